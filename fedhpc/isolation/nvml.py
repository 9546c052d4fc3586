"""What NVML, the driver's management library, tells about GPUs: no CUDA context is made for it."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedhpc.errors import GpuLost, PlatformError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device: a part of a GPU that CUDA treats as one of its own.

    Attributes
    ----------
    id : str
        As CUDA_VISIBLE_DEVICES takes it: the UUID, or the index where NVML does not tell the UUID.
    name : str
        Of the card; "" where NVML does not tell it.
    total_bytes : int
        Memory; 0 where NVML does not tell it, and nothing can be said about use either.
    exclusive : bool
        Whether it lets one process at a time use it (compute mode EXCLUSIVE_PROCESS).
    """

    id: str
    name: str = ""
    total_bytes: int = 0
    exclusive: bool = False


@dataclass(frozen=True)
class Reading:
    """Memory of a GPU at one moment.

    Attributes
    ----------
    total_bytes, free_bytes : int
        Of the GPU.
    processes : dict
        Bytes in use by pid, None where NVML does not tell how many. In containers other processes
        may be missing, or have pids of another namespace.
    """

    total_bytes: int
    free_bytes: int
    processes: dict[int, int | None]

    @property
    def used_bytes(self) -> int:
        """Memory in use, whoever uses it."""
        return self.total_bytes - self.free_bytes


class Nvml:
    """NVML, by nvidia-ml-py. One object serves all threads of a process.

    Raises
    ------
    PlatformError
        If there is no driver, or nvidia-ml-py is not installed.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise PlatformError(
                "nvidia-ml-py is not installed", "pip install nvidia-ml-py"
            ) from error
        self._pynvml: Any = pynvml
        self._handles: dict[str, Any] = {}
        self._ask("initialisation", pynvml.nvmlInit)

    def cards(self) -> list[list[Gpu]]:
        """Return the GPUs that this process may use, in PCI order as nvidia-smi numbers them.

        Each is a list: of the card itself, or of its MIG devices if it is in MIG mode.
        """
        count = self._ask("the number of GPUs", self._pynvml.nvmlDeviceGetCount)
        cards = (self._card(index) for index in range(count))
        return [card for card in cards if card is not None]

    def memory(self, gpu: Gpu) -> Reading:
        """Read the memory of a GPU.

        Raises
        ------
        GpuLost
            If the GPU does not answer any more.
        PlatformError
            If NVML fails otherwise.
        """
        if gpu.id not in self._handles:
            self._handles[gpu.id] = self._ask(
                gpu.id, self._pynvml.nvmlDeviceGetHandleByUUID, gpu.id
            )
        handle = self._handles[gpu.id]
        memory = self._ask(gpu.id, self._pynvml.nvmlDeviceGetMemoryInfo, handle)
        processes: dict[int, int | None] = {}
        with contextlib.suppress(PlatformError):  # not told everywhere; a lost GPU has told already
            for process in self._ask(
                gpu.id, self._pynvml.nvmlDeviceGetComputeRunningProcesses, handle
            ):
                processes[int(process.pid)] = process.usedGpuMemory
        return Reading(int(memory.total), int(memory.free), processes)

    def _card(self, index: int) -> list[Gpu] | None:
        pynvml, what = self._pynvml, f"GPU {index}"
        try:
            handle = self._ask(what, pynvml.nvmlDeviceGetHandleByIndex, index)
        except PlatformError as error:
            # NVML counts the GPUs of other jobs too, which the job's control group forbids.
            if isinstance(error.__cause__, pynvml.NVMLError_NoPermission):
                return None
            raise
        try:
            mig_mode, _ = pynvml.nvmlDeviceGetMigMode(handle)
        except pynvml.NVMLError:  # a card without MIG
            mig_mode = 0
        if not mig_mode:
            return [self._gpu(what, handle)]
        devices = []
        for number in range(self._ask(what, pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)):
            with contextlib.suppress(pynvml.NVMLError_NotFound):
                device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                devices.append(self._gpu(what, device))
        return devices

    def _gpu(self, what: str, handle: Any) -> Gpu:
        uuid = str(self._ask(what, self._pynvml.nvmlDeviceGetUUID, handle))
        self._handles[uuid] = handle
        name, total = "", 0
        with contextlib.suppress(PlatformError):
            name = str(self._ask(what, self._pynvml.nvmlDeviceGetName, handle))
        with contextlib.suppress(PlatformError):  # cards that share the host's memory have none
            total = int(self._ask(what, self._pynvml.nvmlDeviceGetMemoryInfo, handle).total)
        exclusive = False
        with contextlib.suppress(PlatformError):  # not told of MIG devices
            mode = self._ask(what, self._pynvml.nvmlDeviceGetComputeMode, handle)
            exclusive = mode == self._pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS
        return Gpu(uuid, name, total, exclusive)

    def _ask(self, what: str, function: Callable[..., T], *arguments: Any) -> T:
        pynvml = self._pynvml
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            lost = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
            if error.value in lost:
                raise GpuLost(
                    f"{what} does not answer any more (NVML: {error})",
                    "the node needs its administrator: dmesg | grep -i xid",
                ) from error
            raise PlatformError(f"NVML cannot tell about {what}: {error}") from error


def device_nodes() -> int:
    """Return how many GPUs the driver's device nodes show; loads neither CUDA nor NVML."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def open_nvml() -> Nvml | None:
    """Return NVML where there are GPUs; warn if it does not work there."""
    if not device_nodes():
        return None
    try:
        return Nvml()
    except PlatformError as error:
        logger.warning(
            "the memory of GPUs cannot be read, so only slots decide which fits may start: %s",
            error,
        )
        return None
