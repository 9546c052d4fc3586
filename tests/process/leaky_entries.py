"""What children call that shall, or shall not, leave something behind."""

import _thread
import ctypes
import functools
import gc
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from entries import entry

from fedhpc.isolation import cleanliness

KEPT: list[Any] = []
MB = 1_000_000


def leak(function: Callable[[], object]) -> Callable[..., Any]:
    """Let a fit do this, and return its process."""

    @functools.wraps(function)
    def fit() -> int:
        function()
        return os.getpid()

    return entry(fit)


def flag_at_import(_: str) -> None:
    """Do what an app does that sets flags when it is imported."""
    torch.use_deterministic_algorithms(True)
    os.environ["SET_AT_IMPORT"] = "1"


# --- fits that leave nothing behind ---


@leak
def train() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(32, 64)), torch.randint(0, 10, (32,))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@leak
def need_much_for_a_while() -> None:
    """Take a different amount of memory each time, in small pieces and large, and in a ring."""
    if not KEPT:
        KEPT.append("once")  # the first one, after which the baseline is taken, needs little
        return
    pieces: list[Any] = [bytes(1000) for _ in range(random.randrange(50_000))]
    pieces += [torch.ones(250_000), pieces]


@leak
def wait_for_a_thread_and_a_process() -> None:
    thread = threading.Thread(target=time.sleep, args=(0.01,))
    thread.start()
    subprocess.run(["true"], check=True)
    thread.join()


@leak
def set_flags_again() -> None:
    torch.use_deterministic_algorithms(True)
    os.environ["SET_AT_IMPORT"] = "1"


# --- fits that change a setting ---


@leak
def leave_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,), name="sleeper", daemon=True).start()


@leak
def leave_process() -> None:
    subprocess.Popen(["sleep", "60"])


@leak
def leave_zombie() -> None:
    if os.fork() == 0:
        os._exit(0)


@leak
def set_environment() -> None:
    os.environ["PASSWORD"] = f"secret {random.random()}"


@leak
def unset_environment() -> None:
    del os.environ["OMP_NUM_THREADS"]


@leak
def change_folder() -> None:
    os.chdir("/")


@leak
def change_umask() -> None:
    os.umask(0o077)


@leak
def handle_signal() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: None)


@leak
def block_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


@leak
def set_timer() -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000)


@leak
def lower_limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (10_000, 10_000))


@leak
def add_path() -> None:
    sys.path.insert(0, "/of/the/app")


@leak
def stop_collecting() -> None:
    gc.disable()


@leak
def use_another_dtype() -> None:
    torch.set_default_dtype(torch.float64)


@leak
def use_another_device() -> None:
    torch.set_default_device("meta")


@leak
def use_more_threads() -> None:
    torch.set_num_threads(2)


@leak
def be_deterministic() -> None:
    torch.use_deterministic_algorithms(True)


@leak
def stop_gradients() -> None:
    torch.set_grad_enabled(False)


@leak
def use_less_precision() -> None:
    torch.set_float32_matmul_precision("medium")


@leak
def let_cudnn_choose() -> None:
    torch.backends.cudnn.benchmark = True


@leak
def stay_in_autocast() -> None:
    torch.autocast("cpu").__enter__()


@leak
def hook_every_module() -> None:
    torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


@leak
def flush_denormals() -> None:
    torch.set_flush_denormal(True)


# --- fits that keep more and more ---


@leak
def keep_memory() -> None:
    KEPT.append(bytearray(b"1" * 60 * MB))


@leak
def keep_a_little_memory() -> None:
    KEPT.append([bytes(1000) for _ in range(2000)])


@leak
def keep_shared_memory() -> None:
    fd = os.memfd_create("kept")
    os.truncate(fd, 60 * MB)
    KEPT.append(mmap.mmap(fd, 60 * MB))
    os.close(fd)
    KEPT[-1].write(bytes(60 * MB))


@leak
def keep_file() -> None:
    KEPT.append(os.open(f"/proc/self/{['stat', 'statm', 'maps'][len(KEPT) % 3]}", os.O_RDONLY))


@leak
def leave_a_file_in_a_cycle() -> None:
    """As Flower's messages are, and so what they hold."""
    cycle: list[Any] = [open("/proc/self/stat")]  # noqa: PTH123, SIM115
    cycle.append(cycle)
    cleanliness._trim = _fail  # of the second look: memory that is given back is missed later


def _fail() -> None:
    raise AssertionError("it was looked at twice")


@leak
def keep_socket() -> None:
    KEPT.append(os.pipe())


@leak
def keep_thread_of_a_library() -> None:
    """Start one that Python's threading does not know."""
    _thread.start_new_thread(time.sleep, (60,))


@leak
def keep_memory_of_a_library() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memset(libc.malloc(60 * MB), 1, 60 * MB)


# --- a GPU that is not there ---


def pretend_gpu(_: str) -> None:
    """Let torch tell of the memory of a GPU, which fits take and give back."""
    from fedhpc.isolation import cuda

    cuda.is_initialised = lambda: True
    cuda.begin = lambda: None
    cuda.held_bytes = lambda: (0, 0)
    torch.cuda.empty_cache = lambda: None
    torch.cuda.memory_allocated = lambda _: 5 * MB + sum(KEPT)
    torch.cuda.memory_reserved = lambda _: 20 * MB


@leak
def keep_gpu_memory() -> None:
    KEPT.append(MB)
