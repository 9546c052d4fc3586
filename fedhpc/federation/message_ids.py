"""Ids of messages: the same fit has the same id, whoever runs it and whichever attempt asks."""

import re
from typing import NamedTuple


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
