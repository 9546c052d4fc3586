"""The built-in models are those of the papers."""

from typing import Any

import pytest
import torch

from fedhpc.errors import ConfigError
from fedhpc.learning import models

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)
Shape = tuple[int, int, int]


def count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def problem(name: str, params: dict[str, Any], shape: Shape = MNIST) -> str:
    with pytest.raises(ConfigError) as caught:
        models.build(name, params, shape, 10)
    assert caught.value.source == "model"
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("logistic", MNIST, 7_850),
        ("mlp2", MNIST, 199_210),
        ("cnn", CIFAR, 62_006),
        ("cnn_mcmahan", MNIST, 1_663_370),
        ("resnet18", CIFAR, 11_173_962),
    ],
)
def test_a_model_has_as_many_parameters_as_in_its_paper(
    name: str, shape: Shape, parameters: int
) -> None:
    assert count(models.build(name, {}, shape, 10)) == parameters


@pytest.mark.parametrize("shape", [(1, 16, 16), MNIST, CIFAR, (3, 48, 80)])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_maps_images_of_each_shape_to_finite_logits(name: str, shape: Shape) -> None:
    model = models.build(name, {}, shape, 7)
    with torch.no_grad():
        logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", models.MODELS)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(models.build(name, {}, CIFAR, 10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_parameters_reach_the_model() -> None:
    assert count(models.build("mlp2", {"hidden": 10}, MNIST, 10)) == 7850 + 110 + 110
    norm = models.build("resnet18", {"groups": 8}, CIFAR, 10).get_submodule("bn1")
    assert isinstance(norm, torch.nn.GroupNorm)
    assert norm.num_groups == 8


def test_resnet18_has_group_instead_of_batch_normalisation_and_no_buffers() -> None:
    model = models.build("resnet18", {}, CIFAR, 10)
    kinds = {type(module) for module in model.modules()}
    assert torch.nn.GroupNorm in kinds
    assert torch.nn.BatchNorm2d not in kinds
    assert not list(model.buffers())


def test_resnet18_has_a_small_stem_up_to_64_pixels_and_the_usual_one_above() -> None:
    for side, kernel, pooling in ((64, 3, torch.nn.Identity), (65, 7, torch.nn.MaxPool2d)):
        for channels in (1, 3):
            model = models.build("resnet18", {}, (channels, side, side), 10)
            stem = model.get_submodule("conv1")
            assert isinstance(stem, torch.nn.Conv2d)
            assert stem.in_channels == channels
            assert stem.kernel_size == (kernel, kernel)
            assert isinstance(model.get_submodule("maxpool"), pooling)


def test_an_unknown_model_is_refused_with_the_nearest_and_all_valid_ones() -> None:
    message = problem("resnet", {})
    assert "name: expected a built-in model, found 'resnet'; did you mean resnet18?" in message
    assert "Hint: valid names: cnn, cnn_mcmahan, logistic, mlp2, resnet18" in message


def test_an_unknown_parameter_is_refused_with_the_valid_ones() -> None:
    message = problem("mlp2", {"hiden": 3})
    assert "params.hiden: mlp2 has no such parameter; did you mean hidden?" in message
    assert "Hint: valid parameters of mlp2: hidden" in message
    message = problem("logistic", {"hidden": 3})
    assert "params.hidden: logistic has no such parameter\n" in message
    assert "Hint: logistic has no parameters" in message
    assert "params.num_classes: cnn has no such parameter" in problem("cnn", {"num_classes": 3})


@pytest.mark.parametrize("value", [0, -1, 2.0, "200", True, None])
def test_a_parameter_that_is_no_count_is_refused(value: object) -> None:
    expected = f"expected an integer of 1 or more, found {value!r}"
    assert f"params.hidden: {expected}" in problem("mlp2", {"hidden": value})
    assert f"params.groups: {expected}" in problem("resnet18", {"groups": value}, CIFAR)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    message = problem("resnet18", {"groups": 3}, CIFAR)
    assert "params.groups: expected a divisor of 64, found 3" in message


def test_images_that_are_too_small_for_a_model_are_refused() -> None:
    message = problem("cnn", {}, DIGITS)
    assert "name: cnn needs images of at least 16x16 pixels, found 8x8" in message
    assert "Hint: logistic and mlp2 take images of any size" in message
    assert "at least 4x4 pixels, found 3x9" in problem("cnn_mcmahan", {}, (1, 3, 9))
    assert count(models.build("cnn_mcmahan", {}, DIGITS, 10)) > 0
