"""Code of libraries in huge pages: it is the same and inherited; a refusal changes nothing."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere code is left where it is"
)

# In a process of its own, whose code may be moved.
BEGIN = """
import os, resource
import torch
from fedhpc.isolation import mappings

torch.set_num_threads(1)

def work():
    torch.manual_seed(0)
    images, weights = torch.randn(8, 3, 32, 32), torch.randn(6, 3, 5, 5, requires_grad=True)
    torch.nn.functional.conv2d(images, weights).relu().sum().backward()
    return weights.grad.sum().item()

def in_fork(what):
    read, write = os.pipe()
    if not os.fork():
        os.write(write, str(what()).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    expected = work()
mappings.forget_code()
assert work() == expected
found = list(mappings.code_in_use(256 * 1024))
assert found
"""


def run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_moved_code_is_the_same_and_forks_have_it_mapped() -> None:
    before, after, moved, found, same, code_left = run("""
before = in_fork(faults)
moved = sum(mappings.move_code(*part) for part in found)
left = len(set(found) & set(mappings.code_in_use(0)))
print(before, in_fork(faults), moved, len(found), work() == expected == in_fork(work), left)
""")
    assert moved == found
    assert same == "True"
    assert code_left == "0"  # it is in no file
    assert float(after) <= float(before) - 4 * int(found)


@pytest.mark.parametrize("refusal", ["mprotect", "madvise", "mremap"])
def test_a_system_that_refuses_changes_nothing(refusal: str) -> None:
    moved, same, unchanged = run(f"""
before = set(mappings.mappings())
setattr(mappings._libc, "{refusal}", lambda *_: -1)
moved = any(mappings.move_code(*part) for part in found)
code = [{{m for m in of if m.is_code}} for of in (before, set(mappings.mappings()))]
print(moved, work() == expected, code[0] == code[1])
""")
    assert (moved, same, unchanged) == ("False", "True", "True")


def test_code_is_left_alone_where_another_thread_could_run_it() -> None:
    assert run("""
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(any(mappings.move_code(*part) for part in found))
""") == ["False"]


def test_a_system_that_does_not_tell_what_is_mapped_only_costs_the_gain() -> None:
    assert run("""
from fedhpc.isolation.image import Image
def refuse(_):
    raise PermissionError("pagemap")
mappings._pages = refuse
image = Image()
with image.rehearsing():
    same = work() == expected
print(same, image.is_settled)
""") == ["True", "True"]


def test_code_that_was_changed_in_memory_is_not_forgotten() -> None:
    assert run("""
import ctypes
code = next(m for m in mappings.mappings() if m.is_code and "libtorch_cpu" in m.name)
libc = mappings._libc
libc.mprotect(code.start, code.end - code.start, 7)
byte = ctypes.c_ubyte.from_address(code.end - 1)  # behind the last function
byte.value = 77
libc.mprotect(code.start, code.end - code.start, 5)
mappings.forget_code()
print(byte.value, work() == expected)
""") == ["77", "True"]
