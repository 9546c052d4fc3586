"""Flower apps that know nothing of fedhpc."""

from pathlib import Path

import pytest
from support import Submitter

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "counting"
version = "1.0.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "counting.server_app:app"
clientapp = "counting.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 2
fraction-train = 1.0
fail-client = -1
how = "raise"
nested.key = "value"
"""
SERVER = """
import numpy as np
from flwr.app import ArrayRecord, Array, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    assert context.run_config["nested.key"] == "value"
    strategy = FedAvg(fraction_train=context.run_config["fraction-train"])
    arrays = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"step": 1.0}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    assert abs(result.train_metrics_clientapp[1]["fits"] - 1) < 1e-6
    if context.run_config["num-server-rounds"] > 1:
        assert abs(result.train_metrics_clientapp[2]["fits"] - 2) < 1e-6
"""
CLIENT = """
import os, random, signal
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    client = context.node_config["partition-id"]
    assert context.node_id == client + 1
    assert 0 <= client < context.node_config["num-partitions"]
    if client == context.run_config["fail-client"]:
        if context.run_config["how"] == "raise":
            raise ValueError("this client has no luck")
        if context.run_config["how"] == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGSEGV)
    # The state travels with the client, arrays and all.
    state = context.state
    seen = int(state["count"]["fits"]) if "count" in state else 0
    if seen:
        assert state["mine"]["a"].numpy().tolist() == [client, seen]
    state["count"] = MetricRecord({"fits": seen + 1})
    state["mine"] = ArrayRecord({"a": Array(np.array([client, seen + 1]))})
    step = message.content["config"]["step"]
    weights = message.content["arrays"]["w"].numpy() + step * (client + random.random())
    return Message(
        RecordDict({
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": client + 1, "fits": seen + 1}),
        }),
        reply_to=message,
    )

@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    loss = float(message.content["arrays"]["w"].numpy().sum())
    metrics = MetricRecord({"num-examples": 1, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""


def write_app(folder: Path, server: str = SERVER, more: str = "") -> Path:
    """Write a Flower app; return a config that names it, with more sections if there are some."""
    package = folder / "app" / "counting"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(server)
    (package / "client_app.py").write_text(CLIENT)
    file = folder / "app.yaml"
    file.write_text(f"name: counting\napp:\n  dir: {package.parent}\n{more}")
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that names a Flower app in a folder."""
    return write_app(tmp_path)


@pytest.mark.parametrize(
    "sets",
    [
        ["cluster.array_tasks=2", "cluster.min_array_tasks=2"],
        ["cluster.inline_mb=0", "cluster.state_mb=0"],
    ],
    ids=["states follow their clients", "states and arrays on disk"],
)
def test_an_unmodified_app_runs(sets: list[str], config: Path, submitter: Submitter) -> None:
    plain = submitter.run(config=config)
    run = submitter.run(sets, config=config)
    assert run.checksum == plain.checksum
    assert [line["round"] for line in run.metrics] == [1, 2]
    assert run.metrics[-1]["evaluate_clients"]["loss"] > 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: this client has no luck"),
        ("exit", "the child exited with code 7"),
        ("crash", "the child was killed by SIGSEGV"),
    ],
)
def test_a_client_that_fails_is_a_line_and_a_file_and_not_the_end(
    how: str, reason: str, config: Path, submitter: Submitter
) -> None:
    sets = ["app.run_config.fail-client=2", f"app.run_config.how={how}"]
    sets += ["app.run_config.num-server-rounds=1", "failures.retry=0"]
    run = submitter.run(sets, config=config)
    assert run.returncode == 0, run.output + run.logs()
    failed = [fit for fit in run.fits if not fit["ok"]]
    assert [fit["client"] for fit in failed] == [2]
    assert reason in failed[0]["reason"]
    (file,) = run.paths.errors.iterdir()
    assert reason in file.read_text()
    if how == "raise":
        assert 'raise ValueError("this client has no luck")' in file.read_text()
    assert run.metrics[0]["failures"] == 1
    assert "failed fits" in run.output


def test_a_round_in_which_every_client_fails_ends_the_run(
    config: Path, submitter: Submitter, tmp_path: Path
) -> None:
    client = tmp_path / "app" / "counting" / "client_app.py"
    client.write_text(CLIENT.replace("client == context", "client != context"))
    run = submitter.run(config=config)
    assert run.returncode == 1
    assert "none of its 6 clients could train" in run.output
    assert "this client has no luck" in run.output
    assert run.status["state"] == "failed"
    assert not run.paths.model.exists()


def test_an_error_in_the_server_part_is_told_with_its_traceback(
    config: Path, submitter: Submitter, tmp_path: Path
) -> None:
    server = tmp_path / "app" / "counting" / "server_app.py"
    server.write_text(SERVER.replace("strategy = FedAvg(", "strategy = 1 / 0 * FedAvg("))
    run = submitter.run(config=config)
    assert run.returncode == 1
    assert "ZeroDivisionError" in run.output
    assert "1 / 0 * FedAvg(" in (run.paths.errors / "server.txt").read_text()


def test_the_run_config_of_the_file_goes_over_the_apps_own(
    config: Path, submitter: Submitter
) -> None:
    run = submitter.run(["app.run_config.num-server-rounds=3"], config=config)
    assert run.returncode == 0, run.output + run.logs()
    assert [line["round"] for line in run.metrics] == [1, 2, 3]
