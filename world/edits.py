"""Edits of the small world: ImgEdit's nine types as instructions, and an exact score of results.

MoS-Edit (MoS sec. 3.4, App. B.5) gets a reference picture and an instruction, and draws the edited
picture. Here an edit is a source scene, a text, and a target scene.

If a text leaves open where an object goes, many pictures are right, but the target follows one
rule, so that it can be learned: straight beside the other object (or, moved "to the left", its own
old place), one STEP away; or as near to a corner as a large object may be. If that is not free,
another edit is drawn. Attributes that a text does not name stay, also if the shape is replaced.
"""

import math
import random
from functools import lru_cache
from itertools import combinations, permutations, product
from typing import NamedTuple

import torch
import torch.nn.functional as F

from world import shapes
from world.shapes import BACKGROUNDS, COLOURS, GRID, RELATIONS, SHAPES, SIZES, Object, Scene

EDIT_MIXTURE = {"add": 3, "adjust": 2, "extract": 1, "replace": 2, "remove": 1, "background": 1,
                "style": 1, "hybrid": 4, "action": 4}  # training weights
TYPES = tuple(EDIT_MIXTURE)  # ImgEdit's
# A hybrid joins two of these. The weights are higher for types that often do not fit.
PARTS = {"add": 4, "adjust": 3, "replace": 3, "remove": 2, "action": 8, "background": 1}
WORDINGS = {
    "add": ("add {new} {where}", "draw {new} {where}", "insert {new} {where}"),
    "colour": ("make {a} {value}", "change the colour of {a} to {value}", "paint {a} {value}"),
    "size": ("make {a} {value}", "change the size of {a} to {value}"),
    "extract": ("keep only {a}", "remove everything but {a}", "remove everything except {a}"),
    "replace": ("replace {a} with {new}", "turn {a} into {new}", "swap {a} for {new}"),
    "remove": ("remove {a}", "delete {a}", "erase {a}"),
    "background": ("change the background to {value}", "make the background {value}",
                   "use a {value} background"),
    "style": ("outline everything", "draw everything as outlines", "show only the outlines"),
    "place": ("move {a} {where}", "put {a} {where}", "place {a} {where}"),
    "shift": ("move {a} {where}", "shift {a} {where}", "push {a} {where}")}
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
DIRECTIONS = {"left of": ("to the left", "left"), "right of": ("to the right", "right"),
              "above": ("up", "upwards"), "below": ("down", "downwards")}
CORNERS = {"in the top left corner": (0, 0), "in the top right corner": (1, 0),
           "in the bottom left corner": (0, 1), "in the bottom right corner": (1, 1)}
STEP = 0.39      # between two centres: enough for large objects; rounded up to the grid
NEAR = 2 / 128   # an object that is at most two pixels of 128 away has not moved
IN_CORNER = 0.4  # largest distance to the picture's corner


class New(NamedTuple):
    """An object that an edit makes: "at" its place, "in" the corner `to`, or related to `to`."""
    object: Object
    relation: str = "at"
    to: Object | None = None


class Edit(NamedTuple):
    """An instruction. The source's objects `changed` go or become `new`, the others stay."""
    type: str
    text: str
    source: Scene
    target: Scene
    changed: tuple[int, ...]
    new: tuple[New, ...]


class Part(NamedTuple):
    """One demand of an instruction. about: the objects that it names; changed, new: as in Edit."""
    text: str
    about: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    new: tuple[New, ...] = ()
    scene: dict = {}  # new values of the scene's background or style


class Room(NamedTuple):
    """The size of a picture, and the grid of its objects' centres (see shapes.draw_scene)."""
    width: float = 1.0
    height: float = 1.0
    grid: int = GRID

    def beside(self, o, relation):
        """Return the centre one STEP away from an object."""
        step = math.ceil(STEP * self.grid) / self.grid
        dx, dy = SIDES[relation]
        return o.x + dx * step, o.y + dy * step

    def corner(self, right, bottom):
        """Return the centre of any object in a corner."""
        margin = math.ceil((shapes.REACH * SIZES["large"] + 0.03) * self.grid) / self.grid
        x = int(self.width * self.grid) / self.grid - margin if right else margin
        y = int(self.height * self.grid) / self.grid - margin if bottom else margin
        return x, y

    def fits(self, scene):
        """Return whether the objects are as far apart and off the edge as draw_scene puts them."""
        discs = [(o.x, o.y, shapes.REACH * SIZES[o.size]) for o in scene.objects]
        for x, y, radius in discs:
            if radius + 0.03 > min(x, y, self.width - x, self.height - y) + 1e-9:
                return False
        return all(math.hypot(x - u, y - v) > radius + other + 0.04
                   for (x, y, radius), (u, v, other) in combinations(discs, 2))


