"""What happened in a run, as it happens: metrics.jsonl, fits.jsonl and errors/."""

import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedhpc import files
from fedhpc.errors import PlatformError, Superseded
from fedhpc.federation.breakdown import OF_FIT, PHASES, USES, SlotAccount, SlotSeconds, Stopwatch
from fedhpc.federation.cohort import Streaks
from fedhpc.federation.transport import Response
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)

_SAID = 20  # clients that fail again and again, in status.json


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    round : int
        The one that runs now; 0 before the first.
    num_rounds : int
        Of the run; 0 if the app does not say.
    fits_done, fits_total : int
        Of the messages sent last.
    fits_failed, fits_late, fits_cancelled : int
        Over the whole run.
    verb : str
        What the clients do: train, evaluate, ...
    metrics : dict
        The latest of the server's evaluation, or of the clients'.
    round_s : float
        Mean wall time of the finished rounds, in seconds.
    failing : list of str
        A line for each client that fails again and again.
    """

    round: int = 0
    num_rounds: int = 0
    fits_done: int = 0
    fits_total: int = 0
    fits_failed: int = 0
    fits_late: int = 0
    fits_cancelled: int = 0
    verb: str = ""
    metrics: dict[str, Any] | None = None
    round_s: float = 0.0
    failing: list[str] = field(default_factory=list)


class Recorder:
    """The only writer of metrics.jsonl and fits.jsonl.

    Parameters
    ----------
    paths : RunPaths
        Of the run.

    Attributes
    ----------
    watch : Stopwatch
        Of the thread that runs the rounds.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._progress = Progress()
        self._start_s = time.monotonic()
        self.watch = Stopwatch()
        self._slots = SlotAccount()
        self._lines: list[dict[str, Any]] = []
        self._written_s = 0.0
        self._rounds_done = 0
        self._has_sent = False
        self.last_failure = ""
        self.streaks = Streaks()

    def progress(self) -> dict[str, Any]:
        """Return how far the run is."""
        with self._lock:
            return asdict(self._progress)

    def mark(self) -> dict[str, Any]:
        """Return where the records are now, for a server that will go on from here."""
        return {
            "metrics": _size(self._paths.metrics),
            "fits": _size(self._paths.fits),
            "elapsed_s": time.monotonic() - self._start_s,
            "rounds_done": self._rounds_done,
            "progress": self.progress(),
        }

    def go_on_from(self, mark: dict[str, Any]) -> None:
        """Forget the records that came after a mark."""
        for path, size in (
            (self._paths.metrics, mark["metrics"]),
            (self._paths.fits, mark["fits"]),
        ):
            if _size(path) > size:
                os.truncate(path, size)
        self._start_s = time.monotonic() - mark["elapsed_s"]
        self._rounds_done = mark["rounds_done"]
        with self._lock:
            self._progress = Progress(**mark["progress"])

    def rounds_begin(self, num_rounds: int, slots: SlotSeconds) -> None:
        """Note how many rounds there will be, and what slots have done before the first of them."""
        self.watch.lap()
        self._slots.lap(slots)
        with self._lock:
            self._progress.num_rounds = num_rounds

    def round_begins(self, server_round: int) -> None:
        """Note the round that begins."""
        with self._lock:
            self._progress.round = server_round

    @property
    def has_sent(self) -> bool:
        """Whether messages went out in this attempt."""
        return self._has_sent

    def sent(self, verb: str, server_round: int, count: int) -> None:
        """Note that messages went out."""
        with self._lock:
            self._has_sent = True
            progress = self._progress
            progress.verb, progress.fits_total, progress.fits_done = verb, count, 0
            progress.round = max(progress.round, server_round)

    def fit_ended(
        self,
        response: Response,
        server_round: int,
        client_id: int,
        verb: str,
        *,
        tries: int = 1,
        late: bool = False,
        refused: bool = False,
    ) -> None:
        """Note the line of a fit, and write the file of its failure if it failed.

        `write_fits` writes the line.

        Parameters
        ----------
        response : Response
            How it ended.
        server_round, client_id, verb
            What it was for.
        tries : int
            Which try this was.
        late : bool
            Whether nobody waited for it any more.
        refused : bool
            Whether the fit, which has a line already, has failed after all.
        """
        line: dict[str, Any] = {
            "round": server_round,
            "client": client_id,
            "verb": verb,
            "ok": response.failure is None,
            "array_task": response.array_task,
            "host": response.host,
            "time_s": round(time.monotonic() - self._start_s, 3),
        }
        if tries > 1 or response.failure is not None:
            line["try"] = tries
        if late:
            line["late"] = True
        if fit := response.fit:
            for name in ("slot", "wait_s", "start_s", "run_s", "return_s", "peak_rss_mb"):
                line[name] = round(getattr(fit, name), 4)
            if response.failure is None and not late:
                told = {use: line[f"{use}_s"] for use in OF_FIT}
                line["link_s"] = round(self._slots.add(response.held_s, told), 4)
            line["late_imports"] = list(fit.late_imports)
            if fit.gpu:
                line["gpu"] = fit.gpu
            for name in ("gpu_before_mb", "gpu_peak_mb"):
                if fit.HasField(name):
                    line[name] = getattr(fit, name)
            if fit.out_of_memory:
                line["out_of_memory"] = True
            if fit.replaced:
                line["replaced"] = fit.replaced
        if response.failure is not None:
            line["reason"] = response.failure.reason
            self.last_failure = f"client {client_id}: {response.failure.reason}"
            self._write_error(response, line, tries)
        self._lines.append(line)
        with self._lock:
            self._progress.fits_done += not refused
            self._progress.fits_failed += response.failure is not None

    def write_fits(self, patience_s: float | None = None, *, every_s: float = 0.0) -> None:
        """Write the lines of fits that were noted since the last time.

        Parameters
        ----------
        patience_s : float, optional
            See `files.persist`.
        every_s : float
            Nothing is written if the last time was less than this ago.
        """
        now_s = time.monotonic()
        if self._lines and now_s >= self._written_s + every_s:
            # Forgotten first: a signal to leave may come when they are written, and none is twice.
            lines, self._lines = self._lines, []
            files.append_line(self._paths.fits, *lines, patience_s=patience_s)
            self._written_s = now_s

    def decided(self, count: int) -> None:
        """Note of how many messages sent last it is decided what their fits end with."""
        with self._lock:
            self._progress.fits_done = count

    def closed(self, *, late: int, cancelled: int) -> None:
        """Note that a cohort is answered, and how many results nobody waited for."""
        with self._lock:
            self._progress.fits_late += late
            self._progress.fits_cancelled += cancelled
            self._progress.failing = self.streaks.said()[:_SAID]

    def lap(self, slots: SlotSeconds) -> dict[str, Any]:
        """Return what the line of a round that ends now says of its time, since the one before.

        Parameters
        ----------
        slots : SlotSeconds
            What slots have done so far.
        """
        seconds = self.watch.lap()
        uses = self._slots.lap(slots)
        return {
            "time_s": round(time.monotonic() - self._start_s, 3),
            "round_s": round(sum(seconds.values()), 4),
            "seconds": _rounded(seconds, PHASES),
            **({"slot_seconds": _rounded(uses, USES)} if uses else {}),
        }

    def round_ended(self, server_round: int, line: dict[str, Any], lap: dict[str, Any]) -> None:
        """Write the line of a round.

        Parameters
        ----------
        server_round : int
            Which.
        line : dict
            What happened in it.
        lap : dict
            Where its time went: see `lap`.
        """
        start = {name: lap[name] for name in ("time_s", "round_s")}
        files.append_line(self._paths.metrics, {"round": server_round, **start, **line, **lap})
        with self._lock:
            progress = self._progress
            if server_round > 0:
                self._rounds_done += 1
                progress.round_s += (lap["round_s"] - progress.round_s) / self._rounds_done
            metrics = line.get("evaluate") or line.get("evaluate_clients")
            if metrics:
                progress.metrics = {
                    key: value for key, value in metrics.items() if isinstance(value, int | float)
                }

    def _write_error(self, response: Response, line: dict[str, Any], tries: int) -> None:
        failure = response.failure
        assert failure is not None  # noqa: S101
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        text = (
            f"{stamp} round {line['round']} client {line['client']} {line['verb']}"
            f" on array task {line['array_task']} ({line['host']})\n"
            f"{failure.reason}\n\n{failure.traceback}"
        )
        path = self._paths.error(response.message_id, tries)
        try:
            files.write_atomic(path, text, patience_s=0.0)
        except Superseded:
            raise
        except PlatformError as error:  # the run does not depend on it; a person may
            logger.warning("%s; it was to say:\n%s", error.message, text)


def _rounded(seconds: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: round(seconds.get(name, 0.0), 4) for name in names}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
