"""Count the floating-point operations of a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count the matrix products and convolutions of the block (torch.utils.flop_counter), two per multiply-add.

    Each of the two gradients of a convolution takes as many operations as its forward pass. torch 2.14 does not divide
    the gradient of the weights by `groups`: it counts a depthwise convolution of 32 channels as 34 forward passes
    instead of 3.
    """
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    # Attention is counted where it is written out as matrix products
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def _convolution_backward(
    gradient_shape: list[int],
    input_shape: list[int],
    weight_shape: list[int],
    *others: Any,  # noqa: ANN401
    **_: object,
) -> int:
    """`others` are those of aten.convolution_backward from `bias` on."""
    *_before, transposed, _output_padding, _groups, output_mask = others
    forward = conv_flop_count(input_shape, weight_shape, gradient_shape, transposed=transposed)
    return forward * sum(output_mask[:2])  # the gradients of the input and of the weights, where they are wanted


def flops_per_image(module: nn.Module, example: torch.Tensor, *, is_training: bool = False) -> int:
    """Floating-point operations for `example`, one image; with the backward pass if `is_training`."""
    module.eval()
    with counting_flops() as counter, torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training and output.requires_grad:
            output.sum().backward()
            module.zero_grad()
    return counter.get_total_flops()
