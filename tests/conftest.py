"""What all tests share: the closing word about what was left out.

Only the standard library and pytest: tests/gpu run where hardly more is installed.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ON_GPU = pytest.StashKey[str]()  # why tests on a GPU were left out; "" if they were not


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests on a GPU where there is none."""
    on_gpu = {item for item in items if item.get_closest_marker("gpu")}
    if not on_gpu:
        return
    config.stash[ON_GPU] = without_gpu()
    if config.stash[ON_GPU]:
        config.hook.pytest_deselected(items=sorted(on_gpu, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in on_gpu]


def without_gpu() -> str:
    """Return why torch cannot use a GPU here; "" if it can. This process itself uses none."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "there is none"
    command = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "torch did not get one within 120 s"
    return (tried.stderr.strip() or "it failed").splitlines()[-1] if tried.returncode else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this run could not test, whatever was selected."""
    left_out = []
    if reason := terminalreporter.config.stash.get(ON_GPU, "make test-gpu"):
        left_out.append(f"anything on a GPU ({reason})")
    if not any("tests/slurm" in str(item) for item in terminalreporter.config.args):
        left_out.append("a real Slurm cluster (make test-slurm)")
    if not SHARED_DATA.is_dir():
        left_out.append(f"real MNIST and CIFAR-10 (not found in {SHARED_DATA})")
    terminalreporter.write_line(f"left out: {'; '.join(left_out) or 'nothing'}")
