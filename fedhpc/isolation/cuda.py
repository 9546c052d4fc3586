"""What a child asks of torch about its GPU. Nothing here makes a CUDA context."""

import ctypes
import os
import sys

_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",  # cuDNN 8; 9 has the two below
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


def is_initialised() -> bool:
    """Return whether this process has a CUDA context by torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def driver_in_use() -> bool:
    """Return whether anybody has initialised CUDA's driver in this process.

    Then CUDA cannot be used in its forks. Already counting devices does it, without a context.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:  # not loaded
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


def cap(limit_bytes: int) -> None:
    """Let torch hold at most so many bytes of its GPU, from the moment that it uses it."""
    import torch

    def set_fraction() -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), 0)

    # Called at once if there is a context, else when the app makes one; never by us.
    torch.cuda._lazy_call(set_fraction)  # type: ignore[no-untyped-call]


def begin() -> None:
    """Forget the peak of the fit before, in a process that is kept."""
    if is_initialised():
        import torch

        torch.cuda.reset_peak_memory_stats(0)


def held_bytes() -> tuple[int, int]:
    """Return what torch's allocator has held of its GPU at most, and what it holds now."""
    if not is_initialised():
        return 0, 0
    import torch

    return torch.cuda.max_memory_reserved(0), torch.cuda.memory_reserved(0)


def give_back() -> tuple[int, int]:
    """Give back what torch keeps of its GPU and nobody uses; return what is in use, and held."""
    if not is_initialised():
        return 0, 0
    import torch

    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(0), torch.cuda.memory_reserved(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception comes from a GPU without memory."""
    torch = sys.modules.get("torch")
    seen: BaseException | None = error
    for _ in range(20):  # a chain could be a ring
        if seen is None:
            return False
        if torch is not None and isinstance(seen, torch.cuda.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
