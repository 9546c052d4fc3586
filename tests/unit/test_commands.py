"""The commands on run folders: made with the real functions, without a run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

import fedhpc.list
from fedhpc import cancel, clean, cluster, config, files, logs, report, run_state, status, words
from fedhpc.cluster import submission
from fedhpc.cluster.submission import Submission
from fedhpc.paths import RunPaths, create_run_folder, is_run_folder, run_folders

COMMANDS = ["submit", "status", "list", "logs", "report", "cancel", "clean", "data", "doctor"]
HEAVY = {"torch", "torchvision", "flwr", "grpc", "submitit", "matplotlib"}


def call(app: typer.Typer, *arguments: object, answer: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(value) for value in arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


class Site:
    """A place for run folders, and a PATH on which Slurm's commands are tiny scripts, or absent."""

    def __init__(self, folder: Path) -> None:
        self.runs_dir = folder / "runs"
        self.runs_dir.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"

    def run(
        self,
        state: run_state.State = "running",
        *,
        executor: str = "slurm",
        array_tasks: int = 2,
        **known: Any,
    ) -> RunPaths:
        """Make a run folder; its server job is <n>0 and its client array <n>1."""
        number = len(list(self.runs_dir.iterdir())) + 1
        paths = create_run_folder(self.runs_dir, "test")
        files.write_atomic(paths.config, "name: test\n")
        os.utime(paths.config, (1e9 + number, 1e9 + number))
        jobs = [f"{number}1_{index}" for index in range(array_tasks)]
        submission.write(paths, Submission(executor, f"{number}0", jobs))
        run_state.write(paths, state, **known)
        return paths

    def says(self, *lines: str) -> None:
        """Let squeue say this."""
        text = "\n".join(lines)
        self.command("squeue", f"cat <<'END'\n{text}\nEND")

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(
            f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "{name} $@" >> {self.calls}\n{script}\n'
        )
        path.chmod(0o755)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.setenv("PATH", str(site.bin))
    return site


# --- all of them ---


