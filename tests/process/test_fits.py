"""The fits of an array task on simulated GPUs: how many at a time, and what a lost GPU leads to."""

import json
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import fit_entries
import pytest
from entries import wait_until

from fedhpc import config, fits
from fedhpc.errors import GpuLost, PlatformError
from fedhpc.federation import grid_pb2, message_ids
from fedhpc.isolation import ChildPool, Gpu, PoolOptions, gpu_slots
from fedhpc.isolation.nvml import Reading
from fedhpc.isolation.peaks import Peaks
from fedhpc.isolation.telemetry import Sampler
from fedhpc.paths import RunPaths

GB = fit_entries.GB
GPUS = [Gpu("GPU-a", "a simulated card", 16 * GB), Gpu("GPU-b", "a simulated card", 16 * GB)]


class Cards:
    """Simulated GPUs that are empty, and may be lost."""

    def __init__(self) -> None:
        self.lost: set[str] = set()

    def memory(self, gpu: Gpu) -> Reading:
        if gpu.id in self.lost:
            raise GpuLost(f"{gpu.id} does not answer any more")
        return Reading(gpu.total_bytes, gpu.total_bytes, {})


class Link:
    """Collects what would go to the server."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[grid_pb2.FromArrayTask] = queue.SimpleQueue()
        self.slots: list[int] = []
        self.results: dict[int, grid_pb2.Result] = {}
        self.handed_back: list[str] = []
        self.waits: list[float] = []
        self.hurried_after: list[int] = []

    def hurry(self) -> None:
        self.hurried_after.append(len(self.results))

    def send(self, events: Any, *, within_s: float = 0.0) -> None:
        for event in events:
            if event.HasField("slots"):
                self.slots.append(event.slots.slots)
            elif event.HasField("result"):
                client = message_ids.read(event.result.message_id).client_id
                self.results[client] = event.result
                self.waits.append(within_s)
            elif event.HasField("hand_back"):
                self.handed_back.append(event.hand_back.message_id)


class ArrayTask:
    """`Fits` with a pool of real children on two simulated GPUs."""

    def __init__(self, folder: Path, pool: ChildPool, cards: Cards, sets: dict[str, Any]) -> None:
        self.paths = RunPaths(folder)
        settings = config.parse({"isolation": sets}, "experiment.yaml")
        slots = gpu_slots(
            GPUS,
            settings.isolation.slots_per_gpu,
            cpus=8,
            threads_per_fit=1,
            lock_folder=folder / "locks",
        )
        self.link = Link()
        self.problems: list[PlatformError] = []
        self.sampler = Sampler(self.paths.memory_of(0), pool, {}, gpus=GPUS, nvml=cards)  # type: ignore[arg-type]
        self.fits = fits.Fits(pool, slots, self.paths, settings, self.sampler, self.problems.append)
        self.fits.use(self.link)  # type: ignore[arg-type]

    def give(self, clients: range) -> None:
        for client in clients:
            message_id = message_ids.make(message_ids.Parts(1, client, "train", 0))
            work = grid_pb2.Work(message_id=message_id)
            self.fits.handle(grid_pb2.ToArrayTask(work=work))

    def most_at_a_time(self, clients: range) -> int:
        stamps = [line.split() for line in (self.paths.root / "stamps").read_text().splitlines()]
        running = most = 0
        for _, sign, _ in sorted(line for line in stamps if int(line[2]) in clients):
            running += 1 if sign == "+" else -1
            most = max(most, running)
        return most


@pytest.fixture
def cards() -> Cards:
    return Cards()


@pytest.fixture
def pool(tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildPool]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *_paths()]))
    monkeypatch.setenv("FEDHPC_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv(entries.TOKEN, tmp_path.name)
    monkeypatch.setattr(fits, "FIT", "fit_entries")
    (tmp_path / "locks").mkdir(mode=0o700)
    options = PoolOptions(preload=["torch", "fit_entries"], standby=False, huge_pages=False)
    with ChildPool(options, cards) as pool:  # type: ignore[arg-type]
        yield pool


def _paths() -> list[str]:
    return list(filter(None, [os.environ.get("PYTHONPATH")]))


def test_automatic_slots_begin_with_one_a_gpu_and_follow_what_fits_need(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": "auto"})
    assert task.fits.capacity() == 2
    task.give(range(1))
    assert wait_until(lambda: 0 in task.link.results, 30)
    # 3 GB, a tenth, 256 MB and a usual context of 1 GB: three fit on a GPU of 16 GB.
    assert wait_until(lambda: task.fits.capacity() == 6)
    assert task.link.slots[-1] == 6
    task.give(range(1, 13))
    assert wait_until(lambda: len(task.link.results) == 13, 60)
    assert not any(result.HasField("failure") for result in task.link.results.values())
    assert 3 <= task.most_at_a_time(range(1, 13)) <= 6
    task.sampler.close()
    (peaks,) = task.paths.peaks.iterdir()
    assert json.loads(peaks.read_text())["peak_bytes"] == fit_entries.PEAK


def test_results_wait_for_others_while_fits_follow_and_no_slot_is_idle(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 1})
    task.give(range(5))
    assert wait_until(lambda: len(task.link.results) == 5, 60)
    assert wait_until(lambda: 5 in task.link.hurried_after)
    # At least one fit waits behind the first two, and none behind the last two or three.
    assert [wait > 0 for wait in task.link.waits[:2]] == [True, True]
    assert task.link.waits[-1] == 0


@pytest.mark.parametrize("standby", ["auto", False])
def test_children_stand_by_for_slots_that_have_nothing_more_to_do(
    pool: ChildPool,
    cards: Cards,
    tmp_path: Path,
    standby: str | bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 1, "standby": standby})
    asked: list[int] = []
    monkeypatch.setattr(pool, "stand_by", lambda slot: asked.append(slot.index))
    task.give(range(2))
    assert wait_until(lambda: len(task.link.results) == 2, 60)
    time.sleep(0.5)
    # Not before the first fit: the fork server has more to do then.
    assert sorted(asked) == ([0, 1] if standby else [])


def test_fits_of_unknown_need_run_alone_and_the_first_one_tells_for_all(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 3})
    task.give(range(12))
    assert wait_until(lambda: len(task.link.results) == 12, 60)
    stamps = [line.split() for line in (tmp_path / "stamps").read_text().splitlines()]
    ordered = sorted(stamps)
    assert [sign for _, sign, _ in ordered[:2]] in (["+", "+"], ["+", "-"])
    first_end = next(index for index, line in enumerate(ordered) if line[1] == "-")
    assert first_end <= 2, "no GPU has a second fit before the first of all has told its need"
    assert task.most_at_a_time(range(12)) > 2
    task.sampler.close()


def test_few_fits_spread_over_all_gpus_whichever_slots_were_used_before(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 3, "gpu_memory_gb": 4.0})

    def gpus_of(clients: range) -> list[str]:
        task.give(clients)
        assert wait_until(lambda: set(clients) <= set(task.link.results), 30)
        return sorted(task.link.results[client].fit.gpu for client in clients)

    for first in range(0, 15, 3):  # three at a time: the slots do not come free in their order
        gpus_of(range(first, first + 1))
        assert gpus_of(range(first + 1, first + 3)) == ["GPU-a", "GPU-b"]
    task.sampler.close()


def test_a_given_need_admits_as_many_as_fit(pool: ChildPool, cards: Cards, tmp_path: Path) -> None:
    sets = {"slots_per_gpu": "auto", "gpu_memory_gb": 8.0}
    task = ArrayTask(tmp_path, pool, cards, sets)
    assert task.fits.capacity() == 4
    task.give(range(8))
    assert wait_until(lambda: len(task.link.results) == 8, 60)
    assert task.most_at_a_time(range(8)) <= 4
    assert not task.paths.peaks.exists()
    task.sampler.close()


def test_a_need_that_no_gpu_has_fails_at_once_and_says_so(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"gpu_memory_gb": 17.0})
    task.give(range(1))
    assert wait_until(lambda: 0 in task.link.results, 30)
    reason = task.link.results[0].failure.reason
    assert "isolation.gpu_memory_gb: expected at most the 16.0 GB of GPU-" in reason
    assert "found 17.0" in reason
    task.sampler.close()


def test_a_need_learned_on_a_larger_gpu_gets_this_one_alone(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 2})
    kind = task.fits._kind_of("train")
    Peaks(task.paths.peaks).note(kind, 30 * GB, GB)  # by an array task whose GPUs have 80 GB
    task.give(range(4))
    assert wait_until(lambda: len(task.link.results) == 4, 60)
    assert not any(result.HasField("failure") for result in task.link.results.values())
    assert task.most_at_a_time(range(4)) <= len(GPUS)
    task.sampler.close()


def test_a_lost_gpu_hands_its_fits_back_and_the_other_goes_on(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    cards.lost.add("GPU-b")
    task = ArrayTask(tmp_path, pool, cards, {"slots_per_gpu": 2, "gpu_memory_gb": 4.0})
    task.give(range(4))
    assert wait_until(lambda: len(task.link.results) + len(set(task.link.handed_back)) == 4, 30)
    assert task.link.handed_back, "the lost GPU had work"
    assert task.fits.capacity() == task.link.slots[-1] == 2
    assert task.problems == []
    task.give(range(4, 10))
    assert wait_until(lambda: set(task.link.results) >= set(range(4, 10)), 60)
    assert task.most_at_a_time(range(4, 10)) <= 2
    task.sampler.close()


def test_an_array_task_whose_gpus_are_all_lost_gives_up(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    cards.lost |= {"GPU-a", "GPU-b"}
    task = ArrayTask(tmp_path, pool, cards, {})
    task.give(range(2))
    assert wait_until(lambda: task.problems, 30)
    assert isinstance(task.problems[0], GpuLost)
    assert wait_until(lambda: len(task.link.handed_back) == 2, 30)
    assert task.link.slots[-1] == 0
    assert task.link.results == {}
    task.sampler.close()


def test_a_fits_line_of_telemetry_has_what_it_used(
    pool: ChildPool, cards: Cards, tmp_path: Path
) -> None:
    task = ArrayTask(tmp_path, pool, cards, {})
    task.give(range(1))
    assert wait_until(lambda: 0 in task.link.results, 30)
    time.sleep(0.1)
    task.sampler.close()
    lines = [json.loads(line) for line in task.paths.memory_of(0).read_text().splitlines()]
    assert lines[0]["kind"] == "start"
    assert [gpu["id"] for gpu in lines[0]["gpus"]] == ["GPU-a", "GPU-b"]
    (fit,) = [line for line in lines if line["kind"] == "fit"]
    assert (fit["client"], fit["round"], fit["verb"], fit["ok"]) == (0, 1, "train", True)
    assert (fit["before_mb"], fit["peak_mb"], fit["after_mb"]) == (0, 3000, 0)
    assert 0.3 <= fit["ended_s"] - fit["began_s"] < 10
    assert any(line["kind"] == "sample" and line["running"] == 0 for line in lines[2:])
