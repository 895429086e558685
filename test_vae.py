"""The VAE: parity with diffusers' AutoencoderKLWan, random weights, float64, offline."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from vae import load_wan

diffusers = pytest.importorskip("diffusers")
SMALL = dict(base_dim=8, decoder_base_dim=12, z_dim=6, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
             temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
             in_channels=12, out_channels=12, scale_factor_spatial=16,
             latents_mean=[0.1 * i - 0.2 for i in range(6)],
             latents_std=[1 + 0.1 * i for i in range(6)])


@pytest.fixture(scope="module")
def theirs():
    """A random AutoencoderKLWan, its norms and biases, too."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(**SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


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


@torch.no_grad()
def compare(vae, theirs, size):
    """Latents, normalised, and decoded pictures are diffusers'."""
    x = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, x = theirs.double(), 2 * x - 1
    mean, std = (torch.tensor(SMALL[f"latents_{name}"], dtype=torch.float64).view(1, 6, 1, 1)
                 for name in ("mean", "std"))
    z = model.encode(x[:, :, None]).latent_dist.mean
    torch.testing.assert_close(vae.encode(x), (z[:, :, 0] - mean) / std, rtol=1e-9, atol=1e-9)
    decoded = model.decode(z).sample[:, :, 0]
    found = vae.decode((z[:, :, 0] - mean) / std)
    # diffusers upsamples in fp32, whatever comes in.
    torch.testing.assert_close(found, decoded.clamp(-1, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", ((64, 64), (64, 96)))
def test_parity(size, theirs, folder):
    """Encoder and decoder of one image, with the folder's own mean and std."""
    compare(load_wan(folder, dtype=torch.float64), theirs, size)


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
    compare(load_wan(folder, dtype=torch.float64), theirs, (64, 64))


@pytest.mark.parametrize("damage, blame", (
    (lambda t: t.pop("quant_conv.bias"), "quant_conv.bias is missing"),
    (lambda t: t.update(more=torch.ones(1)), "tensor more is not part of this VAE"),
    (lambda t: t.update({"quant_conv.bias": torch.ones(3)}), r"shape \(3,\), .*asks for \(12,\)")))
def test_damaged_tensors(damage, blame, folder):
    """A tensor that is missing, too much or misshaped is named."""
    tensors = tensors_of(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=blame):
        load_wan(folder)


def test_other_folders(folder):
    """Another VAE, or none, is refused in one line."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_residual": False}))
    with pytest.raises(ValueError, match="is not Wan 2.2's VAE: expected is_residual"):
        load_wan(folder)
    tensors_of(folder)
    with pytest.raises(FileNotFoundError, match="expected the VAE's folder in diffusers' layout"):
        load_wan(folder)
