"""The small world, its judge and its data: what they promise, and that lies are caught."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, permutations, product

import pytest
import torch
from PIL import Image

import shapes
from conftest import ROOT
from data import Collate, Folder, Shapes, sequence, vocabulary
from evaluate import same_scene, score_judge
from mos import MoSConfig
from shapes import (BACKGROUNDS, COLOURS, HELD_COLOURS, HELD_COUNTS, HELD_PAIRS, HELD_TRIPLES,
                    INVERSE, NUMBERS, RELATIONS, SHAPES, SIZES, TASKS, Object, Prompt, Scene,
                    benchmark, judge, pack, related, render, satisfies)
from towers import Tokenizer

HOW_MANY = {word: n for n, word in NUMBERS.items()} | {"one": 1}
NOUN = (rf"\b(?:an?|the|two|three|four) (?:(?:{'|'.join(SIZES)}) )?"
        rf"(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})(?:e?s)?\b")
WORDINGS = {w: r for r, words in RELATIONS.items() for w in words}
RELATION = re.compile(f"({NOUN}) (?:is )?({'|'.join(WORDINGS)}) ({NOUN})")
EVERYTHING = [Scene((Object(s, c, tuple(SIZES)[(i + i // 10) % 2], .5, .5),), tuple(BACKGROUNDS)[i % 4])
              for i, (s, c) in enumerate(product(SHAPES, COLOURS))]


def thing(words, x=0.0, y=0.0):
    """Words to an object: "large red circles" or "the star"."""
    words = re.sub(rf"({'|'.join(SHAPES)})e?s\b", r"\1", words).split()
    return Object(*(next((w for w in words if w in table), None)
                    for table in (SHAPES, COLOURS, SIZES)), x, y)


def read(text):
    """Objects, relations and background of a caption, from its words alone."""
    said = [thing(noun) for noun in re.findall(NOUN, text) if not noun.startswith("the ")
            for _ in range(HOW_MANY.get(noun.split()[0], 1))]
    place = lambda noun: next(i for i, o in enumerate(said) if o[:2] == thing(noun)[:2])
    relations = tuple((place(a), WORDINGS[r], place(b)) for a, r, b in RELATION.findall(text))
    background = re.search(r"on an? (\w+) background", text)
    return tuple(said), relations, background and background[1]


def facts(objects):
    """All (i, relation, j) that are true of placed objects."""
    return [(i, r, j) for i, j in permutations(range(len(objects)), 2) for r in RELATIONS
            if related(objects[i], r, objects[j])]


def shows_held(objects, relations):
    """Whether objects in these relations contain a combination that training must not show."""
    names = [o.shape for o in objects]
    return (any(o[1::-1] in HELD_COLOURS for o in objects)
            or any((n, s) in HELD_COUNTS for s, n in Counter(names).items())
            or any(frozenset(pair) in HELD_PAIRS for pair in combinations(names, 2))
            or any((names[i], r, names[j]) in HELD_TRIPLES for i, r, j in relations))


def show(scenes, height=128, width=128):
    """Pictures of scenes in 8 bits, as a file would hold them."""
    return ((render(pack(scenes), height, width) + 1) * 127.5).round() / 127.5 - 1


def asked(scene):
    """The prompt that leaves nothing about a scene open but the places."""
    return Prompt("", "", scene.objects, tuple(facts(scene.objects)), scene.background)


def passes(scenes, pictures):
    """The scenes whose pictures, in the judge's eyes, show them."""
    return [s for s, seen in zip(scenes, judge(pictures)) if satisfies(asked(s), seen)]


def fingerprint():
    """What seeds decide: scenes, captions, questions, picture bits and benchmark prompts."""
    world, bits = Shapes(64, 3), b""
    for i in range(20):
        bits += repr(world.scene(i)).encode() + world.draw(world[i][0][None], "cpu").numpy().tobytes()
    return hashlib.sha256(bits + repr([benchmark(t, 20, 3, True) for t in TASKS]).encode()).hexdigest()


