"""What a submission would do: ``--dry-run`` prints the plan, both sbatch scripts and the config.

It needs no Slurm, imports neither torch, flwr nor grpc, and writes nothing.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhpc import config, environment, run_state, words
from fedhpc.config import Config
from fedhpc.errors import PlatformError
from fedhpc.paths import RunPaths

_RUNS_TRIED = 20
_TAIL_BYTES = 1_000_000  # of fits.jsonl: some thousand fits, however long the run was


def show(resolved: Config, *, maybe_on_slurm: bool) -> None:
    """Print the plan, the sbatch scripts and the resolved config.

    Parameters
    ----------
    resolved : Config
        As submit resolves it.
    maybe_on_slurm : bool
        Whether the run goes to Slurm where there is one, so that its scripts are of interest.
    """
    rows = list(_rows(resolved))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if maybe_on_slurm:
        from fedhpc.cluster import scripts

        lines.append("")
        if resolved.cluster.executor != "slurm":
            lines.append("# no sbatch here: this run would be local; where it is, it submits these")
        for job, text in scripts.texts(resolved, _placeholder(resolved)).items():
            lines += [f"# ---- {job}: sbatch script ----", text]
    lines += ["", "# ---- resolved config ----", config.dump(resolved)]
    sys.stdout.write("\n".join(lines))


def _placeholder(resolved: Config) -> RunPaths:
    return RunPaths(Path(resolved.cluster.runs_dir) / f"{resolved.name}-YYYYmmdd-HHMMSS-xxxx")


def _rows(resolved: Config) -> Iterator[tuple[str, str]]:
    cluster, federation = resolved.cluster, resolved.federation
    places = places_of(resolved)
    yield "executor", cluster.executor
    yield "jobs", _jobs(resolved, places)
    if places.gpus or places.server_gpus:
        yield "GPUs", _gpus(resolved, places)
    yield "slots", _slots(places)
    if resolved.app.is_builtin:
        rounds, fits = federation.num_rounds, federation.clients_per_round
        each = f"{fits} a round"
        if evaluations := federation.clients_per_evaluation:
            each += f", {evaluations} evaluate"
            fits += evaluations
        yield "clients", f"{federation.num_clients}; {each}{_share(resolved, places)}"
        yield "rounds", str(rounds)
        yield "fits", str(rounds * fits)
    else:
        yield "clients", f"{federation.num_clients}{_share(resolved, places)}"
        yield "rounds, fits", "the ServerApp decides"
    yield "expected", _expected(resolved, places)
    if resolved.snapshot:
        yield "code", "a copy in the run folder"
    yield "run folder", str(_placeholder(resolved).root)


# --- places for fits ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where fits can run at the same time.

    Attributes
    ----------
    array_tasks : int
        At a time.
    slots : int or None
        Of an array task; None if only its node will tell.
    gpus : int
        That all array tasks of a time hold.
    server_gpus : int
        That the server job holds.
    """

    array_tasks: int
    slots: int | None
    gpus: int = 0
    server_gpus: int = 0

    @property
    def all_slots(self) -> int | None:
        """Slots of all array tasks at a time."""
        return self.slots and self.slots * self.array_tasks


