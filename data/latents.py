"""Latents on disk, so that a picture is decoded and encoded once and never again.

A folder holds made.json (what made them), a shard for each piece of the sources, NNNNNN.safetensors
with its captions, and index.jsonl, which comes last: with it the folder is complete.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checksum, move, replacing
from data.pictures import Texts, Unreadable


def shard_path(folder, number):
    """The file of a shard."""
    return Path(folder) / f"{number:06d}.safetensors"


@lru_cache(64)
def open_shard(folder, number):
    """A shard, memory-mapped."""
    return safe_open(shard_path(folder, number), framework="pt")


class Stored:
    """Latents of a source on disk; rows: its lines of index.jsonl. They are read, never decoded."""

    def __init__(self, folder, name, rows):
        rows.sort(key=lambda row: row["index"])
        self.folder, self.name, self.kind = folder, name, rows[0]["kind"]
        self.total, self.broken = len(rows), {}
        self.captions = Texts([row["text"] for row in rows])
        self.sides = np.array([[row["height"], row["width"]] for row in rows])
        self.places = np.array([[row["file"], row["row"]] for row in rows])
        self.shard = None if rows[0]["shard"] is None else np.array([r["shard"] for r in rows])

    def title(self, index):
        """What messages call a sample."""
        return "row {1} of {0:06d}.safetensors".format(*self.places[index])

    def item(self, index, height, width):
        """The item of one index, its latents (C, h, w). Raises Unreadable."""
        file, row = map(int, self.places[index])
        try:
            latents = open_shard(self.folder, file).get_slice("latents")
            latents = latents[row:row + 1][0]                             # (C, h, w)
        except (OSError, SafetensorError) as e:
            raise Unreadable(" ".join(str(e).split())) from None
        return latents, self.captions[index], None, None

    def draw(self, latents, device):
        """Latents (B, C, h, w) in full precision on the device."""
        return move(latents, device).to(torch.get_default_dtype())


def read_lines(path):
    """The JSON of each line of a file. Raises ValueError where it is damaged."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); delete its folder and start again") from None


def made_by(c, names, size, sizes):
    """What stored latents depend on, by name, as far as it is known without an index."""
    vae = checksum(Path(c.init) / "vae.safetensors")
    world = [size, c.seed, c.scenes, list(c.tasks), c.grid] if "shapes" in names else []
    return {"vae": vae, "sizes": sizes, "data": list(names), "where": c.where, "shapes": world}


def check_made(folder, made):
    """Raise ValueError unless `folder` is free for latents, or holds some that were made so."""
    path = folder / "made.json"
    if not path.is_file():
        if any(not path.name.startswith(".") for path in folder.glob("*")):
            raise ValueError(f"latents: {folder} holds something else; choose a new folder")
        return
    old, = read_lines(path)
    for name in made:
        if name in old and old[name] != made[name]:
            raise ValueError(f"latents: {folder} was made with another {name} ({old[name]}, now "
                             f"{made[name]}); choose another folder")


def read_stored(folder, made):
    """The Stored sources of a folder, None if it is not complete. Raises ValueError: check_made."""
    check_made(folder, made)
    if not (folder / "index.jsonl").is_file():
        return None
    rows = [[] for _ in made["data"]]
    for row in read_lines(folder / "index.jsonl"):
        rows[row["source"]].append(row)
    return [Stored(folder, name, own) for name, own in zip(made["data"], rows)]


def with_digest(dataset):
    """What made the latents of a dataset, with a digest of its samples."""
    digest = hashlib.sha256()
    for source in dataset.sources:
        if source.kind:  # what the small world holds follows from its settings
            for data in (source.paths.data, source.captions.data, source.places.tobytes()):
                digest.update(data)
    return {**dataset.made, "samples": digest.hexdigest()}


def write_made(folder, made):
    """Write made.json into a folder, which need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "made.json") as path:
        path.write_text(json.dumps(made))


def write_shard(path, piece, latents, texts, broken):
    """Write the latents (n, C, h, w) of a piece, with captions and {(source, index): why}.

    In bf16, half of fp32's bytes: it rounds by up to 2^-9 of a value, far below the noise that
    training adds, and on a GPU the tower reads bf16 anyway.
    """
    own = set(zip(piece.source.tolist(), piece.index.tolist()))
    about = json.dumps([texts, {key[1]: why for key, why in broken.items() if key in own}])
    with replacing(path) as temporary:
        try:
            save_file({"latents": latents.bfloat16().cpu()}, temporary, {"about": about})
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from None


def about(folder, number):
    """Captions of a shard and {index as text: why} of what in it is broken."""
    try:
        return json.loads(open_shard(folder, number).metadata()["about"])
    except SafetensorError as e:
        raise OSError(f"{shard_path(folder, number)} is damaged ({e}); delete it and start "
                      "again") from None


def broken_samples(folder, pieces):
    """What was found broken in all shards, {(source, index): why}."""
    return {(int(piece.source[0]), int(index)): why for number, piece in enumerate(pieces)
            for index, why in about(folder, number)[1].items()}


def end_store(folder, dataset, pieces):
    """Write index.jsonl, a line for each good sample of these pieces: now `folder` is complete."""
    with replacing(folder / "index.jsonl") as path, open(path, "w") as file:
        for number, piece in enumerate(pieces):
            source, (texts, broken) = dataset.sources[piece.source[0]], about(folder, number)
            for row, (index, text) in enumerate(zip(piece.index.tolist(), texts)):
                if str(index) not in broken:
                    file.write(json.dumps({
                        "source": int(piece.source[0]), "index": index, "file": number, "row": row,
                        "text": text, "kind": source.kind, "height": piece.bucket.height,
                        "width": piece.bucket.width,
                        "shard": None if source.shard is None else int(source.shard[index]),
                        "fields": json.loads(source.fields[index]) if source.kind else {}}) + "\n")
