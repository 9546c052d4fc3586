"""Whether the GPUs that were asked for are there, and whether this torch can use them."""

from collections.abc import Sequence

from fedhpc.config import Config
from fedhpc.doctor.report import Check, Status
from fedhpc.doctor.tries import Try
from fedhpc.errors import PlatformError
from fedhpc.isolation import find_slots

_TIMEOUT_S = 180.0  # torch on a cold disk, and all GPUs at once


def check(config: Config, wanted: int, cpus: int, where: str, *, on_slurm: bool) -> list[Check]:
    """Find the GPUs that an array task's fits would get, and compute on each.

    Parameters
    ----------
    config : Config
        Of the experiment.
    wanted : int
        GPUs that the array task asks for.
    cpus : int
        Cores that it has.
    where : str
        This party.
    on_slurm : bool
        Whether somebody allotted GPUs; the local executor does not.
    """
    isolation = config.isolation
    if isolation.device == "cpu":
        found = "not checked, as isolation.device is cpu"
        if not wanted:
            return [Check("GPUs", where, "info", found)]
        remedy = "cluster.gpus_per_task: 0 (and no gres), or isolation.device: auto"
        return [Check("GPUs", where, "warn", f"{found}, but {wanted} asked for", remedy)]
    try:
        slots = find_slots(
            isolation.device, isolation.slots, cpus=cpus, threads_per_fit=isolation.threads_per_fit
        )
    except PlatformError as error:
        return [Check("GPUs", where, "fail", error.message, error.hint or "")]
    # The slots of a GPU, and its index in the list of all, stand in its children's environment.
    visible = [gpu for gpu in dict.fromkeys(s.env["CUDA_VISIBLE_DEVICES"] for s in slots) if gpu]
    return [_count(wanted, visible, where, on_slurm=on_slurm), *_use(visible, where)]


def _count(wanted: int, visible: Sequence[str], where: str, *, on_slurm: bool) -> Check:
    seen = f"sees {len(visible)} (CUDA_VISIBLE_DEVICES {','.join(visible)})" if visible else "none"
    if not wanted and not visible:
        return Check("GPUs", where, "info", "none asked for, none visible: fits run on the CPU")
    if not visible:
        return Check(
            "GPUs",
            where,
            "warn",
            f"asked for {wanted}, sees none: the CPU will be used",
            "ask for them with cluster.gpus_per_task or cluster.gres, as the site wants it;"
            " isolation.device: cuda makes this an error"
            if on_slurm
            else "this machine has none; isolation.device: cpu says so",
        )
    if len(visible) < wanted:
        status: Status = "fail" if on_slurm else "warn"
        remedy = "does the site want cluster.gres in place of gpus_per_task, or the reverse?"
        if not on_slurm:
            remedy = "the local executor allots nothing: set CUDA_VISIBLE_DEVICES yourself"
        return Check("GPUs", where, status, f"asked for {wanted}, {seen}", remedy)
    if on_slurm and len(visible) > wanted:
        return Check(
            "GPUs",
            where,
            "warn",
            f"asked for {wanted}, {seen}: Slurm does not keep them apart, or they are not asked"
            " for, and other jobs may use them too",
            "ask for them with cluster.gpus_per_task, or set isolation.device: cpu",
        )
    return Check("GPUs", where, "pass", f"asked for {wanted}, {seen}")


def _use(visible: Sequence[str], where: str) -> list[Check]:
    tries = [Try("gpu", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in visible]
    try:
        answers = [attempt.wait(_TIMEOUT_S) for attempt in tries]
    finally:
        for attempt in tries:
            attempt.end()
    checks = []
    for gpu, answer in zip(visible, answers, strict=True):
        name = f"GPU {gpu}"
        if problem := answer.get("problem"):
            remedy = answer.get("hint") or (
                "try it on this node with `python -m fedhpc.doctor.child gpu`; is its torch build"
                " made for this GPU and this driver?"
            )
            checks.append(Check(name, where, "fail", problem, remedy))
            continue
        found = (
            f"{answer['name']}, {answer['memory_gb']:.1f} GB; torch {answer['torch']} (CUDA"
            f" {answer['cuda']}) computes on it in {answer['seconds']:.1f} s; driver"
            f" {answer['driver']}"
        )
        checks.append(Check(name, where, "pass", found))
    return checks
