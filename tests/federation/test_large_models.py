"""A model of 1.2 GB, there and back."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from support import REPOSITORY, Submitter

MODEL_MB = 1200
CLIENTS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with room, which is empty again at the end."""
    free_gb = shutil.disk_usage(tmp_path).free / 1e9
    if free_gb < 8:
        pytest.skip(f"the replies and models need 6 GB of disk, {free_gb:.0f} GB are free")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.timeout(600)  # half a minute on two free cores
def test_a_model_of_1200_mb_is_trained_and_held_only_as_often_as_it_must_be(
    folder: Path, data_root: Path
) -> None:
    report = folder / "report.json"
    sizes = {"model-mb": MODEL_MB, "num-rounds": 1, "report": str(report)}
    config = folder / "large.yaml"
    config.write_text(
        json.dumps(
            {
                "app": {
                    "server": "adding_app:server",
                    "client": "adding_app:client",
                    "run_config": sizes,
                },
                "checkpoint": {"every": 0},
                "isolation": {"slots": 1},
            }
        )
    )
    run = Submitter(folder, data_root).run(
        [f"federation.num_clients={CLIENTS}"],
        config=config,
        timeout_s=500,
        env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"},
    )
    assert run.checksum
    with safe_open(run.paths.model, "numpy") as model:
        names = list(model.keys())
        largest = model.get_tensor("0")
        assert largest[0] == largest[-1] == (1 + 2) / CLIENTS
        assert model.get_tensor(names[-1])[-1] == (1 + 2) / CLIENTS
    assert largest.nbytes == MODEL_MB * 1e6 / 2
    server = json.loads(report.read_text())
    # The old model and the sum; then the new one, or a reply's largest array (half of a model) and
    # what it is times its weight.
    assert server["peak_mb"] - server["before_mb"] < 3.3 * MODEL_MB
    # The new model, and what its largest array is made from; what came is shared by all fits.
    assert max(fit["peak_rss_mb"] for fit in run.fits) < 2 * MODEL_MB
    assert not list(run.paths.blobs.iterdir())