def fedhpc_(*arguments: str, flags: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_help_lists_every_command_and_imports_none() -> None:
    done = fedhpc_("fedhpc", "--help", flags=["-X", "importtime"])
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert "fedhpc.status" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    done = fedhpc_("fedhpc", name, "--help", flags=["-X", "importtime"])
    assert done.returncode == 0
    assert "Usage: python -m fedhpc" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("name", ["status", "list", "logs", "report", "cancel", "clean"])
def test_a_command_is_a_module_too(name: str) -> None:
    done = fedhpc_(f"fedhpc.{name}", "--help")
    assert done.returncode == 0
    assert f"Usage: python -m fedhpc.{name}" in done.stdout


def test_a_mistyped_command_is_told_what_was_meant() -> None:
    done = fedhpc_("fedhpc", "statsu")
    assert done.returncode == 2
    assert "status" in done.stderr


@pytest.mark.parametrize("app", [status.app, logs.app, report.app, cancel.app, clean.app])
def test_a_folder_that_is_no_run_folder_is_an_error_with_its_code(
    app: typer.Typer, tmp_path: Path
) -> None:
    result = call(app, tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: command line: 1 problem\n  RUN_DIR: expected a run f")


def test_run_folders_are_found_newest_first_and_not_through_links(site: Site) -> None:
    first, second = site.run(), site.run()
    (site.runs_dir / "latest").symlink_to(second.root)
    (site.runs_dir / "notes").mkdir()
    (site.runs_dir / "notes" / "config.yaml").touch()
    assert run_folders(site.runs_dir) == [second, first]
    assert not is_run_folder(site.runs_dir / "notes")


def test_numbers_are_read_as_ranges() -> None:
    assert words.ranges([3]) == "3"
    assert words.ranges([9, 0, 1, 2, 7, 8]) == "0 to 2, 7 to 9"
    assert words.ranges(range(0, 2000, 2)) == "0, 2, 4, 6, 8, 10, 994 more"
    assert words.roles(["server", "client-1", "client-0"]) == "the server, array tasks 0 to 1"


# --- status ---

LINKS = [
    {"array_task": 0, "host": "n1", "job_id": "11_0", "gpus": ["0"], "slots": 2, "running": 2,
     "done": 10, "failed": 1},
]  # fmt: skip


def test_status_shows_rounds_fits_metrics_and_what_each_job_does(site: Site) -> None:
    paths = site.run(
        array_tasks=3, round=3, num_rounds=10, fits_done=5, fits_total=10, fits_failed=1,
        verb="train", metrics={"loss": 0.5}, round_s=60.0, fits_late=2, fits_cancelled=3,
        failing=["client 7 has failed in 3 rounds in a row; at last: no luck"],
    )  # fmt: skip
    value = files.read_json(paths.status) | {"array_tasks": LINKS}
    files.write_json(paths.status, value)
    site.says(
        "10|RUNNING|None|2026-01-01T10:00:00|n4",
        "11_0|RUNNING|None|2026-01-01T10:00:00|n1",
        "11_1|PENDING|Resources|2026-01-01T12:00:00|",
        "11_2|PENDING|Resources|N/A|",
    )
    result = call(status.app, "--runs-dir", site.runs_dir)
    assert result.exit_code == 0
    text = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "rounds 3/10" in text
    assert "fits train: 5 of 10 done, 1 failed, 2 late, 3 cancelled in the run so far" in text
    assert "failing client 7 has failed in 3 rounds in a row; at last: no luck" in text
    assert "metrics loss 0.5000" in text
    assert "ETA 7:30" in text
    assert "server 10 RUNNING 2026-01-01T10:00:00 n4" in text
    assert "array task 0 11_0 RUNNING 2026-01-01T10:00:00 n1 0 2 2 10 1" in text
    assert "array tasks 1 to 2 11 PENDING (Resources) expected 2026-01-01T12:00:00" in text

    known = json.loads(call(status.app, paths.root, "--json").stdout)
    assert (known["run"], known["state"], known["eta_s"]) == (paths.run_id, "running", 450.0)
    assert known["jobs"]["client-0"] == {
        "job_id": "11_0", "state": "RUNNING", "reason": "", "start": "2026-01-01T10:00:00",
        "node": "n1", "gpus": ["0"], "slots": 2, "running": 2, "done": 10, "failed": 1,
    }  # fmt: skip
    assert known["jobs"]["client-1"]["reason"] == "Resources"


@pytest.mark.parametrize("connected", [{}, {"array_tasks": 0}, {"array_tasks": []}])
def test_status_does_without_a_word_about_array_tasks(
    site: Site, connected: dict[str, Any]
) -> None:
    paths = site.run()
    files.write_json(paths.status, {"state": "running", "reason": "", **connected})
    site.says("10|RUNNING|None||n1")
    assert call(status.app, paths.root).exit_code == 0


def test_a_thousand_array_tasks_are_a_few_rows(site: Site) -> None:
    paths = site.run(array_tasks=1001)
    running = [f"11_{index}|RUNNING|None|2026-01-01T10:00:00|n{index}" for index in range(12)]
    pending = [f"11_{index}|PENDING|Resources|N/A|" for index in range(12, 1001)]
    site.says("10|RUNNING|None||n1", *running, *pending)
    result = call(status.app, paths.root)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "array tasks 0 to 11 11 RUNNING 2026-01-01T10:00:00 12 nodes" in lines
    assert "array tasks 12 to 1000 11 PENDING (Resources)" in lines
    assert len(lines) < 12
    assert len(json.loads(call(status.app, paths.root, "--json").stdout)["jobs"]) == 1002


@pytest.mark.parametrize(
    ("state", "said"),
    {
        "TIMEOUT": ", it reached its time limit (cluster.time_min)",
        "OUT_OF_MEMORY": ", it used more memory than it asked for (cluster.mem_gb)",
        "NODE_FAIL": ", its node failed",
        "PREEMPTED": ", it was preempted",
        "CANCELLED": " ",
    }.items(),
)
def test_how_slurm_ended_a_job_is_said_in_words(site: Site, state: str, said: str) -> None:
    paths = site.run()
    site.says("10|RUNNING|None||n1", f"11_0|{state}|None||n2", "11_1|RUNNING|None||n3")
    assert f"{state}{said}" in call(status.app, paths.root).stdout


def test_a_server_that_slurm_has_ended_never_stays_running(site: Site) -> None:
    paths = site.run()
    site.says("10|TIMEOUT|None||n1", "11_0|RUNNING|None||n2")
    result = call(status.app, paths.root, "--json")
    known = json.loads(result.stdout)
    assert known["state"] == "failed"
    assert "Slurm ended the server job 10 on n1: TIMEOUT" in known["reason"]
    assert run_state.read(paths)["state"] == "failed"


def test_without_an_answer_of_slurm_status_shows_what_the_server_said(site: Site) -> None:
    paths = site.run(round=3, num_rounds=10)
    result = call(status.app, paths.root)
    assert result.exit_code == 0
    assert "3/10" in result.stdout
    assert "not known: wanted to run 'squeue" in result.stdout


def test_status_exits_with_75_when_nobody_has_said_anything(site: Site) -> None:
    paths = site.run("pending")
    result = call(status.app, paths.root)
    assert result.exit_code == 75
    assert result.stderr.startswith("error: Slurm did not answer")


def test_watching_a_run_that_has_ended_prints_it_once(site: Site) -> None:
    paths = site.run("finished")
    result = call(status.app, paths.root, "--watch")
    assert result.exit_code == 0
    assert result.stdout.count("finished") == 1


# --- list ---


def test_the_list_asks_slurm_once_for_all_that_run(site: Site) -> None:
    site.run("finished", round=10, num_rounds=10, metrics={"accuracy": 0.9})
    site.run()
    site.run()
    site.says("20|RUNNING|None||n1", "30|NODE_FAIL|None||n2")
    result = call(fedhpc.list.app, "--runs-dir", site.runs_dir)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[1] for row in rows] == ["failed", "running", "finished"]
    assert rows[2][2:5] == ["10/10", "accuracy", "0.9000"]
    assert len(site.called()) == 1
    assert "--jobs=20,21,30,31" in site.called()[0]


def test_the_list_is_there_without_slurm_and_says_so(site: Site) -> None:
    paths = site.run()
    result = call(fedhpc.list.app, "--runs-dir", site.runs_dir, "--json")
    assert result.exit_code == 0
    assert [run["run"] for run in json.loads(result.stdout)] == [paths.run_id]
    assert "squeue" in result.stderr


# --- logs ---


def test_logs_names_the_files_only_where_there_are_two(site: Site) -> None:
    paths = site.run()
    out, err = cluster.log_paths(paths, "10")
    err.write_bytes(b"one\ntwo\xff\nthree\n")
    out.touch()
    assert call(logs.app, paths.root).stdout_bytes == b"one\ntwo\xff\nthree\n"
    out.write_text("printed\n")
    text = call(logs.app, paths.root, "server", "--lines", 1).stdout
    assert text == f"==> {out} <==\nprinted\n\n==> {err} <==\nthree\n"


def test_a_log_that_is_not_there_is_an_error_that_says_which_are(site: Site) -> None:
    paths = site.run(array_tasks=4)
    cluster.log_paths(paths, "11_2")[1].write_text("here\n")
    site.says("10|PENDING|Priority|N/A|")
    assert call(logs.app, paths.root, "client", 2).stdout == "here\n"
    result = call(logs.app, paths.root)
    assert result.exit_code == 75
    assert "no log of the server yet: job 10 is PENDING (Priority)" in result.stderr
    assert "there are logs of array task 2" in result.stderr
    for arguments in (["client", 4], ["client"], ["worker"]):
        result = call(logs.app, paths.root, *arguments)
        assert result.exit_code == 2
        assert "expected server or client K, K being one of 0 to 3" in result.stderr


# --- cancel ---

KNOWN_UNTIL_SCANCEL = """
if [ -e "{gone}" ]; then exit 0; fi
echo '10|RUNNING|None||n1'
echo '11_0|RUNNING|None||n1'
echo '11_1|PENDING|Resources||'
"""


def queue(site: Site, *, obeys: bool = True) -> None:
    gone = site.runs_dir.parent / "gone"
    site.command("squeue", KNOWN_UNTIL_SCANCEL.format(gone=gone))
    site.command("scancel", f"touch {gone}" if obeys else "")


def test_cancel_ends_all_jobs_and_writes_the_last_word(site: Site) -> None:
    paths = site.run()
    paths.secrets.mkdir()
    queue(site)
    result = call(cancel.app, paths.root)
    assert result.exit_code == 0, result.stderr
    assert "cancelling the server, array tasks 0 to 1" in result.stdout
    assert run_state.read(paths)["state"] == "cancelled"
    assert not paths.secrets.exists()
    assert "scancel 11 10" in site.called()


def test_cancel_ends_what_a_run_that_has_ended_left_in_the_queue(site: Site) -> None:
    paths = site.run("finished")
    queue(site)
    result = call(cancel.app, paths.root)
    assert result.exit_code == 0
    assert "had already ended: finished" in result.stdout
    assert "cancelled the server, array tasks 0 to 1" in result.stdout
    assert run_state.read(paths)["state"] == "finished"
    assert call(cancel.app, paths.root).exit_code == 0
    assert len([line for line in site.called() if "scancel" in line]) == 1


def test_cancel_names_what_is_still_there_at_the_deadline(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_GONE_TIMEOUT_S", 0.5)
    paths = site.run()
    queue(site, obeys=False)
    result = call(cancel.app, paths.root)
    assert result.exit_code == 75
    assert "still there: the server, array tasks 0 to 1" in result.stderr
    assert run_state.read(paths)["state"] == "running"


def test_cancel_does_not_pretend_for_processes_of_another_machine(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = site.run(executor="local")
    submission.write(paths, Submission("local", "1", ["2"], host="elsewhere"))
    result = call(cancel.app, paths.root)
    assert result.exit_code == 75
    assert "its processes are on elsewhere" in result.stderr
    assert run_state.read(paths)["state"] == "running"


# --- clean ---

KEPT = ["config.yaml", "metrics.jsonl", "fits.jsonl", "model.safetensors", "errors/one.txt",
        "jobs/10_0_log.err", "jobs/submission.json", "checkpoints/round-00002/arrays",
        "status.json", "memory/0.jsonl", "report.html", "figures/memory.png"]  # fmt: skip
FREED = ["blobs/aa.safetensors", "jobs/10_submitted.pkl", "jobs/10_0_result.pkl",
         "secrets/ca.pem", "checkpoints/round-00001/arrays"]  # fmt: skip


def full(paths: RunPaths) -> RunPaths:
    for name in [*KEPT, *FREED]:
        path = paths.root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if not path.exists():
            path.write_bytes(b"x" * 1_000_000)
    return paths


def there(paths: RunPaths, names: Sequence[str]) -> list[str]:
    return [name for name in names if (paths.root / name).exists()]


def test_clean_asks_and_frees_only_what_nobody_needs(site: Site) -> None:
    paths = full(site.run("finished"))
    result = call(clean.app, paths.root, answer="n\n")
    assert result.exit_code == 1
    assert "5.0 MB" in result.stdout
    assert there(paths, FREED) == FREED
    result = call(clean.app, paths.root, answer="y\n")
    assert result.exit_code == 0
    assert there(paths, FREED) == []
    assert there(paths, KEPT) == KEPT
    assert call(clean.app, paths.root).stdout == "nothing to free\n"


def test_clean_without_an_answer_frees_nothing(site: Site) -> None:
    paths = full(site.run("finished"))
    assert call(clean.app, paths.root).exit_code == 1
    assert there(paths, FREED) == FREED


def test_clean_follows_no_link(site: Site, tmp_path: Path) -> None:
    paths = site.run("finished")
    outside = tmp_path / "outside"
    (outside / "round-1").mkdir(parents=True)
    (outside / "precious.pkl").touch()
    paths.blobs.rmdir()
    paths.blobs.symlink_to(outside)
    paths.secrets.symlink_to(outside)
    (paths.jobs / "link.pkl").symlink_to(outside / "precious.pkl")
    for name in ("round-1", "round-2"):
        (paths.checkpoints / name).symlink_to(outside / "round-1")
    assert call(clean.app, paths.root, "--yes").exit_code == 0
    assert sorted(path.name for path in outside.iterdir()) == ["precious.pkl", "round-1"]
    assert not paths.secrets.is_symlink()
    assert not (paths.jobs / "link.pkl").is_symlink()
    assert [path.name for path in paths.checkpoints.iterdir()] == ["round-2"]
    assert call(clean.app, paths.root, "--yes", "--whole").exit_code == 0
    assert not paths.root.exists()
    assert sorted(path.name for path in outside.iterdir()) == ["precious.pkl", "round-1"]


def test_clean_refuses_a_run_that_runs_and_one_with_jobs_in_the_queue(site: Site) -> None:
    running, ended = full(site.run()), full(site.run("finished"))
    site.says("10|RUNNING|None||n1", "21_1|PENDING|Resources||")
    result = call(clean.app, running.root, ended.root, "--yes", "--whole")
    assert result.exit_code == 1
    assert f"{running.run_id}: running" in result.stderr
    assert f"{ended.run_id}: finished, but still there: array task 1" in result.stderr
    assert there(running, FREED) == there(ended, FREED) == FREED


def test_clean_leaves_alone_what_it_cannot_be_sure_of(site: Site) -> None:
    unsure, ended = full(site.run()), full(site.run("failed"))
    result = call(clean.app, "--runs-dir", site.runs_dir, "--yes")
    assert result.exit_code == 0
    assert "left alone, as they have not ended: 1" in result.stderr
    assert there(unsure, FREED) == FREED
    assert there(ended, FREED) == []


def test_clean_takes_only_runs_that_ended_long_ago(site: Site) -> None:
    old, new = site.run("finished"), site.run("finished")
    os.utime(old.status, (1e9, 1e9))
    result = call(clean.app, "--runs-dir", site.runs_dir, "--whole", "--yes")
    assert result.exit_code == 2
    result = call(clean.app, "--runs-dir", site.runs_dir, "--whole", "--yes", "--older-than", 30)
    assert result.exit_code == 0
    assert run_folders(site.runs_dir) == [new]


def test_clean_refuses_a_folder_that_only_looks_like_a_run(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.schema())
    result = call(clean.app, folder, "--whole", "--yes")
    assert result.exit_code == 2
    assert folder.exists()
