"""What a round costs over the bare training: python benchmarks/round_overhead.py [--data ZIP].

The work of docs/performance.md: the blitz CNN on CIFAR-10 in 100 partitions, 10 clients a round,
one epoch, batch 32, two fits at a time. Prints each mode's steady time per round as a ratio to two
bare persistent processes that end in the same model, all from one call, the modes in turn.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bare

from fedhpc.files import read_json, read_lines

CONFIG = Path(__file__).parents[1] / "configs" / "cifar.yaml"
MODES = {
    "fits_per_process=1": ["isolation.fits_per_process=1"],
    "... with standby": ["isolation.fits_per_process=1", "isolation.standby=true"],
    "fits_per_process=auto": ["isolation.fits_per_process=auto"],
    "fits_per_process=0": ["isolation.fits_per_process=0"],
    "spawn": ["isolation.start_method=spawn"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="zip or folder of CIFAR-10 images; default: torchvision's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--spawn-rounds", type=int, default=4, help="spawn is slow: fewer rounds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    options = parser.parse_args()
    data = (
        ["data.name=image_folder", f"data.source={Path(options.data).resolve()}"]
        if options.data
        else []
    )
    ratios: dict[str, list[float]] = {mode: [] for mode in options.modes}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for mode in options.modes:
                rounds = options.spawn_rounds if mode == "spawn" else options.rounds
                run_dir, cpu_s = federate(folder, rounds, [*data, *MODES[mode]])
                lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["round"]]
                seconds = steady([line["round_s"] for line in lines[:-1]])
                bare_s, bare_cpu_s = run_bare(run_dir, rounds)  # each time: the machine drifts
                ratio = seconds / bare_s
                ratios[mode].append(ratio)
                print(
                    f"{repeat + 1}: {mode:<22} {seconds:6.3f} s a round, bare"
                    f" {bare_s:6.3f} s, ratio {ratio:6.2f};"
                    f" CPU of the whole run {cpu_s:5.1f} s, bare {bare_cpu_s:5.1f} s",
                    flush=True,
                )
    print(f"\n{os.cpu_count()} cores; ratio to bare, median (min to max):")
    for mode, found in ratios.items():
        print(
            f"  {mode:<22} {statistics.median(found):6.2f} ({min(found):.2f} to {max(found):.2f})"
        )


def federate(folder: str, rounds: int, sets: list[str]) -> tuple[Path, float]:
    """Run a federation; return its folder and the CPU seconds of all its processes."""
    sets = [
        *sets,
        f"federation.num_rounds={rounds}",
        "federation.evaluate_every=1000000",
        "isolation.slots=2",
        f"cluster.runs_dir={folder}",
    ]
    before = children_cpu_s()
    command = [sys.executable, "-m", "fedhpc.submit", str(CONFIG), "--executor", "local"]
    command += ["--follow", *(part for value in sets for part in ("--set", value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    runs = sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime)
    return runs[-1], children_cpu_s() - before


def run_bare(run_dir: Path, rounds: int) -> tuple[float, float]:
    """Run the same work bare; stop if it ends in another model."""
    before = children_cpu_s()
    seconds, digest = bare.run(run_dir, rounds, workers=2)
    expected = read_json(run_dir / "status.json")["model_sha256"]
    if digest != expected:
        sys.exit(f"the bare baseline ended in another model: {digest}, expected {expected}")
    return steady(seconds), children_cpu_s() - before


def steady(seconds: list[float]) -> float:
    """Return the median without the first round."""
    return statistics.median(seconds[1:])


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
