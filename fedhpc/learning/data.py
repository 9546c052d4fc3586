"""Data sets, packed once into arrays that every process maps into memory instead of decoding."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fedhpc.errors import ConfigError, PlatformError
from fedhpc.learning import lookup
from fedhpc.learning.split import Split

FORMAT = 2  # of the packed folder; a new number packs again instead of misreading an old folder
_SPLITS = ("train", "test")
_TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
NAMES = ("digits", *_TORCHVISION, "image_folder")

_Shape = tuple[int, ...]
_Open = Callable[[str], IO[bytes]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A packed data set.

    Attributes
    ----------
    train, test : Split
        The examples that clients share, and those of the server.
    classes : tuple of str
        Names in label order.
    mean, std : tuple of float
        One a channel, of the training images, in raw units (0 to 255); std is never 0.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def prepare(name: str, root: Path, source: Path | None = None, *, download: bool = True) -> Path:
    """Pack a data set once; a second call returns the packed folder at once.

    Several processes, on several nodes, may call it at the same time: a folder appears whole.

    Parameters
    ----------
    name : str
        ``digits`` (comes with scikit-learn; every fifth of each class is in the test split),
        ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100`` (by torchvision) or
        ``image_folder``.
    root : Path
        Where downloads and packed folders lie, seen by every node.
    source : Path, optional
        image_folder: a folder or .zip with images, all of one size and mode RGB or L, directly in
        ``train/<class>/`` and ``test/<class>/``; hidden files are left out. It is packed again
        when its path, or the size or time of change of the zip or of one of these folders,
        changes. torchvision's: a folder that its files are already in; nothing is downloaded.
    download : bool, default True
        Whether torchvision may download what is missing.

    Returns
    -------
    Path
        The packed folder, for `open_dataset`.

    Raises
    ------
    ConfigError
        For an unknown name, a missing source, or images that do not fit together.
    PlatformError
        If a data set is missing and could not be downloaded, or the disk refuses it.
    """
    folder = packed_folder(name, root, source)
    if folder.is_dir():
        return folder
    with _lock(folder), _moved_into_place(folder) as beside:
        if beside is not None:
            classes = _write_splits(name, beside, root, source, download)
            _write_meta(beside, name, classes)
    return folder


def packed_folder(name: str, root: Path, source: Path | None = None) -> Path:
    """Return the folder that `prepare` returns, which need not be there; see there."""
    _check_request(name, source)
    return root / "packed" / f"{name}-{_fingerprint(name, source)}"


def open_dataset(folder: Path) -> Dataset:
    """Map a packed data set into memory.

    Parameters
    ----------
    folder : Path
        What `prepare` or `stage` returned.

    Raises
    ------
    PlatformError
        If it is missing or damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        train, test = (_open_split(folder, split) for split in _SPLITS)
        return Dataset(train, test, tuple(meta["classes"]), tuple(meta["mean"]), tuple(meta["std"]))
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise PlatformError(
            f"could not open the packed data set {folder}: {error}",
            "remove this folder and submit again, or pack it with python -m fedhpc.data",
        ) from error


def stage(folder: Path, stage_to: Path) -> Path:
    """Copy a packed data set to a node's own disk, once however many array tasks ask for it.

    Parameters
    ----------
    folder : Path
        What `prepare` returned.
    stage_to : Path
        A folder of this node; made if missing.

    Returns
    -------
    Path
        The copy, for `open_dataset`.

    Raises
    ------
    PlatformError
        If there is nothing to copy, or the disk refuses it.
    """
    if not folder.is_dir():
        raise PlatformError(
            f"could not stage the packed data set {folder}: no such folder",
            "pack it with python -m fedhpc.data on a node that sees this path",
        )
    copy = stage_to / folder.name
    if copy.is_dir():
        return copy
    with _lock(copy), _moved_into_place(copy) as beside:
        if beside is not None:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
    return copy


