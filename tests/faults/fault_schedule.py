"""Which faults hit a run, and when: drawn from a seed, so that what failed can be done again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Every run is hit before its last fits, and gets on between two faults.
FIRST, MARGIN, APART = 2, 4, 5


@dataclass(frozen=True)
class Size:
    """How large a disturbed run is: rounds, and fits a round."""

    rounds: int = 6
    cohort: int = 6

    @property
    def fits(self) -> int:
        return self.rounds * self.cohort


@dataclass(frozen=True)
class Fault:
    """One fault, and the moment that it waits for: so many fits or rounds done, never a time."""

    kind: str
    after: int
    unit: Literal["fits", "rounds"]
    seed: str  # of what is drawn when it happens: which child, which array task

    @property
    def moment(self) -> str:
        return f"{self.after} {self.unit if self.after > 1 else self.unit[:-1]}"


def draw(seed: str, kinds: Sequence[str], size: Size, most: int = 3) -> list[Fault]:
    """Return one to ``most`` faults of different kinds, the earliest first."""
    draws = random.Random(seed)
    chosen = draws.sample(list(kinds), min(draws.randint(1, most), len(kinds)))
    return at_moments(draws, seed, chosen, size)


def at_moments(draws: random.Random, seed: str, kinds: Sequence[str], size: Size) -> list[Fault]:
    """Return a fault of each kind, in this order, at moments that are drawn."""
    room = size.fits - FIRST - MARGIN - APART * (len(kinds) - 1)
    if room < 1:
        raise ValueError(f"{len(kinds)} faults do not fit into a run of {size.fits} fits")
    offsets = sorted(draws.randrange(room) for _ in kinds)
    faults = []
    for number, (kind, offset) in enumerate(zip(kinds, offsets, strict=True)):
        fits = FIRST + offset + APART * number
        # Between two rounds there is a moment of its own: checkpoint and evaluation.
        whole = draws.random() < 0.25 and fits % size.cohort == 0
        after, unit = (fits // size.cohort, "rounds") if whole else (fits, "fits")
        faults.append(Fault(kind, after, unit, f"{seed}/{number}"))  # type: ignore[arg-type]
    return faults
