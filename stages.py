"""What one step of each training stage computes: its loss as a module, its data, its validation.

All randomness is a function of seed and step, and drawn for the global batch, so that the number of
processes and a resume change nothing.
"""

import itertools
import time
from collections import deque
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from common import move, replacing
from data.buckets import Batch, Bucket
from data.latents import (
    Stored,
    broken_samples,
    check_made,
    end_store,
    read_stored,
    shard_path,
    with_digest,
    write_made,
    write_shard,
)
from data.sources import Collate, Mixture, Reader, count_tokens, loader
from data.states import Cache, Producer
from kernels import autocast, cast
from mos import Context, sample_t
from tools import estimate, evaluate
from towers import Patches, Tokenizer
from world import edits, shapes


class Stage(nn.Module):
    """One stage's loss as a module (so that DDP and compile can wrap it) and its data.

    Raises ValueError for a caption that the tower cannot read.
    """

    unit = 1  # samples of a batch that belong together

    def __init__(self, model, dataset, c, world):
        super().__init__()
        self.c, self.world, self.dataset = c, world, dataset
        self.__dict__["model"] = model  # not a child: a stage owns what its `forward` uses
        self.parts = nn.ModuleList(self.used())
        self.lengths, self.broken = self.count_lengths(), {}
        self.forget()

    def used(self):
        """The parts that `forward` needs."""
        return [self.trained()]

    def idle(self):
        """Parameters of what is trained that the loss does not depend on."""
        return []

    def flops(self, *inputs):
        """Forward FLOP of a micro-batch, of what is trained; 0: not counted."""
        return 0

    def generator(self, step):
        return torch.Generator(self.world.device).manual_seed(self.c.seed * 1_000_003 + step)

    def count_lengths(self):
        """Tokens of each sample's prompts, an array or the most for each source."""
        return self.dataset.lengths(self.model.tokenizer, self.model.config.max_tokens)

    def start(self, step):
        """Say what the buckets are, and follow the plan from `step` on. Returns the Plan."""
        plan = self.plan()
        self.world.print0(f"buckets ({len(plan.buckets)}): " + ", ".join(
            f"{b.height}x{b.width}" + f" with {b.length} tokens" * (b.length > 0)
            for b in plan.buckets[:8]) + ", ..." * (len(plan.buckets) > 8))
        self.batches = self.follow(plan.batches(step, self.c.steps))
        return plan

    def plan(self):
        """The Plan of all batches."""
        c = self.c
        return self.dataset.plan(self.lengths, c.length_step, c.batch, c.seed)

    def follow(self, batches):
        """Yield what `next` needs of these batches."""
        return self.read(batches)

    def read(self, batches, dataset=None, mine=None):
        """Yield each batch with its drawn pictures, its other tensors, and its captions.

        The share of this process, or `mine`; by data processes, another dataset by this one. Notes
        broken samples.
        """
        workers = self.c.workers if dataset is None else 0
        dataset, mine = dataset or self.dataset, mine or self.world.share(self.c.batch)
        planned, ahead = itertools.tee(batches)
        reader = Reader(dataset, Collate(self.c.stage, self.model.tokenizer), mine)
        contents = loader(reader, ahead, workers)
        for batch, (tensors, texts, broken) in zip(planned, contents):
            self.broken |= broken
            if tensors is None:
                raise ValueError("no sample of a batch can be read; remove " + ", ".join(
                    f"{dataset.sources[k].title(i)} ({why})" for (k, i), why in broken.items()))
            (pictures, *rest), device = tensors, self.world.device
            pictures = dataset.sources[batch.source[0]].draw(pictures, device)
            yield batch, (pictures, *(move(a, device) for a in rest)), texts

    def next(self):
        """The next batch of this process, on its device, pictures drawn."""
        batch, tensors, _ = next(self.batches)
        self.drawn += np.bincount(batch.source, minlength=len(self.drawn))
        self.waiting = batch.waiting
        for tokens in tensors[1::2]:  # targets or pictures stand between
            self.padding += (tokens == Tokenizer.PAD).sum()
            self.context += tokens.numel()
        return tensors

    def forget(self):
        """Begin to count anew what batches hold."""
        self.drawn, self.context = np.zeros(len(self.dataset.sources), int), 0
        self.padding = torch.zeros((), device=self.world.device)

    def tell(self):
        """Log values of the batches since the last time; every process asks.

        waiting: samples in buckets that are not full, broken: samples found unreadable so far,
        padding: share of the context tokens, share_*: of the samples. Raises ValueError where too
        many are broken.
        """
        self.broken = self.world.gather(self.broken)
        self.dataset.check(self.broken, self.c.max_broken)
        values = {"waiting": self.waiting, "broken": len(self.broken)}
        if self.context:
            values["padding"] = self.world.sum(self.padding).item() / (
                self.context * self.world.size)
        if len(self.drawn) > 1 and self.drawn.any():
            values |= {f"share_{source.name}": number / self.drawn.sum()
                       for source, number in zip(self.dataset.sources, self.drawn)}
        self.forget()
        return values

    def report(self, sums, steps):
        """Log values from the metrics' sums over steps and processes."""
        return {name: (value / steps / self.world.size).item() for name, value in sums.items()}

    def unseen(self, number):
        """A Mixture of `number` samples that training does not see, or the own pictures."""
        own = self.dataset.scenes
        return self.dataset if own is None else Mixture(
            [type(own)(own.size, self.c.seed, "val", own.tasks, own.grid, number)])

    def validation(self, number):
        """Drawn pictures of the model's size and other tensors: unseen, or the first of its own."""
        data, size = self.unseen(number), self.model.config.size
        index = np.arange(min(number, len(data.sources[0].sides)))
        bucket = Bucket(0, size, size, self.model.config.max_tokens)
        (_, tensors, _), = self.read([Batch(0 * index, index, bucket)], data, slice(None))
        return tensors


