"""A pool of child processes: calls in, replies out, each call in a slot."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedhpc.errors import (
    FitDied,
    FitOutOfMemory,
    GpuLost,
    PlatformError,
)
from fedhpc.isolation import ahead, channel, failures, host_memory
from fedhpc.isolation.admission import Need, Terms, can_be_met, check_need
from fedhpc.isolation.calls import EXIT_CUDA_BEFORE_SLOT, Ahead, Call, PoolOptions, Reply
from fedhpc.isolation.children import Child, Children, wanted_bytes
from fedhpc.isolation.nvml import Nvml, Reading
from fedhpc.isolation.slots import Slot

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT_S = 5.0
_LATELY_S = 0.5


class _Left(Exception):
    """A child that was kept, or stood by, has left: the call is another's."""


class ChildPool:
    """Calls functions in child processes, each call in a slot that the caller owns.

    ``run`` may be called from several threads at once, one for each slot.

    Parameters
    ----------
    options : PoolOptions
        How children are made.
    nvml : Nvml, optional
        Where the memory of GPUs is read. Without it slots alone decide who may start.
    """

    def __init__(self, options: PoolOptions, nvml: Nvml | None = None) -> None:
        self._options = options
        self._nvml = nvml
        self._children = Children(options)
        self._oom_kills_lately = (0, 0)
        self._oom_kills_until_s = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the fork server. It preloads in the background; the first call waits for it."""
        self._children.start()

    def close(self) -> None:
        """End the fork server and every child; returns when they are gone."""
        self._children.close()

    def run(
        self,
        entry: str,
        buffers: Iterable[channel.Buffer],
        *,
        slot: Slot,
        timeout_s: float,
        slot_timeout_s: float | None = None,
        tag: str = "",
        label: str = "",
        need: Need | Callable[[], Need | None] | None = None,
        capped: bool = True,
        on_admitted: Callable[[int | None], None] | None = None,
        following: Iterable[Ahead] = (),
    ) -> Reply:
        """Call ``entry`` in a child and return what it returned.

        A call that runs out of GPU memory runs once more, alone on its GPU.

        Parameters
        ----------
        entry, buffers, slot, timeout_s, slot_timeout_s, tag, label, need, capped, on_admitted,
        following
            See `Call`; ``need`` may also be one that does not change, which its GPU must have.
            Without ``slot_timeout_s``, ``timeout_s`` holds until the slot, and again from there.

        Raises
        ------
        FitFailed
            If the function raised; with the child's traceback. `FitOutOfMemory` if there was not
            enough GPU memory.
        FitDied
            If the child ended without a reply, or passed the deadline. `FitCancelled` after
            `cancel`.
        SlotTimeout
            If there was no slot or no memory in time.
        GpuLost
            If the slot's GPU does not answer.
        PlatformError
            If the pool is closed, no child could be started, or a lock file cannot be used.
        """
        limit_s = timeout_s if slot_timeout_s is None else slot_timeout_s
        total_bytes = min((gpu.total_bytes for gpu in slot.gpus), default=0)
        if not callable(need):
            check_need(need, total_bytes, ", ".join(gpu.id for gpu in slot.gpus))

        def needs() -> Need | None:
            known = need() if callable(need) else need
            # Learned on a larger GPU: here it gets the GPU alone, and may do with less.
            return known if can_be_met(known, total_bytes) else None

        call = Call(
            entry, tuple(buffers), slot, timeout_s, limit_s, tag, label, needs, capped, on_admitted,
            tuple(following),
        )  # fmt: skip
        _check_buffers(call.buffers)
        try:
            return self._run(call, alone=False)
        except FitOutOfMemory as error:
            if not slot.gpus:
                raise
            logger.warning("%s ran out of GPU memory; it runs again, alone", label or entry)
            first = error
        try:
            reply = self._run(call, alone=True)
        except FitOutOfMemory as error:
            error.need_bytes = max(error.need_bytes, first.need_bytes)
            raise
        reply.out_of_memory = True
        return reply

    def cancel(self, tag: str) -> None:
        """Kill the children of calls with this tag; the calls raise `FitCancelled`."""
        self._children.cancel(tag)

    def pass_over(self, slot: Slot) -> None:
        """Forget the calls that a slot's child has ahead.

        To be called when none of them follows, so that the child neither works on that for long nor
        waits for an answer.
        """
        child = self._children.take_back(slot)
        if child is not None and self._pass_over(child, "", slot):
            self._children.answered(child, slot, keep=True)

    def stand_by(self, slot: Slot) -> None:
        """Prepare the child for the next call in a slot that has nothing to do."""
        self._children.stand_by(slot)

    def kill_for_memory(self, pid: int) -> None:
        """Kill a child that used more host memory than it may; its call raises `FitDied`."""
        self._children.kill_for_memory(pid)

    def children(self) -> dict[int, str]:
        """Return live children by pid: the tag of their call until they end; "" between calls."""
        return self._children.pids()

    def standing_by(self) -> set[int]:
        """Return the pids of children that have had no call yet."""
        return self._children.standing_by()

    def waiting(self) -> list[str]:
        """Return what calls wait for that have no slot yet, in words."""
        return self._children.waiting()

    def fork_server(self) -> int | None:
        """Return the pid of the fork server, if it lives."""
        return self._children.fork_server()

    # --- calls ---

    def _run(self, call: Call, *, alone: bool) -> Reply:
        called_s = time.monotonic()
        oom_kills = self._oom_kills()
        while True:
            child = self._children.take(call)
            since_s = child.answered_s if call.tag in child.sent else called_s
            try:
                received = self._exchange(child, call, alone=alone)
                break
            except _Left:
                continue
            except BaseException:
                # Not waited for: whoever interrupts the caller must not wait for the child.
                child.doomed = True
                self._children.kill(child)
                raise
            finally:
                child.waits_for = ""
        if received is None:
            self._oom_kills_until_s = 0.0
            raise self._death(child, oom_kills)
        reply, buffers, admitted = received
        self._children.answered(child, call.slot, keep=not reply["last"])
        child.took_s = reply["answered_s"] - since_s
        child.answered_s = reply["answered_s"]
        if "learnable" in reply:
            self._children.learn(reply["learnable"])
        if lost := reply.get("lost_lock"):
            logger.warning(
                "isolation.lock_dir: %s was removed while a fit held it, so more fits than allowed"
                " may have run; nothing may clean that folder while jobs run",
                lost,
            )
        if "error" in reply:
            raise failures.raised(reply, self._options.host_memory_bytes)
        peak, context = reply.get("gpu_peak_bytes"), reply.get("gpu_context_bytes")
        until_s = child.answered_s if child.sent else time.monotonic()
        return Reply(
            buffers=buffers,
            wait_s=admitted["wait_s"],
            start_s=reply["entered_s"] - since_s - admitted["wait_s"],
            run_s=reply["returned_s"] - reply["entered_s"],
            return_s=until_s - reply["returned_s"],
            peak_rss_mb=reply["peak_rss_mb"],
            late_imports=reply["late_imports"],
            gpu_before_bytes=admitted["gpu_before_bytes"],
            gpu_peak_bytes=None if peak is None else peak + (context or 0),
            gpu_context_bytes=context,
            replaced=reply.get("replaced", ""),
            gone=child.exited if reply["last"] else None,
        )

    def _oom_kills(self) -> tuple[int, int]:
        """Return what `host_memory.oom_kills` said lately: it takes a tenth of a short call."""
        now_s = time.monotonic()
        if now_s > self._oom_kills_until_s:
            self._oom_kills_lately = host_memory.oom_kills()
            self._oom_kills_until_s = now_s + _LATELY_S
        return self._oom_kills_lately

    def _exchange(
        self, child: Child, call: Call, *, alone: bool
    ) -> tuple[dict[str, Any], list[channel.Buffer], dict[str, Any]] | None:
        """Send a call, answer the child's questions and wait for its reply; None if it is gone."""
        deadline_s = time.monotonic() + call.slot_timeout_s
        nothing = {"wait_s": 0.0, "gpu_before_bytes": None}
        admitted: dict[str, Any] | None = None
        message = call.message(alone=alone, host_bytes=self._options.host_memory_bytes)

        def begin(told: dict[str, Any]) -> None:
            nonlocal admitted, deadline_s
            admitted, child.waits_for = told, ""
            deadline_s = time.monotonic() + call.timeout_s
            if self._options.standby:  # not sooner: the fork takes a core
                self._children.prepare_successor(call.slot)
            if call.on_admitted is not None:
                call.on_admitted(told["gpu_before_bytes"])

        try:
            if not self._pass_over(child, call.tag, call.slot):
                raise _Left
            if call.tag not in child.sent:
                child.sock.settimeout(call.slot_timeout_s)
                ahead.send(child, call.tag, message, call.buffers)
            if child.kept:  # it has its slot: a message less in each fit
                if not alone:
                    ahead.send_following(child, call, message)
                begin(nothing)
                if not call.slot.gpus:  # there the child asks for its memory at the end
                    ahead.linger(child)
            while True:
                child.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                received = channel.receive(child.sock)
                if received is None:
                    _gone(child, admitted)
                    return None
                answer = received.message
                match answer.get("event"):
                    case "terms?":
                        terms = call.terms(self._read_memory(call.slot), alone=alone)
                        if admitted is None:
                            child.promise = wanted_bytes(None if alone else terms["need_bytes"])
                        channel.send(child.sock, terms)
                    case "waiting":
                        child.waits_for = answer["reason"]
                        logger.info("%s waits: %s", call.label or call.entry, answer["reason"])
                    case "admitted":
                        begin(answer)
                    case _:
                        child.sent.popleft()
                        # Without a slot it can only be an error.
                        return answer, channel.buffers_of(received), admitted or nothing
        except ConnectionError:
            _gone(child, admitted)
            return None
        except TimeoutError:
            self._children.kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            raise failures.too_late(call, child.waits_for, admitted=admitted is not None) from None
        except OSError as error:
            if child.exited.is_set():
                _gone(child, admitted)
                return None
            raise PlatformError(f"the channel to a child failed: {error.strerror}") from error

    def _pass_over(self, child: Child, tag: str, slot: Slot) -> bool:
        """Return whether a child is to be used for a call, without others that it has ahead."""
        try:
            useful = ahead.pass_over(child, tag, lambda: asdict(Terms(self._read_memory(slot))))
        except GpuLost:  # the next call finds it out too
            useful = False
        if not useful:
            self._children.kill(child)
        return useful

    def _read_memory(self, slot: Slot) -> Reading | str | None:
        """Return the memory of a slot's GPU, or why it cannot be told now; None: not at all."""
        if self._nvml is None or not slot.gpus or not slot.gpus[0].total_bytes:
            return None
        try:
            return self._nvml.memory(slot.gpus[0])
        except GpuLost:
            raise
        except PlatformError as error:
            return error.message

    def _death(self, child: Child, oom_kills: tuple[int, int]) -> FitDied:
        told = child.exited.wait(1.0)
        if not told and not (_has_ended(child.pid) and child.exited.wait(_EXIT_TIMEOUT_S)):
            self._children.kill(child)
            child.exited.wait(_EXIT_TIMEOUT_S)
            return FitDied(
                "the child closed its channel and lived on; it was killed",
                "does the app close descriptors that are not its own?",
            )
        if child.doomed and not child.over_memory:
            return failures.cancelled()
        limit = self._options.host_memory_bytes if child.over_memory else None
        return failures.died(child.exit_code, oom_kills, limit)


