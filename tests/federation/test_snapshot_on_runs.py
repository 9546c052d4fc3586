"""Runs whose code changes on disk between submission and start: they use their snapshot."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import Run, Submitter, eventually
from test_apps import CLIENT, PYPROJECT, SERVER

import fedhpc
from fedhpc import run_state

SMALLER = [
    "snapshot=true",
    "federation.num_clients=2",
    "federation.clients_per_round=2",
    "federation.num_rounds=1",
]
ENV = {"PYTHONDONTWRITEBYTECODE": ""}  # each child would compile the copy anew
BROKEN = 'raise RuntimeError("changed after the submission")\n'
# A module beside it, and a file of the folder that submit was called in.
HELPED = (
    'from pathlib import Path\nfrom helper import OK\nassert Path("here.txt").exists() and OK\n'
)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def app_folder(folder: Path) -> tuple[list[str], Path]:
    """Write an app with a pyproject.toml; return what names it and where its code lies."""
    code = folder / "app"
    server, client = (f"import counting.helper\n{text}" for text in (SERVER, CLIENT))
    write(code, {"pyproject.toml": PYPROJECT, "counting/__init__.py": "",
                 "counting/server_app.py": server, "counting/client_app.py": client,
                 "counting/helper.py": ""})  # fmt: skip
    return ["app.dir=app", "app.run_config.num-server-rounds=1"], code


def modules(folder: Path) -> tuple[list[str], Path]:
    """Write an app as modules of the working directory, and children that import it anew."""
    write(folder, {"my_server.py": HELPED + SERVER, "my_client.py": HELPED + CLIENT,
                   "helper.py": "OK = True\n"})  # fmt: skip
    run_config = {"num-server-rounds": 1, "fraction-train": 1.0, "fail-client": -1,
                  "nested.key": "value"}  # fmt: skip
    return [
        "app.server='my_server:app'",
        "app.client='my_client:app'",
        f"app.run_config={json.dumps(run_config)}",
        "isolation.start_method=spawn",
    ], folder


def built_in(folder: Path) -> tuple[list[str], Path]:
    """Install a fedhpc that may be broken."""
    code = folder / "site" / "fedhpc"
    shutil.copytree(Path(fedhpc.__file__).parent, code)
    return [], code


@pytest.mark.parametrize("app", [app_folder, modules, built_in], ids=lambda app: app.__name__)
def test_a_queued_run_is_not_changed_by_what_happens_to_its_code(
    app: Callable[[Path], tuple[list[str], Path]], tmp_path: Path, submitter: Submitter
) -> None:
    folder = tmp_path / "work"
    write(folder, {"here.txt": "", "c.yaml": "name: frozen\n"})
    sets, code = app(folder)
    gate = tmp_path / "gate"
    queued = f"timeout 60 bash -c 'until test -e {gate}; do sleep 0.1; done'"
    submitted = submit(submitter, folder, [*sets, f"cluster.setup={json.dumps([queued])}"])
    assert submitted.returncode == 0, submitted.stdout
    paths = submitter.newest()
    for file in code.rglob("*.py"):
        file.write_text(BROKEN)
    gate.touch()
    eventually(lambda: run_state.read(paths)["state"] in run_state.ENDED, 90)
    run = Run(paths, 0, submitted.stdout)
    assert run.status["state"] == "finished", run.status["reason"] + run.logs()
    assert run.fits
    assert all(fit["ok"] for fit in run.fits)
    manifest = json.loads(paths.manifest.read_text())["snapshot"]
    assert str(code) in manifest["folders"].values()


def test_an_app_that_needs_what_git_ignores_is_refused_at_once(
    tmp_path: Path, submitter: Submitter
) -> None:
    folder = tmp_path / "work"
    write(folder, {"c.yaml": "name: frozen\n", ".gitignore": "helper.py\n"})
    sets, _ = app_folder(folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True, timeout=30)
    refused = submit(submitter, folder, sets)
    assert refused.returncode == 2
    assert "No module named 'counting.helper'" in refused.stdout
    assert "Hint: a snapshot has no files that git ignores" in refused.stdout
    assert list(submitter.runs_dir.iterdir()) == []


def submit(
    submitter: Submitter, folder: Path, sets: Sequence[str]
) -> "subprocess.CompletedProcess[str]":
    """Submit from a folder, with a fedhpc that lies in its ``site`` if there is one."""
    command = submitter.command([*SMALLER, *sets], config=folder / "c.yaml", follow=False)
    # Not a pipe: local jobs keep submit's output open.
    with (folder.parent / "output").open("w+") as output:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **ENV, "PYTHONPATH": str(folder / "site")},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
        output.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, output.read())
