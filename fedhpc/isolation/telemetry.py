"""Evidence: what fits used, and that it came back. A thread writes samples over time to a file."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedhpc import files
from fedhpc.errors import PlatformError
from fedhpc.isolation.host_memory import MB, families, proportional_bytes
from fedhpc.isolation.nvml import Gpu, Nvml
from fedhpc.isolation.processes import ChildPool

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
_OWN_INTERVAL_S = 5.0
_LIMITED_INTERVAL_S = 0.2  # where a child may have to be killed
# So much longer than samples take are the times between them: with kept children, which cost 5 ms
# each, they are half a percent of a core; where a child may have to be killed they may be more.
_LONGER_THAN_A_SAMPLE = 200
_LONGER_THAN_A_LIMITED_SAMPLE = 4
_IDLE_INTERVAL_S = 0.1  # between samples of moments in which nothing runs: tiny fits had one each
_GATHERED_S = 0.2  # one by one they were 5 % of an array task's CPU with tiny fits
_GONE_S = 2.0


@dataclass
class Usage:
    """One fit, from the moment that it has its slot until its process is gone.

    Attributes
    ----------
    about : dict
        What its line begins with: whose fit it is, and in which slot.
    gpu : Gpu or None
        Where it ran.
    began_s, before_mb : float
        When it had its slot, and what was in use then.
    """

    about: dict[str, Any]
    gpu: Gpu | None
    began_s: float
    before_mb: float | None


_Ended = tuple[Usage, threading.Event | None, dict[str, Any]]


class Sampler:
    """Writes samples of memory, and a line a fit, to a file.

    Parameters
    ----------
    path : Path
        JSON lines; appended to. Its folder is made.
    pool : ChildPool
        Whose children are watched.
    header : dict
        What the first line says, besides time and GPUs.
    gpus : sequence of Gpu
        Which GPUs are watched.
    nvml : Nvml, optional
        Where their memory is read.
    host_limit_bytes : int, optional
        A child that uses more, with its descendants, is killed.
    """

    def __init__(
        self,
        path: Path,
        pool: ChildPool,
        header: dict[str, Any],
        *,
        gpus: Sequence[Gpu] = (),
        nvml: Nvml | None = None,
        host_limit_bytes: int | None = None,
    ) -> None:
        self._path = path
        self._pool = pool
        self._gpus = [gpu for gpu in gpus if nvml is not None and gpu.total_bytes]
        self._nvml = nvml
        self._limit_bytes = host_limit_bytes
        self._interval_s, self._longer = INTERVAL_S, _LONGER_THAN_A_SAMPLE
        if host_limit_bytes is not None:
            self._interval_s, self._longer = _LIMITED_INTERVAL_S, _LONGER_THAN_A_LIMITED_SAMPLE
        self._closing = threading.Event()
        self._own_mb: float | None = None
        self._own_next_s = 0.0
        self._sampled_s = self._took_s = 0.0  # the last sample's end and length
        self._start_s = time.monotonic()
        self._ended: queue.SimpleQueue[_Ended | None]
        self._ended = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with contextlib.suppress(OSError):  # the first line says it
            path.parent.mkdir(exist_ok=True)
        shown = [
            {"id": gpu.id, "name": gpu.name, "total_mb": round(gpu.total_bytes / MB, 1)}
            for gpu in gpus
        ]
        start = {"kind": "start", "utc": round(time.time(), 3), **header}
        self._lines.put({**start, "interval_s": self._interval_s, "gpus": shown})
        # A disk that stalls must not hold up who watches the limit of memory.
        self._writer = threading.Thread(target=self._write, name="telemetry file", daemon=True)
        self._writer.start()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def began(self, about: dict[str, Any], gpu: Gpu | None, before_bytes: int | None) -> Usage:
        """Note a fit that begins."""
        before_mb = None if before_bytes is None else round(before_bytes / MB, 1)
        return Usage(about, gpu, self._now_s(), before_mb)

    def ended(self, usage: Usage, gone: threading.Event | None, **more: Any) -> None:
        """Note that a fit ended; its line is written when its process is ``gone``, if it goes."""
        if gone is None and usage.gpu is None and any(self._pool.children().values()):
            self._put_line(usage, None, more)  # nothing to wait for or to look at
        else:
            self._ended.put((usage, gone, more))

    def close(self) -> None:
        """Write what is left and stop."""
        self._closing.set()
        self._ended.put(None)
        self._thread.join(2 * _GONE_S)
        self._lines.put(None)
        self._writer.join(2 * _GONE_S)

    def _run(self) -> None:
        next_s = self._start_s
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._ended.get(timeout=max(0.0, next_s - time.monotonic()))
                if item is None:
                    self._sample()
                    return
                self._finish(*item)
            # Also where the next fit always ends before the last one's process has gone.
            began_s = time.monotonic()
            if began_s >= next_s:
                self._measure_own()
                self._sample()
                # With many children a sample takes long: the lines of fits must not queue up.
                took_s = time.monotonic() - began_s
                next_s = began_s + max(self._interval_s, self._longer * took_s)

    def _finish(self, usage: Usage, gone: threading.Event | None, more: dict[str, Any]) -> None:
        if gone is not None:
            gone.wait(0 if self._closing.is_set() else _GONE_S)
        after = None
        if usage.gpu is not None:
            after = self._used_mb(usage.gpu)
        if self._is_idle_moment():
            sample = self._sample()
            if usage.gpu is None:
                after = sample["children_mb"]
        self._put_line(usage, after, more)

    def _is_idle_moment(self) -> bool:
        """Return whether nothing runs, and it is time for a sample of that."""
        children = self._pool.children()
        if any(children.values()):
            return False
        pause_s = _IDLE_INTERVAL_S
        if children.keys() - self._pool.standing_by():  # else it costs next to nothing
            pause_s = max(pause_s, _LONGER_THAN_A_SAMPLE * self._took_s)
        return time.monotonic() >= self._sampled_s + pause_s

    def _put_line(self, usage: Usage, after: float | None, more: dict[str, Any]) -> None:
        times = {"began_s": usage.began_s, "ended_s": self._now_s()}
        memory = {"before_mb": usage.before_mb, "after_mb": after}
        self._lines.put({"kind": "fit", **usage.about, **times, **memory, **more})

    def _sample(self) -> dict[str, Any]:
        began_s = time.monotonic()
        children = self._pool.children()
        # Those hold nothing of a fit, but each would count as having a part of what it shares with
        # the fork server.
        used_by = children.keys() - self._pool.standing_by()
        total = 0
        for pid, family in families(used_by).items():
            used = proportional_bytes(family)
            total += used
            if children[pid] and self._limit_bytes is not None and used > self._limit_bytes:
                used = proportional_bytes(family, of_files=False)
                if used <= self._limit_bytes:
                    continue  # the data set, which is in memory once for all
                logger.warning("pid %d uses %.1f GB of host memory: killed", pid, used / 1e9)
                self._pool.kill_for_memory(pid)
        line = {
            "kind": "sample",
            "time_s": self._now_s(),
            "running": sum(bool(tag) for tag in children.values()),
            "children": len(children),
            "own_mb": self._own_mb,
            "children_mb": round(total / MB, 1),
            "gpus": {gpu.id: self._used_mb(gpu) for gpu in self._gpus},
        }
        self._lines.put(line)
        self._sampled_s = time.monotonic()
        self._took_s = self._sampled_s - began_s
        return line

    def _measure_own(self) -> None:
        """Measure this process and the fork server: seldom, they are large and steady."""
        if time.monotonic() < self._own_next_s:
            return
        self._own_next_s = time.monotonic() + _OWN_INTERVAL_S
        own = [os.getpid(), *filter(None, [self._pool.fork_server()])]
        self._own_mb = round(proportional_bytes(own) / MB, 1)

    def _used_mb(self, gpu: Gpu) -> float | None:
        if self._nvml is None or not gpu.total_bytes:
            return None
        try:
            return round(self._nvml.memory(gpu).used_bytes / MB, 1)
        except PlatformError:  # lost, or busy: the fits will say
            return None

    def _now_s(self) -> float:
        return round(time.monotonic() - self._start_s, 3)

    def _write(self) -> None:
        """Write lines, all that have come within `_GATHERED_S` at once."""
        failing = False
        line: dict[str, Any] | None = {}
        while line is not None:
            lines = []
            line = self._lines.get()
            self._closing.wait(_GATHERED_S)
            with contextlib.suppress(queue.Empty):
                while line is not None:
                    lines.append(line)
                    line = self._lines.get_nowait()
            if not lines:
                continue
            try:
                files.append_line(self._path, *lines, patience_s=0.0)
                failing = False
            except PlatformError as error:  # no fit depends on it
                if not failing:
                    logger.warning("telemetry is lost: %s", error)
                failing = True
