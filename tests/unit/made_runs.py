"""Run folders with made-up records in them, as the processes of a run would have written them.

Times are 1.79e9 plus seconds, memory is whatever a test wants it to be.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc import files, run_state
from fedhpc.paths import RunPaths, create_run_folder

UTC = 1_790_000_000.0
CARD = "NVIDIA H200"
CONFIG = """\
name: {name}
seed: 1
federation: {{num_clients: 20, clients_per_round: 10, num_rounds: 10}}
data: {{name: cifar10, partitioner: {{name: dirichlet, params: {{alpha: 0.5}}}}}}
model: {{name: cnn, params: {{}}}}
strategy: {{name: FedAvg, params: {{}}}}
"""


def run_folder(
    runs_dir: Path, name: str = "isolation", state: run_state.State = "finished", **known: Any
) -> RunPaths:
    """Make a run folder without records."""
    runs_dir.mkdir(exist_ok=True)
    paths = create_run_folder(runs_dir, name)
    files.write_atomic(paths.config, CONFIG.format(name=name))
    run_state.write(paths, state, **known)
    return paths


def start(
    array_task: int = 0, *, utc: float = UTC, host: str = "n1", gpus: int = 0, **more: Any
) -> dict[str, Any]:
    """Return the start line; its GPUs are GPU-<host>-0 and so on."""
    return {
        "kind": "start", "utc": utc, "host": host, "array_task": array_task, "slots": 2,
        "interval_s": 0.5, "device": "cuda" if gpus else "cpu",
        "gpus": [{"id": f"GPU-{host}-{k}", "name": CARD, "total_mb": 150754.8}
                 for k in range(gpus)], **more,
    }  # fmt: skip


def sample(
    time_s: float, mb: float | None, *, running: int = 0, gpu: str | None = None
) -> dict[str, Any]:
    """Return a sample of the children's memory, or of a GPU's."""
    return {
        "kind": "sample", "time_s": round(time_s, 3), "running": running, "children": 3,
        "own_mb": 94.1, "children_mb": 30.0 if gpu else mb,
        "gpus": {gpu: mb} if gpu else {},
    }  # fmt: skip


def fit(
    began_s: float, ended_s: float, *, client: int = 0, round: int = 1, verb: str = "train",
    slot: int = 0, gpu: str | None = None, ok: bool = True, peak: float | None = 410.0,
) -> dict[str, Any]:  # fmt: skip
    """Return the line of a fit."""
    return {
        "kind": "fit", "message_id": f"r{round}-c{client}-{verb}", "client": client,
        "round": round, "verb": verb, "slot": slot, "gpu": gpu, "began_s": round_(began_s),
        "ended_s": round_(ended_s), "ok": ok, "before_mb": 3.1, "peak_mb": peak, "after_mb": 3.1,
    }  # fmt: skip


def round_(value: float) -> float:
    return round(value, 3)


def fit_line(
    array_task: int, client: int, round: int, verb: str = "train", *, ok: bool = True,
    run_s: float = 1.0, reason: str = "", host: str = "n1",
) -> dict[str, Any]:  # fmt: skip
    """Return a line of fits.jsonl."""
    line = {
        "round": round, "client": client, "verb": verb, "ok": ok, "array_task": array_task,
        "host": host, "time_s": 1.0, "slot": 0, "wait_s": 0.25, "start_s": 0.05, "run_s": run_s,
        "return_s": 0.01, "peak_rss_mb": 400.0,
    }  # fmt: skip
    return line if ok else {**line, "reason": reason}


def metrics_line(number: int, accuracy: float, loss: float, **more: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    return {
        "round": number, "time_s": number * 5.0, "round_s": 5.0, "cohort": 10, "failures": 0,
        "train": {"train_loss": loss * 0.8}, "evaluate": {"loss": loss, "accuracy": accuracy},
        **more,
    }  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Made:
    """What `records` made, for a test to compare with."""

    memory: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)


def records(
    array_task: int = 0, *, utc: float = UTC, host: str = "n1", gpus: int = 0, rounds: int = 8,
    slots: int = 2, fits_a_round: int = 6, kept_mb: float = 0.0, base_mb: float = 3.0,
    fit_mb: float = 400.0, fit_s: float = 1.5, interval_s: float = 0.1, fails: int = 0,
    first_round: int = 1, evaluate: bool = True,
) -> Made:  # fmt: skip
    """Make the records of one attempt of an array task.

    Each fit leaves ``kept_mb`` behind, on the GPU that it used: this is what a run looks like whose
    processes are kept. Every ``fails``-th fit fails half-way.
    """
    random = np.random.default_rng(array_task + first_round)
    made = Made([start(array_task, utc=utc, host=host, gpus=gpus)])
    ids = [f"GPU-{host}-{k}" for k in range(gpus)] or [None]
    runs: list[tuple[float, float, str | None]] = []
    now_s, count = 1.0, 0
    for number in range(first_round, first_round + rounds):
        for verb, share in (("train", 1.0), ("evaluate", 0.3))[: 1 + evaluate]:
            free = [now_s] * slots
            for client in range(fits_a_round):
                slot = int(np.argmin(free))
                count += 1
                ok = not fails or count % fails > 0
                began = free[slot] + 0.03
                ended = began + fit_s * share * random.uniform(0.7, 1.3) * (1.0 if ok else 0.5)
                gpu = ids[slot % len(ids)]
                runs.append((began, ended, gpu))
                made.memory.append(
                    fit(began, ended, client=client, round=number, verb=verb, slot=slot, gpu=gpu,
                        ok=ok, peak=fit_mb * random.uniform(0.9, 1.0))
                )  # fmt: skip
                made.fits.append(
                    fit_line(array_task, client, number, verb, ok=ok, host=host,
                             run_s=ended - began - 0.1,
                             reason=f"ValueError: batch {count} is empty")
                )  # fmt: skip
                free[slot] = ended
            now_s = max(free) + 0.02
            made.memory.append({"now": now_s})  # the extra sample when the last one has ended
            now_s += 0.6
    moments = list(np.arange(0.0, now_s, interval_s))
    moments += [line["now"] for line in made.memory if "now" in line]
    made.memory = [line for line in made.memory if "now" not in line]
    began_s = np.array([run[0] for run in runs])
    ended_s = np.array([run[1] for run in runs])
    of_gpu = np.array([run[2] for run in runs], dtype=object)
    for time_s in sorted(moments):
        runs_now = (began_s <= time_s) & (time_s < ended_s)
        used = {}
        for gpu in ids:
            own = runs_now & (of_gpu == gpu)
            grown = np.minimum((time_s - began_s[own]) / 0.4, 1.0)
            left = kept_mb * int(((ended_s <= time_s) & (of_gpu == gpu)).sum())
            used[gpu] = base_mb + left + float((fit_mb * (0.35 + 0.65 * grown)).sum())
        line = sample(time_s, used.get(None, 30.0), running=int(runs_now.sum()))
        line["gpus"] = {gpu: round_(mb) for gpu, mb in used.items() if gpu}
        made.memory.append(line)
    made.memory[1:] = sorted(
        made.memory[1:], key=lambda line: line.get("ended_s", line.get("time_s"))
    )
    return made
