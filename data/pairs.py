"""Own edits: pictures before and after with instructions, and pictures to draw from text."""

import numpy as np
import torch

from data.pictures import Pictures, StringArray


class Pairs:
    """The data source of stage edit: samples of an edit and of a picture with its caption.

    Both come from one folder, see `pictures.entry_for`. Every edit is in one sample; where there
    are more pictures than edits, all edits are in the same number of samples. Arguments and errors
    are those of Pictures.
    """

    kind, shard = 1, None  # see buckets.Plan

    def __init__(self, path, sizes, world, rules):
        self.edits = Pictures(path, sizes, world, rules._replace(stage="edit"))
        self.drawn = Pictures(path, sizes, world, rules._replace(stage="image"))
        self.name = self.drawn.name
        self.total = self.edits.total + self.drawn.total
        self.broken = self.edits.broken | self.drawn.broken
        count = len(self.edits.sides)
        rounds = -(-len(self.drawn.sides) // count)
        self.edit = np.tile(np.arange(count), rounds)  # of each sample, (L,)
        self.sides = self.edits.sides[self.edit]
        self.validation = self.edits.validation[self.edit]
        self.picture = self.choose_pictures()
        self.captions = StringArray([self.drawn.captions[i] for i in self.picture])
        self.instructions = StringArray([self.edits.captions[i] for i in self.edit])

    def choose_pictures(self):
        """Return the picture that is drawn beside each edit, (L,).

        A held-back edit takes held-back pictures, another one the others: those of its size; where
        there are none, of any size. Where there are none at all, it takes any picture. Edits that
        choose among the same pictures take them in turn.
        """
        pictures = np.column_stack((self.drawn.sides, self.drawn.validation))
        samples = np.column_stack((self.sides, self.validation))
        chosen = np.empty(len(samples), int)
        for row in np.unique(samples, axis=0):
            members = np.flatnonzero((samples == row).all(1))
            candidates = [np.flatnonzero((pictures == row).all(1)),
                          np.flatnonzero(pictures[:, 2] == row[2]), np.arange(len(pictures))]
            best = next(index for index in candidates if len(index))
            chosen[members] = np.resize(best, len(members))
        return chosen

    def sample_name(self, index):
        """Return the names of a sample's pictures for messages."""
        edit = self.edits.sample_name(self.edit[index])
        return f"{edit} with {self.drawn.sample_name(self.picture[index])}"

    def load(self, index, height, width):
        """Return the pictures before and after an edit, and the one drawn beside it, as bytes.

        They are one tensor (3, 3, height, width). Also returns the caption of the last picture, the
        instruction, and None. Raises Unreadable.
        """
        i = self.edit[index]
        before = self.edits.load_source(i, height, width)
        after, instruction, *_ = self.edits.load(i, height, width)
        other, caption, *_ = self.drawn.load(self.picture[index], height, width)
        return torch.stack((before, after, other)), caption, instruction, None

    def to_pixels(self, pictures, device):
        """Return pictures given as bytes (..., H, W) in [-1, 1] on the device."""
        return self.edits.to_pixels(pictures, device)
