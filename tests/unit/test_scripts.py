"""The sbatch scripts: each option that a config asks for, in the script of the right job."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fedhpc import config
from fedhpc.cluster import options, scripts
from fedhpc.config import JobOptions
from fedhpc.paths import RunPaths

# Each field of JobOptions: a value, and the option that it becomes.
OPTIONS: dict[str, tuple[Any, str]] = {
    "slurm_partition": ("long", "--partition=long"),
    "account": ("lab", "--account=lab"),
    "qos": ("high", "--qos=high"),
    "constraint": ("a100&ib|v100", "--constraint=a100&ib|v100"),
    "reservation": ("course", "--reservation=course"),
    "nodelist": ("n[1-2]", "--nodelist=n[1-2]"),
    "exclude": ("n3,n4", "--exclude=n3,n4"),
    "time_min": (77, "--time=77"),
    "mem_gb": (1.5, "--mem=1500M"),
    "cpus_per_task": (3, "--cpus-per-task=3"),
    "gpus_per_task": (2, "--gpus-per-task=2"),
    "gres": ("gpu:a100:2", "--gres=gpu:a100:2"),
    "comment": ('it\'s "mine" $HOME #1', '--comment=it\'s "mine" $HOME #1'),
    "mail_user": ("me@example.org", "--mail-user=me@example.org"),
    "mail_type": ("END,FAIL", "--mail-type=END,FAIL"),
    "export": ("NONE", "--export=NONE"),
    "extra": ({"licenses": "matlab:1"}, "--licenses=matlab:1"),
}
JOBS = {"server": "server job", "clients": "client array"}


def texts(**cluster: Any) -> dict[str, str]:
    app = cluster.pop("app", {})
    snapshot = cluster.pop("snapshot", False)
    raw = {"cluster": cluster, "data": {"root": "/data"}, "app": app, "snapshot": snapshot}
    return scripts.texts(config.parse(raw, "test"), RunPaths(Path("/runs/a run")))


def given(text: str) -> list[str]:
    """Return the options of a script, as sbatch reads them."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [shlex.split(line, comments=False)[1] for line in lines]


def command(text: str) -> list[str]:
    """Return the words of the line that starts the step."""
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    return shlex.split(line)


def test_the_table_has_every_option() -> None:
    assert OPTIONS.keys() == JobOptions.model_fields.keys()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("field", OPTIONS)
def test_an_option_of_one_job_is_in_its_script_alone(field: str, job: str) -> None:
    value, option = OPTIONS[field]
    found = texts(**{job: {field: value}})
    other = next(name for name in JOBS if name != job)
    assert given(found[JOBS[job]]).count(option) == 1
    name = option.partition("=")[0]
    assert not [line for line in given(found[JOBS[other]]) if line.startswith(name)]


@pytest.mark.parametrize("field", OPTIONS)
def test_a_common_option_is_in_both_scripts_and_gpus_are_the_clients(field: str) -> None:
    value, option = OPTIONS[field]
    found = texts(**{field: value})
    assert option in given(found["client array"])
    assert (option in given(found["server job"])) is (field not in ("gpus_per_task", "gres"))


@pytest.mark.parametrize("field", [name for name in OPTIONS if name not in ("gres", "extra")])
def test_an_option_of_one_job_takes_the_place_of_the_common_one(field: str) -> None:
    value, option = OPTIONS[field]
    other: Any = value + 1 if isinstance(value, int | float) else "other"
    found = texts(**{field: other}, server={field: value}, clients={field: value})
    for text in found.values():
        name = option.partition("=")[0]
        assert [line for line in given(text) if line.startswith(f"{name}=")] == [option]


@pytest.mark.parametrize(
    ("common", "clients", "server_has", "clients_have"),
    [
        ({"gres": "gpu:2,lscratch:50"}, {}, ["--gres=lscratch:50"], ["--gres=gpu:2,lscratch:50"]),
        ({"gres": "gpu:2"}, {"gpus_per_task": 1}, [], ["--gpus-per-task=1"]),
        ({"gpus_per_task": 2}, {"gres": "gpu:a100:1"}, [], ["--gres=gpu:a100:1"]),
        ({"gpus_per_task": 2}, {"gpus_per_task": 0}, [], []),
        ({"extra": {"gpus": 2, "cpus-per-gpu": 4}}, {}, [], ["--gpus=2", "--cpus-per-gpu=4"]),
        ({"extra": {"gpus": 2}}, {"gpus_per_task": 1}, [], ["--gpus-per-task=1"]),
        (
            {"gres": "lscratch:50", "gpus_per_task": 1},
            {},
            ["--gres=lscratch:50"],
            ["--gpus-per-task=1", "--gres=lscratch:50"],
        ),
    ],
)
def test_gpus_are_asked_for_once_and_not_for_the_server(
    common: dict[str, Any], clients: dict[str, Any], server_has: list[str], clients_have: list[str]
) -> None:
    found = texts(**common, clients=clients)

    def asked(text: str) -> set[str]:
        return {line for line in given(text) if "gpu" in line or "gres" in line}

    assert asked(found["server job"]) == set(server_has)
    assert asked(found["client array"]) == set(clients_have)


