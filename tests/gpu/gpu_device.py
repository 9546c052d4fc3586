"""The lines of these tests that touch a GPU, or ask the driver about one.

Only the standard library, torch (inside functions) and fedhpc.isolation: children import this.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedhpc.isolation.nvml import Gpu, Nvml, Reading

MIB, GIB = 1 << 20, 1 << 30

# --- in the tests' process: no CUDA here ---


@functools.cache
def probe() -> dict[str, Any]:
    """Return what torch says of the first GPU, asked in another process."""
    asked = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(asked.stdout)


def tell() -> None:
    import torch

    torch.zeros(1, device="cuda")
    gpu = torch.cuda.get_device_properties(0)
    uuid = str(getattr(gpu, "uuid", ""))
    known = {"name": gpu.name, "uuid": uuid, "total_bytes": gpu.total_memory}
    print(json.dumps(known))


class Meter:
    """Reads the memory of GPUs: by NVML if nvidia-ml-py is there, else by nvidia-smi."""

    def __init__(self, nvml: Nvml | None) -> None:
        self._nvml = nvml
        self._smi = shutil.which("nvidia-smi")

    @property
    def works(self) -> bool:
        return self._nvml is not None or self._smi is not None

    def reading(self, gpu: Gpu) -> Reading:
        if self._nvml is not None:
            return self._nvml.memory(gpu)
        ((total, used),) = self._ask("--query-gpu=memory.total,memory.used", gpu)
        apps = self._ask("--query-compute-apps=pid,used_memory", gpu)
        processes = {
            int(pid): int(mib) * MIB if mib.isdigit() else None
            for pid, mib in apps
            if pid.isdigit()
        }
        return Reading(int(total) * MIB, (int(total) - int(used)) * MIB, processes)

    def _ask(self, query: str, gpu: Gpu) -> list[list[str]]:
        assert self._smi is not None
        command = [self._smi, query, "--format=csv,noheader,nounits", "-i", gpu.id]
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return [line.split(", ") for line in text.stdout.splitlines() if line.strip()]


def cuda_library_in(pid: int | str) -> bool:
    """Return whether a process has loaded the driver's CUDA library."""
    return "libcuda.so" in Path(f"/proc/{pid}/maps").read_text()


def device_files_in(pid: int | str) -> list[str]:
    """Return the driver's device files that a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            found.append(target)
    return found


# --- in children ---


def device() -> Any:
    from fedhpc.isolation.devices import device_of_this_child

    return device_of_this_child()


def allocate(size: int) -> Any:
    """Take memory of the GPU and write to it; it is given back with the returned object."""
    import torch

    block = torch.ones(size, dtype=torch.uint8, device=device())
    torch.cuda.synchronize()
    return block


def seen() -> dict[str, Any]:
    """Return which devices this process sees."""
    import torch

    return {
        "device": str(device()),
        "count": torch.cuda.device_count(),
        "uuid": str(getattr(torch.cuda.get_device_properties(0), "uuid", "")),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def break_context() -> None:
    """Read outside of an array on the GPU: every later call of CUDA in this process fails."""
    import torch

    values = torch.arange(4, device=device())
    values[torch.tensor([4000], device=values.device)].sum().item()


def count_devices() -> None:
    """Ask CUDA, not NVML, for the number of devices: no context, but no fork may follow either."""
    import torch

    torch._C._cuda_getDeviceCount()


def synchronize() -> None:
    import torch

    torch.cuda.synchronize()


if __name__ == "__main__":
    tell()
