"""Edits: instructions mean what was drawn, the score is exact, outlines are read as outlines."""

import math
import random
import re
from itertools import combinations, permutations

import pytest
import torch
from scenes import AREAS, FEW, thing

from conftest import make_config
from towers import Tokenizer
from world import edits, shapes
from world.edits import TYPES, draw_edit, edit_benchmark, instruct, outside, score, words
from world.judge import judge, same_scene
from world.shapes import (BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, STYLES, Object, Prompt,
                          Scene, coverage, held_out, is_validation, pack, render, satisfies)

NOUN = (rf"\b(?:the|an?) ((?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?"
        rf"(?:{'|'.join(SHAPES)}))\b")
TOWARDS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WHERE = {words: r for table in (RELATIONS, edits.DIRECTIONS) for r in table for words in table[r]}
KEEP = "extract", "background", "style"  # these make no new combination
X, Y = torch.arange(128).view(1, 128) + 0.5, torch.arange(128).view(128, 1) + 0.5


def draw(number, seed=0, **settings):
    """Edits of every type in turn."""
    rng = random.Random(f"test {seed}")
    return [draw_edit(rng, TYPES[i % len(TYPES)], **settings) for i in range(number)]


def see(scenes, height=128, width=128):
    """What the judge sees in pictures of scenes that were stored in 8 bits."""
    pictures = torch.cat([render(pack(scenes[i:i + 50]), height, width)
                          for i in range(0, len(scenes), 50)])
    return judge(((pictures + 1) * 127.5).round() / 127.5 - 1)


@pytest.fixture(scope="module")
def drawn():
    return draw(2700)


# --- An interpreter of the words alone ------------------------------------------------------------

def only(scene, noun):
    """The one object of the scene that a noun phrase fits."""
    found, = (o for o in scene.objects if all(w in (None, v) for w, v in zip(thing(noun)[:3], o)))
    return found


def moved(o, text, source, grid):
    """The object at the place that the end of the text names, by the rule of edits.py."""
    up = lambda length: math.ceil(length * grid) / grid
    if corner := re.search(r" in the (\w+) (\w+) corner$", text):
        near = up(1.15 * 0.15 + 0.03)
        return o._replace(x=near if corner[2] == "left" else 1 - near,
                          y=near if corner[1] == "top" else 1 - near)
    where = "|".join(sorted(WHERE, key=len, reverse=True))
    place, noun = re.search(rf" ({where})(?: {NOUN})?$", text).groups()
    to, (dx, dy) = only(source, noun) if noun else o, TOWARDS[WHERE[place]]
    return o._replace(x=to.x + dx * up(0.39), y=to.y + dy * up(0.39))


def apply_demand(text, source, scene, grid):
    """The scene after one demand that speaks of the source."""
    verb, *_, end = text.split()
    nouns = re.findall(NOUN, text)
    if "background" in text:
        background, = set(text.split()) & set(BACKGROUNDS)
        return scene._replace(background=background)
    if "outline" in text:
        return scene._replace(style="outlined")
    if verb in ("add", "draw", "insert"):
        return scene._replace(objects=(*scene.objects, moved(thing(nouns[0]), text, source, grid)))
    o = only(source, nouns[0])
    rest = tuple(p for p in scene.objects if p != o)
    if "everything" in text or verb == "keep":
        return scene._replace(objects=(o,))
    if verb in ("replace", "turn", "swap"):
        shape, colour, *_ = thing(nouns[1])
        rest += (o._replace(shape=shape, colour=colour or o.colour),)
    elif verb in ("make", "paint", "change"):
        rest += (o._replace(**{"colour" if end in COLOURS else "size": end}),)
    elif verb not in ("remove", "delete", "erase"):
        rest += (moved(o, text, source, grid),)
    return scene._replace(objects=rest)


