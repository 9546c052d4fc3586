"""When processes end: deadlines, cancels, kills of any process, and the end of a pool."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import GONE_WITHIN_S, SLOT, Background, call, wait_until

from fedhpc.errors import FedHPCError, FitDied, PlatformError
from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel
from fedhpc.isolation.launcher import Launcher

HERE = Path(__file__).parent
METHODS = ["forkserver", "spawn"]
EVERY_KIND = ["same group", "new session", "daemon", "family of daemons", "fork"]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    value = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, value)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    leftovers = entries.nothing_is_left(value)
    next(leftovers)
    yield value
    next(leftovers, None)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file by which a child tells that it is where the test wants it, usually with its pid."""
    return tmp_path / "marker"


def light(**options: Any) -> PoolOptions:
    return PoolOptions(**{"preload": ["json"], "standby": False, **options})


def reached(marker: Path) -> int:
    """Wait until the marker is written, and return the pid in it, if any."""
    assert wait_until(lambda: marker.exists() and marker.stat().st_size, 20), "never got there"
    return int(marker.read_text())


def all_gone(token: str) -> bool:
    return wait_until(lambda: not entries.processes_with(token))


def only_server_left(token: str, within_s: float = GONE_WITHIN_S) -> bool:
    return wait_until(lambda: len(entries.processes_with(token)) <= 1, within_s)


# --- deadlines and cancels ---


@pytest.mark.parametrize("kind", [[], *([kind] for kind in EVERY_KIND)], ids=str)
def test_at_its_deadline_a_hanging_child_ends_with_all_its_descendants(
    kind: list[str], marker: Path, token: str
) -> None:
    with ChildPool(light()) as pool:
        call(pool, "pid")
        called_s = time.monotonic()
        with pytest.raises(FitDied, match=r"no reply within 1 s; .* killed"):
            call(pool, "hang_with_descendants", str(marker), kind, timeout_s=1)
        assert time.monotonic() - called_s < 1 + GONE_WITHIN_S
        assert marker.exists()
        assert only_server_left(token), entries.processes_with(token)
        assert call(pool, "add", 1, 2) == 3


def test_the_deadline_also_ends_a_spawned_child(marker: Path, token: str) -> None:
    with ChildPool(light(start_method="spawn")) as pool:
        with pytest.raises(FitDied, match="no reply within 2 s"):
            call(pool, "hang_with_descendants", str(marker), ["daemon"], timeout_s=2)
        assert only_server_left(token)
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize("entry", ["stop_self", "close_everything_and_hang"])
def test_a_child_that_cannot_answer_ends_at_its_deadline(entry: str, token: str) -> None:
    with ChildPool(light()) as pool:
        call(pool, "pid")
        called_s = time.monotonic()
        with pytest.raises(FitDied) as caught:
            call(pool, entry, timeout_s=1)
        assert time.monotonic() - called_s < 1 + GONE_WITHIN_S
        assert "fork server ended" not in str(caught.value), "it did not"
        assert only_server_left(token), "the child is still there"
        assert call(pool, "add", 1, 2) == 3


def test_a_deadline_in_prepare_ends_the_child(marker: Path, token: str) -> None:
    options = light(prepare="entries:prepare_slowly", prepare_arg=str(marker))
    with ChildPool(options) as pool:
        with pytest.raises(FitDied, match="not ready within 1 s"):
            call(pool, "pid", timeout_s=1)
        assert only_server_left(token)
        assert call(pool, "add", 1, 2) == 3


def test_a_deadline_during_the_preload_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_module(tmp_path, monkeypatch, tmp_path / "marker")
    with ChildPool(light(preload=["slow_module"])) as pool:
        called_s = time.monotonic()
        with pytest.raises(FitDied, match="not ready within 1 s"):
            call(pool, "pid", timeout_s=1)
        assert time.monotonic() - called_s < 1 + GONE_WITHIN_S + 1