@pytest.mark.parametrize(
    ("given_as", "count"),
    [
        ({}, 0),
        ({"gpus_per_task": 3}, 3),
        ({"gpus_per_task": 0}, 0),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:2"}, 2),
        ({"gres": "gpu:a100"}, 1),
        ({"gres": "gpu:a100:2"}, 2),
        ({"gres": "gpu:a100:2(S:0-1),gpu:v100:1,lscratch:50"}, 3),
        ({"gres": "gres/gpu=4"}, 4),
        ({"gres": "lscratch:50"}, 0),
        ({"gres": "gpumem:50"}, 0),
        ({"extra": {"gpus": 2}}, 2),
        ({"extra": {"gpus-per-node": "a100:4"}}, 4),
        ({"extra": {"gpus": False}}, 0),
    ],
)
def test_gpus_are_counted_however_they_are_asked_for(given_as: dict[str, Any], count: int) -> None:
    assert options.gpus(JobOptions.model_validate(given_as)) == count


def test_further_options_are_given_once_and_win() -> None:
    extra = {
        "exclusive": True,
        "nice": 0,
        "contiguous": False,
        "time": "1-00:00:00",
    }
    for text in texts(extra=extra, time_min=10).values():
        lines = given(text)
        assert {"--exclusive", "--nice=0", "--time=1-00:00:00"} <= set(lines)
        assert not [line for line in lines if line.startswith("--contiguous")]
        names = [line.partition("=")[0] for line in lines]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("extra", "requeue"),
    [
        ({}, ["--requeue"]),
        ({"no-requeue": True}, ["--no-requeue"]),
        ({"no-requeue": False}, ["--requeue"]),
        ({"requeue": False}, []),
    ],
)
def test_jobs_may_be_requeued_unless_the_config_says_otherwise(
    extra: dict[str, Any], requeue: list[str]
) -> None:
    for text in texts(extra=extra).values():
        assert [line for line in given(text) if "requeue" in line] == requeue


@pytest.mark.parametrize(
    ("cluster", "array"),
    [
        ({}, "--array=0-0%1"),
        ({"array_tasks": 8}, "--array=0-7%8"),
        ({"array_tasks": 8, "max_parallel": 3}, "--array=0-7%3"),
        ({"array_tasks": 1000}, "--array=0-999%1000"),
    ],
)
def test_the_clients_are_an_array_and_the_server_is_not(cluster: Any, array: str) -> None:
    found = texts(**cluster)
    assert array in given(found["client array"])
    assert "--array" not in found["server job"]


@pytest.mark.parametrize(
    ("cluster", "waits_for"),
    [
        ({}, ["--dependency=after:SERVER_JOB"]),
        ({"dependency": False}, []),
        ({"clients": {"extra": {"dependency": "afterok:7"}}},
         ["--dependency=afterok:7,after:SERVER_JOB"]),
        ({"dependency": False, "clients": {"extra": {"dependency": "afterok:7"}}},
         ["--dependency=afterok:7"]),
    ],
)  # fmt: skip
def test_the_clients_wait_for_the_server_unless_the_config_says_otherwise(
    cluster: Any, waits_for: list[str]
) -> None:
    found = texts(**cluster)
    assert [line for line in given(found["client array"]) if "depend" in line] == waits_for
    assert "--dependency" not in found["server job"]


def test_every_job_has_a_name_logs_a_warning_and_no_wckey() -> None:
    found = texts()
    for job, text in found.items():
        lines = given(text)
        role = {"server job": "server", "client array": "clients"}[job]
        assert f"--job-name=a run-{role}" in lines
        assert "--signal=USR2@90" in lines
        assert "--open-mode=append" in lines
        assert "wckey" not in text
        assert not [line for line in lines if line.startswith("--time")]
    assert "--output=/runs/a run/jobs/%j_0_log.out" in given(found["server job"])
    assert "--error=/runs/a run/jobs/%A_%a_0_log.err" in given(found["client array"])
    assert command(found["client array"])[-1] == "/runs/a run/jobs"


