"""Transforms: the order and the meaning of their hooks, and those that come with thunder."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401  (autouse fixture)
from thunder.transforms import ConstantFolding, LoRA, NvtxRanges, OffloadSaved, opaque_call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Silu(thunder.Transform):
    """Another activation: seen in values and in gradients."""

    def transform_trace(self, trace, **info):
        for symbol in trace.bound_symbols:
            if symbol.name == "torch.nn.functional.gelu":
                trace = trace.replace(symbol, F.silu)
        return trace


class Recording(thunder.Transform):
    def __init__(self, name="r", log=None):
        self.name, self.log = name, [] if log is None else log

    def transform_module(self, model):
        self.log.append((self.name, "module"))

    def transform_trace(self, trace, **info):
        self.log.append((self.name, "trace"))
        self.trace, self.info = trace, info
        return trace

    def transform_trace_post_optimization(self, trace, *, kind):
        self.log.append((self.name, kind))
        self.final = trace
        return trace


def gradients(module, x):
    y = module(x)
    names, parameters = zip(*[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True)
    return y, dict(zip(names, torch.autograd.grad(y.square().sum(), parameters), strict=True))


def assert_gradients(ours, expected):
    y, grads = ours
    torch.testing.assert_close(y, expected[0])
    assert list(grads) == list(expected[1])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], msg=lambda text, name=name: f"{name}: {text}")


# ---- hooks ----


def test_hooks_are_called_for_all_transforms_in_order(net, x):
    log = []
    first, second = Recording("a", log), Recording("b", log)
    compiled = thunder.jit(net, transforms=[first, second])
    assert log == [("a", "module"), ("b", "module")]
    assert thunder.list_transforms(compiled) == (first, second)
    with torch.no_grad():
        compiled(x)
        compiled(x)
    assert log[2:] == [("a", "trace"), ("b", "trace"), ("a", "inference"), ("b", "inference")]
    del log[:]
    compiled(x)
    assert [stage for name, stage in log if name == "b"] == ["trace", "forward", "backward"]


def test_a_transform_is_told_what_the_inputs_are(net, x):
    recording = Recording()
    compiled = thunder.jit(net, transforms=[recording])
    compiled(x)
    names, tensors = recording.info["names"], recording.info["tensors"]
    assert sorted(names.values()) == sorted(dict(net.named_parameters()))
    assert all(tensors[proxy] is compiled.get_parameter(name) for proxy, name in names.items())
    assert recording.info["module"] is compiled
    assert set(recording.trace.inputs) - set(tensors) == {recording.trace.inputs[0]}, "the argument is not known"
    assert "del" not in str(recording.final)


def test_a_changed_program_is_differentiated_as_changed(net, x):
    compiled = thunder.jit(net, transforms=[Silu()])
    expected = copy.deepcopy(net)
    expected.forward = lambda x: expected.down(F.silu(expected.up(x)))
    assert_gradients(gradients(compiled, x), gradients(expected, x))
    assert "torch.nn.functional.silu" in thunder.last_traces(compiled)[-1].operations()


def test_functions_are_transformed_too(x):
    class Seen(thunder.Transform):
        def transform_trace(self, trace, **info):
            self.info = info
            return trace

    seen = Seen()
    compiled = thunder.jit(lambda x: F.gelu(x) + 1, transforms=[Silu(), seen])
    torch.testing.assert_close(compiled(x), F.silu(x) + 1)
    assert seen.info == {"module": None, "names": {}, "tensors": {}}


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_under_autocast_the_casts_are_not_made_twice(net, x, dtype):
    same = lambda symbol: lambda *args, **kwargs: symbol.sym(*args, **kwargs)  # noqa: E731

    class Again(thunder.Transform):
        def transform_trace(self, trace, **info):
            for symbol in trace.bound_symbols:
                trace = trace.replace(symbol, same(symbol))
            return trace

    plain, ours = thunder.jit(net), thunder.jit(net, transforms=[Again()])
    with torch.autocast("cpu", dtype), torch.no_grad():
        torch.testing.assert_close(plain(x), ours(x))
    assert thunder.last_traces(plain)[-1].operations() == thunder.last_traces(ours)[-1].operations()


def test_what_a_final_trace_adds_runs(x):
    class Doubled(thunder.Transform):
        def transform_trace_post_optimization(self, trace, *, kind):
            return trace.map_output(0, lambda y: y * 2) if kind == "forward" else trace

    compiled = thunder.jit(lambda x: (x.sin(), x.cos()), transforms=[Doubled()])
    y, _ = compiled(x.requires_grad_())
    torch.testing.assert_close(y, 2 * x.sin())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.cos(), msg="nothing is differentiated any more")


# ---- the module ----


class Halved(thunder.Transform):
    def transform_module(self, model):
        model.override("up.weight", nn.Parameter(model.get_parameter("up.weight").detach() / 2))

    def transform_state_dict_for_submodule(self, model, submodule_name, state_dict):
        if submodule_name == "up":
            state_dict["weight"] = state_dict["weight"] / 2
        return state_dict

    def reverse_transform_state_dict_for_submodule(self, model, submodule_name, state_dict):
        if submodule_name == "up":
            state_dict["weight"] = state_dict["weight"] * 2
        return state_dict


def halved(net):
    expected = copy.deepcopy(net)
    expected.up.weight.data /= 2
    return expected


def test_an_overridden_parameter_leaves_the_original_as_it_is(net, x):
    before = copy.deepcopy(net.state_dict())
    compiled = thunder.jit(net, transforms=[Halved()])
    assert_gradients(gradients(compiled, x), gradients(halved(net), x))
    assert compiled.get_parameter("down.weight") is net.down.weight, "other tensors are shared"
    assert compiled.get_parameter("up.weight") is not net.up.weight
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_override_wants_a_name_that_is_there(net):
    compiled = thunder.jit(net, transforms=[Halved()])
    with pytest.raises(AttributeError, match="no parameter or buffer 'w'"):
        compiled.override("up.w", torch.zeros(1))
    with pytest.raises(AttributeError):
        compiled.override("side.weight", torch.zeros(1))


def test_state_dicts_pass_through_transforms_both_ways(net, x):
    compiled = thunder.jit(net, transforms=[Halved(), Halved()])
    original = compiled.original_state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(original[name], value)
    other = Net()
    compiled.load_original_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), halved(halved(other))(x))
    with pytest.raises(RuntimeError, match="unknown"):
        compiled.load_original_state_dict({**other.state_dict(), "unknown": torch.zeros(1)})


def test_copies_and_pickles_are_transformed_once(net, x):
    compiled = thunder.jit(net, transforms=[Halved(), Silu()])
    expected = compiled(x)
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        torch.testing.assert_close(copied(x), expected)
        assert len(thunder.list_transforms(copied)) == 2


# ---- failures ----


class Failing(thunder.Transform):
    def __init__(self, hook, result=None):
        self.hook, self.result = hook, result

    def _act(self, hook, default):
        if hook == self.hook:
            if self.result is None:
                raise ZeroDivisionError("of mine")
            return self.result
        return default

    def transform_module(self, model):
        self._act("transform_module", None)

    def transform_trace(self, trace, **info):
        return self._act("transform_trace", trace)

    def transform_trace_post_optimization(self, trace, *, kind):
        return self._act(kind, trace)


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("transform_trace", "transform_trace"),
        ("forward", "transform_trace_post_optimization"),
        ("backward", "transform_trace_post_optimization"),
    ],
)
def test_failures_name_the_transform(net, x, hook, name):
    compiled = thunder.jit(net, transforms=[Silu(), Failing(hook)], fallback="eager")
    for _ in range(2):
        with pytest.raises(
            thunder.TransformError, match=rf"Failing\(\)\.{name} failed: ZeroDivisionError: of mine"
        ) as info:
            compiled(x)
        assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_a_failure_on_the_module_is_told_at_once(net):
    with pytest.raises(thunder.TransformError, match=r"Failing\(\)\.transform_module failed"):
        thunder.jit(net, transforms=[Failing("transform_module")])


@pytest.mark.parametrize("hook", ["transform_trace", "forward"])
def test_something_else_than_an_edit_is_refused(net, x, hook):
    foreign = thunder.Trace('def f(x: "cpu f32[2]"):\n    return x\n')
    with pytest.raises(thunder.TransformError, match="must return an edit"):
        thunder.jit(net, transforms=[Failing(hook, foreign)])(x)
    with pytest.raises(thunder.TransformError, match="must return a Trace, not int"):
        thunder.jit(net, transforms=[Failing(hook, 3)])(x)


def test_halves_that_disagree_are_refused(net, x):
    class Bad(thunder.Transform):
        def transform_trace_post_optimization(self, trace, *, kind):
            first = len(trace.output) - len(trace.saved)
            return trace.map_output(first, lambda t: t.double()) if kind == "forward" else trace

    with pytest.raises(thunder.TransformError, match=r"Bad\(\): the forward trace saves .*f64.*expects .*f32"):
        thunder.jit(net, transforms=[Bad()])(x)


def test_results_keep_their_types_once_differentiated(net, x):
    class Bad(thunder.Transform):
        def transform_trace_post_optimization(self, trace, *, kind):
            return trace.map_output(0, lambda t: t.double()) if kind == "forward" else trace

    with pytest.raises(thunder.TransformError, match=r"Bad\(\).* must keep the types of the results"):
        thunder.jit(net, transforms=[Bad()])(x)


def test_what_changes_modules_wants_one_that_can_be_copied(net):
    with pytest.raises(
        TypeError, match=r"LoRA\(r=2.*\) changes modules: pass thunder.jit the nn.Module, not a function"
    ):
        thunder.jit(lambda x: net(x), transforms=[LoRA(2)])
    net.lock = __import__("threading").Lock()
    with pytest.raises(thunder.TransformError, match="Net cannot be copied: TypeError"):
        thunder.jit(net, transforms=[LoRA(2)])


def test_a_program_that_needs_its_transforms_never_runs_as_the_original(net, x):
    compiled = thunder.jit(lambda x: F.gelu(x * float(x.numpy().sum())), transforms=[Silu()], fallback="eager")
    with pytest.raises(thunder.CaptureError, match="numpy"):
        compiled(x)
    inner = thunder.jit(net, transforms=[Silu()])
    with pytest.raises(thunder.CaptureError, match="transforms would be left out"):
        thunder.jit(lambda x: inner(x) + 1)(x)
    left_out = pytest.raises(thunder.CaptureError, match="transforms would be left out")
    with left_out, torch.overrides.BaseTorchFunctionMode():
        inner(x)
    observing = thunder.jit(net, transforms=[NvtxRanges(print, print)], fallback="eager")
    assert torch.allclose(thunder.jit(lambda x: observing(x) + 1)(x), net(x) + 1), "without ranges it is the same"


# ---- constant folding ----


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        weight = torch.randn(4, 8)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_quantised_weight_is_dequantised_once(x):
    model = Quantised()
    folded = thunder.jit(model, transforms=[ConstantFolding()])
    assert_gradients(gradients(folded, x), gradients(model, x))
    assert thunder.last_traces(folded)[-1].operations() == ["torch.nn.functional.linear"]
    assert "torch.Tensor.to" in thunder.last_traces(folded)[0].operations()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))


def test_folding_leaves_what_it_may_not_rely_on(x):
    model = Quantised()
    only = thunder.jit(model, transforms=[ConstantFolding(only=["scale"])])
    small = thunder.jit(model, transforms=[ConstantFolding(max_bytes=4)])
    for compiled in (only, small):
        torch.testing.assert_close(compiled(x), model(x))
        assert "torch.Tensor.mul" in thunder.last_traces(compiled)[-1].operations()


def test_folding_does_not_touch_what_is_trained(net, x):
    folded = thunder.jit(net, transforms=[ConstantFolding()])
    assert_gradients(gradients(folded, x), gradients(net, x))


# ---- LoRA ----


class EagerLoRA(nn.Module):
    """The same by hand: modules instead of a transform."""

    class Linear(nn.Module):
        def __init__(self, linear, a, b, scale):
            super().__init__()
            self.linear, self.scale = linear.requires_grad_(False), scale
            self.lora_a, self.lora_b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

        def forward(self, x):
            return self.linear(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)

    def __init__(self, net, compiled, scale):
        super().__init__()
        for name in ("up", "down"):
            ours = compiled.get_submodule(name)
            linear = EagerLoRA.Linear(copy.deepcopy(getattr(net, name)), ours.lora_a.data, ours.lora_b.data, scale)
            setattr(self, name, linear)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def lora(net, r=2, alpha=3.0):
    compiled = thunder.jit(net, transforms=[LoRA(r, alpha)])
    with torch.no_grad():
        for name, parameter in compiled.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    return compiled


def test_lora_starts_as_the_original(net, x):
    torch.testing.assert_close(thunder.jit(net, transforms=[LoRA()])(x), net(x))


def test_lora_trains_as_by_hand(net, x):
    net, x = net.double(), x.double()  # steps amplify rounding
    compiled = lora(net)
    eager = EagerLoRA(net, compiled, 3.0 / 2)
    trained = [name for name, p in compiled.named_parameters() if p.requires_grad]
    assert trained == ["up.lora_a", "up.lora_b", "down.lora_a", "down.lora_b"]
    assert_gradients(gradients(compiled, x), gradients(eager, x))
    ours, theirs = (torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (compiled, eager))
    for _ in range(3):
        for module, optimizer in ((compiled, ours), (eager, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(compiled(x), eager(x))
    assert compiled.up.weight.grad is None
    assert thunder.compile_stats(compiled).cache_misses == 1, "a step does not compile again"


def test_lora_leaves_the_original_module(net, x):
    expected = net(x)
    lora(net)
    torch.testing.assert_close(net(x), expected)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["up.weight", "up.bias", "down.weight"]


def test_lora_merges_into_a_state_dict_of_the_original(net, x):
    compiled, merged = lora(net), Net()
    merged.load_state_dict(compiled.original_state_dict())
    torch.testing.assert_close(merged(x), compiled(x))


def test_lora_loads_weights_of_the_original(net, x):
    compiled, other = lora(net), Net()
    before = compiled.up.lora_a.clone()
    compiled.load_original_state_dict(other.state_dict())
    assert torch.equal(compiled.up.weight, other.up.weight) and torch.equal(compiled.up.lora_a, before)
    torch.testing.assert_close(compiled(x), EagerLoRA(other, compiled, 1.5)(x))


def test_lora_keeps_tied_weights_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, i):
            return self.head(self.emb(i))

    net, ids = Tied(), torch.tensor([1, 3])
    compiled = thunder.jit(net, transforms=[LoRA(1)])
    torch.testing.assert_close(compiled(ids), net(ids))
    assert compiled.head.weight is compiled.emb.weight and not compiled.emb.weight.requires_grad


def test_one_lora_serves_several_modules(net, x):
    transform, other = LoRA(2, 3.0), nn.Sequential(nn.Linear(8, 2))
    first, second = thunder.jit(net, transforms=[transform]), thunder.jit(other, transforms=[transform])
    second(x)
    first.down.lora_b.data.normal_()
    torch.testing.assert_close(first(x), EagerLoRA(net, first, 1.5)(x))


def test_lora_wants_a_rank():
    with pytest.raises(ValueError, match="at least 1"):
        LoRA(0)


# ---- offloading ----


def offloading(net, log, **options):
    def to_cpu(t):
        log.append(("out", tuple(t.shape)))
        return t.clone()

    def from_cpu(t, device):
        log.append(("in", tuple(t.shape)))
        return t.clone()

    transform = OffloadSaved(to_cpu=to_cpu, from_cpu=from_cpu, devices=("cpu",), **options)
    return thunder.jit(net, transforms=[transform])


def test_saved_tensors_move_out_and_back(net, x):
    log = []
    compiled = offloading(net, log, min_bytes=0)
    assert_gradients(gradients(compiled, x), gradients(net, x))
    out, back = [s for w, s in log if w == "out"], [s for w, s in log if w == "in"]
    assert out == back == [(3, 16)], "what the call was given stays where it is"
    forward, backward = thunder.last_traces(compiled)[-1], thunder.last_backward_traces(compiled)[-1]
    assert "to_cpu" in forward.operations() and "from_cpu" in backward.operations()
    assert len(forward.saved) == len(backward.saved)


def test_a_saved_tensor_leaves_after_its_last_use_and_comes_before_its_first(net, x):
    compiled = offloading(net, [], min_bytes=0)
    compiled(x)
    forward, backward = thunder.last_traces(compiled)[-1], thunder.last_backward_traces(compiled)[-1]
    gone = next(s for s in forward.bound_symbols if s.name == "to_cpu").flat_proxy_args[0]
    at = forward.operations().index("to_cpu")
    assert all(gone not in s.flat_proxy_args for s in forward.bound_symbols[at + 1 :])
    assert backward.operations().index("from_cpu") > 0


def test_small_tensors_stay(net, x):
    log = []
    gradients(offloading(net, log, min_bytes=4 * 3 * 16 + 1), x)
    assert log == []


@pytest.mark.parametrize(
    ("layout", "moves"),
    [
        ("[4, 6]", True),
        ("[4, 6]{1, 4}", True),
        ("[4, 6]{12, 2}", False),
        ("[4, 6]{0, 1}", False),
        ("[1, 6]{9, 1}", True),
    ],
)
def test_only_what_fills_its_memory_moves(layout, moves):
    trace = thunder.Trace(f'def f(x: "cpu f32{layout}"):\n    return x\n')
    assert OffloadSaved(min_bytes=0, devices=("cpu",))._moves(trace.inputs[0]) == moves


def test_a_result_that_is_saved_too_is_given_to_the_user_as_it_is(x):
    log = []
    compiled = offloading(lambda x: x.exp(), log, min_bytes=0)
    y = compiled(x.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.exp())
    assert [w for w, _ in log] == ["out", "in"]


@pytest.mark.gpu
def test_offloading_saves_device_memory():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model, x = Deep().cuda(), torch.randn(8192, 512, device="cuda")
    held, results = {}, {}
    for name, transforms in {"plain": [], "offload": [OffloadSaved()]}.items():
        compiled = thunder.jit(model, transforms=transforms)
        gradients(compiled, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = compiled(x)
        torch.cuda.synchronize()
        held[name] = torch.cuda.memory_allocated() - before
        del y
        results[name] = gradients(compiled, x)
    assert_gradients(results["offload"], results["plain"])
    activation = x.numel() * x.element_size()
    assert held["plain"] >= 8 * activation and held["offload"] <= 2 * activation


# ---- NVTX ----


def test_ranges_around_each_operation(net, x):
    log = []
    compiled = thunder.jit(net, transforms=[NvtxRanges(log.append, lambda: log.append("pop"))])
    y, _ = gradients(compiled, x)
    line = Net.forward.__code__.co_firstlineno + 1
    assert log[0] == f"torch.nn.functional.linear test_transforms.py:{line}"
    assert log[1] == "pop" and len(log) % 2 == 0 and log[1::2] == ["pop"] * (len(log) // 2)
    calls = len(log) // 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y)
    assert calls > 3, "forward and backward"
    torch.testing.assert_close(gradients(compiled, x)[0], net(x))


def test_ranges_around_chosen_operations(net, x):
    log = []
    chosen = NvtxRanges(log.append, lambda: log.append("pop"), only=lambda s: s.name.endswith("gelu"))
    with torch.no_grad():
        thunder.jit(net, transforms=[chosen])(x)
    assert len(log) == 2 and log[0].startswith("torch.nn.functional.gelu ")


@pytest.mark.gpu
def test_ranges_of_cuda(net, x):
    net, x = net.cuda(), x.cuda()
    torch.testing.assert_close(thunder.jit(net, transforms=[NvtxRanges()])(x), net(x))


# ---- together ----


def test_several_transforms_together(net, x):
    log = []
    transforms = [LoRA(2, 3.0), Silu(), NvtxRanges(log.append, lambda: None)]
    compiled = thunder.jit(net, transforms=transforms)
    eager = EagerLoRA(net, compiled, 1.5)
    eager.forward = lambda x: eager.down(F.silu(eager.up(x)))
    assert_gradients(gradients(compiled, x), gradients(eager, x))
    assert any("silu" in name for name in log)


def test_an_opaque_call_on_the_program_is_kept_through_the_passes(net, x):
    seen = []

    class Watching(thunder.Transform):
        def transform_trace(self, trace, **info):
            for symbol in trace.bound_symbols:
                if symbol.name.endswith("gelu"):
                    trace = trace.insert_after(symbol, opaque_call, watch, symbol.output)
            return trace

    def watch(t):
        seen.append(t.abs().max().item())

    compiled = thunder.jit(net, transforms=[Watching()])
    assert_gradients(gradients(compiled, x), gradients(net, x))
    with torch.no_grad():
        compiled(x)
    assert len(seen) == 2 and math.isclose(seen[0], F.gelu(net.up(x)).abs().max().item(), rel_tol=1e-5)


# ---- what recorded code may do ----


class Act(thunder.Transform):
    """Any function in the place of gelu."""

    def __init__(self, fn):
        self.fn = fn

    def transform_trace(self, trace, **info):
        for symbol in trace.bound_symbols:
            if symbol.name == "torch.nn.functional.gelu":
                trace = trace.replace(symbol, lambda y, *args, **kwargs: self.fn(y))
        return trace


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0]


def without_gradients_inside(y):
    with torch.no_grad():
        factor = y.square()
    return y * factor


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: y.clone().mul_(2).sub_(1),
        lambda y: y.add_(1),
        lambda y: F.dropout(y, 0.5),
        lambda y: y[torch.tensor([2, 0, 1])],
        lambda y: y + torch.tensor([1.0, 2.0] * 4),
        lambda y: y if torch.ones(()).item() else -y,
        lambda y: y * y.detach(),
        lambda y: Tripled.apply(y),
        without_gradients_inside,
    ],
    ids=["fresh in place", "in place", "random", "index", "data", "branch", "detach", "function", "no_grad"],
)
def test_recorded_code_means_what_it_means_in_eager(fn, x):
    compiled = thunder.jit(lambda x: F.gelu(x * 2) + 1, transforms=[Act(fn)])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(0)
    y = compiled(ours)
    torch.manual_seed(0)
    expected = fn(theirs * 2) + 1
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), ours), torch.autograd.grad(expected.sum(), theirs))


def test_a_result_made_of_data_alone_is_a_constant(x):
    compiled = thunder.jit(lambda x: F.gelu(x) + 1, transforms=[Act(lambda y: torch.tensor([[1.0] * 8] * 3))])
    torch.testing.assert_close(compiled(x), torch.full((3, 8), 2.0))


def test_programs_that_write_to_their_inputs_are_transformed(x):
    def writes(x, total):
        x.mul_(2)
        y = F.gelu(x)
        total.add_(y.sum())
        return y, x

    ours, theirs = (x.clone(), torch.zeros(())), (x.clone(), torch.zeros(()))
    y, same = thunder.jit(writes, transforms=[Act(F.silu)])(*ours)
    theirs[0].mul_(2)
    theirs[1].add_(F.silu(theirs[0]).sum())
    torch.testing.assert_close((y, *ours), (F.silu(theirs[0]), *theirs))
    assert same is ours[0]


def test_modules_with_state_and_randomness_are_transformed(x):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2))
    eager = copy.deepcopy(model)
    eager[2] = nn.SiLU()
    compiled = thunder.jit(model, transforms=[Act(F.silu)])
    for seed in range(3):
        torch.manual_seed(seed)
        ours = gradients(compiled, x)
        torch.manual_seed(seed)
        assert_gradients(ours, gradients(eager, x))
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))
