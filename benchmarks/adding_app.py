"""A Flower app whose clients only add to the arrays, for benchmarks of everything but training.

Run config: ``model-mb`` (size of the model, half of it in one array), ``num-rounds``, ``report``
(file for the server's memory, or "").
"""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

_SMALL_ARRAYS = 20


@client.train()
def train(message: Message, context: Context) -> Message:
    """Add a number of this client's to every value."""
    step = np.float32(1 + int(context.node_config["partition-id"]))
    arrays = ArrayRecord(
        {name: Array(array.numpy() + step) for name, array in message.content["arrays"].items()}
    )
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average all clients' models, and write how much memory that took."""
    config = context.run_config
    before_mb = memory_mb("VmRSS")
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(grid, model(float(config["model-mb"])), num_rounds=int(config["num-rounds"]))
    if config["report"]:
        report = {"before_mb": before_mb, "peak_mb": memory_mb("VmHWM")}
        Path(str(config["report"])).write_text(json.dumps(report))


def model(mb: float) -> ArrayRecord:
    """Return a model of zeros."""
    values = int(mb * 1e6 / 4)
    sizes = [values // 2] + [values // 2 // _SMALL_ARRAYS] * _SMALL_ARRAYS
    return ArrayRecord(
        {str(i): Array(np.zeros(size, dtype=np.float32)) for i, size in enumerate(sizes)}
    )


def memory_mb(what: str) -> float:
    """Return a line of this process's /proc/self/status: VmRSS (now), VmHWM (at most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))
