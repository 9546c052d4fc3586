"""What a child is given, what it may do, and what of it reaches the caller."""

import ctypes
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import SLOT, call, call_for_reply, read, wait_until

from fedhpc.client import ArrayTask
from fedhpc.errors import FitDied, FitFailed
from fedhpc.files import read_lines
from fedhpc.isolation import ChildPool, Gpu, PoolOptions, Slot, channel
from fedhpc.isolation.calls import DEFAULT_PRELOAD
from fedhpc.isolation.telemetry import Sampler

HERE = Path(__file__).parent
METHODS = ["forkserver", "spawn"]

needs_huge_pages = pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="the kernel gives no huge pages",
)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    token = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, token)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    # A pool that lives on may hold the socket of the child that ended last.
    sockets = 1 if "builtin_pool" in request.fixturenames else 0
    yield from entries.nothing_is_left(token, sockets)


def builtin_options(tmp_path: Path) -> PoolOptions:
    """Return what an array task of the built-in app gives its pool."""
    from fedhpc import config

    task = ArrayTask.__new__(ArrayTask)
    document = tmp_path / "config.yaml"
    document.write_text((HERE.parents[1] / "configs/digits.yaml").read_text())
    task._config = config.load(document)
    task._paths = type("Paths", (), {"root": tmp_path})()  # type: ignore[assignment]
    return task._pool_options(standby=True, rehearse=False)


@pytest.fixture(scope="module")
def builtin_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildPool]:
    """Share one pool with the preload of the built-in app, because that takes seconds."""
    token = uuid.uuid4().hex
    preload = builtin_options(tmp_path_factory.mktemp("run")).preload
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(entries.TOKEN, token)
        patch.setenv("PYTHONPATH", str(HERE))
        leftovers = entries.nothing_is_left(token)
        next(leftovers)
        with ChildPool(light(preload=[*preload, "entries"])) as pool:
            call(pool, "pid", timeout_s=60)
            yield pool
        next(leftovers, None)


def light(**options: Any) -> PoolOptions:
    return PoolOptions(**{"preload": ["json"], "standby": False, **options})


def memory(*contents: bytes) -> list[int]:
    return [channel.write_memory([content]) for content in contents]


# --- buffers ---


@pytest.mark.parametrize("method", METHODS)
def test_buffers_come_back_as_they_went(method: str) -> None:
    contents = [b"one", b"", os.urandom(3_000_000), b"last"]
    fds = memory(*contents)
    with ChildPool(light(start_method=method)) as pool:
        reply = pool.run("entries:echo", fds, slot=SLOT, timeout_s=30)
        assert [read(fd) for fd in reply.buffers] == contents
        assert reply.run_s >= 0
        assert reply.start_s > 0
        assert reply.return_s > 0
        reply.close()
        assert reply.buffers == []
    channel.close_all(fds)


def test_no_buffers_are_fine() -> None:
    with ChildPool(light()) as pool:
        assert pool.run("entries:echo", [], slot=SLOT, timeout_s=30).buffers == []


@pytest.mark.parametrize("method", METHODS)
def test_small_buffers_go_and_come_as_bytes_and_the_others_as_descriptors(method: str) -> None:
    half = channel.MAX_INLINE // 2
    contents = [os.urandom(half), b"", os.urandom(half), b"!", os.urandom(2 * half + 1)]
    large = memory(*contents[3:])
    with ChildPool(light(start_method=method)) as pool:
        reply = pool.run("entries:echo", [*contents[:3], *large], slot=SLOT, timeout_s=30)
        assert [read(buffer) for buffer in reply.buffers] == contents
        assert [isinstance(buffer, int) for buffer in reply.buffers] == [False] * 3 + [True] * 2
        reply.close()
    channel.close_all(large)


def test_more_bytes_than_a_message_takes_are_the_callers_error() -> None:
    contents = [bytes(channel.MAX_INLINE), b"!"]
    with ChildPool(light()) as pool:
        with pytest.raises(ValueError, match="expected at most 65536 bytes, found 65537"):
            pool.run("entries:echo", contents, slot=SLOT, timeout_s=30)
        assert call(pool, "add", 1, 2) == 3


