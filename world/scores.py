"""Scores of a model of the small world, separately for what training has shown and has not.

The judge recognises the content of pictures, so that counts of what it sees take the place of FID
and CLIP scores. A table is {column: {row: score}}, with the paper's columns. A score is [passed,
count, different prompts], [value, standard error], or a number alone.
"""

import math
import random
from itertools import product
from typing import NamedTuple

import torch

from common import to_image
from kernels import autocast
from mos import to_pixels
from world import edits, shapes
from world.captions import CATEGORIES, dense_benchmark, in_words, read_caption, statements
from world.dataset import Shapes
from world.judge import judge, same_scene

GENEVAL_COUNTS = dict(zip(shapes.TASKS, (80, 99, 80, 94, 100, 100)))
DENSE_COUNT = 1065  # DPG's number of prompts
EDIT_COUNT = 100    # about ImgEdit's number for each type
SCENES = {"seen": "val", "held-out": "held"}  # the splits of shapes.draw_scene
SPLITS = tuple(SCENES)


class Result(NamedTuple):
    """One judgement. value: 1 or true if all is right, else less. note: what the judge saw."""
    column: str
    row: str
    text: str
    value: float
    pictures: tuple = ()  # as PIL images, if a failure should be looked at
    note: str = ""


def tabulate(results, failures=None):
    """Return the table of Results. failures: a list that receives the first three of each kind."""
    table = {}
    texts = {}
    for r in results:
        kind = r.column, r.row
        texts.setdefault(kind, set()).add(r.text)
        column = table.setdefault(r.column, {})
        passed, count, _ = column.get(r.row, (0, 0, 0))
        column[r.row] = [passed + r.value, count + 1, len(texts[kind])]
        if failures is not None and r.pictures and r.value < 1:
            if sum(failure[:2] == kind for failure in failures) < 3:
                failures.append(r)
    return table


def figures(score):
    """Return value, standard error (binomial) and number of different prompts, None if unknown."""
    if not isinstance(score, list):
        return score, None, None
    if len(score) == 2:
        return *score, None
    passed, count, prompts = score
    p = passed / count
    return p, math.sqrt(p * (1 - p) / count), prompts  # for shares the most that it can be


def averages(table):
    """Return {row: mean score of the columns that have this row}."""
    means = {}
    for row in dict.fromkeys(row for column in table.values() for row in column):
        scores = [figures(column[row]) for column in table.values() if row in column]
        values, errors, _ = zip(*scores)
        mean = sum(values) / len(values)
        means[row] = mean if None in errors else [mean, math.hypot(*errors) / len(errors)]
    return means


def overall(table, row):
    """Return the mean of a row, GenEval's overall score."""
    return figures(averages(table)[row])[0]


def draw_and_judge(model, prompts, seed, batch, **settings):
    """Return (prompt, PIL picture, judged scene) of each prompt. Prompt i has the seed + i."""
    images = []
    for start in range(0, len(prompts), batch):
        texts = [p.text for p in prompts[start:start + batch]]
        seeds = range(seed + start, seed + start + len(texts))
        images += model.generate(texts, seed=seeds, **settings)
    return zip(prompts, images, judge(to_pixels(images)))


def score_tasks(model, prompts=None, pictures=4, seed=0, batch=64, splits=SPLITS,
                tasks=shapes.TASKS, failures=None, **settings):
    """Score GenEval's six tasks: {task: {"seen": [passed, drawn, prompts], "held-out": ...}}.

    prompts: number for each task and split, GenEval's own if None. pictures: for each prompt.
    batch: pictures drawn at once. failures: see tabulate. settings: of `MoS.generate`.
    A picture passes if the judge sees exactly what the prompt asks for.
    """
    def results():
        for task, split in product(tasks, splits):
            if task == "single object" and split == "held-out":
                continue  # one shape is no combination
            count = prompts or GENEVAL_COUNTS[task]
            wanted = [p for p in shapes.benchmark(task, count, seed, split == "held-out")
                      for _ in range(pictures)]
            for p, image, scene in draw_and_judge(model, wanted, seed, batch, **settings):
                yield Result(task, split, p.text, shapes.satisfies(p, scene), (image,),
                             f"seen: {in_words(scene)}")
    return tabulate(results(), failures)


