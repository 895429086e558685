"""Own data: the plan of batches, folders and tar shards, filtering, latents on disk."""

import csv
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training import MODEL, alone, launch, near, prepare, settings

import sample
import stages
import train
from checkpoint import read_vocabulary, save_model
from common import World, to_image
from conftest import ROOT, make_config, make_model
from data import buckets, latents, pictures, sources, states
from data.buckets import Batch, Bucket, Plan, choose_resolutions, crop_to_fill, resolutions
from data.pictures import Pictures, Rules, Where
from data.sources import Mixture, Reader, parse_mixture
from mos import MoS
from tools import evaluate
from world import shapes

SIZES = ((64, 64), (96, 64), (64, 100), (70, 70), (140, 64))  # four buckets at 64 pixels


def picture(i, size=None, form="PNG"):
    """Return the bytes of picture i: noise with a mark in the corner whose colour says i."""
    width, height = size or SIZES[i % len(SIZES)]
    noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    image.paste((20 * i % 256, 100, 200), (0, 0, 20, 20))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def caption(i):
    return "a red circle" + " and two blue stars" * (i % 2)


def make_folder(path, number=6):
    """Write pictures with a metadata.jsonl whose field `score` counts from 0."""
    path.mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", "text": caption(i), "score": i} for i in range(number)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(number):
        (path / f"{i}.png").write_bytes(picture(i))
    return path


def make_tar(path, members):
    """Write a tar of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_shards(path, shards=2, each=4):
    """Write tar shards of pictures with JSON."""
    for s in range(shards):
        make_tar(path / f"{s:03d}.tar", {
            name: content for i in range(s * each, s * each + each) for name, content in (
                (f"{i:04d}.json", json.dumps({"text": caption(i), "score": i}).encode()),
                (f"{i:04d}.png", picture(i)))})
    return path


def read(path, where=None, broken=1.0, world=None, holdout=0.0):
    rules = Rules(broken, holdout, where and Where(where))
    return Pictures(str(path), [64], world or alone(), rules)


# ------------------------------------------------------------------------------------------------
# The plan

def steps(plan, start, stop):
    return [(b.source.tolist(), b.index.tolist(), b.bucket, b.waiting)
            for b in plan.batches(start, stop)]


def source(sides, kind=1, shard=None):
    """Return what a plan needs to know of a source."""
    return SimpleNamespace(sides=sides, kind=kind, shard=shard, validation=False)


def mixed(seed=0, batch=4, chunk=64):
    """Return the plan of two finite sources of several buckets and one without end."""
    rng = np.random.default_rng(0)
    parts = [source(np.stack([rng.choice([64, 96], n)] * 2, 1)) for n in (50, 7)]
    parts += [source(np.array([64, 64]), kind=0)]
    lengths = [rng.integers(3, 30, 50), rng.integers(3, 30, 7), 20]
    plan = Plan(parts, lengths=lengths, length_step=16, weights=[5, 3, 2], batch=batch, seed=seed)
    plan.CHUNK = chunk
    return plan


def single(side, lengths=0, kind=1, shard=None, **options):
    """Return the plan of one source."""
    options = {"batch": 1, "seed": 0, **options}
    return Plan([source(side, kind, shard)], lengths=[lengths], weights=[1], **options)


def test_one_source_and_one_bucket_are_a_permutation_of_each_epoch():
    """Every epoch is another permutation, epochs join seamlessly; another seed, another order."""
    for length, batch in ((10, 4), (7, 16), (5, 5)):
        side = np.full((length, 2), 64)
        plans = [single(side, batch=batch, seed=seed) for seed in (3, 4)]
        drawn = [np.concatenate([b.index for b in p.batches(0, 2 * length)]) for p in plans]
        epochs = drawn[0].reshape(-1, length)
        assert (np.sort(epochs, 1) == np.arange(length)).all()
        assert len(np.unique(epochs, axis=0)) > 1 and (drawn[0] != drawn[1]).any()
    endless = single(np.array([64, 64]), 9, kind=0, batch=6, seed=3)
    assert [b.index.tolist() for b in endless.batches(7, 9)] == [[*range(42, 48)], [*range(48, 54)]]


def test_resume_at_any_step():
    """A resumed plan has the same batches; for one source the size of a chunk changes nothing."""
    whole = steps(mixed(), 0, 60)
    assert all(steps(mixed(), s, 60) == whole[s:] for s in (1, 7, 31, 59))
    assert steps(mixed(seed=1), 0, 60) != whole
    side, length = np.repeat([[64, 64], [64, 96]], 9, 0), np.arange(18)
    a, b = (single(side, length, length_step=8, batch=4) for _ in range(2))
    b.CHUNK = 5
    assert steps(a, 0, 50) == steps(b, 0, 50)


def test_buckets_fill_in_turn():
    """A batch is of one bucket that is full; all other samples wait, and none is lost."""
    plan, found, stop = mixed(), [], 200
    for step, b in enumerate(plan.batches(0, stop)):
        ids = [plan.bucket_ids[s][0 if s == 2 else i]
               for s, i in zip(b.source, b.index)]
        assert {plan.buckets[i] for i in ids} == {b.bucket} and len(ids) == 4
        assert 0 <= b.waiting <= 3 * len(plan.buckets)
        found += zip(b.source.tolist(), b.index.tolist())
    for source, length in ((0, 50), (1, 7)):
        times = np.bincount([i for s, i in found if s == source], minlength=length)
        missing = times.max() * length - times.sum()
        assert times.min() >= times.max() - 2 and missing <= length + 3 * len(plan.buckets)
    last = [i for s, i in found if s == 2]
    assert sorted(last) == sorted(set(last)) and max(last) - len(last) <= 3 * len(plan.buckets)
    drawn = (stop - 1) * 4 + 4 + b.waiting  # of the stream, up to the last one dispatched
    cursors, stream = [0] * 3, []
    for chunk in range(-(-drawn // 64)):
        stream += [tuple(column) for column in plan.sample_chunk(chunk, cursors)[:2].T.tolist()]
    rest = list(stream[:drawn])
    for one in found:
        rest.remove(one)
    assert len(rest) == b.waiting


def test_shares_of_sources():
    """Samples come from sources by weight, to within three standard deviations."""
    plan, number = mixed(batch=10), 4000
    counts = sum(np.bincount(b.source, minlength=3) for b in plan.batches(0, number))
    for share, count in zip((0.5, 0.3, 0.2), counts / (10 * number)):
        assert abs(count - share) < 3 * (share * (1 - share) / (10 * number)) ** 0.5


def test_shards_are_read_in_windows(monkeypatch):
    """Any stretch of an epoch touches few shards; shards and samples are in random order."""
    monkeypatch.setattr(buckets, "WINDOW", 3)
    shard = np.repeat(np.arange(30), 20)
    plan = single(np.full((600, 2), 64), batch=20, shard=shard)
    order = np.concatenate([b.index for b in plan.batches(0, 30)])
    windows = shard[order].reshape(-1, 60)
    assert sorted(order) == list(range(600))
    assert all(len(set(w)) == 3 and len(set(w[:20])) == 3 for w in windows)
    assert windows[0].max() - windows[0].min() > 2


def test_lengths():
    """Prompts are padded to the next multiple of length_step, with 0 to the longest of all."""
    side = np.full((6, 2), 64)
    lengths = np.array([1, 16, 17, 32, 33, 40])
    plan = single(side, lengths, length_step=16)
    assert [plan.buckets[i].length for i in plan.bucket_ids[0]] == [16, 16, 32, 32, 48, 48]
    assert single(side, lengths).buckets == [Bucket(1, 64, 64, 40)]
    with pytest.raises(ValueError, match="70,000 buckets.*length-step"):
        single(np.full((70_000, 2), 64), np.arange(70_000), length_step=1)


def test_resolutions():
    """Sides are multiples of 32 with about the wanted area; a picture gets the nearest ratio."""
    for size in (512, 1024):
        table = resolutions(size)
        assert (table % 32 == 0).all() and {(h, w) for h, w in table} == {(w, h) for h, w in table}
        assert abs(table.prod(1) / size ** 2 - 1).max() < 0.07 and [size, size] in table.tolist()
    widths, heights = np.array([(600, 600), (1000, 600), (512, 4000), (1024, 1024), (300, 200)]).T
    assert choose_resolutions(widths, heights, [512]).tolist() == [
        [512, 512], [384, 672], [1024, 256], [512, 512], [416, 640]]
    assert choose_resolutions(widths, heights, [1024, 512])[:4].tolist() == [
        [512, 512], [384, 672], [2048, 512], [1024, 1024]]
    rng = np.random.default_rng(0)
    w, h = rng.integers(100, 800, (2, 300))
    table = resolutions(512)
    away = abs(np.log(table[:, 1] / table[:, 0]) - np.log(w / h)[:, None])
    sides = choose_resolutions(w, h, [512])
    assert (abs(np.log(sides[:, 1] / sides[:, 0]) - np.log(w / h)) <= away.min(1) + 1e-9).all()


def test_crop_to_fill():
    """Pictures of one size get one scale and crop, so that a mark in them stays aligned."""
    pair = [Image.new("RGB", (300, 200), colour) for colour in ("black", "blue")]
    for image in pair:
        image.paste("red", (150, 100, 180, 110))
    for height, width in ((64, 64), (96, 64), (64, 96), (32, 96), (128, 128)):
        found = [np.asarray(crop_to_fill(p, height, width))[..., 0] > 128 for p in pair]
        scale = max(width / 300, height / 200)
        rows, columns = np.nonzero(found[0])
        assert found[0].shape == (height, width) and (found[0] == found[1]).all()
        assert abs(rows.min() - height / 2) <= 1 and abs(columns.min() - width / 2) <= 1
        assert abs(rows.max() + 1 - height / 2 - 10 * scale) <= 1
        assert abs(columns.max() + 1 - width / 2 - 30 * scale) <= 1


# ------------------------------------------------------------------------------------------------
# Folders, tar shards, filters

def test_layouts(tmp_path):
    """Pairs, metadata.jsonl, a folder and a pattern of tars give the same samples."""
    folder, shards = make_folder(tmp_path / "a", 8), make_shards(tmp_path / "b")
    plain = tmp_path / "c"
    plain.mkdir()
    for i in range(8):
        shutil.copy(folder / f"{i}.png", plain / f"{i}.png")
        (plain / f"{i}.txt").write_text(caption(i) + "\n")
    mixed = make_tar(tmp_path / "d" / "0.tar", {
        name: content for i in range(8) for name, content in (
            (f"deep/{i}.jpg", picture(i, form="JPEG")), (f"deep/{i}.txt", caption(i).encode()),
            (f"deep/{i}.json", b'{"caption": "not this"}'))})
    opened = [read(p) for p in (folder, shards, f"{shards}/00*.tar", plain, mixed)]
    for data in opened:
        assert list(data.captions) == [caption(i) for i in range(8)]
        assert (data.sides == opened[0].sides).all() and not data.broken and data.total == 8
        items = [data.load(i, *data.sides[i]) for i in range(8)]
        assert all(item[0].shape == (3, *side) for item, side in zip(items, data.sides))
    assert opened[1].shard.tolist() == [0] * 4 + [1] * 4 and opened[0].shard is None
    assert [json.loads(f)["score"] for f in opened[1].fields] == list(range(8))
    assert json.loads(opened[1].fields[1]) == {"score": 1, "width": 96, "height": 64}
    for i in range(8):  # pixels of one are those of the other
        a, b, c = (data.load(i, 64, 64)[0].float() for data in (opened[0], opened[1], opened[4]))
        mark = a[:, 2:14, 2:14] - torch.tensor([20. * i % 256, 100, 200]).view(3, 1, 1)
        assert torch.equal(a, b)
        assert i % 5 or mark.abs().max() == 0 and (a - c)[:, 2:14, 2:14].abs().max() < 9  # JPEG
    assert len(np.unique(opened[0].sides, axis=0)) == 4


def test_orientation(tmp_path):
    """The index and the pixels follow a photo's EXIF orientation."""
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    image = Image.new("RGB", (96, 64))
    image.paste("white", (0, 0, 48, 64))
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("half")
    data = read(tmp_path)
    bright = data.load(0, 96, 64)[0].float().mean((0, 2))
    assert data.sides.tolist() == [[96, 64]] and bright[:40].min() > 200 > 50 > bright[56:].max()
    pixels = data.to_pixels(data.load(0, 96, 64)[0][None], "cpu")
    assert pixels.shape == (1, 3, 96, 64) and -1 <= pixels.min() < -0.9 < 0.9 < pixels.max() <= 1


