"""Training follows the recipe: its settings, first values, draws, losses, steps and validations.

Each is compared with the paper's numbers, or with formulas that are written out here in numpy.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from training import MODEL, WORDS, alone, prepare, settings, validate_on_few

import config
import stages
from common import to_image
from config import MoSConfig, TrainConfig, read_recipe
from conftest import ROOT, make_config, same
from data.sources import Mixture, open_sources
from data.states import Cache
from mos import MoS, sample_t, unfilled
from towers import Tokenizer
from world import edits, scores, shapes
from world.dataset import WORLDS

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
LARGE = ("mos_s", "mos_l", "ablation_1b")
every_stage = pytest.mark.parametrize("stage", config.STAGES)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A folder with a small model of random weights, which always explores."""
    folder = tmp_path_factory.mktemp("recipe") / "init"
    torch.manual_seed(0)
    model = MoS(make_config(**MODEL, epsilon=1.0), Tokenizer(WORDS))
    for p in [*model.generation.parameters(), *model.router.parameters()]:
        p.data.add_(0.05 * torch.randn_like(p))  # the output layer starts at zero
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def double():
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def begun(init, monkeypatch):
    """Call begun(stage, **settings) for a stage of the small model that has opened its data."""
    def call(stage, **changes):
        c = settings(stage, init=str(init), **changes)
        data = open_sources(c, make_config(**MODEL), alone())
        stage = stages.KINDS[stage](MoS.from_pretrained(init), data, c, alone())
        stage.begin(0)
        return stage
    validate_on_few(monkeypatch.setattr)
    return call


# --- Settings -------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_are_the_papers(recipe):
    """Routing, optimizer and guidance of MoS sec. 3 and App. A; states are normed in the large."""
    tables = read_recipe(recipe)
    model = MoSConfig(**tables.pop("model"))
    assert (model.k, model.epsilon, model.renormalize, model.tokenwise) == (2, 0.05, False, True)
    assert model.router_inputs == ("prompt", "latent", "time") and model.router_depth == 2
    assert model.edit_inputs == ("understanding", "generation") and model.registers == 4
    assert (model.rescale, model.sampling_steps, model.schedule) == (0.7, 50, "uniform")
    large = recipe in LARGE
    assert model.state_norm == ("pre" if large else "post")
    assert (model.t_sampling, model.shift) == (("logit-normal", 1) if large else ("mode", 3))
    assert tables.keys() == ({"image"} if large else set(config.STAGES))
    for stage, values in tables.items():
        c = TrainConfig(**values, out="")
        assert (c.weight_decay, c.clip, c.prompt_dropout) == (0.01, 1.0, 0.1), stage
        assert c.kl_weight == 1e-4 and c.tasks == () and c.data == "shapes", stage
        if large:
            assert (c.lr, c.final_lr * c.lr, c.warmup) == (1e-4, pytest.approx(1.5e-5), 4000)
            assert (c.batch, c.steps) == (2048, 400_000) and 0.999 <= c.ema < 1
            assert model.guidance == model.edit_guidance == 5.0


