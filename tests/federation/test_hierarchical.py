"""Hierarchical aggregation has a model of its own, and that one on every layout."""

import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import Run, Submitter, eventually

from fedhpc.federation import groups
from fedhpc.files import read_json, read_lines

IN_GROUPS = ["federation.aggregation=hierarchical", "federation.clients_per_round=5"]
LAYOUTS = {
    "two array tasks and arrays in files": [
        "cluster.array_tasks=2",
        "cluster.min_array_tasks=2",
        "cluster.inline_mb=0",
    ],
    "three array tasks that keep their processes": [
        "cluster.array_tasks=3",
        "cluster.min_array_tasks=3",
        "isolation.fits_per_process=0",
    ],
    "clients pinned to array tasks": [
        "federation.placement=pinned",
        "cluster.array_tasks=2",
        "cluster.min_array_tasks=2",
    ],
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, data_root: object) -> Run:
    """The run in one process."""
    submitter = Submitter(tmp_path_factory.mktemp("grouped"), data_root)  # type: ignore[arg-type]
    run = submitter.run(IN_GROUPS, executor="debug")
    assert run.checksum
    return run


@pytest.mark.parametrize("sets", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_model_made_in_groups_is_the_same_with(
    sets: list[str], submitter: Submitter, grouped: Run
) -> None:
    run = submitter.run([*IN_GROUPS, *sets])
    assert run.checksum == grouped.checksum
    means = [fit["round"] for fit in run.fits if fit["verb"] == groups.MESSAGE_TYPE]
    assert means == [1, 1, 2, 2]  # five clients: three and two
    assert not list(run.paths.blobs.iterdir())


def test_the_model_made_in_groups_is_the_flat_one_but_for_the_last_bits(
    submitter: Submitter, grouped: Run
) -> None:
    flat = submitter.run(["federation.clients_per_round=5"], executor="debug")
    assert flat.checksum != grouped.checksum
    found, expected = load_file(grouped.paths.model), load_file(flat.paths.model)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(400)
def test_the_model_made_in_groups_is_the_same_when_an_array_task_is_killed(
    submitter: Submitter,
) -> None:
    sets = [*IN_GROUPS, "cluster.array_tasks=2", "cluster.min_array_tasks=2", "training.epochs=20"]
    sets += ["federation.num_rounds=3", "cluster.inline_mb=0"]
    undisturbed = submitter.run(sets)
    process = submitter.start([*sets, "name=killed"])
    eventually(lambda: list(submitter.runs_dir.glob("killed-*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("client-1"))["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    run = Run(paths, process.returncode, output)
    assert run.checksum == undisturbed.checksum
    fits = [(fit["round"], fit["client"], fit["verb"]) for fit in read_lines(paths.fits)]
    assert len(fits) == len(set(fits)) == 3 * (5 + 2)


def test_a_strategy_that_needs_every_reply_is_refused_before_anything_is_submitted(
    submitter: Submitter,
) -> None:
    process = submitter.start([*IN_GROUPS, "strategy={name: FedMedian}"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "FedMedian needs every client's reply" in output
    assert "Flower's own path" in output