def encoded(image, form, **options):
    """Return a picture's file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(depth, colour_type, row, transparent=b""):
    """Return a PNG of one row, two pixels, in a depth that PIL does not write."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)),
              (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks if body or name == b"IEND")


def filled(kind, *values):
    """Return a picture of one row with these values."""
    return Image.fromarray(np.array([values], kind))


RED_BLUE = Image.new("P", (2, 1))
RED_BLUE.putpalette([255, 0, 0, 0, 0, 255])
RED_BLUE.putpixel((1, 0), 1)
BROWN = Image.new("RGB", (2, 2), (200, 100, 50))
ANIMATED = dict(save_all=True, append_images=[Image.new("RGB", (2, 2), "blue")])
SEEN = {  # a file, and the levels of its first two pixels; a number: red, green and blue
    "16-bit PNG": (encoded(filled(np.uint16, 128 * 257, 65535), "PNG"), 128, 255),
    "16-bit TIFF": (encoded(filled(np.uint16, 128 * 257, 255), "TIFF"), 128, 1),
    "16-bit TIFF, 0 is white": (encoded(filled(np.uint16, 65535, 127 * 257), "TIFF",
                                        tiffinfo={262: 0}), 0, 128),
    "16-bit PGM": (b"P5 2 1 65535 " + struct.pack(">HH", 128 * 257, 65535), 128, 255),
    "32-bit TIFF": (encoded(filled(np.int32, 2 ** 30, 2 ** 31 - 1), "TIFF"), 128, 255),
    "fractions": (encoded(filled(np.float32, 0.5, 1.2), "TIFF"), 128, 255),
    "floats to 255": (encoded(filled(np.float32, 128, 255), "TIFF"), 128, 255),
    "no number": (encoded(filled(np.float32, np.nan, 1), "TIFF"), 0, 255),
    "RGBA": (encoded(Image.new("RGBA", (2, 1), (255, 0, 0, 0)), "PNG"), 255, 255),
    "half transparent": (encoded(Image.new("LA", (2, 1), (0, 51)), "PNG"), 204, 204),
    "WebP": (encoded(Image.new("RGBA", (2, 1), (0, 0, 255, 0)), "WEBP", lossless=True), 255, 255),
    "palette": (encoded(RED_BLUE, "PNG", transparency=0), 255, (0, 0, 255)),
    "palette of alphas": (encoded(RED_BLUE, "PNG", transparency=b"\x33\0"), (255, 204, 204), 255),
    "GIF": (encoded(RED_BLUE, "GIF", transparency=1), (255, 0, 0), 255),
    "16-bit grey with alpha": (png(16, 4, struct.pack(">HHHH", 32896, 65535, 9, 0)), 128, 255),
    "16-bit grey, one transparent": (png(16, 0, struct.pack(">HH", 40000, 40001), b"\x9c\x40"),
                                     255, 156),
    "16-bit RGB, one transparent": (
        png(16, 2, struct.pack(">6H", 40000, 3000, 99, 51400, 25700, 12850),
            struct.pack(">HHH", 40000, 3000, 99)), 255, (200, 100, 50)),
    "RGB, one transparent": (png(8, 2, bytes((5, 6, 7, 5, 6, 8)), b"\0\5\0\6\0\7"), 255,
                             (5, 6, 8)),
    "4-bit grey, one transparent": (png(4, 0, b"\x3a", b"\0\3"), 255, 170),
    "2-bit grey, one transparent": (png(2, 0, b"\x90", b"\0\2"), 255, 85),
    "1 bit, one transparent": (png(1, 0, b"\x40", b"\0\0"), 255, 255),
    "CMYK": (encoded(BROWN.convert("CMYK"), "JPEG", quality=95), (200, 100, 50), (200, 100, 50)),
    "animated PNG": (encoded(BROWN, "PNG", **ANIMATED), (200, 100, 50), (200, 100, 50)),
    "animated WebP": (encoded(BROWN, "WEBP", lossless=True, **ANIMATED), (200, 100, 50),
                      (200, 100, 50))}


