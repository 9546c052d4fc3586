"""Copy the code of a run's app into its folder, so that what is queued does not change any more.

What is copied: the app's folder (``app.dir``); the folder that submit was called in, if modules
that the config names lie there; packages that it names from elsewhere, unless they are installed;
and fedhpc itself. Of a folder in a git repository: the files that git does not ignore.
"""

import hashlib
import heapq
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc import files
from fedhpc.config import Config
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.paths import RunPaths, is_run_folder

_MAX_BYTES = 500_000_000
_MAX_FILES = 20_000
_SHOWN = 5
_GIT_TIMEOUT_S = 60.0
_STATE_TIMEOUT_S = 10.0


def take(config: Config, paths: RunPaths) -> tuple[Config, dict[str, Any]]:
    """Copy the code of an app into the run folder.

    Parameters
    ----------
    config : Config
        Of the run, with absolute paths.
    paths : RunPaths
        Of the run.

    Returns
    -------
    config : Config
        The same, with the copy as ``app.dir``.
    manifest : dict
        For manifest.json: ``folders`` (what each folder of the copy is a copy of), ``files``,
        ``bytes``, ``links`` (links that lead out of the copy) and ``sha256``, the checksum of the
        copy's SHA256SUMS.

    Raises
    ------
    ConfigError
        If it is too much.
    PlatformError
        If a file could not be read or written.
    """
    copy = _Copy(paths)
    folder = _app_dir(config)
    if folder is not None:
        copy.add_folder(folder, paths.code_app)
        app = config.app.model_copy(update={"dir": str(paths.code_app)})
        config = config.model_copy(update={"app": app})
    in_cwd, elsewhere = _modules(config, folder)
    if in_cwd:
        copy.add_folder(Path.cwd(), paths.code_cwd)
    for package in (Path(fedhpc.__file__).parent, *elsewhere):
        copy.add_package(package)
    return config, copy.finish()


def git_state(config: Config) -> dict[str, Any] | None:
    """Return ``folder``, ``commit`` and ``dirty`` of the app's code; None if git knows nothing."""
    folder = _app_dir(config)
    if folder is None:
        folder = Path(fedhpc.__file__).parent if config.app.is_builtin else Path.cwd()
    runs = _below(Path(config.cluster.runs_dir), folder)
    exclude = [f":(exclude){runs}"] if runs else []  # a run does not make its own code dirty
    try:
        commit = _git(folder, "rev-parse", "HEAD", timeout_s=_STATE_TIMEOUT_S)
        changes = commit and _git(
            folder, "status", "--porcelain", "--", ".", *exclude, timeout_s=_STATE_TIMEOUT_S
        )
    except PlatformError:  # a remark in the manifest is worth no failure
        return None
    if commit is None or changes is None:
        return None
    return {
        "folder": str(folder),
        "commit": os.fsdecode(commit).strip(),
        "dirty": bool(changes),
    }


def _app_dir(config: Config) -> Path | None:
    """Return the app's folder, if there is one; what it should hold is preflight's to say."""
    if config.app.dir is None or not (Path(config.app.dir) / "pyproject.toml").is_file():
        return None
    return Path(config.app.dir).resolve()


# --- which modules --------------------------------------------------------------------------------


def _modules(config: Config, folder: Path | None) -> tuple[bool, list[Path]]:
    """Return whether modules come from the working directory, and packages from elsewhere."""
    app = config.app
    names = [*filter(None, (app.server, app.client)), *app.mods, *config.isolation.preload]
    in_cwd, elsewhere = False, []
    for name in dict.fromkeys(name.partition(":")[0].partition(".")[0] for name in names):
        here = _location(name, folder)
        if name == "fedhpc" or here is None or here.parent == folder or _is_installed(here):
            continue
        if here.parent == Path.cwd():
            in_cwd = True
        else:
            elsewhere.append(here)
    return in_cwd, elsewhere


def _location(name: str, folder: Path | None) -> Path | None:
    """Return the package's folder or the module's file, as the jobs would find it."""
    first = [str(path) for path in (folder, Path.cwd()) if path is not None]
    spec: ModuleSpec | None = PathFinder.find_spec(name, [*first, *sys.path])
    if spec is None:
        try:
            spec = importlib.util.find_spec(name)  # packages in editable mode
        except (ImportError, ValueError):
            return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.has_location and spec.origin else None


def _is_installed(location: Path) -> bool:
    """Return whether a module belongs to the environment, and not to the app."""
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    return location.is_relative_to(library) or not {"site-packages", "dist-packages"}.isdisjoint(
        location.parts
    )


# --- which files ----------------------------------------------------------------------------------


