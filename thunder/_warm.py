"""What a first call would otherwise pay for: the functions of torch that models use most are looked up at import.

A tiny program is captured and run once, on zeros, so that no generator is drawn from. It costs some milliseconds.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F

from thunder._api import jit


def _program(tokens: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The operations of a transformer block, of several families, at the smallest size."""
    x = F.embedding(tokens, table)
    q, k, v = F.linear(x, weight.repeat(3, 1)).split(8, dim=-1)
    q, k, v = (t.view(1, 4, 2, 4).transpose(1, 2) for t in (q, k, v))
    half = q.chunk(2, dim=-1)
    q = q * table[:4, :4].cos() + torch.cat((-half[1], half[0]), dim=-1) * table[:4, :4].sin()
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, 4, 8)
    x = x + F.linear(y.contiguous(), weight, bias)
    normed = F.layer_norm(x, (8,), bias, bias)
    scaled = normed * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    hidden = F.gelu(F.linear(scaled, weight, bias)) + F.silu(scaled.float()).type_as(x) * x
    hidden = F.relu(hidden).unsqueeze(0).squeeze(0).permute(0, 2, 1).flatten(1)
    return F.softmax(hidden, dim=-1) / 2 - F.dropout(hidden, 0.1, False)[:, :1]


def warm_up() -> None:
    """Capture and run the program, where nothing of the user's is active around the import."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return
    cpu = torch.device("cpu")
    with contextlib.suppress(Exception), torch.inference_mode(False), torch.no_grad():
        tokens = torch.zeros(1, 4, dtype=torch.int64, device=cpu)
        table, weight = torch.zeros(8, 8, device=cpu), torch.zeros(8, 8, device=cpu)
        jit(_program)(tokens, table, weight, torch.zeros(8, device=cpu))
