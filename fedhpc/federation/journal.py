"""Whose replies counted in a cohort, on disk before they are used.

A server that does a round again accepts the same clients, and so ends in the same model. Nothing
is written where the whole cohort succeeded.
"""

import json
import logging
from dataclasses import dataclass

from fedhpc import files
from fedhpc.errors import PlatformError
from fedhpc.federation.cohort import Answer, Outcome
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What became of a cohort before.

    Attributes
    ----------
    accepted : list of str
        Messages whose replies counted.
    failed : dict
        Reasons, by message.
    missed : list of str
        Messages without a reply before the deadline.
    late, cancelled : int
        See `Outcome`.
    """

    accepted: list[str]
    failed: dict[str, str]
    missed: list[str]
    late: int
    cancelled: int

    def complete(
        self, outcome: Outcome, asked: list[str], wanted: int | None, failed: list[Answer]
    ) -> Outcome:
        """Return the outcome of a cohort whose accepted part alone was asked again.

        Parameters
        ----------
        outcome : Outcome
            Of this part.
        asked : list of str
            All messages of the cohort.
        wanted : int or None
            How many replies are enough, if not all.
        failed : list of Answer
            The errors of `failed`.
        """
        if lost := len(self.accepted) - len(outcome.accepted):
            logger.warning(
                "%d of %d clients whose replies counted before the restart have failed now",
                lost, len(self.accepted),
            )  # fmt: skip
        return Outcome(
            asked=sorted(asked),
            accepted=outcome.accepted,
            failed=[*outcome.failed, *failed],
            missed=[*outcome.missed, *self.missed],
            late=self.late,
            cancelled=self.cancelled,
            wanted=len(asked) if wanted is None else min(wanted, len(asked)),
        )


class AcceptedJournal:
    """The entries of a run, a file each.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def read(self, asked: list[str]) -> Entry | None:
        """Return the entry of a cohort, by the ids of its messages; None if there is none.

        Raises
        ------
        PlatformError
            If there is one that cannot be read: without it the model would be another one.
        """
        if not asked:
            return None
        path = self._paths.accepted_of(min(asked))
        try:
            found = json.loads(files.persist(path.read_bytes, f"read {path}"))
        except ValueError as error:
            raise PlatformError(f"{path} is damaged: {error}") from error
        except PlatformError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        if found.pop("asked", None) != sorted(asked):
            logger.warning(
                "%s is of another cohort (has the config changed?): it is not used", path
            )
            return None
        return Entry(**found)

    def write(self, outcome: Outcome) -> None:
        """Keep whose replies count, durably, unless everybody's do.

        Raises
        ------
        PlatformError
            If the disk refuses it.
        """
        if len(outcome.accepted) == len(outcome.asked):
            return
        folder = self._paths.accepted
        files.persist(lambda: folder.mkdir(exist_ok=True), f"make {folder}")
        value = {
            "asked": outcome.asked,
            "accepted": sorted(answer.message_id for answer in outcome.accepted),
            "failed": {answer.message_id: answer.reason for answer in outcome.failed},
            "missed": outcome.missed,
            "late": outcome.late,
            "cancelled": outcome.cancelled,
        }
        files.write_json(self._paths.accepted_of(min(outcome.asked)), value)
