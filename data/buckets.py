"""Buckets: which samples make up the batch of each training step.

All samples of a batch must have one resolution and one padded length of prompts. Samples are
therefore sorted into buckets, and a bucket that is full is the next batch. Every process computes
the same plan of global batches and takes its slice of each; the order depends on the seed alone.
MoS App. A, "Bucket-wise Dynamic Resolution Training".
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

STRIDE = 32  # pixels of a latent patch: 16 by the VAE, 2 by the tower
RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 5 / 2, 3, 4)  # and their inverses
WINDOW = 8  # tar shards that are shuffled together


class Bucket(NamedTuple):
    """What the samples of a batch have in common."""
    kind: int    # 0: scenes of the small world, 1: own pictures
    height: int  # in pixels
    width: int
    length: int  # of the prompts, in tokens


class Batch(NamedTuple):
    """A global batch of B samples."""
    source: np.ndarray  # the number of each sample's source, (B,)
    index: np.ndarray   # the index of each sample within its source, (B,)
    bucket: Bucket
    waiting: int = 0    # samples drawn so far that are in no batch yet


# --- Resolutions ---

@functools.cache
def resolutions(size):
    """Return heights and widths (n, 2), multiples of 32 with about size x size pixels, by ratio."""
    ratios = np.array(RATIOS + tuple(1 / ratio for ratio in RATIOS))
    sides = size * np.stack((ratios ** -0.5, ratios ** 0.5), 1) / STRIDE
    table = np.unique(STRIDE * np.maximum(1, np.rint(sides)).astype(int), axis=0)
    return table[np.argsort(table[:, 1] / table[:, 0])]


def choose_resolutions(widths, heights, sizes):
    """Return the height and width that each of L pictures is scaled and cropped to: (L, 2).

    widths, heights: of the pictures, (L,). A picture gets the largest of `sizes` whose area
    size x size it has, or the smallest one if it has none: then it is scaled up. Among the
    resolutions of that size it gets the one with the nearest ratio, on a logarithmic scale.
    """
    sizes = np.sort(sizes)
    level = np.searchsorted(sizes ** 2, widths * heights, side="right") - 1
    level = np.maximum(level, 0)
    sides = np.empty((len(widths), 2), int)
    for i, size in enumerate(sizes):
        table = resolutions(int(size))
        table_ratios = np.log(table[:, 1] / table[:, 0])
        boundaries = (table_ratios[1:] + table_ratios[:-1]) / 2
        members = level == i
        ratios = np.log(widths[members] / heights[members])
        sides[members] = table[np.searchsorted(boundaries, ratios)]
    return sides


def crop_to_fill(picture, height, width):
    """Scale a PIL picture until it covers height x width, and crop the centre."""
    w, h = picture.size
    scale = max(width / w, height / h)
    left = (w - width / scale) / 2
    top = (h - height / scale) / 2
    box = (max(0, left), max(0, top), min(w, w - left), min(h, h - top))  # rounding stays inside
    return picture.resize((width, height), Image.Resampling.LANCZOS, box)


# --- The plan ---

class Plan:
    """The global batches of a run, in the order in which their buckets become full.

    Samples are drawn from the sources by weight. Every epoch of a source is another permutation of
    its samples; a source without end gives them in turn. Samples whose bucket is not full wait,
    into the next epoch too, so that none is lost. With tar shards an epoch permutes these, and
    samples only within windows of WINDOW shards: few files are read at a time.

    A source has a `kind` (see Bucket), `sides`: heights and widths of its L samples, (L, 2), or
    (2,) without end, `shard`: the tar shard of each sample, (L,), or None, and `validation`: which
    samples are held back, (L,), or False. lengths: for each source the tokens of the prompts, (L,)
    or one number. batch: samples in a batch. length_step: prompts are padded to the next multiple
    of it, or with 0 to the longest of all sources. Raises ValueError if there are too many buckets.
    """

    CHUNK = 2 ** 16  # samples that are drawn at a time

    def __init__(self, sources, *, lengths, weights, batch, seed, length_step=0):
        sides = [np.reshape(source.sides, (-1, 2)) for source in sources]  # (without end: one row)
        self.training = [np.flatnonzero(~np.broadcast_to(source.validation, len(pairs)))
                         for source, pairs in zip(sources, sides)]  # the samples that are drawn
        lengths = [np.broadcast_to(length, len(pairs))[training]
                   for length, pairs, training in zip(lengths, sides, self.training)]
        longest = max(length.max() for length in lengths)
        rows = []
        for k, (source, length) in enumerate(zip(sources, lengths)):
            padded = longest
            if length_step:
                padded = (length + length_step - 1) // length_step * length_step
            height, width = sides[k][self.training[k]].T
            rows.append(np.column_stack(np.broadcast_arrays(source.kind, height, width, padded)))
        table, ids = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
        if len(table) > 2 ** 16:  # see fill_buckets
            raise ValueError(f"{len(table):,} buckets are too many; choose a larger --length-step")
        ends = np.cumsum([len(row) for row in rows])
        self.buckets = [Bucket(*map(int, row)) for row in table]
        self.bucket_ids = np.split(ids.reshape(-1), ends[:-1])  # (without end: one)
        self.endless = [source.sides.ndim == 1 for source in sources]
        self.shares = np.cumsum(weights) / np.sum(weights)
        self.batch = batch
        self.seed = seed
        self.shards = [None if source.shard is None else source.shard[training]
                       for source, training in zip(sources, self.training)]
        self.epoch_order = functools.lru_cache(2 * len(sources))(self._epoch_order)

    def batches(self, start, stop):
        """Return an iterator over the Batch of each step from `start` to `stop`."""
        return itertools.chain.from_iterable(self.chunks(start, stop))

    def chunks(self, start, stop):
        """Yield lists of Batches, one list for each chunk; see `batches`.

        The steps before `start` are planned, too, because they decide which samples wait.
        """
        pool = np.empty((3, 0), int)  # samples that wait, as `sample_chunk` returns them
        cursors = [0] * len(self.bucket_ids)
        step = 0
        for chunk in itertools.count():
            if step >= stop:
                return
            pool = np.concatenate((pool, self.sample_chunk(chunk, cursors)), 1)
            members, left_over = self.fill_buckets(pool)
            batches = []
            for i in range(max(start - step, 0), min(stop - step, len(members))):
                source, index, bucket_id = pool[:, members[i]]
                drawn = int(members[i, -1]) + 1  # of the pool, up to the last one of this batch
                batches.append(Batch(source, index, self.buckets[bucket_id[0]],
                                     waiting=drawn - (i + 1) * self.batch))
            yield batches
            pool = pool[:, left_over]
            step += len(members)

    def sample_chunk(self, chunk, cursors):
        """Draw the samples of a chunk: source, index and bucket id of each, (3, CHUNK).

        cursors: for each source the number of samples drawn before this chunk; it is updated.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chunk)
        uniform = torch.rand(self.CHUNK, generator=generator, dtype=torch.float64).numpy()
        source = np.searchsorted(self.shares[:-1], uniform, side="right")
        index = np.empty(self.CHUNK, int)
        bucket_id = np.empty(self.CHUNK, int)
        for k, ids in enumerate(self.bucket_ids):
            members = np.flatnonzero(source == k)
            drawn = self.next_samples(k, cursors[k], len(members))
            index[members] = drawn if self.endless[k] else self.training[k][drawn]
            bucket_id[members] = ids[0 if self.endless[k] else drawn]
            cursors[k] += len(members)
        return np.stack((source, index, bucket_id))

    def next_samples(self, source, cursor, count):
        """Return the places in `training` of `count` samples of a source after the first `cursor`.
        """
        if self.endless[source]:
            return np.arange(cursor, cursor + count)
        length = len(self.bucket_ids[source])
        epoch, begin = divmod(cursor, length)
        epochs = range(epoch, (cursor + count) // length + 1)
        order = np.concatenate([self.epoch_order(source, epoch) for epoch in epochs])
        return order[begin:begin + count]

    def _epoch_order(self, source, epoch):
        """Return the order of a source's n training samples in an epoch, (n,)."""
        seed = self.seed * 100_003 + epoch
        order = permutation(len(self.bucket_ids[source]), seed)
        shard = self.shards[source]
        if shard is None:
            return order
        window = permutation(shard.max() + 1, seed)[shard] // WINDOW
        return order[np.argsort(window[order], kind="stable")]

    def fill_buckets(self, pool):
        """Sort a pool of L samples (3, L) into batches; return positions in the pool.

        Returns those of each batch's samples, (n, B), in the order in which the batches become
        full, and those of the samples that are left over.
        """
        bucket_id = pool[2]
        counts = np.bincount(bucket_id)
        by_bucket = np.argsort(bucket_id.astype(np.uint16), kind="stable")  # 16 bits: a radix sort
        end_of_full = np.cumsum(counts) - counts % self.batch  # of each bucket, in `by_bucket`
        is_full = np.arange(len(by_bucket)) < end_of_full[bucket_id[by_bucket]]
        members = by_bucket[is_full].reshape(-1, self.batch)
        members = members[np.argsort(members[:, -1])]  # the last sample makes a batch full
        return members, np.sort(by_bucket[~is_full])


def permutation(length, seed):
    """Return a random order of range(length): (length,)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()
