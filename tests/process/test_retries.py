"""Which fits run again after a death, and how often."""

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from entries import wait_until

from fedhpc import config, files
from fedhpc.errors import (
    FitDied,
    FitFailed,
    FitKilled,
    FitOutOfMemory,
    ForkServerDied,
    GpuLost,
    SlotTimeout,
)
from fedhpc.federation import grid_pb2, message_ids
from fedhpc.fits import Fits
from fedhpc.isolation import Reply, Slot, channel, failures
from fedhpc.paths import RunPaths

REPOSITORY = Path(__file__).parents[2]


def killed() -> FitKilled:
    return FitKilled("the child was killed by SIGKILL")


def killed_for_memory() -> FitKilled:
    error = FitKilled("the child was killed by the kernel's out-of-memory killer")
    error.for_memory = True
    return error


def terminated() -> FitDied:
    """Return what a child becomes whose job Slurm ends."""
    return failures.died(-signal.SIGTERM, (0, 0), None)


def fork_server_died() -> ForkServerDied:
    return ForkServerDied("the fork server ended, and the child with it")


class DyingPool:
    """A pool whose calls end as the test says, one after the other, and then always so."""

    def __init__(self, endings: list[Callable[[], Exception]]) -> None:
        self.calls = 0
        self.during: Callable[[], object] = lambda: None
        self._endings = endings

    def run(self, *_: object, **__: object) -> None:
        self.calls += 1
        self.during()
        raise self._endings[min(self.calls, len(self._endings)) - 1]()

    def cancel(self, _: str) -> None:
        pass

    def pass_over(self, _: Slot) -> None:
        pass

    def stand_by(self, _: Slot) -> None:
        pass


class NoSampler:
    def began(self, *_: object) -> None: ...

    def ended(self, *_: object, **__: object) -> None: ...


class Link:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.results: list[grid_pb2.Result] = []
        self.backs: list[grid_pb2.HandBack] = []
        self.came = threading.Event()

    def hurry(self) -> None: ...

    def send(self, events: Any, *, within_s: float = 0.0) -> None:
        for event in events:
            if event.HasField("result"):
                self.results.append(event.result)
                self.came.set()
            elif event.HasField("hand_back"):
                self.backs.append(event.hand_back)
                self.came.set()


def succeed(pool: DyingPool, message_id: str, *blobs: int) -> None:
    """Let the next call of a pool return a result."""
    result = grid_pb2.Result(message_id=message_id)
    for i in range(len(blobs)):
        result.blobs.add(digest=f"b{i}", size=1)
    done = channel.write_memory([result.SerializeToString()])
    reply = Reply([done, *blobs], 0, 0, 0, 0, 0, [])

    def run(*_: object, **__: object) -> Reply:
        pool.calls += 1
        pool.during()
        return reply

    pool.run = run  # type: ignore[method-assign, assignment]


def start(pool: DyingPool, folder: Path) -> tuple[Fits, Link, grid_pb2.Work]:
    document = folder / "config.yaml"
    document.write_text((REPOSITORY / "configs/digits.yaml").read_text())
    link: Any = Link()
    fits = Fits(
        pool,  # type: ignore[arg-type]
        [Slot(0)],
        RunPaths(folder),
        config.load(document),
        NoSampler(),  # type: ignore[arg-type]
        lambda _: None,
    )
    fits.use(link)
    message_id = message_ids.make(message_ids.Parts(1, 3, "train", 0))
    return fits, link, grid_pb2.Work(message_id=message_id)