def test_a_stages_own_value_goes_above_the_shared_one(tmp_path):
    """[train] is for all stages, a stage's own table for it alone."""
    text = (ROOT / "recipes" / "laptop.toml").read_text()
    (tmp_path / "own.toml").write_text(text.replace("[vae]\n", "[vae]\nclip = 3.0\n"))
    tables = read_recipe(str(tmp_path / "own.toml"))
    assert [tables[stage]["clip"] for stage in config.STAGES] == [3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("phase, size, t_sampling, shift, batch", (
    ("512", 512, "logit-normal", 1.0, 2048), ("1024", 1024, "mode", 3.0, 1024),
    ("aesthetic", 1024, "mode", 3.0, 1024), ("2048", 2048, "mode", 3.0, 1024)))
@pytest.mark.parametrize("recipe", ("mos_s", "mos_l"))
def test_phases_are_the_papers(recipe, phase, size, t_sampling, shift, batch):
    """Sizes, times and batches of MoS sec. 3.5; from 1024 pixels on activations are recomputed."""
    tables = read_recipe(recipe, phase)
    model, image = tables["model"], tables["image"]
    assert [model[name] for name in ("size", "t_sampling", "shift")] == [size, t_sampling, shift]
    assert (image["batch"], image["recompute"]) == (batch, size > 512)


# --- First values ---------------------------------------------------------------------------------

def first_values(module):
    """Yield names and first values of a module's parameters, of one block of each kind."""
    for name, p in module.named_parameters():
        if "blocks." not in name or "blocks.0." in name:
            values = torch.full([min(side, 256) for side in p.shape], math.nan)
            module.init_parameter(name, values)
            yield name, values


def check_normal(name, values, mean, std):
    """Fail unless values have this mean and standard deviation (5 sigma)."""
    tolerance = 5 * std / values.numel() ** 0.5
    assert abs(values.mean() - mean) <= tolerance, name
    assert values.numel() == 1 or abs(values.std() - std) <= tolerance, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_values(recipe):
    """The output layer is 0, norms are 1, all else is random; Proj's bias, too, unlike others'."""
    torch.manual_seed(0)
    c = MoSConfig(**read_recipe(recipe)["model"])
    model = unfilled(c)
    for part, depth in (("generation", c.gen_depth), ("router", c.router_depth),
                        ("understanding", c.und_depth)):
        for name, values in first_values(getattr(model, part)):
            constant = name.endswith("bias") and name != "proj.bias"
            if constant or part == "generation" and name in ("head.weight", "reference"):
                check_normal(name, values, 0.0, 0.0)
            elif "norm" in name:
                check_normal(name, values, 1.0, 0.0)
            elif name == "embedding.weight":
                check_normal(name, values, 0.0, 0.1)
            elif name.startswith("vision."):
                check_normal(name, values, 0.0, (2 / values[0].numel()) ** 0.5)
            elif name.endswith(("out.weight", "down.weight")):  # residual branches end in these
                check_normal(name, values, 0.0, 0.02 / (2 * depth) ** 0.5)
            else:
                check_normal(name, values, 0.0, 0.02)


def test_first_values_of_the_vae():
    """Those of PyTorch's convolutions, but biases 0; its norms are 1."""
    torch.manual_seed(0)
    for name, values in first_values(unfilled(make_config()).vae):
        if values.ndim in (2, 4):
            bound = values[0].numel() ** -0.5
            assert values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.2), name
        else:
            assert (values == ("gamma" in name)).all(), name


def test_a_stage_begins_with_first_values(light, init, tmp_path):
    """Stage image does not go on from weights in --init; every seed begins with its own."""
    begun = [prepare("image", tmp_path, init=str(init), seed=seed).model for seed in (0, 0, 1)]
    for model in begun:
        assert not model.generation.head.weight.any() and not model.generation.reference.any()
    for name in ("generation.proj.bias", "router.logits.weight", "generation.registers"):
        first, again, other = (model.state_dict()[name] for model in begun)
        assert torch.equal(first, again) and not torch.isclose(first, other).any(), name
        assert first.std().item() == pytest.approx(0.02, rel=0.3), name
    first, second, *_ = begun[0].generation.blocks
    assert not torch.isclose(first.qkv.weight, second.qkv.weight).all()


@pytest.mark.parametrize("recompute", (False, True))
def test_recompute_reaches_the_blocks(recompute, light, init, tmp_path):
    """Activation checkpointing is on where the recipe says so."""
    model = prepare("image", tmp_path, init=str(init), recompute=recompute).model
    assert {block.recompute for block in model.generation.blocks} == {recompute}


# --- Random draws ---------------------------------------------------------------------------------

