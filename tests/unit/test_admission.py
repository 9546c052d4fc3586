"""Whether a fit may start beside others: the decision alone, without processes and locks."""

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhpc.errors import PlatformError
from fedhpc.isolation.admission import Need, Request, _as_holder, _room, check_need, shortage
from fedhpc.isolation.locks import Holder
from fedhpc.isolation.nvml import Reading

GB = 1_000_000_000
CARD = 40 * GB


def wants(gb: float | None, *, alone: bool = False, key: str = "GPU-1") -> Request:
    need = None if gb is None else int(gb * GB)
    return Request("/locks", key, 8, "this fit", gpu=True, need_bytes=need, alone=alone)


def holds(slot: int, promised_gb: float | None, foreign_gb: float = 0) -> Holder:
    reserved = None if promised_gb is None else int(promised_gb * GB)
    return Holder(slot, 100 + slot, f"fit {slot}", reserved, int(foreign_gb * GB))


def reads(used_gb: float, processes: dict[int, float | None] | None = None) -> Reading:
    by_pid = {
        pid: None if used is None else int(used * GB) for pid, used in (processes or {}).items()
    }
    return Reading(CARD, CARD - int(used_gb * GB), by_pid)


# What is free is 40 GB less what is used; what can be had is less what neighbours may yet use.
ROOMS = {
    "an empty card": (reads(0), [], 40),
    "a neighbour that uses what it was promised": (reads(10, {100: 10}), [holds(0, 10)], 30),
    "a neighbour that has used nothing yet": (reads(0), [holds(0, 10)], 30),
    "a neighbour that has used a part": (reads(4, {100: 4}), [holds(0, 10)], 30),
    "a neighbour that uses more than it was promised": (reads(12, {100: 12}), [holds(0, 10)], 28),
    "a neighbour without a promise, as memory could not be read": (
        reads(6, {100: 6}),
        [holds(0, 0)],
        34,
    ),
    "one that has begun and one that has not": (
        reads(8, {100: 8, 101: 0}),
        [holds(0, 10), holds(1, 5)],
        25,
    ),
    "one that has begun and one that NVML does not list yet, as another program came": (
        reads(24, {9: 20, 100: 4}),
        [holds(0, 10), holds(1, 5)],
        5,
    ),
    "other programs alone": (reads(33, {9: 30, 8: 3}), [], 7),
    "another program beside a neighbour": (
        reads(14, {9: 10, 100: 4}),
        [holds(0, 6, foreign_gb=10)],
        24,
    ),
    "a neighbour's foreign memory of old, when each process is known": (
        reads(4, {100: 4}),
        [holds(0, 6, foreign_gb=10)],
        34,
    ),
    "a container, where no process is told": (reads(4), [holds(0, 10)], 30),
    "a container, where the neighbours use all their promises": (
        reads(15),
        [holds(0, 10), holds(1, 5)],
        25,
    ),
    "a container, where the neighbours use more than their promises": (
        reads(17),
        [holds(0, 10), holds(1, 5)],
        23,
    ),
    "a container, with foreign memory that was there before": (
        reads(9),
        [holds(0, 10, foreign_gb=8)],
        22,
    ),
    "a container, with foreign memory that has gone since": (
        reads(2),
        [holds(0, 10, foreign_gb=20)],
        28,
    ),
    "a container, with amounts that are not told": (
        reads(4, {100: None}),
        [holds(0, 10)],
        30,
    ),
    "pids of another namespace": (reads(4, {7: 4}), [holds(0, 10)], 30),
    "a card that is full": (reads(40, {9: 40}), [], 0),
}


@pytest.mark.parametrize("case", ROOMS)
def test_room_is_what_is_free_and_not_promised(case: str) -> None:
    reading, others, room_gb = ROOMS[case]
    assert _room(reading, others) == room_gb * GB


