"""The memory that children inherit from the fork server, made cheap to share."""

import contextlib
import ctypes
from collections.abc import Iterator

from fedhpc.isolation import mappings
from fedhpc.isolation.mappings import HUGE_PAGE, MB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MERGED_AT_ONCE = 4 * HUGE_PAGE  # 1 to 10 ms, for which a request may have to wait
# Of code that is run in a huge page: four page faults a child, and as many entries to drop again.
_WORTH_A_HUGE_PAGE = 256 * 1024
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

    Code lies in files, and none of it is mapped in a process that was just forked: a fault for each
    16 pages of it. So what children run of it goes into huge pages, too, as Node.js
    (``--use-largepages``) and ClickHouse (``remap_executable``) do it.
    """

    def __init__(self) -> None:
        _libc.malloc.restype = _libc.sbrk.restype = ctypes.c_void_p
        _libc.malloc.argtypes = [ctypes.c_size_t]
        _libc.free.argtypes = [ctypes.c_void_p]
        _libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        _libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
        _libc.malloc_usable_size.restype = ctypes.c_size_t
        # Addresses and lengths.
        self._unmerged: list[tuple[int, int]] = []
        self._unmoved: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Learn what code children will run from what is run inside of it.

        What is allocated and freed inside of it leaves no large holes in the heap.
        """
        _tell_malloc(_M_MMAP_THRESHOLD, _LARGE)
        with contextlib.suppress(OSError):  # a system that does not tell what is mapped
            mappings.forget_code()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._unmoved = list(mappings.code_in_use(_WORTH_A_HUGE_PAGE))
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
        return not (self._unmerged or self._unmoved)

    def merge_some(self) -> None:
        """Move a part of the memory into huge pages: all of it takes up to a second."""
        if self._unmerged:
            mappings.merge(*self._unmerged.pop())
        elif not mappings.move_code(*self._unmoved.pop()):
            self._unmoved.clear()

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
        start = -(-(first + 4 * _WORD) // HUGE_PAGE) * HUGE_PAGE
        _libc.realloc(first, start - first - _WORD)
        length = (_libc.sbrk(0) - start) // HUGE_PAGE * HUGE_PAGE
        if length > 0:
            mappings.prefer_huge_pages(start, length)

    def _fill_holes(self) -> None:
        """Take what is free in the heap before its end, for good."""
        end = _libc.malloc(_ROOM) or 0
        _libc.free(end)
        left = _MOST_HOLES
        for size in _SIZES_OF_HOLES:
            while left > 0 and (_libc.malloc(size) or end) < end:
                left -= size


def _own_memory() -> list[tuple[int, int]]:
    """Return addresses and lengths of huge pages that hold what this process has written."""
    found = []
    for mapping in mappings.mappings():
        if mapping.is_own_data and (pages := mapping.huge_pages):
            end = pages[-1] + HUGE_PAGE
            for address in range(pages[0], end, _MERGED_AT_ONCE):
                found.append((address, min(_MERGED_AT_ONCE, end - address)))
    return found