@pytest.mark.parametrize("fits", [1, 0])
@pytest.mark.parametrize("ending", ["answers", "dies"])
def test_what_a_child_leaves_behind_ends_with_it(ending: str, fits: int, token: str) -> None:
    with ChildPool(light(fits_per_process=fits)) as pool:
        if ending == "answers":
            child = call(pool, "leave_descendants", EVERY_KIND)
            if fits == 0:  # it lives on, and may use what it started
                assert len(entries.processes_with(token)) > 2
                os.kill(child, signal.SIGKILL)
        else:
            with pytest.raises(FitDied, match="SIGKILL"):
                call(pool, "die_with_descendants", EVERY_KIND)
        assert only_server_left(token), entries.processes_with(token)
        assert call(pool, "add", 1, 2) == 3


def test_cancel_ends_the_calls_of_one_tag_and_no_other(tmp_path: Path) -> None:
    with ChildPool(light(standby=True)) as pool:
        calls = [
            Background(
                call, pool, "hang", str(tmp_path / "0"), slot=Slot(0), tag="round 1 client 1"
            ),
            Background(
                call, pool, "hang", str(tmp_path / "1"), slot=Slot(1), tag="round 1 client 1"
            ),
            Background(call, pool, "working_time", 1.5, slot=Slot(2), tag="round 1 client 10"),
            Background(call, pool, "working_time", 1.5, slot=Slot(3)),
        ]
        for name in "01":
            reached(tmp_path / name)
        pool.cancel("round 1 client 1")
        for cancelled in calls[:2]:
            with pytest.raises(FitDied):
                cancelled.result(GONE_WITHIN_S)
        assert calls[2].result(10) > 0
        assert calls[3].result(10) > 0
        assert call(pool, "add", 1, 2) == 3


def test_cancelling_what_is_not_there_does_nothing(marker: Path) -> None:
    with ChildPool(light(standby=True)) as pool:
        call(pool, "pid", tag="over")
        running = Background(call, pool, "working_time", 0.5)
        began_s = time.monotonic()
        for tag in ("over", "never"):
            pool.cancel(tag)
        assert time.monotonic() - began_s < 0.4
        assert running.result(10) > 0


def test_a_cancelled_kept_child_is_replaced(marker: Path) -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        first = call(pool, "pid")
        hanging = Background(call, pool, "hang", str(marker), tag="a")
        assert reached(marker) == first
        pool.cancel("a")
        with pytest.raises(FitDied):
            hanging.result(GONE_WITHIN_S)
        assert call(pool, "pid") != first


def test_a_crash_of_a_kept_child_is_the_fits_only_if_a_fresh_one_crashes_too(
    tmp_path: Path,
) -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        first = call(pool, "pid")
        second = call(pool, "kill_self_in", first, signal.SIGSEGV)
        assert second != first
        with pytest.raises(FitDied, match="SIGSEGV"):
            call(pool, "kill_self", signal.SIGSEGV)
        assert call(pool, "pid") not in (first, second)


def test_a_successor_is_prepared_also_for_a_fit_that_has_ended_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ChildPool(light(standby=True)) as pool:
        prepare = pool._children.prepare_successor

        def prepare_late(slot: Slot) -> None:
            assert wait_until(lambda: not pool.children())
            prepare(slot)

        monkeypatch.setattr(pool._children, "prepare_successor", prepare_late)
        call(pool, "pid")
        assert wait_until(lambda: len(pool.children()) == 1)


def test_many_cancels_at_any_moment_leave_nothing(token: str) -> None:
    with ChildPool(light(standby=True, prepare="entries:jitter")) as pool:
        for number in range(16):
            running = Background(call, pool, "working_time", 600, tag=f"t{number}")
            time.sleep(0.004 * (number % 8))
            while running.running():  # a cancel before the call has a child is no cancel
                pool.cancel(f"t{number}")
                time.sleep(0.002)
            with pytest.raises(FitDied):
                running.result(1)
        assert call(pool, "add", 1, 2) == 3
        assert wait_until(lambda: len(pool.children()) <= 1)
        assert wait_until(lambda: len(entries.processes_with(token)) <= 2)  # one is the standby


