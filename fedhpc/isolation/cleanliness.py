"""Whether a process is as it was: what a child proves after each fit, to be used for the next one.

Two kinds of things are compared, always with the same baseline, never with the fit before, so that
what grows a little with every fit is found when it has grown too much.

*Settings* are compared with those **before the first fit**: a fresh process would start with these,
so that a fit which changes one would change what the next fit computes. They are: environment,
working directory, umask, signal handlers and masks, timers, resource limits, cores and priority,
``sys.path``, garbage collection, the locale, how floats are rounded to zero, numpy's errors, and
the global flags of torch (`_TORCH`). Threads started by Python and child processes count among
them: no fit needs either to be there when it is over. A flag that every fit wants is set where the
app is imported.

*Resources* are compared with those **after the first fit**, as it leaves allocators, thread pools
and loaded kernels behind that the next ones use too: memory, threads, open files, and what torch
holds of its GPU after `torch.cuda.empty_cache`.

What cannot be proven: what Python modules hold, as long as it is small (a cache, a counter, another
learning rate in a global variable), state inside of libraries, and files on the disk. An app whose
fits depend on any of it is different in a process that is kept.
"""

import contextlib
import ctypes
import gc
import locale
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from fedhpc.isolation import cuda, host_memory

MB = 1_000_000

# An allocator keeps what it was given and gives it out in another order, so that a fit leaves now
# more, now less behind: docs/performance.md has how much. What is below this is no leak that
# anybody would notice before it has grown.
TOLERANCE_BYTES = 8 * MB
TOLERANCE_SHARE = 0.05  # of the baseline
# torch takes memory of a GPU in blocks of 2 MiB or more, and counts what it gives out exactly.
CUDA_TOLERANCE_BYTES = 2 * 1024 * 1024

_SETTLE_S = 0.1  # a thread or process that was waited for may be listed a moment longer
_MAX_SAID = 500
_SIGNALS = range(1, signal.NSIG)
_OF_LIBC = 0b11 << 31  # signals 32 and 33, which it catches as soon as it makes a thread
_LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
_STATUS = re.compile(
    "^(RssAnon|RssShmem|Threads|Umask|SigBlk|SigIgn|SigCgt|Cpus_allowed_list):\t(.*)$", re.MULTILINE
)

# The getters of torch's global flags; those that this version does not have are left out.
_TORCH = (
    "get_default_dtype", "get_default_device", "get_num_threads", "get_num_interop_threads",
    "is_grad_enabled", "is_inference_mode_enabled", "is_anomaly_enabled",
    "is_autocast_cache_enabled", "are_deterministic_algorithms_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "_C._get_deterministic_fill_uninitialized_memory", "_C._get_float32_matmul_precision",
    "_C._get_cudnn_enabled", "_C._get_cudnn_benchmark", "_C._get_cudnn_deterministic",
    "_C._get_cudnn_allow_tf32", "_C._get_cublas_allow_tf32",
    "_C._get_cublas_allow_fp16_accumulation",
    "_C._get_cublas_allow_fp16_reduced_precision_reduction",
    "_C._get_cublas_allow_bf16_reduced_precision_reduction",
    "_C._get_mkldnn_enabled", "_C._get_mkldnn_deterministic", "_C._get_nnpack_enabled",
    "_C._get_flash_sdp_enabled", "_C._get_mem_efficient_sdp_enabled", "_C._get_math_sdp_enabled",
    "_C._get_cudnn_sdp_enabled", "_C._len_torch_function_stack", "_C._len_torch_dispatch_stack",
)  # fmt: skip
_TORCH_BY_DEVICE = ("is_autocast_enabled", "get_autocast_dtype")
_TORCH_HOOKS = (
    ("torch.nn.modules.module", "_global_"),
    ("torch.optim.optimizer", "_global_optimizer_"),
)