def score_dense(model, number=None, seed=0, batch=64, splits=SPLITS, failures=None, **settings):
    """Score dense prompts: {category: {"seen": [fulfilled, stated, prompts], "held-out": ...}}.

    number: of prompts, DPG's own if None, with one picture each; other arguments: see score_tasks.
    A category's score is the share of its statements that the pictures fulfil. "overall" is DPG's,
    the mean share that a picture fulfils; "whole" is the share of pictures that fulfil all.
    """
    def results():
        for split in splits:
            pairs = dense_benchmark(number or DENSE_COUNT, seed, split == "held-out")
            prompts = [p for p, _ in pairs]
            for p, image, scene in draw_and_judge(model, prompts, seed, batch, **settings):
                judged = list(statements(p, scene))
                for category, fulfilled in judged:
                    yield Result(category, split, p.text, fulfilled)
                share = sum(fulfilled for _, fulfilled in judged) / len(judged)
                yield Result("overall", split, p.text, share, (image,), f"seen: {in_words(scene)}")
                yield Result("whole", split, p.text, share == 1)
    table = tabulate(results(), failures)
    columns = *CATEGORIES, "overall", "whole"
    return {column: table[column] for column in columns if column in table}


@torch.no_grad()
def score_edits(model, number=None, seed=0, batch=64, splits=SPLITS, types=edits.TYPES,
                failures=None, **settings):
    """Score edits: {type: {"seen, asked": [passed, drawn, texts], "seen, kept": ..., ...}}.

    asked, kept: see edits.score; both: the two together. "dB": PSNR of result and source where the
    edit must not change them. "VAE, dB": of the source after the VAE, the most that can be
    expected. "within 2 dB": the share of pictures that come so near to it. number: of each type;
    settings: of `MoS.edit`; other arguments: see score_tasks.
    """
    def results():
        for type, split in product(types, splits):
            wanted = edits.edit_benchmark(type, number or EDIT_COUNT, seed, split == "held-out")
            for start in range(0, len(wanted), batch):
                part = wanted[start:start + batch]
                seeds = range(seed + start, seed + start + len(part))
                yield from edit_and_judge(model, part, seeds, split, **settings)

    table = tabulate(results(), failures)
    for column in table.values():
        for row, (error, count, _) in column.items():
            if row.endswith(", dB"):  # not "within 2 dB", a share
                column[row] = psnr(error / count)
    return table


def edit_and_judge(model, wanted, seeds, split, **settings):
    """Yield all Results of a batch of edits."""
    size = model.config.size
    rendered = shapes.render(shapes.pack([edit.source for edit in wanted]), size, size)
    sources = [to_image(picture) for picture in rendered]
    images = model.edit(sources, [edit.text for edit in wanted], seed=seeds, **settings)
    before = to_pixels(sources)
    after = to_pixels(images)
    weights = next(model.vae.parameters())
    restored = model.vae.decode(model.vae.encode(before.to(weights))).cpu()
    for i, (edit, scene) in enumerate(zip(wanted, judge(after))):
        asked, kept = edits.score(edit, scene)
        values = {"asked": asked, "kept": kept, "both": asked and kept}
        outside = edits.outside(edit, size, size)
        if outside.any():
            error = (after[i] - before[i])[:, outside].square().mean().item()
            least = (restored[i] - before[i])[:, outside].square().mean().item()
            near = psnr(error) >= psnr(least) - 2
            values |= {"within 2 dB": near, "dB": error, "VAE, dB": least}
        for name, value in values.items():
            pictures = (sources[i], images[i]) if name == "both" else ()
            yield Result(edit.type, f"{split}, {name}", edit.text, value, pictures,
                         f"seen: {in_words(scene)}")


def psnr(error):
    """Return the PSNR in decibels for a mean squared error of pictures in [-1, 1]."""
    return 10 * math.log10(4 / error) if error else math.inf


@torch.no_grad()
def score_understanding(model, number, split="val", seed=0, batch=100):
    """Return how many of `number` questions about new pictures the tower answers word for word."""
    dataset = Shapes(model.config.size, seed, split)
    device = model.understanding.embedding.weight.device
    right = 0
    for start in range(0, number, batch):
        items = [dataset[2 * i + 1] for i in range(start, min(start + batch, number))]
        packed, _, questions, answers = zip(*items)  # items with odd indices have a question
        pairs = [model.tokenizer.ids_and_targets(*texts, length=model.config.max_tokens)
                 for texts in zip(questions, answers)]
        tokens, targets = torch.tensor(pairs, device=device).unbind(1)
        pictures = dataset.to_pixels(torch.stack(packed), device)
        _, metrics = model.understanding.loss(tokens, targets, pictures)
        right += round(metrics["text_accuracy"].item() * len(tokens))
    return right


@torch.no_grad()
def write_caption(model, picture):
    """Return the tower's caption of a picture (3, H, W) in [-1, 1], without any prompt."""
    U, tokenizer = model.understanding, model.tokenizer
    device = U.embedding.weight.device
    tokens = torch.tensor([tokenizer.encode("")], device=device)
    limit = model.config.max_tokens - tokens.shape[1]
    with autocast(device):
        ids = U.write(tokens, limit, tokenizer.stops, images=picture[None].to(device))
    return tokenizer.decode(ids)


