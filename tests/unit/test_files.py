"""Files that several processes share: whole or not at all, and every wait ends."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedhpc import files
from fedhpc.errors import PlatformError, Superseded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of(process: subprocess.Popen[str], timeout_s: float = 30.0) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    return output.strip()


# --- write_atomic --------------------------------------------------------------------------------


def test_a_file_is_written_with_its_content_and_mode(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "text", "größe\n")
    files.write_atomic(tmp_path / "bytes", b"\x00\xff", mode=0o600)
    assert (tmp_path / "text").read_bytes() == "größe\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE((tmp_path / "bytes").stat().st_mode) == 0o600
    assert names(tmp_path) == ["bytes", "text"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * (200_000 + letter) for letter in b"ab"]
    files.write_atomic(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            files.write_atomic(path, contents[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: set[bytes] = set()
        deadline_s = time.monotonic() + 10
        reads = 0
        while (len(seen) < 2 or reads < 200) and time.monotonic() < deadline_s:
            found = path.read_bytes()
            assert found in contents
            seen.add(found[:1])
            reads += 1
    finally:
        stop.set()
        writer.join(10)
    assert seen == {b"a", b"b"}
    assert names(tmp_path) == ["file"]


def test_an_interruption_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt  # as a signal handler may, in the middle of it

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_in_the_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    path = tmp_path / "folder" / "file"
    with pytest.raises(PlatformError) as caught:
        files.write_atomic(path, "x")
    assert f"could not write {path}: Not a directory" in str(caught.value)
    assert caught.value.exit_code == 75
    assert names(tmp_path) == ["folder"]


def test_a_folder_in_the_place_of_the_file_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(PlatformError, match="Is a directory"):
        files.write_atomic(tmp_path / "file", "x")
    assert names(tmp_path) == ["file"]


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fedhpc import files
from fedhpc.errors import PlatformError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
path = Path(sys.argv[2])
"""


def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = """
try:
    files.write_atomic(path, "x" * 101)
except PlatformError as error:
    print(error)
"""
    message = output_of(python(_FULL_DISK + code, "", path))
    assert message.startswith(f"could not write {path}: File too large")
    assert "Hint: check space" in message
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "file", {"a": object()})
    assert names(tmp_path) == []


# --- read_json -----------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {}}
    files.write_json(tmp_path / "file", value)
    assert files.read_json(tmp_path / "file") == value


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b'{"a": 1}}', b"\x00" * 64, b"\xff\xfe\x00", b"not json"]
)
def test_a_half_written_file_or_garbage_reads_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert files.read_json(tmp_path / "file") is None


def test_a_missing_file_and_a_folder_read_as_none(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "missing") is None
    assert files.read_json(tmp_path) is None
    assert files.read_json(tmp_path / "missing" / "folder") is None


# --- lines ---------------------------------------------------------------------------------------


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    values = [{"a": 1}, [2], "three\nlines\u2028more", None]
    for value in values:
        files.append_line(tmp_path / "file", value)
    assert list(files.read_lines(tmp_path / "file")) == values
    assert (tmp_path / "file").read_bytes().count(b"\n") == len(values)


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(files.read_lines(tmp_path / "missing")) == []


@pytest.mark.parametrize("rest", ['{"half": ', "\x00\x00\x00"])
def test_a_last_line_that_is_not_whole_is_left_out(tmp_path: Path, rest: str) -> None:
    files.append_line(tmp_path / "file", 1)
    with (tmp_path / "file").open("a") as file:
        file.write(rest)
    assert list(files.read_lines(tmp_path / "file")) == [1]