def test_a_late_cancel_does_not_hit_the_next_call_of_a_kept_child() -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        call(pool, "pid")
        for number in range(150):
            first = Background(call, pool, "pid", tag=f"cancelled {number}")
            cancel = Background(_cancel_soon, pool, f"cancelled {number}", 0.0002 * (number % 8))
            try:
                first.result(10)
            except FitDied:
                cancel.result(10)
                continue
            assert call(pool, "working_time", 0.003, tag=f"wanted {number}")
            cancel.result(10)


def _cancel_soon(pool: ChildPool, tag: str, delay_s: float) -> None:
    time.sleep(delay_s)
    pool.cancel(tag)


# --- kills ---

STAGES = ["preloading", "prepare", "running", "standby idle", "reply", "descendants"]


def _slow_module(folder: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    """Make a module that takes long to import, the first time."""
    (folder / "slow_module.py").write_text(
        "import os, pathlib, time\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "if not marker.exists():\n"
        "    marker.write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def _stage_options(
    stage: str, method: str, folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "start_method": method,
        "standby": stage == "standby idle",
        "preload": ["json"],
    }
    if stage == "preloading":
        _slow_module(folder, monkeypatch, marker)
        options["preload"] = ["slow_module"]
    if stage == "prepare":
        options |= {"prepare": "entries:prepare_slowly", "prepare_arg": str(marker)}
    return options


def _combinations(stages: list[str]) -> list[tuple[str, str]]:
    return [
        (stage, method)
        for stage in stages
        for method in METHODS
        if (stage, method) != ("preloading", "spawn")  # it preloads nothing
    ]


@pytest.mark.parametrize(("stage", "method"), _combinations(STAGES))
def test_nothing_outlives_a_killed_owner(
    stage: str,
    method: str,
    tmp_path: Path,
    marker: Path,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = _stage_options(stage, method, tmp_path, marker, monkeypatch)
    owner = subprocess.Popen(
        [sys.executable, HERE / "entries.py", stage, json.dumps(options), marker]
    )
    try:
        assert wait_until(marker.exists, 20)
        time.sleep(0.05)
        assert len(entries.processes_with(token)) > 1
    finally:
        owner.kill()
        owner.wait(5)
    assert all_gone(token), entries.processes_with(token)


def _start(pool: ChildPool, stage: str, marker: Path) -> Background | None:
    """Bring a pool to a stage; return the call that runs there."""
    if stage == "standby idle":
        call(pool, "pid")
        assert wait_until(lambda: len(pool.children()) == 1)
        return None
    if stage == "descendants":
        running = Background(call, pool, "hang_with_descendants", str(marker), EVERY_KIND)
    else:
        running = Background(call, pool, {"reply": "slow_reply"}.get(stage, "hang"), str(marker))
    assert wait_until(marker.exists, 20)
    return running


@pytest.mark.parametrize(("stage", "method"), _combinations(STAGES))
def test_a_killed_fork_server_ends_its_calls_and_the_next_call_has_another(
    stage: str,
    method: str,
    tmp_path: Path,
    marker: Path,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = _stage_options(stage, method, tmp_path, marker, monkeypatch)
    with ChildPool(PoolOptions(**options)) as pool:
        running = _start(pool, stage, marker)
        killed = entries.fork_server_of(os.getpid())
        before = [pid for pid, _ in entries.processes_with(token)]
        os.kill(killed, signal.SIGKILL)
        if running is not None:
            with pytest.raises(FitDied, match="fork server"):
                running.result(GONE_WITHIN_S)
        assert wait_until(lambda: not any(map(entries.is_alive, before))), [
            each for each in entries.processes_with(token) if each[0] in before
        ]
        assert wait_until(lambda: not pool.children())
        assert call(pool, "add", 1, 2) == 3
        assert entries.fork_server_of(os.getpid()) != killed


@pytest.mark.parametrize(("stage", "method"), _combinations(STAGES[1:]))
def test_a_killed_child_ends_its_call_and_leaves_nothing(
    stage: str,
    method: str,
    tmp_path: Path,
    marker: Path,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = _stage_options(stage, method, tmp_path, marker, monkeypatch)
    with ChildPool(PoolOptions(**options)) as pool:
        running = _start(pool, stage, marker)
        (child,) = pool.children()
        os.kill(child, signal.SIGKILL)
        if running is not None:
            with pytest.raises(FitDied, match="killed by SIGKILL"):
                running.result(GONE_WITHIN_S)
        assert wait_until(lambda: not entries.is_alive(child))
        assert only_server_left(token), entries.processes_with(token)
        assert wait_until(lambda: child not in pool.children())
        assert call(pool, "add", 1, 2) == 3


def _answer_or_error(pool: ChildPool, slot: Slot = SLOT) -> int | str:
    try:
        return int(call(pool, "add", 1, 2, slot=slot, timeout_s=10))
    except (FitDied, PlatformError) as error:
        return str(error)


def test_a_call_right_after_the_death_of_a_fork_server_works(token: str) -> None:
    with ChildPool(light()) as pool:
        for _ in range(10):
            call(pool, "pid")
            os.kill(entries.fork_server_of(os.getpid()), signal.SIGKILL)
            answer = _answer_or_error(pool)
            if answer != 3:  # the call was given to the dying one
                assert "fork server" in str(answer)
                assert call(pool, "add", 1, 2, timeout_s=10) == 3


def test_a_child_asked_for_while_the_fork_server_is_noted_to_be_dead_is_refused(token: str) -> None:
    refusals: list[Exception] = []
    noted = threading.Event()

    def on_end() -> None:
        ours, theirs = channel.pair()
        with ours, theirs:
            try:
                launcher.start_child(1, theirs, {})
            except Exception as error:
                refusals.append(error)
        noted.set()

    options = PoolOptions(preload=())
    launcher = Launcher(options.for_fork_server(), options.env(), lambda _: None, on_end)
    os.kill(launcher.pid, signal.SIGKILL)
    assert noted.wait(GONE_WITHIN_S)
    launcher.close()
    assert [isinstance(error, ConnectionError) for error in refusals] == [True], refusals


@pytest.mark.parametrize("fits", [1, 0])
def test_an_idle_child_that_dies_just_before_its_call_is_no_hang(fits: int) -> None:
    with ChildPool(light(standby=True, fits_per_process=fits)) as pool:
        for _ in range(20):
            call(pool, "pid")
            assert wait_until(lambda: len(pool.children()) == 1)
            os.kill(next(iter(pool.children())), signal.SIGKILL)
            answer = _answer_or_error(pool)
            assert answer == 3 or "SIGKILL" in str(answer)


def test_a_fork_server_killed_while_it_prepares_a_standby_ends_both(marker: Path) -> None:
    options = light(standby=True, prepare="entries:prepare_second_slowly", prepare_arg=str(marker))
    with ChildPool(options) as pool:
        running = Background(call, pool, "working_time", 600)
        standby = reached(marker)
        os.kill(entries.fork_server_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(FitDied, match="fork server"):
            running.result(GONE_WITHIN_S)
        assert wait_until(lambda: not entries.is_alive(standby))
        assert call(pool, "add", 1, 2) == 3


def test_fork_servers_killed_under_load_lose_calls_but_never_hang(token: str) -> None:
    with ChildPool(light(standby=True, prepare="entries:jitter")) as pool:
        stop_s = time.monotonic() + 2

        def work(slot: Slot) -> int:
            answers = 0
            while time.monotonic() < stop_s:
                answer = _answer_or_error(pool, slot)
                assert answer == 3 or re.search("fork server|SIGKILL", str(answer))
                answers += answer == 3
            return answers

        workers = [Background(work, Slot(index)) for index in range(3)]
        while time.monotonic() < stop_s - 0.5:
            time.sleep(0.35)
            for pid in entries.children_of(os.getpid()):
                os.kill(pid, signal.SIGKILL)
        assert all(worker.result(20) > 0 for worker in workers)
        assert call(pool, "add", 1, 2) == 3
        assert wait_until(lambda: len(pool.children()) <= 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_ctrl_c_does_not_reach_the_children(method: str, marker: Path) -> None:
    options = {"start_method": method, "preload": ["json"]}
    owner = subprocess.Popen(
        [sys.executable, HERE / "entries.py", "interrupt", json.dumps(options), marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_until(marker.exists, 20)
        time.sleep(0.2)
        os.killpg(owner.pid, signal.SIGINT)
        out, err = owner.communicate(timeout=20)
    finally:
        owner.kill()
        owner.wait(5)
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "interrupted"
    assert re.fullmatch(r"answer \d+", lines[1])
    assert owner.returncode == 0


# --- the end of a pool ---


@pytest.mark.parametrize("method", METHODS)
def test_closing_a_pool_ends_the_calls_that_run(method: str, tmp_path: Path, token: str) -> None:
    pool = ChildPool(light(start_method=method, standby=True))
    pool.start()
    calls = [
        Background(
            call, pool, "hang_with_descendants", str(tmp_path / str(n)), EVERY_KIND, slot=Slot(n)
        )
        for n in range(3)
    ]
    for number in range(3):
        reached(tmp_path / str(number))
    closed_s = time.monotonic()
    pool.close()
    for running in calls:
        with pytest.raises(FedHPCError):
            running.result(GONE_WITHIN_S)
    assert time.monotonic() - closed_s < GONE_WITHIN_S
    assert all_gone(token), entries.processes_with(token)


def test_closing_during_the_preload_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    _slow_module(tmp_path, monkeypatch, tmp_path / "marker")
    pool = ChildPool(light(preload=["slow_module"]))
    pool.start()
    running = Background(call, pool, "pid")
    reached(tmp_path / "marker")
    closed_s = time.monotonic()
    pool.close()
    assert time.monotonic() - closed_s < GONE_WITHIN_S
    with pytest.raises(FedHPCError):
        running.result(GONE_WITHIN_S)
    assert all_gone(token)


def test_a_pool_may_be_closed_twice_and_unused(token: str) -> None:
    pool = ChildPool(light())
    pool.close()
    pool.close()
    used = ChildPool(light())
    call(used, "pid")
    used.close()
    used.close()
    assert all_gone(token)


@pytest.mark.parametrize("fits", [1, 0])
def test_a_closed_pool_refuses_calls(fits: int) -> None:
    for _ in range(5):
        pool = ChildPool(light(fits_per_process=fits, standby=True))
        call(pool, "pid")
        pool.close()
        with pytest.raises(PlatformError, match="closed"):
            call(pool, "pid")
        with pytest.raises(PlatformError, match="closed"):
            pool.start()


def test_two_pools_in_one_process_do_not_touch_each_other(marker: Path) -> None:
    with ChildPool(light()) as first:
        running = Background(call, first, "working_time", 1.0)
        with ChildPool(light()) as second:
            assert call(second, "add", 1, 2) == 3
        assert running.result(10) > 0
        assert call(first, "add", 2, 2) == 4


def test_closing_one_pool_ends_its_processes_while_another_lives(token: str) -> None:
    first, second = ChildPool(light()), ChildPool(light())
    with first:
        call(first, "pid")
        second.start()
        call(second, "pid")
        first.close()
        assert only_server_left(token)
        assert call(second, "add", 1, 2, slot=SLOT) == 3
        second.close()
        assert all_gone(token)
