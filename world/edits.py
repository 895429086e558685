"""Edits of the small world: ImgEdit's nine types as instructions, and an exact score of results.

MoS-Edit (MoS sec. 3.4, App. B.5) gets a reference picture and an instruction and draws the edited
picture. An edit here is a source scene, a text, and a target scene. `score` compares any judged
picture with what the text asks for and with what it does not speak of; `outside` tells which pixels
have nothing to do with it.

A text may leave open where an object goes. Then many pictures are right, and the target is drawn by
one rule, so that it can be learned: beside another object (or, moved "to the left", beside its own
old place) an object comes to lie straight on that side, one STEP away; in a corner it lies as near
to the corner as a large object may. Where that place is not free, another edit is drawn. What a
text does not name stays: a circle that is replaced with "a star" passes on its colour and size.
"""

import math
import random
from functools import lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F

from world import shapes
from world.shapes import (BACKGROUNDS, COLOURS, GRID, MAX_OBJECTS, REACH, RELATIONS, SHAPES, SIZES,
                          Object, Scene, held_out, is_validation, pack, related, render)

EDIT_MIXTURE = {"add": 3, "adjust": 2, "extract": 1, "replace": 2, "remove": 1, "background": 1,
                "style": 1, "hybrid": 4, "action": 4}  # training weights
TYPES = tuple(EDIT_MIXTURE)  # ImgEdit's
PARTS = {"add": 4, "adjust": 3, "replace": 3, "remove": 2, "action": 8,
         "background": 1}  # hybrids join two of these; what seldom fits is tried more often
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
    "shift": ("move {a} {where}", "shift {a} {where}", "push {a} {where}"),
}
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
DIRECTIONS = {"left of": ("to the left", "left"), "right of": ("to the right", "right"),
              "above": ("up", "upwards"), "below": ("down", "downwards")}
CORNERS = {"in the top left corner": (0, 0), "in the top right corner": (1, 0),
           "in the bottom left corner": (0, 1), "in the bottom right corner": (1, 1)}
STEP = 0.39      # more than two large objects need side by side, rounded up to the grid
NEAR = 2 / 128   # what lies within two pixels of 128 has not moved
IN_CORNER = 0.4  # distance to the picture's corner


class New(NamedTuple):
    """An object that an edit makes: `at` its place, `in` the corner `to`, or so related to `to`."""
    object: Object
    relation: str = "at"
    to: Object | None = None


class Edit(NamedTuple):
    """An instruction; `changed` of the source's objects go or turn into `new`, the others stay."""
    type: str
    text: str
    source: Scene
    target: Scene
    changed: tuple[int, ...]
    new: tuple[New, ...]


class Part(NamedTuple):
    """One demand. about: objects that it names or changes; look: other fields of the scene."""
    text: str
    about: tuple
    changed: tuple[int, ...] = ()
    new: tuple[New, ...] = ()
    look: dict = {}


class Room(NamedTuple):
    """The picture in which scenes are placed (see shapes.draw_scene)."""
    width: float
    height: float
    grid: int

    def beside(self, o, relation):
        """The place one STEP from an object."""
        step = math.ceil(STEP * self.grid) / self.grid
        dx, dy = SIDES[relation]
        return o.x + dx * step, o.y + dy * step

    def corner(self, right, bottom):
        """The place of any object in a corner."""
        margin = math.ceil((REACH * SIZES["large"] + 0.03) * self.grid) / self.grid
        width, height = (int(side * self.grid) / self.grid for side in (self.width, self.height))
        return width - margin if right else margin, height - margin if bottom else margin

    def holds(self, scene):
        """Whether the objects lie apart and off the edge as far as shapes.draw_scene places them.
        """
        discs = [(o.x, o.y, REACH * SIZES[o.size]) for o in scene.objects]
        return (all(r + 0.03 <= min(x, y, self.width - x, self.height - y) + 1e-9
                    for x, y, r in discs)
                and all(math.hypot(x - u, y - v) > r + other + 0.04
                        for (x, y, r), (u, v, other) in combinations(discs, 2)))


# ------------------------------------------------------------------------------------------------
# Instructions

@lru_cache(1)  # several edits are tried on a scene
def _names(scene):
    """For each object of the scene, all noun phrases that fit it alone."""
    def fits(want):
        return sum(all(w in (None, v) for w, v in zip(want[:3], p)) for p in scene.objects)

    return [[shapes._noun(want, "the") for want in
             (Object(o.shape, c, z) for c in (None, o.colour) for z in (None, o.size))
             if fits(want) == 1] for o in scene.objects]


