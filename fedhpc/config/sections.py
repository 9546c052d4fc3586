"""What a config may say: its sections, their defaults and their checks."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(
            "expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return name


def _check_reference(reference: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", reference):
        raise ValueError("expected 'module:attribute'")
    return reference


Name = Annotated[StrictStr, AfterValidator(_check_name)]
Reference = Annotated[StrictStr, AfterValidator(_check_reference)]
Count = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictInt, Field(ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seconds = Annotated[Number, Field(gt=0, le=30 * 24 * 3600)]


class Section(BaseModel):
    """A part of the config: strict, immutable, every field with a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Named(Section):
    """Something of a library, by its own name and parameters."""

    name: StrictStr = Field(min_length=1, description="its name")
    params: dict[StrictStr, Any] = Field(
        default_factory=dict, description="its parameters, by the names its library gives them"
    )


class App(Section):
    """Which Flower app runs. Without any of these: the built-in image classification."""

    dir: StrictStr | None = Field(
        None, description="folder of a Flower app, with the pyproject.toml that `flwr run` reads"
    )
    server: Reference | None = Field(None, description="its ServerApp, 'module:attribute'")
    client: Reference | None = Field(None, description="its ClientApp, 'module:attribute'")
    run_config: dict[StrictStr, StrictBool | StrictInt | float | StrictStr] = Field(
        default_factory=dict, description="its run config, over the values in pyproject.toml"
    )
    mods: list[Reference] = Field(
        default_factory=list,
        description="mods around the ClientApp, e.g. flwr.clientapp.mod:fixedclipping_mod",
    )

    @property
    def is_builtin(self) -> bool:
        """Whether the built-in app runs."""
        return self.dir is None and self.server is None and self.client is None


class Federation(Section):
    """Clients and rounds."""

    num_clients: Positive = Field(10, description="clients; client k holds partition k")
    clients_per_round: Positive = Field(
        10, description="clients that train in each round: the cohort"
    )
    over_select: Number = Field(
        1,
        ge=1,
        le=100,
        description="so many times as many clients train, and a round closes when as many as"
        " clients_per_round have succeeded",
    )
    num_rounds: Positive = Field(10, description="rounds of training")
    evaluate_every: Count = Field(
        1,
        description="evaluate the global model on the server before the first round, every n-th"
        " round, and after the last; 0: after the last only",
    )
    overlap_evaluation: Literal["auto"] | StrictBool = Field(
        "auto",
        description="evaluate the global model on the server while the next round trains; auto: of"
        " the built-in app; true: of yours too, whose evaluate_fn must then not change what the"
        " next round is made of",
    )
    clients_per_evaluation: Count = Field(
        0, description="clients that evaluate the global model on their own data in each round"
    )
    validation_fraction: Number = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of a client's examples kept for its own evaluation, if any",
    )
    placement: Literal["any", "pinned"] = Field(
        "any", description="any: an array task trains any client; pinned: client k on task k mod T"
    )
    aggregation: Literal["flat", "hierarchical"] = Field(
        "flat",
        description="flat: the server averages the replies; hierarchical: array tasks average"
        " groups of clients, the server the groups; for strategies that average all replies (an"
        " app that runs its own rounds, without a strategy's start(), averages as it does)",
    )
    round_timeout_s: Seconds = Field(
        3600,
        description="deadline of a round's fits, in seconds in which array tasks are connected",
    )

    @property
    def clients_asked(self) -> int:
        """How many clients are asked to train in each round."""
        asked = math.ceil(round(self.clients_per_round * self.over_select, 6))
        return min(asked, self.num_clients)


class Failures(Section):
    """What happens when clients fail."""

    retry: Count = Field(
        1, description="how often a client's failed fit is tried again within the round"
    )
    min_completed: Number = Field(
        0,
        ge=0,
        le=1,
        description="share of clients_per_round that must succeed in a round; 0: one client",
    )
    on_too_few: Literal["stop", "skip_round", "keep_model"] = Field(
        "stop",
        description="where fewer succeed: stop the run; skip_round: neither aggregate nor evaluate;"
        " keep_model: evaluate the model as it was",
    )


