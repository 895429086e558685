"""The operations that the towers, the router and the VAE share: in PyTorch first, then in Triton.

    operation      formula                                                       used by
    rms_norm       s = x + residual, y = s / sqrt(mean(s^2) + eps) * weight      all but the VAE
    feed_forward   down(silu(gate) * up), gate and up = gate_up(x)               all but the VAE
    rope_table     angle = position * theta^(-2i / channels)                     all but the VAE
    queries_keys   q, k, v = split(qkv), then rms_norm and rotation of q and k   all but the VAE
    mix_states     sum over the K chosen layers of weight * state, eq. (4)       mos.py, sampling
    mix_project    Proj of that sum                                              mos.py, training
    channel_norm   silu(x / |x| * sqrt(C) * gamma)                               vae.py
    attention      softmax(q k^T / sqrt(Dh)) v over the real keys                all but the VAE

A reader of the model needs the first half only. `NAME_twin` defines an operation in plain PyTorch;
`NAME` has the same signature and takes the Triton kernels of the second half where `fused` says so.
"""

import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton does not exist for this platform: the twins do all the work
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=None)

PLAIN = os.environ.get("MOS_PLAIN", "0") == "1" or not hasattr(tl, "load")
# A compiled model uses our kernels from this width on. In narrower ones the compiler gains more by
# fusing the twins with what is around them: docs/speed.md has the measurements.
NARROW = 2048


def fused(x, width=None):
    """Return whether the Triton kernels compute x: on a GPU, unless MOS_PLAIN=1.

    Inside torch.compile the model's width (None: x's last axis) must also be at least NARROW.
    """
    if not x.is_cuda or PLAIN:
        return False
    width = x.shape[-1] if width is None else width
    return width >= NARROW or not torch.compiler.is_compiling()


# --- Precision -----------------------------------------------------------------------------------
def autocast(device):
    """Return the context in which matrix products are bf16 on a GPU, fp32 elsewhere. MoS App. A."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def at_least_fp32(x):
    """Cast x to fp32, since sums and norms are not safe in bf16. fp64, used by tests, is kept."""
    return x if x.dtype == torch.float64 else x.float()


def cast(*tensors):
    """Return the tensors in the type that autocast gives to the inputs of a matrix product."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


# --- RMSNorm, alone or after a residual addition -------------------------------------------------
def rms_norm_twin(x, weight, residual=None, eps=1e-6):
    """Return y = s / sqrt(mean(s^2) + eps) * weight with s = x + residual (Zhang & Sennrich).

    x, residual: (..., D) of any float type, weight: (D,). Computed in fp32. Returns y in x's type;
    with a residual s, y, where s has the wider type of x and residual.
    """
    s = x if residual is None else x + residual
    n = at_least_fp32(s)
    scale = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    y = (n * scale * at_least_fp32(weight)).type_as(x)
    return y if residual is None else (s, y)


def rms_norm(x, weight, residual=None, eps=1e-6):
    """Compute `rms_norm_twin`. Raises ValueError for shapes that do not fit."""
    if weight.shape != x.shape[-1:] or residual is not None and residual.shape != x.shape:
        shapes = [tuple(a.shape) for a in (weight, residual) if a is not None]
        raise ValueError(f"x {tuple(x.shape)} needs a weight of shape {tuple(x.shape[-1:])} and a "
                         f"residual of its own shape, got {shapes}")
    return (FusedNorm.apply if fused(x) else rms_norm_twin)(x, weight, residual, eps)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis, of width D, with its learned weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, None, self.eps)

    def add(self, x, branch):
        """Return x + branch and its norm: the end of a residual branch, one pass over memory."""
        return rms_norm(branch, self.weight, x, self.eps)


# --- The feed-forward network --------------------------------------------------------------------
def swiglu_twin(gate_up):
    """Return silu(gate) * up (Shazeer): (..., F). gate_up: both side by side, (..., 2F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def feed_forward_twin(x, gate_up, down):
    """Return down(swiglu(gate_up(x))): (..., D). x: (..., D), gate_up: (2F, D), down: (D, F)."""
    return F.linear(swiglu_twin(F.linear(x, gate_up)), down)


def feed_forward(x, gate_up, down):
    """Compute `feed_forward_twin`."""
    if fused(x):
        return FusedFeedForward.apply(x.contiguous(), gate_up, down)
    return feed_forward_twin(x, gate_up, down)


class SwiGLU(nn.Module):
    """`feed_forward` with its learned weights, without biases."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return feed_forward(*cast(x, self.gate_up.weight, self.down.weight))


