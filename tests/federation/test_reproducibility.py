"""The contract of docs/design.md: the final model is the same, bit for bit, on any layout."""

import os
import signal
from pathlib import Path

import pytest
from support import Run, Submitter, eventually

from fedhpc.files import read_json, read_lines

LAYOUTS = {
    "three array tasks": ["cluster.array_tasks=3", "cluster.min_array_tasks=3"],
    "one slot and standby children": ["isolation.slots=1", "isolation.standby=true"],
    "spawn instead of fork": ["isolation.start_method=spawn", "isolation.slots=2"],
    "processes that are kept": ["isolation.fits_per_process=0"],
    "processes that are kept while they are clean": ["isolation.fits_per_process=auto"],
    "processes that do three fits and arrays in files": [
        "isolation.fits_per_process=3",
        "cluster.inline_mb=0",
    ],
    "evaluation between rounds": ["federation.overlap_evaluation=false"],
    "clients pinned to array tasks": [
        "federation.placement=pinned",
        "cluster.array_tasks=2",
        "cluster.min_array_tasks=2",
    ],
}


@pytest.mark.parametrize("sets", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_final_model_is_the_same_with(
    sets: list[str], submitter: Submitter, reference: Run
) -> None:
    run = submitter.run(sets)
    assert run.checksum == reference.checksum
    assert [line["round"] for line in run.metrics] == [0, 1, 2]
    evaluated = [[line["evaluate"] for line in one.metrics] for one in (run, reference)]
    assert evaluated[0] == evaluated[1]
    assert sorted((fit["round"], fit["client"]) for fit in run.fits) == sorted(
        (fit["round"], fit["client"]) for fit in reference.fits
    )
    assert not list(run.paths.blobs.iterdir())


def test_the_final_model_is_the_same_in_one_process(submitter: Submitter, reference: Run) -> None:
    assert submitter.run(executor="debug").checksum == reference.checksum


def test_the_final_model_is_the_same_from_data_staged_to_the_node(
    submitter: Submitter, reference: Run, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    run = submitter.run(["data.stage_to=$NODE_DISK/stage"], env={"NODE_DISK": str(tmp_path)})
    assert run.checksum == reference.checksum
    assert list(stage.glob("digits-*/train_images.npy"))


def test_the_final_model_is_another_one_with_another_seed(
    submitter: Submitter, reference: Run
) -> None:
    assert submitter.run(["seed=2"]).checksum != reference.checksum


def test_the_final_model_is_the_same_when_an_array_task_is_killed(
    submitter: Submitter,
) -> None:
    sets = ["cluster.array_tasks=2", "cluster.min_array_tasks=2", "training.epochs=20"]
    undisturbed = submitter.run([*sets, "federation.num_rounds=3"])
    process = submitter.start([*sets, "federation.num_rounds=3", "name=killed"])
    eventually(lambda: list(submitter.runs_dir.glob("killed-*/fits.jsonl")), 60)
    paths = submitter.newest()
    os.kill(read_json(paths.process("client-1"))["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    run = Run(paths, process.returncode, output)
    assert run.checksum == undisturbed.checksum
    fits = [(fit["round"], fit["client"]) for fit in read_lines(paths.fits)]
    assert len(fits) == len(set(fits)) == 12
