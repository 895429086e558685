"""Pictures with captions: the small world without end, image folders, tar shards, mixed by weight.

A source gives (picture, caption, question, answer), or what its stage needs instead, by index and
resolution; a picture is whatever the source's `draw` turns into pixels on the device. Sample i is
always the same sample. Pixels are read where they lie when they are needed; stored latents take
their place where there are some.
"""

import io
import json
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from common import move
from data.buckets import STRIDE, Batch, Bucket, assign, fit, make_plan
from data.latents import made_by, read_stored
from data.pictures import Broken, Sample, Texts, Unreadable, Where, find, read_tar
from towers import Tokenizer
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

    def item(self, index, height, width):
        """The item of one index; its size is the world's."""
        return self[index]

    def draw(self, packed, device):
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


def check_broken(name, broken, total, most):
    """Raise ValueError if more than the share `most` of samples is broken ({name: reason})."""
    if len(broken) > most * total:
        listed = ", ".join(f"{one}: {reason}" for one, reason in list(broken.items())[:20])
        raise ValueError(f"{name}: {len(broken)} of {total} samples cannot be used, more than "
                         f"--max-broken {most} allows: {listed}" + ", ..." * (len(broken) > 20))


class Pictures:
    """Own pictures with captions: a folder, or tar shards in WebDataset's layout.

    path: a folder with `metadata.jsonl` (file_name, text and any fields a line), or with name.png
    beside name.txt, or with *.tar; or a pattern of tar shards. A tar holds 0001.jpg with 0001.txt
    or with 0001.json ("text" or "caption" and any fields). sizes: see buckets.assign. where: keeps
    the samples whose fields fulfil it. The processes of `world` share the work, and all get the
    same index, of 40 bytes and three texts a sample.
    Raises ValueError for a missing caption file, a malformed line, for more than the share
    `max_broken` of samples that cannot be used, and where none is left.
    """

    kind = 1

    def __init__(self, path, sizes, world, where=None, max_broken=0.05):
        self.name, (pieces, read) = str(path), find(path)
        own = {i: list(read(piece)) for i, piece in enumerate(pieces)
               if i % world.size == world.rank}
        found = [one for _, part in sorted(world.gather(own).items()) for one in part]
        good = [one for one in found if isinstance(one, Sample)]
        self.total, self.broken = len(found), dict(b for b in found if isinstance(b, Broken))
        check_broken(path, self.broken, self.total, max_broken)
        if self.broken:
            world.print0(f"{path}: left out of {self.total:,}: {tally(self.broken.values())}")
        if where:
            faults = [where.fault(sample.fields) for sample in good]
            good = [sample for sample, fault in zip(good, faults) if not fault]
            world.print0(f"{path}: --where keeps {len(good):,} of {len(faults):,}; of the others "
                      + (tally(filter(None, faults)) or "there are none"))
        if not good:
            raise ValueError(f"{path}: none of its {self.total} samples " + (
                f"fulfils --where {where.text!r}" if where else "can be used"))
        self.paths, self.captions, self.fields = (Texts(column) for column in (
            [s.path for s in good], [s.text for s in good], [json.dumps(s.fields) for s in good]))
        self.places = np.array([s[1:3] for s in good])  # offset and size
        self.sides = assign(*np.array([s[3:5] for s in good]).T, sizes)
        names = [s.path for s in good]
        self.shard = np.unique(names, return_inverse=True)[1] if read is read_tar else None

    def title(self, index):
        """What messages call a sample."""
        place = self.places[index, 0]
        return self.paths[index] + (f" at byte {place}" if place else "")

    def texts(self, _):
        """All captions, for a vocabulary."""
        return self.captions

    def item(self, index, height, width):
        """The item of one index, its bytes (3, height, width). Raises Unreadable."""
        try:
            offset, size = map(int, self.places[index])
            with open(self.paths[index], "rb") as file:
                file.seek(offset)
                image = Image.open(io.BytesIO(file.read(size)))
            image, = fit([ImageOps.exif_transpose(image).convert("RGB")], height, width)
        except Exception as e:  # PIL raises nearly anything at broken files
            raise Unreadable(" ".join(str(e).split())) from None
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        picture = flat.view(height, width, 3).permute(2, 0, 1)            # (3, height, width)
        return picture, self.captions[index], None, None

    def draw(self, pictures, device):
        """Bytes (B, 3, H, W) to pictures in [-1, 1] on the device."""
        return move(pictures, device) / 127.5 - 1


