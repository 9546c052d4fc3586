"""The built-in models, from a table of names; each is the one of a paper or tutorial."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedhpc.errors import ConfigError
from fedhpc.learning import lookup

Shape = tuple[int, int, int]


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            "model", [f"params.{key}: expected an integer of 1 or more, found {value!r}"]
        )


def _check_size(name: str, in_shape: Shape, smallest: int) -> None:
    _, height, width = in_shape
    if min(height, width) < smallest:
        raise ConfigError(
            "model",
            [
                f"name: {name} needs images of at least {smallest}x{smallest} pixels,"
                f" found {height}x{width}"
            ],
            "logistic and mlp2 take images of any size",
        )


def logistic(in_shape: Shape, num_classes: int) -> nn.Module:
    """Multinomial logistic regression on the pixels.

    Parameters
    ----------
    in_shape : tuple of int
        (C, H, W) of an image.
    num_classes : int
        Number of classes.

    Returns
    -------
    torch.nn.Module
        Maps (N, C, H, W) to (N, num_classes) logits. 7,850 parameters on MNIST.
    """
    channels, height, width = in_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def mlp2(in_shape: Shape, num_classes: int, hidden: int = 200) -> nn.Module:
    """Multilayer perceptron with two hidden layers and ReLU: the "2NN" of McMahan et al.

    Parameters
    ----------
    in_shape : tuple of int
        (C, H, W) of an image.
    num_classes : int
        Number of classes.
    hidden : int, default 200
        Units of each hidden layer, 1 or more.

    Returns
    -------
    torch.nn.Module
        Maps (N, C, H, W) to (N, num_classes) logits. 199,210 parameters on MNIST.

    Raises
    ------
    ConfigError
        If ``hidden`` is not such a number.

    References
    ----------
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data. AISTATS 2017, https://arxiv.org/abs/1602.05629
    """
    _check_count("hidden", hidden)
    channels, height, width = in_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def cnn(in_shape: Shape, num_classes: int) -> nn.Module:
    """Small convolutional network of PyTorch's 60-minute blitz, for images of any larger size.

    Parameters
    ----------
    in_shape : tuple of int
        (C, H, W) of an image; H and W at least 16.
    num_classes : int
        Number of classes.

    Returns
    -------
    torch.nn.Module
        Maps (N, C, H, W) to (N, num_classes) logits. 62,006 parameters on 3x32x32 and 10 classes.

    Raises
    ------
    ConfigError
        If the images are too small.

    References
    ----------
    Deep Learning with PyTorch: A 60 Minute Blitz, Training a Classifier,
    https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    """
    _check_size("cnn", in_shape, 16)
    channels, height, width = in_shape
    left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left[0] * left[1], 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def cnn_mcmahan(in_shape: Shape, num_classes: int) -> nn.Module:
    """Convolutional network that McMahan et al. train on MNIST.

    Two 5x5 convolutions of 32 and 64 channels that keep the size, each with ReLU and 2x2 max
    pooling, then 512 dense units with ReLU.

    Parameters
    ----------
    in_shape : tuple of int
        (C, H, W) of an image; H and W at least 4.
    num_classes : int
        Number of classes.

    Returns
    -------
    torch.nn.Module
        Maps (N, C, H, W) to (N, num_classes) logits. 1,663,370 parameters on MNIST.

    Raises
    ------
    ConfigError
        If the images are too small.

    References
    ----------
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data. AISTATS 2017, https://arxiv.org/abs/1602.05629
    """
    _check_size("cnn_mcmahan", in_shape, 4)
    channels, height, width = in_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


def resnet18(in_shape: Shape, num_classes: int, groups: int = 2) -> nn.Module:
    """ResNet-18 of torchvision with group normalisation in place of batch normalisation.

    Statistics of a batch differ between clients whose data differ, so that averaging them breaks
    the model; group normalisation has none (Hsieh et al.). For images of at most 64 pixels a side
    the first convolution is 3x3 with stride 1 and the max pooling after it is left out, as in the
    CIFAR networks of He et al.

    Parameters
    ----------
    in_shape : tuple of int
        (C, H, W) of an image.
    num_classes : int
        Number of classes.
    groups : int, default 2
        Groups of each normalisation; a divisor of 64. Reddi et al. use 2.

    Returns
    -------
    torch.nn.Module
        Maps (N, C, H, W) to (N, num_classes) logits. 11,173,962 parameters on 3x32x32 and 10
        classes.

    Raises
    ------
    ConfigError
        If ``groups`` is not such a number.

    References
    ----------
    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016,
    https://arxiv.org/abs/1512.03385

    Hsieh, Phanishayee, Mutlu, Gibbons: The Non-IID Data Quagmire of Decentralized Machine
    Learning. ICML 2020, https://arxiv.org/abs/1910.00189

    Reddi et al.: Adaptive Federated Optimization. ICLR 2021, https://arxiv.org/abs/2003.00295
    """
    from torchvision.models import resnet

    _check_count("groups", groups)
    if 64 % groups:
        raise ConfigError("model", [f"params.groups: expected a divisor of 64, found {groups}"])
    channels, height, width = in_shape
    model: nn.Module = resnet.resnet18(
        num_classes=num_classes, norm_layer=lambda features: nn.GroupNorm(groups, features)
    )
    small = max(height, width) <= 64
    if small:
        model.maxpool = nn.Identity()
    if small or channels != 3:
        size, stride = (3, 1) if small else (7, 2)
        model.conv1 = nn.Conv2d(channels, 64, size, stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "mlp2": mlp2,
    "cnn": cnn,
    "cnn_mcmahan": cnn_mcmahan,
    "resnet18": resnet18,
}


def build(
    name: str, params: Mapping[str, Any], in_shape: Shape, num_classes: int
) -> torch.nn.Module:
    """Build a model by name, with weights drawn from torch's global generator.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    params : mapping
        Keywords of that function: ``{"hidden": 100}``.
    in_shape : tuple of int
        (C, H, W) of an image.
    num_classes : int
        Number of classes.

    Returns
    -------
    torch.nn.Module
        Maps normalised float32 images (N, C, H, W) to (N, num_classes) logits.

    Raises
    ------
    ConfigError
        For an unknown name, an unknown or bad parameter, or images that are too small.
    """
    builder = lookup.find("model", "a built-in model", name, MODELS)
    lookup.check_parameters("model", name, builder, params, reserved={"in_shape", "num_classes"})
    return builder(in_shape, num_classes, **params)
