"""Logging of the server and client processes: to standard error, which Slurm keeps per attempt."""

import logging
import os


def set_up(role: str) -> None:
    """Log to standard error, each line with time and role; FEDHPC_LOG_LEVEL sets the level."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s %(message)s"))
    root = logging.getLogger("fedhpc")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(os.environ.get("FEDHPC_LOG_LEVEL", "INFO").upper())
    # Flower asks its makers' server by default; compute nodes have no internet.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