@pytest.mark.parametrize("name", SEEN)
def test_pictures_are_as_seen(name, tmp_path, monkeypatch):
    """Deep, transparent, animated and printed pictures look as in a viewer, on white.

    Training and sample.py read them by one function.
    """
    file, *expected = SEEN[name]
    image = pictures.open_as_seen(io.BytesIO(file))
    levels = np.array([np.broadcast_to(level, 3) for level in expected])
    assert image.mode == "RGB" and abs(np.asarray(image, int)[0] - levels).max() <= 1
    (tmp_path / "a").write_bytes(file)
    monkeypatch.setattr(sample, "check_size", lambda size: None)
    assert sample.read_picture(tmp_path / "a") == image
    monkeypatch.setattr(pictures, "LEAST_SIDE", 1)
    monkeypatch.setattr(pictures, "crop_to_fill", lambda image, *_: image)
    own = read(make_tar(tmp_path / "a.tar", {"0.png": file, "0.txt": b"words"}))
    loaded = own.load(0, 32, 32)[0].permute(1, 2, 0)                            # (1, 2, 3)
    assert (loaded.numpy() == np.asarray(image)).all()


@pytest.mark.parametrize("form", ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"))
def test_every_orientation(form):
    """The index has the sides of the turned picture; a value that is not defined turns nothing."""
    corners = {2: "right top", 3: "right bottom", 4: "left bottom", 5: "left top",
               6: "right top", 7: "right bottom", 8: "left bottom"}
    image = Image.new("RGB", (96, 64))
    image.paste("white", (0, 0, 48, 32))
    for value in (None, *range(10), 255, 65535):
        exif = Image.Exif()
        if value is not None:
            exif[pictures.ORIENTATION] = value
        file = io.BytesIO(encoded(image, form, exif=exif))
        seen = pictures.open_as_seen(file)
        x, y = np.argwhere(np.asarray(seen)[..., 0].T > 128).mean(0) > np.array(seen.size) / 2
        corner = f"{'right' if x else 'left'} {'bottom' if y else 'top'}"
        assert seen.size == ((64, 96) if value in (5, 6, 7, 8) else (96, 64)) == \
            pictures.read_size(file)
        assert corner == corners.get(value, "left top")


@pytest.mark.parametrize("options, size", (
    (dict(xmp=b'<rdf:Description tiff:Orientation="6"/>'), (64, 96)),
    (dict(xmp=b'<rdf:Description tiff:Orientation="9"/>'), (96, 64)),
    (dict(exif=b"Exif\0\0junk of a camera"), (96, 64)),
    (dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\2\0\0\0\x026" + bytes(7)), (96, 64))),
    ids=("XMP", "XMP, not defined", "damaged", "text"))
def test_odd_orientations(options, size):
    """XMP is heeded; damaged EXIF, and a text in place of a number, turn nothing."""
    file = io.BytesIO(encoded(Image.new("RGB", (96, 64)), "JPEG", **options))
    assert pictures.open_as_seen(file).size == pictures.read_size(file) == size


def test_what_cannot_be_used_is_counted(tmp_path, monkeypatch, capsys):
    """Each reason is counted and named; past --max-broken a run stops with the list."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    text = b'{"text": "a star"}'
    path = make_tar(tmp_path / "a.tar", {
        "0.png": picture(0), "0.json": text, "1.png": bytes(range(200)), "1.json": text,
        "2.png": picture(0), "2.json": b"{}", "3.png": picture(0), "3.txt": b" \n", "4.txt": b"a",
        "5.png": picture(0), "5.json": b"[", "6.png": picture(0, (31, 90)), "6.txt": b"a",
        "7.png": picture(0, (40, 330)), "7.txt": b"a", "8.png": picture(0, (400, 301)),
        "8.txt": b"a", "9.png": picture(0), "9.txt": b"\xff\xfe\xff", "10.png": picture(0)})
    data = read(path)
    assert (data.total, list(data.captions)) == (11, ["a star"])
    reasons = {name.split("/")[-1]: reason for name, reason in data.broken.items()}
    assert reasons == {"1.png": "cannot be read", "2.png": "no caption", "10.png": "no caption",
                       "3.png": "its caption is empty", "4.txt": "no picture",
                       "5.png": "its JSON is malformed", "6.png": "a side below 32 pixels",
                       "7.png": "an aspect ratio beyond 8", "8.png": "more than 0 M pixels",
                       "9.png": "its caption is not in UTF-8"}
    printed = capsys.readouterr().out
    assert "left out of 11: 2 no caption, 1 cannot be read, 1 its caption is empty" in printed
    with pytest.raises(ValueError, match=r"10 of 11 samples .* --max-broken 0.9 allows: .*a.tar/1."
                                         "png: cannot be read, .*a.tar/2.png: no caption"):
        read(path, broken=0.9)
    assert len(read(path, broken=0.91).captions) == 1
    many = make_tar(tmp_path / "b.tar", {f"{i:02d}.png": b"" for i in range(30)})
    with pytest.raises(ValueError, match=r"19.png: no caption, \.\.\.$"):
        read(many, broken=0.5)
    with pytest.raises(ValueError, match="none of its 30 samples can be used"):
        read(many)


@pytest.mark.parametrize("cut, kept, broken", (
    ("nowhere", 8, 0), ("padding", 8, 0), ("end", 8, 1), ("picture", 5, 1), ("text", 5, 1),
    ("between", 6, 1), ("header", 6, 1), ("first", 0, 1)))
def test_broken_shard(tmp_path, cut, kept, broken):
    """Samples that are complete before a shard breaks off are kept; the break counts as one."""
    path = make_shards(tmp_path, 1, 8) / "000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        text, image, seventh = tar.getmembers()[10:13]
        end = tar.offset
    place = {"nowhere": len(whole), "padding": end + 512, "end": end, "first": 700,
             "picture": image.offset_data + image.size - 9, "text": text.offset_data + 5,
             "between": seventh.offset, "header": seventh.offset}[cut]
    path.write_bytes(whole[:place] + (b"x" * 512 + whole[place + 512:]) * (cut == "header"))
    if kept:
        data = read(path)
        assert list(data.captions) == [caption(i) for i in range(kept)]
        assert len(data.broken) == broken and data.total == kept + broken
    else:
        with pytest.raises(ValueError, match="none of its 1 samples"):
            read(path)


@pytest.mark.parametrize("message, files", (
    ("not a folder", None), ("no pictures", {}),
    ("a.png: no caption .expected a.txt, or a line of metadata.jsonl", {"a.png": ""}),
    ("b/a.png: no caption .expected a.txt", {"b/a.png": "", "a.txt": ""}),
    ("none of its 1 samples", {"a.png": "junk", "a.txt": "words"}),
    ("none of its 1 samples", {"a.tar": "junk"}), ("no pictures", {"metadata.jsonl": "\n"}),
    ("line 3", {"metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n\n{"file_name": \n'}),
    ("b.png: no such file", {"metadata.jsonl": '{"file_name": "b.png"}'}),
    ("a.png: its caption is empty", {"a.png": "", "metadata.jsonl": '{"file_name": "a.png"}'}),
    ("b.png: no such file", {"metadata.jsonl": '{"file_name": "b.png", "text": "a"}'}),
    ("line 1", {"metadata.jsonl": "[1]"}), ("line 1", {"metadata.jsonl": '{"text": "a"}'}),
    ("line 1", {"metadata.jsonl": '{"file_name": "a.png", "text": 5}'})))
def test_folder_says_what_is_wrong(tmp_path, message, files):
    """A folder that cannot be used is a ValueError that names the folder, and the line."""
    for name, text in (files or {}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    broken = 0.0 if ":" in message else 1.0
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read(tmp_path / "none" if files is None else tmp_path, broken=broken)


def test_files_in_folders(tmp_path, capsys):
    """All formats of PIL, in any case and in subfolders, are found; hidden names are skipped.

    A folder with a picture's name is none, a link to a folder is followed once, a name need not be
    UTF-8, and what is not used is named.
    """
    one = b"\xff\x89" + b".png"  # no UTF-8
    names = [b"a.PNG", b"b.gif", b"c.tiff", b"d.avif", b"e.jfif", b"sub/f.webp", b"sub/.hidden.png",
             b"sub/.more/g.png", b"._a.png", b".DS_Store", one, b"x.png/h.bmp"]
    forms = dict(gif="GIF", tiff="TIFF", avif="AVIF", jfif="JPEG", webp="WEBP", bmp="BMP")
    folder = os.fsencode(tmp_path / "a")
    for i, name in enumerate(names):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        form = forms.get(name.decode("latin-1")[-4:].strip("."), "PNG")
        with open(path, "wb") as file:
            file.write(picture(i, (64, 64), form))
        with open(os.path.splitext(path)[0] + (b".TXT" if i else b".txt"), "w") as file:
            file.write(f"\ufeffpicture {i}\r\n")
    for stray in ("notes.md", "clip.mp4", "paper.eps", "lonely.txt"):
        (tmp_path / "a" / stray).write_text("")
    (tmp_path / "a" / "sub" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a" / "b.gif", tmp_path / "elsewhere" / "i.gif")
    (tmp_path / "elsewhere" / "i.txt").write_text("picture 9")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    data = read(tmp_path / "a")
    found = sorted(int(text.split()[1]) for text in data.captions)
    assert found == [0, 1, 2, 3, 4, 5, 9, 10, 11] and not data.broken and data.total == 9
    assert "not used: 4 (clip.mp4, lonely.txt, notes.md, paper.eps)" in capsys.readouterr().out
    for i in range(9):
        assert data.load(i, 64, 64)[0].shape == (3, 64, 64)
    assert len(set(data.draws)) == 9 and (data.draws == read(f"{tmp_path}/a/").draws).all()
    (tmp_path / "a" / "a.txt").unlink()
    os.remove(os.path.splitext(os.path.join(folder, one))[0] + b".TXT")
    with pytest.raises(ValueError, match=r"2 of 9 samples .*/\?\?.png: no caption .expected"):
        read(tmp_path / "a", broken=0.1)


def test_brackets_in_a_name(tmp_path):
    """A tar that exists is read, whatever its name would mean as a pattern."""
    for name in ("t[1].tar", "t1.tar"):
        make_tar(tmp_path / name, {"0.png": picture(0), "0.txt": name.encode()})
    assert list(read(tmp_path / "t[1].tar").captions) == ["t[1].tar"]
    assert list(read(tmp_path / "t[0-9].tar").captions) == ["t1.tar"]


def test_one_layout_of_a_folder(tmp_path, monkeypatch, capsys):
    """metadata.jsonl comes before tars, tars before pairs; the rest is named."""
    folder = make_folder(tmp_path / "a", 2)
    make_tar(folder / "backup.tar", {"0.png": picture(0), "0.txt": b"of the tar"})
    (folder / "8.png").write_bytes(picture(8))
    (folder / "8.txt").write_text("a pair")
    assert list(read(folder).captions) == [caption(0), caption(1)]
    assert "files that are not used: 3 (8.png, 8.txt, backup.tar)" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    assert read("./../a/.").paths[0].endswith("0.png")
    assert "files that are not used: 3 (8.png, 8.txt, backup.tar)" in capsys.readouterr().out
    (folder / "metadata.jsonl").unlink()
    assert list(read(folder).captions) == ["of the tar"]
    assert "not used: 4 (0.png, 1.png, 8.png, 8.txt)" in capsys.readouterr().out
    (folder / "backup.tar").unlink()
    with pytest.raises(ValueError, match="2 of 3 samples .*/0.png: no caption .expected 0.txt"):
        read("./", broken=0.5)
    assert list(read("./").captions) == ["a pair"]
    assert "not used" not in capsys.readouterr().out


def test_hidden_members_of_a_tar(tmp_path):
    """What macOS adds to a tar is no sample; a leading ./ hides nothing."""
    path = make_tar(tmp_path / "a.tar", {"./._0.png": b"", "./0.png": picture(0), "./0.txt": b"a",
                                         ".git/1.png": picture(1), ".git/1.txt": b"b"})
    data = read(path)
    assert list(data.captions) == ["a"] and data.total == 1


@pytest.mark.parametrize("content, reason", (
    ("it\u2019s red".encode("cp1252"), "its caption is not in UTF-8"),
    ("a red circle".encode("utf-16"), "its caption is not in UTF-8"),
    ("a red circle".encode("utf-16-le"), "its caption is not in UTF-8"),
    (b"\xef\xbb\xbf \r\n", "its caption is empty"), (None, "no caption"),
    (b"a red circle " * 20, "its caption is too long"),
    (b"a red zinnober", "its caption has words that the tower does not know")))
def test_one_bad_caption(content, reason, world, tmp_path, capsys):
    """It is left out and counted by reason; where it is one too many its file is named."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n")
    (folder / "1.txt").write_bytes(content) if content else (folder / "1.txt").unlink()
    tokenizer = read_vocabulary(world / "init")
    config = make_config(max_tokens=16)
    c = settings("image", data=str(folder), max_broken=0.4)
    dataset = sources.open_sources(c, config, alone(), tokenizer)
    assert list(dataset.sources[0].captions) == ["a red circle"] * 2
    assert f"left out of 3: 1 {reason}\n" in capsys.readouterr().out
    c = settings("image", data=str(folder), max_broken=0.3)
    with pytest.raises(ValueError, match=rf"1 of 3 .*--max-broken 0.3 allows: .*1.png: {reason}"):
        sources.open_sources(c, config, alone(), tokenizer)


def test_what_a_stage_needs_of_captions():
    """The longest that fits; the VAE reads none, the tower's own stage knows every word."""
    tokenizer = make_model().tokenizer
    for stage, words in (("image", 15), ("understand", 14)):
        fault = partial(sources.caption_fault, stage, tokenizer if stage == "image" else None, 16)
        assert fault("red " * words) == ""
        assert fault("red " * (words + 1)) == \
            "its caption is too long (17 tokens; --max-tokens is 16)"
        assert fault(" . . ") == "its caption has no words"
        assert fault("zinnober").endswith("(unknown word 'zinnober')" * (stage == "image"))
    assert sources.caption_fault("vae", None, 16, "zinnober " * 99) == ""
    tokenizer.encode = lambda text, image_tokens: [1] * (image_tokens + 2 + len(text.split()))
    fault = partial(sources.caption_fault, "edit", tokenizer, 16, placeholders=1)
    assert fault("red " * 14) == "" and "(17 tokens" in fault("red " * 15)  # 2 mark the picture


@pytest.mark.parametrize("name", ("metadata.jsonl", "prompts.jsonl"))
def test_lines_of_json(name, tmp_path):
    """A mark in front, Windows' ends of lines and empty lines are read; other encodings are named.
    """
    def read_lines():
        if name == "prompts.jsonl":
            return [entry["prompt"] for entry in evaluate.read_prompts(tmp_path / name)]
        return [entry.text for entry in pictures.read_metadata(str(tmp_path), str(tmp_path / name))]
    row = {"file_name": "0.png", "text": "caf\u00e9\u2028", "prompt": "caf\u00e9\u2028", "tag": "x",
           "include": []}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n\r\n".encode())
    assert read_lines() == ["caf\u00e9\u2028"] * 2
    for encoding, byte in (("utf-16", "0 is 0xff"), ("cp1252", "35 is 0xe9")):
        content = line.replace("\u2028", "").encode(encoding)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not in UTF-8 .byte {byte}.; save it in"):
            read_lines()
    (tmp_path / name).write_bytes(line.encode() + b"\n{\n")
    with pytest.raises(ValueError, match=f"{name}, line 2: expected .*, got '{{'"):
        read_lines()


# ------------------------------------------------------------------------------------------------
# Validation

def test_which_pictures_are_held_back(tmp_path):
    """A share by the hash of the name in the data set: a longer list, another place change nothing.
    """
    draws = [pictures.draw(f"{i}.png", {}) for i in range(4000)]
    assert all(0 <= number < 1 for number in draws) and abs(np.mean(draws) - 0.5) < 0.02
    held = pictures.choose_validation("", draws, 0.05)
    assert abs(held.mean() - 0.05) < 0.011 and (held == (np.array(draws) < 0.05)).all()
    assert (pictures.choose_validation("", draws[:1000], 0.05) == held[:1000]).all()
    assert pictures.draw("0.png", {}) == draws[0] == 0.059170504566282034
    assert not pictures.choose_validation("", draws, 0.0).any()
    folder, shards = make_folder(tmp_path / "a", 3), make_shards(tmp_path / "b", 2, 2)
    assert list(read(folder).draws) == draws[:3]
    shutil.move(folder, tmp_path / "moved")
    assert list(read(tmp_path / "moved").draws) == draws[:3]
    assert list(read(shards).draws) == list(read(f"{shards}/*.tar").draws) == [
        pictures.draw(f"{i // 2:03d}.tar/{i:04d}.png", {}) for i in range(4)]


def test_few_pictures_train():
    """Where the share is less than one picture, or all of them, none is held back."""
    for draws, held in (([0.01], 0), ([0.01] * 19, 0), ([0.01] * 20, 0), ([0.01, *[0.9] * 18], 0),
                        ([0.01, *[0.9] * 19], 1)):
        assert pictures.choose_validation("", draws, 0.05).sum() == held


def test_split_decides(tmp_path):
    """A field "split" other than train holds a sample back, even with --holdout 0."""
    folder = make_folder(tmp_path / "a", 4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")]
    for row, split in zip(rows, ("train", "test", None, "validation")):
        row["split"] = split
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for holdout in (0.0, 0.5):
        validation = read(folder, holdout=holdout).validation.tolist()
        assert validation[:2] + validation[3:] == [False, True, True]
    (folder / "metadata.jsonl").write_text(json.dumps({**rows[0], "split": "test"}))
    with pytest.raises(ValueError, match='split of all 1 samples .*some with "split": "train"'):
        read(folder)


def test_plan_without_what_is_held_back(monkeypatch):
    """No held-back sample is drawn, all others are once an epoch; shards and lengths are theirs."""
    rng = np.random.default_rng(0)
    validation = rng.random(60) < 0.3
    one = SimpleNamespace(sides=np.full((60, 2), 64), kind=1, shard=np.arange(60) // 6,
                          validation=validation)
    lengths = np.where(validation, 99, np.arange(60) % 20)
    plan = Plan([one], lengths=[lengths], weights=[1], batch=1, seed=0)
    training = np.flatnonzero(~validation)
    drawn = np.concatenate([b.index for b in plan.batches(0, 2 * len(training))])
    assert (np.sort(drawn.reshape(2, -1), 1) == training).all()
    assert plan.buckets == [Bucket(1, 64, 64, lengths[training].max())]
    monkeypatch.setattr(buckets, "WINDOW", 1)
    shards = one.shard[np.concatenate([b.index for b in plan.batches(0, len(training))])]
    assert (shards[1:] != shards[:-1]).sum() == len(set(shards)) - 1  # one after the other


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A folder in which the even pictures train and are dark, and the odd ones are bright."""
    folder = make_folder(tmp_path_factory.mktemp("halves") / "a", 8)
    rows = []
    for i in range(8):
        Image.new("RGB", (64, 64), (200 * (i % 2),) * 3).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption(i),
                     "split": "val" if i % 2 else "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize("where", ("memory", "step", "disk"))
def test_latents_that_are_held_back(where, halves, world, light, tmp_path, monkeypatch, capsys):
    """Training never sees them, and validation sees them only, from wherever latents come."""
    seen, compared = [], []
    monkeypatch.setattr(stages.ImageStage, "compare_with_vae",
                        lambda self: compared.append(self))
    monkeypatch.setattr(stages.ImageStage, "forward", lambda self, z0, *rest: seen.append(z0) or (
        self.model.loss(z0, *rest[:4]).mean(), {"bins": torch.ones(10), "counts": torch.ones(10)}))
    where = str(tmp_path / "latents") if where == "disk" else where
    for again in range(1 + (where not in ("memory", "step"))):
        trainer = prepare("image", tmp_path / f"out{again}", init=str(world / "init"), data=halves,
                          latents=where, steps=2)
        train.run_stage(trainer)
        vae = trainer.model.vae
        dark, bright = (vae.encode(torch.full((1, 3, 64, 64), level / 127.5 - 1)) for level in
                        (0, 200))
        z0, tokens = trainer.stage.val
        torch.testing.assert_close(z0, bright.expand_as(z0), rtol=0.02, atol=0.02)
        assert len(z0) == 4 and {text for text, _ in trainer.stage.val_texts} == {caption(1)}
        for batch in seen:
            torch.testing.assert_close(batch, dark.expand_as(batch), rtol=0.02, atol=0.02)
    assert len(seen) == 2 * (again + 1) and len(compared) == again + 1
    printed = capsys.readouterr().out
    assert "a: 4 of 8 pictures are held back for validation\n" in printed
    assert ("encoded 4 samples" in printed) == (where == "memory")


def test_first_stages_hold_back_too(halves, tmp_path, monkeypatch):
    """The VAE and the tower train on the even pictures and validate on the odd ones.

    The statistics of latents are those of training pictures, the vocabulary that of all captions.
    """
    monkeypatch.setattr(train, "product_rate", lambda _: 1e12)
    trainer = prepare("vae", tmp_path, data=halves, steps=1, max_tokens=16)
    trainer.begin()
    stage, vae = trainer.stage, trainer.model.vae
    assert (stage.inputs(0)[0] == -1).all()
    stage.complete()
    assert stage.val.shape == (4, 3, 64, 64) and (stage.val > 0.5).all()
    dark = vae.posterior(torch.full((4, 3, 64, 64), -1.0))[0]
    torch.testing.assert_close(vae.latents_mean.flatten(), dark.mean((0, 2, 3)))
    stage = prepare("understand", tmp_path, data=halves, steps=1, max_tokens=16).stage
    assert "blue" in stage.model.tokenizer.words  # of held-back captions alone
    stage.begin(0)
    assert (stage.inputs(0)[0] == -1).all() and (stage.validation_batch(3)[0] > 0.5).all()
    assert len(stage.validation_batch(3)[0]) == 3
    _, index = stage.dataset.samples(9, validation=False)
    assert sorted(index) == [0, 2, 4, 6] and list(index) != sorted(index)


def test_validation_on_training_pictures(world, light, tmp_path, capsys):
    """With --holdout 0 a line says so, and --holdout cannot change when a run goes on."""
    go(world, tmp_path / "out", data=f"{world}/a", holdout=0.0, steps=1)
    text = capsys.readouterr().out
    assert "0 of 9 pictures are held back" in text
    assert "no picture is held back: validation is on training pictures\n" in text
    with pytest.raises(ValueError, match="holdout is 0.0 in .* and cannot become 0.1"):
        go(world, tmp_path / "out", data=f"{world}/a", holdout=0.1, steps=2, resume=True)


def test_shorter_captions_than_those_of_stored_latents(world, light, tmp_path, capsys):
    """Captions in a folder of latents are left out like others; beside pictures it is refused."""
    own = tmp_path / "a"
    shutil.copytree(world / "a", own)
    changes = dict(data=str(own), latents=str(tmp_path / "latents"), steps=1)
    go(world, tmp_path / "one", **changes)
    changes |= dict(max_tokens=6, max_broken=0.5)
    with pytest.raises(ValueError, match="made with another set of pictures and captions"):
        go(world, tmp_path / "two", **changes)
    shutil.rmtree(own)
    with pytest.raises(ValueError, match="4 of 9 samples .*: sample 1: its caption is too long"):
        go(world, tmp_path / "two", **{**changes, "max_broken": 0.4})
    capsys.readouterr()
    go(world, tmp_path / "two", **changes)
    assert "left out of 9: 4 its caption is too long\n" in capsys.readouterr().out


def test_pictures_far_from_the_vae(tmp_path, capsys):
    """The VAE in weights warns of noise, but not of the small world's own pictures."""
    rng = np.random.default_rng(0)
    fine = shapes.pack([shapes.draw_scene(random.Random(i), "dense") for i in range(4)])
    fine = shapes.render(fine, 64, 64)
    noise = rng.normal(size=(4, 64, 64, 3)).cumsum(1).cumsum(2)  # as smooth as photographs
    noise = torch.from_numpy(noise / abs(noise).max()).permute(0, 3, 1, 2)
    model = MoS.from_pretrained(ROOT / "weights", parts=("vae",))
    for name, images in (("fine", fine), ("noise", noise)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            to_image(image).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text("a star")
        c = settings("image", data=str(tmp_path / name), sizes=("64",))
        dataset = sources.open_sources(c, model.config, alone(), model.tokenizer)
        stages.ImageStage(model, dataset, c, alone()).compare_with_vae()
        printed = capsys.readouterr().out
        assert ("warning: the VAE was not trained on pictures like these" in printed) == (
            name == "noise")
        assert ("train it on them first (--stage vae)" in printed) == (name == "noise")


def test_processes_share_the_index(tmp_path):
    """Each process reads only its part of the tars; all get the same index in the same order."""
    path, parts, seen = make_shards(tmp_path / "a", 5, 2), [], []

    class Some(train.World):
        def gather(self, own):
            parts.append(own)
            return {key: value for part in parts for key, value in part.items()}
    for rank in range(3):
        try:
            seen.append(read(path, world=Some(rank, 3, torch.device("cpu"))))
        except KeyError:
            pass
    assert [sorted(part) for part in parts] == [[0, 3], [1, 4], [2]]
    assert list(seen[-1].captions) == [caption(i) for i in range(10)] == list(read(path).captions)
    assert (seen[-1].byte_ranges == read(path).byte_ranges).all()


FIELDS = {"score": 6, "width": 1024, "tag": "cat", "tags": ["a", "b"], "none": None, "ok": True}


@pytest.mark.parametrize("text, reason", (
    ("score >= 6 and width >= 1024", ""), ("score > 6", "fail"), ("5 < score <= 6 < width", ""),
    ("5 < score < 6 < width", "fail"), ("not score < 6", ""), ("tag == 'cat'", ""),
    ("tag in ('dog', 'cat')", ""), ("'a' in tags and 'c' not in tags", ""), ("score != -6", ""),
    ("score > 9 or tag == 'cat'", ""), ("zebra > 1 or score == 6", "lack zebra"),
    ("score == 6 or zebra > 1", "lack zebra"), ("none > 1", "lack none"),
    ("tag > 5", "hold what cannot be compared"), ("ok", ""),
    ("score == 6.0 and (score < 3 or width == 1024)", ""), ("tag.startswith('c')", ""),
    ("tags[0] == 'a' and width / 2 > 500", ""), ("len(tags) > 1", "lack len")))
def test_where(text, reason):
    """A condition is a Python expression over the fields; a sample is dropped for a reason."""
    assert Where(text).reason_to_drop(FIELDS) == reason


@pytest.mark.parametrize("text", ("score >", "", "score = 6", "x\0", "(" * 300, "score > 6) or ("))
def test_where_refuses(text):
    """A text that is no expression is refused in one line, with an example of a condition."""
    with pytest.raises(ValueError, match="^where: .* is not a condition such as ") as error:
        Where(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", (
    ("score / 0 > 1", "ZeroDivisionError: division by zero"),
    ("tags[5] == 'a'", "IndexError: "), ("score.real.no", "AttributeError: ")))
def test_where_cannot_be_evaluated(text, message):
    """Whatever else goes wrong in a condition is an error in one line."""
    with pytest.raises(ValueError, match="^where: .* cannot be evaluated: " + message) as error:
        Where(text).reason_to_drop(FIELDS)
    assert "\n" not in str(error.value)


def test_where_drops_and_says_so(tmp_path, capsys):
    """Fields come from metadata.jsonl, width and height from the picture; nothing left: error."""
    path = make_folder(tmp_path / "a", 10)
    rows = (path / "metadata.jsonl").read_text().replace('"score": 9', '"other": 1')
    (path / "metadata.jsonl").write_text(rows)
    data = read(path, "score >= 2 and width == 64")
    assert [json.loads(f)["score"] for f in data.fields] == [2, 5, 7]
    assert "keeps 3 of 10; of the others 6 fail, 1 lack score" in capsys.readouterr().out
    assert data.captions[0] == caption(2) and len(data.sides) == len(data.byte_ranges) == 3
    with pytest.raises(ValueError, match="none of its 10 samples fulfils --where 'score > 99'"):
        read(path, "score > 99")
    with pytest.raises(ValueError, match="no sample of .* has the field 'scor' of 'scor > 2'; the "
                                         "fields are: height, other, score, width"):
        read(path, "scor > 2")


def test_parse_mixture(tmp_path):
    """Paths by weight, a path alone; anything else is one line."""
    assert parse_mixture("shapes") == {"shapes": 1} and parse_mixture("a,b") == {"a,b": 1}
    assert parse_mixture("x/a=3,shapes=0.5") == {"x/a": 3, "shapes": 0.5}
    (tmp_path / "a=1").mkdir()
    assert list(parse_mixture(str(tmp_path / "a=1"))) == [str(tmp_path / "a=1")]
    for text in ("", "  "):
        with pytest.raises(ValueError, match="^data is empty; expected shapes, a folder of"):
            parse_mixture(text)
    for text in ("a=0", "a=-1", "a=x", "a=1,b", "a=1,a=2", "=1", "a=nan", "a=inf"):
        with pytest.raises(ValueError, match="data: expected path=weight"):
            parse_mixture(text)


def test_broken_body_is_replaced(tmp_path):
    """A good header over a broken body: the next good sample of the global batch stands in."""
    path = make_folder(tmp_path / "a", 6)
    for i in (2, 3):
        whole = (path / f"{i}.png").read_bytes()
        (path / f"{i}.png").write_bytes(whole[:len(whole) // 2])
    own = read(path)
    assert own.total == 6 and not own.broken
    collate = partial(sources.collate, "image", make_model().tokenizer)
    batch = Batch(np.zeros(6, int), np.array([5, 2, 3, 0, 4, 1]), Bucket(1, 64, 64, 16))
    whole = Reader([own], collate)[batch]
    order = [5, 0, 0, 0, 4, 1]
    assert whole[1] == [(caption(i), None) for i in order] and set(whole[2]) == {(0, 2), (0, 3)}
    assert all(torch.equal(p, own.load(i, 64, 64)[0]) for p, i in zip(whole[0][0], order))
    for size in (2, 3):
        parts = [Reader([own], collate, alone(rank, size).share(6))[batch]
                 for rank in range(size)]
        for a, *others in zip(whole[0], *(part[0] for part in parts)):
            assert torch.equal(a, torch.cat(others))
    bad = Batch(np.zeros(2, int), np.array([2, 3]), Bucket(1, 64, 64, 16))
    assert Reader([own], collate)[bad][0] is None
    mixture = Mixture([own])
    mixture.check(whole[2], 0.4)
    with pytest.raises(ValueError, match="2 of 6 .*2.png: .*truncated.*, .*3.png"):
        mixture.check(whole[2], 0.3)


# ------------------------------------------------------------------------------------------------
# Stages

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small model (init), a folder of pictures (a) and tar shards (b)."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    MoS(make_config(**MODEL), read_vocabulary(ROOT / "weights")).save_pretrained(root / "init")
    make_folder(root / "a", 9)
    make_shards(root / "b", 2, 5)
    return root


def go(world, out, stage="image", **changes):
    """Train a stage of the small model in this process; gives its losses and the CSV's rows."""
    trainer = prepare(stage, out, **{"init": str(world / "init"),
                                     "data": f"{world}/a=2,{world}/b=1", **changes})
    assert train.run_stage(trainer)
    with open(out / f"{stage}.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return [float(row["loss"]) for row in rows], rows


@pytest.mark.slow
def test_columns(world, light, tmp_path, capsys):
    """A run on a mixture of tars and a folder, filtered, logs shares, padding and who waits."""
    _, rows = go(world, tmp_path / "out", where="score >= 1", length_step=4, latents="step",
                 workers=1, steps=8)
    a, b = ([float(row[f"share_{world}/{name}"]) for row in rows] for name in "ab")
    assert all(x + y == pytest.approx(1) for x, y in zip(a, b)) and sum(a) > sum(b) > 0
    assert {row["broken"] for row in rows} == {"0"} and any(int(row["waiting"]) for row in rows)
    padding = {float(row["padding"]) for row in rows}
    assert padding <= {0, 0.0} and float(rows[0]["data_wait"]) >= 0  # 4 and 8 tokens: no padding
    text = capsys.readouterr().out
    assert "keeps 8 of 9; of the others 1 fail" in text and "keeps 9 of 10" in text
    assert "buckets (8): 32x96 with 4 tokens, 32x96 with 8 tokens, 64x64 with 4" in text
    _, rows = go(world, tmp_path / "all", steps=8)
    assert sum(float(row["padding"]) for row in rows) / 8 == pytest.approx(2 / 8, abs=0.1)


def test_latents_three_ways(world, light, tmp_path, monkeypatch, capsys):
    """Latents in memory, of each step and from disk give the same losses; disk needs no picture."""
    changes = dict(length_step=4, steps=4)
    memory, _ = go(world, tmp_path / "memory", **changes)
    step, _ = go(world, tmp_path / "step", latents="step", **changes)
    folder = tmp_path / "latents"
    disk, _ = go(world, tmp_path / "disk", latents=str(folder), **changes)
    assert len(memory) == 4 and step == pytest.approx(memory, rel=1e-4)
    assert disk == pytest.approx(memory, rel=1e-2) and disk != memory  # bf16
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert len(rows) == 19 and rows[0]["fields"].keys() == {"score", "width", "height"}
    assert {row["text"] for row in rows} == {caption(0), caption(1)}
    monkeypatch.setattr(type(make_model().vae), "encode", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(pictures.Pictures, "load", lambda *_: pytest.fail("opened a picture"))
    again, _ = go(world, tmp_path / "again", latents=str(folder), **{**changes, "workers": 1})
    assert again == disk
    monkeypatch.setattr(pictures, "list_entries", lambda *_: pytest.fail("looked at the sources"))
    for name in "ab":
        (world / name).rename(world / f"away_{name}")
    try:
        alone, _ = go(world, tmp_path / "alone", latents=str(folder), **changes)
    finally:
        for name in "ab":
            (world / f"away_{name}").rename(world / name)
    assert alone == disk and "is used alone" in capsys.readouterr().out


def test_stored_latents_notice_other_pictures(world, light, tmp_path):
    """Another caption, a replaced or an added picture: stored latents are refused."""
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    options = dict(latents=str(tmp_path / "latents"), steps=1)
    go(root, tmp_path / "first", **options)
    for name in ("0.png", "metadata.jsonl"):
        path = root / "a" / name
        kept = path.read_bytes()
        if name == "0.png":
            with Image.open(path) as image:
                Image.new("RGB", image.size, "navy").save(path)
        else:
            path.write_bytes(kept.replace(b"red", b"blue", 1))
        assert path.read_bytes() != kept
        with pytest.raises(ValueError, match="latents: .* another set of pictures and captions"):
            go(root, tmp_path / name, **options)
        path.write_bytes(kept)
    go(root, tmp_path / "last", **options)


@pytest.mark.slow
def test_states_three_ways(world, light, tmp_path, monkeypatch):
    """Prompts' states of each step, of a producer and from disk give the same losses."""
    step, _ = go(world, tmp_path / "step", steps=4)
    produced, _ = go(world, tmp_path / "produced", steps=4, states="producer")
    assert produced == step
    folder = tmp_path / "states"
    disk, _ = go(world, tmp_path / "disk", steps=4, states=str(folder))
    assert disk == pytest.approx(step, rel=1e-4)
    monkeypatch.setattr(MoS, "understand", lambda *_: pytest.fail("ran the tower"))
    again, _ = go(world, tmp_path / "again", steps=4, states=str(folder))
    assert again == disk
    shutil.copytree(world / "init", tmp_path / "init")
    path = tmp_path / "init" / "understanding.safetensors"
    save_file({name: p + 1 for name, p in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="made with another tower .*choose another folder"):
        go(world, tmp_path / "other", states=str(folder), init=str(tmp_path / "init"))
    with pytest.raises(ValueError, match="holds something else; choose a new folder"):
        go(world, tmp_path / "other", states=str(world / "init"))
    (folder / "made.json").write_text("{")
    with pytest.raises(ValueError, match="made.json is damaged .*delete its folder"):
        go(world, tmp_path / "other", states=str(folder))


def test_dead_producer(world, light, tmp_path, monkeypatch):
    """A producer that has died is an error of one line, not a hang; it ends with the training."""
    monkeypatch.setattr(states, "WAIT", 0.1)
    at_exit = []
    monkeypatch.setattr(states.atexit, "register", at_exit.append)
    own = states.Producer.ask

    def ask(self, tokens):
        own(self, tokens)
        assert self.process.kill in at_exit
        self.process.kill()
        self.process.join()
    monkeypatch.setattr(states.Producer, "ask", ask)
    with pytest.raises(OSError, match="has ended with code -9; start again with --resume"):
        go(world, tmp_path / "out", steps=2, states="producer")


@pytest.mark.slow
@pytest.mark.parametrize("beside", ("", "=1,{}/a=1"))
def test_latents_of_the_small_world(beside, world, light, tmp_path):
    """The small world can be stored, too, alone or beside pictures."""
    changes, losses = dict(data="shapes" + beside.format(world), scenes=10, steps=3), []
    for out, where in (("a", "memory"), ("b", "step"), ("c", "stored"), ("d", "stored")):
        where = str(tmp_path / where) if where == "stored" else where
        losses += [go(world, tmp_path / out, latents=where, **changes)[0]]
    assert all(one == pytest.approx(losses[0], rel=1e-2) for one in losses[1:])
    assert losses[2] == losses[3]


@pytest.mark.slow
def test_latents_of_another_kind(world, light, tmp_path):
    """A folder that another VAE, other sizes or other samples made is refused in one line."""
    folder, out = tmp_path / "latents", tmp_path / "out"
    go(world, tmp_path / "first", latents=str(folder), steps=1)
    shutil.copytree(world / "init", tmp_path / "init")
    model = MoS.from_pretrained(tmp_path / "init")
    model.vae.quant_conv.weight.data += 1
    save_model(model, tmp_path / "init", ("vae",))
    for name, changes in (("vae", {"init": str(tmp_path / "init")}), ("sizes", {"sizes": ("96",)}),
                          ("data", {"data": str(world / "a")}), ("where", {"where": "score > 1"})):
        with pytest.raises(ValueError, match=f"{folder} was made with another {name} .*another fo"):
            go(world, out, latents=str(folder), **changes)
    with open(folder / "index.jsonl", "a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="index.jsonl is damaged"):
        go(world, out, latents=str(folder))
    (folder / "index.jsonl").unlink()  # now the samples matter, too
    shutil.copytree(world / "a", tmp_path / "a")
    made = json.loads((folder / "made.json").read_text())
    (folder / "made.json").write_text(json.dumps({**made, "set of pictures and captions": []}))
    with pytest.raises(ValueError, match="another set of pictures and captions"):
        go(world, tmp_path / "more", latents=str(folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="full holds something else"):
        go(world, out, latents=str(tmp_path / "full"))
    assert not out.exists()


def test_interrupted_latents(world, light, tmp_path, monkeypatch):
    """Broken off while it is made, a folder is completed: whole shards stay, nothing differs."""
    monkeypatch.setattr(Mixture.pieces, "__defaults__", (3 * 64 * 64,))
    whole, folder, written, own = tmp_path / "whole", tmp_path / "part", [], latents.write_shard
    expected, _ = go(world, tmp_path / "one", latents=str(whole), steps=3)
    shards = len(list(whole.glob("*.safetensors")))

    def write(path, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        own(path, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            go(world, tmp_path / "two", latents=str(folder), steps=3)
    assert {p.name for p in folder.iterdir()} == {"made.json", *written} and shards > 6
    monkeypatch.setattr(latents, "write_shard",
                        lambda path, *rest: written.append(path.name) or own(path, *rest))
    again, _ = go(world, tmp_path / "two", latents=str(folder), steps=3, resume=True)
    assert again == expected and len(written) == shards == len(set(written))
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())


def test_processes_share_the_encoding(world, light, tmp_path):
    """Of two processes the second writes every other shard."""
    class Second(World):
        def wait(self):
            pass

        def gather(self, values):
            return values
    c = settings("image", tmp_path, init=str(world / "init"), data="shapes", scenes=9,
                 latents=str(tmp_path / "z"))
    (tmp_path / "z").mkdir()
    dataset = sources.open_sources(c, make_config(size=32), alone())
    dataset.pieces = lambda length: Mixture.pieces(dataset, length, 2 * 32 * 32)
    stage = stages.ImageStage(MoS.from_pretrained(world / "init"), dataset, c, Second(1, 2, "cpu"))
    with pytest.raises(OSError):  # the others' are missing
        stage.prepare()
    assert {p.name[:6] for p in (tmp_path / "z").iterdir()} == {"000001", "000003"}


def spoil(world, folder, number):
    """A copy of folder a in which the body of one picture is broken."""
    shutil.copytree(world / "a", folder)
    content = (folder / f"{number}.png").read_bytes()
    (folder / f"{number}.png").write_bytes(content[:len(content) // 2])
    return str(folder)


@pytest.mark.parametrize("where", (
    "step", *(pytest.param(where, marks=pytest.mark.slow) for where in ("disk", "memory"))))
def test_broken_body_in_training(where, world, light, tmp_path):
    """It is counted and replaced, on disk left out; past --max-broken the run stops with the list.
    """
    own = spoil(world, tmp_path / "a", 8)
    changes = dict(data=own, steps=12, latents=str(tmp_path / where) if where == "disk" else where)
    with pytest.raises(ValueError, match="1 of 9 samples .*0.1 allows: .*8.png: .*truncated"):
        go(world, tmp_path / "out", max_broken=0.1, **changes)
    _, rows = go(world, tmp_path / "more", max_broken=0.2, **changes)
    assert rows[-1]["broken"] == ("0" if where == "disk" else "1")
    if where == "disk":
        assert len((tmp_path / "disk/index.jsonl").read_text().splitlines()) == 8
        go(world, tmp_path / "again", max_broken=0, **changes)


@pytest.mark.parametrize("where", ("step", "memory"))
def test_bucket_without_a_good_sample(where, world, light, tmp_path):
    """Where nothing can stand in for a broken picture the run ends with its name."""
    own = spoil(world, tmp_path / "a", 4)  # the only one of its ratio
    with pytest.raises(ValueError, match="no sample of a batch.*remove .*4.png .*truncated"):
        go(world, tmp_path / "out", data=own, latents=where, steps=50, max_broken=1)


@pytest.mark.parametrize("stage", (pytest.param("vae", marks=pytest.mark.slow), "understand"))
def test_first_stages_follow_the_plan(stage, world, light, tmp_path):
    """VAE and tower train on buckets of a mixture with the small world, and resume exactly."""
    changes = dict(data=f"{world}/a=1,shapes=1", steps=6, length_step=8)
    losses, rows = go(world, tmp_path / "whole", stage, **changes)
    assert 0 < sum(float(row["share_shapes"]) for row in rows) < 6
    assert all(("padding" in row) == (stage == "understand") for row in rows)
    kind = train.KINDS[stage]
    c = settings(stage, tmp_path, batch=4, data=changes["data"], steps=6)
    dataset = sources.open_sources(c, make_config(size=64), alone())
    model = MoS(make_config(**MODEL), sources.build_tokenizer(dataset, 300))
    inputs = [kind(model, dataset, c, alone(r, n)) for n in (1, 2, 4) for r in range(n)]
    for one in inputs:
        one.begin(3)
    batches = [[one.inputs(3), one.inputs(4)] for one in inputs]
    for i in range(2):
        whole, *parts = (b[i] for b in batches)
        for ranks in (parts[:2], parts[2:]):
            assert all(torch.equal(a, torch.cat(cut)) for a, *cut in zip(whole, *ranks))


@pytest.mark.slow
def test_two_processes(world, light, tmp_path, monkeypatch):
    """Two processes index, encode and train like one, in float64, on buckets of a mixture.

    They have the prompts' states from disk, although their own tower is cut into shards.
    """
    one, two, changes = tmp_path / "one", tmp_path / "two", dict(steps=6, length_step=4)
    two.mkdir()
    monkeypatch.setenv("SHARED", "1")
    torch.set_default_dtype(torch.float64)
    try:
        go(world, one, latents=str(tmp_path / "a"), **changes)
    finally:
        torch.set_default_dtype(torch.float32)
    launch(two, 2, "1", stage="image", init=world / "init", latents=tmp_path / "b",
           data=f"{world}/a=2,{world}/b=1", parallel="fsdp", states=tmp_path / "s", **changes)
    near(one, two, "image", 1e-10)
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes()
               for p in (tmp_path / "a").iterdir())
