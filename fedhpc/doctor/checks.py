"""What the doctor looks at on one node.

A check returns in words what it found. It raises a `FedHPCError` if a run would fail for it, and
`Doubt` if a run may work, but not as it was asked for.
"""

import hashlib
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import fedhpc
from fedhpc import allotment, environment
from fedhpc.cluster import slurm
from fedhpc.config import Config, Isolation
from fedhpc.errors import FedHPCError, PlatformError, RunError
from fedhpc.isolation import ChildPool, Slot, channel
from fedhpc.isolation import locks as slot_locks

_CHILD_TIMEOUT_S = 300.0  # torch on a cold disk
_ASK_SLURM_S = 10.0
_ITS_NAME = f"{PlatformError.__module__}.{PlatformError.__name__}: "
_SIZE = 256  # of the matrices that a child multiplies
# A run needs these to be the same everywhere: they carry pickles and messages, or decide numbers.
_PACKAGES = ("flwr", "flwr-datasets", "numpy", "submitit", "torch", "torchvision")


class Doubt(FedHPCError):
    """A run may work, but not as it was asked for."""


@dataclass(frozen=True)
class Check:
    """What a check (``name``) found at one place, and what to do about it."""

    name: str
    where: str  # "server job (<host>)", "array task (<host>)" or "everywhere"
    status: Literal["pass", "warn", "fail"]
    found: str
    remedy: str = ""


def check(name: str, where: str, look: Callable[..., str], *arguments: Any) -> Check:
    """Call a check with its arguments and return what came of it, also if it breaks."""
    try:
        return Check(name, where, "pass", look(*arguments))
    except FedHPCError as error:
        status: Literal["warn", "fail"] = "warn" if isinstance(error, Doubt) else "fail"
        return Check(name, where, status, error.message, error.hint or "")
    except Exception as error:
        traceback.print_exc()
        found = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(name, where, "fail", found, "see the job's log: --keep")


