"""The layers of design.md, section 6: imports go downward only."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedhpc

ROOT = Path(fedhpc.__file__).resolve().parent

# From the bottom up. A package stands for all its modules.
LAYERS = {
    "base": ["fedhpc", "fedhpc.errors", "fedhpc.files", "fedhpc.logging_setup"],
    "facts": [
        "fedhpc.config",
        "fedhpc.paths",
        "fedhpc.environment",
        "fedhpc.network",
        "fedhpc.run_state",
    ],
    "isolation": ["fedhpc.isolation"],
    "allotment": ["fedhpc.allotment"],
    "learning": ["fedhpc.learning"],
    "federation": ["fedhpc.federation"],
    "processes": [
        "fedhpc.rendezvous",
        "fedhpc.cluster",
        "fedhpc.inspection",
        "fedhpc.oversight",
        "fedhpc.requeue",
        "fedhpc.server",
        "fedhpc.held",
        "fedhpc.turns",
        "fedhpc.fits",
        "fedhpc.client",
    ],
    "commands": [
        "fedhpc.submit",
        "fedhpc.plan",
        "fedhpc.preflight",
        "fedhpc.resume",
        "fedhpc.snapshot",
        "fedhpc.follow",
        "fedhpc.data",
        "fedhpc.__main__",
        "fedhpc.commandline",
        "fedhpc.words",
        "fedhpc.overview",
        "fedhpc.status",
        "fedhpc.list",
        "fedhpc.logs",
        "fedhpc.cancel",
        "fedhpc.clean",
        "fedhpc.report",
        "fedhpc.doctor",
    ],
}
ORDER = list(LAYERS)

# The packages that a layer may import from outside, besides the standard library; what comes with
# one of these for free (numpy with torch) is named too.
OUTSIDE = {
    "base": set(),
    "facts": {"pydantic", "yaml"},
    "isolation": {"torch", "pynvml"},
    "allotment": set(),
    "learning": {"torch", "torchvision", "flwr_datasets", "datasets", "sklearn", "numpy", "PIL"},
    "federation": {"flwr", "grpc", "numpy", "torch", "google", "cryptography"},
    "processes": {"submitit"},
    "commands": {"typer", "click", "rich", "matplotlib", "torch"},
}
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
PUBLIC_BELOW = ("flwr.clientapp.mod", "flwr.serverapp.strategy")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py")) if "_pb2" not in file.name}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def layer_of(module: str) -> str | None:
    for layer, members in LAYERS.items():
        for member in members:
            if module == member or (module.startswith(f"{member}.") and member != "fedhpc"):
                return layer
    return None


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports, anywhere in it, by full names."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from fedhpc import files` names a module, `from fedhpc.files import x` does not.
                yield full if full in FILES else base


def outside(module: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imports(module)}
    return {top for top in tops if top != "fedhpc" and top not in sys.stdlib_module_names}


def strings(module: str) -> Iterator[str]:
    """Yield the string constants of a module, without docstrings."""
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(module)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in documented:
            yield text


def test_the_modules_were_found() -> None:
    assert {"fedhpc", "fedhpc.config", "fedhpc.isolation", "fedhpc.federation.dispatch"} <= set(
        FILES
    )


@pytest.mark.parametrize("module", FILES)
def test_every_module_has_a_layer(module: str) -> None:
    assert layer_of(module) is not None, f"name the layer of {module} in this test and in design.md"


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_its_own_layer_and_below(module: str) -> None:
    own = ORDER.index(layer_of(module) or "commands")
    upward = {
        name
        for name in imports(module)
        if name.partition(".")[0] == "fedhpc" and ORDER.index(layer_of(name) or "commands") > own
    }
    assert upward == set()


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_the_libraries_of_its_layer_and_those_below(module: str) -> None:
    layer = layer_of(module) or "commands"
    allowed = set().union(*(OUTSIDE[below] for below in ORDER[: ORDER.index(layer) + 1]))
    assert outside(module) <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if layer_of(name) == "isolation"])
def test_isolation_can_be_used_alone(module: str) -> None:
    ours = {name for name in imports(module) if name.partition(".")[0] == "fedhpc"}
    allowed = ("fedhpc.isolation", "fedhpc.errors", "fedhpc.files")
    assert {name for name in ours if not name.startswith(allowed)} == set()
    assert outside(module) <= {"torch", "pynvml"}


@pytest.mark.parametrize("module", [name for name in FILES if layer_of(name) == "isolation"])
def test_isolation_imports_torch_inside_functions_only(module: str) -> None:
    at_the_top = {
        name
        for node in tree(module).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        if name
    }
    assert not any(name.partition(".")[0] == "torch" for name in at_the_top)


@pytest.mark.parametrize("module", [name for name in FILES if layer_of(name) == "learning"])
def test_learning_knows_neither_flower_nor_slurm(module: str) -> None:
    assert outside(module) & {"flwr", "grpc", "submitit"} == set()
    assert not any(name.startswith("fedhpc.isolation") for name in imports(module))


@pytest.mark.parametrize("module", FILES)
def test_only_cluster_imports_submitit(module: str) -> None:
    assert "submitit" not in outside(module) or module.startswith("fedhpc.cluster")


@pytest.mark.parametrize("module", FILES)
def test_only_environment_reads_the_variables_of_slurm(module: str) -> None:
    read = {text for text in strings(module) if text.startswith("SLURM_")}
    assert not read or module == "fedhpc.environment"


@pytest.mark.parametrize("module", FILES)
def test_only_compat_imports_what_flower_keeps_internal(module: str) -> None:
    internal = {
        name
        for name in imports(module)
        if name.partition(".")[0] == "flwr"
        and name not in PUBLIC_FLOWER
        and not any(name == below or name.startswith(f"{below}.") for below in PUBLIC_BELOW)
    }
    assert not internal or module == "fedhpc.federation.compat"


@pytest.mark.parametrize(
    "module", ["fedhpc.submit", "fedhpc.doctor", "fedhpc.report", "fedhpc.config", "fedhpc.paths"]
)
def test_what_answers_at_once_imports_nothing_heavy_at_the_top(module: str) -> None:
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen or current not in FILES:
            continue
        seen.add(current)
        for node in tree(current).body:
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        heavy = {"torch", "flwr", "grpc", "numpy", "submitit", "matplotlib"}
        assert heavy & {name.partition(".")[0] for name in todo} == set(), current


def test_these_rules_notice_a_breach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        '"""SLURM_IN_A_DOCSTRING is fine."""\n'
        "from fedhpc import client, errors\n"
        "from . import link\n"
        "def f():\n"
        "    import submitit.core\n"
        "    from flwr.common import serde\n"
        "    from flwr.serverapp.strategy import FedAvg\n"
        "    return 'SLURM_JOB_ID'\n"
    )
    monkeypatch.setitem(FILES, "fedhpc.federation.bad", file)
    found = set(imports("fedhpc.federation.bad"))
    assert found == {
        "fedhpc.client",
        "fedhpc.errors",
        "fedhpc.federation.link",
        "submitit.core",
        "flwr.common",
        "flwr.serverapp.strategy",
    }
    assert outside("fedhpc.federation.bad") == {"submitit", "flwr"}
    assert list(strings("fedhpc.federation.bad")) == ["SLURM_JOB_ID"]
