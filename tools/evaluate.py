"""Score a checkpoint of the small world, apart for what training has shown and what it has not.

    python evaluate.py weights                     # all that it can do
    python evaluate.py weights --what tasks        # GenEval's tasks: the paper's Table 6
    python evaluate.py weights --what dense edits  # as DPG (Table 7) and ImgEdit (Table 10)
    python evaluate.py weights --what understanding descriptions  # what its tower says
    python evaluate.py weights --what loss vae     # does the judge see through the VAE?
    python evaluate.py --what judge                # the judge on its own renders
    python evaluate.py CHECKPOINT --export FOLDER --prompts evaluation_metadata.jsonl

The last one is for models of the real world: it draws GenEval's own prompts into the folders that
GenEval's own judge reads. Here a picture's content is known, and a judge that reads it without
error takes the place of FID and CLIP scores; the validation loss is the only other measure.
"""

import json
import math
import random
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from common import ROOT, CommandLine, pick_device, replacing, run
from data.sources import Collate
from kernels import autocast
from mos import MoS
from tools import report
from tools.report import Result, averages, tabulate
from world import edits, shapes
from world.captions import CATEGORIES, dense_benchmark, in_words, read_caption, statements
from world.dataset import Shapes

GENEVAL_COUNTS = dict(zip(shapes.TASKS, (80, 99, 80, 94, 100, 100)))
DENSE_COUNT, EDIT_COUNT = 1065, 100  # DPG's number of prompts; about ImgEdit's of each type
SPLITS = {False: "seen", True: "held-out"}
SCENES = {"seen": "val", "held-out": "held"}  # the splits of shapes.draw_scene


# ------------------------------------------------------------------------------------------------
# Drawing and judging

