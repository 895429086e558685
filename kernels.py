"""What towers, router and VAE do most: each operation as a PyTorch twin, then as a Triton kernel.

These are the places where a network spends its memory traffic. The twin defines the result and
runs wherever Triton has no GPU; on such a GPU the kernels below it take its place, unless the
environment variable MOS_PLAIN=1 asks for the twins.

A kernel's floor is the bytes it must move over the bandwidth of the memory (`bench.py` prints the
fraction), so each reads its inputs once, keeps the rest in registers and writes its outputs once.
Backward passes rebuild what they need from what the forward pass read or wrote. Where many programs
add to one sum, each writes a row of partial sums and no atomics are used: same input, same bits.
"""

import os
from functools import wraps
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the twins do all the work
    triton, tl = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=None)

PLAIN = os.environ.get("MOS_PLAIN", "0") == "1" or not hasattr(tl, "load")


def fused(x):
    """Whether the Triton kernels take this tensor."""
    return x.is_cuda and not PLAIN


def autocast(device):
    """bf16 matrix products on a GPU, fp32 elsewhere. MoS App. A."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def at_least_fp32(x):
    """x in fp32 for what must not be rounded to less; fp64, in which tests compare, stays."""
    return x if x.dtype == torch.float64 else x.float()


def cast(*tensors):
    """The tensors as autocast hands them to a matrix product."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def operator(fake):
    """Make a function the operator `mos::name`, which torch.compile calls instead of tracing it.

    Called eagerly on a GPU it stays a function: an operator's way through the dispatcher costs the
    host more time than the launch. fake: the same signature; returns outputs of the right shape and
    type, uncomputed.
    """
    def wrap(function):
        op = torch.library.custom_op(f"mos::{function.__name__}", function, mutates_args=())
        op.register_fake(fake)

        @wraps(function)
        def call(*arguments):
            eager = arguments[0].is_cuda and not torch.compiler.is_compiling()
            return (function if eager else op)(*arguments)
        call.operator = op
        return call
    return wrap


# ------------------------------------------------------------------------------------------------
# RMSNorm, alone or with the residual addition before it

def rms_norm_twin(x, weight, residual=None, eps=1e-6):
    """s = x + residual, y = s / sqrt(mean(s^2) + eps) * weight, in fp32 (Zhang & Sennrich).

    x, residual: (..., D) of any float type, weight: (D,). Returns y in x's type; with a residual s
    and y, s in the wider type of the two.
    """
    s = x if residual is None else x + residual
    n = at_least_fp32(s)
    scale = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    y = (n * scale * at_least_fp32(weight)).type_as(x)
    return y if residual is None else (s, y)


@triton.jit
def rms_norm_kernel(x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, rows, D, eps: tl.constexpr,
                    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program normalises ROWS whole rows; ADD: of x + r, which is written to s."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None]
    inside, at = (row < rows) & (col < D), row * D + col
    s = tl.load(x_ptr + at, inside, 0)
    if ADD:  # rounded to the type that is stored, so that the backward pass sees the same s
        s = s.to(tl.float32) + tl.load(r_ptr + at, inside, 0).to(tl.float32)
        s = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + at, s, inside)
    s = s.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / D + eps)
    w = tl.load(w_ptr + col, col < D, 0).to(tl.float32)
    tl.store(y_ptr + at, s * scale * w, inside)


