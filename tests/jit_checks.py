"""What the tests of ``thunder.jit`` share: eager beside compiled, and nothing left behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thunder
from tests.harness.compare import clone, differences


def traces_left() -> dict[str, Any]:
    """Everything that a capture switches on and must switch off again."""
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "is_compiling": torch.compiler.is_compiling(),
        "capturing": thunder._C.is_capturing(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Each test leaves modes, flags and defaults as it found them."""
    before = traces_left()
    yield
    assert traces_left() == before


@pytest.fixture(autouse=True)
def no_grad(nothing_leaks: None) -> Iterator[None]:
    """Tests run where compiled code is used: without gradients."""
    with torch.no_grad():
        yield


def is_only_thread() -> bool:
    """No other thread runs Python code, as earlier tests may leave some."""
    return len(sys._current_frames()) == 1


def run_alone(*tests: str) -> None:
    """Runs tests in a process of their own, which has one thread."""
    env = {**os.environ, "THUNDER_TEST_ALONE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests],
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def assert_captured_at_most(compiled: Any, count: int) -> None:
    """Where threads are left, ints of attributes are not followed: then a process of its own tells (run_alone)."""
    if os.environ.get("THUNDER_TEST_ALONE"):
        assert is_only_thread()
    if is_only_thread():
        assert thunder.cache_misses(compiled) <= count


def assert_same(eager: Any, ours: Any) -> None:
    """Both are equal in structure, types, tensor metadata with strides, and values."""
    found = differences(eager, ours, strides=True)
    assert not found, "\n".join(found)


def assert_served(compiled: Any, *, misses: int, hits: int) -> None:
    """The calls so far were compiled that often, hit that often, and none ran the original."""
    stats = thunder.compile_stats(compiled)
    assert (stats.cache_misses, stats.cache_hits, stats.fallbacks) == (misses, hits, 0)


def assert_call_same(compiled: Callable, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """One call of both on equal arguments and equal random state: same result, writes to the arguments and draws."""
    eager_args, our_args = clone((args, kwargs)), clone((args, kwargs))
    start = torch.get_rng_state()
    expected = fn(*eager_args[0], **eager_args[1])
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    ours = compiled(*our_args[0], **our_args[1])
    assert_same(expected, ours)
    assert_same(eager_args, our_args)
    assert torch.equal(after, torch.get_rng_state()), "another number of random draws than eager"
    return ours


def check(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """Compile ``fn``, call it twice on fresh copies of the arguments: eager's results, one compile, one hit."""
    compiled = thunder.jit(fn)
    assert_call_same(compiled, fn, *args, **kwargs)
    assert_call_same(compiled, fn, *args, **kwargs)
    assert_served(compiled, misses=1, hits=1)
    return compiled


class Pair:
    """A module run eager and its copy compiled, driven side by side."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.eager = module
        self.model = copy.deepcopy(module)
        self.compiled = thunder.jit(self.model)

    def both(self, change: Callable[[torch.nn.Module], Any]) -> None:
        """Make the same change to the eager module and to the module under the compiled one."""
        change(self.eager)
        change(self.model)

    def same(self, *args: Any, **kwargs: Any) -> Any:
        """Call both: same result, same state dict afterwards, and no fake tensor in any attribute."""
        result = assert_call_same(self.compiled, self.eager, *args, **kwargs)
        assert_same(dict(self.eager.state_dict()), dict(self.model.state_dict()))
        assert_no_fakes(self.model)
        return result

    def served(self, *, misses: int, hits: int) -> None:
        """See :func:`assert_served`."""
        assert_served(self.compiled, misses=misses, hits=hits)


def assert_no_fakes(module: torch.nn.Module) -> None:
    """No attribute of any submodule holds a tensor of a capture."""
    from torch._subclasses.fake_tensor import FakeTensor

    def look(value: Any, where: str, depth: int = 0) -> None:
        assert not isinstance(value, FakeTensor), f"a fake tensor is left in {where}"
        if depth < 4:
            if isinstance(value, dict):
                for key, item in value.items():
                    look(item, f"{where}[{key!r}]", depth + 1)
            elif isinstance(value, list | tuple | set):
                for item in value:
                    look(item, f"{where}[...]", depth + 1)

    for name, part in module.named_modules():
        for key, value in vars(part).items():
            look(value, f"{name}.{key}")