def to_tensor(image):
    """A PIL image as (3, H, W) in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def to_image(picture):
    """A picture (3, H, W) in [-1, 1] as a PIL image."""
    pixels = ((picture.cpu() + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def judge_in_parts(pictures, size=64):
    """shapes.judge over many pictures, `size` at a time."""
    return [scene for part in pictures.split(size) for scene in shapes.judge(part)]


def draw_and_judge(model, prompts, seed, batch, **settings):
    """(prompt, PIL picture, what it shows) of each prompt; prompt i is drawn with seed + i."""
    images = []
    for i in range(0, len(prompts), batch):
        texts = [p.text for p in prompts[i:i + batch]]
        seeds = [seed + i + k for k in range(len(texts))]
        images += model.generate(texts, seed=seeds, **settings)
    return zip(prompts, images, judge_in_parts(torch.stack([*map(to_tensor, images)])))


# ------------------------------------------------------------------------------------------------
# GenEval's six tasks

def score_tasks(model, prompts=None, pictures=4, seed=0, batch=64, held=(False, True),
                tasks=shapes.TASKS, failures=None, **settings):
    """The six-task score: {"task": {"seen": [passed, drawn, prompts], "held-out": ...}}.

    prompts: number for each task and split, GenEval's own counts if None; pictures: for each
    prompt; batch: drawn at once; held: which splits, False is seen and True held out; failures:
    see report.tabulate; settings: as for `MoS.generate`. A picture passes if the judge finds
    exactly what the prompt asks for. "single object" has nothing to hold out.
    """
    def results():
        for task, split in product(tasks, held):
            if split and task == "single object":
                continue
            wanted = [p for p in shapes.benchmark(task, prompts or GENEVAL_COUNTS[task], seed,
                                                  split) for _ in range(pictures)]
            for p, image, seen in draw_and_judge(model, wanted, seed, batch, **settings):
                yield Result(task, SPLITS[split], p.text, shapes.satisfies(p, seen), (image,),
                             f"seen: {in_words(seen)}")
    return tabulate(results(), failures)


def overall(table, split):
    """Mean of the tasks' scores of one split, GenEval's way."""
    return report.figures(averages(table)[split])[0]


# ------------------------------------------------------------------------------------------------
# Dense prompts, in DPG's five categories

def score_dense(model, number=None, seed=0, batch=64, held=(False, True), failures=None,
                **settings):
    """{category: {"seen": [fulfilled, stated, prompts], "held-out": ...}}, one picture a prompt.

    A category's score is the share of its statements that pictures fulfil; "overall" is DPG's, the
    mean over pictures of the share of their own; "whole" is the share of pictures that fulfil
    all. Arguments: as for `score_tasks`; DPG's number of prompts if None.
    """
    def results():
        for split in held:
            prompts = [p for p, _ in dense_benchmark(number or DENSE_COUNT, seed, split)]
            for p, image, seen in draw_and_judge(model, prompts, seed, batch, **settings):
                stated, row = list(statements(p, seen)), SPLITS[split]
                for category, fulfilled in stated:
                    yield Result(category, row, p.text, fulfilled)
                share = sum(fulfilled for _, fulfilled in stated) / len(stated)
                yield Result("overall", row, p.text, share, (image,), f"seen: {in_words(seen)}")
                yield Result("whole", row, p.text, share == 1)
    table = tabulate(results(), failures)
    return {column: table[column] for column in (*CATEGORIES, "overall", "whole")
            if column in table}


# ------------------------------------------------------------------------------------------------
# Edits, of ImgEdit's nine types

@torch.no_grad()
def score_edits(model, number=None, seed=0, batch=64, held=(False, True), types=edits.TYPES,
                failures=None, **settings):
    """{type: {"seen, asked": [passed, drawn, texts], "seen, kept": ..., "seen, both": ..., ...}}.

    asked, kept: see edits.score. "seen, dB": PSNR of result and source outside of what the text
    speaks of; "VAE, dB": of source and its round trip through the VAE, which is the most that can
    be expected; "within 2 dB": the share of pictures that come so near to it. Arguments: as for
    `score_tasks`, settings: as for `MoS.edit`.
    """
    def results():
        for type, split in product(types, held):
            wanted = edits.edit_benchmark(type, number or EDIT_COUNT, seed, split)
            for start in range(0, len(wanted), batch):
                part = wanted[start:start + batch]
                seeds = [seed + start + i for i in range(len(part))]
                yield from edit_and_judge(model, part, seeds, SPLITS[split], **settings)

    table = tabulate(results(), failures)
    for column in table.values():
        column.update({row: decibel(error / count) for row, (error, count, _) in column.items()
                       if row.endswith(", dB")})  # not "within 2 dB", a share
    return table


def edit_and_judge(model, wanted, seeds, row, **settings):
    """Yield all results of a batch of edits."""
    size = model.config.size
    sources = [to_image(p) for p in shapes.render(shapes.pack([e.source for e in wanted]), size,
                                                  size)]
    images = model.edit(sources, [e.text for e in wanted], seed=seeds, **settings)
    before, after = (torch.stack([*map(to_tensor, own)]) for own in (sources, images))
    again = model.vae.decode(model.vae.encode(before.to(next(model.vae.parameters())))).cpu()
    for i, (edit, seen) in enumerate(zip(wanted, judge_in_parts(after))):
        asked, kept = edits.score(edit, seen)
        yield Result(edit.type, f"{row}, asked", edit.text, asked)
        yield Result(edit.type, f"{row}, kept", edit.text, kept)
        yield Result(edit.type, f"{row}, both", edit.text, asked and kept,
                     (sources[i], images[i]), f"seen: {in_words(seen)}")
        outside = edits.outside(edit, size, size)
        if outside.any():
            own, least = ((picture - before[i])[:, outside].square().mean().item()
                          for picture in (after[i], again[i]))
            yield Result(edit.type, f"{row}, within 2 dB", edit.text,
                         decibel(own) >= decibel(least) - 2)
            yield Result(edit.type, f"{row}, dB", edit.text, own)
            yield Result(edit.type, f"{row}, VAE, dB", edit.text, least)


def decibel(error):
    """The PSNR of a mean squared error of pictures in [-1, 1]."""
    return 10 * math.log10(4 / error) if error else math.inf


# ------------------------------------------------------------------------------------------------
# What the understanding tower says about pictures

@torch.no_grad()
def score_understanding(model, number, split="val", seed=0, batch=100):
    """How many of `number` questions about fresh pictures the tower answers word for word."""
    dataset = Shapes(model.config.size, seed, split)
    device = model.understanding.embedding.weight.device
    collate, right = Collate("understand", model.tokenizer), 0
    for start in range(0, 2 * number, 2 * batch):  # every other item of a batch is a question
        items = [dataset[i] for i in range(start, min(start + 2 * batch, 2 * number))]
        pictures, _, _, tokens, target = (a[1::2] for a in
                                         collate(items, model.config.max_tokens))
        _, metrics = model.understanding.loss(tokens.to(device), target.to(device),
                                              dataset.to_pixels(pictures, device))
        right += round(metrics["text_accuracy"].item() * len(tokens))
    return right


@torch.no_grad()
def write_caption(model, picture):
    """What the tower writes about a picture (3, H, W) in [-1, 1] if it is asked nothing."""
    U, start = model.understanding, model.tokenizer.encode("")
    tokens = torch.tensor([start], device=U.embedding.weight.device)
    with autocast(tokens.device):
        return model.tokenizer.decode(U.write(tokens, model.config.max_tokens - len(start),
                                              model.tokenizer.stops,
                                              images=picture[None].to(tokens.device)))


def score_descriptions(model, number, seed=0, failures=None):
    """{"readable": {"seen": [right, written, scenes], "held-out": ...}, "true": ..., "full": ...}.

    readable: the tower's caption of a picture is one that the small world knows. true: also it
    names as many objects as there are, one for each, and all that it says of them, of the
    background and of relations is so. full: also it names every colour, so that its set of
    (shape, colour) is the scene's. Plain captions (half of what it learned) leave colours open.
    """
    def results():
        for row, split in SCENES.items():
            dataset = Shapes(model.config.size, seed, split)
            for i in range(number):
                scene = dataset.scene(i)[0]
                picture = dataset.to_pixels(shapes.pack([scene]), "cpu")[0]
                text = write_caption(model, picture)
                said, shown = read_caption(text), in_words(scene)
                true = bool(said) and shapes.satisfies(said, scene)
                yield Result("readable", row, shown, bool(said))
                yield Result("true", row, shown, true, (to_image(picture),), f"written: {text}")
                yield Result("full", row, shown, true and all(o.colour for o in said.objects))
    return tabulate(results(), failures)


# ------------------------------------------------------------------------------------------------
# The loss, the VAE, the judge

@torch.no_grad()
def losses_by_time(model, z0, tokens):
    """The loss of each sample at t = (i + 0.5) / 8, with fixed noise: (8, B)."""
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0)
    times = (torch.full_like(z0[:, 0, 0, 0], (i + 0.5) / 8) for i in range(8))
    with autocast(z0.device):
        return torch.stack([model.loss(z0, tokens, t, z1) for t in times])


@torch.no_grad()
def score_loss(model, number=256, seed=0):
    """The loss by time on unseen pictures: {"t=0.0625": {"seen": [mean, standard error], ...}, ...}
    """
    device, table = next(model.vae.parameters()).device, {}
    for row, split in SCENES.items():
        data, losses = Shapes(model.config.size, seed, split, number=number), []
        for start in range(0, number, 64):
            packed, texts, *_ = zip(*(data[i] for i in range(start, min(start + 64, number))))
            z0 = model.vae.encode(data.to_pixels(torch.stack(packed), device))
            losses.append(losses_by_time(model, z0, model.tokenizer.batch(texts).to(device)))
        losses = torch.cat(losses, 1).cpu()
        named = {f"t={(i + 0.5) / 8:.4g}": each for i, each in enumerate(losses)}
        for name, each in {**named, "mean": losses.mean(0)}.items():
            error = each.std(correction=0).item() / math.sqrt(number)
            table.setdefault(name, {})[row] = [each.mean().item(), error]
    return table


def same_scene(truth, seen, unit, pixels=2.0):
    """Whether a judged scene equals the true one: every object, each within `pixels`."""
    if len(truth.objects) != len(seen.objects) or truth[1:] != seen[1:]:
        return False
    left = list(seen.objects)
    for o in truth.objects:
        near = min(left, key=lambda p: math.hypot(p.x - o.x, p.y - o.y))
        if near[:3] != o[:3] or math.hypot(near.x - o.x, near.y - o.y) * unit > pixels:
            return False
        left.remove(near)
    return True


@torch.no_grad()
def score_judge(number, height=128, width=128, vae=None, seed=0, split="any", style="filled"):
    """How many of `number` fresh renders the judge reads back without a mistake, and the PSNR.

    With a VAE the judge sees the pictures after encoding and decoding. style: of all objects.
    """
    unit, right, error = min(height, width), 0, 0.0
    device = "cpu" if vae is None else next(vae.parameters()).device
    for start in range(0, number, 50):
        scenes = []
        for i in range(start, min(start + 50, number)):
            rng = random.Random(f"judge {seed} {i}")
            task = shapes.draw_task(rng)
            scene = shapes.draw_scene(rng, task, split, width / unit, height / unit)
            scenes.append(scene._replace(style=style))
        true = shapes.render(shapes.pack(scenes), height, width, device)
        seen = true if vae is None else vae.decode(vae.encode(true))
        error += (seen - true).square().mean((1, 2, 3)).sum().item()
        rounded = ((seen.cpu() + 1) * 127.5).round() / 127.5 - 1
        right += sum(same_scene(a, b, unit) for a, b in zip(scenes, shapes.judge(rounded)))
    return right, decibel(error / number)


# ------------------------------------------------------------------------------------------------
# The command

ALL = ("vae","understanding","mos")
SCORES = {  # what can be scored: a title, and the parts of a model that it takes
    "tasks": ("GenEval's tasks (Table 6): share of pictures that show just what is asked", ALL),
    "dense": ("Dense prompts (Table 7): share of statements that pictures fulfil", ALL),
    "edits": ("Edits (Table 10): what was asked for is there, all else is kept", ALL),
    "understanding": ("Questions about pictures, answered word for word", ("understanding",)),
    "descriptions": ("Descriptions of pictures", ("understanding",)),
    "loss": ("Loss on unseen pictures", ALL),
    "vae": ("Pictures that the judge reads without a mistake behind the VAE", ("vae",)),
    "judge": ("Renders that the judge reads without a mistake", ())}


def score(what, model, args, settings, failures):
    """The table of one of SCORES, its averages included."""
    number, several, seed = args.number, args.number or 2000, args.seed
    drawing = dict(seed=seed, batch=args.batch, failures=failures, **settings)
    if what == "edits":
        table = score_edits(model, number, **drawing)
        return table | {"overall": averages(table)}
    if what == "tasks":
        table = score_tasks(model, number, args.pictures, tasks=args.tasks or shapes.TASKS,
                            **drawing)
        means, both = {"overall": averages(table)}, [t for t in table if "held-out" in table[t]]
        if both and len(both) < len(table):
            means[f"overall of {len(both)}"] = averages({task: table[task] for task in both})
        return table | means
    if what == "dense":
        return score_dense(model, number, **drawing)
    if what == "understanding":
        return {"questions": {row: [score_understanding(model, several, split, seed), several,
                                    several] for row, split in SCENES.items()}}
    if what == "descriptions":
        return score_descriptions(model, number or 500, seed, failures)
    if what == "loss":
        return score_loss(model, number or 256, seed)
    return score_renders(model, several, seed) if what == "vae" else score_sizes(several, seed)


def score_renders(model, number, seed):
    """{"right": {"seen": [right, pictures, pictures], ...}, "PSNR": {"seen": dB, ...}}.

    The rows "seen" and "held-out" show filled objects, "outlined" unseen scenes as an edit may.
    """
    table, size = {"right": {}, "PSNR": {}}, model.config.size
    for row, (split, style) in {"seen": ("val", "filled"), "held-out": ("held", "filled"),
                                "outlined": ("val", "outlined")}.items():
        right, psnr = score_judge(number, size, size, model.vae, seed, split, style)
        table["right"][row], table["PSNR"][row] = [right, number, number], psnr
    return table


def score_sizes(number, seed):
    """{"128x128": {"renders": [right, pictures, pictures]}, ...}."""
    table = {}
    for height, width in ((128, 128), (96, 96), (160, 160), (256, 256), (128, 256)):
        fresh = number if height == width == 128 else -(-number // 5)
        right, _ = score_judge(fresh, height, width, seed=seed)
        table[f"{height}x{width}"] = {"renders": [right, fresh, fresh]}
    return table


def obstacle(what, folder, model):
    """Why a checkpoint cannot be scored so, "" if it can."""
    c = model.config
    elsewhere = {"understanding": c.und_folder, "vae": c.vae_folder}
    for part in SCORES[what][1]:
        if not elsewhere.get(part) and not (Path(folder) / f"{part}.safetensors").is_file():
            return f"no {part}.safetensors in {folder}"
    if not c.und_images and (what in ("understanding", "descriptions")
                             or what == "edits" and "understanding" in c.edit_inputs):
        return "its tower reads no pictures"
    try:
        model.tokenizer.encode(" ".join(sorted(edits.words())) if what == "edits" else "")
    except ValueError as e:
        return str(e).split(" in ")[0]
    return ""


def parse(arguments=None):
    """The command line, checked."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", nargs="?", default=str(ROOT / "weights"),
                        help="folder of a trained model")
    parser.add_argument("--what", nargs="+", choices=(*SCORES, "all"), help="what to score; all "
                        "that the checkpoint can do, or tasks if --tasks is given")
    parser.add_argument("--tasks", nargs="+", choices=shapes.TASKS, help="of GenEval's; all six if "
                        "not given")
    parser.add_argument("--number", type=int, help="prompts for each task (GenEval's counts if not "
                        f"given), dense prompts ({DENSE_COUNT}), edits of each type "
                        f"({EDIT_COUNT}), descriptions (500), pictures for the loss (256), "
                        "questions and renders (2000), lines of --prompts (all)")
    parser.add_argument("--pictures", type=int, default=4, help="pictures for each of GenEval's "
                        "prompts; dense prompts and edits never run out and get one each")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, scenes and noise")
    parser.add_argument("--batch", type=int, help="pictures drawn at once; 512 on a GPU, else 64")
    parser.add_argument("--steps", type=int, help="sampling steps; this and the next four default "
                        "to the checkpoint's own settings")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--rescale", type=float, help="guidance rescale")
    parser.add_argument("--image-guidance", type=float, help="guidance scale of an edit's picture")
    parser.add_argument("--schedule", help="uniform or linear-quadratic")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--sheet", help="PNG for a contact sheet of failures")
    parser.add_argument("--export", type=Path, help="draw --prompts into this folder, as GenEval's "
                        "own judge reads them, and score nothing; goes on where it was broken off")
    parser.add_argument("--prompts", help="GenEval's evaluation_metadata.jsonl")
    args = parser.parse_args(arguments)
    for name in ("number", "pictures", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if abs(args.seed) >= 2 ** 62:
        raise ValueError(f"--seed is too large: {args.seed}")
    for name in ("json", "sheet"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise ValueError(f"--{name}: cannot write {path}")
    if bool(args.export) != bool(args.prompts):
        raise ValueError("--export and --prompts go together: a folder, and GenEval's prompts")
    return args


def export(model, args, settings, device):
    """Draw GenEval's prompts into its folders."""
    prompts = report.read_prompts(args.prompts)[:args.number]
    made = report.made_by(args.checkpoint, args.prompts, args.pictures, args.seed, settings)
    report.check_export(args.export, made)
    model.load(args.checkpoint, ALL, device)
    report.export(model, args.export, prompts, args.pictures, args.batch, made)


def main():
    """The command."""
    args, device = parse(), pick_device()
    args.batch = args.batch or (512 if device.type == "cuda" else 64)
    model = MoS.from_pretrained(args.checkpoint, device, None, ())  # nothing is loaded yet
    given = {name: getattr(args, name) for name in ("steps", "guidance", "rescale", "schedule")}
    settings = model.settings(**given)
    edit_settings = model.settings(True, **given, image_guidance=args.image_guidance)
    if args.export:
        export(model, args, settings, device)
        return
    chosen = args.what or (["tasks"] if args.tasks else ["all"])
    hurdles = {what: obstacle(what, args.checkpoint, model)
               for what in SCORES if what in chosen or "all" in chosen}
    for what, why in hurdles.items():
        if why and what in chosen:
            raise ValueError(f"--what {what}: {why}")
    needed = {part for what, why in hurdles.items() if not why for part in SCORES[what][1]}
    model.load(args.checkpoint, needed, device)
    about = {"checkpoint": args.checkpoint, "seed": args.seed, "pictures": args.pictures,
             "settings": settings, "edit_settings": edit_settings, "device": device.type,
             "torch": torch.__version__,
             "parameters": sum(p.numel() for module in (model.router, model.generation)
                               for p in module.parameters())}
    print(json.dumps(about))
    scores, failures = {}, {}
    for what, why in hurdles.items():
        title = SCORES[what][0]
        if why:
            print(f"\n{title}: left out, {why}")
        else:
            scores[what] = score(what, model, args, edit_settings if what == "edits" else settings,
                                 failures.setdefault(what, []))
            report.show(title, scores[what])
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(about | {"scores": scores}, indent=1))
    if args.sheet:
        with replacing(args.sheet) as path:
            report.draw_sheet(failures).save(path, "PNG")


if __name__ == "__main__":
    run(main)
