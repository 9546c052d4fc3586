"""``--dry-run``: the plan, the scripts and the config, with or without a Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedhpc import config, plan
from fedhpc.paths import RunPaths
from fedhpc.submit import app

SCRIPTS = ["# ---- server job: sbatch script ----", "# ---- client array: sbatch script ----"]
CONFIG = "# ---- resolved config ----"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with an empty config, without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    (tmp_path / "c.yaml").write_text("name: mine\n")


def with_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def dry_run(*arguments: str) -> str:
    shown = CliRunner().invoke(app, ["c.yaml", "--dry-run", *arguments])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def rows(output: str) -> dict[str, str]:
    table = output.partition("\n\n")[0].splitlines()
    width = table[0].index(table[0].split()[1])  # of the first column
    return {line[:width].strip(): line[width:] for line in table}


def of(*assignments: str) -> dict[str, str]:
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    return rows(dry_run("--executor", "slurm", *sets))


def test_plan_scripts_and_config_come_in_this_order() -> None:
    output = dry_run("--executor", "slurm")
    places = [output.index(head) for head in ("executor", *SCRIPTS, CONFIG)]
    assert places == sorted(places)
    assert "no sbatch" not in output
    resolved = yaml.safe_load(output[output.index(CONFIG) :])
    assert resolved["cluster"]["executor"] == "slurm"
    assert config.parse(resolved, "the output").name == "mine"


def test_where_a_run_would_be_local_one_line_says_so_above_the_scripts() -> None:
    output = dry_run()
    (line,) = (line for line in output.splitlines() if "no sbatch" in line)
    assert "local" in line
    assert output.index(line) < output.index(SCRIPTS[0])
    assert rows(output)["executor"] == "local"


def test_where_there_is_sbatch_the_run_is_slurms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_sbatch(monkeypatch, tmp_path)
    output = dry_run()
    assert rows(output)["executor"] == "slurm"
    assert "no sbatch" not in output
    assert all(head in output for head in SCRIPTS)


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_who_asks_for_no_slurm_sees_no_scripts(executor: str) -> None:
    output = dry_run("--executor", executor)
    assert "sbatch" not in output
    assert CONFIG in output


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    dry_run("--executor", "slurm", "--set", "snapshot=true")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_site_and_assignments_count_as_in_a_submission(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("cluster: {slurm_partition: long, account: lab}\n")
    output = dry_run("--site", "site.yaml", "--set", "cluster.account=other")
    assert output.count("#SBATCH --partition=long\n") == 2
    assert output.count("#SBATCH --account=other\n") == 2
    resolved = yaml.safe_load(output[output.index(CONFIG) :])
    assert resolved["cluster"]["account"] == "other"


def test_a_submission_to_slurm_still_needs_it() -> None:
    refused = CliRunner().invoke(app, ["c.yaml", "--executor", "slurm"])
    assert refused.exit_code == 2
    assert "expected sbatch on the PATH" in refused.stderr


@pytest.mark.parametrize(
    ("assignments", "wanted"),
    [
        (
            ["cluster.array_tasks=4", "cluster.max_parallel=2", "cluster.gpus_per_task=2",
             "isolation.slots_per_gpu=3", "federation.num_clients=48",
             "federation.clients_per_round=25", "federation.num_rounds=7"],
            {"jobs": "1 server job, 1 client array of 4 array tasks, 2 at a time",
             "GPUs": "2 an array task, 4 at a time",
             "slots": "6 an array task, 12 at a time",
             "clients": "48; 25 a round; 4 for each slot, a round is 3 waves",
             "rounds": "7",
             "fits": "175"},
        ),
        (
            ["cluster.gres=gpu:a100:2", "cluster.clients.cpus_per_task=16",
             "cluster.server.gpus_per_task=1"],
            {"GPUs": "2 an array task, 2 at a time; 1 for the server",
             "slots": "2 an array task, 2 at a time"},
        ),
        (
            ["cluster.cpus_per_task=8", "isolation.threads_per_fit=3"],
            {"slots": "2 an array task, 2 at a time"},
        ),
        (
            ["cluster.cpus_per_task=8", "cluster.gpus_per_task=1", "isolation.device=cpu"],
            {"GPUs": "1 an array task, 1 at a time", "slots": "8 an array task, 8 at a time"},
        ),
        (["isolation.slots=5"], {"slots": "5 an array task, 5 at a time"}),
        (
            [],
            {"slots": "auto: as many an array task as it finds GPUs, or cores",
             "clients": "10; 10 a round"},
        ),
        (
            ["federation.clients_per_evaluation=4"],
            {"clients": "10; 10 a round, 4 evaluate", "fits": "140"},
        ),
        (
            ["app.server='a:b'", "app.client='a:b'", "isolation.slots=4"],
            {"clients": "10; 2.5 for each slot", "rounds, fits": "the ServerApp decides"},
        ),
        (["snapshot=true"], {"code": "a copy in the run folder"}),
    ],
)  # fmt: skip
def test_the_plan_says_what_the_options_come_to(
    assignments: list[str], wanted: dict[str, str]
) -> None:
    found = of(*assignments)
    assert {name: found.get(name) for name in wanted} == wanted
    assert ("GPUs" in found) is any("gpu" in text for text in assignments)


def test_the_local_executor_shares_the_cores_of_this_machine() -> None:
    output = dry_run("--executor", "local", "--set", "cluster.array_tasks=2",
                     "--set", "isolation.device=cpu")  # fmt: skip
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert rows(output)["slots"] == f"{each} an array task, {2 * each} at a time"


# --- expected time --------------------------------------------------------------------------------


def ended(runs_dir: Path, run: str, state: str, fits: list[dict[str, Any]]) -> None:
    """Write what a run leaves behind."""
    paths = RunPaths(runs_dir / run)
    paths.root.mkdir(parents=True)
    paths.status.write_text(json.dumps({"state": state, "reason": ""}))
    lines = [{"verb": "train", "ok": True, **fit} for fit in fits]
    paths.fits.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fit(wall_s: float, **more: Any) -> dict[str, Any]:
    return {"start_s": 0.25 * wall_s, "run_s": 0.5 * wall_s, "return_s": 0.25 * wall_s, **more}


def test_the_newest_finished_run_of_the_name_tells_how_long_it_takes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ended(runs, "mine-20260101-000000-aaaa", "finished", [fit(999)])
    ended(runs, "mine-20260102-000000-bbbb", "finished",
          [fit(4), fit(8), fit(77, ok=False), {"reason": "no times"}])  # fmt: skip
    ended(runs, "mine-20260103-000000-cccc", "failed", [fit(555)])
    ended(runs, "mine-20260104-000000-dddd", "finished", [])
    ended(runs, "mine-too-20260105-000000-eeee", "finished", [fit(333)])
    (runs / "mine-notes").mkdir()
    found = of("cluster.clients.gpus_per_task=2", "cluster.array_tasks=3",
               "federation.num_rounds=600", "federation.clients_per_round=10")  # fmt: skip
    # 600 rounds of 2 waves (10 fits in 6 slots) of 6 s are 2 hours on 6 GPUs.
    assert found["expected"] == (
        "at least 2:00:00, 12 GPU hours of fits: 6 s a fit (train), as in mine-20260102-000000-bbbb"
    )


def test_fits_that_evaluate_have_a_time_of_their_own(tmp_path: Path) -> None:
    fits = [fit(6), fit(2, verb="evaluate")]
    ended(tmp_path / "runs", "mine-20260101-000000-aaaa", "finished", fits)
    found = of("isolation.slots=5", "federation.num_rounds=10",
               "federation.clients_per_evaluation=10")  # fmt: skip
    assert found["expected"].startswith("at least 2:40 of fits: 2 s a fit (evaluate); 6 s a fit")


def test_without_known_slots_only_the_time_of_a_fit_is_told(tmp_path: Path) -> None:
    ended(tmp_path / "runs", "mine-20260101-000000-aaaa", "finished", [fit(6)])
    assert of()["expected"] == "6 s a fit (train), as in mine-20260101-000000-aaaa"


def test_without_an_earlier_run_nothing_is_expected(tmp_path: Path) -> None:
    assert of()["expected"] == f"not known: no finished run 'mine' in {tmp_path / 'runs'}"


def test_of_a_long_run_only_the_last_fits_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(tmp_path / "runs", "mine-20260101-000000-aaaa", "finished", [fit(1)] * 50 + [fit(9)] * 50)
    monkeypatch.setattr(plan, "_TAIL_BYTES", 1000)
    assert of()["expected"].startswith("9 s a fit")


def test_a_dry_run_loads_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fedhpc.submit", "c.yaml", "--dry-run",
               "--executor", "slurm"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "submitit" in imported
    assert imported & {"torch", "torchvision", "flwr", "grpc", "numpy"} == set()
