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
# The highest that there is. glibc's own rises to it by and by, as larger blocks are freed.
_MMAP_THRESHOLD = 32 * MB
_TRIM_THRESHOLD = 2 * _MMAP_THRESHOLD  # glibc's own proportion
_ROOM = _MMAP_THRESHOLD - MB  # twice that for what children allocate: addresses, no memory yet
_OWN = 64 * 1024  # for what this process still allocates
# From large to small; of those up to 1,032 bytes glibc keeps some of each size apart.
_SIZES_OF_HOLES = (*(2**n for n in range(16, 10, -1)), *range(1032, 23, -16))
_MOST_HOLES = 32 * MB
# Of a block of glibc's: it begins two of these before its address, the first of them still belongs
# to the block before it, the second is its size.
_WORD = 8


_libc = ctypes.CDLL(None, use_errno=True)


def keep_what_is_freed() -> None:
    """Let malloc keep what is freed, in this process and in those that are forked from it.

    Else it gives memory back to the kernel and takes it again, depending on what lies where: in
    half of all runs of the blitz CNN with kept children, 2,500 pages in each fit of 80 ms, a tenth
    of the time.
    """
    _tell_malloc(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    _tell_malloc(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def _tell_malloc(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # a C library of another kind
        _libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


class Image:
    """The memory of this process, as those inherit it that are forked from it.

    A fork copies a page table entry for each page, with torch 400 MB of them, and the exit of a
    child drops it again; so it goes into huge pages, where the kernel can (Linux 6.1). Measured on
    2 cores: fork 16 to 5 ms, exit 16 to 8 ms.

    What a child writes to is copied a page at a time, and for what it allocates the kernel has to
    find and clear pages, 2.4 us each. malloc gives it first what was freed here: pages of garbage
    that are copied too. So little is left to be freed here, holes that are left are filled, and new
    memory comes from huge pages that this process has not written to: docs/performance.md has what
    that is worth.
    """

    def __init__(self) -> None:
        _libc.malloc.restype = _libc.sbrk.restype = ctypes.c_void_p
        _libc.malloc.argtypes = [ctypes.c_size_t]
        _libc.free.argtypes = [ctypes.c_void_p]
        _libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        _libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
        _libc.malloc_usable_size.restype = ctypes.c_size_t
        self._unmerged: list[tuple[int, int]] = []  # addresses and lengths

    @contextlib.contextmanager
    def without_holes(self) -> Iterator[None]:
        """Let what is allocated and freed inside of it leave no large holes in the heap."""
        _tell_malloc(_M_MMAP_THRESHOLD, _LARGE)
        try:
            yield
        finally:
            _tell_malloc(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)

    def settle(self) -> None:
        """Make what is in memory now, and what children allocate, cheap for them."""
        with contextlib.suppress(AttributeError):  # a C library of another kind
            _libc.malloc_trim(0)
        self._unmerged = _own_memory()
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
        keep_what_is_freed()
        _tell_malloc(_M_TRIM_THRESHOLD, 4 * _TRIM_THRESHOLD)  # nor the room
        self._fill_holes()
        own, first, second = (_libc.malloc(size) or 0 for size in (_OWN, _ROOM, _ROOM))
        is_at_end = second == first + _libc.malloc_usable_size(first) + _WORD
        _libc.free(own)
        _libc.free(second)
        if not is_at_end:  # a C library of another kind, or no memory
            _libc.free(first)
            return
        # What is up to the next huge page stays taken, so that the next block begins there, and
        # glibc's notes of it end before: a huge page that was written to here would be copied in
        # each child, a page at a time.
        start = -(-(first + 4 * _WORD) // _HUGE_PAGE) * _HUGE_PAGE
        _libc.realloc(first, start - first - _WORD)
        length = (_libc.sbrk(0) - start) // _HUGE_PAGE * _HUGE_PAGE
        if length > 0:
            self._advise(start, length, _MADV_HUGEPAGE)

    def _fill_holes(self) -> None:
        """Take what is free in the heap before its end, for good."""
        end = _libc.malloc(_ROOM) or 0
        _libc.free(end)
        left = _MOST_HOLES
        for size in _SIZES_OF_HOLES:
            while left > 0 and (_libc.malloc(size) or end) < end:
                left -= size

    def _advise(self, address: int, length: int, advice: int) -> None:
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)


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
