"""Where the time of a real run went."""

import itertools

from support import Run

from fedhpc.federation.breakdown import OTHER


def test_the_parts_explain_the_wall_time_of_a_run(reference: Run) -> None:
    lines = reference.metrics
    for before, line in itertools.pairwise(lines):
        passed_s = line["time_s"] - before["time_s"]
        named_s = sum(line["seconds"].values()) - line["seconds"][OTHER]
        assert 0.95 * passed_s <= named_s <= 1.01 * passed_s + 0.002, line
        # Two slots of one array task, connected before the first round ended.
        slot_s = sum(line["slot_seconds"].values())
        assert line["round"] == 1 or 0.95 <= slot_s / (2 * passed_s) <= 1.05, line
        assert line["slot_seconds"]["lost"] <= 0.05 * slot_s, line
        of_round = [fit for fit in reference.fits if fit["round"] == line["round"]]
        run_s = sum(fit["run_s"] for fit in of_round)
        # Its turn may be known here a moment later than the slot began with it.
        assert abs(line["slot_seconds"]["run"] - run_s) < 0.001 + 0.05 * run_s, line
