"""The built-in app's server: an ordinary Flower ServerApp.

The model is made and evaluated in child processes, so that this process, which holds the whole
federation, loads no torch and keeps no GPU memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedhpc import allotment, config, environment
from fedhpc.federation import compat, seeds, strategies
from fedhpc.federation.payload import BytesLike, decode_arrays, encode_arrays
from fedhpc.isolation import ChildPool, Need, PoolOptions, Slot, channel
from fedhpc.isolation.nvml import open_nvml
from fedhpc.paths import RunPaths

app = ServerApp()

_MODULE = "fedhpc.federation.server_app"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the configured strategy."""
    run_dir = str(context.run_config["run-dir"])
    settings = config.load(RunPaths(Path(run_dir)).config)
    federation, isolation = settings.federation, settings.isolation
    strategy = strategies.build(settings.strategy, federation)
    options = PoolOptions(
        start_method=isolation.start_method,
        threads_per_fit=isolation.threads_per_fit,
        standby=False,
        huge_pages=False,  # one child a round: it would not pay
        # No optimizer steps here: without torch._dynamo the first model is there sooner.
        preload=("numpy", "torch", f"{_MODULE}_children"),
        prepare=f"{_MODULE}_children:prepare",
        prepare_arg=run_dir,
        prepare_early=True,
    )
    # The server job needs no GPU, and uses one that it has: in its turn, if others share it.
    nvml = None if isolation.device == "cpu" else open_nvml()
    here = environment.current()
    folder = allotment.prepare_lock_folder(isolation, here) if nvml else None
    if isolation.device == "cuda":
        isolation = isolation.model_copy(update={"device": "auto"})
    slot = allotment.slots(isolation, here, nvml, folder=folder)[0]
    with ChildPool(options, nvml) as pool:
        model = _Model(pool, slot, isolation, f"{Path(run_dir).name}, the server")
        arrays = model.initial(seeds.derive(settings.seed, "model"))

        def evaluate(server_round: int, current: ArrayRecord) -> MetricRecord | None:
            every, last = federation.evaluate_every, server_round == federation.num_rounds
            due = last or (every > 0 and server_round % every == 0)
            return model.evaluate(current) if due else None

        strategy.start(
            grid=grid,
            initial_arrays=arrays,
            num_rounds=federation.num_rounds,
            timeout=federation.round_timeout_s,
            evaluate_fn=evaluate,
        )


class _Model:
    """The global model, as far as it needs torch: each call is a child process."""

    def __init__(
        self, pool: ChildPool, slot: Slot, isolation: config.Isolation, label: str
    ) -> None:
        given = isolation.gpu_memory_gb
        self._need = None if given is None else Need(int(1e9 * given))
        self._label = label
        self._pool = pool
        self._slot = slot
        self._isolation = isolation
        self._skeleton = b""

    def initial(self, seed: int) -> ArrayRecord:
        """Return the arrays of a new model."""
        skeleton, blob = self._call("initial_arrays", [seed.to_bytes(8, "little")])
        self._skeleton = bytes(skeleton)
        records = compat.records_from_bytes(self._skeleton)
        return decode_arrays(records.array_records["arrays"], blob)

    def evaluate(self, arrays: ArrayRecord) -> MetricRecord:
        """Return the metrics of a model on the test set."""
        (text,) = self._call("evaluate", [self._skeleton], encode_arrays(arrays).parts)
        metrics = json.loads(bytes(text))
        # Flower's records are flat: the confusion matrix goes row by row.
        matrix = metrics.pop("confusion_matrix")
        return MetricRecord({**metrics, "confusion_matrix": [n for row in matrix for n in row]})

    def _call(self, function: str, *buffers: Sequence[BytesLike]) -> list[memoryview]:
        fds = [channel.write_memory(parts) for parts in buffers]
        try:
            reply = self._pool.run(
                f"{_MODULE}_children:{function}",
                fds,
                slot=self._slot,
                timeout_s=self._isolation.fit_timeout_s,
                slot_timeout_s=self._isolation.slot_timeout_s,
                label=self._label,
                need=self._need,
            )
        finally:
            channel.close_all(fds)
        try:
            return [channel.view(buffer) for buffer in reply.buffers]
        finally:
            reply.close()