def places_of(resolved: Config) -> Places:
    """Return where the fits of a run would run, as far as it is known before."""
    cluster = resolved.cluster
    array_tasks = min(cluster.array_tasks, cluster.max_parallel or cluster.array_tasks)
    if cluster.executor == "debug":
        return Places(1, 1)
    if cluster.executor == "local":
        return _places_here(resolved, array_tasks)
    from fedhpc.cluster import options

    isolation, job = resolved.isolation, options.of_clients(cluster)
    gpus = options.gpus(job)
    slots: int | None = None if isolation.slots == "auto" else isolation.slots
    if gpus and isolation.device != "cpu":
        per_gpu = isolation.slots_per_gpu
        slots = None if per_gpu == "auto" else gpus * per_gpu
    elif slots is None and job.cpus_per_task:
        slots = max(1, job.cpus_per_task // isolation.threads_per_fit)
    return Places(array_tasks, slots, gpus * array_tasks, options.gpus(options.of_server(cluster)))


def _places_here(resolved: Config, array_tasks: int) -> Places:
    """Return the places of the local executor, whose array tasks share this machine."""
    from fedhpc import allotment
    from fedhpc.isolation.nvml import open_nvml

    here = environment.current()
    try:
        slots = allotment.slots(resolved.isolation, here, open_nvml(), array_tasks_here=array_tasks)
    except PlatformError:  # no GPU here: the run will say so
        return Places(array_tasks, None)
    gpus = {gpu for slot in slots for gpu in slot.gpus}
    return Places(array_tasks, len(slots), len(gpus))


def _jobs(resolved: Config, places: Places) -> str:
    total, executor = resolved.cluster.array_tasks, resolved.cluster.executor
    if executor == "debug":
        return "none: everything in this process"
    if executor == "local":
        return f"1 server process, {_count(places.array_tasks, 'array task')} on this machine"
    at_a_time = f", {places.array_tasks} at a time" if places.array_tasks < total else ""
    return f"1 server job, 1 client array of {_count(total, 'array task')}{at_a_time}"


def _gpus(resolved: Config, places: Places) -> str:
    if resolved.cluster.executor == "local":
        return f"{places.gpus}, shared by the array tasks"
    each = places.gpus // places.array_tasks
    server = f"; {places.server_gpus} for the server" if places.server_gpus else ""
    return f"{each} an array task, {places.gpus} at a time{server}"


def _slots(places: Places) -> str:
    if places.slots is None:
        return "auto: as many an array task as it finds GPUs, or cores"
    return f"{places.slots} an array task, {places.all_slots} at a time"


def _share(resolved: Config, places: Places) -> str:
    """Return how many clients come to a slot, and how often all slots are filled in a round."""
    if not (slots := places.all_slots):
        return ""
    text = f"; {resolved.federation.num_clients / slots:.3g} for each slot"
    if not resolved.app.is_builtin:
        return text
    waves = math.ceil(resolved.federation.clients_per_round / slots)
    return f"{text}, a round is {_count(waves, 'wave')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- expected time --------------------------------------------------------------------------------


def _expected(resolved: Config, places: Places) -> str:
    """Return how long the fits will take at least, if an earlier run tells."""
    runs_dir = Path(resolved.cluster.runs_dir)
    found = _last_times(runs_dir, resolved.name)
    if found is None:
        return f"not known: no finished run '{resolved.name}' in {runs_dir}"
    run, times = found
    each = "".join(f"; {mean_s:.3g} s a fit ({verb})" for verb, mean_s in sorted(times.items()))
    source = f"{each.removeprefix('; ')}, as in {run}"
    slots = places.all_slots
    if not resolved.app.is_builtin or not slots:
        return source
    federation = resolved.federation
    wanted = {"train": federation.clients_per_round, "evaluate": federation.clients_per_evaluation}
    round_s = sum(math.ceil(wanted.get(verb, 0) / slots) * mean for verb, mean in times.items())
    wall_s = federation.num_rounds * round_s
    gpus = places.gpus + places.server_gpus
    hours = f", {gpus * wall_s / 3600:.2g} GPU hours" if gpus else ""
    return f"at least {words.duration(wall_s)}{hours} of fits: {source}"


def _last_times(runs_dir: Path, name: str) -> tuple[str, dict[str, float]] | None:
    """Return the newest finished run of a name and the mean wall time of its fits, by verb."""
    pattern = re.compile(re.escape(name) + r"-\d{8}-\d{6}-[0-9a-f]{4}")
    try:
        runs = sorted(filter(pattern.fullmatch, os.listdir(runs_dir)), reverse=True)  # noqa: PTH208
    except OSError:
        return None
    for run in runs[:_RUNS_TRIED]:
        paths = RunPaths(runs_dir / run)
        if run_state.read(paths)["state"] == "finished" and (times := _mean_times(paths)):
            return run, times
    return None


def _mean_times(paths: RunPaths) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for fit in _last_lines(paths.fits):
        if fit.get("ok") and "run_s" in fit:
            wall_s = fit.get("start_s", 0) + fit["run_s"] + fit.get("return_s", 0)
            times.setdefault(fit["verb"], []).append(wall_s)
    return {verb: sum(walls) / len(walls) for verb, walls in times.items()}


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines[1:] if start else lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