def test_bytes_that_are_no_text_do_not_hide_the_other_lines(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1\n\xff\xfe\n2\n")
    assert list(files.read_lines(tmp_path / "file")) == [1, 2]


def test_no_line_is_lost_when_several_processes_append(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = """
import sys
from pathlib import Path
from fedhpc.files import append_line
for number in range(300):
    append_line(Path(sys.argv[2]), {"who": sys.argv[1], "number": number, "pad": "x" * 500})
"""
    writers = [python(code, who, path) for who in range(3)]
    for writer in writers:
        output_of(writer)
    lines = list(files.read_lines(path))
    assert len(lines) == 900
    for who in "012":
        assert [line["number"] for line in lines if line["who"] == who] == list(range(300))


def test_a_line_that_a_full_disk_cuts_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = """
files.append_line(path, "x" * 60)
try:
    files.append_line(path, "y" * 60)
except PlatformError as error:
    print(error)
"""
    message = output_of(python(_FULL_DISK + code, "", path))
    assert message.startswith(f"could not append to {path}: ")
    assert list(files.read_lines(path)) == ["x" * 60]


def test_appending_below_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(PlatformError, match=r"could not append to .*: Not a directory"):
        files.append_line(tmp_path / "folder" / "file", 1)


# --- wait_until ----------------------------------------------------------------------------------


def test_what_is_ready_is_not_waited_for() -> None:
    start_s = time.monotonic()
    assert files.wait_until(lambda: True, timeout_s=60, first_pause_s=30)
    assert files.wait_until(lambda: True, timeout_s=0)
    assert time.monotonic() - start_s < 5


def test_a_wait_ends_at_its_deadline() -> None:
    start_s = time.monotonic()
    assert not files.wait_until(lambda: False, timeout_s=0.3, max_pause_s=60, first_pause_s=60)
    assert 0.3 <= time.monotonic() - start_s < 5


def test_a_wait_asks_once_more_at_its_deadline() -> None:
    end_s = time.monotonic() + 0.2
    assert files.wait_until(lambda: time.monotonic() >= end_s, timeout_s=0.25, first_pause_s=60)


def test_a_wait_pauses_longer_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now_s
        pauses.append(seconds)
        now_s += seconds

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    assert not files.wait_until(lambda: False, timeout_s=10)
    assert pauses[0] == pytest.approx(0.02)
    assert pauses[:-1] == sorted(pauses[:-1])
    assert max(pauses) == 1.0
    assert sum(pauses) == pytest.approx(10)


# --- claim and refresh ---------------------------------------------------------------------------


def test_one_process_of_several_gets_a_claim(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from fedhpc.files import claim
folder = Path(sys.argv[2])
(folder / f"ready-{sys.argv[1]}").touch()
deadline_s = time.monotonic() + 30
while not (folder / "go").exists() and time.monotonic() < deadline_s:
    pass
print(*(int(claim(folder / f"claim-{number}")) for number in range(50)))
"""
    claimants = [python(code, who, tmp_path) for who in range(4)]
    try:
        everybody = files.wait_until(lambda: len(names(tmp_path)) == 4, timeout_s=30)
    finally:
        (tmp_path / "go").touch()
        answers = [output_of(claimant).split() for claimant in claimants]
    assert everybody
    assert [column.count("1") for column in zip(*answers, strict=True)] == [1] * 50


def test_a_claim_is_kept(tmp_path: Path) -> None:
    assert files.claim(tmp_path / "claim")
    assert not files.claim(tmp_path / "claim")


def test_a_claim_in_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"could not create .*: No such file or directory"):
        files.claim(tmp_path / "missing" / "claim")


def test_refreshing_a_missing_folder_is_no_error(tmp_path: Path) -> None:
    files.refresh_directory(tmp_path)
    files.refresh_directory(tmp_path / "missing")


def test_json_is_readable_by_people_and_ends_with_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "file", {"a": 1, "b": 2})
    text = (tmp_path / "file").read_text()
    assert text.endswith("}\n")
    assert len(text.splitlines()) == 4
    assert json.loads(text) == {"a": 1, "b": 2}


# --- a disk that fails ---------------------------------------------------------------------------


def failing(name: str, errors: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the next calls of a function of `os` fail, one for each error; return what is left."""
    real = getattr(os, name)

    def call(*arguments: object, **more: object) -> object:
        if errors:
            number = errors.pop(0)
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, call)
    return errors


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_disk_that_fails_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    (tmp_path / "file").write_text("old")
    left = failing(call, [error] * 3, monkeypatch)
    files.write_atomic(tmp_path / "file", "new")
    assert left == []
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOENT])
def test_what_no_wait_can_mend_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    left = failing("open", [error] * 2, monkeypatch)
    with pytest.raises(PlatformError, match=os.strerror(error)):
        files.write_atomic(tmp_path / "file", "new")
    assert len(left) == 1