@pytest.fixture(scope="module")
def train():
    return [Shapes(128, 7).scene(i) for i in range(4000)]


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary(Shapes(128, 0))


# ------------------------------------------------------------------------------------------------
# The judge

OTHER = ((96, 96), (160, 160), (256, 256), (128, 256))
FULL = [(10_000, 128, 128), *((2_000, *size) for size in OTHER)]


@pytest.mark.parametrize("number, height, width", [(300, 128, 128), *((40, *s) for s in OTHER)] + [
    pytest.param(*row, marks=pytest.mark.slow) for row in FULL])
def test_judge_reads_every_render(number, height, width):
    """Every object of every fresh scene is read back: shape, colour, size, place, background."""
    assert score_judge(number, height, width, seed=number) == (number, math.inf)


TRUTH = Scene((thing("large red circle", .25, .3), thing("small blue square", .7, .3),
               thing("large green star", .3, .75)), "gray")
CIRCLE, SQUARE, STAR = TRUTH.objects
WRONG = {  # each differs from TRUTH in one respect
    "shape": (CIRCLE._replace(shape="hexagon"), SQUARE, STAR),
    "colour": (CIRCLE._replace(colour="orange"), SQUARE, STAR),
    "size": (CIRCLE._replace(size="small"), SQUARE, STAR),
    "missing": (CIRCLE, SQUARE),
    "extra": (CIRCLE, SQUARE, STAR, thing("small pink ring", .75, .75)),
    "twice": (CIRCLE, SQUARE, STAR, thing("small blue square", .75, .75)),
    "swapped": (CIRCLE._replace(x=.7), SQUARE._replace(x=.25), STAR),
    "reversed": tuple(o._replace(x=1 - o.x) for o in TRUTH.objects),
    "attribution": (CIRCLE._replace(colour="blue"), SQUARE._replace(colour="red"), STAR),
    "background": TRUTH.objects, "moved": (CIRCLE._replace(x=.25 + 4 / 128), SQUARE, STAR)}


def test_judge_passes_the_truth():
    """A faithful picture satisfies its scene, so the failures below are the damage's doing."""
    seen = judge(show([TRUTH]))[0]
    assert satisfies(asked(TRUTH), seen) and same_scene(TRUTH, seen, 128)
    assert passes(EVERYTHING, show(EVERYTHING)) == EVERYTHING


@pytest.mark.parametrize("name", WRONG)
def test_judge_fails_one_wrong_respect(name):
    """A well-drawn picture of a slightly different scene is read as that scene, and fails."""
    wrong = Scene(WRONG[name], "beige" if name == "background" else "gray")
    seen = judge(show([wrong]))[0]
    assert same_scene(wrong, seen, 128) and not same_scene(TRUTH, seen, 128)
    assert satisfies(asked(TRUTH), seen) == (name == "moved")  # prompts say nothing so exact


def test_judge_counts():
    """Of n stars wanted and m drawn, only n = m passes."""
    stars = [thing("small red star", x, y) for x, y in product((.25, .75), repeat=2)]
    for m, seen in enumerate(judge(show([Scene((*stars[:m],), "teal") for m in range(5)]))):
        for n in NUMBERS:
            assert satisfies(Prompt("", "counting", (Object("star"),) * n), seen) == (m == n)