@pytest.mark.parametrize("case", ROOMS)
def test_an_exact_fit_is_a_fit_and_a_byte_more_is_none(case: str) -> None:
    reading, others, room_gb = ROOMS[case]
    exact = wants(room_gb)
    if room_gb:
        assert shortage(exact, reading, others) == ""
    more = replace(exact, need_bytes=room_gb * GB + 1)
    assert shortage(more, reading, others).startswith(
        f"needs {room_gb:.1f} GB of GPU-1, {room_gb:.1f} of 40.0 GB can be had;"
    )


@pytest.mark.parametrize("known", [True, False])
def test_a_fit_that_was_just_admitted_counts_before_nvml_shows_it(known: bool) -> None:
    # The first uses what it was promised; the second has no CUDA context yet.
    others = [holds(0, 10), holds(1, 25)]
    reading = reads(10, {100: 10} if known else None)
    assert shortage(wants(5), reading, others) == ""
    assert shortage(wants(6), reading, others) != ""


@pytest.mark.parametrize("reading", [reads(0), reads(39, {9: 39}), None])
def test_a_fit_that_wants_the_gpu_alone_gets_it_when_nobody_holds_a_slot(
    reading: Reading | None,
) -> None:
    assert shortage(wants(None, alone=True), reading, []) == ""


def test_a_fit_that_ran_out_of_memory_waits_until_all_others_have_left() -> None:
    said = shortage(wants(2, alone=True), reads(1, {100: 1}), [holds(0, 1)])
    assert said == "wants GPU-1 alone after it ran out of memory, held by fit 0 (pid 100)"


def test_a_fit_whose_need_is_not_known_has_the_gpu_for_itself() -> None:
    assert shortage(wants(None), reads(30, {9: 30}), []) == ""
    said = shortage(wants(None), reads(1, {100: 1}), [holds(0, 1), holds(3, 2)])
    assert said == (
        "wants GPU-1 alone as its need is not known yet, held by fit 0 (pid 100), fit 3 (pid 103)"
    )
    holder = _as_holder(wants(None), 0, reads(0), [])
    assert holder.reserved_bytes is None


@pytest.mark.parametrize("request_", [wants(1), wants(None), wants(1, alone=True)])
@pytest.mark.parametrize("reading", [reads(0), None])
def test_nobody_joins_a_fit_that_has_the_gpu_for_itself(
    request_: Request, reading: Reading | None
) -> None:
    said = shortage(request_, reading, [holds(2, None)])
    assert said == "GPU-1 is reserved for one fit alone: fit 2 (pid 102)"


def test_where_memory_cannot_be_read_slots_alone_decide() -> None:
    assert shortage(wants(None), None, [holds(0, 0)]) == ""
    assert shortage(wants(1000), None, [holds(0, 0), holds(1, 30)]) == ""
    assert _as_holder(wants(None), 0, None, []).reserved_bytes == 0
    assert _as_holder(wants(None, alone=True), 0, None, []).reserved_bytes is None


def test_a_gpu_for_one_process_is_free_when_the_process_before_has_gone() -> None:
    request = replace(wants(1), exclusive=True)
    # Its lock was free before the driver had taken its context down.
    said = shortage(request, reads(1, {99: 1}), [])
    assert said == "GPU-1 lets one process at a time use it, now pid 99"
    assert shortage(request, reads(0, {}), []) == ""


def test_the_reason_names_who_has_the_memory() -> None:
    reading = reads(36, {100: 4, 555: 20, 777: 8.5, 888: None})
    said = shortage(wants(12), reading, [holds(0, 6), holds(1, 1)])
    assert said == (
        "needs 12.0 GB of GPU-1, 1.0 of 40.0 GB can be had; in use or promised:"
        " fit 0 (pid 100): promised 6.0 GB, has 4.0;"
        " fit 1 (pid 101): promised 1.0 GB;"
        " pid 555 of another program: 20.0 GB;"
        " pid 777 of another program: 8.5 GB;"
        " pid 888 of another program: an unknown amount;"
        " 3.5 GB by processes that cannot be seen from here"
    )


