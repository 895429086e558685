"""The small world as a data set: scenes and edits by index, in the form that each stage trains on."""

import random
from collections import Counter

import numpy as np

from world import edits, shapes


class Shapes:
    """Scenes of the small world, drawn by (seed, index), as pictures of size x size pixels.

    split: "train", "val" or "held", grid: of the centres (see shapes.draw_scene). tasks: which
    tasks, all if empty. number: of scenes, None: without end. Raises ValueError for an unknown task
    or a grid below 4.
    """

    kind, name, shard, total, broken = 0, "shapes", None, 0, {}

    def __init__(self, size, seed, split="train", tasks=(), grid=shapes.GRID, number=None):
        unknown = set(tasks) - set(shapes.MIXTURE)
        if unknown:
            raise ValueError(f"unknown task {min(unknown)!r}, expected some of: "
                             + ", ".join(shapes.MIXTURE))
        if grid < 4:
            raise ValueError(f"grid must be at least 4 to hold four objects, got {grid}")
        self.size, self.seed, self.split, self.grid, self.number = size, seed, split, grid, number
        self.tasks = tuple(tasks) or tuple(shapes.MIXTURE)
        self.sides = np.full((2,) if number is None else (number, 2), size)

    def scene(self, index):
        """Scene, caption (shapes.Prompt), question and answer of one index."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        task = shapes.draw_task(rng, self.tasks)
        scene = shapes.draw_scene(rng, task, self.split, grid=self.grid)
        return scene, shapes.describe(rng, scene, task), *shapes.ask(rng, scene)

    def edit(self, index):
        """The edit (edits.Edit) of one index, which has nothing to do with its scene."""
        rng = random.Random(f"{self.seed} edit {self.split} {index}")
        type, = rng.choices(edits.TYPES, edits.EDIT_MIXTURE.values())
        return edits.draw_edit(rng, type, self.split, grid=self.grid)

    def lesson(self, index):
        """What the tower learns from one index: scene, text, question, answer, answer to the text.

        Half of the texts, which come without a picture, ask for a detailed caption. About the
        scene's picture there are as many captions, questions, and edits, whose answer tells what
        the picture becomes.
        """
        rng = random.Random(f"{self.seed} lesson {self.split} {index}")
        scene, prompt, question, answer = self.scene(index)
        text, detail = prompt.text, None
        if index % 2:
            short = prompt
            if prompt.task == "dense":
                short = shapes.describe(rng, scene, "two objects")  # as if there were two
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
        """The caption of every scene, each drawn for it."""
        return [self.scene(i)[1].text for i in range(self.number)]

    def texts(self, number):
        """All that any stage says about the first scenes, for a vocabulary."""
        yield " ".join(edits.words())
        for i in range(number):
            yield from filter(None, self.lesson(i)[1:])

    def __getitem__(self, index):
        scene, prompt, question, answer = self.scene(index)
        ask = (question, answer) if index % 2 else (None, None)
        return shapes.pack([scene])[0], prompt.text, *ask

    def load(self, index, height, width):
        """The item of one index; its size is the world's."""
        return self[index]

    def to_pixels(self, packed, device):
        """Packed scenes (..., 21) to pictures (..., 3, size, size) in [-1, 1] on the device."""
        pictures = shapes.render(packed.flatten(0, -2), self.size, self.size, device)
        return pictures.unflatten(0, packed.shape[:-1])


class OutlinedShapes(Shapes):
    """For the VAE: every other scene is outlined, as an edit may make it: the harder half."""

    def scene(self, index):
        scene, *words = super().scene(index)
        return scene._replace(style="filled" if index % 2 else "outlined"), *words


class TowerTexts(Shapes):
    """For the understanding tower: (picture, text, question, answer, answer to the text)."""

    def __getitem__(self, index):
        scene, *texts = self.lesson(index)
        return shapes.pack([scene])[0], *texts


class Edits(Shapes):
    """Edits, each beside a scene with its caption: (pictures, caption, instruction, None).

    The three pictures are those before and after the edit, and the scene's.
    """

    def __getitem__(self, index):
        (scene, prompt, *_), edit = self.scene(index), self.edit(index)
        return shapes.pack([edit.source, edit.target, scene]), prompt.text, edit.text, None


WORLDS = {"vae": OutlinedShapes, "understand": TowerTexts, "image": Shapes, "edit": Edits}  # of each stage


def in_detail(rng, scene, said=None):
    """A caption that names all objects of any scene by colour and shape.

    It says no less than `said`, a caption (shapes.Prompt) of the scene, nothing ambiguous, and no
    more than two relations.
    """
    names = Counter((o.colour, o.shape) for o in scene.objects)
    clear = {i for i, o in enumerate(scene.objects) if names[o.colour, o.shape] == 1}
    while True:
        dense = shapes.describe(rng, scene, "dense" if len(scene.objects) > 1 else "colours")
        if len(dense.relations) <= 2 and clear.issuperset(
                k for i, _, j in dense.relations for k in (i, j)) and (
                said is None or set(said.relations) <= set(dense.relations)
                and said.background in (None, dense.background)
                and all(a.size in (None, b.size) for a, b in zip(said.objects, dense.objects))):
            return dense.text + (" , drawn as outlines" if scene.style == "outlined" else "")
