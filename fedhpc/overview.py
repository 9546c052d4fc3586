"""What is known of a run and its jobs: as a dict for a script, as tables for a person."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fedhpc import inspection, run_state, words
from fedhpc.cluster.slurm import Job
from fedhpc.inspection import Standing
from fedhpc.paths import RunPaths

_MANY = 16  # array tasks; more than these are one row a state
_MANY_NODES = 3
_MANY_WAITING = 5
_FIGURES = ("slots", "running", "done", "failed")
_KNOWN = ("gpus", *_FIGURES, "waiting")
_SAY_IT_ALL = ("COMPLETED", "ENDED", "CANCELLED", "FAILED")


@dataclass
class _Job:
    """What Slurm says of a job, and the server of its link."""

    role: str
    job_id: str
    job: Job | None
    link: dict[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> str:
        return (self.job.node if self.job else "") or str(self.link.get("host", ""))


def as_dict(paths: RunPaths, standing: Standing) -> dict[str, Any]:
    """Return everything that is known of a run, for a script.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    standing : Standing
        What `inspection.inspect` found.

    Returns
    -------
    dict
        What status.json says, with ``run``, ``run_dir``, ``problem`` (why the jobs are not known,
        or ""), ``eta_s`` (seconds, or None) and ``jobs``. These are by role: ``job_id``; Slurm's
        ``state``, ``reason`` and ``start``, and the ``node``, None where they are not known; of
        array tasks that have connected also ``gpus``, ``slots``, the fits ``running``,
        ``done`` and ``failed``, and what others are ``waiting`` for.
    """
    jobs = {}
    for known in _jobs(standing):
        job = known.job
        jobs[known.role] = {
            "job_id": known.job_id,
            "state": job and job.state,
            "reason": job and job.reason,
            "start": job and job.start,
            "node": known.node or None,
            **{name: known.link[name] for name in _KNOWN if name in known.link},
        }
    return {
        "run": paths.run_id,
        "run_dir": str(paths.root),
        **{name: value for name, value in standing.status.items() if name != "array_tasks"},
        "problem": standing.problem,
        "eta_s": eta_s(standing),
        "jobs": jobs,
    }


def eta_s(standing: Standing) -> float | None:
    """Return how many seconds the rest of the rounds will take; None if that is not known."""
    status = standing.status
    total, round_s = status.get("num_rounds"), status.get("round_s")
    if standing.ended or not total or not round_s:
        return None
    left = total - status.get("round", 0) + 1
    if fits := status.get("fits_total"):
        left -= status.get("fits_done", 0) / fits
    return float(max(left, 0) * round_s)


def as_table(paths: RunPaths, standing: Standing) -> RenderableType:
    """Return what a person wants to know of a run.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    standing : Standing
        What `inspection.inspect` found.
    """
    status = standing.status
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    eta = eta_s(standing)
    phase = "" if standing.ended else status.get("phase")
    rows = {
        "run": paths.run_id,
        "state": " ".join([status["state"], *([f"({phase})"] if phase else [])]),
        "reason": status["reason"],
        "attempt": str(status["attempt"]) if status.get("attempt", 1) > 1 else "",
        "rounds": rounds(status),
        "fits": _fits(status),
        "failing": _failing(status),
        "checkpoint": _checkpoint(paths, status),
        "metrics": words.summary(status.get("metrics") or {}),
        "ETA": "" if eta is None else words.duration(eta),
        "run folder": str(paths.root),
        "waiting": "" if standing.ended else _waiting(status),
        "jobs": f"not known: {standing.problem}" if standing.problem else "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return Group(table, "", jobs) if (jobs := _jobs_table(standing)) else table


def rounds(status: dict[str, Any]) -> str:
    """Return the round that runs, or ran last, and how many there will be: ``3/10``."""
    number, total = status.get("round", 0), status.get("num_rounds")
    return f"{number}/{total or '?'}" if number or total else ""


def _fits(status: dict[str, Any]) -> str:
    if not status.get("fits_total"):
        return ""
    text = f"{status.get('verb')}: {status.get('fits_done', 0)} of {status['fits_total']} done"
    names = {"fits_failed": "failed", "fits_late": "late", "fits_cancelled": "cancelled"}
    more = ", ".join(f"{status[key]} {word}" for key, word in names.items() if status.get(key))
    return f"{text}, {more} in the run so far" if more else text


def _failing(status: dict[str, Any]) -> str:
    """Return the clients that fail again and again."""
    found = status.get("failing")
    return "\n".join(map(str, found)) if isinstance(found, list) else ""


def _checkpoint(paths: RunPaths, status: dict[str, Any]) -> str:
    """Return where the run would go on, and how to make it do so if it will not by itself."""
    if status["state"] == "finished":
        return ""
    if why := status.get("begins_anew"):
        return f"none, a lost server begins at round 1 again: {why}"
    if (done := status.get("checkpoint")) is None:
        return ""
    text = f"after round {done}"
    if status["state"] in run_state.ENDED:
        text += f"; to go on: fedhpc submit --resume {paths.root}"
    return text


def _waiting(status: dict[str, Any]) -> str:
    """Return what fits wait for: a slot and who holds it, or the array task they are pinned to."""
    found = status.get("array_tasks")
    lines = [
        f"array task {link['array_task']}: {reason}"
        for link in (found if isinstance(found, list) else [])
        for reason in link.get("waiting") or []
    ]
    more = [f"and {len(lines) - _MANY_WAITING} more"] if len(lines) > _MANY_WAITING else []
    return "\n".join([*lines[:_MANY_WAITING], *more])


def _jobs(standing: Standing) -> list[_Job]:
    """Return the jobs, the server's first."""
    found = standing.status.get("array_tasks")
    links = {
        f"client-{link['array_task']}": link for link in (found if isinstance(found, list) else [])
    }
    if standing.ended:
        links = {role: {**link, "running": 0} for role, link in links.items()}
    ids = dict(standing.submission.roles()) if standing.submission else {}
    ids |= {role: job.job_id for role, job in standing.jobs.items()}
    for role, link in links.items():  # somebody called sbatch by hand
        ids.setdefault(role, str(link.get("job_id", "")))
    return [
        _Job(role, job_id, standing.jobs.get(role), links.get(role, {}))
        for role, job_id in ids.items()
    ]


