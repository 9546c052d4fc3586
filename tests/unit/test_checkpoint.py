"""Checkpoints on a disk: whole ones are found, damaged ones are not believed."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedhpc.config import Checkpoints
from fedhpc.errors import CheckpointError, PlatformError
from fedhpc.federation import plain
from fedhpc.federation.checkpoint import Checkpoint, CheckpointStore, read
from fedhpc.federation.states import ClientStates
from fedhpc.paths import RunPaths, checkpointed_rounds

FILES = ("model.safetensors", "state.json", "state.bin", "SHA256SUMS")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = RunPaths(tmp_path)
    made.checkpoints.mkdir()
    made.states.mkdir()
    return made


def store(paths: RunPaths, attempt: int = 1, **settings: object) -> CheckpointStore:
    return CheckpointStore(paths, Checkpoints.model_validate(settings), attempt)


def checkpoint(server_round: int, **more: object) -> Checkpoint:
    arrays = ArrayRecord({"w": Array(np.full((2, 3), server_round, dtype=np.float32))})
    parts = {"history": plain.encode({"loss": [0.1] * server_round, "raw": np.arange(4)})}
    return Checkpoint(server_round, arrays, parts, **more)  # type: ignore[arg-type]


def write(paths: RunPaths, *rounds: int, **settings: object) -> None:
    writer = store(paths, **settings)
    for server_round in rounds:
        writer.save(checkpoint(server_round), due=True)
    writer.close()


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_a_checkpoint_comes_back_as_it_was(paths: RunPaths) -> None:
    write(paths, 3)
    found = store(paths).load_newest()
    assert found is not None
    assert found.server_round == 3
    assert found.arrays["w"].numpy().tolist() == [[3.0] * 3] * 2
    history = plain.decode(found.parts["history"])
    assert history["loss"] == [0.1] * 3
    assert history["raw"].tolist() == [0, 1, 2, 3]


def test_where_there_is_none_none_is_found(paths: RunPaths) -> None:
    assert store(paths).load_newest() is None
    (paths.checkpoints / ".round-00001.host.1.tmp").mkdir()  # a server was killed as it wrote
    assert store(paths).load_newest() is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_one_is_named_and_the_one_before_it_used(
    paths: RunPaths, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(paths, 1, 2)
    damage(paths.checkpoint(2) / name, how)
    found = store(paths).load_newest()
    assert found is not None
    assert found.server_round == 1
    assert "round-00002 is damaged" in caplog.text
    # The round is done again, and its checkpoint replaced.
    write(paths, 2)
    assert read(paths, 2).server_round == 2


def test_where_all_are_damaged_the_run_does_not_begin_anew_in_silence(paths: RunPaths) -> None:
    write(paths, 1, 2)
    for server_round in (1, 2):
        damage(paths.checkpoint(server_round) / "state.bin", "changed")
    with pytest.raises(CheckpointError, match=r"only damaged ones: .*round-00002 is damaged"):
        store(paths).load_newest()


def test_the_last_ones_and_the_best_are_kept(paths: RunPaths) -> None:
    writer = store(paths, keep=2, best_metric="accuracy")
    for server_round, accuracy in enumerate([0.1, 0.9, 0.5, float("nan"), 0.7, 0.6], start=1):
        writer.save(checkpoint(server_round, metrics={"accuracy": accuracy}), due=True)
    writer.close()
    assert checkpointed_rounds(paths) == [2, 5, 6]
    assert paths.best_checkpoint.resolve() == paths.checkpoint(2)
    # The next server knows which is the best.
    later = store(paths, keep=2, best_metric="accuracy")
    later.load_newest()
    for server_round in (7, 8):
        later.save(checkpoint(server_round, metrics={"accuracy": 0.8}), due=True)
    later.close()
    assert checkpointed_rounds(paths) == [2, 7, 8]


def test_the_best_may_be_the_lowest(paths: RunPaths) -> None:
    writer = store(paths, keep=1, best_metric="loss", best_mode="min")
    for server_round, loss in enumerate([0.5, 0.2, 0.3], start=1):
        writer.save(checkpoint(server_round, metrics={"loss": loss}), due=True)
    writer.close()
    assert checkpointed_rounds(paths) == [2, 3]


def test_one_that_was_not_due_is_written_at_the_end(paths: RunPaths) -> None:
    writer = store(paths)
    writer.save(checkpoint(2), due=True)
    writer.save(checkpoint(3), due=False)
    assert checkpointed_rounds(paths) in ([], [2])
    writer.close()
    assert checkpointed_rounds(paths) == [2, 3]
    assert writer.last_round == 3


def test_a_server_that_another_one_has_followed_writes_none(paths: RunPaths) -> None:
    paths.attempt(1).touch()
    paths.attempt(2).touch()
    write(paths, 5)
    assert checkpointed_rounds(paths) == []


def test_a_disk_that_takes_none_is_an_error_at_the_next_one(paths: RunPaths) -> None:
    writer = store(paths)
    paths.checkpoints.rmdir()
    paths.checkpoints.write_text("a file in the place of the folder")
    writer.save(checkpoint(1), due=True)
    with pytest.raises(PlatformError, match="could not write a checkpoint"):
        writer.save(checkpoint(2), due=True)
    with pytest.raises(PlatformError, match="could not write a checkpoint"):
        writer.close()


def test_writing_does_not_hold_up_the_round(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_sync = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: may_sync.wait(30))
    writer = store(paths)
    start_s = time.monotonic()
    writer.save(checkpoint(1), due=True)
    assert time.monotonic() - start_s < 5
    assert checkpointed_rounds(paths) == []
    with pytest.raises(PlatformError, match="not written within"):
        writer.close(0.1)
    may_sync.set()


def test_files_of_client_states_stay_as_long_as_a_checkpoint_needs_them(paths: RunPaths) -> None:
    writer = store(paths, keep=2)
    states = ClientStates(paths, 0, writer.refers_to)

    def after(server_round: int) -> None:
        state = RecordDict({"m": ArrayRecord({"v": Array(np.full(9, server_round))})})
        states.put(1, state)
        captured, names = states.capture()
        parts = {"states": plain.encode(captured)}
        made = Checkpoint(server_round, ArrayRecord(), parts, names)
        writer.save(made, due=True)

    for server_round in range(1, 6):
        after(server_round)
    writer.close()
    assert 2 <= len(list(paths.states.iterdir())) <= 4  # of the last ones, or not looked for since
    for server_round in (4, 5):
        found = read(paths, server_round)
        fresh = ClientStates(paths, 0, writer.refers_to)
        fresh.restore(plain.decode(found.parts["states"]))
        state = fresh.get(1)
        assert state is not None
        assert state.array_records["m"]["v"].numpy().tolist() == [server_round] * 9
    assert len(list(paths.states.iterdir())) == 2


def test_files_of_a_checkpoint_that_is_not_due_yet_stay_too(paths: RunPaths) -> None:
    writer = store(paths)
    states = ClientStates(paths, 0, writer.refers_to)
    states.put(1, RecordDict({"m": ArrayRecord({"v": Array(np.arange(9))})}))
    captured, names = states.capture()
    parts = {"states": plain.encode(captured)}
    writer.save(Checkpoint(1, ArrayRecord(), parts, names), due=False)
    # The next round has replaced the state by the time that the server is stopped.
    states.put(1, RecordDict({"m": ArrayRecord({"v": Array(np.arange(8))})}))
    writer.close()
    assert read(paths, 1).state_files == names


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(paths: RunPaths) -> None:
    write(paths, 4, 6)
    damage(paths.checkpoint(6) / "state.bin", "changed")
    writer = store(paths, keep=2)
    found = writer.load_newest()
    assert found is not None
    assert found.server_round == 4
    writer.save(checkpoint(8), due=True)
    writer.close()
    assert checkpointed_rounds(paths) == [4, 8]


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_a_checkpoint_with_a_damaged_state_of_a_client_is_damaged(
    paths: RunPaths, how: str
) -> None:
    states = ClientStates(paths, 0)
    states.put(1, RecordDict({"m": ArrayRecord({"v": Array(np.arange(9))})}))
    captured, names = states.capture()
    writer = store(paths)
    writer.save(Checkpoint(1, ArrayRecord(), {"s": plain.encode(captured)}, names), due=True)
    writer.close()
    assert read(paths, 1).state_files == names
    (file,) = paths.states.iterdir()
    damage(file, how)
    with pytest.raises(CheckpointError, match="damaged"):
        read(paths, 1)
