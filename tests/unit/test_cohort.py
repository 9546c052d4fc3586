"""Cohorts through the real grid and loop, with fits in this process and no link."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedhpc import config
from fedhpc.errors import RunError
from fedhpc.federation import apps, compat
from fedhpc.federation.checkpoint import CheckpointStore
from fedhpc.federation.cohort import Streaks
from fedhpc.federation.fit import Prepared
from fedhpc.federation.grid import HpcGrid
from fedhpc.federation.inprocess import InProcess
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.rounds import Rounds
from fedhpc.federation.states import ClientStates
from fedhpc.federation.transport import Request, Response, WorkClock
from fedhpc.files import read_json, read_lines
from fedhpc.paths import RunPaths

CLIENTS = 6
START = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
Behaviour = Callable[[int, int], None]  # (client, round); raises


class Transport(InProcess):
    """Answers in batches of ``together``, the last client first; some never answer."""

    def __init__(self, prepared: Prepared, together: int = 1) -> None:
        super().__init__(prepared)
        self.silent: set[int] = set()
        self.late: set[int] = set()  # these have answered just when nobody waits any more
        self.sent: list[int] = []
        self.gone: list[int] = []
        self.stalls_s: list[float] = []  # nobody is at work for so long, where anybody waits
        self.clock_ahead_s = 0.0
        self._stood_s = 0.0
        self._together = together

    def clock_s(self) -> float:
        return super().clock_s() - self._stood_s + self.clock_ahead_s

    def send(self, requests: Sequence[Request]) -> None:
        self.sent += [request.client_id for request in requests]
        super().send(requests)

    def receive(self, message_ids: Iterable[str], timeout_s: float) -> list[Response]:
        if self.stalls_s:
            time.sleep(self.stalls_s[0])
            self._stood_s += self.stalls_s.pop(0)
            return []
        wanted = sorted(
            (name for name in set(message_ids) & self._waiting.keys()
             if self._waiting[name].client_id not in self.silent),
            reverse=True,
        )  # fmt: skip
        return [
            response
            for name in wanted[: self._together]
            for response in super(Transport, self).receive([name], timeout_s)
        ]

    def withdraw(self, message_ids: Iterable[str]) -> list[Response]:
        clients = {name: self._waiting[name].client_id for name in message_ids}
        self.gone += clients.values()
        late = [name for name, client in clients.items() if client in self.late]
        answers = [answer for name in late for answer in super(Transport, self).receive([name], 0)]
        return [*answers, *super().withdraw(clients)]


class Federation:
    """A run folder with a grid and a loop over clients that add 1 to the model."""

    def __init__(self, folder: Path, behaviour: Behaviour, together: int = 1, **sets: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.paths = RunPaths(folder)
        self.paths.errors.mkdir(exist_ok=True)
        self.paths.blobs.mkdir(exist_ok=True)
        federation = {"num_clients": CLIENTS, "clients_per_round": 4, **sets.pop("federation", {})}
        checkpoint = sets.pop("checkpoint", {"every": 0})
        raw = {"federation": federation, "cluster": sets.pop("cluster", {}), "failures": sets}
        raw["checkpoint"] = checkpoint
        self.config = config.parse(raw, "test")
        compat.set_identity("test")
        spec = apps.AppSpec("", "", None, [], {})

        def app(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            behaviour(client, int(message.content["config"]["server-round"]))
            seen = int(context.state["seen"]["n"]) if "seen" in context.state else 0
            context.state["seen"] = MetricRecord({"n": seen + 1})
            w = message.content["arrays"]["w"].numpy() + np.float32(client + 1)
            w = np.resize(w, self.shapes.get(client, w.shape))
            examples = self.examples.get(client, 1)
            metrics = MetricRecord({"num-examples": examples, "seen": seen})
            arrays = ArrayRecord({"w": Array(w)})
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        # What a client adds to: it says in which shape.
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.examples: dict[int, int] = {}

        self.transport = Transport(Prepared(self.config, self.paths, spec, app), together)
        self.grid = HpcGrid(
            self.transport,
            Recorder(self.paths),
            self.paths,
            num_clients=CLIENTS,
            seed=0,
            states=ClientStates(self.paths, 1e9),
            inline_bytes=int(self.config.cluster.inline_mb * 1e6),
            retry=self.config.failures.retry,
        )

    def run(self, rounds: int = 1, timeout: float = 3600, evaluate: float = 0.0) -> list[float]:
        """Return the model's first value after each round that it changed in."""
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=evaluate)
        seen: list[float] = []

        def look(_round: int, arrays: ArrayRecord) -> None:
            seen.append(float(arrays["w"].numpy()[0]))

        store = CheckpointStore(self.paths, self.config.checkpoint, attempt=1)
        Rounds(store, self.config).start(
            strategy, self.grid, START, rounds, timeout, evaluate_fn=look
        )
        return seen[1:]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return list(read_lines(self.paths.metrics))

    @property
    def failed(self) -> list[tuple[int, int]]:
        return [(fit["client"], fit["try"]) for fit in read_lines(self.paths.fits) if not fit["ok"]]


