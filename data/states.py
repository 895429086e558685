"""States of prompts that are made outside of the training step.

The understanding tower is frozen, so its states of a prompt never change: a second process can run
it ahead of training (Producer, MoS App. B.4), or every prompt goes through it once and its states
stay on disk (Cache). Both return input embeddings (B, S, Du) and states (B, S, M, Du).
"""

import hashlib
import json
import queue
from collections import deque
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from checkpoint import fingerprint, load_part, unloaded
from common import check_made, leave_stopping_to_parent, replacing, write_made
from data.latents import open_shard, shard_path
from kernels import autocast
from mos import MoS
from towers import Tokenizer

SHARD = 256  # prompts in a file
WAIT = 5  # seconds between looks at a producer that does not answer


def open_tower(config, tokenizer, folder, device):
    """Load a tower; return a function from prompts (B, S) to embeddings and states on the host."""
    model = unloaded(MoS, config, tokenizer)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched
        model.understanding.bfloat16()
    model.understanding.to_empty(device=device)
    load_part(model, folder, "understanding")

    def read(tokens):
        with autocast(device):
            context = model.understand(tokens.to(device))
        return context.inputs.cpu(), context.states.cpu()
    return read


def produce(questions, answers, *tower):
    """Answer questions in the producer's process, until the training process is gone."""
    leave_stopping_to_parent()
    torch.set_num_threads(1)
    read = open_tower(*tower)
    while multiprocessing.parent_process().is_alive():
        try:
            answers.put(read(questions.get(timeout=WAIT)))
        except queue.Empty:
            pass


class Producer:
    """The tower of a model's folder in a second process, on a device of its choice."""

    ahead = 2  # steps for which it is asked in advance

    def __init__(self, model, folder, device):
        context = multiprocessing.get_context("spawn")
        self.questions, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=produce, daemon=True, args=(
            self.questions, self.answers, model.config, model.tokenizer, folder,
            torch.device(device)))
        self.process.start()

    def ask(self, tokens):
        """Ask for the states of prompts (B, S)."""
        self.questions.put(tokens.cpu())

    def answer(self, device):
        """Return the next answer, in the questions' order. Raises OSError if none can come."""
        while True:
            try:
                answer = self.answers.get(timeout=WAIT)
                return [part.to(device, non_blocking=True) for part in answer]
            except queue.Empty:
                if not self.process.is_alive():
                    raise OSError("the process that makes the prompts' states has ended with code "
                                  f"{self.process.exitcode}; start again with --resume") from None


def digest(values):
    """Return a SHA-256 of values that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class Cache:
    """The states of all prompts of a data set in a folder, made once by all processes together.

    captions: the prompts. A shard holds SHARD of them, padded to the longest; made.json comes first
    and says what they were made from. Raises ValueError where the folder holds something else.
    """

    ahead = 0  # nothing is asked in advance

    def __init__(self, folder, model, captions, init, world):
        self.folder = Path(folder)
        self.questions = deque()
        ids = {text: model.tokenizer.encode(text) for text in {"", *captions}}
        texts = sorted(ids, key=lambda text: (len(ids[text]), text))
        self.rows = {tuple(ids[text]): row for row, text in enumerate(texts)}
        made = {"tower": fingerprint(model.config, init, "understanding"),
                "state_norm": model.config.state_norm, "prompts": digest(texts),
                "tokenizer or chat template": digest([ids[text] for text in texts])}
        check_made(self.folder, made, "states")
        shards = [texts[i:i + SHARD] for i in range(0, len(texts), SHARD)]
        missing = [number for number in range(len(shards))
                   if not shard_path(self.folder, number).is_file()]
        world.wait()
        if world.first:
            write_made(self.folder, made)
        world.wait()
        share = missing[world.rank::world.size]
        if share:  # a second tower: the model's may be sharded
            read = open_tower(model.config, model.tokenizer, init, world.device)
        for number in share:
            inputs, states = read(model.tokenizer.batch(shards[number]))
            with replacing(shard_path(self.folder, number)) as path:
                save_file({"inputs": inputs, "states": states}, path)
        world.wait()
        world.print0(f"{folder}: states of {len(texts):,} prompts, {len(missing)} of "
                     f"{len(shards)} shards made now")

    def ask(self, tokens):
        """Ask for the states of prompts (B, S)."""
        self.questions.append(tokens.cpu())

    def answer(self, device):
        """Return the next answer, in the order of the questions. Raises OSError for damage."""
        tokens = self.questions.popleft()
        answer = None
        for b, row in enumerate(tokens.tolist()):
            ids = tuple(i for i in row if i != Tokenizer.PAD)
            number, position = divmod(self.rows[ids], SHARD)
            shard = open_shard(self.folder, number)
            parts = [shard.get_slice(name)[position, :len(ids)] for name in ("inputs", "states")]
            answer = answer or [part.new_zeros(*tokens.shape, *part.shape[1:]) for part in parts]
            for padded, part in zip(answer, parts):
                padded[b, :len(ids)] = part
        return [padded.to(device, non_blocking=True) for padded in answer]
