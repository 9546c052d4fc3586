"""Which slot runs which fit next."""

import threading

import pytest

from fedhpc.federation import grid_pb2
from fedhpc.held import Held
from fedhpc.isolation import Gpu, Slot
from fedhpc.turns import Turns

SLOTS = [Slot(0), Slot(1)]
LIKE = Held(grid_pb2.Work(), "like the others", {})


def nothing() -> None: ...


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(SLOTS, binds_ahead=True, clock=clock)


def fits(count: int) -> list[Held]:
    return [Held(grid_pb2.Work(message_id=f"{n}"), f"{n}", {}) for n in range(count)]


def give(turns: Turns, count: int) -> list[Held]:
    made = fits(count)
    for held in made:
        turns.give(held)
    return made


def tags(found: list[Held]) -> list[str]:
    return [held.tag for held in found]


def test_fits_are_given_out_in_their_order(turns: Turns) -> None:
    made = give(turns, 3)
    assert [turns.next(SLOTS[n % 2], nothing) for n in range(3)] == made


def test_a_fit_wakes_the_slot_that_waits_for_it(turns: Turns) -> None:
    found: list[Held | None] = []
    thread = threading.Thread(target=lambda: found.append(turns.next(SLOTS[1], nothing)))
    thread.start()
    (held,) = fits(1)
    turns.give(held)
    thread.join(5)
    assert found == [held]


@pytest.mark.parametrize(("took_s", "count"), [(0.001, 6), (0.004, 4), (0.015, 1), (0.03, 0)])
def test_as_many_are_bound_ahead_as_take_a_moment(turns: Turns, took_s: float, count: int) -> None:
    give(turns, 20)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, took_s)
    turns.next(SLOTS[0], nothing)
    assert tags(turns.bind_ahead(SLOTS[0])) == [f"{n}" for n in range(2, 2 + count)]
    assert turns.time_to_tell_s(SLOTS[0]) > 0


@pytest.mark.parametrize(("took_s", "within_s"), [(0.001, 0.01), (0.06, 0.12), (60.0, 0.2)])
def test_a_result_waits_for_others_up_to_two_of_the_next_fit(
    turns: Turns, took_s: float, within_s: float
) -> None:
    give(turns, 2)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, took_s)
    assert turns.time_to_tell_s(SLOTS[0]) == within_s
    turns.next(SLOTS[0], nothing)
    assert turns.time_to_tell_s(SLOTS[0]) == 0  # the slot waits for the server


def test_no_result_waits_where_the_server_may_have_enough_with_it(clock: Clock) -> None:
    turns = Turns(SLOTS[:1], binds_ahead=False, closes_early=True, clock=clock)
    give(turns, 3)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 60.0)
    assert turns.time_to_tell_s(SLOTS[0]) == 0


def test_the_last_two_results_do_not_wait_where_others_could_be_given_the_last_fit(
    clock: Clock,
) -> None:
    turns = Turns(SLOTS[:1], binds_ahead=False, alone=False, clock=clock)
    give(turns, 3)
    waits = []
    for _ in range(3):
        turns.next(SLOTS[0], nothing)
        turns.ended(SLOTS[0], LIKE, 60.0)
        waits.append(turns.time_to_tell_s(SLOTS[0]) > 0)
    assert waits == [True, False, False]


def test_nothing_is_bound_ahead_of_a_fit_whose_like_is_not_known(turns: Turns) -> None:
    give(turns, 3)
    turns.next(SLOTS[0], nothing)
    assert turns.bind_ahead(SLOTS[0]) == []
    turns.ended(SLOTS[0], LIKE, None)  # it failed
    turns.next(SLOTS[0], nothing)
    assert turns.bind_ahead(SLOTS[0]) == []


def test_only_fits_of_a_verb_that_is_known_to_be_short_are_bound_ahead(turns: Turns) -> None:
    give(turns, 2)
    long = Held(grid_pb2.Work(), "long", {}, verb="another")
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 0.001)
    turns.give(long)
    give(turns, 1)
    turns.next(SLOTS[0], nothing)
    assert turns.bind_ahead(SLOTS[0]) == []
    turns.ended(SLOTS[0], long, 0.002)
    assert tags(turns.bind_ahead(SLOTS[0])) == ["long", "0"]


