"""The figures of a report. No pyplot: nothing of matplotlib's global state is touched."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fedhpc.report import tables, tracks
from fedhpc.report.summary import Summary
from fedhpc.report.tracks import Floats, Piece, Track

MAX_PANELS = 8
CPU_RUN = "resident memory (PSS) of the children, CPU run: no GPU was used"

# The palette of Okabe and Ito, which colour-blind people can tell apart.
_INK, _GREY = "#222222", "#6b6b6b"
_MEMORY, _IDLE = "#0072B2", "#D55E00"
_VERBS = {"train": "#56B4E9", "evaluate": "#E69F00"}
_MORE_COLOURS = ("#CC79A7", "#009E73", "#F0E442")
_MARKS = ("o", "s", "^", "D", "v", "P")

_DPI = 150
_BUCKETS = 1000  # about the pixels of a panel's width
_MANY = 800  # shapes in a figure from which on the svg holds them as an image
_GAP_INTERVALS, _GAP_S = 10, 5.0  # without a sample for longer than both, the line is broken
_WIDTH, _LEFT, _RIGHT = 9.0, 0.95, 0.25  # inches, as are all below
_TOP, _TITLE, _BETWEEN, _BOTTOM = 0.5, 0.36, 0.06, 0.5
_MEMORY_HEIGHT = 1.35


def render(figure: Figure) -> dict[str, bytes]:
    """Return a figure as the files that people want, by their suffix."""
    files = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=_DPI)
        files[suffix] = buffer.getvalue()
    return files


def chosen(found: Sequence[Track]) -> list[Track]:
    """Return the tracks to draw: of those with samples, the ones with the highest peaks."""
    drawn = [track for track in found if track.pieces]
    highest = sorted(drawn, key=lambda track: -(track.peak_mb or 0.0))[:MAX_PANELS]
    return [track for track in drawn if track in highest]


def what_is_drawn(found: Sequence[Track]) -> str:
    """Return what the memory of these tracks is, as a heading."""
    if all(track.kind == "gpu" for track in found):
        return "GPU memory in use on the device (NVML), that of other users included"
    if all(track.kind == "children" and track.card == "cpu" for track in found):
        return CPU_RUN[0].upper() + CPU_RUN[1:]
    return "Memory in use: of the GPU where there is one, else of the children (PSS)"


def memory(summary: Summary) -> Figure | None:
    """Draw memory over time, a panel a track, with the fits as bars below; None without samples.

    Parameters
    ----------
    summary : Summary
        Of the run; `chosen` says which of its tracks are drawn.
    """
    found = chosen(summary.tracks)
    if not found:
        return None
    heights = [_fits_height(track) for track in found]
    panel = _TITLE + _MEMORY_HEIGHT + _BETWEEN
    height = _TOP + sum(panel + fits for fits in heights) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height))
    start_s = summary.start_s
    span_s = max(_end_s(track) for track in found) - start_s
    peaks = [track.peak_mb or 0.0 for track in found]
    shared = min(peaks) > max(peaks) / 5  # else the small ones would be flat lines
    bottom = height - _TOP
    for track, fits_height in zip(found, heights, strict=True):
        bottom -= panel + fits_height
        axes = _add_panel(figure, _LEFT, bottom, _WIDTH - _LEFT - _RIGHT, fits_height)
        _draw(*axes, track, start_s, span_s)
        axes[0].set_ylim(0, 1.08 * (max(peaks) if shared else track.peak_mb or 0.0) or 1.0)
        axes[0].set_title(_title(track), loc="left", fontsize=9, color=_INK)
        axes[0].set_title(_idle_words(track), loc="right", fontsize=8, color=_GREY)
        axes[0].set_ylabel(_label(track), fontsize=8)
        if track is not found[-1]:
            axes[1].tick_params(labelbottom=False)
        else:
            axes[1].set_xlabel(_time_label(span_s), fontsize=8)
    _head(figure, what_is_drawn(found), found)
    return figure


def beside(summaries: Sequence[Summary]) -> Figure:
    """Draw the memory of runs beside each other, with the same axes.

    Parameters
    ----------
    summaries : sequence of Summary
        Of the runs, each with samples; of a run with several tracks it is the one with the highest
        peak.
    """
    found = [max(chosen(summary.tracks), key=lambda t: t.peak_mb or 0.0) for summary in summaries]
    fits_height = max(_fits_height(track) for track in found)
    height = _TOP + _TITLE + 0.15 + 2 * _MEMORY_HEIGHT + _BETWEEN + fits_height + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height))
    gap = 0.65  # for the names of the slots
    width = (_WIDTH - _LEFT - _RIGHT - gap * (len(found) - 1)) / len(found)
    span_s = max(
        _end_s(track) - summary.start_s for track, summary in zip(found, summaries, strict=True)
    )
    top_mb = 1.08 * max(track.peak_mb or 0.0 for track in found)
    names = [summary.name for summary in summaries]
    if len(set(names)) < len(names):
        names = [summary.paths.run_id for summary in summaries]
    for index, (track, summary) in enumerate(zip(found, summaries, strict=True)):
        left = _LEFT + index * (width + gap)
        axes = _add_panel(figure, left, _BOTTOM, width, fits_height, 2 * _MEMORY_HEIGHT)
        _draw(*axes, track, summary.start_s, span_s)
        axes[0].set_ylim(0, top_mb or 1.0)
        size = 10 if len(names[index]) <= 36 else 8
        axes[0].set_title(names[index], loc="left", fontsize=size, fontweight="bold", pad=18)
        axes[0].text(
            0, 1.03, _idle_words(track), transform=axes[0].transAxes, fontsize=8, color=_GREY
        )
        axes[1].set_xlabel(_time_label(span_s), fontsize=8)
        if index == 0:
            axes[0].set_ylabel(_label(track), fontsize=8)
        else:
            axes[0].tick_params(labelleft=False)
    cards = sorted({track.card for track in found if track.kind == "gpu"})
    head = ", ".join([what_is_drawn(found), *cards])
    _head(figure, head, found)
    return figure


def learning(curves: dict[str, dict[str, list[tuple[int, float]]]]) -> Figure | None:
    """Draw metrics over rounds, a panel a metric; None if there are none.

    Parameters
    ----------
    curves : dict
        As `summary.curves` returns them.
    """
    if not curves:
        return None
    width = 0.5 + 4.25 * len(curves)
    figure = Figure(figsize=(width, 3.0))
    everybody = list(dict.fromkeys(who for series in curves.values() for who in series))
    palette = (_MEMORY, _IDLE, *_MORE_COLOURS)
    for index, (name, series) in enumerate(curves.items()):
        left = (0.75 + index * 4.25) / width
        axes = figure.add_axes((left, 0.165, 3.5 / width, 0.72))
        for who, points in series.items():
            number = everybody.index(who)  # the same colour in all panels
            rounds, values = zip(*points, strict=True)
            axes.plot(
                rounds, values, label=who, linewidth=1.6, markersize=4, zorder=3,
                color=palette[number % len(palette)],
                marker=_MARKS[number % len(_MARKS)], markevery=max(1, len(points) // 20),
            )  # fmt: skip
        if name == "accuracy" and all(0 <= y <= 1 for line in series.values() for _, y in line):
            axes.set_ylim(0, 1.02)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("round", fontsize=9)
        axes.set_ylabel(name, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend(fontsize=8, frameon=False)
        plain(axes)
    return figure


def _add_panel(
    figure: Figure, left: float, bottom: float, width: float, fits: float,
    memory: float = _MEMORY_HEIGHT,
) -> tuple[Axes, Axes]:  # fmt: skip
    """Return the axes of memory and, below, those of the fits; in inches."""
    wide, high = figure.get_size_inches()
    below = figure.add_axes((left / wide, bottom / high, width / wide, fits / high))
    above = figure.add_axes(
        (left / wide, (bottom + fits + _BETWEEN) / high, width / wide, memory / high), sharex=below
    )
    above.tick_params(labelbottom=False)
    return above, below


def _draw(above: Axes, below: Axes, track: Track, start_s: float, span_s: float) -> None:
    """Draw a track into its two axes."""
    scale, _ = _unit(span_s)
    for piece in track.pieces:
        for times_s, mb in _unbroken(piece):
            kept = tracks.thin(times_s, mb, _BUCKETS)
            x, y = (times_s[kept] - start_s) / scale, mb[kept]
            above.fill_between(
                x, y, color=_MEMORY, alpha=0.18, linewidth=0, rasterized=len(x) >= _MANY
            )
            above.plot(
                x, y, color=_MEMORY, linewidth=0.9 if len(x) < _BUCKETS else 0.5,
                marker="." if len(x) == 1 else "", rasterized=len(x) >= _MANY,
            )  # fmt: skip
    moments = tracks.idle_moments(track)
    kept = tracks.thin(moments.times_s, moments.mb, 60)
    above.plot(
        (moments.times_s[kept] - start_s) / scale, moments.mb[kept], linestyle="", marker="o",
        markersize=3, color=_IDLE, markeredgewidth=0, clip_on=False, zorder=4,
    )  # fmt: skip
    for restart_s in _restarts(track):
        for axes in (above, below):
            axes.axvline((restart_s - start_s) / scale, color=_GREY, linewidth=0.8, linestyle=":")
    _draw_fits(below, track, start_s, scale)
    below.set_xlim(0, 1.01 * span_s / scale or 1.0)
    above.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if _big(track) else "{x:g}"))
    above.yaxis.set_major_locator(MaxNLocator(nbins=4))
    for axes in (above, below):
        plain(axes)
    below.grid(visible=False, axis="y")


def _draw_fits(axes: Axes, track: Track, start_s: float, scale: float) -> None:
    """Draw the fits as bars, a row a slot."""
    slots = _slots(track)
    row_of = {slot: row for row, slot in enumerate(slots)}
    bars: dict[str, list[list[tuple[float, float]]]] = {}
    failed = []
    for fit in track.fits:
        row = row_of[fit.array_task, fit.slot]
        x = ((fit.began_s - start_s) / scale, (fit.ended_s - start_s) / scale)
        low, high = row - 0.38, row + 0.38
        bars.setdefault(fit.verb, []).append([(x[0], low), (x[1], low), (x[1], high), (x[0], high)])
        if not fit.ok:
            failed.append(((x[0] + x[1]) / 2, row))
    many = len(track.fits) > _MANY
    colours = _colours([track])
    for verb, shapes in bars.items():
        edges = "white" if len(shapes) < 200 else "none"
        axes.add_collection(
            PolyCollection(
                shapes,
                facecolors=colours[verb],
                edgecolors=edges,
                linewidths=0.4,
                rasterized=many,
            )
        )
    if failed:
        x, y = zip(*failed, strict=True)
        axes.scatter(x, y, marker="x", s=16, color=_INK, linewidths=1.2, zorder=4, rasterized=many)
    axes.set_ylim(max(len(slots), 1) - 0.5, -0.5)
    if len(slots) <= 8:
        several = len(track.array_tasks) > 1
        names = [f"task {task}, slot {slot}" if several else f"slot {slot}" for task, slot in slots]
        axes.set_yticks(range(len(slots)), names, fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(slots)} slots", fontsize=8)
    axes.tick_params(axis="y", length=0)


def _head(figure: Figure, title: str, found: Sequence[Track]) -> None:
    """Put the heading and the legend above the panels."""
    height = figure.get_size_inches()[1]
    left = _LEFT / _WIDTH
    figure.text(left, 1 - 0.12 / height, title, fontsize=10, color=_INK, va="top")
    handles: list[Line2D | Patch] = [Line2D([], [], color=_MEMORY, label="memory")]
    if any(len(tracks.idle_moments(track).mb) for track in found):
        handles.append(
            Line2D([], [], color=_IDLE, marker="o", markersize=4, linestyle="", label="nothing ran")
        )
    handles += [
        Patch(color=colour, label=f"fit: {verb}") for verb, colour in _colours(found).items()
    ]
    if any(not fit.ok for track in found for fit in track.fits):
        handles.append(
            Line2D([], [], color=_INK, marker="x", markersize=5, linestyle="", label="failed")
        )
    if any(_restarts(track) for track in found):
        handles.append(Line2D([], [], color=_GREY, linestyle=":", label="array task restarted"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left, 1 - 0.32 / height), fontsize=8,
        ncols=len(handles), frameon=False, borderaxespad=0, borderpad=0, handlelength=1.4,
        columnspacing=1.6,
    )  # fmt: skip


def _colours(found: Sequence[Track]) -> dict[str, str]:
    """Return the colour of each verb that occurs; Flower's two always have the same ones."""
    verbs = {fit.verb for track in found for fit in track.fits}
    own = sorted(verbs - _VERBS.keys())
    return {
        **{verb: colour for verb, colour in _VERBS.items() if verb in verbs},
        **{verb: _MORE_COLOURS[index % len(_MORE_COLOURS)] for index, verb in enumerate(own)},
    }


