"""What evaluating beside training saves: python benchmarks/overlap.py [--data ZIP].

The blitz CNN on CIFAR-10 in 100 partitions, 10 clients a round, the global model evaluated on the
10,000 test images after each. Prints the time of a round with federation.overlap_evaluation as a
ratio to that without, the two in turn: with one slot, where a core is left for the server as on a
node of its own, and with two, where it takes its time from the fits.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fedhpc.files import read_json, read_lines

CONFIG = Path(__file__).parents[1] / "configs" / "cifar.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="zip or folder of CIFAR-10 images; default: torchvision's")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 2])
    options = parser.parse_args()
    for slots in options.slots:
        ratios = []
        for _ in range(options.repeats):
            (apart_s, apart), (together_s, together) = (
                federate(options, slots, overlap) for overlap in ("false", "true")
            )
            if apart != together:
                sys.exit(f"the models differ: {apart}, {together}")
            ratios.append(together_s / apart_s)
        print(
            f"{slots} slots: ratio {statistics.median(ratios):.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def federate(options: argparse.Namespace, slots: int, overlap: str) -> tuple[float, str]:
    """Run a federation; return the median seconds of its steady rounds, and its model."""
    sets = {
        "federation.num_rounds": options.rounds,
        "federation.evaluate_every": 1,
        "federation.overlap_evaluation": overlap,
        "isolation.slots": slots,
    }
    if options.data:
        sets |= {"data.name": "image_folder", "data.source": Path(options.data).resolve()}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedhpc.submit", str(CONFIG), "--executor", "local"]
        command += ["--follow", "--set", f"cluster.runs_dir={folder}"]
        command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        (run_dir,) = Path(folder).iterdir()
        # In the first the children start, and the last one always evaluates its own model too.
        lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["round"] > 1][:-1]
        seconds = statistics.median(line["round_s"] for line in lines)
        evaluate_s = statistics.median(line["seconds"]["evaluate"] for line in lines)
        clients_s = statistics.median(line["seconds"]["clients"] for line in lines)
        print(
            f"  {slots} slots, overlap {overlap}: {seconds:.2f} s a round, of which the server"
            f" evaluates {evaluate_s:.2f} s and waits {clients_s:.2f} s",
            flush=True,
        )
        return seconds, str(read_json(run_dir / "status.json")["model_sha256"])


if __name__ == "__main__":
    main()
