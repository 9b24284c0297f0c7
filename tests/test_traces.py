"""Traces as objects: reading operations and values, editing, running."""

from __future__ import annotations

import pytest
import torch

import thunder
from tests.jit_checks import no_grad, nothing_leaks  # noqa: F401  (autouse fixtures)
from thunder.transforms import opaque_call

close = torch.testing.assert_close  # torch's kernels round by how memory happens to be aligned

X, W = torch.randn(4, 5), torch.randn(5, 6)


def program(x, w):
    y = torch.nn.functional.gelu(x @ w, approximate="tanh")
    a, b = y.chunk(2)
    return a * b, {"total": y.sum()}


def capture(fn, *args) -> thunder.Trace:
    compiled = thunder.jit(fn)
    compiled(*args)
    return thunder.last_traces(compiled)[-1]


@pytest.fixture
def trace():
    return capture(program, X, W)


def symbol(trace, name):
    (found,) = [s for s in trace.bound_symbols if s.name.rpartition(".")[2] == name]
    return found


def run(trace, *args):
    return trace.python_callable()(*args)


# ---- reading ----


def test_a_symbol_says_what_is_called_with_what_and_where(trace):
    matmul, gelu, chunk, *_ = trace.bound_symbols
    assert [s.name for s in trace.bound_symbols] == trace.operations()[:5]
    assert gelu.name == "torch.nn.functional.gelu" and gelu.sym is torch.nn.functional.gelu
    assert gelu.args == (matmul.output,) and gelu.kwargs == {"approximate": "tanh"}
    assert matmul.flat_proxy_args == matmul.args == trace.inputs
    assert chunk.args[1] == 2 and chunk.flat_proxy_outs == chunk.output
    assert gelu.effects == frozenset() and gelu.writes == ()
    assert gelu.file == "test_traces.py" and gelu.line == program.__code__.co_firstlineno + 1


def test_effects_and_writes_are_told():
    def draws(x):
        x.add_(1)
        return torch.nn.functional.dropout(x, 0.5)

    trace = capture(draws, torch.zeros(3))
    by_name = {s.name.rpartition(".")[2]: s for s in trace.bound_symbols}
    assert by_name["dropout"].effects == {"random"}
    assert by_name["add_"].effects == {"writes"} and by_name["add_"].writes == trace.inputs
    assert by_name["add_"].kwargs == {}


def test_a_proxy_describes_a_tensor(trace):
    x, _ = trace.inputs
    assert isinstance(x, thunder.TensorProxy) and x.name == "a0"
    assert x.shape == torch.Size([4, 5]) and isinstance(x.shape, torch.Size)
    assert (x.dtype, x.device, x.ndim, x.numel()) == (torch.float32, torch.device("cpu"), 2, 20)
    assert x.stride() == (5, 1) and x.stride(0) == 5 and x.stride(-1) == 1
    with pytest.raises(IndexError):
        x.stride(2)
    assert x.requires_grad is False
    with torch.enable_grad():
        grads = thunder.jit(lambda a: a * 2)
        grads(torch.ones(2, requires_grad=True))
    assert thunder.last_traces(grads)[0].inputs[0].requires_grad is True


def test_output_is_nested_as_the_trace_returns_it(trace):
    product, total = trace.output
    assert product == symbol(trace, "mul").output and total == symbol(trace, "sum").output


def test_equality_of_proxies_and_symbols_spans_edits_and_not_programs(trace):
    edited = trace.insert_after(None, torch.relu, trace.inputs[0])
    assert edited.inputs == trace.inputs and hash(edited.inputs[0]) == hash(trace.inputs[0])
    assert edited.bound_symbols[:5] == trace.bound_symbols and len(edited.bound_symbols) == 6
    other = capture(program, X, W)
    assert other == trace and other.inputs != trace.inputs and other.bound_symbols[0] != trace.bound_symbols[0]
    with pytest.raises(ValueError, match="belongs to another"):
        trace.remove(other.bound_symbols[0])
    with pytest.raises(ValueError, match="a0 is not a value of this trace: it belongs to another"):
        trace.insert_before(None, torch.relu, other.inputs[0])


