"""Where randomness comes from: the run's seed and what is being done, never who does it or when."""

import hashlib
import os
import random
import sys

import numpy as np


def derive(seed: int, *what: object) -> int:
    """Return a 63-bit seed for one purpose.

    Parameters
    ----------
    seed : int
        Of the run.
    *what
        The purpose, e.g. round, client id and verb.
    """
    text = ":".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_all(seed: int) -> None:
    """Seed `random`, numpy's global generator, and torch where it is loaded."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (Flower draws its noise from this one)
    if torch := sys.modules.get("torch"):
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # What notes the call's stack for a GPU that may be used later reads the sources of all
            # modules on it: 3.6 ms in a fresh process.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
