"""Checkpoints: what a run needs to go on after a round, in a folder each.

A folder is written beside, synced and moved into place, by a thread of its own while the next
round runs. It holds the global model as a safetensors file, the rest as JSON and bytes, and
SHA256SUMS, which ``sha256sum -c`` reads too. Nothing in it is a pickle.
"""

import functools
import hashlib
import json
import logging
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from fedhpc import files
from fedhpc.config import Checkpoints as Settings
from fedhpc.errors import CheckpointError, PlatformError
from fedhpc.federation import compat, plain
from fedhpc.federation.payload import BytesLike, decode_arrays, encode_arrays
from fedhpc.federation.plain import Encoded
from fedhpc.paths import RunPaths, checkpointed_rounds, latest_attempt

logger = logging.getLogger(__name__)

_FORMAT = 2
_MODEL, _REST, _BUFFERS, _SUMS = "model.safetensors", "state.json", "state.bin", "SHA256SUMS"
_SAVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes
    ----------
    server_round : int
        The last one that is done.
    arrays : ArrayRecord
        The global model after it.
    parts : dict
        The rest, by name: strategy, history, ...
    state_files : frozenset of str
        Names of files of client states that it refers to.
    metrics : dict
        What the best checkpoint is chosen by.
    """

    server_round: int
    arrays: ArrayRecord = field(repr=False)
    parts: dict[str, Encoded] = field(repr=False)
    state_files: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of a run.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    settings : Checkpoints
        Section of the config.
    attempt : int
        Of this server: one with a lower attempt than the latest writes nothing.
    """

    def __init__(self, paths: RunPaths, settings: Settings, attempt: int) -> None:
        self._paths = paths
        self._settings = settings
        self._attempt = attempt
        self._lock = threading.Lock()
        self._state_files: dict[int, frozenset[str]] = {}
        self._best: tuple[float, int] | None = None
        self._damaged: set[int] = set()
        self._latest: Checkpoint | None = None  # not written
        self._written_round: int | None = None
        self._error: PlatformError | None = None
        self._jobs: queue.Queue[Checkpoint | None] = queue.Queue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None

    @property
    def last_round(self) -> int | None:
        """The round of the newest checkpoint that is on disk; None if there is none."""
        return self._written_round

    # --- reading ---

    def load_newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; None if there is none at all.

        Raises
        ------
        CheckpointError
            If there are checkpoints, and every one is damaged.
        """
        for left in self._paths.checkpoints.glob(".*.tmp"):  # of servers that were killed
            shutil.rmtree(left, ignore_errors=True)
        problems = []
        newest: Checkpoint | None = None
        for server_round in reversed(checkpointed_rounds(self._paths)):
            if newest is not None:
                self._note(server_round, *_glance(self._paths.checkpoint(server_round)))
                continue
            folder = self._paths.checkpoint(server_round)
            try:
                look = functools.partial(read, self._paths, server_round)
                newest = files.persist(look, f"read {folder}")
            except (CheckpointError, PlatformError) as error:
                problems.append(error.message)
                self._damaged.add(server_round)
                logger.error("%s; the checkpoint before it is used", error.message)
                continue
            self._note(server_round, newest.state_files, newest.metrics)
            self._written_round = server_round
        if newest is None and problems:
            raise CheckpointError(
                f"wanted a checkpoint to go on from, found only damaged ones: {problems[0]}",
                f"remove {self._paths.checkpoints} to begin at round 1 again",
            )
        return newest

    def refers_to(self, state_file: str) -> bool:
        """Return whether a checkpoint needs a file of a client's state."""
        latest = self._latest
        with self._lock:
            return (latest is not None and state_file in latest.state_files) or any(
                state_file in names for names in self._state_files.values()
            )

    # --- writing ---

    def save(self, checkpoint: Checkpoint, *, due: bool) -> None:
        """Note a checkpoint; write it beside the next round if it is ``due``.

        Raises
        ------
        PlatformError
            If the one before could not be written.
        """
        self._check()
        if not due:
            self._latest = checkpoint
            return
        self.wait()
        self._begin(checkpoint)
        self._latest = None

    def wait(self) -> None:
        """Wait until the checkpoint before is on disk.

        Raises
        ------
        PlatformError
            If it could not be written, or takes too long.
        """
        if not self._idle.wait(_SAVE_TIMEOUT_S):
            raise PlatformError(
                f"a checkpoint was not written within {_SAVE_TIMEOUT_S:.0f} s to"
                f" {self._paths.checkpoints}",
                "the disk of the run folder is too slow or hangs",
            )
        self._check()

    def close(self, timeout_s: float = _SAVE_TIMEOUT_S) -> None:
        """Write the last checkpoint, due or not, and stop.

        Raises
        ------
        PlatformError
            If that fails, or takes longer than ``timeout_s`` seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        latest = self._latest  # until it is written its files are needed
        in_time = self._idle.wait(timeout_s)
        if latest is not None and in_time and self._error is None:
            self._begin(latest)
            self._latest = None
        in_time = in_time and self._idle.wait(max(0.0, deadline_s - time.monotonic()))
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
            self._thread = None
        self._check()
        if not in_time:
            raise PlatformError(f"the last checkpoint was not written within {timeout_s:.0f} s")

    def _begin(self, checkpoint: Checkpoint) -> None:
        with self._lock:  # from now on its files are needed
            self._state_files[checkpoint.server_round] = checkpoint.state_files
        self._idle.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        self._jobs.put(checkpoint)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (checkpoint := self._jobs.get()) is not None:
            what = f"write a checkpoint to {self._paths.checkpoints}"
            try:
                files.persist(functools.partial(self._write, checkpoint), what)
            except PlatformError as error:
                self._error = error
            except Exception as error:
                logger.exception("a checkpoint could not be written")
                self._error = PlatformError(f"could not write a checkpoint: {error}")
            finally:
                self._idle.set()

    def _write(self, checkpoint: Checkpoint) -> None:
        target = self._paths.checkpoint(checkpoint.server_round)
        beside = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            _write_files(beside, checkpoint)
            if latest_attempt(self._paths) > self._attempt:
                return  # another server runs this run now
            if target.exists():  # a damaged one, or one of a run that is done again from before
                shutil.rmtree(target)
            beside.rename(target)
            _sync(self._paths.checkpoints)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._note(checkpoint.server_round, checkpoint.state_files, checkpoint.metrics)
        self._written_round = checkpoint.server_round
        self._damaged.discard(checkpoint.server_round)
        self._prune(checkpoint.server_round)

    def _note(
        self, server_round: int, state_files: frozenset[str], metrics: dict[str, float]
    ) -> None:
        with self._lock:
            self._state_files[server_round] = state_files
        value = metrics.get(self._settings.best_metric or "", math.nan)
        rank = value if self._settings.best_mode == "max" else -value
        if not math.isnan(rank) and (self._best is None or rank > self._best[0]):
            self._best = rank, server_round

    def _prune(self, newest: int) -> None:
        """Remove what is neither among the last nor the best; those after ``newest`` are void."""
        there = checkpointed_rounds(self._paths)
        rounds = [n for n in there if n <= newest and n not in self._damaged]
        kept = set(rounds[-self._settings.keep :])
        if self._best is not None and self._best[1] in rounds:
            kept.add(self._best[1])
            self._link_best(self._best[1])
        for server_round in set(there) - kept:
            shutil.rmtree(self._paths.checkpoint(server_round), ignore_errors=True)
            with self._lock:
                self._state_files.pop(server_round, None)

    def _link_best(self, server_round: int) -> None:
        link = self._paths.best_checkpoint
        name = self._paths.checkpoint(server_round).name
        if not link.is_symlink() or os.readlink(link) != name:  # noqa: PTH115
            beside = link.with_name(f".best.{os.getpid()}.tmp")
            beside.unlink(missing_ok=True)
            beside.symlink_to(name)
            beside.replace(link)


def read(paths: RunPaths, server_round: int) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    CheckpointError
        If it is not whole.
    OSError
        If the disk does not tell.
    """
    folder = paths.checkpoint(server_round)
    try:
        model, rest, buffers = _read_files(folder)
        value = json.loads(bytes(rest))
        if value["format"] != _FORMAT:
            raise CheckpointError(f"{folder} has format {value['format']}, expected {_FORMAT}")
        parts = {
            name: Encoded(part["plain"], [buffers[start:end] for start, end in part["buffers"]])
            for name, part in value["parts"].items()
        }
        skeleton = compat.records_from_bytes(plain.decode(parts.pop("skeleton")))
        arrays = decode_arrays(skeleton.array_records["arrays"], model)
        state_files = frozenset(value["state_files"])
        for name in state_files:
            if files.sha256(paths.states / name) != RunPaths.digest_of_state(name):
                raise CheckpointError(
                    f"{folder} is damaged: {paths.states / name} does not have its checksum"
                )
        return Checkpoint(value["round"], arrays, parts, state_files, value["metrics"])
    except OSError as error:
        if files.is_of_disk(error):
            raise  # it may be whole
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError) as error:  # the sums are right: another program's
        raise CheckpointError(f"{folder} is not a checkpoint: {error!r}") from error


