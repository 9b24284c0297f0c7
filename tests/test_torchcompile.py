"""The torchcompile executor: regions through Inductor."""

from __future__ import annotations

import copy
import functools
import re
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.test_executors import blocks, check, units
from thunder.executors.torchcompile import TorchCompileExecutor, inductor, torchcompile_executor

pytestmark = pytest.mark.filterwarnings("error::thunder.ThunderWarning")


def test_the_line_of_the_requirements():
    model = blocks(2)
    exc_list = [thunder.extend.get_executor("torchcompile"), *thunder.get_always_executors()]
    jmodel = thunder.jit(model, executors=exc_list)
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(jmodel(x), model(x))
        assert thunder.extend.wait_for_builds(300)
        for _ in range(2):
            torch.testing.assert_close(jmodel(x), model(x))
    assert {u.state for u in units(jmodel)} == {"trusted"}
    assert "torchcompile_0(" in str(thunder.last_traces(jmodel)[-1])


def test_forward_and_backward_run_through_inductor():
    compiled = check(blocks(3), (torch.randn(4, 16),), ["torchcompile"], tier="block")
    assert {u.state for u in units(compiled)} == {"trusted"}
    assert "torchcompile_" in str(thunder.last_backward_traces(compiled)[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_saves_scores_and_numbers_of_rows(dtype):
    """The logarithms of the probabilities are not written: the backward has them from the scores."""
    torch.manual_seed(0)
    head = nn.Linear(16, 50).to(dtype)
    x, labels = torch.randn(8, 16, dtype=dtype), torch.randint(0, 50, (8,))

    def program(x, labels, weight, bias):
        scores = nn.functional.linear(nn.functional.gelu(x), weight, bias)
        return nn.functional.cross_entropy(scores, labels, ignore_index=3)

    compiled = thunder.jit(program, executors=["torchcompile"], tier="block")
    arguments = (x.requires_grad_(), labels, head.weight, head.bias)
    wanted = [a for a in arguments if a.requires_grad]
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]
    exact_grads = torch.autograd.grad(program(*exact), [a for a in exact if a.requires_grad])
    theirs = torch.autograd.grad(program(*arguments), wanted)
    for _ in range(3):
        ours = torch.autograd.grad(compiled(*arguments), wanted)
        for o, t, e in zip(ours, theirs, exact_grads, strict=True):
            assert (o - e).norm() <= 2 * (t - e).norm() + 1e-6 * e.norm()
    assert {u.state for u in units(compiled)} == {"trusted"}
    forward = str(thunder.last_traces(compiled)[-1])
    shape = "8, 50"
    assert forward.count(f"[{shape}]") == 1, "of what has the size of the scores only they are saved"
    assert any("thunder._rows.logsumexp" in str(u.trace) for u in units(compiled))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_numbers_of_rows_are_computed_in_pieces(monkeypatch, dim):
    from thunder import _rows

    x = torch.randn(7, 12, 5)
    whole = torch.logsumexp(x, dim, keepdim=True)
    monkeypatch.setattr(_rows, "_CHUNK", 60)
    pieces = []
    one = _rows._logsumexp
    monkeypatch.setattr(_rows, "_logsumexp", lambda part, dim: pieces.append(part.numel()) or one(part, dim))
    torch.testing.assert_close(_rows.logsumexp(x, dim), whole)
    assert len(pieces) > 1 and max(pieces) <= 60
    torch.testing.assert_close(_rows.log_softmax(x, whole, torch.float32), torch.log_softmax(x, dim))


def test_layers_of_a_transformer_are_built_once():
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()

    def gpt(layers):
        config = litgpt.Config.from_name(
            "pythia-14m", n_layer=layers, n_embd=32, n_head=4, block_size=16, padded_vocab_size=64, intermediate_size=64
        )
        return litgpt.GPT(config).eval()

    tokens = torch.randint(0, 64, (1, 16))
    executor = TorchCompileExecutor("torchcompile_counted")
    with torch.no_grad():
        for layers in (4, 8):
            model = gpt(layers)
            compiled = thunder.jit(model, executors=[executor], tier="block")
            torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
            if layers == 4:
                built = len(executor._built)
        assert len(executor._built) == built <= 4
    assert len(units(compiled)) >= 8


def attention_between(x, w):
    """Two different regions."""
    y = F.layer_norm(F.gelu(x @ w), (x.shape[-1],))
    z = F.scaled_dot_product_attention(y, y, y)
    return torch.sigmoid(z * 2) + z.relu()


def test_the_next_region_is_built_while_compilers_work(monkeypatch):
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import fresh_cache

    generated, both, in_time = [], threading.Event(), []
    generate, submit = TorchCompileExecutor._generate, AsyncCompile.submit.__func__

    def generating(self, trace, form, ways):
        generated.append(trace)
        if len(generated) == 2:
            both.set()
        return generate(self, trace, form, ways)

    def compiling(task):  # a compiler that is not done before the second region has its turn
        in_time.append(both.wait(60))
        task()

    monkeypatch.setattr(TorchCompileExecutor, "_generate", generating)
    monkeypatch.setattr(AsyncCompile, "submit", classmethod(lambda cls, task: submit(cls, lambda: compiling(task))))
    arguments = torch.randn(2, 8, 16), torch.randn(16, 16)
    executor = TorchCompileExecutor("torchcompile_beside")
    with fresh_cache(), config.patch(compile_threads=2):
        compiled = thunder.jit(attention_between, executors=[executor], tier="block")
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), attention_between(*arguments))
    assert [u.state for u in units(compiled)] == ["trusted", "trusted"]
    assert in_time and all(in_time)