class Data(Section):
    """The data set of the built-in app and how clients share it."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder"] = (
        Field("digits", description="which data set")
    )
    root: StrictStr = Field(
        "~/.cache/fedhpc", description="folder for data sets, seen by every node; $VARIABLES work"
    )
    source: StrictStr | None = Field(
        None,
        description="image_folder: a folder or zip with train/<class>/... and test/<class>/...;"
        " others: a folder that torchvision's files are already in",
    )
    partitioner: Named = Field(
        Named(name="iid"),
        description="a partitioner of flwr-datasets (iid, dirichlet, pathological, shard, ...)",
    )
    stage_to: StrictStr | None = Field(
        None, description="copy the data to this folder of each node once, e.g. $SLURM_TMPDIR"
    )


class Training(Section):
    """What one fit does."""

    epochs: Positive = Field(1, description="passes over the client's examples in one fit")
    batch_size: Positive = Field(32, description="examples a step")
    optimizer: Named = Field(
        Named(name="SGD", params={"lr": 0.1}), description="an optimizer of torch.optim"
    )
    deterministic: StrictBool = Field(
        True, description="on GPU: use deterministic algorithms only (slower); on CPU: no effect"
    )


class Isolation(Section):
    """How a node's cores and GPUs are shared."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the allotted GPUs, or the CPU where there are none"
    )
    slots: Literal["auto"] | Positive = Field(
        "auto",
        description="on the CPU: fits at a time in an array task; auto: cores / threads_per_fit",
    )
    slots_per_gpu: Literal["auto"] | Positive = Field(
        1,
        description="on GPUs: fits at a time on each, of all array tasks and runs of yours that"
        " share it; auto: as many as its memory admits and the cores can feed",
    )
    gpu_memory_gb: Number | None = Field(
        None,
        gt=0,
        description="GPU memory of one fit, CUDA's context included: it starts when so much is"
        " free and is held to it; null: learned from the first fits",
    )
    host_memory_gb: Number | None = Field(
        None,
        gt=0,
        description="memory of one fit on the host, its data loader's workers included; a fit that"
        " uses more fails; null: no limit but the job's",
    )
    lock_dir: StrictStr | None = Field(
        None,
        description="folder of the node, the same for all your jobs on it, for the slot locks;"
        " null: /tmp/fedhpc-<uid>; $VARIABLES work",
    )
    threads_per_fit: Positive = Field(
        1, description="threads of one fit; part of what makes a result reproducible"
    )
    fits_per_process: Literal["auto"] | Count = Field(
        1,
        description="fits before a child process is replaced; 1: always fresh; 0: never replaced;"
        " auto: as soon as a fit left it other than it was (memory, threads, files, flags, ...)",
    )
    start_method: Literal["forkserver", "spawn"] = Field(
        "forkserver", description="how child processes start; spawn is about 100 times slower"
    )
    standby: Literal["auto"] | StrictBool = Field(
        "auto",
        description="prepare the next child while its predecessor trains; auto: where a core is"
        " left for it, else when there is nothing else to do",
    )
    slot_timeout_s: Seconds = Field(
        3600, description="how long a fit waits for its slot and memory, in seconds"
    )
    fit_timeout_s: Seconds = Field(
        3600, description="deadline of one fit, from the moment that it has its slot, in seconds"
    )
    preload: list[StrictStr] = Field(
        default_factory=list,
        description="further modules to import once in the fork server; they must not touch CUDA",
    )
    learn_preload: StrictBool = Field(
        True,
        description="import there, too, what the first fits import late of installed packages, if"
        " that neither touches CUDA nor starts threads",
    )


class Checkpoints(Section):
    """What a run goes on from when its server was lost, requeued, or resumed."""

    every: Count = Field(
        1, description="rounds between checkpoints; 0: none, and a run cannot go on"
    )
    keep: Positive = Field(2, description="how many of the newest are kept")
    best_metric: StrictStr | None = Field(
        "accuracy",
        description="the best checkpoint by this metric (of the server's evaluation, or else of the"
        " clients') is kept too; null, or no such metric: none",
    )
    best_mode: Literal["max", "min"] = Field("max", description="whether more is better, or less")


