"""The second stage of validation remembers what it has found good."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedhpc import config, files
from fedhpc.learning import partitions
from fedhpc.paths import RunPaths, create_run_folder

_RUN = """
import sys
from pathlib import Path
from fedhpc import preflight
from fedhpc.paths import RunPaths
findings = preflight.check(RunPaths(Path(sys.argv[1])))
print(findings.problems, "torch" in sys.modules)
"""


def run(folder: Path, *sets: str) -> tuple[RunPaths, str]:
    """Check a new run's config in a new process; return what it said, and whether torch loaded."""
    sets = (f"data.root={folder / 'data'}", *sets)
    empty = folder / "config.yaml"
    empty.write_text("")
    loaded = config.load(empty, None, sets)
    paths = create_run_folder(folder / "runs", loaded.name)
    files.write_atomic(paths.config, config.dump(loaded))
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(paths.root)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return paths, done.stdout.strip()


@pytest.mark.timeout(300)
def test_a_config_that_was_found_good_needs_no_libraries_until_something_changes(
    tmp_path: Path,
) -> None:
    first, said = run(tmp_path)
    assert said == "[] True"
    others = ("cluster.array_tasks=3", "isolation.slots=2", "name=other", "federation.num_rounds=7")
    again, said = run(tmp_path, *others)
    assert said == "[] False"
    assert files.read_json(again.data) == files.read_json(first.data)
    shares = [partitions.load(paths.partitions) for paths in (first, again)]
    assert all(np.array_equal(a, b) for a, b in zip(*shares, strict=True))

    _, said = run(tmp_path, "training.optimizer={name: Adamm}")
    assert "training.optimizer.name: expected" in said
    _, said = run(tmp_path, "training.optimizer={name: Adamm}")  # a problem is not remembered
    assert "training.optimizer.name: expected" in said
    for cached in (tmp_path / "data" / "packed").glob("*/partitions-*"):
        cached.unlink()
    remade, said = run(tmp_path)
    assert said == "[] True"
    assert remade.partitions.is_file()
