"""Count the floating-point operations of a network."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_per_image(module: nn.Module, example: torch.Tensor, *, is_training: bool = False) -> int:
    """Floating-point operations for `example`, one image; with the backward pass if `is_training`.

    Counts matrix products and convolutions (torch.utils.flop_counter), two per multiply-add.
    """
    module.eval()
    # Attention is counted where it is written out as matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training and output.requires_grad:
            output.sum().backward()
            module.zero_grad()
    return counter.get_total_flops()