# --- Queries and keys: a norm for each head, then the rotary embedding ---------------------------
def rope_table(positions, axes, theta=1e4, scale_rates=None):
    """Return cos and sin of an axial rotary embedding (Su et al.), each (L, Dh/2) in fp32.

    positions: (L, A). axes: how many channels each of the A coordinates rotates, even numbers whose
    sum is Dh. scale_rates: a function of the frequencies, in radians for each step in position.
    """
    angles = []
    for axis, channels in enumerate(axes):
        index = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32)
        rates = theta ** (-index / channels)
        if scale_rates:
            rates = scale_rates(rates)
        angles.append(positions[:, axis, None].float() * rates)
    angles = torch.cat(angles, -1)                                                # (L, Dh/2)
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate the channel pairs (i, i + Dh/2) of x: (B, L, H, Dh) by the table's angles, in fp32."""
    cos, sin = (table[:, None] for table in rope)                            # (L, 1, Dh/2) each
    a, b = at_least_fp32(x).chunk(2, -1)                                     # (B, L, H, Dh/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)       # (B, L, H, Dh)


def queries_keys_twin(qkv, rope, heads, weights=(None, None, None), context=None, eps=1e-6):
    """Return queries, keys and values of a packed projection, normalised by head and rotated.

    qkv: (B, L, H+2Hk, Dh), H=heads queries, Hk keys, Hk values. rope: `rope_table` of L positions.
    weights: (Dh,) each, of the norms of q, k and the context's k; None: no norm. context: keys and
    values (B, S, 2Hk, Dh) of tokens that are not rotated and come last.
    Returns q (B, L, H, Dh), k and v (B, L+S, Hk, Dh) in qkv's type.
    """
    def norm(x, weight):
        return x if weight is None else rms_norm_twin(x, weight, None, eps)

    Hk = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([heads, Hk, Hk], 2)         # (B, L, H, Dh), (B, L, Hk, Dh), (B, L, Hk, Dh)
    q = apply_rope(norm(q, weights[0]), rope)                                     # (B, L, H, Dh)
    k = apply_rope(norm(k, weights[1]), rope)                                     # (B, L, Hk, Dh)
    if context is not None:
        kc, vc = context.chunk(2, 2)                                         # (B, S, Hk, Dh) each
        k = torch.cat((k, norm(kc, weights[2])), 1)                               # (B, L+S, Hk, Dh)
        v = torch.cat((v, vc), 1)                                                 # (B, L+S, Hk, Dh)
    return q, k, v


