"""The VAE equals diffusers' AutoencoderKLWan, with random weights; its tiles, types and layout."""

import copy
import random
import re

import pytest
import torch
import torch.nn.functional as F
from published import WAN, make_vae, vae_tensors, write_json, write_vae
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
    """Return an AutoencoderKLWan with noise on all tensors of at most `largest` values.

    Norms and biases would not be random otherwise.
    """
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


def take_tensors(folder):
    """Return all tensors of a folder, and delete its files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    return tensors


def compare(ours, theirs, size, dtype=torch.float64, latents=1e-9, pictures=1e-6):
    """Check that normalised latents and decoded pictures equal diffusers'.

    latents, pictures: the relative errors allowed; diffusers always upsamples in fp32.
    """
    model = theirs.to(dtype)
    mean = torch.tensor(theirs.config.latents_mean, dtype=dtype).view(-1, 1, 1)
    std = torch.tensor(theirs.config.latents_std, dtype=dtype).view(-1, 1, 1)
    x = 2 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype) - 1
    z = model.encode(x[:, :, None]).latent_dist.mean[:, :, 0]
    decoded = model.decode(z[:, :, None]).sample[:, :, 0].clamp(-1, 1)
    assert (decoded.abs() < 1).double().mean() > 0.5
    z = (z - mean) / std
    for result, expected, error in ((ours.encode(x), z, latents),
                                    (ours.decode(z), decoded, pictures)):
        assert result.shape == expected.shape
        assert result.dtype == dtype
        assert (result - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("size", ((64, 64), (64, 96)))
def test_parity(size, theirs, folder):
    """Encoder and decoder equal diffusers' for one image, with the folder's own mean and std."""
    compare(load_vae(folder, dtype=torch.float64), theirs, size)


@pytest.mark.slow
def test_parity_at_full_width(tmp_path):
    """The same holds for the network of Wan 2.2, in fp32."""
    full = make_theirs(FULL, 10 ** 4)
    full.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    for size in ((64, 64), (64, 96)):
        compare(ours, full, size, torch.float32, 1e-5, 1e-5)


def test_parameters():
    """One image uses 252.1 M of diffusers' 704.7 M parameters; ours has these only."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**FULL)
        ours = VAE()
    assert sum(p.numel() for p in theirs.parameters()) == 704_688_668
    assert sum(p.numel() for p in ours.parameters()) == 252_125_020


def wan_name(name):
    """Return Wan's own name of a tensor for diffusers' name."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    parts = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2",
             "mid_block.attentions.0": "middle.1", "mid_block.resnets.0": "middle.0",
             "mid_block.resnets.1": "middle.2"}
    for theirs, wan in parts.items():
        name = name.replace(f".{theirs}.", f".{wan}.")
    for way, last in (("down", 2), ("up", 3)):
        name = re.sub(rf"{way}_blocks\.(\d)\.{way}sampler", rf"{way}samples.\1.{way}samples.{last}",
                      name)
        name = re.sub(rf"{way}_blocks\.(\d)\.resnets", rf"{way}samples.\1.{way}samples", name)
    name = name.replace(".norm1.", ".residual.0.").replace(".norm2.", ".residual.3.")
    name = re.sub(r"(samples\.\d|middle\.\d)\.conv1\.", r"\1.residual.2.", name)
    name = re.sub(r"\.conv2\.(?!.*conv)", ".residual.6.", name)
    return name.replace("conv_shortcut", "shortcut")


@pytest.fixture
def written(tmp_path):
    """The folder of a random VAE that is written without diffusers."""
    return write_vae(tmp_path / "vae")


def test_written_tensors_are_named_as_theirs(theirs):
    """The random folder of other tests has the names and numbers of axes of diffusers' own."""
    axes = {name: p.ndim for name, p in theirs.named_parameters()}
    written = {name: p.ndim for name, p in vae_tensors().items()}
    assert written == {name: axes[name] for name in written}
    assert all("time_conv" in name for name in axes.keys() - written.keys())


def test_original_names(written):
    """A folder may use Wan's own names for the same weights."""
    expected = make_vae().state_dict()
    named = {wan_name(name): p for name, p in take_tensors(written).items()}
    assert "encoder.downsamples.0.downsamples.0.residual.2.weight" in named
    assert "decoder.upsamples.1.upsamples.3.resample.1.weight" in named
    assert "encoder.middle.1.to_qkv.weight" in named
    assert "conv2.weight" in named
    save_file(named, written / "model.safetensors")
    found = load_vae(written).state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items()
               if name not in ("latents_mean", "latents_std"))


@pytest.mark.parametrize("damage, message", (
    (lambda t: t.pop("quant_conv.bias"), "quant_conv.bias is missing"),
    (lambda t: t.update(more=torch.ones(1)), "tensor more is not part of this model"),
    (lambda t: t.update({"quant_conv.bias": torch.ones(3)}), r"shape \(3,\), .*asks for \(12,\)")))
def test_damaged_tensors(damage, message, written):
    """A tensor that is missing, unknown or of a wrong shape is named."""
    tensors = take_tensors(written)
    damage(tensors)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_vae(written)


@pytest.mark.parametrize("name, value, expected", (
    ("is_residual", False, "True"), ("patch_size", None, "2"), ("attn_scales", [1.0], r"\[\]"),
    ("in_channels", 3, "12"), ("_class_name", "AutoencoderKL", "'AutoencoderKLWan'"),
    ("quantization_config", dict(quant_method="fp8"), "None")))
