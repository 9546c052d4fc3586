"""What the built-in ServerApp does in child processes: make the model and evaluate it."""

import json

import torch
from flwr.app import ArrayRecord

from fedhpc import environment
from fedhpc.federation import compat, seeds
from fedhpc.federation.client_app import evaluate_arrays
from fedhpc.federation.experiment import Experiment, open_experiment
from fedhpc.federation.payload import BytesLike, decode_arrays, encode_arrays

_experiment: Experiment | None = None


def prepare(run_dir: str) -> None:
    """Make this process ready for the functions below."""
    global _experiment
    _experiment = open_experiment(run_dir)
    _experiment.warm_up()


def initial_arrays(seed: memoryview) -> list[list[BytesLike]]:
    """Return names, types and shapes of a new model's arrays, and their blob."""
    assert _experiment is not None  # noqa: S101
    seeds.seed_all(int.from_bytes(seed, "little"))
    arrays = ArrayRecord(_experiment.new_model().state_dict())
    return [[compat.skeleton_to_bytes(arrays)], encode_arrays(arrays).parts]


def evaluate(skeleton: memoryview, blob: memoryview) -> list[list[BytesLike]]:
    """Return the metrics of a model on the test set, as JSON."""
    assert _experiment is not None  # noqa: S101
    records = compat.records_from_bytes(bytes(skeleton))
    arrays = decode_arrays(records.array_records["arrays"], blob)
    test = _experiment.dataset.test
    workers = environment.current().cpus // torch.get_num_threads()
    return [[json.dumps(evaluate_arrays(_experiment, arrays, test, workers)).encode()]]
