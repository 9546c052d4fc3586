"""A run that faults hit: started, watched, resumed as a user would, and looked at in the end."""

import contextlib
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fault_schedule import Fault, Size
from support import REPOSITORY, Run, Submitter, processes_of

from fedhpc import cluster, inspection, run_state
from fedhpc.cluster.entries import JOB_ENV
from fedhpc.files import read_json, read_lines
from fedhpc.paths import RunPaths, latest_attempt

if TYPE_CHECKING:
    from fault_kinds import Kind

ARRAY_TASKS = 2
LIVENESS_S = 3.0
_PAUSE_S = 0.03
_ASK_S = 1.0
_PROGRESS_S = 150.0  # a run that does not get on for so long is lost
_GONE_S = 30.0


def sets(size: Size) -> list[str]:
    """Return what a disturbed run is made of."""
    return [
        "federation.num_clients=8" if size.cohort < 8 else f"federation.num_clients={size.cohort}",
        f"federation.clients_per_round={size.cohort}",
        f"federation.num_rounds={size.rounds}",
        "training.epochs=10",
        f"cluster.array_tasks={ARRAY_TASKS}",
        f"cluster.liveness_timeout_s={LIVENESS_S}",
        "isolation.slots=2",
        "isolation.standby=true",
    ]


class Lost(Exception):
    """The run did not survive."""


@dataclass
class Hit:
    """A fault that has happened, and what was seen of it."""

    kind: "Kind"
    fault: Fault
    round: int
    fits: int
    at_s: float
    shows: str  # what the logs say of it; "": nothing
    detected_s: float | None = None
    rounds_redone: int = 0
    fits_redone: int = 0


