"""What the two halves of the built-in app share: the run's data, model and hyperparameters."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedhpc import config
from fedhpc.errors import PlatformError
from fedhpc.files import read_json
from fedhpc.learning import data, models, partitions, training
from fedhpc.learning.data import Dataset
from fedhpc.learning.split import Split
from fedhpc.paths import RunPaths


class Experiment:
    """One run of the built-in app, seen from any process.

    Parameters
    ----------
    run_dir : Path
        The run folder.

    Attributes
    ----------
    rehearses : bool
        Whether fits are to be short, as nothing comes of them.
    """

    def __init__(self, run_dir: Path) -> None:
        self.paths = RunPaths(run_dir)
        self.config = config.load(self.paths.config)
        if self.config.training.deterministic:  # here, as no fit may change the environment
            os.environ.setdefault(*training.CUBLAS_WORKSPACE)
        self.rehearses = False

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, memory-mapped: all children of a node share its pages."""
        prepared = read_json(self.paths.data)
        if prepared is None:
            raise PlatformError(f"could not read {self.paths.data}", "it is written by submit")
        packed = Path(prepared["packed"])
        if self.config.data.stage_to is not None:
            target = os.path.expandvars(self.config.data.stage_to)
            if "$" in target:
                raise PlatformError(
                    f"data.stage_to: expected its variables to be set on this node, found {target}"
                )
            packed = data.stage(packed, Path(target).expanduser())
        return data.open_dataset(packed)

    @cached_property
    def _partitions(self) -> list[np.ndarray]:
        return partitions.load(self.paths.partitions)

    def warm_up(self) -> None:
        """Open what every child needs, so that the children of this process inherit it."""
        _ = self.dataset, self._partitions, self._model

    def examples(self, client_id: int, *, validation: bool = False) -> Split:
        """Return a client's examples; copies, unlike the data set.

        If clients evaluate, the last ``validation_fraction`` of each one's examples (at least one)
        is kept for that and not trained on.
        """
        indices = self._partitions[client_id]
        federation = self.config.federation
        if federation.clients_per_evaluation:
            kept = max(1, round(len(indices) * federation.validation_fraction))
            indices = indices[-kept:] if validation else indices[:-kept]
        if self.rehearses:
            batch = self.config.training.batch_size
            indices = indices[: batch + len(indices) % batch]
        is_fresh = self.config.isolation.fits_per_process == 1
        return self.dataset.train.take(indices, once=is_fresh)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Let fits have one epoch, with a batch of each size and few examples, inside of it."""
        self.rehearses = True
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            self.rehearses = False
            self._model.zero_grad()

    @cached_property
    def _model(self) -> torch.nn.Module:
        # A fit's random numbers must not depend on whether it was the first in its process.
        with torch.random.fork_rng(devices=[]):
            return self.new_model()

    def model_with(self, arrays: ArrayRecord) -> torch.nn.Module:
        """Return the process's one model, with these weights; initialising one each time is slow.

        The weights are copied: where numpy's memory lies would change the last bits of a product.
        """
        self._model.load_state_dict(arrays.to_torch_state_dict())
        return self._model

    def new_model(self) -> torch.nn.Module:
        """Return a new model, initialised from torch's global generator."""
        dataset = self.dataset
        channels, height, width = dataset.train.images.shape[1:]
        return models.build(
            self.config.model.name,
            self.config.model.params,
            (channels, height, width),
            len(dataset.classes),
        )

    def determinism(self, device: torch.device) -> AbstractContextManager[None]:
        """Return what keeps to deterministic algorithms inside of it, if the config asks so."""
        if self.config.training.deterministic:
            return training.deterministic_algorithms(device)
        return nullcontext()


@lru_cache(maxsize=1)
def open_experiment(run_dir: str) -> Experiment:
    """Return the run's experiment; the same object within a process and its forks."""
    return Experiment(Path(run_dir))
