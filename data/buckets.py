"""Which samples make up the batch of step s: buckets by resolution, ratio and prompt length.

Every process computes the plan of the global batches and takes its slice: all do the same steps, in
an order that the seed alone decides. MoS App. A, "Bucket-wise Dynamic Resolution Training".
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

STRIDE = 32  # pixels of a latent patch: 16 by the VAE, 2 by the tower
RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 5 / 2, 3, 4)  # and their inverses
WINDOW = 8  # tar shards that are shuffled together


class Bucket(NamedTuple):
    """Samples that fit into one batch. height, width: in pixels, length: of prompts in tokens."""
    kind: int
    height: int
    width: int
    length: int


class Batch(NamedTuple):
    """A global batch: source and index of each sample, (B,) each, and how many more still wait."""
    source: np.ndarray
    index: np.ndarray
    bucket: Bucket
    waiting: int = 0


@functools.cache
def resolutions(size):
    """Heights and widths, (n, 2), multiples of 32 of about size x size pixels in all."""
    ratios = np.array(RATIOS + tuple(1 / r for r in RATIOS))
    sides = size * np.stack((ratios ** -0.5, ratios ** 0.5), 1) / STRIDE
    return np.unique(STRIDE * np.maximum(1, np.rint(sides)).astype(int), axis=0)


def assign(widths, heights, sizes):
    """The resolution of each picture: heights and widths, (L, 2).

    Of `sizes` the largest whose area a picture has, else the smallest: then it is scaled up. Of
    that size's resolutions the nearest in log aspect ratio.
    """
    sizes = np.sort(sizes)
    level = np.searchsorted(sizes ** 2, widths * heights, side="right") - 1
    sides = np.empty((len(widths), 2), int)
    for i, size in enumerate(sizes):
        table, at = resolutions(int(size)), np.maximum(level, 0) == i
        ratios, own = np.log(table[:, 1] / table[:, 0]), np.log(widths[at] / heights[at])
        order = np.argsort(ratios)
        middles = (ratios[order][1:] + ratios[order][:-1]) / 2
        sides[at] = table[order][np.searchsorted(middles, own)]
    return sides


def fit(pictures, height, width):
    """Scale PIL pictures of one sample so that they cover height x width, and keep the centre.

    All get the same scale and crop, so that the pixels of an edit's pair stay aligned. Raises
    ValueError where they differ in size.
    """
    if len({picture.size for picture in pictures}) > 1:
        raise ValueError("pictures of one sample must have one size, got "
                         + ", ".join("x".join(map(str, p.size)) for p in pictures))
    w, h = pictures[0].size
    scale = max(width / w, height / h)
    left, top = (w - width / scale) / 2, (h - height / scale) / 2
    box = (max(0, left), max(0, top), min(w, w - left), min(h, h - top))  # rounding stays inside
    return [p.resize((width, height), Image.Resampling.LANCZOS, box) for p in pictures]


def permutation(length, seed):
    """A random order of range(length): (length,)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()


