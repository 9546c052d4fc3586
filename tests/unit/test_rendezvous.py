"""The address file: who believes it, and who may write it."""

import errno
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedhpc import files, rendezvous
from fedhpc.errors import RendezvousTimeout, Superseded
from fedhpc.paths import RunPaths, latest_attempt
from fedhpc.rendezvous import Fence, Publisher, Rendezvous, Seeker

SHORT_S = 0.15
LONG_S = 20.0


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    root = tmp_path / "digits-20260101-120000-abcd"
    root.mkdir()
    return RunPaths(root)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(paths: RunPaths, **changes: object) -> Rendezvous:
    first = Rendezvous(
        run_id=paths.run_id,
        attempt=1,
        address="10.0.0.7:50051",
        host="node7",
        pid=4711,
        job_id="1234",
        phase="serving",
        heartbeat=1,
    )
    return replace(first, **changes)  # type: ignore[arg-type]


def publish(paths: RunPaths, **changes: object) -> Rendezvous:
    found = record(paths, **changes)
    files.write_json(paths.rendezvous, asdict(found))
    return found


def go_on() -> bool:
    return False


def why_not(seeker: Seeker) -> str:
    with pytest.raises(RendezvousTimeout) as caught:
        seeker.wait(SHORT_S, go_on)
    return str(caught.value)


@contextmanager
def later(action: Callable[[], object], after_s: float = 0.2) -> Iterator[None]:
    timer = threading.Timer(after_s, action)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join(LONG_S)


def found_later(seeker: Seeker, action: Callable[[], object]) -> Rendezvous | None:
    """Return what is found when the action comes a moment after the wait has begun."""
    with later(action):
        return seeker.wait(LONG_S, go_on)


# --- Seeker ---------------------------------------------------------------------------------------


def test_a_published_server_is_found_at_once(paths: RunPaths) -> None:
    published = publish(paths)
    assert Seeker(paths, "1234").wait(0, go_on) == published


def test_a_server_that_is_published_later_is_found(paths: RunPaths) -> None:
    assert found_later(Seeker(paths, "1"), lambda: publish(paths)) == record(paths)


def test_the_deadline_names_the_path_and_the_server_job(paths: RunPaths) -> None:
    message = why_not(Seeker(paths, "1234"))
    assert str(paths.rendezvous) in message
    assert "server job 1234" in message
    assert "it does not exist" in message
    assert "Hint: " in message
    assert RendezvousTimeout("").exit_code == 75


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00\x00",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"{}",
        b"\xff\xfe",
    ],
)
def test_garbage_is_waited_out(paths: RunPaths, content: bytes) -> None:
    paths.rendezvous.write_bytes(content)
    seeker = Seeker(paths, "1")
    assert "it is half-written or garbage" in why_not(seeker)
    assert found_later(seeker, lambda: publish(paths)) == record(paths)


def test_every_half_of_a_file_is_waited_out(paths: RunPaths) -> None:
    publish(paths)
    whole = paths.rendezvous.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        paths.rendezvous.write_bytes(whole[:length])
        assert rendezvous.read(paths) is None
    paths.rendezvous.write_bytes(whole)
    assert rendezvous.read(paths) == record(paths)


@pytest.mark.parametrize("field", list(Rendezvous.__dataclass_fields__))
def test_a_field_that_is_missing_or_of_another_type_is_garbage(paths: RunPaths, field: str) -> None:
    value = asdict(record(paths))
    files.write_json(paths.rendezvous, {key: value[key] for key in value if key != field})
    assert rendezvous.read(paths) is None
    files.write_json(paths.rendezvous, value | {field: [value[field]]})
    assert rendezvous.read(paths) is None


def test_a_field_of_a_later_version_is_ignored(paths: RunPaths) -> None:
    files.write_json(paths.rendezvous, asdict(record(paths)) | {"more": 1})
    assert rendezvous.read(paths) == record(paths)


def test_a_file_of_another_run_is_not_believed(paths: RunPaths) -> None:
    publish(paths, run_id="mnist-20260101-120000-ffff")
    seeker = Seeker(paths, "1")
    assert "it is of another run, mnist-20260101-120000-ffff" in why_not(seeker)
    assert found_later(seeker, lambda: publish(paths)) == record(paths)


def test_a_file_of_an_older_attempt_is_not_believed(paths: RunPaths) -> None:
    publish(paths, attempt=2)
    seeker = Seeker(paths, "1")
    assert seeker.wait(0, go_on) == record(paths, attempt=2)
    publish(paths, attempt=1, heartbeat=99)
    assert "it is of attempt 1, older than 2" in why_not(seeker)
    third = found_later(seeker, lambda: publish(paths, attempt=3, address="10.0.0.8:1"))
    assert third == record(paths, attempt=3, address="10.0.0.8:1")