# --- Instructions ---------------------------------------------------------------------------------

@lru_cache(1)  # several edits are tried on a scene
def _names(scene):
    """Return for each object of a scene all noun phrases that fit it alone."""
    names = []
    for o in scene.objects:
        names.append([])
        for colour, size in product((None, o.colour), (None, o.size)):
            named = Object(o.shape, colour, size)
            if sum(shapes.matches(named, other) for other in scene.objects) == 1:
                names[-1].append(shapes.noun_phrase(named, "the"))
    return names


def _choose_other(rng, values, current):
    """Draw a value that is not the current one."""
    return rng.choice([value for value in values if value != current])


# Each of these draws a Part about a scene; names: a noun phrase for each of its objects.

def _add(rng, scene, names, room):
    o = Object(*(rng.choice(tuple(table)) for table in (SHAPES, COLOURS, SIZES)))
    if rng.random() < 0.7:  # an object beside another one fits less often than one in a corner
        j = rng.randrange(len(names))
        relation = rng.choice(tuple(SIDES))
        about = (j,)
        to = scene.objects[j]
        x, y = room.beside(to, relation)
        where = f"{rng.choice(RELATIONS[relation])} {names[j]}"
    else:
        where, (right, bottom) = rng.choice(tuple(CORNERS.items()))
        about = ()
        relation = "in"
        to = Object(None, x=right * room.width, y=bottom * room.height)
        x, y = room.corner(right, bottom)
    text = rng.choice(WORDINGS["add"]).format(new=shapes.noun_phrase(o), where=where)
    return Part(text, about, new=(New(o._replace(x=x, y=y), relation, to),))


def _adjust(rng, scene, names, room):
    i = rng.randrange(len(names))
    field, table = rng.choice((("colour", COLOURS), ("size", SIZES)))
    o = scene.objects[i]
    value = _choose_other(rng, table, getattr(o, field))
    text = rng.choice(WORDINGS[field]).format(a=names[i], value=value)
    return Part(text, (i,), (i,), (New(o._replace(**{field: value})),))


def _extract(rng, scene, names, room):
    i = rng.randrange(len(names))
    text = rng.choice(WORDINGS["extract"]).format(a=names[i])
    return Part(text, (i,), tuple(j for j in range(len(names)) if j != i))


def _replace(rng, scene, names, room):
    i = rng.randrange(len(names))
    o = scene.objects[i]
    new = o._replace(shape=_choose_other(rng, SHAPES, o.shape))
    named = Object(new.shape)
    if rng.random() < 0.3:
        new = new._replace(colour=_choose_other(rng, COLOURS, o.colour))
        named = Object(new.shape, new.colour)
    text = rng.choice(WORDINGS["replace"]).format(a=names[i], new=shapes.noun_phrase(named))
    return Part(text, (i,), (i,), (New(new),))


def _remove(rng, scene, names, room):
    i = rng.randrange(len(names))
    return Part(rng.choice(WORDINGS["remove"]).format(a=names[i]), (i,), (i,))


def _background(rng, scene, names, room):
    value = _choose_other(rng, BACKGROUNDS, scene.background)
    text = rng.choice(WORDINGS["background"]).format(value=value)
    return Part(text, scene={"background": value})


def _style(rng, scene, names, room):
    return Part(rng.choice(WORDINGS["style"]), scene={"style": "outlined"})


def _action(rng, scene, names, room):
    i = j = rng.randrange(len(names))
    if len(names) > 1 and rng.random() < 0.7:
        j = _choose_other(rng, range(len(names)), i)
    o, to = scene.objects[i], scene.objects[j]
    relation = rng.choice(tuple(SIDES))
    if i == j:
        wordings, where = WORDINGS["shift"], rng.choice(DIRECTIONS[relation])
    else:
        wordings, where = WORDINGS["place"], f"{rng.choice(RELATIONS[relation])} {names[j]}"
    x, y = room.beside(to, relation)
    text = rng.choice(wordings).format(a=names[i], where=where)
    return Part(text, tuple({i, j}), (i,), (New(o._replace(x=x, y=y), relation, to),))


_DRAW_PART = {"add": _add, "adjust": _adjust, "extract": _extract, "replace": _replace,
              "remove": _remove, "background": _background, "style": _style, "action": _action}


