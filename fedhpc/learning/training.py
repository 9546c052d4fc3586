"""What one fit does: plain mini-batch training, with as little as possible around PyTorch."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhpc.errors import ConfigError
from fedhpc.learning import lookup

# Name and value of the environment variable that makes cuBLAS deterministic.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# On a GPU, partitions that take less than this as float32 are normalised once a fit, not a batch at
# a time. On the CPU that much new memory costs a fresh process more than it saves: 5 to 6 ms a fit
# of 500 CIFAR-10 images (medians of children with and without in turn), and 1 ms an epoch.
_NORMALISED_AHEAD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images on a device, normalised at once on a GPU if they are few, else by batches.

    Attributes
    ----------
    images : Tensor
        (N, C, H, W); float32 and normalised, or uint8: a quarter of the memory.
    labels : Tensor
        int64, (N,).
    mean, std : Tensor
        float32, (C, 1, 1), in units of ``images``.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def on(
        cls,
        device: torch.device,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> "Examples":
        """Move examples to a device.

        Parameters
        ----------
        device : torch.device
            Where the model is.
        images : ndarray
            uint8, (N, C, H, W), N at least 1; may be read-only or memory-mapped.
        labels : ndarray
            int64, (N,).
        mean, std : sequence of float
            One a channel, in units of ``images``; std not 0.

        Raises
        ------
        ConfigError
            If there are no examples.
        """
        if len(images) == 0:
            raise ConfigError("data", ["partition: expected at least 1 example, found 0"])
        # torch warns of arrays that cannot be written, such as a read-only memory map.
        writable = [np.require(array, requirements=["C", "W"]) for array in (images, labels)]
        on_device = [torch.from_numpy(array).to(device) for array in writable]
        moments = [
            torch.tensor(m, dtype=torch.float32, device=device).view(-1, 1, 1) for m in (mean, std)
        ]
        examples = cls(*on_device, *moments)
        if device.type == "cpu" or 4 * examples.images.nbytes > _NORMALISED_AHEAD_BYTES:
            return examples
        return replace(examples, images=examples._normalised(examples.images))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised images, float32 (B, C, H, W), and labels, (B,), of these rows."""
        # Copies whole rows, which indexing does not.
        images, labels = self.images.index_select(0, rows), self.labels.index_select(0, rows)
        return images if images.is_floating_point() else self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)


def train(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: int,
    batch_size: int,
    optimizer: str,
    optimizer_params: Mapping[str, Any],
    device: torch.device,
    proximal_mu: float = 0.0,
) -> dict[str, float]:
    """Train a model in place on one client's examples, with cross entropy.

    The order of the examples comes from torch's global generator on the CPU, so that it is the
    same on every device; seed it before. The last, smaller batch of an epoch is used.

    Parameters
    ----------
    model : torch.nn.Module
        Maps (B, C, H, W) to (B, classes) logits; moved to ``device``.
    images : ndarray
        uint8, (N, C, H, W), N at least 1.
    labels : ndarray
        int64, (N,).
    mean, std : sequence of float
        Normalisation, one a channel, in units of ``images`` (0 to 255); std not 0.
    epochs : int
        Passes over the examples, 1 or more.
    batch_size : int
        Examples a step, 1 or more.
    optimizer : str
        A class of torch.optim by its own name.
    optimizer_params : mapping
        Its parameters by their own names.
    device : torch.device
        Where to train.
    proximal_mu : float, default 0
        FedProx: pulls the weights towards those at the start with mu/2 times their squared
        distance (Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127). 0 or more.

    Returns
    -------
    dict
        ``loss``: cross entropy (without the proximal term) averaged over the examples of the last
        epoch, each as it was when its batch was used. ``steps``: optimizer steps of all epochs.

    Raises
    ------
    ConfigError
        For an unknown optimizer or parameter, or if there are no examples.
    """
    # To ask for a move that moves nothing takes 3 % of a tiny fit.
    if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
        model.to(device)
    model.train()
    examples = Examples.on(device, images, labels, mean, std)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights] if proximal_mu else []
    stepper = make_optimizer(weights, optimizer, optimizer_params)

    def loss_and_gradient(rows: Tensor) -> Tensor:
        for weight in weights:
            weight.grad = None  # what zero_grad() does, without its call of the profiler
        inputs, targets = examples.batch(rows)
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        # The proximal term's gradient, mu * (w - w_start), is cheaper than the term; without mu,
        # start is empty.
        for weight, anchor in zip(weights, start, strict=False):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - anchor, alpha=proximal_mu)
        return loss.detach()

    total = torch.zeros((), dtype=torch.float64, device=device)
    steps = 0
    for _ in range(epochs):
        total.zero_()
        for rows in torch.split(torch.randperm(len(examples)).to(device), batch_size):
            # A closure works with every optimizer; LBFGS calls it several times a step.
            loss = stepper.step(partial(loss_and_gradient, rows))  # type: ignore[arg-type]
            total.add_(loss, alpha=len(rows))
            steps += 1
    # The only wait for the device: reading a number in every step would stall a GPU.
    return {"loss": total.item() / len(examples), "steps": float(steps)}


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, params: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Make an optimizer of torch.optim.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        The weights to train.
    name : str
        Its class, in torch's own spelling: ``SGD``, ``Adam``, ``LBFGS``.
    params : mapping
        Its parameters, by their own names: ``{"lr": 0.1, "momentum": 0.9}``.

    Raises
    ------
    ConfigError
        For an unknown name or parameter, with the nearest and all valid ones, or a value that the
        class refuses.
    """
    section = "training.optimizer"
    optimizer = lookup.find(section, "an optimizer of torch.optim", name, _optimizers())
    accepted = lookup.check_parameters(section, name, optimizer, params, reserved={"params"})
    by_user = {"foreach", "fused", "differentiable"} & params.keys()
    # torch's own choice on a GPU: one call for all weights. On the CPU it saves a third of a step
    # of SGD with momentum on a small model, with the same bits.
    chosen: dict[str, Any] = {"foreach": True} if "foreach" in accepted and not by_user else {}
    try:
        return optimizer(parameters, **params, **chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(section, [f"params: {name} refuses {dict(params)}: {error}"]) from error


@lru_cache(maxsize=1)
def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic algorithms only, on a GPU; the CPU's always are.

    Afterwards its flags are what they were. cuBLAS wants `CUBLAS_WORKSPACE` in the environment
    before the first use of the GPU (https://docs.nvidia.com/cuda/cublas, "Results
    reproducibility").
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
