"""Training and evaluation, against plain PyTorch and scikit-learn, on real digits."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedhpc.errors import ConfigError
from fedhpc.learning import data, metrics, models, training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return data.open_dataset(data.prepare("digits", tmp_path_factory.mktemp("digits")))


def fit(
    model: nn.Module, digits: data.Dataset, rows: int = 100, **changes: Any
) -> dict[str, float]:
    arguments: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 32,
        "optimizer": "SGD",
        "optimizer_params": {"lr": 0.1},
        "device": CPU,
    }
    torch.manual_seed(7)
    return training.train(
        model,
        digits.train.images[:rows],
        digits.train.labels[:rows],
        mean=digits.mean,
        std=digits.std,
        **(arguments | changes),
    )


def new_model(name: str = "mlp2") -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, {}, (1, 8, 8), 10)


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def plain_loop(
    model: nn.Module, digits: data.Dataset, rows: int, epochs: int, mu: float = 0.0
) -> float:
    """What `train` must compute, written in the plainest way; returns the last epoch's loss."""
    images = torch.tensor(np.array(digits.train.images[:rows]), dtype=torch.float32)
    images = (images - torch.tensor(digits.mean)) / torch.tensor(digits.std)
    labels = torch.tensor(np.array(digits.train.labels[:rows]))
    start = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    for _ in range(epochs):
        order, losses = torch.randperm(rows), []
        for first in range(0, rows, 32):
            batch = order[first : first + 32]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            losses.append(loss.item() * len(batch))
            for weight, anchor in zip(model.parameters(), start, strict=True):
                loss = loss + mu / 2 * (weight - anchor).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return sum(losses) / rows


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_gives_the_weights_and_loss_of_the_plainest_loop(
    digits: data.Dataset, epochs: int
) -> None:
    ours, plain = new_model(), new_model()
    result = fit(ours, digits, epochs=epochs)
    loss = plain_loop(plain, digits, 100, epochs)
    assert torch.equal(vector(ours), vector(plain))
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["steps"] == epochs * 4  # three batches of 32 and one of 4


def test_the_proximal_term_is_that_of_fedprox(digits: data.Dataset) -> None:
    ours, plain, without = new_model(), new_model(), new_model()
    result = fit(ours, digits, epochs=3, proximal_mu=1.0)
    loss = plain_loop(plain, digits, 100, epochs=3, mu=1.0)
    fit(without, digits, epochs=3)
    torch.testing.assert_close(vector(ours), vector(plain), rtol=1e-5, atol=1e-6)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    start = vector(new_model())
    assert (vector(ours) - start).norm() < (vector(without) - start).norm()


def test_the_same_seed_gives_the_same_bits_and_the_order_comes_from_the_seed(
    digits: data.Dataset,
) -> None:
    first, again, other = new_model(), new_model(), new_model()
    fit(first, digits)
    fit(again, digits)
    assert torch.equal(vector(first), vector(again))
    training.train(
        other,
        digits.train.images[:100],
        digits.train.labels[:100],
        mean=digits.mean,
        std=digits.std,
        epochs=1,
        batch_size=32,
        optimizer="SGD",
        optimizer_params={"lr": 0.1},
        device=CPU,
    )
    assert not torch.equal(vector(first), vector(other))


def test_frozen_weights_stay_as_they_are(digits: data.Dataset) -> None:
    model = new_model()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    fit(model, digits, proximal_mu=0.1)
    assert torch.equal(frozen, before)


def test_training_learns_the_digits_and_leaves_read_only_images_alone(
    digits: data.Dataset, recwarn: pytest.WarningsRecorder
) -> None:
    model = new_model()
    result = fit(model, digits, rows=len(digits.train.labels), epochs=8)
    assert result["loss"] < 0.1
    assert evaluate(model, digits)["accuracy"] > 0.9
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("Adam", {}),
        ("AdamW", {}),
        ("Adagrad", {}),
        ("RMSprop", {}),
        ("LBFGS", {"lr": 0.5, "max_iter": 5}),
    ],
)
def test_optimizers_of_torch_lower_the_loss_also_those_that_evaluate_several_times_a_step(
    digits: data.Dataset, name: str, params: dict[str, Any]
) -> None:
    # All examples in each step: LBFGS diverges where the batches differ.
    changes: dict[str, Any] = {
        "optimizer": name,
        "optimizer_params": params,
        "batch_size": 100,
    }
    model = new_model("logistic")
    first = fit(model, digits, **changes)
    last = fit(model, digits, epochs=5, **changes)
    assert last["loss"] < first["loss"]
    assert last["steps"] == 5


