"""What fits are found to need of a GPU, and which errors mean that it had too little."""

import itertools
from pathlib import Path

import pytest
import torch

from fedhpc.errors import FitFailed, FitOutOfMemory, PlatformError
from fedhpc.isolation import Need, cuda, failures
from fedhpc.isolation.peaks import Peaks

GB = 1_000_000_000


# --- what was learned ---


def test_nothing_is_known_of_a_kind_that_never_ran(tmp_path: Path) -> None:
    peaks = Peaks(tmp_path / "peaks")
    assert peaks.need("train") is None
    assert not (tmp_path / "peaks").exists()


def test_the_need_is_the_highest_peak_and_more(tmp_path: Path) -> None:
    peaks = Peaks(tmp_path / "peaks")
    for peak in (2 * GB, 4 * GB, 3 * GB):
        peaks.note("train", peak, GB // 2)
    peaks.note("evaluate", GB, GB // 2)
    need = peaks.need("train")
    assert need == Need(int(1.1 * 4 * GB) + 256_000_000, GB // 2, least_bytes=4 * GB)
    assert need.cap_bytes == need.total_bytes - GB // 2
    other = peaks.need("evaluate")
    assert other is not None
    assert other.least_bytes == GB


def test_where_the_context_is_not_known_a_usual_one_is_added(tmp_path: Path) -> None:
    peaks = Peaks(tmp_path)
    peaks.note("train", 4 * GB, None)
    need = peaks.need("train")
    assert need is not None
    assert need.total_bytes > 1.1 * 4 * GB + need.context_bytes
    assert need.cap_bytes >= 1.1 * 4 * GB  # torch may have as much as it had, and more


def test_what_one_process_learned_another_finds(tmp_path: Path) -> None:
    Peaks(tmp_path).note("train", 4 * GB, GB)
    Peaks(tmp_path).note("train", 3 * GB, GB)
    need = Peaks(tmp_path).need("train")
    assert need is not None
    assert need.least_bytes == 4 * GB


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"peak_bytes": "x", "context_bytes": 1}'])
def test_a_damaged_file_is_learned_anew(text: str, tmp_path: Path) -> None:
    Peaks(tmp_path).note("train", 4 * GB, GB)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    peaks = Peaks(tmp_path)
    assert peaks.need("train") is None
    peaks.note("train", 2 * GB, GB)
    need = Peaks(tmp_path).need("train")
    assert need is not None
    assert need.least_bytes == 2 * GB


# --- out of memory ---


def chained(*errors: BaseException) -> BaseException:
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def ring() -> BaseException:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__context__ = second, first
    return first


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("any text"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (chained(ValueError("fit"), KeyError("x"), torch.cuda.OutOfMemoryError("no")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA out of memory"), False),  # an app that talks about it
        (MemoryError("on the host"), False),
        (ring(), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_error_without_gpu_memory_is_known(error: BaseException, expected: bool) -> None:
    assert cuda.is_out_of_memory(error) == expected


def test_an_error_is_told_by_where_it_happened() -> None:
    plain = {"error": "ValueError: no", "traceback": "File ...", "out_of_memory": False}
    error = failures.raised(plain, None)
    assert type(error) is FitFailed
    assert error.traceback == "File ..."
    memory = failures.raised(
        {**plain, "out_of_memory": True, "gpu_peak_bytes": 3 * GB, "gpu_context_bytes": GB}, None
    )
    assert isinstance(memory, FitOutOfMemory)
    assert memory.need_bytes == 4 * GB
    assert "training.batch_size" in str(memory)
    assert "isolation.slots_per_gpu" in str(memory)
    platform = failures.raised(
        {"error": "no lock file", "hint": "remove it", "platform": True}, None
    )
    assert type(platform) is PlatformError
    assert platform.hint == "remove it"
