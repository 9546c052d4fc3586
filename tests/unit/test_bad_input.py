"""Bad input gets a clear error and costs nothing: a table of bad configs and command lines.

No two rows exercise the same check. The first table is the first stage of validation (schema,
values, combinations, command line), the second one the stage that asks the installed libraries.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fedhpc import config, files, preflight, submit
from fedhpc.paths import RunPaths, create_run_folder

BAD_CONFIG = 2
BAD_PLATFORM = 75
FILE = "experiment.yaml"


# --- first stage ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A command line, and what is said about it.

    ``text`` is the config file's; ``said`` are whole phrases of the message, the first one
    beginning with the key or option it is about.
    """

    text: str | bytes
    said: list[str]
    arguments: list[str] = field(default_factory=lambda: [FILE])
    exit_code: int = BAD_CONFIG
    prepare: Callable[[], object] = lambda: None


def bad(text: str | bytes, *said: str) -> Bad:
    return Bad(text, list(said))


def assign(assignment: str, *said: str) -> Bad:
    return Bad("", list(said), [FILE, "--set", assignment])


def command(*arguments: str, said: str, text: str = "") -> Bad:
    return Bad(text, [said], list(arguments))


FIRST_STAGE: dict[str, Bad] = {
    # The file.
    "a missing file": command("missing.yaml", said="missing.yaml: 1 problem could not be read: No"),
    "a folder as the file": command(".", said="could not be read: Is a directory"),
    "not UTF-8": bad(b"name: \xff\xfe", "expected UTF-8 text"),
    "not YAML": bad("federation: {num_clients: 3", "not valid YAML: while parsing a flow mapping"),
    "a tab": bad("federation:\n\tnum_clients: 3", "not valid YAML: ", "line 2, column 1"),
    "two documents": bad("name: a\n---\nname: b", "not valid YAML: expected a single document"),
    "a Python object": bad("name: !!python/object/apply:os.getcwd []", "not valid YAML: ", "tag"),
    "a mapping within itself": bad("app: &x {y: *x}", "not valid YAML: ", "recursive"),
    "a list as a key": bad("? [a]\n: b", "not valid YAML: a key must be a single word"),
    "a key twice": bad(
        "seed: 1\nseed: 2", "not valid YAML: the key 'seed' appears twice", "line 2"
    ),
    "thousands of brackets": bad("[" * 5000, "not valid YAML: "),
    "a list as the file": bad("- name: a\n", "expected sections, found a list"),
    "a number as a key": bad("1: 2", "1: Keys should be strings, found 1"),
    # Keys.
    "an unknown section": bad("clutser: {}", "clutser: unknown key; did you mean cluster?"),
    "an unknown key": bad(
        "training: {local_epochs: 3}",
        "training.local_epochs: unknown key; did you mean training.epochs?",
    ),
    "a section that is a list": bad("federation: [1]", "federation: expected a mapping, found [1]"),
    "an empty section": bad("federation:", "federation: expected a mapping, found None"),
    "a model that is only a name": bad("model: cnn", "model: expected a mapping, found 'cnn'"),
    # Values.
    "a name with a slash": bad("name: a/b", "name: expected 1 to 64 letters", "found 'a/b'"),
    "a name that is a number": bad("name: 3", "name: expected text, found 3"),
    "an empty model name": bad("model: {name: ''}", "model.name: expected a name, found ''"),
    "half a client": bad(
        "federation: {num_clients: 1.5}",
        "federation.num_clients: expected an integer, found 1.5",
    ),
    "true rounds": bad(
        "federation: {num_rounds: yes}", "federation.num_rounds: expected an integer, found True"
    ),
    "no clients": bad(
        "federation: {num_clients: 0}",
        "federation.num_clients: expected ",
        "1 or more, found 0",
    ),
    "a negative count": bad(
        "isolation: {fits_per_process: -1}",
        "isolation.fits_per_process: expected ",
        "0 or more, found -1",
    ),
    "a seed of 64 bits": bad(
        f"seed: {2**63}", "seed: expected ", f"less than {2**63}, found {2**63}"
    ),
    "a fraction of nothing": bad(
        "federation: {validation_fraction: 0}",
        "federation.validation_fraction: expected ",
        "more than 0",
    ),
    "a fraction of all": bad(
        "federation: {validation_fraction: 1}",
        "federation.validation_fraction: expected ",
        "less than 1",
    ),
    "a timeout with a unit": bad(
        "cluster: {liveness_timeout_s: 15s}",
        "cluster.liveness_timeout_s: expected a number, found '15s'",
    ),
    "an infinite timeout": bad(
        "cluster: {rendezvous_timeout_s: .inf}",
        "cluster.rendezvous_timeout_s: expected a finite number, found inf",
    ),
    "a timeout of years": bad(
        "cluster: {rendezvous_timeout_s: 1e9}",
        "cluster.rendezvous_timeout_s: expected ",
        "2592000",
        " or less, found 1000000000",
    ),
    "true as a text": bad(
        "training: {deterministic: 'true'}",
        "training.deterministic: expected true or false, found 'true'",
    ),
    "an unknown choice": bad(
        "federation: {placement: pined}",
        "federation.placement: expected 'any' or 'pinned', found 'pined'",
    ),
    "slots in words": bad(
        "isolation: {slots: many}", "isolation.slots: expected 'auto' or an integer, found 'many'"
    ),
    "one line for a list": bad(
        "cluster: {setup: module load cuda}",
        "cluster.setup: expected a list, found 'module load cuda'",
    ),
    "a number in a list of texts": bad(
        "isolation: {preload: [a, 3]}", "isolation.preload.1: expected text, found 3"
    ),
    "params that are a list": bad(
        "model: {name: cnn, params: [1]}", "model.params: expected a mapping, found [1]"
    ),
    "a value of no simple type": bad(
        "app: {server: 'a:b', client: 'a:c', run_config: {lr: [1]}}",
        "app.run_config.lr: expected true or false or an integer or a number or text, found [1]",
    ),
    "a module without attribute": bad(
        "app: {server: my_app, client: 'a:b'}",
        "app.server: expected 'module:attribute', found 'my_app'",
    ),
    # Combinations.
    "a cohort larger than the clients": bad(
        "federation: {num_clients: 5, clients_per_round: 6}",
        "federation.clients_per_round: expected at most federation.num_clients (5), found 6",
    ),
    "more evaluate than there are": bad(
        "federation: {num_clients: 10, clients_per_evaluation: 11}",
        "federation.clients_per_evaluation: expected at most federation.num_clients (10), found 11",
    ),
    "more array tasks needed than there are": bad(
        "cluster: {array_tasks: 2, min_array_tasks: 3, max_parallel: 3}",
        "cluster.min_array_tasks: expected at most cluster.array_tasks (2), found 3",
    ),
    "more array tasks needed than may run": bad(
        "cluster: {array_tasks: 4, min_array_tasks: 3, max_parallel: 2}",
        "cluster.max_parallel: expected at least cluster.min_array_tasks (3), found 2",
    ),
    "pinned to array tasks that wait": bad(
        "federation: {placement: pinned}\ncluster: {array_tasks: 4, max_parallel: 2}",
        "cluster.max_parallel: placement 'pinned' needs every array task at the same time (4),"
        " found 2",
    ),
    "a fit longer than its round": bad(
        "federation: {round_timeout_s: 60}\nisolation: {fit_timeout_s: 61}",
        "isolation.fit_timeout_s: expected at most federation.round_timeout_s (60), found 61",
    ),
    "more clients asked than an app of its own would ask": bad(
        "federation: {over_select: 1.3}\napp: {server: 'a:b', client: 'a:c'}",
        "federation.over_select: expected 1, as this app's own strategy chooses how many clients"
        " train, found 1.3",
    ),
    "fewer clients asked than needed": bad(
        "federation: {over_select: 0.9}",
        "federation.over_select: expected 1.0 or more, found 0.9",
    ),
    "more than all clients needed": bad(
        "failures: {min_completed: 1.1}",
        "failures.min_completed: expected 1.0 or less, found 1.1",
    ),
    "an image folder without a folder": bad(
        "data: {name: image_folder}",
        "data.source: image_folder needs a folder or a zip file here, found null",
    ),
    "digits from a folder": bad(
        "data: {name: digits, source: /data}",
        "data.source: digits come with scikit-learn, expected null",
    ),
    "GPUs asked for twice": bad(
        "cluster: {clients: {gpus_per_task: 1, gres: 'gpu:1'}}",
        "cluster.clients.gres: expected either gres or gpus_per_task, found both",
    ),
    "an sbatch option with dashes": bad(
        "cluster: {extra: {--mail-type: END}}",
        "cluster.extra.--mail-type: expected the long name of an sbatch option, e.g. 'mail-type'",
    ),
    "a comment of two lines": bad(
        'cluster: {comment: "a\\nb"}', "cluster.comment: expected one line of text, found 'a\\nb'"
    ),
    "an sbatch option of two lines": bad(
        'cluster: {server: {extra: {licenses: "a\\nb"}}}',
        "cluster.server.extra.licenses: expected one line of text, found 'a\\nb'",
    ),
    "a variable with a dash": bad(
        "cluster: {env: {MY-VAR: a}}",
        "cluster.env.MY-VAR: expected the name of an environment variable",
    ),
    "half an app": bad(
        "app: {server: 'a:b'}",
        "app.client: expected 'module:attribute' as app has the other one, found null",
    ),
    "a run config for the built-in app": bad(
        "app: {run_config: {lr: 1}}", "app.run_config: the built-in app reads data, model and"
    ),
    # The command line.
    "nothing": command(
        said="command line: 1 problem CONFIG: expected a YAML file or --resume RUN_DIR, found"
    ),
    "an unknown option": command(FILE, "--excutor", "local", said="No such option '--excutor'"),
    "an unknown executor": command(
        FILE, "--executor", "pbs", said="Invalid value for '--executor': 'pbs' is not one of 'auto'"
    ),
    "two files": command(FILE, "more.yaml", said="unexpected extra argument (more.yaml)"),
    "--set without anything": command(FILE, "--set", said="'--set' requires an argument"),
    "--set without a value": assign(
        "seed", "command line: 1 problem --set: expected section.key=value, found 'seed'"
    ),
    "--set with half a key": assign(
        "cluster.=3", "--set: expected section.key=value, found 'cluster.=3'"
    ),
    "--set with half a value": assign("seed=[1", "--set seed: not a YAML value: '[1'"),
    "--set of an unknown key": assign(
        "federation.num_cliens=3",
        "federation.num_cliens: unknown key; did you mean federation.num_clients?",
    ),
    "--set below a value": assign("name.first=x", "name: expected text, found a mapping"),
    "a missing site file": command(
        FILE, "--site", "missing.yaml", said="missing.yaml: 1 problem could not be read: No such"
    ),
    "slurm without Slurm": command(
        FILE,
        "--executor",
        "slurm",
        said="cluster.executor: expected sbatch on the PATH for 'slurm', found none Hint: ",
    ),
    # The run folder.
    "a file in the place of runs_dir": Bad(
        "cluster: {runs_dir: occupied}",
        ["cluster.runs_dir: expected a folder, found the file ", "occupied Hint: "],
        exit_code=BAD_PLATFORM,
        prepare=lambda: Path("occupied").touch(),
    ),
    "runs_dir below a file": Bad(
        "cluster: {runs_dir: occupied/runs}",
        ["cluster.runs_dir: could not create a run folder in ", ": Not a directory Hint: "],
        exit_code=BAD_PLATFORM,
        prepare=lambda: Path("occupied").touch(),
    ),
    "a variable that is not set": bad(
        "cluster: {runs_dir: $FEDHPC_NOT_SET/runs}",
        "cluster.runs_dir: ",
        "$FEDHPC_NOT_SET",
    ),
}


