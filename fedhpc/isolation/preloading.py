"""Which modules the fork server should have imported: learned from what children import late.

A module that every child imports for itself costs every fit its import; in the fork server it costs
it once. Only installed packages are learned, never the code of an app, whose import may do
anything. What starts a thread or touches CUDA at its import is not for a fork server: a process of
its own tries first.
"""

import contextlib
import importlib
import itertools
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

from fedhpc.isolation import cuda

_INSTALLED = {"site-packages", "dist-packages"}
_MAX_BYTES = 48 * 1024  # as JSON; a reply holds more than this


def imported_since(count: int) -> list[str]:
    """Return the modules imported after the first ``count``, in their order.

    The names before them are not even looked at: counting a reference to each would copy a page
    of the fork server's memory for nearly every one.
    """
    late = list(itertools.islice(reversed(sys.modules), max(0, len(sys.modules) - count)))
    return late[::-1]


def learnable(names: list[str]) -> list[str]:
    """Return those of the imported modules that are of installed packages, in their order."""
    standard = sysconfig.get_paths()["stdlib"]
    found: list[str] = []
    size = 0
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if not isinstance(file, str) or name == "__main__":
            continue
        if file.startswith(standard) or _INSTALLED & set(Path(file).parts):
            size += len(json.dumps(name)) + 2
            if size > _MAX_BYTES:
                break
            found.append(name)
    return found


def try_out(names: list[str], output: int) -> None:
    """Import modules in this process, which is for nothing else, and write what became of each.

    Parameters
    ----------
    names : list of str
        In the order in which they were imported.
    output : int
        A descriptor; gets a line for each module: its name and the seconds, or nothing for one that
        a fork server must not import.
    """
    threads = _threads()
    for name in names:
        begun_s = time.monotonic()
        try:
            importlib.import_module(name)
        except BaseException:  # noqa: S112  (the children that need it tell)
            continue
        if cuda.is_initialised() or cuda.driver_in_use():
            return  # nor what comes after it, of which nothing can be told any more
        before, threads = threads, _threads()
        if threads == before:
            os.write(output, json.dumps([name, time.monotonic() - begun_s]).encode() + b"\n")


def results(text: bytes) -> tuple[list[str], float]:
    """Return the modules that `try_out` found good, and the seconds that they took."""
    good, seconds = [], 0.0
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # cut off by its end
            name, took_s = json.loads(line)
            good.append(name)
            seconds += took_s
    return good, seconds


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208  (the cheapest way)
