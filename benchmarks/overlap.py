"""What evaluating beside training saves: python benchmarks/overlap.py [--data ZIP].

The blitz CNN on CIFAR-10 in 100 partitions, 10 clients a round, the global model evaluated on the
10,000 test images after each. Prints the time of a round with federation.overlap_evaluation as a
ratio to that without, the two in turn: with one slot, where a core is left for the server as on a
node of its own, and with two, where it takes its time from the fits. With --asleep it is an app
whose fits sleep 0.5 s and whose evaluation sleeps 1 s: whatever else the machine does, that much
can be won where server and array tasks have nodes of their own.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import submitting

from fedhpc.files import read_json, read_lines

CONFIG = Path(__file__).parents[1] / "configs" / "cifar.yaml"
ASLEEP = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    time.sleep(0.5)
    arrays = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + 1)})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

@server.main()
def main(grid, context):
    def evaluate(server_round, arrays):
        time.sleep(1.0)

    start = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    rounds = context.run_config["rounds"]
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(grid, start, num_rounds=rounds, evaluate_fn=evaluate)
"""
PYPROJECT = """
[project]
name = "asleep"
version = "1.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "asleep:server"
clientapp = "asleep:client"
[tool.flwr.app.config]
rounds = 3
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="zip or folder of CIFAR-10 images; default: torchvision's")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--asleep", action="store_true")
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
    sets = {"federation.overlap_evaluation": overlap, "isolation.slots": slots}
    if not options.asleep:
        sets |= {"federation.num_rounds": options.rounds, "federation.evaluate_every": 1}
    if options.data:
        sets |= {"data.name": "image_folder", "data.source": Path(options.data).resolve()}
    with tempfile.TemporaryDirectory() as folder:
        config = write_app(Path(folder), options.rounds) if options.asleep else CONFIG
        values = [f"{key}={value}" for key, value in sets.items()]
        run_dir = submitting.federate(config, values, Path(folder) / "runs")
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


def write_app(folder: Path, rounds: int) -> Path:
    """Write the app that sleeps; return a config that names it."""
    package = folder / "app" / "asleep"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text(ASLEEP)
    config = folder / "asleep.yaml"
    config.write_text(
        f"name: asleep\napp: {{dir: {package.parent}, run_config: {{rounds: {rounds}}}}}\n"
        "federation: {num_clients: 10, clients_per_round: 10}\n"
    )
    return config


if __name__ == "__main__":
    main()