@pytest.mark.parametrize("grid", (256, 8))
def test_texts_mean_the_target(drawn, grid):
    """Every noun fits one object, and the words lead to the target, all of it and nothing else."""
    for edit in drawn if grid == 256 else draw(450, grid=8):
        scene = edit.source
        for part in edit.text.split(" and "):
            scene = apply_demand(part, edit.source, scene, grid)
        assert sorted(scene.objects) == sorted(edit.target.objects), edit
        assert scene[1:] == edit.target[1:] and edit.target != edit.source, edit
        assert (" and " in edit.text) == (edit.type == "hybrid")


# --- What is drawn --------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height, grid", ((1, 1, 256), (2, 1, 256), (1, 1.5, 64), (1, 1, 4)))
def test_scenes_are_valid(drawn, width, height, grid):
    """Objects lie on the grid, apart and off the edge, as shapes.draw_scene places them."""
    square = (width, height, grid) == (1, 1, 256)
    for edit in drawn if square else draw(270, width=width, height=height, grid=grid):
        for objects, background, style in (edit.source, edit.target):
            assert 1 <= len(objects) <= shapes.MAX_OBJECTS
            assert background in BACKGROUNDS and style in STYLES
            for o in objects:
                assert o.shape in SHAPES and o.colour in COLOURS and o.size in SIZES
                assert o.x * grid % 1 == o.y * grid % 1 == 0
                assert min(o.x, o.y, width - o.x, height - o.y) > 1.15 * SIZES[o.size] + 0.0299
            for a, b in combinations(objects, 2):
                radii = SIZES[a.size] + SIZES[b.size]
                assert math.hypot(a.x - b.x, a.y - b.y) > 1.15 * radii + 0.04


def test_splits_are_apart(drawn):
    """Training meets no held-out combination and no validation scene; "held" edits make one."""
    pairs = {"train": drawn, "val": draw(36, split="val"), "held": draw(72, split="held")}
    for split, scenes in pairs.items():
        for edit in scenes:
            both = edit.source, edit.target
            held = split == "held"
            assert [*map(held_out, both)] == [held and edit.type in KEEP, held], edit
            assert held or {*map(is_validation, both)} == {split == "val"}, edit


def test_the_seed_decides_all():
    """The same seed draws the same edits, in every process; another seed others."""
    assert draw(90, 3) == draw(90, 3) != draw(90, 4)
    for type in TYPES:
        for held in (False, True):
            few, more = (edit_benchmark(type, number, 1, held) for number in (1, 2))
            assert few == more[:1] and {edit.type for edit in more} == {type}
            assert {held_out(edit.target) for edit in more} == {held}
    assert [edit.text for edit in edit_benchmark("hybrid", 2)] == [
        "erase the ring and insert a large pink cross in the top right corner",
        "erase the triangle and make the pink square green"]
    with pytest.raises(ValueError, match="unknown type of edit 'crop', expected one of: add, adj"):
        draw_edit(random.Random(0), "crop")


def test_words_are_all_words(drawn):
    """All wordings occur and no other words; the longest instructions fit the config."""
    assert {word for edit in drawn for word in edit.text.split()} == words()
    for wording in (w for wordings in edits.WORDINGS.values() for w in wordings):
        pattern = re.sub(r"\{\w+\}", "[a-z ]+", wording)
        assert sum(re.search(pattern, edit.text) is not None for edit in drawn) > 20, wording
    tokenizer = Tokenizer(words())
    longest = max(drawn, key=lambda edit: len(edit.text.split())).text
    assert 20 < len(tokenizer.encode(longest)) + 1 <= make_config().max_tokens
    assert set(edits.EDIT_MIXTURE) == set(TYPES) and len(TYPES) == 9


