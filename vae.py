"""The image path of the Wan 2.2 VAE: 16x compression, written as a 2-D network.

The original is a causal video network. One image is a video of one frame: every causal 3x3x3
convolution then sees two zero frames before it, so only its last temporal slice matters, and what
remains is a 2-D network. Module names follow diffusers' `AutoencoderKLWan`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import initialise
from kernels import at_least_fp32, channel_norm

TILE = 64  # side of a tile in latent pixels
WHOLE = 72 * 72  # latent pixels that are not cut into tiles: 1024x1024, and its bucket


class ChannelNorm(nn.Module):
    """RMS norm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return F.normalize(at_least_fp32(x), dim=1).type_as(x) * (self.gamma * self.gamma.shape[0] ** 0.5)


class NormSiLU(ChannelNorm):
    """The same norm with SiLU behind it: one pass over the memory at sampling."""

    def forward(self, x):
        return channel_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, beside a shortcut: (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = NormSiLU(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(self.norm1(x))                                     # (B, C', H, W)
        return self.conv2(self.norm2(h)) + self.conv_shortcut(x)


class Attention(nn.Module):
    """One head over all positions of the picture."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        qkv = self.to_qkv(self.norm(x)).flatten(2).mT[:, None]            # (B, 1, H*W, 3*C)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, -1))           # (B, 1, H*W, C)
        return x + self.proj(out[:, 0].mT.unflatten(2, x.shape[2:]))      # (B, C, H, W)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DoublingConv(nn.Conv2d):
    """A 3x3 convolution of x with every pixel repeated 2x2, in 2.25 times fewer products.

    The copies of a pixel meet neighbouring taps of the kernel, so the pixel meets their sum: a
    transposed convolution of kernel 4 and stride 2.
    """

    def forward(self, x):
        k = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))   # (C, C, 5, 5)
        k = k[:, :, 1:] + k[:, :, :-1]                                    # (C, C, 4, 5)
        k = k[..., 1:] + k[..., :-1]                                      # (C, C, 4, 4)
        return F.conv_transpose2d(x, k, self.bias, 2, 1)                  # (B, C, 2H, 2W)


class Resample(nn.Module):
    """Halve (stride-2 convolution) or double (nearest, then convolution) height and width."""

    def __init__(self, channels, up):
        super().__init__()
        first = nn.Identity() if up else nn.ZeroPad2d((0, 1, 0, 1))
        conv = DoublingConv(channels, channels, 3) if up else nn.Conv2d(channels, channels, 3, 2)
        self.resample = nn.Sequential(first, conv)

    def forward(self, x):
        return self.resample(x)


def average_down(x, cout, space, time):
    """Parameter-free shortcut: fold space (and time) into channels, then average to `cout`.

    The one frame is the last of its temporal group, the others are zero.
    """
    x = F.pixel_unshuffle(x, space)[:, :, None]                           # (B, C*s*s, 1, h, w)
    x = x.unflatten(1, (-1, space * space)).movedim(3, 2)                 # (B, C, 1, s*s, h, w)
    x = F.pad(x, (0, 0, 0, 0, 0, 0, time - 1, 0)).flatten(1, 3)           # (B, C*t*s*s, h, w)
    return x.unflatten(1, (cout, -1)).mean(2)                             # (B, C', h, w)


def duplicate_up(x, cout, space, time):
    """Parameter-free shortcut: repeat channels, unfold them into space, keep the last frame."""
    x = x.repeat_interleave(cout * space * space * time // x.shape[1], 1)  # (B, C'*t*s*s, h, w)
    x = x.unflatten(1, (cout, time, space * space))[:, :, -1]             # (B, C', s*s, h, w)
    return F.pixel_shuffle(x.flatten(1, 2), space)                        # (B, C', h*s, w*s)


class DownBlock(nn.Module):
    """An encoder stage: residual blocks, halving, and a parameter-free shortcut around both."""

    def __init__(self, cin, cout, blocks, down, time):
        super().__init__()
        self.shortcut = dict(cout=cout, space=2 if down else 1, time=2 if time else 1)
        self.resnets = nn.ModuleList(ResidualBlock(cin if i == 0 else cout, cout)
                                     for i in range(blocks))
        self.downsampler = Resample(cout, up=False) if down else nn.Identity()

    def forward(self, x):
        h = x
        for block in self.resnets:
            h = block(h)                                                  # (B, C', H, W)
        return self.downsampler(h) + average_down(x, **self.shortcut)     # (B, C', H/s, W/s)


class UpBlock(nn.Module):
    """A decoder stage: residual blocks, doubling, and a parameter-free shortcut around both."""

    def __init__(self, cin, cout, blocks, up, time):
        super().__init__()
        self.shortcut = dict(cout=cout, space=2, time=2 if time else 1)
        self.resnets = nn.ModuleList(ResidualBlock(cin if i == 0 else cout, cout)
                                     for i in range(blocks))
        self.upsampler = Resample(cout, up=True) if up else None

    def forward(self, x):
        h = x
        for block in self.resnets:
            h = block(h)                                                  # (B, C', H, W)
        if self.upsampler is None:
            return h
        return self.upsampler(h) + duplicate_up(x, **self.shortcut)       # (B, C', 2H, 2W)


def spans(length, margin):
    """Of each tile along a side: from where to where it is read, and what of that is kept."""
    for start in range(0, length, TILE):
        begin = max(0, start - margin)
        yield (begin, start + TILE + margin), (start - begin, start - begin + TILE)


def crop(x, rows, columns, cell):
    """A part of x (B, C, H, W) between rows and columns of cells, which are so many pixels wide."""
    (top, bottom), (left, right) = rows, columns
    return x[:, :, cell * top:cell * bottom, cell * left:cell * right]


def by_tiles(network, x, cell, out_cell, margin):
    """network(x) for less memory: a large picture goes through it in tiles, and no seam shows.

    cell, out_cell: side of a latent pixel in x and in the result. Each tile is read with `margin`
    latent pixels around it, beyond which the network sees nothing: the values are the same.
    """
    h, w = (n // cell for n in x.shape[2:])
    if h * w <= WHOLE:
        return network(x)
    rows = []
    for rows_read, rows_kept in spans(h, margin):
        row = []
        for columns_read, columns_kept in spans(w, margin):
            y = network(crop(x, rows_read, columns_read, cell))
            row.append(crop(y, rows_kept, columns_kept, out_cell))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)                                             # (B, C', H', W')


class Encoder(nn.Module):
    """Patches (B, 12, H/2, W/2) to moments (B, channels, H/16, W/16)."""

    def __init__(self, width, multipliers, temporal, blocks, channels):
        super().__init__()
        widths = [width] + [width * m for m in multipliers]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(12, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[i], widths[i + 1], blocks, i < last, i < last and temporal[i])
            for i in range(last + 1))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.cell = 2 ** last
        # Each stage has 2 convolutions a block, and sees half as far as the one that is coarser.
        self.margin = 4 * blocks + 1

    def forward(self, x):
        x = by_tiles(self.local, x, self.cell, 1, self.margin)            # (B, C', h, w)
        return self.conv_out(self.norm_out(self.mid_block(x)))            # (B, 2*C, h, w)

    def local(self, x):
        """What comes before the attention over the whole picture: convolutions."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return x


class Decoder(nn.Module):
    """Latents (B, C, h, w) to patches (B, 12, 8h, 8w)."""

    def __init__(self, width, multipliers, temporal, blocks, channels):
        super().__init__()
        widths = [width * m for m in (multipliers[-1], *reversed(multipliers))]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[i], widths[i + 1], blocks + 1, i < last, i < last and temporal[-1 - i])
            for i in range(last + 1))
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 12, 3, padding=1)
        self.cell, self.margin = 2 ** last, 4 * (blocks + 1) + 1          # as in the encoder

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                               # (B, C', h, w)
        return by_tiles(self.local, x, 1, self.cell, self.margin)         # (B, 12, 8*h, 8*w)

    def local(self, x):
        """What comes after the attention over the whole picture: convolutions."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.norm_out(x))


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/16, W/16) and back.

    width, decoder_width: channels of the first encoder and the last decoder stage, multipliers: of
    the width, for each stage; temporal: which stages also halve time in the video model; blocks:
    residual blocks of a stage (the decoder has one more).
    The defaults are those of Wan 2.2 TI2V-5B.
    """

    def __init__(self, latent_channels=48, width=160, decoder_width=256, multipliers=(1, 2, 4, 4),
                 temporal=(False, True, True), blocks=2):
        super().__init__()
        self.factor = 2 ** len(multipliers)
        self.encoder = Encoder(width, multipliers, temporal, blocks, 2 * latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(decoder_width, multipliers, temporal, blocks, latent_channels)
        self.register_buffer("latents_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latents_std", torch.ones(latent_channels, 1, 1))
        initialise(self)

    def init_parameter(self, name, p):
        """Give the parameter of this name its first values: PyTorch's own, but biases 0."""
        if p.ndim < 2 or "gamma" in name:
            p.fill_(1.0 if "gamma" in name else 0.0)
        else:
            bound = p[0].numel() ** -0.5
            p.uniform_(-bound, bound)

    def _apply(self, function, recurse=True):
        """What `to`, `bfloat16` and others call: the latents' statistics stay in fp32 at least."""
        before = dict(self.named_buffers())
        super()._apply(function, recurse)
        for name, values in before.items():
            after = getattr(self, name)
            if at_least_fp32(after) is not after:
                setattr(self, name, values.to(after.device))
        return self

    def admit(self, x):
        """x in the type of the networks, a pixel's channels side by side in memory.

        In that order convolutions are fastest, and norms read what they need in one piece.
        """
        return x.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)

    def posterior(self, x):
        """Mean and log-variance of the latent, unnormalised: (B, C, H/16, W/16) each.

        Raises ValueError where a side is no multiple of 16.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"pictures must be a multiple of {self.factor} pixels on each side, "
                             f"got {x.shape[-2]}x{x.shape[-1]}")
        # Wan's patches put the column offset before the row offset: transpose around the unshuffle.
        x = self.admit(F.pixel_unshuffle(x.mT, 2).mT)                     # (B, 12, H/2, W/2)
        return self.quant_conv(self.encoder(x)).chunk(2, 1)               # (B, C, H/16, W/16) each

    def encode(self, x):
        """The latent z0 = E(x) of MoS sec. 3.1, the posterior's normalised mean: (B, C, h, w).

        The networks may be in bf16 (`vae.to(torch.bfloat16)`); pictures and latents are fp32.
        Raises ValueError where values leave [-1, 1].
        """
        low, high = x.aminmax()
        if low < -1.001 or high > 1.001:
            raise ValueError(f"pictures must lie in [-1, 1], got [{low:.3f}, {high:.3f}]")
        return (self.posterior(x)[0] - self.latents_mean) / self.latents_std

    def decode(self, z):
        """Pictures in [-1, 1] of normalised latents (B, C, h, w): (B, 3, 16h, 16w)."""
        z = z * self.latents_std + self.latents_mean
        return at_least_fp32(self.reconstruct(z)).clamp(-1, 1)                     # (B, 3, H, W)

    def reconstruct(self, z):
        """The decoder without normalisation and clamping: (B, C, h, w) to (B, 3, 16h, 16w)."""
        x = self.decoder(self.post_quant_conv(self.admit(z)))             # (B, 12, H/2, W/2)
        return F.pixel_shuffle(x.mT, 2).mT                                # (B, 3, H, W)

    def loss(self, x, noise, kl_weight):
        """Reconstruction and KL terms (Kingma & Welling), each a mean over its elements.

        NOTE (ours): L1, and no perceptual or adversarial term. x: (B, 3, H, W), noise: standard
        normal (B, C, H/16, W/16).
        Returns the loss and {"psnr": decibel, "kl": nats per latent value}.
        """
        mean, log_variance = self.posterior(x)
        mean, log_variance = at_least_fp32(mean), at_least_fp32(log_variance).clamp(-30, 20)
        z = mean + (0.5 * log_variance).exp() * noise
        error = at_least_fp32(self.reconstruct(z)) - x
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        psnr = 10 * (math.log10(4) - error.detach().square().mean().log10())
        return error.abs().mean() + kl_weight * kl, {"psnr": psnr, "kl": kl.detach()}

    @torch.no_grad()
    def set_statistics(self, mean, std):
        """Store the mean and standard deviation (C,) by which latents are normalised."""
        self.latents_mean.copy_(mean.view(-1, 1, 1))
        self.latents_std.copy_(std.view(-1, 1, 1))
