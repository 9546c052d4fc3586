"""What a person reads in more than one place: durations, metrics, job ids and ranges of them."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

_MAX_RANGES = 6


def duration(seconds: float) -> str:
    """Return a duration as minutes:seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def age(seconds: float) -> str:
    """Return how long ago something was, to two digits or so."""
    for name, unit_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def summary(metrics: dict[str, Any]) -> str:
    """Return the metrics that matter most in one line."""
    names = shown(metrics, ("loss", "accuracy", "train_loss"))
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)


def shown(metrics: dict[str, Any], wanted: tuple[str, ...]) -> list[str]:
    """Return the names of the metrics to show: the usual ones, or the first of an app's own."""
    numbers = [name for name, value in metrics.items() if isinstance(value, int | float)]
    return [name for name in wanted if name in numbers] or numbers[:3]


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ``0 to 3, 7``; only the first few ranges, and how many more there are."""
    ordered = sorted(numbers)
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])
    ]
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    left = sum(len(run) for run in runs[_MAX_RANGES:])
    return ", ".join([*texts[:_MAX_RANGES], *([f"{left} more"] if left else [])])


def array_tasks(indices: Sequence[int]) -> str:
    """Return array tasks by their indices: ``array tasks 0 to 3``."""
    return f"array task{'s' if len(indices) > 1 else ''} {ranges(indices)}"


def roles(names: Iterable[str]) -> str:
    """Return roles (``server``, ``client-0``, ...) as ``the server, array tasks 0 to 3``."""
    wanted = list(names)
    parts = ["the server"] if "server" in wanted else []
    if indices := [array_task_of(role) for role in wanted if role != "server"]:
        parts.append(array_tasks(indices))
    return ", ".join(parts)


def array_task_of(role: str) -> int:
    """Return the index in a role ``client-<index>``."""
    return int(role.removeprefix("client-"))