def test_other_vaes(name, value, expected, written):
    """Another VAE than Wan 2.2's is refused, with the setting that tells."""
    write_json(written, "config.json", WAN | {name: value})
    with pytest.raises(ValueError, match=f"is not Wan 2.2's VAE: .*{name} .*; expected {expected}"):
        load_vae(written)


def test_defaults_of_a_vae(written):
    """Settings that a config.json leaves out are those of diffusers."""
    left_out = ("dim_mult", "num_res_blocks", "temperal_downsample", "decoder_base_dim",
                "attn_scales", "in_channels", "out_channels", "_class_name")
    expected = load_vae(written).state_dict()
    write_json(written, "config.json",
               {name: value for name, value in WAN.items() if name not in left_out})
    found = load_vae(written).state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_no_weights(written):
    """A folder without weights is refused in one line."""
    take_tensors(written)
    with pytest.raises(FileNotFoundError, match="no safetensors files in"):
        load_vae(written)


# ------------------------------------------------------------------------------------------------
# Layers, tiles, types and layout

@pytest.fixture
def small():
    """A VAE in float64 whose weights, norms and biases are all random."""
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
    """The fused norm and SiLU equal the two one after the other, bit for bit."""
    x = torch.randn(2, 20, 3, 5, dtype=dtype)
    fused = NormSiLU(20).to(dtype)
    norm = ChannelNorm(20).to(dtype)
    norm.gamma.data.copy_(fused.gamma.data.normal_())
    assert torch.equal(fused(x), F.silu(norm(x)))


def test_doubling():
    """The doubling convolution equals nearest neighbours, then a convolution; gradients, too."""
    conv = DoublingConv(5, 5, 3).double()
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64, requires_grad=True)
    leaves = x, conv.weight, conv.bias
    y = conv(x)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(y.sin().sum(), leaves)
    expected = torch.autograd.grad(expected.sin().sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile, size", ((8, (24, 24)), (4, (34, 5)), (4, (5, 34))))
def test_tiles(tile, size, small, monkeypatch):
    """Tiles do not change any value, and with a margin narrower by one they would."""
    h, w = size
    z = torch.randn(1, 6, h, w, dtype=torch.float64)
    x = 2 * torch.rand(1, 3, 16 * h, 16 * w, dtype=torch.float64) - 1
    latents = small.encode(x)
    pictures = small.reconstruct(z)
    monkeypatch.setattr(vae, "TILE", tile)
    monkeypatch.setattr(vae, "UNTILED", h * w - 1)
    torch.testing.assert_close(small.encode(x), latents, rtol=0, atol=1e-12)
    torch.testing.assert_close(small.reconstruct(z), pictures, rtol=0, atol=1e-12)
    small.encoder.margin -= 1
    small.decoder.margin -= 1
    assert (small.encode(x) - latents).abs().max() > 1e-11
    assert (small.reconstruct(z) - pictures).abs().max() > 1e-11


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel() * x.itemsize)
        return result


@pytest.mark.parametrize("size, tiles", (((1024, 1024), 1), ((832, 1280), 1), ((2048, 2048), 4),
                                         ((1024, 4096), 4)))
def test_which_pictures_are_cut(size, tiles, monkeypatch):
    """At full width 1024x1024 pixels are not cut; tiles of larger pictures halve the memory."""
    calls = []
    for part in (vae.Encoder, vae.Decoder):
        monkeypatch.setattr(part, "convolve", lambda self, x, convolve=part.convolve:
                            calls.append(self) or convolve(self, x))

    def measure(run, x, limit):
        """Return the number of tiles, and the bytes of the largest tensor."""
        monkeypatch.setattr(vae, "UNTILED", limit)
        calls.clear()
        with LargestTensor() as largest:
            run(x)
        return len(calls), largest.size

    limit = vae.UNTILED
    with FakeTensorMode(), torch.no_grad():
        model = VAE()
        picture = torch.empty(1, 3, *size)
        latent = torch.empty(1, 48, size[0] // 16, size[1] // 16)
        for run, x in ((model.posterior, picture), (model.reconstruct, latent)):
            count, memory = measure(run, x, limit)
            untiled_count, untiled_memory = measure(run, x, 10 ** 9)
            assert count == tiles
            assert untiled_count == 1
            if tiles == 1:
                assert memory == untiled_memory
            else:
                assert memory < untiled_memory / 2


def test_channels_last(small, monkeypatch):
    """Every norm with SiLU reads memory in which the channels of a pixel are adjacent."""
    inputs = []
    monkeypatch.setattr(vae, "channel_norm", lambda x, gamma: inputs.append(x) or F.silu(x))
    small.decode(small.encode(2 * torch.rand(2, 3, 64, 96, dtype=torch.float64) - 1))
    assert len(inputs) == 10 * 2 + 1 + 14 * 2 + 1  # two in a residual block, and one after them
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


def test_bf16(trained):
    """With weights in bf16, pictures, latents and statistics stay fp32, within 55 dB of fp32."""
    model, pictures = trained
    bf16 = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    for name, values in model.named_buffers():
        assert values.dtype == torch.float32
        assert torch.equal(getattr(bf16, name), values)
    z = model.encode(pictures)
    z_bf16 = bf16.encode(pictures)
    decoded = model.decode(z)
    decoded_bf16 = bf16.decode(z_bf16)
    assert z_bf16.dtype == torch.float32
    assert decoded_bf16.dtype == torch.float32
    print(f"PSNR of bf16 against fp32: {psnr(decoded_bf16, decoded):.1f} dB")
    assert psnr(decoded_bf16, decoded) > 55
    assert (z - z_bf16).norm() < 0.02 * z.norm()
