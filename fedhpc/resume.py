"""Go on with a run that has ended: ``python -m fedhpc.submit --resume RUN_DIR``."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fedhpc import config, files, inspection, run_state, words
from fedhpc.config import Config
from fedhpc.errors import ConfigError
from fedhpc.paths import RunPaths, latest_attempt

# What may change: how and where a run is done, never what its result is made of.
_FREE = ("cluster.", "checkpoint.", "isolation.")
_NOT_FREE = ("isolation.device", "isolation.threads_per_fit")
_ROUNDS = "federation.num_rounds"
_OWN_ROUNDS = "app.run_config."  # of an app, which reads their number there


def check(paths: RunPaths, new: Config) -> dict[str, list[Any]]:
    """Return what is different from the run's config so far: key, old value, new value.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    new : Config
        What it shall go on with.

    Raises
    ------
    ConfigError
        If the run has not ended, has nothing left to do, or would become another experiment.
    """
    old = config.load(paths.config)
    standing = inspection.inspect(paths)
    there = [role for role, job in standing.jobs.items() if not job.ended]
    if latest_attempt(paths) and not standing.ended:
        _refuse(paths, f"expected one that has ended, found it {standing.status['state']}")
    if there:
        _refuse(paths, f"expected all its jobs to be gone, found {words.roles(there)}")
    changes = {key: [was, now] for key, was, now in _differences(old, new)}
    problems = [
        f"{key}: a run goes on with the same value, expected {was!r}, found {now!r}"
        for key, (was, now) in changes.items()
        if not _may_change(key)
    ]
    done = int(standing.status.get("round", 0))
    rounds = new.federation.num_rounds
    if rounds < done and old.app.is_builtin:
        problems.append(
            f"{_ROUNDS}: expected {done} or more, the rounds already begun; found {rounds}"
        )
    if problems:
        raise ConfigError(str(paths.config), problems, "submit it as another run")
    grows = any(key.startswith(_OWN_ROUNDS) for key in changes)
    grows |= old.app.is_builtin and rounds > done
    if standing.status["state"] == "finished" and not grows:
        _refuse(paths, "it has finished", f"to add rounds: --set {_ROUNDS}={2 * rounds}")
    return changes


def prepare(
    paths: RunPaths, new: Config, changes: dict[str, list[Any]], command: Sequence[str]
) -> None:
    """Make the run folder ready for another attempt.

    Raises
    ------
    PlatformError
        If the disk refuses it.
    """
    manifest = files.read_json(paths.manifest) or {}
    entry = {"utc": round(time.time()), "command": list(command), "changes": changes}
    manifest["resumed"] = [*manifest.get("resumed", []), entry]
    files.write_atomic(paths.config, config.dump(new))
    files.write_json(paths.manifest, manifest)
    processes = [paths.process("server"), *paths.jobs.glob("client-*.json")]
    for path in (paths.rendezvous, paths.server_job, paths.submission, *processes):  # all are gone
        path.unlink(missing_ok=True)
    run_state.write(paths, "pending", "resumed")


def _may_change(key: str) -> bool:
    if key == _ROUNDS or (key.startswith(_OWN_ROUNDS) and "rounds" in key):
        return True
    return key.startswith(_FREE) and key not in _NOT_FREE


def _differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{prefix}{key}"
        flat |= _flat(item, f"{path}.") if isinstance(item, dict) and item else {path: item}
    return flat


def _refuse(paths: RunPaths, found: str, hint: str = "") -> None:
    raise ConfigError(
        "command line",
        [f"--resume {paths.root}: {found}"],
        hint or f"to see how it stands: fedhpc status {paths.root}",
    )
