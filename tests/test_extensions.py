"""Kernels that Python calls past torch's dispatcher: extensions of the user's, linked to torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import thunder

SOURCE = Path(__file__).parent / "c" / "extension.c"
OFFSET = object.__basicsize__  # where a tensor's object holds its TensorImpl


@pytest.fixture(scope="module")
def tripled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    library = tmp_path_factory.mktemp("extension") / "extension.so"
    libraries = Path(torch.__file__).parent / "lib"
    command = [sysconfig.get_config_var("CC").split()[0], "-std=c11", "-shared", "-fPIC", "-o", library, SOURCE]
    command += [f"-I{sysconfig.get_path('include')}", f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location("extension", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tripled


def test_an_extension_is_not_called_while_captured(tripled: Callable[..., torch.Tensor]) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return tripled(x + 1, OFFSET, x.numel()) - 1

    x = torch.randn(4)
    with pytest.raises(thunder.CaptureError, match=r"tripled.*torch\.library\.custom_op") as caught:
        thunder.jit(program, fallback="error")(x)
    assert "test_extensions.py" in str(caught.value)
    compiled = thunder.jit(program, fallback="eager")
    with pytest.warns(UserWarning, match="tripled"):
        assert torch.equal(compiled(x), (x + 1) * 3 - 1)
    assert torch.equal(compiled(2 * x), (2 * x + 1) * 3 - 1)


def test_an_extension_in_an_operator_is_compiled(tripled: Callable[..., torch.Tensor]) -> None:
    @torch.library.custom_op("thunder_tests::tripled", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        return tripled(x.clone(), OFFSET, x.numel())

    @operator.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def program(x: torch.Tensor) -> torch.Tensor:
        return operator(x + 1) - operator(torch.ones(4))  # the second is evaluated while the program is captured

    compiled, x = thunder.jit(program, fallback="error"), torch.randn(4)
    for _ in range(2):
        assert torch.equal(compiled(x), (x + 1) * 3 - 3)
    assert thunder.cache_hits(compiled) == 1