def test_a_lost_server_is_not_believed_while_its_counter_stands(paths: RunPaths) -> None:
    seeker = Seeker(paths, "1")
    found = seeker_finds(seeker, publish(paths, heartbeat=7))
    seeker.failed(found)
    message = why_not(seeker)
    assert "its heartbeat stands still at 7" in message
    assert "10.0.0.7:50051 could not be reached" in message


def seeker_finds(seeker: Seeker, published: Rendezvous) -> Rendezvous:
    found = seeker.wait(0, go_on)
    assert found == published
    return published


@pytest.mark.parametrize(
    "change", [{"heartbeat": 8}, {"heartbeat": 3}, {"attempt": 2}, {"phase": "finished"}]
)
def test_a_lost_server_is_believed_again_when_its_file_moves(
    paths: RunPaths, change: dict[str, object]
) -> None:
    seeker = Seeker(paths, "1")
    found = seeker_finds(seeker, publish(paths, heartbeat=7))
    seeker.failed(found)
    moved = {"heartbeat": 7} | change
    assert found_later(seeker, lambda: publish(paths, **moved)) == record(paths, **moved)


def test_a_server_that_is_being_requeued_is_waited_for(paths: RunPaths) -> None:
    publish(paths, phase="requeueing", heartbeat=5)
    seeker = Seeker(paths, "1")
    assert "the server of attempt 1 is being requeued" in why_not(seeker)
    second = found_later(seeker, lambda: publish(paths, attempt=2))
    assert second == record(paths, attempt=2)


@pytest.mark.parametrize("phase", ["finished", "failed"])
def test_a_server_that_has_ended_is_returned(paths: RunPaths, phase: str) -> None:
    published = publish(paths, phase=phase)
    assert Seeker(paths, "1").wait(0, go_on) == published


def test_a_file_that_is_deleted_in_the_middle_is_waited_for(paths: RunPaths) -> None:
    seeker = Seeker(paths, "1")
    found = seeker_finds(seeker, publish(paths))
    seeker.failed(found)
    paths.rendezvous.unlink()
    assert "it does not exist" in why_not(seeker)
    assert found_later(seeker, lambda: publish(paths, heartbeat=2)) == record(paths, heartbeat=2)


def test_a_folder_that_does_not_exist_yet_is_waited_for(paths: RunPaths) -> None:
    paths.root.rmdir()
    seeker = Seeker(paths, "1")
    assert "it does not exist" in why_not(seeker)

    def appear() -> None:
        paths.root.mkdir()
        publish(paths)

    assert found_later(seeker, appear) == record(paths)


def test_a_stop_ends_the_wait(paths: RunPaths) -> None:
    stop = threading.Event()
    with later(stop.set):
        assert Seeker(paths, "1").wait(LONG_S, stop.is_set) is None


def test_a_stop_counts_more_than_a_server(paths: RunPaths) -> None:
    publish(paths)
    assert Seeker(paths, "1").wait(LONG_S, lambda: True) is None


# --- Publisher ------------------------------------------------------------------------------------


@pytest.fixture
def _fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "BEAT_S", 0.02)


def current(paths: RunPaths) -> Rendezvous:
    found = rendezvous.read(paths)
    assert found is not None
    return found


@contextmanager
def publisher(paths: RunPaths, attempt: int = 1) -> Iterator[tuple[Publisher, threading.Event]]:
    assert files.claim(paths.attempt(attempt))
    superseded = threading.Event()
    made = Publisher(paths, record(paths, attempt=attempt, heartbeat=0), superseded.set)
    made.start()
    try:
        yield made, superseded
    finally:
        made.end("failed")


@pytest.mark.usefixtures("_fast_beats")
def test_a_publisher_is_found_at_once_and_its_counter_moves(paths: RunPaths) -> None:
    with publisher(paths):
        first = current(paths)
        assert first == record(paths, heartbeat=first.heartbeat)
        moved = files.wait_until(lambda: current(paths).heartbeat > first.heartbeat + 3, LONG_S)
        assert moved


@pytest.mark.usefixtures("_fast_beats")
def test_no_time_is_in_the_file(paths: RunPaths) -> None:
    with publisher(paths):
        value = json.loads(paths.rendezvous.read_bytes())
    assert set(value) == {
        "run_id",
        "attempt",
        "address",
        "host",
        "pid",
        "job_id",
        "phase",
        "heartbeat",
    }


@pytest.mark.usefixtures("_fast_beats")
def test_a_deleted_file_comes_back_with_the_next_beat(paths: RunPaths) -> None:
    with publisher(paths):
        paths.rendezvous.unlink()
        assert files.wait_until(paths.rendezvous.exists, LONG_S)


