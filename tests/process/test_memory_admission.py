"""Memory of a GPU that fits share: who may start, who waits for what, and what happens without.

The GPU is simulated: what its processes have is what they write into files.
"""

import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import Background, wait_until
from sharing_entries import (
    KEY,
    finish,
    held,
    light,
    lines,
    most_at_once,
    owner,
    reply_of,
    slots,
    value_of,
)
from simulated_nvml import GB, SimulatedNvml

from fedhpc.errors import (
    FitFailed,
    FitOutOfMemory,
    GpuLost,
    PlatformError,
    SlotTimeout,
)
from fedhpc.isolation import ChildPool, Slot, locks
from fedhpc.isolation.locks import SlotGroup

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    value = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, value)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    leftovers = entries.nothing_is_left(value)
    next(leftovers)
    yield value
    next(leftovers, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "locks"
    locks.prepare_folder(made)
    return made


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """The folder where processes write what they have."""
    made = tmp_path / "memory"
    made.mkdir()
    return made


def sharing(nvml: SimulatedNvml, **options: Any) -> ChildPool:
    return ChildPool(light(**options), nvml)  # type: ignore[arg-type]


def entered(log: Path) -> int:
    return sum(line["what"] == "in" for line in lines(log))


def waits_for(pool: ChildPool, words: str) -> bool:
    return wait_until(lambda: any(words in reason for reason in pool.waiting()), 20)


# --- memory decides ---


@pytest.mark.parametrize("tells", [True, False], ids=["processes told", "in a container"])
def test_two_runs_cannot_both_take_the_last_free_memory(
    tells: bool, folder: Path, log: Path, memory: Path
) -> None:
    """Each fit needs 6 of 10 GB, and uses them some time after it was admitted."""
    calls = [["use_memory", str(log), str(memory), 6, 0.1]] * 3
    settings = {"folder": str(folder), "calls": calls, "limit": 4, "need_gb": 6}
    owners = [owner("make_calls", **settings, memory=str(memory), tells=tells) for _ in range(2)]
    answers = finish(owners, 60)
    assert [len(set(answer)) for answer in answers] == [3, 3]
    assert most_at_once(lines(log)) == 1
    assert held(folder) == []


@pytest.mark.parametrize("tells", [True, False], ids=["processes told", "in a container"])
def test_as_many_run_at_once_as_memory_admits(
    tells: bool, folder: Path, log: Path, memory: Path
) -> None:
    nvml = SimulatedNvml(folder=memory)
    nvml.tells_processes = tells
    with sharing(nvml) as pool:
        calls = [
            Background(
                value_of, pool, slot, "use_memory_together", str(log), str(memory), 3, 3, need_gb=3
            )
            for slot in slots(folder, 5)
        ]
        for call in calls:
            call.result(30)
    assert most_at_once(lines(log)) == 3


def test_a_large_fit_at_the_head_of_the_queue_is_not_starved_by_small_ones(
    folder: Path, log: Path, memory: Path
) -> None:
    nvml = SimulatedNvml(folder=memory)
    mine = slots(folder, 4, limit=8)
    stop = log.with_name("stop")

    def small(slot: Slot) -> int:
        number = 0
        while not stop.exists():
            value_of(pool, slot, "use_memory", str(log), str(memory), 2, 0.05, "small", need_gb=2)
            number += 1
        return number

    with sharing(nvml) as pool, sharing(nvml) as other:
        workers = [Background(small, slot) for slot in mine[:3]]
        assert wait_until(lambda: entered(log) >= 3, 20)
        large = Background(
            value_of,
            *(other, mine[3], "use_memory", str(log), str(memory), 9, 0.05, "large"),
            need_gb=9,
            label="the large one",
        )
        gate = SlotGroup(folder, KEY).gate()
        at_the_head = wait_until(lambda: "the large one" in gate.waiting(), 20)
        first = time.monotonic_ns()
        large.result(30)
        stop.touch()
        assert all(worker.result(30) for worker in workers)
    assert at_the_head
    noted = [line for line in lines(log) if line["what"] == "in"]
    (its,) = [line["ns"] for line in noted if line["name"] == "large"]
    # From its turn on nobody else is admitted; those who were then may still have to begin.
    assert sum(first < line["ns"] < its for line in noted) <= 3


def test_foreign_memory_only_delays(folder: Path) -> None:
    nvml = SimulatedNvml()
    nvml.foreign = {4242: 8 * GB}
    (slot,) = slots(folder, 1)
    before: list[int | None] = []
    with sharing(nvml) as pool:
        waiting = Background(
            reply_of, pool, slot, "pid", need_gb=4, label="my fit", on_admitted=before.append
        )
        assert waits_for(pool, "pid 4242 of another program: 8.0 GB")
        assert "my fit" in SlotGroup(folder, KEY).gate().waiting()
        nvml.foreign = {4242: 5 * GB}
        reply = waiting.result(10)
        assert pool.waiting() == []
        assert before == [5 * GB]
        assert reply.gpu_before_bytes == 5 * GB
        assert reply.wait_s > 0
        reply.close()


def test_at_the_deadline_the_error_names_who_has_the_memory(folder: Path) -> None:
    nvml = SimulatedNvml()
    nvml.foreign = {4242: 7 * GB, 4343: None}
    nvml.unseen_bytes = 1 * GB
    (slot,) = slots(folder, 1)
    with sharing(nvml) as pool:
        with pytest.raises(SlotTimeout) as raised:
            value_of(pool, slot, "pid", need_gb=4, slot_timeout_s=1)
        assert str(raised.value).startswith(
            f"waited 1 s for a slot: needs 4.0 GB of {KEY}, 2.0 of 10.0 GB can be had;"
            " in use or promised: pid 4242 of another program: 7.0 GB;"
            " pid 4343 of another program: an unknown amount;"
            " 1.0 GB by processes that cannot be seen from here"
        )
        assert "Hint: " in str(raised.value)
        assert wait_until(lambda: held(folder) == [])
        nvml.foreign = {}
        assert value_of(pool, slot, "pid", need_gb=4)


def test_all_that_wait_in_the_queue_say_so_at_the_deadline(folder: Path) -> None:
    """They come at once, so that the first has not yet announced itself when the others ask."""
    nvml = SimulatedNvml()
    nvml.foreign = {4242: 8 * GB}
    nvml.pause_s = 0.3
    with sharing(nvml) as pool:
        calls = [
            Background(value_of, pool, slot, "pid", need_gb=4, slot_timeout_s=2)
            for slot in slots(folder, 6)
        ]
        for call in calls:
            with pytest.raises(SlotTimeout, match=r"waited 2 s for a slot: .*(queue|pid 4242)"):
                call.result(20)


def test_a_need_larger_than_the_gpu_is_refused_before_any_wait(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    with (
        sharing(SimulatedNvml()) as pool,
        pytest.raises(PlatformError, match=r"expected at most the 10.0 GB of GPU-.*, found 11.0"),
    ):
        value_of(pool, slot, "pid", need_gb=11)


def test_a_fit_whose_need_is_not_known_runs_alone(folder: Path, log: Path, memory: Path) -> None:
    with sharing(SimulatedNvml(folder=memory)) as pool:
        calls = [
            Background(value_of, pool, slot, "occupy", str(log), 0.1, need_gb=need)
            for slot, need in zip(slots(folder, 4), [None, 1, None, 1], strict=True)
        ]
        for call in calls:
            call.result(30)
    noted = lines(log)
    assert most_at_once(noted) <= 2  # the two that need 1 GB, if they follow one another
    assert entered(log) == 4


def test_a_kept_child_is_replaced_for_a_fit_that_needs_more_than_it_was_promised(
    folder: Path, log: Path, memory: Path
) -> None:
    marker = log.with_name("marker")
    first, second = slots(folder, 2)
    nvml = SimulatedNvml(folder=memory)
    with sharing(nvml, fits_per_process=0) as pool, sharing(nvml) as other:
        kept = value_of(pool, first, "pid", need_gb=2)
        assert value_of(pool, first, "pid", need_gb=1) == kept
        assert value_of(pool, first, "pid", need_gb=2) == kept
        neighbour = Background(
            value_of, other, second, "occupy_until", str(log), str(marker), need_gb=5
        )
        assert wait_until(lambda: entered(log) == 1, 20)
        larger = Background(value_of, pool, first, "pid", need_gb=6)
        assert waits_for(pool, "needs 6.0 GB")
        assert not entries.is_alive(kept)
        marker.touch()
        neighbour.result(20)
        kept = larger.result(20)
        assert value_of(pool, first, "pid", need_gb=6) == kept
        alone = value_of(pool, first, "pid")  # its need is not known
        assert alone != kept
        assert value_of(pool, first, "pid", need_gb=9) == alone


def test_without_nvml_slots_alone_decide(folder: Path, log: Path) -> None:
    with ChildPool(light()) as pool:
        calls = [
            Background(value_of, pool, slot, "occupy_together", str(log), 2, need_gb=9)
            for slot in slots(folder, 2)
        ]
        for call in calls:
            call.result(30)
    assert most_at_once(lines(log)) == 2


# --- NVML fails ---


def test_a_wait_goes_on_while_nvml_cannot_tell(folder: Path) -> None:
    nvml = SimulatedNvml()
    nvml.error = PlatformError("NVML cannot tell about GPU-1: Unknown Error")
    (slot,) = slots(folder, 1)
    with sharing(nvml) as pool:
        waiting = Background(value_of, pool, slot, "pid", need_gb=4)
        assert waits_for(pool, "NVML cannot tell about GPU-1")
        asked = nvml.asked
        assert wait_until(lambda: nvml.asked > asked + 2)
        assert waiting.running()
        nvml.error = None
        assert waiting.result(10)


def test_nvml_that_never_tells_is_named_at_the_deadline(folder: Path) -> None:
    nvml = SimulatedNvml()
    nvml.error = PlatformError("NVML cannot tell about GPU-1: Unknown Error")
    (slot,) = slots(folder, 1)
    with (
        sharing(nvml) as pool,
        pytest.raises(SlotTimeout, match="for a slot: NVML cannot tell about GPU-1: Unknown Error"),
    ):
        value_of(pool, slot, "pid", need_gb=4, slot_timeout_s=3)


def test_a_lost_gpu_ends_the_calls_that_wait_for_it_and_leaves_no_lock(
    folder: Path, memory: Path
) -> None:
    nvml = SimulatedNvml(folder=memory)
    nvml.foreign = {4242: 9 * GB}
    first, second = slots(folder, 2)
    with sharing(nvml) as pool:
        calls = [
            Background(value_of, pool, slot, "pid", need_gb=4, slot_timeout_s=20)
            for slot in (first, second)
        ]
        assert waits_for(pool, "pid 4242")
        nvml.error = GpuLost(f"{KEY} does not answer any more (NVML: GPU is lost)", "dmesg")
        for call in calls:
            with pytest.raises(GpuLost, match="does not answer any more"):
                call.result(10)
        assert wait_until(lambda: held(folder) == [])
        gate = SlotGroup(folder, KEY).gate()
        assert wait_until(lambda: gate.waiting() == "")
        nvml.error, nvml.foreign = None, {}
        assert value_of(pool, first, "pid", need_gb=4)


# --- out of memory ---


@pytest.mark.parametrize("fits", [1, 0])
@pytest.mark.parametrize("kind", ["text", "cublas"])
def test_a_fit_that_runs_out_of_memory_runs_again_alone(
    kind: str, fits: int, folder: Path, log: Path, memory: Path
) -> None:
    marker, neighbour = log.with_name("marker"), log.with_name("neighbour")
    first, second, third = slots(folder, 3)
    with sharing(SimulatedNvml(folder=memory), fits_per_process=fits) as pool:
        other = Background(
            value_of, pool, second, "occupy_until", str(log), str(neighbour), need_gb=2
        )
        assert wait_until(lambda: entered(log) == 1, 20)
        failing = Background(
            reply_of, pool, first, "fail_at_first", str(log), str(marker), 2, kind, need_gb=2
        )
        assert waits_for(pool, f"wants {KEY} alone after it ran out of memory, held by")
        later = Background(value_of, pool, third, "occupy", str(log), 0.1, need_gb=1)
        neighbour.touch()
        other.result(20)
        reply = failing.result(20)
        assert reply.out_of_memory
        reply.close()
        later.result(20)
    again = [line for line in lines(log) if line.get("again")]
    begin, end = (line["ns"] for line in again)
    assert not [line for line in lines(log) if begin < line["ns"] < end]
    assert [line["what"] for line in lines(log) if line["ns"] < begin].count("out") == 2


def test_torchs_own_error_is_known_as_out_of_memory(folder: Path, log: Path, memory: Path) -> None:
    (slot,) = slots(folder, 1)
    with sharing(SimulatedNvml(folder=memory)) as pool:
        reply = reply_of(
            pool, slot, "fail_at_first", str(log), str(log.with_name("m")), 1, "torch", need_gb=2
        )
        assert reply.out_of_memory
        reply.close()


@pytest.mark.parametrize("standby", [True, False])
def test_two_fits_of_one_gpu_that_run_out_of_memory_at_once_do_not_block_each_other(
    standby: bool, folder: Path, log: Path, memory: Path
) -> None:
    nvml = SimulatedNvml(folder=memory)
    mine = slots(folder, 4)
    with sharing(nvml, standby=standby) as pool, sharing(nvml, standby=standby) as other:
        calls = [
            Background(
                reply_of,
                *(pool if number % 2 else other, slot, "fail_at_first"),
                *(str(log), str(log.with_name(f"marker{number}")), 4),
                need_gb=2,
            )
            for number, slot in enumerate(mine)
        ]
        for call in calls:
            reply = call.result(30)
            assert reply.out_of_memory
            reply.close()
    again = [line for line in lines(log) if line["again"]]
    assert len(again) == 8
    assert most_at_once(again) == 1
    assert most_at_once(lines(log)) == 4


def test_a_fit_without_enough_memory_on_the_whole_gpu_fails(
    folder: Path, log: Path, memory: Path
) -> None:
    (slot,) = slots(folder, 1)
    with sharing(SimulatedNvml(folder=memory)) as pool:
        with pytest.raises(FitOutOfMemory) as raised:
            value_of(pool, slot, "run_out_of_memory", str(log), need_gb=2)
        assert "CUDA out of memory. Tried to allocate 20.00 GiB." in str(raised.value)
        assert "training.batch_size" in str(raised.value)
        assert "isolation.slots_per_gpu" in str(raised.value)
        assert "run_out_of_memory" in raised.value.traceback
        assert entered(log) == 2
        assert wait_until(lambda: held(folder) == [])
        assert value_of(pool, slot, "pid", need_gb=2)


def test_on_the_cpu_nothing_runs_again(folder: Path, log: Path) -> None:
    with ChildPool(light()) as pool:
        with pytest.raises(FitFailed, match="out of memory"):
            value_of(pool, Slot(0, (), folder, "cpu-1"), "run_out_of_memory", str(log))
        assert entered(log) == 1


# --- an app whose import uses CUDA ---


def prepared(log: Path) -> list[dict[str, Any]]:
    return [line for line in lines(log) if line["what"] == "prepared"]


def test_an_app_whose_import_uses_cuda_is_imported_inside_the_slot(
    folder: Path, log: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (slot,) = slots(folder, 1)
    options = {"preload": ["torch", "sharing_entries"], "standby": True}
    nvml = SimulatedNvml(folder=memory)
    with (
        caplog.at_level(logging.WARNING),
        sharing(nvml, **options, prepare="sharing_entries:use_cuda", prepare_arg=str(log)) as pool,
    ):
        reply = reply_of(pool, slot, "occupy", str(log), 0.1, need_gb=3)
        assert reply.gpu_peak_bytes == 3 * GB
        assert reply.gpu_context_bytes is None
        reply.close()
        # The next call meets the child that stands by, which finds only now that it must go.
        answers = [value_of(pool, slot, "pid", need_gb=3) for _ in range(3)]
        assert len(set(answers)) == 3
        assert caplog.text.count("the app's import uses CUDA") == 1
        assert wait_until(lambda: not pool.children())
        by_pid = {line["pid"]: line["inside"] for line in prepared(log)}
        assert all(by_pid[answer] for answer in answers)
        # The first calls made some in advance, before anybody knew; nobody did after that.
        in_advance = list(by_pid.values()).count(False)
        assert 1 <= in_advance <= 2
        assert len(by_pid) == 4 + in_advance
    assert held(folder) == []


def test_a_child_that_stands_by_and_uses_cuda_leaves_by_itself(
    folder: Path, log: Path, memory: Path
) -> None:
    (slot,) = slots(folder, 1)
    options = {"preload": ["torch", "sharing_entries"], "standby": True}
    with sharing(
        SimulatedNvml(folder=memory),
        **options,
        prepare="sharing_entries:use_cuda",
        prepare_arg=str(log),
    ) as pool:
        value_of(pool, slot, "pid", need_gb=3)
        assert wait_until(lambda: not pool.children(), 20)
        began = len(prepared(log))
        assert value_of(pool, slot, "pid", need_gb=3)
        assert wait_until(lambda: not pool.children())
        assert len(prepared(log)) == began + 1


@pytest.mark.parametrize("early", [False, True], ids=["preload", "prepare_early"])
def test_cuda_in_the_fork_server_is_a_clear_error(
    early: bool, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "uses_cuda.py").write_text(
        "import sys, types\n"
        "def use(_=None):\n"
        "    torch = types.ModuleType('torch')\n"
        "    torch.cuda = types.SimpleNamespace(is_initialized=lambda: True)\n"
        "    torch.set_num_threads = lambda number: None\n"
        "    sys.modules['torch'] = torch\n" + ("" if early else "use()\n")
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    options: dict[str, Any] = {"preload": ["json", "uses_cuda"]}
    if early:
        options |= {"prepare": "uses_cuda:use", "prepare_early": True}
    (slot,) = slots(folder, 1)
    with ChildPool(light(**options)) as pool:
        for _ in range(2):
            with pytest.raises(FitFailed) as raised:
                value_of(pool, slot, "pid", need_gb=1)
            assert "used CUDA in the fork server, so no child can use it any more" in str(
                raised.value
            )
            assert ("uses_cuda:use, called in advance" in str(raised.value)) == early
            assert ("importing uses_cuda, from isolation.preload" in str(raised.value)) != early
            assert "Hint: leave it out of isolation.preload" in str(raised.value)
        assert wait_until(lambda: held(folder) == [])
