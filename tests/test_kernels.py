"""The kernels and their twins against float64, in one table of cases.

Without a GPU the small cases run in fp32 under Triton's interpreter, which takes 1 ms a program,
and the kernels are compiled for GPUs. With one, `python -m pytest -m gpu` runs all cases on it.
"""

import csv
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.autograd import grad
from torch.library import opcheck

import kernels
import mos
from conftest import ROOT, make_model

GPU = torch.cuda.is_available()
DEVICE, KIND = ("cuda", "mixed") if GPU else ("cpu", "fp32")
TYPES = {"fp32": (torch.float32, torch.float32), "fp16": (torch.float16, torch.float16),
         "bf16": (torch.bfloat16, torch.bfloat16),
         "mixed": (torch.bfloat16, torch.float32)}  # data and weights of norms, as under autocast
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, in L2
OPERATORS = {name: f.operator for name, f in vars(kernels).items() if hasattr(f, "operator")}


# --- the operations in float64 -------------------------------------------------------------------

def norm64(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = s * weight / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if residual is None else (s, y)


def turn64(x, rope):
    """Rotate channel pairs, as a product of complex numbers."""
    y = torch.complex(*x.chunk(2, -1)) * torch.complex(*(a.double()[:, None] for a in rope))
    return torch.cat((y.real, y.imag), -1)


def queries_keys64(qkv, rope, heads, weights, context):
    q, kv = qkv[:, :, :heads], qkv[:, :, heads:]
    (k, v), (kc, vc) = kv.chunk(2, 2), (kv[:, :0] if context is None else context).chunk(2, 2)
    q, k, kc = (x if w is None else norm64(x, w) for x, w in zip((q, k, kc), weights))
    return turn64(q, rope), torch.cat((turn64(k, rope), kc), 1), torch.cat((v, vc), 1)


def feed_forward64(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up @ down.T


def mix64(states, index, weight, bias=None):
    """Return the dense sum over all states, most of them with weight 0."""
    dense = torch.einsum("bsk,bskm->bsm", weight, F.one_hot(index, states.shape[2]).double())
    mixture = torch.einsum("bsm,bsmd->bsd", dense, states)
    return mixture if bias is None else mixture + bias


def channel64(x, gamma):
    """Return silu(x / |x| * sqrt(C) * gamma); a pixel whose channels are all 0 stays 0."""
    length = x.square().sum(1, keepdim=True).sqrt()
    y = torch.where(length > 0, x / length, 0) * len(gamma) ** 0.5 * gamma
    return y / (1 + (-y).exp())


# --- the table -----------------------------------------------------------------------------------

class Case(NamedTuple):
    """An operation with its inputs; gradients are compared for inputs that require one."""
    inputs: list
    call: Callable       # inputs -> outputs, by kernels or twins
    reference: Callable  # the same in float64


def spread(x):
    """Return the same values in a strided view: every second one of a wider tensor."""
    return torch.stack((x, x), -1)[..., 0]


class Draw:
    """Makes leaves of random normal values, the same at every run."""

    def __init__(self, kind="fp32", strided=False, device=DEVICE, seed=0):
        torch.manual_seed(seed)
        self.scale = 1
        (self.dtype, self.weights), self.strided, self.device = TYPES[kind], strided, device

    def __call__(self, *shape):
        x = torch.randn(shape, device=self.device).mul_(self.scale).to(self.dtype)
        return (spread(x) if self.strided else x).requires_grad_()

    def weight(self, *shape):
        return torch.randn(shape, device=self.device).to(self.weights).requires_grad_()


def norm_case(draw, *shape, add=False, itself=False):
    """Return a case of rms_norm; add: with a residual, itself: which is x."""
    x, w, r = draw(*shape), draw.weight(shape[-1]), draw(*shape) if add else None
    if itself:
        return Case([x, w], lambda x, w: kernels.rms_norm(x, w, x), lambda x, w: norm64(x, w, x))
    return Case([x, w, r], kernels.rms_norm, norm64)


def chain_case(draw, *shape):
    """Return a case where an output becomes an input, x is used twice, and s or y alone is."""
    def chain(norm, x, w):
        y = norm(x, w)
        s, z = norm(y, w, x)
        return y + s + z, norm(x, w, y)[1], norm(x, w, y)[0]

    return Case([draw(*shape), draw.weight(shape[-1])], lambda *a: chain(kernels.rms_norm, *a),
                lambda *a: chain(norm64, *a))


def heads_case(draw, B, L, H, Hk, Dh, S=None, norm=True, only=slice(None)):
    """Return a case of queries_keys; only: which of q, k, v are used."""
    rope = kernels.rope_table(torch.arange(L, device=draw.device)[:, None], (Dh,))
    context = None if S is None else draw(B, S, 2 * Hk, Dh)
    weights = [draw.weight(Dh) if norm and (i < 2 or context is not None) else None
               for i in range(3)]
    return Case([draw(B, L, H + 2 * Hk, Dh), context, *weights],
                lambda x, c, *w: kernels.queries_keys(x, rope, H, w, c)[only],
                lambda x, c, *w: queries_keys64(x, rope, H, w, c)[only])


def ffn_case(draw, *shape, hidden, twice=False):
    """Return a case of feed_forward; twice: the output becomes an input of the same network."""
    D = shape[-1]
    gate_up, down = (draw(*size).detach().mul(size[1] ** -0.5).requires_grad_()
                     for size in ((2 * hidden, D), (D, hidden)))

    def run(f, x, *weights):
        y = f(x, *weights)
        return x + y + f(y, *weights) if twice else y

    return Case([draw(*shape), gate_up, down],
                lambda *a: run(kernels.feed_forward, *a),
                lambda *a: run(feed_forward64, *a))


def choose(draw, B, S, M, K):
    """Return indices and weights for three blocks; cases take one, sliced as in `MoS.forward`."""
    index = torch.rand(B, S, M, 3, device=draw.device).topk(K, 2).indices
    return index, draw.weight(B, S, K, 3)


def mix_case(draw, B, S, M, K, D, bias=True):
    """Return a case of mix_states, without gradients."""
    index, weight = choose(draw, B, S, M, K)
    inputs = [draw(B, S, M, D), index, weight, draw.weight(D) if bias else None]
    return Case([x if x is None else x.detach() for x in inputs],
                lambda x, i, w, b: kernels.mix_states(x, i[..., 1], w[..., 1], b),
                lambda x, i, w, b: mix64(x, i[..., 1], w[..., 1], b))


def project_case(draw, B, S, M, K, D, Dg):
    index, weight = choose(draw, B, S, M, K)
    return Case([draw(B, S, M, D).detach(), index, weight, draw(Dg, D), draw(Dg)],
                lambda x, i, w, *p: kernels.mix_project(x, i[..., 1], w[..., 1], *p),
                lambda x, i, w, *p: F.linear(mix64(x, i[..., 1], w[..., 1]), *p))


def channel_case(draw, B, H, W, C):
    """Return a case of channel_norm without gradients; some pixels are 0.

    Channels are last in memory unless inputs are strided.
    """
    x, gamma = draw(B, H, W, C).detach().movedim(3, 1), draw.weight(C, 1, 1).detach()
    x[:, :, 1:2, 1:2] = 0
    return Case([x, gamma], kernels.channel_norm, channel64)


SMALL = {
    "norm": (norm_case, 37, 200),
    "norm, 3-d": (norm_case, 5, 3, 123),
    "norm, one row": (norm_case, 1, 40),
    "norm, no row": (norm_case, 2, 0, 64),
    "norm, 5000": (norm_case, 3, 5000),
    "norm, small": (norm_case, 9, 32, dict(scale=1e-3)),  # eps matters
    "add": (norm_case, 37, 200, dict(add=True)),
    "add, odd": (norm_case, 5, 123, dict(add=True)),
    "add, no row": (norm_case, 0, 64, dict(add=True)),
    "add, itself": (norm_case, 5, 32, dict(itself=True)),
    "chain": (chain_case, 5, 123),
    "heads": (heads_case, 1, 17, 4, 4, 32),  # more tokens than programs of the backward pass
    "heads, groups": (heads_case, 2, 3, 6, 2, 96),
    "heads, context": (heads_case, 2, 5, 4, 2, 128, 3),
    "heads, context, one kv head": (heads_case, 2, 3, 5, 1, 32, 9),
    "heads, tiny": (heads_case, 3, 1, 1, 1, 8, 1),
    "heads, no norm": (heads_case, 2, 3, 6, 3, 32, None, False),
    "heads, no norm, context": (heads_case, 1, 9, 6, 1, 96, 4, False),
    "heads, no sample": (heads_case, 0, 9, 4, 2, 32, 3),
    "heads, no context token": (heads_case, 2, 3, 4, 2, 32, 0),
    "heads, small": (heads_case, 1, 5, 4, 2, 32, 3, dict(scale=1e-3)),
    "heads, only q": (heads_case, 1, 5, 4, 2, 32, 3, True, slice(1)),
    "heads, only v": (heads_case, 1, 5, 4, 2, 32, None, True, slice(2, 3)),
    "ffn": (ffn_case, 5, 24, dict(hidden=41)),
    "ffn, 3-d": (ffn_case, 3, 2, 24, dict(hidden=1030)),
    "ffn, twice": (ffn_case, 3, 16, dict(hidden=40, twice=True)),
    "ffn, no row": (ffn_case, 2, 0, 24, dict(hidden=40)),
    "mix": (mix_case, 2, 5, 6, 2, 123),
    "mix, no bias": (mix_case, 2, 5, 6, 1, 40, False),
    "mix, 2100": (mix_case, 1, 2, 3, 3, 2100),
    "mix, no token": (mix_case, 2, 0, 6, 2, 40),
    "project": (project_case, 2, 5, 6, 2, 123, 24),
    "project, one token": (project_case, 1, 1, 3, 3, 40, 24),
    "project, no sample": (project_case, 0, 5, 6, 2, 40, 24),
    "channels": (channel_case, 2, 9, 11, 40),
    "channels, 20": (channel_case, 1, 13, 12, 20),
    "channels, 24": (channel_case, 3, 2, 2, 24),
    "channels, 96": (channel_case, 2, 5, 8, 96),
    "channels, 320": (channel_case, 1, 4, 3, 320),
    "channels, one": (channel_case, 2, 3, 3, 1),
    "channels, one pixel": (channel_case, 1, 1, 1, 40),
    "channels, 5000": (channel_case, 1, 2, 2, 5000),
    "channels, no sample": (channel_case, 0, 2, 2, 40),
    "channels, small": (channel_case, 1, 3, 3, 40, dict(scale=1e-8))}
LARGE = {  # on a GPU, and compiled without one
    "norm 2560": (norm_case, 4608, 2560),
    "norm 3072": (norm_case, 4608, 3072),
    "norm 128": (norm_case, 2, 999, 128),
    "add 2560": (norm_case, 4608, 2560, dict(add=True)),
    "add 3072": (norm_case, 4608, 3072, dict(add=True)),
    "heads 128": (heads_case, 2, 1028, 20, 20, 128),
    "heads 128, context": (heads_case, 2, 1028, 24, 8, 128, 77),
    "heads 128, one kv head": (heads_case, 2, 1028, 20, 1, 128),
    "heads 128, no norm": (heads_case, 2, 1028, 24, 8, 128, 77, False),
    "ffn 2048": (ffn_case, 2, 300, 1024, dict(hidden=2048)),
    "mix 4096": (mix_case, 2, 300, 32, 2, 4096),
    "mix 3072, no bias": (mix_case, 2, 300, 28, 2, 3072, False),
    "project 4096": (project_case, 2, 300, 32, 2, 4096, 2560),
    "channels 160": (channel_case, 2, 128, 96, 160),
    "channels 512": (channel_case, 1, 128, 96, 512),
    "channels 640": (channel_case, 2, 33, 31, 640),
    "channels 1024": (channel_case, 2, 64, 64, 1024)}
HUGE = {  # more than 2^31 values, on a GPU
    "norm": (norm_case, 700_000, 3072),
    "add": (norm_case, 700_000, 3072, dict(add=True)),
    "heads": (heads_case, 11_000, 64, 16, 4, 128),
    "heads, context": (heads_case, 5_500, 64, 16, 16, 128, 128),
    "ffn": (ffn_case, 1_050_000, 16, dict(hidden=1024)),
    "project": (project_case, 8_200, 8, 32, 2, 1024, 16),
    "channels": (channel_case, 210_000, 4, 4, 640)}
EACH = ("norm", "add", "chain", "heads", "heads, context", "heads, no norm", "ffn, 3-d",
        "mix", "project", "channels")


def make(case, draw):
    """Return the Case of a row of the table; its option scale multiplies the data."""
    make_case, *arguments = case
    options = dict(arguments.pop()) if isinstance(arguments[-1], dict) else {}
    draw.scale = options.pop("scale", 1)
    return make_case(draw, *arguments, **options)


def device(test):
    """Mark a test of the kernels: in the interpreter on a CPU, on the GPU if there is one."""
    return pytest.mark.gpu(test) if GPU else test


def gpu(test):
    """Mark a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a GPU")(test))


@pytest.fixture
def fused(monkeypatch):
    """Let the kernels take tensors on the CPU, too, with the interpreter."""
    if not GPU:
        monkeypatch.setattr(kernels, "fused", lambda *_: not kernels.PLAIN)


def evaluate(call, inputs, upstream=None, strided=False, times=1):
    """Return outputs, gradients of the inputs, and the random gradients of the outputs.

    upstream: the latter, where they are given. times: how often to go backward through the graph.
    """
    outputs = call(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    upstream = upstream or [torch.randn_like(y) for y in outputs]
    upstream = [spread(d) for d in upstream] if strided else upstream
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    gradients = []
    for _ in range(times if leaves else 0):
        gradients = grad(outputs, leaves, upstream, retain_graph=times > 1, materialize_grads=True)
    return outputs, list(gradients), upstream


def agree(ours, theirs):
    """Assert that tensors differ by no more than the coarsest type among ours explains."""
    allowed = max(ERROR[a.dtype] for a in ours)
    for a, b in zip(ours, theirs, strict=True):
        error, size = (torch.linalg.vector_norm(x).item() for x in (a.double() - b, b.double()))
        assert a.shape == b.shape and error <= allowed * size, (a.shape, error / max(size, 1e-30))


def check(case, kind="fp32", strided=False, ends=False):
    """Compare a case with float64; ends: only the first and last two entries of axis 0."""
    inputs, call, reference = make(case, Draw(kind, strided))
    rows = len(inputs[0])

    def cut(x):
        return torch.cat((x[:2], x[-2:])) if ends and len(x) == rows else x

    def widen(x):
        if x is None or not x.is_floating_point():
            return x if x is None else cut(x)
        return cut(x.detach()).double().requires_grad_(x.requires_grad)

    outputs, gradients, upstream = evaluate(call, inputs, strided=strided)
    assert {y.dtype for y in outputs} == {TYPES[kind][0]}
    expected, d_expected, _ = evaluate(reference, [widen(x) for x in inputs],
                                       [widen(d) for d in upstream])
    kept = [i for i, d in enumerate(gradients) if not ends or len(d) == rows]
    agree([cut(y) for y in outputs] + [cut(gradients[i]) for i in kept],
          expected + [d_expected[i] for i in kept])


# --- A. on the CPU with the interpreter, or on the GPU -------------------------------------------

@device
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", TYPES if GPU else ["fp32"])
@pytest.mark.parametrize("name", SMALL | LARGE if GPU else SMALL)
def test_kernels_match_float64(name, kind, strided, fused):
    """Every output and gradient; strided inputs and gradients as well as contiguous ones."""
    check((SMALL | LARGE)[name], kind, strided)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SMALL)
def test_twins_match_float64(name, kind, monkeypatch):
    """The same for the twins, in all types on any machine."""
    monkeypatch.setattr(kernels, "PLAIN", True)
    check(SMALL[name], kind)


@device
@pytest.mark.parametrize("name", SMALL | LARGE if GPU else [
    name if name in ("add", "heads, context", "ffn") else pytest.param(name, marks=pytest.mark.slow)
    for name in SMALL])
def test_same_input_same_bits(name, fused):
    """Twice forward, twice backward through one graph: equal bits, and inputs stay as they are."""
    inputs, call, _ = make((SMALL | LARGE)[name], Draw(KIND))
    before = [None if x is None else x.clone() for x in inputs]
    *first, upstream = evaluate(call, inputs)
    for times in (1, 2):
        *again, _ = evaluate(call, inputs, upstream, times=times)
        assert all(map(torch.equal, sum(first, []), sum(again, [])))
    assert all(x is None or torch.equal(x, b) for x, b in zip(inputs, before))


@device
def test_choices_of_some_tokens(fused):
    """Index and weight may be any part of a larger tensor."""
    (states, index, weight, bias), call, reference = make(SMALL["mix"], Draw())
    more = [torch.cat((x, x), 1)[:, 2:-3] for x in (index, weight)]
    agree([call(states, *more, bias)],
          [reference(states.double(), more[0], more[1].double(), bias.double())])


@device
def test_a_residual_in_fp32(fused):
    """Under autocast a product in bf16 meets a stream in fp32, and the stream stays so."""
    x, w, r = Draw("bf16")(5, 32), Draw()(32), Draw(seed=1)(5, 32)
    (s, y), gradients, upstream = evaluate(kernels.rms_norm, [x, w, r])
    assert (s.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert [d.dtype for d in gradients] == [x.dtype, w.dtype, r.dtype]
    doubles = [a.detach().double().requires_grad_() for a in (x, w, r)]
    expected, d_expected, _ = evaluate(norm64, doubles, [d.double() for d in upstream])
    agree([y, s, *gradients], [expected[1], expected[0], *d_expected])


@pytest.mark.parametrize("call, message", [
    (lambda: kernels.rms_norm(torch.ones(2, 8), torch.ones(4)), r"shape \(8,\).*\[\(4,\)\]"),
    (lambda: kernels.rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8)), "of its own shape"),
    (lambda: kernels.queries_keys(torch.ones(1, 3, 3, 8), torch.ones(2, 2, 4), 1), r"\(3, 4\)"),
    (lambda: kernels.queries_keys(torch.ones(1, 3, 3, 8), torch.ones(2, 3, 4), 1,
                                  (torch.ones(8), None, None)), "or none"),
    (lambda: kernels.channel_norm(torch.ones(2, 8, 3, 3), torch.ones(8)), r"\(8, 1, 1\), got")])
def test_shapes_that_do_not_fit(call, message):
    """Shapes with which a kernel would read beyond a tensor's end are refused by size."""
    with pytest.raises(ValueError, match=message):
        call()


@device
@pytest.mark.parametrize("name", EACH)
def test_compiled(name, fused, monkeypatch):
    """Each operation compiles without a break, and its kernels then compute the same."""
    monkeypatch.setattr(kernels, "NARROW", 0)
    torch._dynamo.reset()
    inputs, call, _ = make(SMALL[name], Draw(KIND))
    outputs, gradients, upstream = evaluate(call, inputs)
    compiled = torch.compile(call, backend="inductor" if GPU else "aot_eager", fullgraph=True)
    agree(sum(evaluate(compiled, inputs, upstream)[:2], []), outputs + gradients)


@device
@pytest.mark.slow
def test_operators(fused, monkeypatch):
    """The schemas and output shapes that torch.compile knows of the operators are true."""
    seen = {name: {} for name in OPERATORS}

    def spy(name):
        def call(*arguments):
            arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            seen[name].setdefault(tuple(x is None for x in arguments), arguments)
            return OPERATORS[name](*arguments)
        return call

    for name in OPERATORS:
        monkeypatch.setattr(kernels, name, spy(name))
    for case in SMALL.values():
        inputs, call, _ = make(case, Draw())
        evaluate(call, inputs)
    for name, calls in seen.items():
        assert calls, name
        for arguments in calls.values():
            opcheck(OPERATORS[name], arguments)


# --- B. which path -------------------------------------------------------------------------------

def run_code(code, **environment):
    """Return what Python code prints in a process of its own, by default without interpreter."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": paths,
           **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, check=True,
                          stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("name", ["norm", "add", "heads, context", "ffn", "project"])
def test_dispatch(name, monkeypatch):
    """Kernels run for tensors on a GPU, twins elsewhere and where PLAIN asks for them."""
    for plain in (False, True):
        monkeypatch.setattr(kernels, "PLAIN", plain)
        for device in {"cpu", DEVICE}:
            inputs, call, _ = make(SMALL[name], Draw(device=device))
            y = call(*inputs)
            y = y if isinstance(y, torch.Tensor) else y[0]
            assert ("Fused" in y.grad_fn.name()) == (device == "cuda" and not plain)


@pytest.mark.parametrize("name, width", [
    ("norm", 200), ("add", 200), ("heads, context", 4 * 128), ("ffn", 24), ("project", 123)])
def test_narrow_models_leave_fusion_to_the_compiler(name, width, monkeypatch):
    """Inside torch.compile kernels run from NARROW channels on, elsewhere at any width.

    The width is the model's: of queries and keys all query heads together.
    """
    rule = kernels.fused
    monkeypatch.setattr(kernels, "fused", lambda x, width=None: rule(
        SimpleNamespace(is_cuda=True, shape=x.shape), width))
    inputs, call, _ = make(SMALL[name], Draw(device="cpu"))

    def kernel_taken(narrow, compiling):
        monkeypatch.setattr(kernels, "NARROW", narrow)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = call(*inputs)
        y = y if isinstance(y, torch.Tensor) else y[0]
        return "Fused" in y.grad_fn.name()

    assert kernel_taken(narrow=width, compiling=True)
    assert not kernel_taken(narrow=width + 1, compiling=True)
    assert kernel_taken(narrow=width + 1, compiling=False)
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert not kernel_taken(narrow=width, compiling=True)


def test_channel_norm_dispatch(fused, monkeypatch):
    """The kernel runs where channels are last and no gradient is needed, else the twin."""
    calls = []
    forward = kernels.channel_norm_forward
    monkeypatch.setattr(kernels, "channel_norm_forward", lambda *a: calls.append(a) or forward(*a))
    (x, gamma), call, reference = make(SMALL["channels"], Draw())

    def kernel_taken(*inputs):
        before = len(calls)
        agree([call(*inputs).detach()], [reference(*(a.detach().double() for a in inputs))])
        return len(calls) > before

    leaves = x.clone().requires_grad_(), gamma.clone().requires_grad_()
    assert kernel_taken(x, gamma) and torch.no_grad()(kernel_taken)(*leaves)
    assert not kernel_taken(x.contiguous(), gamma) and not kernel_taken(x[:, :, :, ::2], gamma)
    assert not kernel_taken(leaves[0], gamma) and not kernel_taken(x, leaves[1])
    nonzero = [torch.randn_like(x).requires_grad_(), leaves[1]]
    _, gradients, upstream = evaluate(call, nonzero)
    doubles = [a.detach().double().requires_grad_() for a in nonzero]
    agree(gradients, evaluate(reference, doubles, [d.double() for d in upstream])[1])
    monkeypatch.setattr(kernels, "PLAIN", True)
    assert not kernel_taken(x, gamma)


def test_variable_and_missing_triton():
    """MOS_PLAIN=1 asks for the twins; without Triton there is nothing else."""
    assert run_code("import kernels; print(kernels.PLAIN)", MOS_PLAIN="1") == "True\n"
    assert run_code("import sys; sys.modules['triton'] = None; import test_kernels as t\n"
                 "print(t.kernels.PLAIN, {*map(t.check, t.SMALL.values())})") == "True {None}\n"


def test_no_silent_loss_of_gradients(fused):
    """Kernels without a gradient refuse tensors that require one."""
    inputs, call, _ = make(SMALL["mix"], Draw())
    for i in (0, 2, 3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        with pytest.raises(RuntimeError, match=r"mix_project\(\)"):
            call(*leaves)
        with torch.no_grad():
            call(*leaves)
    inputs, call, _ = make(SMALL["project"], Draw())
    with pytest.raises(RuntimeError, match="freeze"):
        call(inputs[0].requires_grad_(), *inputs[1:])


# --- C. compiled for GPUs that are not there -----------------------------------------------------

def launches():
    """Return (kernel, arguments, options) of each launch in the large cases; nothing runs."""
    recorded = []
    real = dict(vars(kernels))

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: recorded.append((self.kernel, arguments, options))

    replaced = {name: Recorder(value) for name, value in real.items() if name.endswith("_kernel")}
    replaced |= {name: op._init_fn for name, op in OPERATORS.items()}
    vars(kernels).update(replaced, fused=lambda *_: True)
    try:
        with FakeTensorMode():
            for case in LARGE.values():
                inputs, call, _ = make(case, Draw("mixed"))
                evaluate(call, inputs)
    finally:
        vars(kernels).update(real)
    assert {kernel.__name__ for kernel, _, _ in recorded} == {*replaced} - {*OPERATORS}
    return recorded


def compile_kernels(arch):
    """Compile each of `launches`; print registers, stack and 16-byte accesses as JSON lines.

    Arguments are specialised as in a launch: 1 and None are constants, multiples of 16 and pointers
    are known to be aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    done = set()
    for kernel, arguments, options in launches():
        signature = {}
        constants = {}
        aligned = {}
        values = dict(zip(kernel.arg_names, arguments)) | options
        for i, parameter in enumerate(kernel.params):
            value = values.pop(parameter.name)
            tensor = isinstance(value, torch.Tensor)
            if parameter.is_constexpr or value is None or not tensor and value == 1:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            else:
                signature[parameter.name] = names[value.dtype] if tensor else "i32"
                if tensor or value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, aligned)
        if source.hash() in done:
            continue
        done.add(source.hash())
        asm = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=values).asm
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage",
                                    file.name], capture_output=True, text=True, check=True).stdout
        ptx = asm["ptx"]
        print(json.dumps({
            "kernel": kernel.__name__, "options": options,
            **{key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)},
            **{key: len(re.findall(pattern, ptx)) for key, pattern in (
                ("loads", r"ld\.global\S*\.v4\.b32"), ("stores", r"st\.global\S*\.v4\.b32"),
                ("copies", r"cp\.async\S* \[[^,]*, \[[^,]*, 0x10"))}}))


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90,
                                  pytest.param(100, marks=pytest.mark.slow)])
