"""Replies that cannot be used: what is said of them, and that no others are refused."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedhpc.federation.updates import is_train, non_finite, odd_ones_out


def records(metrics: dict[str, Any] | None = None, **arrays: Any) -> RecordDict:
    """Return one record of arrays (lists are float32), one of metrics, and a config."""
    found = {
        name: Array(value if isinstance(value, np.ndarray) else np.array(value, np.float32))
        for name, value in arrays.items()
    }
    content = RecordDict({"arrays": ArrayRecord(found), "config": ConfigRecord({"any": 1})})
    if metrics is not None:
        content["metrics"] = MetricRecord(metrics)
    return content


def said_of(reply: RecordDict, sent: RecordDict | None = None) -> str:
    return non_finite(reply, lambda: sent or RecordDict())


def odd(
    sent: RecordDict, *replies: RecordDict, arrays: bool = True, metrics: bool = False
) -> dict[int, str]:
    return odd_ones_out([(sent, reply) for reply in replies], arrays=arrays, metrics=metrics)


# --- NaN and Inf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "complex64"])
def test_values_that_are_no_numbers_are_counted_and_the_first_array_is_named(dtype: str) -> None:
    bad = np.array([[1, np.nan], [np.inf, -np.inf]], dtype)
    reply = records(a=[1, 2], b=bad, c=[np.nan])
    assert said_of(reply) == "4 of 7 values are NaN or Inf, first in 'b'"
    fortran = records(b=np.asfortranarray(bad))
    assert said_of(fortran) == "3 of 4 values are NaN or Inf, first in 'b'"


def test_other_types_empty_arrays_scalars_and_metrics_are_fine() -> None:
    reply = records(
        {"loss": float("nan")},
        count=np.array(3),
        none=np.zeros((0, 4), np.float32),
        flags=np.array([True]),
        whole=np.array([2**62]),
    )
    assert said_of(reply) == ""
    reply["raw"] = ArrayRecord({"r": Array("float32", (4,), "another.kind", b"\xff" * 16)})
    assert said_of(reply) == ""


def test_infinities_that_were_sent_may_come_back_but_no_others() -> None:
    mask = [0.0, -np.inf, -np.inf]
    assert said_of(records(mask=mask), records(mask=mask)) == ""
    found = said_of(records(mask=[0.0, -np.inf, np.inf]), records(mask=mask))
    assert found == "1 of 3 values are NaN or Inf, first in 'mask'"
    assert said_of(records(mask=[np.nan]), records(mask=[np.nan])) != ""


@pytest.mark.parametrize(
    ("verb", "expected"), [("train", True), ("train.head", True), ("evaluate", False)]
)
def test_training_is_known_by_the_type_of_its_message(verb: str, expected: bool) -> None:
    assert is_train(verb) is expected


# --- odd ones out --------------------------------------------------------------------------------

SENT = records(w=[0, 0, 0], b=[0])
GOOD = records(w=[1, 2, 3], b=[4])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (records(w=[1, 2], b=[4]), "'w' as float32 (2,) instead of float32 (3,)"),
        (records(w=np.zeros(3), b=[4]), "'w' as float64 (3,) instead of float32 (3,)"),
        (records(w=[1, 2, 3]), "no 'b'"),
        (records(w=[1, 2, 3], b=[4], c=[5]), "'c' that nobody wants"),
        (records(v=[1, 2, 3], b=[4]), "no 'w', 'v' that nobody wants"),
    ],
)
def test_a_reply_unlike_the_message_is_odd_where_half_are_like_it(
    reply: RecordDict, reason: str
) -> None:
    found = odd(SENT, GOOD, reply, GOOD)
    assert list(found) == [1]
    assert reason in found[1]
    assert list(odd(SENT, reply, GOOD)) == [0]  # a tie: what was sent decides


def test_replies_in_another_form_than_the_message_are_compared_with_each_other() -> None:
    delta, other = records(delta=[1, 2]), records(delta=[1, 2, 3])
    found = odd(SENT, delta, delta, other, delta)
    assert list(found) == [2]
    assert "'delta' as float32 (3,) instead of float32 (2,)" in found[2]
    assert list(odd(SENT, delta, delta, GOOD, delta)) == [2]
    wide = records(w=np.zeros(3), b=np.zeros(1))  # of another type than what was sent
    assert list(odd(SENT, wide, wide, wide, records(w=np.zeros(2), b=np.zeros(1)))) == [3]


def test_where_no_half_agrees_nobody_is_odd() -> None:
    assert odd(SENT, records(a=[1]), records(b=[1, 2]), records(c=[1, 2, 3])) == {}
    assert odd(SENT, records(a=[1])) == {}
    assert odd(SENT, records(a=[1]), records(b=[1])) == {}


def test_arrays_that_are_as_long_as_the_data_makes_them_may_agree_by_chance() -> None:
    """As in FedXgbBagging: each reply is a tree, sent is the forest."""
    forest = records(trees=np.zeros(10, np.uint8))
    trees = [records(trees=np.zeros(size, np.uint8)) for size in (5, 5, 7)]
    assert odd(forest, *trees) == {}
    assert list(odd(forest, *trees, records(twigs=np.zeros(5, np.uint8)))) == [3]


def test_clients_with_models_of_their_own_sizes_are_not_odd() -> None:
    """As in HeteroFL: each reply is like the message that it answers."""
    small, large = records(w=[0]), records(w=[0, 0])
    pairs = [(small, small), (large, large), (small, small), (large, small)]
    assert list(odd_ones_out(pairs, arrays=True, metrics=False)) == [3]


def test_metrics_are_compared_by_name_and_length_if_at_all() -> None:
    plain = [records({"loss": 0.5, "n": n}, w=[1]) for n in (1, 2, 3)]
    other = records({"loss": 1}, w=[1])
    long = records({"loss": [0.5, 0.6], "n": 1}, w=[1])
    assert odd(records(w=[0]), *plain, other, long) == {}
    found = odd(records(w=[0]), *plain, other, long, metrics=True)
    assert list(found) == [3, 4]
    assert "no 'n'" in found[3]
    assert "'loss' as a list of 2 instead of a number" in found[4]
    assert odd(records(), records(a=[1]), records(), records(), arrays=False) == {}
