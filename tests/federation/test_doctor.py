"""The doctor with real jobs of the local executor, with parts that fail for real."""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from doctor_support import CANCELLED, PLATFORM, Doctor
from support import eventually, processes_of

from fedhpc import config
from fedhpc.config import Config
from fedhpc.doctor import folder, locks, port, probes
from fedhpc.doctor.folder import Folder
from fedhpc.doctor.locks import Mount
from fedhpc.doctor.port import Address
from fedhpc.learning import data
from fedhpc.paths import RunPaths, create_run_folder


def parse(values: dict[str, object]) -> Config:
    return config.parse(values, "experiment.yaml")


@pytest.fixture
def doctor(tmp_path: Path) -> Iterator[Doctor]:
    """A doctor whose jobs leave no process behind."""
    doctor = Doctor(tmp_path, "local")
    yield doctor
    for path in doctor.runs_dir.glob("*"):
        assert processes_of(RunPaths(path)) == []


def test_a_sound_machine_passes_every_check(doctor: Doctor, data_root: Path) -> None:
    data.prepare("digits", data_root)
    visit = doctor.visit("--set", f"data.root={data_root}", "--set", "isolation.device=cpu")
    assert visit.returncode == 0, visit
    assert visit.found["fail"] == 0
    assert visit.status("jobs accepted", "login") == "pass"
    for role in ("server", "client"):
        for name in ("shared folder", "imports", "data", "cores", "server's port"):
            assert visit.status(name, role) == "pass", (name, role)
    assert visit.status("slot locks", "client") == "pass"
    assert visit.status("GPUs", "client") == "info"
    assert "round trip" in visit.text("server's port", "client")
    assert "1442 examples" in visit.text("data", "client")
    assert doctor.nothing_is_left()


def test_everything_that_is_wrong_is_told_at_once_with_its_remedy(
    doctor: Doctor, tmp_path: Path
) -> None:
    other = tmp_path / "torch-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    wrong = {
        "cluster.interface": "ib77",
        "cluster.gpus_per_task": "1",
        "cluster.cpus_per_task": "5000",
        "cluster.mem_gb": "1000000",
        "cluster.python": str(python),
        "data.root": str(tmp_path / "nodata"),
        "data.stage_to": "$FEDHPC_NO_SUCH_VARIABLE/data",
    }
    sets = [text for key, value in wrong.items() for text in ("--set", f"{key}={value}")]
    visit = doctor.visit(*sets, env={"CUDA_VISIBLE_DEVICES": "63"})
    assert visit.returncode == PLATFORM
    said = {
        ("server's port", "server"): ["found 'ib77'", "--set cluster.interface=NAME", "(lo)"],
        ("server's port", "client"): ["has no address to connect to"],
        ("data", "client"): [str(tmp_path / "nodata"), "python -m fedhpc.data digits"],
        ("data.stage_to", "client"): ["FEDHPC_NO_SUCH_VARIABLE", "cluster.env"],
        ("GPU 63", "client"): ["GPU 63 was allotted, but torch", "with driver"],
        ("versions", "everywhere"): ["9.9.9 on client", "cluster.python"],
    }
    for (name, role), parts in said.items():
        assert visit.status(name, role) == "fail"
        assert all(part in visit.text(name, role) for part in parts), visit.text(name, role)
    assert visit.status("cores", "client") == "warn"  # nobody allots them here
    assert visit.status("memory", "client") == "warn"
    assert doctor.nothing_is_left()


