"""CUDA is used by children alone, and every byte of the GPU's memory comes back with their end."""

import os
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import gpu_device
import gpu_entries
import pytest
from entries import Background, fork_server_of, is_alive, parent_of, wait_until
from gpu_device import GIB, MIB
from gpu_entries import options, run, slots

from fedhpc.errors import FitDied, FitFailed
from fedhpc.isolation import ChildPool, Need

pytestmark = pytest.mark.gpu

BACK_WITHIN_S = 1.0


def reached(marker: Path, timeout_s: float = 60) -> int:
    assert wait_until(marker.exists, timeout_s), "never got there"
    return int(marker.read_text())


# --- who has a context ---


def test_neither_the_owner_nor_the_fork_server_has_a_context(
    metered: Any, lock_folder: Path, marker: Path
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    with ChildPool(options(), metered.nvml) as pool:
        running = Background(run, pool, slot, "use", 512, 2.0, str(marker))
        child = reached(marker)
        server = pool.fork_server()
        assert server == parent_of(child)
        users = metered.users()
        assert gpu_device.cuda_library_in(child), "the test would not see a context"
        assert gpu_device.device_files_in(child), "the test would not see a context"
        assert not gpu_device.cuda_library_in(os.getpid())
        assert not gpu_device.cuda_library_in(server)
        assert gpu_device.device_files_in(server) == []
        assert os.getpid() not in users
        assert server not in users
        assert metered.used() > metered.start_bytes + 512 * MIB
        running.result(30)
    if child not in users:
        pytest.skip("the driver does not tell pids here; memory, libraries and files were checked")


def test_a_child_that_stands_by_uses_no_memory_of_the_gpu(
    metered: Any, shared_pool: ChildPool, lock_folder: Path
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    with ChildPool(options(standby=True), metered.nvml) as pool:
        first, reply = run(pool, slot, "use", 64)
        assert reply.gone.wait(5)
        assert wait_until(lambda: len(pool.children()) == 1), "there should be one that stands by"
        assert metered.back_within(BACK_WITHIN_S)
        (standby,) = pool.children()
        assert standby != first["pid"]
        assert run(pool, slot, "use", 64)[0]["pid"] == standby


def test_an_app_whose_import_makes_a_context_is_noticed(
    one: Any, lock_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a child must not stand by: its memory would lie outside of any slot."""
    (slot,) = slots(one.gpu, lock_folder)
    with ChildPool(options(standby=True, prepare="gpu_entries:make_context"), one.nvml) as pool:
        for _ in range(3):  # at once one after the other: the second finds the first standby
            run(pool, slot, "use", 64)
        assert wait_until(lambda: not pool.children())
        assert "import uses CUDA" in caplog.text
        run(pool, slot, "use", 64)
        assert wait_until(lambda: not pool.children())


def test_a_fork_server_whose_preload_uses_the_driver_is_noticed(
    one: Any, lock_folder: Path
) -> None:
    """Counting devices makes no context, but CUDA does not work in a fork after it."""
    (slot,) = slots(one.gpu, lock_folder)
    preload = [*gpu_entries.PRELOAD, "gpu_imports_cuda"]
    with (
        ChildPool(options(preload=preload), one.nvml) as pool,
        pytest.raises(FitFailed, match=r"importing gpu_imports_cuda.*used CUDA in the fork server"),
    ):
        run(pool, slot, "use", 64)


# --- memory comes back ---


@pytest.mark.parametrize(("method", "fits"), [("forkserver", 8), ("spawn", 2)])
def test_after_each_fit_its_memory_is_back_within_a_second(
    method: str, fits: int, metered: Any, lock_folder: Path
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    with ChildPool(options(start_method=method), metered.nvml) as pool:
        for _ in range(fits):
            run(pool, slot, "use", 1024)
            assert metered.back_within(BACK_WITHIN_S), metered.users()


@pytest.mark.parametrize("loader", [False, True], ids=["alone", "with DataLoader workers"])
def test_memory_of_a_killed_child_is_back_within_a_second(
    loader: bool, metered: Any, lock_folder: Path, marker: Path, shared_pool: ChildPool
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    name = "keep_with_loader" if loader else "keep"
    running = Background(run, shared_pool, slot, name, 1024, str(marker))
    child = reached(marker)
    assert metered.used() > metered.start_bytes + GIB
    os.kill(child, signal.SIGKILL)
    assert metered.back_within(BACK_WITHIN_S), metered.users()
    with pytest.raises(FitDied, match="SIGKILL"):
        running.result(10)
    run(shared_pool, slot, "use", 64)


def test_memory_of_a_fit_at_its_deadline_is_back_within_a_second(
    metered: Any, lock_folder: Path, marker: Path, shared_pool: ChildPool
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    with pytest.raises(FitDied, match="no reply within 4 s"):
        run(shared_pool, slot, "keep", 1024, str(marker), timeout_s=4)
    assert marker.exists()
    assert metered.back_within(BACK_WITHIN_S), metered.users()


def test_memory_is_back_within_a_second_after_a_kill_of_the_fork_server(
    metered: Any, lock_folder: Path, marker: Path
) -> None:
    (slot,) = slots(metered.gpu, lock_folder)
    with ChildPool(options(), metered.nvml) as pool:
        running = Background(run, pool, slot, "keep", 1024, str(marker))
        child = reached(marker)
        assert metered.used() > metered.start_bytes + GIB
        os.kill(parent_of(child), signal.SIGKILL)
        assert metered.back_within(BACK_WITHIN_S), metered.users()
        with pytest.raises(FitDied, match="fork server"):
            running.result(10)
        run(pool, slot, "use", 64)  # the next call has another fork server


@pytest.mark.parametrize("loader", [False, True], ids=["alone", "with DataLoader workers"])
def test_memory_is_back_within_a_second_after_a_kill_of_the_owner(
    loader: bool, metered: Any, lock_folder: Path, marker: Path, start: Any
) -> None:
    owner: subprocess.Popen[str] = start("own_and_keep", str(lock_folder), str(marker), loader)
    child = reached(marker)
    server = fork_server_of(owner.pid)
    assert metered.used() > metered.start_bytes + 512 * MIB
    assert not gpu_device.cuda_library_in(owner.pid)
    owner.kill()
    assert metered.back_within(BACK_WITHIN_S), metered.users()
    assert wait_until(lambda: not is_alive(child) and not is_alive(server))


def test_the_use_of_the_gpu_does_not_grow_over_200_fits(
    metered: Any, lock_folder: Path, shared_pool: ChildPool
) -> None:
    """Four at a time; the device is read whenever all four are gone."""
    readings: list[int] = []
    mine = slots(metered.gpu, lock_folder, 4)
    for _ in range(50):
        calls = [
            Background(run, shared_pool, slot, "use", 128, need=Need(2 * GIB)) for slot in mine
        ]
        for call in calls:
            _, reply = call.result(60)
            assert reply.gone.wait(5)
        assert metered.back_within(BACK_WITHIN_S), metered.users()
        readings.append(metered.used())
    slope = statistics.linear_regression(range(len(readings)), readings).slope
    assert abs(slope) * len(readings) < 16 * MIB, readings
    assert max(readings) - min(readings) <= 64 * MIB, readings


# --- kept children ---


def test_a_kept_child_whose_context_broke_is_replaced(one: Any, lock_folder: Path) -> None:
    """After an error of the GPU, CUDA fails in that process for ever."""
    (slot,) = slots(one.gpu, lock_folder)
    with ChildPool(options(fits_per_process=0), one.nvml) as pool:
        first = run(pool, slot, "use", 64)[0]["pid"]
        assert run(pool, slot, "use", 64)[0]["pid"] == first
        with pytest.raises(FitFailed, match="CUDA error"):
            run(pool, slot, "break_context")
        assert run(pool, slot, "use", 64)[0]["pid"] != first


def test_a_kept_child_gives_way_to_another_run(
    one: Any, lock_folder: Path, shared_pool: ChildPool
) -> None:
    (slot,) = slots(one.gpu, lock_folder)
    with ChildPool(options(fits_per_process=0), one.nvml) as pool:
        kept, _ = run(pool, slot, "use", 64)
        began_s = time.monotonic()
        run(shared_pool, slot, "use", 64)
        assert time.monotonic() - began_s < 20
        assert not is_alive(kept["pid"])
