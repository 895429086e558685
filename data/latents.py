"""Latents that are kept, so that a picture is decoded and encoded once: in memory, or in a folder.

A folder holds made.json (what the latents depend on), one shard for each piece of the sources,
NNNNNN.safetensors with its captions, and index.jsonl, which is written last, when all is there.
"""

import json
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint import fingerprint
from common import check_made, read_lines, replacing, write_made
from data.pictures import Pictures, StringArray, Unreadable, choose_validation, leave_out
from towers import Tokenizer


@torch.no_grad()
def encode(vae, pictures):
    """Return latents (B, C, h, w) of pictures (B, 3, H, W), a part that fits at a time."""
    pixels_at_once = 2 ** 23 if pictures.is_cuda else 2 ** 20
    parts = pictures.split(max(1, pixels_at_once // pictures[0, 0].numel()))
    latents = torch.cat([vae.encode(part) for part in parts])             # (B, C, h, w)
    return latents.contiguous()  # the VAE leaves a pixel's channels side by side in memory


# --- In memory ---

class Memory:
    """All latents of a data set on the device, by resolution, beside the tokens of their captions.

    pieces: every sample once, as `Loader.batches` yields them. tables: what the samples have
    besides latents, each (L, ...) in host memory; the first one holds the tokens.
    """

    def __init__(self, dataset, pieces, device):
        counts = [len(source.sides) for source in dataset.sources]
        self.first = np.cumsum([0, *counts])  # of each source, its first row in the tables
        self.rows = np.zeros(self.first[-1], int)  # of each sample, its row in its latents
        self.device = device
        self.tables = []
        latents = {}
        for batch, (z0, *others), _ in pieces:
            index = self.index(batch)
            parts = latents.setdefault(batch.bucket[1:3], [])
            filled = sum(map(len, parts))
            self.rows[index] = np.arange(filled, filled + len(index))
            parts.append(z0)
            if not self.tables:
                self.tables = [values.new_zeros(self.first[-1], *values.shape[1:], device="cpu")
                               for values in others]
            for table, values in zip(self.tables, others):
                table[index] = values.cpu()
        self.latents = {size: torch.cat(parts) for size, parts in latents.items()}
        self.tokens = self.tables[0].to(device)

    def index(self, batch):
        """Return the rows (B,) of a batch's samples in the tables."""
        return self.first[batch.source] + batch.index

    def lengths(self):
        """Return the tokens of each sample's caption, one array for each source."""
        lengths = (self.tables[0] != Tokenizer.PAD).sum(1).numpy()
        return np.split(lengths, self.first[1:-1])

    def batches(self, planned, share):
        """Yield each planned batch with this process's share of its latents and tokens."""
        for batch in planned:
            index = self.index(batch)[share]
            rows = torch.from_numpy(self.rows[index]).to(self.device, non_blocking=True)
            index = torch.from_numpy(index).to(self.device, non_blocking=True)
            z0 = self.latents[batch.bucket[1:3]][rows]  # (B, C, h, w), or (B, 3, C, h, w) in edits
            tokens = self.tokens[index, :batch.bucket.length]             # (B, S)
            yield batch, (z0, tokens)


# --- In a folder ---

def shard_path(folder, number):
    """Return the file of a shard."""
    return Path(folder) / f"{number:06d}.safetensors"


@lru_cache(64)
def open_shard(folder, number):
    """Open a shard, memory-mapped. Raises OSError where it is missing or damaged."""
    path = shard_path(folder, number)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise OSError(f"{path} is damaged ({e}); delete it, and index.jsonl beside it if there is "
                      "one, and start again") from None


class Stored:
    """A source whose latents lie in a folder; rows: its lines of index.jsonl.

    rules: see pictures.Rules. Raises ValueError where too many captions cannot be used.
    """

    shard = None

    def __init__(self, folder, name, rows, rules, world):
        rows.sort(key=lambda row: row["index"])
        self.folder = folder
        self.name = name
        self.kind = rows[0]["kind"]
        self.total = len(rows)
        faults = [rules.caption_fault(row["text"]) for row in rows]
        self.broken = {f"sample {row['index']}": fault for row, fault in zip(rows, faults) if fault}
        leave_out(self, rules.max_broken, world)
        rows = [row for row, fault in zip(rows, faults) if not fault]
        if not rows:
            raise ValueError(f"{name}: none of the captions in {folder} can be used; give "
                             "--latents another folder")
        self.captions = StringArray([row["text"] for row in rows])
        self.sides = np.array([(row["height"], row["width"]) for row in rows])
        self.locations = np.array([(row["file"], row["row"]) for row in rows])
        self.validation = choose_validation(name, [row["draw"] for row in rows], rules.holdout)
        if rows[0]["shard"] is not None:
            self.shard = np.array([row["shard"] for row in rows])

    def sample_name(self, index):
        """Return the name of a sample for messages."""
        file, row = self.locations[index]
        return f"row {row} of {file:06d}.safetensors"

    def load(self, index, height, width):
        """Return the latents (C, h, w) of a sample and its texts. Raises Unreadable."""
        file, row = map(int, self.locations[index])
        try:
            shard = open_shard(self.folder, file)
        except OSError as e:
            raise Unreadable(" ".join(str(e).split())) from None
        return shard.get_slice("latents")[row], self.captions[index], None, None

    def to_pixels(self, latents, device):
        """Return the latents (B, C, h, w) in full precision on the device: nothing to decode."""
        return latents.to(device, non_blocking=True).to(torch.get_default_dtype())


def made_from(c, config, data, sizes):
    """Return what stored latents depend on, {name: value}.

    config: the model's. data: the paths of `--data`. sizes: of own pictures, in pixels.
    """
    vae = fingerprint(config, c.init, "vae")
    world = [config.size, c.seed, c.scenes, list(c.tasks), c.grid] if "shapes" in data else []
    return {"vae": vae, "sizes": sizes, "data": list(data), "where": c.where, "shapes": world}


def describe_pictures(sources):
    """Return what stored latents also depend on: the own pictures of the sources, if any."""
    digests = [source.digest() for source in sources if isinstance(source, Pictures)]
    return {"set of pictures and captions": digests} if digests else {}


def read_stored(folder, made, rules, world):
    """Return the Stored sources of a folder, or [] if it is not complete.

    Raises ValueError where it was made from other things.
    """
    check_made(folder, made, "latents")
    if not (folder / "index.jsonl").is_file():
        return []
    rows = [[] for _ in made["data"]]
    for row in read_lines(folder / "index.jsonl"):
        rows[row["source"]].append(row)
    return [Stored(folder, name, lines, rules, world) for name, lines in zip(made["data"], rows)]


def store(folder, dataset, loader, pieces, *, rules, world):
    """Encode the pieces that a folder lacks, each process a part. Returns the Stored sources.

    Raises ValueError for another data set's folder, and where too many samples are broken.
    """
    begin = time.time()
    made = dataset.made | describe_pictures(dataset.sources)
    check_made(folder, made, "latents")
    world.wait()
    if world.first:
        write_made(folder, made)
    missing = [number for number in range(world.rank, len(pieces), world.size)
               if not shard_path(folder, number).is_file()]
    world.wait()
    contents = loader.batches(pieces[number] for number in missing)
    for number, (piece, (z0, _), texts) in zip(missing, contents):
        captions = [caption for caption, _ in texts]
        write_shard(shard_path(folder, number), piece, z0, captions, loader.broken)
    world.wait()
    broken = {(int(piece.source[0]), int(index)): why for number, piece in enumerate(pieces)
              for index, why in read_about(folder, number)[1].items()}
    dataset.check(broken, rules.max_broken)
    if world.first:
        write_index(folder, dataset, pieces)
    world.wait()
    world.print0(f"{folder}: {len(pieces)} shards of latents, {len(missing)} encoded by this "
                 f"process in {time.time() - begin:.0f} s")
    return read_stored(folder, dataset.made, rules, world)


def write_shard(path, piece, latents, captions, broken):
    """Write the latents (n, C, h, w) of a piece, and its captions.

    broken: {(source, index): why} of samples, of which the piece's own are written, too. Latents
    are stored in bf16, half the size of fp32: it rounds by up to 2^-9 of a value, far below the
    noise that training adds, and on a GPU the tower reads bf16 anyway.
    """
    number = piece.source[0]
    reasons = {index: broken[number, index] for index in piece.index.tolist()
               if (number, index) in broken}
    with replacing(path) as temporary:
        save_file({"latents": latents.bfloat16().cpu()}, temporary,
                  {"about": json.dumps([captions, reasons])})


def read_about(folder, number):
    """Return the captions of a shard and {index: why} of its broken samples. Raises OSError."""
    return json.loads(open_shard(folder, number).metadata()["about"])


def write_index(folder, dataset, pieces):
    """Write index.jsonl, a line for each good sample of the pieces; it makes the folder complete.
    """
    with replacing(folder / "index.jsonl") as path, open(path, "w") as file:
        for number, piece in enumerate(pieces):
            k = int(piece.source[0])
            source = dataset.sources[k]
            captions, broken = read_about(folder, number)
            for row, (index, text) in enumerate(zip(piece.index.tolist(), captions)):
                if str(index) in broken:
                    continue
                line = {"source": k, "index": index, "file": number, "row": row, "text": text,
                        "kind": source.kind, "height": piece.bucket.height,
                        "width": piece.bucket.width,
                        "shard": None if source.shard is None else int(source.shard[index]),
                        "draw": float(source.draws[index]) if source.kind else 1.0,
                        "fields": json.loads(source.fields[index]) if source.kind else {}}
                file.write(json.dumps(line) + "\n")
