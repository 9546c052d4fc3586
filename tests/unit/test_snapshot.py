"""What a snapshot copies: git's rules, links, limits, and which folders and packages."""

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedhpc
from fedhpc import config, snapshot
from fedhpc.cluster import entries
from fedhpc.config import Config
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.paths import RunPaths, create_run_folder

PYPROJECT = {"pyproject.toml": "[tool.flwr.app.components]\n"}
ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, "-c", "protocol.file.allow=always", *arguments]
    done = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=30, env=ENV
    )
    return done.stdout.strip()


def commit(folder: Path, files: dict[str, str]) -> None:
    write(folder, files)
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "x")


def of_app(folder: Path, runs_dir: Path) -> Config:
    raw = {"app": {"dir": str(folder)}, "cluster": {"runs_dir": str(runs_dir)}}
    return config.parse(raw, "test")


def take(resolved: Config) -> tuple[RunPaths, Config, dict[str, Any]]:
    paths = create_run_folder(Path(resolved.cluster.runs_dir), "a")
    return paths, *snapshot.take(resolved, paths)


def below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The app's folder."""
    folder = tmp_path / "app"
    write(folder, PYPROJECT)
    return folder


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"


# --- which files ----------------------------------------------------------------------------------


def test_of_a_repository_what_git_does_not_ignore_is_copied(folder: Path, runs_dir: Path) -> None:
    commit(folder, {"mine/tracked.py": "a", "mine/deleted.py": "b", "mine/changed.py": "old",
                    ".gitignore": "*.log\nout/\n", "name with\nlines é.txt": ""})  # fmt: skip
    write(folder, {"mine/changed.py": "new", "mine/untracked.py": "c", "x.log": "d", "out/y": "e"})
    write(folder, {"mine/__pycache__/a.pyc": "f", ".venv/pyvenv.cfg": "", ".venv/lib/big.py": ""})
    (folder / "mine" / "deleted.py").unlink()
    paths, _, _ = take(of_app(folder, runs_dir))
    assert below(paths.code_app) == {
        "pyproject.toml", ".gitignore", "name with\nlines é.txt",
        "mine/tracked.py", "mine/changed.py", "mine/untracked.py",
    }  # fmt: skip
    assert (paths.code_app / "mine" / "changed.py").read_text() == "new"


def test_of_a_folder_within_a_repository_that_folder_alone_is_copied(
    tmp_path: Path, runs_dir: Path
) -> None:
    commit(tmp_path, {"outer.py": "", ".gitignore": "/runs\n*.log\n", "sub/app/mine.py": "",
                      "sub/app/x.log": "", "sub/sibling.py": ""})  # fmt: skip
    write(tmp_path / "sub" / "app", PYPROJECT)
    paths, resolved, manifest = take(of_app(tmp_path / "sub" / "app", runs_dir))
    assert below(paths.code_app) == {"pyproject.toml", "mine.py"}
    assert resolved.app.dir == str(paths.code_app)
    assert manifest["folders"]["app"] == str(tmp_path / "sub" / "app")


def test_submodules_and_repositories_within_are_copied_too(
    tmp_path: Path, folder: Path, runs_dir: Path
) -> None:
    commit(tmp_path / "library", {"lib.py": "", ".gitignore": "*.log\n"})
    commit(folder, {"mine.py": ""})
    git(folder, "submodule", "add", "-q", str(tmp_path / "library"), "sub/lib")
    git(folder, "submodule", "add", "-q", str(tmp_path / "library"), "unused")
    git(folder, "submodule", "deinit", "-q", "-f", "unused")
    commit(folder / "nested", {"inner.py": "", ".gitignore": "*.log\n"})
    write(folder, {"sub/lib/x.log": "", "nested/x.log": ""})
    paths, _, _ = take(of_app(folder, runs_dir))
    found = below(paths.code_app)
    assert {"mine.py", "sub/lib/lib.py", "nested/inner.py"} <= found
    assert not [name for name in found if name.endswith(".log") or "/.git/" in name]