def test_a_full_disk_is_waited_for_until_the_deadline_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 1.0)
    failing("fsync", [errno.ENOSPC] * 1000, monkeypatch)
    start_s = time.monotonic()
    with pytest.raises(PlatformError) as caught:
        files.write_atomic(tmp_path / "file", "new")
    assert 1.0 <= time.monotonic() - start_s < 10
    assert "No space left on device (for 1 s)" in str(caught.value)
    assert "Hint: free space" in str(caught.value)
    assert caplog.text.count("waiting 1 s") == 1
    assert names(tmp_path) == []


def test_without_patience_only_a_stale_handle_gets_a_second_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("open", [errno.ESTALE], monkeypatch)
    files.write_atomic(tmp_path / "file", "new", patience_s=0)
    failing("open", [errno.ENOSPC], monkeypatch)
    with pytest.raises(PlatformError, match="No space left"):
        files.write_atomic(tmp_path / "file", "newer", patience_s=0)
    assert (tmp_path / "file").read_text() == "new"


def test_a_stale_file_is_opened_again_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.append_line(tmp_path / "file", {"a": 1})
    real = Path.open
    stale = [errno.ESTALE, errno.ESTALE]

    def open_(path: Path, *arguments: Any, **more: Any) -> Any:
        if stale:
            raise OSError(stale.pop(), "Stale file handle")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", open_)
    assert files.read_json(tmp_path / "file") == {"a": 1}
    stale.append(errno.ESTALE)
    assert list(files.read_lines(tmp_path / "file")) == [{"a": 1}]


def test_a_line_is_appended_once_where_only_the_close_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, errors = os.close, [errno.ENOSPC, errno.EIO]  # as NFS, which writes only then

    def close(fd: int) -> None:
        real(fd)
        if errors:
            raise OSError(errors.pop(), "late")

    files.append_line(tmp_path / "file", {"round": 0})
    monkeypatch.setattr(os, "close", close)
    files.append_line(tmp_path / "file", {"round": 1})
    assert errors == []
    assert list(files.read_lines(tmp_path / "file")) == [{"round": 0}, {"round": 1}]


def test_the_half_line_of_a_killed_process_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"round": 1}\n{"round": 2, "ha')
    files.append_line(path, {"round": 2})
    assert list(files.read_lines(path)) == [{"round": 1}, {"round": 2}]


def test_a_fence_is_asked_in_the_last_moment_and_prevents_every_write(tmp_path: Path) -> None:
    for name in ("replaced", "appended", "removed"):
        (tmp_path / name).write_text("{}\n")

    def superseded() -> None:
        raise Superseded("another server has come")

    with files.fenced(superseded):
        with pytest.raises(Superseded):
            files.write_atomic(tmp_path / "replaced", "new")
        with pytest.raises(Superseded):
            files.append_line(tmp_path / "appended", {"new": 1})
        with pytest.raises(Superseded):
            files.remove(tmp_path / "removed")
    assert names(tmp_path) == ["appended", "removed", "replaced"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"{}\n"}
    files.write_atomic(tmp_path / "replaced", "new")


def test_a_file_of_another_node_is_opened_only_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    with pytest.raises(PlatformError, match=r"with 4 bytes, found No such file"):
        files.open_whole(path, 4, timeout_s=0.1)
    path.write_bytes(b"ab")
    with pytest.raises(PlatformError, match="found 2 bytes"):
        files.map_whole(path, 4, timeout_s=0.1)
    timer = threading.Timer(0.2, path.write_bytes, [b"abcd"])
    timer.start()
    assert files.map_whole(path, 4) == b"abcd"
    timer.join(10)


_READ_ONLY = """
set -e
mount -t tmpfs none "$1"
echo '{"old": 1}' > "$1/file"
mount -o remount,ro "$1"
exec "$2" -c "$3" "$1"
"""


def test_a_disk_that_has_become_read_only_is_an_error_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedhpc import files
from fedhpc.errors import PlatformError
folder = Path(sys.argv[1])
for write in (
    lambda: files.write_json(folder / "file", {}),
    lambda: files.append_line(folder / "file", {}),
    lambda: files.claim(folder / "claim"),
):
    try:
        write()
    except PlatformError as error:
        print(error)
files.remove(folder / "file")
print(files.read_json(folder / "file"))
"""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root")
    words = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", tmp_path, sys.executable, code]
    start_s = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - start_s < 30
    assert done.stdout.count("Read-only file system") == 3
    assert done.stdout.count("Hint: the disk is read-only on this node") == 3
    assert done.stdout.endswith("{'old': 1}\n")
