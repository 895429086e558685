"""Score a checkpoint of the small world, separately for what training has shown and has not.

    python -m tools.evaluate weights                     # all that it can do
    python -m tools.evaluate weights --what tasks        # GenEval's tasks: the paper's Table 6
    python -m tools.evaluate weights --what dense edits  # as DPG (Table 7) and ImgEdit (Table 10)
    python -m tools.evaluate weights --what loss vae     # can the judge see through the VAE?
    python -m tools.evaluate --what judge                # the judge on the world's own renders
    python -m tools.evaluate CHECKPOINT --export FOLDER --prompts evaluation_metadata.jsonl

The last one is for models of the real world. It draws GenEval's own prompts into the folders that
GenEval's own judge reads. The scores are in `world/scores.py`.
"""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoint import PARTS, load_parts, published_folder
from common import (ROOT, CommandLine, check_made, checksum, contact_sheet, pick_device,
                    read_json_lines, replacing, run, wrap, write_made)
from mos import MoS
from world import edits, scores, shapes

ALL = tuple(PARTS)
SCORES = {  # each with its title, and the parts of a model that it needs
    "tasks": ("GenEval's tasks (Table 6): share of pictures that show just what is asked", ALL),
    "dense": ("Dense prompts (Table 7): share of statements that pictures fulfil", ALL),
    "edits": ("Edits (Table 10): what was asked for is there, all else is kept", ALL),
    "understanding": ("Questions about pictures, answered word for word", ("understanding",)),
    "descriptions": ("Descriptions of pictures", ("understanding",)),
    "loss": ("Loss on unseen pictures", ALL),
    "vae": ("Pictures in which the judge makes no mistake after the VAE", ("vae",)),
    "judge": ("Renders in which the judge makes no mistake", ())}
HEADS = {"single object": "Single Obj.", "two objects": "Two Obj.", "colours": "Colors",
         "attribution": "Color Attri.", "background": "Back."}  # the paper's, where ours differ


def score(what, model, args, settings, failures):
    """Return the table of one of SCORES, with its averages."""
    number, seed = args.number, args.seed
    many = number or 2000
    drawing = dict(seed=seed, batch=args.batch, failures=failures, **settings)
    if what == "tasks":
        tasks = args.tasks or shapes.TASKS
        table = scores.score_tasks(model, number, args.pictures, tasks=tasks, **drawing)
        both = {task: column for task, column in table.items() if "held-out" in column}
        means = {"overall": scores.averages(table)}
        if 0 < len(both) < len(table):
            means[f"overall of {len(both)}"] = scores.averages(both)
        return table | means
    if what == "dense":
        return scores.score_dense(model, number, **drawing)
    if what == "edits":
        table = scores.score_edits(model, number, **drawing)
        return table | {"overall": scores.averages(table)}
    if what == "understanding":
        right = {row: scores.score_understanding(model, many, split, seed)
                 for row, split in scores.SCENES.items()}
        return {"questions": {row: [count, many, many] for row, count in right.items()}}
    if what == "descriptions":
        return scores.score_descriptions(model, number or 500, seed, failures)
    if what == "loss":
        return scores.score_loss(model, number or 256, seed)
    return scores.score_vae(model, many, seed) if what == "vae" else scores.score_sizes(many, seed)


def obstacle(what, folder, model):
    """Return why a checkpoint cannot get one of SCORES, "" if it can."""
    c = model.config
    for part in SCORES[what][1]:
        if not published_folder(c, part) and not (Path(folder) / f"{part}.safetensors").is_file():
            return f"no {part}.safetensors in {folder}"
    if not c.und_images and (what in ("understanding", "descriptions")
                             or what == "edits" and "understanding" in c.edit_inputs):
        return "its tower reads no pictures"
    try:
        model.tokenizer.encode(" ".join(sorted(edits.words())) if what == "edits" else "")
    except ValueError as e:
        return str(e).split(" in ")[0]
    return ""


