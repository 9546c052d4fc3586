"""How much GPU memory fits of one kind needed, learned from those before."""

import contextlib
import hashlib
import json
import threading
import time
from pathlib import Path

from fedhpc import files
from fedhpc.errors import PlatformError
from fedhpc.isolation.admission import Need

_MARGIN = 1.1
_MORE_BYTES = 256_000_000
_FRESH_S = 1.0  # fits that wait ask often, and the folder may be on a network disk


class Peaks:
    """What fits needed so far, kept in a folder that several processes may share.

    Two that learn at the same moment may lose what one of them learned; the next fit finds it.

    Parameters
    ----------
    folder : Path
        Made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, int, int]] = {}  # when it was read, and what

    def need(self, kind: str) -> Need | None:
        """Return what a fit of a kind needs: the highest peak so far and more; None: no idea.

        Parameters
        ----------
        kind : str
            What makes fits alike: app, verb, batch size.
        """
        peak, context = self._read(kind)
        if not peak:
            return None
        total = int(_MARGIN * peak) + _MORE_BYTES
        if context:
            return Need(total, context, least_bytes=peak)
        usual = Need(0).context_bytes
        return Need(total + usual, usual, least_bytes=peak)

    def note(self, kind: str, peak_bytes: int, context_bytes: int | None) -> None:
        """Note what a fit used: all of it, and of this its context.

        Where that is not known, the peak is torch's alone, and `need` adds a usual context.

        Raises
        ------
        PlatformError
            If the disk refuses it.
        """
        with self._lock:
            peak, context = self._read(kind)
            if peak_bytes <= peak:
                return
            record = {
                "kind": kind,
                "peak_bytes": peak_bytes,
                "context_bytes": max(context, context_bytes or 0),
            }
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlatformError(
                    f"could not make {self._folder}: {error.strerror}", "check the disk"
                ) from error
            files.write_atomic(self._file(kind), json.dumps(record), patience_s=0.0)
            self._known.pop(kind, None)

    def _read(self, kind: str) -> tuple[int, int]:
        read_s, peak, context = self._known.get(kind, (-_FRESH_S, 0, 0))
        if time.monotonic() < read_s + _FRESH_S:
            return peak, context
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file(kind).read_text())
            peak, context = int(record["peak_bytes"]), int(record["context_bytes"])
        self._known[kind] = time.monotonic(), peak, context
        return peak, context

    def _file(self, kind: str) -> Path:
        return self._folder / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"
