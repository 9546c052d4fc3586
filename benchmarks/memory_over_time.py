"""Memory over time with and without isolation: python benchmarks/memory_over_time.py [--data ZIP].

The same federation twice: as fedhpc runs it, a fresh process for every fit; and with a process for
each client that is kept, which is what plain Flower clients are. Prints what was in use, and draws
both beside each other with `fedhpc.report`. Without a GPU it is the resident memory of the clients'
processes (proportional set size, so that pages they share count once); with GPUs, the device's.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import submitting

from fedhpc.report.tables import slope

CONFIG = Path(__file__).parents[1] / "configs" / "cifar.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="zip or folder of CIFAR-10 images; default: torchvision's")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--figure", help="where to put the figure, a .png")
    options = parser.parse_args()
    sets = [
        f"federation.num_clients={options.clients}",
        f"federation.num_rounds={options.rounds}",
        # Between rounds, so that there are moments in which no fit runs.
        "federation.evaluate_every=1",
        "federation.overlap_evaluation=false",
        f"training.epochs={options.epochs}",
        # Under a limit memory is looked at as often as a figure needs with many processes.
        "isolation.host_memory_gb=8",
    ]
    if options.data:
        sets += ["data.name=image_folder", f"data.source={Path(options.data).resolve()}"]
    kept = [
        "isolation.fits_per_process=0",
        f"isolation.slots={options.clients}",
        f"isolation.slots_per_gpu={options.clients}",
    ]
    fresh = ["name=a_process_per_fit", "isolation.slots=2"]
    kept.append("name=a_process_per_client_kept")
    with tempfile.TemporaryDirectory() as folder:
        fresh_run, kept_run = (
            submitting.federate(CONFIG, [*mode, *sets], Path(folder)) for mode in (fresh, kept)
        )
        for run_dir in (fresh_run, kept_run):
            found = json.loads(report(str(run_dir), "--json"))
            for line in found["memory"]:
                print(
                    f"{found['name']}, {line['name']} ({line['card']}): {line['fits']} fits,"
                    f" peak {line['peak_mb']:.0f} MB; with nothing running"
                    f" {line['idle_after_first_mb']:.0f} MB after the first fits,"
                    f" {line['idle_after_last_mb']:.0f} MB after the last,"
                    f" MB per 100 fits: {slope(line)}"
                )
        if options.figure:
            report(str(fresh_run), "--beside", str(kept_run))
            shutil.copy(fresh_run / "figures" / "beside.png", options.figure)


def report(*arguments: str) -> str:
    """Call fedhpc.report and return what it prints."""
    return submitting.run([sys.executable, "-m", "fedhpc.report", *arguments])


if __name__ == "__main__":
    main()
