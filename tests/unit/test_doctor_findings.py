"""What the doctor finds on a node, each check failing once; and what it submits."""

import fcntl
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedhpc import config
from fedhpc.cluster import options
from fedhpc.config import Config
from fedhpc.doctor import checks, node, pair
from fedhpc.isolation import Gpu, Slot, locks
from fedhpc.paths import RunPaths


def parse(**sections: object) -> Config:
    return config.parse(sections, "experiment.yaml")


def expect(status: str, said: str, look: Callable[..., str], *arguments: Any) -> None:
    """Call a check and compare what comes of it."""
    found = checks.check("a check", "here", look, *arguments)
    assert found.status == status
    assert said in f"{found.found} -> {found.remedy}"
    assert bool(found.remedy) == (status != "pass")


def test_a_check_that_breaks_is_a_failure_and_not_the_end() -> None:
    expect("fail", "ZeroDivisionError", lambda: str(1 / 0))


@pytest.mark.parametrize("name", ["python", "fedhpc", "torch"])
def test_versions_that_differ_are_told(name: str) -> None:
    here = checks.versions()
    expect("pass", f"{name} {here[name]}", checks.versions_agree, {"a": here, "b": here})
    said = f"{name}: {here[name]} on a, 9.9 on b -> install the same"
    expect("fail", said, checks.versions_agree, {"a": here, "b": here | {name: "9.9"}})


@pytest.mark.parametrize(
    ("gpus", "wanted", "device", "status", "said"),
    [
        (0, 0, "cpu", "pass", "0 asked for, sees none"),
        (0, 2, "cpu", "warn", "isolation.device is cpu"),
        (1, 2, "auto", "fail", "2 asked for, sees GPU-0 (a card) ->"),
        (2, 2, "auto", "pass", "2 asked for, sees GPU-0 (a card), GPU-1 (a card)"),
        (3, 2, "auto", "warn", "other jobs may use them too"),
    ],
)
def test_gpus_that_are_seen_are_compared_with_those_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int, wanted: int, device: str, status: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    isolation = parse(isolation={"device": device}).isolation
    slots = [Slot(index, (Gpu(f"GPU-{index}", "a card", 10**9),)) for index in range(gpus)]
    expect(status, said, checks.gpus, wanted, isolation, slots)


def test_a_gpu_whose_memory_cannot_be_read_is_a_warning() -> None:
    isolation = parse().isolation
    said = "slots alone decide which fits may start -> is nvidia-ml-py installed"
    expect("warn", said, checks.gpus, 1, isolation, [Slot(0, (Gpu("0"),))])


