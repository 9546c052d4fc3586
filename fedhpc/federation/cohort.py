"""Which answers of a cohort count: what is tried again, when it is enough, and who was late.

A state machine without I/O; the grid does what it says.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from fedhpc.config import Failures
from fedhpc.errors import RunError

logger = logging.getLogger(__name__)

_ROUNDS = 3  # failed in a row: then a client is reported by name


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Answer:
    """A reply to a message.

    Attributes
    ----------
    message_id : str
        Of the message.
    client_id : int
        Who answers.
    message : Message
        What was sent.
    reply : Message
        With content, or an error.
    commit : callable
        Puts the client's state in place of its old one.
    tries : int
        How many there were, this one included.
    final : bool
        Whether it makes no sense to try again.
    """

    message_id: str
    client_id: int
    message: Message
    reply: Message
    commit: Callable[[], None] = nothing
    tries: int = 1
    final: bool = False

    @property
    def reason(self) -> str:
        """Why it failed; "" if it did not."""
        return (self.reply.error.reason or "an error") if self.reply.has_error() else ""

    @property
    def key(self) -> tuple[int, str]:
        """The order of answers: that of the clients."""
        return self.client_id, self.message_id


@dataclass
class Outcome:
    """What became of a cohort.

    Attributes
    ----------
    asked : list of str
        All messages; each is in one of the following.
    accepted : list of Answer
        Replies that count.
    failed : list of Answer
        Errors that the last try ended with.
    missed : list of str
        Messages without a reply before the deadline.
    late : int
        Results that came when enough were there.
    cancelled : int
        Fits that waited or ran when enough were there.
    wanted : int
        How many replies would have been enough.
    """

    asked: list[str]
    accepted: list[Answer]
    failed: list[Answer]
    missed: list[str]
    late: int
    cancelled: int
    wanted: int

    @property
    def replies(self) -> list[Message]:
        """Replies in the order of the clients, with errors unless others made up for them."""
        made_up = len(self.accepted) == self.wanted < len(self.asked)
        answers = [*self.accepted, *([] if made_up else self.failed)]
        return [answer.reply for answer in sorted(answers, key=lambda answer: answer.key)]

    def commit(self) -> None:
        """Put the states of the clients whose replies count in place of their old ones."""
        for answer in self.accepted:
            answer.commit()

    def figures(self) -> dict[str, int]:
        """Return what metrics.jsonl says of the cohort."""
        figures = {"cohort": len(self.asked), "failures": len(self.failed) + len(self.missed)}
        more = {"late": self.late, "cancelled": self.cancelled}
        return figures | {name: count for name, count in more.items() if count}


class Cohort:
    """Messages that were sent at once, until enough of them are answered.

    Parameters
    ----------
    asked : iterable of str
        Ids of the messages.
    retry : int
        How often each is tried again.
    wanted : int, optional
        How many successes are enough; all by default.
    refuse : callable
        Returns errors in the place of those replies that do not go with the others.
    """

    def __init__(
        self,
        asked: Iterable[str],
        *,
        retry: int,
        wanted: int | None = None,
        refuse: Callable[[Sequence[Answer]], list[Answer]],
    ) -> None:
        self.waiting = set(asked)
        self._asked = sorted(self.waiting)
        self._retry = retry
        self._wanted = min(len(self._asked) if wanted is None else wanted, len(self._asked))
        self._refuse = refuse
        self._good: dict[str, Answer] = {}  # in the order of arrival
        self._errors: dict[str, Answer] = {}  # the last of each message
        self._again: list[str] = []

    @property
    def closed(self) -> bool:
        """Whether nothing more is waited for."""
        return not self.waiting or self._enough

    @property
    def _enough(self) -> bool:
        return len(self._good) >= self._wanted

    def tries(self, message_id: str) -> int:
        """Return which try of a message runs now: 1 or more."""
        return self._errors[message_id].tries + 1 if message_id in self._errors else 1

    def take(self, batch: Iterable[Answer]) -> list[Answer]:
        """Note answers that came at the same time.

        Returns
        -------
        list of Answer
            Errors in the place of replies that have been refused now.
        """
        for answer in sorted(batch, key=lambda answer: answer.key):
            self.waiting.discard(answer.message_id)
            if answer.reply.has_content():
                self._good[answer.message_id] = answer
            else:
                self._fail(answer)
        return self.weed() if self.closed else []

    def weed(self) -> list[Answer]:
        """Refuse replies that do not go with the others; return errors in their place."""
        good = list(self._good.values())
        refused = self._refuse(good) if good else []
        for error in refused:
            del self._good[error.message_id]
            self._fail(error)
        return refused

    def again(self) -> list[str]:
        """Return what is to be sent again, and forget it."""
        again, self._again = self._again, []
        return again

    def is_late(self, message_id: str) -> bool:
        """Return whether a success came when enough were there."""
        extra = len(self._good) - self._wanted
        return extra > 0 and message_id in list(self._good)[-extra:]

    def outcome(self, late: Iterable[str] = ()) -> Outcome:
        """Return what became of everybody.

        Parameters
        ----------
        late : iterable of str
            Messages that were answered when nobody waited any more.
        """
        good = list(self._good.values())
        pending = self.waiting - self._errors.keys()
        answered = pending & set(late)
        left = sorted(pending - answered)
        return Outcome(
            asked=self._asked,
            accepted=good[: self._wanted],
            failed=[error for name, error in self._errors.items() if name not in self._good],
            missed=[] if self._enough else left,
            late=len(good[self._wanted :]) + len(answered),
            cancelled=len(left) if self._enough else 0,
            wanted=self._wanted,
        )

    def _fail(self, answer: Answer) -> None:
        self._errors[answer.message_id] = answer
        if answer.tries <= self._retry and not answer.final:
            self._again.append(answer.message_id)
            self.waiting.add(answer.message_id)


def too_few(outcome: Outcome, failures: Failures, server_round: int, last_failure: str) -> str:
    """Return why the replies of a round are not to be aggregated; "" if they are.

    Raises
    ------
    RunError
        If the run is to stop then.
    """
    needed = max(1, math.ceil(round(failures.min_completed * outcome.wanted, 6)))
    had = len(outcome.accepted)
    if had >= needed or not outcome.asked:
        return ""
    text = (
        f"round {server_round}: {had or 'none'} of its {len(outcome.asked)} clients could train,"
        f" {needed} needed (failures.min_completed: {failures.min_completed:g}); at last"
        f" {last_failure}"
    )
    if failures.on_too_few == "stop":
        raise RunError(
            text,
            "the run folder's errors/ has every traceback; failures.on_too_few says what else may"
            " be done than to stop",
        )
    logger.warning("%s; %s", text, failures.on_too_few)
    return text


@dataclass
class _Streak:
    rounds: int = 0
    reason: str = ""


@dataclass
class Streaks:
    """Clients that fail again and again.

    A client's failures to train and to evaluate are counted apart.
    """

    _streaks: dict[tuple[int, str], _Streak] = field(default_factory=dict)

    def note(self, client_id: int, verb: str, reason: str) -> None:
        """Note how a client's part in a round ended; ``reason`` is "" if it succeeded."""
        if not reason:
            self._streaks.pop((client_id, verb), None)
            return
        streak = self._streaks.setdefault((client_id, verb), _Streak())
        streak.rounds, streak.reason = streak.rounds + 1, reason
        if streak.rounds == _ROUNDS:
            logger.warning("%s", _say(client_id, streak))

    def said(self) -> list[str]:
        """Return a line for each client that has failed three times in a row, or more often."""
        return [
            _say(client_id, streak)
            for (client_id, _), streak in sorted(self._streaks.items())
            if streak.rounds >= _ROUNDS
        ]


def _say(client_id: int, streak: _Streak) -> str:
    reason = streak.reason.partition("\n")[0]
    return f"client {client_id} has failed in {streak.rounds} rounds in a row; at last: {reason}"