def test_plans_call_generated_code_with_their_handles():
    """No Python of Inductor's runs between the kernels of a region, nor around them."""
    import sys

    compiled = check(blocks(2), (torch.randn(4, 16),), ["torchcompile"], tier="block")
    assert {type(u.implementation) for u in units(compiled)} == {thunder._C.HandleCall}
    frames = []
    sys.setprofile(lambda frame, event, _: frames.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        with torch.no_grad():
            compiled(torch.randn(4, 16))
    finally:
        sys.setprofile(None)
    assert not [f for f in frames if "inductor" in f or "torchcompile" in f]


def test_generated_code_that_fails_raises():
    call = thunder._C.HandleCall(lambda handles: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        call(torch.randn(2))
    with pytest.raises(TypeError, match="argument 0 is no tensor"):
        call(3)
    with pytest.raises(TypeError, match="no list"):
        thunder._C.HandleCall(lambda handles: None)(torch.randn(2))
    same = torch.randn(2, requires_grad=True)
    (back,) = thunder._C.HandleCall(lambda handles: handles)(same)
    assert back is same


def test_generated_code_gets_aligned_inputs():
    seen = []

    def align(tensor):
        seen.append(tensor)
        return tensor.clone()

    call = thunder._C.HandleCall(lambda handles: handles, b"\0\1", 16, align)
    base = torch.arange(9, dtype=torch.float32)
    assert base.data_ptr() % 16 == 0
    odd, even = base[1:], base[4:]
    for given, aligned in ((even, True), (odd, False)):
        one, two, three = call(odd, given, odd)
        assert one.data_ptr() == three.data_ptr() == odd.data_ptr()  # nobody asks for these
        assert two.data_ptr() % 16 == 0 and torch.equal(two, given)
        assert (two.data_ptr() == given.data_ptr()) == aligned == (not seen)
    with pytest.raises(ZeroDivisionError):
        thunder._C.HandleCall(lambda handles: handles, b"\1", 16, lambda tensor: 1 / 0)(odd)
    with pytest.raises(TypeError, match="positive alignment"):
        thunder._C.HandleCall(lambda handles: handles, b"\1")


def test_what_the_cpp_wrapper_cannot_do_python_calls(monkeypatch):
    real, ways = inductor.build, []

    def compile_(trace, form, options, way):
        ways.append(way)
        if way.cpp:
            raise NotImplementedError("not in C++")
        return real(trace, form, options, way)

    monkeypatch.setattr(inductor, "build", compile_)
    compiled = check(blocks(1), (torch.randn(7, 16),), [TorchCompileExecutor("torchcompile_python")], tier="block")
    assert {u.state for u in units(compiled)} == {"trusted"}
    assert {way.cpp for way in ways} == {True, False} and not inductor._instructions.doubted


def test_handles_that_a_call_is_given_go_with_it():
    x = torch.randn(4, 16)
    compiled = check(blocks(1), (x,), ["torchcompile"], tier="block")
    counts = []
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
            counts.append(torch._C._storage_Use_Count(x.untyped_storage()._cdata))
    assert len(set(counts)) == 1


def grown(x, w, cache):
    """A step of a decoder: two regions around the attention, a table of positions that grows."""
    y = F.gelu(x @ w)
    keys = torch.cat((cache, y), dim=1)
    places = torch.arange(keys.shape[1], dtype=x.dtype)[:, None]
    z = F.scaled_dot_product_attention(y, keys + places * 0.01, keys * 2)
    return torch.sigmoid(z).reshape(-1, 16) * 2, keys.softmax(1).flatten(1)


def count_builds(monkeypatch) -> list:
    real, forms = inductor.build, []

    def compile_(trace, form, options, way):
        forms.append(form)
        return real(trace, form, options, way)

    monkeypatch.setattr(inductor, "build", compile_)
    return forms


def test_growing_sizes_are_built_twice(monkeypatch):
    forms = count_builds(monkeypatch)
    compiled = thunder.jit(grown, executors=[TorchCompileExecutor("torchcompile_growing")], tier="block")
    w = torch.randn(16, 16)
    for length in (5, 6, 7, 12, 31, 32, 33, 100):
        arguments = torch.randn(2, 1, 16), w, torch.randn(2, length, 16)
        for _ in range(2):
            for ours, theirs in zip(compiled(*arguments), grown(*arguments), strict=True):
                torch.testing.assert_close(ours, theirs)
                assert ours.stride() == theirs.stride()
        if length == 6:
            built = len(forms)
    assert len(forms) == built
    assert [form is None for form in forms] == [True, True, False], "what follows the attention is of one size"
    assert {u.state for u in units(compiled)} == {"trusted"}


def test_backward_regions_of_growing_sizes_are_built_twice(monkeypatch):
    forms = count_builds(monkeypatch)
    model = blocks(2)
    compiled = thunder.jit(model, executors=[TorchCompileExecutor("torchcompile_growing_back")], tier="block")
    for rows in (4, 6, 9, 17, 40):
        x = torch.randn(rows, 16)
        for _ in range(2):
            ours = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
            theirs = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
            torch.testing.assert_close(ours, theirs)
        if rows == 6:
            built = len(forms)
    assert len(forms) == built
    assert {u.state for u in units(compiled)} == {"trusted"}


def test_code_for_any_sizes_is_not_taken_beyond_what_it_was_made_for(monkeypatch):
    """Sizes of 1 broadcast, and numbers that do not follow from sizes are what they are."""
    forms = count_builds(monkeypatch)
    executor = TorchCompileExecutor("torchcompile_fitting")

    def run(program, *arguments):
        compiled = thunder.jit(program, executors=[executor], tier="block")
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), program(*arguments))
        return len(forms)

    def program(k):
        return lambda x: (x.sin() * k).cumsum(0) + x.exp()

    run(program(3), torch.randn(4, 3))
    twice = run(program(3), torch.randn(6, 3))
    assert twice == 2 and forms[0] is None and forms[1] is not None
    assert run(program(3), torch.randn(9, 3)) == 2
    assert run(program(5), torch.randn(9, 3)) == 3, "a number that does not vary with a size"
    assert run(program(3), torch.randn(1, 3)) == 4, "a size of one"
    assert run(program(3), torch.randn(6, 6)) > 4, "another size varies"


