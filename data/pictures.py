"""Own pictures with captions: the formats, the index of what is there, filtering, and loading.

A data set of own pictures has one of these formats, the first one that fits:
* a folder with `metadata.jsonl`, each line {"file_name": ..., "text": ..., any further fields}; a
  line with "source", the picture before, is an edit, and its text the instruction;
* tar shards in WebDataset's layout, as a folder with *.tar or as a pattern such as `shards/*.tar`:
  neighbours in a shard such as 0001.jpg with 0001.txt, or with 0001.json ("text" or "caption", and
  any further fields), are one sample;
* a folder of pairs such as 0001.png and 0001.txt.
Subfolders are read, names that begin with a dot are not, and files that are not used are named. The
index reads every picture's header once. Samples that cannot be used are left out and counted by
reason; a condition on the fields (`--where`) may leave out more. A share is held back for
validation, chosen by a hash of each picture's name, or by a field "split".
"""

import ast
import functools
import glob
import hashlib
import io
import json
import os
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common import move, on_white, read_json_lines
from data.buckets import choose_resolutions, crop_to_fill

NO_PIXELS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # PIL needs other programs for these
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
    name: str    # for messages
    path: str
    offset: int  # of the picture's bytes in the file
    size: int    # how many bytes they are; -1: up to the end of the file
    mark: int    # checksum of the first bytes and the length, to notice another picture
    width: int   # in pixels, as shown: after the EXIF orientation
    height: int
    text: str
    draw: float  # see draw()
    fields: dict
    source: str = ""  # of an edit: the path of the picture before


class Broken(NamedTuple):
    """A sample that cannot be used, and why."""
    name: str
    reason: str


class Rules(NamedTuple):
    """Which samples of a data set are used, and for what.

    max_broken: the largest share that cannot be used. holdout: the share that is held back for
    validation. where: the condition (a Where) that a sample must fulfil. caption_fault: gives the
    reason why a caption cannot be used, or "". stage: see `entry_for`.
    """
    max_broken: float
    holdout: float
    where: object = None
    caption_fault: object = lambda text: ""
    stage: str = "image"


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
            if image.mode[0] in WHITES:
                image = scale_values(image)
            image = on_white(image)
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
        exif = Image.Image.getexif(image)  # a PNG's own getexif would decode the pixels
        return TURNS.get(exif.get(ORIENTATION))
    except Exception:  # PIL raises nearly anything at broken files
        return None


def scale_transparent_colour(image):
    """Scale the transparent colour of an opened PNG to 8 bits; PIL scales the pixels only."""
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

class Entry(NamedTuple):
    """A picture in a folder: its file, its path within the folder, its caption, other fields.

    text: the caption, the path of its file, or None. source: "", or the file of the picture before
    an edit, whose instruction the text then is.
    """
    path: str
    name: str
    text: str | Path | None
    fields: dict
    source: str = ""


@functools.cache
def suffixes():
    """Return the suffixes, such as ".png", of the formats whose pixels PIL can read by itself."""
    return {suffix for suffix, form in Image.registered_extensions().items()
            if form in Image.OPEN and form not in NO_PIXELS}


def has_suffix(path, known):
    """Return whether the path of a file ends with one of some suffixes, in any case."""
    return os.path.splitext(path)[1].lower() in known


def is_hidden(name):
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def list_files(folder):
    """Yield the paths of all files in a folder and its subfolders but hidden ones, in order.

    Links to folders are followed, once each. Raises OSError for a folder that cannot be read.
    """
    def stop(error):
        raise error
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        yield from (os.path.join(parent, name) for name in sorted(names) if not is_hidden(name))


