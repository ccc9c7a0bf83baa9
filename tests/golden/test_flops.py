"""FLOPs against counts by hand: 2 per multiply-add; each gradient of a layer costs what its forward pass costs."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.network.flops import counting_flops, flops_per_image
from pipeline.training import heads
from pipeline.training.heads import Examples
from tests.factories import LINEAR

N, SIZE = 32, 14  # channels, px


class Attention(nn.Module):
    """Self-attention of one head over the rows of (1, n, d)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def convolution(layer: nn.Conv2d | nn.ConvTranspose2d, pixels: int) -> int:
    """Operations of a forward pass; `pixels` of the output, or of the input of a transposed convolution."""
    return 2 * pixels * math.prod(layer.weight.shape)


@pytest.mark.parametrize("groups", [1, 4, N], ids=["plain", "grouped", "depthwise"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_two_gradients_cost_the_same(groups: int, stride: int):
    layer = nn.Conv2d(N, N, 3, stride, padding=1, groups=groups)
    forward = convolution(layer, (SIZE // stride) ** 2)
    image = torch.zeros(1, N, SIZE, SIZE)
    assert flops_per_image(layer, image) == forward
    assert flops_per_image(layer, image, is_training=True) == 2 * forward, "the image needs no gradient"
    assert flops_per_image(layer, image.requires_grad_(), is_training=True) == 3 * forward


@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_convolution(groups: int):
    layer = nn.ConvTranspose2d(N, 2 * N, 2, stride=2, groups=groups)
    forward = convolution(layer, SIZE**2)
    image = torch.zeros(1, N, SIZE, SIZE, requires_grad=True)
    assert flops_per_image(layer, image) == forward
    assert flops_per_image(layer, image, is_training=True) == 3 * forward


def test_a_linear_layer():
    layer, x = nn.Linear(48, 10), torch.zeros(1, 48, requires_grad=True)
    assert flops_per_image(layer, x) == 2 * 48 * 10
    assert flops_per_image(layer, x, is_training=True) == 3 * 2 * 48 * 10


def test_attention_is_two_matrix_products_and_their_four_gradients():
    n, d = 20, 16
    x = torch.zeros(1, n, d, requires_grad=True)
    assert flops_per_image(Attention(), x) == 2 * (2 * n * n * d)
    assert flops_per_image(Attention(), x, is_training=True) == 3 * 2 * (2 * n * n * d)


def test_a_network_of_depthwise_and_plain_convolutions():
    network = nn.Sequential(nn.Conv2d(3, N, 1), nn.Conv2d(N, N, 3, padding=1, groups=N), nn.Conv2d(N, 8, 1))
    forwards = [convolution(cast(nn.Conv2d, layer), SIZE**2) for layer in network]
    image = torch.zeros(1, 3, SIZE, SIZE)
    assert flops_per_image(network, image, is_training=True) == 3 * sum(forwards) - forwards[0]


MLP = {"kind": "mlp", "hidden": (16,), "epochs": 3, "batch_size": 64}


@pytest.mark.parametrize(
    ("n_classes", "changes", "products"),
    [
        (2, {}, 2 * 64),  # one vector for two classes
        (2, {"penalty": "l1"}, 2 * 2 * 64),
        (5, {}, 2 * 5 * 64),
        (5, MLP, 2 * 64 * 16 + 3 * 16 * 5),  # the features need no gradient, the hidden layer does
    ],
    ids=["two classes", "two classes, l1", "five classes", "mlp"],
)
def test_a_head_counts_the_products_that_its_fit_computes(n_classes: int, changes: dict[str, Any], products: int):
    random, n = np.random.default_rng(0), 640
    label = np.arange(n) % n_classes
    features = random.normal(size=(n, 1, 64)) + np.eye(n_classes, 64)[label][:, None]
    train = Examples(features.astype(np.float32), label, np.ones(n))
    options = LINEAR.model_copy(update=changes | {"regularization_strengths": (0.1, 0.01), "standardize": False})
    head = heads.build((64,), n_classes, options, nn.Identity())
    with counting_flops() as counter:
        found = heads.fit(head, train, Examples(train.features[:1], label[:1], np.ones(1)), options).train_flops
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05), "what is not counted is small"
    assert found % (2 * products * n) == 0
