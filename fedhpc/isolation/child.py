"""What runs inside a child process: take a call, run it, send the reply, end."""

import contextlib
import importlib
import itertools
import json
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from fedhpc.isolation import channel

# Bytes as JSON; together with the rest they must fit into channel.MAX_MESSAGE.
_MAX_ERROR = 16 * 1024
_MAX_TRACEBACK = 64 * 1024
_MAX_LATE_IMPORTS = 100


def main() -> None:
    """Serve as a spawned child: a new interpreter with its channel's number as argument."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    code = 1
    try:
        received = channel.receive(sock)
        if received is not None:
            serve(sock, received[0])
        code = 0
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


def serve(sock: socket.socket, options: dict[str, Any]) -> None:
    """Answer calls until ``options["fits"]`` of them are done (0: no limit) or the pool is gone.

    Parameters
    ----------
    sock : socket
        The channel to the pool.
    options : dict
        ``prepare``: "module:function" to call before the first call, or None; ``prepare_arg``: its
        argument; ``fits``: calls to answer; ``threads``: of torch.
    """
    modules_at_start = len(sys.modules)
    failure: dict[str, Any] | None = None
    try:
        prepare(options)
    except BaseException as error:
        failure = _describe(error)  # told to whoever calls first
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(options["threads"])
    done = 0
    while True:
        received = channel.receive(sock)
        if received is None:
            return
        call, fds = received
        done += 1
        reply, reply_fds = _answer(call, fds) if failure is None else (failure, [])
        reply["late_imports"] = _imported_since(modules_at_start)
        reply["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        last = done == options["fits"] or failure is not None
        reply["last"] = last
        try:
            channel.send(sock, reply, reply_fds)
        except ConnectionError:
            return
        finally:
            channel.close_all(reply_fds)
        if last:
            return


def _imported_since(count: int) -> list[str]:
    """Return the modules imported after the first ``count``, in their order.

    The names before them are not even looked at: counting a reference to each would copy a page
    of the fork server's memory for nearly every one.
    """
    late = list(itertools.islice(reversed(sys.modules), max(0, len(sys.modules) - count)))
    return late[::-1][:_MAX_LATE_IMPORTS]


def prepare(options: dict[str, Any]) -> None:
    """Call the function that ``options["prepare"]`` names, if any."""
    if options["prepare"]:
        resolve(options["prepare"])(options["prepare_arg"])


def _answer(call: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
    os.environ.update(call["env"])
    reply_fds: list[int] = []
    try:
        buffers = [channel.map_file(fd) for fd in fds]
        channel.close_all(fds)
        function = resolve(call["entry"])
        entered_s = time.monotonic()
        results = function(*buffers)
        returned_s = time.monotonic()
        for parts in results:
            reply_fds.append(channel.write_memory(parts))
        if len(reply_fds) > channel.MAX_FDS:
            raise ValueError(
                f"{call['entry']} returned {len(reply_fds)} buffers,"
                f" expected at most {channel.MAX_FDS}"
            )
    except BaseException as error:
        channel.close_all(reply_fds)
        return _describe(error), []
    return {"entered_s": entered_s, "returned_s": returned_s}, reply_fds


def _describe(error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    message = "".join(traceback.format_exception_only(error)).strip()
    return {"error": _clip(message, _MAX_ERROR), "traceback": _clip(text, _MAX_TRACEBACK)}


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
