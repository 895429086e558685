"""The VAE: parity with diffusers' AutoencoderKLWan, random weights; tiles, types and layout."""

import copy
import json
import random
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae
from conftest import ROOT
from mos import MoS
from pretrained.folders import load_vae
from vae import VAE, ChannelNorm, DoublingConv, NormSiLU
from world import shapes

SMALL = dict(base_dim=8, decoder_base_dim=12, z_dim=6, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
             temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
             in_channels=12, out_channels=12, scale_factor_spatial=16,
             latents_mean=[0.1 * i - 0.2 for i in range(6)],
             latents_std=[1 + 0.1 * i for i in range(6)])
FULL = {**SMALL, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48,  # Wan 2.2 TI2V-5B
        "latents_mean": [0.02 * i - 0.5 for i in range(48)],
        "latents_std": [1 + 0.01 * i for i in range(48)]}


def make_theirs(config, largest):
    """A random AutoencoderKLWan, its norms and biases, too: tensors of at most so many values."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.numel() <= largest:
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def theirs():
    return make_theirs(SMALL, 10 ** 9)


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    return tmp_path


def tensors_of(folder):
    """All tensors of a folder, whose files go."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
        path.unlink()
    return found


def compare(ours, theirs, size, dtype=torch.float64, latents=1e-9, pictures=1e-6):
    """Latents, normalised, and decoded pictures are diffusers', up to these relative errors.

    diffusers upsamples in fp32, whatever comes in.
    """
    c, model = theirs.config, theirs.to(dtype)
    x = 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype) - 1
    mean, std = (torch.tensor(values, dtype=dtype).view(-1, 1, 1)
                 for values in (c.latents_mean, c.latents_std))
    z = model.encode(x[:, :, None]).latent_dist.mean[:, :, 0]
    decoded = model.decode(z[:, :, None]).sample[:, :, 0].clamp(-1, 1)
    assert (decoded.abs() < 1).double().mean() > 0.5
    z = (z - mean) / std
    for found, expected, error in ((ours.encode(x), z, latents),
                                   (ours.decode(z), decoded, pictures)):
        assert found.shape == expected.shape and found.dtype == dtype
        assert (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("size", ((64, 64), (64, 96)))
def test_parity(size, theirs, folder):
    """Encoder and decoder of one image, with the folder's own mean and std."""
    compare(load_vae(folder, dtype=torch.float64), theirs, size)


@pytest.mark.slow
def test_parity_at_full_width(tmp_path):
    """The same for the network of Wan 2.2, in fp32."""
    full = make_theirs(FULL, 10 ** 4)
    full.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    for size in ((64, 64), (64, 96)):
        compare(ours, full, size, torch.float32, 1e-5, 1e-5)


def test_parameters():
    """Of diffusers' 704.7 M parameters one image uses 252.1 M; ours are those."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        full, ours = diffusers.AutoencoderKLWan(**FULL), VAE()
    count = [sum(p.numel() for p in model.parameters()) for model in (full, ours)]
    assert count == [704_688_668, 252_125_020]


def wan_name(name):
    """Wan's own name of a tensor, from diffusers'."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    parts = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2",
             "mid_block.attentions.0": "middle.1", "mid_block.resnets.0": "middle.0",
             "mid_block.resnets.1": "middle.2"}
    for own, wan in parts.items():
        name = name.replace(f".{own}.", f".{wan}.")
    for way, last in (("down", 2), ("up", 3)):
        name = re.sub(rf"{way}_blocks\.(\d)\.{way}sampler", rf"{way}samples.\1.{way}samples.{last}",
                      name)
        name = re.sub(rf"{way}_blocks\.(\d)\.resnets", rf"{way}samples.\1.{way}samples", name)
    for own, wan in {"norm1": 0, "norm2": 3}.items():
        name = name.replace(f".{own}.", f".residual.{wan}.")
    name = re.sub(r"(samples\.\d|middle\.\d)\.conv1\.", r"\1.residual.2.", name)
    name = re.sub(r"\.conv2\.(?!.*conv)", ".residual.6.", name) if name.count("conv2") else name
    return name.replace("conv_shortcut", "shortcut")


def test_original_names(theirs, folder):
    """The same weights under Wan's own names."""
    named = {wan_name(name): p for name, p in tensors_of(folder).items()}
    assert "encoder.downsamples.0.downsamples.0.residual.2.weight" in named
    assert "decoder.upsamples.1.upsamples.3.resample.1.weight" in named
    assert "encoder.middle.1.to_qkv.weight" in named and "conv2.weight" in named
    save_file(named, folder / "model.safetensors")
    compare(load_vae(folder, dtype=torch.float64), theirs, (64, 64))


@pytest.mark.parametrize("damage, blame", (
    (lambda t: t.pop("quant_conv.bias"), "quant_conv.bias is missing"),
    (lambda t: t.update(more=torch.ones(1)), "tensor more is not part of this model"),
    (lambda t: t.update({"quant_conv.bias": torch.ones(3)}), r"shape \(3,\), .*asks for \(12,\)")))
def test_damaged_tensors(damage, blame, folder):
    """A tensor that is missing, too much or misshaped is named."""
    tensors = tensors_of(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=blame):
        load_vae(folder)


