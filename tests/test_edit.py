"""MoS-Edit: where the reference picture enters, guidance, edited pictures, data and training."""

import csv
import json
import math
import os
import random
import re
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training import MODEL, alone, prepare, settings, validate_on_few

import train
from checkpoint import read_vocabulary
from common import to_image
from conftest import ROOT, make_config, make_model, same
from data.pairs import Pairs
from data.pictures import Pictures, Rules
from data.sources import Mixture, build_tokenizer
from kernels import Keys
from mos import Context, MoS, guide, to_pixels
from pretrained.encoders import InternVision, PerceptionEncoder
from stages import EditStage
from towers import Tokenizer, Understanding
from world import edits, scores, shapes
from world.captions import read_caption
from world.dataset import Edits, OutlinedShapes, Shapes, TowerTexts, in_detail

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
    G.init_parameter("reference", G.reference.data)
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
        x = own(*inputs)
        seen.append(x.shape[1])
        return F.pad(x[:, :3 + 8], (0, 0, 0, 8), value=9.0)

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
    assert torch.equal(context.keys.mask, F.pad(tokens != Tokenizer.PAD, (FRONT, 0), value=True))
    assert torch.equal(context.inputs[:, FRONT:], plain.inputs)
    assert not torch.allclose(context.states[:, FRONT:], plain.states, rtol=1e-2)
    read = model.read(TEXTS[:1], "", images[:1])
    assert read.keys.runs == [(1, FRONT + 4), (1, FRONT + 1)]
    close(read.states[0, :FRONT + 4], context.states[0, :FRONT + 4], **TIGHT)
    close(read.inputs[1, :FRONT], read.inputs[0, :FRONT])  # the picture stays without the text
    two = z[:1].repeat(2, 1, 1, 1), t[:1].repeat(2)
    close(model(*two, read, reference=reference),
          model(*two, read._replace(keys=Keys(read.keys.mask)), reference=reference), **TIGHT)


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
        assert torch.equal(context.states, plain.states)
        assert torch.equal(context.keys.mask, plain.keys.mask)
    else:
        assert torch.equal(model(z, t, plain, reference=reference), v)
    edited = model(z, t, context, reference=reference)
    assert not torch.allclose(edited, v, rtol=1e-2, atol=1e-3)
    assert model.edit(pictures(), TEXTS, steps=1, image_guidance=2.0)[0].size == (64, 32)


def test_settings_are_checked():
    """Unknown towers, no tower, and a tower that reads no pictures are ValueErrors."""
    for wrong in ((), ("router",), ["understanding", "vae"]):
        with pytest.raises(ValueError, match="edit_inputs must be .*understanding, generation"):
            make_config(edit_inputs=wrong)
    assert make_config(edit_inputs=["generation"]).edit_inputs == ("generation",)
    with pytest.raises(ValueError, match="image_guidance must be a finite number, got inf"):
        make_config(image_guidance=math.inf)
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
        real = context.keys.mask.sum(1).tolist()
        seen.extend(zip(real, z.flatten(1), [None] * len(z) if reference is None else reference))
        return forward(z, t, context, reference=reference)

    model.forward = spy
    model.edit(pictures(1), TEXTS[:1], steps=1, negative="blue star", guidance=guidance,
               image_guidance=image_guidance)
    reference, = model.vae.encode(to_pixels(pictures(1)))
    assert [real for real, *_ in seen] == [
        *(FRONT + n for n in (4, 3)[:branches.count("I")]), *([3] if "0" in branches else [])]
    for branch, (_, z, own) in zip(branches, seen, strict=True):
        assert torch.equal(z, seen[0][1])
        assert own is None if branch == "0" else torch.equal(own, reference)


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
    assert same(both, painter.edit(**{**call, "negative": None}))
    for change in (dict(images=pictures()[::-1]), dict(instructions=TEXTS[::-1]), dict(seed=9),
                   dict(negative="blue star"), dict(guidance=5.0), dict(image_guidance=2.0),
                   dict(rescale=1.0), dict(steps=3), dict(schedule="linear-quadratic")):
        assert not same(both, painter.edit(**{**call, **change})), change
    painter.config.guidance, painter.config.edit_guidance = 5.0, 3.0  # edits have their own
    assert same(both, painter.edit(**{**call, "guidance": None}))
    assert not same(both, painter.generate(TEXTS, seed=3, steps=2, guidance=3.0, rescale=0.0,
                                           size=(32, 64)))