def test_kernels_compile(arch):
    """In large cases no register is spilled, and memory is accessed 16 bytes at a time."""
    for line in run_code(f"import test_kernels; test_kernels.compile_kernels({arch})").splitlines():
        print(line)
        usage = json.loads(line)
        assert usage["STACK"] == usage["LOCAL"] == 0, line
        assert usage["loads"] + usage["copies"], line
        assert usage["stores"] or usage["kernel"] == "mix_backward_kernel", line


# --- D. a complete model -------------------------------------------------------------------------

@device
@pytest.mark.parametrize("changes", (dict(gen_depth=1, und_depth=2, router_depth=1),
                                     pytest.param({}, marks=pytest.mark.slow)))
def test_model(changes, fused, monkeypatch):
    """Loss and gradients of a small MoS are those of the twins, on a GPU under bf16 autocast."""
    model = make_model(**changes).to(DEVICE)
    results = []
    B = 2
    z0, z1 = torch.randn(2, B, model.config.vae_channels, 2, 3, device=DEVICE)
    tokens = model.tokenizer.batch(["two stars", "a star left of the blue square"])
    arguments = z0, tokens.to(DEVICE), torch.rand(B).to(DEVICE), z1, None, None, None, z1
    trained = [p for p in model.parameters() if p.requires_grad]
    for plain in (False, True):
        monkeypatch.setattr(kernels, "PLAIN", plain)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            loss = model.loss(*arguments).mean()
        results.append((loss, torch.cat([d.flatten() for d in grad(loss, trained)])))
    (ours, d_ours), (theirs, d_theirs) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if GPU else 1e-5, atol=0)
    assert F.cosine_similarity(d_ours, d_theirs, 0) > (0.99 if GPU else 0.99999)


