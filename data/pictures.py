"""Own pictures with captions: the formats, the index of what is there, filtering, and loading.

A data set of own pictures is one of
* a folder with `metadata.jsonl`, each line {"file_name": ..., "text": ..., any further fields};
* a folder of pairs such as 0001.png and 0001.txt;
* tar shards in WebDataset's layout, as a folder with *.tar or as a pattern such as `shards/*.tar`:
  neighbours in a shard such as 0001.jpg with 0001.txt, or with 0001.json ("text" or "caption", and
  any further fields), are one sample.
The index reads every picture's header once. Samples that cannot be used are left out and counted
by reason; a condition on the fields (`--where`) may leave out more.
"""

import ast
import glob
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common import move
from data.buckets import choose_resolutions, crop_to_fill

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LEAST_SIDE = 32  # pixels of a picture
LARGEST_RATIO = 8  # of its sides; PIL itself refuses more than 178 M pixels
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of EXIF and TIFF
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # what makes each orientation upright
SIDEWAYS = [TURNS[value] for value in (5, 6, 7, 8)]
WHITES = {"I": (2 ** 16 - 1, 2 ** 31 - 1), "F": (1, 2 ** 8 - 1, 2 ** 16 - 1)}  # of PIL's modes
TO_8_BITS = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # factors, for PNG's depths
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Sample(NamedTuple):
    """A picture that can be used: where its bytes are, what it shows, and what to filter by."""
    path: str
    offset: int  # of the picture's bytes in the file
    size: int    # how many bytes they are; -1: up to the end of the file
    width: int   # in pixels, as shown: after the EXIF orientation
    height: int
    text: str
    fields: dict


class Broken(NamedTuple):
    """A sample that cannot be used, and why."""
    name: str
    reason: str


class Unreadable(Exception):
    """Raised for a sample whose header is fine but whose pixels cannot be read."""


# --- What a picture shows ---

def open_as_seen(file):
    """Return a picture in RGB as viewers show it: upright, the first frame, on white.

    file: a path or an open file. Values of more than 8 bits are scaled, and what is transparent is
    composited on white. Colour profiles are not applied. Raises Unreadable with PIL's reason.
    """
    try:
        with Image.open(file) as image:
            turn = find_turn(image)
            scale_transparent_colour(image)
            image.load()
            if image.mode[0] in WHITES:
                image = scale_values(image)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
            return image if turn is None else image.transpose(turn)
    except Exception as e:  # PIL raises nearly anything at broken files
        raise Unreadable(" ".join(str(e).split()) or type(e).__name__) from None


def find_turn(image):
    """Return what makes an opened picture upright, from its header alone; None: it is upright.

    Orientations other than 2 to 8 mean upright, and so does damaged EXIF.
    """
    if image.format == "TIFF":  # PIL has exchanged its sides already, and turns it when it loads
        return None
    try:
        value = Image.Image.getexif(image).get(ORIENTATION)  # a PNG's own would decode the pixels
        return TURNS.get(value)
    except Exception:  # PIL raises nearly anything, as above
        return None


def scale_transparent_colour(image):
    """Bring the transparent colour of an opened PNG to 8 bits: PIL does so with pixels only."""
    colour = image.info.get("transparency")
    factor = TO_8_BITS.get(image.tile[0].args) if image.format == "PNG" and image.tile else None
    if colour is not None and factor:
        levels = tuple(int(level * factor) for level in np.ravel(colour))
        image.info["transparency"] = levels if len(levels) > 1 else levels[0]


def scale_values(image):
    """Return a picture of 16 or 32 bits a value as one of 8 bits, grey and alpha.

    White is 65535 for integers and 1 for floating point. Where the largest value is at least twice
    as much, white is the next of 2^31 - 1, or of 255 and 65535.
    """
    values = torch.from_numpy(np.asarray(image).astype(float)).nan_to_num()        # (H, W)
    whites = WHITES[image.mode[0]]
    white = next((white for white in whites if values.max() < 2 * white), whites[-1])
    grey = (values / white * 255).round().clamp(0, 255)                            # (H, W)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # in this TIFF 0 is white
        grey = 255 - grey                                                          # (H, W)
    alpha = 255 * (values != image.info.get("transparency", -1))                   # (H, W)
    return Image.fromarray(torch.stack((grey, alpha), 2).byte().numpy())


# --- Where the samples are: folders and tar shards ---

