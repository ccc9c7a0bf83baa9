"""flops: parameters and operations that one counts by hand."""

import torch
from torch import nn

from pipeline.network.backbones import count_parameters
from pipeline.network.flops import flops_per_image


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_parameters_are_counted_without_buffers() -> None:
    assert count_parameters(network()) == 4 * (27 + 1) + 2 * 4 + 5 * (144 + 1)


def test_forward_is_two_operations_per_multiply_add() -> None:
    assert flops_per_image(network(), torch.zeros(1, 3, 6, 6)) == 2 * (27 * 4 * 36 + 144 * 5)


def test_training_adds_the_gradients_of_weights_and_of_inputs_that_need_one() -> None:
    found = flops_per_image(network(), torch.zeros(1, 3, 6, 6), is_training=True)
    assert found == 2 * (2 * 27 * 4 * 36 + 3 * 144 * 5)
    example = torch.zeros(1, 3, 6, 6, requires_grad=True)
    assert flops_per_image(network(), example, is_training=True) == 3 * 2 * (27 * 4 * 36 + 144 * 5)


def test_counting_leaves_no_gradients_and_evaluation_mode() -> None:
    counted = network().train()
    statistics = counted[1].get_buffer("running_mean").clone()
    flops_per_image(counted, torch.ones(1, 3, 6, 6), is_training=True)
    assert not counted.training
    assert all(parameter.grad is None for parameter in counted.parameters())
    assert torch.equal(counted[1].get_buffer("running_mean"), statistics)


def test_attention_is_counted_as_its_matrix_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert flops_per_image(Attention(), torch.zeros(1, 2, 7, 8)) == 2 * 2 * (2 * 7 * 7 * 8)
