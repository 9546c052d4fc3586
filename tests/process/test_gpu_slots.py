"""Children in slots of a GPU, as far as no GPU is needed for it; tests/gpu has the rest."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import call, wait_until

from fedhpc.errors import FitFailed
from fedhpc.isolation import ChildPool, Gpu, Need, Nvml, PoolOptions, Slot, channel, cuda

HERE = Path(__file__).parent
GPU = Gpu("GPU-00000000-1111-2222-3333-444444444444")
GB = 10**9


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(entries.TOKEN, value := os.urandom(8).hex())
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    leftovers = entries.nothing_is_left(value)
    next(leftovers)
    yield
    next(leftovers, None)


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    folder = tmp_path / "locks"
    folder.mkdir(mode=0o700)
    return Slot(0, (GPU,), folder, GPU.id)


def light(**options: Any) -> PoolOptions:
    return PoolOptions(**{"preload": ["json"], "standby": False, **options})


def run(pool: ChildPool, slot: Slot, entry: str, need: Need | None = None) -> Any:
    fd = channel.write_memory([b"[]"])
    try:
        reply = pool.run(entry, [fd], slot=slot, timeout_s=30, need=need)
    finally:
        os.close(fd)
    try:
        return json.loads(entries.read(reply.buffers[0]))
    finally:
        reply.close()


def test_calls_at_once_after_another_survive_an_app_whose_import_uses_cuda(
    slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    """A child that stands by finds that out; it may have been given the next call meanwhile."""
    with ChildPool(light(standby=True, prepare="pretended_gpu:make_context")) as pool:
        found = [call(pool, "pid", slot=slot) for _ in range(4)]
        assert len(set(found)) == 4
        assert "import uses CUDA" in caplog.text
        assert wait_until(lambda: not pool.children())


def test_a_kept_child_is_replaced_after_an_error_on_a_gpu(slot: Slot) -> None:
    options = light(fits_per_process=0, prepare="pretended_gpu:make_context")
    with ChildPool(options) as pool:
        first = call(pool, "pid", slot=slot)
        assert call(pool, "pid", slot=slot) == first
        with pytest.raises(FitFailed, match="device-side assert"):
            run(pool, slot, "pretended_gpu:fail")
        assert call(pool, "pid", slot=slot) != first


def test_a_kept_child_serves_the_fits_that_need_no_more_than_its_first(slot: Slot) -> None:
    with ChildPool(light(fits_per_process=0, preload=["torch"])) as pool:
        small = run(pool, slot, "entries:pid", Need(2 * GB))
        assert run(pool, slot, "entries:pid", Need(2 * GB)) == small
        large = run(pool, slot, "entries:pid", Need(4 * GB))
        assert large != small
        assert run(pool, slot, "entries:pid", Need(2 * GB)) == large
        alone = run(pool, slot, "entries:pid", None)
        assert alone != large
        assert run(pool, slot, "entries:pid", Need(4 * GB)) == alone


def test_a_fork_server_never_asks_cuda_about_a_mig_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5f2e1f4a-0000-0000-0000-000000000000")
    assert PoolOptions().env()["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f2e1f4a-0000-0000-0000-000000000000")
    assert "CUDA_VISIBLE_DEVICES" not in PoolOptions().env()


def test_gpus_that_nvml_counts_but_forbids_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return index

    def no_mig(_: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", no_mig)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda _: GPU.id)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "a card")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", no_mig)
    assert Nvml().cards() == [[Gpu(GPU.id, "a card")]]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_libraries_without_gpu_memory_are_understood(words: str) -> None:
    assert cuda.is_out_of_memory(RuntimeError(words))