def test_a_reply_may_come_in_parts() -> None:
    with ChildPool(light()) as pool:
        reply = pool.run("entries:in_parts", [], slot=SLOT, timeout_s=30)
        assert [read(fd) for fd in reply.buffers] == [b"abcdef", b"", b"", bytes(8)]
        reply.close()


def test_a_file_can_be_a_buffer(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"in a file")
    with ChildPool(light()) as pool, (tmp_path / "blob").open("rb") as file:
        reply = pool.run("entries:echo", [file.fileno()], slot=SLOT, timeout_s=30)
        assert read(reply.buffers[0]) == b"in a file"
        reply.close()


@pytest.mark.parametrize("method", METHODS)
def test_300_mb_of_input_are_read_where_they_lie(method: str) -> None:
    chunk = bytes(range(1, 251)) * 4000  # 1 MB
    fd = channel.write_memory([chunk] * 300)
    with ChildPool(light(start_method=method)) as pool:
        idle_mb = pool.run("entries:echo", [], slot=SLOT, timeout_s=30).peak_rss_mb
        reply = pool.run("entries:measure_input", [fd], slot=SLOT, timeout_s=60)
        seen = json.loads(read(reply.buffers[0]))
        reply.close()
    assert seen["total"] == sum(channel.view(fd)[::4096])
    assert seen["inodes"] == [os.fstat(fd).st_ino], "not the pages of the caller"
    assert not seen["writable"]
    assert seen["anonymous_mb"] < 60, "the child copied its input"
    assert 280 < seen["shared_mb"] < 330
    assert reply.peak_rss_mb < idle_mb + 330
    os.close(fd)


def test_a_reply_of_several_hundred_mb_costs_the_caller_no_memory() -> None:
    fd = channel.write_memory([bytes(1 << 20)] * 200)
    with ChildPool(light()) as pool:
        before_mb = entries.memory_mb("RssAnon")
        reply = pool.run("entries:echo", [fd], slot=SLOT, timeout_s=60)
        assert os.fstat(reply.buffers[0]).st_size == 200 << 20
        assert entries.memory_mb("RssAnon") - before_mb < 20
        reply.close()
    os.close(fd)


@pytest.mark.parametrize("entry", ["returns_none", "returns_text"])
def test_a_result_of_the_wrong_type_is_the_functions_failure(entry: str) -> None:
    with ChildPool(light()) as pool:
        with pytest.raises(FitFailed, match="TypeError"):
            pool.run(f"entries:{entry}", [], slot=SLOT, timeout_s=30)
        assert call(pool, "add", 1, 2) == 3


def test_more_result_buffers_than_a_message_holds_are_a_clear_failure() -> None:
    (fd,) = memory(b"300")
    with ChildPool(light()) as pool:
        with pytest.raises(FitFailed, match="300"):
            pool.run("entries:many_buffers", [fd], slot=SLOT, timeout_s=30).close()
        assert call(pool, "add", 1, 2) == 3
    os.close(fd)


def test_more_input_buffers_than_a_message_holds_are_a_clear_failure() -> None:
    fds = memory(*[b""] * 300)
    with ChildPool(light()) as pool:
        called_s = time.monotonic()
        with pytest.raises(Exception, match=r"300|[Dd]escriptor|[Bb]uffer"):
            pool.run("entries:echo", fds, slot=SLOT, timeout_s=30).close()
        assert time.monotonic() - called_s < 3
        assert call(pool, "add", 1, 2) == 3
        assert wait_until(lambda: not pool.children()), "the child of the failed call stays"
    channel.close_all(fds)


def test_a_closed_descriptor_is_the_callers_error_and_leaves_no_child() -> None:
    with ChildPool(light()) as pool:
        call(pool, "pid")
        called_s = time.monotonic()
        with pytest.raises(Exception, match=r"[Dd]escriptor"):
            pool.run("entries:echo", [999_999], slot=SLOT, timeout_s=30)
        assert time.monotonic() - called_s < 3
        assert call(pool, "add", 1, 2) == 3
        assert wait_until(lambda: not pool.children()), "the child of the failed call stays"


