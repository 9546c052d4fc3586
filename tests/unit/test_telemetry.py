"""Samples over time, with a pool that only seems to have children."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import eventually

from fedhpc.isolation import telemetry
from fedhpc.isolation.telemetry import Sampler


class Pool:
    """A pool with one child that always works."""

    def __init__(self) -> None:
        self.killed = threading.Event()

    def children(self) -> dict[int, str]:
        return {1: "it"}

    def standing_by(self) -> set[int]:
        return set()

    def fork_server(self) -> None:
        return None

    def kill_for_memory(self, _: int) -> None:
        self.killed.set()


def sampler(path: Path, pool: Pool, **more: Any) -> Sampler:
    return Sampler(path, pool, {}, **more)  # type: ignore[arg-type]


def test_samples_are_taken_also_where_a_process_that_ends_is_always_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "INTERVAL_S", 0.05)
    path = tmp_path / "0.jsonl"
    monkeypatch.setattr(telemetry, "_GONE_S", 0.1)
    monkeypatch.setattr(telemetry, "_GATHERED_S", 0.0)  # the file is there at once
    # After a sample that took long (of large processes, or many) the next one comes later.
    monkeypatch.setattr(telemetry, "proportional_bytes", lambda _, **more: 1)
    monkeypatch.setattr(telemetry, "_LONGER_THAN_A_SAMPLE", 1)
    with sampler(path, Pool()) as made:
        usage = made.began({}, None, None)
        for _ in range(20):  # none of these processes goes
            made.ended(usage, threading.Event())
        deadline_s = time.monotonic() + 30
        while (kinds := kinds_in(path)).count("fit") < 20 and time.monotonic() < deadline_s:
            time.sleep(0.05)
    assert kinds.count("fit") == 20
    last_fit = len(kinds) - 1 - kinds[::-1].index("fit")
    assert "sample" in kinds[kinds.index("fit") : last_fit]


def test_tiny_fits_do_not_have_a_sample_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "proportional_bytes", lambda _, **more: 1)
    path, pool = tmp_path / "0.jsonl", Pool()
    monkeypatch.setattr(pool, "children", lambda: {1: ""})  # kept, and idle between fits
    begin_s = time.monotonic()
    with sampler(path, pool) as made:
        for _ in range(200):
            made.ended(made.began({}, None, None), None)
    seconds = time.monotonic() - begin_s
    kinds = kinds_in(path)
    assert kinds.count("fit") == 200
    assert 1 <= kinds.count("sample") <= 5 + seconds / 0.1


def test_a_look_at_large_processes_does_not_hide_the_moments_when_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_: object, **__: object) -> int:
        time.sleep(0.1)
        return 1

    monkeypatch.setattr(telemetry, "proportional_bytes", slow)  # the next look comes in 20 s
    monkeypatch.setattr(telemetry, "_GATHERED_S", 0.0)
    path, pool = tmp_path / "0.jsonl", Pool()
    there = {1: "it"}
    monkeypatch.setattr(pool, "children", there.copy)
    gone = threading.Event()
    gone.set()

    def idle_moments() -> int:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return sum(line["kind"] == "sample" and not line["running"] for line in lines)

    with sampler(path, pool) as made:
        eventually(lambda: "sample" in kinds_in(path), 10)
        there.clear()
        for moments in (1, 2):
            time.sleep(0.15)
            made.ended(made.began({}, None, None), gone)
            eventually(lambda: idle_moments() == moments, 5)  # noqa: B023


def kinds_in(path: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_a_disk_that_takes_no_samples_ends_neither_the_start_nor_the_limit_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "proportional_bytes", lambda _, **more: 2)
    (tmp_path / "no folder").write_text("")
    pool = Pool()
    with (
        caplog.at_level(logging.WARNING),
        sampler(tmp_path / "no folder" / "0.jsonl", pool, host_limit_bytes=1),
    ):
        assert pool.killed.wait(5)
    assert caplog.text.count("telemetry is lost") == 1


def test_a_disk_that_stalls_does_not_hold_up_the_limit_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(telemetry.files, "append_line", lambda *_, **__: go_on.wait(20))
    monkeypatch.setattr(telemetry, "proportional_bytes", lambda _, **more: 2)
    pool = Pool()
    try:
        with sampler(tmp_path / "0.jsonl", pool, host_limit_bytes=1):
            assert pool.killed.wait(5)
            go_on.set()
    finally:
        go_on.set()


def test_samples_go_on_when_the_disk_takes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "INTERVAL_S", 0.02)
    folder = tmp_path / "folder"
    folder.write_text("a file in its place")
    with sampler(folder / "0.jsonl", Pool()):
        time.sleep(0.2)
        folder.unlink()
        folder.mkdir()
        deadline_s = time.monotonic() + 10
        while not (folder / "0.jsonl").exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
    assert '"kind":"sample"' in (folder / "0.jsonl").read_text()
