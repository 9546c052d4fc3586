"""The doctor's judgements: versions, refusals, GPUs asked for, mounts, memory, time limits."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedhpc import config, doctor
from fedhpc.config import Config
from fedhpc.doctor import gpus, locks, pair, probes, remedies, report
from fedhpc.doctor.locks import Mount
from fedhpc.doctor.report import Check

VERSIONS = {"python": "3.11.7", "fedhpc": "0.1.0", "flwr": "1.41.0", "torch": "2.6.0",
            "protobuf": "5.29.0", "sources": "3f2a0000"}  # fmt: skip


def parse(values: dict[str, object]) -> Config:
    return config.parse(values, "experiment.yaml")


@pytest.mark.parametrize(
    ("other", "status", "said"),
    [
        ({}, "pass", "torch 2.6.0"),
        ({"torch": "2.7.0"}, "fail", "torch: 2.6.0 on login (a), 2.7.0 on client (b)"),
        ({"torch": report.MISSING}, "fail", "torch: 2.6.0 on login (a), not installed on client"),
        ({"python": "3.12.1"}, "fail", "python: 3.11.7 on login (a), 3.12.1 on client (b)"),
        ({"python": "3.11.9"}, "warn", "python: 3.11.7 on login (a), 3.11.9 on client (b)"),
        ({"protobuf": "5.28.3"}, "warn", "protobuf: 5.29.0 on login (a), 5.28.3 on client (b)"),
        ({"protobuf": report.MISSING}, "fail", "protobuf: 5.29.0 on login (a), not installed"),
        ({"sources": "77770000"}, "warn", "fedhpc's source files: 3f2a0000 on login (a), 7777"),
    ],
)
def test_versions_that_differ_are_listed_and_judged_by_what_depends_on_them(
    other: dict[str, str], status: str, said: str
) -> None:
    check = report.compare_versions({"login (a)": VERSIONS, "client (b)": VERSIONS | other})
    assert check.status == status
    assert said in check.found
    assert bool(check.remedy) == (status != "pass")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("sbatch: error: invalid partition specified: gpuu", "cluster.slurm_partition"),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing"
            " or exceeds some limit)",
            "cluster.time_min",
        ),
        ("Invalid account or account/partition combination specified", "cluster.account"),
        ("Batch job submission failed: Invalid qos specification", "cluster.qos"),
        ("Invalid generic resource (gres) specification", "cluster.clients.gpus_per_task"),
        ("Batch job submission failed: Invalid feature specification", "cluster.constraint"),
        ("Memory specification can not be satisfied", "cluster.mem_gb"),
        ("Requested node configuration is not available", "nodelist"),
        ("Requested reservation is invalid", "cluster.reservation"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "squeue --me",
        ),
        ("PartitionTimeLimit", "cluster.time_min"),
        ("BadConstraints", "cluster.constraint"),
        ("ReqNodeNotAvail, UnavailableNodes:n3", "nodelist"),
        ("QOSMaxGRESPerUser", "squeue --me"),
        ("JobHeldUser", "scontrol release"),
        ("Resources", "--timeout-min"),
        ("Priority", "--timeout-min"),
        ("something new", "the message"),
    ],
)
def test_what_slurm_says_has_a_remedy(said: str, remedy: str) -> None:
    assert remedy in remedies.for_slurm(said, "see the message")


def gpu_check(
    monkeypatch: pytest.MonkeyPatch, visible: str, wanted: int, device: str, on_slurm: bool = True
) -> Check:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus, "_use", lambda _visible, _where: [])
    resolved = parse({"isolation": {"device": device}})
    (check,) = gpus.check(resolved, wanted, 8, "client (b)", on_slurm=on_slurm)
    return check


@pytest.mark.parametrize(
    ("visible", "wanted", "device", "status", "said"),
    [
        ("", 0, "cpu", "info", "isolation.device is cpu"),
        ("0,1", 2, "cpu", "warn", "isolation.device is cpu, but 2 asked for"),
        ("", 0, "auto", "info", "run on the CPU"),
        ("", 2, "auto", "warn", "the CPU will be used"),
        ("", 2, "cuda", "fail", "expected a GPU, found none visible"),
        ("0", 2, "auto", "fail", "asked for 2, sees 1 (CUDA_VISIBLE_DEVICES 0)"),
        ("0,1", 2, "auto", "pass", "asked for 2, sees 2"),
        ("0,1,2", 2, "auto", "warn", "asked for 2, sees 3"),
    ],
)
def test_gpus_that_are_seen_are_compared_with_those_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    wanted: int,
    device: str,
    status: str,
    said: str,
) -> None:
    check = gpu_check(monkeypatch, visible, wanted, device)
    assert (check.status, said in check.found) == (status, True), check
    assert bool(check.remedy) == (status in ("warn", "fail"))


def test_without_slurm_nobody_allots_gpus_and_too_few_are_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_check(monkeypatch, "0", 2, "auto", on_slurm=False).status == "warn"


@pytest.mark.parametrize(
    ("wanted", "threads", "on_slurm", "status"),
    [
        (1, 1, True, "pass"),
        (10_000, 1, True, "fail"),
        (10_000, 1, False, "warn"),
        (1, 9_000, True, "warn"),
        (None, 1, True, "info"),
        (None, 1, False, "pass"),
    ],
)
def test_cores_that_are_seen_are_compared_with_those_asked_for(
    wanted: int | None, threads: int, on_slurm: bool, status: str
) -> None:
    resolved = parse({"isolation": {"threads_per_fit": threads}})
    assert probes.check_cores(resolved, wanted, "client (b)", on_slurm=on_slurm).status == status


@pytest.mark.parametrize(
    ("cgroup", "limits", "limit_gb", "why"),
    [
        ("0::/job/step", {}, 16.0, "the machine's"),
        ("0::/job/step", {"job/memory.max": "8000000000"}, 8.0, "the job's cgroup"),
        ("0::/job/step", {"job/step/memory.max": "max"}, 16.0, "the machine's"),
        (
            "9:cpu:/\n4:memory:/job/step",
            {"memory/job/memory.limit_in_bytes": "4000000000"},
            4.0,
            "the job's cgroup",
        ),
    ],
)
def test_memory_is_the_least_of_the_machines_and_of_all_cgroups_above(
    tmp_path: Path, cgroup: str, limits: dict[str, str], limit_gb: float, why: str
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(cgroup + "\n")
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemTotal:    15625000 kB\n")
    for name, text in limits.items():
        file = tmp_path / "cgroups" / name
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n")
    found, found_why = probes.memory_limit_gb(tmp_path, tmp_path / "cgroups")
    assert (round(found, 3), found_why) == (limit_gb, why)


def test_less_memory_than_asked_for_fails_under_slurm() -> None:
    assert probes.check_memory(1e6, "client (b)", on_slurm=True).status == "fail"
    assert probes.check_memory(1e6, "client (b)", on_slurm=False).status == "warn"
    assert probes.check_memory(0.001, "client (b)", on_slurm=True).status == "pass"


MOUNTS = r"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw
41 22 259:3 /4711/.4711 /tmp rw,relatime - xfs /dev/nvme0n1p1 rw
42 22 0:40 / /home rw shared:9 - nfs4 fs:/home rw
43 22 0:41 / /a\040b rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "mount"),
    [
        ("/", Mount("/", "/", "ext4")),
        ("/var/tmp", Mount("/", "/", "ext4")),
        ("/dev/shm", Mount("/dev/shm", "/", "tmpfs")),
        ("/tmp", Mount("/tmp", "/4711/.4711", "xfs")),
        ("/tmpfoo", Mount("/", "/", "ext4")),
        ("/home/me/tmp", Mount("/home", "/", "nfs4")),
        ("/a b/c", Mount("/a b", "/", "tmpfs")),
    ],
)
def test_the_mount_of_a_folder_is_the_deepest_above_it(folder: str, mount: Mount) -> None:
    assert locks.mount_of(Path(folder), MOUNTS.strip()) == mount


@pytest.mark.parametrize(
    ("folder", "mount", "theirs", "private"),
    [
        ("/tmp", Mount("/", "/", "ext4"), [1, 2], False),
        ("/tmp", Mount("/", "/", "ext4"), [1, 3], True),
        ("/tmp", Mount("/tmp", "/4711/.4711", "xfs"), None, True),
        ("/tmp/slurm-4711", Mount("/", "/", "ext4"), None, True),
        ("/tmp", Mount("/tmp", "/14711", "xfs"), None, None),
        ("/tmp", Mount("/", "/", "ext4"), None, None),
    ],
)
def test_whether_a_folder_is_private_to_the_job_is_told_by_evidence(
    folder: str, mount: Mount, theirs: list[int] | None, private: bool | None
) -> None:
    assert locks.privacy(Path(folder), mount, "4711_0", [1, 2], theirs)[0] is private


def test_the_pair_is_one_array_task_with_the_options_of_the_run_and_minutes_of_time() -> None:
    resolved = parse(
        {
            "cluster": {
                "executor": "slurm",
                "array_tasks": 16,
                "max_parallel": 8,
                "min_array_tasks": 4,
                "time_min": 2880,
                "mem_gb": 8,
                "extra": {"requeue": True, "time": "2-0", "nice": 3},
                "server": {"time_min": 5},
                "clients": {"gpus_per_task": 2},
            }
        }
    )
    cluster = pair.shorten(resolved, timeout_s=1800).cluster
    assert (cluster.array_tasks, cluster.max_parallel, cluster.min_array_tasks) == (1, 1, 1)
    assert (cluster.server.time_min, cluster.clients.time_min) == (5, 10)
    assert (cluster.mem_gb, cluster.clients.gpus_per_task) == (8, 2)
    assert cluster.extra == {"nice": 3, "no-requeue": True}
    longer = pair.shorten(parse({}), timeout_s=1800).cluster
    assert (longer.executor, longer.server.time_min, longer.clients.time_min) == ("local", 30, 10)


def test_the_table_shows_what_was_found_and_what_to_do_unchanged() -> None:
    console = Console(width=100, record=True, markup=False)
    checks = [
        Check("a check", "login (a)", "pass", "fine [bold]"),
        Check("another", "client (b)", "fail", "line 1\nline 2", "do [this]"),
    ]
    report.print_table(console, checks)
    text = console.export_text()
    for part in ("fine [bold]", "line 2", "-> do [this]", "FAIL", "client (b)"):
        assert part in text
    assert report.summary(checks, 1.25) == "1 failed, 1 passed, in 1.2 s"


def test_garbage_in_a_report_is_left_out() -> None:
    good = {"name": "a", "where": "b", "status": "pass", "found": "c", "remedy": ""}
    assert report.read([good, {"name": "a"}, 3]) == [Check(**good)]
    assert report.read(None) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CONFIG: expected a YAML file, found nothing"),
        (["missing.yaml"], "missing.yaml: 1 problem"),
        (["{file}", "--set", "cluster.gpu_per_task=1"], "did you mean cluster.gpus_per_task?"),
        (["{file}", "--executor", "slurm"], "expected sbatch on the PATH for 'slurm', found none"),
    ],
)
def test_a_bad_command_line_ends_with_2_and_submits_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "experiment.yaml"
    file.write_text("name: small\n")
    found = CliRunner().invoke(doctor.app, [text.format(file=file) for text in arguments])
    assert found.exit_code == 2
    assert said in found.output
    assert list(tmp_path.iterdir()) == [file]
