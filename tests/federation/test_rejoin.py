"""Real array tasks whose server goes away, stalls or comes back as the next attempt."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from rejoin_app import SlowApp
from support import REPOSITORY, Submitter, eventually

from fedhpc import files
from fedhpc.cluster import submission
from fedhpc.federation import certificates, compat, issuer
from fedhpc.federation.dispatch import Dispatch
from fedhpc.federation.grid import HpcGrid
from fedhpc.federation.link_server import LinkServer
from fedhpc.federation.peer import LinkOptions
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.states import ClientStates
from fedhpc.files import read_json
from fedhpc.paths import RunPaths, create_run_folder
from fedhpc.rendezvous import Publisher, Rendezvous

SLOTS = 2
LIVENESS_S = 4.0
INLINE_BYTES = 10_000


class Attempt:
    """One attempt of a server: links, rendezvous and grid, without an app."""

    def __init__(self, paths: RunPaths, number: int) -> None:
        files.claim(paths.attempt(number))
        self.links = LinkServer(
            Dispatch(array_tasks=1, liveness_timeout_s=LIVENESS_S),
            LinkOptions(paths.run_id, number, LIVENESS_S, INLINE_BYTES, lambda *_: None),
            paths,
            certificates.server_credentials(paths.secrets),
        )
        port = self.links.start("127.0.0.1")
        told = Rendezvous(
            paths.run_id, number, f"127.0.0.1:{port}", "here", os.getpid(), "1", "serving", 0
        )
        self._publisher = Publisher(paths, told, lambda: None)
        self._publisher.start()
        states = ClientStates(paths, float("inf"))
        self.grid = HpcGrid(
            self.links,
            Recorder(paths),
            paths,
            num_clients=10,
            seed=1,
            states=states,
            inline_bytes=INLINE_BYTES,
        )

    def has_company(self) -> bool:
        return any(known["connected"] for known in self.links.array_tasks())

    def ask(self, server_round: int, steps: dict[int, float], seconds: float) -> list[str]:
        """Send a message to each client; its arrays are too large for the link."""
        arrays = ArrayRecord({"w": Array(np.zeros(5_000, dtype=np.float32))})
        messages = []
        for client_id, step in steps.items():
            config = ConfigRecord({"server-round": server_round, "seconds": seconds, "step": step})
            content = RecordDict({"arrays": arrays, "config": config})
            messages.append(Message(content, dst_node_id=client_id + 1, message_type="train"))
        return self.grid.push_messages(messages)

    def replies(self, message_ids: list[str]) -> dict[int, float]:
        """Return by client what was added to the zeros that were sent."""
        found: dict[int, float] = {}

        def all_there() -> bool:
            for reply in self.grid.pull_messages(message_ids):
                (weight,) = set(reply.content["arrays"]["w"].numpy())
                client_id = reply.metadata.src_node_id - 1
                assert client_id not in found
                found[client_id] = float(weight)
            return len(found) == len(message_ids)

        eventually(all_there, 60)
        return found

    def go_away(self) -> None:
        """As a server that is requeued."""
        self._publisher.end("requeueing")
        self.links.finish(None)

    def finish(self) -> None:
        self._publisher.end("finished")
        self.links.finish("finished")


@pytest.fixture
def app(tmp_path: Path) -> SlowApp:
    return SlowApp(tmp_path)


@pytest.fixture
def paths(tmp_path: Path, app: SlowApp) -> RunPaths:
    paths = create_run_folder(tmp_path, "rejoin")
    sets = f"""
        isolation: {{slots: {SLOTS}, lock_dir: {tmp_path / "locks"}}}
        cluster: {{executor: local, liveness_timeout_s: {LIVENESS_S}}}
    """
    paths.config.write_text(app.config.read_text() + sets.replace("\n        ", "\n"))
    issuer.create(paths.secrets)
    compat.set_identity(paths.run_id)
    return paths


@pytest.fixture
def array_task(paths: RunPaths) -> Iterator["subprocess.Popen[bytes]"]:
    with (paths.jobs / "array-task.err").open("wb") as file:
        command = [sys.executable, "-m", "fedhpc.client", str(paths.root), "0"]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True
        )
    yield process
    process.kill()
    process.wait(10)


def test_an_array_task_brings_its_fits_to_the_next_attempts_and_none_runs_twice(
    paths: RunPaths, array_task: "subprocess.Popen[bytes]", app: SlowApp
) -> None:
    first = Attempt(paths, 1)
    first.ask(3, {0: 1.0, 1: 2.0}, seconds=0.5)
    eventually(lambda: len(app.began()) == 2, 120)
    first.go_away()
    eventually(lambda: len(app.ended()) == 2, 30)
    eventually(lambda: len([path for path in paths.blobs.iterdir() if "train" in path.name]) == 2)

    # The same is asked again: held results are used, and what was not held runs.
    second = Attempt(paths, 2)
    eventually(second.has_company)
    assert second.links.array_tasks()[0]["running"] == 2
    asked = second.ask(3, {0: 1.0, 1: 2.0, 2: 3.0}, seconds=0.5)
    assert second.replies(asked) == {0: 1.0, 1: 2.0, 2: 3.0}
    assert sorted(app.began()) == ["3 0", "3 1", "3 2"]

    # Another question to one of two clients: its fit is cancelled and runs anew.
    second.ask(4, {0: 1.0, 1: 2.0}, seconds=2.0)
    eventually(lambda: len(app.began()) == 5, 60)
    second.go_away()
    third = Attempt(paths, 3)
    eventually(third.has_company)
    asked = third.ask(4, {0: 7.0, 1: 2.0}, seconds=2.0)
    assert third.replies(asked) == {0: 7.0, 1: 2.0}
    assert Counter(app.began()[3:]) == {"4 0": 2, "4 1": 1}

    # What it holds of a round that is over is forgotten.
    third.ask(5, {0: 1.0, 1: 1.0}, seconds=30.0)
    eventually(lambda: len(app.began()) == 8, 60)
    third.go_away()
    fourth = Attempt(paths, 4)
    eventually(fourth.has_company)
    assert fourth.replies(fourth.ask(6, {5: 1.0}, seconds=0.1)) == {5: 1.0}
    assert fourth.links.array_tasks()[0]["running"] == 0

    # Killed in the middle of fits: the stream breaks at once, although children live a bit longer.
    fourth.ask(7, {0: 1.0, 1: 1.0}, seconds=30.0)
    eventually(lambda: len(app.began()) == 11, 60)
    killed_s = time.monotonic()
    array_task.kill()
    eventually(lambda: not fourth.has_company(), 30)
    noticed_s = time.monotonic() - killed_s
    assert noticed_s < 2, f"it took {noticed_s:.2f} s to notice an array task killed with -9"

    fourth.finish()
    assert list(paths.blobs.iterdir()) == []


def _pid(paths: RunPaths, role: str) -> int:
    return int((read_json(paths.process(role)) or {})["pid"])


def _stall(pid: int) -> None:
    """Stop a process for longer than others wait for a sign of life."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(LIVENESS_S + 1.5)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_stalled_server_blames_nobody_and_a_stalled_array_task_is_replaced_and_comes_back(
    submitter: Submitter, app: SlowApp, tmp_path: Path
) -> None:
    process = submitter.start(
        [
            "app.run_config.seconds=2.0",
            "federation.num_clients=4",
            "cluster.array_tasks=2",
            "cluster.min_array_tasks=2",
            f"cluster.liveness_timeout_s={LIVENESS_S}",
            f"isolation.slots={SLOTS}",
            f"isolation.lock_dir={tmp_path / 'locks'}",
        ],
        config=app.config,
    )
    eventually(lambda: len(app.began()) == 4, 120)  # round 1
    paths = submitter.newest()
    jobs = submission.read(paths)
    assert jobs is not None
    logs = {role: paths.jobs / f"{job_id}_0_log.err" for role, job_id in jobs.roles()}
    _stall(_pid(paths, "server"))
    eventually(lambda: len(app.began()) >= 8, 60)  # round 2
    assert sorted(app.began()) == sorted(set(app.began())), "a fit ran twice"
    for role in ("client-0", "client-1"):
        assert "the server was silent for" in logs[role].read_text()
    assert "was silent for" not in logs["server"].read_text()

    _stall(_pid(paths, "client-0"))
    output, _ = process.communicate(timeout=90)
    told = output + "".join(path.read_text() for path in logs.values())
    assert process.returncode == 0, told
    assert "array task 0 was silent for" in logs["server"].read_text()
    fits = [(fit["round"], fit["client"]) for fit in files.read_lines(paths.fits)]
    assert sorted(fits) == [(number, client) for number in range(1, 4) for client in range(4)]
    assert set(app.began()) == {f"{number} {client}" for number, client in fits}
