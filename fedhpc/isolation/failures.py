"""Why a call has no result, in words that help."""

import signal
from typing import Any

from fedhpc.errors import (
    FitCancelled,
    FitDied,
    FitFailed,
    FitKilled,
    FitOutOfMemory,
    ForkServerDied,
    PlatformError,
    SlotTimeout,
)
from fedhpc.isolation import host_memory
from fedhpc.isolation.calls import Call


def died(
    exit_code: int | None, oom_kills_before: tuple[int, int], memory_limit_bytes: int | None
) -> FitDied:
    """Return the error for a child that ended without a reply.

    Parameters
    ----------
    exit_code : int or None
        Negative: the signal that killed it; None: its fork server ended.
    oom_kills_before : tuple
        What `host_memory.oom_kills` said when the call began.
    memory_limit_bytes : int or None
        Set if the pool itself killed it, as it had used more host memory than this.
    """
    if memory_limit_bytes is not None:
        return FitDied(
            "the child was killed, as it and its descendants used more host memory than the"
            f" {memory_limit_bytes / 1e9:g} GB of isolation.host_memory_gb",
            "raise isolation.host_memory_gb, or lower the batch size or the loader's workers",
        )
    if exit_code is None:
        return ForkServerDied("the fork server ended, and the child with it", "see its log")
    if exit_code >= 0:
        return FitDied(
            f"the child exited with code {exit_code} before it replied",
            "does the app call exit()? its output is in the array task's log",
        )
    if -exit_code == signal.SIGKILL:
        return _killed(oom_kills_before)
    if -exit_code == signal.SIGTERM:
        # Slurm sends it to every process of a job that it ends, and so to ours too.
        return FitKilled("the child was killed by SIGTERM", "does the app send it to itself?")
    hint = None
    if -exit_code == signal.SIGSEGV:
        hint = "a crash in native code; try isolation.start_method: spawn"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal
        name = f"signal {-exit_code}"
    return FitDied(f"the child was killed by {name}", hint)


def _killed(before: tuple[int, int]) -> FitKilled:
    in_job, on_node = host_memory.oom_kills()
    hint = "raise cluster.mem_gb, or lower isolation.slots or the batch size"
    if in_job > before[0]:
        error = FitKilled(
            "the child was killed by the kernel's out-of-memory killer (SIGKILL): the job had used"
            " all the memory it may use",
            hint,
        )
    elif on_node > before[1]:
        error = FitKilled(
            "the child was killed by SIGKILL, just when the kernel's out-of-memory killer was at"
            " work on this node",
            hint,
        )
    else:
        return FitKilled(
            "the child was killed by SIGKILL", f"if it was the memory limit of the job: {hint}"
        )
    error.for_memory = True
    return error


def cancelled() -> FitCancelled:
    """Return the error for a child that the pool was told to kill."""
    return FitCancelled("the call was cancelled, and its child killed")


def too_late(call: Call, waits_for: str, *, admitted: bool) -> FitDied | SlotTimeout:
    """Return the error for a call that passed a deadline.

    Parameters
    ----------
    call : Call
        Which one.
    waits_for : str
        What it waits for, in words; "" if it has not said anything.
    admitted : bool
        Whether it had its slot.
    """
    if admitted:
        return FitDied(
            f"no reply within {call.timeout_s:g} s; the child and its descendants were killed",
            "raise isolation.fit_timeout_s, or look for a hang in the app",
        )
    if waits_for:
        return SlotTimeout(
            f"waited {call.slot_timeout_s:g} s for a slot: {waits_for}",
            "raise isolation.slot_timeout_s, or use fewer array tasks or runs on this node",
        )
    return FitDied(
        f"the child was not ready within {call.slot_timeout_s:g} s; it was killed",
        "does the app's import hang? else raise isolation.slot_timeout_s",
    )


def raised(reply: dict[str, Any], memory_limit_bytes: int | None) -> FitFailed | PlatformError:
    """Return the error for a call whose function raised, or whose child could ask for no slot.

    Parameters
    ----------
    reply : dict
        Of its child.
    memory_limit_bytes : int or None
        What it might use on the host.
    """
    if reply.get("platform"):
        return PlatformError(reply["error"], reply["hint"])
    if not reply.get("out_of_memory"):
        hint = None
        if memory_limit_bytes is not None and reply.get("refused_memory"):
            hint = (
                f"it may use {memory_limit_bytes / 1e9:g} GB of host memory: raise"
                " isolation.host_memory_gb, or lower the batch size"
            )
        return FitFailed(reply["error"], reply["traceback"], hint)
    error = FitOutOfMemory(
        reply["error"],
        reply["traceback"],
        "it had the GPU for itself: lower the batch size (training.batch_size) or use a smaller"
        " model; if other programs use this GPU, lower isolation.slots_per_gpu",
    )
    error.need_bytes = (reply.get("gpu_peak_bytes") or 0) + (reply.get("gpu_context_bytes") or 0)
    return error
