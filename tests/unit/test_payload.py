"""Messages as bytes and blobs, and back."""

import copy
import hashlib
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from safetensors.numpy import load as load_safetensors

from fedhpc import files
from fedhpc.federation import compat, payload
from fedhpc.federation.mapped import layout_of, record_of
from fedhpc.federation.payload import (
    Blob,
    Encodings,
    Packed,
    decode_arrays,
    encode_arrays,
    map_arrays,
)

PLAIN = [
    "float64", "float32", "float16", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip
RAW = [">f4", "<c8", "complex128", "S3", "U2", "datetime64[s]"]  # safetensors has no such types


@pytest.fixture(autouse=True)
def _identity() -> None:
    compat.set_identity("test-run")  # messages can be made, as in a ServerApp


def content_of(blob: Blob) -> bytes:
    return b"".join(bytes(part) for part in blob.parts)


def travelled(arrays: ArrayRecord) -> ArrayRecord:
    blob = encode_arrays(arrays)
    skeleton = compat.without_data(arrays)
    return decode_arrays(skeleton, memoryview(content_of(blob)))


def record(**arrays: np.ndarray) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def values(dtype: str) -> np.ndarray:
    if dtype == "bool":
        return np.array([[True, False, True]] * 2)
    return np.arange(6).reshape(2, 3).astype(dtype)


def assert_same(found: ArrayRecord, expected: ArrayRecord) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert tuple(found[name].shape) == tuple(expected[name].shape)
        assert found[name].stype == expected[name].stype
        if expected[name].stype == "numpy.ndarray":
            wanted, got = expected[name].numpy(), found[name].numpy()
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            np.testing.assert_array_equal(got, wanted)
        else:
            assert found[name].data == expected[name].data


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*PLAIN, *RAW])
def test_every_type_of_number_travels(dtype: str) -> None:
    arrays = record(a=values(dtype))
    assert_same(travelled(arrays), arrays)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (1, 1, 1, 1, 1, 1), (2, 3, 4)])
def test_every_shape_travels(shape: tuple[int, ...]) -> None:
    arrays = record(a=np.full(shape, 2.5, dtype=np.float32), b=np.ones(shape, dtype=np.int64))
    assert_same(travelled(arrays), arrays)


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12.0).reshape(3, 4)[::2, ::-1],
        np.arange(12.0).reshape(3, 4).T,
        np.broadcast_to(np.float32(1), (3, 2)),
    ],
    ids=["Fortran", "strided", "transposed", "broadcast"],
)
def test_every_layout_in_memory_travels(array: np.ndarray) -> None:
    arrays = record(a=array, b=np.arange(3))
    assert_same(travelled(arrays), arrays)


def test_what_is_not_a_number_travels_bit_by_bit() -> None:
    array = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324])
    found = travelled(record(a=array))["a"].numpy()
    assert found.tobytes() == array.tobytes()


def test_arrays_of_another_serialisation_travel_as_they_are() -> None:
    arrays = ArrayRecord(
        {
            "mine": Array("float32", (2,), "my.own.format", b"\x01\x02\x03"),
            "empty": Array("float32", (0,), "my.own.format", b""),
            "numpy": Array(np.arange(3)),
        }
    )
    assert_same(travelled(arrays), arrays)


def test_bytes_that_only_claim_to_be_numpy_travel_as_they_are() -> None:
    arrays = ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", b"not numpy at all")})
    assert travelled(arrays)["a"].data == b"not numpy at all"


def test_a_later_version_of_numpys_format_travels_as_it_is() -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(4), version=(2, 0))
    arrays = ArrayRecord({"a": Array("int64", (4,), "numpy.ndarray", file.getvalue())})
    found = travelled(arrays)
    assert found["a"].data == file.getvalue()
    np.testing.assert_array_equal(found["a"].numpy(), np.arange(4))


def test_a_pytorch_model_travels() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    arrays = ArrayRecord(model.state_dict())
    found = travelled(arrays).to_torch_state_dict()
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_record_without_arrays_travels() -> None:
    assert_same(travelled(ArrayRecord()), ArrayRecord())


