"""Several fits, runs and programs on one GPU: slots, caps, memory, and what each fit sees."""

import re
from pathlib import Path
from typing import Any

import gpu_device
import pytest
from entries import Background, wait_until
from gpu_device import GIB, MIB
from gpu_entries import lines, options, run, slots

from fedhpc.errors import FitOutOfMemory, SlotTimeout
from fedhpc.isolation import ChildPool, Need
from fedhpc.isolation.calls import DEFAULT_PRELOAD
from fedhpc.isolation.peaks import Peaks

pytestmark = pytest.mark.gpu


def same(uuid: str, gpu_id: str) -> bool:
    """Return whether torch's name of a GPU, which has no prefix, is the driver's."""
    return uuid.removeprefix("GPU-") == gpu_id.removeprefix("GPU-").removeprefix("MIG-")


# --- what a fit sees ---


def test_each_fit_sees_one_device_and_it_is_the_slots_own(
    one: Any, lock_folder: Path, shared_pool: ChildPool
) -> None:
    seen, _ = run(shared_pool, slots(one.gpu, lock_folder)[0], "see")
    assert seen["count"] == 1
    assert seen["device"] == "cuda"
    assert seen["visible"] == one.gpu.id
    if not one.gpu.id.startswith("GPU-") or not seen["uuid"]:
        pytest.skip("a MIG device, or no UUIDs here: the number of devices was checked")
    assert same(seen["uuid"], one.gpu.id)


def test_an_owner_may_name_its_gpu_by_index(one: Any, lock_folder: Path, start: Any) -> None:
    if one.nvml is not None:
        cards = one.nvml.cards()
        (index,) = [number for number, card in enumerate(cards) if one.gpu in card]
        if len(cards[index]) > 1:
            pytest.skip("a card in MIG mode")
    elif one.gpu.id.startswith("MIG-"):
        pytest.skip("a MIG device")
    else:
        index = 0
    owner = start("own_and_see", str(lock_folder), CUDA_VISIBLE_DEVICES=str(index))
    out, _ = owner.communicate(timeout=60)
    assert owner.returncode == 0
    seen, cuda_in_owner = gpu_device.json.loads(out)
    assert seen["count"] == 1
    assert not cuda_in_owner
    if one.nvml is not None:
        assert seen["visible"] == one.gpu.id  # the UUID, whatever the owner called it
        assert same(seen["uuid"], one.gpu.id)


# --- slots ---


def test_two_runs_on_one_gpu_never_use_it_more_often_than_its_slots(
    one: Any, lock_folder: Path, tmp_path: Path, start: Any
) -> None:
    stamps = tmp_path / "stamps"
    fits = 6
    owners = [start("own_and_stamp", str(lock_folder), str(stamps), fits) for _ in range(2)]
    for owner in owners:
        owner.communicate(timeout=120)
        assert owner.returncode == 0
    found = lines(stamps)
    assert len(found) == 2 * 2 * fits
    assert len({pid for pid, _, _ in found}) == len(found)  # a process for every fit
    assert most_at_a_time(found) == 2


def most_at_a_time(stamps: list[Any]) -> int:
    changes = sorted((s, +1) for _, s, _ in stamps) + sorted((s, -1) for _, _, s in stamps)
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


# --- caps, and what happens without memory ---