@triton.jit
def rms_norm_backward_kernel(s_ptr, w_ptr, ds_ptr, dy_ptr, dx_ptr, dw_ptr, rows, D,
                             eps: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                             BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """With n = s * scale, g = dy * w:  dx = scale * (g - n * mean(g * n)) + ds, dw = sum(dy * n).

    A few programs for each multiprocessor stride over all rows: dw stays in registers, and the next
    rows are on their way (STAGES) while these are reduced. dw_ptr: a row for each program.
    """
    col = tl.arange(0, BLOCK)[None]
    w = tl.load(w_ptr + col, col < D, 0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside, at = (row < rows) & (col < D), row * D + col
        s = tl.load(s_ptr + at, inside, 0).to(tl.float32)
        dy = tl.load(dy_ptr + at, inside, 0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / D + eps)
        g, n = dy * w, s * scale
        dx = scale * (g - n * (scale * tl.sum(g * s, 1, keep_dims=True) / D))
        if ADD:
            dx += tl.load(ds_ptr + at, inside, 0).to(tl.float32)
        tl.store(dx_ptr + at, dx, inside)
        dw += dy * n
    tl.store(dw_ptr + tl.program_id(0) * D + col, tl.sum(dw, 0, keep_dims=True), col < D)


def multiprocessors(x):
    """Of the tensor's GPU; the interpreter has one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def norm_shape(x):
    """Rows and width of x, and the tile for them: whole rows, about 4096 values."""
    block = triton.next_power_of_2(x.shape[-1])
    return x.numel() // x.shape[-1], x.shape[-1], dict(BLOCK=block, ROWS=max(1, 4096 // block))


def empty_sum(x, residual):
    """Uninitialised x + residual, in their common type; nothing where there is no residual."""
    if residual is None:
        return x.new_empty(0)
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))


@operator(lambda x, weight, residual, eps: (empty_sum(x, residual), torch.empty_like(x)))
def rms_norm_forward(x: Tensor, weight: Tensor, residual: Tensor | None,
                     eps: float) -> tuple[Tensor, Tensor]:
    """s (empty without a residual) and y of `rms_norm_twin`; x and residual contiguous."""
    rows, D, tile = norm_shape(x)
    s, y = empty_sum(x, residual), torch.empty_like(x)
    rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, residual, weight.contiguous(), s, y, rows, D, eps, ADD=residual is not None, **tile,
        num_warps=4)
    return s, y


@operator(lambda s, weight, ds, dy, eps: (torch.empty_like(s), torch.empty_like(weight)))
def rms_norm_backward(s: Tensor, weight: Tensor, ds: Tensor | None, dy: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (that of the residual, too) and of the weight; s is x without a residual."""
    rows, D, tile = norm_shape(s)
    programs = min(triton.cdiv(rows, tile["ROWS"]), 2 * multiprocessors(s))
    dx, dw = torch.empty_like(s), s.new_empty(programs, D, dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](
        s, weight.contiguous(), ds, dy, dx, dw, rows, D, eps, ADD=ds is not None, **tile, STAGES=3,
        num_warps=4)
    return dx, dw.sum(0).to(weight.dtype)


class FusedNorm(Function):
    """`rms_norm_twin`, one pass forward and one backward."""

    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
        s, y = rms_norm_forward(x, weight, residual, eps)
        ctx.save_for_backward(x if residual is None else s, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if residual is None else residual.dtype)
        return y if residual is None else (s, y)

    @staticmethod
    def backward(ctx, *gradients):
        s, weight = ctx.saved_tensors
        *ds, dy = (d.contiguous() for d in gradients)
        dx, dw = rms_norm_backward(s, weight, ds[0] if ds else None, dy, ctx.eps)
        return dx.to(ctx.dtypes[0]), dw, dx.to(ctx.dtypes[1]) if ds else None, None


def rms_norm(x, weight, residual=None, eps=1e-6):
    """`rms_norm_twin` by the path that suits x. Raises ValueError for shapes that do not fit."""
    if weight.shape != x.shape[-1:] or residual is not None and residual.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} needs a weight as wide and a residual of its shape, "
                         f"got {[tuple(a.shape) for a in (weight, residual) if a is not None]}")
    return (FusedNorm.apply if fused(x) else rms_norm_twin)(x, weight, residual, eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its learned weight, over the last axis of width D."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, None, self.eps)

    def add(self, x, branch):
        """Return x + branch and its norm: the end of a residual branch, one pass over memory."""
        return rms_norm(branch, self.weight, x, self.eps)


# ------------------------------------------------------------------------------------------------
# From the packed projection to queries and keys: a norm for each head, then the rotary embedding

def rope_table(positions, axes, theta=1e4, slow=None):
    """Angles of an axial rotary embedding (Su et al.): each axis rotates its share of a head.

    positions: (L, A), axes: A even channel counts that sum to the head width, slow: changes the
    frequencies, in radians a position. Returns cos and sin, each (L, Dh/2) in fp32.
    """
    angles = []
    for axis, channels in enumerate(axes):
        index = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32)
        rate = theta ** (-index / channels)
        angles.append(positions[:, axis, None].float() * (slow(rate) if slow else rate))
    angles = torch.cat(angles, -1)                                                # (L, Dh/2)
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate the channel pairs (i, i + Dh/2) of x: (B, L, H, Dh) by the table's angles, in fp32."""
    cos, sin = (a[:, None] for a in rope)                                    # (L, 1, Dh/2) each
    a, b = at_least_fp32(x).chunk(2, -1)                                              # (B, L, H, Dh/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)       # (B, L, H, Dh)


