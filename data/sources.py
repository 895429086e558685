"""Pictures with captions: the small world without end, image folders, tar shards, mixed by weight.

A source gives (picture, caption, question, answer), or what its stage needs instead, by index and
resolution; a picture is whatever the source's `draw` turns into pixels on the device. Sample i is
always the same sample. Pixels are read where they lie when they are needed; stored latents take
their place where there are some.
"""

import signal
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.buckets import STRIDE, Batch, Bucket, make_plan
from data.latents import made_by, read_stored
from data.pictures import Pictures, Unreadable, Where, check_broken
from towers import Tokenizer
from world.dataset import WORLDS, Shapes

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
