"""The names of everything in a run folder. No other module spells them."""

import hashlib
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedhpc.errors import ConfigError, PlatformError


@dataclass(frozen=True)
class RunPaths:
    """One run's folder and what lies in it.

    Parameters
    ----------
    root : Path
        The run folder, ``<runs_dir>/<name>-<YYYYmmdd-HHMMSS>-<4 hex>``.
    """

    root: Path

    @property
    def run_id(self) -> str:
        """The folder's name, unique for the user."""
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved config, every default written out."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, git state, host, command."""
        return self.root / "manifest.json"

    @property
    def code(self) -> Path:
        """The copy of the app's code, with `snapshot: true`."""
        return self.root / "code"

    @property
    def code_app(self) -> Path:
        """The copy of the app's folder."""
        return self.code / "app"

    @property
    def code_cwd(self) -> Path:
        """The copy of the folder that submit was called in."""
        return self.code / "cwd"

    @property
    def code_packages(self) -> Path:
        """Copies of single packages: fedhpc itself, and those that the config names."""
        return self.code / "packages"

    @property
    def code_list(self) -> Path:
        """The files of the copy with their checksums, as sha256sum prints them."""
        return self.code / "SHA256SUMS"

    @property
    def data(self) -> Path:
        """Where the packed data set is."""
        return self.root / "data.json"

    @property
    def partitions(self) -> Path:
        """Which examples each client has."""
        return self.root / "partitions.npz"

    @property
    def rendezvous(self) -> Path:
        """Where the server is."""
        return self.root / "rendezvous.json"

    @property
    def secrets(self) -> Path:
        """Certificates and keys of this run, 0700, deleted at its end."""
        return self.root / "secrets"

    @property
    def jobs(self) -> Path:
        """Submitit's folder: scripts, logs and what was submitted."""
        return self.root / "jobs"

    @property
    def submission(self) -> Path:
        """Which jobs belong to this run."""
        return self.jobs / "submission.json"

    @property
    def server_job(self) -> Path:
        """What Slurm last said of the server job, shared by array tasks that wait for it."""
        return self.jobs / "server-job.json"

    @property
    def metrics(self) -> Path:
        """One line a round."""
        return self.root / "metrics.jsonl"

    @property
    def fits(self) -> Path:
        """One line a fit."""
        return self.root / "fits.jsonl"

    @property
    def memory(self) -> Path:
        """Samples of memory over time, a file an array task."""
        return self.root / "memory"

    @property
    def peaks(self) -> Path:
        """How much GPU memory fits needed, a file for each kind of fit."""
        return self.root / "peaks"

    @property
    def errors(self) -> Path:
        """One file a failure."""
        return self.root / "errors"

    @property
    def accepted(self) -> Path:
        """Whose replies counted, where not those of a whole cohort did."""
        return self.root / "accepted"

    @property
    def status(self) -> Path:
        """How the run stands."""
        return self.root / "status.json"

    @property
    def blobs(self) -> Path:
        """Arrays too large for the link, by content."""
        return self.root / "blobs"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint; the last by name is the newest, `best` links to the best."""
        return self.root / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """A link to the folder of the best one by ``checkpoint.best_metric``."""
        return self.checkpoints / "best"

    @property
    def states(self) -> Path:
        """Arrays of client states that are not kept in memory."""
        return self.root / "states"

    @property
    def model(self) -> Path:
        """The final global model."""
        return self.root / "model.safetensors"

    @property
    def report(self) -> Path:
        """The page of the run, with its figures in it."""
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        """The figures of the page, one file each."""
        return self.root / "figures"

    def memory_of(self, array_task: int) -> Path:
        """Return the file of what an array task saw of its memory."""
        return self.memory / f"{array_task}.jsonl"

    def error(self, message_id: str, tries: int) -> Path:
        """Return the file of a fit's failure, at its ``tries``-th try."""
        return self.errors / (f"{message_id}.txt" if tries == 1 else f"{message_id}.{tries}.txt")

    def accepted_of(self, message_id: str) -> Path:
        """Return the file of whose replies counted, of the cohort whose first message this is."""
        return self.accepted / f"{message_id}.json"

    def process(self, role: str) -> Path:
        """Pid, start time and host of the process that plays ``role``."""
        return self.jobs / f"{role}.json"

    def attempt(self, number: int) -> Path:
        """Return the file that claims attempt ``number`` (1 or more)."""
        return self.root / f"attempt-{number:04d}"

    def blob(self, digest: str) -> Path:
        """Return the file of the arrays with this digest."""
        return self.blobs / f"{digest}.safetensors"

    def result_blob(self, message_id: str, digest: str) -> Path:
        """Return the file of arrays that belong to a result: nobody else refers to it."""
        return self.blobs / f"{message_id}.{digest}.safetensors"

    def state_blob(self, client_id: int, record: str, digest: str) -> Path:
        """Return the file of one ArrayRecord of a client's state, by its content."""
        name = hashlib.sha256(record.encode()).hexdigest()[:16]  # a record may have any name
        return self.states / f"{client_id:06d}-{name}-{digest}.safetensors"

    @staticmethod
    def digest_of_state(name: str) -> str:
        """Return the digest in the name of such a file."""
        return name.rpartition("-")[2].partition(".")[0]

    def checkpoint(self, server_round: int) -> Path:
        """Return the folder of the checkpoint after a round."""
        return self.checkpoints / f"round-{server_round:05d}"


