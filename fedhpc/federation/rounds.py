"""The loop of rounds, in place of Flower's ``Strategy.start``.

Flower's loop always begins at round 1, draws from unseeded global generators and tells nobody how
far it is. This one has the same signature and calls the same four public verbs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedhpc.config import Config
from fedhpc.federation import seeds
from fedhpc.federation.cohort import too_few
from fedhpc.federation.grid import HpcGrid


class Rounds:
    """Runs strategies and keeps the model they end with.

    Parameters
    ----------
    config : Config
        Of the run.

    Attributes
    ----------
    final_arrays : ArrayRecord or None
        The global model after the last round, once there is one.
    """

    def __init__(self, config: Config) -> None:
        self.final_arrays: ArrayRecord | None = None
        self._failures = config.failures
        federation = config.federation
        # More are asked only then, and only by the built-in app.
        self._wanted = federation.clients_per_round if federation.over_select > 1 else None

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
            If too few clients of a round's cohort could train, and the config says stop.
        """
        assert isinstance(grid, HpcGrid)  # noqa: S101  (apps get no other one)
        recorder, seed = grid.recorder, grid.seed
        strategy.summary()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        averages = _averages(strategy)
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
                outcome = grid.exchange(
                    messages,
                    timeout=timeout,
                    wanted=self._wanted,
                    compare_metrics=averages,
                    journalled=True,
                )
            line |= outcome.figures()
            problem = too_few(outcome, self._failures, server_round, recorder.last_failure)
            grid.journal.write(outcome)
            if problem:
                line["too_few"] = problem
            if problem and self._failures.on_too_few == "skip_round":
                recorder.round_ended(server_round, {**line, "seconds": seconds.values})
                continue
            if not problem:
                outcome.commit()
                seeds.seed_all(seeds.derive(seed, server_round, "aggregate_train"))
                with seconds.measure("aggregate"):
                    new_arrays, train_metrics = strategy.aggregate_train(
                        server_round, outcome.replies
                    )
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
                outcome = grid.exchange(messages, timeout=timeout, compare_metrics=averages)
            outcome.commit()
            seeds.seed_all(seeds.derive(seed, server_round, "aggregate_evaluate"))
            client_metrics = strategy.aggregate_evaluate(server_round, outcome.replies)
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


def _averages(strategy: Strategy) -> bool:
    """Return whether a strategy, or the one that it wraps, refuses metrics of different names."""
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    return isinstance(strategy, FedAvg)