def test_pixels():
    """A picture's rows, columns and channels; what is not RGB becomes so, on white."""
    images = pictures(4)
    images[2] = images[2].convert("L")
    expected = [np.asarray(image.convert("RGB")) for image in images]
    images[3] = images[3].convert("RGBA")
    images[3].putalpha(0)
    expected[3] = np.full_like(expected[3], 255)
    values = (to_pixels(images) + 1) * 127.5
    assert (values.round().permute(0, 2, 3, 1).numpy() == expected).all()


def test_what_cannot_be_edited_is_refused(painter):
    """A ValueError of one line that names what is wrong."""
    for match, change in (
            ("one size, got 32x64, 64x64$", dict(images=pictures(1) + pictures(1, 64))),
            ("one size, got none", dict(images=[], instructions=[])),
            ("multiple of 32 .*got 48x64", dict(images=pictures(2, 48))),
            ("2 pictures for 1 prompts", dict(instructions=TEXTS[:1])),
            ("must be a list of PIL images", dict(images=pictures()[0])),
            ("must be a list of PIL images", dict(images=[np.zeros((32, 64, 3), np.uint8)] * 2)),
            ("must be a list of texts, got 'a star'", dict(instructions="a star")),
            ("must be texts with words, got ' '", dict(instructions=["a star", " "])),
            ("must be texts with words, got '. .'", dict(instructions=["a star", ". ."])),
            ("'zebra'", dict(instructions=["a zebra", "a star"])),
            ("seed must be a list of 2, one for each picture, got 1", dict(seed=[1])),
            ("seed must be a whole number", dict(seed=1.0)),
            ("image_guidance", dict(image_guidance=math.nan)), ("steps", dict(steps=0))):
        with pytest.raises(ValueError, match=match):
            painter.edit(**{"images": pictures(), "instructions": TEXTS, "steps": 1, **change})


# --- data ----------------------------------------------------------------------------------------

WORDS = Tokenizer([*read_vocabulary(ROOT / "weights").words, *edits.words(),
                   *"in detail : drawn".split()])


def test_lessons():
    """Texts alone and texts about a picture, half and half and in thirds; all answers are true."""
    world, kinds = TowerTexts(64, 3), Counter()
    for i in range(300):
        scene, prompt, question, answer = world.scene(i)
        packed, text, about, told, detail = world[i]
        shown = scene
        if i % 2:
            short, long = text.removeprefix("in detail : "), read_caption(detail)
            assert text == f"in detail : {short}" and shapes.satisfies(long, scene)
            assert all(o.colour for o in long.objects) and len(long.relations) <= 2
            if prompt.task == "dense":
                assert " , " not in short and short.count(" and ") == len(scene.objects) - 1
            else:
                asked = read_caption(short)
                assert short == prompt.text and {*asked.relations} <= {*long.relations}
                assert asked.background in (None, long.background)
                assert all(a.size in (None, b.size) for a, b in zip(asked.objects, long.objects))
        else:
            assert (text, detail) == (prompt.text, None)
        if i % 3 == 2:
            edit = world.edit(i)
            shown, target = edit.source, edit.target
            outlined = told.endswith(" , drawn as outlines")
            long = read_caption(told.removesuffix(" , drawn as outlines"))
            assert about == edit.text and outlined == (target.style == "outlined")
            assert shapes.satisfies(long, target._replace(style="filled"))
            assert all(o.colour for o in long.objects)
            kinds[edit.type] += 1
        else:
            assert (about, told) == ((question, answer), (prompt.text, None))[i % 3]
        assert torch.equal(packed, shapes.pack([shown])[0])
    assert kinds.keys() == {*edits.TYPES}


