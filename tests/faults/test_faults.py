"""The schedule of faults, and one run that many of them hit; `make chaos` does many runs."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from disturbed_run import DisturbedRun, sets
from fault_kinds import LOCAL
from fault_schedule import APART, FIRST, Fault, Size, at_moments, draw
from support import Submitter

KINDS = list(LOCAL)
SEEDS = [str(number) for number in range(300)]


def in_fits(fault: Fault, size: Size) -> int:
    return fault.after * (size.cohort if fault.unit == "rounds" else 1)


def test_the_same_seed_draws_the_same_faults_and_another_one_others() -> None:
    drawn = [draw(seed, KINDS, Size()) for seed in SEEDS]
    assert drawn == [draw(seed, KINDS, Size()) for seed in SEEDS]
    assert len(set(map(tuple, drawn))) == len(SEEDS)


def test_schedules_have_all_kinds_all_lengths_and_moments_in_fits_and_in_rounds() -> None:
    faults = [draw(seed, KINDS, Size()) for seed in SEEDS]
    assert {len(schedule) for schedule in faults} == {1, 2, 3}
    assert {fault.kind for schedule in faults for fault in schedule} == set(KINDS)
    assert {fault.unit for schedule in faults for fault in schedule} == {"fits", "rounds"}


def test_moments_are_apart_and_inside_the_run() -> None:
    size = Size()
    for seed in SEEDS:
        moments = [in_fits(fault, size) for fault in draw(seed, KINDS, size)]
        assert moments[0] >= FIRST
        assert moments[-1] < size.fits
        assert all(later - earlier >= APART for earlier, later in pairwise(moments))


def test_more_faults_than_a_run_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="10 faults do not fit into a run of 36 fits"):
        at_moments(random.Random(0), "0", KINDS[:10], Size())


@pytest.mark.timeout(600)
def test_300_fits_under_kills_of_every_process_and_two_resumes_end_in_the_same_model(
    tmp_path: Path,
) -> None:
    size = Size(rounds=10, cohort=30)
    seed = "7"
    draws = random.Random(seed)
    kinds = ["child-killed"] * 8 + ["fork-server-killed", "array-task-killed"] * 2
    kinds += ["server-killed", "checkpoint-flipped", "rendezvous-deleted"]
    draws.shuffle(kinds)
    schedule = at_moments(draws, seed, kinds, size)
    more = ["training.epochs=3"]
    undisturbed = Submitter(tmp_path / "undisturbed", tmp_path / "data")
    reference = undisturbed.run([*sets(size), *more], executor="debug")
    run = DisturbedRun(Submitter(tmp_path / "run", tmp_path / "data"), reference, size, more)
    outcome = run.survive(schedule, LOCAL)
    assert not outcome.problems, outcome
    assert Counter(hit.kind.name for hit in outcome.hits) == Counter(kinds)
    logs = "".join(path.read_text() for path in run.paths.jobs.glob("*.err"))
    assert "killed by SIGKILL; it runs again" in logs
    assert "is damaged" in logs
    assert logs.count("going on after round") == 2
    # One round at most for each end, and one more as the newest checkpoint was damaged.
    assert sum(hit.rounds_redone for hit in outcome.hits) <= 3
