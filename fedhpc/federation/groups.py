"""Hierarchical aggregation: array tasks average groups of clients, the strategy averages groups.

When it is known whose replies count they are cut, in the order of the clients, into groups whose
size depends on their number alone. A group's mean is asked for with a message like any other, whose
arrays are the replies as they lie in their files: whichever array task is free reads them, and if
it is lost another does, with the same result. The strategy is given a reply a group, with the
group's total weight: Flower's own code makes both kinds of mean.
"""

import math
from typing import TYPE_CHECKING

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)

from fedhpc.config import Federation
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.federation import compat
from fedhpc.federation.cohort import Answer, Outcome

if TYPE_CHECKING:
    from fedhpc.federation.grid import HpcGrid

# What an array task is asked for a mean with; to a ClientApp it never comes.
MESSAGE_TYPE = "query.fedhpc_mean"
_MAX_GROUP = 200  # descriptors that fit into one message to a child

# What they do with the replies is all in FedAvg.aggregate_train; they go on from the mean.
_WEIGHTED_MEANS = {kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)}


def are_wanted(federation: Federation, strategy: Strategy) -> bool:
    """Return whether a strategy is to be given means of groups.

    Raises
    ------
    ConfigError
        If it is, and needs every reply.
    """
    if federation.aggregation == "flat":
        return False
    check(strategy)
    return True


def check(strategy: Strategy) -> FedAvg:
    """Return a strategy that may be given means of groups in place of replies.

    Raises
    ------
    ConfigError
        If it may not: it needs every reply.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, FedAvg) or type(strategy).aggregate_train not in _WEIGHTED_MEANS:
        why = f"{name} needs every client's reply"
    elif not compat.averages_metrics(strategy):
        why = f"the train_metrics_aggr_fn given to {name} needs every client's reply"
    else:
        return strategy
    raise ConfigError(
        "federation",
        [f"aggregation: hierarchical is for strategies that average all replies; {why}"],
        "aggregation: flat uses Flower's own path, for every strategy",
    )


def means(
    grid: "HpcGrid", strategy: Strategy, outcome: Outcome, server_round: int, timeout_s: float
) -> list[Message]:
    """Return what a strategy is given in place of a cohort's replies.

    Parameters
    ----------
    grid : HpcGrid
        It has kept the replies.
    strategy : Strategy
        See `check`.
    outcome : Outcome
        Of the cohort.
    server_round : int
        The round.
    timeout_s : float
        Deadline of the means.

    Raises
    ------
    PlatformError
        If a group's mean could not be had.
    """
    weighted_by = check(strategy).weighted_by_key
    errors = [reply for reply in outcome.replies if reply.has_error()]
    answers = sorted(outcome.accepted, key=lambda answer: answer.key)
    if not answers:
        return errors
    compat.check_consistency([answer.reply.content for answer in answers], weighted_by)
    # A group without any weight has no mean. If nobody has weight Flower's own error says so.
    answers = [answer for answer in answers if _weight(answer, weighted_by)] or answers
    questions = [_question(group, weighted_by, server_round) for group in _cut(answers)]
    found = grid.send_on(questions, timeout=timeout_s)
    if len(found.accepted) < len(questions):
        reason = found.failed[0].reason if found.failed else "no reply before the deadline"
        raise PlatformError(
            f"round {server_round}: {len(questions) - len(found.accepted)} of {len(questions)}"
            f" groups of clients could not be averaged: {reason}"
        )
    return [*errors, *found.replies]


def _weight(answer: Answer, weighted_by: str) -> MetricRecordValues:
    (metrics,) = answer.reply.content.metric_records.values()
    return metrics[weighted_by]


def _cut(answers: list[Answer]) -> list[list[Answer]]:
    """Return as many groups as there are answers in each, about."""
    size = min(math.isqrt(len(answers) - 1) + 1, _MAX_GROUP)
    return [answers[start : start + size] for start in range(0, len(answers), size)]


def _question(group: list[Answer], weighted_by: str, server_round: int) -> Message:
    """Return the message that asks for the mean of a group's replies."""
    content = RecordDict({"weighted-by": ConfigRecord({"key": weighted_by})})
    for i, answer in enumerate(group):
        for name, record in answer.reply.content.items():
            if isinstance(record, ArrayRecord | MetricRecord):
                content[f"{i}.{name}"] = record
    node_id = group[0].client_id + 1
    return Message(content, node_id, MESSAGE_TYPE, group_id=str(server_round))


def answer(message: Message, context: Context) -> Message:  # noqa: ARG001
    """Return the mean of a group's replies: a reply like theirs with their total weight."""
    replies: dict[str, RecordDict] = {}
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord | MetricRecord):
            i, _, name = key.partition(".")
            replies.setdefault(i, RecordDict())[name] = record
    weighted_by = str(message.content.config_records["weighted-by"]["key"])
    mean = compat.weighted_mean(list(replies.values()), weighted_by)
    return Message(mean, reply_to=message)
