"""The small world as data sets: scenes and edits by index, in the form of each training stage."""

import random
from collections import Counter

import numpy as np

from world import edits, shapes


class Shapes:
    """For stage image: scenes that follow from (seed, index), in pictures of size x size pixels.

    split, grid: see shapes.draw_scene. tasks: empty for all. number: of scenes, None for endless.
    Raises ValueError for an unknown task or a grid below 4.
    """

    kind, name, shard, total, broken = 0, "shapes", None, 0, {}  # see data.sources.Mixture
    validation = False  # scenes for validation are others, of the split "val"

    def __init__(self, size, seed, split="train", tasks=(), grid=shapes.GRID, number=None):
        unknown = set(tasks) - set(shapes.MIXTURE)
        if unknown:
            known = ", ".join(shapes.MIXTURE)
            raise ValueError(f"unknown task {min(unknown)!r}, expected some of: {known}")
        if grid < 4:
            raise ValueError(f"grid must be at least 4 to hold four objects, got {grid}")
        self.size, self.seed, self.split, self.grid, self.number = size, seed, split, grid, number
        self.tasks = tuple(tasks) or tuple(shapes.MIXTURE)
        self.sides = np.full((2,) if number is None else (number, 2), size)

    def scene(self, index):
        """Return the scene of an index, its caption (a Prompt), a question and the answer."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        task = shapes.draw_task(rng, self.tasks)
        scene = shapes.draw_scene(rng, task, self.split, grid=self.grid)
        return scene, shapes.describe(rng, scene, task), *shapes.ask(rng, scene)

    def edit(self, index):
        """Return the Edit of an index, which is independent of the index's scene."""
        rng = random.Random(f"{self.seed} edit {self.split} {index}")
        type, = rng.choices(edits.TYPES, edits.EDIT_MIXTURE.values())
        return edits.draw_edit(rng, type, self.split, grid=self.grid)

    def lesson(self, index):
        """Return a lesson for the tower: scene, text, question, answer, answer to the text.

        The text comes without a picture; half of the texts ask for a detailed caption. One third
        each of the questions about the scene's picture are a caption to be completed (without an
        answer), a question, and an edit, whose answer describes the edited scene.
        """
        rng = random.Random(f"{self.seed} lesson {self.split} {index}")
        scene, prompt, question, answer = self.scene(index)
        text = prompt.text
        detail = None
        if index % 2:
            dense = prompt.task == "dense"
            short = shapes.describe(rng, scene, "two objects") if dense else prompt
            text = f"in detail : {short.text}"  # see Tokenizer.request
            detail = in_detail(rng, scene, short)
        if index % 3 == 1:
            question, answer = prompt.text, None
        elif index % 3 == 2:
            edit = self.edit(index)
            scene, question, answer = edit.source, edit.text, in_detail(rng, edit.target)
        return scene, text, question, answer, detail

    @property
    def captions(self):
        """The captions of all scenes."""
        return [self.scene(i)[1].text for i in range(self.number)]

    def texts(self, number):
        """Yield all texts of all stages about the first scenes, for a vocabulary."""
        yield " ".join(edits.words())
        for i in range(number):
            yield from filter(None, self.lesson(i)[1:])

    def __getitem__(self, index):
        """Return (packed scene, caption, question, answer); every other one has no question."""
        scene, prompt, *asked = self.scene(index)
        return shapes.pack([scene])[0], prompt.text, *(asked if index % 2 else (None, None))

    def load(self, index, height, width):
        """Return the item of an index; its size is always the world's."""
        return self[index]

    def to_pixels(self, packed, device):
        """Render packed scenes (..., 21) on a device: (..., 3, size, size) in [-1, 1]."""
        pictures = shapes.render(packed.flatten(0, -2), self.size, self.size, device)
        return pictures.unflatten(0, packed.shape[:-1])


class OutlinedShapes(Shapes):
    """For stage vae: every other scene is outlined, as an edit may make it, which is harder."""

    def scene(self, index):
        scene, *words = super().scene(index)
        return scene._replace(style="filled" if index % 2 else "outlined"), *words


class TowerTexts(Shapes):
    """For stage understand: (packed scene, text, question, answer, answer to the text)."""

    def __getitem__(self, index):
        scene, *texts = self.lesson(index)
        return shapes.pack([scene])[0], *texts


class Edits(Shapes):
    """For stage edit: (packed source, target and another scene, its caption, instruction, None)."""

    def __getitem__(self, index):
        scene, prompt, *_ = self.scene(index)
        edit = self.edit(index)
        return shapes.pack([edit.source, edit.target, scene]), prompt.text, edit.text, None


WORLDS = {"vae": OutlinedShapes, "understand": TowerTexts, "image": Shapes, "edit": Edits}


def in_detail(rng, scene, short=None):
    """Write a caption of any scene that names all objects by colour and shape.

    It has at most two relations, none of them ambiguous. short: a Prompt of the scene; the caption
    states all that it does.
    """
    short = short or shapes.Prompt("", "", ())
    counts = Counter((o.colour, o.shape) for o in scene.objects)
    unique = {i for i, o in enumerate(scene.objects) if counts[o.colour, o.shape] == 1}
    while True:
        prompt = shapes.describe(rng, scene, "dense" if len(scene.objects) > 1 else "colours")
        if (len(prompt.relations) <= 2
                and all(i in unique and j in unique for i, _, j in prompt.relations)
                and set(short.relations) <= set(prompt.relations)
                and short.background in (None, prompt.background)
                and all(o.size in (None, p.size) for o, p in zip(short.objects, prompt.objects))):
            return prompt.text + (" , drawn as outlines" if scene.style == "outlined" else "")