@pytest.mark.parametrize("name", ["", "a.b", "größe", 'quo"te', "__metadata__", "a\nb"])
def test_every_name_travels(name: str) -> None:
    arrays = ArrayRecord({name: Array(np.arange(3)), "raw": Array(np.array(["x"]))})
    assert_same(travelled(arrays), arrays)


def test_the_order_of_arrays_is_kept() -> None:
    arrays = record(z=np.arange(3), a=np.arange(2), m=np.arange(1))
    assert list(travelled(arrays)) == ["z", "a", "m"]


def test_what_is_decoded_does_not_change_with_the_buffer() -> None:
    arrays = record(a=np.arange(4))
    buffer = bytearray(content_of(encode_arrays(arrays)))
    found = decode_arrays(compat.without_data(arrays), memoryview(buffer))
    buffer[-8:] = b"\xff" * 8
    np.testing.assert_array_equal(found["a"].numpy(), np.arange(4))


# --- arrays that stay in their blob ----------------------------------------------------------


def mapped(arrays: ArrayRecord) -> ArrayRecord:
    blob = memoryview(content_of(encode_arrays(arrays)))
    return map_arrays(compat.without_data(arrays), blob)


MIXED = [*PLAIN, *RAW]


def mixed() -> ArrayRecord:
    arrays = record(**{f"of {dtype}": values(dtype) for dtype in MIXED})
    arrays["scalar"] = Array(np.array(2.5))
    arrays["empty"] = Array(np.zeros((0, 3), dtype=np.int16))
    arrays["Fortran"] = Array(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    arrays["mine"] = Array("float32", (2,), "my.own.format", b"\x01\x02\x03")
    return arrays


def test_mapped_arrays_are_those_that_were_sent_byte_by_byte() -> None:
    assert_same(mapped(mixed()), mixed())
    assert {name: array.data for name, array in mapped(mixed()).items()} == {
        name: array.data for name, array in mixed().items()
    }
    assert mapped(mixed()) == mixed()
    assert mixed() == mapped(mixed())
    other = mixed()
    other["scalar"] = Array(np.array(3.5))
    assert mapped(mixed()) != other


def test_mapped_arrays_make_the_same_blob_again_without_a_copy() -> None:
    found = mapped(mixed())
    again = encode_arrays(found)
    assert again == encode_arrays(mixed())
    assert content_of(again) == content_of(encode_arrays(mixed()))
    views = [part for part in again.parts[1:] if len(part)]
    assert len({id(view.obj) for view in views if isinstance(view, memoryview)}) == 1


def test_what_a_mapped_array_gives_away_can_be_changed_and_it_stays_as_it_is() -> None:
    array = mapped(record(a=np.arange(4.0)))["a"]
    array.numpy()[:] = 7
    np.testing.assert_array_equal(array.numpy(), np.arange(4.0))


def test_a_mapped_array_takes_other_data() -> None:
    found = mapped(record(a=np.arange(4.0)))
    found["a"].data = Array(np.ones(4)).data
    np.testing.assert_array_equal(found["a"].numpy(), np.ones(4))
    assert encode_arrays(found) == encode_arrays(record(a=np.ones(4)))


def test_a_mapped_record_is_a_record_like_any_other() -> None:
    expected = record(a=np.arange(3), b=np.ones(2), c=np.zeros(1))
    found = mapped(expected)
    before = found.copy()
    for arrays in (found, expected):
        assert arrays.pop("b").numpy().tolist() == [1, 1]
        arrays["d"] = Array(np.array([5.0]))
        arrays["a"] = Array(np.array([6]))
    assert list(found) == list(expected) == ["a", "c", "d"]
    assert len(found) == 3
    assert "b" not in found
    assert found == expected
    with pytest.raises(KeyError):
        found["b"]
    assert list(before) == ["a", "b", "c"]
    assert before["a"].numpy().tolist() == [0, 1, 2]


def test_copies_of_mapped_arrays_need_no_blob() -> None:
    arrays = mapped(record(a=np.arange(4.0)))
    for made in (copy.deepcopy(arrays), pickle.loads(pickle.dumps(arrays))):
        assert type(made["a"]) is Array
        assert made == arrays


def test_a_record_in_a_blob_takes_little_memory_however_many_arrays_it_has() -> None:
    arrays = record(**{f"layer.{i}.weight": np.zeros(i) for i in range(200)})
    skeleton, blob = compat.without_data(arrays), memoryview(content_of(encode_arrays(arrays)))
    map_arrays(skeleton, blob)  # what all of them share
    tracemalloc.start()
    replies = [map_arrays(skeleton, blob) for _ in range(100)]
    assert all(len(list(reply.values())) == 200 for reply in replies)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / len(replies) < 4096


def test_replies_in_files_take_no_memory_before_they_are_read_nor_afterwards(
    tmp_path: Path,
) -> None:
    arrays = record(**{str(i): np.full(2_000_000, i, dtype=np.float32) for i in range(4)})
    blob = encode_arrays(arrays)
    replies, before_mb = [], resident_mb()
    for number in range(4):
        path = tmp_path / str(number)
        files.write_atomic(path, blob.parts)
        replies.append(map_arrays(compat.without_data(arrays), files.map_whole(path, blob.size)))
        path.unlink()
    total = sum(float(array.numpy()[0]) for reply in replies for array in reply.values())
    assert total == 4 * (0 + 1 + 2 + 3)
    assert resident_mb() - before_mb < 16  # of 128 MB; one array is 8 MB


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# --- blobs ---------------------------------------------------------------------------------------


def test_a_blob_opens_with_the_safetensors_library() -> None:
    arrays = record(
        **{f"of {dtype}": values(dtype) for dtype in PLAIN},
        scalar=np.array(3.5, dtype=np.float32),
        empty=np.zeros((0, 4), dtype=np.int16),
    )
    opened = load_safetensors(content_of(encode_arrays(arrays)))
    assert set(opened) == set(arrays)
    for name, array in opened.items():
        expected = arrays[name].numpy()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_a_blob_with_raw_arrays_opens_with_the_safetensors_library() -> None:
    arrays = record(plain=np.arange(3), raw=np.array([1 + 2j]))
    opened = load_safetensors(content_of(encode_arrays(arrays)))
    np.testing.assert_array_equal(opened["plain"], np.arange(3))
    assert opened["raw"].tobytes() == arrays["raw"].data


def test_size_and_digest_are_those_of_the_bytes() -> None:
    blob = encode_arrays(record(a=np.arange(7), b=np.ones((2, 2))))
    assert blob.size == len(content_of(blob))
    assert blob.digest == hashlib.sha256(content_of(blob)).hexdigest()


def test_equal_content_has_an_equal_digest() -> None:
    def made(**changes: Any) -> str:
        arrays = {"a": np.arange(6.0), "b": np.ones(2)} | changes
        return encode_arrays(record(**arrays)).digest

    assert made() == made()
    changed = [
        made(a=np.arange(6.0) + 1),
        made(a=np.arange(6)),
        made(a=np.arange(6.0).reshape(2, 3)),
        made(c=np.ones(1)),
    ]
    assert len({made(), *changed}) == 5


def test_a_blobs_parts_are_views_and_not_copies() -> None:
    array = Array(np.arange(1000.0))
    blob = encode_arrays(ArrayRecord({"a": array}))
    largest = max(blob.parts, key=len)
    assert isinstance(largest, memoryview)
    assert largest.obj is array.data


# --- messages ------------------------------------------------------------------------------------


def message(arrays: ArrayRecord | None = None, client_id: int = 0) -> Message:
    content = RecordDict(
        {
            "arrays": arrays if arrays is not None else record(a=np.arange(3.0)),
            "config": ConfigRecord({"lr": 0.1, "name": "x", "raw": b"\x00\xff", "on": True}),
            "metrics": MetricRecord({"loss": 0.5, "counts": [1, 2]}),
        }
    )
    made = Message(content, dst_node_id=client_id + 1, message_type="train", group_id="3")
    compat.set_message_id(made, f"run-3-{client_id}-train-0")
    return made


def unpacked(packed: Packed) -> tuple[Message, RecordDict]:
    blobs = {blob.digest: memoryview(content_of(blob)) for blob in packed.blobs}
    # As it crosses the wire: the payload as bytes, the blobs apart.
    data = packed.payload.SerializeToString()
    return payload.unpack(type(packed.payload).FromString(data), blobs.__getitem__)


def test_a_message_travels_whole() -> None:
    sent = message()
    got, state = unpacked(payload.pack(sent, None, Encodings()))
    assert state == RecordDict()
    assert got.metadata.message_id == "run-3-0-train-0"
    assert got.metadata.dst_node_id == 1
    assert got.metadata.message_type == "train"
    assert got.metadata.group_id == "3"
    assert list(got.content) == ["arrays", "config", "metrics"]
    assert got.content["config"] == sent.content["config"]
    assert got.content["metrics"] == sent.content["metrics"]
    assert_same(got.content.array_records["arrays"], sent.content.array_records["arrays"])


def test_messages_with_the_same_names_and_shapes_are_not_mixed_up() -> None:
    first, second = (
        unpacked(payload.pack(message(record(a=np.full(3, value))), None, Encodings()))[0]
        for value in (1.0, 2.0)
    )
    first.content.array_records["arrays"]["b"] = Array(np.zeros(1))
    del first.content.array_records["arrays"]["a"]
    assert_same(second.content.array_records["arrays"], record(a=np.full(3, 2.0)))
    third, _ = unpacked(payload.pack(message(record(a=np.full(3, 3.0))), None, Encodings()))
    assert_same(third.content.array_records["arrays"], record(a=np.full(3, 3.0)))


def test_packing_does_not_change_the_message() -> None:
    sent = message()
    before = sent.content.array_records["arrays"]
    payload.pack(sent, RecordDict({"s": record(a=np.ones(2))}), Encodings())
    assert sent.content.array_records["arrays"] is before
    np.testing.assert_array_equal(before["a"].numpy(), np.arange(3.0))


def test_no_array_is_in_the_small_payload() -> None:
    large = np.random.default_rng(0).random(100_000)
    packed = payload.pack(message(record(a=large)), None, Encodings())
    assert packed.payload.ByteSize() < 2000
    assert sum(blob.size for blob in packed.blobs) > large.nbytes


def test_a_client_state_travels_with_its_message() -> None:
    state = RecordDict(
        {
            "momentum": record(v=np.arange(4.0)),
            "arrays": record(other=np.ones(1)),  # the same name as in the message
            "round": ConfigRecord({"seen": 3}),
        }
    )
    got, found = unpacked(payload.pack(message(), state, Encodings()))
    assert list(found) == ["momentum", "arrays", "round"]
    assert found["round"] == state["round"]
    assert_same(found.array_records["momentum"], state.array_records["momentum"])
    assert_same(found.array_records["arrays"], state.array_records["arrays"])
    assert list(got.content.array_records["arrays"]) == ["a"]
    assert list(state.array_records["momentum"]) == ["v"]


@pytest.mark.parametrize("state", [None, RecordDict()])
def test_a_client_without_a_state_has_an_empty_one_at_the_other_end(
    state: RecordDict | None,
) -> None:
    packed = payload.pack(message(), state, Encodings())
    assert not packed.payload.HasField("state")
    assert unpacked(packed)[1] == RecordDict()


def test_an_error_travels() -> None:
    reply = Message(Error(code=3, reason="out of memory"), reply_to=message())
    packed = payload.pack(reply, None, Encodings())
    assert packed.blobs == []
    got, _ = unpacked(packed)
    assert got.has_error()
    assert (got.error.code, got.error.reason) == (3, "out of memory")


def test_an_error_travels_with_a_state() -> None:
    reply = Message(Error(code=3, reason="x"), reply_to=message())
    got, state = unpacked(payload.pack(reply, RecordDict({"s": record(a=np.ones(2))}), Encodings()))
    assert got.has_error()
    np.testing.assert_array_equal(state.array_records["s"]["a"].numpy(), np.ones(2))


def test_a_message_without_arrays_needs_no_blob() -> None:
    sent = Message(RecordDict(), dst_node_id=1, message_type="query")
    packed = payload.pack(sent, None, Encodings())
    assert packed.blobs == []
    got, _ = unpacked(packed)
    assert got.content == RecordDict()


def test_two_records_of_equal_content_are_one_blob() -> None:
    content = RecordDict({"x": record(a=np.arange(3)), "y": record(a=np.arange(3))})
    packed = payload.pack(Message(content, 1, "train"), None, Encodings())
    assert len(packed.blobs) == 1
    got, _ = unpacked(packed)
    assert_same(got.content.array_records["y"], content.array_records["y"])


def test_a_cohorts_common_model_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[ArrayRecord] = []

    def count(arrays: ArrayRecord) -> Blob:
        encoded.append(arrays)
        return encode_arrays(arrays)

    monkeypatch.setattr(payload, "encode_arrays", count)
    model = record(a=np.arange(1000.0))
    cache = Encodings()
    packed = [payload.pack(message(model, client), None, cache) for client in range(20)]
    assert len(encoded) == 1
    assert len({blob.digest for one in packed for blob in one.blobs}) == 1
    assert all(one.blobs[0].parts is packed[0].blobs[0].parts for one in packed)
    assert [unpacked(one)[0].metadata.dst_node_id for one in packed] == list(range(1, 21))


def test_models_that_differ_are_not_mixed_up_in_a_cache() -> None:
    cache = Encodings()
    for client in range(30):  # each record is garbage afterwards: ids could repeat
        packed = payload.pack(message(record(a=np.full(3, client))), None, cache)
        found = unpacked(packed)[0].content.array_records["arrays"]["a"].numpy()
        np.testing.assert_array_equal(found, np.full(3, client))


def test_the_fingerprint_is_of_what_is_asked_and_not_of_when() -> None:
    def ask(step: float = 1.0, weight: float = 1.0, mine: float = 1.0, seed: int = 1) -> str:
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.full(3, weight))}),
                "config": ConfigRecord({"step": step}),
            }
        )
        state = RecordDict({"mine": ArrayRecord({"m": Array(np.full(3, mine))})})
        message = Message(content, dst_node_id=1, message_type="train")
        packed = payload.pack(message, state, Encodings())
        packed.payload.seed = seed
        packed.payload.client_id = 0
        assert packed.payload.message not in seen
        seen.append(packed.payload.message)
        return packed.fingerprint

    seen: list[bytes] = []  # they differ, as Flower writes down when they were made
    assert ask() == ask()
    others = [ask(step=2.0), ask(weight=2.0), ask(mine=2.0), ask(seed=2)]
    assert len({ask(), *others}) == 5


def test_the_record_of_a_state_is_what_flower_makes_of_it() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {
        **model.state_dict(),
        "transposed": torch.arange(6.0).reshape(3, 2).t(),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor(True),
    }
    made, flowers = record_of(state), ArrayRecord(state)
    assert list(made) == list(flowers)
    for name, array in flowers.items():
        assert made[name] == array
        assert made[name].data == array.data


def test_the_layout_of_mapped_arrays_is_that_of_the_arrays() -> None:
    arrays = ArrayRecord({"a": Array(np.zeros((2, 3), "f4")), "b": Array(np.zeros(4, "i8"))})
    over_blob = mapped(arrays)
    expected = {"a": ("float32", (2, 3)), "b": ("int64", (4,))}
    assert layout_of(arrays) == layout_of(over_blob) == expected
    over_blob["b"] = Array(np.zeros((1, 2), "f8"))
    del over_blob["a"]
    assert layout_of(over_blob) == {"b": ("float64", (1, 2))}
    over_blob.clear()
    assert layout_of(over_blob) == {}
