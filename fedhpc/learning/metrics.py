"""How good a model is on labelled images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhpc.learning.training import Examples

# At a time, as float32; what a model makes of them may be 60 times as much (ResNet-18).
_BATCHES_BYTES = 32_000_000


def evaluate(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    device: torch.device,
    batch_size: int = 512,
    workers: int = 1,
) -> dict[str, float | list[Any]]:
    """Evaluate a model; leaves it on ``device`` and in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Maps (B, C, H, W) to (B, num_classes) logits.
    images : ndarray
        uint8, (N, C, H, W), N at least 1.
    labels : ndarray
        int64, (N,), 0 to num_classes - 1.
    mean, std : sequence of float
        Normalisation, one a channel, in units of ``images`` (0 to 255); std not 0.
    num_classes : int
        Number of classes, also of those that do not occur here.
    device : torch.device
        Where to compute.
    batch_size : int, default 512
        Examples at a time; changes the speed only.
    workers : int, default 1
        Batches at a time on the CPU, each with as many threads as torch has here, fewer where they
        are more than 32 MB; changes the speed only, to the last bit.

    Returns
    -------
    dict
        ``loss``: mean cross entropy. ``accuracy``, and ``precision``, ``recall``, ``f1``: macro,
        over the classes that occur in labels or predictions, 0 to 1. ``precision_per_class``,
        ``recall_per_class``, ``f1_per_class``: num_classes values, 0 where undefined.
        ``confusion_matrix``: num_classes lists of num_classes counts, a row a true class.
        ``num_examples``: N.

    Raises
    ------
    ConfigError
        If there are no examples.
    """
    model.to(device).eval()
    examples = Examples.on(device, images, labels, mean, std)

    @torch.inference_mode()
    def evaluate_batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = examples.batch(rows)
        if device.type == "cpu":  # a quarter of the time less with convolutions
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits = model(inputs)
        return functional.cross_entropy(logits, targets, reduction="sum"), logits.argmax(dim=1)

    batches = torch.split(torch.arange(len(examples), device=device), batch_size)
    batch_bytes = 4 * batch_size * int(np.prod(images.shape[1:]))
    workers = min(workers, len(batches), _BATCHES_BYTES // batch_bytes)
    if device.type == "cpu" and workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(evaluate_batch, batches))
    else:
        results = [evaluate_batch(rows) for rows in batches]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for loss, _ in results:
        total.add_(loss)
    predictions = torch.cat([predicted for _, predicted in results]).cpu().numpy()

    # Not by scikit-learn: its import takes longer than the evaluations of a small run.
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    matrix = cells.reshape(num_classes, num_classes)
    hits, answers, truths = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    precision, recall = hits / np.maximum(answers, 1), hits / np.maximum(truths, 1)
    f1 = 2 * hits / np.maximum(answers + truths, 1)
    occurs = matrix.any(axis=0) | matrix.any(axis=1)
    return {
        "loss": total.item() / len(examples),
        "accuracy": float(matrix.trace() / len(examples)),
        "precision": float(precision[occurs].mean()),
        "recall": float(recall[occurs].mean()),
        "f1": float(f1[occurs].mean()),
        "precision_per_class": precision.tolist(),
        "recall_per_class": recall.tolist(),
        "f1_per_class": f1.tolist(),
        "confusion_matrix": matrix.tolist(),
        "num_examples": len(examples),
    }
