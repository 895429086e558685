"""The operations that both towers and the router are made of, in plain PyTorch.

These are the places where a transformer spends its memory traffic. Each is one function of plain
tensors, so that a fused kernel can take its place and be tested against it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 (Zhang & Sennrich).

    x: (..., D) of any float type, weight: (D,). Returns x's shape and type.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).type_as(x)


def rope_table(positions, axes, theta=1e4):
    """Angles of an axial rotary embedding (Su et al.): each axis rotates its share of a head.

    positions: (L, A), axes: A even channel counts that sum to the head width.
    Returns cos and sin, each (L, Dh/2) in fp32.
    """
    angles = []
    for axis, channels in enumerate(axes):
        index = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32)
        angles.append(positions[:, axis, None].float() * theta ** (-index / channels))
    angles = torch.cat(angles, -1)                                                # (L, Dh/2)
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate the channel pairs (i, i + Dh/2) of x: (B, H, L, Dh) by the table's angles, in fp32."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)                                            # (B, H, L, Dh/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)       # (B, H, L, Dh)


def mix_states(states, index, weight):
    """The weighted sum of each token's chosen states. MoS eq. (4), for one generation block.

    states: (B, S, M, D), index and weight: (B, S, K). Returns (B, S, D) in the states' type.
    """
    rows = index[..., None].expand(-1, -1, -1, states.shape[-1])                  # (B, S, K, D)
    chosen = states.gather(2, rows)                                               # (B, S, K, D)
    return (chosen.float() * weight[..., None].float()).sum(2).type_as(states)    # (B, S, D)


class RMSNorm(nn.Module):
    """`rms_norm` with its learned weight, over the last axis of width D."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate(x)) * up(x)) (Shazeer), without biases."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
