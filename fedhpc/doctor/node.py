"""The doctor's two jobs: what the server job and the array task do in place of a run."""

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from fedhpc import config, environment, run_state
from fedhpc.cluster import options
from fedhpc.config import Config
from fedhpc.doctor import gpus, locks, port, probes
from fedhpc.doctor.folder import Folder, Role
from fedhpc.doctor.report import Check

_LINGER_PAUSE_S = 0.2


def server(root: str) -> None:
    """Be the server job of a doctor's folder."""
    _Node(Path(root), "server").run()


def client(root: str, _index: int = 0) -> None:
    """Be the array task of a doctor's folder."""
    _Node(Path(root), "client").run()


class _Node:
    """One job of the pair."""

    def __init__(self, root: Path, role: Role) -> None:
        self.folder = Folder(root, role)
        self.role = role
        self.other: Role = "client" if role == "server" else "server"
        self.where = self.folder.where
        self.config: Config = config.load(self.folder.paths.config)
        of_role = options.of_server if role == "server" else options.of_clients
        self.options = of_role(self.config.cluster)
        self.environment = environment.current()
        self.on_slurm = self.environment.on_slurm
        self.login = self.folder.heard("hello", "login") or {}
        self.deadline_s = time.monotonic() + float(self.login.get("timeout_s", 600.0))
        self.checks: list[Check] = []

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, _leave)  # submitit ignores the first
        role = "server" if self.role == "server" else "client-0"
        run_state.register_process(self.folder.paths, role, self.environment.job_id)
        self.folder.answer_in_background()
        hello = {
            "host": self.environment.host,
            "job_id": self.environment.job_id,
            "kernel": locks.kernel(),
            "folders": locks.identities(),
        }
        self.folder.say("hello", hello)
        with contextlib.ExitStack() as stack:
            if self.role == "server":
                told = stack.enter_context(port.listening(self.config))
                self.folder.say("port", told)
                self.note("server's port", lambda: port.check_listening(told, self.where))
            self.look_here()
            self.look_at_the_other()
            self.report(final=True)
            while not self.folder.stopped() and time.monotonic() < self.deadline_s:
                time.sleep(_LINGER_PAUSE_S)

    def look_here(self) -> None:
        """Check what needs nobody else, and report it: the other job may never start."""
        resolved, where, on_slurm = self.config, self.where, self.on_slurm
        exchange = self.folder.check_exchange
        self.note("shared folder", lambda: exchange("login", str(self.login.get("host"))))
        self.note("imports", lambda: probes.check_imports(where))
        if resolved.app.is_builtin:
            root = str(self.login.get("data_root"))
            self.note("data", lambda: probes.check_data(resolved, where, root))
        else:
            directory = str(self.login.get("directory"))
            self.note("app", lambda: probes.check_app(resolved, where, directory))
        cpus = self.options.cpus_per_task
        self.note("cores", lambda: probes.check_cores(resolved, cpus, where, on_slurm=on_slurm))
        memory = self.options.mem_gb
        self.note("memory", lambda: probes.check_memory(memory, where, on_slurm=on_slurm))
        if on_slurm:
            job_id = self.environment.job_id
            self.note("Slurm's commands", lambda: probes.check_slurm_commands(job_id, where))
        wanted = options.gpus(self.options)
        if self.role == "client" or wanted:
            cores = self.environment.cpus
            self.note("GPUs", lambda: gpus.check(resolved, wanted, cores, where, on_slurm=on_slurm))
        self.report(final=False)

    def look_at_the_other(self) -> None:
        """Check what needs the other job, once it has started."""
        hello = self.folder.wait_for("hello", self.other, self.left_s())
        if hello is None:
            return  # the login node knows why, and says so
        host = str(hello["host"])
        self.note("shared folder", lambda: self.folder.check_exchange(self.other, host))
        if self.role == "server":
            return
        told = self.folder.wait_for("port", "server", self.left_s())
        if told is not None:
            on_slurm = self.on_slurm
            self.note(
                "server's port", lambda: port.check_reach(told, self.where, host, on_slurm=on_slurm)
            )
        same = hello["kernel"] == locks.kernel() and host == self.environment.host
        folders = hello["folders"] if same else None
        job_id = self.environment.job_id
        self.note("slot locks", lambda: locks.check(self.where, job_id, folders))

    def note(self, name: str, check: Callable[[], Check | Iterable[Check]]) -> None:
        """Run a check; one that raises does not keep the others from being made."""
        try:
            found = check()
            self.checks += [found] if isinstance(found, Check) else found
        except Exception as error:
            traceback.print_exc()
            text = f"the check itself failed: {type(error).__name__}: {error}"
            self.checks.append(Check(name, self.where, "fail", text, "see the job's log (--keep)"))

    def report(self, *, final: bool) -> None:
        """Write what was found so far."""
        value = {
            "where": self.where,
            "final": final,
            "versions": probes.versions(),
            "checks": [asdict(check) for check in self.checks],
        }
        self.folder.say("report", value)

    def left_s(self) -> float:
        return max(0.0, self.deadline_s - time.monotonic())


def _leave(signum: int, _frame: FrameType | None) -> None:
    """Leave through the main thread's exits, so that child processes are ended too."""
    sys.exit(128 + signum)
