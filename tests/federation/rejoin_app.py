"""A Flower app for `test_rejoin`: its fits write down that they ran, and last as long as asked."""

from pathlib import Path

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "slow"
version = "1.0.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "slow.server_app:app"
clientapp = "slow.client_app:app"

[tool.flwr.app.config]
seconds = 1.0
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    config = ConfigRecord({"seconds": context.run_config["seconds"], "step": 1.0})
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=arrays, train_config=config, num_rounds=3)
"""
CLIENT = """
import time
from pathlib import Path
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
fits = Path(__file__).with_name("fits")

@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    name = f"{config['server-round']} {context.node_config['partition-id']}\\n"
    with fits.open("a") as file:
        file.write("+ " + name)
        file.flush()
        time.sleep(config["seconds"])
        file.write("- " + name)
    weights = message.content["arrays"]["w"].numpy() + config["step"]
    return Message(
        RecordDict({
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": 1, "step": config["step"]}),
        }),
        reply_to=message,
    )
"""


class SlowApp:
    """The app in a folder, and a config that names it."""

    def __init__(self, folder: Path) -> None:
        package = folder / "app" / "slow"
        package.mkdir(parents=True)
        (package.parent / "pyproject.toml").write_text(PYPROJECT)
        (package / "__init__.py").write_text("")
        (package / "server_app.py").write_text(SERVER)
        (package / "client_app.py").write_text(CLIENT)
        self.config = folder / "app.yaml"
        self.config.write_text(f"name: slow\napp:\n  dir: {package.parent}\n")
        self._fits = package / "fits"

    def began(self) -> list[str]:
        """Return round and client of every fit that ran, in order."""
        return self._marked("+")

    def ended(self) -> list[str]:
        """Return round and client of every fit that came to its end."""
        return self._marked("-")

    def _marked(self, mark: str) -> list[str]:
        lines = self._fits.read_text().splitlines() if self._fits.exists() else []
        return [line[2:] for line in lines if line.startswith(mark)]
