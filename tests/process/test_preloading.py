"""What the fork server learns to import from what its children import late."""

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import call_for_reply, wait_until

from fedhpc.isolation import ChildPool, PoolOptions

HERE = Path(__file__).parent
SLOW = "import time; time.sleep(0.1); VALUE = 7"
MODULES = {
    "site-packages/slow_package/__init__.py": "",
    "site-packages/slow_package/core.py": SLOW,
    "site-packages/starts_a_thread.py": (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True)"
        f".start(); {SLOW}"
    ),
    "site-packages/ends_the_process.py": (
        "import os; 'COUNTED' in os.environ or os._exit(3)\n"  # in a child it is there
        f"{SLOW}"
    ),
    "site-packages/quick.py": "VALUE = 7",
    "own/of_the_app.py": SLOW,
}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    token = uuid.uuid4().hex
    monkeypatch.setenv(entries.TOKEN, token)
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folders = [str(HERE), str(tmp_path / "site-packages"), str(tmp_path / "own")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    yield from entries.nothing_is_left(token)


def pool(**options: Any) -> ChildPool:
    return ChildPool(
        PoolOptions(**{"preload": ["json"], "standby": False, "learn_preload": True, **options})
    )


def imported_late(children: ChildPool, *names: str) -> list[str]:
    """Import modules in a child; return those that were not there when it began."""
    reply = call_for_reply(children, "import_all", *names)
    reply.close()
    return [name for name in reply.late_imports if name in names]


def test_an_installed_package_is_imported_once_for_all_later_children() -> None:
    names = ("slow_package", "slow_package.core")
    with pool() as children:
        assert imported_late(children, *names) == list(names)
        assert wait_until(lambda: imported_late(children, *names) == [], 20)
        begun_s = time.monotonic()
        assert imported_late(children, *names) == []
        assert time.monotonic() - begun_s < 5


def test_the_code_of_an_app_is_imported_by_each_child() -> None:
    with pool() as children:
        assert imported_late(children, "of_the_app", "slow_package.core") == [
            "of_the_app",
            "slow_package.core",
        ]
        assert wait_until(
            lambda: imported_late(children, "of_the_app", "slow_package.core") == ["of_the_app"], 20
        )


def test_what_starts_a_thread_stays_with_the_children_and_the_others_are_learned() -> None:
    names = ("starts_a_thread", "slow_package.core")
    with pool() as children:
        assert imported_late(children, *names) == list(names)
        assert wait_until(lambda: imported_late(children, *names) == ["starts_a_thread"], 20)
        pid = children.fork_server()
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_an_import_that_ends_its_process_ends_no_fork_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pool() as children:
        assert imported_late(children, "slow_package.core") == ["slow_package.core"]
        pid = children.fork_server()
        reply = call_for_reply(children, "import_with", "COUNTED", "ends_the_process")
        assert "ends_the_process" in reply.late_imports
        reply.close()
        for _ in range(3):
            reply = call_for_reply(children, "import_with", "COUNTED", "ends_the_process")
            assert "ends_the_process" in reply.late_imports
            reply.close()
        assert children.fork_server() == pid


def test_what_takes_no_time_is_not_worth_a_lesson() -> None:
    with pool() as children:
        for _ in range(5):
            assert imported_late(children, "quick") == ["quick"]


@pytest.mark.parametrize("options", [{"learn_preload": False}, {"start_method": "spawn"}], ids=str)
def test_nothing_is_learned_where_it_shall_not_or_would_not_help(options: dict[str, Any]) -> None:
    with pool(**options) as children:
        for _ in range(3):
            assert "slow_package.core" in imported_late(children, "slow_package.core")


def test_a_new_fork_server_knows_what_the_old_one_had_learned() -> None:
    with pool() as children:
        imported_late(children, "slow_package.core")
        assert wait_until(lambda: imported_late(children, "slow_package.core") == [], 20)
        pid = children.fork_server()
        assert pid is not None
        os.kill(pid, 9)
        assert wait_until(lambda: children.fork_server() not in (pid,), 20)
        assert wait_until(lambda: imported_late(children, "slow_package.core") == [], 20)
