"""The small world: scenes of coloured shapes, their words, their pictures, and an exact judge.

Every claim of the paper needs pictures whose content is known. Here a scene is a list of objects;
`render` draws it with signed distance fields, `describe` and `ask` put it into words, and `judge`
reads the objects back from the pixels alone. The benchmark follows GenEval's six tasks.

Lengths are in units of the picture's shorter side, x to the right and y downwards.
"""

import math
import random
import zlib
from itertools import combinations, permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import move

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLOURS = {  # GenEval's ten colours
    "red": (220, 30, 40), "orange": (245, 130, 20), "yellow": (250, 220, 40),
    "green": (40, 160, 60), "blue": (35, 75, 215), "purple": (125, 40, 165),
    "pink": (250, 135, 190), "brown": (125, 75, 35), "black": (15, 15, 15),
    "white": (250, 250, 250),
}
BACKGROUNDS = {"gray": (135, 135, 135), "beige": (215, 195, 155), "teal": (60, 150, 160),
               "lavender": (175, 165, 225)}
SIZES = {"small": 0.095, "large": 0.15}  # radius
STYLES = {"filled": math.inf, "outlined": 0.2}  # width of the line along the edge, in radii
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {  # the first wording is GenEval's
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = ("a photo of", "a picture of", "an image of", "a drawing of", "")
TASKS = ("single object", "two objects", "counting", "colours", "position", "attribution")
MIXTURE = {"single object": 1, "two objects": 3, "counting": 5, "colours": 2, "position": 5,
           "attribution": 3, "dense": 5}  # training weights: the harder task is drawn more often
MAX_OBJECTS = 4
REACH = 1.15  # radii that a shape keeps free around it; margins take the square's corners (1.2)
GRID = 256    # centres lie on a grid of 1/256, so that a scene has an exact identity


class Object(NamedTuple):
    """One object. In a prompt None means "left open", in a judged picture "not recognisable"."""
    shape: str | None
    colour: str | None = None
    size: str | None = None
    x: float = 0.0
    y: float = 0.0


class Scene(NamedTuple):
    """What a picture shows; in a judged picture None is "not recognisable", for a style "mixed"."""
    objects: tuple[Object, ...]
    background: str | None
    style: str | None = "filled"  # of all objects


class Prompt(NamedTuple):
    """A text and what it asks for; `relations` holds (i, relation, j) over `objects`."""
    text: str
    task: str
    objects: tuple[Object, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


# ------------------------------------------------------------------------------------------------
# The split: what training never shows. Evaluation reports these combinations apart.

HELD_COLOURS = {(colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)}
HELD_PAIRS = {frozenset(p) for p in (("circle", "star"), ("square", "cross"), ("triangle", "ring"),
                                     ("diamond", "hexagon"))}
HELD_COUNTS = {(2, "triangle"), (2, "hexagon"), (3, "star"), (3, "square"), (4, "ring"),
               (4, "diamond")}
_TRIPLES = (
    ("circle", "left of", "triangle"), ("square", "left of", "ring"),
    ("star", "left of", "diamond"), ("cross", "left of", "hexagon"),
    ("triangle", "left of", "square"), ("hexagon", "left of", "star"),
    ("ring", "above", "circle"), ("diamond", "above", "square"), ("star", "above", "cross"),
    ("hexagon", "above", "triangle"), ("triangle", "above", "star"), ("cross", "above", "diamond"),
)
HELD_TRIPLES = set(_TRIPLES) | {(b, INVERSE[r], a) for a, r, b in _TRIPLES}


def related(a, relation, b):
    """Whether `a` stands in `relation` to `b`: clearly so, and within 60 degrees of the axis."""
    dx, dy = b.x - a.x, b.y - a.y
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead > 0.1 and ahead > 0.5 * math.hypot(dx, dy)


def held_out(scene):
    """Whether the scene contains any combination that training must not show."""
    shapes = [o.shape for o in scene.objects]
    return (any((o.colour, o.shape) in HELD_COLOURS for o in scene.objects)
            or any((shapes.count(s), s) in HELD_COUNTS for s in shapes)
            or any(frozenset(pair) in HELD_PAIRS for pair in combinations(shapes, 2))
            or any((a.shape, r, b.shape) in HELD_TRIPLES and related(a, r, b)
                   for a, b in permutations(scene.objects, 2) for r in RELATIONS))


def is_validation(scene):
    """One scene in 16, by all but its style: training and validation can never overlap."""
    content = repr((sorted(scene.objects), scene.background))
    return zlib.crc32(content.encode()) % 16 == 0


# ------------------------------------------------------------------------------------------------
# Scenes

def _place(rng, sizes, width, height, grid):
    """Centres for objects of these sizes, apart from each other and from the edge, or None."""
    placed = []
    for size in sizes:
        reach = REACH * SIZES[size]
        low = math.ceil((reach + 0.03) * grid)
        for _ in range(8):
            x = rng.randint(low, int(width * grid) - low) / grid
            y = rng.randint(low, int(height * grid) - low) / grid
            if all(math.hypot(x - u, y - v) > reach + other + 0.04 for u, v, other in placed):
                placed.append((x, y, reach))
                break
        else:
            return None
    return [(x, y) for x, y, _ in placed]


def _compose(rng, task, width, height, grid):
    """One scene of a task, without regard to the split; None if it did not fit."""
    number = {"single object": 1, "colours": 1, "counting": rng.randint(2, 4),
              "dense": rng.randint(3, 4)}.get(task, 2)
    if task == "counting":
        shapes = [rng.choice(SHAPES)] * number
    elif task == "dense":
        shapes = rng.choices(SHAPES, k=number)
    else:
        shapes = rng.sample(SHAPES, number)
    colours = rng.choices(tuple(COLOURS), k=number)
    if task == "counting" and rng.random() < 0.5:
        colours = colours[:1] * number
    if task == "dense" and len(set(zip(colours, shapes))) < number:
        return None  # dense captions name objects by colour and shape: these must be unique
    sizes = rng.choices(tuple(SIZES), k=number)
    centres = _place(rng, sizes, width, height, grid)
    if centres is None:
        return None
    objects = tuple(Object(s, c, z, *xy) for s, c, z, xy in zip(shapes, colours, sizes, centres))
    if task == "position" and not any(related(objects[0], r, objects[1]) for r in RELATIONS):
        return None
    return Scene(objects, rng.choice(tuple(BACKGROUNDS)))


def draw_scene(rng, task, split="train", width=1.0, height=1.0, grid=GRID):
    """A random scene of one task.

    split: "train" and "val" hold no held-out combination and are disjoint; "held" holds one;
    "any" is not filtered. width, height: of the picture, in units of its shorter side.
    grid: centres are multiples of 1/grid; a coarse grid makes a world that is learned sooner.
    """
    while True:
        scene = _compose(rng, task, width, height, grid)
        if scene is None:
            continue
        if split == "any" or (held_out(scene) if split == "held" else
                              not held_out(scene) and is_validation(scene) == (split == "val")):
            return scene


def draw_task(rng, tasks=MIXTURE):
    """A task, drawn by its training weight."""
    return rng.choices(tuple(tasks), weights=[MIXTURE[task] for task in tasks])[0]


# ------------------------------------------------------------------------------------------------
# Words

def _plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def _noun(o, article="a"):
    words = " ".join(w for w in (o.size, o.colour, o.shape) if w)
    return f"an {words}" if article == "a" and words[0] in "aeiou" else f"{article} {words}".strip()


def _keep(rng, o, colour, size):
    """The object as a caption names it: colour and size with these probabilities, place never."""
    return Object(o.shape, o.colour if rng.random() < colour else None,
                  o.size if rng.random() < size else None)


def describe(rng, scene, task):
    """A caption of the scene in the manner of the task, and what it commits to.

    Half of the captions are GenEval's own templates; the rest vary prefix and wording and may add
    a colour, a size or the background. Of those with a relation most name colours (which of two
    shapes is where shows little in a noisy picture, which of two colours shows at once), and half
    say the converse, too: a language model that never needs to tell "left of" from "right of"
    gives both the same states.
    """
    plain = task != "dense" and rng.random() < 0.5
    prefix = PREFIXES[0] if plain else rng.choice(PREFIXES)
    colour = {"colours": 1, "attribution": 1, "dense": 1}.get(
        task, 0 if plain else 0.8 if task == "position" else 0.4)
    said = tuple(_keep(rng, o, colour, 0 if plain else 0.25) for o in scene.objects)
    background = scene.background if not plain and rng.random() < 0.4 else None
    relations = ()
    if task == "counting":
        same = len({o.colour for o in scene.objects}) == 1
        tint = scene.objects[0].colour if same and not plain and rng.random() < 0.5 else None
        said = tuple(Object(o.shape, tint) for o in scene.objects)
        words = " ".join(w for w in (NUMBERS[len(said)], tint, _plural(said[0].shape)) if w)
    elif task == "position":
        true = [r for r in RELATIONS if related(scene.objects[0], r, scene.objects[1])]
        relation = rng.choice(true)
        wording = RELATIONS[relation][0] if plain else rng.choice(RELATIONS[relation])
        relations = ((0, relation, 1),)
        words = f"{_noun(said[0])} {wording} {_noun(said[1])}"
    elif task == "dense":
        words = " , ".join(map(_noun, said[:-1])) + " and " + _noun(said[-1])
    else:
        words = " and ".join(map(_noun, said))
    text = f"{prefix} {words}".strip()
    if background:
        text += f" on {_noun(Object(None, background))} background"
    if task == "position" and not plain and rng.random() < 0.5:
        a, b = (_noun(Object(o.shape, o.colour), "the") for o in said)
        text += f" , {b} is {rng.choice(RELATIONS[INVERSE[relation]])} {a}"
        relations += ((1, INVERSE[relation], 0),)
    if task == "dense":
        true = [(i, r, j) for i, j in permutations(range(len(said)), 2) for r in RELATIONS
                if related(scene.objects[i], r, scene.objects[j])]
        relations = tuple(rng.sample(true, min(len(true), rng.randint(0, 5 - len(said)))))
        for i, r, j in relations:
            a, b = (_noun(Object(said[k].shape, said[k].colour), "the") for k in (i, j))
            text += f" , {a} is {rng.choice(RELATIONS[r])} {b}"
    return Prompt(text, task, said, relations, background)


def ask(rng, scene):
    """A question about the scene and its answer, both as text."""
    shapes, colours = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
    o = rng.choice(scene.objects)
    kinds = ["background", "number", "exists"]
    kinds += ["colour"] * 2 if shapes.count(o.shape) == 1 else []
    kinds += ["shape"] * 2 if colours.count(o.colour) == 1 else []
    unique = [p for p in scene.objects if shapes.count(p.shape) == 1]
    right = [(a, [r for r in RELATIONS if related(a, r, b)], b) for a, b in permutations(unique, 2)]
    true = [(a, r[0], b) for a, r, b in right if len(r) == 1]  # on a diagonal two are right
    kinds += ["relation"] * 2 if true else []
    kind = rng.choice(kinds)
    if kind == "background":
        return "what colour is the background ?", scene.background
    if kind == "number":
        number = shapes.count(o.shape)
        return f"how many {_plural(o.shape)} are there ?", "one" if number == 1 else NUMBERS[number]
    if kind == "exists":  # a false question asks only for combinations that training may show
        c, s = o.colour, o.shape
        if rng.random() < 0.5:
            seen = set(zip(colours, shapes)) | HELD_COLOURS
            c, s = rng.choice([p for p in ((c, s) for c in COLOURS for s in SHAPES)
                               if p not in seen])
        there = (c, s) in zip(colours, shapes)
        return f"is there {_noun(Object(s, c))} ?", "yes" if there else "no"
    if kind == "colour":
        return f"what colour is the {o.shape} ?", o.colour
    if kind == "shape":
        return f"what shape is the {o.colour} object ?", o.shape
    a, relation, b = rng.choice(true)
    where = {"left of": "left", "right of": "right"}.get(relation, relation)
    return f"where is the {a.shape} relative to the {b.shape} ?", where


def benchmark(task, number, seed=0, held=False):
    """`number` prompts of a GenEval task in GenEval's template, seen or held-out combinations."""
    if task not in TASKS:
        raise ValueError(f"no benchmark for task {task!r}, expected one of: {', '.join(TASKS)}")
    rng = random.Random(f"benchmark {task} {seed} {held}")
    pairs = {h: [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_COLOURS) == h]
             for h in (False, True)}
    duos = {h: [p for p in permutations(SHAPES, 2) if (frozenset(p) in HELD_PAIRS) == h]
            for h in (False, True)}
    return [_benchmark_prompt(rng, task, held, pairs, duos) for _ in range(number)]


def _benchmark_prompt(rng, task, held, pairs, duos):
    if task == "single object":
        said = (Object(rng.choice(SHAPES)),)
    elif task == "two objects":
        said = tuple(map(Object, rng.choice(duos[held])))
    elif task == "counting":
        n, s = rng.choice([(n, s) for n in NUMBERS for s in SHAPES
                           if ((n, s) in HELD_COUNTS) == held])
        said = (Object(s),) * n
        return Prompt(f"a photo of {NUMBERS[n]} {_plural(s)}", task, said)
    elif task == "colours":
        c, s = rng.choice(pairs[held])
        said = (Object(s, c),)
    elif task == "position":
        a, relation, b = rng.choice([(a, r, b) for a, b in duos[False] for r in RELATIONS
                                     if ((a, r, b) in HELD_TRIPLES) == held])
        said = (Object(a), Object(b))
        text = f"a photo of {_noun(said[0])} {relation} {_noun(said[1])}"
        return Prompt(text, task, said, ((0, relation, 1),))
    else:  # attribution: a held-out prompt has one held-out object
        while True:
            (c, s), (d, z) = rng.choice(pairs[held]), rng.choice(pairs[False])
            if (s, z) in duos[False]:
                break
        said = (Object(s, c), Object(z, d))
        said = said if rng.random() < 0.5 else said[::-1]
    return Prompt("a photo of " + " and ".join(map(_noun, said)), task, said)


def satisfies(prompt, scene):
    """Whether the scene shows exactly what the prompt asks for: nothing missing, nothing more."""
    if (len(prompt.objects) != len(scene.objects) or scene.background is None
            or prompt.background not in (None, scene.background) or scene.style != "filled"):
        return False

    def fits(want, seen):
        return (None not in (seen.shape, seen.colour)
                and all(w in (None, s) for w, s in zip(want[:3], seen[:3])))

    return any(all(map(fits, prompt.objects, order))
               and all(related(order[i], r, order[j]) for i, r, j in prompt.relations)
               for order in permutations(scene.objects))


# ------------------------------------------------------------------------------------------------
# Pictures

def pack(scenes):
    """Scenes as a tensor (B, 1 + 4*5): background, then shape (-1: none), colour, size, x, y.

    The background's number is 4 higher for an outlined scene.
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
    """Distance of points to the shape's edge, negative inside; in radii, centre at the origin."""
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
    if shape == "hexagon":
        return torch.maximum(0.75 ** 0.5 * ax + 0.5 * ay, ay) - 0.92
    raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")


def coverage(shape, x, y, radius, line=math.inf):
    """Share of each pixel that the shape covers; x, y, radius and the line's width in pixels."""
    inside = 0.5 - signed_distance(shape, x / radius, y / radius) * radius
    return inside.clamp(0, 1) - (inside - line).clamp(0, 1)


def _palette(table, device):
    return torch.tensor(list(table.values()), dtype=torch.get_default_dtype(), device=device)


def render(packed, height=128, width=128, device="cpu"):
    """Draw packed scenes (B, 21) on the device: (B, 3, height, width), values in [-1, 1].

    The scenes should lie in host memory: sorted by shape there, they do not synchronise a GPU.
    """
    unit, radii = min(height, width), torch.tensor(list(SIZES.values()))
    lines, first = torch.tensor(list(STYLES.values())), packed[:, 0].long()           # (2,), (B,)
    style, background = first // len(BACKGROUNDS), first % len(BACKGROUNDS)           # (B,) each
    backgrounds = _palette(BACKGROUNDS, packed.device)[background]                    # (B, 3)
    image = move(backgrounds, device)[:, :, None, None].repeat(1, 1, height, width)   # (B, 3, H, W)
    objects = packed[:, 1:].unflatten(1, (MAX_OBJECTS, 5))                            # (B, 4, 5)
    py = torch.arange(height, device=device)[:, None] + 0.5
    px = torch.arange(width, device=device)[None, :] + 0.5
    for index, shape in enumerate(SHAPES):
        picture, slot = (objects[:, :, 0] == index).nonzero(as_tuple=True)            # (O,), (O,)
        _, colour, size, x, y = objects[picture, slot].unbind(1)                      # (O,) each
        paint = _palette(COLOURS, packed.device)[colour.long()] - backgrounds[picture]  # (O, 3)
        radius = radii.to(packed.device)[size.long()]                                 # (O,)
        line = radius * lines.to(packed.device)[style[picture]]                       # (O,)
        place = torch.stack((x, y, radius, line)) * unit                              # (4, O)
        x, y, *pen = move(place, device)[:, :, None, None].unbind()                 # (O, 1, 1) each
        alpha = coverage(shape, px - x, py - y, *pen)[:, None]                        # (O, 1, H, W)
        image.index_add_(0, move(picture, device), alpha * move(paint, device)[:, :, None, None])
    return image / 127.5 - 1  # objects never overlap, so adding is painting


# ------------------------------------------------------------------------------------------------
# The judge: from pixels back to objects, by segmenting and then by trying to redraw each segment

NOT_BACKGROUND = 45.0  # distance in 8-bit RGB from which a pixel belongs to an object
COLOUR_TOLERANCE = 45.0
SHAPE_TOLERANCE = {"filled": 0.07, "outlined": 0.12}  # squared error of the best redrawing,
# relative to its own energy; both admit a star's radius within 10 %, other shapes' within less
SPECK = 8e-4            # smaller segments, as a share of the picture, are noise


def _components(mask):
    """8-connected components of (B, H, W) masks: each pixel gets the largest index of its own."""
    B, H, W = mask.shape
    index = torch.arange(H * W, device=mask.device, dtype=torch.float32).view(1, H, W)
    label = torch.where(mask, index, -1.0)                                            # (B, H, W)
    while True:
        spread = torch.where(mask, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], -1.0)
        root = spread.flatten(1)                                                      # (B, H*W)
        root = root.gather(1, root.long().clamp(min=0)).view(B, H, W)  # jump to the label's label
        new = torch.where(mask, root, -1.0)
        if torch.equal(new, label):
            return label.long()
        label = new