def test_proxies_of_one_edit_are_not_taken_for_those_of_another(trace):
    one = trace.insert_after(None, torch.relu, trace.inputs[0])
    other = trace.insert_after(None, torch.sin, trace.inputs[0])
    assert one.edit_result != other.edit_result
    with pytest.raises(ValueError, match="was removed"):
        other.insert_after(None, torch.cos, one.edit_result)


# ---- running ----


def test_python_callable_computes_what_the_program_computes(trace):
    product, total = run(trace, X, W)
    expected = program(X, W)
    close(product, expected[0])
    close(total, expected[1]["total"])


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X,), TypeError, "2 positional"),
        ((X, 3), TypeError, "a1 must be a tensor"),
        ((X, W.double()), ValueError, "f64"),
        ((X, W.T.contiguous().T), ValueError, r"a1 must be .* not .*\{1, 5\}"),
        ((X[:3], W), ValueError, "a0 must be"),
    ],
)
def test_python_callable_checks_its_arguments(trace, args, error, text):
    with pytest.raises(error, match=text):
        run(trace, *args)


def test_python_callable_runs_parsed_text_and_writes_through():
    text = (
        'def f(x: "cpu f32[2]; alias 1"):\n    t0: "cpu f32[2]; alias 1; writes x" = torch.Tensor.add_(x, 1.0)\n'
        '    return {"x": x}\n'
    )
    x = torch.zeros(2)
    assert run(thunder.Trace(text), x)["x"] is x
    assert x.tolist() == [1, 1]


def test_python_callable_records_no_gradients(trace):
    with torch.enable_grad():
        product, _ = run(trace, X.clone().requires_grad_(), W)
    assert not product.requires_grad


# ---- replacing ----


def quick_gelu(x, approximate):
    return x * torch.sigmoid(1.702 * x)


def test_replace_records_torch_code_in_the_place_of_an_operation(trace):
    edited = trace.replace(symbol(trace, "gelu"), quick_gelu)
    assert "torch.nn.functional.gelu" in trace.operations(), "the trace itself does not change"
    assert edited.operations()[1:4] == ["torch.Tensor.mul", "torch.sigmoid", "torch.Tensor.mul"]
    y = quick_gelu(X @ W, None)
    product, total = run(edited, X, W)
    close(product, y[:2] * y[2:])
    close(total, y.sum())
    assert thunder.Trace(str(edited)) == edited
    assert {s.line for s in edited.bound_symbols[1:4]} == {symbol(trace, "gelu").line}


def test_a_replacement_keeps_the_name_of_the_value(trace):
    gelu = symbol(trace, "gelu")
    assert gelu.output in trace.replace(gelu, quick_gelu).bound_symbols[3].flat_proxy_outs


def test_edits_can_follow_a_list_of_symbols_made_before(trace):
    edited = trace
    for s in trace.bound_symbols:
        edited = edited.replace(s, lambda *args, sym=s.sym, **kwargs: sym(*args, **kwargs))
    assert edited.run_passes("lifetime") == trace and edited is not trace
    close(run(edited, X, W)[0], run(trace, X, W)[0])


def test_replace_several_results(trace):
    edited = trace.replace(symbol(trace, "chunk"), lambda y, n: (y[:2] + 1, y[2:]))
    y = torch.nn.functional.gelu(X @ W, approximate="tanh")
    close(run(edited, X, W)[0], (y[:2] + 1) * y[2:])


