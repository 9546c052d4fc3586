"""What the tests on a GPU share. Here Python, torch, numpy and pytest must do."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import entries
import gpu_device
import gpu_entries
import pytest
from gpu_device import MIB, Meter

from fedhpc.isolation import ChildPool, Gpu, Nvml, allotted_gpus
from fedhpc.isolation.nvml import open_nvml

HERE = Path(__file__).resolve().parent
TOLERANCE = 64 * MIB  # a context takes hundreds


class OneGpu:
    """The GPU of these tests, and its memory."""

    def __init__(self) -> None:
        self.nvml: Nvml | None = open_nvml()
        self.meter = Meter(self.nvml)
        self.known = gpu_device.probe()
        self.gpu = self._find()
        self.total_bytes: int = self.known["total_bytes"]
        self.start_bytes = 0
        if self.meter.works:
            # The driver keeps a little when the GPU was used for the first time: by the probe.
            time.sleep(1)
            self.start_bytes = self.used()

    def _find(self) -> Gpu:
        if self.nvml is not None:
            return allotted_gpus([], self.nvml)[0]
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        if named.startswith(("GPU-", "MIG-")) or not self.known["uuid"]:
            return Gpu(named or "0")
        return Gpu(f"GPU-{self.known['uuid'].removeprefix('GPU-')}")

    def used(self) -> int:
        return self.meter.reading(self.gpu).used_bytes

    def users(self) -> dict[int, int | None]:
        return self.meter.reading(self.gpu).processes

    def back_within(self, seconds: float) -> bool:
        """Wait until the memory is back; the last look begins within the time."""
        deadline_s = time.monotonic() + seconds
        while True:
            last = time.monotonic() > deadline_s - 0.02
            if self.used() <= self.start_bytes + TOLERANCE:
                return True
            if last:
                return False
            time.sleep(0.02)


@pytest.fixture(scope="session", autouse=True)
def module_path() -> Iterator[None]:
    """Let children and owners find these modules, and fedhpc where it is not installed."""
    folders = [HERE, HERE.parent / "process", HERE.parents[1]]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [before])])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def one(module_path: None) -> OneGpu:
    return OneGpu()


@pytest.fixture
def metered(one: OneGpu) -> OneGpu:
    """The GPU, where its memory can be read."""
    if not one.meter.works:
        pytest.skip("needs nvidia-ml-py or nvidia-smi, to read the GPU's memory")
    if not one.back_within(5):
        mib = (one.used() - one.start_bytes) // MIB
        pytest.skip(f"another program uses this GPU: {mib} MiB more than at the start")
    return one


@pytest.fixture
def admitting(metered: OneGpu) -> OneGpu:
    """The GPU, where fits are admitted by its memory."""
    if metered.nvml is None:
        pytest.skip("admission by memory needs nvidia-ml-py: not installed, or it does not work")
    if not metered.gpu.total_bytes:
        pytest.skip("NVML does not tell the memory of this GPU")
    return metered


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, one: OneGpu) -> Iterator[str]:
    """Fail a test that leaves a process, a descriptor or memory of the GPU behind."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, value)
    leftovers = entries.nothing_is_left(value)
    next(leftovers)
    yield value
    next(leftovers, None)
    if one.meter.works:
        assert one.back_within(5), f"GPU memory was left behind, in use by {one.users()}"


@pytest.fixture(scope="session")
def shared_pool(one: OneGpu) -> Iterator[ChildPool]:
    """A pool for all tests that neither kill its fork server nor want other options."""
    with ChildPool(gpu_entries.options(), one.nvml) as pool:
        yield pool


@pytest.fixture
def lock_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "locks"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process of gpu_entries; it ends with the test at the latest."""
    with contextlib.ExitStack() as stack:

        def started(command: str, *args: Any, **env: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_entries.py"), command, json.dumps(args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **env},
            )
            stack.callback(_end, process)
            return process

        yield started


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait(10)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()  # type: ignore[union-attr]