def _nearest(colour, table, tolerance):
    """Names of the nearest palette entries of (O, 3) colours; None where none is near."""
    distance, index = torch.cdist(colour, _palette(table, colour.device)).min(1)
    names = tuple(table)
    return [names[i] if d < tolerance else None for i, d in zip(index.tolist(), distance.tolist())]


@torch.no_grad()
def judge(images):
    """What pictures (B, 3, H, W) in [-1, 1] show: a list of B scenes, by pixels alone.

    An object whose shape, size or colour fits none that the world knows carries None there.
    """
    rgb = (images.float().clamp(-1, 1) + 1) * 127.5
    B, _, H, W = rgb.shape
    unit, device = min(H, W), rgb.device
    border = torch.cat([rgb[:, :, :2].flatten(2), rgb[:, :, -2:].flatten(2),
                        rgb[:, :, :, :2].flatten(2), rgb[:, :, :, -2:].flatten(2)], 2)
    background = border.median(2).values                                              # (B, 3)
    label = _components((rgb - background[:, :, None, None]).norm(dim=1) > NOT_BACKGROUND)
    offset = torch.arange(B, device=device)[:, None, None] * H * W
    area = torch.bincount((label + offset)[label >= 0], minlength=B * H * W)
    roots = (area >= max(6, SPECK * H * W)).nonzero()[:, 0]                           # (O,)
    picture, root = roots // (H * W), roots % (H * W)
    seen = _read(rgb, label, background, picture, root, area[roots], unit) if len(roots) else []
    found = [[] for _ in range(B)]
    for b, one in zip(picture.tolist(), seen):
        found[b] += [one] if one else []
    names = _nearest(background, BACKGROUNDS, COLOUR_TOLERANCE)
    return [Scene(tuple(o for o, _ in objects), name, _common_style(objects))
            for objects, name in zip(found, names)]


