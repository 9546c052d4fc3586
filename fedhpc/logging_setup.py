"""Logging of the server and client processes: to standard error, which Slurm keeps per attempt."""

import atexit
import logging
import os
import queue
import threading
from logging.handlers import QueueHandler

_DRAIN_S = 30.0


def set_up(role: str) -> None:
    """Log to standard error, each line with time and role; FEDHPC_LOG_LEVEL sets the level.

    The log is a file of the run folder. A thread of its own writes it, so that a disk that stalls
    does not stall the links.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s %(message)s"))
    lines: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()

    def write() -> None:
        while (record := lines.get()) is not None:
            handler.handle(record)

    def drain() -> None:
        lines.put(None)
        writer.join(_DRAIN_S)

    writer = threading.Thread(target=write, name="log", daemon=True)
    writer.start()
    atexit.register(drain)
    root = logging.getLogger("fedhpc")
    root.handlers = [QueueHandler(lines)]
    root.propagate = False
    root.setLevel(os.environ.get("FEDHPC_LOG_LEVEL", "INFO").upper())
    # Flower asks its makers' server by default; compute nodes have no internet.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