def show(title, table):
    """Print a table: in each row the scores, then their errors and numbers of different prompts."""
    heads = [HEADS.get(c, c.capitalize() if c.isalpha() and c.islower() else c) for c in table]
    widths = [2 + max(6, len(head)) for head in heads]
    rows = dict.fromkeys(row for column in table.values() for row in column)
    lines = [("", heads)]
    for row in rows:
        columns = [scores.figures(column.get(row)) for column in table.values()]
        for name, values in zip((row, "   ±", "   different"), zip(*columns)):
            if name == row or any(value is not None for value in values):
                lines.append((name, map(as_text, values)))
    label = 2 + max(len(name) for name in (*rows, "   different"))
    print(f"\n{title}")
    for name, cells in lines:
        print(f"{name:{label}}" + "".join(f"{x:>{width}}" for x, width in zip(cells, widths)))


def as_text(value):
    """Return a number as tables show it, "-" for None."""
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def draw_sheet(failures, columns=3):
    """Return all failures, {what was scored: Results}, as one picture, some columns wide."""
    width = 290  # pixels for the words beside each failure's pictures
    results = [(what, r) for what, kinds in failures.items() for r in kinds]
    if not results:
        return Image.new("RGB", (width, 128), "white")
    side = max(128, *(image.height for _, r in results for image in r.pictures))
    left = (side + 4) * max(len(r.pictures) for _, r in results)
    font = ImageFont.load_default(11)
    cards = []
    for what, r in results:
        card = Image.new("RGB", (left + width, side), "white")
        card.paste(contact_sheet([r.pictures]), (0, 0))
        draw = ImageDraw.Draw(card)
        lines = []
        for text in (f"{what}: {r.column}, {r.row}", r.text, r.note):
            lines += wrap(text, width - 12, draw, font)
        draw.multiline_text((left + 6, 4), "\n".join(lines[:9]), "black", font, spacing=2)
        cards.append(card)
    return contact_sheet([cards[i:i + columns] for i in range(0, len(cards), columns)])


def read_prompts(path):
    """Read GenEval's prompts, a dict each. Raises ValueError for an invalid line, OSError."""
    def take(entry):
        if not {"prompt", "tag", "include"} <= entry.keys() or not entry["prompt"].strip():
            raise ValueError
        return entry
    prompts = read_json_lines(path, 'JSON with "prompt", "tag" and "include", as GenEval has it',
                              take)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def draw_prompts(model, folder, prompts, batch, made):
    """Draw prompts (dicts) into GenEval's own folders; pictures that are there already are kept.

    00000/metadata.jsonl holds the first prompt's line, 00000/samples/0000.png its first picture.
    made: {"pictures": for each prompt, "seed": ..., "settings": those of `MoS.generate`, ...}, kept
    in made.json. Picture i of prompt n has the seed + pictures * n + i.
    """
    write_made(folder, made)
    pictures = made["pictures"]
    missing = []
    for n, entry in enumerate(prompts):
        samples = folder / f"{n:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(entry))
        for i in range(pictures):
            path = samples / f"{i:04d}.png"
            if not path.is_file():
                missing.append((path, entry["prompt"], made["seed"] + pictures * n + i))
    print(f"{folder}: {len(missing)} of {len(prompts) * pictures} pictures are missing", flush=True)
    for start in range(0, len(missing), batch):
        paths, texts, seeds = zip(*missing[start:start + batch])
        images = model.generate(list(texts), seed=list(seeds), **made["settings"])
        for path, image in zip(paths, images):
            with replacing(path) as temporary:
                image.save(temporary, "PNG")
        print(f"{min(start + batch, len(missing))} of {len(missing)} drawn", flush=True)


