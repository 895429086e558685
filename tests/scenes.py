"""Scenes, and what they contain, for the tests of the small world."""

import math
import re
from collections import Counter
from itertools import combinations, permutations, product

from world.shapes import (BACKGROUNDS, COLOURS, HELD_COLOURS, HELD_COUNTS, HELD_PAIRS, HELD_TRIPLES,
                          RELATIONS, SHAPES, SIZES, Object, Scene, related)

SHAPE, COLOUR, SIZE = map("|".join, (SHAPES, COLOURS, SIZES))
ALL = [Scene((Object(s, c, tuple(SIZES)[(i + i // 10) % 2], .5, .5),), tuple(BACKGROUNDS)[i % 4])
       for i, (s, c) in enumerate(product(SHAPES, COLOURS))]  # each shape in each colour
FEW = ALL[::3]  # each shape, each colour, each size, each background
AREAS = {"circle": math.pi, "square": 1.7 ** 2, "triangle": 0.75 * 3 ** 0.5 * 1.15 ** 2,
         "star": 5 * 1.15 * 0.5 * math.sin(math.pi / 5), "ring": math.pi * (1 - 0.46 ** 2),
         "cross": 2 * 2.1 * 0.7 - 0.7 ** 2, "diamond": 2 * 1.15 * 0.8,
         "hexagon": 12 ** 0.5 * 0.92 ** 2}


def thing(words, x=0.0, y=0.0):
    """The object that words like "two large red circles" speak of."""
    words = re.sub(rf"({SHAPE})e?s\b", r"\1", words).split()
    return Object(*(next((w for w in words if w in table), None)
                    for table in (SHAPES, COLOURS, SIZES)), x, y)


def facts(scene):
    """All (i, relation, j) that are true of a scene."""
    return tuple((i, r, j) for i, j in permutations(range(len(scene.objects)), 2)
                 for r in RELATIONS if related(scene.objects[i], r, scene.objects[j]))


def shows_held(objects, relations):
    """Whether objects in these relations contain a combination that training must not show."""
    names = [o.shape for o in objects]
    return (any(o[1::-1] in HELD_COLOURS for o in objects)
            or any((n, s) in HELD_COUNTS for s, n in Counter(names).items())
            or any(frozenset(pair) in HELD_PAIRS for pair in combinations(names, 2))
            or any((names[i], r, names[j]) in HELD_TRIPLES for i, r, j in relations))
