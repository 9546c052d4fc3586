"""Runs that faults hit: do they end in the model of an undisturbed one?

    python tests/faults/chaos.py                      # 50 random schedules of 1 to 3 faults
    python tests/faults/chaos.py --seed 7 --only 13   # one of them again
    python tests/faults/chaos.py --each --runs 3      # every kind alone, three times

Each schedule is drawn from seed and number. Prints a line a fault, and a table of the kinds; exit
code 1 if a run did not survive, whose folder is kept and named.
"""

import argparse
import ctypes
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "federation"), str(TESTS / "slurm")]

import fault_kinds  # noqa: E402
import fault_slurm  # noqa: E402
from disturbed_run import DisturbedRun, Hit, Lost, Outcome, sets  # noqa: E402
from fault_kinds import Kind  # noqa: E402
from fault_schedule import Fault, Size, draw  # noqa: E402
from support import Run, Submitter  # noqa: E402

_SMALL_DISK = "size=24m"
_NEW_MOUNTS = 0x00020000


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a small disk at a folder; it is this process's own, and its children's."""
    folder.mkdir(parents=True)
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no mount namespace of its own (needs root)")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", _SMALL_DISK, "tmpfs", folder], check=True)
    try:
        yield
        kept = folder.with_name("kept")
        if any(folder.iterdir()):
            shutil.copytree(folder, kept, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Chaos:
    """Undertakes runs, and remembers how they came through."""

    def __init__(self, folder: Path, size: Size, kinds: dict[str, Kind], more: list[str]) -> None:
        self.outcomes: list[Outcome] = []
        self._folder = folder
        self._size = size
        self._kinds = kinds
        self._more = more
        self._submitter: Callable[[Path, Path], Submitter] = (
            fault_slurm.submitter if kinds is fault_slurm.KINDS else Submitter
        )
        self._reference: Run | None = None

    @property
    def reference(self) -> Run:
        """The undisturbed run: in one process."""
        if self._reference is None:
            submitter = Submitter(self._folder / "undisturbed", self._folder / "data")
            words = [*sets(self._size), *self._more]
            self._reference = submitter.run(words, executor="debug", timeout_s=300)
            assert self._reference.returncode == 0, self._reference.output
        return self._reference

    def undertake(self, label: str, schedule: list[Fault]) -> bool:
        """Do one run; return whether it survived."""
        reference = self.reference
        folder = self._folder / label.replace("/", "-")
        print(f"{label}: " + ", ".join(f"{f.kind} after {f.moment}" for f in schedule), flush=True)
        if any(self._kinds[fault.kind].disk for fault in schedule):
            with small_disk(folder / "runs"):
                outcome = self._run(folder, schedule, reference)
                if not outcome.problems:
                    shutil.rmtree(outcome.folder, ignore_errors=True)
        else:
            outcome = self._run(folder, schedule, reference)
        self.outcomes.append(outcome)
        for hit in outcome.hits:
            print("   " + _line(hit))
        for fault in outcome.missed:
            print(f"    {fault.kind}: the run had ended before")
        if outcome.problems:
            print(f"    DID NOT SURVIVE ({outcome.seconds:.0f} s): " + "; ".join(outcome.problems))
            print(f"    kept: {folder}", flush=True)
            return False
        print(f"    identical ({outcome.seconds:.0f} s)", flush=True)
        shutil.rmtree(folder)
        return True

    def _run(self, folder: Path, schedule: list[Fault], reference: Run) -> Outcome:
        submitter = self._submitter(folder, self._folder / "data")
        try:
            run = DisturbedRun(submitter, reference, self._size, self._more)
        except Lost as lost:
            return Outcome(folder, problems=[str(lost)])
        return run.survive(schedule, self._kinds)


def _line(hit: Hit) -> str:
    seen = "-" if hit.detected_s is None else f"after {hit.detected_s:.1f} s"
    return (
        f" {hit.kind.name}: round {hit.round}, {hit.fits} fits done; detected {seen};"
        f" redone {hit.rounds_redone} whole rounds, {hit.fits_redone} fits"
    )


def table(outcomes: list[Outcome]) -> str:
    """Return what became of each kind of fault, as a table in Markdown."""
    rows = ["| fault | times | when (rounds) | detected after, s | whole rounds redone | result |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    hits: dict[str, list[tuple[Hit, Outcome]]] = {}
    for outcome in outcomes:
        for hit in outcome.hits:
            hits.setdefault(hit.kind.name, []).append((hit, outcome))
    for name, found in sorted(hits.items()):
        seen = [hit.detected_s for hit, _ in found if hit.detected_s is not None]
        detected = "nothing to notice"
        if seen:
            detected = f"{statistics.median(seen):.1f} (at most {max(seen):.1f})"
        when = sorted({hit.round for hit, _ in found})
        fine = sum(not outcome.problems for _, outcome in found)
        result = "identical" if fine == len(found) else f"identical {fine} of {len(found)} times"
        rows.append(
            f"| {name} | {len(found)} | {', '.join(map(str, when))} | {detected} |"
            f" {max(hit.rounds_redone for hit, _ in found)} | {result} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, help="schedules (50), or times each kind (1)")
    parser.add_argument("--seed", help="of all schedules; random by default, and printed")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one schedule of the seed")
    parser.add_argument("--faults", type=int, default=3, help="at most so many in a schedule")
    parser.add_argument("--each", action="store_true", help="one fault a run, every kind in turn")
    parser.add_argument("--kind", action="append", help="only this kind; repeatable")
    parser.add_argument("--slurm", action="store_true", help="on the devcluster, with its kinds")
    parser.add_argument("--list", action="store_true", help="print the kinds, and exit")
    parser.add_argument("--set", action="append", default=[], help="as of submit; repeatable")
    args = parser.parse_args()
    kinds = fault_slurm.KINDS if args.slurm else fault_kinds.LOCAL
    if args.list:
        for kind in [*fault_kinds.LOCAL.values(), *fault_slurm.KINDS.values()]:
            print(f"{kind.name:24} {kind.text}")
        return 0
    if unknown := set(args.kind or ()) - kinds.keys():
        parser.error(f"--kind: expected one of {', '.join(kinds)}; found {', '.join(unknown)}")
    names = [name for name in kinds if name in (args.kind or kinds)]
    if not args.slurm:
        if left_out := set(names) - set(fault_kinds.available()):
            print(f"left out, as they need root: {', '.join(sorted(left_out))}")
        names = [name for name in names if name not in left_out]
    elif problem := fault_slurm.use_cluster():
        print(problem, file=sys.stderr)
        return 2
    seed = args.seed or str(random.randrange(10**6))
    size = Size()
    folder = Path(tempfile.mkdtemp(prefix="fedhpc-chaos-"))
    chaos = Chaos(folder, size, kinds, args.set)
    print(f"seed {seed}; {len(names)} kinds; {os.cpu_count()} cores; {folder}", flush=True)
    each = args.each or len(names) == 1
    if each:
        labels = [(f"{seed}/{name}/{i}", [name]) for i in range(args.runs or 1) for name in names]
    else:
        numbers = range(args.runs or 50) if args.only is None else [args.only]
        labels = [(f"{seed}/{i}", names) for i in numbers]
    survived = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a Ctrl-C: the run is ended too
    try:
        for label, chosen in labels:
            survived += chaos.undertake(label, draw(label, chosen, size, args.faults))
    except KeyboardInterrupt:
        print("\ninterrupted")
    finally:
        print(f"\n{table(chaos.outcomes)}\n\nsurvived {survived} of {len(chaos.outcomes)}")
    if survived == len(labels):
        shutil.rmtree(folder)
    return 0 if survived == len(labels) else 1


if __name__ == "__main__":
    sys.exit(main())
