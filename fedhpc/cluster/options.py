"""The sbatch options of each job: those of section cluster, and the job's own over them."""

import re
from typing import Any

from fedhpc.config import Cluster, JobOptions

_GPUS_ELSEWHERE = ("gres", "gpus", "gpus-per-node", "gpus-per-task")  # as keys of `extra`


def of_server(cluster: Cluster) -> JobOptions:
    """Return the options of the server job.

    GPUs are for the clients: the server has some only where its own section asks for them.
    """
    return _over(_without_gpus(_common(cluster)), cluster.server)


def of_clients(cluster: Cluster) -> JobOptions:
    """Return the options of the client array."""
    common = _common(cluster)
    if gpus(cluster.clients) or cluster.clients.gpus_per_task == 0:
        common = _without_gpus(common)  # asked for in two ways they would add up or be refused
    return _over(common, cluster.clients)


def gpus(options: JobOptions) -> int:
    """Return how many GPUs a task of a job asks for, however it does it."""
    if options.gpus_per_task:
        return options.gpus_per_task
    if found := _count(options.gres or ""):
        return found
    given = {key: options.extra.get(key) for key in _GPUS_ELSEWHERE}
    return max(_count(value, key) if value else 0 for key, value in given.items())


def _common(cluster: Cluster) -> JobOptions:
    return JobOptions.model_validate(cluster.model_dump(include=set(JobOptions.model_fields)))


def _over(common: JobOptions, own: JobOptions) -> JobOptions:
    values = own.model_dump(exclude_none=True)
    return common.model_copy(update={**values, "extra": {**common.extra, **own.extra}})


def _without_gpus(options: JobOptions) -> JobOptions:
    gres = [item for item in (options.gres or "").split(",") if item and not _is_gpu(item)]
    extra = {
        key: value
        for key, value in options.extra.items()
        if not key.startswith(("gpu", "gres")) and not key.endswith("-per-gpu")
    }
    update = {"gpus_per_task": None, "gres": ",".join(gres) or None, "extra": extra}
    return options.model_copy(update=update)


def _is_gpu(item: str) -> bool:
    return re.match(r"(gres[:/])?gpu(\W|$)", item) is not None


def _count(value: Any, key: str = "gres") -> int:
    """Return the GPUs of ``gpu:a100:2,shard:1`` (option gres) or ``a100:2`` (gpus and its kin)."""
    items = [item for item in str(value).split(",") if key != "gres" or _is_gpu(item)]
    # Without a number it is one; cores may follow: gpu:2(S:0-1)
    last = (re.split("[:=]", item.partition("(")[0])[-1] for item in items)
    return sum(int(number) if number.isdigit() else 1 for number in last)
