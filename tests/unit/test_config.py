"""Reading, merging, checking and writing back of configs."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from fedhpc import config
from fedhpc.config import Config, JobOptions, Named
from fedhpc.errors import ConfigError
from fedhpc.submit import app

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str, *assignments: str, site: str | None = None) -> Config:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    site_file = None
    if site is not None:
        site_file = tmp_path / "site.yaml"
        site_file.write_text(site)
    return config.load(file, site_file, assignments)


def problems(tmp_path: Path, text: str, *assignments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *assignments)
    return caught.value.problems


def reload(tmp_path: Path, resolved: Config) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(resolved))
    return config.load(file)


# --- defaults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Config()


def test_the_defaults_are_the_ones_that_the_design_and_the_readme_name() -> None:
    default = Config()
    assert default.app.is_builtin
    assert default.federation.placement == "any"
    assert default.isolation.fits_per_process == 1
    assert default.isolation.start_method == "forkserver"
    assert default.cluster.executor == "auto"
    assert default.cluster.inline_mb == 32
    assert default.training.optimizer == Named(name="SGD", params={"lr": 0.1})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().federation.num_rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_configs_of_the_repository_are_valid(file: Path) -> None:
    config.load(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_configs_of_the_repository_begin_with_their_command(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert f"python -m fedhpc.submit configs/{file.name}" in first


# --- merging --------------------------------------------------------------------------------------


def test_the_site_goes_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "name: mine\nfederation: {num_clients: 20, num_rounds: 3}\ncluster: {array_tasks: 2}",
        "cluster.account=from-set",
        "federation.num_rounds=5",
        "federation.num_rounds=6",
        site="cluster: {slurm_partition: gpu, account: from-site, array_tasks: 4}",
    )
    assert loaded.name == "mine"
    assert (loaded.federation.num_clients, loaded.federation.num_rounds) == (20, 6)
    assert (loaded.cluster.slurm_partition, loaded.cluster.account) == ("gpu", "from-set")
    assert loaded.cluster.array_tasks == 4


def test_a_section_within_a_section_is_merged_too(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "cluster: {server: {mem_gb: 2, time_min: 5}}",
        site="cluster: {server: {mem_gb: 4}, clients: {gpus_per_task: 1}}",
    )
    assert loaded.cluster.server == JobOptions(mem_gb=4, time_min=5)
    assert loaded.cluster.clients == JobOptions(gpus_per_task=1)


def test_a_list_is_replaced_as_a_whole(tmp_path: Path) -> None:
    loaded = load(tmp_path, "cluster: {setup: [a, b]}", "cluster.setup=[c]")
    assert loaded.cluster.setup == ["c"]


def test_parameters_of_the_same_name_are_merged(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "training: {optimizer: {name: SGD, params: {lr: 0.1, momentum: 0.9}}}",
        "training.optimizer.params.lr=0.2",
    )
    assert loaded.training.optimizer.params == {"lr": 0.2, "momentum": 0.9}


def test_parameters_of_another_name_are_not_mixed_in(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "data: {partitioner: {name: dirichlet, params: {alpha: 1.0}}}",
        "data.partitioner.name=iid",
    )
    assert loaded.data.partitioner == Named(name="iid")


def test_a_parameter_of_a_default_can_be_set_alone(tmp_path: Path) -> None:
    loaded = load(tmp_path, "", "training.optimizer.params.momentum=0.9")
    assert loaded.training.optimizer.name == "SGD"
    assert loaded.training.optimizer.params["momentum"] == 0.9


def test_set_reads_yaml_values_and_keeps_later_equals_signs(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "",
        "cluster.setup=[module load cuda, export A=b]",
        "cluster.max_parallel=null",
        "training.deterministic=false",
        "cluster.constraint='a=b'",
    )
    assert loaded.cluster.setup == ["module load cuda", "export A=b"]
    assert loaded.cluster.max_parallel is None
    assert not loaded.training.deterministic
    assert loaded.cluster.constraint == "a=b"


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+1", -20.0), ("2.5e3", 2500.0), ("1.e2", 100.0), ("3", 3)],
)
def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    loaded = load(tmp_path, f"model: {{name: m, params: {{x: {text}}}}}", f"model.params.y={text}")
    assert loaded.model.params == {"x": value, "y": value}
    assert type(loaded.model.params["x"]) is type(value)


@pytest.mark.parametrize("text", ["'1e-3'", "1e", "e5", "1e-3x", "v1e3"])
def test_a_text_that_only_resembles_a_number_stays_a_text(tmp_path: Path, text: str) -> None:
    loaded = load(tmp_path, f"cluster: {{account: {text}}}")
    assert loaded.cluster.account == text.strip("'")


@pytest.mark.parametrize(
    "text",
    [
        "name: a\nname: b",
        "data:\n  name: mnist\n  name: digits",
        "federation: {num_rounds: 1}\ndata: {}\nfederation: {num_rounds: 2}",
        "model: {name: m, params: {a: {b: 1, b: 2}}}",
    ],
)
def test_a_key_that_appears_twice_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert "appears twice" in problem
    assert "line" in problem


def test_the_same_key_in_two_sections_is_no_duplicate(tmp_path: Path) -> None:
    loaded = load(tmp_path, "name: a\nmodel: {name: a}\ndata: {name: mnist}")
    assert (loaded.name, loaded.model.name, loaded.data.name) == ("a", "a", "mnist")


# --- what is wrong --------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "name: a/b\nfederation: {num_clients: 0, num_rounds: x}\nclustre: {}\n"
        "training: {epochs: 0, batch_size: 1.5}",
    )
    assert [line.split(":")[0] for line in found] == [
        "name",
        "federation.num_clients",
        "federation.num_rounds",
        "training.epochs",
        "training.batch_size",
        "clustre",
    ]


def test_all_impossible_combinations_are_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "federation: {num_clients: 5, clients_per_round: 6, clients_per_evaluation: 7}\n"
        "data: {name: image_folder}",
    )
    assert [line.split(":")[0] for line in found] == [
        "federation.clients_per_round",
        "federation.clients_per_evaluation",
        "data.source",
    ]


def test_the_message_counts_the_problems_and_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "seed: -1\nname: ''")
    assert caught.value.source == str(tmp_path / "experiment.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'experiment.yaml'}: 2 problems\n  name: ")
    assert "Hint: python -m fedhpc.submit --schema" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("federatoin: {}", "federation"),
        ("federation: {num_client: 3}", "federation.num_clients"),
        ("cluster: {gpu_per_task: 1}", "cluster.gpus_per_task"),
        ("cluster: {server: {memory_gb: 1}}", "cluster.server.mem_gb"),
        ("training: {optimizer: {name: SGD, parms: {}}}", "training.optimizer.params"),
        ("strategy: {name: FedAvg, parms: {}}", "strategy.params"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(
    tmp_path: Path, text: str, guess: str
) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.endswith(f": unknown key; did you mean {guess}?")
    assert problem.split(":")[0].rpartition(".")[0] == guess.rpartition(".")[0]


def test_a_key_that_resembles_nothing_is_answered_with_all_of_its_section(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "checkpoint: {qqq: 1}")
    assert problem == "checkpoint.qqq: unknown key; known: every, keep, best_metric, best_mode"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("strategy: {name: 3}", "strategy.name"),
        ("strategy: 3", "strategy"),
        ("strategy: {name: FedAvg, params: 3}", "strategy.params"),
        ("cluster: {interface: 3}", "cluster.interface"),
        ("app: {run_config: {strength: [1]}}", "app.run_config.strength"),
        ("app: {run_config: {int: [1]}}", "app.run_config.int"),
        ("cluster: {extra: {float-x: [1]}}", "cluster.extra.float-x"),
        ("isolation: {slots: many}", "isolation.slots"),
        ("isolation: {preload: [torch, 3]}", "isolation.preload.1"),
    ],
)
def test_a_problem_begins_with_the_whole_path_of_its_key(
    tmp_path: Path, text: str, path: str
) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.split(":")[0] == path


@pytest.mark.parametrize("value", ["true", "'7200'"])
@pytest.mark.parametrize(
    "key",
    [
        "cluster.liveness_timeout_s",
        "cluster.state_mb",
        "cluster.time_min",
        "cluster.clients.mem_gb",
    ],
)
def test_neither_true_nor_a_quoted_text_is_taken_for_a_number(
    tmp_path: Path, key: str, value: str
) -> None:
    (problem,) = problems(tmp_path, "", f"{key}={value}")
    assert problem.startswith(f"{key}: expected ")


# --- writing back ---------------------------------------------------------------------------------


def everything() -> Config:
    """Return a config in which no value is a default."""
    raw: dict[str, Any] = {
        "name": "all",
        "seed": 2**63 - 1,
        "app": {
            "server": "a.b:c",
            "client": "d:e.f",
            "run_config": {"a": True, "b": 1, "c": 1e-7, "d": "yes", "e": "", "f": "null"},
            "mods": ["m:n"],
        },
        "federation": {"num_clients": 7, "clients_per_round": 3, "validation_fraction": 0.25},
        "data": {"name": "image_folder", "source": "/a b/ü.zip", "stage_to": "$SLURM_TMPDIR"},
        "model": {"name": "mlp2", "params": {"hidden": 5, "nested": {"list": [1, 2.5, None]}}},
        "training": {"optimizer": {"name": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.99]}}},
        "strategy": {"name": "FedProx", "params": {"proximal_mu": 1e20}},
        "isolation": {"slots": 3, "preload": ["a"], "standby": False},
        "cluster": {
            "extra": {"mail-type": "END", "exclusive": True, "nice": 100, "comment": "12:30"},
            "server": {"mem_gb": 0.5, "gres": "gpu:1"},
            "setup": ["module load cuda", "# a: b", "echo 'x' \"y\""],
            "state_mb": 0,
        },
    }
    return config.parse(raw, "test")


def test_what_is_written_back_reads_as_the_same_config(tmp_path: Path) -> None:
    assert reload(tmp_path, everything()) == everything()
    assert reload(tmp_path, Config()) == Config()


def test_writing_back_keeps_the_types_of_parameters(tmp_path: Path) -> None:
    params = reload(tmp_path, everything()).app.run_config
    assert [type(value) for value in params.values()] == [bool, int, float, str, str, str]


@pytest.mark.parametrize("text", ["2e5", "1e-3", "12", "0x1f", "true", "no", "~", "1_0", "007"])
def test_a_text_that_looks_like_another_type_is_still_a_text_after_writing_back(
    tmp_path: Path, text: str
) -> None:
    loaded = load(tmp_path, f"cluster: {{account: '{text}'}}")
    assert reload(tmp_path, loaded).cluster.account == text


def test_every_default_is_written_out() -> None:
    written = yaml.safe_load(config.dump(Config()))

    def compare(section: BaseModel, values: dict[str, Any]) -> None:
        assert list(values) == list(type(section).model_fields)
        for key, value in section:
            if isinstance(value, BaseModel):
                compare(value, values[key])

    compare(Config(), written)


def test_the_resolved_config_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "c.yaml").write_text("data: {root: cache}\ncluster: {runs_dir: $FEDHPC_TEST_X/runs}\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("FEDHPC_TEST_X", "sub")
    monkeypatch.setenv("PATH", "")  # no sbatch
    first = CliRunner().invoke(app, ["c.yaml", "--dry-run"])
    assert first.exit_code == 0, first.output
    resolved = first.stdout[first.stdout.index("name: ") :]
    (elsewhere / "resolved.yaml").write_text(resolved)
    monkeypatch.chdir(elsewhere)
    second = CliRunner().invoke(app, ["resolved.yaml", "--dry-run"])
    assert second.exit_code == 0, second.output
    assert second.stdout[second.stdout.index("name: ") :] == resolved
    read = config.load(elsewhere / "resolved.yaml")
    assert read.cluster.runs_dir == str(here / "sub" / "runs")
    assert read.data.root == str(here / "cache")
    assert read.cluster.executor == "local"


def test_a_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    (tmp_path / "c.yaml").write_text("app: {dir: ~/an-app}\ndata: {source: ~/files, name: mnist}\n")
    shown = CliRunner().invoke(app, [str(tmp_path / "c.yaml"), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    resolved = yaml.safe_load(shown.stdout[shown.stdout.index("name: ") :])
    assert resolved["app"]["dir"] == f"{tmp_path}{os.sep}an-app"
    assert resolved["data"]["source"] == f"{tmp_path}{os.sep}files"


# --- the documented defaults ----------------------------------------------------------------------


def test_the_schema_reads_back_as_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, config.schema()) == Config()


def test_the_schema_documents_every_key() -> None:
    lines = config.schema().splitlines()

    def check(section: BaseModel, indent: int) -> None:
        for name, field in type(section).model_fields.items():
            assert field.description, name
            value = getattr(section, name)
            head = f"{'  ' * indent}{name}:"
            described = [
                line
                for before, line in zip(["", *lines], lines, strict=False)
                if (line.startswith(f"{head} ") and "  # " in line)
                or (line == head and before.strip().startswith("# "))
            ]
            assert described, head
            if isinstance(value, BaseModel) and not isinstance(value, Named):
                if type(value) is JobOptions:
                    continue
                check(value, indent + 1)

    check(Config(), 0)


def test_the_schema_is_what_the_command_prints() -> None:
    shown = CliRunner().invoke(app, ["--schema"])
    assert shown.exit_code == 0
    assert shown.stdout == config.schema()