def _other(rng, table, value):
    return rng.choice([one for one in table if one != value])


def _add(rng, scene, names, room):
    o = Object(*map(rng.choice, map(tuple, (SHAPES, COLOURS, SIZES))))
    if rng.random() < 0.7:  # which fits less often than a corner
        j, relation = rng.randrange(len(names)), rng.choice(tuple(SIDES))
        about, to, place = (j,), scene.objects[j], room.beside(scene.objects[j], relation)
        where = f"{rng.choice(RELATIONS[relation])} {names[j]}"
    else:
        where, (right, bottom) = rng.choice(tuple(CORNERS.items()))
        to = Object(None, x=right * room.width, y=bottom * room.height)
        about, relation, place = (), "in", room.corner(right, bottom)
    new = New(o._replace(x=place[0], y=place[1]), relation, to)
    text = rng.choice(WORDINGS["add"]).format(new=shapes._noun(o), where=where)
    return Part(text, about, new=(new,))


def _adjust(rng, scene, names, room):
    i, (field, table) = rng.randrange(len(names)), rng.choice((("colour", COLOURS),
                                                               ("size", SIZES)))
    o = scene.objects[i]
    value = _other(rng, table, getattr(o, field))
    text = rng.choice(WORDINGS[field]).format(a=names[i], value=value)
    return Part(text, (i,), (i,), (New(o._replace(**{field: value})),))


def _extract(rng, scene, names, room):
    i, everything = rng.randrange(len(names)), range(len(names))
    text = rng.choice(WORDINGS["extract"]).format(a=names[i])
    return Part(text, tuple(everything), tuple(j for j in everything if j != i))


def _replace(rng, scene, names, room):
    i = rng.randrange(len(names))
    o = scene.objects[i]
    new = o._replace(shape=_other(rng, SHAPES, o.shape))
    said = Object(new.shape)
    if rng.random() < 0.3:
        new = new._replace(colour=_other(rng, COLOURS, o.colour))
        said = Object(new.shape, new.colour)
    text = rng.choice(WORDINGS["replace"]).format(a=names[i], new=shapes._noun(said))
    return Part(text, (i,), (i,), (New(new),))


def _remove(rng, scene, names, room):
    i = rng.randrange(len(names))
    return Part(rng.choice(WORDINGS["remove"]).format(a=names[i]), (i,), (i,))


def _background(rng, scene, names, room):
    value = _other(rng, BACKGROUNDS, scene.background)
    text = rng.choice(WORDINGS["background"]).format(value=value)
    return Part(text, ("background",), look={"background": value})


def _style(rng, scene, names, room):
    text = rng.choice(WORDINGS["style"])
    return Part(text, tuple(range(len(names))), look={"style": "outlined"})


def _action(rng, scene, names, room):
    i = rng.randrange(len(names))
    j = _other(rng, range(len(names)), i) if len(names) > 1 and rng.random() < 0.7 else i
    o, to, relation = scene.objects[i], scene.objects[j], rng.choice(tuple(SIDES))
    if i == j:
        wordings, where = WORDINGS["shift"], rng.choice(DIRECTIONS[relation])
    else:
        wordings, where = WORDINGS["place"], f"{rng.choice(RELATIONS[relation])} {names[j]}"
    x, y = room.beside(to, relation)
    text = rng.choice(wordings).format(a=names[i], where=where)
    return Part(text, (i,) if i == j else (i, j), (i,),
                (New(o._replace(x=x, y=y), relation, to),))


_DRAW = {"add": _add, "adjust": _adjust, "extract": _extract, "replace": _replace,
         "remove": _remove, "background": _background, "style": _style, "action": _action}


def instruct(rng, type, scene, width=1.0, height=1.0, grid=GRID):
    """An edit of this scene; None where the one that was drawn is ambiguous, idle or does not fit.
    """
    room, names = Room(width, height, grid), _names(scene)
    if not all(names):
        return None
    names = [rng.choice(one) for one in names]
    types = rng.choices(tuple(PARTS), PARTS.values(), k=2) if type == "hybrid" else [type]
    parts = [_DRAW[one](rng, scene, names, room) for one in types]
    about = [one for part in parts for one in part.about]
    changed = tuple(i for part in parts for i in part.changed)
    new = tuple(one for part in parts for one in part.new)
    objects = (*(o for i, o in enumerate(scene.objects) if i not in changed),
               *(one.object for one in new))
    look = {field: value for part in parts for field, value in part.look.items()}
    target = scene._replace(objects=objects, **look)
    if (len(set(types)) < len(types)
            or len(set(about)) < len(about)  # both parts of a hybrid speak of one object
            or any(_stands(scene.objects[i], one) for i in changed for one in new)  # already there
            or target == scene or not 0 < len(objects) <= MAX_OBJECTS or not room.holds(target)):
        return None
    return Edit(type, " and ".join(part.text for part in parts), scene, target, changed, new)


