"""The clients' states between their fits, in memory and on disk."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedhpc.errors import PlatformError
from fedhpc.federation.states import ClientStates
from fedhpc.paths import RunPaths

INFINITE = float("inf")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = RunPaths(tmp_path)
    made.states.mkdir()
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(value: float, size: int = 100, record: str = "momentum") -> RecordDict:
    return RecordDict(
        {
            record: ArrayRecord({"v": Array(np.full(size, value))}),
            "seen": ConfigRecord({"rounds": 3, "name": "x"}),
            "loss": MetricRecord({"last": value}),
        }
    )


def assert_is(found: RecordDict | None, expected: RecordDict) -> None:
    assert found is not None
    assert list(found) == list(expected)
    for name, record in expected.items():
        if isinstance(record, ArrayRecord):
            assert list(found.array_records[name]) == list(record)
            for key in record:
                got = found.array_records[name][key].numpy()
                np.testing.assert_array_equal(got, record[key].numpy())
        else:
            assert found[name] == record


@pytest.mark.parametrize("memory_bytes", [0, INFINITE])
def test_a_client_has_no_state_before_it_has_one(paths: RunPaths, memory_bytes: float) -> None:
    states = ClientStates(paths, memory_bytes)
    assert states.get(0) is None
    states.drop(0)
    states.put(1, state(1.0))
    assert states.get(0) is None


def test_within_the_limit_nothing_is_written(paths: RunPaths) -> None:
    states = ClientStates(paths, INFINITE)
    for client in range(5):
        states.put(client, state(client))
    for client in range(5):
        assert_is(states.get(client), state(client))
    assert names(paths.states) == []


def test_beyond_the_limit_states_are_files_and_the_same(paths: RunPaths) -> None:
    states = ClientStates(paths, 2500)  # a state of 100 numbers takes 928 bytes
    for client in range(6):
        states.put(client, state(client))
    assert len(names(paths.states)) == 4
    for _ in range(2):  # reading takes nothing away
        for client in range(6):
            assert_is(states.get(client), state(client))


def test_with_no_memory_at_all_every_state_is_a_file(paths: RunPaths) -> None:
    states = ClientStates(paths, 0)
    states.put(0, state(7.0))
    assert len(names(paths.states)) == 1
    assert_is(states.get(0), state(7.0))


def test_a_state_without_arrays_needs_no_file(paths: RunPaths) -> None:
    states = ClientStates(paths, 0)
    only_config = RecordDict({"c": ConfigRecord({"x": 1})})
    states.put(0, only_config)
    assert_is(states.get(0), only_config)
    assert names(paths.states) == []


@pytest.mark.parametrize("memory_bytes", [0, 1000, INFINITE])
def test_a_new_state_replaces_the_old_one(paths: RunPaths, memory_bytes: float) -> None:
    states = ClientStates(paths, memory_bytes)
    for value in range(5):
        states.put(3, state(value))
        assert_is(states.get(3), state(value))
    assert len(names(paths.states)) == (1 if memory_bytes == 0 else 0)


def test_a_replaced_state_may_change_its_records(paths: RunPaths) -> None:
    states = ClientStates(paths, 0)
    states.put(3, state(1.0, record="old"))
    states.put(3, state(2.0, record="new"))
    assert_is(states.get(3), state(2.0, record="new"))
    assert len(names(paths.states)) == 1


@pytest.mark.parametrize("memory_bytes", [0, INFINITE])
def test_a_dropped_state_is_gone_with_its_files(paths: RunPaths, memory_bytes: float) -> None:
    states = ClientStates(paths, memory_bytes)
    two = state(1.0)
    two["another"] = ArrayRecord({"w": Array(np.ones(3))})
    states.put(0, two)
    states.put(1, state(2.0))
    states.drop(0)
    states.drop(0)
    assert states.get(0) is None
    assert_is(states.get(1), state(2.0))
    states.drop(1)
    assert names(paths.states) == []


def test_memory_that_a_dropped_state_took_is_used_again(paths: RunPaths) -> None:
    states = ClientStates(paths, 1000)
    states.put(0, state(1.0))
    states.put(1, state(2.0))
    assert len(names(paths.states)) == 1
    states.drop(0)
    states.put(2, state(3.0))
    assert len(names(paths.states)) == 1
    states.put(2, state(4.0))
    states.put(2, state(5.0))
    assert len(names(paths.states)) == 1
    assert_is(states.get(1), state(2.0))
    assert_is(states.get(2), state(5.0))


def test_a_state_that_grows_moves_to_disk_and_back(paths: RunPaths) -> None:
    states = ClientStates(paths, 1000)
    for size, files in ((100, 0), (1000, 1), (10, 0)):
        states.put(0, state(1.0, size))
        assert_is(states.get(0), state(1.0, size))
        assert len(names(paths.states)) == files


@pytest.mark.parametrize("record", ["a/b", "..", "", "größe", "a b", "x" * 200])
def test_any_name_of_a_record_makes_a_file_of_the_run_folder(paths: RunPaths, record: str) -> None:
    states = ClientStates(paths, 0)
    states.put(0, state(1.0, record=record))
    assert_is(states.get(0), state(1.0, record=record))
    assert len(names(paths.states)) == 1
    states.drop(0)
    assert names(paths.states) == []


def test_what_was_read_stays_valid_when_the_file_is_replaced(paths: RunPaths) -> None:
    states = ClientStates(paths, 0)
    states.put(0, state(1.0))
    found = states.get(0)
    states.put(0, state(2.0))
    states.drop(0)
    assert_is(found, state(1.0))


def test_a_disk_that_refuses_a_new_state_does_not_lose_the_old_one(paths: RunPaths) -> None:
    states = ClientStates(paths, 1000)
    states.put(0, state(1.0))
    paths.states.rmdir()
    paths.states.write_text("a file in the place of the folder")
    with pytest.raises(PlatformError, match="could not write"):
        states.put(0, state(2.0, size=1000))
    assert_is(states.get(0), state(1.0))