def messages_of(federation: Federation) -> list[Message]:
    strategy = FedAvg(fraction_train=1.0)
    return list(strategy.configure_train(1, START, ConfigRecord(), federation.grid))


def nothing(client: int, server_round: int) -> None:
    """All is well."""


def fails(*clients: int, rounds: Sequence[int] = (1, 2, 3), times: int = 99) -> Behaviour:
    """Return a behaviour of clients that fail, so many times each."""
    left = dict.fromkeys(clients, times)

    def behave(client: int, server_round: int) -> None:
        if left.get(client, 0) and server_round in rounds:
            left[client] -= 1
            raise ValueError(f"client {client} has no luck")

    return behave


def test_messages_that_are_made_one_by_one_may_share_a_content_that_changes(tmp_path: Path) -> None:
    heard: dict[int, int] = {}
    federation = Federation(tmp_path, heard.__setitem__)
    settings = ConfigRecord()
    content = RecordDict({"arrays": START, "config": settings})

    def make() -> Iterator[Message]:
        for client in range(4):
            settings["server-round"] = 10 * client
            yield Message(content, dst_node_id=client + 1, message_type="train")

    assert len(list(federation.grid.send_and_receive(make()))) == 4
    assert heard == {0: 0, 1: 10, 2: 20, 3: 30}


# --- trying again --------------------------------------------------------------------------------


def test_a_failed_fit_is_tried_again_and_gives_the_same_model(tmp_path: Path) -> None:
    (undisturbed,) = Federation(tmp_path / "a", nothing).run()
    federation = Federation(tmp_path / "b", fails(1, 4, times=2), retry=2)
    assert federation.run() == [undisturbed]
    assert sorted(federation.failed) == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert federation.lines[0]["failures"] == 0
    names = {path.name for path in federation.paths.errors.iterdir()}
    assert {f"r00001-c00000{c}-train-0{t}.txt" for c in (1, 4) for t in ("", ".2")} == names
    progress = federation.grid.recorder.progress()
    assert (progress["fits_done"], progress["fits_total"], progress["fits_failed"]) == (6, 6, 4)


def test_without_retry_a_failed_fit_is_final_and_no_round_waits_for_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path, fails(1), retry=0)
    assert federation.run() == pytest.approx([(1 + 3 + 4 + 5 + 6) / 5])
    assert federation.failed == [(1, 1)]


def test_a_retry_that_the_deadline_cuts_off_leaves_the_reason_of_the_failure(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, nothing, retry=5)

    def behave(client: int, server_round: int) -> None:
        if client == 2:
            federation.transport.silent.add(2)  # at the second try
        fails(2)(client, server_round)

    federation = Federation(tmp_path, behave, retry=5)
    federation.run(timeout=0.3)
    assert federation.failed == [(2, 1)]
    assert federation.lines[0]["failures"] == 1
    (entry,) = federation.paths.accepted.iterdir()
    assert read_json(entry)["failed"] == {
        "r00001-c000002-train-0": "ValueError: client 2 has no luck"
    }


def test_an_apps_own_loop_has_retries_too(tmp_path: Path) -> None:
    federation = Federation(tmp_path, fails(0, times=1))
    replies = federation.grid.send_and_receive(messages_of(federation))
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3, 4, 5, 6]
    assert all(reply.has_content() for reply in replies)
    assert not federation.paths.accepted.exists()


def test_what_an_app_pushes_it_pulls_with_errors_and_without_retries(tmp_path: Path) -> None:
    federation = Federation(tmp_path, fails(0))
    waiting = set(federation.grid.push_messages(messages_of(federation)))
    replies = []
    while waiting:
        for reply in federation.grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
    errors = [reply.error.reason for reply in replies if reply.has_error()]
    assert errors == ["ValueError: client 0 has no luck"]
    assert len(replies) == CLIENTS


