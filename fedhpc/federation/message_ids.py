"""Ids of messages: the same fit has the same id, whoever runs it and whichever attempt asks."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

_MANY = 1_000_000  # messages of the same verb to a client in a round


class Parts(NamedTuple):
    """What an id says: round, client, Flower's message type, and a number among equals."""

    server_round: int
    client_id: int
    verb: str
    sequence: int


def make(parts: Parts) -> str:
    """Return the id of a message; it can be the name of a file."""
    return f"r{parts.server_round:05d}-c{parts.client_id:06d}-{parts.verb}-{parts.sequence}"


def read(message_id: str) -> Parts:
    """Return what an id says.

    Raises
    ------
    ValueError
        If `make` did not make it.
    """
    match = re.fullmatch(r"r(\d+)-c(\d+)-(.*)-(\d+)", message_id, re.DOTALL)
    if match is None:
        raise ValueError(f"{message_id!r} is not the id of a message")
    return Parts(int(match[1]), int(match[2]), match[3], int(match[4]))


class Sequences:
    """Numbers the messages of the same round, client and verb; rounds that are over are forgotten.

    An app that goes back to an earlier round gets numbers that were not used before.
    """

    def __init__(self) -> None:
        self._next: Counter[tuple[int, int, str]] = Counter()
        self._first = 0
        self._newest_round = 0

    def next(self, server_round: int, client_id: int, verb: str) -> int:
        """Return the number of a new message; ``server_round`` is 0 if it belongs to none."""
        if 0 < server_round < self._newest_round - 1:
            self.begin_anew()
        if server_round > self._newest_round:
            self._newest_round = server_round
            self._keep_from(server_round - 1)
        key = (server_round, client_id, verb)
        self._next[key] += 1
        return self._first + self._next[key] - 1

    def begin_anew(self) -> None:
        """Let rounds begin at 1 once more."""
        self._first += _MANY
        self._newest_round = 0
        self._keep_from(None)

    def capture(self) -> dict[tuple[int, int, str], int]:
        """Return what must outlast the end of a round: messages of no round."""
        return {key: count for key, count in self._next.items() if key[0] == 0}

    def restore(self, captured: Mapping[tuple[int, int, str], int]) -> None:
        """Go on from what `capture` returned."""
        self._next |= Counter(captured)

    def _keep_from(self, server_round: int | None) -> None:
        self._next = Counter(
            {
                key: count
                for key, count in self._next.items()
                if key[0] == 0 or (server_round is not None and key[0] >= server_round)
            }
        )
