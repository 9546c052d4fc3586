"""What the server needs in memory for a cohort, in models: python benchmarks/server_memory.py.

FedAvg over clients that only add to the arrays (adding_app.py), all of them in each of two rounds,
one array task with two slots, everything else as in any run. Prints the highest resident memory of
the server's process above what it was before it made the model.
The replies of a cohort lie in files of the run folder until they are aggregated: 1,000 clients with
a model of 45 MB need 45 GB there.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import adding_app
import numpy as np
import submitting
from flwr.app import ArrayRecord

from fedhpc import files
from fedhpc.federation import compat
from fedhpc.federation.payload import decode_arrays, encode_arrays, map_arrays

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-mb", type=float, default=45)
    parser.add_argument("--clients", type=int, nargs="*", default=[50, 100, 200])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where the run folders go; default: the temporary folder")
    parser.add_argument("--set", action="append", default=[], help="as for submit")
    options = parser.parse_args()
    print_copies(options.model_mb)
    for clients in options.clients:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            free_gb, needed_gb = (
                shutil.disk_usage(folder).free / 1e9,
                clients * options.model_mb / 1e3,
            )
            if free_gb < 1.1 * needed_gb:
                sys.exit(
                    f"{clients} replies need {needed_gb:.0f} GB of disk, {free_gb:.0f} are free"
                )
            start_s = time.monotonic()
            report = run(Path(folder), clients, options)
            wall_s = time.monotonic() - start_s
        above_mb = report["peak_mb"] - report["before_mb"]
        print(
            f"{clients:>6} clients, model of {options.model_mb:g} MB: the server used"
            f" {above_mb:.0f} MB above {report['before_mb']:.0f} MB,"
            f" {above_mb / options.model_mb:.2f} models; {wall_s:.0f} s",
            flush=True,
        )


def print_copies(model_mb: float) -> None:
    """Print what it costs to read a reply that lies in a file, in copies of its size."""
    arrays = adding_app.model(model_mb)
    skeleton, blob = compat.without_data(arrays), encode_arrays(arrays)
    plain = np.ones(int(model_mb * 1e6 / 4), dtype=np.float32)

    def read(decode: Callable[[ArrayRecord, memoryview], ArrayRecord]) -> None:
        for array in decode(skeleton, files.map_whole(path)).values():
            array.numpy()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply"
        files.write_atomic(path, blob.parts)
        copy_s = best_cpu_s(plain.copy)
        here = best_cpu_s(lambda: read(map_arrays)) / copy_s
        loaded = best_cpu_s(lambda: read(decode_arrays)) / copy_s
    print(
        f"to read a reply of {model_mb:g} MB as numpy costs as much CPU time as {here:.1f} copies"
        f" of it; through Flower's bytes: {loaded:.1f}"
    )


def best_cpu_s(action: Callable[[], object]) -> float:
    """Return the least CPU time of several calls, in seconds."""
    seconds = []
    for _ in range(9):
        start_s = time.process_time()
        action()
        seconds.append(time.process_time() - start_s)
    return min(seconds)


def run(folder: Path, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """Run a federation; return what the server's memory was."""
    config, report = folder / "config.yaml", folder / "report.json"
    config.write_text(
        json.dumps(
            {
                "app": {
                    "server": "adding_app:server",
                    "client": "adding_app:client",
                    "run_config": {
                        "model-mb": options.model_mb,
                        "num-rounds": options.rounds,
                        "report": str(report),
                    },
                },
                "federation": {"num_clients": clients},
                "isolation": {"slots": 2, "preload": ["adding_app"]},
            }
        )
    )
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = submitting.command(config, options.set, folder)
    submitting.run(command, env={"PYTHONPATH": path})
    found: dict[str, float] = json.loads(report.read_text())
    return found


if __name__ == "__main__":
    main()
