"""What checkpoints add to a round, and what going on costs: python benchmarks/checkpoints.py.

Digits with a 45 MB model (mlp2 of 3,300 units), 4 clients a round, a checkpoint after every round
and none, in turn. Then a run of 50 small rounds that goes on to 51, against a fresh run of one.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import submitting

from fedhpc.files import read_lines

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
LARGE = ["model={name: mlp2, params: {hidden: 3300}}", "training.epochs=1"]
SMALL = ["model={name: logistic}", "training.epochs=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for strategy in ("FedAvg", "FedAdam"):
        differences = []
        for repeat in range(options.repeats):
            seconds = {}
            for every in (0, 1):
                sets = [*LARGE, f"strategy.name={strategy}", f"checkpoint.every={every}"]
                run_dir, _ = submit([*sets, f"federation.num_rounds={options.rounds}"])
                lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["round"]]
                seconds[every] = statistics.median(line["round_s"] for line in lines[1:])
            differences.append(seconds[1] - seconds[0])
            print(
                f"{repeat + 1}: {strategy:<8} {seconds[0]:6.3f} s a round without checkpoints,"
                f" {seconds[1]:6.3f} s with",
                flush=True,
            )
        print(
            f"{strategy}: a checkpoint of a 45 MB model adds {statistics.median(differences):.3f} s"
            f" to a round ({min(differences):.3f} to {max(differences):.3f})"
        )
    run_dir, _ = submit([*SMALL, "federation.num_rounds=50"])
    _, resumed_s = submit(["federation.num_rounds=51"], run_dir)
    _, fresh_s = submit([*SMALL, "federation.num_rounds=1"])
    print(
        f"\n{os.cpu_count()} cores; one round of a fresh run {fresh_s:.1f} s, one round of a run"
        f" that goes on after 50 {resumed_s:.1f} s, with their starts"
    )


def submit(sets: list[str], run_dir: Path | None = None) -> tuple[Path, float]:
    """Run a federation, or go on with one; return its folder and how long that took."""
    start_s = time.monotonic()
    if run_dir is None:
        sizes = ["federation.num_clients=8", "federation.clients_per_round=4"]
        sets = [*sets, *sizes, "federation.evaluate_every=0"]
        run_dir = submitting.federate(CONFIG, sets, Path(FOLDER))
    else:
        more = [part for value in sets for part in ("--set", value)]
        resume = ["--resume", str(run_dir), "--follow"]
        submitting.run([sys.executable, "-m", "fedhpc.submit", *resume, *more])
    return run_dir, time.monotonic() - start_s


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as FOLDER:
        main()