def _files(folder: Path, skip: Sequence[Path]) -> Iterator[str]:
    """Yield the files and links of a folder, relative to it; what git ignores is left out."""
    found = _git(folder, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if not found:  # no repository, or the whole folder is ignored
        yield from _files_without_git(folder, skip)
        return
    names = sorted({os.fsdecode(name).rstrip("/") for name in found.split(b"\0") if name})
    places = [Path(name) for name in names]
    environments = {place.parent for place in places if place.name == "pyvenv.cfg"}
    for name, place in zip(names, places, strict=True):
        path = folder / place
        if "__pycache__" in place.parts or not environments.isdisjoint(place.parents):
            continue
        if path in skip or any(parent in skip for parent in path.parents):
            continue
        if not path.is_dir() or path.is_symlink():
            yield name
        elif (path / ".git").exists():  # a submodule, or a repository within
            yield from (f"{name}/{below}" for below in _files(path, skip))


def _files_without_git(folder: Path, skip: Sequence[Path]) -> Iterator[str]:
    """Yield the files and links of a folder, without hidden folders and environments."""
    for current, folders, names in os.walk(folder):
        here = Path(current)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(
            name
            for name in folders
            if name not in links
            and not name.startswith(".")
            and name != "__pycache__"
            and here / name not in skip
            and not (here / name / "pyvenv.cfg").exists()
        )
        for name in sorted([*names, *links]):
            yield str((here / name).relative_to(folder))


def _git(folder: Path, *arguments: str, timeout_s: float = _GIT_TIMEOUT_S) -> bytes | None:
    """Return what git prints about a folder; None if it is in no repository.

    Raises
    ------
    PlatformError
        If git does not come to an end.
    """
    # A hook, in which git calls us, names its own repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, env=env, timeout=timeout_s)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            f"'{' '.join(command)}' gave no answer within {timeout_s:.0f} s",
            "is the disk slow? try again, or without a snapshot",
        ) from error
    return done.stdout if done.returncode == 0 else None


def _below(path: Path, folder: Path) -> str:
    """Return a path relative to a folder that it is truly below of; "" if it is not."""
    path = path.resolve()
    return str(path.relative_to(folder)) if folder in path.parents else ""


# --- the copy -------------------------------------------------------------------------------------


class _Copy:
    """The copy in a run folder, as it grows."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._bytes = 0
        self._folders: dict[str, str] = {}
        self._links: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def add_folder(self, source: Path, target: Path) -> None:
        """Copy what belongs to the code in a folder, and never a run folder."""
        runs_dir = self._paths.root.parent
        skip = [self._paths.root]
        if source in runs_dir.parents:
            skip = [runs_dir]
        elif source == runs_dir:
            skip += [path for path in runs_dir.iterdir() if is_run_folder(path)]
        self._add(source, target, _files(source, skip))

    def add_package(self, source: Path) -> None:
        """Copy a package or a module, with all that lies in it."""
        if source.is_dir():
            target = self._paths.code_packages / source.name
            self._add(source, target, _files_without_git(source, []))
        else:
            self._add(source.parent, self._paths.code_packages, [source.name])

    def finish(self) -> dict[str, Any]:
        """Write the list of the files and return what the manifest says of the copy."""
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
        text = os.fsencode("".join(lines))
        files.write_atomic(self._paths.code_list, text)
        return {
            "folders": self._folders,
            "files": len(self._digests),
            "bytes": self._bytes,
            "links": self._links,
            "sha256": hashlib.sha256(text).hexdigest(),
        }

    def _add(self, source: Path, target: Path, names: Iterable[str]) -> None:
        sizes = self._within_limits(source, names)
        known = {str(parent) for name in sizes for parent in (Path(name), *Path(name).parents)}
        for name in sizes:
            try:
                self._copy_one(source, target, name, known)
            except FileNotFoundError:
                continue  # an editor's, gone again
            except OSError as error:
                raise PlatformError(
                    f"snapshot: could not copy {source / name} to {target}: {error.strerror}",
                    "check its permissions, and space and quota of cluster.runs_dir",
                ) from error
        self._folders[str(target.relative_to(self._paths.code))] = str(source)

    def _within_limits(self, source: Path, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes of what exists."""
        sizes: dict[str, int] = {}
        for name in names:
            size = _size(source / name)
            if size is not None:
                sizes[name] = size
            if len(sizes) + len(self._digests) > _MAX_FILES:
                raise _too_much(source, f"more than {_MAX_FILES} files", sizes)
        self._bytes += sum(sizes.values())
        if self._bytes > _MAX_BYTES:
            raise _too_much(source, f"{self._bytes / 1e6:.0f} MB", sizes)
        return sizes

    def _copy_one(self, source: Path, target: Path, name: str, known: set[str]) -> None:
        here, there = source / name, target / name
        listed = str(there.relative_to(self._paths.code))
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():
            place = Path(os.path.normpath(here.parent / here.readlink()))
            if place.is_relative_to(source) and str(place.relative_to(source)) in known:
                there.symlink_to(os.path.relpath(place, here.parent))
                return
            if not here.is_file():  # data, or broken: as it was, from wherever it is seen
                there.symlink_to(place)
                self._links[listed] = str(place)
                return
        shutil.copy2(here, there)
        self._digests[listed] = files.sha256(there)


def _size(path: Path) -> int | None:
    """Return what copying takes, in bytes; None if there is nothing to copy."""
    try:
        found = path.stat()
    except OSError:
        return 0 if path.is_symlink() else None
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    return 0 if path.is_symlink() else None


def _too_much(folder: Path, found: str, sizes: dict[str, int]) -> ConfigError:
    largest = heapq.nlargest(_SHOWN, sizes, key=sizes.__getitem__)
    shown = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
    return ConfigError(
        "snapshot",
        [
            f"{folder}: expected at most {_MAX_FILES} files and {_MAX_BYTES / 1e6:.0f} MB of code,"
            f" found {found}; the largest: {shown}"
        ],
        "let .gitignore name what is no code, or submit from the folder of the app's code alone",
    )
