"""A whole federation while its processes are killed at random moments."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPOSITORY, Run, Submitter, eventually

from fedhpc.files import read_json
from fedhpc.paths import RunPaths

ARRAY_TASKS = 2
ROUNDS, CLIENTS = 10, 30
SETS = [
    f"federation.num_clients={CLIENTS}",
    f"federation.clients_per_round={CLIENTS}",
    f"federation.num_rounds={ROUNDS}",
    "training.epochs=3",
    f"cluster.array_tasks={ARRAY_TASKS}",
    f"cluster.min_array_tasks={ARRAY_TASKS}",
    "isolation.slots=2",
    "isolation.standby=true",
]
SEED = 7


class Killer:
    """Sends SIGKILL to children, fork servers and array tasks of a run, until it is stopped.

    An array task that it killed is started again, as Slurm does when it requeues one.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.kills: Counter[str] = Counter()
        self._paths = paths
        self._draws = random.Random(SEED)
        self._stopped = threading.Event()
        self._restarted: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for process in self._restarted:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(20)

    def _run(self) -> None:
        for kind in self._plan():
            # A fit may lose its process twice: let it get on between two kills.
            done, pause_s = self._done(), self._draws.uniform(0.05, 0.4)
            end_s = time.monotonic() + 3
            while self._done() < done + 2 * ARRAY_TASKS and time.monotonic() < end_s:
                if self._stopped.wait(0.02):
                    return
            if self._stopped.wait(pause_s):
                return
            self._kill(kind)

    def _done(self) -> int:
        return self._paths.fits.read_bytes().count(b"\n")

    def _plan(self) -> Iterator[str]:
        while True:
            kinds = ["child"] * 8 + ["fork server"] + ["array task"]
            self._draws.shuffle(kinds)
            yield from kinds

    def _kill(self, kind: str) -> None:
        for index in self._draws.sample(range(ARRAY_TASKS), ARRAY_TASKS):
            array_task = (read_json(self._paths.process(f"client-{index}")) or {}).get("pid")
            fork_server = _fork_server(array_task)
            children = _children(fork_server) if fork_server else []
            if not children:  # it was killed lately
                continue
            pid = {"array task": array_task, "fork server": fork_server}.get(kind)
            pid = pid or self._draws.choice(children)
            with contextlib.suppress(ProcessLookupError):  # a child that has just ended
                os.kill(pid, signal.SIGKILL)
                self.kills[kind] += 1
            if kind == "array task":
                self._restart(index, pid)
            return

    def _restart(self, index: int, dead: int) -> None:
        eventually(lambda: not _alive(dead), 10)
        log = self._paths.jobs / f"restarted-{index}-{dead}.err"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "fedhpc.client", str(self._paths.root), str(index)]
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True
            )
        self._restarted.append(process)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _fork_server(array_task: int | None) -> int | None:
    """Return the pid of an array task's fork server, once it has preloaded and has children."""
    for folder in Path("/proc").glob("[0-9]*") if array_task else ():
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != array_task:
                continue
            if b"isolation.forkserver" in (folder / "cmdline").read_bytes():
                return int(folder.name) if _children(int(folder.name)) else None
        except OSError:
            continue
    return None


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.timeout(400)
def test_300_fits_under_random_kills_of_every_process_end_in_the_same_model(
    submitter: Submitter, tmp_path: Path
) -> None:
    sets = [*SETS, f"isolation.lock_dir={tmp_path / 'locks'}"]
    undisturbed = submitter.run(sets, executor="debug")
    process = submitter.start([*sets, "name=chaos"])
    eventually(lambda: list(submitter.runs_dir.glob("chaos-*/fits.jsonl")), 60)
    paths = RunPaths(next(submitter.runs_dir.glob("chaos-*")))
    began_s = time.monotonic()
    with Killer(paths) as killer:
        try:
            output, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=30)
        killer.stop()
    run = Run(paths, process.returncode, output)
    told = f"{dict(killer.kills)} in {time.monotonic() - began_s:.0f} s\n"
    assert run.returncode == 0, told + output + run.logs()
    seen = Counter((fit["round"], fit["client"]) for fit in run.fits if fit["verb"] == "train")
    wanted = {(number, client) for number in range(1, ROUNDS + 1) for client in range(CLIENTS)}
    assert set(seen) == wanted
    assert set(seen.values()) == {1}
    failed = [fit for fit in run.fits if not fit["ok"]]
    assert not failed, told + run.logs()
    assert run.checksum == undisturbed.checksum
    logs = "".join(path.read_text() for path in paths.jobs.glob("*.err"))
    assert "killed by SIGKILL; it runs again" in logs
    assert killer.kills["child"] >= 5, told
    assert killer.kills["fork server"] >= 1, told
    assert killer.kills["array task"] >= 1, told
