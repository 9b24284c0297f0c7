"""LoRA: small trainable matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from thunder import _C
from thunder.transforms._base import Transform

if TYPE_CHECKING:
    from thunder._module import ThunderModule


class LoRA(Transform):
    """Train ``y = linear(x) + (alpha / r) * (x @ A.T) @ B.T`` on every ``nn.Linear``, everything else frozen.

    Each Linear of the compiled module gets parameters ``lora_a`` of shape ``(r, in_features)``, drawn as ``nn.Linear``
    draws weights, and ``lora_b`` of shape ``(out_features, r)``, zeros: so the output is the original's at first. Both
    have the weight's dtype and device. The original module is left as it is, the frozen weights are shared with it.

    Args:
        r: rank, at least 1.
        alpha: scale; the update is multiplied by ``alpha / r``.
    """

    def __init__(self, r: int = 8, alpha: float = 16.0) -> None:
        if r < 1:
            raise ValueError(f"r must be at least 1, not {r}")
        self.r, self.alpha = r, alpha

    def __repr__(self) -> str:
        return f"LoRA(r={self.r}, alpha={self.alpha})"

    def transform_module(self, model: ThunderModule) -> None:
        """Freeze what is there, add the new parameters."""
        frozen: dict[int, torch.nn.Parameter] = {}  # a tied parameter stays one
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            frozen.setdefault(id(parameter), torch.nn.Parameter(parameter.detach(), requires_grad=False))
            model.override(name, frozen[id(parameter)])
        for module in model.modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            a = torch.empty(self.r, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            module.register_parameter("lora_a", torch.nn.Parameter(a))
            module.register_parameter("lora_b", torch.nn.Parameter(a.new_zeros(module.out_features, self.r)))

    def transform_state_dict_for_submodule(
        self, model: ThunderModule, submodule_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """The original's weights, with the new parameters as they are now."""
        linear = model.get_submodule(submodule_name)
        if _is_extended(linear):
            state_dict.update(lora_a=linear.lora_a.detach(), lora_b=linear.lora_b.detach())
        return state_dict

    def reverse_transform_state_dict_for_submodule(
        self, model: ThunderModule, submodule_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """The merged weight: what the original needs to compute the same."""
        if _is_extended(model.get_submodule(submodule_name)):
            update = state_dict.pop("lora_b") @ state_dict.pop("lora_a")
            state_dict["weight"] = state_dict["weight"] + self.alpha / self.r * update
        return state_dict

    def transform_trace(self, trace: _C.Trace, **info: Any) -> _C.Trace:
        """Add the update after each operation on the weight of a Linear."""
        model, names = info["module"], info["names"]
        for symbol in trace.bound_symbols:
            weight = names.get(symbol.args[1]) if symbol.name == "torch.nn.functional.linear" else None
            owner = model.get_submodule(weight.removesuffix("weight").removesuffix(".")) if weight else None
            if owner is not None and _is_extended(owner):
                trace = trace.replace(symbol, self._updated(symbol.sym, owner))
        return trace

    def _updated(self, linear: Any, owner: torch.nn.Module) -> Any:
        a, b, scale = owner.lora_a, owner.lora_b, self.alpha / self.r

        def with_update(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            update = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
            return linear(x, *args, **kwargs) + scale * update

        return with_update


def _is_extended(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and "lora_a" in module._parameters