def instruct(rng, type, scene, room=Room()):
    """Draw an edit of this scene; None if it is ambiguous, changes nothing or does not fit."""
    if not all(_names(scene)):
        return None
    names = [rng.choice(phrases) for phrases in _names(scene)]
    types = rng.choices(tuple(PARTS), PARTS.values(), k=2) if type == "hybrid" else [type]
    parts = [_DRAW_PART[kind](rng, scene, names, room) for kind in types]
    about = [i for part in parts for i in part.about]
    if len(set(types)) < len(types) or len(set(about)) < len(about):
        return None  # both parts of a hybrid change the same
    text = " and ".join(part.text for part in parts)
    changed = tuple(i for part in parts for i in part.changed)
    new = tuple(made for part in parts for made in part.new)
    if any(_fulfils(scene.objects[i], made) for i in changed for made in new):
        return None  # the object is there already
    objects = [o for i, o in enumerate(scene.objects) if i not in changed]
    objects += [made.object for made in new]
    target = scene._replace(objects=tuple(objects))
    for part in parts:
        target = target._replace(**part.scene)
    if target == scene or not 0 < len(objects) <= shapes.MAX_OBJECTS or not room.fits(target):
        return None
    return Edit(type, text, scene, target, changed, new)


def draw_edit(rng, type, split="train", **size):
    """Draw a random edit of one type. Raises ValueError for an unknown type.

    split: in "train", "val" and "any" source and target are scenes of that split, see
    shapes.draw_scene. In "held" the edit makes a held-out combination from a scene of "train";
    extract, background and style cannot make one, and start from one instead. size: see Room.
    """
    if type not in TYPES:
        raise ValueError(f"unknown type of edit {type!r}, expected one of: {', '.join(TYPES)}")
    makes = split == "held" and type not in ("extract", "background", "style")
    while True:
        scene = shapes.draw_scene(rng, shapes.draw_task(rng), "train" if makes else split, **size)
        for _ in range(8):  # otherwise crowded scenes, in which few edits fit, would be rare
            edit = instruct(rng, type, scene, Room(**size))
            if edit and shapes.in_split(edit.target, split):
                return edit


def edit_benchmark(type, number, seed=0, held=False):
    """Return `number` edits of split "val" or, with `held`, "held"; training never shows them."""
    rng = random.Random(f"edits {type} {seed} {held}")
    return [draw_edit(rng, type, "held" if held else "val") for _ in range(number)]


def words():
    """Return every word that instructions use."""
    texts = [*CORNERS, *SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, "a an the and"]
    for table in (WORDINGS, RELATIONS, DIRECTIONS):
        for wordings in table.values():
            texts += wordings
    return {word for text in texts for word in text.split() if word[0] != "{"}


# --- The score of a result ------------------------------------------------------------------------

def _fulfils(o, new):
    """Return whether an object is the New one that an edit asks for, in a place that is allowed."""
    if o[:3] != new.object[:3]:
        return False
    if new.relation in SIDES:
        return shapes.related(o, new.relation, new.to)
    goal, distance = (new.object, NEAR) if new.relation == "at" else (new.to, IN_CORNER)
    return math.hypot(o.x - goal.x, o.y - goal.y) <= distance


def score(edit, judged):
    """Return (asked, kept): does a judged scene show what the text wants, and the rest as before?

    asked: the new objects are there, where the text allows, and the changed ones are not; the
    background and the style are those asked for. kept: every other object has its shape, colour,
    size and place, no object is extra, and a background or style that should stay has stayed.
    """
    left = list(judged.objects)

    def take(o):
        match = next((p for p in left if _fulfils(p, New(o))), None)
        if match:
            left.remove(match)
        return bool(match)

    unchanged = [take(edit.source.objects[i]) for i in edit.changed]
    kept = [take(o) for i, o in enumerate(edit.source.objects) if i not in edit.changed]
    kept.append(len(left) <= len(edit.new))
    made = any(all(map(_fulfils, order, edit.new)) for order in permutations(left, len(edit.new)))
    asked = [made and not any(unchanged)]
    for field in ("background", "style"):
        wanted = getattr(edit.target, field)
        demands = kept if wanted == getattr(edit.source, field) else asked
        demands.append(getattr(judged, field) == wanted)
    return all(asked), all(kept)


def outside(edit, height=128, width=128):
    """Return the pixels that an edit must not change, for their PSNR: booleans (height, width).

    All others are where source and target differ, or in discs around the objects that the edit
    changes or makes, with a margin of two pixels of 128.
    """
    unit = min(height, width)
    source, target = shapes.render(shapes.pack([edit.source, edit.target]), height, width)
    margin = math.ceil(NEAR * unit)
    differs = (source != target).any(0).float()[None]
    inside = F.max_pool2d(differs, 2 * margin + 1, 1, margin)[0] > 0
    y = (torch.arange(height)[:, None] + 0.5) / unit
    x = (torch.arange(width)[None, :] + 0.5) / unit
    for o in (*(edit.source.objects[i] for i in edit.changed), *(made.object for made in edit.new)):
        inside |= torch.hypot(x - o.x, y - o.y) < 1.2 * SIZES[o.size] + NEAR
    return ~inside