def test_judge_fails_erased_punched_and_cut():
    """Half an object, a circle with a hole, an object leaving the picture: none passes."""
    whole, grid = show(EVERYTHING), torch.arange(128) + 0.5
    x, y = grid.view(1, 128), grid.view(128, 1)
    for erased in (x < 64, x > 64, y < 64, y > 64):
        assert not passes(EVERYTHING, torch.where(erased, whole[:, :, :1, :1], whole))
    hole = torch.tensor([0.33 * 128 * SIZES[s.objects[0].size] for s in EVERYTHING[:10]])
    hole = torch.hypot(x - 64, y - 64) < hole.view(10, 1, 1, 1)
    assert not passes(EVERYTHING[:10], torch.where(hole, whole[:10, :, :1, :1], whole[:10]))
    for side, depth in product(range(4), (-0.2, 0.3)):  # centre `depth` radii from the edge
        cut = []
        for s in EVERYTHING:
            d = depth * SIZES[s.objects[0].size]
            x, y = ((d, .5), (1 - d, .5), (.5, d), (.5, 1 - d))[side]
            cut.append(Scene((s.objects[0]._replace(x=x, y=y),), s.background))
        assert not passes(cut, show(cut))


def test_judge_fails_in_between(monkeypatch):
    """Neither a radius between or beyond the sizes nor a mixture of two colours passes."""
    for radius in (0.085, 0.105, 0.12, 0.135, 0.17):
        with monkeypatch.context() as patch:
            for size in SIZES:
                patch.setitem(shapes.SIZES, size, radius)
            drawn = show(EVERYTHING)
        assert not passes(EVERYTHING, drawn)
    mixtures = 0
    for a, b in combinations(COLOURS, 2):
        mixed = tuple((u + v) / 2 for u, v in zip(COLOURS[a], COLOURS[b]))
        if min(math.dist(mixed, c) for c in COLOURS.values()) > shapes.COLOUR_TOLERANCE:
            scenes = [s for s in EVERYTHING if s.objects[0].colour == a][mixtures % 4::4]
            with monkeypatch.context() as patch:
                patch.setitem(shapes.COLOURS, a, mixed)
                drawn = show(scenes)
            assert not any(s[:2] == t.objects[0][:2] for t in scenes for seen in judge(drawn)
                           for s in seen.objects), (a, b)
            mixtures += 1
    assert mixtures > 35


def test_judge_fails_a_fragment_apart():
    """A patch of 5x5 pixels in another colour, anywhere, spoils the picture."""
    drawn = show([TRUTH])
    drawn[:, :, 90:95, 90:95] = torch.tensor(COLOURS["yellow"]).view(3, 1, 1) / 127.5 - 1
    assert not passes([TRUTH], drawn)


@pytest.mark.xfail(strict=True, reason="_recognise looks only along the ink's own colour direction")
def test_judge_fails_a_fragment_within():
    """A circle of which a third has another palette colour is no circle of one colour."""
    x, y = torch.arange(128).view(1, 128) - 63.5, torch.arange(128).view(128, 1) - 63.5
    part = (torch.hypot(x, y) < 0.15 * 128) & (x > 0.3 * 0.15 * 128)
    for b in BACKGROUNDS:
        pairs = list(permutations(COLOURS, 2))
        scenes = [Scene((thing(f"large {c} circle", .5, .5),), b) for c, _ in pairs]
        other = torch.tensor([COLOURS[c] for _, c in pairs]).view(-1, 3, 1, 1) / 127.5 - 1
        assert not passes(scenes, torch.where(part, other, show(scenes)))


def test_judge_sees_nothing_in_nothing():
    """An empty picture has a background and no object; noise satisfies no prompt."""
    assert judge(show([Scene((), b) for b in BACKGROUNDS])) == [Scene((), b) for b in BACKGROUNDS]
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not any(satisfies(Prompt("", "", (Object(None),) * len(s.objects)), s)
                   for s in judge(noise))


# ------------------------------------------------------------------------------------------------
# satisfies and related