class Cleanliness:
    """Compares a process with what it was. Make it just before the first fit."""

    def __init__(self) -> None:
        self._torch_flags: dict[str, Callable[[], Any]] | None = None
        self._settings = self._read_settings(_status())
        self._python_threads = set(threading.enumerate())
        self._descendants = _count_descendants()
        self._resources: _Resources | None = None

    def changes(self, own_files: Collection[int] = ()) -> list[str]:
        """Return how this process is not as it was, in words; call it after each fit.

        After the first one it takes the baseline of what that fit may leave behind.

        Parameters
        ----------
        own_files : collection of int
            Descriptors that are open for the caller's own sake.
        """
        # What is in a cycle is not gone yet: Flower's messages are, with all that came in them.
        # What the first fit leaves is not looked through again.
        gc.collect()
        if self._resources is None:
            gc.freeze()
            self._resources = _Resources.read(own_files, exact=True)
            self._resources.name_files()
        found = self._compare(own_files, exact=False)
        if not found:
            return []
        # It may be about to go: look again, closely, before the process is given up for it.
        _trim()
        deadline_s = time.monotonic() + _SETTLE_S
        while found := self._compare(own_files, exact=True):
            if time.monotonic() > deadline_s:
                return found
            time.sleep(0.01)
        return []

    def _compare(self, own_files: Collection[int], *, exact: bool) -> list[str]:
        assert self._resources is not None  # noqa: S101
        status = _status()
        settings = self._read_settings(status)
        found = [
            _difference(name, self._settings.get(name, _ABSENT), settings.get(name, _ABSENT))
            for name in {**self._settings, **settings}
            if self._settings.get(name, _ABSENT) != settings.get(name, _ABSENT)
        ]
        if strangers := set(threading.enumerate()) - self._python_threads:
            found.append(f"threads left by the fit: {_names(t.name for t in strangers)}")
        if (descendants := _count_descendants()) > self._descendants:
            found.append(f"child processes {self._descendants} -> {descendants}")
        return found + self._resources.growth(_Resources.read(own_files, exact=exact, of=status))

    def _read_settings(self, status: dict[str, str]) -> dict[str, Any]:
        if self._torch_flags is None and "torch" in sys.modules:
            self._torch_flags = _torch_flags()
        settings = _process_settings(status)
        for name, read in (self._torch_flags or {}).items():
            try:
                settings[name] = read()
            except Exception as error:  # of flags that contradict each other
                settings[name] = f"{type(error).__name__}: {error}"
        return settings