def _jobs_table(standing: Standing) -> Table | None:
    """Return a row a job, array tasks of equal state in one; without columns that are empty."""
    jobs = _jobs(standing)
    array_tasks = [known for known in jobs if known.role != "server"]
    groups: dict[Any, list[_Job]] = {}
    for known in jobs:
        state = "not known" if standing.problem else _state(known.job)
        alone = known not in array_tasks or (known.link and len(array_tasks) <= _MANY)
        groups.setdefault((state, known.role if alone else ""), []).append(known)
    rows = [_row(state, group) for (state, _), group in groups.items()]
    heads = ("", "job", "state", "start", "node", "GPU", "slots", "fits running", "done", "failed")
    kept = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in kept:
        table.add_column(heads[index], overflow="fold", justify="right" if index > 5 else "left")
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table if rows else None


def _state(job: Job | None) -> str:
    if job is None:
        return "no longer known to Slurm"
    if not job.ended or job.state in _SAY_IT_ALL:
        return job.describe()
    return inspection.in_words(job)


def _row(state: str, group: Sequence[_Job]) -> list[str]:
    first = group[0]
    job_id = first.job_id if len(group) == 1 else first.job_id.partition("_")[0]
    if first.role == "server":
        name = "server"
    else:
        name = words.array_tasks([words.array_task_of(known.role) for known in group])
        job_id = job_id if len(group) == 1 or "_" in first.job_id else ""
    starts = sorted(known.job.start for known in group if known.job and known.job.start)
    start = starts[0] if starts else ""
    if start and first.job and first.job.pending:
        start = f"expected {start}"
    nodes = sorted({known.node for known in group if known.node})
    node = ", ".join(nodes) if len(nodes) <= _MANY_NODES else f"{len(nodes)} nodes"
    gpus = [gpu for known in group for gpu in known.link.get("gpus") or []]
    gpu = ", ".join(gpus) if len(group) == 1 else str(len(gpus) or "")
    links = [known.link for known in group if known.link]
    figures = [str(sum(link.get(name, 0) for link in links)) if links else "" for name in _FIGURES]
    return [name, job_id, state, start, node, gpu, *figures]