def _glance(folder: Path) -> tuple[frozenset[str], dict[str, float]]:
    """Return which files a checkpoint refers to, and its metrics, as far as it can be read."""
    value = files.read_json(folder / _REST)
    if not isinstance(value, dict):
        return frozenset(), {}
    return frozenset(value.get("state_files", ())), dict(value.get("metrics", {}))


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    model = encode_arrays(checkpoint.arrays)
    skeleton = compat.skeleton_to_bytes(checkpoint.arrays)
    described: dict[str, Any] = {}
    parts: list[BytesLike] = []
    offset = 0
    for name, part in {**checkpoint.parts, "skeleton": plain.encode(skeleton)}.items():
        places = []
        for buffer in part.buffers:
            places.append((offset, offset + len(buffer)))
            parts.append(buffer)
            offset += len(buffer)
        described[name] = {"plain": part.plain, "buffers": places}
    rest = json.dumps(
        {
            "format": _FORMAT,
            "round": checkpoint.server_round,
            "metrics": checkpoint.metrics,
            "state_files": sorted(checkpoint.state_files),
            "parts": described,
        }
    ).encode()
    contents: dict[str, list[BytesLike]] = {_MODEL: model.parts, _REST: [rest], _BUFFERS: parts}
    for name, content in contents.items():
        _write_file(folder / name, content)
    sums = {_MODEL: model.digest, _REST: _sha256([rest]), _BUFFERS: _sha256(parts)}
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    _write_file(folder / _SUMS, [text.encode()])
    _sync(folder)


def _read_files(folder: Path) -> list[memoryview]:
    """Return the contents of the model's file and the two others, once their sums are right."""
    lines = (folder / _SUMS).read_text().splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    found = []
    for name in (_MODEL, _REST, _BUFFERS):
        data = (folder / name).read_bytes()
        if sums.get(name) != hashlib.sha256(data).hexdigest():
            raise CheckpointError(f"{folder} is damaged: {name} does not have its checksum")
        found.append(memoryview(data))
    return found


def _write_file(path: Path, parts: Sequence[BytesLike]) -> None:
    with path.open("xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sha256(parts: Sequence[BytesLike]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
