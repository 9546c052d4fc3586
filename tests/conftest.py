"""What all tests share: the closing word about what was left out."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this run could not test, whatever was selected."""
    left_out = ["anything on a GPU (no such tests yet)"]
    if not any("tests/slurm" in str(item) for item in terminalreporter.config.args):
        left_out.append("a real Slurm cluster (make test-slurm)")
    if not SHARED_DATA.is_dir():
        left_out.append(f"real MNIST and CIFAR-10 (not found in {SHARED_DATA})")
    terminalreporter.write_line(f"left out: {'; '.join(left_out)}")
