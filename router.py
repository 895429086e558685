"""The router R: which understanding states each context token hands to each generation block.

`Router` predicts the logits W of MoS sec. 3.2, `routing_weights` normalises them (eq. 3) and
`select` picks the top-k states with epsilon-greedy exploration; `kernels.mix_project` and
`kernels.mix_states` sum them (eq. 4).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_parameter, initialise
from kernels import RMSNorm, SwiGLU, at_least_fp32, attention, pad_keys, queries_keys, rope_table

INPUTS = ("prompt", "latent", "time")


def routing_weights(logits):
    """Return the softmax over the understanding layers in fp32: (B, S, M, N). MoS eq. (3)."""
    return at_least_fp32(logits).softmax(2)                                 # (B, S, M, N) eq. (3)


def select(weights, k, epsilon=0.0, explore=None, renormalize=False):
    """Choose the k layers with the largest weights for every token and block. MoS sec. 3.2.

    weights: (B, S, M, N). With probability epsilon the k layers are random instead: the first row
    of explore, (B, S, M + 1, N) in [0, 1), decides whether, and the others rank the layers.
    Whatever the choice, the weights are those of eq. (3), so that for k < M their sum is below 1
    unless `renormalize`. Returns index and weight, both (B, S, K, N). Raises ValueError where k
    exceeds M.
    """
    if not 1 <= k <= weights.shape[2]:
        raise ValueError(f"k={k} states cannot be chosen from M={weights.shape[2]} layers; "
                         f"expected 1 <= k <= {weights.shape[2]}")
    score = weights.detach()
    if epsilon > 0:  # NOTE (ours): decided for each sample, token and block on its own
        score = torch.where(explore[:, :, :1] < epsilon, explore[:, :, 1:], score)
    index = score.topk(k, 2).indices                                        # (B, S, K, N)
    chosen = weights.gather(2, index)                                       # (B, S, K, N)
    return index, chosen / chosen.sum(2, keepdim=True) if renormalize else chosen


def time_embedding(t, width=256):
    """Return sinusoids (B, width) of t in [0, 1], cosines first, as in DDPM for 1000 t."""
    rate = 1e4 ** (-torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * rate                                # (B, width/2)
    return torch.cat((angle.cos(), angle.sin()), -1)                        # (B, width)


class RouterBlock(nn.Module):
    """Pre-norm bidirectional attention with QK-norm, then SwiGLU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(self.head_width)
        self.k_norm = RMSNorm(self.head_width)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, 2 * width)

    def forward(self, x, rope, keys=None):
        """Return the next residual stream (B, L, Dr) from x (B, L, Dr); keys: `kernels.Keys`."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))  # (B, L, 3*H, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, None)
        q, k, v = queries_keys(qkv, rope, self.heads, norms)                # (B, L, H, Dh) each
        a = attention(q, k, v, keys)                                        # (B, L, Dr)
        x, y = self.norm2.add(x, self.out(a))                               # (B, L, Dr) each
        return x + self.ffn(y)                                              # (B, L, Dr)


class Router(nn.Module):
    """A small transformer over [time; latent; context] that reads W off the context tokens.

    context_width: Du, latent_width: Dg, width: Dr, layers: M, blocks: N, axes: of the rotary
    embedding. inputs: which of prompt, latent and time it sees (the paper's Table 1).
    tokenwise: False lets one learned [CLS] token decide for all tokens (Table 2).
    """

    def __init__(self, context_width, latent_width, width, heads, layers, blocks, axes, depth=2,
                 inputs=INPUTS, tokenwise=True):
        super().__init__()
        if width % heads:
            raise ValueError(f"the router's width {width} must be a multiple of its {heads} heads")
        if width // heads != sum(axes):
            raise ValueError(f"the router's heads are {width // heads} wide, their rotary axes "
                             f"{sum(axes)} in all; expected the same")
        self.layers = layers
        self.inputs = tuple(inputs)
        self.axes = axes
        # MoS App. A: each modality has its own projection and its own norm.
        self.context = nn.Linear(context_width, width)
        self.context_norm = RMSNorm(width)
        if "latent" in inputs:
            self.latent = nn.Linear(latent_width, width)
            self.latent_norm = RMSNorm(width)
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
        # NOTE (ours): the logit layer's are random, too. Zeros would break all ties the same way.
        init_parameter(name, p, len(self.blocks))
        if name == "cls":
            p.normal_(0, 0.02)

    def forward(self, context, keys, latent, positions, t):
        """Return the logits W in fp32: (B, S, M, N).

        context: U's input embeddings (B, S, Du), keys: `kernels.Keys` of these S tokens,
        latent: G's patchified tokens (B, T, Dg) at positions (T, 3), t: (B,).
        """
        B, S, _ = context.shape
        context = context.type_as(self.context.weight)  # a tower may be bf16 on a CPU, too
        c = self.context_norm(self.context(context))                        # (B, S, Dr)
        # NOTE (ours): input embeddings carry no order, so context token s stands at (2 + s, 0, 0),
        # behind the picture (0, y, x) and a reference picture (1, y, x).
        order = torch.arange(2, 2 + S, device=c.device)                     # (S,)
        order = F.pad(order[:, None], (0, 2))                               # (S, 3)
        tokens, places = [], []
        if "latent" in self.inputs:
            tokens.append(self.latent_norm(self.latent(latent)))            # (B, T, Dr)
            places.append(positions)                                        # (T, 3)
        extra = []  # tokens at position 0, which the rotary embedding leaves alone
        if "time" in self.inputs:
            wave = time_embedding(t).type_as(latent)                        # (B, 256)
            extra.append(self.time_norm(self.time(wave))[:, None])          # (B, 1, Dr)
        if self.cls is not None:
            extra.append(self.cls.expand(B, 1, -1).type_as(c))              # (B, 1, Dr)
        E = len(extra)
        x = torch.cat([*extra, *tokens, c], 1)                              # (B, L, Dr)
        positions = torch.cat([*places, order])                             # (T+S, 3), or (S, 3)
        positions = F.pad(positions, (0, 0, E, 0))                          # (L, 3)
        rope = rope_table(positions, self.axes)
        keys = pad_keys(x.shape[1] - S, keys)
        for block in self.blocks:
            x = block(x, rope, keys)                                        # (B, L, Dr)
        x = x[:, -S:] if self.cls is None else x[:, E - 1:E].expand(-1, S, -1)  # (B, S, Dr)
        x = at_least_fp32(self.norm(x))                                     # (B, S, Dr)
        head = self.logits
        with torch.autocast(x.device.type, enabled=False):
            w = F.linear(x, at_least_fp32(head.weight), at_least_fp32(head.bias))  # (B, S, M*N)
        return w.unflatten(-1, (self.layers, -1))                           # (B, S, M, N)

    def flops(self, S, T):
        """Return the forward FLOP of one sample, counted as in `Generation.flops`."""
        block = self.blocks[0]
        L = S + T * ("latent" in self.inputs) + ("time" in self.inputs) + (self.cls is not None)
        products = S * self.context.weight.numel() + S * self.logits.weight.numel()
        if "latent" in self.inputs:
            products += T * self.latent.weight.numel()
        if "time" in self.inputs:
            products += self.time[0].weight.numel() + self.time[2].weight.numel()
        weights = (block.qkv.weight, block.out.weight, *block.ffn.parameters())
        pairs = 2 * L * L * self.norm.weight.numel()
        return 2 * (products + len(self.blocks) * (L * sum(w.numel() for w in weights) + pairs))
