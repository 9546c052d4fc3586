"""Which array task does which fit: each rule by itself, then all of them at random."""

from collections import Counter
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedhpc.federation import message_ids, roster
from fedhpc.federation.actions import Action, Assign, Cancel, Drop, Fail, Keep, Turn
from fedhpc.federation.dispatch import Dispatch

LIVENESS_S = 10.0


def machine(array_tasks: int = 2, **options: Any) -> Dispatch:
    return Dispatch(array_tasks=array_tasks, liveness_timeout_s=LIVENESS_S, **options)


def assigned(actions: list[Action]) -> list[tuple[int, str]]:
    return [(a.link, a.message_id) for a in actions if isinstance(a, Assign)]


def done_by(dispatch: Dispatch) -> list[Action]:
    """Return the actions but the turns, which only matter for counting time."""
    return [action for action in dispatch.actions() if not isinstance(action, Turn)]


def connected(array_tasks: int = 2, slots: int = 1, **options: Any) -> Dispatch:
    """Return a machine whose array task t is connected as link t + 1."""
    dispatch = machine(array_tasks, **options)
    for array_task in range(array_tasks):
        dispatch.join(array_task + 1, array_task, slots, {}, 0.0)
    return dispatch


# --- submit and assign ---------------------------------------------------------------------------


def test_a_message_goes_to_a_free_slot() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    assert done_by(dispatch) == [Assign(1, "a")]
    assert done_by(dispatch) == []
    assert dispatch.running == 1


def test_a_message_that_is_open_cannot_be_submitted_again() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    with pytest.raises(ValueError, match="message a is open already"):
        dispatch.submit("a", 0)


def test_a_message_that_was_answered_can_be_submitted_again() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    dispatch.actions()
    dispatch.answered(1, "a")
    dispatch.submit("a", 0)
    assert done_by(dispatch) == [Assign(1, "a")]