def test_an_unknown_optimizer_is_refused_with_the_nearest_and_all_valid_ones(
    digits: data.Dataset,
) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(new_model(), digits, optimizer="sgd")
    message = str(caught.value)
    assert message.startswith("training.optimizer: 1 problem\n")
    assert "name: expected an optimizer of torch.optim, found 'sgd'; did you mean SGD?" in message
    assert "Hint: valid names: ASGD, Adadelta," in message
    with pytest.raises(ConfigError, match="found 'Optimizer'"):
        fit(new_model(), digits, optimizer="Optimizer")


def test_unknown_parameters_of_an_optimizer_are_refused_all_at_once_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        training.make_optimizer(new_model().parameters(), "SGD", {"momentun": 0.9, "params": 1})
    message = str(caught.value)
    assert message.startswith("training.optimizer: 2 problems\n")
    assert "params.momentun: SGD has no such parameter; did you mean momentum?" in message
    assert "params.params: SGD has no such parameter" in message
    assert "Hint: valid parameters of SGD: lr, momentum, dampening," in message


@pytest.mark.parametrize(
    ("params", "words"), [({"lr": -1.0}, "Invalid learning rate: -1.0"), ({"lr": "fast"}, "fast")]
)
def test_values_that_an_optimizer_refuses_come_with_its_own_words(
    params: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        training.make_optimizer(new_model().parameters(), "SGD", params)
    assert f"params: SGD refuses {params}: " in str(caught.value)
    assert words in str(caught.value)


def test_a_client_without_examples_is_refused(digits: data.Dataset) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(new_model(), digits, rows=0)
    assert str(caught.value) == (
        "data: 1 problem\n  partition: expected at least 1 example, found 0"
    )


def test_determinism_changes_nothing_on_a_cpu_and_on_a_gpu_nothing_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with training.deterministic_algorithms(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    with training.deterministic_algorithms(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


def test_images_that_are_normalised_by_batches_are_those_that_are_normalised_at_once(
    digits: data.Dataset,
) -> None:
    train = digits.train
    examples = training.Examples.on(CPU, train.images, train.labels, digits.mean, digits.std)
    at_once = examples._normalised(examples.images)
    for rows in torch.split(torch.randperm(len(examples)), 37):
        images, labels = examples.batch(rows)
        assert torch.equal(images, at_once[rows])
        assert torch.equal(labels, examples.labels[rows])


@pytest.mark.parametrize("given", [{"foreach": False}, {"fused": True}, {"differentiable": True}])
def test_how_an_optimizer_goes_through_the_weights_is_chosen_only_where_nobody_has(
    given: dict[str, bool],
) -> None:
    weights = list(new_model().parameters())
    chosen = training.make_optimizer(weights, "SGD", {"lr": 0.1}).defaults
    asked = training.make_optimizer(weights, "SGD", {"lr": 0.1, **given}).defaults
    assert chosen["foreach"] is True
    assert asked["foreach"] is not True
    assert asked.items() >= given.items()


# --- evaluation ----------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers with the class that is written into the first pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers = images[:, 0, 0, 0].round().long()
        return functional.one_hot(answers, 4).float() * 10


def evaluate(
    model: nn.Module, digits: data.Dataset, batch_size: int = 512, workers: int = 1
) -> dict[str, Any]:
    return metrics.evaluate(
        model,
        digits.test.images,
        digits.test.labels,
        mean=digits.mean,
        std=digits.std,
        num_classes=10,
        device=CPU,
        batch_size=batch_size,
        workers=workers,
    )


def evaluate_fixed(truth: list[int], answers: list[int]) -> dict[str, Any]:
    images = np.array(answers, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return metrics.evaluate(
        Fixed(), images, np.array(truth), mean=(0.0,), std=(1.0,), num_classes=4, device=CPU
    )


def test_metrics_are_those_of_a_confusion_matrix_worked_out_by_hand() -> None:
    result = evaluate_fixed(truth=[0, 0, 0, 1, 1, 2], answers=[0, 0, 1, 1, 1, 0])
    assert result["confusion_matrix"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["precision_per_class"] == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert result["recall_per_class"] == pytest.approx([2 / 3, 1, 0, 0])
    assert result["f1_per_class"] == pytest.approx([2 / 3, 4 / 5, 0, 0])
    # Over the three classes that occur: an absent class does not count against the model.
    assert result["f1"] == pytest.approx((2 / 3 + 4 / 5) / 3)
    assert result["num_examples"] == 6


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    from sklearn.metrics import (  # type: ignore[import-untyped]
        confusion_matrix,
        precision_recall_fscore_support,
    )

    draws = np.random.default_rng(seed)
    size = int(draws.integers(1, 12))  # classes that are not there, or are never answered
    truth, answers = (draws.integers(0, 4, size).tolist() for _ in range(2))
    result = evaluate_fixed(truth, answers)
    assert result["confusion_matrix"] == confusion_matrix(truth, answers, labels=range(4)).tolist()
    each = precision_recall_fscore_support(truth, answers, labels=range(4), zero_division=0)
    mean = precision_recall_fscore_support(truth, answers, average="macro", zero_division=0)
    for key, scores, expected in zip(("precision", "recall", "f1"), each, mean, strict=False):
        assert result[f"{key}_per_class"] == pytest.approx(scores)
        assert result[key] == pytest.approx(expected)


def test_the_loss_is_the_mean_cross_entropy_whatever_the_batch_size(digits: data.Dataset) -> None:
    model = new_model()
    images = torch.tensor(np.array(digits.test.images), dtype=torch.float32)
    images = (images - torch.tensor(digits.mean)) / torch.tensor(digits.std)
    with torch.no_grad():
        expected = functional.cross_entropy(
            model(images), torch.tensor(np.array(digits.test.labels))
        ).item()
    small, large = evaluate(model, digits, batch_size=7), evaluate(model, digits)
    assert small["loss"] == pytest.approx(expected, rel=1e-5)
    assert large["loss"] == pytest.approx(expected, rel=1e-5)
    assert small["confusion_matrix"] == large["confusion_matrix"]


def test_several_batches_at_a_time_have_the_same_metrics_to_the_last_bit(
    digits: data.Dataset,
) -> None:
    model = new_model()
    alone, together = (
        evaluate(model, digits, batch_size=16, workers=workers) for workers in (1, 4)
    )
    assert alone == together
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]


def test_metrics_are_plain_numbers_that_json_can_write(digits: data.Dataset) -> None:
    result = evaluate(new_model(), digits)
    assert json.loads(json.dumps(result)) == result
    assert np.sum(result["confusion_matrix"]) == result["num_examples"] == len(digits.test.labels)


def test_evaluation_changes_neither_weights_nor_gradients(digits: data.Dataset) -> None:
    model = new_model()
    before = vector(model)
    evaluate(model, digits)
    assert torch.equal(vector(model), before)
    assert all(weight.grad is None for weight in model.parameters())


def test_evaluating_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="partition: expected at least 1 example, found 0"):
        evaluate_fixed([], [])


def test_a_whole_fit_of_a_partition_runs_from_packed_data(tmp_path: Path) -> None:
    from fedhpc.learning import partitions

    packed = data.open_dataset(data.prepare("digits", tmp_path))
    file = tmp_path / "partitions.npz"
    partitions.save(file, partitions.make(packed.train.labels, 10, "iid", {}, 0))
    rows = partitions.load_one(file, 3)
    model = new_model("logistic")
    result = training.train(
        model,
        packed.train.images[rows],
        packed.train.labels[rows],
        mean=packed.mean,
        std=packed.std,
        epochs=5,
        batch_size=16,
        optimizer="SGD",
        optimizer_params={"lr": 0.1},
        device=CPU,
    )
    assert result["loss"] < 1.0
    assert evaluate(model, packed)["accuracy"] > 0.7