@dataclass
class Outcome:
    """How a run came through its schedule."""

    folder: Path
    hits: list[Hit] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class DisturbedRun:
    """One run and everything that happens to it.

    Parameters
    ----------
    submitter : Submitter
        Starts it, in a folder of its own.
    reference : Run
        The same run, undisturbed.
    size : Size
        Of the run.
    """

    def __init__(
        self, submitter: Submitter, reference: Run, size: Size, more: Sequence[str] = ()
    ) -> None:
        self._reference = reference
        self._size = size
        self._locks = submitter.runs_dir.parent / "locks"
        self._shared_memory = _shared_memory()
        words = [*sets(size), f"isolation.lock_dir={self._locks}", *more]
        self.follower: subprocess.Popen[str] | None = submitter.start(words)
        self.hits: list[Hit] = []
        self.folder = submitter.runs_dir.parent
        self._others: list[subprocess.Popen[bytes]] = []  # array tasks and servers started here
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._open: Hit | None = None  # the fault that may end the run, or has
        self._offsets: dict[Path, int] = {}
        self._fits = self._rounds = 0
        self._ask_s = 0.0
        self._ended_attempt = 0
        self.output = ""
        try:
            self.paths = self._find(submitter)
        except BaseException:
            self.close()
            raise

    def _find(self, submitter: Submitter) -> RunPaths:
        def there() -> bool:
            assert self.follower is not None
            if self.follower.poll() is not None:
                raise Lost(f"submit has ended: {self.follower.communicate()[0]}")
            return bool(list(submitter.runs_dir.glob("*/fits.jsonl")))

        if not _eventually(there, _PROGRESS_S):
            raise Lost(f"no fit was done within {_PROGRESS_S:g} s in {submitter.runs_dir}")
        return RunPaths(next(submitter.runs_dir.glob("*/fits.jsonl")).parent)

    # --- what kinds of faults use ---

    def pid(self, role: str) -> int:
        """Return the pid of the server or of an array task; 0 if it does not live."""
        found = run_state.record(self.paths, role)
        pid = int(found.get("pid", 0))
        return pid if alive(pid, found.get("start_ticks")) else 0

    def array_task(self, draws: random.Random) -> int | None:
        """Return the index of an array task that has children; None if none has at the moment."""
        indices = draws.sample(range(ARRAY_TASKS), ARRAY_TASKS)
        return next((index for index in indices if self.children(index)), None)

    def fork_server(self, index: int) -> int:
        """Return the pid of an array task's fork server; 0 if it has none now."""
        parent = self.pid(f"client-{index}")
        for pid in children_of(parent):
            with contextlib.suppress(OSError):
                if b"isolation.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return 0

    def children(self, index: int) -> list[int]:
        """Return the pids of an array task's children."""
        return children_of(self.fork_server(index))

    def start_again(self, index: int, after: int) -> None:
        """Start an array task again once a process is gone, as Slurm does that requeues it."""

        def start() -> None:
            if alive(after):
                self.later(0.05, start)
            elif run_state.read(self.paths)["state"] not in run_state.ENDED:
                self.launch("fedhpc.client", str(index))

        start()

    def launch(self, module: str, *arguments: str) -> None:
        """Start a process of the run beside those of submit."""
        log = self.paths.jobs / f"again-{len(self._others)}.err"
        with log.open("wb") as file:
            command = [sys.executable, "-m", module, str(self.paths.root), *arguments]
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, **JOB_ENV},
            )  # fmt: skip
        self._others.append(process)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something in a while."""
        self._later.append((time.monotonic() + delay_s, action))

    # --- what happens ---

    def survive(self, schedule: Sequence[Fault], kinds: "dict[str, Kind]") -> Outcome:
        """Let the faults happen, see the run to its end, and tell how it came through."""
        start_s = time.monotonic()
        outcome = Outcome(self.paths.root, self.hits)
        try:
            for fault in schedule:
                if not self._hit(fault, kinds[fault.kind]):
                    outcome.missed.append(fault)
            self._until(lambda: False)
            outcome.problems += self._check()
        except Lost as lost:
            outcome.problems.append(str(lost))
        finally:
            outcome.problems += self.close()
        outcome.seconds = time.monotonic() - start_s
        return outcome

    def _hit(self, fault: Fault, kind: "Kind") -> bool:
        """Let one fault happen; return False if the run had ended before its moment."""

        def reached() -> bool:
            if run_state.read(self.paths).get("attempt", 0) <= self._ended_attempt:
                return False  # it has been resumed, and its server is not there yet
            return (self._fits if fault.unit == "fits" else self._rounds) >= fault.after

        if not self._until(reached):
            return False
        draws = random.Random(fault.seed)
        hit = Hit(kind, fault, self._rounds + 1, self._fits, time.monotonic(), "")

        def happens() -> bool:  # again until there is a child to kill, and so on
            hit.at_s = time.monotonic()
            shows = kind.inject(self, draws)
            if shows is not None:
                hit.shows = shows
            return shows is not None

        if not self._until(happens):
            return False
        hit.round, hit.fits = self._rounds + 1, self._fits
        self.hits.append(hit)
        if kind.ends != "never":
            self._open = hit
        if kind.ends == "always":  # it is what the next fault waits for
            self._until(lambda: self._open is None)
        return True

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Watch until a condition holds, resuming the run where a fault has ended it.

        Returns False if the run has finished before.
        """
        last, seen_s = (-1, -1), time.monotonic()
        while True:
            self._look()
            if self._has_ended():
                if run_state.read(self.paths)["state"] == "finished":
                    return False
                self._resume()
            if condition():
                return True
            if last != (self._fits, self._rounds):
                last, seen_s = (self._fits, self._rounds), time.monotonic()
            if time.monotonic() - seen_s > _PROGRESS_S:
                raise Lost(f"nothing happened for {_PROGRESS_S:g} s: {self._standing()}")
            time.sleep(_PAUSE_S)

    def _look(self) -> None:
        """See how far the run is, and whether a fault has been noticed."""
        now_s = time.monotonic()
        for item in [item for item in self._later if item[0] <= now_s]:
            self._later.remove(item)
            item[1]()
        for line in self._new_lines():
            for hit in self.hits:
                if hit.shows and hit.detected_s is None and re.search(hit.shows, line):
                    hit.detected_s = now_s - hit.at_s
        fits = sum(1 for _ in read_lines(self.paths.fits))
        rounds = sum(line["round"] > 0 for line in read_lines(self.paths.metrics))
        if self.hits:  # a server that goes on takes the records back to where it does
            self.hits[-1].fits_redone += max(0, self._fits - fits)
            self.hits[-1].rounds_redone += max(0, self._rounds - rounds)
        self._fits, self._rounds = fits, rounds

    def _new_lines(self) -> list[str]:
        found = []
        for path in self.paths.jobs.glob("*.err"):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offsets[path] = self._offsets.get(path, 0) + len(whole + newline)
            found += whole.decode(errors="replace").splitlines()
        return found

    def _has_ended(self) -> bool:
        ended = run_state.read(self.paths)["state"] in run_state.ENDED
        if ended and self._open and self._open.detected_s is None:
            self._open.detected_s = time.monotonic() - self._open.at_s
        if self.follower is not None:
            return self.follower.poll() is not None
        if not ended and time.monotonic() > self._ask_s:  # `fedhpc status`, by hand
            self._ask_s = time.monotonic() + _ASK_S
            ended = inspection.inspect(self.paths).ended
        return ended and not self._later

    def _resume(self) -> None:
        """Go on with a run that a fault has ended early, as its user would."""
        code = self._end_of_follower()
        status = run_state.read(self.paths)
        self._ended_attempt = latest_attempt(self.paths)
        hit, self._open = self._open, None
        if hit is None:
            raise Lost(f"it ended early, exit code {code}: {self._standing()}\n{self.output}")
        wanted_state, wanted_code = hit.kind.end
        if hit.kind.ends == "always" and status["state"] != wanted_state:
            raise Lost(f"{hit.kind.name}: expected {wanted_state}, found {self._standing()}")
        if code is not None and code != wanted_code and hit.kind.ends == "always":
            raise Lost(f"{hit.kind.name}: expected exit code {wanted_code}, found {code}")
        if not _eventually(lambda: not self._processes(), _GONE_S):
            raise Lost(f"left behind after the early end: {self._processes()}")
        self._reap()
        hit.kind.meanwhile(self, random.Random(f"{hit.fault.seed}/meanwhile"))
        command = [sys.executable, "-m", "fedhpc.submit", "--resume", str(self.paths.root)]
        self.follower = subprocess.Popen(
            [*command, "--follow"], cwd=REPOSITORY, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _end_of_follower(self) -> int | None:
        if self.follower is None:
            return None
        self.output = self.follower.communicate(timeout=20)[0]
        code, self.follower = self.follower.returncode, None
        return code

    def _standing(self) -> str:
        status = run_state.read(self.paths)
        return f"{status['state']} {status['reason']} (round {status.get('round')})"

    # --- the end ---

    def _check(self) -> list[str]:
        """Return what is wrong with a run that has finished."""
        problems = []
        code = self._end_of_follower()
        status = run_state.read(self.paths)
        if code:
            problems.append(f"exit code {code}:\n{self.output}")
        if status["model_sha256"] != self._reference.checksum:
            problems.append("another model")
        lines = list(read_lines(self.paths.fits))
        if failed := [line for line in lines if not line["ok"]]:
            problems.append(f"{len(failed)} fits failed, the first: {failed[0]}")
        fits, wanted = _fits_of(lines), _fits_of(self._reference.fits)
        if fits != wanted:
            problems.append(f"fits.jsonl: missing {wanted - fits}, too many {fits - wanted}")
        rounds = [line["round"] for line in read_lines(self.paths.metrics)]
        if rounds != list(range(self._size.rounds + 1)):
            problems.append(f"metrics.jsonl has rounds {rounds}")
        return problems

    def close(self) -> list[str]:
        """End what is left; return what should not have been left."""
        problems = []
        pending, self._later = self._later, []
        for _, action in pending:
            action()
        self._later.clear()
        if self.follower is not None:
            self.follower.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.output = self.follower.communicate(timeout=_GONE_S)[0]
        if not hasattr(self, "paths"):
            return problems
        if run_state.read(self.paths)["state"] not in run_state.ENDED:  # on Slurm, or unfollowed
            cluster.cancel(self.paths)
        if not _eventually(lambda: not self._processes(), _GONE_S):
            problems.append(f"processes left behind: {self._processes()}")
            for line in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGKILL)
        self._reap()
        if held := _held_locks(self._locks):
            problems.append(f"slot locks held: {held}")
        if not _eventually(lambda: not _shared_memory() - self._shared_memory, 5):
            problems.append(f"in /dev/shm: {_shared_memory() - self._shared_memory}")
        if self.paths.secrets.exists() and run_state.read(self.paths)["state"] == "finished":
            problems.append("the keys of the run are still there")
        return problems

    def _processes(self) -> list[str]:
        self._reap()
        return processes_of(self.paths)

    def _reap(self) -> None:
        for process in self._others:
            process.poll()


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int, start_ticks: int | None = None) -> bool:
    """Return whether a process lives, and is the one that started then."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and start_ticks in (None, int(fields[19]))


def _fits_of(lines: list[dict[str, Any]]) -> Counter[tuple[int, int, str]]:
    return Counter((line["round"], line["client"], line["verb"]) for line in lines if line["ok"])


def _held_locks(folder: Path) -> list[str]:
    held = []
    for path in folder.glob("*"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(f"{path.name} {read_json(path)}")
    return held


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*")}


def _eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
