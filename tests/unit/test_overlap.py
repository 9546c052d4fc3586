"""Evaluation on the server while the next round trains: the same results, and no round is lost."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from test_cohort import CLIENTS, START, Federation, fails, nothing

from fedhpc.federation import plain
from fedhpc.federation.checkpoint import Checkpoint, CheckpointStore
from fedhpc.federation.rounds import Rounds
from fedhpc.paths import checkpointed_rounds


class Stop(Exception):
    """What ends a run in a test."""


class Evaluated(Federation):
    """A federation with checkpoints whose evaluations and fits are noted in their order."""

    def __init__(self, folder: Path, overlap: object = "auto", **more: Any) -> None:
        self.happened: list[str] = []

        def note(client: int, server_round: int) -> None:
            self.happened.append(f"train {server_round}")

        federation = {"overlap_evaluation": overlap}
        super().__init__(folder, note, federation=federation, checkpoint={"every": 1}, **more)
        self.paths.checkpoints.mkdir(exist_ok=True)
        self.paths.states.mkdir(exist_ok=True)

    def start(
        self, rounds: int, *, fails_at: str = "", goes_on: bool = False, **more: Any
    ) -> dict[int, float]:
        """Return what was evaluated; ``fails_at`` names what raises `Stop`."""
        checked = self

        class Strategy(FedAvg):
            def configure_train(self, server_round: int, *args: Any) -> Iterable[Message]:
                checked.happen(f"configure {server_round}", fails_at)
                return super().configure_train(server_round, *args)

            def aggregate_train(self, server_round: int, *args: Any) -> Any:
                checked.happen(f"aggregate {server_round}", fails_at)
                return super().aggregate_train(server_round, *args)

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            self.happen(f"evaluate {server_round}", fails_at)
            value = float(arrays["w"].numpy()[0])
            drawn = float(np.random.random())  # noqa: NPY002
            # The best is round 2.
            return MetricRecord({"w": value, "drawn": drawn, "accuracy": -abs(server_round - 2)})

        store = CheckpointStore(self.paths, self.config.checkpoint, attempt=1)
        rounds_of = Rounds(store, self.config)
        if goes_on:
            found = store.load_newest()
            assert found is not None
            self.grid.recorder.go_on_from(plain.decode(found.parts["records"]))
            rounds_of.go_on_from(found)
        try:
            result = rounds_of.start(
                Strategy(fraction_train=1.0, fraction_evaluate=0.0),
                self.grid, START, rounds, evaluate_fn=evaluate, **more,
            )  # fmt: skip
        finally:
            store.close()
        return {n: float(m["w"]) for n, m in result.evaluate_metrics_serverapp.items()}

    def happen(self, what: str, fails_at: str) -> None:
        self.happened.append(what)
        if what == fails_at:
            raise Stop

    @property
    def told(self) -> list[dict[str, Any]]:
        """The lines, but for times."""
        times = ("time_s", "round_s", "seconds", "slot_seconds")
        return [{key: line[key] for key in line if key not in times} for line in self.lines]


def test_a_round_is_evaluated_when_the_next_one_has_been_asked_and_recorded_as_its_own(
    tmp_path: Path,
) -> None:
    apart = Evaluated(tmp_path / "apart", overlap=False)
    values = apart.start(3)
    order = list(dict.fromkeys(apart.happened))
    assert order == [
        "evaluate 0", "configure 1", "train 1", "aggregate 1", "evaluate 1",
        "configure 2", "train 2", "aggregate 2", "evaluate 2",
        "configure 3", "train 3", "aggregate 3", "evaluate 3",
    ]  # fmt: skip
    together = Evaluated(tmp_path / "together")
    assert together.start(3) == values
    order = list(dict.fromkeys(together.happened))
    assert order == [
        "configure 1", "evaluate 0", "train 1", "aggregate 1",
        "configure 2", "evaluate 1", "train 2", "aggregate 2",
        "configure 3", "evaluate 2", "train 3", "aggregate 3", "evaluate 3",
    ]  # fmt: skip
    assert together.told == apart.told
    assert [line["round"] for line in together.told] == [0, 1, 2, 3]
    assert len({line["evaluate"]["drawn"] for line in together.told}) == 4


def test_the_time_of_an_evaluation_counts_for_the_round_that_it_ran_in(tmp_path: Path) -> None:
    federation = Evaluated(tmp_path)
    federation.start(2)
    assert [line["seconds"]["evaluate"] > 0 for line in federation.lines] == [False, True, True]
    explained = [sum(line["seconds"].values()) for line in federation.lines]
    assert explained == pytest.approx([line["round_s"] for line in federation.lines], abs=1e-3)


@pytest.mark.parametrize(
    ("fails_at", "redone"),
    [
        # The round before has no checkpoint yet as long as its evaluation is not known.
        ("evaluate 2", 2),
        ("configure 3", 3),
        ("aggregate 3", 3),
        ("evaluate 4", 4),
    ],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_run_that_ended_anywhere_goes_on_to_the_same_models_metrics_and_best_checkpoint(
    tmp_path: Path, fails_at: str, redone: int, overlap: bool
) -> None:
    undisturbed = Evaluated(tmp_path / "undisturbed", overlap=overlap)
    values = undisturbed.start(4)
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        Evaluated(folder, overlap=overlap).start(4, fails_at=fails_at)
    again = Evaluated(folder, overlap=overlap)
    assert again.start(4, goes_on=True) == values
    assert again.happened[0] == f"configure {redone}"
    assert again.told == undisturbed.told
    best = [federation.paths.best_checkpoint.resolve().name for federation in (undisturbed, again)]
    assert best == [undisturbed.paths.checkpoint(2).name] * 2


def test_a_long_evaluation_brings_no_deadline_nearer(tmp_path: Path) -> None:
    federation = Federation(tmp_path, nothing)

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        federation.transport.clock_ahead_s += 1000

    store = CheckpointStore(federation.paths, federation.config.checkpoint, attempt=1)
    Rounds(store, federation.config).start(
        FedAvg(fraction_train=1.0, fraction_evaluate=0.0),
        federation.grid, START, 2, 500.0, evaluate_fn=evaluate,
    )  # fmt: skip
    assert [line["failures"] for line in federation.lines] == [0, 0]


def test_what_failed_during_an_evaluation_is_tried_again(tmp_path: Path) -> None:
    federation = Federation(tmp_path, fails(2, times=1), retry=1)
    undisturbed = Federation(tmp_path / "undisturbed", nothing)
    assert federation.run(2) == undisturbed.run(2)
    assert federation.failed == [(2, 1)]


def test_a_skipped_round_is_not_evaluated_later_either(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, fails(*range(CLIENTS), rounds=[2]), retry=0, on_too_few="skip_round"
    )
    seen: list[int] = []
    store = CheckpointStore(federation.paths, federation.config.checkpoint, attempt=1)
    Rounds(store, federation.config).start(
        FedAvg(fraction_train=1.0, fraction_evaluate=0.0),
        federation.grid, START, 3, evaluate_fn=lambda number, _: seen.append(number),
    )  # fmt: skip
    assert seen == [0, 1, 3]
    assert [line["round"] for line in federation.lines] == [1, 2, 3]


def test_on_a_slow_disk_at_most_one_round_is_without_a_checkpoint_during_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Evaluated(tmp_path)
    write = CheckpointStore._write

    def slowly(store: CheckpointStore, checkpoint: Checkpoint) -> None:
        time.sleep(0.3)
        write(store, checkpoint)

    monkeypatch.setattr(CheckpointStore, "_write", slowly)
    there: dict[int, list[int]] = {}
    happen = federation.happen

    def look(what: str, fails_at: str) -> None:
        if what.startswith("evaluate"):
            there[int(what.split()[1])] = checkpointed_rounds(federation.paths)
        happen(what, fails_at)

    monkeypatch.setattr(federation, "happen", look)
    federation.start(4)
    newest = {number: max(found, default=0) for number, found in there.items()}
    assert [newest[number] for number in (1, 2, 3)] == [0, 1, 2]
