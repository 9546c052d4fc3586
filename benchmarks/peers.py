"""fedhpc against its peers, on the same ClientApp: python benchmarks/peers.py --data CIFAR10.zip.

20 rounds of 10 of 100 CIFAR-10 clients, the blitz CNN, two fits at a time with a thread each:

    fresh  a process for every fit (the default)      kept  processes that are never replaced
    auto   kept while they prove themselves clean     spawn a new interpreter for every fit
    ray    Flower's simulation engine with two warm actors: pip install 'flwr[simulation]'
    bare   two persistent processes in plain PyTorch, no framework: before and after each of the
           others, which is compared with the mean of the two, as a machine's speed changes

--tiny: 100 of 1,000 clients a round, 60 MNIST images each, logistic regression; without spawn.

Each mode runs as its user runs it, calls the whole ClientApp, and must end in the same model as
bare, bit for bit, or the benchmark stops. What is compared comes from one call, the modes in turn,
after a run that fills the caches of data, partitions and validation. CPU and memory are those of
all processes, idle ones too. A steady round is the median without the first; the wall time of a
whole run includes the start of every process and an evaluation of the last model (not in bare).
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measured import Measured, federate, measure
from pydantic import ValidationError

from fedhpc.config import Isolation
from fedhpc.files import read_json

HERE = Path(__file__).parent
SETS = {
    "fresh": ["isolation.fits_per_process=1"],
    "kept": ["isolation.fits_per_process=0"],
    "auto": ["isolation.fits_per_process=auto"],
    "spawn": ["isolation.start_method=spawn"],
}
TINY = [
    "model={name: logistic}",
    "federation.num_clients=1000",
    "federation.clients_per_round=100",
    "training.batch_size=32",
]


@dataclass(frozen=True)
class Run:
    """What one run of a mode cost."""

    round_s: float
    wall_s: float
    cpu_s: float
    peak_mb: float
    bare_round_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help="zip of CIFAR-10 images, or folder with MNIST/raw; default: torchvision's"
    )
    parser.add_argument("--tiny", action="store_true", help="1,000 clients with 60 images each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--spawn-rounds", type=int, default=3, help="spawn is slow: fewer rounds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=[*SETS, "ray"], default=[*SETS, "ray"])
    parser.add_argument("--without", nargs="+", choices=[*SETS, "ray"], default=[])
    options = parser.parse_args()
    modes = [mode for mode in options.modes if mode not in options.without]
    if options.tiny and "spawn" in modes:
        modes.remove("spawn")
    if "auto" in modes and not _has_auto():
        modes.remove("auto")
        print("this fedhpc has no isolation.fits_per_process: auto; it is left out")
    if "ray" in modes and importlib.util.find_spec("ray") is None:
        sys.exit(
            "ray is not installed here; Hint: pip install 'flwr[simulation]', or --without ray"
        )
    config, sets = _workload(options.tiny, options.data)
    cohort = 100 if options.tiny else 10
    runs: dict[str, list[Run]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder)
        # Its config is that of bare and ray too, whose processes are kept.
        model_dir, _, _ = federate(config, [*sets, *SETS["kept"]], runs_dir, 2)
        before_s = statistics.median(_in_new_process("bare", model_dir, options.rounds)[0][1:])
        for repeat in range(options.repeats):
            for mode in modes:
                rounds = options.spawn_rounds if mode == "spawn" else options.rounds
                run, before_s = _run(mode, config, sets, runs_dir, model_dir, rounds, before_s)
                runs[mode].append(run)
                print(
                    f"{repeat + 1}: {mode:<6} {run.round_s:7.3f} s a round (bare"
                    f" {run.bare_round_s:6.3f}), {1e3 * run.round_s / cohort:7.1f} ms a fit; whole"
                    f" run: {run.wall_s:6.1f} s, CPU {run.cpu_s:6.1f} s, {run.peak_mb:5.0f} MB",
                    flush=True,
                )
    _report(runs, cohort)


def _workload(tiny: bool, data: str | None) -> tuple[Path, list[str]]:
    config = HERE.parent / "configs" / ("mnist.yaml" if tiny else "cifar.yaml")
    sets = ["isolation.slots=2", *(TINY if tiny else [])]
    if data:
        sets.append(f"data.source={Path(data).resolve()}")
        if not tiny:
            sets.append("data.name=image_folder")
    return config, sets


def _has_auto() -> bool:
    try:
        Isolation.model_validate({"fits_per_process": "auto"})
    except ValidationError:
        return False
    return True


def _run(
    mode: str,
    config: Path,
    sets: list[str],
    runs_dir: Path,
    model_dir: Path,
    rounds: int,
    before_s: float,
) -> tuple[Run, float]:
    """Run a mode, then the same bare; ``before_s`` is a round of bare before.

    Returns
    -------
    run : Run
        What it cost.
    after_s : float
        A round of bare after it.
    """
    for _ in range(3):
        if mode == "ray":
            seconds, digest, measured = _in_new_process("flower_simulation", model_dir, rounds)
            seconds = seconds[1:]
        else:
            run_dir, seconds, measured = federate(config, [*sets, *SETS[mode]], runs_dir, rounds)
            digest = read_json(run_dir / "status.json")["model_sha256"]
        bare_seconds, bare_digest, _ = _in_new_process("bare", model_dir, rounds)
        after_s = statistics.median(bare_seconds[1:])
        if digest == bare_digest:
            break
        print(f"{mode} ended in another model than bare: {digest}, {bare_digest}", flush=True)
        before_s = after_s
        if mode != "ray":  # there other threads may draw between seed and sample
            sys.exit(1)
    else:
        sys.exit(1)
    run = Run(
        statistics.median(seconds),
        measured.wall_s,
        measured.cpu_s,
        measured.peak_mb,
        (before_s + after_s) / 2,
    )
    return run, after_s


def _in_new_process(module: str, run_dir: Path, rounds: int) -> tuple[list[float], str, Measured]:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import json, pathlib, {module}\n"
        f"print(json.dumps({module}.run(pathlib.Path({str(run_dir)!r}), {rounds})))"
    )
    measured = measure([sys.executable, "-c", code])
    seconds, digest = json.loads(measured.output.splitlines()[-1])
    return seconds, digest, measured


def _report(runs: dict[str, list[Run]], cohort: int) -> None:
    print(
        f"\n{os.cpu_count()} cores; median (min to max)\n"
        f"{'':<6}  {'steady round / bare':<26}{'ms a fit':<26}{'whole run, s':<26}"
        f"{'its CPU, s':<26}{'its memory, MB'}"
    )
    columns: list[tuple[int, Callable[[Run], float]]] = [
        (2, lambda run: run.round_s / run.bare_round_s),
        (1, lambda run: 1e3 * run.round_s / cohort),
        (1, lambda run: run.wall_s),
        (1, lambda run: run.cpu_s),
        (0, lambda run: run.peak_mb),
    ]
    for mode, found in runs.items():
        cells = [_spread([value(run) for run in found], digits) for digits, value in columns]
        print(f"{mode:<6}  " + "".join(f"{cell:<26}" for cell in cells).rstrip())
    for peer in ("ray", "spawn"):
        for mode in runs if peer in runs else ():
            if mode == peer or mode == "spawn":
                continue
            pairs = list(zip(runs[mode], runs[peer], strict=True))
            rounds = _spread([ours.round_s / theirs.round_s for ours, theirs in pairs], 3)
            text = f"{mode} / {peer}: steady round {rounds}"
            if peer == "ray":
                text += f", whole run {_spread([a.wall_s / b.wall_s for a, b in pairs], 2)}"
            print(text)


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