@pytest.mark.parametrize("why", ["no repository", "no git", "all of it ignored"])
def test_without_git_hidden_folders_and_environments_are_left_out(
    why: str, folder: Path, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "all of it ignored":
        commit(tmp_path, {".gitignore": "*\n"})
    if why == "no git":
        git(folder, "init", "-q")
        monkeypatch.setenv("PATH", "")
    write(folder, {"mine/a.py": "", "mine/data.txt": "", ".env": "", ".cache/b": ""})
    write(folder, {"mine/__pycache__/a.pyc": "", "env/pyvenv.cfg": "", "env/lib/c.py": ""})
    paths, _, _ = take(of_app(folder, runs_dir))
    assert below(paths.code_app) == {"pyproject.toml", "mine/a.py", "mine/data.txt", ".env"}


@pytest.mark.parametrize("in_git", [True, False])
@pytest.mark.parametrize("where", ["out/runs", ".", "other"])
def test_run_folders_are_never_copied(in_git: bool, where: str, folder: Path) -> None:
    write(folder, {"mine.py": "", "other/b.py": ""})
    if in_git:
        commit(folder, {})
    runs_dir = folder / where
    earlier, _, _ = take(of_app(folder, runs_dir))
    earlier.config.write_text("name: a\n")  # as submit does
    paths, _, _ = take(of_app(folder, runs_dir))
    # What lies in cluster.runs_dir is no code, unless that is the app's folder itself.
    others = set() if where == "other" else {"other/b.py"}
    assert below(paths.code_app) == {"pyproject.toml", "mine.py"} | others
    assert len({earlier.root, paths.root}) == 2


def test_a_runs_dir_around_the_app_does_not_matter(folder: Path, tmp_path: Path) -> None:
    write(folder, {"mine.py": ""})
    paths, _, _ = take(of_app(folder, tmp_path))
    assert below(paths.code_app) == {"pyproject.toml", "mine.py"}


def test_links_still_lead_to_what_they_did(folder: Path, runs_dir: Path, tmp_path: Path) -> None:
    write(tmp_path, {"outside/code.py": "outside", "outside/data/d.bin": ""})
    write(folder, {"pkg/real.py": "real", "ignored/data.bin": "", ".gitignore": "/ignored\n"})
    links = {
        "to_file": "pkg/real.py",
        "pkg/up": "../pkg/real.py",
        "to_folder": "pkg",
        "absolute": str(folder / "pkg" / "real.py"),
        "outside": "../outside/code.py",
        "outside_data": str(tmp_path / "outside" / "data"),
        "ignored_data": "ignored",
        "broken": "nowhere",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    git(folder, "init", "-q")
    paths, _, manifest = take(of_app(folder, runs_dir))
    copy = paths.code_app
    for name in ("to_file", "pkg/up", "to_folder", "absolute"):
        assert (copy / name).is_symlink()
        assert (copy / name).resolve().is_relative_to(copy)
    assert (copy / "to_folder" / "real.py").read_text() == "real"
    assert not (copy / "outside").is_symlink()
    assert (copy / "outside").read_text() == "outside"
    assert (copy / "outside_data").resolve() == tmp_path / "outside" / "data"
    assert (copy / "ignored_data").resolve() == folder / "ignored"
    assert (copy / "broken").is_symlink()
    assert manifest["links"] == {
        "app/outside_data": str(tmp_path / "outside" / "data"),
        "app/ignored_data": str(folder / "ignored"),
        "app/broken": str(folder / "nowhere"),
    }


def test_what_is_no_file_is_left_out(folder: Path, runs_dir: Path) -> None:
    os.mkfifo(folder / "pipe")
    paths, _, _ = take(of_app(folder, runs_dir))
    assert below(paths.code_app) == {"pyproject.toml"}


# --- limits ---------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_and_the_largest_files_named(
    folder: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {f"{size}.bin": "x" * size * 1000 for size in range(100, 1100, 100)})
    monkeypatch.setattr(snapshot, "_MAX_BYTES", 5_000_000)
    with pytest.raises(ConfigError) as refused:
        take(of_app(folder, runs_dir))
    (problem,) = refused.value.problems
    assert problem == (
        f"{folder}: expected at most 20000 files and 5 MB of code, found 6 MB; the largest:"
        " 1000.bin (1.0 MB), 900.bin (0.9 MB), 800.bin (0.8 MB), 700.bin (0.7 MB), 600.bin (0.6 MB)"
    )
    assert ".gitignore" in str(refused.value.hint)


def test_too_many_files_are_refused_before_all_of_them_are_looked_at(
    folder: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {f"{number}.py": "" for number in range(30)})
    monkeypatch.setattr(snapshot, "_MAX_FILES", 20)
    with pytest.raises(ConfigError, match="found more than 20 files"):
        take(of_app(folder, runs_dir))


def test_a_file_that_cannot_be_read_is_told(folder: Path, runs_dir: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    write(folder, {"secret.py": ""})
    (folder / "secret.py").chmod(0)
    with pytest.raises(PlatformError, match=r"could not copy .*secret\.py"):
        take(of_app(folder, runs_dir))


# --- which folders and packages -------------------------------------------------------------------


def test_fedhpc_itself_is_always_part_of_it(runs_dir: Path) -> None:
    paths, resolved, manifest = take(config.parse({"cluster": {"runs_dir": str(runs_dir)}}, "t"))
    package = Path(fedhpc.__file__).parent
    wanted = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    found = below(paths.code_packages / "fedhpc")
    assert wanted <= found
    assert "federation/grid.proto" in found
    assert manifest["folders"] == {"packages/fedhpc": str(package)}
    assert resolved.app.is_builtin


REFERENCES = {
    "its own modules": (["here_app"], True, []),
    "a package": (["here_package.sub.deep"], True, []),
    "an installed one": (["flwr.clientapp.mod"], False, []),
    "of the standard library": (["json.decoder", "sys"], False, []),
    "in editable mode": (["elsewhere_package.app"], False, ["elsewhere_package"]),
    "a module of the Python path": (["elsewhere_module"], False, ["elsewhere_module.py"]),
    "both": (["here_app", "elsewhere_module"], True, ["elsewhere_module.py"]),
    "one that is missing": (["nowhere_to_be_found"], False, []),
    "fedhpc's own": (["fedhpc.federation.client_app"], False, []),
}


@pytest.mark.parametrize("key", ["app", "mods", "preload"])
@pytest.mark.parametrize(("modules", "in_cwd", "packages"), REFERENCES.values(), ids=REFERENCES)
def test_what_the_config_names_is_copied_from_where_it_lies(
    key: str,
    modules: list[str],
    in_cwd: bool,
    packages: list[str],
    tmp_path: Path,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "here", {"here_app.py": "", "here_package/__init__.py": "", "helper.py": ""})
    write(tmp_path / "there", {"elsewhere_package/__init__.py": "", "elsewhere_package/d.txt": "",
                               "elsewhere_module.py": "", "not_named.py": ""})  # fmt: skip
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "there")
    importlib.invalidate_caches()
    references = [f"{module}:x" for module in modules]
    raw: dict[str, Any] = {"cluster": {"runs_dir": str(runs_dir)}}
    if key == "app":
        raw["app"] = {"server": references[0], "client": references[-1]}
    elif key == "mods":
        raw["app"] = {"mods": references}
    else:
        raw["isolation"] = {"preload": modules}
    paths, _, manifest = take(config.parse(raw, "test"))
    assert paths.code_cwd.exists() is in_cwd
    if in_cwd:
        assert below(paths.code_cwd) == {"here_app.py", "here_package/__init__.py", "helper.py"}
    copied = {path.name for path in paths.code_packages.iterdir()}
    assert copied == {"fedhpc", *packages}
    if "elsewhere_package" in packages:
        assert (paths.code_packages / "elsewhere_package" / "d.txt").exists()
    assert set(manifest["folders"]) >= ({"cwd"} if in_cwd else {"packages/fedhpc"})


def test_mods_of_an_apps_own_folder_need_no_second_copy(
    folder: Path, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {"own_mods.py": ""})
    monkeypatch.chdir(tmp_path)
    raw = {"app": {"dir": str(folder), "mods": ["own_mods:m"]},
           "cluster": {"runs_dir": str(runs_dir)}}  # fmt: skip
    paths, _, _ = take(config.parse(raw, "test"))
    assert (paths.code_app / "own_mods.py").exists()
    assert not paths.code_cwd.exists()


def test_a_folder_that_is_no_app_is_left_for_preflight_to_refuse(
    tmp_path: Path, runs_dir: Path
) -> None:
    paths, resolved, _ = take(of_app(tmp_path / "missing", runs_dir))
    assert resolved.app.dir == str(tmp_path / "missing")
    assert not paths.code_app.exists()


# --- what the manifest says -----------------------------------------------------------------------


def test_the_list_of_the_files_is_checked_with_sha256sum(folder: Path, runs_dir: Path) -> None:
    write(folder, {"mine.py": "a"})
    paths, _, manifest = take(of_app(folder, runs_dir))
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "--strict", paths.code_list.name],
        cwd=paths.code, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert manifest["sha256"] == hashlib.sha256(paths.code_list.read_bytes()).hexdigest()
    assert manifest["files"] == len(paths.code_list.read_text().splitlines())
    _, _, same = take(of_app(folder, runs_dir))
    assert same["sha256"] == manifest["sha256"]
    write(folder, {"mine.py": "b"})
    _, _, other = take(of_app(folder, runs_dir))
    assert other["sha256"] != manifest["sha256"]


