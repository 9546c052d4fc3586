"""Draw and tell what a run did: ``python -m fedhpc.report [RUN_DIR]``.

This module loads neither matplotlib nor numpy at the top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhpc import commandline, files, words
from fedhpc.commandline import RUNS_DIR, AsJson, Command, RunsDir
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.paths import RunPaths, open_run_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedhpc.report.summary import Summary
    from fedhpc.report.tables import Table
    from fedhpc.report.tracks import Track

__all__ = ["app", "main"]

app = commandline.new_app()

_MANY = 16  # rows of a table in a terminal


@app.command(cls=Command)
def main(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]")] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Draw the memory of another run beside it, on the same axes."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write there, not into the run folder.")
    ] = None,
    as_json: AsJson = False,
    runs_dir: RunsDir = RUNS_DIR,
) -> None:
    """Draw the memory of a run over time, and write its page: report.html and figures/.

    The page needs no other file and no network. A run that still goes on, or has failed, has one
    too. Without RUN_DIR it is the newest run in --runs-dir.
    """
    from fedhpc.report import summary, tables

    paths = commandline.open_or_newest(run_dir, runs_dir)
    other = None if beside is None else open_run_folder(beside)
    found = summary.collect(paths)
    pair = [] if other is None else _comparable([found, summary.collect(other)])
    place = RunPaths(_folder(paths, out))
    pictures = _write(found, pair, place)
    if as_json:
        written = {"report": str(place.report), "figures": [str(path) for path in pictures]}
        commandline.print_json(tables.as_dict(found) | written)
    else:
        _print(found, [place.report, *pictures])


def _folder(paths: RunPaths, out: Path | None) -> Path:
    """Return the folder to write into, with one for figures in it.

    Raises
    ------
    ConfigError
        If --out is a file.
    PlatformError
        If the folder cannot be written.
    """
    folder = paths.root if out is None else out.absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError("command line", [f"--out: expected a folder, found the file {out}"])
    try:
        RunPaths(folder).figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(
            f"wanted to write a report into {folder}, found: {error.strerror}",
            "name a folder of your own with --out FOLDER",
        ) from error
    return folder


def _comparable(pair: "list[Summary]") -> "list[Summary]":
    """Return the runs if they can be drawn on the same axes.

    Raises
    ------
    ConfigError
        If one has no memory over time, or they measured different things.
    """
    problems = [
        f"--beside: expected two runs with samples in {found.paths.memory.name}/,"
        f" found none in {found.paths.root}"
        for found in pair
        if not any(track.pieces for track in found.tracks)
    ]
    kinds = [{track.kind for track in found.tracks if track.pieces} for found in pair]
    if not problems and kinds[0] != kinds[1]:
        told = ["GPU memory" if kind == {"gpu"} else "memory of processes" for kind in kinds]
        problems = [f"--beside: expected two runs of one kind, found {' and '.join(told)}"]
    if problems:
        raise ConfigError("command line", problems)
    return pair


def _write(found: "Summary", pair: "list[Summary]", place: RunPaths) -> list[Path]:
    """Write the page and the figures; return the paths of the figures."""
    from fedhpc.report import breakdown, figures, page, summary

    drawn = figures.chosen(found.tracks)
    pictures: dict[str, tuple[str, Figure | None, str]] = {
        "memory": ("Memory", figures.memory(found), _memory_words(drawn)),
        "beside": (
            "Two runs beside each other",
            figures.beside(pair) if pair else None,
            f"{' and '.join(one.paths.run_id for one in pair)}, on the same axes.",
        ),
        "time": (
            "Where the time of a round went",
            breakdown.figure(found.rounds),
            "A bar a round (the mean of neighbours, where there are many); a bar that is much"
            " higher than most is cut off, and its height written into it.",
        ),
        "learning": (
            "Learning",
            figures.learning(summary.curves(found.rounds)),
            "Metrics over the rounds; round 0 is the model before any training.",
        ),
    }
    shown, written = [], []
    for name, (heading, figure, text) in pictures.items():
        if figure is None:
            continue
        rendered = figures.render(figure)
        shown.append((heading, rendered["png"], text))
        for suffix, content in rendered.items():
            path = place.figures / f"{name}.{suffix}"
            files.write_atomic(path, content)
            written.append(path)
    html = page.build(found, shown, _left_out(found.tracks, drawn))
    files.write_atomic(place.report, html)
    return written


def _memory_words(drawn: "Sequence[Track]") -> str:
    """Say what the figure of memory shows."""
    if not drawn:
        return ""
    from fedhpc.report import figures

    return (
        f"{figures.what_is_drawn(drawn)}. Below each curve the fits that had ended, a row a slot."
        " Dots: the moments when nothing ran; idle says how much was in use at the first of them"
        " after a fit, and at the last. Times of several hosts are by their own clocks."
    )


def _left_out(found: "Sequence[Track]", drawn: "Sequence[Track]") -> str:
    """Say which tracks have no panel, and why."""
    missing = [track for track in found if track not in drawn and track.pieces]
    if not missing:
        return ""
    tasks = sorted({task for track in missing for task in track.array_tasks})
    return (
        f"Drawn are the {len(drawn)} with the highest peaks; {len(missing)} more are left out"
        f" ({words.array_tasks(tasks)}). All are in the table."
    )


def _print(found: "Summary", written: Sequence[Path]) -> None:
    """Print what a person wants to know at once."""
    from rich.table import Table

    from fedhpc.report import breakdown, figures, tables

    status = found.status
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    rows = {
        "run": found.paths.run_id,
        "state": str(status.get("state")),
        "reason": str(status.get("reason") or ""),
        "rounds": f"{found.rounds_done}/{found.num_rounds or '?'}",
        "metrics": words.summary(found.metrics),
        "time": breakdown.largest(found.rounds),
        "memory": figures.what_is_drawn(drawn) if (drawn := figures.chosen(found.tracks)) else "",
        "left out": _left_out(found.tracks, drawn),
        "note": "\n".join(found.notes),
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, value)
    console = commandline.console()
    console.print(facts)
    for table in (
        tables.memory_table(found.rows),
        tables.seconds_table(found.rows),
        tables.replaced_table(found.replaced),
        tables.failure_table(found.failures),
    ):
        if table[1]:
            _print_table(console, table)
    console.print()
    for path in written:
        if path.suffix != ".svg":
            console.print(str(path), soft_wrap=True)


def _print_table(console: Any, table: "Table") -> None:
    from rich.table import Table

    heads, rows = table
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        is_text = index == 0 or head in ("card", "reason", "replaced because", "clients", "rounds")
        shown.add_column(head, overflow="fold", justify="left" if is_text else "right")
    for row in rows[:_MANY]:
        shown.add_row(*row)
    console.print()
    console.print(shown)
    if len(rows) > _MANY:
        console.print(f"and {len(rows) - _MANY} rows more, in the page and with --json")