def list_entries(path):
    """Return the entries of a data set, and the function that yields the samples of an entry.

    An entry is the path of a tar shard, or (path, text, fields) of a picture. Raises ValueError
    where there are none, for a missing caption and for a malformed line.
    """
    folder = Path(path)
    tars = folder.glob("*.tar") if folder.is_dir() else glob.glob(str(path))
    tars = sorted(map(str, tars))
    if tars and all(name.endswith(".tar") for name in tars):
        return tars, read_tar
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder of pictures or tar shards, nor a pattern that "
                         "matches *.tar files")
    if (folder / "metadata.jsonl").is_file():
        entries = list(read_metadata(folder))
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        entries = [(file, file.with_suffix(".txt"), {}) for file in files]
    for picture, text, _ in entries:
        if isinstance(text, Path) and not text.is_file():
            raise ValueError(f"{picture} has no caption: expected {text.name} beside it, "
                             "or a metadata.jsonl")
    if not entries:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)}) and no *.tar")
    return entries, read_pair


def read_metadata(folder):
    """Yield (path, text, fields) of the lines of metadata.jsonl. Raises ValueError."""
    metadata = folder / "metadata.jsonl"
    for number, line in enumerate(metadata.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            path = folder / fields.pop("file_name")
            text = fields.pop("text")
            if not isinstance(text, str):
                raise TypeError
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError(f'{metadata}, line {number}: expected {{"file_name": ..., "text": '
                             f'...}}, got {line[:60]!r}') from None
        yield path, text, fields


def read_pair(entry):
    """Yield the Sample (or Broken) of a picture's path, its text or the text's path, and fields."""
    path, text, fields = entry
    try:
        if isinstance(text, Path):
            text = text.read_text("utf-8-sig")
        with open(path, "rb") as file:
            yield make_sample(file, path, text, fields)
    except (OSError, UnicodeError):
        yield Broken(str(path), "cannot be read")


def read_tar(path):
    """Yield the Samples (or Broken) of a tar shard; if it breaks off, those before the break."""
    try:
        with tarfile.open(path, "r:") as tar:
            for members in split_by_sample(tar):
                yield read_members(path, tar, members)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile does not notice a missing end mark
                raise tarfile.ReadError
    except (OSError, tarfile.TarError):
        yield Broken(str(path), "breaks off, or is no tar file")


def split_by_sample(tar):
    """Yield {suffix: member} of each sample of an open tar.

    The members of a sample are neighbours whose names differ only in their suffix.
    """
    total_size = os.path.getsize(tar.name)
    current = None
    members = {}
    try:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if (folder, stem) != current and members:
                yield members
                members = {}
            current = (folder, stem)
            if member.isfile() and member.offset_data + member.size <= total_size:
                members["." + suffix.lower()] = member
    except tarfile.ReadError:  # the tar breaks off here, maybe within the last sample
        if not (members.keys() & set(SUFFIXES) and members.keys() & {".txt", ".json"}):
            return
    if members:
        yield members


def read_members(path, tar, members):
    """Return the Sample (or Broken) of a tar's {suffix: member}: the text is in .txt or .json."""
    picture = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
    if not picture:
        first = next(iter(members.values()))
        return Broken(f"{path}/{first.name}", "no picture")
    try:
        fields = json.load(tar.extractfile(members[".json"])) if ".json" in members else {}
        caption = fields.pop("caption", None)
        text = fields.pop("text", caption)
        if ".txt" in members:
            text = tar.extractfile(members[".txt"]).read().decode("utf-8-sig")
    except (ValueError, AttributeError, TypeError):
        return Broken(f"{path}/{picture.name}", "its text or JSON is malformed")
    return make_sample(tar.extractfile(picture), path, text, fields, member=picture)


def make_sample(file, path, text, fields, member=None):
    """Return the Sample of an open picture file, or Broken; member: its TarInfo, if in a tar."""
    try:
        if not isinstance(text, str):
            raise ValueError("no caption")
        if not text.strip():
            raise ValueError("its caption is empty")
        width, height = read_size(file)
    except ValueError as e:
        return Broken(f"{path}/{member.name}" if member else str(path), str(e))
    return Sample(path=str(path), offset=member.offset_data if member else 0,
                  size=member.size if member else -1, width=width, height=height,
                  text=text.strip(), fields={**fields, "width": width, "height": height})


def read_size(file):
    """Return width and height as shown from a picture's header. Raises ValueError with a reason."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if find_turn(image) in SIDEWAYS:
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


# --- Which samples are used ---

class Where:
    """A condition on the fields of a sample, such as 'aesthetic >= 6 and width >= 1024'.

    text: a Python expression whose names are fields, without Python's built-in functions. Raises
    ValueError if it does not compile.
    """

    def __init__(self, text):
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self.code = compile(tree, "--where", "eval")  # the user's own text: no harm to fear
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"where: {text!r} is not a condition such as 'aesthetic >= 6 and "
                             "width >= 1024'") from None
        self.names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})

    def reason_to_drop(self, fields):
        """Return why a sample is dropped, or "" if it is kept. Raises ValueError if this fails."""
        for name in self.names:
            if fields.get(name) is None:
                return f"lack {name}"
        try:
            return "" if eval(self.code, {"__builtins__": {}}, fields) else "fail"
        except TypeError:
            return "hold what cannot be compared"
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"where: {self.text!r} cannot be evaluated: {reason}") from None


def check_broken(name, broken, total, most):
    """Raise ValueError if more than the share `most` of samples is broken ({name: reason})."""
    if len(broken) <= most * total:
        return
    listed = [f"{sample}: {reason}" for sample, reason in broken.items()]
    if len(listed) > 20:
        listed[20:] = ["..."]
    raise ValueError(f"{name}: {len(broken)} of {total} samples cannot be used, more than "
                     f"--max-broken {most} allows: {', '.join(listed)}")


def count_reasons(reasons):
    """Return how often each reason occurs, the most frequent first, as one text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(reasons).most_common())


