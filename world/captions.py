"""What captions say: read back from their words, and held against a picture statement by statement.

`read_caption` is the inverse of `shapes.describe`: for descriptions that a model has written.
`statements` is DPG's way to score long prompts, where one mistake shall not cost everything.
"""

import random
import re
from collections import Counter
from itertools import product

from world.shapes import (BACKGROUNDS, COLOURS, HELD_TRIPLES, NUMBERS, PREFIXES, RELATIONS, SHAPES,
                          SIZES, Object, Prompt, Scene, _plural, describe, draw_scene, held_out,
                          related)

CATEGORIES = ("global", "entity", "attribute", "relation", "other")  # DPG's


# ------------------------------------------------------------------------------------------------
# From words to a Prompt

def _either(words):
    return f"({'|'.join(words)})"


PLURALS = {_plural(shape): shape for shape in SHAPES}
HOW_MANY = {word: number for number, word in NUMBERS.items()}
MEANING = {words: relation for relation, wordings in RELATIONS.items() for words in wordings}
NOUN = rf"(?:{_either(SIZES)} )?(?:{_either(COLOURS)} )?{_either(SHAPES)}"
CAPTION = re.compile(rf"(?:{_either(PREFIXES[:-1])} )?(.+?)"
                     rf"(?: on an? {_either(BACKGROUNDS)} background)?( , the .+)?")
COUNTED = re.compile(rf"{_either(HOW_MANY)} (?:{_either(COLOURS)} )?{_either(PLURALS)}")
PLACED = re.compile(rf"(.+?) {_either(MEANING)} (.+)")
CLAUSE = re.compile(rf"(.+?) is {_either(MEANING)} (.+)")


def read_caption(text):
    """What a caption says, as a Prompt without a task; None for what is no caption."""
    caption = CAPTION.fullmatch(text)
    if not caption:
        return None
    _, said, background, more = caption.groups()
    counted, placed, relations = COUNTED.fullmatch(said), PLACED.fullmatch(said), []
    if counted:
        number, colour, shape = counted.groups()
        objects = [Object(PLURALS[shape], colour)] * HOW_MANY[number]
    elif placed:
        objects = [_read_noun(placed[1]), _read_noun(placed[3])]
        relations = [(0, MEANING[placed[2]], 1)]
    else:
        *first, last = re.split(" , | and ", said)
        if first and said != " , ".join(first) + f" and {last}":
            return None
        objects = [_read_noun(noun) for noun in (*first, last)]
    if None in objects:
        return None
    for clause in more.split(" , ")[1:] if more else ():
        told = CLAUSE.fullmatch(clause)
        a, b = (_find(told[k], objects) if told else None for k in (1, 3))
        if None in (a, b):
            return None
        relations.append((a, MEANING[told[2]], b))
    return Prompt(text, "", tuple(objects), tuple(relations), background)


def _read_noun(words, article="an?"):
    """The object that words like "a small red circle" name, or None."""
    noun = re.fullmatch(f"{article} {NOUN}", words)
    return noun and Object(noun[3], noun[2], noun[1])


def _find(words, objects):
    """The number of the only object that words like "the red circle" mean, or None."""
    noun = _read_noun(words, "the")
    meant = [i for i, o in enumerate(objects) if noun and o[:2] == noun[:2]]
    return meant[0] if len(meant) == 1 else None


def in_words(scene):
    """What a scene shows, for people: "?" stands for what the judge could not recognise."""
    objects = [f"{' '.join(word or '?' for word in (o.size, o.colour, o.shape))} at "
               f"{o.x:.2f} {o.y:.2f}" for o in scene.objects]
    style = "" if scene.style == "filled" else f", {scene.style or 'filled and outlined'}"
    return f"{'; '.join(objects) or 'nothing'}; on {scene.background or '?'}{style}"


# ------------------------------------------------------------------------------------------------
# Dense prompts, in DPG's five categories

def dense_benchmark(number, seed=0, held=False):
    """`number` dense prompts, each with its scene, that training never shows.

    With `held` the words themselves name a held-out combination: that the scene has one would not
    do, since a caption tells only some of the relations.
    """
    rng, found = random.Random(f"dense {seed} {held}"), []
    while len(found) < number:
        scene = draw_scene(rng, "dense", "held" if held else "val")
        prompt = describe(rng, scene, "dense")
        named = [(prompt.objects[i].shape, relation, prompt.objects[j].shape)
                 for i, relation, j in prompt.relations]
        if held == (held_out(Scene(prompt.objects, None)) or any(t in HELD_TRIPLES for t in named)):
            found.append((prompt, scene))
    return found


def statements(prompt, seen):
    """What a dense prompt states and whether a picture shows it: yields (category, fulfilled).

    global: the background, where it is said. entity: as many objects of a shape as are named.
    attribute: an object of the named shape and colour; and one that has the named size, too.
    relation: between objects of the named shapes and colours, in which no two of a dense prompt
    are equal. other: nothing else is there: exactly so many objects, filled, on a plain background.
    As in DPG a statement is judged alone, and what is said of an object that is not there is not
    fulfilled. All of them are where `shapes.satisfies` holds, and only there.
    """
    def like(want):
        return [o for o in seen.objects if all(w in (None, v) for w, v in zip(want[:3], o))]

    named = [o._replace(size=None) for o in prompt.objects]
    if prompt.background:
        yield "global", seen.background == prompt.background
    for shape, number in Counter(o.shape for o in named).items():
        yield "entity", len(like(Object(shape))) >= number
    for o, full in zip(named, prompt.objects):
        yield "attribute", bool(like(o))
        if full.size:
            yield "attribute", bool(like(full))
    for i, relation, j in prompt.relations:
        pairs = product(like(named[i]), like(named[j]))
        yield "relation", any(related(a, relation, b) for a, b in pairs)
    yield "other", (len(seen.objects) == len(named) and seen.style == "filled"
                    and seen.background is not None)