def versions() -> dict[str, str]:
    """Return what is installed here, without importing it."""
    sources = hashlib.sha256()  # tells two copies of fedhpc with the same version apart
    for path in sorted(Path(fedhpc.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"python": python, "fedhpc": f"{fedhpc.__version__} ({sources.hexdigest()[:8]})"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions_agree(by_place: Mapping[str, Mapping[str, str]]) -> str:
    """Compare what `versions` returned, by place."""
    first = next(iter(by_place.values()))
    different = []
    for name in first:
        found = {place: versions[name] for place, versions in by_place.items()}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{version} on {place}" for place, version in found.items())
            different.append(f"{name}: {shown}")
    if different:
        raise PlatformError(
            "\n".join(different),
            "install the same versions; the jobs' Python is cluster.python, after cluster.setup, in"
            " cluster.container",
        )
    return ", ".join(f"{name} {version}" for name, version in first.items())


def cores(wanted: int | None, threads_per_fit: int) -> str:
    """Compare the cores that this process may use with ``cpus_per_task`` of its job."""
    cpus = environment.current().cpus
    found = f"{cpus} of {wanted} asked for" if wanted else f"{cpus}, none asked for"
    if wanted and cpus < wanted:
        raise _too_few(found, "is a step bound to fewer than its job has? ask the site")
    if threads_per_fit > cpus:
        raise Doubt(
            f"{found}, but isolation.threads_per_fit is {threads_per_fit}",
            "ask for more with cluster.clients.cpus_per_task, or use fewer threads",
        )
    return found


def gpus(wanted: int, isolation: Isolation, slots: Sequence[Slot]) -> str:
    """Compare the GPUs that fits would use with those that the job asks for."""
    visible = [gpu for slot in slots for gpu in slot.gpus]
    names = ", ".join(f"{gpu.id} ({gpu.name})" if gpu.name else gpu.id for gpu in visible)
    found = f"{wanted} asked for, sees {names or 'none'}"
    if isolation.device == "cpu" and wanted:
        raise Doubt(f"{wanted} asked for, but isolation.device is cpu", "set it to auto")
    if len(visible) < wanted:
        raise _too_few(found, "does the site want cluster.clients.gres, or gpus_per_task?")
    if len(visible) > wanted and environment.current().on_slurm:
        raise Doubt(
            f"{found}: other jobs may use them too",
            "ask for them with cluster.clients.gpus_per_task, or set isolation.device: cpu",
        )
    if not all(gpu.total_bytes for gpu in visible):
        raise Doubt(
            f"{found}; their memory cannot be read, so slots alone decide which fits may start",
            "is nvidia-ml-py installed for the jobs' Python?",
        )
    return found


def _too_few(found: str, hint: str) -> FedHPCError:
    if environment.current().on_slurm:
        return PlatformError(found, hint)
    return Doubt(found, "the local executor allots nothing: this machine has no more")


def child(pool: ChildPool, slot: Slot) -> str:
    """Compute something in a child process, as a fit does."""
    start_s = time.monotonic()
    try:
        reply = pool.run(f"{__name__}:compute", [], slot=slot, timeout_s=_CHILD_TIMEOUT_S)
    except RunError as error:
        # Of a `PlatformError` in the child there is the text, with its name and its hint.
        found, _, hint = error.message.removeprefix(_ITS_NAME).partition("\n  Hint: ")
        hint = hint or "is this torch whole, and built for this GPU and driver? see cluster.python"
        raise PlatformError(found, hint) from error
    found = bytes(channel.view(reply.buffers[0])).decode()
    reply.close()
    return f"{found}, ready in {time.monotonic() - start_s:.1f} s"


def compute() -> list[list[bytes]]:
    """Be the child: multiply two matrices on the device of its slot; return words about it."""
    import flwr.clientapp  # noqa: F401
    import torch

    from fedhpc.isolation import devices

    device = devices.device_of_this_child()
    ones = torch.ones(_SIZE, _SIZE, device=device)
    total = float((ones @ torch.eye(_SIZE, device=device)).sum())
    if total != _SIZE * _SIZE:
        raise PlatformError(f"a sum came out as {total}, expected {_SIZE * _SIZE}")
    found = f"torch {torch.__version__} computes on the CPU"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found = (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) computes on {gpu.name},"
            f" {gpu.total_memory / 1e9:.0f} GB; driver: {devices.driver_version()}"
        )
    return [[found.encode()]]


def data(config: Config) -> str:
    """Open the built-in app's data."""
    from fedhpc.learning import data as packing

    name, root = config.data.name, Path(config.data.root)
    source = f" --source {config.data.source}" if config.data.source else ""
    pack = f"`python -m fedhpc.data {name} --root {root}{source}` packs it"
    if not os.access(root, os.R_OK | os.X_OK):
        raise PlatformError(
            f"data.root: expected a readable folder, found none at {root}",
            f"name a folder that all nodes see with --set data.root=DIR; {pack}",
        )
    packed = max((root / "packed").glob(f"{name}-*"), key=os.path.getmtime, default=None)
    if packed is None:
        raise Doubt(f"{root} is there, {name} is not packed in it", f"submit will do it; or {pack}")
    return f"{packed}, {len(packing.open_dataset(packed).train.labels)} examples"


def app(config: Config) -> str:
    """Look for an app of the user's."""
    if config.app.dir is not None:
        file = Path(config.app.dir) / "pyproject.toml"
        if not file.is_file():
            raise PlatformError(
                f"app.dir: expected {file}, found none", "keep the app on a disk that all nodes see"
            )
        return f"{file} is there"
    references = f"{config.app.server} {config.app.client}".split()
    for reference in references:
        if util.find_spec(reference.partition(":")[0].partition(".")[0]) is None:
            raise PlatformError(
                f"app: expected '{reference}' in {Path.cwd()} or installed, found none",
                "install it for the jobs' Python, or name its folder with app.dir",
            )
    return f"{' and '.join(references)} can be found"


def boot_id() -> str:
    """Return what two processes have in common exactly if they are on the same machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def lock_folder(isolation: Isolation) -> str:
    """Return what tells whether two processes of a machine have the same folder of slot locks."""
    try:
        folder = allotment.lock_folder(isolation)
        slot_locks.prepare_folder(folder)
        return slot_locks.identity(folder)
    except (OSError, PlatformError):  # the check of the locks says why
        return ""


def locks(isolation: Isolation, other_job: str | None) -> str:
    """Try the folder of the slot locks.

    ``other_job`` is what another job on this node says is its `lock_folder`, if there is one.
    """
    folder = allotment.lock_folder(isolation)
    slot_locks.prepare_folder(folder)
    kind, _ = slot_locks.mount_of(folder)
    found = f"{folder} ({kind}): locks work"
    hint = "jobs that share a GPU need one folder: name it with isolation.lock_dir"
    if other_job is not None and other_job != slot_locks.identity(folder):
        raise Doubt(f"{found}; but it is not the one of the other job here", hint)
    job_id = environment.current().job_id
    if other_job is None and (own := slot_locks.private_to_job(folder, job_id)):
        raise Doubt(f"{found}; but it seems to be for this job alone ({own} of its disk)", hint)
    return f"{found}; {'shared with the other job' if other_job else 'for all jobs of this node'}"


def slurm_commands(job_id: str) -> str:
    """Ask Slurm about this job from its node."""
    try:
        slurm.jobs([job_id], _ASK_SLURM_S)
        slurm.control("show", "job", job_id)
    except FedHPCError as error:
        hint = "without them on the nodes a lost server is noticed later, and is not requeued"
        raise Doubt(error.message, hint) from error
    return "squeue and scontrol answer"