@pytest.mark.parametrize("phase", ["finished", "failed", "requeueing"])
@pytest.mark.usefixtures("_fast_beats")
def test_the_end_publishes_the_phase_and_beats_no_more(paths: RunPaths, phase: str) -> None:
    with publisher(paths) as (made, superseded):
        before = current(paths).heartbeat
        made.end(phase)  # type: ignore[arg-type]
        last = current(paths)
        assert last.phase == phase
        assert last.heartbeat > before
        assert not files.wait_until(lambda: current(paths) != last, SHORT_S)
        assert not superseded.is_set()


@pytest.mark.usefixtures("_fast_beats")
def test_a_server_with_a_higher_attempt_silences_the_old_one(paths: RunPaths) -> None:
    with publisher(paths) as (made, superseded):
        assert files.claim(paths.attempt(2))
        assert superseded.wait(LONG_S)
        newer = publish(paths, attempt=2, address="10.0.0.8:1")
        assert not files.wait_until(lambda: current(paths) != newer, SHORT_S)
        made.end("finished")
        assert current(paths) == newer


@pytest.mark.usefixtures("_fast_beats")
def test_a_disk_that_fails_for_a_moment_does_not_end_the_beats(paths: RunPaths) -> None:
    with publisher(paths) as (_, superseded):
        away = paths.root.with_name("away")
        paths.root.rename(away)
        assert not superseded.wait(SHORT_S)
        away.rename(paths.root)
        before = current(paths).heartbeat
        assert files.wait_until(lambda: current(paths).heartbeat > before, LONG_S)


@pytest.mark.usefixtures("_fast_beats")
def test_a_seeker_follows_a_server_to_its_next_attempt(paths: RunPaths) -> None:
    seeker = Seeker(paths, "1")
    with publisher(paths, attempt=1):
        first = seeker.wait(LONG_S, go_on)
        assert first is not None
        assert first.attempt == 1
    seeker.failed(current(paths))
    with publisher(paths, attempt=2):
        second = seeker.wait(LONG_S, go_on)
        assert second is not None
        assert second.attempt == 2


def test_attempts_are_counted_whatever_else_lies_in_the_folder(paths: RunPaths) -> None:
    assert latest_attempt(paths) == 0
    for number in (1, 2, 12, 10_000):
        assert files.claim(paths.attempt(number))
        (paths.root / f"attempt-{number}x").touch()
        assert latest_attempt(paths) == number
    assert len(names(paths.root)) == 8


# --- two servers, and a disk that fails -----------------------------------------------------------


def test_a_server_that_has_not_published_yet_makes_the_older_file_unbelievable(
    paths: RunPaths,
) -> None:
    publish(paths, phase="failed")  # of attempt 1, which has ended
    assert files.claim(paths.attempt(1))
    assert files.claim(paths.attempt(2))
    seeker = Seeker(paths, "1")
    assert "it is of attempt 1, and attempt 2 has not published yet" in why_not(seeker)
    assert found_later(seeker, lambda: publish(paths, attempt=2)) == record(paths, attempt=2)


def test_a_fence_stands_as_soon_as_a_higher_attempt_is_claimed_and_for_ever(
    paths: RunPaths,
) -> None:
    assert files.claim(paths.attempt(1))
    fence = Fence(paths, 1)
    fence.check()
    assert not fence.is_passed()
    assert files.claim(paths.attempt(2))
    with pytest.raises(Superseded, match="attempt 2 of the server has come; this one, attempt 1"):
        fence.check()
    paths.attempt(2).unlink()
    assert fence.is_passed()
    Fence(paths, 2).check()


def test_a_disk_that_does_not_tell_of_attempts_makes_a_write_wait_and_not_pass(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[object] = [OSError(errno.ESTALE, "Stale"), OSError(errno.EIO, "I/O"), 2]

    def latest(_: RunPaths) -> int:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(answer, int)
        return answer

    monkeypatch.setattr(rendezvous, "latest_attempt", latest)
    with files.fenced(Fence(paths, 1).check), pytest.raises(Superseded):
        files.append_line(paths.metrics, {"round": 1})
    assert answers == []
    assert paths.metrics.read_bytes() == b""


@pytest.mark.usefixtures("_fast_beats")
def test_a_publisher_survives_whatever_goes_wrong_and_says_it_once(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with publisher(paths):
        real = files.write_json
        tried: list[int] = []

        def fail(*_: object, **__: object) -> None:
            tried.append(1)
            raise MemoryError

        monkeypatch.setattr(files, "write_json", fail)
        assert files.wait_until(lambda: len(tried) > 3, LONG_S)
        monkeypatch.setattr(files, "write_json", real)
        before = current(paths).heartbeat
        assert files.wait_until(lambda: current(paths).heartbeat > before, LONG_S)
    assert caplog.text.count("could not refresh the rendezvous") == 1
