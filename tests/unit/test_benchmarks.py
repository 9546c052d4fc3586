"""What benchmarks compute by themselves."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_replayed_fits_take_no_longer_with_the_longest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    placement = importlib.import_module("placement")
    fit = dict.fromkeys(("start_s", "return_s", "link_s"), 0.0) | {"ok": True}
    seconds = [1.0] * 8 + [8.0]
    rounds = [
        [{**fit, "client": client, "run_s": run_s} for client, run_s in enumerate(seconds)]
        for _ in range(3)
    ]
    asked_tail, asked_s, _ = placement.replay(rounds, 2, longest_first=False)
    tail, longest_s, least_s = placement.replay(rounds, 2, longest_first=True)
    assert (tail, longest_s, least_s) == (0.0, 16.0, 16.0)  # the long one beside all others
    assert asked_tail > 0
    assert asked_s > longest_s