class JobOptions(Section):
    """Options of a Slurm job; null leaves Slurm's default."""

    slurm_partition: StrictStr | None = Field(None, description="--partition")
    account: StrictStr | None = Field(None, description="--account")
    qos: StrictStr | None = Field(None, description="--qos")
    constraint: StrictStr | None = Field(None, description="--constraint")
    reservation: StrictStr | None = Field(None, description="--reservation")
    nodelist: StrictStr | None = Field(None, description="--nodelist")
    exclude: StrictStr | None = Field(None, description="--exclude")
    time_min: Positive | None = Field(None, description="--time, in minutes")
    mem_gb: Number | None = Field(None, gt=0, description="--mem, in GB")
    cpus_per_task: Positive | None = Field(None, description="--cpus-per-task")
    gpus_per_task: Count | None = Field(
        None, description="--gpus-per-task; of the array tasks, unless given for the server alone"
    )
    gres: StrictStr | None = Field(
        None, description="--gres, where a site wants this instead of gpus_per_task"
    )
    comment: StrictStr | None = Field(None, description="--comment")
    mail_user: StrictStr | None = Field(None, description="--mail-user")
    mail_type: StrictStr | None = Field(None, description="--mail-type, e.g. END,FAIL")
    export: StrictStr | None = Field(
        None, description="--export: ALL (Slurm's default), NONE, or names of variables to forward"
    )
    extra: dict[StrictStr, StrictBool | StrictInt | StrictStr] = Field(
        default_factory=dict,
        description="any other sbatch option, by its long name; true: an option without a value",
    )


class Container(Section):
    """An image that the Slurm jobs run in; it holds Python with fedhpc."""

    image: StrictStr | None = Field(None, description="the image; null: no container")
    runtime: Literal["apptainer", "pyxis"] = Field(
        "apptainer",
        description="apptainer: `apptainer exec IMAGE`; pyxis: srun's --container-image",
    )
    options: list[StrictStr] = Field(
        default_factory=list, description="further options of the runtime"
    )


class Cluster(JobOptions):
    """Where the jobs run. The options of this section hold for both jobs."""

    executor: Literal["auto", "slurm", "local", "debug"] = Field(
        "auto",
        description="slurm; local: processes of this machine; debug: all in one process;"
        " auto: slurm where sbatch is found, else local",
    )
    runs_dir: StrictStr = Field("runs", description="folder of the run folders, seen by every node")
    array_tasks: Positive = Field(1, description="array tasks of the client array")
    max_parallel: Positive | None = Field(
        None, description="array tasks that run at the same time; null: all"
    )
    min_array_tasks: Positive = Field(1, description="array tasks needed before work starts")
    server: JobOptions = Field(JobOptions(), description="options of the server job alone")
    clients: JobOptions = Field(JobOptions(), description="options of the client array alone")
    setup: list[StrictStr] = Field(
        default_factory=list, description="shell lines before Python starts: module load, activate"
    )
    env: dict[StrictStr, StrictStr] = Field(
        default_factory=dict, description="environment variables of the jobs, set after setup"
    )
    python: StrictStr | None = Field(
        None, description="the jobs' Python; null: the one of submit, or python3 in a container"
    )
    container: Container = Field(Container(), description=Container.__doc__)
    dependency: StrictBool = Field(
        True,
        description="the client array waits in the queue until the server job has started; false"
        " where dependent jobs gather no priority",
    )
    pending_timeout_min: Number = Field(
        1440,
        gt=0,
        description="how long the server waits for a client array that is queued (and `submit`,"
        " while it follows, for a queued server job), in minutes",
    )
    reattach_timeout_min: Number = Field(
        5,
        gt=0,
        description="how long an array task waits for a server job that is queued again, in"
        " minutes, before it gives its node back",
    )
    max_requeues: Count = Field(
        5, description="how often a job of the run puts itself into the queue again"
    )
    interface: StrictStr | None = Field(
        None, description="network interface (or address) that the server listens on"
    )
    rendezvous_timeout_s: Seconds = Field(
        600, description="how long an array task waits for the server's address"
    )
    array_task_timeout_s: Seconds = Field(
        1800, description="how long the server waits for array tasks before it fails"
    )
    liveness_timeout_s: Seconds = Field(
        15, description="silence after which an array task counts as lost"
    )
    inline_mb: Number = Field(
        32,
        ge=0,
        le=1024,
        description="larger arrays travel as files of the run folder; so do smaller ones of replies"
        " where a cohort's would be more than 1 GB together",
    )
    state_mb: Number = Field(
        256, ge=0, description="client states above this total are kept as files of the run folder"
    )