def test_ambiguous_objects_are_not_related():
    """A detailed caption relates no two objects of one colour and shape; one object is no list."""
    circle = shapes.Object("circle", "red", "small", 0.2, 0.2)
    three = circle, circle._replace(x=0.5), circle._replace(x=0.5, y=0.8)
    for number, pattern in ((3, "{0} , {0} and {0}"), (1, "{0}")):
        for i in range(20):
            text = in_detail(random.Random(i), shapes.Scene(three[:number], "gray"))
            said = pattern.format("a (small )?red circle")
            assert re.fullmatch(rf"(an? \w+ of )?{said}( on a gray background)?", text)


def test_longest_text():
    """The default max_tokens holds lessons, by far not too many; the words are those of any item.
    """
    world, longest = TowerTexts(64, 1), 0
    tokenizer = build_tokenizer(Mixture([Shapes(64, 0)]), 500)
    for i in range(1500):
        _, text, about, told, detail = world[i]
        longest = max(longest, *(2 + len(tokenizer.encode(f"{a} {b or ''}")) - 1
                                 for a, b in ((text, detail), (about, told))))
    assert 64 < longest <= 76 < make_config().max_tokens == 80
    for a, b in zip(world.texts(20), Edits(64, 1).texts(20)):  # one vocabulary for all stages
        assert a == b


def test_worlds():
    """Edits hold source, target and a scene with its caption; every other look is outlined."""
    world, drawn = Edits(32, 5), Shapes(32, 5)
    packed, caption, instruction, _ = world[7]
    edit = world.edit(7)
    assert torch.equal(packed, shapes.pack([edit.source, edit.target, drawn.scene(7)[0]]))
    assert (caption, instruction) == (drawn[7][1], edit.text)
    pictures = world.to_pixels(torch.stack([packed, packed]), "cpu")
    assert pictures.shape == (2, 3, 3, 32, 32)
    assert torch.equal(pictures[1], drawn.to_pixels(packed, "cpu"))
    styles = [OutlinedShapes(32, 5).scene(i)[0].style for i in range(8)]
    assert styles == ["outlined", "filled"] * 4
    assert {Edits(32, 5, split).edit(7).text for split in ("train", "val")} != {edit.text}


# --- training ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A folder with a small model of random weights that knows the small world's words."""
    folder = tmp_path_factory.mktemp("edit") / "init"
    torch.manual_seed(0)
    model = MoS(make_config(**MODEL), WORDS)
    model.generation.head.weight.data.normal_(0, 0.05)  # or nothing would matter
    model.save_pretrained(folder)
    return folder


def make_stage(init, number=12, model=MODEL, **changes):
    c = settings("edit", init=str(init), scenes=number, **changes)
    model = MoS.from_pretrained(init, **{name: model[name] for name in ("edit_inputs",)
                                         if name in model})
    return EditStage(model, Mixture([Edits(64, 0, number=number)]), c, alone())


def test_half_a_batch_each(init, monkeypatch):
    """A batch of 8 is 4 pictures from text and 4 edits; the tower sees what the latents are of."""
    validate_on_few(monkeypatch.setattr, 2)
    stage = make_stage(init, batch=8, prompt_dropout=0.0)
    stage.begin(0)
    inputs, world, vae = stage.inputs(0), stage.dataset.sources[0], stage.model.vae
    assert {len(a) for a in inputs} == {4}
    scene, prompts, *_, images, before, after, instructions, t, z1, explore = inputs
    for i in range(4):
        texts = [WORDS.decode(ids for ids in a[i][1:] if ids > 0) for a in (prompts, instructions)]
        index, = (j for j in range(12) if [*world[j][1:3]] == texts)
        pictures = world.to_pixels(world[index][0], "cpu")
        close(images[i], pictures[0])
        with torch.no_grad():
            latents = vae.encode(pictures)
        close(torch.stack((before[i], after[i], scene[i])), latents, **TIGHT)
    assert explore.shape == (4, 16 + instructions.shape[1], 6, 3)
    assert stage.padding == ((prompts < 0).sum() + (instructions < 0).sum()) > 0
    loss, metrics = stage(*inputs)
    assert metrics["counts"].sum() == 8 and loss.item() == pytest.approx(
        (metrics["draw"] + metrics["edit"]).item() / 2)


