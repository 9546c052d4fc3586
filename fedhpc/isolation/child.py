"""What runs inside a child process: take a call, get a slot, run it, send the reply, end."""

import contextlib
import importlib
import json
import os
import resource
import select
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedhpc.errors import PlatformError
from fedhpc.isolation import admission, channel, cuda, host_memory, preloading
from fedhpc.isolation.calls import EXIT_CUDA_BEFORE_SLOT
from fedhpc.isolation.cleanliness import Cleanliness
from fedhpc.isolation.image import keep_what_is_freed
from fedhpc.isolation.locks import SlotGroup
from fedhpc.isolation.nvml import Reading

# Bytes as JSON; together with the rest they must fit into channel.MAX_MESSAGE.
_MAX_ERROR = 16 * 1024
_MAX_TRACEBACK = 64 * 1024
_MAX_LATE_IMPORTS = 100
_IDLE_LOOK_S = 0.05
_IDLE_TIMEOUT_S = 60.0


def main() -> None:
    """Serve as a spawned child: a new interpreter with its channel's number as argument."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    keep_what_is_freed()
    code = 1
    try:
        received = channel.receive(sock)
        code = 0 if received is None else Child(sock, received.message).serve()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        leave(code)


def leave(code: int) -> None:
    """End this process at once, without the interpreter's slow teardown."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


_Call = tuple[dict[str, Any], list[channel.Buffer]]


