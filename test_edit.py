"""MoS-Edit: where the reference picture enters, what guidance compares, edited pictures."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import make_model
from mos import Context, MoSConfig, guide, to_pixels
from towers import Tokenizer

TEXTS = ["a red circle", "two stars on the gray background"]
FRONT = 8  # image tokens of 32x64 pixels
close = torch.testing.assert_close
TIGHT = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(model):
    """z, t, tokens, pictures and reference of two edits, the same at every call."""
    g, c = torch.Generator().manual_seed(1), model.config
    z, reference = torch.randn(2, 2, c.vae_channels, 2, 4, generator=g)
    images = 2 * torch.rand(2, 3, 32, 64, generator=g) - 1
    return z, torch.rand(2, generator=g), model.tokenizer.batch(TEXTS), images, reference


def pictures(number=2, height=32, width=64):
    """PIL images of noise."""
    rng = np.random.default_rng(height)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            for _ in range(number)]


# --- the generation tower ------------------------------------------------------------------------

def test_reference_tokens(model):
    """They stand behind the target's with image index 1, and the type embedding is theirs alone."""
    G, (z, *_, reference) = model.generation, draw(model)
    x, places = G.patchify(z, reference)
    alone, there = G.patchify(z)
    assert torch.equal(x[:, :8], alone) and torch.equal(places[:8], there)
    assert torch.equal(places[8:], there + torch.tensor([1, 0, 0])) and not there[:, 0].any()
    close(x[:, 8:] - G.patchify(reference)[0], G.reference.expand(2, 8, -1), **TIGHT)
    G.start("reference", G.reference.data)
    assert not G.reference.any() and torch.equal(G.patchify(z, reference)[0][:, :8], alone)


@torch.no_grad()
def test_what_the_velocity_depends_on(model):
    """On latents and picture of the reference, even without a type embedding; its shape does not.
    """
    z, t, tokens, images, reference = draw(model)
    model.generation.reference.zero_()
    plain, seeing = model.understand(tokens), model.understand(tokens, images)
    v = [model(z, t, plain), model(z, t, plain, reference=reference),
         model(z, t, plain, reference=reference.flip(3)), model(z, t, seeing),
         model(z, t, model.understand(tokens, -images)), model(z, t, seeing, reference=reference)]
    assert {one.shape for one in v} == {z.shape}
    for i, one in enumerate(v):
        assert not any(torch.allclose(one, other, rtol=1e-2, atol=1e-3) for other in v[:i]), i
    marked = model.generation.reference.normal_()
    assert marked.any() and not torch.allclose(
        model(z, t, plain, reference=reference), v[1], rtol=1e-2, atol=1e-3)


def test_no_loss_on_the_reference(model):
    """What the last block makes of the reference's tokens is dropped; the target is the picture."""
    z0, t, tokens, images, reference = draw(model)
    z1, seen, own = torch.randn_like(z0), [], model.generation.blocks[-1].forward

    def loss():
        return model.loss(z0, tokens, t, z1, images=images, reference=reference)

    def garbage(*inputs):
        x, h = own(*inputs)
        seen.append(x.shape[1])
        return F.pad(x[:, :3 + 8], (0, 0, 0, 8), value=9.0), h

    expected = loss()
    model.generation.blocks[-1].forward = garbage
    assert torch.equal(loss(), expected) and seen == [3 + 8 + 8]  # registers, target, reference
    at = t[:, None, None, None]
    v = model((1 - at) * z0 + at * z1, t, model.understand(tokens, images), reference=reference)
    close((v - (z1 - z0)).square().mean((1, 2, 3)), expected)


def test_the_router_sees_the_reference(model):
    """It predicts other weights for another reference; all tokens of the context have some."""
    z, t, tokens, images, reference = draw(model)
    context = model.understand(tokens, images)
    a, b = (model.route(*model.generation.patchify(z, one), t, context)
            for one in (reference, -reference))
    assert a.shape == (2, FRONT + tokens.shape[1], 5, 3) and not torch.allclose(a, b, rtol=1e-3)


