"""The loop of rounds, in place of Flower's ``Strategy.start``.

Flower's loop always begins at round 1, draws from unseeded global generators and tells nobody how
far it is. This one has the same signature and calls the same four public verbs; it goes on from a
checkpoint, if there is one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedhpc.config import Config
from fedhpc.errors import CheckpointError, RunError
from fedhpc.federation import groups, plain, seeds
from fedhpc.federation.checkpoint import Checkpoint, CheckpointStore
from fedhpc.federation.cohort import too_few
from fedhpc.federation.conventions import averages
from fedhpc.federation.grid import HpcGrid
from fedhpc.federation.strategy_state import StrategyState

logger = logging.getLogger(__name__)


class Rounds:
    """Runs strategies and keeps the model they end with.

    Parameters
    ----------
    store : CheckpointStore
        Where checkpoints go.
    config : Config
        Of the run.

    Attributes
    ----------
    final_arrays : ArrayRecord or None
        The global model after the last round, once there is one.
    starts : int
        How often an app has called `start`.
    """

    def __init__(self, store: CheckpointStore, config: Config) -> None:
        self._store = store
        self._config = config
        self._every = config.checkpoint.every
        self._found: Checkpoint | None = None
        self._lazy = ""
        self.final_arrays: ArrayRecord | None = None
        self.starts = 0

    def go_on_from(self, found: Checkpoint) -> None:
        """Let the first call of `start` go on from a checkpoint."""
        self._found = found

    def why_not(self) -> str:
        """Return why this run could not go on from a checkpoint; "" if it can."""
        if not self._every:
            return "checkpoint.every is 0"
        return self._lazy if self.starts else "the app has its own loop of rounds"

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

        The first call in a run goes on from the checkpoint, and makes checkpoints; another call is
        done again from its beginning.

        Raises
        ------
        ConfigError
            If the strategy cannot be aggregated as the config says.
        RunError
            If too few clients of a round's cohort could train, and the config says stop.
        CheckpointError
            If the checkpoint does not fit the app.
        PlatformError
            If a checkpoint could not be written.
        """
        if not isinstance(grid, HpcGrid):
            raise RunError(
                f"start() wants the grid that the ServerApp was called with, found a"
                f" {type(grid).__name__}"
            )
        self.starts += 1
        configs = (
            ConfigRecord() if train_config is None else train_config,
            ConfigRecord() if evaluate_config is None else evaluate_config,
        )
        rounds = _Rounds(
            strategy, grid, self._config, initial_arrays, num_rounds, timeout, configs, evaluate_fn
        )
        strategy.summary()
        grid.recorder.rounds_begin(num_rounds, grid.slot_seconds())
        if self.starts > 1:
            grid.begin_anew()
            rounds.run_all(None)
        else:
            if self._found is not None:
                rounds.restore(self._found)
            rounds.run_all(self)
        self.final_arrays = rounds.arrays
        return rounds.result

    def begin_checkpoint(self, rounds: "_Rounds") -> Checkpoint | None:
        """Return a checkpoint of a round that has ended but for the evaluation on the server."""
        if self.why_not():
            return None
        checkpoint = rounds.capture()
        if checkpoint is None:
            self._lazy = f"the strategy makes {rounds.lazy} while it runs, not when it is made"
            logger.warning("no checkpoints from round %d on: %s", rounds.done, self._lazy)
        elif self._is_due(checkpoint, rounds):
            self._store.wait()  # else two would be missing if the server were lost now
        return checkpoint

    def end_checkpoint(
        self, rounds: "_Rounds", checkpoint: Checkpoint, metrics: dict[str, Any]
    ) -> None:
        """Write a checkpoint, if it is due, as the evaluation is known too."""
        due = self._is_due(checkpoint, rounds)
        self._store.save(rounds.completed(checkpoint, metrics), due=due)

    def _is_due(self, checkpoint: Checkpoint, rounds: "_Rounds") -> bool:
        done = checkpoint.server_round
        return done % self._every == 0 or done == rounds.num_rounds


@dataclass(frozen=True)
class _Ended:
    """A round that has ended, but for the evaluation on the server."""

    server_round: int
    arrays: ArrayRecord
    line: dict[str, Any]
    lap: dict[str, Any]
    checkpoint: Checkpoint | None