def test_satisfies_is_strict():
    """All orders match, open attributes match anything, and every other deviation fails."""
    want = tuple(o._replace(x=0, y=0) for o in TRUTH.objects)
    for order in permutations(TRUTH.objects):
        assert satisfies(Prompt("", "", want, ((0, "left of", 1), (2, "below", 0)), "gray"),
                         Scene(order, "gray"))
        assert not satisfies(Prompt("", "", want, ((1, "left of", 0),)), Scene(order, "gray"))
    two = lambda a, b, *relations: Prompt("", "", (thing(a), thing(b)), relations)
    pair = Scene((thing("large red circle", .3, .3), thing("small blue circle", .3, .7)), "teal")
    for good in (two("circle", "red circle"), two("red", "small"), two("blue circle", "red circle"),
                 two("circle", "circle", (0, "below", 1)), two("red", "blue", (0, "above", 1))):
        assert satisfies(good, pair), good
        assert not satisfies(good._replace(background="gray"), pair)
        assert not satisfies(good, pair._replace(background=None))
        assert not satisfies(good, pair._replace(objects=pair.objects[:1]))
        assert not satisfies(good, pair._replace(objects=pair.objects + pair.objects[:1]))
        assert not satisfies(good, Scene((pair.objects[0], Object(None, "blue", "small")), "teal"))
        assert not satisfies(good, Scene((pair.objects[0], Object("circle", None, "small")), "teal"))
    for bad in (two("red circle", "red circle"), two("circle", "square"), two("small", "small"),
                two("large blue circle", "small red circle"), two("red", "blue", (0, "below", 1)),
                two("circle", "circle", (0, "left of", 1)), two("green circle", "circle")):
        assert not satisfies(bad, pair), bad
    assert not satisfies(Prompt("", "", (Object(None),) * 2), Scene((Object(None),) * 2, "teal"))


def test_related_within_60_degrees():
    """Relations hold beyond 0.1 and within 60 degrees of their axis, y pointing down."""
    a = Object("circle", x=.5, y=.5)
    for axis, relation in enumerate(("left of", "above", "right of", "below")):  # by quarter turns
        for degrees, length, true in ((0, .11, 1), (0, .09, 0), (59, .3, 1), (-59, .3, 1),
                                      (61, .3, 0), (-61, .3, 0), (180, .3, 0)):
            turn = math.radians(90 * axis + degrees)
            b = Object("star", x=.5 + length * math.cos(turn), y=.5 + length * math.sin(turn))
            assert related(a, relation, b) == related(b, INVERSE[relation], a) == bool(true)


# ------------------------------------------------------------------------------------------------
# The split

def test_training_shows_nothing_held_out(train):
    """No held-out combination in scene, caption or question; every other one is shown."""
    coloured, counted, placed = set(), set(), set()
    for scene, prompt, question, answer in train:
        true = facts(scene.objects)
        assert not shows_held(scene.objects, true) and not shows_held(*read(prompt.text)[:2])
        assert not shows_held(prompt.objects, prompt.relations)
        o = thing(question + " " + answer)
        assert (o.colour, o.shape) not in HELD_COLOURS, question
        if question.startswith("how many"):
            assert (HOW_MANY[answer], o.shape) not in HELD_COUNTS, question
        if question.startswith("where"):
            a, b = re.findall("|".join(SHAPES), question)
            relation = next(r for r in RELATIONS if r.startswith(answer))
            assert not shows_held((thing(a), thing(b)), ((0, relation, 1),)), question
        names = [o.shape for o in scene.objects]
        coloured |= {o[1::-1] for o in scene.objects}
        counted |= {(names.count(s), s) for s in names}
        placed |= {(names[i], r, names[j]) for i, r, j in true}
    assert {p.task for _, p, _, _ in train} == set(shapes.MIXTURE)
    assert coloured == set(product(COLOURS, SHAPES)) - HELD_COLOURS
    assert counted == set(product((1, 2, 3, 4), SHAPES)) - HELD_COUNTS
    assert {t for t in placed if t[0] != t[2]} == {
        (a, r, b) for a, b in permutations(SHAPES, 2) for r in RELATIONS
        if frozenset((a, b)) not in HELD_PAIRS} - HELD_TRIPLES


