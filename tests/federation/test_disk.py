"""A whole federation on a disk that stalls or is full, and with two servers at once."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPOSITORY, Run, Submitter, eventually

from fedhpc import rendezvous
from fedhpc.files import read_json, read_lines, wait_until
from fedhpc.paths import RunPaths

pytestmark = pytest.mark.timeout(400)

# --- a disk that stalls --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stalling_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes calls slow in the processes that it is preloaded into."""
    if shutil.which("gcc") is None or platform.machine() != "x86_64":
        pytest.skip("gcc is needed, on x86_64")
    library = tmp_path_factory.mktemp("stall") / "stall.so"
    source = Path(__file__).with_name("stall.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def test_a_disk_that_stalls_for_longer_than_the_liveness_timeout_changes_nothing(
    submitter: Submitter, reference: Run, stalling_library: Path, tmp_path: Path
) -> None:
    count = tmp_path / "stalls"
    env = {
        "LD_PRELOAD": str(stalling_library),
        "STALL_FOLDER": str(submitter.runs_dir),
        "STALL_MS": "20",
        "STALL_SLOW": "rendezvous.json:status.json:memory/:metrics.jsonl:blobs/",
        "STALL_COUNT": str(count),
    }
    sets = [
        f"cluster.env={json.dumps(env)}",
        "cluster.liveness_timeout_s=3",  # each long stall lasts 5 s
        "isolation.slots=2",
    ]
    run = submitter.run(sets, timeout_s=300)
    assert run.checksum == reference.checksum
    assert count.stat().st_size >= 6
    assert "silent" not in run.logs()
    assert "is gone: the array task left" in run.logs()
    assert all(fit["ok"] for fit in run.fits)
    assert [line["round"] for line in run.metrics] == [0, 1, 2]


# --- a disk that is full -------------------------------------------------------------------------


# Not over before the disk is full.
LONGER = ["federation.num_rounds=25"]


class SmallDisk:
    """A run whose folder lies on a small disk of its own that no other process sees."""

    def __init__(self, submitter: Submitter, *, patience_s: float, folder: Path) -> None:
        submitter.runs_dir.mkdir()
        # The processes of the run wait for a shorter time.
        (folder / "sitecustomize.py").write_text(
            f"import fedhpc.files\nfedhpc.files.PATIENCE_S = {patience_s}\n"
        )
        python_path = os.pathsep.join([str(folder), str(REPOSITORY)])
        mount = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
        self._submitter = submitter
        self._env = {**os.environ, "PYTHONPATH": python_path}
        command = submitter.command([*LONGER, "isolation.slots=2"])
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount, submitter.runs_dir, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env=self._env,
            start_new_session=True,
        )
        # /proc/PID/root is how the file system looks to that process, to walk through.
        self._root = Path(f"/proc/{self.process.pid}/root")
        outside = self._root / submitter.runs_dir.relative_to("/")
        found: list[Path] = []

        def exists() -> bool:
            found[:] = outside.glob("*/config.yaml")
            return bool(found)

        eventually(exists)
        self.paths = RunPaths(found[0].parent)

    def fill(self) -> None:
        """Take all the space there is."""
        with (self.paths.root.parent / "fill").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.paths.root.parent / "fill").unlink()

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a module where the small disk is seen."""
        run_dir = str(self._submitter.runs_dir / self.paths.run_id)
        inside = ["nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", sys.executable]
        return subprocess.run(
            [*inside, "-m", words[0], run_dir, *words[1:]],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=self._env,
            timeout=60,
            check=False,
        )

    def server(self) -> int:
        """Return the pid of the server."""
        return int((read_json(self.paths.process("server")) or {})["pid"])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def needs_mount() -> None:
    works = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if works.returncode or shutil.which("nsenter") is None:
        pytest.skip("a disk of its own needs root")


@pytest.fixture
def end_all() -> Iterator[list[subprocess.Popen[str]]]:
    """Ends what a test has started, and stopped."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


@pytest.mark.usefixtures("needs_mount")
def test_a_disk_that_is_full_for_a_while_changes_nothing(
    submitter: Submitter, tmp_path: Path, end_all: list[subprocess.Popen[str]]
) -> None:
    (tmp_path / "reference").mkdir()
    elsewhere = Submitter(tmp_path / "reference", submitter.data_root)
    reference = elsewhere.run(LONGER, executor="debug")
    disk = SmallDisk(submitter, patience_s=60, folder=tmp_path)
    end_all.append(disk.process)
    paths = disk.paths
    assert wait_until(lambda: paths.fits.exists(), 120)
    disk.process.send_signal(signal.SIGSTOP)  # with its end the disk would go
    disk.fill()
    server = disk.server()
    assert wait_until(lambda: "; waiting 60 s" in logs_of(paths), 30), logs_of(paths)
    assert not paths.model.exists()
    assert alive(server)
    disk.free()
    assert wait_until(lambda: not alive(server), 30)
    status = read_json(paths.status) or {}
    lines = list(read_lines(paths.metrics))
    disk.process.send_signal(signal.SIGCONT)
    output, _ = disk.process.communicate(timeout=30)
    assert disk.process.returncode == 0, output
    assert status["state"] == "finished"
    assert status["model_sha256"] == reference.checksum
    assert [line["round"] for line in lines] == list(range(26))


