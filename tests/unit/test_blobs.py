"""Where the server keeps the blobs of its open messages."""

from pathlib import Path

import pytest

from fedhpc.federation.blobs import BlobStore
from fedhpc.federation.payload import Blob
from fedhpc.paths import RunPaths

DIGEST = "1" * 64


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.blobs.mkdir()
    return paths


def in_file(paths: RunPaths, digest: str = DIGEST) -> Blob:
    """Return a blob that came as a file of a result."""
    path = paths.result_blob("a-message", digest)
    path.write_bytes(b"one")
    return Blob(digest, 3, [b"one"], path)


def test_a_file_that_is_there_is_moved_and_no_second_one_written(paths: RunPaths) -> None:
    store = BlobStore(paths, inline_bytes=100)
    blob = in_file(paths)
    inode = paths.result_blob("a-message", DIGEST).stat().st_ino
    store.add({"a": [blob]})
    assert [path.stat().st_ino for path in paths.blobs.iterdir()] == [inode]
    assert paths.blob(DIGEST).read_bytes() == b"one"
    assert store.describe(blob).in_file


def test_what_is_asked_again_after_its_file_has_been_removed_is_written_again(
    paths: RunPaths,
) -> None:
    store = BlobStore(paths, inline_bytes=100)
    blob = in_file(paths)
    store.add({"a": [blob]})
    store.drop("a")
    assert store.add({"b": []}) == [DIGEST]
    assert not list(paths.blobs.iterdir())
    store.add({"a": [blob]})
    assert paths.blob(DIGEST).read_bytes() == b"one"


def test_a_blob_that_goes_over_the_links_does_so_also_if_it_comes_back_as_a_file(
    paths: RunPaths,
) -> None:
    store = BlobStore(paths, inline_bytes=100)
    store.add({"a": [Blob(DIGEST, 3, [b"one"])]})
    again = in_file(paths)
    store.add({"b": [again]})
    assert not store.describe(again).in_file
    assert store.parts(DIGEST) == [b"one"]
    for message_id in ("a", "b"):
        store.drop(message_id)
    assert store.add({"c": []}) == [DIGEST]