def draw_edit(rng, type, split="train", width=1.0, height=1.0, grid=GRID):
    """A random edit of one type.

    split: in "train", "val" and "any" source and target are scenes of that split, see
    shapes.draw_scene. In "held" the edit makes a held-out combination from a scene of "train"; but
    extract, background and style, which can make none, keep one. width, height, grid: as there.
    Raises ValueError for an unknown type.
    """
    if type not in TYPES:
        raise ValueError(f"unknown type of edit {type!r}, expected one of: {', '.join(TYPES)}")
    makes = split == "held" and type not in ("extract", "background", "style")
    while True:
        task = shapes.draw_task(rng)
        scene = shapes.draw_scene(rng, task, "train" if makes else split, width, height, grid)
        for _ in range(8):  # or there would be few crowded scenes, in which least fits
            edit = instruct(rng, type, scene, width, height, grid)
            if edit and (split == "any" or (held_out(edit.target) if split == "held" else
                         not held_out(edit.target)
                         and is_validation(edit.target) == (split == "val"))):
                return edit


def edit_benchmark(type, number, seed=0, held=False):
    """`number` edits of one type that training never shows, with or without held-out combinations.
    """
    rng = random.Random(f"edits {type} {seed} {held}")
    return [draw_edit(rng, type, "held" if held else "val") for _ in range(number)]


def words():
    """Every word that instructions use."""
    texts = [wording for table in (WORDINGS, RELATIONS, DIRECTIONS) for one in table.values()
             for wording in one]
    texts += [*CORNERS, *SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, "a an the and"]
    return {word for text in texts for word in text.split() if word[0] != "{"}


# ------------------------------------------------------------------------------------------------
# Judging a result

def _stands(o, new):
    """Whether a seen object is what an edit asks for, at one of the places where it may be."""
    if o[:3] != new.object[:3]:
        return False
    if new.relation in SIDES:
        return related(o, new.relation, new.to)
    place, far = (new.object, NEAR) if new.relation == "at" else (new.to, IN_CORNER)
    return math.hypot(o.x - place.x, o.y - place.y) <= far


def score(edit, seen):
    """(asked, kept) of a judged scene: does it show what the text wants, and the rest as before?

    asked: the new objects are there, where the text allows, and the changed ones are not; the
    background and the style are those asked for. kept: every other object has its shape, colour,
    size and place, there is nothing extra, and what was not asked for looks as before.
    """
    left = list(seen.objects)

    def take(o):
        here = [p for p in left if _stands(p, New(o))]
        if here:
            left.remove(here[0])
        return bool(here)

    stale = [take(edit.source.objects[i]) for i in edit.changed]
    kept = [take(o) for i, o in enumerate(edit.source.objects) if i not in edit.changed]
    kept.append(len(left) <= len(edit.new))
    asked = [not any(stale), any(all(map(_stands, order, edit.new))
                                 for order in permutations(left, len(edit.new)))]
    for field in ("background", "style"):
        before, after, now = (getattr(one, field) for one in (edit.source, edit.target, seen))
        (kept if before == after else asked).append(now == after)
    return all(asked), all(kept)


def outside(edit, height=128, width=128):
    """The pixels that an edit has nothing to do with: booleans (height, width).

    The rest is where source and target differ, and discs around the objects that the edit changes
    or makes; two pixels of 128 are added around both. For the PSNR of what should not change.
    """
    unit = min(height, width)
    before, after = render(pack([edit.source, edit.target]), height, width)
    near = math.ceil(NEAR * unit)
    inside = F.max_pool2d((before != after).any(0).float()[None], 2 * near + 1, 1, near)[0] > 0
    y = (torch.arange(height)[:, None] + 0.5) / unit
    x = (torch.arange(width)[None, :] + 0.5) / unit
    for o in (*(edit.source.objects[i] for i in edit.changed), *(one.object for one in edit.new)):
        inside |= torch.hypot(x - o.x, y - o.y) < 1.2 * SIZES[o.size] + NEAR
    return ~inside