def test_tensors_that_the_function_brings_along_are_constants(trace):
    bias, whole = torch.randn(6), torch.randn(4, 6)
    added = trace.replace(symbol(trace, "gelu"), lambda x, **_: x + bias)
    y = X @ W + bias
    close(run(added, X, W)[0], y[:2] * y[2:])
    folded = trace.replace(symbol(trace, "gelu"), lambda x, **_: whole)
    close(run(folded, X, W)[1], whole.sum())
    assert any(v is whole for v in folded.namespace().values())


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda x, **_: x.sum(), r't1 is "cpu f32\[4, 6\]"; what should replace it is "cpu f32\[\]"'),
        (lambda x, **_: x.double(), "f64"),
        (lambda x, **_: x.T.contiguous().T, r"\{1, 4\}"),
        (lambda x, **_: 3, "t1 is a tensor; what should replace it is a int"),
        (lambda x, **_: None, "NoneType"),
    ],
)
def test_a_replacement_of_another_kind_is_refused(trace, fn, text):
    with pytest.raises(ValueError, match=text):
        trace.replace(symbol(trace, "gelu"), fn)


def test_another_number_of_results_is_refused(trace):
    with pytest.raises(ValueError, match="2 results"):
        trace.replace(symbol(trace, "chunk"), lambda y, n: (y[:2],))


def test_what_replaced_is_gone(trace):
    gelu = symbol(trace, "gelu")
    edited = trace.replace(gelu, quick_gelu)
    with pytest.raises(
        ValueError, match=r"torch\.nn\.functional\.gelu is not an operation of this trace: it was removed"
    ):
        edited.replace(gelu, quick_gelu)


def test_a_value_whose_memory_is_written_is_not_replaced():
    text = (
        'def f(x: "cpu f32[2]"):\n    t0: "cpu f32[2]; alias 1" = torch.sin(x)\n'
        '    t1: "cpu f32[2]; alias 1; writes t0" = torch.Tensor.add_(t0, 1.0)\n    return t1\n'
    )
    trace = thunder.Trace(text)
    with pytest.raises(ValueError, match=r"t0 cannot be replaced: it shares memory with what torch\.Tensor\.add_"):
        trace.replace(trace.bound_symbols[0], torch.cos)