def score_descriptions(model, number, seed=0, failures=None):
    """Score captions: {"readable": {"seen": [right, written, scenes], "held-out": ...}, ...}.

    readable: the tower's caption is one of the small world's. true: it also names each object, and
    all that it says is so. full: it also names every colour, which half of the captions that the
    tower has learned from leave open.
    """
    def results():
        for row, split in SCENES.items():
            dataset = Shapes(model.config.size, seed, split)
            for i in range(number):
                scene = dataset.scene(i)[0]
                picture = dataset.to_pixels(shapes.pack([scene]), "cpu")[0]
                text = write_caption(model, picture)
                prompt = read_caption(text)
                content = in_words(scene)
                true = bool(prompt) and shapes.satisfies(prompt, scene)
                full = true and all(o.colour for o in prompt.objects)
                yield Result("readable", row, content, bool(prompt))
                yield Result("true", row, content, true, (to_image(picture),), f"written: {text}")
                yield Result("full", row, content, full)
    return tabulate(results(), failures)


@torch.no_grad()
def losses_by_time(model, z0, tokens, images=None, reference=None):
    """Return MoS.loss of each sample at t = (i + 0.5) / 8, with fixed noise: (8, B)."""
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0.device)
    times = [torch.full_like(z0[:, 0, 0, 0], (i + 0.5) / 8) for i in range(8)]
    with autocast(z0.device):
        return torch.stack([model.loss(z0, tokens, t, z1, images=images, reference=reference)
                            for t in times])


@torch.no_grad()
def score_loss(model, number=256, seed=0):
    """Score the loss on unseen pictures: {"t=0.0625": {"seen": [mean, error], ...}, ...}."""
    device = next(model.vae.parameters()).device
    table = {}
    for row, split in SCENES.items():
        data = Shapes(model.config.size, seed, split, number=number)
        parts = []
        for start in range(0, number, 64):
            items = [data[i] for i in range(start, min(start + 64, number))]
            packed, texts, *_ = zip(*items)
            z0 = model.vae.encode(data.to_pixels(torch.stack(packed), device))
            parts.append(losses_by_time(model, z0, model.tokenizer.batch(texts).to(device)))
        losses = torch.cat(parts, 1).cpu()
        columns = {f"t={(i + 0.5) / 8:.4g}": each for i, each in enumerate(losses)}
        for name, each in {**columns, "mean": losses.mean(0)}.items():
            error = each.std(correction=0).item() / math.sqrt(number)
            table.setdefault(name, {})[row] = [each.mean().item(), error]
    return table


@torch.no_grad()
def score_judge(number, height=128, width=128, vae=None, seed=0, split="any", style="filled"):
    """Return how many of `number` renders, after any VAE, the judge reads right, and their PSNR."""
    unit = min(height, width)
    device = "cpu" if vae is None else next(vae.parameters()).device
    right, error = 0, 0.0
    for start in range(0, number, 50):
        scenes = []
        for i in range(start, min(start + 50, number)):
            rng = random.Random(f"judge {seed} {i}")
            task = shapes.draw_task(rng)
            scene = shapes.draw_scene(rng, task, split, width=width / unit, height=height / unit)
            scenes.append(scene._replace(style=style))
        true = shapes.render(shapes.pack(scenes), height, width, device)
        decoded = true if vae is None else vae.decode(vae.encode(true))
        error += (decoded - true).square().mean((1, 2, 3)).sum().item()
        stored = to_pixels([to_image(picture) for picture in decoded])
        right += sum(same_scene(*pair, unit) for pair in zip(scenes, judge(stored)))
    return right, psnr(error / number)


def score_vae(model, number, seed):
    """Score the judge after the VAE: {"right": {"seen": [right, drawn, drawn]}, "PSNR": ...}."""
    table = {"right": {}, "PSNR": {}}
    options = dict(height=model.config.size, width=model.config.size, vae=model.vae, seed=seed)
    for row, split, style in (("seen", "val", "filled"), ("held-out", "held", "filled"),
                              ("outlined", "val", "outlined")):
        right, table["PSNR"][row] = score_judge(number, split=split, style=style, **options)
        table["right"][row] = [right, number, number]
    return table


def score_sizes(number, seed):
    """Score the judge at five sizes: {"128x128": {"renders": [right, pictures, pictures]}, ...}."""
    table = {}
    for height, width in ((128, 128), (96, 96), (160, 160), (256, 256), (128, 256)):
        count = number if height == width == 128 else -(-number // 5)
        right, _ = score_judge(count, height, width, seed=seed)
        table[f"{height}x{width}"] = {"renders": [right, count, count]}
    return table
