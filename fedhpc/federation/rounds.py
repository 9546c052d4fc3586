"""The loop of rounds, in place of Flower's ``Strategy.start``.

Flower's loop always begins at round 1, draws from unseeded global generators and tells nobody how
far it is. This one has the same signature and calls the same four public verbs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedhpc.errors import RunError
from fedhpc.federation import seeds
from fedhpc.federation.grid import HpcGrid


class Rounds:
    """Runs strategies and keeps the model they end with.

    Attributes
    ----------
    final_arrays : ArrayRecord or None
        The global model after the last round, once there is one.
    """

    def __init__(self) -> None:
        self.final_arrays: ArrayRecord | None = None

    def start(
        self,
        strategy: Strategy,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run a strategy; the parameters are those of ``Strategy.start``.

        Raises
        ------
        RunError
            If no client of a round's cohort could train.
        """
        assert isinstance(grid, HpcGrid)  # noqa: S101  (apps get no other one)
        recorder, seed = grid.recorder, grid.seed
        strategy.summary()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result()
        arrays = initial_arrays
        recorder.rounds_begin(num_rounds)

        def evaluate_on_server(server_round: int) -> MetricRecord | None:
            if evaluate_fn is None:
                return None
            seeds.seed_all(seeds.derive(seed, server_round, "evaluate_fn"))
            metrics = evaluate_fn(server_round, arrays)
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics
            return metrics

        recorder.round_begins(0)
        if (metrics := evaluate_on_server(0)) is not None:
            recorder.round_ended(0, {"evaluate": dict(metrics)})

        for server_round in range(1, num_rounds + 1):
            recorder.round_begins(server_round)
            seconds = _Seconds()
            line: dict[str, Any] = {}

            seeds.seed_all(seeds.derive(seed, server_round, "configure_train"))
            messages = list(strategy.configure_train(server_round, arrays, train_config, grid))
            with seconds.measure("train"):
                replies = grid.send_and_receive(messages, timeout=timeout)
            _check_any(replies, len(messages), server_round, recorder.last_failure)
            line["cohort"] = len(messages)
            line["failures"] = len(messages) - sum(reply.has_content() for reply in replies)
            seeds.seed_all(seeds.derive(seed, server_round, "aggregate_train"))
            with seconds.measure("aggregate"):
                new_arrays, train_metrics = strategy.aggregate_train(server_round, replies)
            if new_arrays is not None:
                arrays = result.arrays = new_arrays
            if train_metrics is not None:
                result.train_metrics_clientapp[server_round] = train_metrics
                line["train"] = dict(train_metrics)

            seeds.seed_all(seeds.derive(seed, server_round, "configure_evaluate"))
            messages = list(
                strategy.configure_evaluate(server_round, arrays, evaluate_config, grid)
            )
            with seconds.measure("evaluate_clients"):
                replies = grid.send_and_receive(messages, timeout=timeout)
            seeds.seed_all(seeds.derive(seed, server_round, "aggregate_evaluate"))
            client_metrics = strategy.aggregate_evaluate(server_round, replies)
            if client_metrics is not None:
                result.evaluate_metrics_clientapp[server_round] = client_metrics
                line["evaluate_clients"] = dict(client_metrics)

            with seconds.measure("evaluate"):
                metrics = evaluate_on_server(server_round)
            if metrics is not None:
                line["evaluate"] = dict(metrics)
            recorder.round_ended(server_round, {**line, "seconds": seconds.values})

        self.final_arrays = arrays
        return result


class _Seconds:
    """Where a round's time went."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        self.values[name] = round(time.monotonic() - start_s, 4)


def _check_any(replies: list[Message], sent: int, server_round: int, last_failure: str) -> None:
    if sent and not any(reply.has_content() for reply in replies):
        raise RunError(
            f"round {server_round}: none of its {sent} clients could train; at last {last_failure}",
            "the run folder's errors/ has every traceback",
        )
