"""Where the time of the rounds went: read from metrics.jsonl, as tables and as a figure."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedhpc.federation.breakdown import OTHER, PHASES, USES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedhpc.report.tables import Table

WORDS = (
    "A round lasts from the end of the one before it to its own. The server's thread, each moment"
    " once: configure and aggregate are the strategy's; send packs messages and hands them out;"
    " clients is the wait for them; receive unpacks replies and writes records; checkpoint is what"
    " stood in front of the round. Slots, in seconds of all of them together: run is the app's"
    " training or evaluation; start is until a child runs it; wait is for a slot lock or memory;"
    " return is the reply within the array task, link the way between server and array task; lost"
    " are fits that failed, were cancelled or came late; idle is without work while other fits run"
    " (the tail of a round), between while the server asks nothing."
)
_SHOWN = 0.01  # a part below this share is not worth a word
_MANY = 80  # rounds from which on neighbours are drawn as one bar
_TALL = 3.0  # a bar that is so many times as high as the median is cut off
_SLOT_ORDER = ("run", "start", "wait", "return", "link", "lost", "idle", "between")
_SERVER_ORDER = ("clients", "configure", "send", "receive", "aggregate", "evaluate", "checkpoint",
                 OTHER)  # fmt: skip
_COLOURS = {
    "run": "#56B4E9", "start": "#E69F00", "wait": "#F0E442", "return": "#009E73",
    "link": "#CC79A7", "lost": "#222222", "idle": "#9a9a9a", "between": "#d5d5d5",
}  # fmt: skip
_SERVER_COLOURS = {
    "clients": "#56B4E9", "configure": "#F0E442", "send": "#CC79A7", "receive": "#009E73",
    "aggregate": "#E69F00", "evaluate": "#D55E00", "checkpoint": "#0072B2", OTHER: "#9a9a9a",
}  # fmt: skip

Parts = list[tuple[int, dict[str, float]]]


def of_server(rounds: Sequence[dict[str, Any]]) -> Parts:
    """Return the seconds of the server's thread by phase, for each round that has them."""
    return _parts(rounds, "seconds", PHASES)


def of_slots(rounds: Sequence[dict[str, Any]]) -> Parts:
    """Return the slot-seconds by use, for each round that has them."""
    return _parts(rounds, "slot_seconds", USES)


def _parts(rounds: Sequence[dict[str, Any]], key: str, names: Sequence[str]) -> Parts:
    found = []
    for line in rounds:
        parts = line.get(key)
        # A run of an older fedhpc has other ones.
        if isinstance(parts, dict) and all(isinstance(parts.get(n), int | float) for n in names):
            found.append((int(line["round"]), {name: float(parts[name]) for name in names}))
    return found


def means(parts: Parts) -> dict[str, float]:
    """Return the means over the steady rounds: all but 0 and the first, where there are more."""
    later = [values for number, values in parts if number > 1]
    chosen = later or [values for _, values in parts]
    return {name: fmean(values[name] for values in chosen) for name in chosen[0]} if chosen else {}


def largest(rounds: Sequence[dict[str, Any]]) -> str:
    """Return the largest parts of a steady round in words; "" if nothing is known of it."""
    texts = []
    for head, parts in (("server", of_server(rounds)), ("slots", of_slots(rounds))):
        mean = means(parts)
        total = sum(mean.values())
        shares = sorted(((seconds, name) for name, seconds in mean.items()), reverse=True)[:4]
        told = [f"{name} {seconds / total:.0%}" for seconds, name in shares
                if total and seconds >= _SHOWN * total]  # fmt: skip
        if told:
            texts.append(f"{head}: {', '.join(told)}")
    return "\n".join(texts)


def table(rounds: Sequence[dict[str, Any]]) -> "Table":
    """Return heads and rows of the table of means, as text; no rows if nothing is known."""
    heads = ["part of a round", "first round, s", "later rounds, mean, s", "share of these"]
    rows = []
    for head, parts in (("server", of_server(rounds)), ("slots", of_slots(rounds))):
        mean = means(parts)
        total = sum(mean.values())
        first = next((values for number, values in parts if number > 0), None)
        rows += [
            [
                f"{head}: {name}",
                "-" if first is None else f"{first[name]:.3f}",
                f"{seconds:.3f}",
                f"{seconds / total:.1%}" if total else "-",
            ]
            for name, seconds in mean.items()
        ]
    return heads, rows


def figure(rounds: Sequence[dict[str, Any]]) -> "Figure | None":
    """Draw a stacked bar a round, of the server's thread and of the slots; None without rounds."""
    from matplotlib.figure import Figure

    panels = [
        ("the server's thread, s", of_server(rounds), _SERVER_ORDER, _SERVER_COLOURS),
        ("all slots, slot-seconds", of_slots(rounds), _SLOT_ORDER, _COLOURS),
    ]
    panels = [panel for panel in panels if any(number > 0 for number, _ in panel[1])]
    if not panels:
        return None
    drawn = Figure(figsize=(9.0, 2.5 * len(panels) + 0.3), layout="constrained")
    grid = drawn.subplots(len(panels), 1, squeeze=False, sharex=True)
    for axes, (title, parts, order, colours) in zip(grid[:, 0], panels, strict=True):
        _draw(axes, [part for part in parts if part[0] > 0], order, colours)
        axes.set_title(title, loc="left", fontsize=9)
    grid[-1, 0].set_xlabel("round", fontsize=8)
    return drawn


def _draw(axes: "Axes", parts: Parts, order: Sequence[str], colours: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    from fedhpc.report import figures

    step = -(-len(parts) // _MANY)
    groups = [parts[index : index + step] for index in range(0, len(parts), step)]
    x = [fmean(number for number, _ in group) for group in groups]
    bottoms = [0.0] * len(groups)
    for name in order:
        heights = [fmean(values[name] for _, values in group) for group in groups]
        if any(heights):
            axes.bar(x, heights, width=0.85 * step, bottom=bottoms, color=colours[name], label=name)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    limit = _TALL * sorted(bottoms)[len(bottoms) // 2]
    if 0 < limit < max(bottoms):
        for place, height in zip(x, bottoms, strict=True):
            if height > limit:
                axes.text(place, limit, f" {height:.3g}", fontsize=7, va="top", rotation=90)
        axes.set_ylim(0, limit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figures.plain(axes)
