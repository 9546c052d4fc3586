"""What array tasks wrote down of their memory: the files of ``memory/``, read with care.

A file is appended to by attempts that may have been killed at any moment, so a line may be cut off,
and the next attempt's first line may stand right behind it.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedhpc.paths import RunPaths

_LINE_START = re.compile(r'\{\s*"kind"')


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver names it; ``total_mb`` is None where that is not known."""

    gpu_id: str
    name: str
    total_mb: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """What was in use at one moment.

    Attributes
    ----------
    time_s : float
        Seconds since 1970, by the clock of the array task's host.
    running : int
        Fits that ran then.
    children_mb : float or None
        Resident memory of all children, in MB, as proportional set size.
    gpus : dict
        MB in use on each GPU, whoever uses it, by GPU id.
    """

    time_s: float
    running: int
    children_mb: float | None
    gpus: dict[str, float]


@dataclass(frozen=True, slots=True)
class Fit:
    """A fit that has ended; times in seconds since 1970, memory in MB or None."""

    array_task: int
    client: int
    round: int
    verb: str
    slot: int
    gpu: str | None
    began_s: float
    ended_s: float
    ok: bool
    peak_mb: float | None


@dataclass
class Segment:
    """What one attempt of an array task saw, from its start line on.

    Attributes
    ----------
    array_task : int
        Its index.
    host : str
        Where it ran.
    utc_s : float
        When it started, in seconds since 1970.
    interval_s : float
        Seconds between two samples.
    device : str
        cpu or cuda.
    gpus : dict
        By their ids.
    samples, fits : list
        In the order of time.
    """

    array_task: int
    host: str
    utc_s: float
    interval_s: float
    device: str
    gpus: dict[str, Gpu]
    samples: list[Sample] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything in ``memory/``.

    Attributes
    ----------
    segments : list of Segment
        By array task, and by time within one.
    unreadable : dict
        How many lines could not be used, by the file's name. A last line that is cut off is no
        news, and not counted.
    """

    segments: list[Segment] = field(default_factory=list)
    unreadable: dict[str, int] = field(default_factory=dict)


def read(paths: RunPaths) -> Evidence:
    """Return what the array tasks of a run wrote down; nothing where there is no ``memory/``."""
    evidence = Evidence()
    found = [path for path in paths.memory.glob("*.jsonl") if path.stem.isdecimal()]
    for path in sorted(found, key=lambda path: int(path.stem)):
        segments, unreadable = _read_file(path)
        evidence.segments += segments
        if unreadable:
            evidence.unreadable[f"{paths.memory.name}/{path.name}"] = unreadable
    return evidence


def _read_file(path: Path) -> tuple[list[Segment], int]:
    """Return the segments of a file, and how many of its lines could not be used."""
    segments: list[Segment] = []
    unreadable = 0
    for value in _values(path):
        try:
            if value is None:
                unreadable += 1
            elif value.get("kind") == "start":
                segments.append(_segment(int(path.stem), value))
            elif value.get("kind") == "sample":
                segments[-1].samples.append(_sample(segments[-1], value))
            elif value.get("kind") == "fit":
                segments[-1].fits.append(_fit(segments[-1], value))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            unreadable += 1
    for segment in segments:
        segment.samples.sort(key=lambda sample: sample.time_s)
        segment.fits.sort(key=lambda fit: fit.began_s)
    return segments, unreadable


def _values(path: Path) -> Iterator[Any]:
    """Yield the values of the lines, None for one that is broken unless it is the last one."""
    text = path.read_text(errors="replace")
    *lines, last = text.split("\n")
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            yield None
            starts = [match.start() for match in _LINE_START.finditer(line)]
            if len(starts) > 1 and (value := _json_or_none(line[starts[-1] :])) is not None:
                yield value  # the line of the next attempt
    if (value := _json_or_none(last)) is not None:
        yield value


def _json_or_none(text: str) -> Any | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _segment(array_task: int, line: dict[str, Any]) -> Segment:
    gpus = [
        Gpu(str(gpu["id"]), str(gpu.get("name") or "GPU"), _mb(gpu.get("total_mb")))
        for gpu in line.get("gpus") or []
    ]
    return Segment(
        array_task=array_task,
        host=str(line.get("host") or "?"),
        utc_s=float(line["utc"]),
        interval_s=float(line.get("interval_s") or 0.0),
        device=str(line.get("device") or ("cuda" if gpus else "cpu")),
        gpus={gpu.gpu_id: gpu for gpu in gpus},
    )


def _sample(segment: Segment, line: dict[str, Any]) -> Sample:
    used = ((str(gpu), _mb(mb)) for gpu, mb in (line.get("gpus") or {}).items())
    return Sample(
        time_s=segment.utc_s + float(line["time_s"]),
        running=int(line["running"]),
        children_mb=_mb(line.get("children_mb")),
        gpus={gpu: mb for gpu, mb in used if mb is not None},
    )


def _fit(segment: Segment, line: dict[str, Any]) -> Fit:
    gpu = line.get("gpu")
    if gpu is None and len(segment.gpus) == 1:
        gpu = next(iter(segment.gpus))  # it never came as far as its GPU, but there is only one
    return Fit(
        array_task=segment.array_task,
        client=int(line["client"]),
        round=int(line["round"]),
        verb=str(line["verb"]),
        slot=int(line["slot"]),
        gpu=None if gpu is None else str(gpu),
        began_s=segment.utc_s + float(line["began_s"]),
        ended_s=segment.utc_s + float(line["ended_s"]),
        ok=bool(line["ok"]),
        peak_mb=_mb(line.get("peak_mb")),
    )


def _mb(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
