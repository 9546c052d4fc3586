"""What longest first saves: python benchmarks/placement.py [--data FOLDER] [--beside CHECKOUT].

MNIST in 12 Dirichlet partitions (of very different sizes), all clients in each round, 2 slots.
Prints the tail of a round: the share of the slots' time in which they have no work while other
fits of the round still run. First of the run itself; then of its measured fits, replayed through
`Dispatch` with more slots, in the order asked and longest first. With --beside the same run of
another checkout of fedhpc follows each of this one.
"""

import argparse
import heapq
import random
import statistics
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import submitting

from fedhpc.federation.actions import Turn
from fedhpc.federation.dispatch import Dispatch
from fedhpc.federation.estimates import Estimates
from fedhpc.files import read_lines

REPOSITORY = Path(__file__).parents[1]
CLIENTS = 12
VERB = "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with torchvision's MNIST; default: its download")
    parser.add_argument("--replay", type=Path, help="only replay the fits of this run folder")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet distribution")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout of fedhpc")
    options = parser.parse_args()
    if options.replay:
        replay_all(list(read_lines(options.replay / "fits.jsonl")))
        return
    checkouts = [REPOSITORY, *([options.beside.resolve()] if options.beside else [])]
    runs: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for checkout in checkouts:
                run_dir = federate(checkout, Path(folder), options)
                lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line["round"]]
                first, steady = lines[0], lines[1:]
                runs[checkout].append((tail_of(steady), mean_s(steady)))
                name = "this checkout" if checkout == REPOSITORY else "the other one"
                print(
                    f"{name}: round 1: tail {tail_of([first]):.1%}; later rounds: tail"
                    f" {tail_of(steady):.1%}, {mean_s(steady):.2f} s a round",
                    flush=True,
                )
                if checkout == REPOSITORY:
                    fits = list(read_lines(run_dir / "fits.jsonl"))
    if options.beside:
        ours, theirs = runs.values()
        ratios = [mine[1] / other[1] for mine, other in zip(ours, theirs, strict=True)]
        print(f"seconds of a round, this to the other: {statistics.median(ratios):.3f}")
    replay_all(fits)


def replay_all(fits: list[dict[str, Any]]) -> None:
    print("\nreplayed: slots, tail in the order asked and longest first")
    rounds = [list(group) for _, group in groupby(fits, lambda fit: fit["round"])]
    for slots in (2, 4, 8, 16):
        asked, longest = (replay(rounds, slots, longest_first=value) for value in (False, True))
        print(
            f"{slots:>4}  {asked[0]:6.1%} {longest[0]:6.1%}   {longest[1] / asked[1]:.3f} of the"
            f" time; no order could do with less than {asked[2] / asked[1]:.3f}"
        )


def federate(checkout: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Run the federation with a checkout's fedhpc; return its folder."""
    sets = {
        "data.partitioner.name": "dirichlet",
        "data.partitioner.params.alpha": options.alpha,
        "federation.num_clients": CLIENTS,
        "federation.clients_per_round": CLIENTS,
        "federation.num_rounds": options.rounds,
        "federation.evaluate_every": 0,
        "training.epochs": 1,
        "training.batch_size": 40,
        "isolation.slots": 2,
    }
    if options.data:
        sets["data.source"] = Path(options.data).resolve()
    values = [f"{key}={value}" for key, value in sets.items()]
    command = submitting.command(REPOSITORY / "configs" / "mnist.yaml", values, folder)
    submitting.run(command, cwd=folder, env={"PYTHONPATH": str(checkout)})
    return submitting.newest(folder)


def tail_of(lines: list[dict[str, Any]]) -> float:
    """Return the share of the slots' time without work while other fits ran."""
    idle_s = sum(line["slot_seconds"]["idle"] for line in lines)
    between_s = sum(line["slot_seconds"]["between"] for line in lines)
    return idle_s / (sum(sum(line["slot_seconds"].values()) for line in lines) - between_s)


def mean_s(lines: list[dict[str, Any]]) -> float:
    return statistics.fmean(line["round_s"] for line in lines)


def replay(
    rounds: list[list[dict[str, Any]]], slots: int, *, longest_first: bool
) -> tuple[float, float, float]:
    """Return the tail and the seconds of rounds, and the least seconds that they can take."""
    order = random.Random(1)
    machine = Dispatch(array_tasks=1)
    machine.join(1, 0, slots, {}, 0.0)
    estimates = Estimates()
    wall_s = busy_s = least_s = 0.0
    for number, fits in enumerate(rounds):
        seconds = {
            f"r{number:05d}-c{fit['client']:06d}-{VERB}-0": sum(
                fit[f"{part}_s"] for part in ("start", "run", "return", "link")
            )
            for fit in fits
            if fit["ok"]
        }
        clients = dict(zip(seconds, (fit["client"] for fit in fits if fit["ok"]), strict=True))
        for message_id in order.sample(sorted(seconds), len(seconds)):
            expected = estimates.expected(VERB, clients[message_id]) if longest_first else 0.0
            machine.submit(message_id, clients[message_id], expected=expected)
        now_s, running = 0.0, []
        while True:
            for action in machine.actions():
                if isinstance(action, Turn):  # it may have been sent before, ahead of its turn
                    name = action.message_id
                    heapq.heappush(running, (now_s + seconds[name], name))
            if not running:
                break
            now_s, done = heapq.heappop(running)
            machine.answered(1, done)
        for name, took_s in seconds.items():
            estimates.note(VERB, clients[name], took_s, 0, None)
        if number:  # in the first one nothing is known
            wall_s += now_s
            busy_s += sum(seconds.values())
            least_s += max(sum(seconds.values()) / slots, *seconds.values())
    return 1 - busy_s / (slots * wall_s), wall_s, least_s


if __name__ == "__main__":
    main()
