"""Which jobs belong to a run: jobs/submission.json."""

import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields

from fedhpc import files
from fedhpc.paths import RunPaths


@dataclass
class Submission:
    """The jobs of a run.

    Attributes
    ----------
    executor : str
        slurm, local or debug.
    server : str
        Job id; with ``local`` the pid of submitit's controller process. "" if there is none.
    clients : list of str
        Job ids of the array tasks.
    host : str
        Where submit ran; with ``local`` the jobs are processes of it.
    """

    executor: str
    server: str = ""
    clients: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)

    def roles(self) -> Iterator[tuple[str, str]]:
        """Yield role and job id of each job."""
        if self.server:
            yield "server", self.server
        for index, job_id in enumerate(self.clients):
            yield f"client-{index}", job_id

    def whole_jobs(self) -> list[str]:
        """Return the ids to cancel, the client array first and as a whole."""
        ids = [*(job_id.split("_")[0] for job_id in self.clients), self.server]
        return [job_id for job_id in dict.fromkeys(ids) if job_id]


def write(paths: RunPaths, submission: Submission) -> None:
    """Write jobs/submission.json."""
    files.write_json(paths.submission, asdict(submission))


def read(paths: RunPaths) -> Submission | None:
    """Return the jobs of a run; None if it was not submitted.

    Where somebody called sbatch by hand they are those that have started and said so.
    """
    value = files.read_json(paths.submission)
    if isinstance(value, dict) and value.keys() <= {f.name for f in fields(Submission)}:
        return Submission(**value)
    records = {}
    for path in paths.jobs.glob("*.json"):
        record = files.read_json(path)
        if isinstance(record, dict) and not str(record.get("job_id", "local-")).startswith(
            "local-"
        ):
            records[path.stem] = str(record["job_id"])
    if not records:
        return None
    clients = sorted(
        (role for role in records if role.startswith("client-")),
        key=lambda role: int(role.removeprefix("client-")),
    )
    return Submission("slurm", records.get("server", ""), [records[role] for role in clients])
