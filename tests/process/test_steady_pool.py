"""What calls cost in memory and descriptors: large ones, and many."""

import contextlib
import gc
import json
import os
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import entries
import pytest
from entries import call, wait_until

from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel

HERE = Path(__file__).parent
MB = 1_000_000


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    token = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, token)
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield from entries.nothing_is_left(token)


def anonymous_mb(pids: list[int]) -> float:
    """Return the anonymous memory of processes; what n of them share counts 1/n in each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            if match := re.search(r"^Pss_Anon:\s+(\d+) kB", text, re.MULTILINE):
                total += int(match[1])
    return total * 1024 / MB


def shared_mb(pids: list[int]) -> float:
    """Return the memory of all memfds that processes have open, each counted once."""
    blocks: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if "memfd:fedhpc" in str(fd.readlink()):
                        status = fd.stat()
                        blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512 / MB


class Watch:
    """The most memory that this process, a pool's fork server and its children had together."""

    def __init__(self, pool: ChildPool) -> None:
        self._pool = pool
        self._over = threading.Event()
        wait_until(lambda: not pool.children())  # one that ends would count as there before
        self._before_mb, _ = self._look()
        self.anonymous_mb = self.shared_mb = self.together_mb = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._over.wait(0.005):
            anonymous, shared = self._look()
            anonymous -= self._before_mb
            self.anonymous_mb = max(self.anonymous_mb, anonymous)
            self.shared_mb = max(self.shared_mb, shared)
            self.together_mb = max(self.together_mb, anonymous + shared)

    def _look(self) -> tuple[float, float]:
        server = self._pool.fork_server()
        pids = [os.getpid(), *([server] if server else []), *self._pool.children()]
        return anonymous_mb(pids), shared_mb(pids)


def test_500_mb_to_a_child_and_back_are_two_copies_in_all_processes_together() -> None:
    fd = channel.write_memory([bytes(range(250)) * 4000] * 500)
    with ChildPool(PoolOptions(preload=["json"], standby=False)) as pool:
        call(pool, "pid")
        with Watch(pool) as watch:
            reply = pool.run("entries:echo", [fd], slot=entries.SLOT, timeout_s=60)
        assert os.fstat(reply.buffers[0]).st_size == 500 * MB
        assert watch.shared_mb > 490, "the watch did not see the input"
        assert watch.anonymous_mb < 60
        assert watch.together_mb < 2 * 500 + 60
        reply.close()
    os.close(fd)


def test_500_mb_through_flowers_records_are_one_copy_more_which_is_flowers() -> None:
    import transfer_entries

    from fedhpc.federation.payload import encode_arrays

    arrays = transfer_entries.model(500)
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    blob = encode_arrays(arrays)
    fds = [channel.write_memory([json.dumps(shapes).encode()]), channel.write_memory(blob.parts)]
    del arrays, blob.parts[:]
    gc.collect()  # what other tests have left must not go while this one measures
    preload = ["numpy", "flwr.clientapp", "fedhpc.federation.payload", "transfer_entries"]
    with ChildPool(PoolOptions(preload=preload, standby=False)) as pool:
        call(pool, "pid", timeout_s=60)
        with Watch(pool) as watch:
            reply = pool.run("transfer_entries:fit", fds, slot=entries.SLOT, timeout_s=60)
        found, sent = channel.view(reply.buffers[0]), channel.view(fds[1])
        assert found == sent
        assert 490 < watch.anonymous_mb < 500 + 80
        assert watch.together_mb < 3 * 500 + 80
        del found, sent
        reply.close()
    channel.close_all(fds)


def test_2000_fits_leave_memory_descriptors_and_locks_as_they_were_after_200(
    tmp_path: Path,
) -> None:
    slot = Slot(0, lock_folder=tmp_path, lock_key="cpu-test", limit=2)
    with ChildPool(PoolOptions(preload=["json", "entries"], standby=True)) as pool:

        def measure(calls: int) -> list[tuple[float, int]]:
            for number in range(calls):
                assert call(pool, "add", number, 1, slot=slot) == number + 1
            assert wait_until(lambda: len(pool.children()) == 1)  # the standby
            server = pool.fork_server()
            assert server is not None
            return [
                (_rss_mb(pid), len(list(Path(f"/proc/{pid}/fd").iterdir())))
                for pid in (os.getpid(), server)
            ]

        after_200 = measure(200)
        after_2000 = measure(1800)
    for (before_mb, before_fds), (now_mb, now_fds) in zip(after_200, after_2000, strict=True):
        assert now_mb < before_mb + 3
        assert now_fds <= before_fds + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-test.0", "cpu-test.gate"]
    assert all(path.stat().st_size < 4096 for path in tmp_path.iterdir())


def _rss_mb(pid: int) -> float:
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024
