"""The second stage of validation: ``python -m fedhpc.preflight RUN_DIR``, a child of submit.

It imports torch, flwr and the partitioners, checks the config against what is installed, and
prepares what all jobs of the run share: the packed data set and the partitions. What it finds goes
to standard output as one JSON line. Of a config that was found good before, submit itself prepares
the data (`is_remembered`).
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from fedhpc import config, files
from fedhpc.errors import ConfigError, FedHPCError
from fedhpc.learning import data, partitions
from fedhpc.paths import RunPaths

# What a finding depends on besides the config.
_LIBRARIES = ("torch", "torchvision", "flwr", "flwr-datasets", "scikit-learn", "numpy")


class Findings:
    """Problems of several independent checks."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.hints: list[str] = []
        self.platform: FedHPCError | None = None

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note the error that a check raises, and go on."""
        try:
            yield
        except ConfigError as error:
            self.problems += [f"{error.source}.{problem}" for problem in error.problems]
            if error.hint:
                self.hints.append(error.hint)
        except FedHPCError as error:
            self.platform = self.platform or error

    def to_json(self) -> dict[str, Any]:
        """Return what submit reads."""
        platform = self.platform
        return {
            "problems": self.problems,
            "hint": "; ".join(dict.fromkeys(self.hints)) or None,
            "platform": platform
            and {
                "kind": type(platform).__name__,
                "message": platform.message,
                "hint": platform.hint,
            },
        }


def check(paths: RunPaths) -> Findings:
    """Check a run folder's config and prepare its data."""
    findings = Findings()
    resolved = config.load(paths.config)
    if is_remembered(resolved, paths):
        return findings
    from fedhpc.federation import apps

    with findings.collect():
        spec = apps.locate(resolved, paths)
        for load in (apps.load_server, apps.load_client):
            _load_quietly(findings, load, spec)
    if resolved.app.is_builtin:
        _check_builtin(resolved, paths, findings)
    return findings


def _load_quietly(findings: Findings, load: Callable[[Any], Any], spec: Any) -> None:
    from fedhpc.federation import apps

    with findings.collect():
        try:
            load(spec)
        except FedHPCError:
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # the app's own module raised while it was imported
            part = "server" if load is apps.load_server else "client"
            raise ConfigError(
                "app", [f"{part}: its import raised {type(error).__name__}: {error}"]
            ) from error


def _check_builtin(resolved: config.Config, paths: RunPaths, findings: Findings) -> None:
    from fedhpc.federation import groups, strategies
    from fedhpc.learning import models, training

    federation, spec = resolved.federation, resolved.data
    with findings.collect():
        strategy = strategies.build(resolved.strategy, federation)
        groups.are_wanted(federation, strategy)
    with findings.collect():
        optimizer = resolved.training.optimizer
        training.make_optimizer([_parameter()], optimizer.name, optimizer.params)
    packed = None
    with contextlib.suppress(FedHPCError):
        packed = _pack(resolved, download=False)
    if packed is None:
        with findings.collect():
            partitions.check(spec.partitioner.name, spec.partitioner.params, federation.num_clients)
        if findings.problems:
            return  # before a download
    with findings.collect():
        packed = packed or _pack(resolved, download=True)
        files.write_json(paths.data, {"packed": str(packed)})
        dataset = data.open_dataset(packed)
        with findings.collect():
            channels, height, width = dataset.train.images.shape[1:]
            models.build(
                resolved.model.name,
                resolved.model.params,
                (channels, height, width),
                len(dataset.classes),
            )
        shares = _partition(resolved, packed, dataset)
        if federation.clients_per_evaluation:
            _check_validation(shares)
        partitions.save(paths.partitions, shares)
        if not findings.problems:
            _remember(resolved, packed)


def is_remembered(resolved: config.Config, paths: RunPaths) -> bool:
    """Prepare the data of a run whose like was checked before, if it was; else it is to be checked.

    For submit itself: a child, torch and flwr take seconds to start, and the findings would be the
    same.
    """
    if not resolved.app.is_builtin or resolved.app.mods:  # code that may have changed
        return False
    with contextlib.suppress(Exception):  # the check itself says what is wrong
        packed = data.packed_folder(*_place_of_data(resolved))
        if _note_of_check(resolved, packed).exists():
            shares = partitions.load(_cached_partitions(resolved, packed))
            files.write_json(paths.data, {"packed": str(packed)})
            partitions.save(paths.partitions, shares)
            return True
    return False


def _remember(resolved: config.Config, packed: Path) -> None:
    with contextlib.suppress(OSError):  # a data folder of somebody else
        _note_of_check(resolved, packed).touch()


def _note_of_check(resolved: config.Config, packed: Path) -> Path:
    """Return the file that says that a config like this one was found good."""
    sections = {"federation", "model", "training", "strategy", "data", "app", "seed"}
    source = Path(__file__).parent
    rounds = {"federation": {"num_rounds"}}  # no library has a say in how many there are
    what = [
        resolved.model_dump(mode="json", include=sections, exclude=rounds),
        [metadata.version(name) for name in _LIBRARIES],
        sys.version,
        sorted((str(p), p.stat().st_mtime_ns) for p in source.rglob("*.py")),
    ]
    return packed / f"checked-{_digest(what)}"


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _pack(resolved: config.Config, *, download: bool) -> Path:
    return data.prepare(*_place_of_data(resolved), download=download)


def _place_of_data(resolved: config.Config) -> tuple[str, Path, Path | None]:
    spec = resolved.data
    return spec.name, Path(spec.root), Path(spec.source) if spec.source else None


def _partition(resolved: config.Config, packed: Path, dataset: data.Dataset) -> list[Any]:
    """Return the partitions, from the last run that had the same: flwr-datasets imports slowly."""
    cached = _cached_partitions(resolved, packed)
    with contextlib.suppress(FedHPCError, OSError, ValueError):
        return partitions.load(cached)
    partitioner, clients = resolved.data.partitioner, resolved.federation.num_clients
    shares = partitions.make(
        dataset.train.labels, clients, partitioner.name, partitioner.params, resolved.seed
    )
    with contextlib.suppress(FedHPCError, OSError):  # a data folder of somebody else
        partitions.save(cached, shares)
    return shares


def _cached_partitions(resolved: config.Config, packed: Path) -> Path:
    partitioner, clients = resolved.data.partitioner, resolved.federation.num_clients
    version = metadata.version("flwr-datasets")
    what = [partitioner.name, partitioner.params, clients, resolved.seed, version]
    return packed / f"partitions-{_digest(what)}.npz"


def _check_validation(shares: list[Any]) -> None:
    small = [client for client, indices in enumerate(shares) if len(indices) < 2]
    if small:
        raise ConfigError(
            "federation",
            [
                f"clients_per_evaluation: needs 2 examples or more of each client,"
                f" {len(small)} have fewer, e.g. client {small[0]}"
            ],
        )


def _parameter() -> Any:
    import torch

    return torch.nn.Parameter(torch.zeros(1))


def main() -> None:
    """Check the run folder that is the first argument."""
    # What apps print goes to standard error; standard output is for the findings alone.
    answer = os.dup(1)
    os.dup2(2, 1)
    findings = check(RunPaths(Path(sys.argv[1])))
    with os.fdopen(answer, "w") as file:
        json.dump(findings.to_json(), file)


if __name__ == "__main__":
    main()
