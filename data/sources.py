"""The data of every stage: the small world, own pictures and edits, mixed by weight, and batches.

A source loads a sample by index and resolution: (picture, caption, question, answer), or what its
stage needs instead. A picture is whatever the source's `to_pixels` turns into pixels on the device.
Sample i is always the same sample. Stored latents take the place of pictures if there are some.
"""

import glob
import hashlib
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import check_made, leave_stopping_to_parent
from config import GENERATING
from data.buckets import STRIDE, Batch, Bucket, Plan, permutation
from data.latents import Stored, describe_pictures, made_from, read_stored
from data.pairs import Pairs
from data.pictures import Pictures, Rules, Unreadable, Where, check_broken
from towers import Tokenizer
from world.dataset import WORLDS, Shapes

# --- Several sources ---

class Mixture:
    """Sources and their weights: shares of samples, which need not add up to one.

    scenes: the small world if validation uses it. made: what latents in a folder depend on.
    """

    def __init__(self, sources, weights=None, scenes=None, made=None):
        self.sources = list(sources)
        self.weights = list(weights or [1] * len(self.sources))
        self.made = made
        self.scenes = scenes
        if isinstance(self.sources[0], Shapes):
            self.scenes = self.sources[0]

    def lengths(self, tokenizer, longest):
        """Return for each source the tokens of its captions, (L,); `longest` for the small world.

        Raises ValueError for an unknown word, and for a caption longer than `longest`.
        """
        return [longest if isinstance(source, Shapes) else
                count_tokens(tokenizer, source.captions, longest) for source in self.sources]

    def captions_digest(self):
        """Return a SHA-256 in hex of all own captions, in their order."""
        digest = hashlib.sha256()
        for source in self.sources:
            if not isinstance(source, Shapes):
                digest.update(source.captions.data)
            if isinstance(source, Pairs):
                digest.update(source.instructions.data)
        return digest.hexdigest()

    def plan(self, lengths, step, batch, seed):
        """Return the Plan of global batches; lengths, step: see buckets.Plan."""
        return Plan(self.sources, lengths=lengths, weights=self.weights, batch=batch, seed=seed,
                    length_step=step)

    def pieces(self, length, pixels=2 ** 24):
        """Return batches of at most so many pixels that hold every sample once, in order.

        All samples of a batch are for training, or all are for validation.
        """
        result = []
        for k, source in enumerate(self.sources):
            table = np.column_stack((source.sides, np.broadcast_to(source.validation,
                                                                   len(source.sides))))
            for row in np.unique(table, axis=0).tolist():
                height, width, _ = row
                index = np.flatnonzero((table == row).all(1))
                most = max(1, pixels // (height * width))
                bucket = Bucket(source.kind, height, width, length)
                for part in np.split(index, range(most, len(index), most)):
                    result.append(Batch(np.full(len(part), k), part, bucket))
        return result

    def samples(self, count, validation):
        """Return source and index of up to `count` samples for validation, or for training.

        Where none are for validation they are the first ones of the first source; those for
        training are drawn at random.
        """
        parts = [np.flatnonzero(source.validation == validation) if source.kind else []
                 for source in self.sources]
        index = np.concatenate(parts).astype(int)
        source = np.repeat(np.arange(len(parts)), list(map(len, parts)))
        if not len(index):
            index = np.arange(len(self.sources[0].sides))
            source = np.zeros_like(index)
        order = slice(count) if validation else permutation(len(index), 0)[:count]
        return source[order], index[order]

    def is_validation(self, batch):
        """Return whether the samples of one of the pieces are held back from training."""
        validation = np.atleast_1d(self.sources[batch.source[0]].validation)
        return bool(validation[batch.index[0] % len(validation)])

    def check(self, broken, most):
        """Raise ValueError if more than a share `most` of a source is in {(source, index): why}."""
        for k, source in enumerate(self.sources):
            reasons = {source.sample_name(index): reason
                       for (number, index), reason in broken.items() if number == k}
            check_broken(source.name, {**source.broken, **reasons}, source.total, most)


def parse_mixture(text):
    """Return {path: weight} of `--data`: a lone path, or path=weight,path=weight."""
    if not text.strip():
        raise ValueError("data is empty; expected shapes, a folder of pictures, or tar shards")
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


def open_sources(c, config, world, tokenizer=None):
    """Return the Mixture that a TrainConfig asks for, or of stored latents if there are some.

    config: the model's, whose size is that of pictures where c.sizes names none. Captions that it
    cannot read are left out: too long, or not in the words of its tokenizer (None: not made yet).
    Raises ValueError as the sources do.
    """
    weights = parse_mixture(c.data)
    where = Where(c.where) if c.where else None
    if where and "shapes" in weights:
        raise ValueError("where filters by fields of own pictures; shapes has none: leave it out")
    sizes = [int(text) if str(text).isdecimal() else 0 for text in c.sizes] or [config.size]
    if any(side < STRIDE or side % STRIDE for side in sizes):
        raise ValueError(f"sizes must be multiples of {STRIDE}, got {' '.join(map(str, c.sizes))}")
    if c.stage == "edit" and len(weights) > 1:
        raise ValueError(f"data: stage edit takes shapes or one folder with edits, got {c.data!r}")
    number = c.scenes if c.stage in GENERATING else None
    scenes = WORLDS[c.stage](config.size, c.seed, tasks=c.tasks, grid=c.grid, number=number)
    # One placeholder stands for all image tokens of an instruction: what marks their place counts.
    placeholders = int(c.stage == "edit" and config.und_folder != "" and config.und_images
                       and "understanding" in config.edit_inputs)
    rules = Rules(c.max_broken, c.holdout, where, stage=c.stage, caption_fault=partial(
        caption_fault, c.stage, tokenizer, config.max_tokens, placeholders=placeholders))
    made = None
    stored = []
    if c.stage == "image" and c.latents not in ("memory", "step"):
        made = made_from(c, config, weights, sizes)
        stored = read_stored(Path(c.latents), made, rules, world)
    if stored and not all(path == "shapes" or Path(path).exists() or glob.glob(path)
                           for path in weights):
        world.print0(f"{c.latents} is used alone: the pictures that it was made from are not here")
        sources = stored
    else:
        own = Pairs if c.stage == "edit" else Pictures
        sources = [scenes if path == "shapes" else own(path, sizes, world, rules)
                   for path in weights]
        if stored:
            check_made(c.latents, describe_pictures(sources), "latents")
            sources = stored
    dataset = Mixture(sources, weights.values(), scenes if sources[0].kind == 0 else None, made)
    introduce_validation(dataset, world)
    return dataset


def introduce_validation(dataset, world):
    """Print how many own pictures are held back for validation, or that none are."""
    for source in dataset.sources:
        if source.kind == 1:
            world.print0(f"{source.name}: {source.validation.sum():,} of "
                         f"{len(source.validation):,} pictures are held back for validation")
    if not dataset.scenes and not any(np.any(source.validation) for source in dataset.sources):
        world.print0("no picture is held back: validation is on training pictures")


def caption_fault(stage, tokenizer, longest, text, placeholders=0):
    """Return why a stage cannot learn from a caption, or "".

    longest: the most tokens. placeholders: the number of those for image tokens, which do not
    count; the tokens around them do.
    """
    if stage == "vae":
        return ""
    try:
        empty, ids = (tokenizer.encode(words, placeholders) if tokenizer else
                      ["<bos>", *Tokenizer.split(words)] for words in ("", text))
    except ValueError as e:
        return f"its caption has words that the tower does not know ({str(e).split(' in ')[0]})"
    if ids == empty:
        return "its caption has no words"
    tokens = len(ids) - placeholders + (stage == "understand")  # <eos>
    if tokens <= longest:
        return ""
    return f"its caption is too long ({tokens} tokens; --max-tokens is {longest})"


# --- Batches ---

def build_tokenizer(dataset, samples=5000):
    """Return a Tokenizer of all own captions, or of the texts of `samples` small-world items."""
    words = set()
    for source in dataset.sources:
        for text in source.texts(samples):
            words.update(Tokenizer.split(text))
    return Tokenizer(words)


def count_tokens(tokenizer, captions, longest, placeholders=0):
    """Return the number of tokens of each caption without placeholders, (L,).

    Raises ValueError for one of more than `longest`.
    """
    lengths = np.array([len(tokenizer.encode(text, placeholders)) for text in captions])
    lengths -= placeholders
    if lengths.max() > longest:
        text = captions[int(lengths.argmax())]
        raise ValueError(f"{text!r} has {lengths.max()} tokens, expected at most {longest}; "
                         "shorten it, or raise --max-tokens")
    return lengths


def collate(stage, tokenizer, samples, length, placeholders=0):
    """Return samples as the tensors of a stage, prompts padded to S = length.

    "vae": pictures. "image": pictures and prompts (B, S). "understand": pictures, texts with
    targets, and what is said about the picture with targets: the text where a source says no more.
    "edit": three pictures each, prompts (B, S), what is edited (packed scenes (B, 21) or pictures),
    and instructions (B, placeholders + S), with so many placeholders for image tokens.
    """
    pictures = torch.stack([sample[0] for sample in samples])
    if stage == "vae":
        return (pictures,)
    if stage == "understand":
        return pictures, *texts_and_targets(tokenizer, samples, length)
    prompts = tokenizer.batch([sample[1] for sample in samples], length)
    if stage == "image":
        return pictures, prompts
    instructions = tokenizer.batch([sample[2] for sample in samples], length + placeholders,
                                   placeholders)
    return pictures, prompts, pictures[:, 0], instructions


def texts_and_targets(tokenizer, samples, length):
    """Return the tower's texts, their targets, what it says about pictures, and the targets."""
    texts = []
    about = []
    for _, text, question, answer, *answer_to_text in samples:
        texts.append(tokenizer.ids_and_targets(text, *answer_to_text, length=length))
        about.append(tokenizer.ids_and_targets(question, answer, length=length)
                     if question else texts[-1])
    return [torch.tensor(column) for column in (*zip(*texts), *zip(*about))]   # (B, S) each


class Reader(Dataset):
    """Reads a process's share of global batches, and collates it, maybe in data processes.

    A sample that cannot be read is replaced by the next good one of the global batch, so that the
    number of processes changes nothing.
    """

    def __init__(self, sources, collate, share=slice(None)):
        self.sources = sources
        self.collate = collate
        self.share = share

    def __getitem__(self, batch):
        """Return a batch's tensors (None: no sample is good), texts and broken samples.

        texts: of each sample the caption, and a question or an instruction if it has one.
        """
        broken = {}
        positions = np.arange(len(batch.index))
        samples = [self.first_good(batch, np.roll(positions, -position), broken)
                   for position in positions[self.share]]
        if None in samples:
            return None, [], broken
        tensors = self.collate(samples, batch.bucket.length)
        return tensors, [sample[1:3] for sample in samples], broken

    def first_good(self, batch, positions, broken):
        """Return the first sample at these positions of the batch that can be read, or None."""
        _, height, width, _ = batch.bucket
        for source, index in zip(batch.source[positions].tolist(), batch.index[positions].tolist()):
            try:
                return self.sources[source].load(index, height, width)
            except Unreadable as e:
                broken[source, index] = str(e)
        return None


class Loader:
    """Loads planned batches of a Mixture onto the device.

    share: which samples of a batch this process needs, a slice. workers: data processes. broken:
    a dict that takes {(source, index): why} of samples that cannot be read. encode: turns pictures
    (B, 3, H, W) into latents, or None.
    """

    def __init__(self, dataset, collate, device, *, share, workers, broken, encode):
        self.sources = dataset.sources
        self.device = device
        self.broken = broken
        self.encode = None if isinstance(self.sources[0], Stored) else encode
        self.options = dict(dataset=Reader(dataset.sources, collate, share), batch_size=None,
                            num_workers=workers, prefetch_factor=4 if workers else None,
                            worker_init_fn=leave_stopping_to_parent)

    def batches(self, planned):
        """Yield each planned batch with its tensors on the device, and its texts (see Reader).

        The first tensor holds pictures or latents. Raises ValueError where no sample of a batch
        can be read.
        """
        planned, ahead = itertools.tee(planned)
        contents = DataLoader(sampler=ahead, **self.options)
        for batch, (tensors, texts, broken) in zip(planned, contents):
            self.broken |= broken
            if tensors is None:
                names = [f"{self.sources[source].sample_name(index)} ({why})"
                         for (source, index), why in broken.items()]
                raise ValueError("no sample of a batch can be read; remove " + ", ".join(names))
            pictures, *others = tensors
            pictures = self.sources[batch.source[0]].to_pixels(pictures, self.device)
            if self.encode:
                pictures = self.encode(pictures)
            others = [tensor.to(self.device, non_blocking=True) for tensor in others]
            yield batch, (pictures, *others), texts