# --- The data set ---

class StringArray:
    """Many strings in one block of memory, which data processes share.

    A list would be copied into each of them: reading an element writes its reference count.
    """

    def __init__(self, texts):
        encoded = [text.encode("utf-8", "replace") for text in texts]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.data = b"".join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return self.data[self.ends[i]:self.ends[i + 1]].decode()


class Pictures:
    """The data source of own pictures with captions, in one of the formats above.

    sizes: see buckets.choose_resolutions. where: the condition (a Where) that a sample must
    fulfil. The processes of `world` share the reading of headers, and all get the same index, of
    40 bytes and three texts a sample. Raises ValueError as `list_entries` does, if more than the
    share `max_broken` of samples cannot be used, and if none is left.
    """

    kind, shard = 1, None  # see buckets.Plan

    def __init__(self, path, sizes, world, where=None, max_broken=0.05):
        self.name = str(path)
        entries, read_entry = list_entries(path)
        part = range(world.rank, len(entries), world.size)  # that this process reads
        results = world.gather({i: list(read_entry(entries[i])) for i in part})
        results = [result for i in sorted(results) for result in results[i]]
        samples = [result for result in results if isinstance(result, Sample)]
        self.total = len(results)
        self.broken = dict(result for result in results if isinstance(result, Broken))
        check_broken(path, self.broken, self.total, max_broken)
        if self.broken:
            world.print0(f"{path}: left out of {self.total:,}: "
                         f"{count_reasons(self.broken.values())}")
        if where:
            samples = self.filter(samples, where, world)
        if not samples:
            what = f"fulfils --where {where.text!r}" if where else "can be used"
            raise ValueError(f"{path}: none of its {self.total} samples {what}")
        paths, offsets, byte_counts, widths, heights, texts, fields = zip(*samples)
        self.paths = StringArray(paths)
        self.captions = StringArray(texts)
        self.fields = StringArray(map(json.dumps, fields))
        self.byte_ranges = np.column_stack((offsets, byte_counts))
        self.sides = choose_resolutions(np.array(widths), np.array(heights), sizes)
        if read_entry is read_tar:  # of each sample the number of its tar shard, (L,)
            _, self.shard = np.unique(paths, return_inverse=True)

    def filter(self, samples, where, world):
        """Return the samples that fulfil a condition, and print how many do not, and why."""
        fields = sorted({name for sample in samples for name in sample.fields})
        unknown = [name for name in where.names if name not in fields]
        if samples and unknown:
            raise ValueError(f"where: no sample of {self.name} has the field {unknown[0]!r} of "
                             f"{where.text!r}; the fields are: {', '.join(fields)}")
        reasons = [where.reason_to_drop(sample.fields) for sample in samples]
        kept = [sample for sample, reason in zip(samples, reasons) if not reason]
        dropped = filter(None, reasons)
        world.print0(f"{self.name}: --where keeps {len(kept):,} of {len(samples):,}; of the "
                     f"others {count_reasons(dropped) or 'there are none'}")
        return kept

    def sample_name(self, index):
        """Return the name of a sample for messages."""
        offset = self.byte_ranges[index, 0]
        return self.paths[index] + (f" at byte {offset}" if offset else "")

    def texts(self, _):
        """Return all captions, for a vocabulary."""
        return self.captions

    def load(self, index, height, width):
        """Return the picture of a sample, bytes (3, height, width), its caption, None and None.

        The bytes become numbers in `to_pixels`, on the device. Raises Unreadable.
        """
        try:
            offset, size = map(int, self.byte_ranges[index])
            with open(self.paths[index], "rb") as file:
                file.seek(offset)
                content = io.BytesIO(file.read(size))
        except OSError as e:
            raise Unreadable(str(e)) from None
        image = crop_to_fill(open_as_seen(content), height, width)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)      # (3, height, width)
        return picture, self.captions[index], None, None

    def to_pixels(self, pictures, device):
        """Return pictures given as bytes (B, 3, H, W) in [-1, 1] on the device."""
        return move(pictures, device) / 127.5 - 1
