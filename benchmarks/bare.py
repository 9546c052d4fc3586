"""The practical limit: FedAvg in plain PyTorch, persistent processes, no framework.

It draws the same cohorts and the same random numbers as fedhpc and sums in the same order, so it
ends in the same model, bit for bit; everything else is as fast as I could make it: images are
normalised by batches (a tenth of a fit faster than at once, which needs 18 MB of new memory), there
is no optimizer object, the workers never end, and malloc keeps what is freed (a tenth faster).
"""

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from fedhpc.federation import seeds
from fedhpc.federation.experiment import Experiment

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}


def work(run_dir: str, pipe: Connection) -> None:
    """Train one client after the other."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    experiment = Experiment(Path(run_dir))
    settings = experiment.config.training
    hyper = settings.optimizer.params
    momentum = hyper.get("momentum", 0.0)
    model = experiment.new_model()
    weights = list(model.parameters())
    dataset = experiment.dataset
    mean = torch.tensor(dataset.mean).view(-1, 1, 1)
    std = torch.tensor(dataset.std).view(-1, 1, 1)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        arrays, client_id, seed = task
        torch.manual_seed(seed)
        split = experiment.examples(client_id)
        images = torch.from_numpy(split.images)
        labels = torch.from_numpy(split.labels)
        with torch.no_grad():
            for weight, array in zip(weights, arrays, strict=True):
                weight.copy_(torch.from_numpy(array))
        momenta: Sequence[torch.Tensor] = []
        for _ in range(settings.epochs):
            for rows in torch.split(torch.randperm(len(labels)), settings.batch_size):
                batch = (images[rows].float() - mean) / std
                loss = cross_entropy(model(batch), labels[rows])
                gradients = torch.autograd.grad(loss, weights)
                with torch.no_grad():
                    if not momentum:
                        momenta = gradients
                    elif not momenta:
                        momenta = [gradient.clone() for gradient in gradients]
                    else:
                        torch._foreach_mul_(momenta, momentum)
                        torch._foreach_add_(momenta, gradients)
                    torch._foreach_add_(weights, momenta, alpha=-hyper["lr"])
        pipe.send(([weight.detach().numpy() for weight in weights], len(labels)))


def run(run_dir: Path, rounds: int, workers: int = 2) -> tuple[list[float], str]:
    """Run the federation of a run folder; return the seconds of each round and the checksum."""
    from flwr.app import Array, ArrayRecord

    from fedhpc.federation.payload import encode_arrays

    experiment = Experiment(run_dir)
    config = experiment.config
    seeds.seed_all(seeds.derive(config.seed, "model"))
    state = experiment.new_model().state_dict()
    arrays = [tensor.numpy() for tensor in state.values()]
    os.environ |= MALLOC
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(str(run_dir), theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    nodes = list(range(1, config.federation.num_clients + 1))
    seconds = []
    for server_round in range(1, rounds + 1):
        start_s = time.perf_counter()
        seeds.seed_all(seeds.derive(config.seed, server_round, "configure_train"))
        cohort = [node - 1 for node in random.sample(nodes, config.federation.clients_per_round)]
        arrays = _average(_fit_all(pipes, arrays, cohort, config.seed, server_round))
        seconds.append(time.perf_counter() - start_s)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(10)
    record = ArrayRecord({name: Array(a) for name, a in zip(state, arrays, strict=True)})
    digest = hashlib.sha256(b"".join(encode_arrays(record).parts)).hexdigest()
    return seconds, digest


def _fit_all(
    pipes: list[Connection],
    arrays: list[np.ndarray],
    cohort: list[int],
    seed: int,
    server_round: int,
) -> list[tuple[list[np.ndarray], int]]:
    todo = list(cohort)
    busy: dict[Connection, int] = {}
    results = {}

    def give(pipe: Connection) -> None:
        if todo:
            client_id = todo.pop(0)
            fit_seed = seeds.derive(seed, server_round, client_id, "train", 0)
            pipe.send((arrays, client_id, fit_seed))
            busy[pipe] = client_id

    for pipe in pipes:
        give(pipe)
    while busy:
        for pipe in wait(list(busy)):
            results[busy.pop(pipe)] = pipe.recv()
            give(pipe)
    return [results[client_id] for client_id in sorted(results)]


def _average(results: list[tuple[list[np.ndarray], int]]) -> list[np.ndarray]:
    total = sum(count for _, count in results)
    factors = [count / total for _, count in results]
    sums = [array * factors[0] for array in results[0][0]]
    for (arrays, _), factor in zip(results[1:], factors[1:], strict=True):
        for current, array in zip(sums, arrays, strict=True):
            current += array * factor
    return sums