class VaeStage(Stage):
    """Reconstruct pictures that are drawn as they are needed."""

    def trained(self):
        return self.model.vae

    def count_lengths(self):
        return [0] * len(self.dataset.sources)

    def inputs(self, step):
        (pictures,) = self.next()
        shape = (self.c.batch, self.model.config.vae_channels,
                 *(side // self.model.vae.factor for side in pictures.shape[2:]))
        noise = torch.randn(shape, generator=self.generator(step), device=self.world.device)
        return pictures, noise[self.world.share(self.c.batch)]

    def forward(self, pictures, noise):
        return self.model.vae.loss(pictures, noise, self.c.kl_weight)

    @torch.no_grad()
    def validate(self, step, folder):
        vae, (true,) = self.model.vae, self.validation(200)
        latents = [vae.posterior(part)[0] for part in true.split(50)]
        seen = torch.cat([vae.reconstruct(part) for part in latents]).clamp(-1, 1)
        error = (seen - true).square().mean()
        std, mean = torch.std_mean(torch.cat(latents), (0, 2, 3))
        vae.set_statistics(mean, std)
        if self.world.first:
            save_grid(torch.cat((true[:8], seen[:8])), folder / f"vae_{step:06d}.png", 8)
        values = {"val_psnr": (10 * torch.log10(4 / error)).item()}
        if self.dataset.scenes:
            right, _ = evaluate.score_judge(100, vae=vae, seed=1, split="val")
            values["val_judge"] = right / 100
        return values


class UnderstandStage(Stage):
    """Next token of captions alone, and of descriptions of and answers about pictures."""

    def trained(self):
        return self.model.understanding

    def count_lengths(self):
        """With <eos>."""
        tokenizer, longest = self.model.tokenizer, self.model.config.max_tokens
        return [n + 1 for n in self.dataset.lengths(tokenizer, longest - 1)]

    def inputs(self, step):
        return self.next()

    def forward(self, pictures, captions, caption_targets, about, about_targets):
        U = self.model.understanding
        blind, _ = U.loss(captions, caption_targets)
        seeing, metrics = U.loss(about, about_targets, pictures)
        return blind + seeing, {"caption_loss": blind.detach(), "picture_loss": seeing.detach(),
                                **metrics}

    @torch.no_grad()
    def validate(self, step, folder):
        inputs = self.validation(200)
        with autocast(self.world.device):
            loss, _ = self(*inputs)
        values = {"val_loss": loss.item()}
        if self.dataset.scenes:
            values["val_answers"] = evaluate.score_understanding(self.model, 400) / 400
        return values


class ImageStage(Stage):
    """The main stage: router and generation tower on stored latents, everything else frozen."""

    states = None  # a Producer or a Cache, where prompts' states are not made in the step

    def trained(self):
        return nn.ModuleList([self.model.router, self.model.generation])

    def used(self):
        return [self.model.understanding, self.trained()]

    def idle(self):
        return [self.model.generation.reference]  # of edits

    def read(self, batches, dataset=None, mine=None):
        """Latents instead of pictures: the VAE encodes what is not stored, in fp32."""
        stored = isinstance((dataset or self.dataset).sources[0], Stored)
        for batch, (pictures, *rest), texts in super().read(batches, dataset, mine):
            yield batch, (pictures if stored else self.encode(pictures), *rest), texts

    @torch.no_grad()
    def encode(self, pictures):
        """Latents of pictures, in parts that fit."""
        most = 2 ** 23 if pictures.is_cuda else 2 ** 20  # pixels at once
        parts = pictures.split(max(1, most // pictures[0, 0].numel()))
        latents = torch.cat([self.model.vae.encode(part) for part in parts])
        return latents.contiguous()  # the VAE leaves a pixel's channels side by side

    def start(self, step):
        self.costs, self.ahead, c = {}, deque(), self.c
        self.prepare()
        if c.states == "producer":
            self.states = Producer(self.model, c.init, c.tower_device or self.world.device)
        elif c.states != "step":
            texts = (text for source in self.dataset.sources for text in source.captions)
            self.states = Cache(c.states, self.model, texts, c.init, self.world)
        plan, batch = super().start(step), self.c.batch
        visual, context = (batch * max(counts) for counts in zip(*map(self.count, plan.buckets)))
        self.world.print0(f"tokens a step, at most: {visual:,} visual, {context:,} context (with "
                       "padding)")

    def count(self, bucket):
        """Visual and context tokens of a sample."""
        side = self.model.vae.factor * self.model.config.gen_patch  # of a visual token, in pixels
        return bucket.height * bucket.width // side ** 2, bucket.length

    def follow(self, batches):
        return (self.recall if self.c.latents == "memory" else self.read)(batches)

    def prepare(self):
        """Have latents where they shall come from, and those of validation at hand."""
        c, longest = self.c, self.model.config.max_tokens
        if c.latents == "memory":
            self.fill()
        elif c.latents != "step" and not isinstance(self.dataset.sources[0], Stored):
            self.store(Path(c.latents))
        else:
            self.lengths = [count_tokens(self.model.tokenizer, source.captions, longest)
                            if np.ndim(n) == 0 else n
                            for n, source in zip(self.lengths, self.dataset.sources)]
        (z0, tokens), self.prompts = self.held_back()
        self.val = z0, trim(tokens)

    def held_back(self):
        """Up to 256 samples for validation, of one size, and their captions."""
        data = self.unseen(256)
        piece = max((p for p in data.pieces(self.model.config.max_tokens) if p.source[0] == 0),
                    key=lambda p: len(p.index))
        piece = piece._replace(source=piece.source[:256], index=piece.index[:256])
        (_, tensors, captions), = self.read([piece], data, slice(None))
        return tensors, captions

    def fill(self):
        """Encode everything and keep it on the device, latents by resolution."""
        begin, sources = time.time(), self.dataset.sources
        self.first = np.cumsum([0, *(len(source.sides) for source in sources)])
        pieces = self.dataset.pieces(self.model.config.max_tokens)
        self.rows, latents, tables = np.zeros(self.first[-1], int), {}, []
        for piece, (z0, *rest), _ in self.read(pieces, mine=slice(None)):
            number, parts = self.number(piece), latents.setdefault(piece.bucket[1:3], [])
            self.rows[number] = sum(map(len, parts)) + np.arange(len(number))
            tables = tables or [a.new_zeros(self.first[-1], *a.shape[1:], device="cpu")
                                for a in rest]
            for table, part in zip(tables, rest):
                table[number] = part.cpu()
            parts.append(z0)
        self.latents = {size: torch.cat(parts) for size, parts in latents.items()}
        tokens, *self.beside = tables
        self.tokens = tokens.to(self.world.device)
        lengths = (tokens != Tokenizer.PAD).sum(1).numpy()
        self.lengths = np.split(lengths, self.first[1:-1])
        self.world.print0(f"encoded {len(tokens)} samples in {time.time() - begin:.0f} s")

    def number(self, batch):
        """Where the samples of a batch stand among those of all sources."""
        return self.first[batch.source] + batch.index

    def recall(self, batches):
        """Yield batches of what `fill` has kept, like `read`."""
        device, mine = self.world.device, self.world.share(self.c.batch)
        for batch in batches:
            number = self.number(batch)[mine]
            at, rows = (move(torch.from_numpy(n), device) for n in (number, self.rows[number]))
            tokens = self.tokens[at, :batch.bucket.length]
            yield batch, (self.latents[batch.bucket[1:3]][rows], tokens), None

    def store(self, folder):
        """Encode what `folder` lacks, each process its part, and read from there from now on."""
        data, world, begin = self.dataset, self.world, time.time()
        made, pieces = with_digest(data), data.pieces(self.model.config.max_tokens)
        check_made(folder, made)
        world.wait()
        if world.first:
            write_made(folder, made)
        mine = [n for n in range(world.rank, len(pieces), world.size)
                if not shard_path(folder, n).is_file()]
        world.wait()
        contents = self.read([pieces[n] for n in mine], mine=slice(None))
        for n, (piece, (z0, _), texts) in zip(mine, contents):
            write_shard(shard_path(folder, n), piece, z0, texts, self.broken)
        world.wait()
        data.check(broken_samples(folder, pieces), self.c.max_broken)
        if world.first:
            end_store(folder, data, pieces)
        world.wait()
        world.print0(f"{folder}: {len(pieces)} shards of latents, {len(mine)} encoded by this process "
                  f"in {time.time() - begin:.0f} s")
        self.dataset = Mixture(read_stored(folder, data.made), data.weights, data.scenes)
        self.lengths, self.broken = self.count_lengths(), {}

    @cached_property
    def empty(self):
        """The empty prompt's tokens."""
        return torch.tensor(self.model.tokenizer.encode(""), device=self.world.device)

    def draws(self, z0, tokens, generator, front=0):
        """Times, noise, exploration and prompt dropout of a global batch; this process's share.

        front: image tokens before each text.
        """
        m, c, mine = self.model.config, self.c, self.world.share(self.c.batch)
        source = dict(generator=generator, device=generator.device)
        t = sample_t(c.batch, m.t_sampling, m.shift, generator)
        z1 = torch.randn(c.batch, *z0.shape[1:], **source)
        explore = torch.rand(c.batch, front + tokens.shape[1], m.und_depth + 1, m.gen_depth,
                             **source)
        empty = (torch.rand(c.batch, **source) < c.prompt_dropout)[mine, None]
        blank = torch.full_like(tokens, Tokenizer.PAD)
        blank[:, :len(self.empty)] = self.empty
        # Copies: a slice would keep what the other processes need in memory.
        return torch.where(empty, blank, tokens), t[mine], z1[mine].clone(), explore[mine].clone()

    def batch(self, step):
        """Latents, prompts and all that is random of this process's share of a step."""
        z0, tokens = self.next()
        return z0, *self.draws(z0, tokens, self.generator(step))

    def inputs(self, step):
        if not self.states:
            return self.batch(step)
        while len(self.ahead) <= self.states.ahead and step + len(self.ahead) < self.c.steps:
            self.ahead.append(self.batch(step + len(self.ahead)))
            self.states.ask(self.ahead[-1][1])
        return *self.ahead.popleft(), *self.states.answer(self.world.device)

    def forward(self, z0, tokens, t, z1, explore, *told):
        """told: the prompts' embeddings and states, where they are made elsewhere."""
        context = Context(told[0], *cast(told[1]), tokens != Tokenizer.PAD) if told else None
        each = self.model.loss(z0, tokens, t, z1, explore, context)               # (B,)
        return each.mean(), self.by_time(each.detach(), t)

    def by_time(self, each, t):
        """Sums of the losses (B,) in ten bins of their times t (B,), and how many there are."""
        bins = nn.functional.one_hot((t * 10).long().clamp(max=9), 10).type_as(each)
        return {"bins": each @ bins, "counts": bins.sum(0)}

    def flops(self, z0, tokens, *_):
        return self.cost(z0, tokens.shape[1])

    def cost(self, z0, length, edit=False):
        """Forward FLOP of latents, each with so long a context, and in edits with a reference."""
        key = length, tuple(z0.shape[2:]), edit
        if key not in self.costs:
            self.costs[key] = estimate.forward_flops(self.model.config, *key)
        return len(z0) * self.costs[key]

    def report(self, sums, steps):
        means = (sums["bins"] / sums["counts"]).tolist()
        return {f"loss_t{i}": mean for i, mean in enumerate(means)}

    @torch.no_grad()
    def losses_by_time(self, val=None):
        """Validation loss at t = (i + 0.5) / 8, with fixed noise: (8,).

        val: latents, tokens, and for edits images and reference (see MoS.loss); self.val if None.
        """
        z0, tokens, *edited = val or self.val
        edited = dict(zip(("images", "reference"), edited))
        z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0.device)
        times = (torch.full_like(z0[:, 0, 0, 0], (i + 0.5) / 8) for i in range(8))
        with autocast(self.world.device):
            return torch.stack([self.model.loss(z0, tokens, t, z1, **edited).mean()
                                for t in times])

    @torch.no_grad()
    def routing(self):
        """The router's entropy by block (N,) in nats, and how often each layer is chosen (N, M).

        At t = 1/2, over the real tokens of the validation prompts.
        """
        model, (z0, tokens) = self.model, self.val
        z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0.device)
        with autocast(self.world.device):
            context = model.understand(tokens)
            x, places = model.generation.patchify((z0 + z1) / 2)                  # (B, T, Dg)
            weights = model.route(x, places, torch.full_like(z0[:, 0, 0, 0], 0.5), context)
        weights = weights[context.mask]                                           # (P, M, N)
        chosen = torch.zeros_like(weights).scatter(1, weights.topk(model.config.k, 1).indices, 1)
        return torch.special.entr(weights).sum(1).mean(0), chosen.mean(0).T

    @torch.no_grad()
    def validate(self, step, folder):
        losses, (entropy, usage) = self.losses_by_time(), self.routing()
        values = {"val_loss": losses.mean().item()}
        values |= {f"val_t{i}": loss for i, loss in enumerate(losses.tolist())}
        values |= {f"entropy_{j}": e for j, e in enumerate(entropy.tolist())}
        values |= {f"usage_{j}_{m}": share for j, row in enumerate(usage.tolist())
                   for m, share in enumerate(row)}
        tasks = [task for task in shapes.TASKS if task in getattr(self.dataset.scenes, "tasks", ())]
        if tasks:  # "dense" has no benchmark
            prompts = [p.text for task in tasks
                       for p in shapes.benchmark(task, 24 // len(tasks), 9)]
            table = evaluate.score_tasks(self.model, self.c.eval_prompts, 1, seed=7, batch=256,
                                         held=(False,), tasks=tasks, steps=25)
            values["score"] = evaluate.overall(table, "seen")
            values |= {f"score_{task.replace(' ', '_')}": row["seen"][0] / row["seen"][1]
                       for task, row in table.items()}
        else:
            prompts = self.prompts[:8]
        images = self.model.generate(prompts, seed=0, steps=25)
        if self.world.first:
            save_grid(torch.stack([evaluate.to_tensor(image) for image in images]),
                      folder / f"{self.c.stage}_{step:06d}.png", 8)
        return values


class EditStage(ImageStage):
    """Edits (MoS sec. 3.4), and pictures from text, lest drawing be forgotten: half and half.

    Its own batch counts pairs of both. Prompt dropout takes the instruction from an edit, and the
    picture stays; in the other half nothing stays: what guidance with two scales compares.
    The latents of a pair's three pictures stay in memory; what the tower reads is drawn anew.
    Raises ValueError for a tower that reads no pictures.
    """

    unit = 2

    def __init__(self, model, dataset, c, world):
        c = replace(c, batch=c.batch // 2, latents="memory", states="step")
        super().__init__(model, dataset, c, world)
        vision, self.front = model.understanding.vision, 0
        if "understanding" in model.config.edit_inputs:
            if not isinstance(vision, Patches):
                raise ValueError("stage edit needs the small world's tower, which reads pictures, "
                                 "or --edit-inputs generation")
            self.front = (model.config.size // vision.patch) ** 2  # image tokens

    def idle(self):
        return [] if "generation" in self.model.config.edit_inputs else super().idle()

    def flops(self, *inputs):
        after, instructions = inputs[7:9]
        return (super().flops(*inputs[:2])
                + self.cost(after, self.front + instructions.shape[1], True))

    def count(self, bucket):
        visual, context = super().count(bucket)
        return 3 * visual, 2 * context + self.front

    def encode(self, pictures):
        return super().encode(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    def prepare(self):
        self.fill()
        (latents, prompts, sources, instructions), self.prompts = self.held_back()
        before, after, scene = latents.unbind(1)
        pictures = self.dataset.sources[0].draw(sources, self.world.device)
        self.val = scene, trim(prompts)
        self.val_edits = after, trim(instructions), pictures, before

    def fill(self):
        super().fill()
        self.sources, instructions = self.beside
        self.instructions = trim(instructions).to(self.world.device)
        lengths = (instructions != Tokenizer.PAD).sum(1).numpy()
        self.lengths = [np.maximum(lengths, *self.lengths)]

    def recall(self, batches):
        device, mine = self.world.device, self.world.share(self.c.batch)
        for batch, (latents, prompts), _ in super().recall(batches):
            index = torch.from_numpy(batch.index[mine])
            pictures = self.dataset.sources[0].draw(self.sources[index], device)
            instructions = self.instructions[move(index, device), :batch.bucket.length]
            yield batch, (latents, prompts, pictures, instructions), None

    def batch(self, step):
        """All that `forward` needs: of pictures from text, then of edits."""
        latents, prompts, pictures, instructions = self.next()
        generator, (before, after, scene) = self.generator(step), latents.unbind(1)
        return (scene, *self.draws(scene, prompts, generator), pictures, before,
                after, *self.draws(after, instructions, generator, self.front))

    def forward(self, *inputs):
        drawing, (images, reference), editing = inputs[:5], inputs[5:7], inputs[7:]
        drawn = self.model.loss(*drawing)                                         # (B,)
        edited = self.model.loss(*editing, images=images, reference=reference)    # (B,)
        each, t = torch.cat((drawn, edited)), torch.cat((drawing[2], editing[2]))
        means = {"draw": drawn.mean().detach(), "edit": edited.mean().detach()}
        return each.mean(), means | self.by_time(each.detach(), t)

    def report(self, sums, steps):
        means = Stage.report(self, {name: sums[name] for name in ("draw", "edit")}, steps)
        return super().report(sums, steps) | {f"{name}_loss": x for name, x in means.items()}

    @torch.no_grad()
    def validate(self, step, folder):
        values, losses = super().validate(step, folder), self.losses_by_time(self.val_edits)
        values |= {"val_edit": losses.mean().item()}
        values |= {f"edit_t{i}": loss for i, loss in enumerate(losses.tolist())}
        table = evaluate.score_edits(self.model, self.c.eval_prompts, seed=9, held=(False,),
                                     steps=25)
        values["edits"] = evaluate.overall(table, "seen, both")
        for type, column in table.items():
            right, number, _ = column["seen, both"]
            values[f"edits_{type}"] = right / number
        self.show(folder / f"edited_{step:06d}.png")
        return values

    def show(self, path):
        """Write a picture of an edit of each type: above before, below after."""
        shown = [edits.edit_benchmark(type, 1)[0] for type in edits.TYPES]
        size = self.model.config.size
        before = shapes.render(shapes.pack([edit.source for edit in shown]), size, size)
        images = self.model.edit([*map(evaluate.to_image, before)], [e.text for e in shown],
                                 steps=25)
        if self.world.first:
            after = torch.stack([*map(evaluate.to_tensor, images)])
            save_grid(torch.cat((before, after)), path, len(shown))


KINDS = {"vae": VaeStage, "understand": UnderstandStage, "image": ImageStage, "edit": EditStage}


def trim(tokens):
    """Token ids (B, S) without the columns that are padding in every row."""
    return tokens[:, :(tokens != Tokenizer.PAD).any(0).sum()]


def save_grid(pictures, path, columns):
    """Pictures (B, 3, H, W) in [-1, 1] as one PNG, row by row."""
    B, _, H, W = pictures.shape
    sheet = Image.new("RGB", (columns * W, -(-B // columns) * H))
    for i, p in enumerate(((pictures.cpu() + 1) * 127.5).round().byte().permute(0, 2, 3, 1)):
        sheet.paste(Image.fromarray(p.numpy()), (i % columns * W, i // columns * H))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
