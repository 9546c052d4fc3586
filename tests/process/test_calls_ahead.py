"""Calls that a kept child has ahead of their turn: what comes back, and what cannot go wrong."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import read, wait_until

from fedhpc.errors import FitCancelled, FitDied
from fedhpc.isolation import Ahead, ChildPool, PoolOptions, Reply, Slot, channel

SLOT = Slot(0)
HERE = Path(__file__).parent


def light(**options: Any) -> PoolOptions:
    return PoolOptions(**{"preload": ["json"], "standby": False, "fits_per_process": 0, **options})


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    token = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, token)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    # The fixture's pool lives on, with the socket of the child that ended last.
    yield from entries.nothing_is_left(token, sockets="pool" in request.fixturenames)


@pytest.fixture
def pool() -> Iterator[ChildPool]:
    """A pool whose child is kept, and has answered once."""
    with ChildPool(light()) as pool:
        take(pool, "first", ["echo", 0])
        yield pool


def encoded(call: list[Any]) -> bytes:
    return json.dumps(call).encode()


def ahead(**calls: list[Any]) -> list[Ahead]:
    return [Ahead(tag, (encoded(call),)) for tag, call in calls.items()]


def run(
    pool: ChildPool, tag: str, call: list[Any], following: list[Ahead] | None = None,
    timeout_s: float = 30.0,
) -> Reply:  # fmt: skip
    return pool.run(
        "entries:do", [encoded(call)], slot=SLOT, timeout_s=timeout_s, tag=tag,
        following=following or [],
    )  # fmt: skip


def take(
    pool: ChildPool, tag: str, call: list[Any], following: list[Ahead] | None = None
) -> tuple[int, Any]:
    """Return the pid that answered a call, and what it answered."""
    reply = run(pool, tag, call, following)
    pid, found = json.loads(read(reply.buffers[0]))
    reply.close()
    return pid, found


def test_calls_ahead_are_answered_in_their_order_by_the_same_process(pool: ChildPool) -> None:
    calls = {f"call {n}": ["echo", n] for n in range(20)}
    tags = list(calls)
    found = []
    for n, tag in enumerate(tags):
        following = {t: calls[t] for t in tags[n + 1 : n + 5]}
        found.append(take(pool, tag, calls[tag], ahead(**following)))
    assert [answer for _, answer in found] == list(range(20))
    assert len({pid for pid, _ in found}) == 1


def test_a_call_ahead_begins_before_it_is_made_and_runs_once(
    pool: ChildPool, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    take(pool, "a", ["echo", 1], ahead(b=["append", str(mark)]))
    assert wait_until(mark.exists)
    took = run(pool, "b", ["append", str(mark)])
    assert 0 <= took.start_s < 1
    assert 0 <= took.return_s < 1
    assert mark.read_text() == "x"


def test_nothing_is_sent_ahead_to_a_child_that_may_not_be_kept(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with ChildPool(light(fits_per_process=1)) as pool:
        pids = [take(pool, f"{n}", ["echo", 1], ahead(b=["append", str(mark)])) for n in range(3)]
    assert len({pid for pid, _ in pids}) == 3
    assert not mark.exists()


def test_replies_of_any_size_go_to_their_own_calls(pool: ChildPool) -> None:
    sizes = {f"{size}": ["zeros", size] for size in (10, 40_000, 3_000_000, 60_000, 0, 70_000)}
    tags = list(sizes)
    for n, (tag, call) in enumerate(sizes.items()):
        reply = run(pool, tag, call, ahead(**{t: sizes[t] for t in tags[n + 1 :]}))
        assert len(read(reply.buffers[1])) == int(tag)
        reply.close()


def test_replies_that_nobody_takes_leave_no_descriptor() -> None:
    with ChildPool(light()) as pool:
        take(pool, "first", ["echo", 0])
        take(pool, "a", ["echo", 1], ahead(b=["zeros", 3_000_000], c=["echo", 2]))
        take(pool, "c", ["echo", 2], ahead(d=["zeros", 3_000_000], e=["zeros", 3_000_000]))
        run(pool, "d", ["zeros", 3_000_000]).close()
        time.sleep(0.2)  # the last one is answered and lies there; that nothing stays is checked


def test_a_call_ahead_that_nobody_makes_is_passed_over(pool: ChildPool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    following = ahead(b=["append", str(mark)], c=["echo", 3])
    first, _ = take(pool, "a", ["echo", 1], following)
    assert take(pool, "c", ["echo", 3]) == (first, 3)
    assert mark.read_text() == "x"


def test_one_that_nobody_makes_and_that_hangs_does_not_hold_up_the_next(pool: ChildPool) -> None:
    first, _ = take(pool, "a", ["echo", 1], ahead(b=["sleep", 60], c=["echo", 3]))
    called_s = time.monotonic()
    pid, found = take(pool, "c", ["echo", 3])
    assert found == 3
    assert pid != first
    assert time.monotonic() - called_s < 10
    assert wait_until(lambda: first not in pool.children())


def test_a_short_call_ahead_is_passed_over_at_once_and_costs_no_process(
    pool: ChildPool, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    first, _ = take(pool, "a", ["echo", 1], ahead(b=["echo", 2], c=["append", str(mark)]))
    pool.pass_over(SLOT)
    assert mark.exists()
    pool.pass_over(SLOT)
    assert take(pool, "d", ["echo", 4]) == (first, 4)


def test_a_long_call_ahead_that_is_passed_over_ends_with_its_process(pool: ChildPool) -> None:
    first, _ = take(pool, "a", ["echo", 1], ahead(b=["sleep", 60], c=["echo", 3]))
    called_s = time.monotonic()
    pool.pass_over(SLOT)
    assert time.monotonic() - called_s < 5
    assert wait_until(lambda: first not in pool.children())
    pid, found = take(pool, "c", ["echo", 3])
    assert (pid != first, found) == (True, 3)


def test_a_call_ahead_has_its_own_deadline(pool: ChildPool) -> None:
    take(pool, "a", ["echo", 1], ahead(b=["sleep", 60]))
    called_s = time.monotonic()
    with pytest.raises(FitDied, match="no reply within 1 s"):
        run(pool, "b", ["sleep", 60], timeout_s=1)
    assert time.monotonic() - called_s < 10
    assert take(pool, "c", ["echo", 3])[1] == 3


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_child_that_ends_takes_no_call_ahead_with_it(
    pool: ChildPool, tmp_path: Path, how: str
) -> None:
    mark = tmp_path / "mark"
    calls = {"a": ["once", how, str(mark)], "b": ["echo", 2]}
    first, _ = take(pool, "0", ["echo", 0], ahead(**calls))
    second, found = take(pool, "a", calls["a"], ahead(b=calls["b"]))
    assert (second != first, found) == (True, "again")
    assert take(pool, "b", ["echo", 2]) == (second, 2)


def test_calls_ahead_of_one_that_is_cancelled_begin_anew(pool: ChildPool) -> None:
    def cancel(_: int | None) -> None:
        pool.cancel("a")

    with pytest.raises(FitCancelled):
        pool.run(
            "entries:do", [encoded(["sleep", 60])], slot=SLOT, timeout_s=30, tag="a",
            following=ahead(b=["echo", 2]), on_admitted=cancel,
        )  # fmt: skip
    assert take(pool, "b", ["echo", 2])[1] == 2


def test_a_child_that_leaves_after_some_calls_leaves_the_others_to_the_next() -> None:
    calls = {f"call {n}": ["echo", n] for n in range(8)}
    tags = list(calls)
    with ChildPool(light(fits_per_process=3)) as pool:
        found = []
        for n, tag in enumerate(tags):
            following = ahead(**{t: calls[t] for t in tags[n + 1 :]})
            found.append(take(pool, tag, calls[tag], following))
    assert [answer for _, answer in found] == list(range(8))
    pids = [pid for pid, _ in found]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 2]


def test_a_child_that_a_call_leaves_unclean_answers_none_of_those_ahead() -> None:
    with ChildPool(light(fits_per_process="auto", preload=("torch",))) as pool:
        first, _ = take(pool, "first", ["echo", 0])
        assert take(pool, "a", ["echo", 1], ahead(b=["set", "LEFT", "1"], c=["get", "LEFT"])) == (
            first,
            1,
        )
        reply = run(pool, "b", ["set", "LEFT", "1"], ahead(c=["get", "LEFT"]))
        assert reply.replaced == "environment: LEFT"
        reply.close()
        pid, found = take(pool, "c", ["get", "LEFT"])
        assert pid != first
        assert found is None


def test_more_calls_ahead_than_a_socket_takes_are_all_answered(pool: ChildPool) -> None:
    load = "x" * 30_000
    calls = {f"call {n}": ["length", load, 0.01] for n in range(60)}
    tags = list(calls)
    for n, tag in enumerate(tags):
        following = ahead(**{t: calls[t] for t in tags[n + 1 :]})
        assert take(pool, tag, calls[tag], following)[1] == len(load)


def test_files_can_be_buffers_of_calls_ahead(pool: ChildPool) -> None:
    content = os.urandom(channel.MAX_INLINE + 1)
    fd = channel.write_memory([content])
    one = encoded(["length of the second"])
    following = [Ahead("b", (one, fd))]
    take(pool, "a", ["echo", 1], following)
    reply = pool.run("entries:do", [one, fd], slot=SLOT, timeout_s=30, tag="b")
    assert json.loads(read(reply.buffers[0]))[1] == len(content)
    reply.close()
    os.close(fd)
