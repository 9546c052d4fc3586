"""Slots, gates and memory come back whoever is killed, and wherever its fit was."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import entries
import pytest
import slot_entries
from entries import GONE_WITHIN_S, Background, wait_until
from slot_entries import KEY, STAGES, WAITING, slot_in

from fedhpc.errors import FitCancelled, FitDied, FitKilled, ForkServerDied, PlatformError
from fedhpc.isolation import ChildPool, PoolOptions
from fedhpc.isolation.locks import SlotGroup

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    value = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, value)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    leftovers = entries.nothing_is_left(value)
    next(leftovers)
    yield value
    next(leftovers, None)
    assert list(temporary.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "locks"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@contextlib.contextmanager
def rival(stage: str, folder: Path) -> Iterator[None]:
    """Hold what the fit of this stage has to wait for."""
    group = SlotGroup(folder, KEY)
    if stage == "waiting in the queue":
        with group.gate() as gate:
            gate.announce("a rival")
            yield
    elif stage == "waiting as the first":
        lock = group.take(1)
        assert lock is not None
        yield
        lock.release()
    else:
        yield


def is_free(folder: Path) -> bool:
    """Whether nobody holds a slot or stands in the gate."""
    if SlotGroup(folder, KEY).holders() or SlotGroup(folder, KEY).gate().waiting():
        return False
    with (folder / f"{KEY}.gate").open("rb") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def check_that_the_next_fit_gets_the_slot(folder: Path) -> None:
    assert wait_until(lambda: is_free(folder)), SlotGroup(folder, KEY).holders()
    card = slot_entries.Card()
    options = PoolOptions(preload=["json"], standby=False)
    with ChildPool(options, card) as pool:  # type: ignore[arg-type]
        reply = slot_entries.run(pool, "entries:add", 1, 2, slot=slot_in(folder))
        assert entries.read(reply.buffers[0]) == b"3"
        assert reply.wait_s < GONE_WITHIN_S
        reply.close()
    assert len(list(folder.iterdir())) == 2  # the slot and the gate


@pytest.mark.parametrize("stage", STAGES)
def test_a_slot_is_free_after_its_owner_is_killed(
    stage: str, folder: Path, marker: Path, token: str
) -> None:
    with rival(stage, folder):
        owner = subprocess.Popen(
            [sys.executable, HERE / "slot_entries.py", stage, folder, marker],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == "reached\n"
            assert len(entries.processes_with(token)) > 2
        finally:
            owner.kill()
            owner.communicate(timeout=5)
        assert wait_until(lambda: not entries.processes_with(token)), entries.processes_with(token)
    check_that_the_next_fit_gets_the_slot(folder)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim", ["fork server", "child", "cancelled child"])
def test_a_slot_is_free_after_the_end_of_its(
    victim: str, stage: str, folder: Path, marker: Path, token: str
) -> None:
    with slot_entries.pool_for(stage, marker) as pool:
        with rival(stage, folder):
            running = Background(slot_entries.begin, pool, stage, folder, marker)
            assert wait_until(lambda: slot_entries.reached(pool, stage, marker), 20)
            assert wait_until(lambda: len(pool.children()) == 1)  # the fork server tells later
            before = [pid for pid, _ in entries.processes_with(token)]
            (child,) = pool.children()
            expected: type[FitDied] = FitKilled
            if victim == "fork server":
                expected = ForkServerDied
                os.kill(entries.fork_server_of(os.getpid()), signal.SIGKILL)
            elif victim == "child":
                os.kill(child, signal.SIGKILL)
            else:
                expected = FitCancelled
                pool.cancel("it")
            with pytest.raises(expected) as caught:
                running.result(GONE_WITHIN_S)
            assert type(caught.value) is expected
            left = [] if victim == "fork server" else [pool.fork_server()]
            assert wait_until(lambda: [pid for pid in before if entries.is_alive(pid)] == left)
            assert pool.waiting() == []
        check_that_the_next_fit_gets_the_slot(folder)


@pytest.mark.parametrize("stage", WAITING)
def test_a_fit_that_waited_runs_when_what_it_waits_for_is_there(
    stage: str, folder: Path, marker: Path
) -> None:
    with slot_entries.pool_for(stage, marker) as pool:
        with rival(stage, folder):
            running = Background(slot_entries.run, pool, "entries:add", 1, 2, slot=slot_in(folder))
            assert wait_until(lambda: slot_entries.reached(pool, stage, marker), 20)
            time.sleep(0.1)
            assert running.running()
        if stage == "waiting for memory":
            pool._nvml.free_bytes = 80 * slot_entries.GB  # type: ignore[union-attr]
        reply = running.result(GONE_WITHIN_S)
        assert reply.wait_s >= 0.1
        reply.close()
    assert is_free(folder)


def test_what_a_killed_waiter_wrote_into_the_gate_is_not_believed(
    folder: Path, marker: Path
) -> None:
    stage = "waiting as the first"
    with slot_entries.pool_for(stage, marker) as pool:
        with rival(stage, folder):
            running = Background(slot_entries.begin, pool, stage, folder, marker)
            assert wait_until(lambda: SlotGroup(folder, KEY).gate().waiting() != "", 20)
            assert wait_until(lambda: len(pool.children()) == 1)
            (child,) = pool.children()
            os.kill(child, signal.SIGKILL)
            with pytest.raises(FitKilled):
                running.result(GONE_WITHIN_S)
        assert (folder / f"{KEY}.gate").read_bytes().strip()
        with SlotGroup(folder, KEY).gate():
            assert SlotGroup(folder, KEY).gate().waiting() == ""


def test_a_lock_file_that_cannot_be_used_is_told_with_its_path(folder: Path, marker: Path) -> None:
    (folder / f"{KEY}.0").symlink_to(marker)
    with slot_entries.pool_for("training", marker) as pool:
        with pytest.raises(PlatformError, match=r"isolation.lock_dir.*GPU-test.0") as caught:
            slot_entries.run(pool, "entries:add", 1, 2, slot=slot_in(folder))
        assert caught.value.hint is not None
        (folder / f"{KEY}.0").unlink()
        check_that_the_next_fit_gets_the_slot(folder)
