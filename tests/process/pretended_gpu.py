"""What children call that shall believe they use a GPU: only the standard library."""

from pathlib import Path

from entries import entry

from fedhpc.isolation import cuda


def make_context(marker: str) -> None:
    """Look like an app whose import makes a context, and takes its time."""
    cuda.is_initialised = lambda: True
    cuda.begin = lambda: None
    cuda.held_bytes = lambda: (0, 0)
    if marker:
        Path(marker).touch()


@entry
def fail() -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")
