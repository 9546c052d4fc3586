"""The built-in ClientApp on Flower's simulation engine, with Ray: a peer of `peers.py`.

Flower draws cohorts and numbers from generators that nobody seeds, and averages in the order of
arrival. So that the model can be compared bit for bit, the strategy is seeded before it samples and
is given the replies in client order, and the ClientApp is called inside one that seeds each fit, as
fedhpc does. The engine's best settings: two actors of one core, no dashboard, a small object store,
replies looked for every 10 ms (not 100), malloc keeps what is freed, no checkpoints, no fit
recorded.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from bare import MALLOC
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedhpc.federation import apps, seeds
from fedhpc.federation.experiment import Experiment, open_experiment

_NODES_TIMEOUT_S = 60.0


@dataclass
class SeededClient:
    """The run's ClientApp with its mods, seeded for each fit as `fedhpc.federation.fit` does it."""

    run_dir: str

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        experiment, app = _open(self.run_dir)
        client_id = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        seeds.seed_all(seeds.derive(experiment.config.seed, server_round, client_id, "train", 0))
        # Flower does not let an app change the run config of its context.
        inner = Context(
            context.run_id, context.node_id, context.node_config, context.state,
            {"run-dir": self.run_dir},
        )  # fmt: skip
        return app(message, inner)


@lru_cache(maxsize=1)
def _open(run_dir: str) -> tuple[Experiment, apps.ClientCallable]:
    torch.set_num_threads(1)
    experiment = open_experiment(run_dir)
    return experiment, apps.load_client(apps.locate(experiment.config, experiment.paths))


def run(run_dir: Path, rounds: int) -> tuple[list[float], str]:
    """Run the federation of a run folder; return the seconds of each round and the checksum."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", **MALLOC}
    import ray  # noqa: F401
    from flwr.simulation import run_simulation

    torch.set_num_threads(1)
    experiment = Experiment(run_dir)
    server = _Server(experiment, rounds)
    app = ServerApp()
    app.main()(server.main)
    run_simulation(
        server_app=app,
        client_app=SeededClient(str(run_dir)),
        num_supernodes=experiment.config.federation.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {
                "num_cpus": 2,
                "object_store_memory": 200_000_000,
                "_temp_dir": str(run_dir.parent / "ray"),
            },
        },
    )
    return server.seconds, server.digest


class _Server:
    """The rounds of Flower's own loop, timed."""

    def __init__(self, experiment: Experiment, rounds: int) -> None:
        self._experiment = experiment
        self._rounds = rounds
        self.seconds: list[float] = []
        self.digest = ""

    def main(self, grid: Grid, _context: Context) -> None:
        from fedhpc.federation import strategies
        from fedhpc.federation.client_app import evaluate_arrays
        from fedhpc.federation.payload import encode_arrays

        config = self._experiment.config
        seeds.seed_all(seeds.derive(config.seed, "model"))
        initial = ArrayRecord(self._experiment.new_model().state_dict())
        strategy = strategies.build(config.strategy, config.federation)
        configure, aggregate = strategy.configure_train, strategy.aggregate_train
        # The engine starts this before all of its nodes are there.
        deadline_s = time.monotonic() + _NODES_TIMEOUT_S
        while len(grid.state.nodes) < config.federation.num_clients:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(grid.state.nodes)} of Flower's nodes are there")
            time.sleep(0.01)
        clients = {node: k for k, node in enumerate(grid.state.nodes)}  # in the order of partitions
        grid.pull_interval = 0.01
        grid.get_node_ids = lambda: list(clients)
        begins_s: list[float] = []

        def configure_train(
            server_round: int, arrays: ArrayRecord, train_config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            begins_s.append(time.perf_counter())
            seeds.seed_all(seeds.derive(config.seed, server_round, "configure_train"))
            return configure(server_round, arrays, train_config, grid)

        def aggregate_train(
            server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            in_order = sorted(replies, key=lambda reply: clients[reply.metadata.src_node_id])
            return aggregate(server_round, in_order)

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == self._rounds:
                test = self._experiment.dataset.test
                workers = len(os.sched_getaffinity(0)) // torch.get_num_threads()
                evaluate_arrays(self._experiment, arrays, test, workers)
            return None

        strategy.configure_train, strategy.aggregate_train = configure_train, aggregate_train
        result = strategy.start(grid, initial, self._rounds, evaluate_fn=evaluate)
        self.seconds = [end - begin for begin, end in pairwise(begins_s)]
        self.digest = hashlib.sha256(b"".join(encode_arrays(result.arrays).parts)).hexdigest()