def test_times_follow_the_settings(init):
    """Stage image draws t as `sample_t` does with the recipe's distribution and shift."""
    kinds = [*product(("logit-normal", "mode"), (1.0, 3.0))]
    expected = {kind: sample_t(20_000, *kind, torch.Generator().manual_seed(1)).sort().values
                for kind in kinds}
    for kind in kinds:
        model = MoS.from_pretrained(init, t_sampling=kind[0], shift=kind[1])
        t = flow(model, 20_000, 0).t.sort().values
        far = {other: (t - values).abs().mean() for other, values in expected.items()}
        assert far.pop(kind) < 0.005 and min(far.values()) > 0.02, kind


def flow(model, number, step):
    """What stage image draws for a step: a batch of latents of one value and prompts of two."""
    data = Mixture([WORLDS["image"](64, 0, number=16)])
    stage = stages.ImageStage(model, data, settings("image", batch=number), alone())
    tokens = torch.full((number, 2), 5)
    return stage.random_inputs(torch.zeros(number, 6, 1, 1), tokens, stage.generator(step))


def test_draws_are_independent(init):
    """Times, noise and exploration differ by sample, value, token, layer, block and step."""
    n, model = 4000, MoS.from_pretrained(init)
    flows = [flow(model, n, step) for step in (0, 1)]
    for drawn in flows:
        assert drawn.explore.shape == (n, 2, 5 + 1, 3)
        for values, mean, std in ((drawn.z1, 0.0, 1.0), (drawn.explore, 0.5, 12 ** -0.5)):
            assert abs(values.mean() - mean) < 0.03 and abs(values.std() - std) < 0.03
    columns = torch.cat([part.reshape(n, -1) for drawn in flows
                         for part in (drawn.t, drawn.z1, drawn.explore)], 1)
    assert all(len(column.unique()) > 0.99 * n for column in columns.T)
    correlation = columns.T.corrcoef() - torch.eye(columns.shape[1])
    assert (correlation.abs() < 6 / n ** 0.5).all()


def test_both_halves_of_stage_edit_draw_their_own(begun):
    """An edit and the picture drawn beside it share neither time nor noise nor exploration."""
    inputs = begun("edit", batch=8).inputs(0)
    drawing, editing = stages.Flow(*inputs[:5]), stages.Flow(*inputs[7:])
    assert not set(drawing.t.tolist()) & set(editing.t.tolist())
    assert not torch.isclose(drawing.z1, editing.z1).all((1, 2, 3)).any()
    assert not (drawing.explore[:, 0] == editing.explore[:, 0]).all((1, 2)).any()


def test_noise_of_stage_vae(begun):
    """It is standard normal and differs in every value."""
    _, noise = begun("vae", batch=32).inputs(0)
    assert noise.shape == (32, 6, 4, 4) and len(noise.unique()) > 0.99 * noise.numel()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