def list_entries(path):
    """Return the entries of a data set, the function that reads one of them, and unused files.

    An entry is the path of a tar shard, or an Entry. Raises ValueError where there are none, and
    for a malformed line of metadata.jsonl.
    """
    if not os.path.isdir(path):
        tars = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not tars or not all(has_suffix(name, {".tar"}) for name in tars):
            raise ValueError(f"{path} is not a folder of pictures or tar shards, nor a pattern "
                             "that matches *.tar files")
        return tars, read_tar, []
    files = list(list_files(path))
    metadata = os.path.join(path, "metadata.jsonl")
    tars = [file for file in files if has_suffix(file, {".tar"})]
    if metadata in files:
        entries, read_entry = read_metadata(path, metadata), read_pair
        used = {metadata, *(file for entry in entries for file in (entry.path, entry.source))}
    elif tars:
        entries, read_entry, used = tars, read_tar, set(tars)
    else:
        entries, read_entry = pair_with_texts(path, files), read_pair
        used = {str(file) for entry in entries for file in (entry.path, entry.text)}
    if not entries:
        raise ValueError(f"{path} holds no pictures (.png, .jpg, .webp or another format that PIL "
                         "reads) and no *.tar")
    used = {os.path.normpath(file) for file in used}
    return entries, read_entry, [file for file in files if os.path.normpath(file) not in used]


def read_metadata(folder, metadata):
    """Return the Entries of the lines of a metadata.jsonl. Raises ValueError."""
    def entry(fields):
        name = fields.pop("file_name")
        text = fields.pop("text", None) or ""
        if not isinstance(text, str):
            raise TypeError
        source = fields.get("source")
        is_file = isinstance(source, str) and has_suffix(source, suffixes())
        return Entry(os.path.join(folder, name), os.path.normpath(name), text, fields,
                     source=os.path.join(folder, source) if is_file else "")
    return read_json_lines(metadata, '{"file_name": ..., "text": ...}', entry)


def pair_with_texts(folder, files):
    """Return the Entry of each picture among the files of a folder; its text is beside it."""
    texts = {os.path.splitext(file)[0]: Path(file) for file in files if has_suffix(file, {".txt"})}
    return [Entry(file, os.path.relpath(file, folder), texts.get(os.path.splitext(file)[0]), {})
            for file in files if has_suffix(file, suffixes())]


def entry_for(stage, entry):
    """Return what a stage learns from an entry of `list_entries`, as an entry; None: nothing.

    Stage edit learns from edits alone, as they are. Of an edit stage vae learns the picture after
    it, stage image that picture with the field "caption" (nothing without one), and stage
    understand the picture before it, with the instruction and then the caption as its text.
    """
    if isinstance(entry, str) or not entry.source:  # a tar shard, or no edit
        return None if stage == "edit" else entry
    caption = entry.fields.get("caption")
    if stage == "image":
        return entry._replace(text=caption, source="") if caption else None
    if stage == "understand":
        text = f"{entry.text} {caption}" if isinstance(caption, str) else entry.text
        return entry._replace(path=entry.source, text=text, source="")
    return entry if stage == "edit" else entry._replace(source="")


def entries_for(stage, entries, name, world):
    """Return what a stage learns from the entries of a data set. Raises ValueError for nothing."""
    chosen = [entry_for(stage, entry) for entry in entries]
    kept = [entry for entry in chosen if entry]
    if not kept:
        raise ValueError(f"{name}: " + (
            "no line of a metadata.jsonl has a source, the picture before an edit; expected some"
            if stage == "edit" else "nothing to draw from text: every line is an edit without a "
            "field caption; add captions of the pictures after the edits, or lines without source"))
    if stage == "image" and len(kept) < len(chosen):
        world.print0(f"{name}: not drawn from text: {len(chosen) - len(kept):,} edits without a "
                     "field caption")
    return kept


def check_source(path):
    """Raise ValueError unless the picture before an edit can be used."""
    try:
        with open(path, "rb") as file:
            read_size(file)
    except FileNotFoundError:
        raise ValueError("its source is not there") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"its source: {e}") from None


def read_pair(entry):
    """Yield the Sample (or Broken) of an Entry."""
    try:
        if entry.source:
            check_source(entry.source)
        text = entry.text
        if isinstance(text, Path):
            text = decode_caption(text.read_bytes())
        if text is None:
            stem, _ = os.path.splitext(os.path.basename(entry.path))
            raise ValueError(f"no caption (expected {stem}.txt, or a line of metadata.jsonl)")
        with open(entry.path, "rb") as file:
            sample = make_sample(file, entry.path, entry.name, text, entry.fields)
            yield sample._replace(source=entry.source)
    except FileNotFoundError:
        yield Broken(entry.path, "no such file")
    except OSError:
        yield Broken(entry.path, "cannot be read")
    except ValueError as e:
        yield Broken(entry.path, str(e))


