"""Slot locks: how many fits run at once, who is next, and that no lock outlives its holder."""

import errno
import json
import logging
import os
import signal
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
import sharing_entries
from entries import Background, wait_until
from sharing_entries import (
    KEY,
    finish,
    held,
    light,
    lines,
    most_at_once,
    owner,
    queue_length,
    reply_of,
    slots,
    value_of,
)

from fedhpc.errors import FitDied, PlatformError, SlotTimeout
from fedhpc.isolation import ChildPool, locks
from fedhpc.isolation.locks import Holder, SlotGroup

HERE = Path(__file__).parent


def _not_supported(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


NOBODY = 65534


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


def inside(log: Path) -> int:
    return sum({"in": 1, "out": -1}.get(line["what"], 0) for line in lines(log))


# --- how many at once ---


@pytest.mark.parametrize("limit", [1, 2])
def test_two_pools_keep_to_the_common_limit(limit: int, folder: Path, log: Path) -> None:
    with ChildPool(light()) as first, ChildPool(light()) as second:
        calls = [
            Background(value_of, pool, slot, "occupy_together", str(log), limit)
            for pool in (first, second)
            for slot in slots(folder, 3, limit=limit)
        ]
        assert len({running.result(30) for running in calls}) == 6
    assert most_at_once(lines(log)) == limit
    assert held(folder) == []


@pytest.mark.parametrize("limit", [1, 3])
def test_two_processes_keep_to_the_common_limit(limit: int, folder: Path, log: Path) -> None:
    calls = [["occupy_together", str(log), limit]] * 6
    owners = [
        owner("make_calls", folder=str(folder), calls=calls, limit=limit, standby=standby)
        for standby in (True, False)
    ]
    answers = finish(owners, 60)
    assert [len(set(answer)) for answer in answers] == [6, 6]
    assert most_at_once(lines(log)) == limit
    assert sum(line["what"] == "out" for line in lines(log)) == 12


def test_spawned_children_keep_to_the_limit_too(folder: Path, log: Path) -> None:
    with ChildPool(light(start_method="spawn", standby=True)) as pool:
        calls = [
            Background(value_of, pool, slot, "occupy_together", str(log), 2)
            for slot in slots(folder, 3, limit=2)
        ]
        assert len({running.result(40) for running in calls}) == 3
    assert most_at_once(lines(log)) == 2
    assert held(folder) == []


def test_a_run_uses_the_slots_below_its_own_limit(folder: Path, log: Path) -> None:
    marker = log.with_name("marker")
    with ChildPool(light()) as pool:
        wide = slots(folder, 3)
        running = [
            Background(value_of, pool, slot, "occupy_until", str(log), str(marker)) for slot in wide
        ]
        assert wait_until(lambda: inside(log) == 3, 20)
        assert [holder.slot for holder in SlotGroup(folder, KEY).holders()] == [0, 1, 2]
        with (
            ChildPool(light()) as narrow,
            pytest.raises(SlotTimeout, match=r"the slot of GPU-.* held by"),
        ):
            value_of(narrow, slots(folder, 1)[0], "pid", slot_timeout_s=3)
        marker.touch()
        for call in running:
            call.result(20)


def test_different_keys_do_not_disturb_each_other(folder: Path, log: Path) -> None:
    with ChildPool(light()) as pool:
        calls = []
        for index, key in enumerate(["GPU-1", "GPU-1.x", "GPU-10"]):
            slot = slots(folder, index + 1, limit=1, key=key)[-1]
            calls.append(Background(value_of, pool, slot, "occupy_together", str(log), 3))
        assert wait_until(lambda: inside(log) == 3, 20)
        assert [len(held(folder, key)) for key in ("GPU-1", "GPU-1.x", "GPU-10")] == [1, 1, 1]
        for call in calls:
            call.result(20)


def test_a_holder_says_who_it_is_and_the_deadline_names_it(folder: Path, log: Path) -> None:
    marker = log.with_name("marker")
    slot, other = slots(folder, 2, limit=1)
    with ChildPool(light()) as pool:
        running = Background(
            value_of, pool, slot, "occupy_until", str(log), str(marker), label="run a, client 7"
        )
        assert wait_until(lambda: inside(log) == 1, 20)
        (child,) = held(folder)
        began_s = time.monotonic()
        with pytest.raises(SlotTimeout) as raised:
            value_of(pool, other, "pid", slot_timeout_s=1.2)
        assert time.monotonic() - began_s > 1
        assert f"the slot of {KEY} held by run a, client 7 (pid {child})" in str(raised.value)
        assert "waited 1.2 s for a slot" in str(raised.value)
        assert "Hint: raise isolation.slot_timeout_s" in str(raised.value)
        assert wait_until(lambda: SlotGroup(folder, KEY).gate().waiting() == "")
        marker.touch()
        assert running.result(20) == child


def test_the_deadline_of_a_fit_begins_when_it_has_its_slot(folder: Path, log: Path) -> None:
    first, second = slots(folder, 2, limit=1)
    with ChildPool(light()) as pool:
        running = Background(value_of, pool, first, "occupy", str(log), 1.5)
        assert wait_until(lambda: inside(log) == 1, 20)
        reply = reply_of(pool, second, "pid", timeout_s=1.2, slot_timeout_s=20)
        assert reply.wait_s > 0
        reply.close()
        running.result(20)


# --- who is next ---


@pytest.mark.parametrize("limit", [1, 3])
def test_fifty_contenders_all_get_their_turn_in_order(limit: int, folder: Path, log: Path) -> None:
    (order,) = finish(
        [owner("contend", folder=str(folder), limit=limit, count=50, log=str(log))], 60
    )
    assert sorted(order) == list(range(50))  # each exactly once
    assert most_at_once(lines(log)) <= limit
    # The kernel wakes them in their order; older ones let a few change places.
    overtaken = [
        sum(later > number for later in order[: order.index(number)]) for number in range(50)
    ]
    assert max(overtaken) <= 5, order


def test_the_queue_survives_that_its_file_is_removed(folder: Path, log: Path) -> None:
    (order,) = finish(
        [owner("contend", folder=str(folder), limit=1, count=8, log=str(log), remove_gate=True)], 60
    )
    assert sorted(order) == list(range(8))
    assert most_at_once(lines(log)) == 1


def test_calls_of_two_pools_are_served_in_the_order_in_which_they_came(
    folder: Path, log: Path
) -> None:
    marker, gate = log.with_name("marker"), folder / f"{KEY}.gate"
    mine = slots(folder, 4, limit=1)
    with ChildPool(light()) as first, ChildPool(light()) as second:
        calls = [
            Background(value_of, first, mine[0], "occupy_until", str(log), str(marker), "holder")
        ]
        assert wait_until(lambda: inside(log) == 1, 20)
        for number in range(6):
            pool, slot = (first, second)[number % 2], mine[1 + number // 2]
            calls.append(Background(value_of, pool, slot, "occupy", str(log), 0.01, str(number)))
            # The first of them is behind the gate, the others wait for that.
            assert wait_until(
                lambda number=number: (
                    queue_length(gate) == number and SlotGroup(folder, KEY).gate().waiting()
                ),
                20,
            )
        marker.touch()
        for call in calls:
            call.result(30)
    order = [line["name"] for line in lines(log) if line["what"] == "in"]
    assert order == ["holder", *"012345"]


def test_a_call_that_is_cancelled_or_killed_in_the_queue_lets_the_next_one_in(
    folder: Path, log: Path
) -> None:
    marker, gate = log.with_name("marker"), folder / f"{KEY}.gate"
    mine = slots(folder, 5, limit=1)
    with ChildPool(light()) as pool:
        holder = Background(value_of, pool, mine[0], "occupy_until", str(log), str(marker))
        assert wait_until(lambda: inside(log) == 1, 20)
        waiting = []
        for number, slot in enumerate(mine[1:]):
            waiting.append(Background(value_of, pool, slot, "pid", tag=f"fit {number}"))
            assert wait_until(lambda number=number: queue_length(gate) == number, 20)
        by_tag = {tag: pid for pid, tag in pool.children().items()}
        pool.cancel("fit 0")  # it is behind the gate
        with pytest.raises(FitDied):
            waiting[0].result(10)
        os.kill(by_tag["fit 2"], signal.SIGKILL)  # it waits for the gate
        with pytest.raises(FitDied, match="SIGKILL"):
            waiting[2].result(10)
        marker.touch()
        assert holder.result(20)
        assert {waiting[1].result(20), waiting[3].result(20)} == {
            by_tag["fit 1"],
            by_tag["fit 3"],
        }


def test_a_stopped_child_at_the_head_of_the_queue_blocks_it_until_its_own_deadline(
    folder: Path, log: Path
) -> None:
    marker, gate = log.with_name("marker"), folder / f"{KEY}.gate"
    mine = slots(folder, 3, limit=1)
    with ChildPool(light()) as pool:
        holder = Background(value_of, pool, mine[0], "occupy_until", str(log), str(marker))
        assert wait_until(lambda: inside(log) == 1, 20)
        head = Background(value_of, pool, mine[1], "pid", tag="head", slot_timeout_s=3)
        assert wait_until(lambda: any("held by" in reason for reason in pool.waiting()), 20)
        next_one = Background(value_of, pool, mine[2], "pid")
        assert wait_until(lambda: queue_length(gate) == 1, 20)
        (stopped,) = [pid for pid, tag in pool.children().items() if tag == "head"]
        os.kill(stopped, signal.SIGSTOP)
        marker.touch()
        assert holder.result(20)
        with pytest.raises(SlotTimeout):
            head.result(20)
        assert next_one.result(20) != stopped
        assert not entries.is_alive(stopped)


# --- children that are kept ---


def test_a_kept_child_keeps_its_slot_between_calls(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    with ChildPool(light(fits_per_process=0)) as pool:
        first = value_of(pool, slot, "pid")
        assert held(folder) == [first]
        reply = reply_of(pool, slot, "pid")
        assert json.loads(entries.read(reply.buffers[0])) == first
        assert reply.wait_s == 0
        assert reply.gone is None
        reply.close()
        assert held(folder) == [first]
    assert held(folder) == []


def test_a_kept_child_leaves_when_a_fit_of_another_pool_waits(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    with ChildPool(light(fits_per_process=0)) as first, ChildPool(light()) as second:
        kept = value_of(first, slot, "pid")
        assert value_of(second, slot, "pid", slot_timeout_s=10) != kept
        assert wait_until(lambda: not entries.is_alive(kept))
        assert value_of(first, slot, "pid") not in (kept, None)


def test_a_kept_child_leaves_when_a_fit_of_its_own_pool_waits(folder: Path) -> None:
    first, second = slots(folder, 2, limit=1)
    with ChildPool(light(fits_per_process=0)) as pool:
        kept = value_of(pool, first, "pid")
        assert value_of(pool, second, "pid", slot_timeout_s=10) != kept
        assert wait_until(lambda: not entries.is_alive(kept))


def test_a_kept_child_that_works_leaves_after_its_call(folder: Path, log: Path) -> None:
    (slot,) = slots(folder, 1)
    marker = log.with_name("marker")
    with ChildPool(light(fits_per_process=0)) as first, ChildPool(light()) as second:
        working = Background(value_of, first, slot, "occupy_until", str(log), str(marker))
        assert wait_until(lambda: inside(log) == 1, 20)
        waiting = Background(value_of, second, slot, "pid")
        assert wait_until(lambda: SlotGroup(folder, KEY).gate().waiting() != "", 20)
        assert entries.is_alive(held(folder)[0])
        marker.touch()
        kept = working.result(20)
        assert waiting.result(10) != kept


@pytest.mark.parametrize("fits", [0, 3])
def test_calls_that_meet_leaving_children_are_not_lost(fits: int, folder: Path) -> None:
    """Two pools take one slot from each other again and again."""
    (slot,) = slots(folder, 1)

    def hammer(pool: ChildPool, pause_s: float) -> int:
        for number in range(20):
            assert value_of(pool, slot, "pid")
            time.sleep(pause_s * (number % 5))
        return 20

    with (
        ChildPool(light(fits_per_process=fits)) as first,
        ChildPool(light(fits_per_process=fits)) as second,
    ):
        workers = [Background(hammer, first, 0.004), Background(hammer, second, 0.007)]
        assert [worker.result(60) for worker in workers] == [20, 20]


def test_a_call_that_meets_an_idle_child_on_its_way_out_is_not_lost(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    options = light(fits_per_process=0, prepare="sharing_entries:impatient", prepare_arg="0.01")
    with ChildPool(options) as pool:
        answers = []
        for number in range(50):
            answers.append(value_of(pool, slot, "pid"))
            time.sleep(0.046 + 0.0004 * (number % 25))  # it looks about every 50 ms
        assert len(answers) == 50
        assert len(set(answers)) > 1  # some did leave


def test_an_idle_kept_child_leaves_and_its_slot_is_free(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    options = light(fits_per_process=0, prepare="sharing_entries:impatient", prepare_arg="0.3")
    with ChildPool(options) as pool:
        kept = value_of(pool, slot, "pid")
        assert wait_until(lambda: not pool.children())
        assert held(folder) == []
        assert not entries.is_alive(kept)
        assert value_of(pool, slot, "pid") != kept


# --- what outlives a holder does not hold its slot ---

WAYS = ["fork", "session", "multiprocessing", "subprocess", "loader"]


def descendants(marker: Path) -> dict[str, int]:
    assert wait_until(marker.exists, 30)
    return dict(json.loads(marker.read_text()))


def test_no_descendant_of_a_killed_child_keeps_its_slot(folder: Path, tmp_path: Path) -> None:
    (slot,) = slots(folder, 1)
    with ChildPool(light()) as pool:
        running = Background(value_of, pool, slot, "have_descendants", WAYS, str(tmp_path / "m"))
        found = descendants(tmp_path / "m")
        assert len(found) == 6
        (child,) = held(folder)
        assert sharing_entries.lock_files_of(child, folder) == [f"{KEY}.0"]
        assert {way: sharing_entries.lock_files_of(pid, folder) for way, pid in found.items()} == {
            way: [] for way in found
        }
        server = entries.fork_server_of(os.getpid())
        os.kill(server, signal.SIGSTOP)  # it would end them
        try:
            os.kill(child, signal.SIGKILL)
            assert wait_until(lambda: held(folder) == [])
            with SlotGroup(folder, KEY).gate():
                lock = SlotGroup(folder, KEY).take(1)
            assert lock is not None
            lock.release()
            assert entries.is_alive(found["fork"])
            assert entries.is_alive(found["session"])
        finally:
            os.kill(server, signal.SIGCONT)
        with pytest.raises(FitDied, match="SIGKILL"):
            running.result(10)
        assert wait_until(lambda: not any(map(entries.is_alive, found.values())))


def test_after_a_killed_fork_server_the_slot_is_free_for_others(
    folder: Path, tmp_path: Path
) -> None:
    (slot,) = slots(folder, 1)
    ways = ["fork", "session", "subprocess"]
    with ChildPool(light()) as first, ChildPool(light()) as second:
        value_of(second, slot, "pid")
        running = Background(value_of, first, slot, "have_descendants", ways, str(tmp_path / "m"))
        found = descendants(tmp_path / "m")
        waiting = Background(value_of, second, slot, "pid", slot_timeout_s=20)
        assert wait_until(lambda: SlotGroup(folder, KEY).gate().waiting() != "", 20)
        os.kill(first.fork_server() or 0, signal.SIGKILL)
        with pytest.raises(FitDied, match="fork server"):
            running.result(10)
        assert waiting.result(10)
        assert wait_until(lambda: not any(map(entries.is_alive, found.values())))


def test_a_killed_run_leaves_no_lock(folder: Path, log: Path, tmp_path: Path) -> None:
    calls = [["have_descendants", ["fork", "session"], str(tmp_path / "m")]]
    process = owner("make_calls", folder=str(folder), calls=calls, limit=1)
    try:
        found = descendants(tmp_path / "m")
        assert len(held(folder)) == 1
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert wait_until(lambda: held(folder) == [])
    assert wait_until(lambda: not any(map(entries.is_alive, found.values())))


# --- lock files that are not ours alone ---


def _symlink(path: Path) -> None:
    path.symlink_to(path.with_name("target"))


def _others_file(path: Path) -> None:
    path.touch(0o666)
    os.chown(path, NOBODY, NOBODY)


def _hard_link(path: Path) -> None:
    path.touch(0o600)
    path.with_name("other").hardlink_to(path)


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


FILES = {
    "a symbolic link": (_symlink, "found a symbolic link"),
    "another user's": (_others_file, f"found one of uid {NOBODY}"),
    "a hard link": (_hard_link, "with 2 links"),
    "a fifo": (_fifo, "found one of uid .* mode 10600"),
    "a folder": (Path.mkdir, "unusable: Is a directory"),
}


@pytest.mark.parametrize("file", ["0", "gate"])
@pytest.mark.parametrize("kind", FILES)
def test_a_lock_file_that_somebody_else_could_have_put_there_is_refused(
    kind: str, file: str, folder: Path
) -> None:
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    make: Callable[[Path], Any]
    make, words = FILES[kind]
    path = folder / f"{KEY}.{file}"
    make(path)
    (slot,) = slots(folder, 1)
    with ChildPool(light()) as pool:
        with pytest.raises(PlatformError, match=words) as raised:
            value_of(pool, slot, "pid")
        assert str(path) in str(raised.value)
        assert "expected a lock file of" in str(raised.value)
        assert "Hint: remove it, or name a folder of the node with isolation.lock_dir" in str(
            raised.value
        )
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        for other in folder.glob("other"):
            other.unlink()
        assert value_of(pool, slot, "pid")
    assert not (folder / "target").exists()


def test_a_lock_folder_that_vanished_is_an_error_of_the_platform(folder: Path) -> None:
    (slot,) = slots(folder, 1)
    folder.rmdir()
    with (
        ChildPool(light()) as pool,
        pytest.raises(PlatformError, match=r"isolation.lock_dir: .*No such file or directory"),
    ):
        value_of(pool, slot, "pid")


def test_a_lock_file_that_is_removed_while_it_is_held_is_not_passed_over_in_silence(
    folder: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever comes next makes a new file, and cannot know of the old one."""
    marker = log.with_name("marker")
    (slot,) = slots(folder, 1)
    with (
        caplog.at_level(logging.WARNING),
        ChildPool(light(fits_per_process=0)) as first,
        ChildPool(light()) as second,
    ):
        running = Background(value_of, first, slot, "occupy_until", str(log), str(marker))
        assert wait_until(lambda: inside(log) == 1, 20)
        (folder / f"{KEY}.0").unlink()
        assert value_of(second, slot, "pid")
        marker.touch()
        kept = running.result(20)
        assert f"{folder / KEY}.0" in caplog.text
        assert "removed" in caplog.text
        assert wait_until(lambda: not entries.is_alive(kept))  # it must not go on without a lock
        assert value_of(first, slot, "pid")
        assert held(folder)


def test_a_file_that_a_foreign_program_locks_only_delays(folder: Path, tmp_path: Path) -> None:
    (slot,) = slots(folder, 1)
    marker = tmp_path / "marker"
    foreign = owner("lock_and_stay", path=str(folder / f"{KEY}.0"), marker=str(marker))
    try:
        assert wait_until(marker.exists, 20)
        with ChildPool(light()) as pool:
            with pytest.raises(SlotTimeout, match=r"held by somebody"):
                value_of(pool, slot, "pid", slot_timeout_s=3)
            waiting = Background(value_of, pool, slot, "pid")
            assert wait_until(lambda: SlotGroup(folder, KEY).gate().waiting() != "", 20)
            foreign.kill()
            assert waiting.result(10)
    finally:
        foreign.kill()
        foreign.communicate(timeout=10)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff" * 9000, b'{"pid": 1, "label": 2}']
)
def test_a_record_that_cannot_be_read_is_somebodys(content: bytes, folder: Path) -> None:
    group = SlotGroup(folder, KEY)
    with group.gate():
        lock = group.take(1)
    assert lock is not None
    os.pwrite(lock.fd, content, 0)
    assert [str(holder) for holder in group.holders()] == ["somebody (pid 0)"]
    lock.release()
    assert group.holders() == []


# --- the folder ---


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    for _ in range(2):
        locks.prepare_folder(tmp_path / "deep" / "locks")
    made = tmp_path / "deep" / "locks"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert locks.identity(made) == locks.identity(tmp_path / "deep" / ".." / "deep" / "locks")
    assert locks.identity(made) != locks.identity(tmp_path)


def _link_to_folder(path: Path) -> None:
    path.with_name("real").mkdir(0o700)
    path.symlink_to(path.with_name("real"))


def _others_folder(path: Path) -> None:
    path.mkdir(0o700)
    os.chown(path, NOBODY, NOBODY)


def _open_folder(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return make


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link": (_link_to_folder, "expected a folder, found a symbolic link at"),
    "a link to nothing": (_symlink, "expected a folder, found something else at"),
    "a file": (Path.touch, "expected a folder, found something else at"),
    "another user's": (_others_folder, rf"expected a folder of uid \d+, found .* of uid {NOBODY}"),
    "group-writable": (_open_folder(0o770), "only its owner may write .* with mode 0770"),
    "open to all": (_open_folder(0o1777), "only its owner may write .* with mode 1777"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_others_could_touch_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    make, words = FOLDERS[kind]
    path = tmp_path / "locks"
    make(path)
    with pytest.raises(PlatformError, match=words) as raised:
        locks.prepare_folder(path)
    assert str(raised.value).startswith("isolation.lock_dir: ")
    assert str(path) in str(raised.value)
    assert "name a folder of the node with isolation.lock_dir" in (raised.value.hint or "")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlatformError, match=r"could not make .*locks: Not a directory"):
        locks.prepare_folder(tmp_path / "file" / "locks")
    with pytest.raises(PlatformError, match="expected an absolute path, found locks"):
        locks.prepare_folder(Path("locks"))


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs"])
def test_a_folder_on_a_network_disk_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"29 1 0:1 / / rw - ext4 /dev/a rw\n30 29 0:2 / {tmp_path} rw - {kind} server:/x rw"
    mount_of = locks.mount_of
    monkeypatch.setattr(locks, "mount_of", lambda folder: mount_of(folder, text))
    with pytest.raises(PlatformError) as raised:
        locks.prepare_folder(tmp_path / "locks")
    assert f"expected a folder of this node, found {tmp_path / 'locks'} on a network disk" in str(
        raised.value
    )
    assert f"({kind})" in str(raised.value)


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /site/tmp rw,nosuid shared:2 - tmpfs tmpfs rw
24 22 0:22 /export/home /site/home rw - nfs4 server:/export rw,vers=4.2
25 24 0:23 / /site/home/scratch rw master:3 - xfs /dev/vdb rw
26 22 0:24 / /site/var/tmp rw - xfs /dev/vdc rw
27 26 254:1 /slurm/4711/.4711 /site/var/tmp rw - ext4 /dev/vdd rw
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/site/srv/locks", ("ext4", "/")),
        ("/site/tmp/locks", ("tmpfs", "/")),
        ("/site/tmpfiles", ("ext4", "/")),
        ("/site/home/me/locks", ("nfs4", "/export/home")),
        ("/site/home/scratch/locks", ("xfs", "/")),
        ("/site/var/tmp/locks", ("ext4", "/slurm/4711/.4711")),  # the last mount hides the first
    ],
)
def test_the_disk_of_a_folder_is_that_of_its_deepest_mount(
    folder: str, expected: tuple[str, str]
) -> None:
    assert locks.mount_of(Path(folder), MOUNTS) == expected


def test_the_disk_of_a_folder_below_a_link_is_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "network").mkdir()
    (tmp_path / "tmp").symlink_to(tmp_path / "network")
    text = f"22 1 0:1 / / rw - ext4 /dev/a rw\n23 22 0:2 / {tmp_path}/network rw - nfs4 s:/x rw"
    assert locks.mount_of(tmp_path / "tmp" / "locks", text) == ("nfs4", "/")


@pytest.mark.parametrize(
    ("folder", "job", "private"),
    [
        ("/site/var/tmp/locks", "4711", "/slurm/4711/.4711"),
        ("/site/var/tmp/locks", "4711_3", "/slurm/4711/.4711"),
        ("/site/var/tmp/locks", "471", ""),
        ("/site/tmp/locks", "4711", ""),
        ("/site/var/tmp/locks", "local-12", ""),
    ],
)
def test_a_folder_that_a_site_gives_each_job_is_known(folder: str, job: str, private: str) -> None:
    assert locks.private_to_job(Path(folder), job, MOUNTS) == private


def test_a_label_of_any_length_hides_neither_what_is_promised_nor_who_waits(folder: Path) -> None:
    group = SlotGroup(folder, "gpu-x")
    with group.gate() as gate:
        lock = group.take(1)
        assert lock is not None
        lock.write(Holder(0, 7, "\U0001f600" * 10_000, reserved_bytes=5))
        (holder,) = group.holders()
        assert (holder.pid, holder.reserved_bytes) == (7, 5)
        gate.announce("\U0001f600" * 10_000)
        assert group.gate().waiting()
    lock.release()


@pytest.mark.parametrize(
    ("flock", "found"),
    [
        (lambda *_: None, "grants one lock twice"),  # as a mount with "nolock"
        (_not_supported, "could not lock .*: Operation not supported"),
    ],
)
def test_a_disk_without_locks_is_refused(
    flock: Callable[..., None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(PlatformError, match=found) as caught:
        locks.prepare_folder(tmp_path / "locks")
    assert "name a folder of the node with isolation.lock_dir" in str(caught.value)
    assert not list((tmp_path / "locks").iterdir())