@pytest.mark.usefixtures("needs_mount")
def test_a_disk_that_stays_full_ends_the_run_and_nobody_says_that_it_runs(
    submitter: Submitter, tmp_path: Path, end_all: list[subprocess.Popen[str]]
) -> None:
    disk = SmallDisk(submitter, patience_s=2, folder=tmp_path)
    end_all.append(disk.process)
    paths = disk.paths
    assert wait_until(lambda: paths.fits.exists(), 120)
    disk.process.send_signal(signal.SIGSTOP)  # it keeps the disk there; it is not what is tested
    disk.fill()
    server = disk.server()
    deadline_s = time.monotonic() + 60
    while alive(server) and time.monotonic() < deadline_s:
        disk.fill()  # also what the server frees itself: its keys
        time.sleep(0.01)
    assert not alive(server)
    # Most often nobody could write the end; what must not be is that the run seems to go well.
    assert (read_json(paths.status) or {})["state"] in ("running", "failed")
    assert not [path for path in paths.root.rglob("*.tmp") if path.is_file()]
    assert not paths.model.exists()
    for path in (paths.fits, paths.metrics):
        assert len(list(read_lines(path))) == path.read_text().count("\n")

    shown = disk.python("fedhpc.status", "--json")
    told = json.loads(shown.stdout)
    assert told["state"] == "failed", shown.stdout + shown.stderr
    again = disk.python("fedhpc.server")
    assert again.returncode == 75, again.stderr
    assert "No space left on device" in again.stderr
    assert "Traceback" not in again.stderr

    disk.free()
    disk.python("fedhpc.status")
    assert (read_json(paths.status) or {})["state"] == "failed"
    disk.process.send_signal(signal.SIGCONT)
    output, _ = disk.process.communicate(timeout=60)
    assert disk.process.returncode not in (0, None), output


def logs_of(paths: RunPaths) -> str:
    return "\n".join(path.read_text() for path in sorted(paths.jobs.glob("*.err")))


# --- two servers ---------------------------------------------------------------------------------


def test_a_server_that_wakes_up_beside_its_successor_leaves_and_writes_nothing(
    submitter: Submitter, reference: Run, end_all: list[subprocess.Popen[str]]
) -> None:
    sets = ["isolation.slots=2", "cluster.liveness_timeout_s=2"]
    submitting = submitter.start(sets)
    end_all.append(submitting)
    paths = submitter.newest()
    assert wait_until(paths.fits.exists, 120, max_pause_s=0.002)
    old = int((read_json(paths.process("server")) or {})["pid"])
    os.kill(old, signal.SIGSTOP)
    try:
        assert not paths.model.exists()
        new = subprocess.Popen(
            [sys.executable, "-m", "fedhpc.server", str(paths.root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        end_all.append(new)

        def at_work() -> bool:
            found = rendezvous.read(paths)
            return found is not None and found.attempt == 2 and paths.fits.exists()

        assert wait_until(at_work, 120, max_pause_s=0.01)
    finally:
        os.kill(old, signal.SIGCONT)
    seen: Counter[tuple[int, int]] = Counter()
    deadline_s = time.monotonic() + 60
    while new.poll() is None and time.monotonic() < deadline_s:
        found = rendezvous.read(paths)
        status = read_json(paths.status) or {}
        seen[found.attempt if found else 0, status.get("attempt", 0)] += 1
        time.sleep(0.01)
    said, _ = new.communicate(timeout=10)
    assert new.returncode == 0, said
    assert set(seen) == {(2, 2)}
    assert wait_until(lambda: not alive(old), 10)
    output, _ = submitting.communicate(timeout=30)
    assert submitting.returncode == 0, output
    run = Run(paths, 0, output)
    assert "a server with a higher attempt has come; this one leaves" in run.logs()
    assert run.checksum == reference.checksum
    assert run.status["attempt"] == 2
    assert [line["round"] for line in run.metrics] == [0, 1, 2]
    assert len({(fit["round"], fit["client"], fit["verb"]) for fit in run.fits}) == len(run.fits)
    assert not paths.secrets.exists()