def test_edits_vary(drawn):
    """Crowded and lonely sources, all kinds of places, both attributes, and backgrounds in some."""
    number = [len(edit.source.objects) for edit in drawn]
    assert min(number.count(n) for n in (1, 2, 3, 4)) > 0.01 * len(drawn)
    share = lambda type, true: sum(map(true, of := [e for e in drawn if e.type == type])) / len(of)
    for type, true in (("add", lambda e: e.new[0].relation == "in"),
                       ("action", lambda e: e.new[0].to == e.source.objects[e.changed[0]]),
                       ("adjust", lambda e: e.text.split()[-1] in SIZES),
                       ("hybrid", lambda e: e.source.background != e.target.background)):
        assert 0.25 < share(type, true) < 0.75, type


# --- The score ------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, number", (
    (128, 128, 54), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        (128, 128, 3600), (96, 96, 900), (160, 160, 450), (256, 256, 180), (128, 256, 450)))))
def test_targets_pass_and_sources_do_not(height, width, number):
    """Judged from pixels, the target is asked and kept; the source is kept, but never asked."""
    unit = min(height, width)
    pairs = draw(number, number, width=width / unit, height=height / unit)
    for edit, seen in zip(pairs, see([edit.target for edit in pairs], height, width)):
        assert score(edit, seen) == (True, True), (edit, seen)
    for edit, seen in zip(pairs, see([edit.source for edit in pairs], height, width)):
        assert score(edit, seen) == (False, True), (edit, seen)


def still(edit):
    """What an edit says nothing about."""
    return [o for i, o in enumerate(edit.source.objects) if i not in edit.changed]


def changes(o):
    """An object with another shape, colour or size, or with one that nobody can recognise."""
    yield from (o._replace(shape=s) for s in (*SHAPES[:2], None) if s != o.shape)
    yield from (o._replace(colour=c) for c in ("red", "blue", None) if c != o.colour)
    yield from (o._replace(size=z) for z in (*SIZES, None) if z != o.size)


def wrong(edit):
    """The target with one thing wrong that was not asked for."""
    scene = edit.target
    for o in still(edit):
        rest = tuple(p for p in scene.objects if p != o)
        yield scene._replace(objects=rest)
        for x, y in ((o.x + 4 / 128, o.y), (o.x - 3 / 128, o.y), (o.x, o.y + 3 / 128)):
            yield scene._replace(objects=(*rest, o._replace(x=x, y=y)))
        yield from (scene._replace(objects=(*rest, other)) for other in changes(o))
    for o in (thing("small red star", .5, .5), Object(None, x=.5, y=.5), *scene.objects[:1]):
        yield scene._replace(objects=(*scene.objects, o))
    if scene.background == edit.source.background:
        yield from (scene._replace(background=b) for b in (*BACKGROUNDS, None)
                    if b != scene.background)
    if scene.style == edit.source.style:
        yield from (scene._replace(style=s) for s in ("outlined", None))


def elsewhere(new):
    """Where a new object may not be."""
    o, relation, to = new
    if relation == "at":
        return o._replace(x=o.x + 3 / 128)
    x, y = (0.5, 0.5) if relation == "in" else to[3:]
    return o._replace(x=2 * x - o.x, y=2 * y - o.y)


def undone(edit):
    """The target with one thing less that was asked for."""
    scene = edit.target
    for new in edit.new:
        rest = tuple(p for p in scene.objects if p != new.object)
        yield scene._replace(objects=rest)
        yield from (scene._replace(objects=(*rest, other))
                    for other in (elsewhere(new), *changes(new.object)))
    for i in edit.changed:
        yield scene._replace(objects=(*scene.objects, edit.source.objects[i]))
    for field in ("background", "style"):
        if getattr(edit.source, field) != getattr(scene, field):
            yield from (scene._replace(**{field: value})
                        for value in (getattr(edit.source, field), None))


def test_score_is_strict(drawn):
    """One thing wrong with the rest is not kept, one thing of the text not done is not asked."""
    for edit in drawn[:900]:
        assert score(edit, edit.target) == (True, True)
        assert score(edit, edit.target._replace(objects=edit.target.objects[::-1])) == (True, True)
        bad = [*wrong(edit)]
        assert bad and all(score(edit, seen) == (True, False) for seen in bad), edit
        less = [*undone(edit)]
        assert less and all(score(edit, seen) == (False, True) for seen in less), edit


