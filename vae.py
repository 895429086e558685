"""The image path of the Wan 2.2 VAE, written as a 2-D network: 16 times fewer pixels on each side.

The original is a causal video network, to which an image is a video of one frame: each 3x3x3
convolution sees two frames of zeros before it, so that only the last temporal slice of its kernel
counts. Modules are named as in diffusers. Letters as in `mos.py`; C': a layer's output channels.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import initialise
from kernels import at_least_fp32, channel_norm

TILE = 64  # side of a tile, in latent pixels
UNTILED = 72 * 72  # the most latent pixels that are not tiled: 1024x1024 and its aspect buckets


class ChannelNorm(nn.Module):
    """An RMS norm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        scale = self.gamma * self.gamma.shape[0] ** 0.5
        return F.normalize(at_least_fp32(x), dim=1).type_as(x) * scale


class NormSiLU(ChannelNorm):
    """The same norm, then SiLU: a single kernel at sampling."""

    def forward(self, x):
        return channel_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, and a shortcut: (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1 = NormSiLU(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = NormSiLU(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        y = self.conv1(self.norm1(x))                                     # (B, C', H, W)
        return self.conv2(self.norm2(y)) + self.conv_shortcut(x)          # (B, C', H, W)


class Attention(nn.Module):
    """Self-attention with one head over all pixels."""

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
    """The middle of encoder and decoder: residual block, attention, residual block."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DoublingConv(nn.Conv2d):
    """Repeat every pixel 2x2, then apply a 3x3 convolution, with 2.25 times fewer products.

    Where neighbouring taps of the kernel see copies of one pixel, their sum is applied to it once:
    a transposed convolution with a 4x4 kernel and stride 2, whose result is the same.
    """

    def forward(self, x):
        k = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))   # (C, C, 5, 5)
        k = k[:, :, 1:] + k[:, :, :-1]                                    # (C, C, 4, 5)
        k = k[..., 1:] + k[..., :-1]                                      # (C, C, 4, 4)
        return F.conv_transpose2d(x, k, self.bias, 2, 1)                  # (B, C, 2H, 2W)


class Resample(nn.Module):
    """Double height and width (nearest neighbours, then convolution), or halve them (stride 2)."""

    def __init__(self, channels, up):
        super().__init__()
        if up:
            layers = nn.Identity(), DoublingConv(channels, channels, 3)
        else:
            layers = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        self.resample = nn.Sequential(*layers)

    def forward(self, x):
        return self.resample(x)


def average_down(x, cout, space, time):
    """Return an encoder stage's shortcut: fold space and time into channels, then average these.

    space, time: the factors s and t. The image is the last of t frames; the others are zero.
    """
    x = F.pixel_unshuffle(x, space)[:, :, None]                           # (B, C*s*s, 1, h, w)
    x = x.unflatten(1, (-1, space * space)).movedim(3, 2)                 # (B, C, 1, s*s, h, w)
    x = F.pad(x, (0, 0, 0, 0, 0, 0, time - 1, 0)).flatten(1, 3)           # (B, C*t*s*s, h, w)
    return x.unflatten(1, (cout, -1)).mean(2)                             # (B, C', h, w)


def duplicate_up(x, cout, space, time):
    """Return a decoder stage's shortcut: repeat channels, unfold them, keep the last frame."""
    x = x.repeat_interleave(cout * space * space * time // x.shape[1], 1)  # (B, C'*t*s*s, h, w)
    x = x.unflatten(1, (cout, time, space * space))[:, :, -1]             # (B, C', s*s, h, w)
    return F.pixel_shuffle(x.flatten(1, 2), space)                        # (B, C', h*s, w*s)


class DownBlock(nn.Module):
    """An encoder stage: residual blocks, then halving if `down`, and a shortcut around both."""

    def __init__(self, cin, cout, blocks, down, time):
        super().__init__()
        self.shortcut = dict(cout=cout, space=2 if down else 1, time=2 if time else 1)
        self.resnets = nn.Sequential(*(ResidualBlock(cin if i == 0 else cout, cout)
                                       for i in range(blocks)))
        self.downsampler = Resample(cout, up=False) if down else nn.Identity()

    def forward(self, x):
        y = self.resnets(x)                                               # (B, C', H, W)
        return self.downsampler(y) + average_down(x, **self.shortcut)     # (B, C', H/s, W/s)


class UpBlock(nn.Module):
    """A decoder stage: residual blocks, then, if `up`, doubling with a shortcut around both."""

    def __init__(self, cin, cout, blocks, up, time):
        super().__init__()
        self.shortcut = dict(cout=cout, space=2, time=2 if time else 1)
        self.resnets = nn.Sequential(*(ResidualBlock(cin if i == 0 else cout, cout)
                                       for i in range(blocks)))
        self.upsampler = Resample(cout, up=True) if up else None

    def forward(self, x):
        y = self.resnets(x)                                               # (B, C', H, W)
        if self.upsampler is None:
            return y
        return self.upsampler(y) + duplicate_up(x, **self.shortcut)       # (B, C', 2H, 2W)


def apply_along_side(network, x, scales, margin, side):
    """Return network(x), computed for one span of a side after the other; see `apply_in_tiles`."""
    in_scale, out_scale = scales
    length = x.shape[side] // in_scale
    results = []
    for begin in range(0, length, TILE):
        first = max(begin - margin, 0)  # there is no margin outside the picture
        last = min(begin + TILE + margin, length)
        y = network(x.narrow(side, in_scale * first, in_scale * (last - first)))
        size = min(TILE, length - begin)
        results.append(y.narrow(side, out_scale * (begin - first), out_scale * size))
    return torch.cat(results, side)


def apply_in_tiles(network, x, scales, margin):
    """Return network(x), computed tile by tile for a large picture, which takes less memory.

    scales: how many pixels of x and of the result a latent pixel is wide. margin: how far the
    network sees, in latent pixels; tiles are read with it, so that no value differs.
    """
    if x.shape[2] * x.shape[3] <= UNTILED * scales[0] ** 2:
        return network(x)
    apply_in_row = partial(apply_along_side, network, scales=scales, margin=margin, side=3)
    return apply_along_side(apply_in_row, x, scales, margin, side=2)      # (B, C', H', W')


class Encoder(nn.Module):
    """From 2x2 patches (B, 12, H/2, W/2) to mean and log-variance (B, 2*C, H/16, W/16)."""

    def __init__(self, width, multipliers, temporal, blocks, channels):
        super().__init__()
        widths = [width] + [width * m for m in multipliers]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(12, width, 3, padding=1)
        self.down_blocks = nn.Sequential(*(
            DownBlock(widths[i], widths[i + 1], blocks, down=i < last,
                      time=i < last and temporal[i])
            for i in range(last + 1)))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.scale = 2 ** last
        # Each block has 2 convolutions, and a stage's pixels are half as wide as the next one's.
        self.margin = 4 * blocks + 1

    def forward(self, x):
        x = apply_in_tiles(self.convolve, x, (self.scale, 1), self.margin)  # (B, C', h, w)
        return self.conv_out(self.norm_out(self.mid_block(x)))            # (B, 2*C, h, w)

    def convolve(self, x):
        """Apply the stages before the attention, in which a pixel sees its surroundings only."""
        return self.down_blocks(self.conv_in(x))


class Decoder(nn.Module):
    """From latents (B, C, h, w) to 2x2 patches (B, 12, 8*h, 8*w)."""

    def __init__(self, width, multipliers, temporal, blocks, channels):
        super().__init__()
        widths = [width * m for m in (multipliers[-1], *reversed(multipliers))]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.Sequential(*(
            UpBlock(widths[i], widths[i + 1], blocks + 1, up=i < last,
                    time=i < last and temporal[-1 - i])
            for i in range(last + 1)))
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 12, 3, padding=1)
        self.scale = 2 ** last
        self.margin = 4 * (blocks + 1) + 1  # as in the encoder

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                               # (B, C', h, w)
        return apply_in_tiles(self.convolve, x, (1, self.scale), self.margin)  # (B, 12, 8*h, 8*w)

    def convolve(self, x):
        """Apply the stages after the attention, in which a pixel sees its surroundings only."""
        return self.conv_out(self.norm_out(self.up_blocks(x)))


class VAE(nn.Module):
    """From pictures (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/16, W/16) and back.

    latent_channels: C. width, decoder_width: channels of the first encoder and the last decoder
    stage. multipliers: of these widths, for each stage. temporal: whether a stage also halves time
    in the video network. blocks: residual blocks in an encoder stage; a decoder stage has one more.
    The defaults are those of Wan 2.2 TI2V-5B.
    """

    def __init__(self, latent_channels=48, width=160, decoder_width=256, multipliers=(1, 2, 4, 4),
                 temporal=(False, True, True), blocks=2):
        super().__init__()
        self.factor = 2 ** len(multipliers)
        self.encoder = Encoder(width, multipliers, temporal, blocks, channels=2 * latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(decoder_width, multipliers, temporal, blocks,
                               channels=latent_channels)
        self.register_buffer("latents_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latents_std", torch.ones(latent_channels, 1, 1))
        initialise(self)

    def init_parameter(self, name, p):
        """Initialise one parameter as PyTorch does, but biases with 0."""
        if "gamma" in name:
            p.fill_(1.0)
        elif p.ndim == 1:
            p.zero_()
        else:
            bound = p[0].numel() ** -0.5
            p.uniform_(-bound, bound)

    def _apply(self, function, recurse=True):
        """Keep the latents' statistics in at least fp32 when `to`, `bfloat16` and others cast."""
        statistics = dict(self.named_buffers())
        super()._apply(function, recurse)
        for name, values in statistics.items():
            cast = getattr(self, name)
            if at_least_fp32(cast) is not cast:
                setattr(self, name, values.to(cast.device))
        return self

    def to_network(self, x):
        """Cast x to the type of the weights; convolutions are fastest with channels last."""
        return x.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)

    def posterior(self, x):
        """Return latents' mean and log-variance. Raises ValueError unless 16 divides each side."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"pictures must be a multiple of {self.factor} pixels on each side, "
                             f"got {x.shape[-2]}x{x.shape[-1]}")
        # In Wan's 2x2 patches columns come before rows: transpose before and after the unshuffle.
        x = self.to_network(F.pixel_unshuffle(x.mT, 2).mT)                # (B, 12, H/2, W/2)
        return self.quant_conv(self.encoder(x)).chunk(2, 1)               # (B, C, H/16, W/16) each

    def encode(self, x):
        """Return z0 = E(x) of MoS sec. 3.1, the normalised mean of the posterior: (B, C, h, w).

        Pictures and latents are fp32, even if the weights are bf16 (`vae.to(torch.bfloat16)`).
        Raises ValueError where pictures leave [-1, 1].
        """
        low, high = x.aminmax()
        if low < -1.001 or high > 1.001:
            raise ValueError(f"pictures must lie in [-1, 1], got [{low:.3f}, {high:.3f}]")
        mean, _ = self.posterior(x)                                       # (B, C, h, w) each
        return (mean - self.latents_mean) / self.latents_std

    def decode(self, z):
        """Return the pictures in [-1, 1] of normalised latents (B, C, h, w): (B, 3, 16*h, 16*w)."""
        z = z * self.latents_std + self.latents_mean
        return at_least_fp32(self.reconstruct(z)).clamp(-1, 1)            # (B, 3, H, W)

    def reconstruct(self, z):
        """Decode unnormalised latents (B, C, h, w), without clamping: (B, 3, 16*h, 16*w)."""
        x = self.decoder(self.post_quant_conv(self.to_network(z)))        # (B, 12, H/2, W/2)
        return F.pixel_shuffle(x.mT, 2).mT                                # (B, 3, H, W)

    def loss(self, x, noise, kl_weight):
        """Return reconstruction error plus KL (Kingma & Welling), both means over elements.

        NOTE (ours): the error is L1, and there is no perceptual or adversarial term. x:
        (B, 3, H, W), noise: standard normal (B, C, H/16, W/16). Also returns {"psnr": in decibels,
        "kl": in nats per latent value}.
        """
        mean, log_variance = map(at_least_fp32, self.posterior(x))        # (B, C, h, w) each
        log_variance = log_variance.clamp(-30, 20)
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