class Child:
    """Answers calls until ``options["fits"]`` of them are done or the pool is gone.

    Parameters
    ----------
    sock : socket
        The channel to the pool.
    options : dict
        ``prepare``: "module:function" to call before the first call, or None; ``prepare_arg``: its
        argument; ``prepare_now``: whether before there is a slot; ``fits``: calls to answer, 0: no
        limit, "auto": as long as it is clean (`cleanliness`);
        ``threads``: of torch; ``learn``: whether to tell what could be preloaded; ``env``:
        environment of the slot; ``refuse``: what to answer to every call, or "".
    """

    def __init__(self, sock: socket.socket, options: dict[str, Any]) -> None:
        self._sock = sock
        self._options = options
        self._slot: admission.Admission | None = None
        self._group: SlotGroup | None = None
        self._has_gpu = bool(options["env"].get("CUDA_VISIBLE_DEVICES"))
        self._failure: dict[str, Any] | None = None
        self._prepared = False
        self._limited = False
        self._cleanliness: Cleanliness | None = None
        self._done = 0
        self._calls: deque[_Call] = deque()  # ahead of their turn

    def serve(self) -> int:
        """Serve and return the exit code."""
        os.environ.update(self._options["env"])
        modules_at_start = len(sys.modules)
        if self._options["refuse"]:
            self._failure = {"error": self._options["refuse"], "traceback": ""}
        elif self._options["prepare_now"]:
            self._prepare()
            if cuda.is_initialised():
                return EXIT_CUDA_BEFORE_SLOT
        while (received := self._next_call()) is not None:
            self._done += 1
            reply, buffers = self._answer(*received)
            late = preloading.imported_since(modules_at_start)
            reply["late_imports"] = late[:_MAX_LATE_IMPORTS]
            if late and self._options["learn"] and "error" not in reply:
                reply["learnable"] = preloading.learnable(late)
            if self._slot is not None and not self._slot.lock.is_in_place():
                reply["lost_lock"] = str(self._slot.lock.path)
            reply["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            last = (
                self._done == self._options["fits"]
                or self._failure is not None
                or reply.get("out_of_memory", False)
                or reply.get("refused_memory", False)
                or reply.get("platform", False)  # it has no slot
                # After some errors CUDA fails in this process for ever, and none tells which.
                or ("error" in reply and (cuda.is_initialised() or self._proves_itself()))
                or self._is_in_the_way()
            )
            last = last or self._has_changed(reply, buffers)
            reply["last"] = last
            if last:
                self._release_cores()
            reply["answered_s"] = time.monotonic()
            try:
                channel.send_buffers(self._sock, reply, buffers)
            except ConnectionError:
                break
            finally:
                channel.close_all(buffers)
            if last:
                break
        return 0

    # --- between calls ---

    def _next_call(self) -> _Call | None:
        """Wait for a call; None when it is time to leave."""
        if self._calls:
            return self._calls.popleft()
        if self._done:
            end_s = time.monotonic() + _IDLE_TIMEOUT_S
            while not select.select([self._sock], [], [], _IDLE_LOOK_S)[0]:
                if self._is_in_the_way() or time.monotonic() > end_s:
                    return None
        received = channel.receive(self._sock)
        return None if received is None else _call_of(received)

    def _proves_itself(self) -> bool:
        """Return whether it is to be kept only as long as it is clean."""
        return bool(self._options["fits"] == "auto")

    def _has_changed(self, reply: dict[str, Any], buffers: list[channel.Buffer]) -> bool:
        """Return whether this process is not to be used again; why is told with the reply."""
        if self._cleanliness is None:
            return False
        known = [buffers, *(of for _, of in self._calls)]
        own = {fd for of in known for fd in channel.descriptors(of)}
        try:
            changes = _clip("; ".join(self._cleanliness.changes(own)), _MAX_ERROR)
        except Exception as error:  # what cannot be proven is not so
            changes = f"it could not be looked at: {type(error).__name__}: {error}"
        if changes:
            reply["replaced"] = changes
        return bool(changes)

    def _is_in_the_way(self) -> bool:
        """Return whether somebody waits for the slot that this process would keep.

        Or has it already, as the file that is locked here was removed.
        """
        if self._slot is not None and not self._slot.lock.is_in_place():
            return True
        return self._group is not None and bool(self._group.gate().waiting())

    def _release_cores(self) -> None:
        """Let the next fit have the cores while this process ends; a GPU's memory is still used."""
        if self._slot is not None and not self._has_gpu:
            self._slot.lock.release()
            self._slot = None

    # --- a call ---

    def _answer(
        self, call: dict[str, Any], buffers: list[channel.Buffer]
    ) -> tuple[dict[str, Any], list[channel.Buffer]]:
        reply_buffers: list[channel.Buffer] = []
        try:
            views = [channel.view(buffer) for buffer in buffers]
            channel.close_all(buffers)
            try:
                wait_s = self._take_slot(call)
            except PlatformError as error:  # a lock file that cannot be used
                told = {"error": error.message, "hint": error.hint, "platform": True}
                return told, []
            if not self._prepared and self._failure is None:
                self._prepare()
            if self._failure is not None:
                return dict(self._failure), []
            function = resolve(call["entry"])
            cuda.begin()
            if self._proves_itself() and self._cleanliness is None:
                self._cleanliness = Cleanliness()
            entered_s = time.monotonic()
            results = function(*views)
            returned_s = time.monotonic()
            room = channel.MAX_INLINE
            for parts in results:
                size = sum(memoryview(part).nbytes for part in parts)
                is_small = size <= room
                room -= size if is_small else 0
                reply_buffers.append(b"".join(parts) if is_small else channel.write_memory(parts))
            if len(reply_buffers) > channel.MAX_FDS:
                raise ValueError(
                    f"{call['entry']} returned {len(reply_buffers)} buffers,"
                    f" expected at most {channel.MAX_FDS}"
                )
        except BaseException as error:
            channel.close_all(reply_buffers)
            refused = self._limited and host_memory.is_refused(error)
            if refused:
                host_memory.lift_limit()  # to say it takes memory too; then this process leaves
            failure = {**_describe(error), "refused_memory": refused}
            with contextlib.suppress(Exception):  # a broken context must not hide the error
                failure |= self._gpu_use()
            return failure, []
        return {
            "entered_s": entered_s,
            "returned_s": returned_s,
            "wait_s": wait_s,
            **self._gpu_use(),
        }, reply_buffers

    def _prepare(self) -> None:
        """Call what is to be called once; a failure is told to whoever calls."""
        try:
            prepare(self._options)
        except BaseException as error:
            self._failure = _describe(error)
        self._prepared = True
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._options["threads"])

    def _take_slot(self, call: dict[str, Any]) -> float:
        """Wait for a slot and memory, unless they are there from the call before."""
        wait_s, before, terms = 0.0, None, admission.Terms()
        takes_slot = call["request"] is not None and self._slot is None
        if takes_slot:
            request = admission.Request(**call["request"])
            self._slot = admission.admit(request, self._ask, self._tell_waiting)
            self._group = SlotGroup(Path(request.folder), request.key)
            wait_s = self._slot.wait_s
            terms = self._slot.terms
            if isinstance(terms.reading, Reading):
                before = terms.reading.used_bytes
        elif self._has_gpu and self._done == 1:  # no locks, but its share is its share
            terms = self._ask()
        if terms.cap_bytes:
            cuda.cap(terms.cap_bytes)
        if call["host_bytes"] and self._done == 1 and not self._has_gpu:
            host_memory.limit_own_data(call["host_bytes"])
            self._limited = True
        if takes_slot or self._done == 1:  # else the pool knows that it has its slot
            self._tell({"event": "admitted", "wait_s": wait_s, "gpu_before_bytes": before})
        return wait_s

    def _gpu_use(self) -> dict[str, Any]:
        """Return the most that this process had of its GPU, its context included where known."""
        peak, now = cuda.held_bytes()
        if not peak:
            return {}
        context = None
        with contextlib.suppress(ConnectionError):
            reading = self._ask().reading
            used = reading.processes.get(os.getpid()) if isinstance(reading, Reading) else None
            if used:
                context = max(0, used - now)
        return {"gpu_peak_bytes": peak, "gpu_context_bytes": context}

    # --- the pool ---

    def _tell(self, message: dict[str, Any]) -> None:
        channel.send(self._sock, message)

    def _tell_waiting(self, reason: str) -> None:
        self._tell({"event": "waiting", "reason": reason})

    def _ask(self) -> admission.Terms:
        """Ask the pool, which has NVML open, for the memory of this child's GPU, and its share."""
        self._tell({"event": "terms?"})
        while (received := channel.receive(self._sock)) is not None:
            if "entry" not in received.message:
                break
            self._calls.append(_call_of(received))
        else:
            raise ConnectionResetError("the pool is gone")
        terms, reading = received.message, received.message["reading"]
        if isinstance(reading, dict):
            processes = {int(pid): used for pid, used in reading["processes"].items()}
            terms["reading"] = Reading(reading["total_bytes"], reading["free_bytes"], processes)
        return admission.Terms(**terms)


def _call_of(received: channel.Received) -> _Call:
    return received.message, channel.buffers_of(received)


def prepare(options: dict[str, Any]) -> None:
    """Call the function that ``options["prepare"]`` names, if any."""
    if options["prepare"]:
        resolve(options["prepare"])(options["prepare_arg"])


def _describe(error: BaseException) -> dict[str, Any]:
    """Return an exception as a reply."""
    text = "".join(traceback.format_exception(error))
    message = "".join(traceback.format_exception_only(error)).strip()
    return {
        "error": _clip(message, _MAX_ERROR),
        "traceback": _clip(text, _MAX_TRACEBACK),
        "out_of_memory": cuda.is_out_of_memory(error),
    }


def _clip(text: str, limit: int) -> str:
    """Shorten a text to ``limit`` bytes of JSON; type and end of an error are what counts."""
    while (size := len(json.dumps(text))) > limit:
        keep = len(text) * limit // size // 2 - 8
        text = f"{text[:keep]} [...] {text[-keep:]}"
    return text


def resolve(reference: str) -> Callable[..., Any]:
    """Return the function that ``module:attribute`` names.

    Raises
    ------
    ImportError, AttributeError
        If there is none.
    """
    module, _, attribute = reference.partition(":")
    target: Any = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
