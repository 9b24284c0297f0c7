"""Operators whose fake kernels want data only to check it, in terms of others.

torch's own code reads a value in the middle ("are the weights negative?") and raises or warns. Here the check is an
operation of its own, made at each call, so the rest can be captured and differentiated. Formulas and messages are
torch's: torch/nn/functional.py and aten/src/ATen/native/Correlation.cpp.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from thunder._kernels import raise_if, warn_if


def gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """``torch.nn.functional.gaussian_nll_loss`` of a ``var`` that is a tensor."""
    assert isinstance(var, torch.Tensor)
    raise_if(torch.any(var < 0), "ValueError", "var has negative entry/entries")
    if var.size() != input.size():
        if input.size()[:-1] == var.size():
            var = torch.unsqueeze(var, -1)
        elif not (
            input.ndim == var.ndim and sum(y for x, y in zip(input.size(), var.size(), strict=True) if x != y) == 1
        ):
            raise ValueError("var is of incorrect size")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(reduction + " is not valid")
    var = torch.where(var < eps, var - var.detach() + eps, var)  # clamped where autograd does not see it
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss += 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def combinations(input: torch.Tensor, r: int = 2, with_replacement: bool = False) -> torch.Tensor:
    """``torch.combinations``: which elements come together follows from their number alone."""
    if input.dim() != 1:
        raise RuntimeError(f"Expect a 1D vector, but got shape {list(input.shape)}")
    if r < 0:
        raise RuntimeError(f"Expect a non-negative number, but got {r}")
    if r == 0:
        return input.new_empty(0)
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    rows = list(choose(range(input.shape[0]), r))
    flat = torch.tensor([place for row in rows for place in row], dtype=torch.int64, device=input.device)
    return input.index_select(0, flat).view(len(rows), r)


def _weights(fweights: torch.Tensor | None, aweights: torch.Tensor | None, count: int) -> torch.Tensor | None:
    for name, given, kind in (("fweights", fweights, "integral"), ("aweights", aweights, "floating point")):
        if given is None:
            continue
        if given.dim() > 1:
            raise RuntimeError(
                f"cov(): expected {name} to have one or fewer dimensions but got {name} with {given.dim()} dimensions"
            )
        integral = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if integral is not (name == "fweights") or given.is_complex() or given.dtype == torch.bool:
            raise RuntimeError(f"cov(): expected {name} to have {kind} dtype but got {name} with {given.dtype} dtype")
        if given.numel() != count:
            raise RuntimeError(
                f"cov(): expected {name} to have the same numel as there are observations in the input but got "
                f"{given.numel()} != {count}"
            )
        raise_if((given < 0).any(), "RuntimeError", f"cov(): {name} cannot be negative")
    if fweights is None or aweights is None:
        return aweights if fweights is None else fweights
    return fweights * aweights


def cov(
    input: torch.Tensor,
    *,
    correction: int = 1,
    fweights: torch.Tensor | None = None,
    aweights: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torch.cov``."""
    if input.dim() > 2:
        raise RuntimeError(
            f"cov(): expected input to have two or fewer dimensions but got an input with {input.dim()} dimensions"
        )
    if input.dtype == torch.bool:
        raise RuntimeError("cov(): bool dtype is not supported for input")
    rows = input.view(1, -1) if input.dim() < 2 else input
    count = rows.shape[1]
    w = _weights(fweights, aweights, count)
    if w is None:
        total: Any = count
        norm: Any = max(count - correction, 0)
        if norm == 0:
            warnings.warn("cov(): degrees of freedom is <= 0", stacklevel=2)
        mean = rows.sum(1) / total
    else:
        total = w.sum()
        raise_if(total == 0, "RuntimeError", "cov(): weights sum to zero, can't be normalized")
        mean = (rows * w).sum(1) / total
        lost = correction * (w * aweights).sum() / total if aweights is not None and correction != 0 else correction
        norm = total - lost
        warn_if(norm <= 0, "cov(): degrees of freedom is <= 0")
        norm = torch.where(norm <= 0, torch.zeros_like(norm), norm)
    rows = rows - mean.unsqueeze(1)
    product = torch.mm(rows, (rows if w is None else rows * w).t().conj())
    return torch.true_divide(product, norm).squeeze()


def corrcoef(input: torch.Tensor) -> torch.Tensor:
    """``torch.corrcoef``."""
    if input.dim() > 2:
        raise RuntimeError(
            f"corrcoef(): expected input to have two or fewer dimensions but got an input with {input.dim()} dimensions"
        )
    c = cov(input)
    if c.dim() == 0:
        return c / c
    d = c.diag()
    deviation = torch.sqrt(d.real if d.is_complex() else d)
    c = c / deviation.view(-1, 1) / deviation.view(1, -1)
    return torch.complex(c.real.clip(-1, 1), c.imag.clip(-1, 1)) if c.is_complex() else c.clip(-1, 1)


TABLE: dict[str, Callable[..., Any]] = {
    "torch.nn.functional.gaussian_nll_loss": gaussian_nll_loss,
    "torch.combinations": combinations,
    "torch.cov": cov,
    "torch.Tensor.cov": cov,
    "torch.corrcoef": corrcoef,
    "torch.Tensor.corrcoef": corrcoef,
}