def no_checks_made(monkeypatch):
    """Inductor has not asked a compiler for instructions yet: the list of what it asks from here on."""
    from torch._inductor.cpu_vec_isa import VecISA

    asked = []
    instructions = inductor._Instructions()
    instructions.doubt()
    instructions.doubted = False
    monkeypatch.setattr(inductor, "_instructions", instructions)
    monkeypatch.setattr(VecISA, "check_build", lambda self, code: asked.append(code) or True)
    return asked, VecISA._avx_code


def test_no_compiler_is_asked_for_instructions(monkeypatch):
    from torch._inductor import cpu_vec_isa

    asked, _ = no_checks_made(monkeypatch)
    check(blocks(1), (torch.randn(5, 16),), [TorchCompileExecutor("torchcompile_assuming")], tier="block")
    assert not asked
    assert not cpu_vec_isa.valid_vec_isa_list.cache_info().currsize, "torch.compile takes for granted what we do"


def test_parts_of_instructions_are_taken_for_granted_by_the_thread_that_builds(monkeypatch):
    from torch._inductor import cpu_vec_isa

    asked, _ = no_checks_made(monkeypatch)
    isa = cpu_vec_isa.supported_vec_isa_list[0]
    with inductor._instructions.granted():
        assert isa.check_build("mine")
        other = threading.Thread(target=isa.check_build, args=("another's",))
        other.start()
        other.join()
    isa.check_build("later")
    assert asked == ["another's", "later"]