# --- too few -------------------------------------------------------------------------------------


def test_too_few_successes_stop_the_run_and_the_error_has_numbers_and_reason(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, fails(0, 1, rounds=[2]), min_completed=0.7)
    with pytest.raises(RunError) as caught:
        federation.run(3)
    assert caught.value.message.startswith("round 2: 4 of its 6 clients could train, 5 needed")
    assert "has no luck" in caught.value.message
    assert [line["round"] for line in federation.lines] == [1]
    # Whoever mends the cause and resumes is not bound by what happened.
    assert not federation.paths.accepted.exists()


def test_one_success_is_enough_by_default_and_none_is_not(tmp_path: Path) -> None:
    Federation(tmp_path / "a", fails(0, 1, 2, 3, 4)).run()
    with pytest.raises(RunError, match="round 1: none of its 6 clients could train, 1 needed"):
        Federation(tmp_path / "b", fails(*range(6))).run()


@pytest.mark.parametrize(("mode", "evaluated"), [("skip_round", 2), ("keep_model", 3)])
def test_a_round_with_too_few_successes_changes_nothing_and_the_next_one_follows(
    mode: str, evaluated: int, tmp_path: Path
) -> None:
    federation = Federation(
        tmp_path, fails(0, 1, rounds=[2]), min_completed=1.0, on_too_few=mode
    )  # fmt: skip
    values = federation.run(3)
    assert len(values) == evaluated
    assert (values[0], values[-1]) == pytest.approx((3.5, 7.0))
    said = [line.get("too_few", "") for line in federation.lines]
    assert [bool(text) for text in said] == [False, True, False]
    assert "4 of its 6 clients could train, 6 needed" in said[1]
    assert "train" not in federation.lines[1]
    # Nobody's state remembers it either: in round 3 each client has seen one round.
    assert federation.lines[2]["train"]["seen"] == pytest.approx(1)


# --- over-selection, the deadline, and the journal -----------------------------------------------

OVER = {"over_select": 1.5}


def test_a_round_closes_at_the_last_success_needed_and_counts_everybody_once(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path / "a", fails(5), together=4, federation=OVER, retry=0)
    assert federation.run() == [(1 + 3 + 4 + 5) / 4]  # 2 to 5 came first, then 0 and 1
    (line,) = federation.lines
    assert (line["cohort"], line["failures"], line["late"]) == (6, 1, 1)
    federation = Federation(tmp_path / "b", nothing, together=4, federation=OVER)
    assert federation.run() == [(3 + 4 + 5 + 6) / 4]
    (line,) = federation.lines
    assert (line["cohort"], line["failures"], line["cancelled"]) == (6, 0, 2)
    assert sorted(federation.transport.gone) == [0, 1]


def test_time_in_which_nobody_can_work_does_not_bring_the_deadline_nearer(tmp_path: Path) -> None:
    federation = Federation(tmp_path, nothing, together=CLIENTS)
    federation.transport.stalls_s = [0.6]
    assert federation.run(timeout=0.5) == [3.5]
    assert federation.lines[0]["failures"] == 0


def test_the_clock_of_work_stands_while_nobody_works_or_this_process_was_stalled() -> None:
    clock = WorkClock(100.0)
    assert clock.read(101.0, at_work=True) == 1.0
    assert clock.read(102.0, at_work=False) == 1.0
    assert clock.read(3702.0, at_work=True) == 1.0
    assert clock.read(3703.0, at_work=True) == 2.0


def test_a_reply_of_another_shape_is_refused_when_the_deadline_closes_the_round_too(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, nothing, retry=1)
    federation.shapes = {5: (3,)}
    federation.transport.silent = {0}
    assert federation.run(timeout=0.3) == [(2 + 3 + 4 + 5) / 4]
    assert federation.lines[0]["failures"] == 2
    assert federation.failed == [(5, 1), (0, 1)]
    assert federation.transport.sent.count(5) == 1  # it is too late for another try
    assert federation.transport.gone == [0]


def test_of_those_that_come_at_once_the_first_clients_count(tmp_path: Path) -> None:
    federation = Federation(tmp_path, nothing, together=6, federation=OVER)
    assert federation.run() == [(1 + 2 + 3 + 4) / 4]
    (line,) = federation.lines
    assert (line["cohort"], line["failures"], line["late"]) == (6, 0, 2)
    assert "cancelled" not in line
    late = [fit["client"] for fit in read_lines(federation.paths.fits) if fit.get("late")]
    assert late == [4, 5]
    assert federation.grid.recorder.progress()["fits_late"] == 2


