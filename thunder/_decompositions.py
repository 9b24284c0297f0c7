"""Operators whose fake kernels want data, in terms of others.

Some want it only to check it: torch's own code reads a value in the middle ("are the weights negative?") and raises or
warns. Here the check is an operation of its own, made at each call, so the rest can be captured and differentiated.
Others have a result whose shape depends on data: there, the operation that finds the shape out becomes one of its own,
and the rest has fixed shapes. Formulas and messages are torch's: torch/nn/functional.py, and Correlation.cpp,
IndexingUtils.h and Repeat.cpp of aten/src/ATen/native.
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


# ---- shapes that depend on data ----


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and index.dim() > 0


def _places(mask: torch.Tensor, input: torch.Tensor, dim: int, position: int) -> tuple[torch.Tensor, ...]:
    """Where a mask is true, as one index tensor for each of its dimensions; it is applied at dimension ``dim``."""
    if tuple(mask.shape) != tuple(input.shape[dim : dim + mask.dim()]):
        raise IndexError(
            f"The shape of the mask {list(mask.shape)} at index {position} does not match the shape of the indexed "
            f"tensor {list(input.shape)} at index {dim}"
        )
    return torch.nonzero(mask, as_tuple=True)


def _taken(index: Any) -> int:
    """How many dimensions an index uses up."""
    if index is None or isinstance(index, bool):
        return 0
    if isinstance(index, torch.Tensor):
        return index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    return 1


def _without_masks(input: torch.Tensor, index: Any) -> tuple[Any, ...] | None:
    """The index with a mask's places instead of the mask; None: there is no mask in it."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if not any(map(_is_mask, items)):
        return None
    dim, result = 0, []
    for position, item in enumerate(items):
        if item is Ellipsis:
            dim = input.dim() - sum(_taken(rest) for rest in items[position + 1 :])
            result.append(item)
            continue
        result.extend(_places(item, input, dim, position) if _is_mask(item) else [item])
        dim += _taken(item)
    return tuple(result)


def getitem(input: torch.Tensor, index: Any) -> torch.Tensor:
    """``input[index]`` with masks in the index."""
    places = _without_masks(input, index)
    return NotImplemented if places is None else input[places]


