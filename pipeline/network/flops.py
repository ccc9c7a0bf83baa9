"""Count the floating-point operations of a network."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Count the matrix products and convolutions of the block (torch.utils.flop_counter), two per multiply-add."""
    # Attention is counted where it is written out as matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def flops_per_image(module: nn.Module, example: torch.Tensor, *, is_training: bool = False) -> int:
    """Floating-point operations for `example`, one image; with the backward pass if `is_training`."""
    module.eval()
    with counting_flops() as counter, torch.set_grad_enabled(is_training):
        output = module(example)
        if is_training and output.requires_grad:
            output.sum().backward()
            module.zero_grad()
    return counter.get_total_flops()
