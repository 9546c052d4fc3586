"""Everything that a report says of a run, as plain values."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import yaml

from fedhpc import files, inspection, run_state
from fedhpc.paths import RunPaths
from fedhpc.report import evidence, tracks
from fedhpc.report.tracks import Track

SECONDS = ("wait_s", "start_s", "run_s", "return_s", "link_s")
_SOURCES = {"train": "clients, training", "evaluate_clients": "clients, evaluation",
            "evaluate": "server, evaluation"}  # fmt: skip


@dataclass
class Group:
    """Fits that failed, or whose process was replaced, for the same reason but for numbers in it.

    Attributes
    ----------
    reason : str
        Of the first one.
    count : int
        How many there are.
    clients, rounds : list of int
        Whose, and when.
    """

    reason: str
    count: int = 0
    clients: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


@dataclass
class Summary:
    """What is known of a run.

    Attributes
    ----------
    paths : RunPaths
        Of the run.
    status : dict
        As in status.json, corrected where the jobs say otherwise.
    config, manifest : dict
        As they were written; empty if they cannot be read.
    rounds : list of dict
        The lines of metrics.jsonl; of rounds that a server has done again, the last time.
    fits : list of dict
        The lines of fits.jsonl.
    failures : list of Group
        The most frequent first.
    replaced : list of Group
        Why processes were not kept (``fits_per_process: auto``), the most frequent first.
    tracks : list of Track
        Memory over time.
    rows : list of dict
        A row for each track, and for each array task without one: see `tracks.figures_of`, with
        ``name``, ``card`` and the medians of `SECONDS`.
    notes : list of str
        What is missing, or strange.
    start_s : float
        When the first array task started, in seconds since 1970; 0 if that is not known.
    """

    paths: RunPaths
    status: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]
    rounds: list[dict[str, Any]]
    fits: list[dict[str, Any]]
    failures: list[Group]
    replaced: list[Group]
    tracks: list[Track]
    rows: list[dict[str, Any]]
    notes: list[str]
    start_s: float

    @property
    def name(self) -> str:
        """The run's name in its config."""
        return str(self.config.get("name") or self.paths.run_id)

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.status.get("state") in run_state.ENDED

    @property
    def rounds_done(self) -> int:
        """The last round that has ended."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def num_rounds(self) -> int | None:
        """How many rounds there were to be; None if nobody said."""
        federation = _dict(self.config.get("federation"))
        known = self.status.get("num_rounds") or federation.get("num_rounds")
        return known if isinstance(known, int) else None

    @property
    def metrics(self) -> dict[str, Any]:
        """The latest evaluation."""
        for line in reversed(self.rounds):
            if metrics := line.get("evaluate") or line.get("evaluate_clients"):
                return dict(metrics)
        return dict(self.status.get("metrics") or {})


def collect(paths: RunPaths) -> Summary:
    """Read a run folder, whatever is there of it.

    Parameters
    ----------
    paths : RunPaths
        Of the run, which may still be going on.
    """
    standing = inspection.inspect_all([paths], retry_s=0.0, jobs_of_ended=False)[0]
    seen = evidence.read(paths)
    found = tracks.build(seen)
    fits = [line for line in files.read_lines(paths.fits) if isinstance(line, dict)]
    notes = [f"jobs: {standing.problem}"] if standing.problem else []
    if not paths.memory.is_dir():
        notes.append(
            f"there is no {paths.memory.name}/ in the run folder, so memory over time is not known"
        )
    elif not any(track.pieces for track in found):
        notes.append(f"{paths.memory.name}/ has no samples, so memory over time is not known")
    notes += [
        f"{name}: {count} line{'s' * (count > 1)} could not be read and "
        f"{'are' if count > 1 else 'is'} left out"
        for name, count in seen.unreadable.items()
    ]
    if any(segment.device != "cpu" and not _has_gpu(segment) for segment in seen.segments):
        notes.append("array tasks with a GPU have no samples of its memory; see their children's")
    homeless = sum(fit.gpu is None for seg in seen.segments if _has_gpu(seg) for fit in seg.fits)
    if homeless:
        notes.append(f"fits that never came as far as a GPU, and are in no row: {homeless}")
    if not fits:
        notes.append(f"there is no fit in {paths.fits.name} yet")
    return Summary(
        paths=paths,
        status=standing.status,
        config=_config(paths),
        manifest=_dict(files.read_json(paths.manifest)),
        rounds=_rounds(paths),
        fits=fits,
        failures=_groups(fit for fit in fits if not fit.get("ok", True)),
        replaced=_groups((fit for fit in fits if fit.get("replaced")), "replaced"),
        tracks=found,
        rows=_rows(found, fits),
        notes=notes,
        start_s=min((segment.utc_s for segment in seen.segments), default=0.0),
    )


def _has_gpu(segment: evidence.Segment) -> bool:
    return bool(segment.gpus) or any(sample.gpus for sample in segment.samples)


def _config(paths: RunPaths) -> dict[str, Any]:
    """Return the config as it was written: one of an older fedhpc may no longer be valid."""
    try:
        return _dict(yaml.safe_load(paths.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rounds(paths: RunPaths) -> list[dict[str, Any]]:
    """Return the lines of the rounds; a server that began again has done some of them twice."""
    kept: list[dict[str, Any]] = []
    for line in files.read_lines(paths.metrics):
        if isinstance(line, dict) and isinstance(line.get("round"), int):
            while kept and kept[-1]["round"] >= line["round"]:
                kept.pop()
            kept.append(line)
    return kept


def _groups(fits: Iterable[dict[str, Any]], key: str = "reason") -> list[Group]:
    """Return fits by what their lines say under ``key``."""
    groups: dict[str, Group] = {}
    for fit in fits:
        reason = str(fit.get(key) or "no reason given")
        group = groups.setdefault(re.sub(r"\d+", "#", reason), Group(reason))
        group.count += 1
        group.clients.append(int(fit.get("client", -1)))
        group.rounds.append(int(fit.get("round", -1)))
    return sorted(groups.values(), key=lambda group: -group.count)


def curves(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the metrics over rounds that are worth a picture.

    Returns
    -------
    dict
        By ``accuracy`` and ``loss`` (which include an app's own ``eval_acc`` and the like), or by
        the names of other metrics where a run has neither: by who measured, (round, value) pairs.
    """
    chosen: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    others: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in rounds:
        for source, who in _SOURCES.items():
            for name, value in _dict(line.get(source)).items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                kind = "loss" if "loss" in name.lower() else "accuracy" if _is_acc(name) else ""
                plain = name.removeprefix("train_").removeprefix("eval_")
                label = who if plain in (kind, "acc", "") else f"{who}: {name}"
                target = chosen[kind][label] if kind else others[name][who]
                target.append((line["round"], float(value)))
    if not chosen:
        names = [name for name in others if name not in ("num_examples", "num-examples")][:3]
        return {name: dict(others[name]) for name in names}
    return {kind: dict(chosen[kind]) for kind in ("accuracy", "loss") if kind in chosen}


