"""What `dispatch` wants done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assign:
    """Send the message to the link's array task."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Turn:
    """A slot of the link is the message's from now on, as far as is known here."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Keep:
    """The link's array task has the message from before: its result is wanted."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Cancel:
    """The link's array task need not finish the message."""

    link: int
    message_id: str


@dataclass(frozen=True)
class Drop:
    """Close the link: it counts as lost."""

    link: int
    reason: str


@dataclass(frozen=True)
class Fail:
    """Answer the message with an error."""

    message_id: str
    reason: str


Action = Assign | Turn | Keep | Cancel | Drop | Fail