def create_run_folder(runs_dir: Path, name: str) -> RunPaths:
    """Create a new run folder with its subfolders.

    Raises
    ------
    PlatformError
        If the folder cannot be written.
    """
    if runs_dir.exists() and not runs_dir.is_dir():
        raise PlatformError(
            f"cluster.runs_dir: expected a folder, found the file {runs_dir}",
            "name another folder with --set cluster.runs_dir=DIR",
        )
    for _ in range(100):
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        paths = RunPaths((runs_dir / f"{name}-{stamp}-{os.urandom(2).hex()}").resolve())
        try:
            paths.root.mkdir(parents=True)
            paths.jobs.mkdir()
            paths.errors.mkdir()
            paths.blobs.mkdir()
            paths.states.mkdir()
            paths.checkpoints.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise PlatformError(
                f"cluster.runs_dir: could not create a run folder in {runs_dir}: {error.strerror}",
                "name a folder that you can write and every node sees, --set cluster.runs_dir=DIR",
            ) from error
        return paths
    raise PlatformError(f"cluster.runs_dir: no free run folder name in {runs_dir}")


def open_run_folder(path: Path) -> RunPaths:
    """Return the paths of an existing run folder.

    Raises
    ------
    ConfigError
        If it is not one.
    """
    paths = RunPaths(path.resolve())
    if not paths.config.is_file():
        raise ConfigError(
            "command line",
            [f"RUN_DIR: expected a run folder with a config.yaml, found {path}"],
            "run folders lie in cluster.runs_dir, by default ./runs",
        )
    return paths


def is_run_folder(path: Path) -> bool:
    """Return whether ``path`` holds what every run folder has from its creation on."""
    paths = RunPaths(path)
    folders = (path, paths.jobs, paths.errors)
    try:
        return paths.config.is_file() and all(
            folder.is_dir() and not folder.is_symlink() for folder in folders
        )
    except OSError:  # not ours to look into
        return False


def run_folders(runs_dir: Path) -> list[RunPaths]:
    """Return the run folders in a folder, the newest first.

    Links to run folders are left out: they lie in their own place too.

    Raises
    ------
    ConfigError
        If there is no such folder.
    """
    if not runs_dir.is_dir():
        raise ConfigError(
            "command line",
            [f"--runs-dir: expected a folder with run folders, found no folder {runs_dir}"],
            "name the cluster.runs_dir of your runs with --runs-dir DIR",
        )
    found = [RunPaths(path.resolve()) for path in runs_dir.iterdir() if is_run_folder(path)]
    return sorted(found, key=created_s, reverse=True)


def created_s(paths: RunPaths) -> float:
    """Return when a run was submitted, in seconds since 1970; 0 if its folder is gone."""
    try:
        return paths.config.stat().st_mtime  # written once
    except OSError:
        return 0.0


def latest_attempt(paths: RunPaths) -> int:
    """Return the highest attempt ever claimed in the run folder; 0 if none.

    Raises
    ------
    OSError
        If the disk does not tell.
    """
    try:
        names = [entry.name for entry in paths.root.iterdir()]
    except FileNotFoundError:
        return 0
    found = (re.fullmatch(r"attempt-(\d+)", name) for name in names)
    return max((int(match[1]) for match in found if match), default=0)


def checkpointed_rounds(paths: RunPaths) -> list[int]:
    """Return the rounds that there are checkpoints of, whole or not, in order."""
    try:
        names = [entry.name for entry in paths.checkpoints.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"round-(\d+)", name)))
