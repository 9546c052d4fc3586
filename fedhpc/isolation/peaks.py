"""How much GPU memory fits of one kind needed, learned from those before."""

import contextlib
import hashlib
import json
import threading
from pathlib import Path

from fedhpc import files
from fedhpc.isolation.admission import Need

_MARGIN = 1.1
_MORE_BYTES = 256_000_000


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

    def need(self, kind: str) -> Need | None:
        """Return what a fit of a kind needs: the highest peak so far and a tenth; None: no idea.

        Parameters
        ----------
        kind : str
            What makes fits alike: app, verb, batch size.
        """
        peak, context = self._read(kind)
        if not peak:
            return None
        total = int(_MARGIN * peak) + _MORE_BYTES
        return Need(total, context) if context else Need(total)

    def note(self, kind: str, peak_bytes: int, context_bytes: int | None) -> None:
        """Note what a fit used: all of it, and of this its context, if that is known.

        Without that the peak is torch's alone, and a usual context is added.
        """
        if context_bytes is None:
            peak_bytes += Need(0).context_bytes
        with self._lock:
            peak, context = self._read(kind)
            if peak_bytes <= peak:
                return
            record = {
                "kind": kind,
                "peak_bytes": peak_bytes,
                "context_bytes": max(context, context_bytes or 0),
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_atomic(self._file(kind), json.dumps(record))

    def _read(self, kind: str) -> tuple[int, int]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file(kind).read_text())
            return int(record["peak_bytes"]), int(record["context_bytes"])
        return 0, 0

    def _file(self, kind: str) -> Path:
        return self._folder / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"
