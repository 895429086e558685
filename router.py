"""The router R: which understanding states each context token hands to each generation block.

`Router` predicts the logits W of MoS sec. 3.2, `routing_weights` normalises them (eq. 3) and
`select` picks the top-k states with epsilon-greedy exploration; `kernels.mix_project` and
`kernels.mix_states` sum them (eq. 4).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import RMSNorm, SwiGLU, at_least_fp32, attention, keys_behind, queries_keys, rope_table

INPUTS = ("prompt", "latent", "time")


def routing_weights(logits):
    """Softmax over the understanding layers in fp32. MoS eq. (3). (B, S, M, N) to the same."""
    return at_least_fp32(logits).softmax(2)                                          # MoS eq. (3)


def select(weights, k, epsilon=0.0, uniform=None, renormalize=False):
    """The k chosen layers of every (sample, token, block) and their weights. MoS sec. 3.2, eq. (4).

    weights: (B, S, M, N). uniform: (B, S, M + 1, N) in [0, 1), needed where epsilon > 0: its first
    row decides whether to explore, the others rank the layers at random. Whatever the choice, the
    weights are those of eq. (3), so that their sum stays below 1 unless `renormalize`.
    Returns index and weight, both (B, S, K, N). Raises ValueError where k exceeds M.
    """
    if not 1 <= k <= weights.shape[2]:
        raise ValueError(f"k={k} states cannot be chosen from M={weights.shape[2]} layers; "
                         f"expected 1 <= k <= {weights.shape[2]}")
    score = weights.detach()
    if epsilon > 0:  # NOTE (ours): decided for each sample, token and block on its own
        score = torch.where(uniform[:, :, :1] < epsilon, uniform[:, :, 1:], score)
    index = score.topk(k, 2).indices                                        # (B, S, K, N)
    chosen = weights.gather(2, index)                                       # (B, S, K, N)
    return index, chosen / chosen.sum(2, keepdim=True) if renormalize else chosen


def time_embedding(t, width=256):
    """Sinusoids of t in [0, 1], cosines first, period up to 1e4 at t*1000 (DDPM): (B, width)."""
    rate = 1e4 ** (-torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * rate                                # (B, width/2)
    return torch.cat((angle.cos(), angle.sin()), -1)                        # (B, width)


class RouterBlock(nn.Module):
    """Pre-norm bidirectional attention with QK-norm, SwiGLU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_width), RMSNorm(self.head_width)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, 2 * width)

    def forward(self, x, rope, mask=None, runs=None):
        """x: (B, L, Dr), mask and runs: as in `kernels.attention`. Returns x's successor."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, L, 3*H, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, None)
        q, k, v = queries_keys(qkv, rope, self.heads, norms)                # (B, L, H, Dh) each
        a = attention(q, k, v, mask, runs)                                  # (B, L, Dr)
        x, y = self.norm2(self.out(a), x)                                   # (B, L, Dr) each
        return x + self.ffn(y)


class Router(nn.Module):
    """A two-block transformer over [time; latent; context] that reads W off the context tokens.

    context_width: Du, latent_width: Dg, width: Dr, layers: M, blocks: N.
    inputs: which of prompt, latent and time it sees (the paper's Table 1).
    tokenwise: False lets one learned [CLS] token decide for all tokens (Table 2).
    """

    def __init__(self, context_width, latent_width, width, heads, layers, blocks, axes, depth=2,
                 inputs=INPUTS, tokenwise=True):
        super().__init__()
        unknown = set(inputs) - set(INPUTS)
        if unknown or "prompt" not in inputs:
            raise ValueError(f"router_inputs must hold prompt and come from {', '.join(INPUTS)}, "
                             f"got {' '.join(inputs)}")
        if width % heads:
            raise ValueError(f"the router's width {width} must be a multiple of its {heads} heads")
        if width // heads != sum(axes):
            raise ValueError(f"the router's heads are {width // heads} wide, their rotary axes "
                             f"{sum(axes)} in all; expected the same")
        self.layers, self.inputs, self.axes = layers, tuple(inputs), axes
        # MoS App. A: each modality has its own projection and its own norm.
        self.context = nn.Linear(context_width, width)
        self.context_norm = RMSNorm(width)
        if "latent" in inputs:
            self.latent, self.latent_norm = nn.Linear(latent_width, width), RMSNorm(width)
        if "time" in inputs:
            self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
            self.time_norm = RMSNorm(width)
        self.cls = None if tokenwise else nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(RouterBlock(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.logits = nn.Linear(width, layers * blocks)
        initialise(self)

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values."""
        # NOTE (ours): also the logit layer's are random. Zeros would break every tie the same way.
        init_parameter(name, p, len(self.blocks))
        if name == "cls":
            p.normal_(0, 0.02)

    def forward(self, context, mask, latent, places, t, runs=None):
        """Logits W in fp32: (B, S, M, N).

        context: U's input embeddings (B, S, Du), mask: (B, S) True at real tokens,
        latent: G's patchified tokens (B, T, Dg), places: their positions (T, 3), t: (B,).
        runs: instead of the mask, as in `kernels.attention`, pairs (samples, real tokens).
        """
        B, S, _ = context.shape
        c = self.context_norm(self.context(context))                        # (B, S, Dr)
        # NOTE (ours): input embeddings carry no order, so context token s stands at (2 + s, 0, 0),
        # behind the picture (0, y, x) and a reference picture (1, y, x).
        order = F.pad(torch.arange(2, 2 + S, device=c.device)[:, None], (0, 2))  # (S, 3)
        tokens, spots = [], []
        if "latent" in self.inputs:
            tokens.append(self.latent_norm(self.latent(latent)))            # (B, T, Dr)
            spots.append(places)
        extra = []
        if "time" in self.inputs:
            wave = time_embedding(t).type_as(latent)                        # (B, 256)
            extra.append(self.time_norm(self.time(wave))[:, None])          # (B, 1, Dr)
        if self.cls is not None:
            extra.append(self.cls.expand(B, 1, -1).type_as(c))              # (B, 1, Dr)
        E = len(extra)
        x = torch.cat([*extra, *tokens, c], 1)                              # (B, L, Dr)
        spots = torch.cat([*spots, order])                                  # (T+S, 3), or (S, 3)
        rope = rope_table(F.pad(spots, (0, 0, E, 0)), self.axes)            # the extras do not turn
        keys = keys_behind(x.shape[1] - S, mask, runs)
        for block in self.blocks:
            x = block(x, rope, *keys)                                       # (B, L, Dr)
        readout = x[:, -S:] if self.cls is None else x[:, E - 1:E].expand(-1, S, -1)
        head = self.logits
        with torch.autocast(x.device.type, enabled=False):
            w = F.linear(at_least_fp32(self.norm(readout)), at_least_fp32(head.weight), at_least_fp32(head.bias))
        return w.unflatten(-1, (self.layers, -1))                           # (B, S, M, N)
