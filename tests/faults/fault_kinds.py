"""The kinds of faults on one machine: what each does, and what shows that it was noticed."""

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disturbed_run import LIVENESS_S, DisturbedRun, alive

from fedhpc import run_state
from fedhpc.files import read_json, write_json
from fedhpc.paths import checkpointed_rounds

# Does it, and returns the pattern of the log line that shows it ("" if none does); None if there is
# nothing to do it to at the moment, e.g. no child to kill.
Inject = Callable[[DisturbedRun, random.Random], str | None]
Meanwhile = Callable[[DisturbedRun, random.Random], None]

SHORT_S, LONG_S = LIVENESS_S / 3, 2 * LIVENESS_S
FULL_S = 4.0
_KILLED_SERVER = ("failed", 1)
_RUNS_AGAIN = "it runs again|fork server ended"


def _nothing(_run: DisturbedRun, _draws: random.Random) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes
    ----------
    name : str
        As in tables and on the command line.
    text : str
        What it does.
    inject : callable
        Does it.
    ends : str
        Whether the run ends early and has to be resumed: always, perhaps or never.
    end : tuple
        State and exit code of such an end.
    meanwhile : callable
        What happens before the run is resumed.
    disk : bool
        Whether the run folder must be on a small disk of its own.
    """

    name: str
    text: str
    inject: Inject
    ends: Literal["always", "perhaps", "never"] = "never"
    end: tuple[str, int] = _KILLED_SERVER
    meanwhile: Meanwhile = _nothing
    disk: bool = False


def _signal(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(ProcessLookupError):  # a child that has just ended
        if pid:
            os.kill(pid, number)
            return True
    return False


# --- processes are killed ---


def _kill_child(run: DisturbedRun, draws: random.Random) -> str | None:
    index = run.array_task(draws)
    pids = run.children(index) if index is not None else []
    # A child that waits in reserve is replaced without a word.
    pids = [pid for pid in pids if _is_at_work(pid)]
    return _RUNS_AGAIN if pids and _signal(draws.choice(pids), signal.SIGKILL) else None


def _is_at_work(pid: int) -> bool:
    """Return whether a child holds a slot: it has a file of the lock folder open."""
    with contextlib.suppress(OSError):
        return any(".gate" not in str(link) and "/locks/" in str(link) for link in _files_of(pid))
    return False


def _files_of(pid: int) -> list[Path]:
    return [entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()]


def _kill_fork_server(run: DisturbedRun, draws: random.Random) -> str | None:
    index = run.array_task(draws)
    if index is None:
        return None
    return _RUNS_AGAIN if _signal(run.fork_server(index), signal.SIGKILL) else None


def _end_array_task(number: signal.Signals) -> Inject:
    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        index = run.array_task(draws)
        if index is None or not _signal(pid := run.pid(f"client-{index}"), number):
            return None
        run.start_again(index, pid)
        return f"array task {index} is gone"

    return inject


def _end_server(number: signal.Signals) -> Inject:
    def inject(run: DisturbedRun, _draws: random.Random) -> str | None:
        return "" if _signal(run.pid("server"), number) else None

    return inject


def _kill_submit(run: DisturbedRun, _draws: random.Random) -> str | None:
    if run.follower is not None:
        run.follower.kill()
        run.follower.communicate(timeout=10)
        run.follower = None  # the run is on its own
    return ""


# --- processes stand still ---


def _stop(run: DisturbedRun, pid: int, seconds: float) -> bool:
    if not _signal(pid, signal.SIGSTOP):
        return False
    run.later(seconds, lambda: alive(pid) and _signal(pid, signal.SIGCONT))
    return True


def _stop_child(seconds: float) -> Inject:
    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        index = run.array_task(draws)
        pids = [pid for pid in run.children(index) if _is_at_work(pid)] if index is not None else []
        return "" if pids and _stop(run, draws.choice(pids), seconds) else None

    return inject


def _stop_array_task(seconds: float) -> Inject:
    def inject(run: DisturbedRun, draws: random.Random) -> str | None:
        index = run.array_task(draws)
        if index is None or not _stop(run, run.pid(f"client-{index}"), seconds):
            return None
        return f"array task {index} is gone" if seconds > LIVENESS_S else ""

    return inject


def _stop_server(seconds: float) -> Inject:
    def inject(run: DisturbedRun, _draws: random.Random) -> str | None:
        if not _stop(run, run.pid("server"), seconds):
            return None
        return r"client-\d+ WARNING" if seconds > LIVENESS_S else ""

    return inject


# --- files go wrong ---


def _newest_file(run: DisturbedRun, draws: random.Random) -> Path | None:
    """Return a file of the newest checkpoint; None if there is no other one to go on from."""
    rounds = checkpointed_rounds(run.paths)
    if len(rounds) < 2:
        return None
    files = [path for path in run.paths.checkpoint(rounds[-1]).iterdir() if path.stat().st_size]
    return draws.choice(sorted(files))


def _kill_server_with_two_checkpoints(run: DisturbedRun, draws: random.Random) -> str | None:
    if _newest_file(run, draws) is None:
        return None
    return "" if _signal(run.pid("server"), signal.SIGKILL) else None


def _flip_byte(run: DisturbedRun, draws: random.Random) -> None:
    if path := _newest_file(run, draws):
        data = bytearray(path.read_bytes())
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(data)


def _truncate(run: DisturbedRun, draws: random.Random) -> None:
    if path := _newest_file(run, draws):
        os.truncate(path, draws.randrange(path.stat().st_size))


def _remove_file(run: DisturbedRun, draws: random.Random) -> None:
    if path := _newest_file(run, draws):
        path.unlink()


def _delete_rendezvous(run: DisturbedRun, _draws: random.Random) -> str | None:
    run.paths.rendezvous.unlink(missing_ok=True)
    return ""


def _put_back_stale_files(run: DisturbedRun, _draws: random.Random) -> None:
    """What a disk still shows of the attempt before: the address of a server that is gone."""
    stale = read_json(run.paths.rendezvous)
    status = run_state.read(run.paths)
    write_json(run.paths.status, {**status, "state": "running", "reason": ""})

    def put_back() -> None:
        """Show the old address again, from the removal by submit until the new server comes."""
        found = read_json(run.paths.rendezvous)
        if found is None:
            write_json(run.paths.rendezvous, stale)
        elif found != stale:
            return
        if run.follower is None or run.follower.poll() is None:
            run.later(0.0, put_back)

    if stale is not None:
        put_back()


def _second_server(run: DisturbedRun, _draws: random.Random) -> str | None:
    run.launch("fedhpc.server")
    return "a server with a higher attempt has come"


# --- the disk is full ---


def _fill_disk(run: DisturbedRun) -> Path:
    filler = run.folder / "runs" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def _full_for_a_while(run: DisturbedRun, _draws: random.Random) -> str | None:
    filler = _fill_disk(run)
    run.later(FULL_S, lambda: filler.unlink(missing_ok=True))
    return "No space left on device|quota"


def _full(run: DisturbedRun, _draws: random.Random) -> str | None:
    _fill_disk(run)
    return "No space left on device|quota"


def _free_disk(run: DisturbedRun, _draws: random.Random) -> None:
    (run.folder / "runs" / "filler").unlink(missing_ok=True)


_TERM, _KILL = signal.SIGTERM, signal.SIGKILL
LOCAL = {
    kind.name: kind
    for kind in (
        Kind("child-killed", "kill -9 of a child in the middle of a fit", _kill_child),
        Kind("fork-server-killed", "kill -9 of a fork server, with all its children",
             _kill_fork_server),
        Kind("array-task-killed", "kill -9 of an array task; it is started again, as Slurm does",
             _end_array_task(_KILL)),
        Kind("array-task-terminated", "SIGTERM of an array task; it is started again",
             _end_array_task(_TERM)),
        Kind("server-killed", "kill -9 of the server; resumed", _end_server(_KILL), "always"),
        Kind("server-terminated", "SIGTERM of the server; resumed", _end_server(_TERM), "always",
             ("cancelled", 128 + _TERM)),
        Kind("submit-killed", "kill -9 of submit, which follows the run", _kill_submit),
        Kind("child-stopped", f"SIGSTOP of a child, for {LONG_S:g} s", _stop_child(LONG_S)),
        Kind("array-task-paused", f"SIGSTOP of an array task, for {SHORT_S:g} s",
             _stop_array_task(SHORT_S)),
        Kind("array-task-stopped", f"SIGSTOP of an array task, for {LONG_S:g} s, twice"
             " cluster.liveness_timeout_s", _stop_array_task(LONG_S)),
        Kind("server-paused", f"SIGSTOP of the server, for {SHORT_S:g} s", _stop_server(SHORT_S)),
        Kind("server-stopped", f"SIGSTOP of the server, for {LONG_S:g} s, twice"
             " cluster.liveness_timeout_s", _stop_server(LONG_S)),
        Kind("checkpoint-flipped", "kill -9 of the server, and a bit of its newest checkpoint"
             " flips; resumed", _kill_server_with_two_checkpoints, "always", meanwhile=_flip_byte),
        Kind("checkpoint-truncated", "kill -9 of the server, and a file of its newest checkpoint is"
             " cut off; resumed", _kill_server_with_two_checkpoints, "always", meanwhile=_truncate),
        Kind("checkpoint-incomplete", "kill -9 of the server, and a file of its newest checkpoint"
             " is gone; resumed", _kill_server_with_two_checkpoints, "always",
             meanwhile=_remove_file),
        Kind("rendezvous-deleted", "rendezvous.json is deleted", _delete_rendezvous),
        Kind("rendezvous-stale", "kill -9 of the server; resumed while rendezvous.json and"
             " status.json are those of the attempt before", _end_server(_KILL), "always",
             meanwhile=_put_back_stale_files),
        Kind("second-server", "another server is started for the same run folder", _second_server),
        Kind("disk-full-for-a-while", f"the disk of the run folder is full for {FULL_S:g} s;"
             " resumed if that has ended the run", _full_for_a_while, "perhaps", ("failed", 75),
             _free_disk, disk=True),
        Kind("disk-full", "the disk of the run folder is full until the run has ended; resumed",
             _full, "always", ("failed", 75), _free_disk, disk=True),
    )
}  # fmt: skip


def available() -> list[str]:
    """Return the names of the kinds that this machine can have."""
    small_disks = not os.geteuid() and shutil.which("mount") is not None
    return [kind.name for kind in LOCAL.values() if small_disks or not kind.disk]