@pytest.fixture
def _no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that no bad input gets as far as a process."""

    def started(*_: object) -> None:
        raise AssertionError("it got past the first stage")

    for name in ("_preflight", "_start", "_run_here"):
        monkeypatch.setattr(submit, name, started)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plain(message: str) -> str:
    """Return a message without the frames and line breaks of its layout."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", message).split())


def entries() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.usefixtures("_no_jobs")
@pytest.mark.parametrize("case", FIRST_STAGE.values(), ids=FIRST_STAGE)
def test_bad_input_is_refused_at_once(
    case: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    Path(FILE).write_bytes(case.text.encode() if isinstance(case.text, str) else case.text)
    case.prepare()
    before = entries()
    result = CliRunner().invoke(submit.app, case.arguments, env={"COLUMNS": "250"})
    message = plain(result.stderr)
    assert isinstance(result.exception, SystemExit), result.exception
    for phrase in case.said:
        assert phrase in message
    assert result.exit_code == case.exit_code
    assert result.stdout == ""
    assert "Traceback" not in message
    assert entries() == before


# --- second stage ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfit:
    """A valid config that the installed libraries or the data do not fit."""

    text: str
    said: list[str]
    files: dict[str, str | bytes] = field(default_factory=dict)
    platform: bool = False


def unfit(text: str, *said: str, **written: str | bytes) -> Unfit:
    return Unfit(text, list(said), written)


def picture(size: tuple[int, int] = (4, 3), mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def images(said: str, **written: str | bytes) -> Unfit:
    """Return the case of an image folder with these files; __ in a name stands for a slash."""
    return Unfit(
        "data: {name: image_folder, source: images}",
        [said],
        {f"images/{name.replace('__', '/')}.png": content for name, content in written.items()},
    )


PYPROJECT = """
[project]
name = "an-app"
version = "1.0.0"
description = ""
license = {text = "x"}
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "SERVER"
clientapp = "CLIENT"
[tool.flwr.app.config]
learning-rate = 0.1
"""
SERVER = "from flwr.serverapp import ServerApp\napp = ServerApp()\n"
CLIENT = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"


def flower_app(said: str, text: str = "", *, server: str = SERVER, client: str = CLIENT) -> Unfit:
    """Return the case of an app folder; its modules get names of their own (imports are cached)."""
    flower_app.count = count = getattr(flower_app, "count", 0) + 1  # type: ignore[attr-defined]
    modules = f"bad_server_{count}", f"bad_client_{count}"
    project = PYPROJECT.replace("SERVER", f"{modules[0]}:app").replace(
        "CLIENT", f"{modules[1]}:app"
    )
    written: dict[str, str | bytes] = {
        "an-app/pyproject.toml": project,
        f"an-app/{modules[0]}.py": server,
        f"an-app/{modules[1]}.py": client,
    }
    return Unfit(text or "app: {dir: an-app}", [said], written)


SECOND_STAGE: dict[str, Unfit] = {
    # Models.
    "an unknown model": unfit(
        "model: {name: resnet}",
        "model.name: expected a built-in model, found 'resnet'; did you mean resnet18?",
    ),
    "an unknown parameter of a model": unfit(
        "model: {name: mlp2, params: {hiden: 3}}",
        "model.params.hiden: mlp2 has no such parameter; did you mean hidden?",
    ),
    "no hidden units": unfit(
        "model: {name: mlp2, params: {hidden: 0}}",
        "model.params.hidden: expected an integer of 1 or more, found 0",
    ),
    "groups that do not divide": unfit(
        "model: {name: resnet18, params: {groups: 3}}",
        "model.params.groups: expected a divisor of 64, found 3",
    ),
    "images too small for the model": unfit(
        "model: {name: cnn}",
        "model.name: cnn needs images of at least 16x16 pixels, found 8x8",
    ),
    # Strategies.
    "an unknown strategy": unfit(
        "strategy: {name: FedAverage}",
        "strategy.name: expected a strategy of flwr.serverapp.strategy, found 'FedAverage'",
    ),
    "an unknown parameter of a strategy": unfit(
        "strategy: {name: FedProx, params: {mu: 1}}",
        "strategy.params.mu: FedProx has no such parameter",
    ),
    "a missing parameter of a strategy": unfit(
        "strategy: {name: QFedAvg}",
        "strategy.params.client_learning_rate: QFedAvg needs a value, found none",
    ),
    "a value that a strategy refuses": unfit(
        "strategy: {name: FedTrimmedAvg, params: {beta: 0.7}}",
        "strategy.params: FedTrimmedAvg refuses them: `beta` must be in",
    ),
    "trees": unfit(
        "strategy: {name: FedXgbBagging}",
        "strategy.name: FedXgbBagging aggregates XGBoost trees",
    ),
    "a wrapper around nothing": unfit(
        "strategy: {name: DifferentialPrivacyServerSideAdaptiveClipping,"
        " params: {noise_multiplier: 1, strategy: {params: {}}}}",
        "strategy.params.strategy: expected a mapping of name and params, found",
    ),
    # Optimizers.
    "an unknown optimizer": unfit(
        "training: {optimizer: {name: sgd}}",
        "training.optimizer.name: expected an optimizer of torch.optim, found 'sgd';"
        " did you mean SGD?",
    ),
    "an unknown parameter of an optimizer": unfit(
        "training: {optimizer: {name: SGD, params: {learning_rate: 0.1}}}",
        "training.optimizer.params.learning_rate: SGD has no such parameter",
    ),
    "a learning rate below zero": unfit(
        "training: {optimizer: {name: SGD, params: {lr: -1}}}",
        "training.optimizer.params: SGD refuses {'lr': -1}: Invalid learning rate: -1",
    ),
    # Partitioners.
    "an unknown partitioner": unfit(
        "data: {partitioner: {name: dirichelt}}",
        "data.partitioner.name: expected a partitioner of flwr-datasets, found 'dirichelt';"
        " did you mean dirichlet?",
    ),
    "an unknown parameter of a partitioner": unfit(
        "data: {partitioner: {name: dirichlet, params: {alhpa: 1, alpha: 1}}}",
        "data.partitioner.params.alhpa: dirichlet has no such parameter; did you mean alpha?",
    ),
    "a missing parameter of a partitioner": unfit(
        "data: {partitioner: {name: dirichlet}}",
        "data.partitioner.params.alpha: dirichlet needs a value, found none",
    ),
    "a value that a partitioner refuses": unfit(
        "data: {partitioner: {name: dirichlet, params: {alpha: -1}}}",
        "data.partitioner.params: dirichlet: ",
    ),
    "data that a partitioner refuses": unfit(
        "data: {partitioner: {name: dirichlet, params: {alpha: 1, min_partition_size: 900}}}",
        "data.partitioner.params: dirichlet: ",
    ),
    "a partitioner that leaves a client empty": unfit(
        "data: {partitioner: {name: dirichlet, params: {alpha: 0.001, min_partition_size: 0,"
        " self_balancing: false}}}\nfederation: {num_clients: 40}",
        "data.partitioner.params: dirichlet leaves ",
        " of 40 clients without examples: ",
    ),
    "partitions for other clients": unfit(
        "data: {partitioner: {name: iid, params: {num_partitions: 3}}}",
        "data.partitioner.params: expected a partition for each of 10 clients, found 3 from iid",
    ),
    "more clients than examples": unfit(
        "federation: {num_clients: 2000}",
        "data.partitioner.num_partitions: expected at most one client an example (1442),"
        " found 2000 clients",
    ),
    "too few examples to evaluate": unfit(
        "data: {partitioner: {name: size, params: {partition_sizes: [9, 1]}}}\n"
        "federation: {num_clients: 2, clients_per_round: 2, clients_per_evaluation: 1}",
        "federation.clients_per_evaluation: needs 2 examples or more of each client,"
        " 1 have fewer, e.g. client 1",
    ),
    # Data.
    "a missing source": unfit(
        "data: {name: image_folder, source: missing}",
        "data.source: no such file or folder: missing",
    ),
    "a source that is no zip": unfit(
        "data: {name: image_folder, source: notes.txt}",
        "data.source: expected a folder or a zip file, found notes.txt",
        **{"notes.txt": "text"},
    ),
    "no test images": images(
        "data.source: expected images in test/<class>/ of images, found none",
        train__a__1=picture(),
    ),
    "a class that is only tested": images(
        "data.source: test/b has no counterpart train/b in images",
        train__a__1=picture(),
        test__b__1=picture(),
    ),
    "images of two sizes": images(
        "data.source: train/a/2.png is 5x3 L, expected 4x3 L as train/a/1.png",
        train__a__1=picture(),
        train__a__2=picture((5, 3)),
        test__a__1=picture(),
    ),
    "images with transparency": images(
        "data.source: train/a/1.png has mode RGBA, expected RGB or L",
        train__a__1=picture(mode="RGBA"),
        test__a__1=picture(),
    ),
    "an image that is none": images(
        "data.source: test/a/1.png is not a readable image",
        train__a__1=picture(),
        test__a__1=b"not a PNG",
    ),
    "a data set that is not where it was said": Unfit(
        "data: {name: mnist, source: empty}",
        ["could not find the data set mnist in empty", "python -m fedhpc.data mnist"],
        {"empty/note": ""},
        platform=True,
    ),
    "a data folder that cannot be written": Unfit(
        "data: {root: occupied}",
        ["could not write ", "occupied"],
        {"occupied": "a file"},
        platform=True,
    ),
    # Apps.
    "a folder without an app": unfit(
        "app: {dir: no-app}",
        "app.dir: expected the folder of a Flower app, found ",
        **{"no-app/note": ""},
    ),
    "an app file that is not TOML": unfit(
        "app: {dir: an-app}",
        "app.dir: expected the folder of a Flower app, found ",
        **{"an-app/pyproject.toml": "[tool"},
    ),
    "an app without components": unfit(
        "app: {dir: an-app}",
        '"clientapp" missing',
        **{"an-app/pyproject.toml": PYPROJECT.replace("clientapp =", "client =")},
    ),
    "an unknown key of its run config": flower_app(
        "app.run_config.learning_rate: the app has no such run config key; did you mean"
        " learning-rate?",
        "app: {dir: an-app, run_config: {learning_rate: 1}}",
    ),
    "a module that is missing": unfit(
        "app: {server: 'not_there_at_all:app', client: 'fedhpc.federation.client_app:app'}",
        "app.server: could not load not_there_at_all:app from the Python path: No module",
    ),
    "an attribute that is missing": unfit(
        "app: {server: 'fedhpc.federation.server_app:app', client: 'fedhpc.files:app'}",
        "app.client: could not load fedhpc.files:app from the Python path: ",
    ),
    "a ServerApp that is none": flower_app(
        "app.server: expected a ServerApp in ", server="app = 3\n"
    ),
    "a ClientApp that is none": flower_app(
        "app.client: expected a ClientApp in ", client="app = ''\n"
    ),
    "an app that raises when it is imported": flower_app(
        "app.server: its import raised ZeroDivisionError: division by zero", server="1 / 0\n"
    ),
    "an app that exits when it is imported": flower_app(
        "app.client: its import raised SystemExit", client="raise SystemExit(0)\n"
    ),
    "an app whose own imports are missing": flower_app(
        "No module named 'not_there_either'", client="import not_there_either\n"
    ),
    "a mod that is missing": unfit(
        "app: {mods: ['flwr.clientapp.mod:fixedcliping_mod']}",
        "app.mods: could not load flwr.clientapp.mod:fixedcliping_mod from the Python path: ",
    ),
    "a mod that cannot be called": unfit(
        "app: {mods: ['os:sep']}", "app.mods: expected a function in os:sep, found str"
    ),
}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def _clean_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("bad_"):
            del sys.modules[name]


def run_folder(text: str, data_root: Path) -> RunPaths:
    Path(FILE).write_text(text)
    loaded = config.load(Path(FILE))
    if loaded.data.root == config.Data().root:
        data = loaded.data.model_copy(update={"root": str(data_root)})
        loaded = loaded.model_copy(update={"data": data})
    paths = create_run_folder(Path("runs"), loaded.name)
    files.write_atomic(paths.config, config.dump(loaded))
    return paths


@pytest.mark.usefixtures("_clean_imports")
@pytest.mark.parametrize("case", SECOND_STAGE.values(), ids=SECOND_STAGE)
def test_what_the_libraries_or_the_data_do_not_fit_is_refused(
    case: Unfit, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in case.files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    paths = run_folder(case.text, data_root)
    findings = preflight.check(paths).to_json()
    if case.platform:
        assert findings["problems"] == []
        message = f"{findings['platform']['message']} Hint: {findings['platform']['hint']}"
    else:
        assert findings["platform"] is None
        (message,) = findings["problems"]
    for phrase in case.said:
        assert phrase in plain(message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model: {name: mlp2, params: {hidden: 8}}\ndata: {partitioner: {name: linear}}",
        "app: {mods: ['flwr.clientapp.mod:fixedclipping_mod']}",
    ],
)
def test_what_is_fit_is_not_refused(
    text: str, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = run_folder(text, data_root)
    findings = preflight.check(paths).to_json()
    assert findings == {"problems": [], "hint": None, "platform": None}
    assert paths.partitions.is_file()
    packed = files.read_json(paths.data)
    assert packed is not None
    assert Path(packed["packed"]).is_dir()


@pytest.mark.usefixtures("_clean_imports")
def test_a_fit_app_of_ones_own_is_not_refused(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = flower_app("", "app: {dir: an-app, run_config: {learning-rate: 0.5}}")
    Path("an-app").mkdir()
    for name, content in case.files.items():
        Path(name).write_text(str(content))
    findings = preflight.check(run_folder(case.text, data_root)).to_json()
    assert findings == {"problems": [], "hint": None, "platform": None}


def test_problems_of_several_libraries_are_told_at_once(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "strategy: {name: nope}\ntraining: {optimizer: {name: nope}}\n"
        "data: {partitioner: {name: nope}}\napp: {mods: ['nope:nope']}"
    )
    problems = preflight.check(run_folder(text, data_root)).to_json()["problems"]
    keys = ["app.mods", "strategy.name", "training.optimizer.name", "data.partitioner.name"]
    assert [problem.partition(":")[0] for problem in problems] == keys


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(FIRST_STAGE) + len(SECOND_STAGE) >= 45
    texts = [(case.text, tuple(case.arguments)) for case in FIRST_STAGE.values()]
    assert len(set(texts)) == len(texts)


# --- the whole command ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    cpu_s: float


def run(folder: Path, *arguments: str, flags: tuple[str, ...] = ()) -> Ended:
    """Run the command as a user does, with a deadline, and measure what it used."""
    command = [sys.executable, *flags, "-m", "fedhpc.submit", *arguments]
    environment = os.environ | {"COLUMNS": "250", "NO_COLOR": "1"}
    before = os.times()
    process = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    after = os.times()
    cpu_s = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return Ended(process.returncode, process.stdout, process.stderr, cpu_s)


def test_the_command_tells_what_the_libraries_refuse_and_leaves_nothing(
    tmp_path: Path, data_root: Path
) -> None:
    (tmp_path / FILE).write_text(f"model: {{name: cnnn}}\ndata: {{root: {data_root}}}\n")
    ended = run(tmp_path, FILE, "--executor", "local", "--detach")
    assert ended.exit_code == BAD_CONFIG
    lines = ended.stderr.splitlines()
    assert lines[0] == f"error: {FILE}: 1 problem"
    assert lines[1] == "  model.name: expected a built-in model, found 'cnnn'; did you mean cnn?"
    assert lines[2].startswith("  Hint: valid names: cnn, cnn_mcmahan, ")
    assert "Traceback" not in ended.stdout + ended.stderr
    assert list((tmp_path / "runs").glob("*")) == []


def test_the_command_survives_an_app_that_prints_and_raises(tmp_path: Path) -> None:
    app = tmp_path / "loud_app.py"
    app.write_text("import os\nprint('{}')\nos.write(1, b'more')\nraise RuntimeError('no GPU')\n")
    (tmp_path / FILE).write_text("app: {server: 'loud_app:server', client: 'loud_app:client'}\n")
    ended = run(tmp_path, FILE, "--executor", "local", "--detach")
    assert ended.exit_code == BAD_CONFIG
    assert "app.server: its import raised RuntimeError: no GPU" in ended.stderr
    assert "app.client: its import raised RuntimeError: no GPU" in ended.stderr
    assert ended.stderr.startswith(f"error: {FILE}: 2 problems")
    assert "Traceback" not in ended.stdout + ended.stderr
    assert list((tmp_path / "runs").glob("*")) == []


QUICK = {
    "--help": (["--help"], 0),
    "--schema": (["--schema"], 0),
    "--dry-run": ([FILE, "--dry-run", "--executor", "local"], 0),  # test_plan.py: with scripts
    "a schema error": ([FILE, "--set", "federation.num_clients=0"], BAD_CONFIG),
}


@pytest.mark.parametrize(("arguments", "exit_code"), QUICK.values(), ids=QUICK)
def test_what_needs_no_library_answers_within_a_second_of_cpu_time(
    tmp_path: Path, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / FILE).write_text("name: quick\n")
    tries = [run(tmp_path, *arguments) for _ in range(2)]
    assert [ended.exit_code for ended in tries] == [exit_code] * 2
    assert min(ended.cpu_s for ended in tries) < 1.0
    assert names(tmp_path) == [FILE]


@pytest.mark.parametrize(("arguments", "exit_code"), QUICK.values(), ids=QUICK)
def test_what_needs_no_library_imports_none(
    tmp_path: Path, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / FILE).write_text("name: quick\n")
    ended = run(tmp_path, *arguments, flags=("-X", "importtime"))
    assert ended.exit_code == exit_code
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"typer", "pydantic", "fedhpc"} <= imported
    assert imported & {"torch", "torchvision", "flwr", "grpc", "numpy", "submitit"} == set()
