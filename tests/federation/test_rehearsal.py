"""What the fork server does in advance for the children of the built-in app changes no fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import Submitter

SCRIPT = Path(__file__).parent / "rehearsed_fit.py"


def fit_after(rehearsals: int, run_dir: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), run_dir, str(rehearsals)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize(
    "sets",
    [
        ["isolation.fits_per_process=1", "training.batch_size=7"],
        ["isolation.fits_per_process=auto", "training.batch_size=1000"],  # more than there are
    ],
)
def test_a_fit_after_a_rehearsal_is_the_same_to_the_last_bit(
    sets: list[str], submitter: Submitter
) -> None:
    command = [*submitter.command(sets), "--prepare"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    run_dir = made.stdout.strip()
    before = sorted(path for path in Path(run_dir).rglob("*"))
    alone, after = fit_after(0, run_dir), fit_after(2, run_dir)
    assert alone == after
    assert alone["same random state"] is True
    assert alone["examples"] > 100
    assert len(alone["model"]) == 1
    assert sorted(path for path in Path(run_dir).rglob("*")) == before
