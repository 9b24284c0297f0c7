"""Executors that come with the package. Each is a module that registers itself; what it needs is imported when used."""

from thunder.executors import torchcompile

__all__ = ["torchcompile"]