class Config(Section):
    """One experiment."""

    name: Name = Field("experiment", description="name of the run")
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = Field(
        0, description="everything random derives from it"
    )
    snapshot: StrictBool = Field(
        False,
        description="copy the app's code into the run folder; queued and requeued jobs use it",
    )
    app: App = Field(App(), description=App.__doc__)
    federation: Federation = Field(Federation(), description=Federation.__doc__)
    data: Data = Field(Data(), description=Data.__doc__)
    model: Named = Field(
        Named(name="logistic"),
        description="The built-in app's model: logistic, mlp2, cnn, cnn_mcmahan or resnet18.",
    )
    training: Training = Field(Training(), description=Training.__doc__)
    strategy: Named = Field(
        Named(name="FedAvg"), description="A strategy of flwr.serverapp.strategy."
    )
    failures: Failures = Field(Failures(), description=Failures.__doc__)
    isolation: Isolation = Field(Isolation(), description=Isolation.__doc__)
    checkpoint: Checkpoints = Field(Checkpoints(), description=Checkpoints.__doc__)
    cluster: Cluster = Field(Cluster(), description=Cluster.__doc__)


# Options of sbatch that are no one else's, and what to use instead.
_OURS = {
    "array": "; see cluster.array_tasks and cluster.max_parallel",
    "error": "; logs are in the run folder's jobs/",
    "job-name": "; see name",
    "nodes": "; see cluster.array_tasks",
    "ntasks": "; see cluster.array_tasks",
    "ntasks-per-node": "; see cluster.array_tasks",
    "open-mode": "",
    "output": "; logs are in the run folder's jobs/",
    "parsable": "",
    "signal": "",
    "test-only": "; see --dry-run",
    "wait": "; see --follow",
    "wrap": "",
}


def combination_problems(config: Config) -> Iterator[str]:
    """Yield the problems that no single field can see."""
    federation, cluster, app = config.federation, config.cluster, config.app
    for field in ("clients_per_round", "clients_per_evaluation"):
        found = getattr(federation, field)
        if found > federation.num_clients and app.is_builtin:  # another app samples for itself
            yield (
                f"federation.{field}: expected at most federation.num_clients"
                f" ({federation.num_clients}), found {found}"
            )
    if federation.over_select > 1 and not app.is_builtin:
        yield (
            "federation.over_select: expected 1, as this app's own strategy chooses how many"
            f" clients train, found {federation.over_select:g}"
        )
    if cluster.min_array_tasks > cluster.array_tasks:
        yield (
            f"cluster.min_array_tasks: expected at most cluster.array_tasks"
            f" ({cluster.array_tasks}), found {cluster.min_array_tasks}"
        )
    parallel = cluster.max_parallel or cluster.array_tasks
    if cluster.min_array_tasks > parallel:
        yield (
            f"cluster.max_parallel: expected at least cluster.min_array_tasks"
            f" ({cluster.min_array_tasks}), found {parallel}"
        )
    if federation.placement == "pinned" and parallel < cluster.array_tasks:
        yield (
            "cluster.max_parallel: placement 'pinned' needs every array task at the same time"
            f" ({cluster.array_tasks}), found {parallel}"
        )
    if config.isolation.fit_timeout_s > federation.round_timeout_s:
        yield (
            "isolation.fit_timeout_s: expected at most federation.round_timeout_s"
            f" ({federation.round_timeout_s:g}), found {config.isolation.fit_timeout_s:g}"
        )
    if config.data.name == "image_folder" and config.data.source is None and app.is_builtin:
        yield "data.source: image_folder needs a folder or a zip file here, found null"
    if config.data.name == "digits" and config.data.source is not None:
        yield "data.source: digits come with scikit-learn, expected null"
    for job, options in (("", cluster), ("server.", cluster.server), ("clients.", cluster.clients)):
        if options.gpus_per_task and "gpu" in (options.gres or ""):
            yield f"cluster.{job}gres: expected either gres or gpus_per_task, found both"
        for key, value in options:
            if isinstance(value, str) and not value.isprintable():
                yield f"cluster.{job}{key}: expected one line of text, found {value!r}"
        for key, value in options.extra.items():
            if isinstance(value, str) and not value.isprintable():
                yield f"cluster.{job}extra.{key}: expected one line of text, found {value!r}"
            if key in _OURS:
                yield f"cluster.{job}extra.{key}: fedhpc sets this option itself{_OURS[key]}"
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                yield (
                    f"cluster.{job}extra.{key}: expected the long name of an sbatch option,"
                    " e.g. 'mail-type'"
                )
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"cluster.env.{name}: expected the name of an environment variable"
    if (app.server is None) != (app.client is None) and app.dir is None:
        missing = "server" if app.server is None else "client"
        yield f"app.{missing}: expected 'module:attribute' as app has the other one, found null"
    if app.run_config and app.is_builtin:
        yield "app.run_config: the built-in app reads data, model and training, not this"
