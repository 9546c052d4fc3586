"""The memory that children inherit from the fork server, made cheap to share."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MB = 1024 * 1024

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HUGE_PAGE = 2 * MB
_MERGED_AT_ONCE = 4 * _HUGE_PAGE  # 1 to 10 ms, for which a request may have to wait
_LARGE = 64 * 1024
_MMAP_THRESHOLD = 32 * MB  # the highest that there is; glibc's own rises to it by and by
_ROOM = [16 * MB] * 4  # for what children allocate: addresses, which take no memory before that


class Image:
    """The memory of this process, as those inherit it that are forked from it.

    A fork copies a page table entry for each page, with torch 400 MB of them, and the exit of a
    child drops it again; so it goes into huge pages, where the kernel can (Linux 6.1). Measured on
    2 cores: fork 16 to 5 ms, exit 16 to 8 ms.

    What a child writes to is copied a page at a time, and for what it allocates the kernel has to
    find and clear pages, 2.4 us each. malloc gives it first what was freed here: pages of garbage
    that are copied too. So little is left to be freed here, and new memory comes from huge pages:
    with the blitz CNN and 500 CIFAR-10 images 3,200 instead of 7,700 faults, and 104 instead of 118
    ms of CPU for fork, fit and exit (2 cores; medians of 50 children of both kinds in turn).
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.malloc.restype = self._libc.sbrk.restype = ctypes.c_void_p
        self._unmerged: list[tuple[int, int]] = []  # addresses and lengths

    @contextlib.contextmanager
    def without_holes(self) -> Iterator[None]:
        """Let what is allocated and freed inside of it leave no large holes in the heap."""
        self._tell_malloc(_M_MMAP_THRESHOLD, _LARGE)
        try:
            yield
        finally:
            self._tell_malloc(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)

    def settle(self) -> None:
        """Make what is in memory now, and what children allocate, cheap for them."""
        self._unmerged = _own_memory()
        with contextlib.suppress(AttributeError):  # a C library of another kind
            self._make_room()

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing left to merge."""
        return not self._unmerged

    def merge_some(self) -> None:
        """Move a part of the memory into huge pages: all of it takes up to a second."""
        address, length = self._unmerged.pop()
        self._advise(address, length, _MADV_COLLAPSE)

    def _make_room(self) -> None:
        """Let the heap end in room for huge pages that nobody has written to yet."""
        self._tell_malloc(_M_TRIM_THRESHOLD, 4 * sum(_ROOM))  # what is freed stays where it is
        self._tell_malloc(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        end = self._libc.sbrk(0)
        for block in [self._libc.malloc(ctypes.c_size_t(size)) for size in _ROOM]:
            self._libc.free(ctypes.c_void_p(block))
        start = -(-end // _HUGE_PAGE) * _HUGE_PAGE
        length = (self._libc.sbrk(0) - start) // _HUGE_PAGE * _HUGE_PAGE
        if length > 0:
            self._advise(start, length, _MADV_HUGEPAGE)

    def _tell_malloc(self, parameter: int, value: int) -> None:
        with contextlib.suppress(AttributeError):
            self._libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))

    def _advise(self, address: int, length: int, advice: int) -> None:
        self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)


def _own_memory() -> list[tuple[int, int]]:
    """Return addresses and lengths of huge pages that hold what this process has written."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *name = line.split(maxsplit=5)
        if access != "rw-p" or (name and name[0].strip() != "[heap]"):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        end -= end % _HUGE_PAGE
        for address in range(-(-start // _HUGE_PAGE) * _HUGE_PAGE, end, _MERGED_AT_ONCE):
            found.append((address, min(_MERGED_AT_ONCE, end - address)))
    return found