class _Rounds:
    """One call of `Rounds.start`."""

    def __init__(
        self,
        strategy: Strategy,
        grid: HpcGrid,
        config: Config,
        arrays: ArrayRecord,
        num_rounds: int,
        timeout_s: float,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        self.strategy = strategy
        self.grid = grid
        self.recorder = grid.recorder
        self._watch = grid.recorder.watch
        self.arrays = arrays
        self.num_rounds = num_rounds
        self.timeout_s = timeout_s
        self.train_config, self.evaluate_config = configs
        self.evaluate_fn = evaluate_fn
        self.result = Result()
        self.done = -1  # the last round that is done; 0 is the evaluation before the first
        self._state = StrategyState(strategy)
        self._averages = averages(strategy)
        self._failures = config.failures
        federation = config.federation
        # More are asked only then, and only by the built-in app.
        self._wanted = federation.clients_per_round if federation.over_select > 1 else None
        self._in_groups = groups.are_wanted(federation, strategy)
        self._told: set[str] = set()
        overlap = federation.overlap_evaluation
        self._overlaps = config.app.is_builtin if overlap == "auto" else overlap
        self._put_off: _Ended | None = None
        self._saver: Rounds | None = None

    def run_all(self, saver: Rounds | None) -> None:
        """Run the rounds that are left; without ``saver`` there are no checkpoints."""
        self._saver = saver
        if self.done < 0:
            self.recorder.round_begins(0)
            self._end(0, {}, evaluated=True)
        for server_round in range(self.done + 1, self.num_rounds + 1):
            line = self._run(server_round)
            skipped = "too_few" in line and self._failures.on_too_few == "skip_round"
            self._end(server_round, line, evaluated=not skipped)

    def _end(self, server_round: int, line: dict[str, Any], *, evaluated: bool) -> None:
        """End a round: evaluate its model and write line and checkpoint, now or in the next one."""
        self.done = server_round
        later = evaluated and self._overlaps and server_round < self.num_rounds
        if evaluated and not later:
            line |= self._evaluate_on_server(server_round, self.arrays)
        lap = self.recorder.lap(self.grid.slot_seconds())
        checkpoint = None
        if self._saver is not None and server_round > 0:
            with self._watch.phase("checkpoint"):
                checkpoint = self._saver.begin_checkpoint(self)
        # A strategy may put other arrays into the record when it configures the next round.
        ended = _Ended(server_round, self.arrays.copy(), line, lap, checkpoint)
        if later:
            self._put_off = ended
        else:
            self._write(ended)

    def _catch_up(self) -> None:
        """Do for the round before what was put off."""
        if (ended := self._put_off) is not None:
            self._put_off = None
            ended.line.update(self._evaluate_on_server(ended.server_round, ended.arrays))
            self._write(ended)

    def _write(self, ended: _Ended) -> None:
        line = ended.line
        if line or ended.server_round > 0:
            self.recorder.round_ended(ended.server_round, line, ended.lap)
        if self._saver is not None and ended.checkpoint is not None:
            with self._watch.phase("checkpoint"):
                metrics = line.get("evaluate") or line.get("evaluate_clients") or {}
                self._saver.end_checkpoint(self, ended.checkpoint, metrics)

    # --- checkpoints ---

    @property
    def lazy(self) -> str:
        """What the strategy has made since, which a new one could not be given back."""
        return ", ".join(sorted(self._state.lazy))

    def capture(self) -> Checkpoint | None:
        """Return what to go on from but for `completed`; None if a new strategy cannot hold it."""
        grid, files = self.grid.capture()
        parts = {
            "grid": plain.encode(grid),
            # Strategies change them: the round, and in many apps a learning rate.
            "configs": plain.encode([self.train_config, self.evaluate_config]),
        }
        changed = self._state.changed()
        if self.lazy:
            return None
        for path, encoded in changed.items():
            parts[f"strategy.{path}"] = encoded
        if unknown := self._state.unknown - self._told:
            self._told |= unknown
            logger.warning(
                "a checkpoint cannot hold these attributes of the strategy; it is assumed that"
                " rounds do not change them: %s", ", ".join(sorted(unknown)),
            )  # fmt: skip
        # A strategy may put other arrays into the record while the checkpoint is being written.
        return Checkpoint(self.done, self.arrays.copy(), parts, files)

    def completed(self, captured: Checkpoint, metrics: dict[str, Any]) -> Checkpoint:
        """Add history and records to a checkpoint, before any reply of the next round is there."""
        history = {
            name: value for name, value in vars(self.result).items() if isinstance(value, dict)
        }
        parts = {
            "records": plain.encode(self.recorder.mark()),
            "history": plain.encode(history),
        }
        numbers = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float)
        }
        return replace(captured, parts={**captured.parts, **parts}, metrics=numbers)

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        CheckpointError
            If it is of another app.
        """
        parts = found.parts
        prefix = "strategy."
        self.grid.restore(plain.decode(parts["grid"]))
        for name, value in plain.decode(parts["history"]).items():
            setattr(self.result, name, value)
        configs = plain.decode(parts["configs"])
        for config, value in zip((self.train_config, self.evaluate_config), configs, strict=True):
            config.clear()  # the app may hold it too
            config.update(value)
        try:
            self._state.restore(
                {
                    name.removeprefix(prefix): encoded
                    for name, encoded in parts.items()
                    if name.startswith(prefix)
                }
            )
        except AttributeError as error:
            raise CheckpointError(
                f"the checkpoint after round {found.server_round} is of another strategy: {error}",
                "was the app changed since the run began?",
            ) from error
        self.arrays = found.arrays
        if found.server_round > 0:
            self.result.arrays = found.arrays
        self.done = found.server_round
        logger.info("going on after round %d", self.done)

    # --- a round ---

    def _run(self, server_round: int) -> dict[str, Any]:
        """Run a round until its model is there; return what its line of metrics says."""
        strategy, grid = self.strategy, self.grid
        self.recorder.round_begins(server_round)
        line: dict[str, Any] = {}

        try:
            with self._watch.phase("configure"):
                self._seed(server_round, "configure_train")
                messages = list(
                    strategy.configure_train(server_round, self.arrays, self.train_config, grid)
                )
            asked = grid.ask(
                messages,
                timeout=self.timeout_s,
                wanted=self._wanted,
                compare_metrics=self._averages,
                journalled=True,
            )
        except Exception:
            self._catch_up()  # the round before is done, whatever becomes of this one
            raise
        self._catch_up()
        outcome = grid.collect(asked, keep=self._in_groups)
        line |= outcome.figures()
        problem = too_few(outcome, self._failures, server_round, self.recorder.last_failure)
        with self._watch.phase("receive"):
            grid.journal.write(outcome)
        if problem:
            line["too_few"] = problem
            if self._failures.on_too_few == "skip_round":
                return line
        else:
            with self._watch.phase("receive"):
                outcome.commit()
            with self._watch.phase("aggregate"):
                replies = outcome.replies
                if self._in_groups:
                    replies = groups.means(grid, strategy, outcome, server_round, self.timeout_s)
                self._seed(server_round, "aggregate_train")
                new_arrays, train_metrics = strategy.aggregate_train(server_round, replies)
            if new_arrays is not None:
                self.arrays = self.result.arrays = new_arrays
            if train_metrics is not None:
                self.result.train_metrics_clientapp[server_round] = train_metrics
                line["train"] = dict(train_metrics)

        with self._watch.phase("configure"):
            self._seed(server_round, "configure_evaluate")
            messages = list(
                strategy.configure_evaluate(server_round, self.arrays, self.evaluate_config, grid)
            )
        asked = grid.ask(
            messages, timeout=self.timeout_s, compare_metrics=self._averages, journalled=True
        )
        outcome = grid.collect(asked)
        with self._watch.phase("receive"):
            if outcome.accepted:  # else no state changes, and who mends the cause is not bound
                grid.journal.write(outcome)
            outcome.commit()
        with self._watch.phase("aggregate"):
            self._seed(server_round, "aggregate_evaluate")
            client_metrics = strategy.aggregate_evaluate(server_round, outcome.replies)
        if client_metrics is not None:
            self.result.evaluate_metrics_clientapp[server_round] = client_metrics
            line["evaluate_clients"] = dict(client_metrics)

        return line

    def _evaluate_on_server(self, server_round: int, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what a round's line says of the evaluation; nothing where there is none."""
        if self.evaluate_fn is None:
            return {}
        with self._watch.phase("evaluate"):
            self._seed(server_round, "evaluate_fn")
            metrics = self.evaluate_fn(server_round, arrays)
        if metrics is None:
            return {}
        self.result.evaluate_metrics_serverapp[server_round] = metrics
        return {"evaluate": dict(metrics)}

    def _seed(self, server_round: int, what: str) -> None:
        seeds.seed_all(seeds.derive(self.grid.seed, server_round, what))
