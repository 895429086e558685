"""What an evaluation leaves: tables, failures to look at, and folders for GenEval's own judge.

A table is {column: {row: score}}, columns as the paper has them. A score is [passed, of, different
prompts], [value, standard error], or a number alone.
"""

import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from common import checksum, replacing

HEADS = {"single object": "Single Obj.", "two objects": "Two Obj.", "colours": "Colors",
         "attribution": "Color Attri.", "background": "Back."}  # the paper's, where ours differ
SHOWN = 3  # failures of one kind on a contact sheet


class Result(NamedTuple):
    """One judgement: value is 1 or true where all is right, else less. told: what the judge saw."""
    column: str
    row: str
    text: str
    value: float
    pictures: tuple = ()  # as PIL, where a failure is worth a look
    told: str = ""


def tabulate(results, failures=None):
    """The table of results. failures: a list that takes the first ones of each kind."""
    table, texts, kinds = {}, {}, {}
    for r in results:
        column, kind = table.setdefault(r.column, {}), (r.column, r.row)
        texts.setdefault(kind, set()).add(r.text)
        passed, number, _ = column.get(r.row, (0, 0, 0))
        column[r.row] = [passed + r.value, number + 1, len(texts[kind])]
        if failures is not None and r.pictures and r.value < 1:
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] <= SHOWN:
                failures.append(r)
    return table


# ------------------------------------------------------------------------------------------------
# Tables

def figures(score):
    """Value, standard error and number of prompts of a score; None: it has none.

    The error is binomial. For shares between 0 and 1 that is the most it can be.
    """
    if not isinstance(score, list):
        return score, None, None
    if len(score) == 2:
        return *score, None
    passed, number, prompts = score
    p = passed / number
    return p, math.sqrt(p * (1 - p) / number), prompts


def rows_of(table):
    """The rows of a table, in the order in which they appear."""
    return list(dict.fromkeys(row for column in table.values() for row in column))


def averages(table, columns=None):
    """The mean of columns (all if None) for each row that one of them has: {row: score}."""
    means = {}
    for row in rows_of(table):
        found = [figures(table[c][row]) for c in columns or table if row in table[c]]
        if found:
            values, errors, _ = zip(*found)
            mean = sum(values) / len(values)
            means[row] = mean if None in errors else [mean, math.hypot(*errors) / len(errors)]
    return means


def show(title, table):
    """Print a table: for each row the scores, their errors, and how many prompts differed."""
    heads = [HEADS.get(c, c.capitalize() if c.isalpha() and c.islower() else c) for c in table]
    label = 2 + max(map(len, [*rows_of(table), "   different"]))
    print(f"\n{title}\n" + " " * label + "".join(f"{head:>{cell(head)}}" for head in heads))
    for row in rows_of(table):
        found = [figures(column[row]) if row in column else (None,) * 3
                 for column in table.values()]
        for name, values in zip((row, "   ±", "   different"), zip(*found)):
            if name == row or any(value is not None for value in values):
                print(f"{name:{label}}" + "".join(f"{form(value):>{cell(head)}}"
                                                  for value, head in zip(values, heads)))


def cell(head):
    """The width of a column."""
    return 2 + max(6, len(head))


def form(value):
    """A number as tables have it."""
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------
# Failures

def draw_sheet(failures, columns=3, width=290):
    """All failures {what was scored: results} as one picture, `columns` of them side by side."""
    each = [(what, r) for what, results in failures.items() for r in results]
    pictures = max((len(r.pictures) for _, r in each), default=1)
    side = max([128, *(image.height for _, r in each for image in r.pictures)])
    wide, rows = pictures * side + width, max(1, -(-len(each) // columns))
    sheet = Image.new("RGB", (columns * wide, rows * side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (what, r) in enumerate(each):
        x, y = i % columns * wide, i // columns * side
        for k, image in enumerate(r.pictures):
            sheet.paste(image, (x + k * side, y))
        lines = [line for text in (f"{what}: {r.column}, {r.row}", r.text, r.told)
                 for line in textwrap.wrap(text, 50)]
        draw.multiline_text((x + pictures * side + 6, y + 4), "\n".join(lines[:9]), "black", font,
                            spacing=2)
    return sheet


# ------------------------------------------------------------------------------------------------
# GenEval's own folders, for models of the real world

def read_prompts(path):
    """GenEval's prompts, a dict each. Raises ValueError for a line that is none, OSError."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not {"prompt", "tag", "include"} <= entry.keys() or not entry["prompt"].strip():
                raise ValueError
        except (ValueError, AttributeError):
            raise ValueError(f'{path}, line {number}: expected JSON with "prompt", "tag" and '
                             f'"include", as in GenEval\'s evaluation_metadata.jsonl, got '
                             f"{line[:60]!r}") from None
        prompts.append(entry)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def check_export(folder, made):
    """Raise ValueError unless a folder is free, or holds pictures that were made just so."""
    path = folder / "made.json"
    if not path.is_file():
        if folder.is_file() or any(not p.name.startswith(".") for p in folder.glob("*")):
            raise ValueError(f"--export: {folder} holds something else; choose a new folder")
        return
    old = json.loads(path.read_text())
    for name in made:
        if old.get(name) != made[name]:
            raise ValueError(f"--export: {folder} was made with another {name} ({old.get(name)}, "
                             f"now {made[name]}); choose another folder")


def export(model, folder, prompts, pictures, batch, made):
    """Draw prompts (dicts) into GenEval's own folders; what is there already is left.

    00000/metadata.jsonl holds the first prompt's line, 00000/samples/0000.png its first picture.
    made: {"seed": ..., "settings": what `MoS.generate` takes, ...}, kept in made.json. Picture i of
    prompt n has the seed + pictures * n + i.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "made.json", made)
    todo = []
    for n, entry in enumerate(prompts):
        own = folder / f"{n:05d}"
        (own / "samples").mkdir(parents=True, exist_ok=True)
        write(own / "metadata.jsonl", entry)
        places = (own / "samples" / f"{i:04d}.png" for i in range(pictures))
        todo += [(path, entry["prompt"], made["seed"] + pictures * n + i)
                 for i, path in enumerate(places) if not path.is_file()]
    print(f"{folder}: {len(todo)} of {len(prompts) * pictures} pictures are missing", flush=True)
    for start in range(0, len(todo), batch):
        paths, texts, seeds = zip(*todo[start:start + batch])
        images = model.generate(list(texts), seed=list(seeds), **made["settings"])
        for path, image in zip(paths, images):
            with replacing(path) as temporary:
                image.save(temporary, "PNG")
        print(f"{min(start + batch, len(todo))} of {len(todo)} drawn", flush=True)


def write(path, value):
    """Write JSON, under another name until it is whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value))


def made_by(checkpoint, prompts, pictures, seed, settings):
    """What exported pictures depend on; checkpoint, prompts: paths."""
    return {"checkpoint": checksum(Path(checkpoint) / "mos.safetensors"),
            "prompts": checksum(prompts), "pictures": pictures, "seed": seed, "settings": settings}
