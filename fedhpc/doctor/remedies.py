"""What to do about Slurm's answers: a refused job, a reason why a job pends, how a job ended."""

import re

_WHOSE = "`sacctmgr show associations user=$USER` lists what is yours"
# Part of sbatch's message, of a pending reason or of a job's last state; what to do.
_REMEDIES = (
    (
        r"invalid partition|partition.*(not|un)available|PartitionDown|PartitionInactive",
        "set cluster.slurm_partition; `sinfo --format=%P,%a,%l` lists the partitions",
    ),
    (
        r"time ?limit.*(invalid|exceed)|PartitionTimeLimit|QOSMaxWall|AssocMaxWall",
        "lower cluster.time_min; `sinfo --format=%P,%l` lists the limits",
    ),
    (
        r"JobArrayTaskLimit|QOSMax|Assoc.*Limit|MaxJobs|MaxCpu|MaxGRES|accounting/qos policy",
        "the jobs are over a limit of your account or QOS: ask for less, or cancel other jobs"
        " (`squeue --me`); a run needs its server job and an array task at the same time",
    ),
    (r"invalid account|InvalidAccount|AccountNotAllowed", f"set cluster.account; {_WHOSE}"),
    (r"invalid qos|InvalidQOS|QOSNotAllowed", f"set cluster.qos; {_WHOSE}"),
    (
        r"generic resource|gres|gpus?[-_ ]per|invalid gpu",
        "set cluster.clients.gpus_per_task or gres, as the site wants it; `sinfo --format=%P,%G`"
        " lists what the nodes have",
    ),
    (
        r"feature|BadConstraints",
        "set cluster.constraint; `sinfo --format=%P,%f` lists what the nodes have",
    ),
    (r"reservation", "set cluster.reservation; `scontrol show reservations` lists them"),
    (r"memory", "lower cluster.mem_gb; `sinfo --format=%P,%m` lists the nodes' memory in MB"),
    (
        r"node (count|configuration)|requested node|more processors|ReqNodeNotAvail|invalid node",
        "ask for less (cpus_per_task, mem_gb, gpus_per_task), or for other nodes (nodelist,"
        " exclude, slurm_partition); `sinfo --Node --long` lists them",
    ),
    (r"JobHeld|launch_failed", "the job is held: `scontrol release JOB`, or ask the site why"),
    (
        r"Dependency",
        "the client array waits for the server job: see that one, or set cluster.dependency: false",
    ),
    (
        r"Resources|Priority|Nodes required|Licenses|BeginTime",
        "the cluster is busy: try later, or wait longer with --timeout-min; a shorter"
        " cluster.time_min may start sooner",
    ),
)


def for_slurm(said: str, otherwise: str) -> str:
    """Return what to do about what Slurm said.

    Parameters
    ----------
    said : str
        sbatch's message, or a pending reason.
    otherwise : str
        Where nothing is known of it.
    """
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, said, re.IGNORECASE):
            return remedy
    return otherwise
