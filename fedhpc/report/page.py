"""The page of a run: one HTML file that needs nothing else, to be sent to a colleague."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from fedhpc import __version__, words
from fedhpc.report import breakdown, tables
from fedhpc.report.summary import Summary

_STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #222;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top;
         border-bottom: 1px solid #ddd; }
th { font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption, .quiet { color: #595959; font-size: 13px; }
.state { font-weight: 600; } .failed, .cancelled { color: #a33a00; }
.note { border-left: 3px solid #e69f00; padding-left: .7rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { margin: 0; } }
"""
_MEMORY_WORDS = (
    "MB are millions of bytes. Peak: the highest sample. Largest fit: the highest peak of a single"
    " fit, by its own account. Idle: the moments when no fit ran; each counts once, the column is"
    " their median. Idle after first, after last fit: the first idle moment after it. MB per 100"
    " fits: how the idle memory grew with the fits that had run, by least squares over all idle"
    " moments after the first fit; 0 means that fits give back what they take."
)
_SECONDS_WORDS = (
    "Medians. Fit: from its admission until its child is gone (without memory records: start, run"
    " and return together). Wait: for a slot. Start: until the child runs the app. Run: the app's"
    " training or evaluation. Return: the reply. Link: the way"
    " between server and array task, both ways."
)

_REPLACED_WORDS = (
    "With isolation.fits_per_process: auto a process is used for another fit only while it proves"
    " to be as it was. These were not, after the fits counted here."
)


def build(summary: Summary, figures: Sequence[tuple[str, bytes, str]], left_out: str = "") -> str:
    """Return the page of a run.

    Parameters
    ----------
    summary : Summary
        Of the run.
    figures : sequence of (str, bytes, str)
        The heading, the PNG, and what it shows in words, for each.
    left_out : str
        Which GPUs or array tasks have no panel; "" if all have one.
    """
    title = f"{summary.name}: {summary.status.get('state')}"
    parts = [
        f"<h1>{escape(summary.name)}</h1>",
        f'<p class="quiet">{escape(summary.paths.run_id)}</p>',
        _facts(summary),
        *(f'<p class="note">{escape(note)}</p>' for note in summary.notes),
    ]
    for heading, png, shown in figures:
        parts += [f"<h2>{escape(heading)}</h2>", _figure(png, shown)]
        if left_out and heading == "Memory":
            parts.append(f'<p class="quiet">{escape(left_out)}</p>')
    of_time = breakdown.table(summary.rounds)
    if of_time[1]:
        parts += [
            "<h2>Time in numbers</h2>",
            _table(of_time, {0}),
            f'<p class="quiet">{escape(breakdown.WORDS)}</p>',
        ]
    in_numbers = tables.memory_table(summary.rows)
    if in_numbers[1]:
        parts += [
            "<h2>Memory in numbers</h2>",
            _table(in_numbers, {0, 1}),
            f'<p class="quiet">{escape(_MEMORY_WORDS)}</p>',
        ]
    if summary.rows:
        parts += [
            "<h2>Seconds of a fit</h2>",
            _table(tables.seconds_table(summary.rows), {0}),
            f'<p class="quiet">{escape(_SECONDS_WORDS)}</p>',
        ]
    if summary.replaced:
        parts += [
            "<h2>Processes that were replaced</h2>",
            _table(tables.replaced_table(summary.replaced), {1, 2, 3}),
            f'<p class="quiet">{escape(_REPLACED_WORDS)}</p>',
        ]
    parts.append("<h2>Failures</h2>")
    if summary.failures:
        parts.append(_table(tables.failure_table(summary.failures), {1, 2, 3}))
        folder = escape(summary.paths.errors.name)
        parts.append(f'<p class="quiet">Reasons that differ in numbers only are one row.'
                     f" Tracebacks are in {folder}/ of the run folder.</p>")  # fmt: skip
    else:
        parts.append(f"<p>{'No fit has failed.' if summary.fits else 'No fits are known.'}</p>")
    parts += [_rounds(summary), _versions(summary.manifest), _foot(summary)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _facts(summary: Summary) -> str:
    """Return what the run is, and how it stands."""
    state = str(summary.status.get("state"))
    config = summary.config
    federation, data = _section(config, "federation"), _section(config, "data")
    cohort = federation.get("clients_per_round")
    own_app = _section(config, "app").get("dir") or _section(config, "app").get("server")
    seconds = summary.rounds[-1].get("time_s") if summary.rounds else None
    failed = sum(group.count for group in summary.failures)
    rows = {
        "reason": str(summary.status.get("reason") or ""),
        "rounds": f"{summary.rounds_done} of {summary.num_rounds or '?'}"
        + (f", {words.duration(seconds)} until then" if isinstance(seconds, int | float) else ""),
        "result": words.summary(summary.metrics),
        "fits": f"{len(summary.fits)}, {failed} of them failed" if summary.fits else "",
        "clients": f"{federation.get('num_clients', '?')}"
        + (f", {cohort} in a round" if cohort else "")
        if federation
        else "",
        "app": str(own_app) if own_app else "",
        "data": "" if own_app else _named(data) + _split(data),
        "model": "" if own_app else _named(_section(config, "model")),
        "strategy": "" if own_app else _named(_section(config, "strategy")),
        "seed": str(config.get("seed", "")),
    }
    known = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in rows.items()
        if value
    )
    kind = state if state.isalpha() else ""
    head = f'<tr><th>state</th><td class="state {kind}">{escape(state)}</td></tr>'
    return f"<table>{head}{known}</table>"


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _named(section: dict[str, Any]) -> str:
    """Return a name with its parameters."""
    params = _section(section, "params")
    inside = ", ".join(f"{name} {value}" for name, value in params.items())
    return f"{section.get('name', '')}{f' ({inside})' if inside else ''}"