def test_too_few_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    expect("pass", "of 1 asked for", checks.cores, 1, 1)
    expect("warn", "isolation.threads_per_fit is 9000", checks.cores, None, 9000)
    expect("warn", "the local executor allots nothing", checks.cores, 9000, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    expect("fail", "of 9000 asked for", checks.cores, 9000, 1)


def test_data_that_is_missing_not_packed_or_damaged_is_told(tmp_path: Path) -> None:
    root = tmp_path / "data"
    resolved = parse(data={"root": str(root)})
    expect("fail", f"`python -m fedhpc.data digits --root {root}`", checks.data, resolved)
    (root / "packed").mkdir(parents=True)
    expect("warn", "digits is not packed", checks.data, resolved)
    (root / "packed" / "digits-0").mkdir()
    expect("fail", "could not open", checks.data, resolved)


def test_an_app_that_a_node_does_not_see_is_told(tmp_path: Path) -> None:
    in_a_folder = parse(app={"dir": str(tmp_path)})
    expect("fail", f"expected {tmp_path}/pyproject.toml", checks.app, in_a_folder)
    (tmp_path / "pyproject.toml").touch()
    expect("pass", "is there", checks.app, in_a_folder)
    for server, status in (("nowhere.to:app", "fail"), ("fedhpc.server:app", "pass")):
        app = {"server": server, "client": "fedhpc.client:app"}
        expect(status, server, checks.app, parse(app=app))


def test_locks_that_do_not_hold_on_a_node_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    isolation = parse(isolation={"lock_dir": str(tmp_path / "locks")}).isolation
    mine = checks.lock_folder(isolation)
    expect("pass", "shared with the other job", checks.locks, isolation, mine)
    expect("pass", "for all jobs of this node", checks.locks, isolation, None)
    expect("warn", "not the one of the other job here", checks.locks, isolation, "0:0")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(locks, "mount_of", lambda *_: ("xfs", "/4711"))
    expect("warn", "for this job alone (/4711 of its disk)", checks.locks, isolation, None)
    monkeypatch.setattr(locks, "mount_of", lambda *_: ("nfs4", "/"))
    expect("fail", "on a network disk (nfs4)", checks.locks, isolation, None)
    monkeypatch.setattr(locks, "mount_of", lambda *_: ("ext4", "/"))
    monkeypatch.setattr(fcntl, "flock", lambda _file, _how: None)
    expect("fail", "grants one lock twice", checks.locks, isolation, mine)
    assert list((tmp_path / "locks").iterdir()) == []


def test_the_mount_of_a_folder_is_the_deepest_above_it() -> None:
    mounts = (
        "22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "41 22 259:3 /4711/.4711 /tmp rw,relatime - xfs /dev/nvme0n1p1 rw\n"
    )
    assert locks.mount_of(Path("/tmp/mine"), mounts) == ("xfs", "/4711/.4711")
    assert locks.mount_of(Path("/tmpfoo"), mounts) == ("ext4", "/")
    assert locks.private_to_job(Path("/tmp/mine"), "4711_3", mounts) == "/4711/.4711"
    assert locks.private_to_job(Path("/tmp/mine"), "471", mounts) == ""
    assert locks.private_to_job(Path("/var/tmp"), "4711", mounts) == ""


def test_a_node_without_slurms_commands_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    expect("warn", "found no squeue on the PATH", checks.slurm_commands, "4711_0")


def test_a_folder_that_others_do_not_see_or_see_late_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    monkeypatch.setattr(node, "_ECHO_TIMEOUT_S", 0.2)
    expect("fail", "saw no answer of the server job", node.echo, paths, "client-0", "server")
    monkeypatch.setattr(node, "_ECHO_TIMEOUT_S", 10.0)
    node.answer_in_background(paths, "login")
    expect("pass", "the login node saw a file", node.echo, paths, "server", "login")
    monkeypatch.setattr(node, "_SLOW_S", 0.2)
    late = tmp_path / "client-0.server.answer"
    threading.Thread(target=lambda: (time.sleep(0.4), late.touch())).start()
    expect("warn", "a faster shared disk", node.echo, paths, "client-0", "server")


def test_a_port_out_of_reach_is_told_with_the_addresses_and_an_interface_that_works() -> None:
    addresses = {"lo": "127.0.0.1", "eth9": "127.0.0.1"}
    server = {"where": "server job (a)", "addresses": addresses, "any_port": node.listen("", "me")}
    advice = "--set cluster.interface=eth9"
    expect("fail", advice, node.reach, server, "me", False)
    server |= {"address": "127.0.0.1", "port": node.listen("127.0.0.1", "me")}
    expect("pass", "of the server job (a) in", node.reach, server, "me", False)
    expect("warn", "nothing between nodes was tried", node.reach, server, "me", True)
    expect("fail", "something else answers there", node.reach, server, "you", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server["port"] = unused.getsockname()[1]
        said = "Connection refused; there: 127.0.0.1 (lo), 127.0.0.1 (eth9); here: 127.0.0.1 (lo)"
        expect("fail", said, node.reach, server, "me", False)
        expect("fail", advice, node.reach, server, "me", False)


def test_the_pair_is_one_array_task_with_the_options_of_the_run_and_minutes_of_time() -> None:
    values = {
        "executor": "slurm", "array_tasks": 16, "max_parallel": 8, "min_array_tasks": 4,
        "time_min": 2880, "mem_gb": 8, "extra": {"requeue": True, "time": "2-0", "nice": 3},
        "server": {"time_min": 5}, "clients": {"gpus_per_task": 2},
    }  # fmt: skip
    cluster = pair.shorten(parse(cluster=values), timeout_s=1800).cluster
    assert (cluster.array_tasks, cluster.max_parallel, cluster.min_array_tasks) == (1, 1, 1)
    server, clients = options.of_server(cluster), options.of_clients(cluster)
    assert (server.time_min, clients.time_min) == (5, 30)
    assert (server.mem_gb, clients.gpus_per_task) == (8, 2)
    assert server.extra == clients.extra == {"nice": 3, "no-requeue": True}