def test_arrays_of_late_results_are_not_left_on_disk(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, nothing, together=4, federation=OVER, cluster={"inline_mb": 0}
    )
    federation.transport.late = {0, 1}
    federation.run()
    assert (federation.lines[0]["late"], federation.lines[0].get("cancelled")) == (2, None)
    assert list(federation.paths.blobs.iterdir()) == []


def test_a_failure_is_made_up_for_by_another_client_and_the_strategy_sees_no_error(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, fails(0, 1), together=6, federation=OVER, retry=0)
    assert federation.run() == [(3 + 4 + 5 + 6) / 4]
    assert federation.lines[0]["failures"] == 2


def test_a_round_that_is_done_again_accepts_the_same_clients(tmp_path: Path) -> None:
    first = Federation(tmp_path, fails(2), federation=OVER)
    first.transport.silent = {0, 1}
    values = first.run(2, timeout=0.2)
    assert [line["failures"] for line in first.lines] == [3, 3]
    first.paths.metrics.unlink()
    # Now all would succeed at once, the first four would count, and there is time enough.
    again = Federation(tmp_path, nothing, together=6, federation=OVER)
    assert again.run(2) == values
    assert set(again.transport.sent) == {3, 4, 5}
    assert [line["failures"] for line in again.lines] == [3, 3]


def test_an_entry_of_another_cohort_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Federation(tmp_path, fails(2), retry=0)
    first.run()
    (path,) = first.paths.accepted.iterdir()
    path.write_text(path.read_text().replace('"r00001-c000004-train-0",\n', "", 1))
    again = Federation(tmp_path, nothing)
    assert again.run() == [3.5]
    assert "is of another cohort" in caplog.text


def test_replies_that_went_with_all_others_are_not_odd_when_the_accepted_are_asked_alone(
    tmp_path: Path,
) -> None:
    first = Federation(tmp_path, nothing, together=6)
    # Of six too many differ for anybody to be odd; of the four that count, two are like the model.
    first.shapes = {2: (1, 2), 3: (2, 1), 4: (4,), 5: (1, 4)}
    outcome = first.grid.collect(first.grid.ask(messages_of(first), wanted=4, journalled=True))
    assert [answer.client_id for answer in outcome.accepted] == [0, 1, 2, 3]
    first.grid.journal.write(outcome)
    again = Federation(tmp_path, nothing, together=6)
    again.shapes = first.shapes
    outcome = again.grid.collect(again.grid.ask(messages_of(again), wanted=4, journalled=True))
    assert [answer.client_id for answer in outcome.accepted] == [0, 1, 2, 3]
    assert sorted(again.transport.sent) == [0, 1, 2, 3]


def test_evaluation_that_is_done_again_accepts_the_same_clients_too(tmp_path: Path) -> None:
    first = Federation(tmp_path, nothing)
    first.transport.silent = {0}
    first.run(timeout=0.2, evaluate=1.0)
    names = sorted(path.name for path in first.paths.accepted.iterdir())
    assert ["evaluate" in name for name in names] == [True, False]
    again = Federation(tmp_path, nothing)
    again.run(evaluate=1.0)
    assert 0 not in again.transport.sent
    seen = [line["evaluate_clients"]["seen"] for line in again.lines]
    assert seen == [1.0, 1.0]  # before and after: who trained has evaluated


def test_nothing_is_journalled_where_the_whole_cohort_succeeds(tmp_path: Path) -> None:
    federation = Federation(tmp_path, fails(3, times=1))
    federation.run(2)
    assert not federation.paths.accepted.exists()


# --- clients that fail again and again -----------------------------------------------------------


def test_a_client_that_fails_three_times_in_a_row_is_said_once_until_it_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streaks = Streaks()
    for _ in range(2):
        streaks.note(7, "train", "no luck\nHint: try harder")
    assert streaks.said() == []
    streaks.note(7, "evaluate", "")
    for _ in range(3):
        streaks.note(7, "train", "no luck\nHint: try harder")
    assert streaks.said() == ["client 7 has failed in 5 rounds in a row; at last: no luck"]
    assert caplog.text.count("client 7 has failed in") == 1
    streaks.note(7, "train", "")
    assert streaks.said() == []
