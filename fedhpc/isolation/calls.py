"""What a call to a child is given, and what comes back."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedhpc.isolation import channel
from fedhpc.isolation.admission import Need, Request, Terms
from fedhpc.isolation.nvml import Reading
from fedhpc.isolation.slots import Slot

# Without torch._dynamo each child pays 1.1 s at its first optimizer step.
DEFAULT_PRELOAD = ("numpy", "torch", "torch._dynamo", "torch.optim")

# How a child ends that has a CUDA context before it has a slot.
EXIT_CUDA_BEFORE_SLOT = 77


@dataclass(frozen=True)
class PoolOptions:
    """How children are made.

    Attributes
    ----------
    start_method : {"forkserver", "spawn"}
        Fork from a process that has preloaded the slow modules, or start a new interpreter.
    fits_per_process : int or "auto"
        Calls before a child is replaced; 1: always a fresh one; 0: never replaced; auto: when a
        call raised, or left the process other than it was (`cleanliness`). A child that is
        kept keeps its slot; it leaves when another process waits for that, when a call needs
        more memory than it was admitted for, or after a minute without work.
    threads_per_fit : int
        Threads of torch and OpenMP in a child.
    standby : bool
        Prepare the next child while its predecessor works; else only when it is told to
        (`ChildPool.stand_by`).
    preload : sequence of str
        Modules to import in the fork server; they must neither touch CUDA nor start threads.
    learn_preload : bool
        Import there, too, what the first children import late, if it is of installed packages and
        neither touches CUDA nor starts threads (`preloading`).
    prepare : str, optional
        "module:function", called with ``prepare_arg`` in each child before its first call.
    prepare_early : bool
        Call it once in the fork server instead. It must neither touch CUDA nor start threads.
    rehearse : str, optional
        "module:function", called with ``prepare_arg`` in the fork server after ``prepare``, so that
        children inherit what a first fit sets up. For pools without GPUs, which it must not see;
        it must not start threads.
    huge_pages : bool
        Spend up to a second of the fork server's, between requests, to make every fork cheaper.
    host_memory_bytes : int, optional
        What a fit may use on the host, more than its child has at the start. On the CPU the kernel
        refuses more (`host_memory.limit_own_data`).
    """

    start_method: Literal["forkserver", "spawn"] = "forkserver"
    fits_per_process: int | Literal["auto"] = 1
    threads_per_fit: int = 1
    standby: bool = True
    preload: Sequence[str] = DEFAULT_PRELOAD
    learn_preload: bool = False
    prepare: str | None = None
    prepare_arg: str = ""
    prepare_early: bool = False
    rehearse: str | None = None
    huge_pages: bool = True
    host_memory_bytes: int | None = None

    def for_child(self) -> dict[str, Any]:
        """Return what each child is told."""
        return {
            "prepare": self.prepare,
            "prepare_arg": self.prepare_arg,
            "fits": self.fits_per_process,
            "threads": self.threads_per_fit,
            "learn": self.learn_preload and self.start_method == "forkserver",
            "refuse": "",
        }

    def for_fork_server(self) -> dict[str, Any]:
        """Return what the fork server is told."""
        spawn = self.start_method == "spawn"
        return {
            "preload": [] if spawn else list(self.preload),
            "spawn": spawn,
            "huge_pages": self.huge_pages and not spawn,
            "prepare_early": self.prepare_early and not spawn,
            "rehearse": None if spawn else self.rehearse,
            "child": self.for_child(),
        }

    def env(self) -> dict[str, str]:
        """Return the environment of the fork server and its children."""
        threads = str(self.threads_per_fit)
        # Of a MIG device torch asks CUDA, not NVML, and then no fork can use CUDA any more. So the
        # fork server sees the card; each child is told its own device.
        mig = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
        return {
            **({"CUDA_VISIBLE_DEVICES": "0"} if mig else {}),
            # Else torch's first backward pass would ask CUDA for GPUs and start a thread for each.
            **({"CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {}),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",  # the order of sets is the same in every array task
            # Older versions of torch set it at the first use of a GPU: it would seem a fit's doing.
            "CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "LAZY"),
            # torch.cuda.is_available() at an app's import then asks NVML and makes no context.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }


@dataclass(frozen=True)
class Ahead:
    """A call of the same function that will follow in the same slot.

    Attributes
    ----------
    tag : str
        Which call it will be: no other one of the slot has it.
    buffers : sequence
        See `Call`.
    need : callable
        See `Call`.
    """

    tag: str
    buffers: tuple[channel.Buffer, ...]
    need: Callable[[], Need | None] = lambda: None


@dataclass(frozen=True)
class Call:
    """A call, and what it may take.

    Attributes
    ----------
    entry : str
        "module:function". It is called with one memoryview a buffer, and returns a sequence of at
        most 250 buffers, each a sequence of bytes-like parts.
    buffers : sequence
        At most 250. Descriptors of memfds or files, which the caller keeps and closes, or bytes: at
        most 64 KiB in all.
    slot : Slot
        Where it runs. One call at a time in each slot of a pool.
    timeout_s : float
        Deadline from the moment that it has its slot. At it the child and all its descendants are
        killed.
    slot_timeout_s : float
        Deadline until it has its slot.
    tag : str
        What `ChildPool.cancel` may know the call by.
    label : str
        Who it is, for others that wait for its slot.
    need : callable
        Returns what it needs of GPU memory, as far as is known now; None: nothing is, then it gets
        its GPU alone.
    capped : bool
        Whether torch is held to the need.
    on_admitted : callable, optional
        Called when it has its slot, with the bytes in use on its GPU just before, where known.
    following : sequence of Ahead
        What a kept child may have already, to begin with it as soon as it has answered this call.
    """

    entry: str
    buffers: tuple[channel.Buffer, ...]
    slot: Slot
    timeout_s: float
    slot_timeout_s: float
    tag: str = ""
    label: str = ""
    need: Callable[[], Need | None] = lambda: None
    capped: bool = True
    on_admitted: Callable[[int | None], None] | None = None
    following: tuple[Ahead, ...] = ()

    def message(self, *, alone: bool, host_bytes: int | None) -> dict[str, Any]:
        """Return what the child is told."""
        slot, request = self.slot, None
        if slot.lock_folder is not None:
            request = vars(
                Request(
                    folder=str(slot.lock_folder),
                    key=slot.lock_key,
                    limit=slot.limit,
                    label=self.label or f"pid {os.getpid()}",
                    gpu=bool(slot.gpus),
                    alone=alone,
                    exclusive=any(gpu.exclusive for gpu in slot.gpus),
                )
            )
        return {"entry": self.entry, "request": request, "host_bytes": host_bytes}

    def terms(self, reading: Reading | str | None, *, alone: bool) -> dict[str, Any]:
        """Return what the child is told when it asks for its `admission.Terms`."""
        terms, need = Terms(reading), self.need()
        if need is not None:
            cap = need.cap_bytes if self.capped and not alone else None
            terms = Terms(reading, need.total_bytes, need.least_bytes, cap)
        return asdict(terms)


@dataclass
class Reply:
    """What a call returned.

    Attributes
    ----------
    buffers : list
        One for each buffer that the function returned: bytes if it is small, else the descriptor of
        a memfd (`channel.view` reads either). The receiver closes them (`close`).
    wait_s : float
        Seconds that it waited for its slot, and for memory.
    start_s, run_s, return_s : float
        Seconds from the call until the function was entered (the wait excepted), inside it, and
        until its reply arrived. Of a child that has calls ahead they are those of the child: from
        its last answer, and until it could go on to the next call.
    peak_rss_mb : float
        Highest resident memory of the child, shared pages of the fork server included.
    late_imports : list of str
        Modules (the first 100) that the child had to import itself, in their order.
    gpu_before_bytes : int or None
        What was in use on its GPU, by anybody, when it got its slot.
    gpu_peak_bytes : int or None
        The most that it had of its GPU; without its context where NVML does not tell that.
    gpu_context_bytes : int or None
        Of these, its context.
    out_of_memory : bool
        Whether it ran again, alone on its GPU, as there was not enough memory at first.
    replaced : str
        Why its process is not kept, where that depends on how the call left it; else "".
    gone : Event or None
        Set when its process is gone; None: the process is kept.
    """

    buffers: list[channel.Buffer]
    wait_s: float
    start_s: float
    run_s: float
    return_s: float
    peak_rss_mb: float
    late_imports: list[str]
    gpu_before_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    gpu_context_bytes: int | None = None
    out_of_memory: bool = False
    replaced: str = ""
    gone: threading.Event | None = None

    def close(self) -> None:
        """Give the memory of the buffers back."""
        channel.close_all(self.buffers)
        self.buffers = []
