"""What array tasks hold from before and nobody has asked for yet: part of `dispatch`, and as pure.

A server that comes back as the next attempt asks for the same messages again, sooner or later.
"""

from collections import defaultdict
from collections.abc import Mapping

from fedhpc.federation import message_ids


class Offers:
    """Offers by link and message, and what has been asked for so far."""

    def __init__(self) -> None:
        self._of: defaultdict[int, dict[str, str]] = defaultdict(dict)  # fingerprints by message
        self._newest_round = 0
        # The last sequence number by round (the newest, and 0), client and verb.
        self._asked: dict[tuple[int, int, str], int] = {}

    def of(self, link: int) -> Mapping[str, str]:
        """Return what a link offers: fingerprints by message."""
        return self._of.get(link, {})

    def links(self) -> list[int]:
        """Return the links that offer something."""
        return list(self._of)

    def add(self, link: int, message_id: str, fingerprint: str) -> None:
        """Add an offer."""
        self._of[link][message_id] = fingerprint

    def remove(self, link: int, message_id: str) -> None:
        """Remove an offer, if there is one."""
        if link in self._of:
            self._of[link].pop(message_id, None)
            if not self._of[link]:
                del self._of[link]

    def remove_all(self, link: int) -> None:
        """Remove what a link offers."""
        self._of.pop(link, None)

    def ask(self, message_id: str) -> list[tuple[int, str]]:
        """Note that a message is asked for; return who offered it, and the fingerprints."""
        parts = _read(message_id)
        if parts.server_round > self._newest_round:
            self._newest_round = parts.server_round
            self._asked = {key: last for key, last in self._asked.items() if key[0] == 0}
        if parts.server_round in (0, self._newest_round):
            key = parts[:3]
            self._asked[key] = max(parts.sequence, self._asked.get(key, 0))
        found = [(link, held[message_id]) for link, held in self._of.items() if message_id in held]
        for link, _ in found:
            self.remove(link, message_id)
        return found

    def is_past(self, message_id: str) -> bool:
        """Return whether a message that is not open will not be asked for any more."""
        parts = _read(message_id)
        lower = 0 < parts.server_round < self._newest_round
        return lower or parts.sequence <= self._asked.get(parts[:3], -1)

    def past(self) -> list[tuple[int, str]]:
        """Return the link and message of the offers that are pointless by now."""
        return [
            (link, message_id)
            for link, held in self._of.items()
            for message_id in held
            if self.is_past(message_id)
        ]


def _read(message_id: str) -> message_ids.Parts:
    """Return what an id says; one of another form belongs to no round and no client."""
    try:
        return message_ids.read(message_id)
    except ValueError:
        return message_ids.Parts(0, -1, message_id, 0)