def test_splits_are_apart():
    """Training and validation share no exact scene; a held-out scene holds something out."""
    places = {split: {(o.x, o.y) for i in range(2000)  # one object: else chance alone keeps apart
                      for o in Shapes(128, 0, split, ("single object",)).scene(i)[0].objects}
              for split in ("train", "val")}
    assert places["train"].isdisjoint(places["val"]) and len(places["val"]) > 500
    for split in ("train", "val", "held"):
        scenes = [Shapes(128, 5, split).scene(i)[0] for i in range(500)]
        assert {shows_held(s.objects, facts(s.objects)) for s in scenes} == {split == "held"}
        if split != "held":
            assert {shapes.is_validation(s) for s in scenes} == {split == "val"}
    assert {(b, INVERSE[r], a) for a, r, b in HELD_TRIPLES} == HELD_TRIPLES
    assert [len(h) for h in (HELD_COLOURS, HELD_PAIRS, HELD_COUNTS, HELD_TRIPLES)] == [10, 4, 6, 24]


# ------------------------------------------------------------------------------------------------
# Reproducible; GenEval's prompts

def test_the_seed_decides_all():
    """A seed and an index give the same bits in any order and process, another seed does not."""
    code = "import test_shapes; print(test_shapes.fingerprint())"
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    assert again.stdout.strip() == fingerprint(), again.stderr
    worlds = [[Shapes(64, seed, split).scene(i) for i in range(30)]
              for seed, split in ((3, "train"), (4, "train"), (3, "val"))]
    assert Shapes(64, 3).scene(29) == worlds[0][29]
    assert all(x != y for a, b in combinations(worlds, 2) for x, y in zip(a, b))
    for task in TASKS:
        assert benchmark(task, 30, 1) == benchmark(task, 90, 1)[:30] != benchmark(task, 30, 2)


@pytest.mark.parametrize("held", (False, True))
@pytest.mark.parametrize("task", TASKS)
def test_benchmark_has_genevals_templates(task, held):
    """The texts are GenEval's word for word, mean what Prompt says, and are all on one side."""
    a = lambda words: ("an " if words[0] == "o" else "a ") + words
    plural = lambda s: "crosses" if s == "cross" else s + "s"
    coloured = [a(f"{c} {s}") for c in COLOURS for s in SHAPES]
    templates = {
        "single object": {f"a {s}" for s in SHAPES},
        "two objects": {f"a {s} and a {t}" for s, t in permutations(SHAPES, 2)},
        "counting": {f"{n} {plural(s)}" for n in ("two", "three", "four") for s in SHAPES},
        "colours": set(coloured),
        "position": {f"a {s} {r} a {t}" for s, t in permutations(SHAPES, 2)
                     for r in ("left of", "right of", "above", "below")},
        "attribution": {f"{s} and {t}" for s, t in permutations(coloured, 2)}}
    prompts = benchmark(task, 4000, held=held)
    for p in prompts:
        assert read(p.text) == (p.objects, p.relations, p.background) and p.task == task
        held_out = shows_held(p.objects, p.relations)  # one object alone: nothing to hold out
        assert held_out == (held and task != "single object"), p.text
    texts = {p.text.removeprefix("a photo of ") for p in prompts}
    if task == "attribution":
        assert texts < templates[task] and any(" an orange" in t for t in texts)
        assert all(sum(o[1::-1] in HELD_COLOURS for o in p.objects) == held for p in prompts)
    else:  # few enough to have drawn them all
        pair = lambda t: frozenset(o.shape for o in read(t)[0])
        assert texts == {t for t in templates[task] if task == "single object"
                         or shows_held(*read(t)[:2]) == held
                         and not (task == "position" and pair(t) in HELD_PAIRS)}


# ------------------------------------------------------------------------------------------------
# Words

