"""The small world: scenes of coloured shapes, captions and questions about them, their pictures.

The paper's claims can only be tested on pictures whose content is known. Here a scene is a list of
objects, and a picture is drawn from it with signed distance fields. `judge.py` recognises the
objects of a picture, and `satisfies` compares them with a prompt. `benchmark` is like GenEval's.

Lengths are in units of the picture's shorter side, x to the right and y downwards.
"""

import math
import random
import zlib
from itertools import combinations, permutations, product
from typing import NamedTuple

import torch

from common import move

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLOURS = {  # GenEval's ten
    "red": (220, 30, 40), "orange": (245, 130, 20), "yellow": (250, 220, 40),
    "green": (40, 160, 60), "blue": (35, 75, 215), "purple": (125, 40, 165),
    "pink": (250, 135, 190), "brown": (125, 75, 35), "black": (15, 15, 15),
    "white": (250, 250, 250)}
BACKGROUNDS = {"gray": (135, 135, 135), "beige": (215, 195, 155), "teal": (60, 150, 160),
               "lavender": (175, 165, 225)}
SIZES = {"small": 0.095, "large": 0.15}  # radius
STYLES = {"filled": math.inf, "outlined": 0.2}  # width of the line inside the edge, in radii
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {  # the first wording is GenEval's
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under")}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = ("a photo of", "a picture of", "an image of", "a drawing of", "")
TASKS = ("single object", "two objects", "counting", "colours", "position", "attribution")
MIXTURE = {"single object": 1, "two objects": 3, "counting": 5, "colours": 2, "position": 5,
           "attribution": 3, "dense": 5}  # training weights: harder tasks are drawn more often
MAX_OBJECTS = 4
REACH = 1.15  # radii around a centre that stay free; the margins admit a square's corners (1.2)
GRID = 256    # centres are multiples of 1/256, so that equal scenes have equal numbers


class Object(NamedTuple):
    """One object. None means "left open" in a prompt, "not recognised" in a judged picture."""
    shape: str | None
    colour: str | None = None
    size: str | None = None
    x: float = 0.0
    y: float = 0.0


class Scene(NamedTuple):
    """The content of a picture. If it was judged, None is "not recognised" or a mixed style."""
    objects: tuple[Object, ...]
    background: str | None
    style: str | None = "filled"  # of all objects


class Prompt(NamedTuple):
    """A text and what it asks for. `relations` holds (i, relation, j), indices of `objects`."""
    text: str
    task: str
    objects: tuple[Object, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


# --- The split: combinations that training never shows, which evaluation scores separately --------

HELD_COLOURS = {(colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)}
HELD_PAIRS = {frozenset(pair) for pair in (("circle", "star"), ("square", "cross"),
                                           ("triangle", "ring"), ("diamond", "hexagon"))}
HELD_COUNTS = {(2, "triangle"), (2, "hexagon"), (3, "star"), (3, "square"), (4, "ring"),
               (4, "diamond")}
_TRIPLES = (
    ("circle", "left of", "triangle"), ("square", "left of", "ring"),
    ("star", "left of", "diamond"), ("cross", "left of", "hexagon"),
    ("triangle", "left of", "square"), ("hexagon", "left of", "star"),
    ("ring", "above", "circle"), ("diamond", "above", "square"), ("star", "above", "cross"),
    ("hexagon", "above", "triangle"), ("triangle", "above", "star"), ("cross", "above", "diamond"))
HELD_TRIPLES = set(_TRIPLES) | {(b, INVERSE[r], a) for a, r, b in _TRIPLES}


def related(a, relation, b):
    """Return whether `a` is, for example, left of `b`: by 0.1 and within 60 degrees of the axis."""
    dx = b.x - a.x
    dy = b.y - a.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > 0.1 and along > 0.5 * math.hypot(dx, dy)


def relations_between(a, b):
    """Return the relations in which `a` stands to `b`: none, one, or two on a diagonal."""
    return [relation for relation in RELATIONS if related(a, relation, b)]


def matches(wanted, o):
    """Return whether an object has the shape, colour and size of another, where these are given."""
    return all(value in (None, actual) for value, actual in zip(wanted[:3], o[:3]))


def held_out(scene):
    """Return whether the scene contains a combination that training must not show."""
    shapes = [o.shape for o in scene.objects]
    return (any((o.colour, o.shape) in HELD_COLOURS for o in scene.objects)
            or any((shapes.count(s), s) in HELD_COUNTS for s in shapes)
            or any(frozenset(pair) in HELD_PAIRS for pair in combinations(shapes, 2))
            or any((a.shape, r, b.shape) in HELD_TRIPLES
                   for a, b in permutations(scene.objects, 2) for r in relations_between(a, b)))


def is_validation(scene):
    """Return True for one scene in 16, whatever its style; so the splits can never overlap."""
    content = repr((sorted(scene.objects), scene.background))
    return zlib.crc32(content.encode()) % 16 == 0


# --- Scenes ---------------------------------------------------------------------------------------

def draw_centres(rng, sizes, width, height, grid):
    """Draw centres of objects of these sizes, apart from each other and from the edge, or None."""
    discs = []
    for size in sizes:
        radius = REACH * SIZES[size]
        low = math.ceil((radius + 0.03) * grid)
        for _ in range(8):
            x = rng.randint(low, int(width * grid) - low) / grid
            y = rng.randint(low, int(height * grid) - low) / grid
            if all(math.hypot(x - u, y - v) > radius + other + 0.04 for u, v, other in discs):
                discs.append((x, y, radius))
                break
        else:
            return None
    return [(x, y) for x, y, _ in discs]


def in_split(scene, split):
    """Return whether a scene belongs to a split, see `draw_scene`."""
    if split == "any":
        return True
    if held_out(scene):
        return split == "held"
    return split == ("val" if is_validation(scene) else "train")


def draw_scene(rng, task, split="train", width=1.0, height=1.0, grid=GRID):
    """Draw a random scene of one task.

    split: "train" and "val" are disjoint and have no held-out combination; "held" has one; "any"
    is not filtered. width, height: of the picture. grid: centres are multiples of 1/grid; a world
    with a coarse grid is learned sooner.
    """
    while True:
        count = {"single object": 1, "colours": 1, "counting": rng.randint(2, 4),
                 "dense": rng.randint(3, 4)}.get(task, 2)
        if task == "counting":
            shapes = [rng.choice(SHAPES)] * count
        elif task == "dense":
            shapes = rng.choices(SHAPES, k=count)
        else:
            shapes = rng.sample(SHAPES, count)
        colours = rng.choices(tuple(COLOURS), k=count)
        if task == "counting" and rng.random() < 0.5:
            colours = colours[:1] * count
        if task == "dense" and len(set(zip(colours, shapes))) < count:
            continue  # dense captions name objects by colour and shape: these must be unique
        sizes = rng.choices(tuple(SIZES), k=count)
        centres = draw_centres(rng, sizes, width, height, grid)
        if centres is None:
            continue
        objects = tuple(Object(shape, colour, size, *centre) for shape, colour, size, centre
                        in zip(shapes, colours, sizes, centres))
        if task == "position" and not relations_between(*objects):
            continue
        scene = Scene(objects, rng.choice(tuple(BACKGROUNDS)))
        if in_split(scene, split):
            return scene


def draw_task(rng, tasks=MIXTURE):
    """Draw a task by its training weight."""
    return rng.choices(tuple(tasks), weights=[MIXTURE[task] for task in tasks])[0]


# --- Words ----------------------------------------------------------------------------------------

def plural(shape):
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def noun_phrase(o, article="a"):
    """Return words such as "a small red circle" for the attributes that an object has."""
    words = " ".join(word for word in (o.size, o.colour, o.shape) if word)
    return f"an {words}" if article == "a" and words[0] in "aeiou" else f"{article} {words}".strip()


def _clause(rng, a, relation, b):
    """Return an addition to a caption such as " , the red circle is over the star"."""
    a, b = (noun_phrase(Object(o.shape, o.colour), "the") for o in (a, b))
    return f" , {a} is {rng.choice(RELATIONS[relation])} {b}"


def describe(rng, scene, task):
    """Write a caption of the scene, a Prompt, in the style of a task.

    Half of the captions are GenEval's own templates. The others vary prefix and wording, and may
    add a colour, a size or the background. Captions with a relation mostly name colours, because
    these are visible in noisy pictures before the shapes. Half of them also state the inverse:
    otherwise the language model gives "left of" and "right of" the same states.
    """
    objects = scene.objects
    plain = task != "dense" and rng.random() < 0.5
    prefix = PREFIXES[0] if plain else rng.choice(PREFIXES)
    colour_rate = {"colours": 1, "attribution": 1, "dense": 1}.get(
        task, 0 if plain else 0.8 if task == "position" else 0.4)
    size_rate = 0 if plain else 0.25
    named = ()
    for o in objects:
        colour = o.colour if rng.random() < colour_rate else None
        size = o.size if rng.random() < size_rate else None
        named += (Object(o.shape, colour, size),)
    background = scene.background if not plain and rng.random() < 0.4 else None
    relations = ()
    if task == "counting":
        one_colour = len({o.colour for o in objects}) == 1
        colour = objects[0].colour if one_colour and not plain and rng.random() < 0.5 else None
        named = (Object(objects[0].shape, colour),) * len(objects)
        words = plural(noun_phrase(named[0], NUMBERS[len(named)]))
    elif task == "position":
        relation = rng.choice(relations_between(*objects))
        wording = RELATIONS[relation][0] if plain else rng.choice(RELATIONS[relation])
        relations = ((0, relation, 1),)
        words = f"{noun_phrase(named[0])} {wording} {noun_phrase(named[1])}"
    elif task == "dense":
        words = " , ".join(map(noun_phrase, named[:-1])) + " and " + noun_phrase(named[-1])
    else:
        words = " and ".join(map(noun_phrase, named))
    text = f"{prefix} {words}".strip()
    if background:
        text += f" on a {background} background"
    if task == "position" and not plain and rng.random() < 0.5:
        text += _clause(rng, named[1], INVERSE[relation], named[0])
        relations += ((1, INVERSE[relation], 0),)
    if task == "dense":
        true = [(i, relation, j) for i, j in permutations(range(len(objects)), 2)
                for relation in relations_between(objects[i], objects[j])]
        relations = tuple(rng.sample(true, min(len(true), rng.randint(0, 5 - len(named)))))
        for i, relation, j in relations:
            text += _clause(rng, named[i], relation, named[j])
    return Prompt(text, task, named, relations, background)


def _pick(rng, options, table, listed):
    """Draw one of the options that are in a table, or one of those that are not."""
    return rng.choice([option for option in options if (option in table) == listed])


def ask(rng, scene):
    """Draw a question about the scene; return it and its answer as texts."""
    shapes = [o.shape for o in scene.objects]
    colours = [o.colour for o in scene.objects]
    o = rng.choice(scene.objects)
    kinds = ["background", "number", "exists"]
    kinds += ["colour"] * 2 if shapes.count(o.shape) == 1 else []
    kinds += ["shape"] * 2 if colours.count(o.colour) == 1 else []
    unique = [p for p in scene.objects if shapes.count(p.shape) == 1]
    pairs = [(a, relations_between(a, b), b) for a, b in permutations(unique, 2)]
    clear = [pair for pair in pairs if len(pair[1]) == 1]  # on a diagonal two relations are true
    kinds += ["relation"] * 2 if clear else []
    kind = rng.choice(kinds)
    if kind == "background":
        return "what colour is the background ?", scene.background
    if kind == "number":
        number = NUMBERS.get(shapes.count(o.shape), "one")
        return f"how many {plural(o.shape)} are there ?", number
    if kind == "exists":
        colour, shape = o.colour, o.shape
        if rng.random() < 0.5:  # the answer is no; training may show the combination elsewhere
            excluded = HELD_COLOURS.union(zip(colours, shapes))
            colour, shape = _pick(rng, product(COLOURS, SHAPES), excluded, False)
        answer = "yes" if (colour, shape) in zip(colours, shapes) else "no"
        return f"is there {noun_phrase(Object(shape, colour))} ?", answer
    if kind == "colour":
        return f"what colour is the {o.shape} ?", o.colour
    if kind == "shape":
        return f"what shape is the {o.colour} object ?", o.shape
    a, (relation,), b = rng.choice(clear)
    return f"where is the {a.shape} relative to the {b.shape} ?", relation.removesuffix(" of")


def benchmark(task, number, seed=0, held=False):
    """Return `number` prompts of a task in GenEval's words; held: with held-out combinations."""
    if task not in TASKS:
        raise ValueError(f"no benchmark for task {task!r}, expected one of: {', '.join(TASKS)}")
    rng = random.Random(f"benchmark {task} {seed} {held}")
    return [_benchmark_prompt(rng, task, held) for _ in range(number)]


def _benchmark_prompt(rng, task, held):
    """Draw one prompt of a benchmark."""
    ordered = {order for pair in HELD_PAIRS for order in permutations(pair)}
    if task == "counting":
        count, shape = _pick(rng, product(NUMBERS, SHAPES), HELD_COUNTS, held)
        text = f"a photo of {NUMBERS[count]} {plural(shape)}"
        return Prompt(text, task, (Object(shape),) * count)
    if task == "position":
        triples = [(a, relation, b) for a, b in permutations(SHAPES, 2) if (a, b) not in ordered
                   for relation in RELATIONS]
        a, relation, b = _pick(rng, triples, HELD_TRIPLES, held)
        text = f"a photo of {noun_phrase(Object(a))} {relation} {noun_phrase(Object(b))}"
        return Prompt(text, task, (Object(a), Object(b)), ((0, relation, 1),))
    if task == "single object":
        named = [Object(rng.choice(SHAPES))]
    elif task == "two objects":
        named = map(Object, _pick(rng, permutations(SHAPES, 2), ordered, held))
    elif task == "colours":
        colour, shape = _pick(rng, product(COLOURS, SHAPES), HELD_COLOURS, held)
        named = [Object(shape, colour)]
    else:  # attribution: one object of a held-out prompt is a held-out combination
        shapes = "", ""
        while shapes[0] == shapes[1] or shapes in ordered:
            pairs = [_pick(rng, product(COLOURS, SHAPES), HELD_COLOURS, listed)
                     for listed in (held, False)]
            shapes = pairs[0][1], pairs[1][1]
        pairs = pairs if rng.random() < 0.5 else pairs[::-1]
        named = [Object(shape, colour) for colour, shape in pairs]
    named = tuple(named)
    return Prompt("a photo of " + " and ".join(map(noun_phrase, named)), task, named)


def satisfies(prompt, scene):
    """Return whether a scene shows exactly what the prompt asks for, no object less or more."""
    if (len(prompt.objects) != len(scene.objects) or scene.background is None
            or prompt.background not in (None, scene.background) or scene.style != "filled"
            or any(None in (o.shape, o.colour) for o in scene.objects)):
        return False
    return any(all(map(matches, prompt.objects, order))
               and all(related(order[i], r, order[j]) for i, r, j in prompt.relations)
               for order in permutations(scene.objects))


# --- Pictures -------------------------------------------------------------------------------------

def pack(scenes):
    """Return scenes as a tensor (B, 1 + 4*5): background, and shape, colour, size, x, y of each.

    The background is an index, 4 higher for an outlined scene. An absent object has the shape -1.
    """
    colours, sizes, backgrounds, styles = map(tuple, (COLOURS, SIZES, BACKGROUNDS, STYLES))
    rows = []
    for scene in scenes:
        style = styles.index(scene.style)
        row = [float(backgrounds.index(scene.background) + style * len(backgrounds))]
        for o in scene.objects:
            row += [SHAPES.index(o.shape), colours.index(o.colour), sizes.index(o.size), o.x, o.y]
        rows.append(row + [-1.0, 0, 0, 0, 0] * (MAX_OBJECTS - len(scene.objects)))
    return torch.tensor(rows)


def signed_distance(shape, x, y):
    """Return the distance of points x, y from a shape's edge, negative inside, all in radii."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(ax, ay) - 0.85
    if shape == "triangle":  # equilateral, circumradius 1.15: three half-planes at half of that
        return torch.maximum(y, 0.75 ** 0.5 * ax - 0.5 * y) - 0.575
    if shape == "star":  # fold the five points onto one, then the line from its tip to the dent
        fifth = 2 * math.pi / 5
        angle = ((torch.atan2(x, -y) + fifth / 2) % fifth - fifth / 2).abs()
        u, v, radius = torch.cos(angle), torch.sin(angle), torch.hypot(x, y)
        tip, dent = 1.15, (0.5 * math.cos(fifth / 2), 0.5 * math.sin(fifth / 2))
        edge = math.hypot(tip - dent[0], dent[1])
        return (radius * (dent[1] * u + (tip - dent[0]) * v) - dent[1] * tip) / edge
    if shape == "ring":
        return (torch.hypot(x, y) - 0.73).abs() - 0.27
    if shape == "cross":
        across, upright = torch.maximum(ax - 1.05, ay - 0.35), torch.maximum(ay - 1.05, ax - 0.35)
        return torch.minimum(across, upright)
    if shape == "diamond":
        return (1.15 * ax + 0.8 * ay - 0.92) / math.hypot(1.15, 0.8)
    return torch.maximum(0.75 ** 0.5 * ax + 0.5 * ay, ay) - 0.92  # the hexagon


def coverage(shape, x, y, radius, line=math.inf):
    """Return the share of each pixel at x, y from the centre that is covered; lengths in pixels."""
    inside = 0.5 - signed_distance(shape, x / radius, y / radius) * radius
    return inside.clamp(0, 1) - (inside - line).clamp(0, 1)


def palette(table, device):
    """Return the colours of a table: (number of colours, 3)."""
    return torch.tensor(list(table.values()), dtype=torch.get_default_dtype(), device=device)


def render(packed, height=128, width=128, device="cpu"):
    """Draw packed scenes (B, 21) on the device: (B, 3, height, width), values in [-1, 1].

    Keep the scenes on the CPU: they are sorted by shape there, and a GPU need not be waited for.
    """
    home, unit = packed.device, min(height, width)
    radii = torch.tensor(list(SIZES.values()), device=home)                           # (2,)
    lines = torch.tensor(list(STYLES.values()), device=home)                          # (2,)
    background = packed[:, 0].long() % len(BACKGROUNDS)                               # (B,)
    style = packed[:, 0].long() // len(BACKGROUNDS)                                   # (B,)
    paper = palette(BACKGROUNDS, home)[background]                                    # (B, 3)
    image = move(paper, device)[:, :, None, None].repeat(1, 1, height, width)         # (B, 3, H, W)
    objects = packed[:, 1:].unflatten(1, (MAX_OBJECTS, 5))                            # (B, 4, 5)
    py = torch.arange(height, device=device)[:, None] + 0.5
    px = torch.arange(width, device=device)[None, :] + 0.5
    for index, shape in enumerate(SHAPES):
        picture, slot = (objects[:, :, 0] == index).nonzero(as_tuple=True)            # (O,), (O,)
        _, colour, size, x, y = objects[picture, slot].unbind(1)                      # (O,) each
        ink = palette(COLOURS, home)[colour.long()] - paper[picture]                  # (O, 3)
        radius = radii[size.long()]                                                   # (O,)
        line = radius * lines[style[picture]]                                         # (O,)
        lengths = torch.stack((x, y, radius, line)) * unit                            # (4, O)
        x, y, radius, line = move(lengths, device)[:, :, None, None].unbind()       # (O, 1, 1) each
        alpha = coverage(shape, px - x, py - y, radius, line)[:, None]                # (O, 1, H, W)
        image.index_add_(0, move(picture, device), alpha * move(ink, device)[:, :, None, None])
    return image / 127.5 - 1  # objects never overlap, so adding is painting
