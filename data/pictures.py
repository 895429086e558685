"""The index of own pictures: what lies where, how large it is and what is said about it.

Folders and tar shards are read once, headers only. What cannot be used is left out with a reason,
and a condition on the samples' fields may leave out more.
"""

import ast
import glob
import io
import json
import operator
import os
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common import move
from data.buckets import assign, fit

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LEAST_SIDE, LARGEST_RATIO = 32, 8  # of a picture; PIL itself refuses more than 178 M pixels
ORIENTATION = 0x0112  # the EXIF tag
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Sample(NamedTuple):
    """Where a picture lies, its width and height as shown, its caption, and fields to filter by."""
    path: str
    offset: int
    size: int
    width: int
    height: int
    text: str
    fields: dict


class Broken(NamedTuple):
    """What cannot be used, and why."""
    name: str
    reason: str


class Unreadable(Exception):
    """A sample whose header is fine but whose body is not."""


class Texts:
    """Many strings as one: a list's reference counts would copy it into every data process."""

    def __init__(self, texts):
        encoded = [text.encode("utf-8", "replace") for text in texts]
        self.ends, self.data = np.cumsum([0, *map(len, encoded)]), b"".join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return self.data[self.ends[i]:self.ends[i + 1]].decode()


def measure(file):
    """Width and height as shown, read from a picture's header; ValueError says what is wrong."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if Image.Image.getexif(image).get(ORIENTATION, 1) > 4:  # PNG's own would decode it
                width, height = height, width
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2e-6 * Image.MAX_IMAGE_PIXELS:.0f} M pixels") from None
    except Exception:  # PIL raises nearly anything at broken files
        raise ValueError("cannot be read") from None
    if min(width, height) < LEAST_SIDE:
        raise ValueError(f"a side below {LEAST_SIDE} pixels")
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"an aspect ratio beyond {LARGEST_RATIO}")
    return width, height


def describe(name, path, offset, size, file, text, fields):
    """The Sample of an open picture file, or Broken."""
    try:
        if not isinstance(text, str):
            raise ValueError("no caption")
        if not text.strip():
            raise ValueError("its caption is empty")
        width, height = measure(file)
    except ValueError as e:
        return Broken(name, str(e))
    fields = {**fields, "width": width, "height": height}
    return Sample(str(path), offset, size, width, height, text.strip(), fields)


# ------------------------------------------------------------------------------------------------
# Folders and tar shards

def find(path):
    """What the index pass is shared out by, and how to read a piece of it: tars, or pictures.

    Raises ValueError where there is neither, and as `pairs` does.
    """
    folder = Path(path)
    tars = sorted(map(str, folder.glob("*.tar")) if folder.is_dir() else glob.glob(str(path)))
    if tars and all(name.endswith(".tar") for name in tars):
        return tars, read_tar
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder of pictures or tar shards, nor a pattern that "
                         "matches *.tar files")
    pieces = list(pairs(folder))
    if not pieces:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)}) and no *.tar")
    return pieces, read_pair


def pairs(folder):
    """Yield path, text or its path, and fields of a folder's pictures; metadata.jsonl goes before.

    Raises ValueError for a missing caption file and for a malformed line.
    """
    index = folder / "metadata.jsonl"
    if not index.is_file():
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
            caption = path.with_suffix(".txt")
            if not caption.is_file():
                raise ValueError(f"{path} has no caption: expected {caption.name} beside it, "
                                 "or a metadata.jsonl")
            yield path, caption, {}
        return
    for number, line in enumerate(index.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path, text = folder / row.pop("file_name"), row.pop("text")
            if not isinstance(text, str):
                raise TypeError
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError(f'{index}, line {number}: expected {{"file_name": ..., "text": '
                             f'...}}, got {line[:60]!r}') from None
        yield path, text, row


def read_pair(pair):
    """Yield the Sample of a path with its text, or the text's path, and fields."""
    path, text, fields = pair
    try:
        text = text.read_text("utf-8-sig") if isinstance(text, Path) else text
        with open(path, "rb") as file:
            yield describe(str(path), path, 0, -1, file, text, fields)
    except (OSError, UnicodeError):
        yield Broken(str(path), "cannot be read")