def test_inductor_finds_instructions_once_a_kernel_does_not_compile(monkeypatch):
    from torch._inductor.exc import CppCompileError

    asked, headers = no_checks_made(monkeypatch)
    real, checks = inductor.build, []

    def fails(*_):
        raise CppCompileError(["g++"], "unknown option")

    def compile_(trace, form, options, way):
        checks.append(way.checked)
        compiled, compilers, symbols = real(trace, form, options, way)
        return compiled, compilers if way.checked else [fails], symbols

    monkeypatch.setattr(inductor, "build", compile_)
    compiled = check(blocks(1), (torch.randn(6, 16),), [TorchCompileExecutor("torchcompile_doubting")], tier="block")
    assert {u.state for u in units(compiled)} == {"trusted"}
    assert headers in asked
    assert True in checks and inductor._instructions.doubted


def test_results_have_eagers_strides():
    """Some decompositions lay results out otherwise than the kernels that they stand for."""

    def program(x):
        y = x.transpose(1, 2)
        return torch.cat((y * 2, y[..., 4:]), dim=-1), (y + 1).sin()

    x = torch.randn(2, 3, 5, 4)
    compiled = thunder.jit(program, executors=["torchcompile"], tier="block")
    for _ in range(2):
        for ours, theirs in zip(compiled(x), program(x), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()


def test_dropout_is_eagers():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5), nn.GELU(), nn.LayerNorm(8))
    compiled = thunder.jit(model, executors=["torchcompile"], tier="block")
    x = torch.randn(4, 8)
    for seed in range(2):
        torch.manual_seed(seed)
        ours = compiled(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours, model(x))


def test_one_kernel_alone_is_left_to_torch():
    compiled = thunder.jit(lambda x: x.sin().view(2, 2).t(), executors=["torchcompile"], tier="block")
    compiled(torch.randn(4))
    assert units(compiled) == []
    (reason,) = {reason for _, _, reason in compiled._thunder_claims.declines}
    assert "nothing to fuse" in reason


class _Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    @torch.compile
    def forward(self, x):
        return self.inner(x)

    @torch.compile
    def other(self, x):
        return self.inner(x)