def _is_acc(name: str) -> bool:
    return "acc" in re.split(r"[^a-z]+", name.lower()) or "accuracy" in name.lower()


def _rows(found: Sequence[Track], fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of each track, and of each array task that has none."""
    of_fit: dict[Any, int] = {
        (fit.array_task, fit.round, fit.client, fit.verb): index
        for index, track in enumerate(found)
        for fit in track.fits
    }
    alone: dict[Any, list[int]] = defaultdict(list)
    for index, track in enumerate(found):
        for array_task in track.array_tasks:
            alone[array_task].append(index)
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    orphans: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in fits:
        task: Any = line.get("array_task")
        owners = alone.get(task, [])
        key = (task, line.get("round"), line.get("client"), line.get("verb"))
        index = of_fit.get(key, owners[0] if len(owners) == 1 else -1)
        if index >= 0:
            lines[index].append(line)
        elif not owners and isinstance(task, int):
            orphans[task].append(line)
    rows = [
        {
            "name": track.name,
            "card": track.card,
            "kind": track.kind,
            "array_tasks": track.array_tasks,
            **tracks.figures_of(track),
            **_medians(lines[index]),
        }
        for index, track in enumerate(found)
    ]
    return rows + [_without_memory(index, orphans[index]) for index in sorted(orphans)]


def _without_memory(array_task: int, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of an array task that only fits.jsonl knows."""
    hosts = sorted({str(line["host"]) for line in lines if line.get("host")})
    walls = [
        sum(line.get(name, 0.0) for name in ("start_s", "run_s", "return_s"))
        for line in lines
        if "run_s" in line
    ]
    nothing = tracks.figures_of(Track("children", "", None, "", None))
    return {
        "name": f"array task {array_task}" + (f" on {', '.join(hosts)}" if hosts else ""),
        "card": "",
        "kind": "unknown",
        "array_tasks": [array_task],
        **nothing,
        "fits": len(lines),
        "failed": sum(not line.get("ok", True) for line in lines),
        "fit_s": median(walls) if walls else None,
        **_medians(lines),
    }


def _medians(lines: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    values = {
        name: [line[name] for line in lines if isinstance(line.get(name), int | float)]
        for name in SECONDS
    }
    return {name: median(found) if found else None for name, found in values.items()}
