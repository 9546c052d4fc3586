"""What Flower's strategies and clients write into the records of messages, by convention."""

from flwr.app import Message
from flwr.serverapp.strategy import FedAvg, Strategy


def round_of(message: Message) -> int:
    """Return the round a message belongs to, as Flower's strategies write it; 0 if it says none."""
    for record in message.content.config_records.values():
        found = record.get("server-round")
        if isinstance(found, int):
            return found
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0


def examples_of(reply: Message) -> float | None:
    """Return how many examples a reply is of, as Flower's clients say it; None if it does not."""
    for record in reply.content.metric_records.values():
        found = record.get("num-examples")
        if isinstance(found, int | float):
            return float(found)
    return None


def averages(strategy: Strategy) -> bool:
    """Return whether a strategy, or the one that it wraps, refuses metrics of different names."""
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    return isinstance(strategy, FedAvg)