def test_instructions_are_dropped(init, monkeypatch):
    """Prompt dropout empties instructions and leaves pictures, and in the other half everything."""
    validate_on_few(monkeypatch.setattr, 2)
    seen = []
    for dropout in (0.0, 1.0):
        stage = make_stage(init, batch=8, prompt_dropout=dropout)
        stage.begin(0)
        seen.append(stage.inputs(0))
    full, empty = seen
    for i, (a, b) in enumerate(zip(full, empty)):
        if i in (1, 8):  # prompts and instructions
            assert (b[:, 0] == Tokenizer.BOS).all() and (b[:, 1:] == Tokenizer.PAD).all()
            assert (a[:, 1] > 2).all()
        else:
            assert torch.equal(a, b)


def test_operations_of_a_step(init, monkeypatch):
    """What MFU counts: all products of router and generation tower, a reference's tokens too."""
    validate_on_few(monkeypatch.setattr, 2)
    stage = make_stage(init, batch=4)
    stage.begin(0)
    inputs, model = stage.inputs(0), stage.model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage(*inputs)
    tower = FlopCounterMode(display=False)
    with tower, torch.no_grad():
        model.understand(inputs[1])
        model.understand(inputs[8], inputs[5])
    products = counter.get_total_flops() - tower.get_total_flops()  # without attention on a CPU
    c, attention = model.config, 0
    for S, T in ((inputs[1].shape[1], 16), (16 + inputs[8].shape[1], 2 * 16)):
        L = c.registers + T
        attention += 2 * 4 * (c.gen_depth * c.gen_width * L * (L + S)
                              + c.router_depth * c.router_width * (S + T) ** 2)
    assert stage.sample_flops(stage.seen[0].bucket) * 2 == pytest.approx(products + attention,
                                                                     rel=0.01)


@pytest.mark.parametrize("arm", (("generation",), ("understanding",)))
def test_training_arms(arm, init, monkeypatch):
    """An arm of MoS App. B.5 trains what it uses, and nothing else."""
    validate_on_few(monkeypatch.setattr, 2)
    stage = make_stage(init, model={"edit_inputs": arm}, batch=4)
    stage.begin(0)
    inputs = stage.inputs(0)
    loss, _ = stage(*inputs)
    other = [torch.rand_like(a) if i in (5, 6) else a for i, a in enumerate(inputs)]
    kept = 5 if arm == ("generation",) else 6  # images or reference are not looked at
    assert stage(*[other[i] if i == kept else a for i, a in enumerate(inputs)])[0] == loss
    assert stage(*[a if i == kept else other[i] for i, a in enumerate(inputs)])[0] != loss
    assert len(stage.without_gradient()) == (arm == ("understanding",))
    assert inputs[-1].shape[1] - inputs[8].shape[1] == (16 if arm == ("understanding",) else 0)


def test_one_batch_is_learned_through_the_picture():
    """The loss falls fivefold though noise, t and text are the same: the reference tells targets.
    """
    colours = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    images = colours[:, :, None, None].float().expand(-1, -1, 32, 32)
    for arm, steps in (("generation", 30), ("understanding", 60)):
        model = make_model(edit_inputs=(arm,))
        torch.nn.init.zeros_(model.generation.head.weight)
        tokens, losses = model.tokenizer.batch(["a star"] * 4), []
        z0, z1 = torch.randn(4, 6, 2, 2), torch.randn(1, 6, 2, 2).expand(4, -1, -1, -1)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 3e-3)
        for _ in range(steps):
            losses.append(model.loss(z0, tokens, torch.ones(4), z1, images=images,
                                     reference=z0.flip(0)).mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0] > 1 and losses[-1] < losses[0] / 5, arm