def read_tar(path):
    """Yield the Samples of a tar shard; of one that breaks off, those complete until there."""
    try:
        with tarfile.open(path, "r:") as tar:
            for group in groups(tar):
                yield read_group(tar, path, group)
            with open(path, "rb") as file:  # tarfile takes any end for the end
                file.seek(tar.offset)
                if file.read(512) != bytes(512):
                    raise tarfile.ReadError
    except (OSError, tarfile.TarError):
        yield Broken(str(path), "breaks off, or is no tar file")


def groups(tar):
    """Yield the members of each sample of an open tar: neighbours whose names differ in suffix."""
    size, last, group = os.path.getsize(tar.name), None, {}
    try:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            if (folder, key) != last and group:
                yield group
                group = {}
            last = folder, key
            if member.isfile() and member.offset_data + member.size <= size:
                group["." + suffix.lower()] = member
    except tarfile.ReadError:  # it breaks off here, maybe within the last sample
        if not (group.keys() & set(SUFFIXES) and group.keys() & {".txt", ".json"}):
            return
    if group:
        yield group


def read_group(tar, path, group):
    """The Sample of 0001.jpg with 0001.txt, or with "text" or "caption" of 0001.json, or Broken."""
    picture = next((group[suffix] for suffix in group if suffix in SUFFIXES), None)
    name = f"{path}/{(picture or next(iter(group.values()))).name}"
    if not picture:
        return Broken(name, "no picture")
    try:
        fields = json.load(tar.extractfile(group[".json"])) if ".json" in group else {}
        caption = fields.pop("caption", None)
        text = fields.pop("text", caption)
        if ".txt" in group:
            text = tar.extractfile(group[".txt"]).read().decode("utf-8-sig")
    except (ValueError, AttributeError, TypeError):
        return Broken(name, "its text or JSON is malformed")
    return describe(name, path, picture.offset_data, picture.size, tar.extractfile(picture), text,
                    fields)


# ------------------------------------------------------------------------------------------------
# Filtering

class Where:
    """A condition on a sample's fields, such as 'aesthetic >= 6 and width >= 1024'.

    Comparisons, chained ones too, `in`, and, or, not, names of fields, numbers, strings and lists;
    nothing else is ever evaluated. Raises ValueError for anything else.
    """

    COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
               ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.In: lambda a, b: a in b,
               ast.NotIn: lambda a, b: a not in b}
    GRAMMAR = (ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Name,
               ast.Load, ast.Constant, ast.List, ast.Tuple, *COMPARE)

    def __init__(self, text):
        self.text = text
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"where: {text!r} is not a condition such as 'aesthetic >= 6 and "
                             "width >= 1024'") from None
        for node in ast.walk(self.tree):
            if not isinstance(node, self.GRAMMAR) or isinstance(node, ast.Constant) and not (
                    isinstance(node.value, (int, float, str))):
                raise ValueError(f"where: {ast.unparse(node)!r} in {text!r} is not allowed, only "
                                 "comparisons of fields, numbers and strings, in, and, or, not")
        self.names = sorted({n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)})

    def fault(self, fields):
        """Why a sample is dropped: it fails, or lacks a field that is named; "" if it is kept."""
        lacking = [name for name in self.names if fields.get(name) is None]
        if lacking:
            return f"lack {lacking[0]}"
        try:
            return "" if self.value(self.tree, fields) else "fail"
        except TypeError:
            return "hold what cannot be compared"

    def value(self, node, fields):
        """The value of a part of the condition."""
        match node:
            case ast.Name(id=name):
                return fields[name]
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self.value(part, fields) for part in parts]
            case ast.BoolOp(op=op, values=parts):
                some = any if isinstance(op, ast.Or) else all
                return some(self.value(part, fields) for part in parts)
            case ast.UnaryOp(op=op, operand=part):
                value = self.value(part, fields)
                return not value if isinstance(op, ast.Not) else -value
            case ast.Compare(left=left, ops=ops, comparators=rest):
                values = [self.value(part, fields) for part in (left, *rest)]
                return all(self.COMPARE[type(op)](a, b)
                           for op, a, b in zip(ops, values, values[1:]))


# ------------------------------------------------------------------------------------------------
# The data set

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

    def load(self, index, height, width):
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

    def to_pixels(self, pictures, device):
        """Bytes (B, 3, H, W) to pictures in [-1, 1] on the device."""
        return move(pictures, device) / 127.5 - 1


def tally(reasons):
    """Counts of reasons, the most frequent first, as one text."""
    return ", ".join(f"{number:,} {reason}" for reason, number in Counter(reasons).most_common())