def test_wrong_edits_are_seen():
    """From pixels, too: another object moved by 4 pixels or of another colour is not kept."""
    pairs = [edit for edit in draw(72, 9) if still(edit) and edit.type != "style"][:24]
    o = [still(edit)[0] for edit in pairs]
    for change in (lambda o: {"x": o.x + 4 / 128}, lambda o: {"y": o.y - 4 / 128},
                   lambda o: {"colour": "white" if o.colour == "black" else "black"}):
        seen = see([edit.target._replace(objects=tuple(
            p._replace(**change(p)) if p == one else p for p in edit.target.objects))
            for edit, one in zip(pairs, o)])
        assert [score(*both) for both in zip(pairs, seen)] == [(True, False)] * 24


def test_open_places_are_open(drawn):
    """An object may stand anywhere on its side of another one or in its corner, else in place."""
    tried = set()
    for edit in drawn:
        for o, relation, to in edit.new:
            far = 0.05 if relation == "in" else 1 / 128
            x, y = o.x + far, o.y - far
            if relation in TOWARDS:
                dx, dy = TOWARDS[relation]
                x, y = to.x + 0.3 * dx + 0.15 * dy, to.y + 0.3 * dy + 0.15 * dx
            rest = (p for p in edit.target.objects if p != o)
            there = edit.target._replace(objects=(*rest, o._replace(x=x, y=y)))
            assert score(edit, there) == (True, True), (edit, there)
            tried.add(relation)
    assert tried == {"at", "in", *TOWARDS}


def test_other_instructions_do_not_pass(drawn):
    """The right answer to another instruction of the type for the same source is a wrong one.

    But an object that was to go left of one thing may end there by going below another.
    """
    rng, passed = random.Random(0), {type: [] for type in TYPES if type != "style"}
    for edit in drawn[:900]:
        others = filter(None, (instruct(rng, edit.type, edit.source) for _ in range(100)))
        other = next((one for one in others if one.target != edit.target), None)
        if other and edit.type != "style":
            passed[edit.type].append(score(edit, other.target) == (True, True))
    assert min(map(len, passed.values())) > 70
    assert all(sum(right) < (0.25 if type == "action" else 0.03) * len(right)
               for type, right in passed.items()), passed
    mixed = [score(edit, other.target) for edit, other in zip(drawn, drawn[1:])]
    assert mixed.count((True, True)) == 0


@pytest.mark.parametrize("height, width", ((128, 128), (96, 160)))
def test_outside_is_what_stays(drawn, height, width):
    """Source and target differ nowhere outside or within 2 pixels of it, and most lies outside."""
    unit, left = min(height, width), {type: 0.0 for type in TYPES}
    for edit in draw(90, 1, width=width / unit, height=height / unit):
        before, after = render(pack([edit.source, edit.target]), height, width)
        mask = outside(edit, height, width)
        assert mask.shape == (height, width) and mask.dtype == torch.bool
        near = mask.float()[None]
        differs = (before - after).abs().amax(0) > 1e-6
        margin = torch.nn.functional.max_pool2d(near, 3, 1, 1)[0] > 0
        assert differs.any() and not (differs & margin).any(), edit
        y, x = (torch.arange(n).add(0.5) / unit for n in (height, width))
        for o in (*(edit.source.objects[i] for i in edit.changed), *(new[0] for new in edit.new)):
            disc = torch.hypot(x - o.x, y[:, None] - o.y) < 1.2 * SIZES[o.size] + 0.01
            assert not (mask & disc).any()
        left[edit.type] += mask.float().mean().item() / 10
    assert all(0.01 < share < 0.12 if type == "background" else share > 0.75
               for type, share in left.items() if type != "hybrid"), left


# --- Outlines -------------------------------------------------------------------------------------

