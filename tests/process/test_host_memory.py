"""Fits that use too much memory of the host: who stops them, and what the caller is told."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import SLOT, Background, call, wait_until

from fedhpc.errors import FitDied, FitFailed
from fedhpc.files import read_lines
from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel
from fedhpc.isolation.telemetry import Sampler

HERE = Path(__file__).parent
MB = 1_000_000


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    token = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, token)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield from entries.nothing_is_left(token)


def limited(**options: Any) -> PoolOptions:
    defaults = {"preload": ["json"], "standby": False, "host_memory_bytes": 300 * MB}
    return PoolOptions(**{**defaults, **options})


def take(pool: ChildPool, name: str, *args: int, slot: Slot = SLOT, timeout_s: float = 60) -> int:
    fd = channel.write_memory([json.dumps(args).encode()])
    try:
        reply = pool.run(
            f"memory_entries:{name}", [fd], slot=slot, timeout_s=timeout_s, tag="greedy"
        )
        try:
            return int(entries.read(reply.buffers[0]))
        finally:
            reply.close()
    finally:
        os.close(fd)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_greedy_fit_fails_and_its_neighbour_finishes(method: str) -> None:
    with ChildPool(limited(start_method=method)) as pool:
        neighbour = Background(call, pool, "working_time", 1.0, slot=Slot(1))
        with pytest.raises(FitFailed, match="MemoryError") as caught:
            take(pool, "take", 600)
        assert neighbour.result(20) > 0
        assert "0.3 GB" in str(caught.value.hint)
        assert "raise isolation.host_memory_gb" in str(caught.value.hint)
        assert "in take" in caught.value.traceback
        assert take(pool, "take", 100) == 100 * MB


@pytest.mark.parametrize("name", ["take_with_torch", "take_with_numpy", "take_and_hide_it"])
def test_the_setting_is_named_whichever_library_was_refused(name: str) -> None:
    with ChildPool(limited(preload=["numpy", "torch"])) as pool:
        assert take(pool, name, 50) == 50 * MB
        with pytest.raises(FitFailed, match=r"Hint: .*isolation.host_memory_gb"):
            take(pool, name, 600)


def test_other_failures_and_fits_without_a_limit_have_no_such_hint() -> None:
    with ChildPool(limited()) as pool, pytest.raises(FitFailed) as caught:
        call(pool, "raise_error", "no memory of it")
    assert caught.value.hint is None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with ChildPool(limited(host_memory_bytes=None)) as pool:
        assert take(pool, "take", 600) == 600 * MB
        with pytest.raises(FitFailed, match="MemoryError") as caught:
            take(pool, "take", 10**9)
    assert caught.value.hint is None
    assert resource.getrlimit(resource.RLIMIT_DATA)[1] == hard


def test_a_kept_child_that_was_refused_memory_is_replaced_and_the_next_is_limited_too() -> None:
    with ChildPool(limited(fits_per_process=0)) as pool:
        first = call(pool, "pid")
        for _ in range(2):
            with pytest.raises(FitFailed, match=r"isolation\.host_memory_gb"):
                take(pool, "take", 600)
        assert call(pool, "pid") != first


def test_a_child_whose_descendants_use_too_much_is_killed_and_told_why(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    limit = 300 * MB
    with (
        ChildPool(limited()) as pool,
        Sampler(path, pool, {}, host_limit_bytes=limit),
    ):
        neighbour = Background(call, pool, "working_time", 3.0, slot=Slot(1))
        began_s = time.monotonic()
        with pytest.raises(FitDied, match="host memory") as caught:
            take(pool, "take_in_subprocesses", 180, 3)
        assert time.monotonic() - began_s < 30
        assert type(caught.value) is FitDied  # not one to be run again
        assert "0.3 GB of isolation.host_memory_gb" in caught.value.message
        assert neighbour.result(20) > 0
        assert wait_until(lambda: not pool.children())
    samples = [line for line in read_lines(path) if line["kind"] == "sample"]
    assert max(sample["children_mb"] for sample in samples) > 300


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """Make a control group with a limit of memory, or skip."""
    root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not root.is_dir():  # version 2
        root, limit = Path("/sys/fs/cgroup"), "memory.max"
    group = root / f"fedhpc-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"memory cannot be limited by a control group here: {error}")
        yield group
    finally:
        assert wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_a_child_that_the_kernel_killed_for_want_of_memory_is_reported_as_that() -> None:
    with memory_cgroup(200 * MB) as group:
        done = subprocess.run(
            [sys.executable, HERE / "memory_entries.py", group / "cgroup.procs", "600"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stdout + done.stderr
        assert lines[0].startswith("FitKilled True the child was killed by the kernel's out-of-")
        assert lines[1] == "then 3"