@pytest.fixture
def few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a link have one message ahead of its turn for each slot."""
    monkeypatch.setattr(roster, "_LEAST_AHEAD", 0)


@pytest.mark.parametrize(("slots", "ahead"), [(2, 8), (8, 8), (10, 10)])
def test_a_link_has_a_message_ahead_of_its_turn_for_each_slot_and_at_least_eight(
    slots: int, ahead: int
) -> None:
    dispatch = connected(1, slots=slots)
    names = list("abcdefghijklmnopqrstuvwxyz")
    for message_id in names:
        dispatch.submit(message_id, 0)
    first = dispatch.actions()
    assert assigned(first) == [(1, name) for name in names[: slots + ahead]]
    turns = {turn.message_id for turn in first if isinstance(turn, Turn)}
    assert turns == set(names[:slots])
    assert dispatch.occupancy() == (slots, slots)
    assert dispatch.answered(1, "a")
    assert dispatch.actions() == [Turn(1, names[slots]), Assign(1, names[slots + ahead])]


def test_nothing_goes_ahead_of_its_turn_that_others_may_need_at_once() -> None:
    dispatch = connected(3)
    for message_id in "abcde":
        dispatch.submit(message_id, 0)
    assert len(assigned(dispatch.actions())) == 3
    dispatch.submit("f", 0)
    assert assigned(dispatch.actions()) == [(1, "d")]


def test_a_message_that_is_ahead_of_its_turn_moves_on_to_a_slot_that_is_free() -> None:
    dispatch = connected(2)
    for message_id in "abcd":
        dispatch.submit(message_id, 0)
    assert assigned(dispatch.actions()) == [(1, "a"), (2, "b"), (1, "c")]
    dispatch.answered(2, "b")
    assert done_by(dispatch) == [Assign(2, "d")]
    dispatch.answered(2, "d")
    assert done_by(dispatch) == [Cancel(1, "c"), Assign(2, "c")]
    assert dispatch.answered(2, "c")
    assert done_by(dispatch) == []


def test_only_messages_whose_turn_had_come_may_be_to_blame_for_a_lost_array_task() -> None:
    dispatch = connected(2, max_losses=1)
    for message_id in "abcd":
        dispatch.submit(message_id, 0)
    assert assigned(dispatch.actions()) == [(1, "a"), (2, "b"), (1, "c")]
    dispatch.leave(1, 0.0)
    failed = [action.message_id for action in dispatch.actions() if isinstance(action, Fail)]
    assert failed == ["a"]
    dispatch.answered(2, "b")
    dispatch.answered(2, "c")
    assert not dispatch.answered(2, "a")


def test_messages_are_assigned_in_the_order_of_submission() -> None:
    dispatch = machine(1)
    for message_id in "cab":
        dispatch.submit(message_id, 0)
    dispatch.join(1, 0, 3, {}, 0.0)
    assert [message_id for _, message_id in assigned(dispatch.actions())] == ["c", "a", "b"]


def test_what_takes_longest_is_assigned_first_and_equals_in_the_order_of_submission() -> None:
    dispatch = connected(1, slots=1)
    for message_id, expected in {"a": 1.0, "b": 3.0, "c": 1.0, "d": 3.0, "e": 2.0}.items():
        dispatch.submit(message_id, 0, expected=expected)
    done = [message_id for _, message_id in assigned(dispatch.actions())]
    for message_id in done:
        dispatch.answered(1, message_id)
        done += [following for _, following in assigned(dispatch.actions())]
    assert done == ["b", "d", "e", "a", "c"]


@pytest.mark.usefixtures("few_ahead")
def test_a_long_message_that_was_lost_comes_first_again() -> None:
    dispatch = connected(2)
    for message_id, expected in {"a": 1.0, "b": 2.0, "c": 1.0, "d": 3.0}.items():
        dispatch.submit(message_id, 0, expected=expected)
    assert assigned(dispatch.actions()) == [(1, "d"), (2, "b"), (1, "a")]
    dispatch.leave(1, 0.0)
    dispatch.answered(2, "b")
    assert assigned(dispatch.actions()) == [(2, "d"), (2, "a")]


def test_a_message_that_is_answered_before_its_turn_and_asked_again_is_assigned_once() -> None:
    dispatch = connected(1)
    for message_id in "ab":
        dispatch.submit(message_id, 0, expected=1.0)
    dispatch.actions()
    assert dispatch.answered(1, "b")  # of an array task that was not asked
    dispatch.submit("b", 0, expected=1.0)
    dispatch.answered(1, "a")
    assert assigned(dispatch.actions()) == [(1, "b")]
    dispatch.answered(1, "b")
    assert assigned(dispatch.actions()) == []


@pytest.mark.usefixtures("few_ahead")
def test_a_message_that_was_lost_comes_before_the_later_ones() -> None:
    dispatch = connected(2)
    for message_id in "abcd":
        dispatch.submit(message_id, 0)
    assert assigned(dispatch.actions()) == [(1, "a"), (2, "b"), (1, "c")]
    dispatch.leave(1, 0.0)
    assert assigned(dispatch.actions()) == [(2, "a")]
    dispatch.answered(2, "b")
    assert assigned(dispatch.actions()) == [(2, "c")]


def test_few_messages_spread_over_the_array_tasks() -> None:
    dispatch = connected(3, slots=4)
    for message_id in "abc":
        dispatch.submit(message_id, 0)
    assert sorted(link for link, _ in assigned(dispatch.actions())) == [1, 2, 3]


def test_no_work_starts_before_enough_array_tasks_are_there() -> None:
    dispatch = machine(3, min_array_tasks=2)
    dispatch.submit("a", 0)
    dispatch.join(1, 0, 1, {}, 0.0)
    assert not dispatch.started
    assert done_by(dispatch) == []
    dispatch.join(2, 1, 1, {}, 0.0)
    assert dispatch.started
    assert dispatch.array_tasks_connected == 2
    assert assigned(dispatch.actions()) == [(1, "a")]


def test_one_array_task_that_connects_twice_is_not_two() -> None:
    dispatch = machine(3, min_array_tasks=2)
    dispatch.join(1, 0, 1, {}, 0.0)
    dispatch.join(2, 0, 1, {}, 1.0)
    assert not dispatch.started
    assert dispatch.links_of(0) == [2]


def test_work_that_has_started_goes_on_with_fewer_array_tasks() -> None:
    dispatch = connected(2, min_array_tasks=2)
    dispatch.leave(1, 0.0)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(2, "a")]
    dispatch.leave(2, 0.0)
    dispatch.join(3, 0, 1, {}, 1.0)
    assert assigned(dispatch.actions()) == [(3, "a")]
    assert dispatch.started


def test_an_array_task_that_comes_later_gets_work_too() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    dispatch.submit("b", 0)
    dispatch.actions()
    dispatch.join(7, 1, 1, {}, 5.0)
    assert assigned(dispatch.actions()) == [(7, "b")]


# --- placement -----------------------------------------------------------------------------------


def test_with_pinned_client_k_runs_on_array_task_k_modulo_their_number() -> None:
    dispatch = connected(2, slots=4, placement="pinned")
    for client_id in range(4):
        dispatch.submit(f"client {client_id}", client_id)
    assert sorted(assigned(dispatch.actions())) == [
        (1, "client 0"),
        (1, "client 2"),
        (2, "client 1"),
        (2, "client 3"),
    ]


def test_a_pinned_message_waits_for_its_array_task_and_holds_nobody_up() -> None:
    dispatch = machine(2, placement="pinned")
    dispatch.join(1, 1, 1, {}, 0.0)
    dispatch.submit("of 0", 0)
    dispatch.submit("of 1", 1)
    assert assigned(dispatch.actions()) == [(1, "of 1")]
    dispatch.join(2, 0, 1, {}, 1.0)
    assert assigned(dispatch.actions()) == [(2, "of 0")]


def test_with_pinned_what_is_no_clients_runs_anywhere() -> None:
    dispatch = machine(2, placement="pinned")
    dispatch.join(1, 1, 1, {}, 0.0)
    dispatch.submit("of 0", 0)
    dispatch.submit("of nobody", None)
    assert assigned(dispatch.actions()) == [(1, "of nobody")]
    assert dispatch.answered(1, "of nobody")
    dispatch.submit("of nobody again", None)
    assert assigned(dispatch.actions()) == [(1, "of nobody again")]


# --- answers -------------------------------------------------------------------------------------


def test_the_first_answer_counts_and_the_second_does_not() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    dispatch.actions()
    assert dispatch.answered(1, "a")
    assert not dispatch.answered(1, "a")
    assert done_by(dispatch) == []
    assert dispatch.running == 0


def test_an_answer_to_an_unknown_message_does_not_count() -> None:
    dispatch = connected(1)
    assert not dispatch.answered(1, "never asked")
    assert done_by(dispatch) == []


def test_a_late_answer_of_a_lost_link_counts_and_the_new_one_is_told() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(1, "a")]
    dispatch.leave(1, 0.0)
    assert assigned(dispatch.actions()) == [(2, "a")]
    assert dispatch.answered(1, "a")
    assert done_by(dispatch) == [Cancel(2, "a")]
    assert not dispatch.answered(2, "a")


def test_an_answer_of_an_array_task_that_was_not_asked_counts() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    dispatch.actions()
    assert dispatch.answered(2, "a")
    assert done_by(dispatch) == [Cancel(1, "a")]


def test_a_slot_that_a_cancelled_message_had_is_free_again() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    dispatch.submit("b", 0)
    dispatch.actions()
    dispatch.withdraw("a")
    assert set(dispatch.actions()) == {Cancel(1, "a"), Turn(1, "b")}


def test_a_withdrawn_message_is_answered_no_more() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    dispatch.actions()
    dispatch.withdraw("a")
    assert done_by(dispatch) == [Cancel(1, "a")]
    assert not dispatch.answered(1, "a")


def test_a_message_can_be_withdrawn_before_anybody_has_it_and_twice() -> None:
    dispatch = machine(1)
    dispatch.submit("a", 0)
    dispatch.withdraw("a")
    dispatch.withdraw("a")
    dispatch.join(1, 0, 1, {}, 0.0)
    assert done_by(dispatch) == []


# --- array tasks that are lost -------------------------------------------------------------------


def test_a_lost_message_goes_to_another_array_task() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    dispatch.actions()
    dispatch.leave(1, 0.0, "its stream broke")
    assert done_by(dispatch) == [Drop(1, "its stream broke"), Assign(2, "a")]


def test_a_link_that_is_gone_can_go_and_speak_again_without_effect() -> None:
    dispatch = connected(1)
    dispatch.leave(1, 0.0)
    dispatch.actions()
    dispatch.leave(1, 0.0)
    dispatch.heard(1, 5.0)
    assert done_by(dispatch) == []
    assert dispatch.array_tasks_connected == 0


def test_a_message_that_is_lost_again_and_again_fails_and_says_why() -> None:
    dispatch = machine(1, max_losses=3)
    dispatch.submit("a", 0)
    seen: list[Action] = []
    for link in (1, 2, 3):
        dispatch.join(link, 0, 1, {}, 0.0)
        assert assigned(dispatch.actions()) == [(link, "a")]
        dispatch.leave(link, 0.0, "killed by SIGKILL")
        seen += dispatch.actions()
    (failure,) = [action for action in seen if isinstance(action, Fail)]
    assert failure.message_id == "a"
    assert failure.reason == (
        "it was lost 3 times with its array task or GPU; at last array task 0: killed by SIGKILL"
    )
    assert not dispatch.answered(3, "a")
    dispatch.join(4, 0, 1, {}, 0.0)
    assert done_by(dispatch) == []


def test_an_array_task_that_connects_again_is_not_blamed_for_its_messages() -> None:
    dispatch = machine(1, max_losses=1)
    dispatch.submit("a", 0)
    for link in range(1, 6):
        dispatch.join(link, 0, 1, {}, 0.0)
        assert not any(isinstance(action, Fail) for action in dispatch.actions())
    assert dispatch.answered(5, "a")


def test_an_array_task_that_said_goodbye_is_not_blamed_for_its_messages() -> None:
    dispatch = machine(1, max_losses=1)
    dispatch.submit("a", 0)
    for link in range(1, 6):
        dispatch.join(link, 0, 1, {}, 0.0)
        assert assigned(dispatch.actions()) == [(link, "a")]
        dispatch.leave(link, 0.0, "SIGTERM", blame=False)
        assert done_by(dispatch) == [Drop(link, "SIGTERM")]
    dispatch.join(6, 0, 1, {}, 0.0)
    assert assigned(dispatch.actions()) == [(6, "a")]


def test_a_message_with_a_second_array_task_is_not_failed_by_the_loss_of_the_first() -> None:
    dispatch = connected(2, max_losses=1)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(1, "a")]
    dispatch.join(3, 1, 1, {"a": ""}, 0.0)  # it had it from before
    dispatch.actions()
    dispatch.leave(1, 0.0)
    assert done_by(dispatch) == [Drop(1, "its stream broke")]
    assert dispatch.answered(3, "a")


# --- array tasks that come back ------------------------------------------------------------------


def test_a_new_link_of_an_array_task_replaces_the_old_one() -> None:
    dispatch = connected(2)
    dispatch.join(3, 0, 1, {}, 1.0)
    (drop,) = dispatch.actions()
    assert isinstance(drop, Drop)
    assert drop.link == 1
    assert "array task 0 connected again" in drop.reason
    assert dispatch.links_of(0) == [3]
    assert dispatch.array_tasks_connected == 2


def test_what_an_array_task_holds_is_not_assigned_again() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(1, "a")]
    dispatch.join(3, 0, 1, {"a": ""}, 1.0)
    assert assigned(dispatch.actions()) == []
    assert dispatch.answered(3, "a")


@pytest.mark.usefixtures("few_ahead")
def test_what_an_array_task_holds_takes_its_slots() -> None:
    dispatch = machine(1)
    for message_id in "abc":
        dispatch.submit(message_id, 0)
    dispatch.join(1, 0, 1, {"a": "", "b": ""}, 0.0)
    assert done_by(dispatch) == [Keep(1, "a"), Keep(1, "b")]
    dispatch.answered(1, "a")
    assert dispatch.actions() == [Turn(1, "b"), Assign(1, "c")]
    dispatch.answered(1, "b")
    assert dispatch.actions() == [Turn(1, "c")]


def test_two_array_tasks_may_hold_one_message_and_the_slower_is_told() -> None:
    dispatch = machine(2)
    dispatch.submit("a", 0)
    dispatch.join(1, 0, 1, {"a": ""}, 0.0)
    dispatch.join(2, 1, 1, {"a": ""}, 0.0)
    assert done_by(dispatch) == [Keep(1, "a"), Keep(2, "a")]
    assert dispatch.answered(2, "a")
    assert done_by(dispatch) == [Cancel(1, "a")]


# --- a server that comes back as the next attempt ------------------------------------------------


def fit(server_round: int, client_id: int = 0, sequence: int = 0, verb: str = "train") -> str:
    return message_ids.make(message_ids.Parts(server_round, client_id, verb, sequence))


def offered(held: dict[str, str], slots: int = 1) -> Dispatch:
    """Return a machine to which array task 0 has come back as link 1, with fits from before."""
    dispatch = machine(1)
    dispatch.join(1, 0, slots, held, 0.0)
    assert done_by(dispatch) == []
    return dispatch


def test_what_was_offered_is_kept_when_it_is_asked_for() -> None:
    dispatch = offered({fit(7): "f"})
    assert dispatch.running_on(1) == 1
    dispatch.submit(fit(7), 0, "f")
    assert done_by(dispatch) == [Keep(1, fit(7))]
    assert dispatch.answered(1, fit(7))
    assert not dispatch.answered(1, fit(7))
    assert dispatch.running_on(1) == 0


@pytest.mark.parametrize("asked_first", [True, False])
def test_what_answers_another_question_is_cancelled_and_runs_anew(asked_first: bool) -> None:
    dispatch = machine(1)
    if asked_first:
        dispatch.submit(fit(7), 0, "new")
    dispatch.join(1, 0, 1, {fit(7): "old"}, 0.0)
    if not asked_first:
        dispatch.submit(fit(7), 0, "new")
    assert done_by(dispatch) == [Cancel(1, fit(7)), Assign(1, fit(7))]


def test_what_two_array_tasks_offer_is_kept_by_both_and_answered_once() -> None:
    dispatch = machine(2)
    dispatch.join(1, 0, 1, {fit(7): "f"}, 0.0)
    dispatch.join(2, 1, 1, {fit(7): "f"}, 0.0)
    dispatch.submit(fit(7), 0, "f")
    assert done_by(dispatch) == [Keep(1, fit(7)), Keep(2, fit(7))]
    assert dispatch.answered(2, fit(7))
    assert done_by(dispatch) == [Cancel(1, fit(7))]


def test_offers_of_rounds_before_the_one_that_is_asked_for_are_cancelled() -> None:
    dispatch = offered({fit(6, 1): "", fit(7, 2): "", fit(8, 3): "", fit(0, 4): ""}, slots=9)
    dispatch.submit(fit(7), 0)
    assert done_by(dispatch) == [Cancel(1, fit(6, 1)), Assign(1, fit(7))]
    dispatch.join(2, 1, 1, {fit(6, 1): ""}, 0.0)
    assert done_by(dispatch) == [Cancel(2, fit(6, 1))]


@pytest.mark.parametrize("ended", ["answered", "withdrawn"])
@pytest.mark.parametrize("server_round", [0, 7])
def test_what_has_been_answered_or_withdrawn_is_cancelled_when_it_is_offered(
    ended: str, server_round: int
) -> None:
    dispatch = connected(1)
    message_id = fit(server_round, sequence=2)
    dispatch.submit(message_id, 0)
    dispatch.actions()
    dispatch.answered(1, message_id) if ended == "answered" else dispatch.withdraw(message_id)
    dispatch.actions()
    earlier, later = fit(server_round, sequence=1), fit(server_round, sequence=3)
    dispatch.join(2, 1, 3, {earlier: "", message_id: "", later: ""}, 0.0)
    assert done_by(dispatch) == [Cancel(2, earlier), Cancel(2, message_id)]


def test_an_offer_makes_room_for_a_message_that_needs_its_slot() -> None:
    dispatch = offered({fit(0, 1): "", fit(0, 2): ""}, slots=2)
    dispatch.submit(fit(0, 3), 3)
    assert done_by(dispatch) == [Cancel(1, fit(0, 1)), Assign(1, fit(0, 3))]
    dispatch.submit(fit(0, 2), 2)
    assert done_by(dispatch) == [Keep(1, fit(0, 2))]


@pytest.mark.usefixtures("few_ahead")
def test_an_offer_makes_no_room_for_what_is_asked_for_together_with_it() -> None:
    dispatch = offered({fit(7, 8): "", fit(7, 9): ""}, slots=2)
    for client_id in range(10):
        dispatch.submit(fit(7, client_id), client_id)
    kept = [Keep(1, fit(7, 8)), Keep(1, fit(7, 9))]
    assert done_by(dispatch) == [*kept, Assign(1, fit(7, 0)), Assign(1, fit(7, 1))]


def test_an_offer_goes_with_its_link_or_is_handed_back() -> None:
    dispatch = offered({fit(7): "", fit(7, 1): ""}, slots=2)
    dispatch.hand_back(1, fit(7), "its GPU is lost")
    assert dispatch.running_on(1) == 1
    dispatch.leave(1, 0.0)
    dispatch.actions()
    dispatch.join(2, 0, 1, {}, 0.0)
    dispatch.submit(fit(7, 1), 1)
    assert done_by(dispatch) == [Assign(2, fit(7, 1))]


def test_a_new_attempt_gives_no_work_out_before_its_array_tasks_are_back() -> None:
    dispatch = machine(2)
    dispatch.expect_back(3.0)
    for client_id in range(2):
        dispatch.submit(fit(7, client_id), client_id)
    dispatch.join(1, 0, 2, {fit(7, 0): ""}, 1.0)
    assert done_by(dispatch) == [Keep(1, fit(7, 0))]
    dispatch.join(2, 1, 2, {fit(7, 1): ""}, 2.0)
    assert done_by(dispatch) == [Keep(2, fit(7, 1))]
    dispatch.submit(fit(7, 2), 2)
    assert assigned(dispatch.actions()) == [(1, fit(7, 2))]


def test_a_new_attempt_does_not_wait_for_long_for_array_tasks_that_are_gone() -> None:
    dispatch = machine(2)
    dispatch.expect_back(3.0)
    dispatch.submit(fit(7), 0)
    dispatch.join(1, 0, 1, {}, 1.0)
    dispatch.tick(2.9)
    assert done_by(dispatch) == []
    dispatch.tick(3.0)
    assert assigned(dispatch.actions()) == [(1, fit(7))]


# --- silence -------------------------------------------------------------------------------------


def ticks(dispatch: Dispatch, start_s: int, end_s: int) -> list[Action]:
    """Tick each second from start to end, both included."""
    actions: list[Action] = []
    for now_s in range(start_s, end_s + 1):
        dispatch.tick(float(now_s))
        actions += dispatch.actions()
    return actions


def test_a_silent_array_task_is_dropped_and_its_message_goes_elsewhere() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    dispatch.actions()
    for now_s in range(20):
        dispatch.heard(2, float(now_s))
        dispatch.tick(float(now_s))
        if found := done_by(dispatch):
            assert now_s == 11
            assert found == [Drop(1, "array task 0 was silent for 11 s"), Assign(2, "a")]
    assert dispatch.array_tasks_connected == 1


def test_an_array_task_that_speaks_is_kept() -> None:
    dispatch = connected(1)
    for now_s in range(0, 100, 4):
        dispatch.heard(1, float(now_s))
        dispatch.tick(float(now_s))
    assert done_by(dispatch) == []


def test_nobody_is_blamed_when_the_server_itself_was_stalled() -> None:
    dispatch = connected(2)
    assert ticks(dispatch, 0, 3) == []
    assert ticks(dispatch, 500, 507) == []  # 3 s of silence before the stall, 7 s after it
    found = ticks(dispatch, 508, 508)
    assert [action.link for action in found if isinstance(action, Drop)] == [1, 2]


def test_a_stall_gives_nobody_more_than_a_whole_timeout_of_patience() -> None:
    dispatch = connected(1)
    assert ticks(dispatch, 0, 3) == []
    dispatch.heard(1, 499.0)  # read in the moment after the stall, before the tick
    assert ticks(dispatch, 500, 508) == []
    found = ticks(dispatch, 509, 512)
    assert [action.link for action in found if isinstance(action, Drop)] == [1]


def test_links_that_break_after_the_server_was_stalled_count_no_losses_and_are_waited_for() -> None:
    dispatch = connected(2, max_losses=1)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(1, "a")]
    assert ticks(dispatch, 0, 3) == []
    dispatch.leave(1, 500.0)
    dispatch.leave(2, 500.0)
    assert all(isinstance(action, Drop) for action in dispatch.actions())
    dispatch.join(3, 1, 1, {}, 501.0)
    assert done_by(dispatch) == [], "array task 0 may still hold it"
    dispatch.join(4, 0, 1, {"a": ""}, 502.0)
    assert done_by(dispatch) == [Keep(4, "a")]


def test_an_array_task_that_does_not_come_back_after_a_stall_is_waited_for_no_longer() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    dispatch.actions()
    assert ticks(dispatch, 0, 3) == []
    dispatch.leave(1, 500.0)
    for now_s in range(500, 510):
        dispatch.heard(2, float(now_s))
        dispatch.tick(float(now_s))
        assert assigned(dispatch.actions()) == []
    dispatch.tick(510.0)
    assert assigned(dispatch.actions()) == [(2, "a")]
    dispatch.leave(2, 511.0)
    assert done_by(dispatch) == [Drop(2, "its stream broke")]


# --- more and fewer slots -------------------------------------------------------------------------


@pytest.mark.usefixtures("few_ahead")
def test_more_slots_take_more_messages_and_fewer_take_none_away() -> None:
    dispatch = connected(1)
    for message_id in "abcd":
        dispatch.submit(message_id, 0)
    assert assigned(dispatch.actions()) == [(1, "a"), (1, "b")]
    dispatch.resize(1, 3)
    assert assigned(dispatch.actions()) == [(1, "c"), (1, "d")]
    assert dispatch.running_on(1) == 3
    dispatch.resize(1, 1)
    dispatch.answered(1, "a")
    assert dispatch.actions() == []
    assert dispatch.running_on(1) == 1


def test_a_message_that_is_handed_back_goes_to_another_array_task() -> None:
    dispatch = connected(2)
    dispatch.submit("a", 0)
    assert assigned(dispatch.actions()) == [(1, "a")]
    dispatch.resize(1, 0)
    dispatch.hand_back(1, "a", "its GPU is lost")
    assert assigned(dispatch.actions()) == [(2, "a")]


def test_a_message_that_nobody_can_run_fails_with_the_last_reason() -> None:
    dispatch = connected(1)
    dispatch.submit("a", 0)
    for _ in range(3):
        assert assigned(dispatch.actions()) == [(1, "a")]
        dispatch.hand_back(1, "a", "its GPU is lost")
    (fail,) = dispatch.actions()
    assert isinstance(fail, Fail)
    assert fail.reason.endswith("array task 0: its GPU is lost")


@pytest.mark.usefixtures("few_ahead")
def test_what_waits_for_a_pinned_array_task_is_counted() -> None:
    dispatch = machine(2, placement="pinned")
    dispatch.join(1, 1, 1, {}, 0.0)
    for client_id in range(6):
        dispatch.submit(f"client {client_id}", client_id)
    dispatch.actions()
    assert (dispatch.waiting_for(0), dispatch.waiting_for(1)) == (3, 1)


# --- everything at random -------------------------------------------------------------------------


class Behaviour(RuleBasedStateMachine):
    """Array tasks and a server with all their habits, against what `Dispatch` promises."""

    placement: ClassVar[Literal["any", "pinned"]] = "any"
    ARRAY_TASKS = 3
    MAX_LOSSES = 3
    ANYWHERE = 8  # what is asked of this client any array task may do

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.next_link = 1
        self.server_round = 0
        self.world = 0  # what all fingerprints of a message depend on
        # The array tasks' side: all that each has, with fingerprints, whatever server is there.
        self.kept: dict[int, dict[str, str]] = {task: {} for task in range(self.ARRAY_TASKS)}
        self.start_server(first=True)

    def start_server(self, *, first: bool) -> None:
        self.dispatch = Dispatch(
            array_tasks=self.ARRAY_TASKS,
            placement=self.placement,
            min_array_tasks=2,
            liveness_timeout_s=LIVENESS_S,
            max_losses=self.MAX_LOSSES,
        )
        # The server's side of the truth.
        self.sequences: Counter[tuple[int, int]] = Counter()
        self.newest_round = 0
        self.client_of: dict[str, int] = {}
        self.open: set[str] = set()
        self.ended: list[str] = []  # every submission of a message that ended
        self.submitted: list[str] = []
        self.most_connected = 0
        self.losses: dict[str, int] = {}
        self.order: dict[str, tuple[float, int]] = {}
        self.awake_s = self.now_s
        self.patient_until_s = 0.0
        self.awaited: set[int] = set()
        if not first:
            self.awaited |= set(range(self.ARRAY_TASKS))
            self.patient_until_s = self.now_s + LIVENESS_S
            self.dispatch.expect_back(self.patient_until_s)
        # What each live link was told to do, and what its array task has from before.
        self.link_of: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        self.has: dict[int, set[str]] = {}
        self.begun: dict[int, set[str]] = {}
        self.offers: dict[int, set[str]] = {}
        self.heard_s: dict[int, float] = {}
        self.dispatch.tick(self.now_s)

    def fingerprint(self, message_id: str) -> str:
        return f"{message_id} in world {self.world}"

    # --- what goes out ---

    def follow(self) -> None:
        self.take(self.dispatch.actions())

    def take(self, actions: list[Action]) -> None:
        made_room: set[int] = set()
        for action in actions:
            if isinstance(action, Fail):
                self.end(action.message_id)
                assert self.losses[action.message_id] >= self.MAX_LOSSES
                assert str(self.losses[action.message_id]) in action.reason
                continue
            if isinstance(action, Drop):
                assert action.link in self.slots, "only a live link is dropped"
                self.forget(action.link)
                continue
            array_task = self.array_task_of(action.link)
            assert array_task is not None, f"{action} for a link that is gone"
            if isinstance(action, Cancel):
                fingerprint = self.kept[array_task].pop(action.message_id)
                if action.message_id in self.offers[action.link]:
                    answers = fingerprint == self.fingerprint(action.message_id)
                    if action.message_id in self.open:
                        assert not answers, "it is asked for"
                    elif not self.is_pointless(action.message_id):
                        made_room.add(action.link)
                    self.offers[action.link].discard(action.message_id)
                else:
                    assert action.message_id in self.has[action.link], "a Cancel of what it has not"
                    self.has[action.link].discard(action.message_id)
                continue
            if isinstance(action, Keep):
                assert action.message_id in self.open, "a Keep of what is not open"
                fingerprint = self.kept[array_task][action.message_id]
                assert fingerprint == self.fingerprint(action.message_id), "no answer to this"
                self.offers[action.link].remove(action.message_id)
                self.has[action.link].add(action.message_id)
                self.begun[action.link].discard(action.message_id)
                continue
            if isinstance(action, Turn):
                assert action.message_id in self.has[action.link], "a turn of what it has not"
                begun = self.begun[action.link] = self.begun_on(action.link)
                assert action.message_id not in begun, "its turn came twice"
                begun.add(action.message_id)
                assert len(begun) <= self.slots[action.link], "no slot is free"
                continue
            assert not self.awaited, "somebody who comes back may have it"
            made_room.discard(action.link)
            assert action.message_id in self.open, "an Assign of what is not open"
            for known in (self.has, self.offers):
                others = [link for link in known if action.message_id in known[link]]
                assert others == [], "somebody has it"
            taken = len(self.has[action.link]) + len(self.offers[action.link])
            if taken >= self.slots[action.link]:
                slots = self.slots[action.link]
                assert taken < slots + max(slots, 8), "too many are ahead of their turn"
                self.assert_that_others_have_enough(action)
            assert self.may_run(action.message_id, array_task), "pinned elsewhere"
            assert self.most_connected >= 2, "work starts with min_array_tasks"
            assert self.losses[action.message_id] < self.MAX_LOSSES, "lost too often"
            running = set().union(*self.has.values())
            for earlier in self.open - running:
                if self.pin(earlier) != self.pin(action.message_id):
                    continue
                if self.order[earlier] < self.order[action.message_id]:
                    assert not self.may_run(earlier, array_task), f"{earlier} came first"
            self.has[action.link].add(action.message_id)
            self.begun[action.link].discard(action.message_id)
            self.kept[array_task][action.message_id] = self.fingerprint(action.message_id)
        assert not made_room, "an offer was cancelled for nothing"

    def assert_that_others_have_enough(self, action: Assign) -> None:
        if self.placement == "pinned":
            assert self.pin(action.message_id) is not None, "another slot may be free first"
            return
        for link, slots in self.slots.items():
            assert len(self.has[link]) + len(self.offers[link]) >= slots, "a slot is free"

    def begun_on(self, link: int) -> set[str]:
        return self.begun[link] & self.has[link]

    def is_pointless(self, message_id: str) -> bool:
        parts = message_ids.read(message_id)
        sequences = self.sequences[parts.server_round, parts.client_id]
        return parts.sequence < sequences or 0 < parts.server_round < self.newest_round

    def may_run(self, message_id: str, array_task: int) -> bool:
        return self.pin(message_id) in (None, array_task)

    def pin(self, message_id: str) -> int | None:
        client_id = self.client_of[message_id]
        is_free = self.placement == "any" or client_id == self.ANYWHERE
        return None if is_free else client_id % self.ARRAY_TASKS

    def array_task_of(self, link: int) -> int | None:
        return next((task for task, number in self.link_of.items() if number == link), None)

    def end(self, message_id: str) -> None:
        assert message_id in self.open, f"{message_id} ends twice"
        self.open.discard(message_id)
        self.ended.append(message_id)

    def forget(self, link: int) -> None:
        task = self.array_task_of(link)
        assert task is not None
        del self.link_of[task], self.slots[link], self.heard_s[link]
        del self.has[link], self.offers[link], self.begun[link]

    def blame(self, link: int) -> None:
        for message_id in self.begun_on(link):
            self.losses[message_id] = self.losses.get(message_id, 0) + 1

    # --- the server's habits ---

    @rule(
        clients=st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True),
        without_round=st.sampled_from([False, False, True]),
    )
    def submit(self, clients: list[int], without_round: bool) -> None:
        server_round = 0 if without_round else self.server_round
        for client_id in clients:
            sequence = self.sequences[server_round, client_id]
            self._submit(fit(server_round, client_id, sequence), client_id)
        self.follow()

    @rule()
    def begin_next_round(self) -> None:
        self.server_round += 1

    @rule(rounds=st.integers(0, 2), same=st.booleans())
    @precondition(lambda self: any(self.kept.values()))
    def come_back_as_the_next_attempt(self, rounds: int, same: bool) -> None:
        """Resume so many rounds earlier, and from another model or not."""
        self.server_round = max(0, self.server_round - rounds)
        self.world += not same
        self.start_server(first=False)

    @rule(data=st.data())
    @precondition(lambda self: set(self.submitted) - self.open)
    def submit_again(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from(sorted(set(self.submitted) - self.open)))
        self._submit(message_id, self.client_of[message_id])
        self.follow()

    def _submit(self, message_id: str, client_id: int) -> None:
        parts = message_ids.read(message_id)
        self.newest_round = max(self.newest_round, parts.server_round)
        self.sequences[parts.server_round, client_id] = max(
            parts.sequence + 1, self.sequences[parts.server_round, client_id]
        )
        expected = float(client_id % 3)
        asked = None if client_id == self.ANYWHERE else client_id
        self.dispatch.submit(message_id, asked, self.fingerprint(message_id), expected)
        self.client_of[message_id] = client_id
        self.open.add(message_id)
        self.submitted.append(message_id)
        self.losses[message_id] = 0
        self.order[message_id] = -expected, len(self.submitted)

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def withdraw(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.open)))
        self.dispatch.withdraw(message_id)
        self.end(message_id)
        self.follow()

    # --- the array tasks' habits ---

    @rule(
        array_task=st.integers(0, ARRAY_TASKS - 1), slots=st.integers(1, 3), restarted=st.booleans()
    )
    def join(self, array_task: int, slots: int, restarted: bool) -> None:
        """Come, or come back: with what it still has, or as a new process with nothing."""
        if restarted:
            self.kept[array_task].clear()
        held = dict(self.kept[array_task])
        link, self.next_link = self.next_link, self.next_link + 1
        older = self.link_of.get(array_task)
        self.dispatch.join(link, array_task, slots, held, self.now_s)
        actions = self.dispatch.actions()
        if older is not None:
            first = actions.pop(0)
            assert isinstance(first, Drop)
            assert first.link == older
            self.forget(older)
        self.link_of[array_task] = link
        self.slots[link] = slots
        self.has[link] = set()
        self.begun[link] = set()
        self.offers[link] = set(held)
        self.awaited.discard(array_task)
        self.heard_s[link] = self.now_s
        self.most_connected = max(self.most_connected, len(self.slots))
        self.take(actions)

    @rule(data=st.data())
    @precondition(lambda self: self.slots)
    def leave(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(sorted(self.slots))))

    def _leave(self, link: int) -> None:
        self.note_awake()
        task = self.array_task_of(link)
        assert task is not None
        if self.now_s < self.patient_until_s:
            self.awaited.add(task)
        else:
            self.blame(link)
        self.dispatch.leave(link, self.now_s)
        self.follow()
        assert link not in self.slots

    def note_awake(self) -> None:
        if self.now_s - self.awake_s > LIVENESS_S / 2:
            self.patient_until_s = self.now_s + LIVENESS_S
        self.awake_s = self.now_s

    @rule(data=st.data(), slots=st.integers(0, 4))
    @precondition(lambda self: self.slots)
    def resize(self, data: st.DataObject, slots: int) -> None:
        """Learn what fits need, or lose a GPU."""
        link = data.draw(st.sampled_from(sorted(self.slots)))
        self.slots[link] = slots
        self.dispatch.resize(link, slots)
        self.follow()

    @rule(data=st.data())
    @precondition(lambda self: any(self.has.values()) or any(self.offers.values()))
    def hand_back(self, data: st.DataObject) -> None:
        """Give a message back that cannot run here, and with it the slot it was to run in."""
        held = {link: self.has[link] | self.offers[link] for link in self.slots}
        link = data.draw(st.sampled_from(sorted(link for link in held if held[link])))
        message_id = data.draw(st.sampled_from(sorted(held[link])))
        task = self.array_task_of(link)
        assert task is not None
        self.slots[link] = max(0, self.slots[link] - 1)
        self.dispatch.resize(link, self.slots[link])
        del self.kept[task][message_id]
        if message_id in self.has[link]:
            self.has[link].discard(message_id)
            self.losses[message_id] += 1
        self.offers[link].discard(message_id)
        self.dispatch.hand_back(link, message_id, "its GPU is lost")
        self.follow()

    @rule(data=st.data())
    @precondition(lambda self: self.submitted and self.next_link > 1)
    def hand_back_out_of_the_blue(self, data: st.DataObject) -> None:
        """Give back what was taken away meanwhile, or over a link that is gone."""
        link = data.draw(st.integers(1, self.next_link - 1))
        message_id = data.draw(st.sampled_from(sorted(set(self.submitted))))
        if message_id not in self.has.get(link, set()):
            self.dispatch.hand_back(link, message_id, "too late")
            self.follow()

    @rule(data=st.data(), twice=st.booleans())
    @precondition(lambda self: any(self.has.values()))
    def answer(self, data: st.DataObject, twice: bool) -> None:
        link = data.draw(st.sampled_from(sorted(link for link, has in self.has.items() if has)))
        message_id = data.draw(st.sampled_from(sorted(self.has[link])))
        task = self.array_task_of(link)
        assert task is not None
        self._answer(link, message_id)
        self.kept[task].pop(message_id, None)
        if twice:
            assert not self.dispatch.answered(link, message_id)
            self.follow()

    @rule(data=st.data())
    @precondition(lambda self: self.submitted and self.next_link > 1)
    def answer_out_of_the_blue(self, data: st.DataObject) -> None:
        """Answer late: by a link that is gone, or whose message was taken away or answered."""
        link = data.draw(st.integers(1, self.next_link - 1))
        message_id = data.draw(st.sampled_from(sorted(set(self.submitted))))
        self._answer(link, message_id)
        if (task := self.array_task_of(link)) is not None:
            self.kept[task].pop(message_id, None)

    def _answer(self, link: int, message_id: str) -> None:
        accepted = self.dispatch.answered(link, message_id)
        assert accepted == (message_id in self.open), "the first answer counts, and no other"
        if link in self.has:
            self.has[link].discard(message_id)
        if accepted:
            self.end(message_id)
        self.follow()

    # --- time ---

    @rule(
        steps=st.integers(1, 4),
        speakers=st.sampled_from([(), (0,), (1,), (0, 1), (1, 2), (0, 1, 2)]),
    )
    def pass_time(self, steps: int, speakers: tuple[int, ...]) -> None:
        """Let time pass; some array tasks speak, others stall."""
        for _ in range(steps):
            self.now_s += 4.0
            for task in speakers:
                if task in self.link_of:
                    self.dispatch.heard(self.link_of[task], self.now_s)
                    self.heard_s[self.link_of[task]] = self.now_s
            self.tick()

    def tick(self) -> None:
        silent = [link for link, at_s in self.heard_s.items() if self.now_s - at_s > LIVENESS_S]
        for link in silent:
            self.blame(link)
        before = set(self.slots)
        self.note_awake()
        if self.now_s >= self.patient_until_s:
            self.awaited.clear()
        self.dispatch.tick(self.now_s)
        self.follow()
        assert before - set(self.slots) == set(silent), "the silent ones are dropped, and no other"

    @rule(read_first=st.booleans(), data=st.data())
    def stall(self, read_first: bool, data: st.DataObject) -> None:
        """Stop the server itself for long; what was said meanwhile is read before or after."""
        self.now_s += 10 * LIVENESS_S
        left = data.draw(st.sets(st.sampled_from(sorted(self.slots)))) if self.slots else set()
        for link in sorted(left):  # they found us silent
            self._leave(link)
        before = set(self.slots)
        if read_first:
            self.all_speak()
        self.note_awake()
        self.dispatch.tick(self.now_s)
        self.follow()
        assert set(self.slots) == before, "nobody is blamed for our own stall"
        if not read_first:
            self.all_speak()

    def all_speak(self) -> None:
        for link in self.slots:
            self.dispatch.heard(link, self.now_s)
            self.heard_s[link] = self.now_s

    # --- what always holds ---

    @invariant()
    def every_message_is_open_or_has_ended_exactly_once(self) -> None:
        assert sorted([*self.ended, *self.open]) == sorted(self.submitted)

    @invariant()
    def both_sides_agree_on_who_is_connected(self) -> None:
        assert self.dispatch.array_tasks_connected == len(self.slots)
        assert self.dispatch.started == (self.most_connected >= 2)
        for task in range(self.ARRAY_TASKS):
            assert self.dispatch.links_of(task) == [
                link for number, link in self.link_of.items() if number == task
            ]

    @invariant()
    def both_sides_agree_on_what_runs(self) -> None:
        with_somebody = set().union(*self.has.values()) if self.has else set()
        assert with_somebody <= self.open
        assert self.dispatch.running == len(with_somebody)

    @invariant()
    def the_slots_are_counted_as_they_are(self) -> None:
        busy = sum(min(self.slots[link], len(has)) for link, has in self.has.items())
        assert self.dispatch.occupancy() == (sum(self.slots.values()), busy)

    @invariant()
    def a_message_that_was_lost_too_often_is_not_tried_again(self) -> None:
        running = set().union(*self.has.values()) if self.has else set()
        waiting = self.open - running
        assert all(self.losses[message_id] < self.MAX_LOSSES for message_id in waiting)

    @invariant()
    def offers_are_of_messages_that_may_still_be_asked_for(self) -> None:
        for link, offers in self.offers.items():
            assert not offers & self.open
            assert not any(map(self.is_pointless, offers))
            taken = len(offers) + len(self.has[link])
            assert self.dispatch.running_on(link) == min(self.slots[link], taken)

    @invariant()
    def no_message_waits_while_a_slot_that_may_take_it_is_free(self) -> None:
        if not self.dispatch.started or self.awaited:
            return
        running = set().union(*self.has.values()) if self.has else set()
        for message_id in self.open - running:
            for task, link in self.link_of.items():
                eligible = self.may_run(message_id, task)
                assert not eligible or len(self.has[link]) >= self.slots[link]

    @invariant()
    def every_slot_is_the_turn_of_a_message_if_there_is_one(self) -> None:
        for link, has in self.has.items():
            assert len(self.begun_on(link)) >= min(self.slots[link], len(has))

    @invariant()
    def no_message_is_ahead_of_its_turn_while_another_slot_is_free(self) -> None:
        if not self.dispatch.started or self.awaited or self.placement == "pinned":
            return
        if any(has - self.begun_on(link) for link, has in self.has.items()):
            for link, slots in self.slots.items():
                assert len(self.has[link]) + len(self.offers[link]) >= slots

    def teardown(self) -> None:
        """Connect everybody, answer everything: then everything has ended."""
        for task in range(self.ARRAY_TASKS):
            if task not in self.link_of:
                self.join(task, 1, restarted=True)
        for link in self.slots:
            self.slots[link] = max(1, self.slots[link])
            self.dispatch.resize(link, self.slots[link])
        self.follow()
        for _ in range(len(self.open)):
            busy = [link for link, has in self.has.items() if has]
            if not busy:
                break
            self._answer(busy[0], min(self.has[busy[0]]))
        assert self.open == set(), "messages were forgotten"
        assert not any(self.has.values())
        assert sorted(self.ended) == sorted(self.submitted)
        assert self.dispatch.running == 0


class PinnedBehaviour(Behaviour):
    placement: ClassVar[Literal["any", "pinned"]] = "pinned"


_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyPlacement = Behaviour.TestCase
TestAnyPlacement.settings = _SETTINGS
TestPinnedPlacement = PinnedBehaviour.TestCase
TestPinnedPlacement.settings = _SETTINGS
