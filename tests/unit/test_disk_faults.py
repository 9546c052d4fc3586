"""What the parts of a run do when the disk refuses them: nothing is lost in silence."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedhpc import clean, config, files, inspection, logging_setup, rendezvous, run_state
from fedhpc.cluster import submission
from fedhpc.cluster.submission import Submission
from fedhpc.errors import PlatformError
from fedhpc.federation import blobs, grid_pb2
from fedhpc.federation.blobs import BlobStore
from fedhpc.federation.breakdown import SlotSeconds
from fedhpc.federation.payload import Blob
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.transport import Response
from fedhpc.paths import RunPaths, create_run_folder
from fedhpc.rendezvous import Rendezvous

NO_PID = "999999999"


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = create_run_folder(tmp_path, "test")
    files.write_atomic(made.config, "name: test\n")
    return made


def refuse(*_: object, **__: object) -> None:
    raise PlatformError("could not write: No space left on device")


def test_an_error_that_no_file_can_hold_is_in_the_log_and_does_not_end_the_run(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "write_atomic", refuse)
    failure = grid_pb2.Failure(reason="ValueError: no", traceback="line 7 of the app")
    recorder = Recorder(paths)
    recorder.fit_ended(Response("1-0-train-0", failure=failure), 1, 0, "train")
    recorder.write_fits()
    assert "line 7 of the app" in caplog.text
    assert [line["reason"] for line in files.read_lines(paths.fits)] == ["ValueError: no"]


def test_lines_of_fits_are_written_together_and_none_is_lost(paths: RunPaths) -> None:
    recorder = Recorder(paths)
    written = []
    for client in range(3):
        recorder.fit_ended(Response(f"1-{client}-train-0"), 1, client, "train")
        recorder.write_fits(every_s=60.0)
        written.append(len(list(files.read_lines(paths.fits))))
    recorder.write_fits()
    assert written == [1, 1, 1]
    assert [line["client"] for line in files.read_lines(paths.fits)] == [0, 1, 2]


def test_a_line_of_a_round_that_is_lost_ends_the_run(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "append_line", refuse)
    recorder = Recorder(paths)
    with pytest.raises(PlatformError, match="No space left"):
        recorder.round_ended(1, {}, recorder.lap(SlotSeconds()))


def test_the_links_never_wait_for_a_blob_that_is_removed(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(paths, inline_bytes=0)
    removed: list[Path] = []

    def remove(path: Path) -> None:  # for as long as a slow disk takes
        store.drop("b")
        assert store.parts("2" * 64) == [b"two"]
        removed.append(path)

    monkeypatch.setattr(blobs, "remove", remove)
    store.add({"a": [Blob("1" * 64, 3, [b"one"])]})
    store.drop("a")
    assert store.add({"b": [Blob("2" * 64, 3, [b"two"])]}) == ["1" * 64]
    assert removed == [paths.blob("1" * 64)]


def left_behind(paths: RunPaths, phase: str) -> None:
    """Make a run whose server is gone, with a last word in the rendezvous alone."""
    run_state.write(paths, "running", attempt=1, model_sha256="abc")
    submission.write(paths, Submission("local", NO_PID))
    assert files.claim(paths.attempt(1))
    word = Rendezvous(paths.run_id, 1, "h:1", "h", 1, "local-1", phase, 9)  # type: ignore[arg-type]
    files.write_json(paths.rendezvous, asdict(word))


@pytest.mark.parametrize(
    ("phase", "state", "reason"),
    [
        ("finished", "finished", "so says its rendezvous; the server process ended"),
        ("failed", "failed", "so says its rendezvous; the server process ended"),
        ("serving", "failed", "the server process ended without a word"),
    ],
)
def test_a_server_that_could_not_write_its_end_is_judged_by_its_rendezvous(
    paths: RunPaths, phase: str, state: str, reason: str
) -> None:
    left_behind(paths, phase)
    assert inspection.inspect(paths).status["state"] == state
    written = run_state.read(paths)
    assert written["state"] == state
    assert written["reason"].startswith(reason)
    assert written["exit_code"] == (0 if state == "finished" else 1)


def test_where_nobody_can_write_the_end_nobody_says_running(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(paths, "serving")
    monkeypatch.setattr(files, "write_json", refuse)
    status = inspection.inspect(paths).status
    assert (status["state"], status["exit_code"]) == ("failed", 75)
    assert run_state.read(paths)["state"] == "running"


def test_a_server_that_is_seen_from_elsewhere_may_wait_for_its_disk(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left_behind(paths, "serving")
    submission.write(paths, Submission("local", NO_PID, host="elsewhere"))
    assert inspection._SILENT_S > files.PATIENCE_S
    monkeypatch.setattr(inspection, "_STRANGE_S", 0.1)
    monkeypatch.setattr(inspection, "_SILENT_S", 30.0)
    real, looks = rendezvous.read, []

    def read(paths: RunPaths) -> Rendezvous | None:  # it moves again after a while
        looks.append(1)
        found = real(paths)
        assert found is not None
        return found if len(looks) < 10 else rendezvous.replace(found, heartbeat=10)

    monkeypatch.setattr(rendezvous, "read", read)
    assert inspection.inspect(paths).status["state"] == "running"
    assert "no heartbeat" in caplog.text


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_runs_are_cleaned_also_where_the_clock_of_the_disk_is_ahead(
    paths: RunPaths, ahead_s: float
) -> None:
    run_state.write(paths, "finished")
    now_s = paths.status.stat().st_mtime
    os.utime(paths.status, (now_s + ahead_s, now_s + ahead_s))
    assert 0 <= clean._ended_days_ago(paths) < 1
    paths.status.unlink()
    assert clean._ended_days_ago(paths) >= 0


def test_a_config_on_a_disk_that_fails_is_no_error_of_the_config(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, errors = Path.read_text, [116, 116, 5]  # stale twice, then EIO

    def read_text(path: Path, *arguments: Any, **more: Any) -> str:
        if errors:
            raise OSError(errors.pop(0), "the disk")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert config.load(paths.config).name == "test"
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    errors += [5] * 100
    with pytest.raises(PlatformError, match="could not read"):
        config.load(paths.config)


def test_who_logs_does_not_wait_for_the_disk_of_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = logging.getLogger("fedhpc")
    before = (root.handlers, root.propagate, root.level)
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w", 1) as pipe, os.fdopen(read_end) as reader:
        monkeypatch.setattr("sys.stderr", pipe)
        try:
            logging_setup.set_up("server")
            for _ in range(2000):  # more than the pipe holds, and nobody reads
                root.warning("x" * 100)
            read = sum("server WARNING x" in reader.readline() for _ in range(2000))
        finally:
            root.handlers, root.propagate = before[:2]
            root.setLevel(before[2])
    assert read == 2000