def _common_style(objects):
    """The style of (object, style) pairs; None if it is not one."""
    styles = {style for o, style in objects if o.shape} or {"filled"}
    return min(styles) if len(styles) == 1 else None


def _read(rgb, label, background, picture, root, area, unit):
    """(object, style) of each segment: what is no filled shape may be an outline.

    The outline of a ring is two circles. So of two unknown segments with one centre the first is
    read as both, and the second one's place holds None.
    """
    seen = [(o, "filled") for o in _recognise(rgb, label, background, picture, root, unit)]
    where, area, unknown = picture.tolist(), area.tolist(), []
    for i, (o, _) in enumerate(seen):
        twins = [j for j in unknown if where[i] == where[j] and 0.4 < area[i] / area[j] < 2.5
                 and math.hypot(seen[j][0].x - o.x, seen[j][0].y - o.y) < 0.02]
        if o.shape is None and twins:
            own = label[where[i]]
            own[own == root[i]], seen[i] = root[twins[0]], None
        elif o.shape is None:
            unknown.append(i)
    if unknown:
        rest = rgb, label, background, picture[unknown], root[unknown], unit
        for i, o in zip(unknown, _recognise(*rest, style="outlined")):
            if o.shape:
                seen[i] = o, "outlined"
    return seen


def _recognise(rgb, label, background, picture, root, unit, style="filled"):
    """Name each segment by the object in this style that redraws it best."""
    device, half = rgb.device, math.ceil(1.2 * SIZES["large"] * unit) + 3
    own = label[picture] == root[:, None, None]                                       # (O, H, W)
    mass = own.flatten(1).sum(1)
    cy = (own.sum(2) * torch.arange(own.shape[1], device=device)).sum(1) / mass
    cx = (own.sum(1) * torch.arange(own.shape[2], device=device)).sum(1) / mass
    y0, x0 = cy.round().long(), cx.round().long()
    reach = torch.arange(-half, half + 1, device=device)
    rows, columns = (y0[:, None] + half + reach), (x0[:, None] + half + reach)        # (O, P) each
    at = (picture[:, None, None], rows[:, :, None], columns[:, None, :])
    window = F.pad(rgb, [half] * 4, value=-1e4).permute(0, 2, 3, 1)[at]               # (O, P, P, 3)
    labels = F.pad(label, [half] * 4, value=-2)[at]                                   # (O, P, P)
    mine = labels == root[:, None, None]
    paper = background[picture][:, None, None]                                        # (O, 1, 1, 3)
    contrast = torch.where(mine, (window - paper).norm(dim=-1), torch.nan)            # (O, P, P)
    if style == "outlined":  # a thin line is mostly soft edge: its strongest eighth has its colour
        rank = 7 * mine.flatten(1).sum(1, keepdim=True) // 8
        least = contrast.flatten(1).sort(1).values.gather(1, rank)
        contrast = contrast.where(contrast >= least[..., None], torch.nan)
    nan = window.where(~contrast.isnan()[..., None], torch.nan).flatten(1, 2)
    colour = nan.nanmedian(1).values                                                  # (O, 3)
    ink = colour[:, None, None] - paper                                               # (O, 1, 1, 3)
    # Besides its own pixels an object has a soft edge, and no share in its neighbours' edges.
    near = F.max_pool2d(mine[:, None].float(), 3, 1, 1)[:, 0] > 0                     # (O, P, P)
    keep = mine | (near & (labels == -1))                                             # (O, P, P)
    alpha = ((window - paper) * ink).sum(-1) / ink.square().sum(-1)
    alpha = torch.where(keep, alpha, 0).clamp(0, 1)                                   # (O, P, P)
    inner = F.max_pool2d((~mine)[:, None].float(), 3, 1, 1)[:, 0] == 0                # (O, P, P)
    stray = (window - colour[:, None, None]).norm(dim=-1) > COLOUR_TOLERANCE          # (O, P, P)
    if style == "outlined":  # and soft edges are no stray colours
        inner = mine
        stray = (window - paper - alpha[..., None] * ink).norm(dim=-1) > COLOUR_TOLERANCE
    mixed = ((stray & inner).sum((1, 2)) / inner.sum((1, 2)) > 0.1).tolist()  # not of one colour
    total = alpha.sum((1, 2))
    ox = ((alpha.sum(1) * reach).sum(1) / total)[:, None, None]
    oy = ((alpha.sum(2) * reach).sum(1) / total)[:, None, None]
    radii, line = torch.tensor(list(SIZES.values()), device=device) * unit, STYLES[style]
    errors, sizes = [], []
    for shape in SHAPES:
        at_one = [coverage(shape, reach.float(), reach[:, None].float(), r, line * r).sum()
                  for r in radii]
        size = (total[:, None].log() - torch.stack(at_one).log()).abs().argmin(1)     # (O,)
        radius = radii[size][:, None, None]                                           # (O, 1, 1)
        drawn = coverage(shape, reach - ox, reach[:, None] - oy, radius, line * radius)
        errors.append((drawn - alpha).square().sum((1, 2)) / drawn.square().sum((1, 2)))  # (O,)
        sizes.append(size)
    error, best = torch.stack(errors).min(0)
    size = torch.stack(sizes).gather(0, best[None])[0]
    colours = _nearest(colour, COLOURS, COLOUR_TOLERANCE)
    x, y = ((x0 + ox[:, 0, 0] + 0.5) / unit).tolist(), ((y0 + oy[:, 0, 0] + 0.5) / unit).tolist()
    for i, (e, b, z) in enumerate(zip(error.tolist(), best.tolist(), size.tolist())):
        known = e < SHAPE_TOLERANCE[style]
        yield Object(SHAPES[b] if known else None, None if mixed[i] else colours[i],
                     tuple(SIZES)[z] if known else None, x[i], y[i])