# --- whole folders, once -------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time make ``folder``."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise PlatformError(
            f"could not write {path}: {error.strerror}", "check space and permissions of the disk"
        ) from error
    with file:
        # Some parallel file systems refuse locks. The lock only saves work done twice: a folder
        # is whole in any case, because it is moved into place.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _moved_into_place(folder: Path) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes ``folder``, or None if another process made it."""
    if folder.is_dir():
        yield None
        return
    beside = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        beside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, with the same content
            raise PlatformError(
                f"could not write {folder}: {error}", "check space and permissions of the disk"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- what to pack --------------------------------------------------------------------------------


def _check_request(name: str, source: Path | None) -> None:
    lookup.find("data", "a data set", name, dict.fromkeys(NAMES))
    if name == "digits" and source is not None:
        raise ConfigError("data", [f"source: digits come with scikit-learn, found {source}"])
    if name == "image_folder" and source is None:
        raise ConfigError("data", ["source: image_folder needs a folder or a zip file, found none"])
    if source is not None and not source.exists():
        raise ConfigError("data", [f"source: no such file or folder: {source}"])


def _fingerprint(name: str, source: Path | None) -> str:
    facts: list[object] = [FORMAT, name]
    if source is not None:
        facts.append(str(source.absolute()))
    if source is not None and name == "image_folder":
        folders = [folder for split in _SPLITS for folder in (source / split).glob("*/")]
        for path in [source, *sorted(folders)]:
            status = path.stat()
            facts.append([path.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _write_splits(
    name: str, folder: Path, root: Path, source: Path | None, download: bool
) -> tuple[str, ...]:
    if name == "digits":
        return _write_digits(folder)
    if name == "image_folder" and source is not None:
        return _write_image_folder(folder, source)
    return _write_torchvision(name, folder, root, source, download)


def _write_meta(folder: Path, name: str, classes: tuple[str, ...]) -> None:
    images = _open_split(folder, "train").images
    mean, std = _moments(images)
    meta = {"format": FORMAT, "name": name, "classes": classes, "mean": mean, "std": std}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, from exact counts of each value."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    block = max(1, 2**22 // images[0].size)  # bounds the memory that counting takes
    for start in range(0, len(images), block):
        for channel, total in enumerate(counts):
            total += np.bincount(images[start : start + block, channel].ravel(), minlength=256)
    values = np.arange(256)
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


def _save_split(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    np.save(folder / f"{split}_images.npy", np.ascontiguousarray(images, dtype=np.uint8))
    np.save(folder / f"{split}_labels.npy", labels.astype(np.int64))


def _open_split(folder: Path, split: str) -> Split:
    images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    labels = np.load(folder / f"{split}_labels.npy")  # small, and inherited by children
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(f"{split} has images {images.shape} and labels {labels.shape}")
    return Split(images, labels)


# --- where the examples come from ----------------------------------------------------------------


def _write_digits(folder: Path) -> tuple[str, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        # Every fifth of a class: the file is ordered by writer, and both splits have all of them.
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        _save_split(folder, split, digits.images[chosen][:, None], labels[chosen])
    return tuple(str(label) for label in digits.target_names)


def _write_torchvision(
    name: str, folder: Path, root: Path, source: Path | None, download: bool
) -> tuple[str, ...]:
    from torchvision import datasets

    download = download and source is None
    place = source or root
    kind = getattr(datasets, _TORCHVISION[name])
    try:
        halves = [kind(str(place), train=split == "train", download=download) for split in _SPLITS]
    except Exception as error:  # of the network, of archives, of half a dozen file formats
        deed = "download" if download else "find"
        where = f"into {root}" if download else f"in {place}"
        raise PlatformError(
            f"could not {deed} the data set {name} {where}: {error}",
            f"on a machine with network, run: python -m fedhpc.data {name} --root {root}"
            + (" (and leave data.source out)" if source is not None else ""),
        ) from error
    for split, half in zip(_SPLITS, halves, strict=True):
        images = np.asarray(half.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        _save_split(folder, split, images, np.asarray(half.targets))
    return tuple(halves[0].classes)


def _write_image_folder(folder: Path, source: Path) -> tuple[str, ...]:
    with _opened(source) as (names, open_member):
        members = _by_split_and_class(names, source)
        classes = tuple(members["train"])
        reference = members["train"][classes[0]][0]
        for split, by_class in members.items():
            counts = [len(by_class.get(name, ())) for name in classes]
            files = list(itertools.chain.from_iterable(by_class.values()))
            images = _decoded(files, open_member, reference)
            _stream_images(folder / f"{split}_images.npy", len(files), images)
            np.save(folder / f"{split}_labels.npy", np.repeat(np.arange(len(classes)), counts))
    return classes


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[list[str], _Open]]:
    """Yield the files of a folder or zip as POSIX paths, and what opens them for reading."""
    if source.is_dir():
        files = [path for split in _SPLITS for path in (source / split).glob("*/*")]
        names = [path.relative_to(source).as_posix() for path in files if path.is_file()]
        yield names, lambda name: (source / name).open("rb")
        return
    if not zipfile.is_zipfile(source):
        raise ConfigError("data", [f"source: expected a folder or a zip file, found {source}"])
    with zipfile.ZipFile(source) as archive:
        yield [name for name in archive.namelist() if not name.endswith("/")], archive.open


def _by_split_and_class(names: list[str], source: Path) -> dict[str, dict[str, list[str]]]:
    """Return the names of the images of each split and class, all in alphabetical order."""
    members: dict[str, dict[str, list[str]]] = {split: {} for split in _SPLITS}
    for parts in sorted(name.split("/") for name in names):
        hidden = any(part.startswith(".") for part in parts)
        if len(parts) == 3 and parts[0] in members and not hidden:
            members[parts[0]].setdefault(parts[1], []).append("/".join(parts))
    problems = [
        f"source: expected images in {split}/<class>/ of {source}, found none"
        for split, by_class in members.items()
        if not by_class
    ]
    if members["train"]:
        problems += [
            f"source: test/{name} has no counterpart train/{name} in {source}"
            for name in members["test"]
            if name not in members["train"]
        ]
    if problems:
        raise ConfigError("data", problems)
    return members


def _decoded(files: list[str], open_member: _Open, reference: str) -> Iterator[np.ndarray]:
    """Yield the pixels of each file, (C, H, W), all of the reference's shape."""
    shape = _decode(reference, open_member).shape
    for file in files:
        pixels = _decode(file, open_member)
        if pixels.shape != shape:
            raise ConfigError(
                "data",
                [
                    f"source: {file} is {_describe(pixels.shape)},"
                    f" expected {_describe(shape)} as {reference}"
                ],
                "give all images the same size and mode",
            )
        yield pixels


def _decode(file: str, open_member: _Open) -> np.ndarray:
    from PIL import Image

    try:
        with open_member(file) as stream, Image.open(stream) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # each of PIL's plug-ins, and zipfile, has its own kinds
        raise ConfigError("data", [f"source: {file} is not a readable image: {error}"]) from error
    if mode not in ("RGB", "L"):
        raise ConfigError("data", [f"source: {file} has mode {mode}, expected RGB or L"])
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _describe(shape: _Shape) -> str:
    channels, height, width = shape
    return f"{width}x{height} {'RGB' if channels == 3 else 'L'}"


def _stream_images(path: Path, count: int, images: Iterable[np.ndarray]) -> None:
    """Write images as one .npy array, one at a time: a data set may be larger than memory."""
    with path.open("wb") as file:
        for position, pixels in enumerate(images):
            if position == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(pixels.tobytes())
