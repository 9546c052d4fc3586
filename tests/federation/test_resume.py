"""Runs that end early and go on: the model is the one of a run that nothing happened to."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import REPOSITORY, Run, Submitter
from test_apps import write_app

# A strategy with a state, a learning rate that it changes itself, clients with states, and two
# calls of start() in one app. It fails once, at the round of the call that the file "fail" names.
SERVER = """
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Array, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvgM

app = ServerApp()
FAIL = Path(__file__).with_name("fail")

class Mine(FedAdam):
    rounds = 0

    def configure_train(self, server_round, arrays, config, grid):
        config["step"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        fail_if("1", server_round)
        self.rounds += 1
        assert self.rounds == server_round
        return super().aggregate_train(server_round, replies)

class Second(FedAvgM):
    def aggregate_train(self, server_round, replies):
        fail_if("2", server_round)
        return super().aggregate_train(server_round, replies)

def fail_if(call, server_round):
    if FAIL.exists() and FAIL.read_text() == f"{call}:{server_round}":
        FAIL.unlink()
        raise RuntimeError("no luck")

@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    config = ConfigRecord({"step": 1.0})
    first = Mine().start(grid, arrays, num_rounds=4, train_config=config)
    assert config["step"] == 1 / 16, config
    assert sorted(first.train_metrics_clientapp) == [1, 2, 3, 4]
    again = ConfigRecord({"step": 1.0})
    Second(server_momentum=0.9).start(grid, first.arrays, num_rounds=3, train_config=again)
"""
ON_DISK = "cluster:\n  state_mb: 0.0001\n"  # the states of clients
OWN_LOOP = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MessageType, RecordDict
from flwr.app import Message
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"step": 1.0})})
    nodes = list(grid.get_node_ids())
    messages = [Message(content, node, MessageType.TRAIN) for node in nodes]
    assert len(list(grid.send_and_receive(messages))) == len(nodes)
"""


def resume(run: Run, *options: str) -> Run:
    """Go on with a run, as a user would."""
    command = [sys.executable, "-m", "fedhpc.submit", "--resume", str(run.paths.root), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, cwd=REPOSITORY
    )
    return Run(run.paths, done.returncode, done.stdout + done.stderr)


def test_a_run_that_failed_goes_on_with_all_that_app_strategy_and_clients_had_gathered(
    tmp_path: Path, submitter: Submitter
) -> None:
    config = write_app(tmp_path, SERVER, ON_DISK)
    undisturbed = submitter.run(config=config, executor="debug")
    for fail, first in (("1:3", 3), ("2:2", 5)):
        (tmp_path / "app" / "counting" / "fail").write_text(fail)
        failed = submitter.run(config=config, executor="debug")
        assert failed.returncode == 1
        assert "no luck" in failed.status["reason"]
        resumed = resume(failed)
        assert f"going on after round {first - 1}\n" in resumed.output
        assert resumed.checksum == undisturbed.checksum
        assert resumed.status["attempt"] == 2
        assert [line["round"] for line in resumed.metrics] == [1, 2, 3, 4, 1, 2, 3]
        fits = Counter((line["round"], line["client"], line["verb"]) for line in resumed.fits)
        assert fits == Counter(
            (line["round"], line["client"], line["verb"]) for line in undisturbed.fits
        )


def test_a_finished_run_has_more_rounds_and_ends_as_one_that_had_them_from_the_start(
    submitter: Submitter,
) -> None:
    sets = ["strategy.name=FedYogi", "checkpoint.every=2"]
    undisturbed = submitter.run([*sets, "federation.num_rounds=5"], executor="debug")
    short = submitter.run([*sets, "federation.num_rounds=3"], executor="debug")
    assert short.returncode == 0
    again = resume(short)
    assert again.returncode == 2
    assert "it has finished" in again.output
    refused = resume(short, "--set", "training.epochs=2", "--set", "federation.num_rounds=2")
    assert refused.returncode == 2
    assert "training.epochs: a run goes on with the same value, expected 1, found 2" in (
        refused.output
    )
    assert "federation.num_rounds: expected 3 or more" in refused.output
    # The newest checkpoint is damaged by now: the one before it is used.
    model = short.paths.checkpoint(3) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    resumed = resume(short, "--set", "federation.num_rounds=5")
    assert resumed.checksum == undisturbed.checksum
    assert [line["round"] for line in resumed.metrics] == [0, 1, 2, 3, 4, 5]
    assert "is damaged" in resumed.output
    # Nor does a run without any begin at round 1 in silence.
    for folder in short.paths.checkpoints.glob("round-*"):
        (folder / "state.json").write_text("{}")
    lost = resume(short, "--set", "federation.num_rounds=6")
    assert lost.returncode == 1
    assert lost.status["state"] == "failed"
    assert "found only damaged ones" in lost.status["reason"]


def test_a_run_whose_app_has_its_own_loop_says_that_it_would_begin_anew(
    tmp_path: Path, submitter: Submitter
) -> None:
    run = submitter.run(config=write_app(tmp_path, OWN_LOOP, ON_DISK), executor="debug")
    assert run.returncode == 0
    assert run.status["begins_anew"] == "the app has its own loop of rounds"


@pytest.mark.parametrize("config", [[], ["configs/digits.yaml", "--resume", "x"]])
def test_a_config_or_a_run_folder_is_needed_and_not_both(config: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedhpc.submit", *config],
        capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected a YAML file or --resume RUN_DIR, found" in done.stderr