def export(model, args, settings, device):
    """Draw GenEval's prompts into its folders."""
    prompts = read_prompts(args.prompts)[:args.number]
    made = {"checkpoint": checksum(Path(args.checkpoint) / "mos.safetensors"),
            "prompts": checksum(args.prompts), "pictures": args.pictures, "seed": args.seed,
            "settings": settings}
    check_made(args.export, made, "--export")
    load_parts(model, args.checkpoint, ALL, device)
    draw_prompts(model, args.export, prompts, batch=args.batch, made=made)


def parse(arguments=None):
    """Parse and check the command line."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", default=str(ROOT / "weights"), help="folder of a trained model")
    add("--what", nargs="+", choices=(*SCORES, "all"),
        help="scores; all that the checkpoint can get if not given, or tasks if --tasks is")
    add("--tasks", nargs="+", choices=shapes.TASKS, help="of GenEval's; all six if not given")
    add("--number", type=int, help="prompts for each task (GenEval's counts if not given), dense "
        f"prompts ({scores.DENSE_COUNT}), edits of each type ({scores.EDIT_COUNT}), descriptions "
        "(500), pictures for the loss (256), questions, renders (2000), lines of --prompts (all)")
    add("--pictures", type=int, default=4, help="for each of GenEval's prompts; others get one")
    add("--seed", type=int, default=0, help="of prompts, scenes and noise")
    add("--batch", type=int, help="pictures drawn at once; 512 on a GPU, else 64")
    add("--steps", type=int,
        help="sampling steps; this and the next four are the checkpoint's own if not given")
    add("--guidance", type=float, help="guidance scale")
    add("--rescale", type=float, help="guidance rescale")
    add("--image-guidance", type=float, help="guidance scale of an edit's picture")
    add("--schedule", help="uniform or linear-quadratic")
    add("--json", help="file for all numbers")
    add("--sheet", help="PNG for a contact sheet of failures")
    add("--export", type=Path, help="draw --prompts into this folder, as GenEval's own judge reads "
        "them, and score nothing; pictures already there are kept")
    add("--prompts", help="GenEval's evaluation_metadata.jsonl")
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


def main():
    """Score a checkpoint, or export pictures."""
    args = parse()
    device = pick_device()
    args.batch = args.batch or (512 if device.type == "cuda" else 64)
    model = MoS.from_pretrained(args.checkpoint, device, parts=())  # nothing is loaded yet
    given = {name: getattr(args, name) for name in ("steps", "guidance", "rescale", "schedule")}
    settings = model.settings(**given)
    edit_settings = model.settings(True, **given, image_guidance=args.image_guidance)
    if args.export:
        export(model, args, settings, device)
        return
    chosen = args.what or (["tasks"] if args.tasks else ["all"])
    obstacles = {what: obstacle(what, args.checkpoint, model)
                 for what in SCORES if what in chosen or "all" in chosen}
    for what, reason in obstacles.items():
        if reason and what in chosen:
            raise ValueError(f"--what {what}: {reason}")
    needed = {part for what, reason in obstacles.items() if not reason for part in SCORES[what][1]}
    load_parts(model, args.checkpoint, needed, device)
    about = {"checkpoint": args.checkpoint, "seed": args.seed, "pictures": args.pictures,
             "settings": settings, "edit_settings": edit_settings, "device": device.type,
             "torch": torch.__version__,
             "parameters": sum(p.numel() for module in (model.router, model.generation)
                               for p in module.parameters())}
    print(json.dumps(about))
    tables = {}
    failures = {what: [] for what in SCORES}
    for what, reason in obstacles.items():
        title, _ = SCORES[what]
        if reason:
            print(f"\n{title}: left out, {reason}")
        else:
            tables[what] = score(what, model, args, failures=failures[what],
                                 settings=edit_settings if what == "edits" else settings)
            show(title, tables[what])
    if args.json:
        Path(args.json).write_text(json.dumps(about | {"scores": tables}, indent=1))
    if args.sheet:
        draw_sheet(failures).save(args.sheet, "PNG")


if __name__ == "__main__":
    run(main)