def test_a_caller_without_descriptors_left_gets_an_error_not_fewer_buffers() -> None:
    script = """
import os, resource
from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel
with ChildPool(PoolOptions(preload=["json"], standby=False)) as pool:
    fd = channel.write_memory([b"100"])
    pool.run("entries:many_buffers", [fd], slot=Slot(0), timeout_s=30).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    try:
        reply = pool.run("entries:many_buffers", [fd], slot=Slot(0), timeout_s=30)
        print("buffers", len(reply.buffers))
    except Exception as error:
        print("error", type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("error"), done.stdout


# --- which process answers ---


@pytest.mark.parametrize("standby", [True, False], ids=["standby", "no standby"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fits", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (0, [7])], ids=["1", "3", "0"]
)
def test_a_child_answers_as_many_calls_as_fits_per_process_says(
    fits: int, expected: list[int], method: str, standby: bool
) -> None:
    options = light(fits_per_process=fits, start_method=method, standby=standby)
    with ChildPool(options) as pool:
        pids = [call(pool, "pid") for _ in range(7)]
    runs = [(pid, pids.count(pid)) for pid in dict.fromkeys(pids)]
    assert [count for _, count in runs] == expected
    assert pids == [pid for pid, count in runs for _ in range(count)], "pids came back"


@pytest.mark.parametrize("method", METHODS)
def test_a_standby_child_is_ready_before_it_is_called(method: str, tmp_path: Path) -> None:
    options = light(start_method=method, standby=True, prepare="entries:remember")
    with ChildPool(options) as pool:
        first = call(pool, "pid")
        assert wait_until(lambda: set(pool.children()) - {first})
        (standby,) = [pid for pid in pool.children() if pid != first]
        assert call(pool, "pid") == standby


def test_a_child_stands_by_for_each_slot_that_has_nothing_to_do() -> None:
    with ChildPool(light()) as pool:
        for index in (0, 1, 0):
            pool.stand_by(Slot(index))
        assert wait_until(lambda: len(pool.standing_by()) == 2)
        standing = pool.standing_by()
        pids = [call(pool, "pid", slot=Slot(index)) for index in (0, 1, 0)]
        assert set(pids[:2]) == standing
        assert pids[2] not in standing
        assert not pool.standing_by()


def test_a_pool_that_keeps_children_has_none_that_stands_by() -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        pool.stand_by(SLOT)
        kept = call(pool, "pid")
        pool.stand_by(SLOT)
        assert call(pool, "pid") == kept
        assert set(pool.children()) == {kept}


def test_that_no_child_could_be_made_ahead_of_its_call_is_for_the_call_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "no descriptor is left")

    with ChildPool(light()) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(channel, "pair", fail)
            pool.stand_by(SLOT)
            with pytest.raises(OSError, match="no descriptor"):
                call(pool, "pid")
        assert call(pool, "pid")


def test_memory_of_a_child_that_stands_by_is_no_fits(tmp_path: Path) -> None:
    with ChildPool(light()) as pool, Sampler(tmp_path / "memory.jsonl", pool, {}) as sampler:
        call(pool, "pid")
        pool.stand_by(SLOT)
        assert wait_until(lambda: len(pool.children()) == len(pool.standing_by()) == 1)
        sampler.close()
        (*_, last) = read_lines(tmp_path / "memory.jsonl")
    assert (last["kind"], last["children"], last["children_mb"]) == ("sample", 1, 0)


def test_without_standby_nothing_runs_between_calls() -> None:
    with ChildPool(light()) as pool:
        call(pool, "pid")
        assert wait_until(lambda: not pool.children())


@pytest.mark.parametrize("fits", [1, 0])
@pytest.mark.parametrize("method", METHODS)
def test_the_environment_of_the_slot_reaches_its_child_only(
    method: str, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    slots = [Slot(n, (Gpu(f"GPU-{n}"),)) for n in range(2)]
    with ChildPool(light(start_method=method, fits_per_process=fits)) as pool:
        answers = [call(pool, "environment", name, slot=slots[n % 2]) for n in range(4)]
    assert [value for _, value in answers] == ["GPU-0", "GPU-1", "GPU-0", "GPU-1"]
    first = {pid for pid, _ in answers[0::2]}
    second = {pid for pid, _ in answers[1::2]}
    assert not first & second
    assert len(first) == len(second) == (2 if fits == 1 else 1)
    assert name not in os.environ


# --- failures and deaths ---


@pytest.mark.parametrize("fits", [1, 0])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_arrives_with_type_message_and_the_childs_traceback(
    method: str, fits: int
) -> None:
    with ChildPool(light(start_method=method, fits_per_process=fits)) as pool:
        with pytest.raises(FitFailed) as caught:
            call(pool, "raise_error", "no such layer: Größe")
        assert caught.value.message == "ValueError: no such layer: Größe"
        assert 'entries.py", line ' in caught.value.traceback
        assert "in raise_error" in caught.value.traceback
        assert caught.value.traceback.startswith("Traceback (most recent call last)")
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("raise_system_exit", "SystemExit: the app left"),
        ("raise_interrupt", "KeyboardInterrupt"),
        ("raise_unprintable", "Unprintable"),
        ("no_such_function", "no_such_function"),
    ],
)
def test_whatever_is_raised_is_a_failure_and_the_pool_works_on(entry: str, message: str) -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        with pytest.raises(FitFailed, match=message):
            call(pool, entry)
        assert call(pool, "add", 1, 2) == 3


def test_an_entry_in_a_module_that_does_not_exist_is_named() -> None:
    with ChildPool(light()) as pool:
        with pytest.raises(FitFailed, match=r"ModuleNotFoundError.*no_such_module"):
            pool.run("no_such_module:run", [], slot=SLOT, timeout_s=30)
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize(
    ("letter", "length"),
    [("x", 100_000), ("ü", 15_000), ("ü", 100_000), ("\N{ROCKET}", 12_000), ("\udcff", 100_000)],
    ids=["ascii", "umlauts", "many umlauts", "emoji", "surrogates"],
)
def test_a_long_message_in_any_alphabet_arrives(letter: str, length: int) -> None:
    with ChildPool(light()) as pool:
        with pytest.raises(FitFailed) as caught:
            call(pool, "raise_error", letter * length)
        assert caught.value.message.startswith(f"ValueError: {letter}")
        assert letter * 500 in caught.value.message
        assert "in raise_error" in caught.value.traceback
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_child_that_leaves_is_reported_with_its_code(method: str) -> None:
    with ChildPool(light(start_method=method)) as pool:
        with pytest.raises(FitDied, match="exited with code 3"):
            call(pool, "leave_with", 3)
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT", "SIGTERM", "SIGUSR1"])
def test_a_death_by_signal_is_reported_by_name(name: str, method: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with ChildPool(light(start_method=method)) as pool:
        called_s = time.monotonic()
        with pytest.raises(FitDied, match=rf"killed by {name}\b"):
            call(pool, "kill_self", signal.Signals[name])
        assert time.monotonic() - called_s < 5
        assert call(pool, "add", 1, 2) == 3


def test_a_death_by_a_real_time_signal_is_reported_too() -> None:
    with ChildPool(light()) as pool:
        with pytest.raises(FitDied, match=r"killed by"):
            call(pool, "kill_self", signal.SIGRTMIN + 3)
        assert call(pool, "add", 1, 2) == 3


@pytest.mark.parametrize("fits", [1, 0])
@pytest.mark.parametrize(
    ("method", "early"),
    [("forkserver", False), ("forkserver", True), ("spawn", False)],
    ids=["forkserver", "early", "spawn"],
)
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("entries:refuse", "LookupError: cannot prepare 4"),
        ("entries:leave_in_prepare", "SystemExit: left with 4"),
        ("entries:no_such_function", "no_such_function"),
        ("no_such_module:prepare", "no_such_module"),
    ],
    ids=["raises", "exits", "no function", "no module"],
)
def test_a_prepare_that_fails_is_told_to_each_caller(
    prepare: str, message: str, method: str, early: bool, fits: int
) -> None:
    options = light(
        prepare=prepare,
        prepare_arg="4",
        prepare_early=early,
        start_method=method,
        fits_per_process=fits,
        standby=True,
    )
    with ChildPool(options) as pool:
        for _ in range(3):
            with pytest.raises(FitFailed, match=message):
                call(pool, "pid")


@pytest.mark.parametrize("method", METHODS)
def test_a_child_that_dies_in_prepare_is_told_to_each_caller(method: str) -> None:
    options = light(
        prepare="entries:die_in_prepare", prepare_arg="4", start_method=method, standby=True
    )
    with ChildPool(options) as pool:
        for _ in range(3):
            with pytest.raises(FitDied, match="exited with code 4"):
                call(pool, "pid")


def test_prepare_runs_once_in_each_child_or_once_early() -> None:
    with ChildPool(light(prepare="entries:remember", prepare_arg="it", fits_per_process=3)) as pool:
        answers = [call(pool, "recall") for _ in range(6)]
        assert [prepared for prepared, _ in answers] == [f"it by {pid}" for _, pid in answers]
    early = light(prepare="entries:remember", prepare_arg="it", prepare_early=True)
    with ChildPool(early) as pool:
        server = entries.fork_server_of(os.getpid())
        assert [call(pool, "recall")[0] for _ in range(3)] == [f"it by {server}"] * 3


@pytest.mark.parametrize("fault", ["raise ValueError('broken')", "import no_such_module", "1 +"])
def test_a_preload_that_cannot_be_imported_does_not_stop_the_children(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with ChildPool(light(preload=["broken", "no_such_module"])) as pool:
        assert call(pool, "add", 1, 2) == 3


# --- what children may do ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("entry", "args", "expected"),
    [
        ("run_threads", [20], 190),
        ("run_subprocess", [], "from a subprocess"),
        ("run_process_pool", ["fork"], [0, 1, 4, 9, 16]),
        ("run_process_pool", ["spawn"], [0, 1, 4, 9, 16]),
        ("run_process_pool", ["forkserver"], [0, 1, 4, 9, 16]),
    ],
    ids=["threads", "subprocess", "pool fork", "pool spawn", "pool forkserver"],
)
def test_a_child_may_use_threads_and_processes(
    entry: str, args: list[Any], expected: Any, method: str
) -> None:
    with ChildPool(light(start_method=method)) as pool:
        assert call(pool, entry, *args) == expected


def test_a_child_may_use_data_loader_workers(builtin_pool: ChildPool) -> None:
    assert call(builtin_pool, "run_data_loader", 2, timeout_s=60) == sum(range(64))
    assert call(builtin_pool, "run_data_loader", 0) == sum(range(64))


def test_an_error_in_a_data_loader_worker_arrives(builtin_pool: ChildPool) -> None:
    with pytest.raises(FitFailed, match="a broken sample"):
        call(builtin_pool, "data_loader_error", timeout_s=60)


def test_workers_of_a_data_loader_end_with_a_child_that_hangs(
    builtin_pool: ChildPool, tmp_path: Path
) -> None:
    hanging = entries.Background(
        call, builtin_pool, "hang_in_data_loader", str(tmp_path / "pid"), timeout_s=3
    )
    assert wait_until(lambda: (tmp_path / "pid").exists(), 30)
    child = int((tmp_path / "pid").read_text())
    workers = entries.children_of(child)
    assert len(workers) >= 2
    with pytest.raises(FitDied, match="no reply within 3 s"):
        hanging.result(10)
    assert wait_until(lambda: not any(map(entries.is_alive, [child, *workers])))


def test_a_thread_that_never_ends_does_not_keep_the_child() -> None:
    with ChildPool(light()) as pool:
        call(pool, "leave_thread_running")
        assert wait_until(lambda: not pool.children())


# --- threads and imports ---


@pytest.mark.parametrize(("method", "threads"), [("forkserver", 2), ("spawn", 1), ("spawn", 2)])
def test_torch_has_threads_per_fit_threads_where_it_is_not_preloaded(
    method: str, threads: int
) -> None:
    with ChildPool(light(start_method=method, threads_per_fit=threads)) as pool:
        assert call(pool, "torch_threads", timeout_s=60) == threads


def expected_state(threads: int) -> dict[str, Any]:
    return {
        "threads": 1,
        "threads of the child's torch": threads,
        "cuda": False,
        "cuda_library": False,
        "cuda_device": False,
    }


def test_the_fork_server_has_one_thread_and_no_cuda_after_its_preload(
    builtin_pool: ChildPool,
) -> None:
    assert call(builtin_pool, "fork_server_state", timeout_s=60) == expected_state(1)


def test_the_fork_server_has_one_thread_also_if_fits_have_two() -> None:
    preload = [*DEFAULT_PRELOAD, "flwr.clientapp", "fedhpc.federation.fit"]
    with ChildPool(light(preload=preload, threads_per_fit=2)) as pool:
        assert call(pool, "fork_server_state", timeout_s=60) == expected_state(2)


def test_a_training_step_imports_nothing_after_the_fork(builtin_pool: ChildPool) -> None:
    # The preload ends with the tests' own module, which is not the product's to preload.
    reply = call_for_reply(builtin_pool, "train_step", timeout_s=60)
    reply.close()
    assert reply.late_imports == []


def test_without_dynamo_a_training_step_imports_hundreds_of_modules_after_the_fork() -> None:
    with ChildPool(light(preload=["numpy", "torch", "entries"])) as pool:
        reply = call_for_reply(pool, "train_step", timeout_s=60)
        reply.close()
    assert len(reply.late_imports) == 100  # the report is cut there


def test_a_late_import_is_reported_by_name() -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        reply = call_for_reply(pool, "pid")
        reply.close()
    assert "entries" in reply.late_imports


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_main_module_is_not_imported_again(method: str, tmp_path: Path) -> None:
    script = tmp_path / "experiment.py"
    script.write_text(
        "print('imported', flush=True)\n"
        "from fedhpc.isolation import *\n"
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from entries import call\n"
        f"with ChildPool(PoolOptions(start_method={method!r}, preload=['json'])) as pool:\n"
        "    for _ in range(3):\n"
        "        print('main is', call(pool, 'main_module'), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("imported") == 1
    assert len(re.findall("main is .*fedhpc/isolation/", done.stdout)) == 3
    assert done.stderr == ""


# --- many calls ---


def test_300_calls_leave_descriptors_and_memory_of_the_caller_flat() -> None:
    with ChildPool(light(standby=True)) as pool:

        def measure(calls: int) -> tuple[int, float]:
            for number in range(calls):
                if number % 10 == 3:
                    with pytest.raises(FitFailed):
                        call(pool, "raise_error", "x")
                else:
                    assert call(pool, "add", number, 1) == number + 1
            assert wait_until(lambda: len(pool.children()) <= 1)
            return len(list(Path("/proc/self/fd").iterdir())), entries.memory_mb()

        fds, rss_mb = measure(50)
        fds_later, rss_mb_later = measure(250)
    assert fds_later <= fds + 2
    assert rss_mb_later < rss_mb + 3


@pytest.mark.parametrize("fits", [1, 3, 0])
@pytest.mark.parametrize("method", METHODS)
def test_four_slots_used_at_once_give_the_right_answers(method: str, fits: int) -> None:
    together = threading.Barrier(4, timeout=30)
    calls = 8 if method == "forkserver" else 3

    def use(slot: Slot) -> list[int]:
        together.wait()
        return [call(pool, "add", slot.index * 1000, n, slot=slot) for n in range(calls)]

    with ChildPool(light(fits_per_process=fits, start_method=method, standby=True)) as pool:
        answers = [entries.Background(use, Slot(index)) for index in range(4)]
        for index, answer in enumerate(answers):
            assert answer.result(60) == [index * 1000 + n for n in range(calls)]
        assert wait_until(lambda: len(pool.children()) <= 4)


def test_slots_run_side_by_side() -> None:
    with ChildPool(light(standby=True)) as pool:
        call(pool, "pid")
        began_s = time.monotonic()
        answers = [
            entries.Background(call, pool, "working_time", 1.0, slot=Slot(index))
            for index in range(4)
        ]
        assert len({answer.result(30) for answer in answers}) == 4
        assert time.monotonic() - began_s < 2.5


def test_under_memory_pressure_the_kernel_takes_a_child_first() -> None:
    with ChildPool(light(fits_per_process=0)) as pool:
        pid = call(pool, "pid")
        score = Path(f"/proc/{pid}/oom_score_adj")
        assert wait_until(lambda: score.read_text().strip() == "500")


@needs_huge_pages
def test_what_a_child_allocates_comes_from_huge_pages() -> None:
    faults = {}
    for huge_pages in (True, False):
        with ChildPool(light(preload=["entries"], huge_pages=huge_pages)) as pool:
            faults[huge_pages] = call(pool, "faults_of", 32)
    assert faults[False] > 32 * 256  # a page each
    assert faults[True] < faults[False] / 4


@needs_huge_pages
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="elsewhere code is left where it is")
def test_what_a_rehearsal_ran_is_moved_into_huge_pages_of_the_fork_server() -> None:
    options = light(preload=["torch", "entries"], rehearse="entries:convolve", huge_pages=True)
    with ChildPool(options) as pool:
        call(pool, "pid")
        maps = Path(f"/proc/{pool.fork_server()}/maps")
        assert wait_until(
            lambda: any(  # code that is in no file
                access == "r-xp" and not name
                for _, access, _, _, _, *name in map(str.split, maps.read_text().splitlines())
            ),
            20,
        )
        assert call(pool, "pid")


@needs_huge_pages
def test_what_a_child_allocates_does_not_come_from_what_the_fork_server_freed() -> None:
    faults = {}
    for huge_pages in (True, False):
        options = light(prepare="entries:leave_holes", prepare_early=True, huge_pages=huge_pages)
        with ChildPool(options) as pool:
            call(pool, "pid")  # the fork server has worked on requests before
            faults[huge_pages] = call(pool, "faults_of", 4, 4000)
    assert faults[False] > 4 * 256 * 0.8
    assert faults[True] < faults[False] / 4


def test_descriptors_that_came_with_a_call_are_not_for_programs_that_an_app_starts() -> None:
    ours, theirs = channel.pair()
    with ours, theirs, Path(os.devnull).open() as file:
        channel.send(theirs, {}, [file.fileno()])
        received = channel.receive(ours)
        assert received is not None
        assert [os.get_inheritable(fd) for fd in received.fds] == [False]
        channel.close_all(received.fds)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 tells")
def test_what_was_freed_in_the_fork_server_leaves_no_holes() -> None:
    script = """
import ctypes
from fedhpc.isolation.image import MB, Image
def after(tidy):
    if not tidy:
        return [bytearray(MB) for _ in range(20)][::3]  # what stays keeps the rest apart
    with Image().rehearsing():
        return [bytearray(MB) for _ in range(20)][::3]
class Info(ctypes.Structure):
    _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.mallopt(-3, 32 * MB)  # what a program comes to that has freed large blocks
before = getattr(libc.mallinfo2(), "8")
kept = after(TIDY)
print((getattr(libc.mallinfo2(), "8") - before) // MB)
"""
    holes = [
        int(subprocess.run(
            [sys.executable, "-c", script.replace("TIDY", str(tidy))],
            capture_output=True, text=True, check=True,
        ).stdout)
        for tidy in (False, True)
    ]  # fmt: skip
    assert holes[0] > 10
    assert holes[1] < 2