def test_a_job_that_dies_without_a_word_leaves_its_log(doctor: Doctor, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named submitit >&2\nexit 1\n")
    python.chmod(0o755)
    visit = doctor.visit("--set", f"cluster.python={python}", "--timeout-min", "1")
    assert visit.returncode == PLATFORM
    assert visit.status("job ran", "client") == "fail"
    assert visit.found["logs"]["client"] == "no module named submitit"
    assert Path(visit.found["folder"]).is_dir()


def test_a_ctrl_c_ends_the_jobs_and_leaves_nothing(doctor: Doctor) -> None:
    process = doctor.start()
    eventually(lambda: list(doctor.runs_dir.glob("*/client-hello.json")))
    (root,) = doctor.runs_dir.iterdir()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == CANCELLED, errors
    assert processes_of(RunPaths(root)) == []
    assert doctor.nothing_is_left()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_submitted(
    doctor: Doctor, tmp_path: Path
) -> None:
    doctor.runs_dir = tmp_path / "a file" / "runs"
    doctor.runs_dir.parent.write_text("")
    visit = doctor.visit()
    assert visit.returncode == PLATFORM
    assert visit.status("shared folder", "login") == "fail"
    assert len(visit.found["checks"]) == 1


# --- Slurm's answers, by commands of the test's own -----------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write Slurm's commands as shell scripts; scancel notes what it is called with."""

    def write(sbatch: str, squeue: str = "true") -> dict[str, str]:
        folder = tmp_path / "slurm"
        folder.mkdir()
        scancel = f'echo "$@" >> {tmp_path}/cancelled; touch {tmp_path}/gone'
        commands = {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": "true"}
        for name, text in commands.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    return write


def test_a_refused_job_is_shown_with_what_to_do(
    tmp_path: Path, slurm: Callable[..., dict[str, str]]
) -> None:
    doctor = Doctor(tmp_path, "slurm")
    refused = "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1"
    visit = doctor.visit(env=slurm(refused))
    assert visit.returncode == PLATFORM
    assert visit.status("jobs accepted", "login") == "fail"
    text = visit.text("jobs accepted", "login")
    assert text.startswith("server job:")
    assert "invalid partition specified: gpuu" in text
    assert "sinfo" in text
    assert doctor.nothing_is_left()


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "PartitionTimeLimit",
            ["and never will: PENDING (PartitionTimeLimit)", "cluster.time_min"],
        ),
        ("Resources", ["did not start within 0.05 min: PENDING (Resources)", "--timeout-min"]),
    ],
)
def test_jobs_that_do_not_start_are_cancelled_with_the_reason(
    tmp_path: Path, slurm: Callable[..., dict[str, str]], reason: str, said: list[str]
) -> None:
    doctor = Doctor(tmp_path, "slurm")
    sbatch = f"echo x >> {tmp_path}/ids; wc -l < {tmp_path}/ids"
    squeue = (
        f"test -e {tmp_path}/gone && exit 0\n"
        f"echo '1|PENDING|{reason}|N/A|'; echo '2_0|PENDING|Dependency|N/A|'"
    )
    env = slurm(sbatch, squeue)
    visit = doctor.visit("--timeout-min", "0.05", env=env)
    assert visit.returncode == PLATFORM
    text = visit.text("job ran", "server")
    assert all(part in text for part in said), text
    assert f"server job 1: PENDING ({reason})" in visit.errors or reason == "PartitionTimeLimit"
    assert (tmp_path / "cancelled").read_text().split()[-2:] == ["2", "1"]
    assert doctor.nothing_is_left()


# --- the parts, where a whole visit could not make them fail --------------------------------------


def test_an_interface_out_of_reach_is_told_with_one_that_is_not() -> None:
    with port.listening(parse({"cluster": {"executor": "local"}})) as told:
        good = port.check_reach(told, "client (b)", "elsewhere", on_slurm=True)
        assert good.status == "pass"
        assert told["chosen"]["interface"] == "lo"
        here = socket.gethostname()
        assert port.check_reach(told, "client (b)", here, on_slurm=True).status == "warn"
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            closed = asdict(Address("ib0", "127.0.0.1", unused.getsockname()[1]))
            bad = told | {"chosen": closed, "others": [told["chosen"]]}
            check = port.check_reach(bad, "client (b)", "elsewhere", on_slurm=True)
    assert check.status == "fail"
    assert "127.0.0.1 (ib0)" in check.found
    assert "Connection refused" in check.found
    assert "--set cluster.interface=lo" in check.remedy


def test_somebody_else_at_the_address_is_not_mistaken_for_the_server() -> None:
    resolved = parse({"cluster": {"executor": "local"}})
    with port.listening(resolved) as told:
        wrong = told | {"token": "another", "others": []}
        check = port.check_reach(wrong, "client (b)", "elsewhere", on_slurm=False)
    assert check.status == "fail"
    assert "something else answers there" in check.found


