"""The meaning of captions: read from their words, and compared with a picture part by part.

`read_caption` is the inverse of `shapes.describe`, for descriptions that a model has written.
`statements` scores long prompts as DPG does, so that one mistake does not make all else wrong.
"""

import random
import re
from collections import Counter
from itertools import product

from world import shapes
from world.shapes import BACKGROUNDS, COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, Object, Prompt

CATEGORIES = ("global", "entity", "attribute", "relation", "other")  # DPG's

# --- From words to a Prompt -----------------------------------------------------------------------

def _either(words):
    return f"({'|'.join(words)})"


SINGULAR = {shapes.plural(shape): shape for shape in SHAPES}
VALUE = {word: number for number, word in NUMBERS.items()}
MEANING = {wording: relation for relation, wordings in RELATIONS.items() for wording in wordings}
NOUN = rf"(?:{_either(SIZES)} )?(?:{_either(COLOURS)} )?{_either(SHAPES)}"
CAPTION = re.compile(rf"(?:{_either(shapes.PREFIXES[:-1])} )?(.+?)"
                     rf"(?: on an? {_either(BACKGROUNDS)} background)?( , the .+)?")
COUNTED = re.compile(rf"{_either(VALUE)} (?:{_either(COLOURS)} )?{_either(SINGULAR)}")
RELATED = re.compile(rf"(.+?) {_either(MEANING)} (.+)")
CLAUSE = re.compile(rf"(.+?) is {_either(MEANING)} (.+)")


def read_caption(text):
    """Return the meaning of a caption as a Prompt without a task; None if it is no caption."""
    caption = CAPTION.fullmatch(text)
    if not caption:
        return None
    _, words, background, clauses = caption.groups()
    counted = COUNTED.fullmatch(words)
    pair = RELATED.fullmatch(words)
    relations = []
    if counted:
        number, colour, shape = counted.groups()
        objects = [Object(SINGULAR[shape], colour)] * VALUE[number]
    elif pair:
        objects = [_read_noun(pair[1]), _read_noun(pair[3])]
        relations = [(0, MEANING[pair[2]], 1)]
    else:
        *first, last = re.split(" , | and ", words)
        if first and words != " , ".join(first) + f" and {last}":
            return None
        objects = [_read_noun(noun) for noun in (*first, last)]
    if None in objects:
        return None
    for clause in clauses.split(" , ")[1:] if clauses else ():
        parts = CLAUSE.fullmatch(clause)
        i = _index_of(parts[1], objects) if parts else None
        j = _index_of(parts[3], objects) if parts else None
        if None in (i, j):
            return None
        relations.append((i, MEANING[parts[2]], j))
    return Prompt(text, "", tuple(objects), tuple(relations), background)


def _read_noun(words, article="an?"):
    """Return the object that words like "a small red circle" name, or None."""
    noun = re.fullmatch(f"{article} {NOUN}", words)
    return noun and Object(noun[3], noun[2], noun[1])


def _index_of(words, objects):
    """Return the index of the only object that words like "the red circle" fit, or None."""
    noun = _read_noun(words, "the")
    fitting = [i for i, o in enumerate(objects) if noun and o[:2] == noun[:2]]
    return fitting[0] if len(fitting) == 1 else None


def in_words(scene):
    """Describe a scene for people; "?" stands for what the judge did not recognise."""
    objects = []
    for o in scene.objects:
        attributes = " ".join(word or "?" for word in (o.size, o.colour, o.shape))
        objects.append(f"{attributes} at {o.x:.2f} {o.y:.2f}")
    style = "" if scene.style == "filled" else f", {scene.style or 'filled and outlined'}"
    return f"{'; '.join(objects) or 'nothing'}; on {scene.background or '?'}{style}"


# --- Dense prompts, in DPG's five categories ------------------------------------------------------

def dense_benchmark(number, seed=0, held=False):
    """Return `number` new dense prompts, each with its scene; held: they say what is held out."""
    rng = random.Random(f"dense {seed} {held}")
    pairs = []
    while len(pairs) < number:
        scene = shapes.draw_scene(rng, "dense", "held" if held else "val")
        prompt = shapes.describe(rng, scene, "dense")
        triples = {(prompt.objects[i].shape, relation, prompt.objects[j].shape)
                   for i, relation, j in prompt.relations}
        objects = shapes.Scene(prompt.objects, None)
        if held == (shapes.held_out(objects) or not triples.isdisjoint(shapes.HELD_TRIPLES)):
            pairs.append((prompt, scene))
    return pairs


def statements(prompt, scene):
    """Yield each statement of a dense prompt as (category, whether the scene fulfils it).

    entity: there are as many objects of a shape as are named. attribute: an object has the shape
    and colour, and one also has the size, if it is given. relation: it holds between objects of the
    shapes and colours. other: there are no more objects, all are filled, the background is plain.
    As in DPG each statement is judged alone, and one about a missing object is not fulfilled. All
    statements are fulfilled exactly where `shapes.satisfies` is true.
    """
    def like(wanted):
        return [o for o in scene.objects if shapes.matches(wanted, o)]

    named = [o._replace(size=None) for o in prompt.objects]
    if prompt.background:
        yield "global", scene.background == prompt.background
    for shape, count in Counter(o.shape for o in named).items():
        yield "entity", len(like(Object(shape))) >= count
    for o, sized in zip(named, prompt.objects):
        yield "attribute", bool(like(o))
        if sized.size:
            yield "attribute", bool(like(sized))
    for i, relation, j in prompt.relations:
        pairs = product(like(named[i]), like(named[j]))
        yield "relation", any(shapes.related(a, relation, b) for a, b in pairs)
    yield "other", (len(scene.objects) == len(named) and scene.style == "filled"
                    and scene.background is not None)