@pytest.mark.parametrize(("time_min", "warning_s"), [(1, 10), (4, 40), (9, 90), (600, 90)])
def test_the_warning_leaves_a_short_job_its_time(time_min: int, warning_s: int) -> None:
    for text in texts(time_min=time_min).values():
        assert f"--signal=USR2@{warning_s}" in given(text)


def test_the_smallest_memory_is_not_all_of_the_node() -> None:
    assert "--mem=1M" in given(texts(mem_gb=0.0001)["server job"])


def test_cores_are_asked_for_again_where_the_step_starts() -> None:
    found = texts(cpus_per_task=4, clients={"cpus_per_task": 8})
    assert "--cpus-per-task=4" in command(found["server job"])
    assert "--cpus-per-task=8" in command(found["client array"])


def test_setup_and_environment_come_before_python_in_their_order() -> None:
    found = texts(
        setup=["module load cuda", "source ~/venv/bin/activate"], env={"A": "it's $X", "B": "2"}
    )
    wanted = [
        "export PYTHONHASHSEED=0",
        "module load cuda",
        "source ~/venv/bin/activate",
        "export A='it'\"'\"'s $X'",
        "export B=2",
    ]
    for text in found.values():
        lines = text.splitlines()
        places = [lines.index(line) for line in wanted]
        assert places == sorted(places)
        assert places[-1] < next(i for i, line in enumerate(lines) if line.startswith("srun "))


@pytest.mark.parametrize(
    "cluster", [{"export": "NONE"}, {"extra": {"export": "PATH"}}], ids=["named", "extra"]
)
def test_what_the_setup_sets_reaches_the_step_also_without_the_environment(cluster: Any) -> None:
    for text in texts(**cluster).values():
        assert "export SLURM_EXPORT_ENV=ALL" in text.splitlines()
    assert "SLURM_EXPORT_ENV" not in texts()["server job"]


def test_the_jobs_run_the_python_of_submit_or_another_one() -> None:
    for text in texts().values():
        assert f"{sys.executable} -u -m submitit.core._submit" in text
    for text in texts(python="~/venv/bin/python -X dev").values():
        # Unquoted: the shell finds the home folder.
        assert " ~/venv/bin/python -X dev -u -m submitit.core._submit" in text


def test_a_snapshot_is_found_before_all_else_and_the_working_directory_not_at_all() -> None:
    for text in texts(snapshot=True, setup=["export PYTHONPATH=/mine"]).values():
        lines = text.splitlines()
        (line,) = (line for line in lines if line.startswith("export PYTHONPATH='"))
        assert line == (
            "export PYTHONPATH='/runs/a run/code/packages:/runs/a run/code/cwd'"
            "${PYTHONPATH:+:$PYTHONPATH}"
        )
        assert lines.index(line) > lines.index("export PYTHONPATH=/mine")
        assert f"{sys.executable} -P -u -m submitit.core._submit" in text


def test_apptainer_shows_what_the_jobs_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    container = {"image": "/images/my image.sif", "options": ["--cleanenv"]}
    found = texts(container=container, clients={"gpus_per_task": 1}, snapshot=True)
    words = command(found["client array"])
    start = words.index("apptainer")
    assert words[start:] == [
        "apptainer", "exec", "--nv", "--bind", f"/runs,{tmp_path},/data", "--pwd", str(tmp_path),
        "--cleanenv", "/images/my image.sif",
        "python3", "-P", "-u", "-m", "submitit.core._submit", "/runs/a run/jobs",
    ]  # fmt: skip
    assert "--nv" not in command(found["server job"])


def test_pyxis_shows_what_the_jobs_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    container = {"image": "nvcr.io#nvidia/pytorch:24.01", "runtime": "pyxis",
                 "options": ["--container-writable"]}  # fmt: skip
    found = texts(container=container, python="/opt/python", app={"dir": "/apps/mine"})
    for text in found.values():
        words = command(text)
        assert "--container-image=nvcr.io#nvidia/pytorch:24.01" in words
        # Another app has no use for the built-in one's data, which need not be there.
        mounts = ",".join(f"{path}:{path}" for path in ("/runs", tmp_path, "/apps/mine"))
        assert f"--container-mounts={mounts}" in words
        assert f"--container-workdir={tmp_path}" in words
        assert words.index("--container-writable") < words.index("/opt/python")


def test_writing_the_scripts_writes_no_file(tmp_path: Path) -> None:
    resolved = config.parse({"cluster": {"array_tasks": 3}}, "test")
    scripts.texts(resolved, RunPaths(tmp_path / "runs" / "a-run"))
    assert list(tmp_path.iterdir()) == []