def _compiled_by(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    if how == "inner method":
        model[0].compile()
    elif how == "inner forward":
        model[0].forward = torch.compile(model[0].forward)
    elif how == "forward":
        model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.compile(nn.Linear(2, 2)), "a module that went"),
        (lambda: torch.compile(lambda x: x), "a function that went"),
        (lambda: functools.partial(torch.compile(lambda x: x)), "a function that went"),
        (lambda: torch.compile(nn.Linear(2, 2).forward), "a function that went"),
        (lambda: _Decorated().other, "a function that went"),
        (_Decorated, "a module whose forward went"),
        (lambda: nn.Sequential(nn.ReLU(), _Decorated()), "the submodule '1' whose forward went"),
        (lambda: nn.Sequential(nn.Sequential(torch.compile(nn.Linear(2, 2)))), "the submodule '0.0' that went"),
        (lambda: _compiled_by("inner method"), "the submodule '0' that went"),
        (lambda: _compiled_by("inner forward"), "the submodule '0' whose forward went"),
        (lambda: _compiled_by("forward"), "a module whose forward went"),
    ],
)
def test_whatever_went_through_torch_compile_is_refused(make, what):
    line = re.escape("executors=[thunder.extend.get_executor('torchcompile'), *thunder.get_always_executors()])")
    with pytest.raises(TypeError, match=rf"given {what} through torch\.compile.*{line}"):
        thunder.jit(make())


def test_what_torch_compile_was_kept_from_is_compiled():
    compiled = thunder.jit(torch.compiler.disable(lambda x: x * 2))
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    model = nn.Sequential(nn.ReLU())
    model[0].forward = torch.compiler.disable(model[0].forward)
    assert torch.equal(thunder.jit(model)(torch.ones(2)), torch.ones(2))


def test_torch_compile_first_is_an_error_that_says_what_to_write():
    with pytest.raises(TypeError, match=r"executors=\[thunder.extend.get_executor\('torchcompile'\)"):
        thunder.jit(torch.compile(blocks(1)))


def test_it_is_registered():
    assert thunder.extend.get_executor("torchcompile") is torchcompile_executor
    assert torchcompile_executor not in thunder.get_default_executors()


@pytest.mark.gpu
def test_on_cuda():
    model = blocks(3).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        check(model, (torch.randn(4, 16, device="cuda"),), ["torchcompile"], tier="block")


@pytest.mark.gpu
def test_no_python_calls_the_kernels_of_a_gpu():
    """Inductor's C++ wrapper is called with handles there as well; it wants its inputs at aligned addresses."""
    model = blocks(2).cuda()
    check(model, (torch.randn(4, 16, device="cuda"),), [TorchCompileExecutor("torchcompile_wrapped")], tier="block")
    exact, half = copy.deepcopy(model).double(), model.half()
    compiled = thunder.jit(half, executors=[TorchCompileExecutor("torchcompile_wrapped_half")], tier="block")
    numbers = torch.randn(1 + 4 * 16, device="cuda", dtype=torch.half)
    even, odd = numbers[:64].view(4, 16), numbers[1:].view(4, 16)
    assert odd.data_ptr() % 16
    with torch.no_grad():
        for x in (even, odd, even):
            error = (half(x) - exact(x.double())).abs().max()  # eager's: half has no more than three digits
            assert (compiled(x) - exact(x.double())).abs().max() <= 2 * error
    assert {type(u.implementation) for u in units(compiled)} == {thunder._C.HandleCall}
    assert "cuda" in inductor._wrapped


@pytest.mark.gpu
def test_without_the_headers_of_cuda_python_calls_its_kernels(monkeypatch):
    real = inductor.build

    def compile_(trace, form, options, way):
        if way.cpp:
            raise inductor.compile_error()(["g++"], "cuda.h:1: fatal error: cuda.h: No such file")
        return real(trace, form, options, way)

    monkeypatch.setattr(inductor, "build", compile_)
    monkeypatch.setattr(inductor, "_wrapped", {"cpu", "cuda"})
    model, x = blocks(1).cuda(), torch.randn(7, 16, device="cuda")
    executor = TorchCompileExecutor("torchcompile_without_headers")
    with torch.no_grad():
        with pytest.warns(thunder.ThunderWarning, match=r"calls CUDA kernels from Python.*cuda\.h.*CUDA toolkit"):
            compiled = thunder.jit(model, executors=[executor], tier="block")
            compiled(x)
        torch.testing.assert_close(compiled(x), model(x))
    assert inductor._wrapped == {"cpu"}
    assert {u.state for u in units(compiled)} == {"trusted"}
