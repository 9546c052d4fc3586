"""With ``fits_per_process: auto`` a child is used again only if its last fit left it as it was."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entries
import pytest
from entries import call_for_reply, read

from fedhpc.errors import FitFailed
from fedhpc.isolation import ChildPool, Gpu, PoolOptions, Reply, Slot, channel

HERE = Path(__file__).parent

# What a fit does to its process, and what is said of it after the first fit.
SETTINGS = {
    "leave_thread": "threads left by the fit: sleeper",
    "leave_process": "child processes 0 -> 1",
    "leave_zombie": "child processes 0 -> 1",
    "set_environment": "environment: PASSWORD",
    "unset_environment": "environment: OMP_NUM_THREADS",
    "change_folder": f"working directory {Path.cwd()} -> /",
    "change_umask": "umask 0022 -> 0077",
    "handle_signal": "signal handlers: SIGUSR1",
    "block_signal": "signal handlers: SigBlk",
    "set_timer": "timer False -> True",
    "lower_limit": "resource limits: RLIMIT_CPU",
    "add_path": "sys.path: /of/the/app",
    "stop_collecting": "garbage collection: False, True",
    "use_another_dtype": "torch.default_dtype torch.float32 -> torch.float64",
    "use_another_device": "torch.default_device cpu -> meta; torch.len_torch_function_stack 0 -> 1",
    "use_more_threads": "torch.num_threads 1 -> 2",
    "be_deterministic": "torch.are_deterministic_algorithms_enabled False -> True",
    "stop_gradients": "torch.is_grad_enabled True -> False",
    "use_less_precision": "torch.float32_matmul_precision highest -> medium;"
    " torch.cublas_allow_tf32 False -> True",
    "let_cudnn_choose": "torch.cudnn_benchmark False -> True",
    "stay_in_autocast": "torch.is_autocast_enabled('cpu') False -> True",
    "hook_every_module": "torch.nn.modules.module._global_forward_hooks 0 -> 1",
    "flush_denormals": "floats below the smallest normal one are 0 False -> True",
}
# What is said after the second fit; the baseline is taken after the first.
RESOURCES = {
    "keep_memory": "memory ",
    "keep_shared_memory": "memory ",
    "keep_memory_of_a_library": "memory ",
    "keep_file": "open files: /proc/",
    "keep_socket": "open files: pipe:[",
    "keep_thread_of_a_library": "threads 2 -> 3",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ChildPool]:
    yield from _pool()


def _pool(**options: Any) -> Iterator[ChildPool]:
    token = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(entries.TOKEN, token)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *_paths()]))
        # Pools that live on hold the sockets of the children that ended last.
        leftovers = entries.nothing_is_left(token, sockets=len(SETTINGS) + len(RESOURCES) + 10)
        next(leftovers)
        preload = ["numpy", "torch", "torch._dynamo", "torch.optim", "leaky_entries"]
        made = PoolOptions(
            preload=preload, fits_per_process="auto", standby=False, huge_pages=False, **options
        )
        with ChildPool(made) as pool:
            yield pool
        next(leftovers, None)


def _paths() -> list[str]:
    return list(filter(None, [os.environ.get("PYTHONPATH")]))


@pytest.fixture
def slot() -> Iterator[Slot]:
    """Return one with a child of its own."""
    slot.count = getattr(slot, "count", 0) + 1  # type: ignore[attr-defined]
    return Slot(slot.count)  # type: ignore[attr-defined]


def fit(pool: ChildPool, name: str, slot: Slot) -> tuple[int, Reply]:
    """Return the process of a fit, and its reply."""
    fd = channel.write_memory([b"[]"])
    reply = pool.run(f"leaky_entries:{name}", [fd], slot=slot, timeout_s=60)
    os.close(fd)
    pid = int(read(reply.buffers[0]))
    reply.close()
    return pid, reply


def fits_until_replaced(pool: ChildPool, name: str, slot: Slot, most: int) -> tuple[int, str]:
    pids = []
    for count in range(1, most + 1):
        pid, reply = fit(pool, name, slot)
        pids.append(pid)
        assert (reply.gone is not None) == bool(reply.replaced)
        if reply.replaced:
            assert len(set(pids)) == 1
            assert fit(pool, "train", slot)[0] not in pids
            return count, reply.replaced
    return most, ""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_child_is_replaced_after_a_fit_that_changed_a_setting(
    name: str, pool: ChildPool, slot: Slot
) -> None:
    count, reason = fits_until_replaced(pool, name, slot, 2)
    assert (count, reason) == (1, SETTINGS[name])


@pytest.mark.parametrize("name", RESOURCES)
def test_a_child_is_replaced_when_a_fit_keeps_what_the_first_one_did_not(
    name: str, pool: ChildPool, slot: Slot
) -> None:
    count, reason = fits_until_replaced(pool, name, slot, 3)
    assert count == 2
    assert reason.startswith(RESOURCES[name])


def test_growth_that_is_small_in_every_fit_is_found_when_it_has_added_up(
    pool: ChildPool, slot: Slot
) -> None:
    count, reason = fits_until_replaced(pool, "keep_a_little_memory", slot, 60)
    assert 4 <= count < 60  # 2 MB each
    assert reason.startswith("memory ")


def test_a_child_is_replaced_when_torch_holds_more_of_its_gpu() -> None:
    slot = Slot(0, (Gpu("GPU-of-nobody", "a card that nobody has", 0),))
    for pool in _pool(prepare="leaky_entries:pretend_gpu"):
        count, reason = fits_until_replaced(pool, "keep_gpu_memory", slot, 10)
        assert (count, reason) == (4, "GPU memory given out by torch 6 -> 9 MB")


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("train", 200),
        ("need_much_for_a_while", 20),
        ("wait_for_a_thread_and_a_process", 20),
        ("leave_a_file_in_a_cycle", 20),
    ],
)
def test_a_child_whose_fits_leave_nothing_behind_is_kept(
    name: str, fits: int, pool: ChildPool, slot: Slot
) -> None:
    assert fits_until_replaced(pool, name, slot, fits) == (fits, "")


def test_flags_that_were_set_at_import_may_be_set_again_in_every_fit(slot: Slot) -> None:
    for pool in _pool(prepare="leaky_entries:flag_at_import"):
        assert fits_until_replaced(pool, "set_flags_again", slot, 5) == (5, "")


def test_a_child_whose_fit_raised_is_replaced(pool: ChildPool, slot: Slot) -> None:
    first, _ = fit(pool, "train", slot)
    with pytest.raises(FitFailed):
        call_for_reply(pool, "raise_error", "no", slot=slot)
    assert fit(pool, "train", slot)[0] != first


def test_values_of_the_environment_are_not_told(pool: ChildPool, slot: Slot) -> None:
    assert "secret" not in fit(pool, "set_environment", slot)[1].replaced