def test_a_short_run(init, tmp_path, monkeypatch):
    """Both losses fall, only router and generation tower change, settings are the checkpoint's."""
    validate_on_few(monkeypatch.setattr, 2)
    monkeypatch.setattr(EditStage, "validate", lambda *_: {"val_loss": 1.0})
    assert train.run_stage(prepare("edit", tmp_path, init=str(init), steps=30, batch=8, lr=5e-3,
                                   warmup=0, edit_inputs=("generation",)))
    rows = list(csv.DictReader((tmp_path / "edit.csv").open()))
    for name in ("draw_loss", "edit_loss"):
        losses = [float(row[name]) for row in rows if row.get(name)]
        assert len(losses) == 30 and sum(losses[-8:]) < 0.9 * sum(losses[:8])
    old, new = (MoS.from_pretrained(folder) for folder in (init, tmp_path))
    assert new.config == replace(old.config, edit_inputs=("generation",))
    changed = {name.split(".")[0] for (name, a), b in zip(old.state_dict().items(),
                                                          new.state_dict().values())
               if not torch.equal(a, b)}
    assert changed == {"router", "generation"} and new.generation.reference.any()


def test_what_is_not_overwritten(init, tmp_path):
    """Stage edit begins with the weights of --init; it replaces none but those that stage image
    can write again.
    """
    (tmp_path / "mos.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="stage edit would overwrite .*mos.safetensors"):
        prepare("edit", tmp_path, init=str(init))
    (tmp_path / "checkpoints/image").mkdir(parents=True)
    trainer = prepare("edit", tmp_path, init=str(init))
    assert trainer.first_step == 0
    for (name, a), b in zip(MoS.from_pretrained(init).state_dict().items(),
                            trainer.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_stages_of_a_whole_run(monkeypatch, tmp_path):
    """All four for the small world, all but edit for own pictures."""
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "prepare",
                        lambda c, *_: SimpleNamespace(c=c, first_step=c.steps))
    monkeypatch.setattr(train, "run_stage",
                        lambda trainer, _: ran.append(trainer.c.stage) or True)
    for flags in ([], ["--data", "folder"], ["--stage", "edit"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        train.main()
    assert ran == ["vae", "understand", "image", "edit", "vae", "understand", "image", "edit"]


def test_a_tower_without_eyes(init):
    """A tower that reads no pictures is refused before anything is encoded."""
    model = MoS(make_config(**MODEL, und_images=False), WORDS)
    with pytest.raises(ValueError, match="reads pictures .*--und-images.*or --edit-inputs gener"):
        EditStage(model, Mixture([Edits(64, 0, number=4)]), settings("edit"), alone())


class Marked(Tokenizer):
    """Marks the places of image tokens, and what follows them, as published tokenizers do."""

    def encode(self, text, image_tokens=0):
        first, *rest = super().encode(text)
        marks = image_tokens * [self.index["<image>"]] + [self.index[":"]]
        return [first, *(marks if image_tokens else []), *rest]


def make_published(encoder):
    """A model whose tower has a published image encoder, of 4 image tokens."""
    tokenizer = Marked([*WORDS.words, "<image>"])
    model = make_model(max_tokens=80)
    model.tokenizer = tokenizer
    vision = encoder(width=32, depth=1, heads=2, hidden=48, out_width=40, image=56)
    model.understanding = Understanding(
        vocabulary=len(tokenizer), width=40, depth=5, heads=5, kv_heads=1, hidden=48,
        vision=vision, image_token=tokenizer.index["<image>"]).requires_grad_(False)
    return model


@pytest.mark.parametrize("dropout", (0.0, 1.0))
@pytest.mark.parametrize("encoder", (InternVision, PerceptionEncoder))
def test_published_towers_read_in_training_as_in_sampling(encoder, dropout, monkeypatch):
    """The picture is resized, its tokens have places in the text, also where that is dropped."""
    validate_on_few(monkeypatch.setattr, 2)
    published = make_published(encoder)
    world = Edits(64, 0, number=12)
    stage = EditStage(published, Mixture([world]),
                      settings("edit", batch=8, prompt_dropout=dropout), alone())
    stage.begin(0)
    inputs = stage.inputs(0)
    images, reference, after, tokens, *_, explore = inputs[5:]
    assert images.shape == (4, 3, 56, 56) and explore.shape == (4, tokens.shape[1], 6, 3)
    trained = published.understand(tokens, images)
    scenes = [world[i][0][0] for i in stage.seen[0].index]
    pictures = world.to_pixels(torch.stack(scenes), "cpu")
    texts = [world[i][2] for i in stage.seen[0].index]
    read = published.read(texts, "", pictures)
    rows = slice(4, 8) if dropout else slice(0, 4)  # the negative prompts are empty
    real = read.keys.mask[rows].sum(1)
    assert torch.equal(trained.keys.mask.sum(1), real) and real.min() > 4
    for i, n in enumerate(real):
        close(trained.inputs[i, :n], read.inputs[rows][i, :n], **TIGHT)
        close(trained.states[i, :n], read.states[rows][i, :n], **TIGHT)
    size = inputs[0].shape[2:]
    forward = (published.flops(inputs[1].shape[1], size)
               + published.flops(tokens.shape[1], size, edit=True))
    assert stage.flops() == pytest.approx(3 * 4 * forward)
    stage(*inputs)[0].backward()
    assert published.generation.reference.grad.any() and reference.shape == after.shape


# --- own edits -----------------------------------------------------------------------------------

HELD = {4, 5, "two stars on the gray background"}  # for validation, by the field split
LINES = {i: f"make the {shape} {colour}" for i, (shape, colour) in enumerate(
    (("circle", "red"), ("star", "blue"), ("square", "green"), ("ring", "white"), ("cross", "red"),
     ("hexagon", "yellow")))}
CAPTIONS = {1: "a blue star", 3: "a white ring", 5: "a yellow hexagon"}  # of edits
OTHERS = ["two red rings", "two stars on the gray background"]


def noise(name, width=96, height=64):
    """A picture of noise that only this name has: 96x64 needs no scaling for the model's size."""
    rng = np.random.default_rng(list(str(name).encode()))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def middle(picture):
    """The centre of a picture, 64 rows, as bytes (3, 64, 96)."""
    rows = np.asarray(picture)
    skip = (len(rows) - 64) // 2
    return torch.from_numpy(rows[skip:skip + 64].copy()).permute(2, 0, 1)


@pytest.fixture
def own(tmp_path):
    """A folder with six edits, whose sources are of another shape, and two more pictures."""
    rows = [dict(file_name=f"{i}.png", text=text, source=f"before/{i}.png", caption=CAPTIONS.get(i))
            for i, text in LINES.items()]
    rows += [dict(file_name=f"{text}.png", text=text) for text in OTHERS]
    (tmp_path / "own" / "before").mkdir(parents=True)
    for i, row in enumerate(rows):
        name = row["file_name"][:-4]
        noise(name).save(tmp_path / "own" / row["file_name"])
        if "source" in row:
            noise(f"before {name}", height=80).save(tmp_path / "own" / row["source"])
        row["split"] = "val" if i in HELD or row["text"] in HELD else "train"
    (tmp_path / "own" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "own"


def parts_of(instruction, caption):
    """The edit with this instruction, its pictures before and after, and the one of a caption."""
    i, = (i for i, text in LINES.items() if text == instruction)
    names = {text: j for j, text in CAPTIONS.items()} | {text: text for text in OTHERS}
    return i, [middle(noise(f"before {i}", height=80)), middle(noise(i)),
               middle(noise(names[caption]))], names[caption]


def open_pairs(folder, **changes):
    return Pairs(str(folder), [64], alone(), Rules(0.0, 0.0, **changes))


def test_own_edits(own):
    """A sample is the pictures before and after, cropped alike, the instruction, and beside them a
    picture with its caption; those for validation keep to themselves, and every picture has a turn.
    """
    pairs = open_pairs(own)
    assert len(pairs.sides) == 6 and (pairs.sides == (64, 96)).all() and pairs.kind == 1
    beside = Counter()
    for index in range(6):
        pictures, caption, instruction, _ = pairs.load(index, 64, 96)
        i, expected, other = parts_of(instruction, caption)
        assert torch.equal(pictures, torch.stack(expected))
        assert pairs.validation[index] == (i in HELD) == (other in HELD)
        assert (pairs.captions[index], pairs.instructions[index]) == (caption, instruction)
        beside[other] += 1
    assert beside.keys() == {1, 3, 5, *OTHERS} and max(beside.values()) == 2
    close(pairs.to_pixels(pictures, "cpu"), pictures / 127.5 - 1)


def test_more_pictures_than_edits(own):
    """Edits repeat until every picture has been drawn, those of an edit's own size beside it."""
    rows = [json.loads(line) for line in (own / "metadata.jsonl").read_text().splitlines()]
    for i in range(20):
        noise(f"new {i}", 64 if i % 2 else 96, 96 if i % 2 else 64).save(own / f"new {i}.png")
        rows.append(dict(file_name=f"new {i}.png", text=f"a star {i}", split="train"))
    for name in ("0.png", "before/0.png", "4.png", "before/4.png"):
        noise(name, 64, 96).save(own / name)
    (own / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = open_pairs(own)
    assert len(pairs.sides) == 30  # 6 edits, 25 pictures
    beside = {}
    for index in range(30):
        beside.setdefault(pairs.instructions[index], set()).add(pairs.captions[index])
    assert beside.pop(LINES[4]) | beside.pop(LINES[5]) == {CAPTIONS[5], OTHERS[1]}  # held back
    assert [len(beside[LINES[i]]) for i in range(4)] == [5] * 4
    tall = beside.pop(LINES[0])
    assert tall < {f"a star {i}" for i in range(1, 20, 2)}
    for text in beside.values():
        assert not text & {f"a star {i}" for i in range(1, 20, 2)}


def test_what_each_stage_learns_from_own_edits(own, capsys):
    """Instructions are no captions: they are read by the tower, about the picture before."""
    def learned(stage):
        data = Pictures(str(own), [64], alone(), Rules(0.0, 0.0, stage=stage))
        return {(os.path.relpath(data.paths[i], own), text) for i, text in enumerate(data.captions)}

    others = {(f"{text}.png", text) for text in OTHERS}
    after = {(f"{i}.png", text) for i, text in LINES.items()}
    assert learned("vae") == others | after and learned("edit") == after
    assert "not drawn" not in capsys.readouterr().out
    assert learned("image") == others | {(f"{i}.png", text) for i, text in CAPTIONS.items()}
    assert "not drawn from text: 3 edits without a field caption\n" in capsys.readouterr().out
    assert learned("understand") == others | {
        (f"before/{i}.png", f"{text} {CAPTIONS.get(i, '')}".strip()) for i, text in LINES.items()}


@pytest.mark.parametrize("tower", ("small", "published", "text"))
def test_training_on_own_edits(tower, own, init):
    """Each batch holds what the files show, for all kinds of towers; none is for validation."""
    model = make_published(InternVision) if tower == "published" else MoS.from_pretrained(init)
    if tower == "text":
        model.understanding.vision = None
        model.config.edit_inputs = ("generation",)
    pairs = open_pairs(own)
    stage = EditStage(model, Mixture([pairs]), settings("edit", batch=8, prompt_dropout=0.0,
                                                         data=str(own), steps=9), alone())
    stage.begin(0)
    seen = set()
    for step in range(2):
        inputs = stage.inputs(step)
        scene, prompts, *_, images, before, after, instructions, _, _, explore = inputs
        places = {"small": 24, "published": 4, "text": 0}[tower]  # of image tokens
        in_text = 4 if tower == "published" else 0
        assert explore.shape[1] == instructions.shape[1] + places - in_text
        for b in range(4):
            texts = [model.tokenizer.decode(id for id in ids[1:] if id > 0)
                     for ids in (prompts[b], instructions[b])]
            i, pictures, other = parts_of(texts[1].removeprefix(in_text * "<image> " + ": "),
                                          texts[0])
            assert i not in HELD and other not in HELD
            seen |= {i, other}
            pixels = torch.stack(pictures) / 127.5 - 1
            with torch.no_grad():
                latents = model.vae.encode(pixels)
            close(torch.stack((before[b], after[b], scene[b])), latents, rtol=1e-4, atol=1e-5)
            shown = pixels[:1]
            if tower == "published":
                shown, _ = model.understanding.vision.resize(shown)
            close(images[b], shown[0])
    assert seen == {0, 1, 2, 3, "two red rings"}
    loss, metrics = stage(*inputs)
    assert loss.item() == pytest.approx((metrics["draw"] + metrics["edit"]).item() / 2)
    size = scene.shape[2:]
    forward = (model.flops(prompts.shape[1], size)
               + model.flops(instructions.shape[1] + places - in_text, size, edit=True))
    assert stage.flops() == pytest.approx(2 * 3 * 4 * forward)


def test_validation_on_own_edits(own, init, tmp_path, monkeypatch):
    """val_edit and the sheet are of edits that are held back: before, edited, and as it should be.
    """
    model = MoS.from_pretrained(init)
    stage = EditStage(model, Mixture([open_pairs(own)]), settings("edit", batch=8), alone())
    stage.begin(0)
    held = sorted(HELD - {*OTHERS})
    assert [text for _, text in stage.val_texts] == [LINES[i] for i in held]
    before = [Image.fromarray(middle(noise(f"before {i}", height=80)).permute(1, 2, 0).numpy())
              for i in held]
    calls = []
    monkeypatch.setattr(model, "generate", lambda prompts, **_: pictures(2, 64, 96))
    monkeypatch.setattr(model, "edit", lambda *given, **_: calls.append(given) or before[::-1])
    values = stage.validate(7, tmp_path)
    assert calls == [(before, [LINES[i] for i in held])]
    assert not any(name.startswith("edits") for name in values)
    drawn = [noise(name) for name in (5, OTHERS[1])]
    with torch.no_grad():
        source, target, other = (model.vae.encode(to_pixels(images)) for images in
                                 (before, [noise(i) for i in held], drawn))
        losses = scores.losses_by_time(model, other,
                                       model.tokenizer.batch([CAPTIONS[5], OTHERS[1]]))
        assert values["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        tokens = model.tokenizer.batch([LINES[i] for i in held])
        losses = scores.losses_by_time(model, target, tokens, to_pixels(before), source)
        wanted = [to_image(picture) for picture in model.vae.decode(target)]
    assert values["val_edit"] == pytest.approx(losses.mean().item(), rel=1e-4)
    sheet = Image.open(tmp_path / "edited_000007.png")
    assert sheet.size == (196, 200)
    rows = [[sheet.crop((left, top, left + 96, top + 64)) for left in (0, 100)]
            for top in (0, 68, 136)]
    assert same(sum(rows, []), [*before, *before[::-1], *wanted])


@pytest.mark.parametrize("change, message", (
    (dict(source=None), "no line of a metadata.jsonl has a source"),
    (dict(source="laion"), "no line of a metadata.jsonl has a source"),  # where a picture is from
    (dict(caption=None), "nothing to draw from text: every line is an edit"),
    (dict(source="gone.png"), "6 of 6 samples cannot be used.*0.png: its source is not there"),
    (dict(source="flat.png"), "0.png: its source: a side below 32 pixels"),
    (dict(text=None), "0.png: its caption is empty"), (dict(source=5), "no line of a metadata")))
def test_own_edits_that_cannot_be_used(change, message, own):
    """A folder without edits, without anything to draw from text, or with broken sources."""
    Image.new("RGB", (64, 16)).save(own / "flat.png")
    rows = [json.loads(line) for line in (own / "metadata.jsonl").read_text().splitlines()]
    rows = [{"caption": "a star"} | row | change for row in rows[:6]]
    (own / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        open_pairs(own)
    tarfile.open(own / "a.tar", "w").close()
    with pytest.raises(ValueError, match="no line of a metadata.jsonl has a source"):
        open_pairs(own / "a.tar")


def test_other_instructions_are_another_run(own):
    """What a run has learned from is told by its instructions, too."""
    first = Mixture([open_pairs(own)]).captions_digest()
    text = (own / "metadata.jsonl").read_text()
    (own / "metadata.jsonl").write_text(text.replace("make the circle red", "make the circle blue"))
    assert Mixture([open_pairs(own)]).captions_digest() != first
