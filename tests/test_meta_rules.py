"""Every meta rule of the catalogue, compared with what eager PyTorch really returns.

Calls are taken where the capture takes them: from a torch-function mode, so each is judged under the function object
that torch passes on, be it `torch.add`, a method, an operator or a property. For each call the rule must either decline
or give the result's shape, strides, dtype and device, whether it shares storage with an input and at which offset, and
whether it is an input object itself. Where torch raises, the rule must decline.

The calls come from `op_db` (function, method, operator and in-place variants), with the tensors of each sample also
transposed, strided, expanded, in channels_last, of size zero, and with odd strides on dimensions of size one, and from
`tests/meta_rule_cases.py`, which spells out what op_db lacks.

    THUNDER_LONG=1 python -m pytest tests/test_meta_rules.py -s      all samples, dtypes and variants
    THUNDER_META_DEVICE=cuda ...                                     on a GPU
"""

import collections
import itertools
import os
import types
import warnings

import pytest
import thunder._C as _C
import torch
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

from tests.meta_rule_cases import cases

LONG = bool(int(os.environ.get("THUNDER_LONG", "0")))
DEVICE = os.environ.get("THUNDER_META_DEVICE", "cpu")
DTYPES = [
    torch.float32,
    torch.int64,
    torch.bool,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.uint8,
]
WRITES_FIRST = 32  # TH_OPDEF_INPLACE

# Errors about the values of a tensor, which no rule can see: an index, a divisor.
BY_INDEX = {
    "getitem",
    "gather",
    "index_select",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "index_fill",
    "index_fill_",
    "index_reduce",
    "index_reduce_",
    "functional.embedding",
    "embedding",
    "aten.index_put",
    "aten.embedding_dense_backward",
    "aten.nll_loss_backward",
}
BY_DIVISOR = {
    "div",
    "div_",
    "floor_divide",
    "floor_divide_",
    "remainder",
    "remainder_",
    "fmod",
    "fmod_",
    "rfloordiv",
    "rmod",
}
# An index out of range, or a misaligned attention operand, would end the CUDA context.
BREAKS_CUDA = BY_INDEX | {"nll_loss", "cross_entropy", "scaled_dot_product_attention"}
VALUE_ERRORS = {
    **dict.fromkeys(BY_INDEX, ("out of bounds", "out of range")),
    **dict.fromkeys(BY_DIVISOR, ("ZeroDivisionError",)),
}

CATALOG = {name: op for op in _C.catalog() for name in op["names"].split()}


def dotted(function):
    """The name under which a function reaches the catalogue."""
    if isinstance(function, torch._ops.OpOverload):
        return f"torch.ops.{function}"
    name = getattr(function, "__name__", "")
    if type(function).__name__ == "method-wrapper":
        return f"torch.Tensor.{function.__self__.__name__}.{name}"
    for prefix, owner in (
        ("torch", torch),
        ("torch.nn.functional", torch.nn.functional),
        ("torch.Tensor", torch.Tensor),
    ):
        if getattr(owner, name, None) is function:
            return f"{prefix}.{name}"
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def is_catalogued(op):
    """Does an op_db entry call a catalogued operator? Some entries are lambdas around one."""
    last_names = {name.removesuffix(".__get__").rpartition(".")[2] for name in CATALOG}
    plain = op.name.removeprefix("nn.functional.")  # no dot left: not masked.sum, sparse.mm, ...
    return plain in last_names or any(dotted(f) in CATALOG for f in spellings(op))


def tensors_in(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def describe(tensor):
    where = "" if tensor.device.type == "cpu" else f" {tensor.device}"
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)}@{list(tensor.stride())}{where}"


