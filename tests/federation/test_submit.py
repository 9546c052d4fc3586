"""What a person sees and what is left behind."""

import os
import re
import signal
import stat
from pathlib import Path

import pytest
from support import Submitter, eventually, processes_of

from fedhpc import run_state
from fedhpc.files import read_json, read_lines


def test_a_followed_run_prints_its_rounds_and_ends_with_the_result(submitter: Submitter) -> None:
    run = submitter.run(["federation.num_rounds=3", "federation.evaluate_every=2"])
    assert run.returncode == 0, run.output
    assert re.search(r"round 2: loss \d\.\d+  accuracy 0\.\d+", run.output)
    assert re.search(r"run +finished", run.output)
    assert str(run.paths.root) in run.output
    assert run.paths.model.exists()
    # Evaluated before the first round, after every second, and after the last.
    assert [line["round"] for line in run.metrics if "evaluate" in line] == [0, 2, 3]
    assert {"precision", "recall", "f1", "f1_per_class", "confusion_matrix"} <= set(
        run.metrics[-1]["evaluate"]
    )
    assert all(fit["ok"] and fit["late_imports"] == [] for fit in run.fits)


def test_a_run_that_evaluates_its_last_model_only_says_so_once(submitter: Submitter) -> None:
    run = submitter.run(["federation.num_rounds=2", "federation.evaluate_every=0"])
    assert run.returncode == 0, run.output
    assert [(line["round"], "evaluate" in line) for line in run.metrics] == [(1, False), (2, True)]
    assert re.search(r"round 1: train_loss \d\.\d+  \(", run.output)
    assert re.search(r"accuracy +0\.\d+", run.output)


def test_secrets_are_the_owners_alone_and_a_run_leaves_neither_them_nor_a_process_nor_a_blob(
    submitter: Submitter,
) -> None:
    process = submitter.start(["training.epochs=30", "cluster.inline_mb=0"])
    eventually(lambda: list(submitter.runs_dir.glob("*/rendezvous.json")), 60)
    paths = submitter.newest()
    assert stat.S_IMODE(paths.secrets.stat().st_mode) == 0o700
    files = list(paths.secrets.iterdir())
    assert len(files) == 5
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert process.wait(timeout=90) == 0
    assert processes_of(paths) == []
    assert not paths.secrets.exists()
    assert not list(paths.blobs.iterdir())
    assert not list(paths.root.glob(".*.tmp"))


def test_a_detached_run_goes_on_after_submit_has_left(submitter: Submitter) -> None:
    process = submitter.start(follow=False)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    paths = submitter.newest()
    eventually(lambda: run_state.read(paths)["state"] == "finished", 60)


def test_a_ctrl_c_cancels_a_local_run_and_says_so(submitter: Submitter) -> None:
    process = submitter.start(["federation.num_rounds=1000"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "cancelled; every process is gone" in output
    assert processes_of(paths) == []
    status = run_state.read(paths)
    assert (status["state"], status["reason"]) == ("cancelled", "by Ctrl-C")
    assert not paths.secrets.exists()


def test_a_ctrl_c_before_the_server_is_up_leaves_nothing(submitter: Submitter) -> None:
    process = submitter.start(["federation.num_rounds=1000"])
    eventually(lambda: list(submitter.runs_dir.glob("*/jobs/submission.json")), 60)
    paths = submitter.newest()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    eventually(lambda: processes_of(paths) == [], 10)
    assert run_state.read(paths)["state"] == "cancelled"


def test_a_killed_server_is_reported_and_its_array_tasks_leave(submitter: Submitter) -> None:
    process = submitter.start(["federation.num_rounds=1000", "cluster.rendezvous_timeout_s=15"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("server"))["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "the server process ended without a word" in output
    assert run_state.read(paths)["state"] == "failed"


def test_a_server_without_array_tasks_fails_at_its_deadline(submitter: Submitter) -> None:
    process = submitter.start(["cluster.array_task_timeout_s=3", "cluster.min_array_tasks=1"])
    eventually(lambda: list(submitter.runs_dir.glob("*/jobs/client-0.json")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("client-0"))["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "no work could start" in output
    assert read_json(paths.status)["state"] == "failed"


@pytest.mark.parametrize(
    ("number", "state", "code", "reason"),
    [
        (signal.SIGTERM, "cancelled", 128 + signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGUSR2, "failed", 75, "time limit"),
    ],
)
def test_a_server_that_is_told_to_stop_leaves_within_5_s(
    number: signal.Signals, state: str, code: int, reason: str, submitter: Submitter
) -> None:
    process = submitter.start(["federation.num_rounds=1000"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("server"))["pid"], number)
    eventually(lambda: run_state.read(paths)["state"] == state, 5)
    assert process.wait(timeout=30) == code
    assert reason in run_state.read(paths)["reason"]


def test_clients_evaluate_on_examples_that_they_do_not_train_on(submitter: Submitter) -> None:
    run = submitter.run(["federation.clients_per_evaluation=3", "federation.evaluate_every=100"])
    assert run.returncode == 0, run.output
    assert all(0 <= line["evaluate_clients"]["accuracy"] <= 1 for line in run.metrics[1:])
    verbs = [fit["verb"] for fit in read_lines(run.paths.fits)]
    assert verbs.count("evaluate") == 6
    assert verbs.count("train") == 8


def test_the_array_task_stays_small_however_many_clients_there_are(submitter: Submitter) -> None:
    peaks = {}
    for clients in (10, 1000):
        sets = [f"federation.num_clients={clients}", "federation.num_rounds=10"]
        process = submitter.start(
            [*sets, f"name=clients-{clients}", "data.partitioner={name: iid}"]
        )
        eventually(lambda c=clients: list(submitter.runs_dir.glob(f"clients-{c}-*/fits.jsonl")), 60)
        paths = submitter.newest()
        pid = read_json(paths.process("client-0"))["pid"]
        while process.poll() is None and (peak := _peak_mb(pid)):
            peaks[clients] = peak
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert max(peaks.values()) < 350
    assert peaks[1000] - peaks[10] < 10


def _peak_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0


def test_a_run_whose_last_array_task_died_is_ended_and_reported(submitter: Submitter) -> None:
    process = submitter.start(["federation.num_rounds=1000"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("client-0"))["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "every array task ended without a word" in output
    assert run_state.read(paths)["state"] == "failed"
    assert not paths.secrets.exists()


def test_a_terminated_submit_cancels_its_local_run(submitter: Submitter) -> None:
    process = submitter.start(["federation.num_rounds=1000"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert processes_of(paths) == []


def test_a_killed_fork_server_costs_no_client(submitter: Submitter) -> None:
    process = submitter.start(["training.epochs=40", "federation.num_rounds=3"])
    eventually(lambda: list(submitter.runs_dir.glob("*/fits.jsonl")), 60)
    paths = submitter.newest()
    client = read_json(paths.process("client-0"))["pid"]
    (fork_server,) = Path(f"/proc/{client}/task/{client}/children").read_text().split()
    os.kill(int(fork_server), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert all(fit["ok"] for fit in read_lines(paths.fits))
