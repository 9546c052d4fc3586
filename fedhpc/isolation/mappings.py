"""The memory of this process, as Linux maps it: what lies where, and in how large pages."""

import ctypes
import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MB = 1024 * 1024
HUGE_PAGE = 2 * MB

_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_COLLAPSE = 4, 14, 25
_READ, _WRITE, _EXECUTE = 1, 2, 4
_PRIVATE, _ANONYMOUS = 0x02, 0x20
_MAYMOVE, _FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value
# Of an entry of pagemap: there is a page, in memory or swapped out, and it is a file's.
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
]  # fmt: skip
_libc.madvise.argtypes = _libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping(NamedTuple):
    """A part of the memory with the same access and origin.

    Attributes
    ----------
    start, end : int
        Addresses: of the first byte, and after the last one.
    access : str
        As in /proc/self/maps: "r-xp", ...
    name : str
        The file, "[heap]" or the like; "" if it is neither.
    """

    start: int
    end: int
    access: str
    name: str

    @property
    def is_code(self) -> bool:
        """Whether it is what a program or library runs."""
        return self.access == "r-xp" and self.name.startswith("/")

    @property
    def is_own_data(self) -> bool:
        """Whether it is memory that was allocated."""
        return self.access == "rw-p" and self.name in ("", "[heap]")

    @property
    def huge_pages(self) -> range:
        """The addresses of the huge pages that lie in it, or could."""
        return range(-(-self.start // HUGE_PAGE) * HUGE_PAGE, self.end - HUGE_PAGE + 1, HUGE_PAGE)


def mappings() -> Iterator[Mapping]:
    """Yield what is mapped, by address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield Mapping(start, end, access, name[0].strip() if name else "")


def prefer_huge_pages(address: int, length: int) -> None:
    """Let memory that nobody has written to yet come in huge pages."""
    _libc.madvise(address, length, _MADV_HUGEPAGE)


def merge(address: int, length: int) -> bool:
    """Move memory into huge pages (Linux 6.1); return whether all of it is there now."""
    return bool(_libc.madvise(address, length, _MADV_COLLAPSE) == 0)


def forget_code() -> None:
    """Let no code be mapped that is not run again: it comes back from its file."""
    for mapping in list(mappings()):
        # Where code was changed in memory, say by a debugger, the file would not bring that back.
        if mapping.is_code and all(
            entry & _OF_FILE and not entry & _SWAPPED
            for entry in filter(None, _pages(mapping))
            if entry & (_PRESENT | _SWAPPED)
        ):
            _libc.madvise(mapping.start, mapping.end - mapping.start, _MADV_DONTNEED)


def code_in_use(least: int) -> Iterator[tuple[int, int]]:
    """Yield addresses and lengths of code, in huge pages with at least so many bytes mapped."""
    for mapping in list(mappings()):
        if mapping.is_code:
            pages = _pages(mapping)
            for address in mapping.huge_pages:
                first = (address - mapping.start) // mmap.PAGESIZE
                inside = pages[first : first + HUGE_PAGE // mmap.PAGESIZE]
                present = sum(1 for entry in filter(None, inside) if entry & _PRESENT)
                if present * mmap.PAGESIZE >= least:
                    yield address, HUGE_PAGE


def move_code(address: int, length: int) -> bool:
    """Put a copy of code in huge pages into its place.

    On x86-64 only, as other processors want to be told that instructions have changed, and in a
    process of one thread only: another one could be running what is moved.

    Returns
    -------
    bool
        Whether it was possible; else nothing has changed, unless the kernel ran out of memory in
        the very last step.
    """
    if os.uname().machine != "x86_64" or len(list(Path("/proc/self/task").iterdir())) > 1:
        return False
    room = _libc.mmap(None, length + HUGE_PAGE, _READ | _WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
    if room == _FAILED:
        return False
    start = -(-room // HUGE_PAGE) * HUGE_PAGE
    prefer_huge_pages(start, length)
    ctypes.memmove(start, address, length)
    # A system may refuse to run what was written. In small pages it would be worse than before.
    moved = (
        merge(start, length)
        and _libc.mprotect(start, length, _READ | _EXECUTE) == 0
        and _libc.mremap(start, length, length, _MAYMOVE | _FIXED, address) == address
    )
    _libc.munmap(room, start - room if moved else length + HUGE_PAGE)
    if moved:
        _libc.munmap(start + length, room + HUGE_PAGE - start)
    return moved


def _pages(mapping: Mapping) -> "array[int]":
    """Return the entries of pagemap of all pages, most of them 0."""
    first, last = mapping.start // mmap.PAGESIZE, mapping.end // mmap.PAGESIZE
    entries = array("Q")
    with open("/proc/self/pagemap", "rb", buffering=0) as file:  # noqa: PTH123
        entries.frombytes(os.pread(file.fileno(), 8 * (last - first), 8 * first))
    return entries