def _unbroken(piece: Piece) -> list[tuple[Floats, Floats]]:
    """Return the stretches of a piece between which nobody sampled: no line may bridge that."""
    limit_s = max(_GAP_INTERVALS * piece.interval_s, _GAP_S)
    cuts = np.flatnonzero(np.diff(piece.times_s) > limit_s) + 1
    return list(zip(np.split(piece.times_s, cuts), np.split(piece.mb, cuts), strict=True))


def _restarts(track: Track) -> list[float]:
    """Return when array tasks began again."""
    seen: set[int] = set()
    times = []
    for piece in sorted(track.pieces, key=lambda piece: float(piece.times_s[0])):
        if piece.array_task in seen:
            times.append(float(piece.times_s[0]))
        seen.add(piece.array_task)
    return times


def _slots(track: Track) -> list[tuple[int, int]]:
    return sorted({(fit.array_task, fit.slot) for fit in track.fits})


def _fits_height(track: Track) -> float:
    return min(max(0.16 * len(_slots(track)), 0.16), 1.6)


def _end_s(track: Track) -> float:
    last = max(float(piece.times_s[-1]) for piece in track.pieces)
    return max([last, *(fit.ended_s for fit in track.fits)])


def _title(track: Track) -> str:
    if track.kind == "children":
        return track.name
    size = f", {track.total_mb / 1000:.0f} GB" if track.total_mb else ""
    return f"{track.card}{size} ({track.name})"


def _label(track: Track) -> str:
    return "GPU memory, MB" if track.kind == "gpu" else "children's PSS, MB"


def _idle_words(track: Track) -> str:
    """Say what the memory is when nothing runs, and whether it grows."""
    row = tracks.figures_of(track)
    if row["idle_mb"] is None:
        return "there was no idle moment"
    text = tables.slope(row)
    growth = text if text == tables.NOT_ENOUGH else f"{text} MB per 100 fits"
    first, last = row["idle_after_first_mb"], row["idle_after_last_mb"]
    if first is None or last is None:
        return f"idle: {row['idle_mb']:,.1f} MB ({growth})"
    return f"idle: {first:,.1f} → {last:,.1f} MB ({growth})"


def _unit(span_s: float) -> tuple[float, str]:
    for seconds, name in ((3600.0, "h"), (60.0, "min")):
        if span_s >= 3 * seconds:
            return seconds, name
    return 1.0, "s"


def _time_label(span_s: float) -> str:
    return f"time since the first array task started, {_unit(span_s)[1]}"


def _big(track: Track) -> bool:
    return (track.peak_mb or 0.0) >= 10


def plain(axes: Axes) -> None:
    """Take away what distracts from the data."""
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=_GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
