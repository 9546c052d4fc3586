"""Packing, opening and staging of data sets, with real images."""

import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedhpc import data as command
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.learning import data

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MNIST = SHARED / "MNIST" / "raw"
CIFAR = SHARED / "cifar10-jpeg.zip"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"needs MNIST's .gz files in {MNIST}")
needs_cifar = pytest.mark.skipif(not CIFAR.is_file(), reason=f"needs CIFAR-10 as JPEG in {CIFAR}")


def picture(width: int = 4, height: int = 3, mode: str = "L", value: int = 7) -> bytes:
    file = io.BytesIO()
    colour = value if mode == "L" else (value,) * len(mode)
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture
def cifar_sample(tmp_path: Path) -> Path:
    """A zip of 5 training and 2 test images of each class of CIFAR-10."""
    counts = {"train": 5, "test": 2}
    with zipfile.ZipFile(CIFAR) as archive:
        names = sorted(archive.namelist())
        chosen = [
            name
            for (split, _), group in itertools.groupby(names, lambda name: name.split("/")[:2])
            for name in list(group)[: counts[split]]
        ]
        return write_zip(tmp_path / "sample.zip", {name: archive.read(name) for name in chosen})


def problems_of(source: Path, root: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        data.prepare("image_folder", root, source)
    assert caught.value.source == "data"
    assert not [path for path in (root / "packed").glob("*") if path.suffix != ".lock"]
    return caught.value


# --- digits, and what holds for every data set ---------------------------------------------------


def test_digits_are_split_the_same_way_each_time_with_every_fifth_of_each_class_as_test(
    tmp_path: Path,
) -> None:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    packed = data.open_dataset(data.prepare("digits", tmp_path))
    again = data.open_dataset(data.prepare("digits", tmp_path / "elsewhere"))
    assert packed.classes == tuple("0123456789")
    assert packed.train.images.shape[1:] == (1, 8, 8)
    assert len(packed.train.labels) + len(packed.test.labels) == 1797
    for label in range(10):
        images = digits.images[digits.target == label].astype(np.uint8)
        is_test = np.arange(len(images)) % 5 == 4
        train = packed.train.images[packed.train.labels == label, 0]
        test = packed.test.images[packed.test.labels == label, 0]
        np.testing.assert_array_equal(train, images[~is_test])
        np.testing.assert_array_equal(test, images[is_test])
    np.testing.assert_array_equal(packed.train.images, again.train.images)


def test_a_packed_data_set_is_uint8_int64_read_only_and_memory_mapped(tmp_path: Path) -> None:
    packed = data.open_dataset(data.prepare("digits", tmp_path))
    for split in (packed.train, packed.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert isinstance(split.images, np.memmap)
        assert not split.images.flags.writeable


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("rows", [[3, 0, 1000, 3, 1441], [5, 6, 7, 2, 3, 9, 8], [0], []])
def test_examples_that_are_taken_are_those_of_the_mapping(
    rows: list[int], once: bool, tmp_path: Path
) -> None:
    packed = data.open_dataset(data.prepare("digits", tmp_path))
    taken = packed.train.take(np.array(rows, dtype=np.int64), once=once)
    np.testing.assert_array_equal(taken.images, np.asarray(packed.train.images)[rows])
    np.testing.assert_array_equal(taken.labels, packed.train.labels[rows])
    assert taken.images.flags.writeable
    assert taken.take(np.arange(len(rows))[-1:]).labels.tolist() == taken.labels[-1:].tolist()


@pytest.mark.parametrize("once", [True, False])
def test_taking_examples_of_a_file_that_was_cut_is_a_clear_error(
    once: bool, tmp_path: Path
) -> None:
    folder = data.prepare("digits", tmp_path)
    packed = data.open_dataset(folder)
    os.truncate(folder / "train_images.npy", 1000)
    with pytest.raises(PlatformError, match="ends before example 900"):
        packed.train.take(np.array([900]), once=once)


def test_mean_and_std_are_those_of_the_training_images_in_raw_units(tmp_path: Path) -> None:
    packed = data.open_dataset(data.prepare("digits", tmp_path))
    assert packed.mean == pytest.approx((np.mean(packed.train.images),), rel=1e-12)
    assert packed.std == pytest.approx((np.std(packed.train.images),), rel=1e-12)


def test_the_std_of_images_of_one_colour_is_one_and_never_zero(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "s.zip", {"train/a/1.png": picture(), "test/a/1.png": picture()})
    packed = data.open_dataset(data.prepare("image_folder", tmp_path, source))
    assert (packed.mean, packed.std) == ((7.0,), (1.0,))


def test_a_second_call_returns_the_packed_folder_without_decoding_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data.prepare("digits", tmp_path)
    monkeypatch.setattr(data, "_write_splits", lambda *_: pytest.fail("decoded again"))
    assert data.prepare("digits", tmp_path) == folder


def test_two_that_prepare_at_once_decode_once_and_get_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    original = data._write_digits

    def count_and_write(folder: Path) -> tuple[str, ...]:
        decoded.append(folder)
        return original(folder)

    monkeypatch.setattr(data, "_write_digits", count_and_write)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(data.prepare("digits", tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert len(decoded) == 1


def test_the_loser_of_a_race_without_locks_keeps_the_folder_of_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = data.prepare("digits", tmp_path / "winner")
    folder = tmp_path / "packed" / winner.name
    original = data._write_digits

    def lose(beside: Path) -> tuple[str, ...]:
        winner.rename(folder)
        (folder / "mark").touch()
        return original(beside)

    monkeypatch.setattr(data, "_write_digits", lose)
    assert data.prepare("digits", tmp_path) == folder
    assert (folder / "mark").exists()
    assert not list(folder.parent.glob("*.tmp"))


def test_a_failed_packing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(beside: Path) -> tuple[str, ...]:
        (beside / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_write_digits", fill_the_disk)
    with pytest.raises(PlatformError) as caught:
        data.prepare("digits", tmp_path)
    assert "could not write" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "Hint: check space and permissions of the disk" in str(caught.value)
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".lock"]


def test_a_root_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlatformError, match=r"could not write .*file/packed.*Not a directory"):
        data.prepare("digits", tmp_path / "file")


@pytest.mark.parametrize("part", ["meta.json", "train_images.npy", "test_labels.npy"])
def test_a_damaged_or_missing_packed_folder_is_a_clear_error(tmp_path: Path, part: str) -> None:
    folder = data.prepare("digits", tmp_path)
    file = folder / part
    for damage in (b"", file.read_bytes()[:-100], b"{}", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(PlatformError) as caught:
            data.open_dataset(folder)
        assert f"could not open the packed data set {folder}" in str(caught.value)
        assert "Hint: remove this folder" in str(caught.value)


def test_labels_that_do_not_belong_to_the_images_are_a_clear_error(tmp_path: Path) -> None:
    folder = data.prepare("digits", tmp_path)
    np.save(folder / "test_labels.npy", np.arange(3))
    with pytest.raises(PlatformError, match=r"test has images \(355, 1, 8, 8\) and labels \(3,\)"):
        data.open_dataset(folder)


def test_wrong_requests_are_refused_with_what_is_right(tmp_path: Path) -> None:
    cases: list[tuple[str, Path | None, str]] = [
        ("mnits", None, "name: expected a data set, found 'mnits'; did you mean mnist?"),
        ("mnits", None, "Hint: valid names: cifar10, cifar100, digits, fashion_mnist, image_fold"),
        ("digits", tmp_path, f"source: digits come with scikit-learn, found {tmp_path}"),
        ("image_folder", None, "source: image_folder needs a folder or a zip file, found none"),
        ("mnist", tmp_path / "no", f"source: no such file or folder: {tmp_path / 'no'}"),
    ]
    for name, source, message in cases:
        with pytest.raises(ConfigError) as caught:
            data.prepare(name, tmp_path, source)
        assert message in str(caught.value)
        assert caught.value.source == "data"


# --- torchvision's -------------------------------------------------------------------------------


@needs_mnist
def test_mnist_is_packed_from_a_folder_that_holds_torchvisions_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed_file in MNIST.glob("*.gz"):
        (raw / packed_file.stem).write_bytes(gzip.decompress(packed_file.read_bytes()))
    mnist = data.open_dataset(data.prepare("mnist", tmp_path / "root", tmp_path, download=False))
    assert mnist.train.images.shape == (60000, 1, 28, 28)
    assert mnist.test.images.shape == (10000, 1, 28, 28)
    assert np.bincount(mnist.train.labels).tolist()[:3] == [5923, 6742, 5958]
    assert len(mnist.classes) == 10
    # The well-known 0.1307 and 0.3081, which do not depend on the order of the images.
    assert mnist.mean[0] / 255 == pytest.approx(0.1307, abs=1e-4)
    assert mnist.std[0] / 255 == pytest.approx(0.3081, abs=1e-4)


def test_missing_data_without_download_name_the_folder_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(PlatformError) as caught:
        data.prepare("cifar10", tmp_path, download=False)
    message = str(caught.value)
    assert f"could not find the data set cifar10 in {tmp_path}:" in message
    command_line = f"python -m fedhpc.data cifar10 --root {tmp_path}"
    assert message.endswith(f"Hint: on a machine with network, run: {command_line}")


def test_a_source_without_torchvisions_files_is_never_downloaded_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(PlatformError) as caught:
        data.prepare("mnist", tmp_path, source)
    assert f"could not find the data set mnist in {source}:" in str(caught.value)
    assert str(caught.value).endswith(f"--root {tmp_path} (and leave data.source out)")
    assert not list(source.iterdir())


def test_a_download_that_fails_names_the_folder_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision  # type: ignore[import-untyped]

    # Nothing listens on the discard port: a real failure, without a network.
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(PlatformError) as caught:
        data.prepare("mnist", tmp_path)
    assert f"could not download the data set mnist into {tmp_path}:" in str(caught.value)
    assert f"run: python -m fedhpc.data mnist --root {tmp_path}" in str(caught.value)


def test_images_of_torchvision_with_channels_last_are_packed_with_channels_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    class Fake:
        classes = ("a", "b")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
            self.targets = [1, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    packed = data.open_dataset(data.prepare("cifar10", tmp_path))
    assert packed.train.images.shape == (2, 3, 4, 5)
    assert packed.train.images[0, :, 0, 0].tolist() == [0, 1, 2]
    assert packed.train.labels.tolist() == [1, 0]


# --- image_folder --------------------------------------------------------------------------------


@needs_cifar
def test_a_zip_of_jpegs_gives_what_pil_decodes_in_order_of_class_and_name(
    tmp_path: Path, cifar_sample: Path
) -> None:
    packed = data.open_dataset(data.prepare("image_folder", tmp_path, cifar_sample))
    assert packed.classes[:3] == ("airplane", "automobile", "bird")
    assert packed.train.labels.tolist() == sorted([*range(10)] * 5)
    assert packed.test.images.shape == (20, 3, 32, 32)
    with zipfile.ZipFile(cifar_sample) as archive, archive.open("train/cat/0001.jpg") as file:
        expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
    np.testing.assert_array_equal(packed.train.images[3 * 5 + 1], expected)
    assert packed.mean == pytest.approx(packed.train.images.mean(axis=(0, 2, 3)), rel=1e-12)
    assert packed.std == pytest.approx(packed.train.images.std(axis=(0, 2, 3)), rel=1e-12)


@needs_cifar
def test_a_folder_gives_the_same_arrays_as_the_zip_of_it(
    tmp_path: Path, cifar_sample: Path
) -> None:
    with zipfile.ZipFile(cifar_sample) as archive:
        archive.extractall(tmp_path / "folder")
    first = data.open_dataset(data.prepare("image_folder", tmp_path, cifar_sample))
    second = data.open_dataset(data.prepare("image_folder", tmp_path, tmp_path / "folder"))
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


def test_classes_are_in_order_of_their_names_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    members = {
        "train/cat-big/1.png": picture(value=1),
        "train/cat/2.png": picture(value=3),
        "train/cat/10.png": picture(value=2),
        "train/cat/.DS_Store": b"no image",
        "train/cat/deeper/1.png": b"not directly in the class",
        "train/README.txt": b"no class",
        "test/cat-big/1.png": picture(value=4),
    }
    for source in (
        write_zip(tmp_path / "s.zip", members),
        write_folder(tmp_path / "folder", members),
    ):
        packed = data.open_dataset(data.prepare("image_folder", tmp_path, source))
        assert packed.classes == ("cat", "cat-big")
        assert packed.train.images[:, 0, 0, 0].tolist() == [2, 3, 1]
        assert packed.train.labels.tolist() == [0, 0, 1]
        assert packed.test.labels.tolist() == [1]


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_source_that_changed_is_packed_again(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    members = {"train/a/1.png": picture(), "test/a/1.png": picture()}
    source = write(tmp_path / "source", members)
    first = data.prepare("image_folder", tmp_path, source)
    assert data.prepare("image_folder", tmp_path, source) == first
    write(source, members | {"train/b/1.png": picture()})
    second = data.prepare("image_folder", tmp_path, source)
    assert second != first
    assert len(data.open_dataset(second).train.labels) == 2


def test_a_source_without_images_or_without_a_split_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "s", {"pictures/a/1.png": picture()})
    assert problems_of(source, tmp_path / "root").problems == [
        f"source: expected images in train/<class>/ of {source}, found none",
        f"source: expected images in test/<class>/ of {source}, found none",
    ]
    write_folder(source, {"train/a/1.png": picture()})
    assert problems_of(source, tmp_path / "root").problems == [
        f"source: expected images in test/<class>/ of {source}, found none"
    ]


def test_a_test_class_that_is_not_in_train_is_refused(tmp_path: Path) -> None:
    members = {"train/a/1.png": picture(), "test/a/1.png": picture(), "test/b/1.png": picture()}
    source = write_zip(tmp_path / "s.zip", members)
    assert problems_of(source, tmp_path / "root").problems == [
        f"source: test/b has no counterpart train/b in {source}"
    ]


@pytest.mark.parametrize(
    ("odd", "described"), [(picture(5, 3), "5x3 L"), (picture(mode="RGB"), "4x3 RGB")]
)
def test_an_image_of_another_size_or_mode_is_refused_with_both_files_and_sizes(
    tmp_path: Path, odd: bytes, described: str
) -> None:
    members = {"train/a/1.png": picture(), "test/a/1.png": picture(), "test/a/2.png": odd}
    error = problems_of(write_zip(tmp_path / "s.zip", members), tmp_path / "root")
    assert error.problems == [
        f"source: test/a/2.png is {described}, expected 4x3 L as train/a/1.png"
    ]
    assert "Hint: give all images the same size and mode" in str(error)


def test_an_image_of_an_unsupported_mode_is_refused(tmp_path: Path) -> None:
    members = {"train/a/1.png": picture(mode="RGBA"), "test/a/1.png": picture()}
    error = problems_of(write_zip(tmp_path / "s.zip", members), tmp_path / "root")
    assert error.problems == ["source: train/a/1.png has mode RGBA, expected RGB or L"]


@pytest.mark.parametrize("content", [b"", b"text", picture(40, 40)[:60]])
def test_an_unreadable_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    members = {"train/a/1.png": picture(40, 40), "test/a/1.png": content}
    for source in (write_zip(tmp_path / "s.zip", members), write_folder(tmp_path / "f", members)):
        (problem,) = problems_of(source, tmp_path / "root").problems
        assert problem.startswith("source: test/a/1.png is not a readable image: ")


def test_a_source_that_is_neither_folder_nor_zip_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "s.tar"
    source.write_bytes(b"no zip")
    assert problems_of(source, tmp_path / "root").problems == [
        f"source: expected a folder or a zip file, found {source}"
    ]


# --- staging -------------------------------------------------------------------------------------


def test_staging_copies_once_and_the_copy_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data.prepare("digits", tmp_path / "shared")
    node = tmp_path / "node" / "local"
    copies: list[Path] = []
    original = shutil.copytree

    def count_and_copy(source: Path, target: Path, dirs_exist_ok: bool) -> Path:
        copies.append(source)
        return original(source, target, dirs_exist_ok=dirs_exist_ok)

    monkeypatch.setattr(shutil, "copytree", count_and_copy)
    threads = [threading.Thread(target=data.stage, args=(folder, node)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    copy = data.stage(folder, node)
    assert copy == node / folder.name
    assert len(copies) == 1
    staged = data.open_dataset(copy)
    np.testing.assert_array_equal(staged.test.images, data.open_dataset(folder).test.images)


def test_staging_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PlatformError) as caught:
        data.stage(tmp_path / "none", tmp_path / "node")
    assert f"could not stage the packed data set {tmp_path / 'none'}" in str(caught.value)
    assert "Hint: pack it with python -m fedhpc.data" in str(caught.value)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_packed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_HERE", str(tmp_path))
    result = CliRunner().invoke(command.app, ["digits", "--root", "$DATA_HERE"])
    assert result.exit_code == 0
    assert data.open_dataset(Path(result.stdout.strip())).mean
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)


def test_the_command_prints_errors_as_they_are_and_exits_with_their_code(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    result = CliRunner().invoke(command.app, ["mnist", "--source", str(missing)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"data: 1 problem\n  source: no such file or folder: {missing}\n"
    result = CliRunner().invoke(
        command.app, ["mnist", "--root", str(tmp_path), "--source", str(tmp_path)]
    )
    assert result.exit_code == 75


def test_the_help_of_the_command_imports_no_heavy_library() -> None:
    code = (
        "import json, sys; from typer.testing import CliRunner; from fedhpc.data import app;"
        "result = CliRunner().invoke(app, ['--help']);"
        "print(json.dumps([result.exit_code, result.output, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    exit_code, output, modules = json.loads(done.stdout)
    assert exit_code == 0
    assert all(name in output for name in data.NAMES)
    assert not {"torch", "torchvision", "sklearn", "datasets", "flwr_datasets"} & set(modules)