def test_captions_are_true(train):
    """The words of a caption mean its Prompt, and its own scene satisfies that."""
    for scene, prompt, _, _ in train:
        assert read(prompt.text) == (prompt.objects, prompt.relations, prompt.background), prompt
        assert satisfies(prompt, scene), prompt


def test_answers_are_true(train):
    """Every answer is right by the scene; all seven kinds and both yes and no occur."""
    kinds = Counter()
    for scene, _, question, answer in train:
        names = [o.shape for o in scene.objects]
        about, words = thing(question), question.split()
        if words[0] == "where":
            a, b = (scene.objects[names.index(s)] for s in re.findall("|".join(SHAPES), question))
            assert related(a, next(r for r in RELATIONS if r.startswith(answer)), b)
            assert names.count(a.shape) == names.count(b.shape) == 1
        elif words[0] == "how":
            assert HOW_MANY[answer] == names.count(about.shape)
        elif words[0] == "is":
            assert answer == ("yes" if about[:2] in [o[:2] for o in scene.objects] else "no")
        elif words[-2] == "background":
            assert answer == scene.background
        else:  # the only object of this shape, or of this colour
            fits = [o for o in scene.objects if about.shape == o.shape or about.colour == o.colour]
            assert [getattr(o, words[1].replace("color", "colour")) for o in fits] == [answer]
        kinds[" ".join(words[:2]) + (answer if answer in ("yes", "no") else "")] += 1
    assert set(kinds) == {"where is", "how many", "is thereyes", "is thereno", "what colour",
                          "what shape"} and min(kinds.values()) > 100


def test_captions_vary(train):
    """All wordings occur, half of the captions are plain, and what is left open is left to chance."""
    texts = [p.text for _, p, _, _ in train]
    for wording in (*shapes.PREFIXES[:-1], *WORDINGS):
        assert sum(f"{wording} a" in t for t in texts) > 10, wording
    assert sum(re.match("(an?|two|three|four) ", t) is not None and "of" not in t.split()[:3]
               for t in texts) > 100
    plain = [re.fullmatch("a photo of [a-z ]*", t) and not re.search("background|small|large", t)
             for t, (_, p, _, _) in zip(texts, train) if p.task == "colours"]
    assert 0.45 < sum(map(bool, plain)) / len(plain) < 0.75
    open_ = {"colour": Counter(), "size": Counter(), "background": Counter()}
    for scene, prompt, _, _ in train:
        for want, o in zip(prompt.objects, scene.objects):
            open_["colour"][o.colour] += want.colour is None
            open_["size"][o.size] += want.size is None
        open_["background"][scene.background] += prompt.background is None
    for table, counts in ((COLOURS, open_["colour"]), (SIZES, open_["size"]),
                          (BACKGROUNDS, open_["background"])):
        assert set(counts) == set(table) and min(counts.values()) > 0.7 * max(counts.values())
    circles = {s.objects[0].colour for s, p, _, _ in train if p.text == "a photo of a circle"}
    assert circles == {c for c in COLOURS if (c, "circle") not in HELD_COLOURS}


def test_the_longest_caption_fits():
    """The wordiest caption that `describe` can form, with <bos> and <eos>, fits the config."""
    class Wordy(random.Random):
        random = lambda self: 0.0  # says everything
        choice = lambda self, options: max(options, key=lambda o: len(o.split()))
        randint = lambda self, low, high: high
        sample = lambda self, options, k: options[:k]
    size = lambda text: len(Tokenizer.split(text)) + 2
    rng, limit, longest = random.Random(0), MoSConfig().max_tokens, {}
    for task in (*TASKS, *["dense"] * 50):
        scene = shapes.draw_scene(rng, task)
        wordy = size(shapes.describe(Wordy(), scene, task).text)
        longest[task] = max(longest.get(task, 0), wordy)
        assert all(size(shapes.describe(rng, scene, task).text) <= max(longest.values())
                   for _ in range(20)) or task != "dense"
    assert max(longest.values()) == longest["dense"] == 47 <= limit
