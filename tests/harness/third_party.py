"""Imports timm and litgpt in an environment that holds only torch itself.

timm wants torchvision, and litgpt's package root wants lightning; both would pull in another build of torch. The model
code of either needs neither, so the missing parts are stood in for while the import runs. The stand-ins leave
`sys.modules` afterwards: other libraries (transformers asks) keep seeing that torchvision is absent.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator

import torch


class _InterpolationMode(enum.Enum):
    """torchvision's enumeration of the same name; timm uses the members as dictionary keys."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _FrozenBatchNorm2d(torch.nn.Module):
    """Only named in isinstance checks; no model here holds one."""


class _Standin(types.ModuleType):
    """A module whose unknown public names are classes that refuse to be instantiated."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **kwargs: object) -> None:
            raise ImportError(f"{self.__name__}.{name} is a stand-in: torchvision is not installed")

        cls = type(name, (), {"__init__": refuse})
        setattr(self, name, cls)
        return cls


_TORCHVISION: dict[str, dict[str, object]] = {
    "torchvision": {"__version__": "0.0.0"},
    "torchvision.ops": {},
    "torchvision.ops.misc": {"FrozenBatchNorm2d": _FrozenBatchNorm2d},
    "torchvision.datasets": {},
    "torchvision.transforms": {"InterpolationMode": _InterpolationMode},
    "torchvision.transforms.functional": {"InterpolationMode": _InterpolationMode},
}


@contextlib.contextmanager
def _torchvision_standin() -> Iterator[None]:
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, members in _TORCHVISION.items():
        module = _Standin(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in _TORCHVISION:
            sys.modules.pop(name, None)


def import_timm() -> types.ModuleType:
    """timm, imported without torchvision where that is missing.

    Raises:
        ImportError: timm itself is not installed (`make setup` installs it).
    """
    if "timm" not in sys.modules:
        with _torchvision_standin():
            importlib.import_module("timm")
    return sys.modules["timm"]


def import_litgpt() -> types.SimpleNamespace:
    """litgpt's `GPT` and `Config`, imported without lightning where that is missing.

    Raises:
        ImportError: litgpt itself is not installed (`make setup` installs it).
    """
    if importlib.util.find_spec("lightning") is None and "litgpt" not in sys.modules:
        spec = importlib.util.find_spec("litgpt")
        if spec is None:
            raise ImportError("litgpt is not installed; run `make setup`")
        # The package without its __init__, and the one checkpoint helper that model.py names (never called here).
        package = types.ModuleType("litgpt")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["litgpt"] = package
        helper = _Standin("litgpt.scripts.convert_hf_checkpoint")
        sys.modules[helper.__name__] = helper
    config = importlib.import_module("litgpt.config")
    model = importlib.import_module("litgpt.model")
    return types.SimpleNamespace(GPT=model.GPT, Config=config.Config)


class _StandinFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for each module of packages that are not installed."""

    def __init__(self, *packages: str) -> None:
        self.packages = [p for p in packages if importlib.util.find_spec(p) is None]
        self.made: list[str] = []

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        missing = name.partition(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.made.append(spec.name)
        return _Standin(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.RequirementCache = lambda *a, **k: False  # what litgpt.constants asks: nothing is there


def import_litgpt_generate() -> types.ModuleType:
    """litgpt's module `generate.base`, whose functions need torch alone; what it imports besides is stood in for.

    Raises:
        ImportError: litgpt itself is not installed (`make setup` installs it).
    """
    import_litgpt()
    finder = _StandinFinder(
        "lightning", "lightning_utilities", "psutil", "jsonargparse", "tokenizers", "huggingface_hub"
    )
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("litgpt.generate.base")
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)