def test_the_state_of_git_is_that_of_the_apps_folder(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(folder, {"mine.py": ""})
    write(tmp_path, {"elsewhere/x": ""})
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as in a hook
    runs_dir = folder / "runs"
    resolved = of_app(folder, runs_dir)
    state = {"folder": str(folder), "commit": git(folder, "rev-parse", "HEAD"), "dirty": False}
    assert snapshot.git_state(resolved) == state
    create_run_folder(runs_dir, "a").config.write_text("")
    assert snapshot.git_state(resolved) == state
    write(folder, {"more.py": ""})
    assert snapshot.git_state(resolved) == state | {"dirty": True}


def test_outside_of_a_repository_there_is_no_state(folder: Path, runs_dir: Path) -> None:
    assert snapshot.git_state(of_app(folder, runs_dir)) is None


# --- jobs that find their copy --------------------------------------------------------------------


def probe(paths: RunPaths, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program that does what every job does first."""
    program = paths.root.parent / "program.py"
    program.write_text(
        "import sys, fedhpc\nfrom fedhpc.cluster import entries\n"
        "entries.use_snapshot(sys.argv[1])\nprint(fedhpc.__file__, sys.argv[2])\n"
    )
    return subprocess.run(
        [sys.executable, *flags, str(program), str(paths.root), "word"],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def copied(runs_dir: Path) -> RunPaths:
    """A run folder with a copy of fedhpc."""
    raw = {"snapshot": True, "cluster": {"runs_dir": str(runs_dir)}}
    paths, resolved, _ = take(config.parse(raw, "test"))
    paths.config.write_text(config.dump(resolved))
    return paths


def test_a_job_started_otherwise_finds_the_copy_too(copied: RunPaths) -> None:
    done = probe(copied, "-u")
    assert done.stdout == f"{copied.code_packages / 'fedhpc' / '__init__.py'} word\n", done.stderr


def test_a_job_that_has_the_copy_is_not_started_again(copied: RunPaths) -> None:
    env = entries.snapshot_env(copied, None)
    assert env == {"PYTHONPATH": f"{copied.code_packages}:{copied.code_cwd}"}
    done = probe(copied, "-P", **env)
    assert str(copied.code) in done.stdout


def test_a_copy_that_is_gone_is_an_error_and_not_silently_replaced(copied: RunPaths) -> None:
    copied.code_packages.rename(copied.root / "moved")
    done = probe(copied)
    assert done.returncode == 1
    assert "PlatformError: snapshot: wanted fedhpc from the run's copy" in done.stderr


def test_without_a_snapshot_nothing_is_started_again(copied: RunPaths) -> None:
    copied.config.write_text("name: a\n")
    assert probe(copied).stdout == f"{fedhpc.__file__} word\n"
