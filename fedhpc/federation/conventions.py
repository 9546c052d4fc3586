"""What Flower's strategies and clients write into the records of messages, by convention."""

from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """Return the records of one type, by name.

    Flower's properties, such as ``content.metric_records``, check each and return what writes
    changes back: with small models that was a tenth of the server's time.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def round_of(message: Message) -> int:
    """Return the round a message belongs to, as Flower's strategies write it; 0 if it says none."""
    for record in records_of(message.content, ConfigRecord).values():
        found = record.get("server-round")
        if isinstance(found, int):
            return found
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0


def examples_of(reply: Message) -> float | None:
    """Return how many examples a reply is of, as Flower's clients say it; None if it does not."""
    for record in records_of(reply.content, MetricRecord).values():
        found = record.get("num-examples")
        if isinstance(found, int | float):
            return float(found)
    return None


def averages(strategy: Strategy) -> bool:
    """Return whether a strategy, or the one that it wraps, refuses metrics of different names."""
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    return isinstance(strategy, FedAvg)
