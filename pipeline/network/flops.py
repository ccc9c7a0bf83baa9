"""Count the parameters and the floating-point operations (two per multiply-add) of a network."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_per_image(module: nn.Module, example: torch.Tensor, *, is_training: bool = False) -> int:
    """Floating-point operations of matrix products and convolutions for `example`, one image.

    With the backward pass if `is_training`.
    """
    module.eval()
    # Attention is counted where it is written out as matrix products
    with counter() as counted, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training and output.requires_grad:
            output.sum().backward()
            module.zero_grad()
    return counted.get_total_flops()


def counter() -> FlopCounterMode:
    """torch's counter, but right for the backward pass of grouped convolutions.

    Each of the two gradients of a convolution takes as many operations as its forward pass. torch 2.14 does not divide
    the gradient of the weights by `groups`: a depthwise convolution of 32 channels would count as 34 forward passes
    instead of 3.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    gradient_shape: list[int],
    input_shape: list[int],
    weight_shape: list[int],
    _bias: Any,  # noqa: ANN401
    _stride: Any,  # noqa: ANN401
    _padding: Any,  # noqa: ANN401
    _dilation: Any,  # noqa: ANN401
    transposed: bool,
    _output_padding: Any,  # noqa: ANN401
    _groups: int,
    output_mask: list[bool],
    **_: object,
) -> int:
    forward = conv_flop_count(input_shape, weight_shape, gradient_shape, transposed=transposed)
    return forward * sum(output_mask[:2])  # the gradients of the input and of the weights, where they are wanted