def test_what_is_ahead_of_a_slot_that_waits_to_begin_is_taken_too(
    turns: Turns, clock: Clock
) -> None:
    give(turns, 3)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 0.001)
    turns.next(SLOTS[0], nothing)
    assert tags(turns.bind_ahead(SLOTS[0])) == ["2"]
    clock.now_s = 0.1
    taken = turns.next(SLOTS[1], nothing)
    assert taken is not None
    assert taken.tag == "2"


def test_a_slot_tells_once_that_it_becomes_idle(turns: Turns) -> None:
    told: list[int] = []
    (held,) = fits(1)

    def idle() -> None:
        told.append(1)
        turns.give(held)

    assert turns.next(SLOTS[0], idle) is held
    assert told == [1]


def test_nothing_is_bound_ahead_where_each_fit_has_a_process_of_its_own(clock: Clock) -> None:
    turns = Turns(SLOTS, binds_ahead=False, clock=clock)
    give(turns, 3)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 0.001)
    assert turns.bind_ahead(SLOTS[0]) == []
    assert turns.time_to_tell_s(SLOTS[0]) > 0


def test_what_is_bound_ahead_comes_next_and_before_what_waits(turns: Turns) -> None:
    give(turns, 8)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 0.005)
    turns.next(SLOTS[0], nothing)
    assert tags(turns.bind_ahead(SLOTS[0])) == ["2", "3", "4"]
    turns.ended(SLOTS[0], LIKE, 0.005)
    found = turns.next(SLOTS[0], nothing)
    assert found is not None
    assert found.tag == "2"
    assert tags(turns.bind_ahead(SLOTS[0])) == ["3", "4", "5"]
    other = turns.next(SLOTS[1], nothing)
    assert other is not None
    assert other.tag == "6"


@pytest.fixture
def stuck(turns: Turns) -> Turns:
    """Slot 0 has 2 to 5 ahead, behind fit 1; 5 was the last one."""
    give(turns, 6)
    turns.next(SLOTS[0], nothing)
    turns.ended(SLOTS[0], LIKE, 0.004)
    turns.next(SLOTS[0], nothing)
    assert tags(turns.bind_ahead(SLOTS[0])) == ["2", "3", "4", "5"]
    return turns


def test_a_free_slot_takes_what_waits_behind_a_long_fit_the_last_first(
    stuck: Turns, clock: Clock
) -> None:
    clock.now_s = 0.1
    taken = [stuck.next(SLOTS[1], nothing) for _ in range(3)]
    assert tags([held for held in taken if held]) == ["5", "4", "3"]
    own = stuck.next(SLOTS[0], nothing)
    assert own is not None
    assert own.tag == "2"


def test_a_free_slot_that_waits_finds_out_that_a_fit_is_long(stuck: Turns, clock: Clock) -> None:
    found: list[Held | None] = []
    thread = threading.Thread(target=lambda: found.append(stuck.next(SLOTS[1], nothing)))
    thread.start()
    thread.join(0.1)
    assert not found, "the fit before may still be short"
    clock.now_s = 0.1
    thread.join(5)
    assert tags([held for held in found if held]) == ["5"]


def test_the_fits_of_a_lost_slot_go_to_others(clock: Clock) -> None:
    slots = [Slot(0, (Gpu("a"),)), Slot(1, (Gpu("b"),))]
    turns = Turns(slots, binds_ahead=True, clock=clock)
    give(turns, 4)
    turns.next(slots[0], nothing)
    turns.ended(slots[0], LIKE, 0.001)
    turns.next(slots[0], nothing)
    turns.bind_ahead(slots[0])
    assert turns.lose([slots[0]]) == [slots[1]]
    assert turns.next(slots[0], nothing) is None
    left = [turns.next(slots[1], nothing) for _ in range(2)]
    assert tags([held for held in left if held]) == ["2", "3"]