@pytest.mark.parametrize(
    ("endings", "calls"),
    [
        ([killed], 3),
        ([fork_server_died], 3),
        ([terminated], 3),
        ([killed, fork_server_died], 3),
        ([killed_for_memory], 2),
        ([killed, killed_for_memory], 3),
        ([killed_for_memory, killed], 2),
        ([lambda: FitDied("the child exited with code 3 before it replied")], 1),
        ([lambda: FitDied("no reply within 1 s")], 1),
        ([lambda: FitFailed("ValueError: x")], 1),
        ([lambda: SlotTimeout("waited 1 s for a slot")], 1),
        ([killed, lambda: FitFailed("ValueError: x")], 2),
        ([lambda: FitOutOfMemory("CUDA out of memory")], 1),
    ],
    ids=[
        "killed", "fork server", "terminated", "killed and fork server", "out of memory",
        "then out of memory", "out of memory then killed", "exit", "deadline", "exception",
        "no slot", "killed and exception", "out of GPU memory",
    ],
)  # fmt: skip
def test_a_fit_runs_again_only_after_a_kill_from_outside(
    endings: list[Callable[[], Exception]],
    calls: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = DyingPool(endings)
    fits, link, work = start(pool, tmp_path)
    with caplog.at_level(logging.WARNING):
        fits.handle(grid_pb2.ToArrayTask(work=work))
        assert link.came.wait(5)
    assert pool.calls == calls
    assert len(link.results) == 1
    last = endings[min(calls, len(endings)) - 1]()
    assert str(last) in link.results[0].failure.reason
    # What has run several times already is not tried again by the server.
    several = isinstance(last, FitKilled | ForkServerDied | FitOutOfMemory)
    assert link.results[0].failure.final is several
    assert caplog.text.count("it runs again") == calls - 1


def test_a_fit_that_was_cancelled_meanwhile_does_not_run_again(tmp_path: Path) -> None:
    pool = DyingPool([killed])
    fits, link, work = start(pool, tmp_path)
    cancel = grid_pb2.Cancel(message_id=work.message_id)
    pool.during = lambda: fits.handle(grid_pb2.ToArrayTask(cancel=cancel))
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert wait_until(lambda: pool.calls)
    time.sleep(0.3)
    assert pool.calls == 1
    assert not link.results
    assert fits.held() == []


def test_a_fit_that_was_killed_after_a_new_link_runs_again_with_its_arrays(tmp_path: Path) -> None:
    pool = DyingPool([killed])
    fits, link, work = start(pool, tmp_path)
    work.blobs.add(digest="d", size=3)
    chunk = grid_pb2.Chunk(digest="d", size=3, offset=0, data=b"abc")
    pool.during = lambda: fits.use(link)  # type: ignore[arg-type]
    fits.handle(grid_pb2.ToArrayTask(chunk=chunk))
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert wait_until(lambda: pool.calls == 3)
    keep = grid_pb2.Keep(message_id=work.message_id)
    fits.handle(grid_pb2.ToArrayTask(keep=keep))  # before or after its end
    assert link.came.wait(5)
    assert "killed by SIGKILL" in link.results[0].failure.reason


def test_a_fit_that_comes_again_right_after_its_cancel_has_a_result_of_its_own(
    tmp_path: Path,
) -> None:
    pool = DyingPool([failures.cancelled, lambda: FitFailed("ValueError: x")])
    fits, link, work = start(pool, tmp_path)
    cancel = grid_pb2.Cancel(message_id=work.message_id)

    def come_again() -> None:
        pool.during = lambda: None
        fits.handle(grid_pb2.ToArrayTask(cancel=cancel))
        fits.handle(grid_pb2.ToArrayTask(work=work))

    pool.during = come_again
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert pool.calls == 2
    assert [result.failure.reason for result in link.results] == ["ValueError: x"]


def test_results_from_before_are_sent_to_a_server_only_when_it_wants_them(tmp_path: Path) -> None:
    pool = DyingPool([])
    fits, link, work = start(pool, tmp_path)
    succeed(pool, work.message_id)
    work.fingerprint = "f"
    pool.during = lambda: [fits.use(None), fits.use(link)]  # type: ignore[arg-type, func-returns-value]
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert wait_until(lambda: fits._held[work.message_id].result)
    held = [grid_pb2.Held(message_id=work.message_id, fingerprint="f")]
    for _ in range(2):  # two servers that it is offered to; the first one does not ask
        assert fits.held() == held
        fits.use(link)  # type: ignore[arg-type]
        assert not link.results
    keep = grid_pb2.Keep(message_id=work.message_id)
    fits.handle(grid_pb2.ToArrayTask(keep=keep))
    assert link.came.wait(5)
    accepted = grid_pb2.Accepted(message_id=work.message_id)
    fits.handle(grid_pb2.ToArrayTask(accepted=accepted))
    assert fits.held() == []
    assert (pool.calls, len(link.results)) == (1, 1)


def test_failures_from_before_are_not_offered_but_run_again_if_they_are_asked_for(
    tmp_path: Path,
) -> None:
    """The server may have had one, and wait for the retry that another array task runs."""
    pool = DyingPool([lambda: FitFailed("ValueError: x")])
    fits, link, work = start(pool, tmp_path)
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    fits.use(None)  # the link broke before the server could say that it has it
    assert fits.held() == []
    fits.use(link)  # type: ignore[arg-type]
    fits.handle(grid_pb2.ToArrayTask(keep=grid_pb2.Keep(message_id=work.message_id)))
    assert len(link.results) == 1
    link.came.clear()
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert (pool.calls, len(link.results)) == (2, 2)


def test_a_result_that_cannot_be_mapped_is_handed_back_and_the_slot_goes_on(tmp_path: Path) -> None:
    pool = DyingPool([])
    fits, link, work = start(pool, tmp_path)
    backs = link.backs
    closed = channel.write_memory([b"x"])
    os.close(closed)
    succeed(pool, work.message_id, closed)
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert "its result could not be read" in backs[0].reason
    assert fits.held() == []
    link.came.clear()
    succeed(pool, work.message_id)
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert not link.results[0].HasField("failure")


def test_a_fit_whose_arrays_are_not_there_is_handed_back_and_no_failure_of_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, link, work = start(DyingPool([]), tmp_path)
    open_whole = functools.partial(files.open_whole, timeout_s=0.1)
    monkeypatch.setattr(files, "open_whole", open_whole)
    work.blobs.add(digest="d", size=3, in_file=True)
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert (len(link.results), len(link.backs)) == (0, 1)
    assert f"the arrays of {work.message_id} are gone: wanted" in link.backs[0].reason
    assert fits.held() == []


def test_a_result_whose_file_is_gone_is_handed_back(tmp_path: Path) -> None:
    """Its server took the file and died before it said so."""
    pool = DyingPool([])
    fits, link, work = start(pool, tmp_path)
    result = grid_pb2.Result(message_id=work.message_id)
    result.blobs.add(digest="d", size=3, in_file=True)
    done = channel.write_memory([result.SerializeToString()])
    reply = Reply([done], 0, 0, 0, 0, 0, [])
    pool.run = lambda *_, **__: reply  # type: ignore[method-assign, assignment, misc]
    sent: list[grid_pb2.FromArrayTask] = []
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    link.send = sent.extend  # type: ignore[method-assign]
    fits.use(link)  # type: ignore[arg-type]
    fits.handle(grid_pb2.ToArrayTask(keep=grid_pb2.Keep(message_id=work.message_id)))
    assert [event.WhichOneof("event") for event in sent] == ["slots", "hand_back"]
    assert f"{work.message_id}.d.safetensors is gone" in sent[-1].hand_back.reason
    assert fits.held() == []


def test_a_fit_of_another_server_that_ends_late_is_no_answer_to_what_came_again(
    tmp_path: Path,
) -> None:
    pool = DyingPool([lambda: FitFailed("ValueError: old"), lambda: FitFailed("ValueError: new")])
    fits, link, work = start(pool, tmp_path)

    def be_asked_for_another() -> None:
        pool.during = lambda: None
        cancel = grid_pb2.Cancel(message_id=work.message_id)
        fits.handle(grid_pb2.ToArrayTask(cancel=cancel))
        work.fingerprint = "another"
        fits.handle(grid_pb2.ToArrayTask(work=work))

    pool.during = be_asked_for_another
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert [result.failure.reason for result in link.results] == ["ValueError: new"]


def test_a_cancel_that_met_no_child_is_made_up_for_when_the_next_one_has_its_slot(
    tmp_path: Path,
) -> None:
    pool = DyingPool([killed])
    fits, _, work = start(pool, tmp_path)
    cancel = grid_pb2.Cancel(message_id=work.message_id)
    run, killed_now = pool.run, []

    def run_and_admit(*_: object, on_admitted: Callable[[int | None], None], **__: object) -> None:
        fits.handle(grid_pb2.ToArrayTask(cancel=cancel))
        pool.cancel = killed_now.append  # type: ignore[method-assign]
        on_admitted(None)
        run()

    pool.run = run_and_admit  # type: ignore[method-assign, assignment]
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert wait_until(lambda: [tag.split()[0] for tag in killed_now] == [work.message_id])
    assert fits.held() == []


def test_a_peak_that_cannot_be_kept_costs_no_fit(tmp_path: Path) -> None:
    pool = DyingPool([])
    fits, link, work = start(pool, tmp_path)
    (tmp_path / "peaks").write_text("")  # where the folder would be
    done = channel.write_memory([grid_pb2.Result(message_id=work.message_id).SerializeToString()])
    reply = Reply([done], 0, 0, 0, 0, 0, [], gpu_peak_bytes=1)
    pool.run = lambda *_, **__: reply  # type: ignore[method-assign, assignment, misc]
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert link.came.wait(5)
    assert not link.results[0].HasField("failure")


def test_a_fit_that_lost_its_gpu_while_the_link_was_made_is_handed_back_over_it(
    tmp_path: Path,
) -> None:
    pool = DyingPool([lambda: GpuLost("GPU-1 does not answer any more")])
    fits, link, work = start(pool, tmp_path)
    pool.during = lambda: fits.use(None)
    fits.handle(grid_pb2.ToArrayTask(work=work))
    assert wait_until(lambda: fits.held() == [])
    sent: list[grid_pb2.FromArrayTask] = []
    link.send = sent.extend  # type: ignore[method-assign]
    fits.use(link)  # type: ignore[arg-type]
    fits.use(link)  # type: ignore[arg-type]
    backs = [event.hand_back.message_id for event in sent if event.HasField("hand_back")]
    assert backs == [work.message_id]