def test_a_port_behind_which_nobody_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "_CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it never accepts
        chosen = asdict(Address("lo", "127.0.0.1", silent.getsockname()[1]))
        told = {"token": "x", "chosen": chosen, "others": [], "problem": None}
        check = port.check_reach(told, "client (b)", "elsewhere", on_slurm=False)
    assert check.status == "fail"
    assert "no answer within" in check.found


def test_two_that_do_not_see_each_others_files_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_ASK_TIMEOUT_S", 0.3)
    root = create_run_folder(tmp_path, "doctor").root
    server, client = Folder(root, "server"), Folder(root, "client")
    server.open_mail()
    (check,) = server.check_exchange("client", "n2")
    assert check.status == "fail"
    assert "no answer of the client" in check.found
    monkeypatch.setattr(folder, "_ASK_TIMEOUT_S", 10.0)
    client.answer_in_background()
    (check,) = server.check_exchange("client", "n2")
    assert check.status == "pass"
    (check,) = server.check_exchange("client", "n2")
    assert check.status == "pass"
    # The answer to an earlier question is none.
    monkeypatch.setattr(client, "answer", lambda: None)
    monkeypatch.setattr(folder, "_ASK_TIMEOUT_S", 0.3)
    (check,) = server.check_exchange("client", "n2")
    assert check.status == "fail"


def test_a_shared_folder_that_is_slow_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SLOW_S", 0.2)
    root = create_run_folder(tmp_path, "doctor").root
    server, login = Folder(root, "server"), Folder(root, "login")
    server.open_mail()
    threading.Thread(target=lambda: (time.sleep(0.4), login.answer())).start()
    check, clock = server.check_exchange("login", "n2")
    assert (check.status, clock.status) == ("warn", "info")


def test_locks_that_do_not_lock_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Mount("/", "/", "ext4")
    assert locks._try_locks(tmp_path, local) == ""
    assert locks._try_locks(tmp_path, Mount("/", "/", "nfs4")) == "not node-local"
    assert locks._try_locks(Path("/proc"), local).startswith("cannot be used")
    monkeypatch.setattr(fcntl, "flock", lambda _file, _how: None)
    assert locks._try_locks(tmp_path, local) == "a second process got a lock that was held"
    check = locks.check("client (b)", "4711", None)
    assert check.status == "fail"
    assert "TMPDIR" in check.remedy


def test_locks_in_private_folders_alone_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "candidates", lambda: [tmp_path])
    assert locks.check("client (b)", "4711", locks.identities()).status == "pass"
    check = locks.check("client (b)", "4711", {str(tmp_path): [0, 0]})
    assert check.status == "warn"
    assert "private to the job" in check.found


def test_an_app_that_a_node_does_not_see_is_told(tmp_path: Path) -> None:
    def status(directory: Path, **app: str) -> list[str]:
        resolved = parse({"app": app})
        return [c.status for c in probes.check_app(resolved, "client (b)", str(directory))]

    assert status(Path.cwd(), dir=str(tmp_path)) == ["fail"]
    (tmp_path / "pyproject.toml").touch()
    assert status(Path.cwd(), dir=str(tmp_path)) == ["pass"]
    assert status(tmp_path, dir=str(tmp_path)) == ["pass", "warn"]
    assert status(Path.cwd(), server="nowhere_to_be_found:app", client="fedhpc.a:b") == [
        "fail",
        "pass",
    ]


def test_data_that_is_not_packed_or_damaged_is_told(tmp_path: Path) -> None:
    resolved = parse({"data": {"root": str(tmp_path), "stage_to": str(tmp_path / "node")}})

    def check() -> list[str]:
        return [c.status for c in probes.check_data(resolved, "client (b)", "there")]

    assert check() == ["warn", "pass"]
    packed = data.prepare("digits", tmp_path)
    assert check() == ["pass", "pass"]
    (packed / "meta.json").write_text("{")
    assert check() == ["fail", "pass"]


def test_a_node_without_slurms_commands_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = probes.check_slurm_commands("4711_0", "client (b)")
    assert check.status == "warn"
    assert "found no squeue on the PATH" in check.found
    assert "is not requeued" in check.remedy


def test_an_import_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "submitit.py").write_text("raise OSError('libstdc++.so.6: version not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = probes.check_imports("client (b)")
    assert check.status == "fail"
    assert "libstdc++.so.6" in check.found
