"""What the doctor looks at on one node: packages, data, app, cores, memory, Slurm's commands."""

import hashlib
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc import environment
from fedhpc.cluster import slurm
from fedhpc.config import Config
from fedhpc.doctor.report import MISSING, PACKAGES, Check, Status
from fedhpc.doctor.tries import Try
from fedhpc.errors import FedHPCError

_IMPORT_TIMEOUT_S = 300.0
_SLOW_IMPORT_S = 30.0
_ASK_SLURM_S = 10.0


def versions() -> dict[str, str]:
    """Return the version of each package that matters, without importing any."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = MISSING
    found["fedhpc"] = fedhpc.__version__
    return found | {"sources": _digest_of_sources()}


def _digest_of_sources() -> str:
    """Return what tells two copies of fedhpc with the same version apart."""
    folder = Path(fedhpc.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def check_imports(where: str) -> Check:
    """Import in a child process what a run imports, and say how long it takes."""
    answer = Try("imports").wait(_IMPORT_TIMEOUT_S)
    if problem := answer.get("problem"):
        remedy = (
            "install fedhpc's requirements into the Python of the jobs: cluster.python, after"
            " cluster.setup, in cluster.container"
        )
        return Check("imports", where, "fail", problem, remedy)
    found = f"torch, flwr, grpc and submitit in {answer['seconds']:.1f} s"
    if answer["seconds"] > _SLOW_IMPORT_S:
        remedy = "keep the environment on a faster disk, or in a container image"
        return Check("imports", where, "warn", found, remedy)
    return Check("imports", where, "pass", found)


def check_data(config: Config, where: str, root_on_login: str) -> Iterator[Check]:
    """Check that the built-in app's data can be read here.

    Parameters
    ----------
    config : Config
        Of the experiment.
    where : str
        This party.
    root_on_login : str
        "there" or "missing": what the login node sees at data.root.
    """
    from fedhpc.learning import data

    spec = config.data
    root = Path(spec.root)
    make = f"python -m fedhpc.data {spec.name} --root {root}"
    if spec.source:
        make += f" --source {spec.source}"
    if not os.access(root, os.R_OK | os.X_OK) or not root.is_dir():
        remedy = "name a folder that all nodes see with --set data.root=DIR"
        if root_on_login == "missing":
            remedy = f"`{make}` makes it, on a disk that all nodes see"
        found = f"data.root: expected a readable folder, found none at {root}"
        yield Check(
            "data", where, "fail", f"{found}; on the login node it is {root_on_login}", remedy
        )
    else:
        yield _check_packed(data, spec.name, root, where, make)
    if spec.stage_to:
        yield _check_stage(spec.stage_to, where)


def _check_packed(data: Any, name: str, root: Path, where: str, make: str) -> Check:
    packed = sorted((root / "packed").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    if not packed:
        found = f"{root} is there, {name} is not packed in it yet: submit will do it"
        remedy = f"now, where there is network: `{make}`"
        return Check("data", where, "warn", found, remedy)
    try:
        start_s = time.perf_counter()
        split = data.open_dataset(packed[-1]).train
        split.images[len(split.images) // 2].sum()
        milliseconds = 1000 * (time.perf_counter() - start_s)
    except FedHPCError as error:
        return Check("data", where, "fail", error.message, error.hint or "")
    found = f"{packed[-1]}: {len(split.labels)} examples, opened in {milliseconds:.0f} ms"
    return Check("data", where, "pass", found)


def _check_stage(stage_to: str, where: str) -> Check:
    folder = Path(os.path.expandvars(stage_to)).expanduser()
    if "$" in str(folder):
        found = f"data.stage_to: a variable of '{stage_to}' is not set on this node"
        remedy = "name a folder of the node, or set the variable with cluster.env"
        return Check("data.stage_to", where, "fail", found, remedy)
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        found = f"data.stage_to: {parent} cannot be written"
        return Check("data.stage_to", where, "fail", found, "name another folder of the node")
    status = os.statvfs(parent)
    free_gb = status.f_bavail * status.f_frsize / 1e9
    return Check("data.stage_to", where, "pass", f"{folder} can be written, {free_gb:.1f} GB free")


def check_app(config: Config, where: str, directory: str) -> Iterator[Check]:
    """Check that an app of the user's is to be seen here.

    Parameters
    ----------
    config : Config
        Of the experiment.
    where : str
        This party.
    directory : str
        Where submit is called: the app's code runs there.
    """
    app = config.app
    if app.dir is not None:
        file = Path(app.dir) / "pyproject.toml"
        if file.is_file():
            yield Check("app", where, "pass", f"{app.dir} is there")
        else:
            remedy = "keep the app on a disk that all nodes see, and name it with app.dir"
            yield Check("app", where, "fail", f"app.dir: expected {file}, found none", remedy)
    else:
        for reference in filter(None, (app.server, app.client)):
            module = reference.partition(":")[0].partition(".")[0]
            if util.find_spec(module) is None:
                found = f"app: the module {module} of '{reference}' is not installed here"
                yield Check("app", where, "fail", found, "install it, or name its folder: app.dir")
            else:
                yield Check("app", where, "pass", f"the module {module} is there")
    here = os.getcwd()  # noqa: PTH109  (of this process, links kept)
    if not Path(directory).is_dir() or not os.path.samefile(here, directory):  # noqa: PTH121
        found = f"the working folder is {here}, not {directory}: relative paths lead elsewhere"
        remedy = "call submit in a folder that all nodes see"
        yield Check("app", where, "warn", found, remedy)


def check_cores(config: Config, wanted: int | None, where: str, *, on_slurm: bool) -> Check:
    """Compare the cores that this process may use with those asked for.

    Parameters
    ----------
    config : Config
        Of the experiment.
    wanted : int or None
        cluster.cpus_per_task of this job.
    where : str
        This party.
    on_slurm : bool
        Whether somebody allotted them; the local executor does not.
    """
    found = environment.current().cpus
    text = f"{found} of {wanted} asked for" if wanted else f"{found}, none asked for"
    if wanted and found < wanted:
        remedy = (
            "does the node have that many, and is the job's step bound to fewer? `scontrol show job"
            f" --details` and `taskset -p $$` in a job tell; ask for {found}, or ask the site"
            if on_slurm
            else "the local executor allots nothing; this machine has no more"
        )
        return Check("cores", where, "fail" if on_slurm else "warn", text, remedy)
    threads = config.isolation.threads_per_fit
    if threads > found:
        remedy = "ask for more with cluster.cpus_per_task, or lower isolation.threads_per_fit"
        text += f", but isolation.threads_per_fit is {threads}"
        return Check("cores", where, "warn", text, remedy)
    if not wanted and on_slurm:
        remedy = "cluster.clients.cpus_per_task asks for more"
        return Check("cores", where, "info", text, remedy if found == 1 else "")
    return Check("cores", where, "pass", text)


def check_memory(wanted_gb: float | None, where: str, *, on_slurm: bool) -> Check:
    """Compare the memory that this process may use with what was asked for."""
    limit_gb, why = memory_limit_gb()
    text = f"{limit_gb:.1f} GB ({why})"
    if wanted_gb is None:
        return Check("memory", where, "info", f"{text}, none asked for")
    text += f" of {wanted_gb:g} GB asked for"
    if limit_gb < 0.95 * wanted_gb:
        status: Status = "fail" if on_slurm else "warn"
        remedy = "lower cluster.mem_gb, or ask for larger nodes with cluster.constraint"
        return Check("memory", where, status, text, remedy)
    return Check("memory", where, "pass", text)


def memory_limit_gb(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> tuple[float, str]:
    """Return the memory that this process may use, in GB, and what limits it.

    Parameters
    ----------
    proc, cgroups : Path
        Where the kernel tells.
    """
    total_kb = int((proc / "meminfo").read_text().split("MemTotal:")[1].split()[0])
    limits = [(total_kb * 1024.0, "the machine's")]
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        while folder.is_relative_to(base):
            if (folder / name).is_file() and (
                text := (folder / name).read_text().strip()
            ).isdigit():
                limits.append((float(text), "the job's cgroup"))
            folder = folder.parent
    limit, why = min(limits)
    return limit / 1e9, why


def check_slurm_commands(job_id: str, where: str) -> Check:
    """Check that squeue and scontrol answer on this node.

    Parameters
    ----------
    job_id : str
        Of the job that this is.
    where : str
        This party.
    """
    name = "Slurm's commands"
    try:
        known = slurm.jobs([job_id], _ASK_SLURM_S)
        slurm.control("show", "job", job_id)
    except FedHPCError as error:
        remedy = (
            f"{error.hint or 'see the message'}. Without squeue and scontrol on the nodes a lost"
            " server is noticed later, and is not requeued"
        )
        return Check(name, where, "warn", error.message, remedy)
    if job_id not in known:
        found = f"squeue on this node does not know job {job_id}"
        return Check(name, where, "warn", found, "does cluster.setup load another Slurm?")
    return Check(name, where, "pass", f"squeue and scontrol answer, and know job {job_id}")