def check_caption(result, caption_fault):
    """Return a Sample, or a Broken in its place if its caption cannot be used."""
    reason = caption_fault(result.text) if isinstance(result, Sample) else ""
    return Broken(result.name, reason) if reason else result


def decode_caption(content):
    """Return the text of a caption's bytes. Raises ValueError for other encodings than UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise ValueError("its caption is not in UTF-8")
    return text


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
            if is_hidden(member.name):
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if (folder, stem) != current and members:
                yield members
                members = {}
            current = (folder, stem)
            if member.isfile() and member.offset_data + member.size <= total_size:
                members["." + suffix.lower()] = member
    except tarfile.ReadError:  # the tar breaks off here, maybe within the last sample
        if not (members.keys() & suffixes() and members.keys() & {".txt", ".json"}):
            return
    if members:
        yield members


def read_members(path, tar, members):
    """Return the Sample (or Broken) of a tar's {suffix: member}: the text is in .txt or .json."""
    picture = next((members[suffix] for suffix in members if suffix in suffixes()), None)
    if not picture:
        first = next(iter(members.values()))
        return Broken(f"{path}/{first.name}", "no picture")
    try:
        fields = json.load(tar.extractfile(members[".json"])) if ".json" in members else {}
        caption = fields.pop("caption", None)
        text = fields.pop("text", caption)
    except (ValueError, AttributeError, TypeError):
        return Broken(f"{path}/{picture.name}", "its JSON is malformed")
    try:
        if ".txt" in members:
            text = decode_caption(tar.extractfile(members[".txt"]).read())
        name = f"{os.path.basename(path)}/{picture.name}"
        return make_sample(tar.extractfile(picture), path, name, text, fields, member=picture)
    except ValueError as e:
        return Broken(f"{path}/{picture.name}", str(e))


def make_sample(file, path, name, text, fields, member=None):
    """Return the Sample of an open picture file. Raises ValueError with the reason if it has none.

    name: within its data set. member: its TarInfo, if it is in a tar.
    """
    if not isinstance(text, str):
        raise ValueError("no caption")
    if not text.strip():
        raise ValueError("its caption is empty")
    width, height = read_size(file)
    shown = f"{path}/{member.name}" if member else path
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    mark = zlib.crc32(file.read(4096), length)
    return Sample(name=shown, path=path, offset=member.offset_data if member else 0,
                  size=member.size if member else -1, mark=mark, width=width, height=height,
                  text=printable(text.strip()), draw=draw(name, fields),
                  fields={**fields, "width": width, "height": height})


def draw(name, fields):
    """Return a number that decides whether a sample is for validation: it is if below --holdout.

    In [0, 1), from a hash of its name in its data set; but 1 or -1 where it has a field "split".
    """
    if fields.get("split") is not None:
        return 1.0 if fields["split"] == "train" else -1.0
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) / 2 ** 32


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
        """Return why a sample is left out, or "". Raises ValueError for a condition that fails."""
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


def printable(text):
    """Return a text that can be printed: bytes of a file's name that are not UTF-8 become "?"."""
    return text.encode("utf-8", "replace").decode()


def first_few(texts, most):
    """Return the first texts of a list as one text that can be printed."""
    return printable(", ".join([*texts[:most], "..."] if len(texts) > most else texts))


def check_broken(name, broken, total, most):
    """Raise ValueError if more than the share `most` of samples is broken ({name: reason})."""
    if len(broken) > most * total:
        listed = [f"{sample}: {reason}" for sample, reason in broken.items()]
        raise ValueError(f"{name}: {len(broken)} of {total} samples cannot be used, more than "
                         f"--max-broken {most} allows: {first_few(listed, 20)}")


def leave_out(source, most, world):
    """Print how many samples a source cannot use, and why. Raises ValueError if they are too many.

    most: the largest share.
    """
    check_broken(source.name, source.broken, source.total, most)
    if source.broken:
        world.print0(f"{source.name}: left out of {source.total:,}: "
                     f"{count_reasons(source.broken.values())}")


