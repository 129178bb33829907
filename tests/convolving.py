"""What tests of convolutions share: packed filters, and a norm in any precision."""

from __future__ import annotations

import torch


def pack(filters: torch.Tensor) -> torch.Tensor:
    """Packs ``(channels, inputs, k, k)`` as operations for CPUs take filters."""
    channels, inputs, kernel, _ = filters.shape
    pair = 2 if filters.dtype == torch.bfloat16 else 1
    lanes = -(-inputs // pair)
    panels = -(-channels // 64)
    whole = filters.new_zeros(panels * 64, kernel, kernel, lanes * pair)
    whole[:channels, :, :, :inputs] = filters.permute(0, 2, 3, 1)
    whole = whole.reshape(panels, 64, kernel * kernel * lanes, pair)
    return whole.permute(0, 2, 1, 3).reshape(panels, -1, 64 * pair).contiguous()


def group_norm(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Norms ``(B, C, ...)``; torch's own takes no group of one element."""
    flat = x.reshape(len(x), groups, -1)
    centred = flat - flat.mean(2, keepdim=True)
    variance = (centred**2).mean(2, keepdim=True)
    return (centred / (variance + 1e-6).sqrt()).reshape(x.shape)
