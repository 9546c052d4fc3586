"""How long fits will take, compared with each other: the longest of a round are to begin first.

They change the order of work and nothing else, so they are not in checkpoints.
"""

from collections import defaultdict
from dataclasses import dataclass

_NEWEST = 0.5  # weight of a client's newest fit among all of its own


@dataclass
class _Sums:
    fits: int = 0
    seconds: float = 0.0
    work: float = 0.0


class Estimates:
    """Expects of a client's fit what its earlier fits of the same verb have taken.

    Array tasks may differ in speed (another type of GPU), so the seconds of a fit are divided by
    the seconds that its array task needs for an example, on average over all of its fits. What
    is left is a number of examples: one for each client and verb, whatever it will run on. Where
    an app does not say how many examples there were, each fit counts for one.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], tuple[float, int]] = {}  # seconds, and on which array task
        self._paces: defaultdict[tuple[str, int], _Sums] = defaultdict(_Sums)
        self._all: defaultdict[str, _Sums] = defaultdict(_Sums)

    def note(
        self, verb: str, client_id: int, seconds: float, array_task: int, examples: float | None
    ) -> None:
        """Note a fit.

        Parameters
        ----------
        verb : str
            What the client did.
        client_id : int
            Which one.
        seconds : float
            How long the app ran.
        array_task : int
            Where.
        examples : float or None
            How many it says that there were, if it does.
        """
        work = examples if examples and examples > 0 else 1.0
        for sums in (self._paces[verb, array_task], self._all[verb]):
            sums.fits += 1
            sums.seconds += seconds
            sums.work += work
        before_s, where = self._of.get((verb, client_id), (seconds, array_task))
        if where == array_task:  # seconds of two array tasks are not to be mixed
            seconds = _NEWEST * seconds + (1 - _NEWEST) * before_s
        self._of[verb, client_id] = seconds, array_task

    def expected(self, verb: str, client_id: int) -> float:
        """Return the work of a client's next fit: 0 or more, the mean if nothing is known of it."""
        if found := self._of.get((verb, client_id)):
            seconds, array_task = found
            pace = self._paces[verb, array_task]
            return seconds * pace.work / pace.seconds if pace.seconds > 0 else 0.0
        known = self._all.get(verb)
        return known.work / known.fits if known else 0.0