# --- Losses ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_vaes_loss(begun):
    """L1 of a sample of the posterior, plus kl_weight times its KL divergence from a normal."""
    stage = begun("vae", kl_weight=0.5)
    x, noise = stage.inputs(0)
    loss, metrics = stage(x, noise)
    vae = stage.model.vae
    mean, log_variance = (a.double().numpy() for a in vae.posterior(x))
    z = mean + np.exp(log_variance / 2) * noise.numpy()
    error = vae.reconstruct(torch.tensor(z).float()).numpy() - x.numpy()
    kl = 0.5 * (mean ** 2 + np.exp(log_variance) - 1 - log_variance).mean()
    assert loss.item() == pytest.approx(np.abs(error).mean() + 0.5 * kl, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["psnr"].item() == pytest.approx(10 * math.log10(4 / (error ** 2).mean()))


def cross_entropy(logits, targets):
    """Loss, share of tokens and share of texts that are right; targets of -100 do not count."""
    losses, right = [], []
    for rows, wanted in zip(logits, targets):
        counted = wanted != -100
        rows, wanted = rows[counted], wanted[counted]
        chances = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        losses.append(-np.log(chances[range(len(wanted)), wanted]).mean())
        right.append(rows.argmax(1) == wanted)
    return np.mean(losses), np.concatenate(right).mean(), np.mean([each.all() for each in right])


@torch.no_grad()
def test_the_towers_loss(begun):
    """Cross entropy, by sample, of captions alone plus that of texts about pictures."""
    stage = begun("understand", batch=6)
    pictures, captions, caption_targets, about, about_targets = stage.inputs(0)
    U = stage.model.understanding

    def logits(tokens, images=None):
        states = U(U.embed(tokens, images))[:, -tokens.shape[1]:]
        return U.logits(states).double().numpy()

    seeing = logits(about, pictures)
    best = torch.from_numpy(seeing.argmax(-1))
    known = about_targets != -100
    known[2:] = False  # two texts are right, in two a token, in two none
    known[2:4] = (about_targets[2:4] != -100).int().cumsum(1) == 1
    about_targets = torch.where(known, best, about_targets)
    assert len(set((about_targets != -100).sum(1).tolist())) > 1
    caption_loss, *_ = cross_entropy(logits(captions), caption_targets.numpy())
    picture_loss, tokens, texts = cross_entropy(seeing, about_targets.numpy())
    loss, metrics = stage(pictures, captions, caption_targets, about, about_targets)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(dict(
        caption_loss=caption_loss, picture_loss=picture_loss, token_accuracy=tokens,
        text_accuracy=texts), rel=1e-5)
    assert loss.item() == pytest.approx(caption_loss + picture_loss, rel=1e-5)
    assert texts == pytest.approx(1 / 3) and 0 < tokens < 1


def velocity_loss(model, flow, images=None, reference=None):
    """The squared error of the velocity, for each sample; each layer choice is explored."""
    z0, z1 = flow.z0.numpy(), flow.z1.numpy()
    t = flow.t.numpy()[:, None, None, None]
    z = torch.from_numpy((1 - t) * z0 + t * z1)
    v = model(z, flow.t, model.understand(flow.tokens, images), flow.explore, reference)
    assert not torch.allclose(v, model(z, flow.t, model.understand(flow.tokens, images),
                                       None, reference), rtol=1e-3, atol=1e-3)
    return ((v.numpy() - (z1 - z0)) ** 2).mean((1, 2, 3))


def in_bins(losses, t):
    """Sums and counts of losses in the tenths of [0, 1) that their times lie in."""
    tenths = np.floor(t * 10).astype(int)
    return [[values[tenths == i].sum() for i in range(10)] for values in (losses, 0 * losses + 1)]


@torch.no_grad()
def test_the_loss_of_stage_image(begun):
    """The velocity's error, a mean over samples, with exploration; the log has it by time."""
    stage = begun("image", batch=6)
    drawn = stages.Flow(*stage.inputs(0))._replace(
        t=torch.tensor([0.04, 0.17, 0.55, 0.58, 0.96, 0.999]))
    assert drawn.tokens.shape[1] == stage.seen[0].bucket.length < MODEL["max_tokens"]
    losses = velocity_loss(stage.model, drawn)
    loss, metrics = stage(*drawn)
    assert loss.item() == pytest.approx(losses.mean(), rel=1e-4)
    sums, counts = in_bins(losses, drawn.t.numpy())
    assert metrics["bins"].tolist() == pytest.approx(sums, rel=1e-4)
    assert metrics["counts"].tolist() == counts == [1, 1, 0, 0, 0, 2, 0, 0, 0, 2]
    averages = stage.average_metrics(metrics, 1)
    assert averages["loss_t5"] == pytest.approx(losses[2:4].mean(), rel=1e-4)
    context = stage.model.understand(drawn.tokens)  # as a producer or a folder would give it
    assert stage(*drawn, context.inputs, context.states)[0].item() == loss.item()
    assert stage(*drawn, context.inputs, context.states.flip(2))[0].item() != loss.item()


def test_states_in_a_folder_are_the_towers(init, tmp_path):
    """Each prompt gets its own embeddings and states back, whatever the order of the captions."""
    model = MoS.from_pretrained(init)
    texts = ["two stars", "a blue ring above a red cross", "a red circle", "four green squares"]
    states = Cache(tmp_path / "states", model, texts, init, alone())
    tokens = model.tokenizer.batch([texts[2], "", texts[1], texts[3]])
    states.ask(tokens[:1])
    states.ask(tokens)
    assert [len(part) for part in states.answer("cpu")] == [1, 1]
    context, real = model.understand(tokens), tokens != Tokenizer.PAD
    for ours, theirs in zip(states.answer("cpu"), (context.inputs, context.states), strict=True):
        torch.testing.assert_close(ours[real], theirs[real])


@torch.no_grad()
def test_the_loss_of_stage_edit(begun):
    """Half is drawing, as in stage image; half is editing, with picture, reference, exploration."""
    stage = begun("edit", batch=8)
    inputs = stage.inputs(0)
    drawing, (images, reference), editing = inputs[:5], inputs[5:7], inputs[7:]
    drawn = velocity_loss(stage.model, stages.Flow(*drawing))
    edited = velocity_loss(stage.model, stages.Flow(*editing), images, reference)
    loss, metrics = stage(*inputs)
    assert loss.item() == pytest.approx((drawn.mean() + edited.mean()) / 2, rel=1e-4)
    assert metrics["draw"].item() == pytest.approx(drawn.mean(), rel=1e-4)
    assert metrics["edit"].item() == pytest.approx(edited.mean(), rel=1e-4)
    sums, counts = in_bins(np.concatenate((drawn, edited)),
                           torch.cat((drawing[2], editing[2])).numpy())
    assert metrics["bins"].tolist() == pytest.approx(sums, rel=1e-4)
    assert metrics["counts"].tolist() == counts
    means = stage.average_metrics({name: 3 * value for name, value in metrics.items()}, 3)
    assert (means["draw_loss"], means["edit_loss"]) == pytest.approx((drawn.mean(), edited.mean()),
                                                                     rel=1e-4)


# --- The optimizer's step -------------------------------------------------------------------------

@every_stage
def test_two_steps_are_adamw_written_out(stage, double, light, init, tmp_path, monkeypatch):
    """Rate by schedule, betas 0.9 and 0.95, decay of matrices alone, clipping, then the average."""
    trainer = prepare(stage, tmp_path, init=str(init), micro_batch=2, lr=0.01, final_lr=0.2,
                      warmup=4, steps=40, weight_decay=0.3, clip=0.01, ema=0.3)
    trainer.begin()
    draw, named = trainer.stage.inputs, trainer.named
    matrices = [module.weight for module in trainer.module.modules()
                if isinstance(module, (nn.Linear, nn.Conv2d))]
    decay = [0.3 * any(p is matrix for matrix in matrices) for _, p in named]
    expected = [p.detach().numpy().copy() for _, p in named]
    average = [p.copy() for p in expected]
    m, v = ([0 * p for p in expected] for _ in range(2))
    rates = {1: 0.01 * 2 / 4, 22: 0.01 * (0.2 + 0.8 * 0.5)}  # in the warm-up, half down the cosine
    for number, (step, rate) in enumerate(rates.items(), 1):
        inputs = draw(step)
        monkeypatch.setattr(trainer.stage, "inputs", lambda _, inputs=inputs: inputs)
        gradients = torch.autograd.grad(trainer.stage(*inputs)[0], [p for _, p in named])
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert norm > 0.02  # clipping shortens it
        trainer.step(step)
        part = max(0.7, 9 / (10 + step))  # of the average that is new
        for i, (name, p) in enumerate(named):
            g = gradients[i].numpy() * 0.01 / (norm + 1e-6)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g ** 2
            expected[i] *= 1 - rate * decay[i]
            expected[i] -= (rate * m[i] / (1 - 0.9 ** number)
                            / (np.sqrt(v[i] / (1 - 0.95 ** number)) + 1e-8))
            average[i] += part * (expected[i] - average[i])
            for ours, theirs in ((p, expected[i]), (trainer.average.shadow[i], average[i])):
                np.testing.assert_allclose(ours.detach().numpy(), theirs, 1e-6, 1e-9, err_msg=name)
    assert 0 < sum(map(bool, decay)) < len(decay)


# --- Validations ----------------------------------------------------------------------------------

@every_stage
def test_unseen_scenes_are_of_the_same_world(stage, begun):
    """Validation shows the training's size, tasks and grid, and what the stage trains on."""
    kind = begun(stage, tasks=("colours",), grid=8, seed=3)
    assert kind.dataset.scenes.seed == 3
    world, = kind.unseen(6).sources
    assert type(world) is WORLDS[stage] and (world.size, world.seed, world.split) == (64, 3, "val")
    assert len(world.sides) == 6
    for i in range(6):
        scene, prompt, *_ = world.scene(i)
        assert prompt.task == "colours" and shapes.in_split(scene, "val")
        edit = world.edit(i)
        assert shapes.in_split(edit.source, "val")
        for shown in (scene, edit.source, edit.target):
            assert {place * 8 % 1 for o in shown.objects for place in (o.x, o.y)} == {0}


@torch.no_grad()
def test_the_validation_of_stage_vae(begun, monkeypatch, tmp_path):
    """PSNR of unseen pictures; statistics of their latents; the judge sees this VAE's pictures."""
    stage, judged = begun("vae"), []
    monkeypatch.setattr(scores, "score_judge", lambda number, **given: judged.append(
        (number, given["vae"], given["split"])) or (37, 0.0))
    vae = stage.model.vae
    true, = stage.validation_batch(200)
    latents, _ = vae.posterior(true)
    error = (vae.reconstruct(latents).clamp(-1, 1) - true).square().mean().item()
    stage.complete()
    values = stage.validate(7, tmp_path)
    assert values == pytest.approx(dict(val_psnr=10 * math.log10(4 / error), val_judge=0.37))
    assert judged == [(100, vae, "val")]
    assert torch.allclose(vae.latents_mean.flatten(), latents.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(vae.latents_std.flatten(), latents.std((0, 2, 3)), atol=1e-5)
    assert torch.allclose(vae.encode(true).mean((0, 2, 3)), torch.zeros(6), atol=1e-4)


@torch.no_grad()
def test_the_validation_of_stage_understand(begun, monkeypatch, tmp_path):
    """The loss of unseen texts, and the share of unseen questions that are answered."""
    stage = begun("understand")
    monkeypatch.setattr(scores, "score_understanding", lambda model, number: number // 4)
    loss, _ = stage(*stage.validation_batch(200))
    assert stage.validate(7, tmp_path) == pytest.approx(dict(val_loss=loss.item(), val_answers=.25))


@pytest.fixture
def scored(begun, monkeypatch, tmp_path):
    """Call scored(stage, **settings) for a stage, what it validates, and what it draws."""
    def call(stage, **changes):
        stage, drawn = begun(stage, **changes), []
        blank = Image.new("RGB", (64, 64))
        monkeypatch.setattr(stage.model, "generate", lambda prompts, **_: drawn.append(
            prompts) or [blank] * len(prompts))
        monkeypatch.setattr(stage.model, "edit", lambda images, texts, **_: drawn.append(
            [*zip(images, texts)]) or images)
        return stage, stage.validate(7, tmp_path), drawn
    return call


def losses_by_time(model, z0, tokens, images=None, reference=None):
    """The mean loss at each of eight times, with noise of seed 1."""
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    return [model.loss(z0, tokens, torch.full((len(z0),), (2 * i + 1) / 16), z1, images=images,
                       reference=reference).mean().item() for i in range(8)]


@torch.no_grad()
def test_the_validation_of_stage_image(scored, monkeypatch):
    """Losses by time, the router's entropy over layers and its choices, scores of each task."""
    asked = []
    monkeypatch.setattr(scores, "score_tasks", lambda model, number, *_, **given: asked.append(
        (number, given["splits"], given["tasks"])) or {
            task: {"seen": [i + 1, 10, 7]} for i, task in enumerate(given["tasks"])})
    stage, values, drawn = scored("image", tasks=("counting", "dense", "colours"), eval_prompts=3)
    assert asked == [(3, ("seen",), ["counting", "colours"])]
    assert {name: value for name, value in values.items() if "score" in name} == pytest.approx(
        dict(score=0.15, score_counting=0.1, score_colours=0.2))
    assert [len(prompts) for prompts in drawn] == [24]
    model, (z0, tokens) = stage.model, stage.val
    losses = losses_by_time(model, z0, tokens)
    assert [values[f"val_t{i}"] for i in range(8)] == pytest.approx(losses, rel=1e-4)
    assert values["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    context = model.understand(tokens)
    weights = model.route(*model.generation.patchify((z0 + z1) / 2), torch.full((len(z0),), 0.5),
                          context).numpy()[(tokens != Tokenizer.PAD).numpy()]   # (P, M, N)
    for j in range(3):
        w = weights[:, :, j]
        assert values[f"entropy_{j}"] == pytest.approx(-(w * np.log(w)).sum(1).mean(), rel=1e-4)
        best = np.argsort(-w, 1)[:, :2]
        for layer in range(5):
            share = (best == layer).any(1).mean()
            assert values[f"usage_{j}_{layer}"] == pytest.approx(share, abs=1e-4)


@torch.no_grad()
def test_the_validation_of_stage_edit(scored, monkeypatch):
    """Unseen edits: the loss of the target, given the source; what counts is asked and kept."""
    monkeypatch.setattr(scores, "score_tasks", lambda *_, tasks, **__: {
        task: {"seen": [1, 2, 2]} for task in tasks})
    table = {"seen, asked": [7, 8, 5], "seen, kept": [5, 8, 5], "seen, both": [4, 8, 5]}
    asked = []
    monkeypatch.setattr(scores, "score_edits", lambda model, number, **given: asked.append(
        (number, given["splits"])) or {"add": table, "style": {row: [1, 8, 5] for row in table}})
    stage, values, drawn = scored("edit", batch=8, eval_prompts=3)
    assert asked == [(3, ("seen",))]
    named = {name: value for name, value in values.items() if name.startswith("edits")}
    assert named == dict(edits=(4 + 1) / 16, edits_add=0.5, edits_style=0.125)
    world, vae = stage.unseen(8).sources[0], stage.model.vae
    z0, instructions, images, reference = stage.val_edits
    assert len(z0) == 8
    for i in range(8):
        packed, caption, instruction, _ = world[i]
        pictures = world.to_pixels(packed, "cpu")
        assert torch.allclose(images[i], pictures[0])
        for latents, k in ((reference[i], 0), (z0[i], 1), (stage.val[0][i], 2)):
            assert torch.allclose(latents, vae.encode(pictures[k:k + 1])[0], atol=1e-4), k
        for row, text in ((instructions[i], instruction), (stage.val[1][i], caption)):
            ids = stage.model.tokenizer.encode(text)
            assert row[:len(ids)].tolist() == ids and (row[len(ids):] == Tokenizer.PAD).all()
    losses = losses_by_time(stage.model, z0, instructions, images, reference)
    assert [values[f"edit_t{i}"] for i in range(8)] == pytest.approx(losses, rel=1e-4)
    assert values["val_edit"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert values["val_loss"] == pytest.approx(np.mean(losses_by_time(stage.model, *stage.val)),
                                               rel=1e-4)
    shown = [edits.edit_benchmark(kind, 1)[0] for kind in edits.TYPES]
    assert [text for _, text in drawn[-1]] == [edit.text for edit in shown]
    pictures = shapes.render(shapes.pack([edit.source for edit in shown]), 64, 64)
    assert same([image for image, _ in drawn[-1]], [*map(to_image, pictures)])