def show(tree):
    return tree_map(lambda leaf: describe(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def aliased(out, inputs):
    return any(torch._C._is_alias_of(out, x) for x in inputs)


def difference(rule, result, inputs, writes):
    """What is wrong with a rule's answer, or None."""
    is_list = isinstance(result, (tuple, list))
    outs = list(result) if is_list else [result]
    if not all(isinstance(out, torch.Tensor) for out in outs):
        return f"torch returns {type(result).__name__}, which is no tensor"
    if len(rule) != len(outs) or any(r["list"] != is_list for r in rule):
        return f"{len(rule)} outputs, torch has {len(outs)}"
    for i, (r, out) in enumerate(zip(rule, outs, strict=True)):
        same = bool(inputs) and out is inputs[0]
        if any(out is x for x in inputs[1:]) and not same:
            return f"output {i} is an input that is not the first one"
        alias = aliased(out, inputs)
        expected = {
            "shape": tuple(out.shape),
            "stride": tuple(out.stride()),
            "dtype": out.dtype,
            "device": out.device,
            "same": same and not writes,
            "alias": alias,
        }
        if alias:
            expected["offset"] = out.storage_offset()
        for key, value in expected.items():
            if r[key] != value:
                return f"output {i}: {key} is {r[key]}, torch has {value}"
    return None


class Judge(TorchFunctionMode):
    """Compares the rule of every catalogued call with the call's own result."""

    def __init__(self):
        super().__init__()
        self.answered = collections.Counter()
        self.declined = collections.Counter()
        self.raised = collections.Counter()
        self.examples = collections.defaultdict(list)
        self.wrong = []

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _C.meta_rule(function, args, kwargs)
        if rule is NotImplemented:
            if not isinstance(function, types.FunctionType):
                return function(*args, **kwargs)
            with self:  # written in Python: judge what it calls
                return function(*args, **kwargs)
        op = CATALOG[dotted(function)]
        inputs = tensors_in(args, kwargs)
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            self.raised[op["name"]] += 1
            if rule is not None and not any(text in str(error) for text in VALUE_ERRORS.get(op["name"], ())):
                self.fail(function, args, kwargs, f"torch raises {str(error)[:200]}", rule)
            raise
        if rule is None:
            self.declined[op["name"]] += 1
            if len(self.examples[op["name"]]) < 200:
                self.examples[op["name"]].append(f"{dotted(function)}{show((args, kwargs))}")
        else:
            self.answered[op["name"]] += 1
            problem = difference(rule, result, inputs, op["effects"] & WRITES_FIRST)
            if problem:
                self.fail(function, args, kwargs, problem, rule)
        return result

    def fail(self, function, args, kwargs, problem, rule):
        if len(self.wrong) < 4000:
            call = str(show((args, kwargs)))[:300]
            self.wrong.append(f"{dotted(function)}{call}: {problem} | rule: {[r['text'] for r in rule][:3]}")

    def run(self, function, *args, **kwargs):
        try:
            with self:
                function(*args, **kwargs)
        except Exception:  # an error of torch's own: judged where it was raised
            pass


# ---- variants of a sample's tensors: the same values in another place, or fewer of them ----


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def rotated(x):
    return x.permute(*range(1, x.dim()), 0).contiguous().permute(-1, *range(x.dim() - 1)) if x.dim() > 2 else x


def strided(x):
    return torch.stack([x, x], -1)[..., 0] if x.dim() else x


def expanded(x):
    return x[:1].expand_as(x) if x.dim() and x.shape[0] else x


def last_expanded(x):
    return x[..., :1].expand_as(x) if x.dim() and x.shape[-1] else x


def shifted(x):
    return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape) if x.numel() else x


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


def odd_ones(x):
    """Dimensions of size one get strides that no packed tensor has."""
    return x.as_strided(x.shape, [s if n != 1 else 7 for n, s in zip(x.shape, x.stride(), strict=True)])


def first_one(x):
    return x[:1] if x.dim() else x


def empty(x):
    return x[:0] if x.dim() else x


def last_empty(x):
    return transposed(x)[..., :0] if x.dim() else x


def scalar(x):
    return x.reshape(-1)[0] if x.numel() else x


VARIANTS = [
    transposed,
    rotated,
    strided,
    expanded,
    last_expanded,
    shifted,
    channels_last,
    odd_ones,
    first_one,
    empty,
    last_empty,
    scalar,
]


def fresh(tree, change=None, only_first=False):
    """Own tensors for a call, so that in-place operators do not spoil the sample."""
    count = itertools.count()

    def one(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().clone(memory_format=torch.preserve_format)
        return change(leaf) if change and (next(count) == 0 or not only_first) else leaf

    return tree_map(one, tree)


def versions(sample, variants):
    call = (sample.input, sample.args, sample.kwargs)
    yield fresh(call)
    for change in variants:
        yield fresh(call, change)
        if len(tensors_in(call)) > 1:
            yield fresh(call, change, only_first=True)


def spellings(op):
    seen = []
    for spelling in (
        op.op,
        *(alias.op for alias in op.aliases),
        op.method_variant,
        op.operator_variant,
        op.inplace_variant,
        op.inplace_operator_variant,
    ):
        if spelling is not None and not any(spelling is other for other in seen):
            seen.append(spelling)
    return seen


def judge_entry(judge, op, dtype):
    if dtype not in op.supported_dtypes(DEVICE):
        return
    limit = 60 if LONG else {torch.float32: 12, torch.int64: 6}.get(dtype, 2)
    variants = VARIANTS if LONG or dtype == torch.float32 else []
    if DEVICE != "cpu" and op.name.removeprefix("nn.functional.") in BREAKS_CUDA:
        variants = [transposed]
    for sample in itertools.islice(op.sample_inputs(DEVICE, dtype, requires_grad=False), limit):
        for spelling in spellings(op):
            for args, more, kwargs in versions(sample, variants):
                judge.run(spelling, args, *more, **kwargs)


@pytest.fixture(scope="module")
def judge():
    judge = Judge()
    entries = [op for op in op_db if is_catalogued(op)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in entries:
            for dtype in DTYPES:
                torch.manual_seed(0)
                judge_entry(judge, op, dtype)
        for case in cases(DEVICE, LONG):
            judge.run(case)
    return judge


def test_no_rule_contradicts_eager(judge):
    grouped = collections.Counter(line.split("(")[0] for line in judge.wrong)
    assert not judge.wrong, "\n".join([str(dict(grouped)), *judge.wrong[:40]])


def test_every_operator_answers_some_call(judge):
    silent = [op["name"] for op in _C.catalog() if not judge.answered[op["name"]]]
    assert not silent


def test_share_of_declined_calls(judge):
    total = sum(judge.answered.values()) + sum(judge.declined.values())
    print(f"\n{len(_C.catalog())} operators, {total} calls, {sum(judge.declined.values()) / total:.1%} declined")
    for op in _C.catalog():
        yes, no = judge.answered[op["name"]], judge.declined[op["name"]]
        if no:
            print(f"  {op['name']:28s} {yes:6d} answered {no:6d} declined {judge.raised[op['name']]:6d} torch raised")
    assert sum(judge.declined.values()) < 0.5 * total


def test_a_wrong_answer_is_seen():
    rule = _C.meta_rule(torch.add, (torch.ones(2, 3), 1), {})
    assert difference(rule, torch.ones(2, 3), [], 0) is None
    assert "shape" in difference(rule, torch.ones(3, 2), [], 0)
    assert "stride" in difference(rule, torch.ones(3, 2).t(), [], 0)
    assert "dtype" in difference(rule, torch.ones(2, 3).int(), [], 0)
    x = torch.ones(2, 3)
    assert "same" in difference(rule, x, [x], 0)
    assert "alias" in difference(rule, x[:], [x], 0)