def index(input: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """``torch.ops.aten.index`` with masks; None stands for a whole dimension there."""
    whole = slice(None)
    places = _without_masks(input, [whole if i is None else i for i in indices])
    if places is None:
        return NotImplemented
    return torch.ops.aten.index.Tensor(input, [None if i is whole else i for i in places])


def masked_select(input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``torch.masked_select``."""
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask] if input.dim() else input.reshape(1)[mask.reshape(1)]


def repeat_interleave(
    input: torch.Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> torch.Tensor:
    """``torch.repeat_interleave`` with the number of repeats in a tensor."""
    if repeats is None:
        return torch.ops.aten.repeat_interleave.Tensor(input, output_size=output_size)
    if not isinstance(repeats, torch.Tensor):
        return NotImplemented
    if dim is None:
        input, dim = input.flatten(), 0
    if repeats.dim() == 0 or (repeats.dim() == 1 and repeats.size(0) == 1):
        repeats = repeats.reshape(1).expand(input.size(dim))
    elif repeats.dim() != 1:
        raise RuntimeError("repeats must be 0-dim or 1-dim tensor")
    elif repeats.size(0) != input.size(dim):
        raise RuntimeError(
            f"repeats must have the same size as input along dim, but got repeats.size(0) = {repeats.size(0)} and "
            f"input.size({dim}) = {input.size(dim)}"
        )
    places = torch.ops.aten.repeat_interleave.Tensor(repeats.contiguous(), output_size=output_size)
    return input.index_select(dim, places)


def tensor_split(input: torch.Tensor, indices: Any, dim: int = 0) -> Any:
    """``torch.tensor_split`` at the places in a tensor."""
    if not isinstance(indices, torch.Tensor):
        return NotImplemented
    places = indices.tolist()
    return torch.tensor_split(input, places, dim)


# ---- tensors where torch takes the number in them ----


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.dim()


def _with_number(function: Callable[..., Any], keyword: str) -> Callable[..., Any]:
    """``function`` with a tensor as the factor ``keyword``, which multiplies its first operand."""

    def call(input: torch.Tensor, *operands: Any, **options: Any) -> Any:
        number = options.pop(keyword, None)
        if not _is_number(number) or not operands:
            return NotImplemented
        return function(input, operands[0] * number.detach(), *operands[1:], **options)

    return call


def _foreach_with_number(method: str) -> Callable[..., Any]:
    """``torch._foreach_`` and the method's name, with numbers in tensors: one for each, or one tensor of all."""

    def call(inputs: Any, ones: Any, others: Any, values: Any = 1) -> Any:
        numbers = _numbers(values, len(inputs))
        if numbers is None:
            return NotImplemented
        for input, one, other, value in zip(inputs, ones, others, numbers, strict=True):
            getattr(input, method)(one, other, value=value)
        return None

    return call


def _numbers(values: Any, count: int) -> list[Any] | None:
    """One tensor for each; ``None``: these are plain numbers."""
    if isinstance(values, torch.Tensor):
        return list(values.unbind()) if values.dim() == 1 and len(values) == count else None
    return list(values) if isinstance(values, list | tuple) and any(map(_is_number, values)) else None


# ---- derivatives whose shapes depend on data ----


def setitem(input: torch.Tensor, index: Any, value: Any) -> Any:
    """``input[index] = value`` with masks in the index."""
    places = _without_masks(input, index) if isinstance(value, torch.Tensor) else None
    return NotImplemented if places is None else torch.Tensor.__setitem__(input, places, value)


def index_put(input: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False) -> Any:
    """``torch.index_put`` with masks."""
    places = _without_masks(input, indices)
    return NotImplemented if places is None else torch.index_put(input, places, values, accumulate)


def index_put_(input: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False) -> Any:
    """In place."""
    places = _without_masks(input, indices)
    return NotImplemented if places is None else input.index_put_(places, values, accumulate)


def index_fill(input: torch.Tensor, dim: int, index: torch.Tensor, value: Any) -> Any:
    """``torch.index_fill`` with a tensor: its derivative counts an index that occurs twice once."""
    if not isinstance(value, torch.Tensor) or value.dim():
        return NotImplemented
    size = input.shape[dim] if input.dim() else 1
    filled = torch.zeros(size, dtype=torch.bool, device=input.device).index_fill(0, index, True)
    shape = [1] * input.dim()
    if shape:
        shape[dim] = size
    return torch.where(filled.view(shape), value.to(input.dtype), input)


GRADIENTS: dict[str, Callable[..., Any]] = {
    "torch.Tensor.__setitem__": setitem,
    "torch.index_put": index_put,
    "torch.Tensor.index_put": index_put,
    "torch.Tensor.index_put_": index_put_,
    "torch.index_fill": index_fill,
    "torch.Tensor.index_fill": index_fill,
}

TABLE: dict[str, Callable[..., Any]] = {
    "torch.nn.functional.gaussian_nll_loss": gaussian_nll_loss,
    "torch.combinations": combinations,
    "torch.cov": cov,
    "torch.Tensor.cov": cov,
    "torch.corrcoef": corrcoef,
    "torch.Tensor.corrcoef": corrcoef,
    "torch.Tensor.__getitem__": getitem,
    "torch.ops.aten.index.Tensor": index,
    "torch.masked_select": masked_select,
    "torch.Tensor.masked_select": masked_select,
    "torch.ops.aten.masked_select.default": masked_select,
    "torch.repeat_interleave": repeat_interleave,
    "torch.Tensor.repeat_interleave": repeat_interleave,
    "torch.tensor_split": tensor_split,
    "torch.Tensor.tensor_split": tensor_split,
    "torch._foreach_addcdiv_": _foreach_with_number("addcdiv_"),
    "torch._foreach_addcmul_": _foreach_with_number("addcmul_"),
}
for _name, _keyword in {"add": "alpha", "sub": "alpha", "addcmul": "value", "addcdiv": "value"}.items():
    TABLE[f"torch.{_name}"] = TABLE[f"torch.Tensor.{_name}"] = _with_number(getattr(torch, _name), _keyword)
    TABLE[f"torch.Tensor.{_name}_"] = _with_number(getattr(torch.Tensor, f"{_name}_"), _keyword)
