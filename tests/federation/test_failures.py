"""Clients that fail in every way there is, and cohorts that close before everybody is done."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import REPOSITORY, Run, Submitter

from fedhpc.files import read_json

SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    arrays = ArrayRecord({
        "w": Array(np.zeros(3, dtype=np.float32)),
        "mask": Array(np.array([0.0, -np.inf])),
    })
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=arrays, num_rounds=3
    )
    # Every client whose update counts adds 1.
    assert np.allclose(result.arrays["w"].numpy(), 3.0)
"""
CLIENT = """
import os, signal, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
HOW = {
    6: "always", 7: "crash", 8: "memory", 9: "hang", 10: "NaN", 11: "shape", 12: "name",
    13: "dtype", 14: "metrics", 15: "once",
}

@app.train()
def train(message, context):
    client = context.node_config["partition-id"]
    how = HOW.get(client)
    if how != "always" and message.content["config"]["server-round"] > 1:
        how = None
    w = message.content["arrays"]["w"].numpy() + np.float32(1)
    name, weight = "w", "num-examples"
    if how == "always":
        raise ValueError("no luck at all")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "memory":
        bytearray(3 << 30)
    if how == "hang":
        time.sleep(600)
    if how == "NaN":
        w[1:] = np.nan, np.inf
    if how == "shape":
        w = w[:2]
    if how == "name":
        name = "W"
    if how == "dtype":
        w = w.astype(np.float64)
    if how == "metrics":
        weight = "examples"
    if how == "once":
        tried = Path(os.environ["TRIED"])
        if not tried.exists():
            tried.touch()
            raise OSError("the disk was away")
    # Each client has seen as many rounds as it has succeeded in.
    seen = int(context.state["seen"]["rounds"]) if "seen" in context.state else 0
    context.state["seen"] = MetricRecord({"rounds": seen + 1})
    arrays = ArrayRecord({name: Array(w), "mask": message.content["arrays"]["mask"]})
    metrics = MetricRecord({weight: 1, "seen": seen, "loss": float("nan")})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""
REASONS = {
    6: "ValueError: no luck at all",
    7: "the child was killed by SIGSEGV",
    8: "MemoryError",
    9: "no reply within 4 s; the child and its descendants were killed",
    10: "2 of 5 values are NaN or Inf, first in 'w'",
    11: "'w' as float32 (2,) instead of float32 (3,)",
    12: "no 'w', 'W' that nobody wants",
    13: "'w' as float64 (3,) instead of float32 (3,)",
    14: "no 'num-examples', 'examples' that nobody wants",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules every process of a run can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    return folder


def test_every_kind_of_failure_is_told_and_tried_again_and_the_round_goes_on(
    submitter: Submitter, tmp_path: Path, modules: Path
) -> None:
    (modules / "failing_server.py").write_text(SERVER)
    (modules / "failing_client.py").write_text(CLIENT)
    config = tmp_path / "failing.yaml"
    config.write_text(
        textwrap.dedent("""\
        name: failing
        app: {server: "failing_server:app", client: "failing_client:app"}
        federation: {num_clients: 16}
        isolation: {slots: 4, fit_timeout_s: 4, host_memory_gb: 1}
    """)
    )
    run = submitter.run(
        ["federation.num_clients=16"], config=config, env={"TRIED": str(tmp_path / "tried")}
    )
    assert run.returncode == 0, run.output + run.logs()
    fits, failed = run.fits, [fit for fit in run.fits if not fit["ok"]]
    for client, reason in REASONS.items():
        first = [fit for fit in failed if fit["client"] == client and fit["round"] == 1]
        assert [fit["try"] for fit in first] == [1, 2], reason
        for fit in first:
            assert reason in fit["reason"]
            tries = fit["try"]
            assert reason in run.paths.error(f"r00001-c{client:06d}-train-0", tries).read_text()
    assert [(fit["ok"], fit.get("try")) for fit in fits if fit["client"] == 15][:2] == [
        (False, 1),
        (True, 2),
    ]
    assert [line["failures"] for line in run.metrics] == [9, 1, 1]
    assert len(failed) == 2 * 9 + 1 + 2 * 2 == run.status["fits_failed"]
    # A failed fit leaves no trace in its client's state: 7 of 15 have seen both rounds before.
    assert abs(run.metrics[2]["train"]["seen"] - (7 * 2 + 8) / 15) < 1e-6
    said = "client 6 has failed in 3 rounds in a row; at last: ValueError: no luck at all"
    assert run.status["failing"] == [said]
    assert run.logs().count("client 6 has failed in 3 rounds in a row") == 1
    status = subprocess.run(
        [sys.executable, "-m", "fedhpc.status", str(run.paths.root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert said in status.stdout


def test_a_round_closes_when_enough_have_succeeded_and_is_done_again_with_the_same_clients(
    submitter: Submitter, modules: Path
) -> None:
    (modules / "slowness.py").write_text(
        textwrap.dedent("""\
        import os, time
        def slow(message, context, call_next):
            if os.environ.get("SLOW") and context.node_config["partition-id"] > 3:
                time.sleep(600)
            return call_next(message, context)
    """)
    )
    sets = ["app.mods=[slowness:slow]", "federation.over_select=1.5", "isolation.slots=4"]
    run = submitter.run(sets, env={"SLOW": "1"})
    checksum = run.checksum
    assert [fit["client"] for fit in run.fits if fit["client"] > 3] == []
    for line in run.metrics[1:]:
        assert (line["cohort"], line["failures"], line["cancelled"]) == (6, 0, 2)
    assert run.status["fits_cancelled"] == 4
    entries = sorted(run.paths.accepted.iterdir())
    assert [len(read_json(entry)["accepted"]) for entry in entries] == [4, 4]
    # Another attempt does round 2 again. Nobody is slow now, and those who were come first: only
    # the journal says whose replies count.
    before, paths = run.metrics, run.paths
    paths.config.write_text(paths.config.read_text().replace("executor: local", "executor: debug"))
    paths.status.unlink()
    paths.best_checkpoint.unlink(missing_ok=True)
    shutil.rmtree(paths.checkpoint(2))
    command = [sys.executable, "-m", "fedhpc.server", str(paths.root)]
    server = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=90)
    again = Run(paths, server.returncode, server.stdout + server.stderr)
    assert again.status["attempt"] == 2
    assert "going on after round 1" in again.output
    assert again.checksum == checksum
    assert [fit["client"] for fit in again.fits if fit["client"] > 3] == []
    kept = ("round", "cohort", "failures", "cancelled")
    assert [[line.get(key) for key in kept] for line in again.metrics] == [
        [line.get(key) for key in kept] for line in before
    ]