class _Resources:
    """What a process holds.

    Attributes
    ----------
    memory, exact_memory : int
        Bytes that are its own, as the kernel counts them by and by (an error of about a megabyte
        for each core that it ran on) and as it finds them in the page table (milliseconds).
    threads : int
        Of any kind.
    files : set of tuple
        What is open: descriptor, device and inode.
    cuda : tuple of int
        Bytes of its GPU that torch has given out, and that it holds.
    """

    def __init__(
        self, memory: int, exact_memory: int | None, threads: int,
        files: set[tuple[int, int, int]], cuda_bytes: tuple[int, int],
    ) -> None:  # fmt: skip
        self.memory, self.exact_memory = memory, exact_memory
        self.threads = threads
        self.files = files
        self.cuda = cuda_bytes
        self.file_names: Counter[str] | None = None

    @classmethod
    def read(
        cls, own_files: Collection[int], *, exact: bool, of: dict[str, str] | None = None
    ) -> "_Resources":
        held = cuda.give_back()  # first, as it frees memory of the host too
        status = of or _status()
        memory = sum(1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        exact_memory = host_memory.own_bytes() if exact else None
        return cls(memory, exact_memory, int(status["Threads"]), _open_files(own_files), held)

    def name_files(self) -> "Counter[str]":
        """Return what is open, by what it is; to be asked while it is open."""
        if self.file_names is None:
            self.file_names = _names_of(descriptor for descriptor, _, _ in self.files)
        return self.file_names

    def growth(self, now: "_Resources") -> list[str]:
        """Return what there is more of ``now`` than is tolerated, in words."""
        found = []
        before, after = self.memory, now.memory
        if self.exact_memory is not None and now.exact_memory is not None:
            before, after = self.exact_memory, now.exact_memory
        if after - before > max(TOLERANCE_BYTES, TOLERANCE_SHARE * before):
            found.append(f"memory {before / MB:.0f} -> {after / MB:.0f} MB")
        for what, was, is_now in zip(("given out", "held"), self.cuda, now.cuda, strict=True):
            if is_now - was > CUDA_TOLERANCE_BYTES:
                found.append(f"GPU memory {what} by torch {was / MB:.0f} -> {is_now / MB:.0f} MB")
        if now.threads > self.threads:
            found.append(f"threads {self.threads} -> {now.threads}")
        # A descriptor may have been closed, and its number be another file of the same name.
        if not now.files <= self.files and (more := now.name_files() - self.name_files()):
            found.append(f"open files: {_names(more.elements())}")
        return found


_ABSENT = "nothing"


def _difference(name: str, before: Any, now: Any) -> str:
    """Say how a setting differs. Of the environment only names: values may be secret."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return f"{name}: {_names(os.fsdecode(key) for key in changed)}"
    if isinstance(before, tuple) and isinstance(now, tuple):
        changed = [str(item) for item in {*before} ^ {*now}]
        return f"{name}: {_names(changed) or 'another order'}"
    return f"{name} {before} -> {now}"[:_MAX_SAID]


def _names(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (", ".join(listed[:3]) + more)[:_MAX_SAID]


# --- the process -------------------------------------------------------------------------------


def _status() -> dict[str, str]:
    """Return what the kernel says of this process, in a single read."""
    descriptor = os.open("/proc/thread-self/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, 65536).decode()
    finally:
        os.close(descriptor)
    return dict(_STATUS.findall(text))


def _process_settings(status: dict[str, str]) -> dict[str, Any]:
    try:
        folder = os.getcwd()  # noqa: PTH109  (it is read after each fit)
    except FileNotFoundError:
        folder = "a folder that is gone"
    masks = {name: int(status[name], 16) & ~_OF_LIBC for name in ("SigBlk", "SigIgn", "SigCgt")}
    caught = masks.pop("SigCgt")
    handlers = {n: signal.getsignal(n) for n in _SIGNALS if caught >> (n - 1) & 1}
    tiny = sys.float_info.min
    settings: dict[str, Any] = {
        "environment": os.environ._data.copy(),  # type: ignore[attr-defined]
        "working directory": folder,
        "umask": status["Umask"],
        "signal handlers": {
            **{_signal_name(n): handler for n, handler in handlers.items()},
            **masks,
        },
        "timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "resource limits": {name: resource.getrlimit(n) for name, n in _LIMITS.items()},
        "cores": status["Cpus_allowed_list"],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "sys.path": tuple(sys.path),
        "recursion limit": sys.getrecursionlimit(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "locale": locale.setlocale(locale.LC_ALL),
        "floats below the smallest normal one are 0": tiny / 2 == 0.0,
    }
    if numpy := sys.modules.get("numpy"):
        settings["numpy.geterr"] = numpy.geterr()
    return settings


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _open_files(own: Collection[int]) -> set[tuple[int, int, int]]:
    """Return what is open; names would take four times as long."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if (descriptor := int(name)) not in own:
            with contextlib.suppress(OSError):  # the listing's own
                status = os.fstat(descriptor)
                found.add((descriptor, status.st_dev, status.st_ino))
    return found


def _names_of(descriptors: Iterable[int]) -> "Counter[str]":
    """Return what is open, by what it is: a path, or the kernel's name of a socket or pipe."""
    found: Counter[str] = Counter()
    for descriptor in descriptors:
        with contextlib.suppress(FileNotFoundError):
            found[os.readlink(f"/proc/self/fd/{descriptor}")] += 1  # noqa: PTH115
    return found


def _count_descendants() -> int:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # nearly always, and it takes a microsecond
        return 0
    own = os.getpid()
    return len(host_memory.families([own])[own]) - 1


def _trim() -> None:
    """Give back what malloc keeps, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


# --- torch -------------------------------------------------------------------------------------


def _torch_flags() -> dict[str, Callable[[], Any]]:
    """Return what reads each of torch's global flags."""
    torch = sys.modules["torch"]
    readers: dict[str, Callable[[], Any]] = {}
    for name in _TORCH:
        target: Any = torch
        for part in name.split("."):
            target = getattr(target, part, None)
        if target is not None:
            readers[f"torch.{name}".replace("._C._", ".").replace(".get_", ".")] = target
    for name in _TORCH_BY_DEVICE:
        for device in ("cpu", "cuda"):
            readers[f"torch.{name}({device!r})"] = partial(getattr(torch, name), device)
    for module, prefix in _TORCH_HOOKS:
        for name, hooks in vars(sys.modules.get(module, torch)).items():
            if name.startswith(prefix) and isinstance(hooks, dict):
                readers[f"{module}.{name}"] = partial(len, hooks)
    return readers