def _gone(child: Child, admitted: dict[str, Any] | None) -> None:
    """Tell a child that had left by itself, before it saw the call, from one that died.

    Of a kept one that is not known: its call begins anew, in another process.
    """
    if child.doomed or (admitted is not None and not child.kept):
        return
    child.exited.wait(_EXIT_TIMEOUT_S)
    on_gpu = bool(child.env["CUDA_VISIBLE_DEVICES"])  # there the next one is not made in advance
    # Whoever was kept may also have been killed meanwhile, which no call is to blame for.
    if (child.kept and child.exit_code is not None) or (
        on_gpu and child.exit_code == EXIT_CUDA_BEFORE_SLOT
    ):
        raise _Left


def _check_buffers(buffers: Sequence[channel.Buffer]) -> None:
    if len(buffers) > channel.MAX_FDS:
        raise ValueError(f"expected at most {channel.MAX_FDS} buffers, found {len(buffers)}")
    if (size := sum(map(len, channel.inline_data(buffers)))) > channel.MAX_INLINE:
        raise ValueError(f"expected at most {channel.MAX_INLINE} bytes, found {size}")
    for fd in channel.descriptors(buffers):
        os.fstat(fd)  # a bad descriptor is the caller's error, not the child's


def _has_ended(pid: int | None) -> bool:
    """Return whether a child has ended, though its fork server has not told yet."""
    if pid is None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