def test_a_greedy_fit_stops_at_its_cap_and_its_neighbour_does_not_notice(
    one: Any, lock_folder: Path, tmp_path: Path, marker: Path, shared_pool: ChildPool
) -> None:
    """It runs again alone, uncapped, takes the whole GPU, and fails for good."""
    first, second = slots(one.gpu, lock_folder, 2)
    neighbour = Background(
        run, shared_pool, first, "use", 256, 4.0, str(marker), need=Need(2 * GIB)
    )
    assert wait_until(marker.exists, 30)
    step = max(128, one.total_bytes // MIB // 256)
    need = Need(max(3 * GIB, 8 * step * MIB))
    path = tmp_path / "taken"
    with pytest.raises(FitOutOfMemory) as caught:
        run(shared_pool, second, "greedy", str(path), step, need=need, label="greedy")
    ended_s = neighbour.result(10)[0]["ended_s"]
    taken = lines(path)
    pids = list(dict.fromkeys(pid for pid, _, _ in taken))
    assert len(pids) == 2, "it should have been tried twice"
    capped = [mib * MIB for pid, mib, _ in taken if pid == pids[0]]
    alone = [(mib * MIB, s) for pid, mib, s in taken if pid == pids[1]]
    assert need.cap_bytes - 2 * step * MIB < capped[-1] <= need.cap_bytes
    assert alone[0][1] > ended_s, "the second try should have waited for the neighbour"
    assert alone[-1][0] > 0.8 * one.total_bytes
    assert "out of memory" in caught.value.message
    assert caught.value.need_bytes > 0.8 * one.total_bytes
    run(shared_pool, second, "use", 64, need=need)  # the GPU is as before


def test_a_fit_whose_need_was_too_low_succeeds_alone(
    one: Any, lock_folder: Path, shared_pool: ChildPool
) -> None:
    slot = slots(one.gpu, lock_folder, 2)[1]
    need = Need(GIB)
    _, reply = run(shared_pool, slot, "use", need.total_bytes // MIB, need=need)
    assert reply.out_of_memory
    assert reply.gpu_peak_bytes is not None
    assert reply.gpu_peak_bytes >= GIB
    _, reply = run(shared_pool, slot, "use", 64, need=need)
    assert not reply.out_of_memory


def test_a_kept_child_is_replaced_for_a_fit_that_needs_more(one: Any, lock_folder: Path) -> None:
    """Its slot promises, and its cap allows, what its first fit needed."""
    slot = slots(one.gpu, lock_folder, 2)[0]
    with ChildPool(options(fits_per_process=0), one.nvml) as pool:
        small, _ = run(pool, slot, "use", 64, need=Need(GIB))
        assert run(pool, slot, "use", 64, need=Need(GIB))[0]["pid"] == small["pid"]
        large, reply = run(pool, slot, "use", 2048, need=Need(4 * GIB))
        assert not reply.out_of_memory
        assert large["pid"] != small["pid"]
        assert run(pool, slot, "use", 64, need=Need(GIB))[0]["pid"] == large["pid"]


def test_the_peak_that_is_learned_of_a_fit_is_plausible(
    one: Any, lock_folder: Path, tmp_path: Path, shared_pool: ChildPool
) -> None:
    _, reply = run(shared_pool, slots(one.gpu, lock_folder)[0], "use", 1024)
    assert reply.gpu_peak_bytes is not None
    assert GIB <= reply.gpu_peak_bytes <= 3 * GIB
    if reply.gpu_context_bytes is not None:  # NVML tells it, unless pids are of another namespace
        assert 50 * MIB <= reply.gpu_context_bytes <= 2 * GIB
    peaks = Peaks(tmp_path / "peaks")
    peaks.note("a fit", reply.gpu_peak_bytes, reply.gpu_context_bytes)
    need = peaks.need("a fit")
    assert need is not None
    _, reply = run(shared_pool, slots(one.gpu, lock_folder)[0], "use", 1024, need=need)
    assert not reply.out_of_memory, "what was learned should be enough"


# --- admission by memory ---


def test_memory_that_another_program_holds_delays_a_fit_until_it_is_released(
    admitting: Any, lock_folder: Path, marker: Path, start: Any, shared_pool: ChildPool
) -> None:
    (slot,) = slots(admitting.gpu, lock_folder)
    other = start("take", admitting.total_bytes // 2 // MIB, str(marker))
    assert wait_until(marker.exists, 60)
    need = Need(int(0.6 * admitting.total_bytes))
    with pytest.raises(SlotTimeout) as caught:
        run(shared_pool, slot, "use", 64, need=need, slot_timeout_s=3)
    message = caught.value.message
    assert re.search(r"needs [\d.]+ GB", message)
    if other.pid in admitting.users():
        assert f"pid {other.pid} of another program" in message
    else:
        assert "cannot be seen from here" in message
    waiting = Background(run, shared_pool, slot, "use", 64, need=need, slot_timeout_s=60)
    assert wait_until(shared_pool.waiting, 20)
    other.stdin.close()  # it leaves
    other.wait(30)
    _, reply = waiting.result(30)
    assert reply.wait_s > 0


def test_a_second_fit_waits_until_the_first_gives_its_memory_back(
    admitting: Any, lock_folder: Path, marker: Path, shared_pool: ChildPool
) -> None:
    """What the first was promised counts, though it uses little of it."""
    first, second = slots(admitting.gpu, lock_folder, 2)
    need = Need(int(0.6 * admitting.total_bytes))
    running = Background(run, shared_pool, first, "use", 64, 2.0, str(marker), need=need)
    assert wait_until(marker.exists, 30)
    _, reply = run(shared_pool, second, "use", 64, need=need)
    assert reply.wait_s > 1
    running.result(10)


def test_a_fit_of_unknown_need_has_its_gpu_alone(
    admitting: Any, lock_folder: Path, marker: Path, shared_pool: ChildPool
) -> None:
    first, second = slots(admitting.gpu, lock_folder, 2)
    running = Background(run, shared_pool, first, "use", 64, 2.0, str(marker))
    assert wait_until(marker.exists, 30)
    _, reply = run(shared_pool, second, "use", 64, need=Need(GIB))
    assert reply.wait_s > 1
    running.result(10)


def test_fits_that_fit_into_the_memory_run_at_the_same_time(
    one: Any, lock_folder: Path, tmp_path: Path, shared_pool: ChildPool
) -> None:
    stamps = tmp_path / "stamps"
    calls = [
        Background(run, shared_pool, slot, "stamp", str(stamps), 64, 3.0, need=Need(GIB))
        for slot in slots(one.gpu, lock_folder, 3)
    ]
    for call in calls:
        call.result(60)
    assert most_at_a_time(lines(stamps)) == 3


# --- numbers ---


def test_training_in_a_child_gives_the_same_bits_each_time(one: Any, lock_folder: Path) -> None:
    (slot,) = slots(one.gpu, lock_folder)
    with ChildPool(options(preload=DEFAULT_PRELOAD), one.nvml) as pool:
        first, _ = run(pool, slot, "train", 7, 40)
        again, _ = run(pool, slot, "train", 7, 40)
        other, _ = run(pool, slot, "train", 8, 40)
    assert first == again
    assert first != other