def queries_keys_twin(qkv, rope, heads, weights=(None, None, None), context=None, eps=1e-6):
    """Queries, keys and values of a packed projection, normalised by head and rotated.

    qkv: (B, L, H+2Hk, Dh), H queries, Hk keys, Hk values; rope: `rope_table` of L positions.
    weights: of the norms of q and k, and of the context's k, each (Dh,), or None: no norm.
    context: (B, S, 2Hk, Dh), keys and values of tokens that are not rotated and come last.
    Returns q (B, L, H, Dh), k and v (B, L+S, Hk, Dh) in qkv's type.
    """
    H, Hk = heads, (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([H, Hk, Hk], 2)                                 # (B, L, H or Hk, Dh) each
    q, k = (a if w is None else rms_norm_twin(a, w, None, eps) for a, w in zip((q, k), weights))
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    if context is not None:
        kc, vc = context.chunk(2, 2)                                         # (B, S, Hk, Dh) each
        kc = kc if weights[2] is None else rms_norm_twin(kc, weights[2], None, eps)
        k, v = torch.cat((k, kc), 1), torch.cat((v, vc), 1)                  # (B, L+S, Hk, Dh) each
    return q, k, v


@triton.jit
def head_tile(q_ptr, k_ptr, v_ptr, token, kv_row, first, H, Hk, HALF: tl.constexpr,
              GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """GROUP heads of a token, from `first` on, of its H queries, Hk keys and Hk values.

    Returns whether they are queries, whether they are values, and where their first halves are, in
    the packed tensor and in q, k or v; the second halves are HALF further on.
    """
    head, col = first + tl.arange(0, GROUP)[:, None], tl.arange(0, BLOCK)[None]
    packed = (token * (H + 2 * Hk) + head) * 2 * HALF + col
    apart = tl.where(head < H + Hk, k_ptr + ((kv_row * Hk + head - H) * 2 * HALF + col),
                     v_ptr + ((kv_row * Hk + head - H - Hk) * 2 * HALF + col))
    apart = tl.where(head < H, q_ptr + ((token * H + head) * 2 * HALF + col), apart)
    return head < H, head >= H + Hk, packed, apart


@triton.jit
def queries_keys_kernel(x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
                        L, KEYS, OFFSET, H, Hk, HEADS, eps: tl.constexpr, NORM: tl.constexpr,
                        TURN: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
                        BLOCK: tl.constexpr):
    """A program takes the first HEADS heads of one token, so that its angles are read once.

    Token l of a sample has its key and its value in row OFFSET + l of KEYS.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_row, lane = token // L * KEYS + OFFSET + token % L, tl.arange(0, GROUP)[:, None]
    # Angles and weights are loaded in the shape of a tile: broadcast later, they would move.
    col = tl.broadcast_to(tl.arange(0, BLOCK)[None], (GROUP, BLOCK))
    if TURN:
        cos = tl.load(cos_ptr + token % L * HALF + col, col < HALF, 0)
        sin = tl.load(sin_ptr + token % L * HALF + col, col < HALF, 0)
    for first in range(0, HEADS, GROUP):
        query, value, packed, apart = head_tile(q_ptr, k_ptr, v_ptr, token, kv_row, first, H, Hk,
                                                HALF, GROUP, BLOCK)
        inside = (first + lane < HEADS) & (col < HALF)
        a = tl.load(x_ptr + packed, inside, 0).to(tl.float32)
        b = tl.load(x_ptr + packed + HALF, inside, 0).to(tl.float32)
        y, z = a, b
        if NORM:
            w = tl.where(query, qw_ptr, kw_ptr) + col
            w1, w2 = tl.load(w, col < HALF, 0), tl.load(w + HALF, col < HALF, 0)
            square = tl.sum(a * a, 1, keep_dims=True) + tl.sum(b * b, 1, keep_dims=True)
            scale = tl.rsqrt(square / (2 * HALF) + eps)
            y, z = a * scale * w1.to(tl.float32), b * scale * w2.to(tl.float32)
        if TURN:
            y, z = y * cos - z * sin, z * cos + y * sin
        tl.store(apart, tl.where(value, a, y), inside)  # values pass
        tl.store(apart + HALF, tl.where(value, b, z), inside)


@triton.jit
def queries_keys_backward_kernel(x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr,
                                 dx_ptr, dw_ptr, tokens, L, KEYS, OFFSET, H, Hk,
                                 eps: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
                                 HALF: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Turn back, then through the norm, into the packed shape.

    As in RMSNorm's, the programs stride over all tokens with dw in registers. dw_ptr: for each
    program that of the queries' norm and that of the keys'.
    """
    lane = tl.arange(0, GROUP)[:, None]
    col = tl.broadcast_to(tl.arange(0, BLOCK)[None], (GROUP, BLOCK))
    none = tl.zeros((GROUP, BLOCK), tl.float32)
    q1, q2, k1, k2 = none, none, none, none
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        kv_row = token // L * KEYS + OFFSET + token % L
        if TURN:
            cos = tl.load(cos_ptr + token % L * HALF + col, col < HALF, 0)
            sin = tl.load(sin_ptr + token % L * HALF + col, col < HALF, 0)
        for first in range(0, H + 2 * Hk, GROUP):
            query, value, packed, apart = head_tile(dq_ptr, dk_ptr, dv_ptr, token, kv_row, first,
                                                    H, Hk, HALF, GROUP, BLOCK)
            inside = (first + lane < H + 2 * Hk) & (col < HALF)
            d1 = tl.load(apart, inside, 0).to(tl.float32)
            d2 = tl.load(apart + HALF, inside, 0).to(tl.float32)
            y, z = d1, d2
            if TURN:
                y, z = d1 * cos + d2 * sin, d2 * cos - d1 * sin
            if NORM:
                w = tl.where(query, qw_ptr, kw_ptr) + col
                w1, w2 = tl.load(w, col < HALF, 0), tl.load(w + HALF, col < HALF, 0)
                a = tl.load(x_ptr + packed, inside & ~value, 0).to(tl.float32)
                b = tl.load(x_ptr + packed + HALF, inside & ~value, 0).to(tl.float32)
                square = tl.sum(a * a, 1, keep_dims=True) + tl.sum(b * b, 1, keep_dims=True)
                scale = tl.rsqrt(square / (2 * HALF) + eps)
                a, b = a * scale, b * scale
                q1, q2 = q1 + tl.where(query, y * a, 0), q2 + tl.where(query, z * b, 0)
                k1, k2 = k1 + tl.where(query, 0, y * a), k2 + tl.where(query, 0, z * b)
                y, z = y * w1.to(tl.float32), z * w2.to(tl.float32)
                mean = tl.sum(y * a, 1, keep_dims=True) + tl.sum(z * b, 1, keep_dims=True)
                mean /= 2 * HALF
                y, z = scale * (y - a * mean), scale * (z - b * mean)
            tl.store(dx_ptr + packed, tl.where(value, d1, y), inside)  # values pass
            tl.store(dx_ptr + packed + HALF, tl.where(value, d2, z), inside)
    if NORM:
        dw, col = dw_ptr + tl.program_id(0) * 4 * HALF, tl.arange(0, BLOCK)
        tl.store(dw + col, tl.sum(q1, 0), col < HALF)
        tl.store(dw + HALF + col, tl.sum(q2, 0), col < HALF)
        tl.store(dw + 2 * HALF + col, tl.sum(k1, 0), col < HALF)
        tl.store(dw + 3 * HALF + col, tl.sum(k2, 0), col < HALF)


def empty_heads(qkv, heads, context):
    """Uninitialised q, k, v of `queries_keys_twin`; v without a context is empty, nothing moves."""
    B, L, total, Dh = qkv.shape
    q, kv_heads = qkv.new_empty(B, L, heads, Dh), (total - heads) // 2
    if context is None:
        return q, qkv.new_empty(B, L, kv_heads, Dh), qkv.new_empty(0)
    k = qkv.new_empty(B, L + context.shape[1], kv_heads, Dh)
    return q, k, torch.empty_like(k)


@operator(lambda qkv, context, cos, sin, q_weight, k_weight, c_weight, heads, eps:
          empty_heads(qkv, heads, context))
def queries_keys_forward(qkv: Tensor, context: Tensor | None, cos: Tensor, sin: Tensor,
                         q_weight: Tensor | None, k_weight: Tensor | None, c_weight: Tensor | None,
                         heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of `queries_keys_twin`; without a context v is empty: it stays in qkv."""
    q, k, v = empty_heads(qkv, heads, context)
    (B, L), (_, keys, Hk, Dh) = qkv.shape[:2], k.shape
    for x, qw, kw, length, offset, H in ((qkv, q_weight, k_weight, L, 0, heads),
                                         (context, c_weight, c_weight, keys - L, L, 0)):
        if x is not None and x.numel():
            queries_keys_kernel[(B * length,)](
                x, qw, kw, cos, sin, q, k, v, length, keys, offset, H, Hk,
                H + (Hk if context is None else 2 * Hk), eps, NORM=qw is not None,
                TURN=x is qkv, HALF=Dh // 2, GROUP=8, BLOCK=triton.next_power_of_2(Dh // 2),
                num_warps=2)
    return q, k, v


def empty_gradients(qkv, context, q_weight):
    """Uninitialised gradients of qkv, the context (empty if there is none), and all norms."""
    norms = 0 if q_weight is None else 4
    return (torch.empty_like(qkv), qkv.new_empty(0) if context is None else
            torch.empty_like(context), qkv.new_empty(norms, qkv.shape[3], dtype=torch.float32))


@operator(lambda qkv, context, cos, sin, q_weight, *_: empty_gradients(qkv, context, q_weight))
def queries_keys_backward(qkv: Tensor, context: Tensor | None, cos: Tensor, sin: Tensor,
                          q_weight: Tensor | None, k_weight: Tensor | None,
                          c_weight: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
                          eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, context (else empty), and of the norms: q, k, none, context's k."""
    dqkv, dcontext, dw = empty_gradients(qkv, context, q_weight)
    (B, L, heads, Dh), (_, keys, Hk, _) = dq.shape, dk.shape
    dw.zero_()
    for i, x, dx, qw, kw, length, offset, H in (
            (0, qkv, dqkv, q_weight, k_weight, L, 0, heads),
            (2, context, dcontext, c_weight, c_weight, keys - L, L, 0)):
        if x is not None and x.numel():
            programs = min(B * length, 16 * multiprocessors(x))
            sums = dw.new_empty(programs, 2, Dh)
            queries_keys_backward_kernel[(programs,)](
                x, qw, kw, cos, sin, dq, dk, dv, dx, sums, B * length, length, keys, offset, H, Hk,
                eps, NORM=qw is not None, TURN=x is qkv, HALF=Dh // 2, GROUP=4,
                BLOCK=triton.next_power_of_2(Dh // 2), num_warps=1)
            if qw is not None:
                dw[i:i + 2] = sums.sum(0)
    return dqkv, dcontext, dw


class FusedQueriesKeys(Function):
    """`queries_keys_twin`, read in place from the packed projection."""

    @staticmethod
    def forward(ctx, qkv, context, cos, sin, q_weight, k_weight, c_weight, heads, eps):
        inputs = [x if x is None else x.contiguous()
                  for x in (qkv, context, cos, sin, q_weight, k_weight, c_weight)]
        ctx.save_for_backward(*inputs)
        ctx.eps = eps
        q, k, v = queries_keys_forward(*inputs, heads, eps)
        return q, k, inputs[0][:, :, heads + k.shape[2]:] if context is None else v

    @staticmethod
    def backward(ctx, *gradients):
        inputs = ctx.saved_tensors
        dqkv, dcontext, dw = queries_keys_backward(
            *inputs, *(d.contiguous() for d in gradients), ctx.eps)
        dw = [w if w is None else dw[i].to(w.dtype) for i, w in zip((0, 1, 3), inputs[4:])]
        return dqkv, None if inputs[1] is None else dcontext, None, None, *dw, None, None


def queries_keys(qkv, rope, heads, weights=(None, None, None), context=None, eps=1e-6):
    """`queries_keys_twin` by the path that suits qkv.

    Raises ValueError where the table is not for L positions, or only some have a norm.
    """
    L, half = qkv.shape[1], qkv.shape[3] // 2
    if any(table.shape != (L, half) for table in rope):
        raise ValueError(f"{L} tokens with heads {2 * half} wide need tables of shape {(L, half)}, "
                         f"got {tuple(rope[0].shape)}")
    weights = weights if context is not None else (*weights[:2], None)
    if len({w is None for w in weights[:2 if context is None else 3]}) > 1:
        raise ValueError("queries and keys must all have a norm, or none")
    if fused(qkv):
        return FusedQueriesKeys.apply(qkv, context, *rope, *weights, heads, eps)
    return queries_keys_twin(qkv, rope, heads, weights, context, eps)


# ------------------------------------------------------------------------------------------------
# The feed-forward network

def swiglu_twin(gate_up):
    """silu(gate) * up (Shazeer). gate_up: (..., 2F), returns (..., F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def feed_forward_twin(x, gate_up, down):
    """down(swiglu(gate_up(x))). x: (..., D), gate_up: (2F, D), down: (D, F). Returns (..., D)."""
    return F.linear(swiglu_twin(F.linear(x, gate_up)), down)


@triton.jit
def swiglu_kernel(gu_ptr, dh_ptr, dgu_ptr, h_ptr, width, BACK: tl.constexpr, HIDDEN: tl.constexpr,
                  BLOCK: tl.constexpr):
    """With s = sigmoid(gate), h = gate * s * up is written if HIDDEN; BACK: also the gradients
    dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s.

    A program takes BLOCK columns of one row, of the gate and of what it gates.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * 2 * width + col, col < width
    gate = tl.load(gu_ptr + at, inside, 0).to(tl.float32)
    up = tl.load(gu_ptr + at + width, inside, 0).to(tl.float32)
    s = tl.sigmoid(gate)
    if BACK:
        dh = tl.load(dh_ptr + row * width + col, inside, 0).to(tl.float32)
        tl.store(dgu_ptr + at, dh * up * s * (1 + gate * (1 - s)), inside)
        tl.store(dgu_ptr + at + width, dh * gate * s, inside)
    if HIDDEN:
        tl.store(h_ptr + row * width + col, gate * s * up, inside)


def empty_half(gate_up):
    """Uninitialised h of `swiglu_twin`."""
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operator(empty_half)
def swiglu_forward(gate_up: Tensor) -> Tensor:
    """`swiglu_twin` of a contiguous tensor."""
    h = empty_half(gate_up)
    width = h.shape[-1]
    swiglu_kernel[(h.numel() // width, triton.cdiv(width, 4096))](
        gate_up, None, None, h, width, BACK=False, HIDDEN=True, BLOCK=4096, num_warps=8)
    return h


@operator(lambda gate_up, dh, rebuild: (
    torch.empty_like(gate_up), empty_half(gate_up) if rebuild else gate_up.new_empty(0)))
def swiglu_backward(gate_up: Tensor, dh: Tensor, rebuild: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and h once more if it is to be rebuilt (else empty)."""
    width = dh.shape[-1]
    dgu, h = torch.empty_like(gate_up), empty_half(gate_up) if rebuild else gate_up.new_empty(0)
    swiglu_kernel[(dh.numel() // width, triton.cdiv(width, 4096))](
        gate_up, dh, dgu, h, width, BACK=True, HIDDEN=rebuild, BLOCK=4096, num_warps=8)
    return dgu, h


class FusedFeedForward(Function):
    """`feed_forward_twin` that keeps 2F values a token for its backward pass, or none.

    The products are the library's; ours is the activation between them, rebuilt going back.
    """

    @staticmethod
    def forward(ctx, x, gate_up, down, recompute):
        hidden = x @ gate_up.mT                                                   # (B, S, 2F)
        ctx.save_for_backward(x, gate_up, down, None if recompute else hidden)
        return swiglu_forward(hidden) @ down.mT                                   # (B, S, D)

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, hidden = ctx.saved_tensors
        hidden = x @ gate_up.mT if hidden is None else hidden                     # (B, S, 2F)
        dhidden, h = swiglu_backward(hidden, dy @ down, True)               # (B, S, 2F), (B, S, F)
        dx = dhidden @ gate_up                                                    # (B, S, D)
        dhidden, h, dy, x = (a.flatten(0, -2) for a in (dhidden, h, dy, x))
        return dx, dhidden.mT @ x, dy.mT @ h, None


def feed_forward(x, gate_up, down, recompute=False):
    """`feed_forward_twin` by the path that suits x; recompute: rebuild everything in backward."""
    if fused(x):
        return FusedFeedForward.apply(x.contiguous(), gate_up, down, recompute)
    if recompute:
        return checkpoint(feed_forward_twin, x, gate_up, down, use_reentrant=False)
    return feed_forward_twin(x, gate_up, down)


class SwiGLU(nn.Module):
    """`feed_forward` with its learned weights, without biases."""

    recompute = False  # set it to keep nothing for the backward pass, for one more product

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return feed_forward(*cast(x, self.gate_up.weight, self.down.weight), self.recompute)


# ------------------------------------------------------------------------------------------------
# Mixing the chosen states

def mix_states_twin(states, index, weight, bias=None):
    """The weighted sum of each token's chosen states. MoS eq. (4), for one generation block.

    states: (B, S, M, D), index and weight: (B, S, K), bias: (D,) to be added.
    Returns (B, S, D) in the states' type.
    """
    rows = index[..., None].expand(-1, -1, -1, states.shape[-1])                  # (B, S, K, D)
    chosen = states.gather(2, rows)                                               # (B, S, K, D)
    mixture = (at_least_fp32(chosen) * at_least_fp32(weight[..., None])).sum(2)                     # (B, S, D)
    return (mixture if bias is None else mixture + at_least_fp32(bias)).type_as(states)


@triton.jit
def mix_kernel(states_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, M, D, i_token, i_k, w_token,
               w_k, K: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A program mixes BLOCK columns of a token's K states; i_, w_: strides of index and weight."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mixture = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        mixture += tl.load(bias_ptr + col, col < D, 0).to(tl.float32)
    for k in tl.static_range(K):
        layer = tl.load(index_ptr + token * i_token + k * i_k)
        weight = tl.load(weight_ptr + token * w_token + k * w_k).to(tl.float32)
        state = tl.load(states_ptr + (token * M + layer) * D + col, col < D, 0)
        mixture += weight * state.to(tl.float32)
    tl.store(out_ptr + token * D + col, mixture, col < D)


@triton.jit
def mix_backward_kernel(states_ptr, index_ptr, d_ptr, dw_ptr, M, D, i_token, i_k,
                        K: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of a weight is the dot product of its state with the mixture's gradient."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    d = tl.load(d_ptr + token * D + col, col < D, 0).to(tl.float32)
    for k in tl.static_range(K):
        layer = tl.load(index_ptr + token * i_token + k * i_k)
        state = tl.load(states_ptr + (token * M + layer) * D + col, col < D, 0)
        tl.store(dw_ptr + token * K + k, tl.sum(d * state.to(tl.float32), 0))


def _mixture(states, *_):
    return states.new_empty(*states.shape[:2], states.shape[3])


@operator(_mixture)
def mix_forward(states: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`mix_states_twin` of contiguous states."""
    out, (B, S, M, D) = _mixture(states), states.shape
    index, weight = index.flatten(0, 1), weight.flatten(0, 1)
    block = min(2048, triton.next_power_of_2(D))
    mix_kernel[(B * S, triton.cdiv(D, block))](
        states, index, weight, bias, out, M, D, *index.stride(), *weight.stride(),
        K=index.shape[1], BIAS=bias is not None, BLOCK=block, num_warps=8)
    return out


@operator(lambda states, index, d: states.new_empty(index.shape, dtype=torch.float32))
def mix_backward(states: Tensor, index: Tensor, d: Tensor) -> Tensor:
    """The gradient (B, S, K) of the weights in fp32, of the mixture's gradient d (B, S, D)."""
    B, S, M, D = states.shape
    dw, index = states.new_empty(index.shape, dtype=torch.float32), index.flatten(0, 1)
    mix_backward_kernel[(B * S,)](states, index, d, dw, M, D, *index.stride(), K=index.shape[1],
                                  BLOCK=triton.next_power_of_2(D), num_warps=4)
    return dw


class FusedMixProject(Function):
    """Mixing and Proj of MoS eq. (4) in one: autograd would keep the mixture of every block.

    Kept are indices and weights; the backward pass mixes again. Gradients reach the weights and
    Proj, never the states: the understanding tower is frozen.
    """

    @staticmethod
    def forward(ctx, states, index, weight, proj, bias):
        ctx.save_for_backward(states, index, weight, proj)
        return F.linear(mix_forward(states, index, weight, None), proj, bias)     # (B, S, Dg)

    @staticmethod
    def backward(ctx, dy):
        states, index, weight, proj = ctx.saved_tensors
        mixture = mix_forward(states, index, weight, None).flatten(0, 1)          # (B*S, Du)
        flat = dy.flatten(0, 1)                                                   # (B*S, Dg)
        dweight = mix_backward(states, index, (dy @ proj).contiguous())           # (B, S, K)
        return None, None, dweight.to(weight.dtype), flat.mT @ mixture, flat.sum(0)


def mix_states(states, index, weight, bias=None):
    """`mix_states_twin` by the path that suits the states; on the fused path without a gradient."""
    if not fused(states):
        return mix_states_twin(states, index, weight, bias)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad
                                       for a in (states, weight, bias)):
        raise RuntimeError("mix_states() has no gradient on a GPU; training uses mix_project()")
    return mix_forward(states.contiguous(), index, weight, bias if bias is None else
                       bias.contiguous())


def mix_project(states, index, weight, proj, bias):
    """Proj(mixture) of MoS eq. (4): (B, S, Dg). proj: (Dg, Du), bias: (Dg,)."""
    states, proj, bias = cast(states, proj, bias)
    if not fused(states):
        return F.linear(mix_states_twin(states, index, weight), proj, bias)
    if states.requires_grad:
        raise RuntimeError("mix_project() gives the states no gradient: freeze the tower first")
    return FusedMixProject.apply(states.contiguous(), index, weight, proj, bias)


# ------------------------------------------------------------------------------------------------
# RMSNorm over the channels of pictures, and SiLU: half of what the VAE does besides convolutions

def channel_norm_twin(x, gamma):
    """silu(x / |x| * sqrt(C) * gamma), |x| over the channels, in fp32; 0 stays 0.

    x: (B, C, H, W) of any float type, gamma: (C, 1, 1). Returns x's shape and type.
    """
    y = F.normalize(at_least_fp32(x), dim=1).type_as(x) * (gamma * gamma.shape[0] ** 0.5)
    return F.silu(y).type_as(x)


@triton.jit
def channel_norm_kernel(x_ptr, g_ptr, y_ptr, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes ROWS pixels, whose channels are neighbours in memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None]
    inside, at = (row < rows) & (col < C), row * C + col
    x = tl.load(x_ptr + at, inside, 0).to(tl.float32)
    square = tl.maximum(tl.sum(x * x, 1, keep_dims=True), 1e-24)  # as in F.normalize
    y = x * tl.rsqrt(square / C) * tl.load(g_ptr + col, col < C, 0).to(tl.float32)
    tl.store(y_ptr + at, y * tl.sigmoid(y), inside)


@operator(lambda x, gamma: torch.empty_like(x))
def channel_norm_forward(x: Tensor, gamma: Tensor) -> Tensor:
    """`channel_norm_twin` of a tensor with channels last in memory."""
    rows, C, tile = norm_shape(x.movedim(1, 3))
    y = torch.empty_like(x)
    channel_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, gamma.contiguous(), y, rows, C, **tile, num_warps=4)
    return y


def channel_norm(x, gamma):
    """`channel_norm_twin` by the path that suits x; the kernel is for sampling, without gradients.

    Raises ValueError where gamma is not one value for each channel.
    """
    if gamma.shape != (x.shape[1], 1, 1):
        raise ValueError(f"x {tuple(x.shape)} needs a gamma of shape {(x.shape[1], 1, 1)}, "
                         f"got {tuple(gamma.shape)}")
    trained = torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad)
    if fused(x) and not trained and x.is_contiguous(memory_format=torch.channels_last):
        return channel_norm_forward(x, gamma)
    return channel_norm_twin(x, gamma)


# ------------------------------------------------------------------------------------------------
# Attention stays the library's

class Keys(NamedTuple):
    """Which keys are real, in one of two ways.

    mask: (B, L') True at real keys. runs: where the real keys come first, pairs (samples, keys) of
    neighbouring samples that have the same number of them; a mask rules out the fastest kernels.
    """
    mask: torch.Tensor | None
    runs: list | None = None


def pad_keys(before, keys):
    """Return the Keys where `before` real keys stand in front of those of `keys`."""
    if keys.runs:
        return Keys(None, [(samples, before + count) for samples, count in keys.runs])
    return Keys(F.pad(keys.mask, (before, 0), value=True))


def attention(q, k, v, keys=None, causal=False):
    """Return softmax attention with grouped heads, (B, L, H*Dh).

    q: (B, L, H, Dh), k, v: (B, L', Hk, Dh), keys: which of the L' keys are real; None: all.
    """
    mask, runs = keys or (None, None)
    if mask is not None:
        mask = mask[:, None, None]                                                # (B, 1, 1, L')

    def attend(q, k, v):
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    q, k, v = (a.transpose(1, 2)
               for a in (q, k, v))  # (B, H, L, Dh), (B, Hk, L', Dh), (B, Hk, L', Dh)
    if not runs:
        return attend(q, k, v)                                                    # (B, L, H*Dh)
    parts = zip(*(a.split([samples for samples, _ in runs]) for a in (q, k, v)), runs)
    return torch.cat([attend(q, k[:, :, :count], v[:, :, :count])
                      for q, k, v, (_, count) in parts])                          # (B, L, H*Dh)