def _split(data: dict[str, Any]) -> str:
    partitioner = _named(_section(data, "partitioner"))
    return f", split by {partitioner}" if partitioner else ""


def _figure(png: bytes, shown: str) -> str:
    text = escape(shown)
    coded = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{coded}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(table: tables.Table, of_text: set[int]) -> str:
    """Return a table; all columns but ``of_text`` are numbers."""
    heads, rows = table

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{escape(value)}</{tag}>"
            if index in of_text
            else f'<{tag} class="n">{escape(value)}</{tag}>'
            for index, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _rounds(summary: Summary) -> str:
    """Return the metrics of the rounds as a table that can be opened."""
    if not summary.rounds:
        return ""
    names: dict[tuple[str, str], None] = {}
    for line in summary.rounds:
        for source in ("train", "evaluate_clients", "evaluate"):
            metrics = _section(line, source)
            for name in words.shown(metrics, ("loss", "accuracy", "train_loss")):
                names[source, name] = None
    heads = ["round", "seconds", "cohort", "failures",
             *(f"{name} ({source})" for source, name in names)]  # fmt: skip
    rows = [
        [
            str(line["round"]),
            _number(line.get("round_s"), ".2f"),
            str(line.get("cohort", "-")),
            str(line.get("failures", "-")),
            *(_number(_section(line, source).get(name), ".4f") for source, name in names),
        ]
        for line in summary.rounds
    ]
    table = _table((heads, rows), set())
    return f"<h2>Rounds</h2><details><summary>{len(rows)} lines</summary>{table}</details>"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _versions(manifest: dict[str, Any]) -> str:
    if not manifest:
        return "<h2>Versions</h2><p>manifest.json is missing or cannot be read.</p>"
    packages = manifest.get("packages")
    known = {name: manifest.get(name) for name in ("fedhpc", "python")}
    known |= packages if isinstance(packages, dict) else {}
    known |= {"git": manifest.get("git"), "submitted on": manifest.get("host")}
    command = manifest.get("command")
    known["command"] = " ".join(map(str, command)) if isinstance(command, list) else command
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in known.items()
        if value
    )
    return f"<h2>Versions</h2><table>{rows}</table>"


def _foot(summary: Summary) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    so_far = "" if summary.ended else " The run had not ended then."
    return (
        f'<p class="quiet">Written {now} by fedhpc {escape(__version__)},'
        f" fedhpc report {escape(summary.paths.run_id)}.{so_far}</p>"
    )