class Plan:
    """The global batches of a run: every bucket that is full is dispatched, in that order.

    keys: for each source the bucket of each sample, (L,), or one number where it has no end and
    gives its samples in turn. weights: of the sources, shares of samples. shards: for each source
    None, or the tar shard of each sample (L,): shards are permuted, and samples shuffled within
    windows of WINDOW shards, so that reading stays local. A finite source is a new permutation
    every epoch. What has not filled a bucket waits, into the next epoch too; nothing is lost.
    """

    CHUNK = 2 ** 16  # samples drawn at a time

    def __init__(self, keys, buckets, weights, batch, seed, shards=None):
        self.keys, self.buckets = [np.asarray(k) for k in keys], buckets
        self.shares = np.cumsum(weights) / np.sum(weights)
        self.batch, self.seed, self.shards = batch, seed, shards or [None] * len(keys)
        self.epoch = functools.lru_cache(2 * len(keys))(self._epoch)

    def _epoch(self, source, epoch):
        """The order of one epoch of a source."""
        seed, shard = self.seed * 100_003 + epoch, self.shards[source]
        order = permutation(len(self.keys[source]), seed)
        if shard is None:
            return order
        window = permutation(shard.max() + 1, seed)[shard] // WINDOW
        return order[np.argsort(window[order], kind="stable")]

    def take(self, source, cursor, number):
        """Indices at these places of a source's stream; epochs join seamlessly."""
        if not self.keys[source].ndim:
            return np.arange(cursor, cursor + number)
        length = len(self.keys[source])
        first, last = cursor // length, -(-(cursor + number) // length)
        orders = [self.epoch(source, epoch) for epoch in range(first, last)]
        begin = cursor - first * length
        return np.concatenate([np.empty(0, int), *orders])[begin:begin + number]

    def draw(self, chunk, cursors):
        """Source, index and bucket of each sample of a chunk, (3, CHUNK); moves the cursors."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chunk)
        place = torch.rand(self.CHUNK, generator=generator, dtype=torch.float64).numpy()
        source = np.searchsorted(self.shares[:-1], place, side="right")
        index, key = np.empty((2, self.CHUNK), int)
        for k, number in enumerate(np.bincount(source, minlength=len(self.keys))):
            own = self.take(k, cursors[k], number)
            index[source == k] = own
            key[source == k] = self.keys[k][own] if self.keys[k].ndim else self.keys[k]
            cursors[k] += number
        return np.stack((source, index, key))

    def cut(self, pool):
        """Full batches of a pool (3, L) as places in it, (n, B), as they fill; and who waits."""
        order = np.argsort(pool[2].astype(np.uint16), kind="stable")  # 16 bits: a radix sort
        key, count = pool[2][order], np.bincount(pool[2])
        first, full = np.cumsum(count) - count, count // self.batch * self.batch
        going = np.arange(len(key)) < (first + full)[key]
        batches = order[going].reshape(-1, self.batch)
        return batches[np.argsort(batches[:, -1])], np.sort(order[~going])

    def batches(self, start, stop):
        """Yield the Batch of each step from start to stop."""
        pool, cursors, step, chunk = np.empty((3, 0), int), [0] * len(self.keys), 0, 0
        while step < stop:
            pool = np.concatenate((pool, self.draw(chunk, cursors)), 1)
            batches, rest = self.cut(pool)
            for i in range(max(0, start - step), min(len(batches), stop - step)):
                source, index, key = pool[:, batches[i]]
                yield Batch(source, index, self.buckets[key[0]],
                            int(batches[i][-1]) + 1 - (i + 1) * self.batch)
            pool, step, chunk = pool[:, rest], step + len(batches), chunk + 1


def make_plan(kinds, sides, lengths, step, weights, batch, seed, shards=None):
    """The Plan of sources whose samples differ in these ways, each a list over the sources.

    kinds: samples of different kinds never meet in a batch. sides: heights and widths, (L, 2), or
    (2,) where a source has no end. lengths: of prompts, (L,) or a number. step: prompts are padded
    to the next multiple of it, 0: to the longest of all.
    """
    longest, rows = max(np.max(each) for each in lengths), []
    for kind, side, length in zip(kinds, sides, lengths):
        length = -(-np.asarray(length) // step) * step if step else longest
        rows.append(np.column_stack(np.broadcast_arrays(
            kind, *np.reshape(side, (-1, 2)).T, length)))
    table, keys = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
    if len(table) > 2 ** 16:  # see Plan.cut
        raise ValueError(f"{len(table):,} buckets are too many; choose a larger --length-step")
    keys = np.split(keys.reshape(-1), np.cumsum([len(each) for each in rows])[:-1])
    keys = [key if np.ndim(side) > 1 else key[0] for key, side in zip(keys, sides)]
    return Plan(keys, [Bucket(*map(int, row)) for row in table], weights, batch, seed, shards)
