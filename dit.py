"""The generation tower G: a diffusion transformer over latent patches.

The timestep does not enter here (MoS App. A): it reaches the tower through the router alone.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import init_parameter, initialise
from kernels import RMSNorm, SwiGLU, attention, queries_keys, rope_table


def rope_axes(head_width):
    """Return the channels of a head for the axes (image index, y, x): 1/8, 7/16, 7/16, all even."""
    if head_width % 32:  # NOTE (ours): the shares of the axes
        raise ValueError(f"heads are {head_width} wide in generation tower or router; expected a "
                         "multiple of 32, to be cut into even axes of 1/8, 7/16 and 7/16")
    return head_width // 8, head_width // 16 * 7, head_width // 16 * 7


class Block(nn.Module):
    """Pre-norm joint attention over [registers; visual tokens; context], then SwiGLU.

    Both modalities share the projections; the norms are per modality (MoS App. A). The context's
    output is thrown away, because the next block gets its own mixture: a context token therefore
    needs a norm, a key and a value, and neither query nor feed-forward network.
    """

    recompute = False  # activation checkpointing (MoS App. A): keep only the block's inputs

    def __init__(self, width, heads, kv_heads, hidden):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.norm1 = RMSNorm(width)
        self.norm_context = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.q_norm = RMSNorm(self.head_width)
        self.k_norm = RMSNorm(self.head_width)
        self.k_norm_context = RMSNorm(self.head_width)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn = SwiGLU(width, hidden)

    def forward(self, x, context, rope, keys=None):
        """Return the next residual stream (B, R+T, Dg) from x (B, R+T, Dg).

        context: (B, S, Dg), rope: `rope_table` of the R+T tokens, keys: `kernels.Keys` of R+T+S.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, rope, keys, use_reentrant=False,
                              preserve_rng_state=False)
        return self._forward(x, context, rope, keys)

    def _forward(self, x, context, rope, keys):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_width))     # (B, R+T, H+2Hk, Dh)
        kv_rows = self.qkv.weight[self.heads * self.head_width:]               # (2*Hk*Dh, Dg)
        kv = F.linear(self.norm_context(context), kv_rows)                     # (B, S, 2*Hk*Dh)
        kv = kv.unflatten(-1, (-1, self.head_width))                           # (B, S, 2*Hk, Dh)
        norms = (self.q_norm.weight, self.k_norm.weight, self.k_norm_context.weight)
        q, k, v = queries_keys(qkv, rope, self.heads, norms, kv)  # k and v: (B, R+T+S, Hk, Dh)
        a = attention(q, k, v, keys)                                           # (B, R+T, Dg)
        x, y = self.norm2.add(x, self.out(a))                                  # (B, R+T, Dg) each
        return x + self.ffn(y)                                                 # (B, R+T, Dg)


class Generation(nn.Module):
    """The tower G of MoS sec. 3.1: patchify, N blocks, unpatchify.

    channels: C, patch: side of a visual token in latent pixels, context_width: Du.
    """

    def __init__(self, channels, context_width, width, depth, heads, kv_heads, hidden, patch=1,
                 registers=4):
        super().__init__()
        if width % heads or heads % kv_heads:
            raise ValueError(f"the generation tower's width {width} must be a multiple of its "
                             f"{heads} heads, and those of its {kv_heads} key-value heads")
        self.patch = patch
        self.axes = rope_axes(width // heads)
        self.embed = nn.Linear(channels * patch * patch, width, bias=False)
        # MoS eq. (4): Proj. NOTE (ours): one for all blocks.
        self.proj = nn.Linear(context_width, width)
        self.registers = nn.Parameter(torch.empty(registers, width))
        self.reference = nn.Parameter(torch.empty(width))  # added to a reference picture's tokens
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, channels * patch * patch, bias=False)
        initialise(self)

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values. NOTE (ours)."""
        if name == "head.weight":
            p.zero_()
        elif name == "proj.bias":
            # Not 0: with k = 1 the block's norm would remove the scale of an unbiased mixture, and
            # with it the router's gradient.
            p.normal_(0, 0.02)
        else:
            init_parameter(name, p, len(self.blocks))

    def patchify(self, z, reference=None):
        """Return tokens (B, T, Dg) and positions (image index, y, x): (T, 3). MoS Fig. 4.

        z: latents (B, C, h, w), reference: clean latents of a reference picture, whose tokens
        follow those of z.
        """
        x, positions = self.tokens(z, 0)                                    # (B, T', Dg), (T', 3)
        if reference is None:
            return x, positions
        y, positions_y = self.tokens(reference, 1)                          # (B, T', Dg), (T', 3)
        y = y + self.reference.type_as(y)                                   # (B, T', Dg)
        return torch.cat((x, y), 1), torch.cat((positions, positions_y))       # (B, T, Dg), (T, 3)

    def tokens(self, z, image):
        """Return the T' tokens and positions of one picture's latents, with this image index."""
        patches = F.pixel_unshuffle(z, self.patch)                            # (B, C*p*p, h/p, w/p)
        rows, columns = (torch.arange(n, device=z.device) for n in patches.shape[2:])
        image = torch.full_like(rows[:1], image)
        positions = torch.cartesian_prod(image, rows, columns)                 # (T', 3)
        return self.embed(patches.flatten(2).mT), positions                 # (B, T', Dg), (T', 3)

    def add_registers(self, x, positions):
        """Put the R registers before the visual tokens. MoS App. A. Returns x and a rope table."""
        R = len(self.registers)
        registers = self.registers.type_as(x).expand(x.shape[0], -1, -1)       # (B, R, Dg)
        x = torch.cat((registers, x), 1)                                       # (B, R+T, Dg)
        positions = F.pad(positions, (0, 0, R, 0))  # position 0 does not rotate
        return x, rope_table(positions, self.axes)

    def unpatchify(self, x, height, width):
        """Drop registers and reference, read the velocity off: x (B, R+T, Dg) to (B, C, h, w).

        height, width: h and w.
        """
        first = len(self.registers)
        grid = height // self.patch, width // self.patch
        x = x[:, first:first + grid[0] * grid[1]]                              # (B, T', Dg)
        v = self.head(self.norm(x)).mT.unflatten(2, grid)                     # (B, C*p*p, h/p, w/p)
        return F.pixel_shuffle(v, self.patch)                                  # (B, C, h, w)

    def flops(self, S, T, target):
        """Return the forward FLOP of one sample: matrix products and attention.

        S: context tokens, T: visual tokens, target: those of them whose velocity is read off. A
        product costs 2 FLOP for each token and weight, attention 4 for each pair and channel.
        """
        block = self.blocks[0]
        L = T + len(self.registers)
        Dg = self.embed.out_features
        kv = block.qkv.out_features - Dg  # channels of keys and values together
        weights = (block.qkv.weight, block.out.weight, *block.ffn.parameters())
        tokens = L * sum(w.numel() for w in weights)
        context = S * (self.proj.weight.numel() + kv * Dg)
        pairs = 2 * L * (L + S) * Dg
        ends = T * self.embed.weight.numel() + target * self.head.weight.numel()
        return 2 * (len(self.blocks) * (tokens + context + pairs) + ends)
