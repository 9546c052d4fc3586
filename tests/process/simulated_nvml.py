"""GPUs that are not there: NVML's answers, made from files that processes write.

A process "has" memory of a GPU while it lives and a file with its pid as name says how much, so
that a killed process gives its memory back as on a real GPU.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from fedhpc.errors import PlatformError
from fedhpc.isolation.nvml import Gpu, Reading

GB = 1_000_000_000
CARD = Gpu("GPU-0a1b2c3d-0000-4000-8000-000000000001", "Simulated 10 GB", 10 * GB)


class SimulatedNvml:
    """Has the calls of `fedhpc.isolation.nvml.Nvml`.

    Parameters
    ----------
    cards : sequence of sequence of Gpu
        As `cards` returns them.
    folder : Path, optional
        Where processes write what they have (`allocate`).

    Attributes
    ----------
    foreign : dict
        Bytes by pid that other programs have.
    unseen_bytes : int
        What processes have that cannot be seen from here.
    tells_processes : bool
        Whether it knows who has what; in many containers it does not.
    error : PlatformError or None
        Raised instead of an answer.
    asked : int
        How often memory was read.
    pause_s : float
        How long an answer takes.
    """

    def __init__(
        self, cards: Sequence[Sequence[Gpu]] = ((CARD,),), folder: Path | None = None
    ) -> None:
        self._cards = [list(card) for card in cards]
        self._folder = folder
        self.foreign: dict[int, int | None] = {}
        self.unseen_bytes = 0
        self.tells_processes = True
        self.error: PlatformError | None = None
        self.asked = 0
        self.pause_s = 0.0

    def cards(self) -> list[list[Gpu]]:
        return self._cards

    def memory(self, gpu: Gpu) -> Reading:
        self.asked += 1
        time.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        processes = {**self.foreign, **self._allocated(gpu)}
        used = self.unseen_bytes + sum(bytes_ or 0 for bytes_ in processes.values())
        if not self.tells_processes:
            processes = {}
        return Reading(gpu.total_bytes, gpu.total_bytes - used, processes)

    def _allocated(self, gpu: Gpu) -> dict[int, int]:
        found = {}
        for file in self._folder.glob(f"{gpu.id}/[0-9]*") if self._folder else ():
            if Path(f"/proc/{file.name}").exists() and (text := file.read_text()):
                found[int(file.name)] = int(text)
        return found


def allocate(folder: str | Path, bytes_: int) -> None:
    """Have so much of the GPU that this process sees, from now until it ends."""
    place = Path(folder) / os.environ["CUDA_VISIBLE_DEVICES"]
    place.mkdir(parents=True, exist_ok=True)
    beside = place / f".{os.getpid()}"
    beside.write_text(str(bytes_))
    beside.replace(place / str(os.getpid()))