def test_other_folders(folder):
    """Another VAE, or none, is refused in one line."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_residual": False}))
    with pytest.raises(ValueError, match="is not Wan 2.2's VAE: expected is_residual"):
        load_vae(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors_of(folder)
    with pytest.raises(FileNotFoundError, match="no safetensors files in"):
        load_vae(folder)


# --- layers, tiles, types and layout -------------------------------------------------------------

@pytest.fixture
def small():
    """A random VAE in float64, its norms and biases, too."""
    torch.manual_seed(0)
    model = VAE(6, 4, 4).double().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    model.set_statistics(torch.randn(6), torch.rand(6) + 0.5)
    return model


@pytest.fixture(scope="module")
def trained():
    """The VAE of `weights/`, and pictures of the small world: (B, 3, 128, 128)."""
    scenes = [shapes.draw_scene(random.Random(i), "dense") for i in range(4)]
    return MoS.from_pretrained(ROOT / "weights").vae, shapes.render(shapes.pack(scenes), 128, 128)


def psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().mean())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_and_silu(dtype):
    """In one they are what they are one after the other, bit for bit."""
    x = torch.randn(2, 20, 3, 5, dtype=dtype)
    one, two = NormSiLU(20).to(dtype), ChannelNorm(20).to(dtype)
    two.gamma.data.copy_(one.gamma.data.normal_())
    assert torch.equal(one(x), F.silu(two(x)))


def test_doubling():
    """Nearest neighbours, then a convolution, with gradients."""
    conv, x = DoublingConv(5, 5, 3).double(), torch.randn(2, 5, 3, 7, dtype=torch.float64)
    leaves = x.requires_grad_(), conv.weight, conv.bias
    results = []
    for y in (conv(x), F.conv2d(F.interpolate(x, scale_factor=2), *leaves[1:], padding=1)):
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile, size", ((8, (24, 24)), (4, (34, 5)), (4, (5, 34))))
def test_tiles(tile, size, small, monkeypatch):
    """Tiles give the values of the whole everywhere, and a margin narrower by one would not."""
    h, w = size
    z = torch.randn(1, 6, h, w, dtype=torch.float64)
    x = 2 * torch.rand(1, 3, 16 * h, 16 * w, dtype=torch.float64) - 1
    whole = small.encode(x), small.reconstruct(z)
    monkeypatch.setattr(vae, "TILE", tile)
    monkeypatch.setattr(vae, "UNTILED", h * w - 1)
    for a, b in zip(whole, (small.encode(x), small.reconstruct(z))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    small.encoder.margin -= 1
    small.decoder.margin -= 1
    for a, b in zip(whole, (small.encode(x), small.reconstruct(z))):
        assert (a - b).abs().max() > 1e-11


class Watch(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        sizes = [x.numel() * x.itemsize for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return made


@pytest.mark.parametrize("size, tiles", (((1024, 1024), 1), ((832, 1280), 1), ((2048, 2048), 4),
                                         ((1024, 4096), 4)))
def test_which_pictures_are_cut(size, tiles, monkeypatch):
    """At full width: those of 1024x1024 are not; tiles of larger ones take less than half."""
    calls = []
    for part in (vae.Encoder, vae.Decoder):
        monkeypatch.setattr(part, "convolve", lambda self, x, convolve=part.convolve:
                            calls.append(self) or convolve(self, x))
    with FakeTensorMode(), torch.no_grad():
        model, found = VAE(), []
        for whole in (vae.UNTILED, 10 ** 9):
            monkeypatch.setattr(vae, "UNTILED", whole)
            for run, x in ((model.posterior, torch.empty(1, 3, *size)),
                           (model.reconstruct, torch.empty(1, 48, size[0] // 16, size[1] // 16))):
                calls.clear()
                with Watch() as watch:
                    run(x)
                found.append((len(calls), watch.largest))
    assert [n for n, _ in found] == [tiles, tiles, 1, 1]
    for (_, part), (_, whole) in zip(found[:2], found[2:]):
        assert part == whole if tiles == 1 else part < whole / 2


def test_channels_last(small, monkeypatch):
    """Every norm with SiLU reads memory in which the channels of a pixel are neighbours."""
    seen = []
    monkeypatch.setattr(vae, "channel_norm", lambda x, gamma: seen.append(x) or F.silu(x))
    small.decode(small.encode(2 * torch.rand(2, 3, 64, 96, dtype=torch.float64) - 1))
    assert len(seen) == 10 * 2 + 1 + 14 * 2 + 1  # of residual blocks, and one behind them
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_bf16(trained):
    """Networks in bf16 take and give fp32, statistics stay whole; 55 dB from fp32's pictures."""
    model, pictures = trained
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}
    for name, values in model.named_buffers():
        assert torch.equal(getattr(coarse, name), values) and values.dtype == torch.float32
    z, z_coarse = model.encode(pictures), coarse.encode(pictures)
    seen, seen_coarse = model.decode(z), coarse.decode(z_coarse)
    assert z_coarse.dtype == seen_coarse.dtype == torch.float32
    print(f"PSNR of bf16 against fp32: {psnr(seen_coarse, seen):.1f} dB")
    assert psnr(seen_coarse, seen) > 55 and (z - z_coarse).norm() < 0.02 * z.norm()