def tally(reasons):
    """Counts of reasons, the most frequent first, as one text."""
    return ", ".join(f"{number:,} {reason}" for reason, number in Counter(reasons).most_common())


# ------------------------------------------------------------------------------------------------
# Several sources

class Mixture:
    """Sources and their weights, shares of samples that need not add up to one.

    scenes: the small world if it is the first source, which validation then uses. made: what its
    latents on disk depend on, where some are wanted.
    """

    def __init__(self, sources, weights=None, scenes=None, made=None):
        self.sources, self.weights = list(sources), list(weights or [1] * len(sources))
        self.made = made
        first = self.sources[0]
        self.scenes = scenes or (first if isinstance(first, Shapes) else None)

    def lengths(self, tokenizer, longest):
        """Tokens of each caption, (L,) for each source; the small world's are at most `longest`.

        Raises ValueError for an unknown word, and for a caption longer than `longest`.
        """
        return [longest if isinstance(source, Shapes) else
                count_tokens(tokenizer, source.captions, longest) for source in self.sources]

    def plan(self, lengths, step, batch, seed):
        """The Plan of global batches; lengths, step: see buckets.make_plan."""
        return make_plan([s.kind for s in self.sources], [s.sides for s in self.sources], lengths,
                         step, self.weights, batch, seed, [s.shard for s in self.sources])

    def pieces(self, length, pixels=2 ** 24):
        """Batches of at most so many pixels that hold every sample once, for encoding in order."""
        found = []
        for k, source in enumerate(self.sources):
            for height, width in np.unique(source.sides, axis=0).tolist():
                index = np.flatnonzero((source.sides == (height, width)).all(1))
                most = max(1, pixels // (height * width))
                parts = np.split(index, range(most, len(index), most))
                bucket = Bucket(source.kind, height, width, length)
                found += [Batch(np.full(len(part), k), part, bucket) for part in parts]
        return found

    def check(self, broken, most):
        """Raise ValueError if a source has too many broken samples; broken: {(source, index)}."""
        for k, source in enumerate(self.sources):
            more = {source.title(i): reason for (j, i), reason in broken.items() if j == k}
            check_broken(source.name, {**source.broken, **more}, source.total, most)


def parse_mixture(text):
    """Paths and weights of `--data`: a lone path, or path=weight,path=weight."""
    if "=" not in text or Path(text).exists():
        return {text: 1.0}
    weights = {}
    for part in text.split(","):
        path, _, weight = part.rpartition("=")
        try:
            if not path or path in weights or not 0 < float(weight) < float("inf"):
                raise ValueError
        except ValueError:
            raise ValueError("data: expected path=weight,path=weight with different paths and "
                             f"positive weights, got {part!r} in {text!r}") from None
        weights[path] = float(weight)
    return weights


def open_sources(c, size, world):
    """The Mixture that a TrainConfig asks for; size: of a picture where its `sizes` names none.

    Stage image reads latents that are stored already instead. Raises ValueError as sources do.
    """
    weights, where = parse_mixture(c.data), Where(c.where) if c.where else None
    if where and "shapes" in weights:
        raise ValueError("where filters by fields of own pictures; shapes has none")
    sizes = [int(s) if s.isdecimal() else 0 for s in c.sizes] or [size]
    if any(s < STRIDE or s % STRIDE for s in sizes):
        raise ValueError(f"sizes must be multiples of {STRIDE}, got {' '.join(c.sizes)}")
    if c.stage == "edit" and c.data != "shapes":
        raise ValueError(f"data: stage edit knows only edits of shapes, got {c.data!r}")
    number = c.scenes if c.stage in ("image", "edit") else None
    scenes = WORLDS[c.stage](size, c.seed, tasks=c.tasks, grid=c.grid, number=number)
    made = None
    if c.stage == "image" and c.latents not in ("memory", "step"):
        made = made_by(c, weights, size, sizes)
        stored = read_stored(Path(c.latents), made)
        if stored:
            return Mixture(stored, weights.values(), scenes if stored[0].kind == 0 else None)
    return Mixture([scenes if path == "shapes" else
                    Pictures(path, sizes, world, where, c.max_broken) for path in weights],
                   weights.values(), made=made)


# ------------------------------------------------------------------------------------------------
# Batches

def build_tokenizer(dataset, samples=5000):
    """A Tokenizer of all own captions, and of the texts of `samples` items of the small world."""
    return Tokenizer(word for source in dataset.sources for text in source.texts(samples)
                     for word in Tokenizer.split(text))


def count_tokens(tokenizer, captions, longest):
    """Tokens of each caption, (L,). Raises ValueError for unknown words and beyond `longest`."""
    lengths = np.array([len(tokenizer.encode(text)) for text in captions])
    if lengths.max() > longest:
        text = captions[int(lengths.argmax())]
        raise ValueError(f"{text!r} has {lengths.max()} tokens, more than the {longest} allowed")
    return lengths


def sequence(tokenizer, length, text, answer=None):
    """Token ids and next-token targets, lists of `length`; with an answer only that is a target."""
    ids = tokenizer.encode(text)
    start = len(ids) - 1 if answer else 0
    ids += tokenizer.encode(answer)[1:] if answer else []
    ids.append(tokenizer.EOS)
    if len(ids) > length:
        raise ValueError(f"{text!r} has {len(ids)} tokens, more than the {length} allowed")
    rest = length - len(ids)
    return (ids + [tokenizer.PAD] * rest,
            [-100] * start + ids[start + 1:] + [-100] * (rest + 1))


class Collate:
    """Turn items into the tensors of a stage, prompts padded to S = length.

    "vae": pictures. "image": pictures and prompts (B, S). "understand": pictures, texts with
    targets, and what is said about the picture with targets: the text where a source says no more.
    "edit": pictures, prompts (B, S), packed scenes to be edited (B, 21), and instructions (B, S).
    """

    def __init__(self, stage, tokenizer):
        self.stage, self.tokenizer = stage, tokenizer

    def __call__(self, items, length):
        pictures = torch.stack([item[0] for item in items])
        if self.stage == "vae":
            return (pictures,)
        if self.stage == "image":
            return pictures, self.tokenizer.batch([item[1] for item in items], length)
        if self.stage == "edit":
            prompts, instructions = (self.tokenizer.batch([item[i] for item in items], length)
                                     for i in (1, 2))
            return pictures, prompts, pictures[:, 0], instructions
        texts = [sequence(self.tokenizer, length, item[1], *item[4:]) for item in items]
        about = [sequence(self.tokenizer, length, *item[2:4]) if item[2] else
                 texts[i] for i, item in enumerate(items)]
        return pictures, *(torch.tensor(column) for rows in (texts, about)
                           for column in zip(*rows))


class Reader(Dataset):
    """What data processes do: read a process's share of global batches, and collate it.

    A sample that cannot be read is replaced by the next good one of the global batch, so that the
    number of processes changes nothing.
    """

    def __init__(self, dataset, collate, mine=slice(None)):
        self.sources, self.collate, self.mine = dataset.sources, collate, mine

    def __getitem__(self, batch):
        """The tensors of this share, None if no sample is good; captions; {(source, index): why}.
        """
        places, broken = np.arange(len(batch.index)), {}
        items = [self.first_good(batch, np.roll(places, -place), broken)
                 for place in places[self.mine]]
        if None in items:
            return None, [], broken
        return self.collate(items, batch.bucket.length), [item[1] for item in items], broken

    def first_good(self, batch, places, broken):
        """The item of the first of these places that can be read, or None."""
        for key in zip(batch.source[places].tolist(), batch.index[places].tolist()):
            try:
                return self.sources[key[0]].item(key[1], batch.bucket.height, batch.bucket.width)
            except Unreadable as e:
                broken[key] = str(e)
        return None


def _same(x):
    """A Reader has collated already."""
    return x


def loader(reader, batches, workers):
    """A DataLoader of a Reader over an iterable of batches; the order is the caller's."""
    return DataLoader(reader, None, sampler=batches, collate_fn=_same, num_workers=workers,
                      prefetch_factor=4 if workers else None, worker_init_fn=_leave_ctrl_c)


def _leave_ctrl_c(worker):
    """Ctrl-C reaches every process of a terminal; only the training process may answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