# --- E. on a GPU alone ---------------------------------------------------------------------------

@gpu
def test_no_interpreter():
    """Tensors on the GPU take the kernels, which are compiled and not interpreted."""
    import triton
    assert isinstance(kernels.rms_norm_kernel, triton.JITFunction)
    assert kernels.fused(torch.ones(1, device="cuda"))


@gpu
@pytest.mark.parametrize("name", EACH)
def test_cuda_graph(name):
    """A graph captured with some inputs replays with others, forward and backward."""
    inputs, call, _ = make(SMALL[name], Draw(KIND))
    others = make(SMALL[name], Draw(KIND, seed=1)).inputs
    *expected, upstream = evaluate(call, others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before
        evaluate(call, inputs, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *replayed, _ = evaluate(call, inputs, upstream)
    for x, other in zip(inputs, others):
        if x is not None:
            x.data.copy_(other)
    graph.replay()
    agree(sum(replayed, []), sum(expected, []))


@gpu
def test_generate_replays(monkeypatch):
    """Pictures drawn with CUDA graphs are those without, alone and in a batch with a mask."""
    model, prompts = make_model().cuda(), ["a red circle", "two stars", "a star left of the square"]
    for some in (prompts[:1], prompts):
        graph = model.generate(some, steps=3)
        with monkeypatch.context() as patch:
            patch.setattr(mos, "replayed", lambda function, *_: function)
            plain = model.generate(some, steps=3)
        assert [a.tobytes() for a in graph] == [b.tobytes() for b in plain]


@gpu
@pytest.mark.slow
def test_training_on_a_gpu(tmp_path):
    """In train.py, compiled, the losses with the kernels are those with the twins."""
    losses = []
    for plain in "01":
        out = tmp_path / plain
        flags = "--stage image --steps 6 --warmup 1 --batch 64 --scenes 500 --log-every 2 --seed 3"
        flags = [*flags.split(), "--init", str(ROOT / "weights"), "--out", str(out)]
        printed = run_code("import kernels, sys, train\nkernels.NARROW = 0\n"
                           f"sys.argv = ['train.py', *{flags}]\ntrain.main()", MOS_PLAIN=plain)
        assert ("plain PyTorch" if plain == "1" else "Triton kernels") in printed
        rows = csv.DictReader((out / "image.csv").read_text().splitlines())
        losses.append([float(row["loss"]) for row in rows if row["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@gpu
@pytest.mark.parametrize("name", HUGE)
def test_more_than_2_31_values(name):
    """The first and last rows are right where offsets need 64 bits."""
    gc.collect()
    torch.cuda.empty_cache()  # of the case before
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")
    check(HUGE[name], "bf16", ends=True)
