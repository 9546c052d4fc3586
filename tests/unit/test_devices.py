"""Which GPUs an array task finds: by CUDA_VISIBLE_DEVICES, by Slurm, and by NVML itself."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from simulated_nvml import GB, SimulatedNvml

from fedhpc import environment
from fedhpc.errors import GpuLost, PlatformError
from fedhpc.isolation import Gpu, allotted_gpus, devices, nvml
from fedhpc.isolation.nvml import Nvml

FIRST = Gpu("GPU-aaaa1111-0000-4000-8000-000000000001", "A100", 40 * GB)
SECOND = Gpu("GPU-aaaa2222-0000-4000-8000-000000000002", "A100", 40 * GB)
THIRD = Gpu("GPU-bbbb3333-0000-4000-8000-000000000003", "A100", 40 * GB)
SMALL = Gpu("MIG-cccc4444-0000-4000-8000-000000000004", "A100", 5 * GB)
LARGE = Gpu("MIG-cccc5555-0000-4000-8000-000000000005", "A100", 20 * GB)

WHOLE = [[FIRST], [SECOND], [THIRD]]
WITH_MIG = [[FIRST], [SMALL, LARGE], [THIRD]]


@pytest.fixture(autouse=True)
def no_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def found(cards: list[list[Gpu]] | None, *slurm: str) -> list[Gpu]:
    return allotted_gpus(slurm, None if cards is None else SimulatedNvml(cards))


# --- CUDA_VISIBLE_DEVICES ---


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", [FIRST]),
        ("2,0", [THIRD, FIRST]),
        (" 1 , 2 ", [SECOND, THIRD]),
        (SECOND.id, [SECOND]),
        (f"{THIRD.id},0", [THIRD, FIRST]),
        ("GPU-b", [THIRD]),
        ("GPU-aaaa2,GPU-aaaa1", [SECOND, FIRST]),
        ("", []),
        (" ", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", [SECOND]),
        ("0,,2", [FIRST]),
        ("2,NoDevFiles", [THIRD]),
    ],
)
def test_cuda_visible_devices_names_whole_gpus(
    visible: str, expected: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert found(WHOLE) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (SMALL.id, [SMALL]),
        (f"{LARGE.id},{SMALL.id}", [LARGE, SMALL]),
        ("MIG-cccc5", [LARGE]),
        ("1", [SMALL, LARGE]),
        ("0,1", [FIRST, SMALL, LARGE]),
    ],
)
def test_cuda_visible_devices_names_mig_devices_or_a_card_with_all_of_them(
    visible: str, expected: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert found(WITH_MIG) == expected


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("3", "3"),
        ("0,7", "7"),
        ("GPU-ffff", "GPU-ffff"),
        (f"{FIRST.id}0", f"{FIRST.id}0"),
        ("GPU-aaaa", "GPU-aaaa"),  # of two
        ("MIG-", "MIG-"),
        ("cuda:0", "cuda:0"),
        ("0;1", "0;1"),
    ],
)
def test_a_name_of_no_gpu_or_of_two_is_an_error_that_lists_what_is_there(
    visible: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(PlatformError) as raised:
        found(WHOLE)
    assert f"CUDA_VISIBLE_DEVICES={visible}: expected GPUs of this machine, found {name!r}" in str(
        raised.value
    )
    assert all(gpu.id in str(raised.value) for card in WHOLE for gpu in card)
    assert "Hint: compare with nvidia-smi -L" in str(raised.value)


def test_a_machine_without_gpus_says_so_when_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(PlatformError, match="there are 0: none"):
        found([])


def test_cuda_visible_devices_wins_over_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert found(WHOLE, "0") == [THIRD]


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_gpus_that_slurm_allotted_and_the_environment_hides_are_an_error(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(PlatformError) as raised:
        found(WHOLE, "0", "2")
    assert f"allotted 2 GPUs (0, 2), but CUDA_VISIBLE_DEVICES is {visible!r}" in str(raised.value)
    assert "Hint: unset it" in str(raised.value)


# --- Slurm ---


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ((), [FIRST, SECOND, THIRD]),
        (("0", "1", "2"), [FIRST, SECOND, THIRD]),
        (("5", "6", "7"), [FIRST, SECOND, THIRD]),  # in its cgroup a job sees its own as 0, 1, 2
        (("1",), [SECOND]),
        (("2", "0"), [THIRD, FIRST]),
    ],
)
def test_without_cuda_visible_devices_the_gpus_are_those_of_slurm(
    slurm: tuple[str, ...], expected: list[Gpu]
) -> None:
    assert found(WHOLE, *slurm) == expected


def test_a_card_in_mig_mode_that_slurm_allots_stands_for_its_devices() -> None:
    assert found(WITH_MIG, "1") == [SMALL, LARGE]
    assert found([[SMALL, LARGE]], "3") == [SMALL, LARGE]


@pytest.mark.parametrize(
    ("cards", "slurm", "words"),
    [
        ([[FIRST]], ("0", "1"), r"allotted 2 GPUs \(0, 1\), .* shows 1"),
        (WHOLE, ("1", "3"), r"allotted 2 GPUs \(1, 3\), .* shows 3"),
        (WHOLE, ("a100:1",), r"allotted 1 GPU \(a100:1\), .* shows 3"),
        ([], ("0",), r"allotted 1 GPU \(0\), .* shows 0"),
        (None, ("0",), r"allotted 1 GPU \(0\), but the driver \(.+\) shows 0"),
    ],
)
def test_slurm_allots_what_the_driver_does_not_show(
    cards: list[list[Gpu]] | None,
    slurm: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "device_nodes", lambda: 0)
    with pytest.raises(PlatformError, match=words) as raised:
        found(cards, *slurm)
    assert "nvidia-smi" in (raised.value.hint or "")


# --- without NVML ---


def test_without_nvml_gpus_are_known_by_what_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_nodes", lambda: 2)
    assert found(None) == [Gpu("0"), Gpu("1")]
    assert found(None, "1") == [Gpu("1")]
    assert found(None, "4", "5") == [Gpu("0"), Gpu("1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaaa, 1,-1")
    assert found(None) == [Gpu("GPU-aaaa"), Gpu("1")]


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_nodes", lambda: 0)
    assert found(None) == []


# --- what Slurm and the machine tell ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("0",)),
        ("0,2-3", ("0", "2", "3")),
        ("0-3,7", ("0", "1", "2", "3", "7")),
        (" 1 , 2 ", ("1", "2")),
        ("", ()),
        ("10-12", ("10", "11", "12")),
        ("GPU-aa-bb,1", ("GPU-aa-bb", "1")),
    ],
)
@pytest.mark.parametrize("name", ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"])
def test_the_list_of_a_jobs_gpus_is_read(
    name: str, text: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    monkeypatch.setenv(name, text)
    assert environment.current().gpus == expected


def test_the_gpus_of_the_step_count_more_than_those_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_GPUS", "0-3")
    monkeypatch.setenv("SLURM_STEP_GPUS", "2")
    assert environment.current().gpus == ("2",)


def control_group(base: Path, limits: dict[str, dict[str, str]]) -> None:
    for group, content in limits.items():
        (base / group).mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            (base / group / name).write_text(text)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b": {"cpu.max": "400000 100000\n"}}, [4]),
        ({"a/b": {"cpu.max": "max 100000\n"}}, []),
        ({"a": {"cpu.max": "200000 100000"}, "a/b": {"cpu.max": "max 100000"}}, [2]),
        (
            {"": {"cpu.max": "800000 100000"}, "a/b": {"cpu.max": "250000 100000"}},
            [2, 8],
        ),
        ({"a/b": {"cpu.max": "50000 100000"}}, [0]),
        ({"a/b": {"cpu.max": "nonsense"}}, []),
        ({"a/b": {}}, []),
    ],
)
def test_the_cores_of_a_control_group_are_the_least_of_it_and_those_around_it(
    limits: dict[str, dict[str, str]], expected: list[int], tmp_path: Path
) -> None:
    control_group(tmp_path, limits)
    assert list(environment._quotas(tmp_path, "/a/b", "cpu.max")) == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000\n", [3]), ("-1\n", [])])
def test_the_cores_of_a_control_group_of_version_1_are_read(
    quota: str, expected: list[int], tmp_path: Path
) -> None:
    control_group(tmp_path, {"a": {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000\n"}})
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    assert list(environment._quotas(tmp_path, "/a", *names)) == expected


# --- NVML itself, over a small pynvml ---


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class NotFound(FakeNvmlError):
    pass


class FakePynvml(ModuleType):
    """As much of nvidia-ml-py as `Nvml` uses; a handle is a dict that says what to answer."""

    NVMLError = FakeNvmlError
    NVMLError_NotFound = NotFound
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_RESET_REQUIRED = 16
    NOT_SUPPORTED, LIBRARY_NOT_FOUND, UNKNOWN, NO_DEVICE = 3, 12, 999, 6

    def __init__(self, *cards: dict[str, Any], init: int | None = None) -> None:
        super().__init__("pynvml")
        self.made = list(cards)
        self.init = init
        self.lookups = 0

    @staticmethod
    def _answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init is not None:
            raise FakeNvmlError(self.init)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.made)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        return self.made[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:  # noqa: N802
        self.lookups += 1
        for card in self.made:
            for device in [card, *(card.get("mig") or [])]:
                if device and device["uuid"] == uuid:
                    return device  # type: ignore[no-any-return]
        raise NotFound(self.NO_DEVICE)

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> tuple[int, int]:  # noqa: N802
        if "mig" not in handle:
            raise FakeNvmlError(self.NOT_SUPPORTED)
        return int(handle["mig"] is not None), 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return len(handle["mig"])

    def nvmlDeviceGetMigDeviceHandleByIndex(  # noqa: N802
        self, handle: dict[str, Any], index: int
    ) -> dict[str, Any]:
        if handle["mig"][index] is None:
            raise NotFound(self.NO_DEVICE)
        return handle["mig"][index]  # type: ignore[no-any-return]

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:  # noqa: N802
        return handle["uuid"]  # type: ignore[no-any-return]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:  # noqa: N802
        return self._answer(handle.get("name", "A100"))  # type: ignore[no-any-return]

    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3

    def nvmlDeviceGetComputeMode(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return handle.get("compute_mode", 0)

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:  # noqa: N802
        return self._answer(handle.get("memory", SimpleNamespace(total=40 * GB, free=30 * GB)))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> Any:  # noqa: N802
        return self._answer(handle.get("processes", []))


def install(patch: pytest.MonkeyPatch, fake: FakePynvml) -> FakePynvml:
    patch.setitem(sys.modules, "pynvml", fake)
    return fake


def card(number: int = 1, **more: Any) -> dict[str, Any]:
    return {"uuid": f"GPU-{number}", **more}


def test_nvml_lists_cards_with_and_without_mig(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        {"uuid": "MIG-1", "memory": SimpleNamespace(total=5 * GB, free=GB)},
        None,
        {"uuid": "MIG-2"},
    ]
    install(monkeypatch, FakePynvml(card(), card(2, mig=None), card(3, mig=parts)))
    assert Nvml().cards() == [
        [Gpu("GPU-1", "A100", 40 * GB)],
        [Gpu("GPU-2", "A100", 40 * GB)],
        [Gpu("MIG-1", "A100", 5 * GB), Gpu("MIG-2", "A100", 40 * GB)],
    ]


def test_a_card_for_one_process_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePynvml(card(1, compute_mode=3), card(2)))
    assert [gpu.exclusive for card in Nvml().cards() for gpu in card] == [True, False]


def test_a_card_in_mig_mode_without_devices_is_an_empty_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, FakePynvml(card(mig=[None] * 7), card(2)))
    assert Nvml().cards() == [[], [Gpu("GPU-2", "A100", 40 * GB)]]


def test_what_nvml_does_not_tell_of_a_card_is_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    unsupported = FakeNvmlError(FakePynvml.NOT_SUPPORTED)
    install(monkeypatch, FakePynvml(card(name=unsupported, memory=unsupported)))
    assert Nvml().cards() == [[Gpu("GPU-1", "", 0)]]


def test_nvml_reads_memory_and_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [
        SimpleNamespace(pid=7, usedGpuMemory=2 * GB),
        SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    fake = install(monkeypatch, FakePynvml(card(processes=processes), card(2)))
    opened = Nvml()
    reading = opened.memory(Gpu("GPU-1"))
    assert (reading.total_bytes, reading.free_bytes, reading.used_bytes) == (
        40 * GB,
        30 * GB,
        10 * GB,
    )
    assert reading.processes == {7: 2 * GB, 8: None}
    assert opened.memory(Gpu("GPU-1")) == reading
    assert fake.lookups == 1  # a handle is looked up once


def test_where_processes_are_not_told_memory_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePynvml(card(processes=FakeNvmlError(FakePynvml.NOT_SUPPORTED))))
    assert Nvml().memory(Gpu("GPU-1")).processes == {}


@pytest.mark.parametrize(
    "code", [FakePynvml.NVML_ERROR_GPU_IS_LOST, FakePynvml.NVML_ERROR_RESET_REQUIRED]
)
def test_a_lost_gpu_is_told_from_other_errors(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakePynvml(card()))
    opened = Nvml()
    gpu = opened.cards()[0][0]
    fake.made[0]["memory"] = FakeNvmlError(code)
    with pytest.raises(GpuLost, match="GPU-1 does not answer any more") as raised:
        opened.memory(gpu)
    assert "dmesg" in (raised.value.hint or "")
    fake.made[0]["memory"] = FakeNvmlError(FakePynvml.UNKNOWN)
    with pytest.raises(PlatformError, match="NVML cannot tell about GPU-1") as other:
        opened.memory(gpu)
    assert not isinstance(other.value, GpuLost)


def test_a_gpu_that_nvml_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakePynvml(card()))
    with pytest.raises(PlatformError, match="GPU-9"):
        Nvml().memory(Gpu("GPU-9"))


def test_without_the_drivers_library_nvml_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, FakePynvml(init=FakePynvml.LIBRARY_NOT_FOUND))
    with pytest.raises(PlatformError, match="NVML cannot tell about initialisation"):
        Nvml()
    monkeypatch.setattr(nvml, "device_nodes", lambda: 1)
    assert nvml.open_nvml() is None
    assert "only slots decide" in caplog.text


def test_without_nvidia_ml_py_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(PlatformError, match="pip install nvidia-ml-py"):
        Nvml()


def test_nvml_is_not_opened_where_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml, "device_nodes", lambda: 0)
    assert nvml.open_nvml() is None