def count_reasons(reasons):
    """Return as a text how often each reason occurs, without the details that are in brackets."""
    kinds = Counter(reason.split(" (")[0] for reason in reasons)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def choose_validation(name, draws, holdout):
    """Return which of L samples are held back from training, for validation: (L,).

    draws: of each sample, see `draw`. Where the share `holdout` is less than one sample, or would
    leave nothing to train on, only the field "split" holds samples back. Raises ValueError where
    that field leaves nothing to train on.
    """
    draws = np.array(draws)
    chosen = draws < holdout
    if holdout * len(draws) < 1 or chosen.all():
        chosen = draws < 0
    if chosen.all():
        raise ValueError(f"{name}: the field split of all {len(chosen)} samples holds them back "
                         'from training; expected some with "split": "train"')
    return chosen


# --- The data set ---

class StringArray:
    """Many strings in one block of memory, which data processes share.

    A list would be copied into each of them: reading an element writes its reference count. Paths
    keep bytes that are not UTF-8.
    """

    def __init__(self, texts):
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.data = b"".join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return self.data[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogateescape")


def load_picture(file, height, width):
    """Return a picture, scaled and cropped, as bytes (3, height, width). Raises Unreadable."""
    image = crop_to_fill(open_as_seen(file), height, width)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)             # (3, height, width)


class Pictures:
    """The data source of own pictures with captions, in one of the formats above.

    sizes: see buckets.choose_resolutions. The processes of `world` share the reading of headers,
    and all get the same index. Raises ValueError as `list_entries` does, if more samples cannot be
    used than the Rules allow, and if none is left.
    """

    kind, shard = 1, None  # see buckets.Plan

    def __init__(self, path, sizes, world, rules):
        self.name = printable(path)
        entries, read_entry, unused = list_entries(path)
        entries = entries_for(rules.stage, entries, self.name, world)
        if unused and rules.stage != "edit":  # which opens the folder twice
            world.print0(f"{self.name}: files that are not used: {len(unused):,} "
                         f"({first_few([os.path.relpath(file, path) for file in unused], 5)})")
        part = range(world.rank, len(entries), world.size)  # that this process reads
        results = world.gather({i: [check_caption(result, rules.caption_fault)
                                    for result in read_entry(entries[i])] for i in part})
        results = [result for i in sorted(results) for result in results[i]]
        samples = [result for result in results if isinstance(result, Sample)]
        self.total = len(results)
        self.broken = dict(result for result in results if isinstance(result, Broken))
        leave_out(self, rules.max_broken, world)
        if rules.where:
            samples = self.filter(samples, rules.where, world)
        if not samples:
            what = f"fulfils --where {rules.where.text!r}" if rules.where else "can be used"
            raise ValueError(f"{self.name}: none of its {self.total} samples {what}")
        (_, paths, offsets, byte_counts, marks, widths, heights, texts, draws, fields,
         sources) = zip(*samples)
        self.paths = StringArray(paths)
        self.captions = StringArray(texts)
        self.sources = StringArray(sources)
        self.fields = StringArray(map(json.dumps, fields))
        self.draws = np.array(draws)
        self.validation = choose_validation(self.name, draws, rules.holdout)
        self.byte_ranges = np.column_stack((offsets, byte_counts))
        self.marks = np.array(marks)
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

    def digest(self):
        """Return a short digest of the set of pictures and captions, to notice another one."""
        parts = (self.paths.data, self.captions.data, self.byte_ranges.tobytes(),
                 self.marks.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def sample_name(self, index):
        """Return the name of a sample for messages."""
        offset = self.byte_ranges[index, 0]
        return printable(self.paths[index]) + (f" at byte {offset}" if offset else "")

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
        return load_picture(content, height, width), self.captions[index], None, None

    def load_source(self, index, height, width):
        """Return the picture before an edit, bytes (3, height, width). Raises Unreadable."""
        return load_picture(self.sources[index], height, width)

    def to_pixels(self, pictures, device):
        """Return pictures given as bytes (B, 3, H, W) in [-1, 1] on the device."""
        return move(pictures, device) / 127.5 - 1
