"""Which examples each client holds, by the partitioners of flwr-datasets."""

import inspect
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.errors import ConfigError, PlatformError
from fedhpc.files import write_atomic
from fedhpc.learning import lookup

_SECTION = "data.partitioner"


def make(
    labels: np.ndarray, num_partitions: int, name: str, params: Mapping[str, Any], seed: int
) -> list[np.ndarray]:
    """Divide examples between clients.

    The rows are shuffled with the seed first: some partitioners, such as iid, give each client
    consecutive rows. The result depends on the arguments and the installed versions alone.

    Parameters
    ----------
    labels : ndarray
        int64, (N,): the class of each example.
    num_partitions : int
        Number of clients, 1 to N.
    name : str
        A partitioner of flwr-datasets by its class or short name in any case:
        ``DirichletPartitioner``, ``dirichlet``, ``inner_dirichlet``.
    params : mapping
        Its parameters by their own names. ``num_partitions``, ``partition_by`` (the labels) and
        ``seed`` are filled in where it takes them and they are not given here.
    seed : int
        0 or more.

    Returns
    -------
    list of ndarray
        int64 each, none empty: the rows of client k, in the partitioner's order.

    Raises
    ------
    ConfigError
        For an unknown name or parameter, with the nearest and all valid ones; for what the
        partitioner refuses; for partitions that are too few, too many or empty.
    """
    if len(labels) < num_partitions:
        raise ConfigError(
            _SECTION,
            [
                f"num_partitions: expected at most one client an example ({len(labels)}),"
                f" found {num_partitions} clients"
            ],
        )
    partitioner = _build(name, params, num_partitions, seed)
    # The prefix keeps this permutation apart from what a partitioner draws from the same seed.
    shuffled = np.random.default_rng([1, seed]).permutation(len(labels))
    try:
        partitions = [shuffled[rows] for rows in _rows(partitioner, np.asarray(labels)[shuffled])]
    except Exception as error:  # whatever a partitioner of the library objects to
        raise ConfigError(_SECTION, [f"params: {name}: {error}"]) from error
    _check_partitions(partitions, num_partitions, name)
    return partitions


def check(name: str, params: Mapping[str, Any], num_partitions: int, seed: int = 0) -> None:
    """Check a partitioner's name and parameters without any data.

    Parameters
    ----------
    name, params, num_partitions, seed
        As for `make`, which checks the rest with the data.

    Raises
    ------
    ConfigError
        For an unknown name, an unknown or missing parameter, or a value that its class refuses.
    """
    _build(name, params, num_partitions, seed)


def save(path: Path, partitions: Sequence[np.ndarray]) -> None:
    """Write partitions to one uncompressed .npz file, atomically.

    Raises
    ------
    PlatformError
        If the disk refuses it.
    """
    offsets = np.cumsum([0, *map(len, partitions)], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, indices=np.concatenate(partitions).astype(np.int64), offsets=offsets)
    write_atomic(path, buffer.getvalue())


def load(path: Path) -> list[np.ndarray]:
    """Read what `save` wrote.

    Raises
    ------
    PlatformError
        If the file is missing or damaged.
    """
    indices, offsets = _read(path)
    return np.split(indices, offsets[1:-1])


def load_one(path: Path, client_id: int) -> np.ndarray:
    """Read one client's rows, int64.

    Raises
    ------
    PlatformError
        If the file is missing or damaged.
    ConfigError
        If there is no such client.
    """
    indices, offsets = _read(path)
    clients = len(offsets) - 1
    if not 0 <= client_id < clients:
        raise ConfigError(
            _SECTION, [f"client_id: expected 0 to {clients - 1} as in {path}, found {client_id}"]
        )
    return indices[offsets[client_id] : offsets[client_id + 1]]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["indices"], file["offsets"]
    except Exception as error:  # numpy and zipfile raise half a dozen kinds for a damaged file
        raise PlatformError(
            f"could not read the partitions {path}: {error}", "submit the run again"
        ) from error


def _partitioners() -> dict[str, type[Any]]:
    """Return the classes of flwr-datasets by short name: ``inner_dirichlet``."""
    from flwr_datasets import partitioner

    classes = [
        value
        for value in vars(partitioner).values()
        # The vertical ones divide an example's columns; here a client holds whole examples.
        if inspect.isclass(value)
        and not inspect.isabstract(value)
        and issubclass(value, partitioner.Partitioner)
        and not value.__name__.startswith("Vertical")
    ]
    stems = {value.__name__.removesuffix("Partitioner"): value for value in classes}
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", stem).lower(): stems[stem] for stem in stems}


def _build(name: str, params: Mapping[str, Any], num_partitions: int, seed: int) -> Any:
    known = _partitioners()
    spellings = {short.replace("_", ""): short for short in known}
    plain = re.sub(r"[_-]", "", name.lower()).removesuffix("partitioner")
    short = spellings.get(plain, name)
    partitioner = lookup.find(_SECTION, "a partitioner of flwr-datasets", short, known)

    accepted = inspect.signature(partitioner).parameters
    filled = {"num_partitions": num_partitions, "partition_by": "label", "seed": seed}
    arguments = {key: value for key, value in filled.items() if key in accepted} | dict(params)
    lookup.check_parameters(_SECTION, short, partitioner, arguments)
    for key, value in params.items():
        # A config has lists only, and some parameters must be arrays.
        if isinstance(value, list) and "ndarray" in str(accepted[key].annotation):
            arguments[key] = np.asarray(value)
    try:
        return partitioner(**arguments)
    except Exception as error:  # whatever a class of the library objects to
        raise ConfigError(_SECTION, [f"params: {short}: {error}"]) from error


def _rows(partitioner: Any, labels: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of each partition."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    return [
        np.asarray(partitioner.load_partition(client_id)[:]["row"], dtype=np.int64)
        for client_id in range(partitioner.num_partitions)
    ]


def _check_partitions(partitions: list[np.ndarray], expected: int, name: str) -> None:
    if len(partitions) != expected:
        raise ConfigError(
            _SECTION,
            [
                f"params: expected a partition for each of {expected} clients,"
                f" found {len(partitions)} from {name}"
            ],
        )
    empty = [client_id for client_id, rows in enumerate(partitions) if len(rows) == 0]
    if empty:
        listed = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ConfigError(
            _SECTION,
            [
                f"params: {name} leaves {len(empty)} of {expected} clients"
                f" without examples: {listed}"
            ],
            "use fewer clients or other parameters",
        )
