"""Pictures with captions: the small world without end, or a folder of own pictures.

Both data sets give (picture, caption, question, answer) by index; a picture is whatever `draw`
turns into pixels on the device. Sample i is always the same sample.
"""

import json
import random
import signal
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import shapes
from towers import Tokenizer


class Shapes(torch.utils.data.Dataset):
    """Scenes of the small world, drawn by (seed, index), as pictures of size x size pixels.

    split: "train", "val" or "held", grid: of the centres (see shapes.draw_scene). tasks: which
    tasks, all if empty. Raises ValueError for an unknown task or a grid below 4.
    """

    def __init__(self, size, seed, split="train", tasks=(), grid=shapes.GRID):
        unknown = set(tasks) - set(shapes.MIXTURE)
        if unknown:
            raise ValueError(f"unknown task {min(unknown)!r}, expected some of: "
                             + ", ".join(shapes.MIXTURE))
        if grid < 4:
            raise ValueError(f"grid must be at least 4 to hold four objects, got {grid}")
        self.size, self.seed, self.split, self.grid = size, seed, split, grid
        self.tasks = tuple(tasks) or tuple(shapes.MIXTURE)

    def scene(self, index):
        """Scene, caption (shapes.Prompt), question and answer of one index."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        task = shapes.draw_task(rng, self.tasks)
        scene = shapes.draw_scene(rng, task, self.split, grid=self.grid)
        return scene, shapes.describe(rng, scene, task), *shapes.ask(rng, scene)

    def __getitem__(self, index):
        scene, prompt, question, answer = self.scene(index)
        ask = (question, answer) if index % 2 else (None, None)
        return shapes.pack([scene])[0], prompt.text, *ask

    def draw(self, packed, device):
        """Packed scenes (B, 21) to pictures (B, 3, size, size) in [-1, 1] on the device."""
        return shapes.render(packed, self.size, self.size, device)


class Folder(torch.utils.data.Dataset):
    """Own pictures: `metadata.jsonl` with file_name and text a line, or name.png beside name.txt.

    The shorter side is scaled to `size` and the middle cropped. Pictures that cannot be read are
    left out and counted in `broken`; the others are held in memory. Raises ValueError for a missing
    or empty caption, a malformed line, or a folder without a readable picture.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

    def __init__(self, folder, size):
        pairs = list(self._pairs(Path(folder)))
        if not pairs:
            raise ValueError(f"{folder} holds no pictures ({', '.join(self.SUFFIXES)})")
        self.captions, pictures, self.broken = [], [], 0
        for path, text in pairs:
            if not text.strip():
                raise ValueError(f"the caption of {path} is empty")
            try:
                pictures.append(self._load(path, size))
                self.captions.append(text)
            except (OSError, SyntaxError, Image.DecompressionBombError,
                    Image.DecompressionBombWarning):
                self.broken += 1
        if not pictures:
            raise ValueError(f"{folder}: none of its {len(pairs)} pictures can be read")
        self.pictures = torch.stack(pictures)                             # (L, 3, size, size)

    def _pairs(self, folder):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        index = folder / "metadata.jsonl"
        if not index.is_file():
            for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in self.SUFFIXES):
                caption = path.with_suffix(".txt")
                if not caption.is_file():
                    raise ValueError(f"{path} has no caption: expected {caption.name} beside it, "
                                     "or a metadata.jsonl")
                yield path, caption.read_text("utf-8-sig").strip()
            return
        for number, line in enumerate(index.read_text("utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError
                yield folder / row["file_name"], row["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'{index}, line {number}: expected {{"file_name": ..., "text": '
                                 f'...}}, got {line[:60]!r}') from None

    @staticmethod
    def _load(path, size):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size],
                             Image.Resampling.LANCZOS)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(size, size, 3).permute(2, 0, 1)                  # (3, size, size)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return self.pictures[index], self.captions[index], None, None

    def draw(self, pictures, device):
        """Bytes (B, 3, size, size) to pictures in [-1, 1] on the device."""
        return pictures.to(device).float() / 127.5 - 1


def build_tokenizer(dataset, samples=5000):
    """A Tokenizer of all captions of a folder, or of the texts of `samples` items of the world."""
    texts = (dataset.captions if isinstance(dataset, Folder) else
             (text for i in range(samples) for text in dataset[i][1:] if text))
    return Tokenizer(word for text in texts for word in Tokenizer.split(text))


def sequence(tokenizer, length, text, answer=None):
    """Token ids and next-token targets, both (length,); with an answer only that is a target."""
    ids = tokenizer.encode(text)
    start = len(ids) - 1 if answer else 0
    ids += tokenizer.encode(answer)[1:] if answer else []
    ids.append(tokenizer.EOS)
    if len(ids) > length:
        raise ValueError(f"{text!r} has {len(ids)} tokens, more than the {length} allowed")
    tokens = torch.full((length,), tokenizer.PAD)
    target = torch.full((length,), -100)
    tokens[:len(ids)] = torch.tensor(ids)
    target[start:len(ids) - 1] = tokens[start + 1:len(ids)]
    return tokens, target


class Collate:
    """Turn items into the tensors of a stage.

    "vae": pictures. "image": pictures and prompts (B, S). "understand": pictures, captions with
    targets, and what is said about the picture (a question where there is one, every other time).
    """

    def __init__(self, stage, tokenizer, length):
        self.stage, self.tokenizer, self.length = stage, tokenizer, length

    def __call__(self, items):
        pictures = torch.stack([item[0] for item in items])
        if self.stage == "vae":
            return (pictures,)
        if self.stage == "image":
            return pictures, self.tokenizer.batch([item[1] for item in items], self.length)
        captions = [sequence(self.tokenizer, self.length, item[1]) for item in items]
        about = [sequence(self.tokenizer, self.length, *item[2:]) if item[2] else
                 captions[i] for i, item in enumerate(items)]
        return pictures, *(torch.stack(column) for rows in (captions, about)
                           for column in zip(*rows))


def loader(dataset, batches, collate, workers):
    """A DataLoader over an iterable of index lists; the order is the caller's."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      prefetch_factor=4 if workers else None, worker_init_fn=_leave_ctrl_c)


def _leave_ctrl_c(worker):
    """Ctrl-C reaches every process of a terminal; only the training process may answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