# --- the context ---------------------------------------------------------------------------------

@torch.no_grad()
def test_image_tokens_stand_before_the_text(model):
    """They are real tokens, in front; `runs` counts them, and says what the mask says."""
    z, t, tokens, images, reference = draw(model)
    context, plain = model.understand(tokens, images), model.understand(tokens)
    assert torch.equal(context.mask, F.pad(tokens != Tokenizer.PAD, (FRONT, 0), value=True))
    assert torch.equal(context.inputs[:, FRONT:], plain.inputs)
    assert not torch.allclose(context.states[:, FRONT:], plain.states, rtol=1e-2)
    read = model.read(TEXTS[:1], "", images[:1])
    assert read.runs == [(1, FRONT + 4), (1, FRONT + 1)]
    close(read.states[0, :FRONT + 4], context.states[0, :FRONT + 4], **TIGHT)
    close(read.inputs[1, :FRONT], read.inputs[0, :FRONT])  # the picture stays without the text
    two = z[:1].repeat(2, 1, 1, 1), t[:1].repeat(2)
    close(model(*two, read, reference=reference),
          model(*two, read._replace(runs=None), reference=reference), **TIGHT)


@torch.no_grad()
def test_projected_context(model):
    """Projecting the states of image tokens first changes nothing."""
    z, t, tokens, images, reference = draw(model)
    context = model.understand(tokens, images)
    close(model(z, t, context, reference=reference),
          model(z, t, model.project(context), reference=reference), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("arm", (("understanding",), ("generation",)))
def test_arms(arm):
    """MoS App. B.5: a tower that shall not see the reference works as if there was none."""
    model = make_model(edit_inputs=arm, und_images=arm != ("generation",))
    z, t, tokens, images, reference = draw(model)
    plain, context = model.understand(tokens), model.understand(tokens, images)
    v = model(z, t, plain)
    if arm == ("generation",):
        assert torch.equal(context.states, plain.states) and torch.equal(context.mask, plain.mask)
    else:
        assert torch.equal(model(z, t, plain, reference=reference), v)
    edited = model(z, t, context, reference=reference)
    assert not torch.allclose(edited, v, rtol=1e-2, atol=1e-3)
    assert model.edit(pictures(), TEXTS, steps=1, image_guidance=2.0)[0].size == (64, 32)


def test_settings_are_checked():
    """Unknown towers, no tower, and a tower that reads no pictures are ValueErrors."""
    for wrong in ((), ("router",), ["understanding", "vae"]):
        with pytest.raises(ValueError, match="edit_inputs must be .*understanding, generation"):
            MoSConfig(edit_inputs=wrong)
    assert MoSConfig(edit_inputs=["generation"]).edit_inputs == ("generation",)
    with pytest.raises(ValueError, match="image_guidance must be a finite number, got inf"):
        MoSConfig(image_guidance=math.inf)
    blind = make_model(und_images=False)
    with pytest.raises(ValueError, match="reads no pictures; .*edit_inputs generation"):
        blind.edit(pictures(), TEXTS, steps=1)


# --- sampling ------------------------------------------------------------------------------------

def test_guidance_with_two_scales():
    """v_0 + g_image (v_image - v_0) + g (v_full - v_image) of InstructPix2Pix; 1 is plain."""
    full, image, nothing = torch.randn(3, 2, 6, 4, 5, dtype=torch.float64)
    expected = nothing + 1.5 * (image - nothing) + 5 * (full - image)
    close(guide(full, image, 5, 0, nothing, 1.5), expected)
    scale = (full.flatten(1).std(1) / expected.flatten(1).std(1))[:, None, None, None]
    close(guide(full, image, 5, 1, nothing, 1.5), scale * expected)
    close(guide(full, image, 5, .7, nothing, 1), guide(full, image, 5, .7))


@pytest.mark.parametrize("guidance, image_guidance, branches", (
    (1, 1, "I"), (3, 1, "II"), (3, 1.5, "II0"), (1, 1.5, "II0")))
def test_branches(model, guidance, image_guidance, branches):
    """Guidance drops the text and keeps the picture; image guidance also drops both."""
    seen, forward = [], model.forward

    def spy(z, t, context, reference=None):
        assert isinstance(context, Context) and context.projected
        real = context.mask.sum(1).tolist()
        seen.extend(zip(real, z.flatten(1), [None] * len(z) if reference is None else reference))
        return forward(z, t, context, reference=reference)

    model.forward = spy
    model.edit(pictures(1), TEXTS[:1], steps=1, guidance=guidance, image_guidance=image_guidance)
    reference, = model.vae.encode(to_pixels(pictures(1)))
    assert [real for real, *_ in seen] == [
        *(FRONT + n for n in (4, 1)[:branches.count("I")]), *([1] if "0" in branches else [])]
    for branch, (_, z, own) in zip(branches, seen, strict=True):
        assert torch.equal(z, seen[0][1])
        assert own is None if branch == "0" else torch.equal(own, reference)


@pytest.fixture
def painter():
    """A model whose random pictures use the whole range of levels."""
    model = make_model()
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.mul_(6)
    return model


def same(a, b):
    """Pictures equal up to one level in one of a thousand values."""
    a, b = (np.stack([np.asarray(image, int) for image in images]) for images in (a, b))
    return a.shape == b.shape and abs(a - b).max() <= 1 and (a != b).mean() <= 1e-3


def test_edit(painter):
    """Seed, size and batch: as for `generate`; everything that is given changes the picture."""
    call = dict(images=pictures(), instructions=TEXTS, seed=3, steps=2, guidance=3.0, rescale=0.0,
                negative="", image_guidance=1.0)
    both = painter.edit(**call)
    assert [image.size for image in both] == [(64, 32)] * 2 and same(both, painter.edit(**call))
    assert painter.edit(pictures(1, 64, 32), TEXTS[:1], steps=1)[0].size == (32, 64)
    for i in range(2):
        one = dict(images=pictures()[i:i + 1], instructions=TEXTS[i:i + 1])
        assert same(both[i:i + 1], painter.edit(**{**call, **one, "seed": 3 + i}))
        assert same(both[i:i + 1], painter.edit(**{**call, **one, "seed": [3 + i]}))
    for change in (dict(images=pictures()[::-1]), dict(instructions=TEXTS[::-1]), dict(seed=9),
                   dict(negative="blue star"), dict(guidance=5.0), dict(image_guidance=2.0),
                   dict(rescale=1.0), dict(steps=3), dict(schedule="linear-quadratic")):
        assert not same(both, painter.edit(**{**call, **change})), change
    assert not same(both, painter.generate(TEXTS, seed=3, steps=2, guidance=3.0, rescale=0.0,
                                           size=(32, 64)))


def test_what_cannot_be_edited_is_refused(painter):
    """A ValueError of one line that names what is wrong."""
    for match, change in (
            ("one size, got 32x64, 64x64$", dict(images=pictures(1) + pictures(1, 64))),
            ("one size, got none", dict(images=[], instructions=[])),
            ("multiple of 32 .*got 48x64", dict(images=pictures(2, 48))),
            ("2 pictures for 1 prompts", dict(instructions=TEXTS[:1])),
            ("must be a list of texts", dict(instructions="a star")),
            ("none of them empty", dict(instructions=["a star", " "])),
            ("'zebra'", dict(instructions=["a zebra", "a star"])), ("seeds", dict(seed=[1])),
            ("image_guidance", dict(image_guidance=math.nan)), ("steps", dict(steps=0))):
        with pytest.raises(ValueError, match=match):
            painter.edit(**{"images": pictures(), "instructions": TEXTS, "steps": 1, **change})
