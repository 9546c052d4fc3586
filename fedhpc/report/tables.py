"""A summary as tables of text, and as a dict for a script."""

import math
from collections.abc import Sequence
from typing import Any

from fedhpc import words
from fedhpc.report import breakdown
from fedhpc.report.summary import SECONDS, Group, Summary

NOT_ENOUGH = "not enough idle moments"
_UNKNOWN = "-"

Table = tuple[list[str], list[list[str]]]


def memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return heads and rows of the table of memory, as text; no rows if nothing is known of it."""
    heads = ["GPU or array task", "card", "fits", "failed", "peak, MB", "largest fit, MB",
             "idle, MB", "idle before first fit", "idle after first fit", "idle after last fit",
             "idle, MB per 100 fits"]  # fmt: skip
    names = ("peak_mb", "fit_peak_mb", "idle_mb", "idle_before_mb", "idle_after_first_mb",
             "idle_after_last_mb")  # fmt: skip
    return heads, [
        [
            row["name"],
            row["card"] or _UNKNOWN,
            str(row["fits"]),
            str(row["failed"]),
            *(_number(row[name], ",.1f") for name in names),
            slope(row) if row["kind"] != "unknown" else _UNKNOWN,
        ]
        for row in rows
        if any(other["kind"] != "unknown" for other in rows)
    ]


def seconds_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return heads and rows of the table of seconds, as text."""
    heads = ["GPU or array task", "fits", "failed",
             "fit, s", "wait, s", "start, s", "run, s", "return, s",
             "link, s"]  # fmt: skip
    return heads, [
        [
            row["name"],
            str(row["fits"]),
            str(row["failed"]),
            *(_number(row[name], ".3f") for name in ("fit_s", *SECONDS)),
        ]
        for row in rows
    ]


def slope(row: dict[str, Any]) -> str:
    """Return the slope of the idle memory as text."""
    value = row["slope_mb_per_100_fits"]
    if value is None:
        return NOT_ENOUGH
    return f"{value:+,.1f}" if abs(value) >= 0.05 else "0.0"  # never -0.0


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)


def as_dict(summary: Summary) -> dict[str, Any]:
    """Return what is known of a run, for a script; what is not a number there is None."""
    status = summary.status
    value = {
        "run": summary.paths.run_id,
        "run_dir": str(summary.paths.root),
        "name": summary.name,
        "state": status.get("state"),
        "reason": status.get("reason"),
        "rounds": summary.rounds_done,
        "num_rounds": summary.num_rounds,
        "metrics": {
            name: value
            for name, value in summary.metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
        "fits": len(summary.fits),
        "fits_failed": sum(group.count for group in summary.failures),
        "seconds": breakdown.means(breakdown.of_server(summary.rounds)),
        "slot_seconds": breakdown.means(breakdown.of_slots(summary.rounds)),
        "memory": summary.rows,
        "failures": _listed(summary.failures),
        "replaced": _listed(summary.replaced),
        "notes": summary.notes,
    }
    return {key: _finite(item) for key, item in value.items()}


def _listed(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "reason": group.reason,
            "count": group.count,
            "clients": sorted(set(group.clients)),
            "rounds": sorted(set(group.rounds)),
        }
        for group in groups
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure_table(groups: Sequence[Group]) -> Table:
    """Return heads and rows of the table of failures, as text."""
    return _group_table(groups, "reason")


def replaced_table(groups: Sequence[Group]) -> Table:
    """Return heads and rows of the table of processes that were not kept, as text."""
    return _group_table(groups, "replaced because")


def _group_table(groups: Sequence[Group], head: str) -> Table:
    return ["fits", head, "clients", "rounds"], [
        [
            str(group.count),
            group.reason,
            words.ranges(set(group.clients)),
            words.ranges(set(group.rounds)),
        ]
        for group in groups
    ]
