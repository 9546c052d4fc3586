"""How many slots an array task has, on which GPUs, and with which locks."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from simulated_nvml import SimulatedNvml

from fedhpc import allotment
from fedhpc.config import Isolation
from fedhpc.environment import Environment
from fedhpc.errors import PlatformError
from fedhpc.isolation import Gpu, Slot, cpu_slots, devices, gpu_slots, locks

LOCKS = Path("/somewhere/locks")
GPUS = [Gpu(f"GPU-{number}", "A100", 40_000_000_000) for number in range(3)]
NAMELESS = [Gpu("0"), Gpu("1")]


# --- the CPU ---


@pytest.mark.parametrize(
    ("count", "cpus", "threads", "expected"),
    [
        (3, 1, 1, 3),
        ("auto", 8, 1, 8),
        ("auto", 8, 3, 2),
        ("auto", 1, 1, 1),
        ("auto", 2, 16, 1),
    ],
)
def test_slots_on_the_cpu_are_as_many_as_asked_or_as_the_cores_feed(
    count: int, cpus: int, threads: int, expected: int
) -> None:
    made = cpu_slots(count, cpus=cpus, threads_per_fit=threads)
    assert [slot.index for slot in made] == list(range(expected))
    assert {slot.limit for slot in made} == {expected}
    assert {slot.lock_folder for slot in made} == {None}


def test_children_on_the_cpu_see_no_gpu() -> None:
    for slot in cpu_slots(2, cpus=4, threads_per_fit=1):
        assert slot.gpus == ()
        assert slot.env == {"CUDA_VISIBLE_DEVICES": ""}


def test_array_tasks_with_the_same_cores_share_their_slots() -> None:
    made = cpu_slots(2, cpus=4, threads_per_fit=1, lock_folder=LOCKS, shared_by=3)
    assert len(made) == 2
    assert {slot.limit for slot in made} == {6}
    assert {slot.lock_folder for slot in made} == {LOCKS}


def keys_of(slots: list[Slot]) -> str:
    (key,) = {slot.lock_key for slot in slots}
    return key


def test_the_cores_of_two_jobs_have_locks_of_their_own() -> None:
    first = cpu_slots(2, cpus=4, threads_per_fit=1, job_id="17_0")
    second = cpu_slots(2, cpus=4, threads_per_fit=1, job_id="17_1")
    alike = cpu_slots(1, cpus=2, threads_per_fit=1, job_id="17_0")
    assert keys_of(first) != keys_of(second)
    assert keys_of(first) == keys_of(alike)


def test_outside_of_a_job_whoever_has_the_same_cores_shares_their_locks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 0, 1})
    first = keys_of(cpu_slots(2, cpus=3, threads_per_fit=1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert keys_of(cpu_slots(1, cpus=3, threads_per_fit=1)) == first
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert keys_of(cpu_slots(1, cpus=1, threads_per_fit=1)) != first


def test_keys_are_names_of_files() -> None:
    made = [
        *cpu_slots(1, cpus=1, threads_per_fit=1, job_id="1_[2-3]"),
        *gpu_slots([Gpu("MIG-GPU-12ab/1/0")], 1, cpus=1, threads_per_fit=1),
        *gpu_slots(GPUS[:1], 1, cpus=1, threads_per_fit=1),
        *gpu_slots(NAMELESS[:1], 1, cpus=1, threads_per_fit=1, job_id="17_0"),
    ]
    for slot in made:
        assert slot.lock_key
        assert set(slot.lock_key) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
        )


# --- GPUs ---


def test_slots_spread_over_gpus_before_they_share_one() -> None:
    made = gpu_slots(GPUS, 2, cpus=1, threads_per_fit=1, lock_folder=LOCKS)
    assert [slot.index for slot in made] == [0, 1, 2, 3, 4, 5]
    assert [slot.gpus for slot in made] == [(gpu,) for gpu in [*GPUS, *GPUS]]
    assert {slot.limit for slot in made} == {2}
    assert {slot.lock_folder for slot in made} == {LOCKS}
    assert Counter(slot.lock_key for slot in made) == {"GPU-0": 2, "GPU-1": 2, "GPU-2": 2}


def test_each_child_sees_the_one_gpu_of_its_slot() -> None:
    made = gpu_slots(GPUS, 1, cpus=1, threads_per_fit=1)
    assert [slot.env for slot in made] == [
        {"CUDA_VISIBLE_DEVICES": f"GPU-{number}"} for number in range(3)
    ]


@pytest.mark.parametrize(
    ("cpus", "threads", "gpus", "expected"),
    [
        (12, 1, GPUS, 4),
        (12, 2, GPUS, 2),
        (2, 1, GPUS, 1),
        (1, 8, GPUS[:1], 1),
        (1000, 1, GPUS[:1], 64),
    ],
)
def test_auto_gives_each_gpu_as_many_slots_as_the_cores_feed(
    cpus: int, threads: int, gpus: list[Gpu], expected: int
) -> None:
    made = gpu_slots(gpus, "auto", cpus=cpus, threads_per_fit=threads)
    assert Counter(slot.gpus[0].id for slot in made) == {gpu.id: expected for gpu in gpus}
    # Memory admits: two runs with different numbers of cores must not refuse each other slots.
    assert {slot.limit for slot in made} == {64}


@pytest.mark.parametrize("gpus", [NAMELESS, [GPUS[0], Gpu("GPU-9")]])
def test_where_memory_cannot_be_read_auto_is_one_fit_at_a_time(gpus: list[Gpu]) -> None:
    made = gpu_slots(gpus, "auto", cpus=64, threads_per_fit=1)
    assert len(made) == len(gpus)
    assert {slot.limit for slot in made} == {1}


def test_gpus_without_uuids_are_locked_by_index_and_job() -> None:
    outside = gpu_slots(NAMELESS, 1, cpus=1, threads_per_fit=1)
    inside = gpu_slots(NAMELESS, 1, cpus=1, threads_per_fit=1, job_id="17_0")
    assert [slot.lock_key for slot in outside] == ["gpu-0", "gpu-1"]
    assert [slot.lock_key for slot in inside] == ["gpu-0-of-17_0", "gpu-1-of-17_0"]


def test_a_uuid_is_the_same_gpu_in_every_job() -> None:
    one = gpu_slots(GPUS[:1], 1, cpus=1, threads_per_fit=1, job_id="17_0")
    other = gpu_slots(GPUS[:1], 4, cpus=9, threads_per_fit=2, job_id="18_3")
    assert {slot.lock_key for slot in [*one, *other]} == {"GPU-0"}


def test_no_gpu_where_one_is_wanted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    with pytest.raises(PlatformError) as raised:
        gpu_slots([], 1, cpus=1, threads_per_fit=1)
    assert "expected a GPU, found none visible (CUDA_VISIBLE_DEVICES='NoDevFiles')" in str(
        raised.value
    )
    assert "Hint: ask Slurm for one with cluster.gpus_per_task" in str(raised.value)


# --- as the config wants them ---


def array_task(**more: Any) -> Environment:
    facts = {"host": "n1", "job_id": "17_0", "array_task": 0, "cpus": 8, "gpus": ()}
    return Environment(**{**facts, "on_slurm": True, "restarts": 0, **more})


@pytest.fixture
def nothing_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "device_nodes", lambda: 0)


@pytest.mark.usefixtures("nothing_visible")
def test_a_machine_without_gpus_has_slots_on_its_cores() -> None:
    made = allotment.slots(Isolation(), array_task(), None, array_tasks_here=2, folder=LOCKS)
    assert len(made) == 4
    assert {slot.limit for slot in made} == {8}
    assert {slot.gpus for slot in made} == {()}


@pytest.mark.usefixtures("nothing_visible")
def test_gpus_are_used_where_they_are_unless_the_config_wants_the_cpu() -> None:
    nvml = SimulatedNvml([[gpu] for gpu in GPUS])
    task = array_task(gpus=("1",))
    (slot,) = allotment.slots(Isolation(), task, nvml, folder=LOCKS)
    assert slot.gpus == (GPUS[1],)
    assert slot.lock_key == GPUS[1].id
    on_cpu = allotment.slots(Isolation(device="cpu", slots=2), task, nvml, folder=LOCKS)
    assert [slot.gpus for slot in on_cpu] == [(), ()]


@pytest.mark.usefixtures("nothing_visible")
def test_a_gpu_that_the_config_wants_and_nobody_has_is_an_error() -> None:
    with pytest.raises(PlatformError, match="expected a GPU, found none visible"):
        allotment.slots(Isolation(device="cuda"), array_task(), None)


def test_the_lock_folder_may_name_variables_and_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("HOME", "/home/ada")
    assert allotment.lock_folder(Isolation(lock_dir="/var/tmp/fl-$USER")) == Path("/var/tmp/fl-ada")
    assert allotment.lock_folder(Isolation(lock_dir="~/locks")) == Path("/home/ada/locks")
    monkeypatch.setenv("TMPDIR", "/tmp/of-this-job")
    assert allotment.lock_folder(Isolation()) == Path(f"/tmp/fedhpc-{os.geteuid()}")


def test_a_lock_folder_of_one_job_alone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    isolation = Isolation(lock_dir=str(tmp_path / "locks"))
    assert allotment.prepare_lock_folder(isolation, array_task()) == tmp_path / "locks"
    assert caplog.text == ""
    monkeypatch.setattr(locks, "mount_of", lambda *_: ("ext4", "/slurm/17/.17"))
    allotment.prepare_lock_folder(isolation, array_task())
    assert "is this job's alone" in caplog.text
    assert "name a folder of the node that your jobs share" in caplog.text


# --- GPUs that let one process at a time use them ---

EXCLUSIVE = [Gpu("GPU-0", "V100", 32_000_000_000, exclusive=True)]


def test_a_gpu_for_one_process_has_one_slot() -> None:
    for wanted in (1, "auto"):
        (slot,) = gpu_slots(EXCLUSIVE, wanted, cpus=8, threads_per_fit=1)  # type: ignore[arg-type]
        assert slot.limit == 1


def test_more_slots_than_a_gpu_for_one_process_can_have_are_refused() -> None:
    with pytest.raises(PlatformError, match="EXCLUSIVE_PROCESS") as caught:
        gpu_slots([*GPUS, *EXCLUSIVE], 2, cpus=8, threads_per_fit=1)
    assert "isolation.slots_per_gpu: expected 1, as GPU-0" in str(caught.value)
    assert "found 2" in str(caught.value)