def test_an_exception_of_the_function_reaches_the_user_and_leaves_nothing(trace):
    def fails(x, **_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace.replace(symbol(trace, "gelu"), fails)
    with pytest.raises(thunder.CaptureError, match="depends on the values"):
        trace.replace(symbol(trace, "gelu"), lambda x, **_: x * x.sum().item())
    close(run(trace, X, W)[0], program(X, W)[0])


def test_a_trace_is_not_edited_inside_a_capture(trace):
    def edits(x):
        trace.remove(trace.bound_symbols[0])
        trace.replace(trace.bound_symbols[0], torch.matmul)
        return x

    with pytest.raises((RuntimeError, ValueError), match=r"captured|cannot be removed"):
        thunder.jit(edits)(X)


# ---- inserting, removing, renaming uses ----


def test_insert_and_replace_uses(trace):
    gelu = symbol(trace, "gelu")
    edited = trace.insert_after(gelu, lambda y: y * 2, gelu.output)
    assert edited.edit_result.shape == (4, 6) and trace.edit_result is None
    edited = edited.replace_uses(gelu.output, edited.edit_result)
    y = 2 * torch.nn.functional.gelu(X @ W, approximate="tanh")
    close(run(edited, X, W)[1], y.sum())
    assert thunder.Trace(str(edited)) == edited


def test_arguments_of_an_insertion_may_be_nested_and_plain(trace):
    x, w = trace.inputs
    edited = trace.insert_before(None, lambda pair, dim: torch.cat(pair, dim), [x, x], 1)
    assert edited.operations()[0] == "torch.cat" and edited.edit_result.shape == (4, 10)
    edited = trace.insert_after(None, lambda d: {"ignored": d["w"].exp()}, {"w": w})
    assert edited.operations()[-1] == "torch.Tensor.exp"


def test_values_must_exist_where_they_are_used(trace):
    gelu = symbol(trace, "gelu")
    with pytest.raises(ValueError, match="t1 is used before it is defined"):
        trace.insert_before(gelu, torch.relu, gelu.output)


def test_replace_uses_wants_the_same_type(trace):
    with pytest.raises(ValueError, match="what should replace it is"):
        trace.replace_uses(*trace.inputs)


def test_remove(trace):
    edited = trace.insert_after(None, torch.relu, trace.inputs[0])
    assert edited.remove(edited.bound_symbols[-1]) == trace.replace(symbol(trace, "gelu"), torch.nn.functional.gelu)
    with pytest.raises(ValueError, match=r"cannot be removed: torch\.Tensor\.chunk uses t1"):
        trace.remove(symbol(trace, "gelu"))
    with pytest.raises(ValueError, match=r"the result uses t5"):
        trace.remove(symbol(trace, "sum"))


def test_things_of_other_types_are_refused(trace):
    with pytest.raises(TypeError, match="expected a BoundSymbol"):
        trace.remove("torch.add")
    with pytest.raises(TypeError, match="expected a TensorProxy"):
        trace.replace_uses(X, W)


# ---- the border ----


def test_map_output_and_map_input_may_change_types(trace):
    edited = trace.map_output(1, lambda s: s.double()).map_input(trace.inputs[0], lambda x: x.float(), X.double())
    assert [i.dtype for i in edited.inputs] == [torch.float64, torch.float32]
    _, total = run(edited, X.double(), W)
    assert total.dtype == torch.float64
    close(total.float(), program(X, W)[1]["total"])
    with pytest.raises(ValueError, match="no result 2"):
        trace.map_output(2, torch.relu)
    with pytest.raises(ValueError, match="t1 is no input"):
        trace.map_input(symbol(trace, "gelu").output, torch.relu)
    with pytest.raises(ValueError, match=r'a0 is "cpu f32\[4, 5\]"'):
        trace.map_input(trace.inputs[0], lambda x: x.sum())


def test_the_border_is_crossed_at_the_last_and_the_first_use(trace):
    out = trace.map_output(0, torch.relu)
    assert out.operations().index("torch.relu") == out.operations().index("torch.Tensor.mul") + 1
    extended = trace.insert_after(None, torch.neg, trace.inputs[1])
    late = extended.insert_before(None, torch.sin, trace.inputs[0]).map_input(trace.inputs[1], torch.exp)
    assert late.operations()[:3] == ["torch.sin", "torch.exp", "torch.Tensor.matmul"]


# ---- calls that are kept ----


def test_opaque_calls_run_in_their_place_each_time(trace):
    log = []

    def note(name):
        log.append(name)

    edited = trace
    for s in trace.bound_symbols:
        edited = edited.insert_before(s, opaque_call, note, s.name)
    runner = edited.python_callable()
    runner(X, W)
    runner(X, W)
    assert log == 2 * [s.name for s in trace.bound_symbols]
    assert edited.bound_symbols[0].effects == {"effect"} and edited.bound_symbols[0].sym is note
    assert edited.run_passes("cse,dce").operations().count("note") == 5


def test_opaque_calls_with_results(trace):
    def swapped(a, b):
        return b.clone(), a.clone()

    chunk = symbol(trace, "chunk")
    edited = trace.replace(chunk, lambda y, n: opaque_call(swapped, *y.chunk(n), like=chunk.output))
    close(run(edited, X, W)[0], program(X, W)[0])
    with pytest.raises(TypeError, match="like holds a int"):
        trace.replace(chunk, lambda y, n: opaque_call(swapped, y, y, like=(3, 4)))


def test_an_opaque_call_outside_of_edits():
    assert opaque_call(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(RuntimeError, match="edit of a trace"):
        thunder.jit(lambda x: opaque_call(torch.relu, x, like=x))(X)
