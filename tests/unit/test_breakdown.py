"""Where the time of a round went: the arithmetic, and what the report makes of it."""

import pytest
from made_runs import metrics_line, run_folder, write_lines

from fedhpc.federation.breakdown import (
    PHASES,
    USES,
    SlotAccount,
    SlotLedger,
    SlotSeconds,
    Stopwatch,
)
from fedhpc.report import breakdown, page, summary


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_each_moment_counts_once_for_the_innermost_phase() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now_s += 1
    with watch.phase("receive"):
        clock.now_s += 2
        with watch.phase("wait"):
            clock.now_s += 4
        clock.now_s += 8
    clock.now_s += 16
    assert watch.lap() == {"other": 17, "receive": 10, "wait": 4}
    clock.now_s += 32
    assert watch.lap() == {"other": 32}


def test_a_phase_that_ends_with_an_error_ends() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def fail() -> None:
        with watch.phase("evaluate"):
            clock.now_s += 1
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    clock.now_s += 2
    assert watch.lap() == {"evaluate": 1, "other": 2}


def test_a_phase_that_a_lap_interrupts_goes_on() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.phase("wait"):
        clock.now_s += 1
        assert watch.lap() == {"wait": 1, "other": 0}
        clock.now_s += 2
    assert watch.lap() == {"wait": 2, "other": 0}


def test_slots_without_a_fit_are_idle_while_clients_are_asked_and_between_while_not() -> None:
    ledger = SlotLedger(0.0)
    ledger.note(1.0, slots=3, busy=0, asked=False)  # no slot was there before
    ledger.note(3.0, slots=3, busy=2, asked=True)
    ledger.note(7.0, slots=3, busy=1, asked=True)
    ledger.note(8.0, slots=3, busy=0, asked=False)
    assert ledger.read(10.0) == SlotSeconds(busy_s=9.0, idle_s=6.0, between_s=12.0)
    ledger.note(10.0, slots=1, busy=2, asked=True)  # a GPU was lost, its fits not yet handed back
    before = ledger.read(10.0)
    assert ledger.read(11.0) - before == SlotSeconds(busy_s=2.0)


def test_the_parts_of_the_slots_are_all_of_their_time() -> None:
    account = SlotAccount()
    before = SlotSeconds(5.0, 6.0, 7.0)
    account.lap(before)
    link_s = account.add(4.0, {"wait": 0.5, "start": 0.25, "run": 3.0, "return": 0.125})
    assert link_s == 0.125
    account.add(2.0, {"wait": 0.0, "start": 0.25, "run": 1.5, "return": 0.125})
    now = SlotSeconds(5.0 + 4 + 2 + 3, 6.0 + 1, 7.0 + 2)  # fits of 3 s led to nothing
    uses = account.lap(now)
    assert uses == {
        "wait": 0.5, "start": 0.5, "run": 4.5, "return": 0.25, "link": 0.25, "lost": 3.0,
        "idle": 1.0, "between": 2.0,
    }  # fmt: skip
    assert sum(uses.values()) == 12.0
    assert account.lap(now) == {}


def test_a_fit_from_before_counts_for_no_longer_than_it_was_held() -> None:
    account = SlotAccount()
    assert account.add(1.0, {"wait": 0.0, "start": 1.0, "run": 3.0, "return": 0.0}) == 0.0
    uses = account.lap(SlotSeconds(busy_s=1.0))
    assert (uses["start"], uses["run"], uses["lost"]) == (0.25, 0.75, 0.0)


def test_a_fit_that_began_while_a_result_was_on_its_way_counts_whole() -> None:
    account = SlotAccount()
    # Two fits of one slot; both results came at 5.0, the first had been there since 2.5.
    assert account.add(5.0, {"wait": 0.0, "start": 0.5, "run": 2.0, "return": 0.0}) == 2.5
    assert account.add(0.0, {"wait": 0.0, "start": 0.5, "run": 1.5, "return": 0.0}) == 0.0
    uses = account.lap(SlotSeconds(busy_s=5.0))
    assert (uses["start"], uses["run"], uses["link"]) == (1.0, 3.5, 0.5)
    assert sum(uses.values()) == 5.0


# --- the report ----------------------------------------------------------------------------------


def seconds(clients: float, **more: float) -> dict[str, float]:
    return {**dict.fromkeys(PHASES, 0.0), "clients": clients, **more}


def rounds_of(count: int) -> list[dict[str, object]]:
    return [
        metrics_line(
            number, 0.5, 1.0,
            seconds=seconds(9.0 if number == 1 else 3.0, evaluate=1.0),
            slot_seconds={**dict.fromkeys(USES, 0.0), "run": 4.0, "idle": 4.0},
        )
        for number in range(1, count + 1)
    ]  # fmt: skip


def test_the_first_round_does_not_count_for_the_means_where_there_are_more() -> None:
    assert breakdown.means(breakdown.of_server(rounds_of(3)))["clients"] == 3.0
    assert breakdown.means(breakdown.of_server(rounds_of(1)))["clients"] == 9.0
    assert breakdown.means([]) == {}
    assert (
        breakdown.largest(rounds_of(3))
        == "server: clients 75%, evaluate 25%\nslots: run 50%, idle 50%"
    )
    rows = {row[0]: row[1:] for row in breakdown.table(rounds_of(3))[1]}
    assert rows["server: clients"] == ["9.000", "3.000", "75.0%"]
    assert rows["slots: idle"] == ["4.000", "4.000", "50.0%"]


def test_rounds_of_an_older_fedhpc_have_no_breakdown() -> None:
    lines = [metrics_line(1, 0.5, 1.0, seconds={"train": 1.0, "aggregate": 0.1})]
    assert breakdown.of_server(lines) == breakdown.of_slots(lines) == []
    assert breakdown.table(lines)[1] == []
    assert breakdown.largest(lines) == ""
    assert breakdown.figure(lines) is None


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_figure_has_a_panel_of_the_server_and_one_of_the_slots(count: int) -> None:
    figure = breakdown.figure(rounds_of(count))
    assert figure is not None
    for axes in figure.axes:
        names = axes.get_legend_handles_labels()[1]
        assert len(names) == 2  # what is never there is not in the legend
        bars = len(axes.patches) / len(names)
        assert bars == count if count < 80 else bars <= 80
    top = max(patch.get_y() + patch.get_height() for patch in figure.axes[0].patches)
    assert top == pytest.approx({1: 10, 3: 10, 1000: 4.46}[count], abs=0.02)


def test_the_page_says_where_the_time_went(tmp_path) -> None:
    paths = run_folder(tmp_path / "runs")
    write_lines(paths.metrics, rounds_of(3))
    text = page.build(summary.collect(paths), [])
    assert "<td>server: clients</td>" in text
    assert '<td class="n">75.0%</td>' in text