def test_memory_that_nobody_here_has_is_told_too() -> None:
    said = shortage(wants(12), reads(30), [])
    assert said.endswith("in use or promised: 30.0 GB by processes that cannot be seen from here")
    driver_only = Reading(CARD, CARD - GB // 2, {})
    said = shortage(wants(40), driver_only, [])
    assert said.endswith("in use or promised: nobody that can be seen from here")


def test_a_margin_does_not_keep_a_fit_off_a_gpu_that_it_has_for_itself() -> None:
    request = replace(wants(44), least_bytes=38 * GB)
    assert shortage(request, reads(2, {9: 2}), []) == ""
    assert shortage(request, reads(3, {9: 3}), []).startswith("needs 38.0 GB of GPU-1, 37.0 of")
    assert shortage(request, reads(0), [holds(0, 1)]).startswith("needs 44.0 GB of GPU-1, 39.0 of")


@pytest.mark.parametrize(
    ("need", "total"),
    [
        (None, CARD),
        (Need(CARD), CARD),
        (Need(CARD), 0),
        (None, 0),
        (Need(1), CARD),
        (Need(2 * CARD, least_bytes=CARD), CARD),  # the margin alone is too much
    ],
)
def test_a_need_that_a_wait_can_meet_is_accepted(need: Need | None, total: int) -> None:
    check_need(need, total, "GPU-1")


def test_a_need_larger_than_the_gpu_is_refused_at_once() -> None:
    with pytest.raises(PlatformError) as raised:
        check_need(Need(41 * GB), CARD, "GPU-1")
    assert "expected at most the 40.0 GB of GPU-1, found 41.0" in str(raised.value)
    assert "Hint: lower it" in str(raised.value)


@pytest.mark.parametrize(
    ("total", "context", "cap"), [(10, 1, 9), (1.5, 1, 0.75), (1, 2, 0.5), (4, 0, 4)]
)
def test_torch_may_hold_what_its_context_leaves_and_half_at_least(
    total: float, context: float, cap: float
) -> None:
    assert Need(int(total * GB), int(context * GB)).cap_bytes == int(cap * GB)


# --- any history ---

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(1, 45), st.just(False)),
        st.tuples(st.just("admit"), st.none(), st.booleans()),
        st.tuples(st.just("allocate"), st.integers(0, 7), st.integers(0, 100)),
        st.tuples(st.just("end"), st.integers(0, 7), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, foreign_gb=st.integers(0, 40), seen=st.booleans(), begun=st.booleans())
def test_what_all_may_use_never_exceeds_the_card(
    steps: list[tuple[str, int | None, int | bool | None]],
    foreign_gb: int,
    seen: bool,
    begun: bool,
) -> None:
    """A holder may use what it was promised; what others had before all of them stays theirs.

    ``seen``: NVML tells the other program; ``begun``: it lists holders that use nothing yet.
    """
    foreign = foreign_gb * GB
    others: list[Holder] = []
    used: dict[int, int] = {}
    pids = iter(range(1000, 2000))

    def reading() -> Reading:
        processes: dict[int, int | None] = {
            pid: bytes_ for pid, bytes_ in used.items() if bytes_ or begun
        }
        if seen and foreign:
            processes[7] = foreign
        return Reading(CARD, CARD - foreign - sum(used.values()), processes)

    for step, first, second in steps:
        if step == "admit":
            request = wants(first, alone=bool(second))
            if len(others) < request.limit and not shortage(request, reading(), others):
                slot = min(set(range(8)) - {holder.slot for holder in others})
                made = _as_holder(request, slot, reading(), others)
                assert made.pid == os.getpid()
                pid = next(pids)
                others.append(
                    Holder(slot, pid, made.label, made.reserved_bytes, made.foreign_bytes)
                )
                used[pid] = 0
        elif others:
            holder = others[(first or 0) % len(others)]
            if step == "end":
                others.remove(holder)
                del used[holder.pid]
            else:
                most = CARD - foreign if holder.reserved_bytes is None else holder.reserved_bytes
                used[holder.pid] = max(used[holder.pid], most * int(second or 0) // 100)
        if any(holder.reserved_bytes is None for holder in others):
            assert len(others) == 1
        else:
            promised = sum(holder.reserved_bytes or 0 for holder in others)
            assert not others or promised + foreign <= CARD
