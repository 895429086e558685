"""States of prompts that are made elsewhere than in the training step.

The understanding tower is frozen, so that what it says about a prompt never changes: a process of
its own can run it ahead of training (a producer, MoS App. B.4), or every prompt goes through it
once and its states stay on disk (a cache). Both answer with the tower's input embeddings (B, S, Du)
and states (B, S, M, Du), as `MoS.understand` makes them in the step.
"""

import hashlib
import json
import queue
import signal
from collections import deque
from functools import lru_cache
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checksum, move, replacing
from data.latents import read_lines
from kernels import autocast
from mos import MoS
from pretrained.folders import weights_of
from towers import Tokenizer

SHARD = 256  # prompts in a file
WAIT = 5  # seconds between looks at a producer that does not answer


def open_tower(config, tokenizer, folder, device):
    """What reads prompts (B, S), wherever they lie: embeddings and states, in host memory."""
    with torch.device("meta"):
        model = MoS(config, tokenizer)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched
        model.understanding.bfloat16()
    model.understanding.to_empty(device=device)
    model.load_part(folder, "understanding")

    def read(tokens):
        with autocast(device):
            context = model.understand(tokens.to(device))
        return context.inputs.cpu(), context.states.cpu()
    return read


def fingerprint(config, init):
    """What tells a tower from others: our file's checksum, or names and sizes of a folder's."""
    if not config.und_folder:
        return checksum(init / "understanding.safetensors")
    return [[path.name, path.stat().st_size] for path in weights_of(config.und_folder)]


def produce(questions, answers, *tower):
    """What the producer's process does, until the training process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    torch.set_num_threads(1)
    read = open_tower(*tower)
    while multiprocessing.parent_process().is_alive():
        try:
            answers.put(read(questions.get(timeout=WAIT)))
        except queue.Empty:
            pass


class Producer:
    """The tower of a checkpoint folder in a process of its own, which has a device of its own."""

    ahead = 2  # steps for which it is asked in advance

    def __init__(self, model, folder, device):
        fresh = multiprocessing.get_context("spawn")
        self.questions, self.answers = fresh.Queue(), fresh.Queue()
        self.process = fresh.Process(target=produce, daemon=True, args=(
            self.questions, self.answers, model.config, model.tokenizer, folder,
            torch.device(device)))
        self.process.start()

    def ask(self, tokens):
        """Ask for the states of prompts (B, S)."""
        self.questions.put(tokens.cpu())

    def answer(self, device):
        """The next answer, in the order of the questions. Raises OSError where none can come."""
        while True:
            try:
                return [move(part, device) for part in self.answers.get(timeout=WAIT)]
            except queue.Empty:
                if not self.process.is_alive():
                    raise OSError("the process that makes the prompts' states has ended with code "
                                  f"{self.process.exitcode}; start again with --resume") from None


class Cache:
    """The states of all prompts of a data set in a folder: made once, by all processes together.

    texts: the prompts. A shard holds SHARD of them, padded to the longest; index.json comes first
    and tells what they are made of. Raises ValueError where the folder holds something else.
    """

    ahead = 0

    def __init__(self, folder, model, texts, init, world):
        self.folder, self.questions = Path(folder), deque()
        rows = {text: model.tokenizer.encode(text) for text in {"", *texts}}
        texts = sorted(rows, key=lambda text: (len(rows[text]), text))
        made = {"tower": fingerprint(model.config, Path(init)),
                "state_norm": model.config.state_norm,
                "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        self.check(made)
        self.rows = {tuple(rows[text]): i for i, text in enumerate(texts)}
        parts = [texts[i:i + SHARD] for i in range(0, len(texts), SHARD)]
        missing = [i for i in range(len(parts)) if not self.path(i).is_file()]
        world.wait()
        if world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "index.json") as path:
                path.write_text(json.dumps(made))
        world.wait()
        mine = missing[world.rank::world.size]
        if mine:  # by a tower of its own: the model's may be sharded
            read = open_tower(model.config, model.tokenizer, init, world.device)
        for i in mine:
            self.write(i, *read(model.tokenizer.batch(parts[i])))
        world.wait()
        world.print0(f"{folder}: states of {len(texts):,} prompts, {len(missing)} of {len(parts)} "
                  "shards made now")

    def path(self, number):
        """The file of a shard."""
        return self.folder / f"{number:06d}.safetensors"

    def write(self, number, inputs, states):
        """Write a shard."""
        with replacing(self.path(number)) as path:
            try:
                save_file({"inputs": inputs, "states": states}, path)
            except SafetensorError as e:
                raise OSError(f"cannot write {self.path(number)}: {e}") from None

    def check(self, made):
        """Raise ValueError unless the folder is free, or holds just these states."""
        index = self.folder / "index.json"
        if not index.is_file():
            if any(not path.name.startswith(".") for path in self.folder.glob("*")):
                raise ValueError(f"states: {self.folder} holds something else; choose a new folder")
        elif read_lines(index) != [made]:
            raise ValueError(f"states: {self.folder} was made by another tower or for other "
                             "prompts; choose another folder")

    @lru_cache(64)
    def shard(self, number):
        """A shard, memory-mapped."""
        return safe_open(self.path(number), "pt")

    def ask(self, tokens):
        """Ask for the states of prompts (B, S)."""
        self.questions.append(tokens.cpu())

    def answer(self, device):
        """The next answer, in the order of the questions. Raises OSError for a damaged shard."""
        found, tokens = [], self.questions.popleft()
        for row, length in zip(tokens.tolist(), (tokens != Tokenizer.PAD).sum(1).tolist()):
            at = self.rows[tuple(row[:length])]
            try:
                shard = self.shard(at // SHARD)
                found.append([shard.get_slice(name)[at % SHARD, :length] for name in
                              ("inputs", "states")])
            except SafetensorError as e:
                raise OSError(f"{self.path(at // SHARD)} is damaged ({e}); delete it") from None
        parts = []
        for column in zip(*found):
            whole = column[0].new_zeros(*tokens.shape, *column[0].shape[1:])
            for place, part in zip(whole, column):
                place[:len(part)] = part
            parts.append(move(whole, device))
        return parts