def outlined(number, seed=0, width=1.0, height=1.0):
    """Scenes of all tasks as outlines."""
    rng = random.Random(f"outlined {seed}")
    return [shapes.draw_scene(rng, shapes.draw_task(rng), "any", width, height)._replace(
        style="outlined") for _ in range(number)]


@pytest.mark.parametrize("height, width, number", (
    (128, 128, 60), (96, 96, 60), (256, 256, 10), *(pytest.param(*row, marks=pytest.mark.slow)
    for row in ((128, 128, 5000), (96, 96, 2000), (160, 160, 1000), (256, 256, 500),
                (128, 256, 1000)))))
def test_judge_reads_outlines(height, width, number):
    """Every object of every outlined scene is read back, and its style."""
    unit = min(height, width)
    scenes = outlined(number, number, width / unit, height / unit)
    for scene, seen in zip(scenes, see(scenes, height, width)):
        assert same_scene(scene, seen, unit) and seen.style == "outlined", (scene, seen)
        assert not satisfies(Prompt("", "", scene.objects), seen)  # captions mean filled shapes


def test_outlines_are_lines():
    """The line lies inside the shape along its edge, with its formula's area."""
    edge = {"circle": 1, "square": 0.85, "triangle": 0.575, "hexagon": 0.92,  # from the centre
            "diamond": 0.92 / math.hypot(1.15, 0.8), "star": 0.422}
    areas = {shape: AREAS[shape] * (1 - (1 - 0.2 / d) ** 2) for shape, d in edge.items()}
    areas["ring"] = math.pi * (1 - 0.8 ** 2 + 0.66 ** 2 - 0.46 ** 2)
    areas["cross"] = AREAS["cross"] - (2 * 1.7 * 0.3 - 0.3 ** 2)
    for shape, area in areas.items():
        full, line = (coverage(shape, X - 64.3, Y - 63.8, 40.0, w) for w in (math.inf, 8.0))
        assert ((line < 1e-4) | (full - line).abs().lt(1e-4) | (full == 1)).all()
        assert (line.sum() / 1600).item() == pytest.approx(area, rel=0.01), shape
        assert line[64, 64] == 0 and 0.999 < line.max() <= 1


def test_judge_fails_outlines_that_are_none(monkeypatch):
    """Half an outline, one of another radius or of two colours, mixed styles, a dot in a ring."""
    scenes = [scene._replace(style="outlined") for scene in FEW[::2]]
    whole = render(pack(scenes))
    fails = lambda drawn: [any(None in o for o in seen.objects) for seen in judge(drawn)]
    assert not any(fails(whole))
    for half in (X < 64, X > 64, Y < 64, Y > 64):
        assert all(fails(torch.where(half, whole[:, :, :1, :1], whole)))
    for radius in (0.085, 0.105, 0.12, 0.135, 0.17):
        with monkeypatch.context() as patch:
            patch.setitem(SIZES, "small", radius)
            patch.setitem(SIZES, "large", radius)
            drawn = render(pack(scenes))
        assert all(fails(drawn))
    drawn = render(pack([Scene((thing(f"large {colour} circle", .5, .5),), "teal", "outlined")
                         for colour in COLOURS]))
    pairs = [torch.where(X < 52, a, b) for a, b in permutations(drawn, 2)]
    assert all(fails(torch.stack(pairs)))
    two = (thing("large red ring", .3, .3), thing("small blue star", .7, .7))
    full, line = render(pack([Scene(two, "gray"), Scene(two, "gray", "outlined")]))
    mixed, = judge(torch.where(X < 64, full, line)[None])
    assert same_scene(Scene(two, "gray", None), mixed, 128)
    ring, = judge(torch.where(torch.hypot(X - 38.4, Y - 38.4) < 4, full[:, 38:39, 22:23],
                                     line)[None])
    assert len(ring.objects) == 3  # a dot in a ring's outline is no part of it
