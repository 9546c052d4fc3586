"""Memory over time of one GPU, or of the children of one array task; and what follows from it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedhpc.report.evidence import Evidence, Fit, Segment

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_MIN_MOMENTS = 3  # through two points any line fits


@dataclass
class Piece:
    """What one attempt of an array task saw of a track, in the order of time.

    Attributes
    ----------
    array_task : int
        Whose samples these are.
    times_s, mb : ndarray of shape (samples,)
        Seconds since 1970, and MB in use.
    idle : ndarray of shape (samples,)
        Whether no fit ran then.
    interval_s : float
        Seconds between two samples, as it was meant to be.
    """

    array_task: int
    times_s: Floats
    mb: Floats
    idle: Bools
    interval_s: float


@dataclass
class Track:
    """One GPU, or the children of one array task on the CPU.

    Attributes
    ----------
    kind : str
        ``gpu``: memory in use on the device, whoever uses it; ``children``: resident memory (PSS)
        of the array task's children.
    name : str
        For a person.
    gpu : str or None
        The id of the GPU.
    card : str
        Its name; for children the device of the array task.
    total_mb : float or None
        The memory of the GPU.
    hosts, array_tasks : list
        Where it is, and who uses it.
    pieces : list of Piece
        Of each attempt of each array task.
    fits : list of Fit
        By the time they began.
    """

    kind: Literal["gpu", "children"]
    name: str
    gpu: str | None
    card: str
    total_mb: float | None
    hosts: list[str] = field(default_factory=list)
    array_tasks: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)

    @property
    def peak_mb(self) -> float | None:
        """The highest sample; None if there is none."""
        return max((float(piece.mb.max()) for piece in self.pieces), default=None)


def build(evidence: Evidence) -> list[Track]:
    """Return a track a GPU; of array tasks that have no GPU, a track an array task.

    Parameters
    ----------
    evidence : Evidence
        What the array tasks wrote down.
    """
    users: dict[tuple[str, str | int], list[Segment]] = defaultdict(list)
    for segment in evidence.segments:
        seen = {gpu for sample in segment.samples for gpu in sample.gpus}
        if gpus := [*segment.gpus, *sorted(seen - segment.gpus.keys())]:
            for gpu in gpus:
                users["gpu", gpu].append(segment)
        else:
            users["children", segment.array_task].append(segment)
    return [
        _gpu(str(key), segments) if kind == "gpu" else _children(segments)
        for (kind, key), segments in users.items()
    ]


def _gpu(gpu: str, segments: Sequence[Segment]) -> Track:
    known = next((segment.gpus[gpu] for segment in segments if gpu in segment.gpus), None)
    track = Track(
        kind="gpu",
        name=gpu if len(gpu) <= 12 else f"{gpu[:12]}…",
        gpu=gpu,
        card=known.name if known else "GPU",
        total_mb=known.total_mb if known else None,
    )
    _fill(track, segments)
    track.name += f" on {', '.join(track.hosts)}"
    for piece in track.pieces:
        others = [fit for fit in track.fits if fit.array_task != piece.array_task]
        if others:  # two array tasks share it: idle is what is idle for both
            began = np.sort([fit.began_s for fit in others])
            ended = np.sort([fit.ended_s for fit in others])
            piece.idle &= np.searchsorted(began, piece.times_s, "right") == np.searchsorted(
                ended, piece.times_s, "left"
            )
    return track


def _children(segments: Sequence[Segment]) -> Track:
    device = segments[-1].device
    track = Track("children", f"array task {segments[0].array_task}", None, device, None)
    _fill(track, segments)
    track.name += f" on {', '.join(track.hosts)}"
    return track


def _fill(track: Track, segments: Sequence[Segment]) -> None:
    for segment in segments:
        track.fits += [fit for fit in segment.fits if track.gpu in (None, fit.gpu)]
        rows = [
            (sample.time_s, mb, sample.running == 0)
            for sample in segment.samples
            if (mb := sample.gpus.get(track.gpu) if track.gpu else sample.children_mb) is not None
        ]
        if rows:
            values = np.array(rows, dtype=np.float64)
            idle = values[:, 2].astype(bool)
            track.pieces.append(
                Piece(segment.array_task, values[:, 0], values[:, 1], idle, segment.interval_s)
            )
    track.fits.sort(key=lambda fit: fit.began_s)
    track.hosts = sorted({segment.host for segment in segments})
    track.array_tasks = sorted({segment.array_task for segment in segments})


@dataclass(frozen=True)
class Moments:
    """The moments when nothing ran, one for each unbroken stretch of idle samples.

    Attributes
    ----------
    times_s, mb : ndarray of shape (moments,)
        The middle of each in seconds since 1970, and the median of its samples in MB.
    fits : ndarray of shape (moments,)
        How many fits had begun, and so ended, before it.
    """

    times_s: Floats
    mb: Floats
    fits: Ints


def idle_moments(track: Track) -> Moments:
    """Return the moments when nothing ran; each counts once, however long it was."""
    began = np.array([fit.began_s for fit in track.fits], dtype=np.float64)
    times, mbs, counts = [], [], []
    for piece in track.pieces:
        before = np.searchsorted(began, piece.times_s, "right")
        changes = (piece.idle[1:] != piece.idle[:-1]) | (before[1:] != before[:-1])
        edges = [0, *(np.flatnonzero(changes) + 1), len(piece.times_s)]
        for first, end in pairwise(edges):
            if piece.idle[first]:
                times.append((piece.times_s[first] + piece.times_s[end - 1]) / 2)
                mbs.append(float(np.median(piece.mb[first:end])))
                counts.append(int(before[first]))
    order = np.argsort(np.array(times, dtype=np.float64), kind="stable")
    return Moments(
        np.array(times, dtype=np.float64)[order],
        np.array(mbs, dtype=np.float64)[order],
        np.array(counts, dtype=np.int64)[order],
    )


def figures_of(track: Track) -> dict[str, Any]:
    """Return what a track's samples and fits say, in MB and seconds; None for what is not known.

    Returns
    -------
    dict
        ``fits`` and ``failed``; ``peak_mb`` (highest sample); ``fit_peak_mb`` (highest peak of a
        single fit); ``idle_moments`` (how many there were), ``idle_mb`` (their median),
        ``idle_before_mb`` (before the first fit), ``idle_after_first_mb`` (the first moment after a
        fit), ``idle_after_last_mb`` (the first one after the last fit); ``slope_mb_per_100_fits``
        (least squares over the moments after the first fit); ``fit_s`` (median seconds of a fit,
        from its admission until its child is gone).
    """
    moments = idle_moments(track)
    after = moments.fits >= 1
    return {
        "fits": len(track.fits),
        "failed": sum(not fit.ok for fit in track.fits),
        "peak_mb": track.peak_mb,
        "fit_peak_mb": max(
            (fit.peak_mb for fit in track.fits if fit.peak_mb is not None), default=None
        ),
        "idle_moments": len(moments.mb),
        "idle_mb": float(np.median(moments.mb)) if len(moments.mb) else None,
        "idle_before_mb": _first(moments.mb[moments.fits == 0][::-1]),
        "idle_after_first_mb": _first(moments.mb[after]),
        "idle_after_last_mb": _first(moments.mb[after & (moments.fits == len(track.fits))]),
        "slope_mb_per_100_fits": _slope(moments.fits[after], moments.mb[after]),
        "fit_s": float(np.median([fit.ended_s - fit.began_s for fit in track.fits]))
        if track.fits
        else None,
    }


def _first(values: Floats) -> float | None:
    return float(values[0]) if len(values) else None


def _slope(fits: Ints, mb: Floats) -> float | None:
    """Return MB per 100 fits by least squares; None with too few moments to tell."""
    if len(np.unique(fits)) < _MIN_MOMENTS:
        return None
    x = fits - fits.mean()
    return float(100 * (x @ (mb - mb.mean())) / (x @ x))


def thin(times: Floats, values: Floats, buckets: int) -> Ints:
    """Return which points to draw so that the picture stays the same.

    Of each of ``buckets`` equal spans of time these are the first, the lowest, the highest and the
    last point.

    Parameters
    ----------
    times, values : ndarray of shape (points,)
        In the order of time.
    buckets : int
        About the pixels of the picture's width.

    Returns
    -------
    ndarray
        Indices, ascending; at most four a bucket.
    """
    count = len(times)
    if count <= 4 * buckets or times[-1] <= times[0]:
        return np.arange(count, dtype=np.int64)
    share = (times - times[0]) / (times[-1] - times[0])
    bucket = np.minimum((share * buckets).astype(np.int64), buckets - 1)
    edges = np.flatnonzero(np.diff(bucket)) + 1
    firsts, lasts = np.r_[0, edges], np.r_[edges, count] - 1
    by_value = np.lexsort((values, bucket))
    return np.unique(np.r_[firsts, lasts, by_value[firsts], by_value[lasts]]).astype(np.int64)