def queries_keys(qkv, rope, heads, weights=(None, None, None), context=None, eps=1e-6):
    """Compute `queries_keys_twin`. Raises ValueError for a wrong table or incomplete norms."""
    _, L, _, head_width = qkv.shape
    if any(table.shape != (L, head_width // 2) for table in rope):
        raise ValueError(f"{L} tokens with heads of width {head_width} need tables of shape "
                         f"{(L, head_width // 2)}, got {tuple(rope[0].shape)}")
    weights = weights[:2] if context is None else weights
    if 0 < sum(weight is None for weight in weights) < len(weights):
        raise ValueError("queries and keys must all have a norm, or none of them")
    if fused(qkv, heads * head_width):
        context_weight = None if context is None else weights[2]
        return FusedQueriesKeys.apply(heads, eps, qkv, context, *rope, *weights[:2], context_weight)
    return queries_keys_twin(qkv, rope, heads, weights, context, eps)


# --- Mixing the chosen states of the understanding tower -----------------------------------------
def mix_states_twin(states, index, weight, bias=None):
    """Return the weighted sum of each token's chosen states, plus bias. MoS eq. (4), for one block.

    states: (B, S, M, D), index and weight: (B, S, K), bias: (D,). Returns (B, S, D), states' type.
    """
    rows = index[..., None].expand(-1, -1, -1, states.shape[-1])                  # (B, S, K, D)
    chosen = at_least_fp32(states.gather(2, rows))                                # (B, S, K, D)
    mixture = (chosen * at_least_fp32(weight[..., None])).sum(2)                  # (B, S, D)
    if bias is not None:
        mixture = mixture + at_least_fp32(bias)                                   # (B, S, D)
    return mixture.type_as(states)


def mix_states(states, index, weight, bias=None):
    """Compute `mix_states_twin`. The kernel is for sampling: it refuses to lose a gradient."""
    if not fused(states):
        return mix_states_twin(states, index, weight, bias)
    inputs = [x for x in (states, weight, bias) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise RuntimeError("mix_states() has no gradient on a GPU; training uses mix_project()")
    bias = None if bias is None else bias.contiguous()
    return mix_forward(states.contiguous(), index, weight, bias)


def mix_project_twin(states, index, weight, proj, bias):
    """Return Proj(mixture) of MoS eq. (4): (B, S, Dg). proj: (Dg, Du), bias: (Dg,)."""
    return F.linear(mix_states_twin(states, index, weight).type_as(proj), proj, bias)


def mix_project(states, index, weight, proj, bias):
    """Compute `mix_project_twin` under autocast. On a GPU the states must be frozen."""
    states, proj, bias = cast(states, proj, bias)
    if not fused(states):
        return mix_project_twin(states, index, weight, proj, bias)
    if states.requires_grad:
        raise RuntimeError("mix_project() gives the states no gradient: freeze the tower first")
    return FusedMixProject.apply(states.contiguous(), index, weight, proj, bias)


# --- RMSNorm over the channels of pictures, then SiLU --------------------------------------------
def channel_norm_twin(x, gamma):
    """Return silu(x / |x| * sqrt(C) * gamma), |x| over the channels, in fp32; 0 stays 0.

    x: (B, C, H, W) of any float type, gamma: (C, 1, 1). Returns x's shape and type.
    """
    y = F.normalize(at_least_fp32(x), dim=1).type_as(x) * (gamma * gamma.shape[0] ** 0.5)
    return F.silu(y).type_as(x)


def channel_norm(x, gamma):
    """Compute `channel_norm_twin`. Raises ValueError unless gamma has a value for each channel."""
    if gamma.shape != (x.shape[1], 1, 1):
        raise ValueError(f"x {tuple(x.shape)} needs a gamma of shape {(x.shape[1], 1, 1)}, "
                         f"got {tuple(gamma.shape)}")
    trained = torch.is_grad_enabled() and (x.requires_grad or gamma.requires_grad)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if fused(x, x.shape[1]) and channels_last and not trained:  # the kernel is for sampling
        return channel_norm_forward(x, gamma)
    return channel_norm_twin(x, gamma)


# --- Attention, by PyTorch -----------------------------------------------------------------------
class Keys(NamedTuple):
    """Which keys of a padded batch are real, in one of two forms.

    mask: (B, L') True at real keys. runs: pairs (samples, keys), for neighbouring samples with the
    same number of real keys, all in front; without a mask the fastest attention kernels can run.
    """
    mask: Tensor | None
    runs: list | None = None


def pad_keys(before, keys):
    """Return the Keys where `before` real keys stand in front of those of `keys`."""
    if keys.runs:
        return Keys(None, [(samples, before + count) for samples, count in keys.runs])
    return Keys(F.pad(keys.mask, (before, 0), value=True))


def attention(q, k, v, keys=None, causal=False):
    """Return softmax(q k^T / sqrt(Dh)) v: (B, L, H*Dh), where H/Hk queries share a key.

    q: (B, L, H, Dh), k, v: (B, L', Hk, Dh), keys: the `Keys` of L' keys; None: all are real.
    causal: token i sees the keys 0 to i only.
    """
    def attend(q, k, v, mask=None):
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    q = q.transpose(1, 2)                                                         # (B, H, L, Dh)
    k = k.transpose(1, 2)                                                         # (B, Hk, L', Dh)
    v = v.transpose(1, 2)                                                         # (B, Hk, L', Dh)
    if keys is None or not keys.runs:
        mask = None if keys is None else keys.mask[:, None, None]
        return attend(q, k, v, mask)                                              # (B, L, H*Dh)
    parts = []
    first = 0
    for samples, count in keys.runs:
        run = slice(first, first + samples)
        parts.append(attend(q[run], k[run, :, :count], v[run, :, :count]))
        first += samples
    return torch.cat(parts)                                                       # (B, L, H*Dh)


# ==================================== second half: the kernels ====================================
# Memory traffic is their limit: each reads its inputs once, writes its outputs once, and backward
# passes compute again what they need. Where many programs add to one sum, each writes its own row
# of partial sums instead of atomic additions, so that the same input gives the same bits.

def operator(empty):
    """Make a function the operator `mos::name`, which torch.compile calls instead of tracing it.

    Called eagerly on a GPU it stays a function: PyTorch's dispatcher would cost the host more than
    the launch. empty: takes the same arguments, returns the outputs uninitialised.
    """
    def wrap(function):
        op = torch.library.custom_op(f"mos::{function.__name__}", function, mutates_args=())
        op.register_fake(empty)

        def call(*arguments):
            eager = arguments[0].is_cuda and not torch.compiler.is_compiling()
            return (function if eager else op)(*arguments)
        call.operator = op
        return call
    return wrap


def sm_count(x):
    """Return the number of SMs of the tensor's GPU (1 in the interpreter)."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def tiling(x):
    """Return x's rows, width, number of tiles (full rows, about 4096 values) and launch options."""
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    rows_each = max(1, 4096 // block)
    return rows, width, triton.cdiv(rows, rows_each), dict(BLOCK=block, ROWS=rows_each, num_warps=4)


# --- rms_norm ------------------------------------------------------------------------------------
@triton.jit
def rms_norm_kernel(x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, rows, D, eps: tl.constexpr,
                    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise ROWS full rows in each program; ADD: rows of x + r, which are written to s."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None]
    inside = (row < rows) & (col < D)
    offset = row * D + col
    s = tl.load(x_ptr + offset, inside, 0)
    if ADD:  # rounded to the type that is stored, so that the backward pass sees the same s
        s = s.to(tl.float32) + tl.load(r_ptr + offset, inside, 0).to(tl.float32)
        s = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offset, s, inside)
    s = s.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / D + eps)
    w = tl.load(w_ptr + col, col < D, 0).to(tl.float32)
    tl.store(y_ptr + offset, s * scale * w, inside)


@triton.jit
def rms_norm_backward_kernel(s_ptr, w_ptr, ds_ptr, dy_ptr, dx_ptr, dw_ptr, rows, D,
                             eps: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
                             BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """With n = s * scale, g = dy * w:  dx = scale * (g - n * mean(g * n)) + ds, dw = sum(dy * n).

    A few programs for each SM loop over all rows, STAGES of which are loaded ahead, with dw in
    registers. dw_ptr: a row of partial sums for each program.
    """
    col = tl.arange(0, BLOCK)[None]
    w = tl.load(w_ptr + col, col < D, 0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (col < D)
        offset = row * D + col
        s = tl.load(s_ptr + offset, inside, 0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, inside, 0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / D + eps)
        g = dy * w
        n = s * scale
        dx = scale * (g - n * (scale * tl.sum(g * s, 1, keep_dims=True) / D))
        if ADD:
            dx += tl.load(ds_ptr + offset, inside, 0).to(tl.float32)
        tl.store(dx_ptr + offset, dx, inside)
        dw += dy * n
    tl.store(dw_ptr + tl.program_id(0) * D + col, tl.sum(dw, 0, keep_dims=True), col < D)


def _empty_norm(x, weight, residual, eps):
    if residual is None:
        return x.new_empty(0), torch.empty_like(x)
    kind = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=kind), torch.empty_like(x)


@operator(_empty_norm)
def rms_norm_forward(x: Tensor, weight: Tensor, residual: Tensor | None,
                     eps: float) -> tuple[Tensor, Tensor]:
    """Return s (empty without a residual) and y of `rms_norm_twin`. x, residual: contiguous."""
    rows, D, tiles, options = tiling(x)
    s, y = _empty_norm(x, weight, residual, eps)
    rms_norm_kernel[(tiles,)](x, residual, weight.contiguous(), s, y, rows, D, eps,
                              ADD=residual is not None, **options)
    return s, y


@operator(lambda s, weight, ds, dy, eps: (torch.empty_like(s), torch.empty_like(weight)))
def rms_norm_backward(s: Tensor, weight: Tensor, ds: Tensor | None, dy: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (which the residual shares) and weight; s: x if no residual."""
    rows, D, tiles, options = tiling(s)
    programs = min(tiles, 2 * sm_count(s))
    dx = torch.empty_like(s)
    dw = s.new_empty(programs, D, dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](s, weight.contiguous(), ds, dy, dx, dw, rows, D, eps,
                                          ADD=ds is not None, STAGES=3, **options)
    return dx, dw.sum(0).to(weight.dtype)


class FusedNorm(Function):
    """`rms_norm_twin`, one pass over memory forward and one backward."""

    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        s, y = rms_norm_forward(x, weight, residual, eps)
        ctx.eps = eps
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.save_for_backward(x if residual is None else s, weight)
        return y if residual is None else (s, y)

    @staticmethod
    def backward(ctx, *gradients):
        s, weight = ctx.saved_tensors
        *ds, dy = (d.contiguous() for d in gradients)
        dx, dw = rms_norm_backward(s, weight, ds[0] if ds else None, dy, ctx.eps)
        return dx.to(ctx.dtypes[0]), dw, dx.to(ctx.dtypes[1]) if ds else None, None


# --- feed_forward --------------------------------------------------------------------------------
@triton.jit
def swiglu_kernel(gu_ptr, dh_ptr, dgu_ptr, h_ptr, width, BACK: tl.constexpr, HIDDEN: tl.constexpr,
                  BLOCK: tl.constexpr):
    """HIDDEN: write h = gate * s * up with s = sigmoid(gate). BACK: also write the gradients
    dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = row * 2 * width + col
    inside = col < width
    gate = tl.load(gu_ptr + offset, inside, 0).to(tl.float32)
    up = tl.load(gu_ptr + offset + width, inside, 0).to(tl.float32)
    s = tl.sigmoid(gate)
    if BACK:
        dh = tl.load(dh_ptr + row * width + col, inside, 0).to(tl.float32)
        tl.store(dgu_ptr + offset, dh * up * s * (1 + gate * (1 - s)), inside)
        tl.store(dgu_ptr + offset + width, dh * gate * s, inside)
    if HIDDEN:
        tl.store(h_ptr + row * width + col, gate * s * up, inside)


def _empty_swiglu(gate_up, dh, hidden):
    half = *gate_up.shape[:-1], gate_up.shape[-1] // 2
    dgate_up = gate_up.new_empty(0) if dh is None else torch.empty_like(gate_up)
    return dgate_up, gate_up.new_empty(half if hidden else 0)


@operator(_empty_swiglu)
def swiglu(gate_up: Tensor, dh: Tensor | None, hidden: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate_up (empty without dh, that of h) and h (empty unless hidden)."""
    dgate_up, h = _empty_swiglu(gate_up, dh, hidden)
    width = gate_up.shape[-1] // 2
    swiglu_kernel[(gate_up.numel() // (2 * width), triton.cdiv(width, 4096))](
        gate_up, dh, dgate_up, h, width, BACK=dh is not None, HIDDEN=hidden, BLOCK=4096,
        num_warps=8)
    return dgate_up, h


class FusedFeedForward(Function):
    """`feed_forward_twin` whose activation is computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x, gate_up, down):
        hidden = x @ gate_up.mT                                                   # (B, S, 2F)
        ctx.save_for_backward(x, gate_up, down, hidden)
        return swiglu(hidden, None, True)[1] @ down.mT                                # (B, S, D)

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, hidden = ctx.saved_tensors
        dhidden, h = swiglu(hidden, dy @ down, True)                        # (B, S, 2F), (B, S, F)
        dx = dhidden @ gate_up                                                    # (B, S, D)
        dhidden, h, dy, x = (a.flatten(0, -2) for a in (dhidden, h, dy, x))
        return dx, dhidden.mT @ x, dy.mT @ h


# --- queries_keys --------------------------------------------------------------------------------
@triton.jit
def head_tile(q_ptr, k_ptr, v_ptr, token, kv_row, first, H, Hk, HALF: tl.constexpr,
              GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Find GROUP heads of a token, from `first` on, among its H queries, Hk keys and Hk values.

    Returns whether each is a query, whether it is a value, and of its first half the offset in the
    packed tensor and the address in q, k or v; the second half follows HALF later.
    """
    head = first + tl.arange(0, GROUP)[:, None]
    col = tl.arange(0, BLOCK)[None]
    packed = (token * (H + 2 * Hk) + head) * 2 * HALF + col
    split = tl.where(head < H + Hk, k_ptr + ((kv_row * Hk + head - H) * 2 * HALF + col),
                     v_ptr + ((kv_row * Hk + head - H - Hk) * 2 * HALF + col))
    split = tl.where(head < H, q_ptr + ((token * H + head) * 2 * HALF + col), split)
    return head < H, head >= H + Hk, packed, split


@triton.jit
def queries_keys_kernel(x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
                        L, KEYS, FIRST, H, Hk, HEADS, eps: tl.constexpr, NORM: tl.constexpr,
                        ROTATE: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
                        BLOCK: tl.constexpr):
    """Take the first HEADS heads of one token in each program, so that its angles are read once.

    Token l of a sample has its key and its value in row FIRST + l of KEYS.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_row = token // L * KEYS + FIRST + token % L
    lane = tl.arange(0, GROUP)[:, None]
    # Angles and weights are loaded in the shape of a tile: a later broadcast would move them.
    col = tl.broadcast_to(tl.arange(0, BLOCK)[None], (GROUP, BLOCK))
    if ROTATE:
        cos = tl.load(cos_ptr + token % L * HALF + col, col < HALF, 0)
        sin = tl.load(sin_ptr + token % L * HALF + col, col < HALF, 0)
    for first in range(0, HEADS, GROUP):
        query, value, packed, split = head_tile(q_ptr, k_ptr, v_ptr, token, kv_row, first, H, Hk,
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
        if ROTATE:
            y, z = y * cos - z * sin, z * cos + y * sin
        tl.store(split, tl.where(value, a, y), inside)  # values stay as they are
        tl.store(split + HALF, tl.where(value, b, z), inside)


@triton.jit
def queries_keys_backward_kernel(x_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr,
                                 dx_ptr, dw_ptr, tokens, L, KEYS, FIRST, H, Hk,
                                 eps: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
                                 HALF: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the gradients back, take them through the norm, and write them packed.

    Programs loop over the tokens as in rms_norm_backward_kernel. dw_ptr: for each program two rows
    of partial sums, of the queries' norm and of the keys'.
    """
    lane = tl.arange(0, GROUP)[:, None]
    col = tl.broadcast_to(tl.arange(0, BLOCK)[None], (GROUP, BLOCK))
    zeros = tl.zeros((GROUP, BLOCK), tl.float32)
    q1, q2, k1, k2 = zeros, zeros, zeros, zeros  # dw of queries and keys, by halves
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        kv_row = token // L * KEYS + FIRST + token % L
        if ROTATE:
            cos = tl.load(cos_ptr + token % L * HALF + col, col < HALF, 0)
            sin = tl.load(sin_ptr + token % L * HALF + col, col < HALF, 0)
        for first in range(0, H + 2 * Hk, GROUP):
            query, value, packed, split = head_tile(dq_ptr, dk_ptr, dv_ptr, token, kv_row, first,
                                                    H, Hk, HALF, GROUP, BLOCK)
            inside = (first + lane < H + 2 * Hk) & (col < HALF)
            d1 = tl.load(split, inside, 0).to(tl.float32)
            d2 = tl.load(split + HALF, inside, 0).to(tl.float32)
            y, z = d1, d2
            if ROTATE:
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
            tl.store(dx_ptr + packed, tl.where(value, d1, y), inside)  # values stay as they are
            tl.store(dx_ptr + packed + HALF, tl.where(value, d2, z), inside)
    if NORM:
        dw = dw_ptr + tl.program_id(0) * 4 * HALF
        col = tl.arange(0, BLOCK)
        tl.store(dw + col, tl.sum(q1, 0), col < HALF)
        tl.store(dw + HALF + col, tl.sum(q2, 0), col < HALF)
        tl.store(dw + 2 * HALF + col, tl.sum(k1, 0), col < HALF)
        tl.store(dw + 3 * HALF + col, tl.sum(k2, 0), col < HALF)


def _empty_heads(qkv, context, cos, sin, q_weight, k_weight, context_weight, heads, eps):
    B, L, packed_heads, Dh = qkv.shape
    kv_heads = (packed_heads - heads) // 2
    keys = L if context is None else L + context.shape[1]
    k = qkv.new_empty(B, keys, kv_heads, Dh)
    v = qkv.new_empty(0) if context is None else torch.empty_like(k)
    return qkv.new_empty(B, L, heads, Dh), k, v


@operator(_empty_heads)
def queries_keys_forward(
        qkv: Tensor, context: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
        k_weight: Tensor | None, context_weight: Tensor | None, heads: int,
        eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v of `queries_keys_twin`; without a context v is empty: it stays in qkv."""
    q, k, v = _empty_heads(qkv, context, cos, sin, q_weight, k_weight, context_weight, heads, eps)
    B, keys, Hk, Dh = k.shape
    written = Hk if context is None else 2 * Hk  # heads of keys and values

    def launch(x, qw, kw, first, H, rotate):
        """Take the heads of x; its first token has its key in row `first`."""
        if x.numel():
            queries_keys_kernel[(B * x.shape[1],)](
                x, qw, kw, cos, sin, q, k, v, x.shape[1], keys, first, H, Hk, H + written, eps,
                NORM=qw is not None, ROTATE=rotate, HALF=Dh // 2, GROUP=8,
                BLOCK=triton.next_power_of_2(Dh // 2), num_warps=2)

    launch(qkv, q_weight, k_weight, first=0, H=heads, rotate=True)
    if context is not None:
        launch(context, context_weight, context_weight, first=qkv.shape[1], H=0, rotate=False)
    return q, k, v


def _empty_qkv_gradients(qkv, context, cos, sin, q_weight, *_):
    dcontext = qkv.new_empty(0) if context is None else torch.empty_like(context)
    rows = 0 if q_weight is None else 4
    return torch.empty_like(qkv), dcontext, qkv.new_zeros(rows, qkv.shape[3], dtype=torch.float32)


@operator(_empty_qkv_gradients)
def queries_keys_backward(
        qkv: Tensor, context: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
        k_weight: Tensor | None, context_weight: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
        eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, of the context (else empty), and of the norms' weights.

    The last has a row each for q, k, nothing, and the context's k; none if there are no norms.
    """
    dqkv, dcontext, dw = _empty_qkv_gradients(qkv, context, cos, sin, q_weight)
    _, keys, Hk, Dh = dk.shape

    def launch(x, dx, qw, kw, dw, first, H, rotate):
        if x.numel():
            B, L = x.shape[:2]
            programs = min(B * L, 16 * sm_count(x))
            sums = dw.new_empty(programs, 2, Dh)
            queries_keys_backward_kernel[(programs,)](
                x, qw, kw, cos, sin, dq, dk, dv, dx, sums, B * L, L, keys, first, H, Hk, eps,
                NORM=qw is not None, ROTATE=rotate, HALF=Dh // 2, GROUP=4,
                BLOCK=triton.next_power_of_2(Dh // 2), num_warps=1)
            if qw is not None:
                dw.copy_(sums.sum(0))

    launch(qkv, dqkv, q_weight, k_weight, dw[:2], first=0, H=dq.shape[2], rotate=True)
    if context is not None:
        launch(context, dcontext, context_weight, context_weight, dw[2:], first=dq.shape[1], H=0,
               rotate=False)
    return dqkv, dcontext, dw


class FusedQueriesKeys(Function):
    """`queries_keys_twin`, read in place from the packed projection."""

    @staticmethod
    def forward(ctx, heads, eps, *inputs):
        inputs = [x if x is None else x.contiguous() for x in inputs]
        ctx.save_for_backward(*inputs)
        ctx.eps = eps
        q, k, v = queries_keys_forward(*inputs, heads, eps)
        return q, k, inputs[0][:, :, heads + k.shape[2]:] if inputs[1] is None else v

    @staticmethod
    def backward(ctx, *gradients):
        inputs = ctx.saved_tensors
        dqkv, dcontext, dw = queries_keys_backward(
            *inputs, *(d.contiguous() for d in gradients), ctx.eps)
        dweights = [None if weight is None else dw[row].to(weight.dtype)
                    for row, weight in zip((0, 1, 3), inputs[4:])]
        dcontext = None if inputs[1] is None else dcontext
        return None, None, dqkv, dcontext, None, None, *dweights


# --- mix_states and mix_project ------------------------------------------------------------------
@triton.jit
def mix_kernel(states_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, M, D, i_token, i_k, w_token,
               w_k, K: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Mix BLOCK columns of a token's K states. i_* and w_*: strides of index and weight."""
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
    """A weight's gradient is the dot product of its state with the mixture's gradient."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    d = tl.load(d_ptr + token * D + col, col < D, 0).to(tl.float32)
    for k in tl.static_range(K):
        layer = tl.load(index_ptr + token * i_token + k * i_k)
        state = tl.load(states_ptr + (token * M + layer) * D + col, col < D, 0)
        tl.store(dw_ptr + token * K + k, tl.sum(d * state.to(tl.float32), 0))


@operator(lambda states, *_: states.new_empty(states.shape[:2] + states.shape[3:]))
def mix_forward(states: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `mix_states_twin` of contiguous states."""
    B, S, M, D = states.shape
    mixture = states.new_empty(B, S, D)
    index, weight = index.flatten(0, 1), weight.flatten(0, 1)
    block = min(2048, triton.next_power_of_2(D))
    mix_kernel[(B * S, triton.cdiv(D, block))](
        states, index, weight, bias, mixture, M, D, *index.stride(), *weight.stride(),
        K=index.shape[1], BIAS=bias is not None, BLOCK=block, num_warps=8)
    return mixture


@operator(lambda states, index, d: states.new_empty(index.shape, dtype=torch.float32))
def mix_backward(states: Tensor, index: Tensor, d: Tensor) -> Tensor:
    """Return the gradient (B, S, K) of the weights in fp32. d: of the mixture, (B, S, D)."""
    B, S, M, D = states.shape
    dw = states.new_empty(index.shape, dtype=torch.float32)
    index = index.flatten(0, 1)
    mix_backward_kernel[(B * S,)](states, index, d, dw, M, D, *index.stride(), K=index.shape[1],
                                  BLOCK=triton.next_power_of_2(D), num_warps=4)
    return dw


class FusedMixProject(Function):
    """`mix_project_twin` whose mixture is computed again in the backward pass, not kept.

    Gradients reach the weights and Proj, never the states: the understanding tower is frozen.
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


# --- channel_norm --------------------------------------------------------------------------------
@triton.jit
def channel_norm_kernel(x_ptr, g_ptr, y_ptr, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Take ROWS pixels in each program; the channels of a pixel are neighbours in memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None]
    inside = (row < rows) & (col < C)
    offset = row * C + col
    x = tl.load(x_ptr + offset, inside, 0).to(tl.float32)
    square = tl.maximum(tl.sum(x * x, 1, keep_dims=True), 1e-24)  # as in F.normalize
    y = x * tl.rsqrt(square / C) * tl.load(g_ptr + col, col < C, 0).to(tl.float32)
    tl.store(y_ptr + offset, y * tl.sigmoid(y), inside)


@operator(lambda x, gamma: torch.empty_like(x))
def channel_norm_forward(x: Tensor, gamma: Tensor) -> Tensor:
    """Compute `channel_norm_twin` of a tensor with channels last in memory."""
    rows, C, tiles, options = tiling(x.movedim(1, 3))
    y = torch.empty_like(x)
    channel_norm_kernel[(tiles,)](x, gamma.contiguous(), y, rows, C, **options)
    return y
