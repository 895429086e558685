"""What one step of each training stage computes: its inputs, its loss, and its validation.

    VaeStage          pictures                         -> reconstruction, KL      vae.py: VAE.loss
    UnderstandStage   captions, questions, pictures    -> next-token loss         towers.py
    ImageStage        latents, prompts, t, noise       -> velocity loss, eq. (1)  mos.py: MoS.loss
    EditStage         the same, and edits              -> the same

All randomness is a function of seed and step and is drawn for the global batch, so that neither the
number of processes nor a resume changes anything.
"""

from collections import deque
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from common import contact_sheet, going_on, replacing, to_image
from data.buckets import Batch, Bucket
from data.latents import Memory, Stored, encode, store
from data.pictures import Rules
from data.sources import Loader, Mixture, collate, count_tokens
from data.states import Cache, Producer
from kernels import Keys, autocast, cast
from mos import Context, sample_t
from towers import Tokenizer
from world import edits, scores, shapes


class Stage(nn.Module):
    """One stage's loss as a module, so that DDP, FSDP and compile can wrap it, and its data.

    dataset: a Mixture, or None where weights are only exported. Raises ValueError for a caption
    that the tower cannot read.
    """

    samples_per_row = 1  # samples of a batch that belong together
    placeholders = 0  # see EditStage

    def __init__(self, model, dataset, c, world):
        super().__init__()
        self.c, self.world, self.dataset = c, world, dataset
        self.share = world.share(c.batch)  # this process's slice of a global batch
        self.__dict__["model"] = model  # hidden from nn.Module: only `parts` are sharded
        self.parts = nn.ModuleList(self.used())
        self.prompt_lengths = self.count_lengths() if dataset else None
        self.broken = {}
        self.reset()

    def used(self):
        """Return the parts of the model that `forward` needs."""
        return [self.trained()]

    def without_gradient(self):
        """Return the parameters of the trained part that the loss does not depend on."""
        return []

    def generator(self, step):
        """Return the random generator of a step."""
        return torch.Generator(self.world.device).manual_seed(self.c.seed * 1_000_003 + step)

    def count_lengths(self):
        """Return for each source its samples' numbers of tokens, (L,), or the largest of them."""
        return self.dataset.lengths(self.model.tokenizer, self.model.config.max_tokens)

    # --- data ------------------------------------------------------------------------------------

    def begin(self, step):
        """Plan the batches from `step` on, and print the buckets. Returns the Plan."""
        c = self.c
        plan = self.dataset.plan(self.prompt_lengths, c.length_step, c.batch, c.seed)
        texts = [f"{bucket.height}x{bucket.width}" + f" with {bucket.length} tokens"
                 * (bucket.length > 0) for bucket in plan.buckets[:8]]
        more = ", ..." if len(plan.buckets) > 8 else ""
        self.world.print0(f"buckets ({len(plan.buckets)}): {', '.join(texts)}{more}")
        self.batches = self.batches_from(plan.batches(step, c.steps))
        return plan

    def batches_from(self, planned):
        """Yield each planned batch with this process's share of its tensors."""
        return self.loader(share=self.share).batches(planned)

    def loader(self, dataset=None, share=slice(None)):
        """Return a Loader of the training data, with data processes, or of another data set."""
        join = partial(collate, self.c.stage, self.model.tokenizer, placeholders=self.placeholders)
        return Loader(dataset or self.dataset, join, self.world.device, share=share,
                      encode=self.encoder(), workers=0 if dataset else self.c.workers,
                      broken=self.broken)

    def encoder(self):
        """Return the function that turns pictures into what the stage learns from, if any."""
        return None

    def next_batch(self):
        """Return the tensors of the next batch: this process's share, on its device."""
        batch, tensors, *_ = next(self.batches)
        self.seen.append(batch)
        self.waiting = batch.waiting
        for tokens in tensors[1::2]:  # every other tensor: targets or pictures stand between
            self.padding += (tokens == Tokenizer.PAD).sum()
            self.context += tokens.numel()
        return tensors

    # --- log ------------------------------------------------------------------------------------

    def reset(self):
        """Begin to count anew what batches hold."""
        self.seen = []
        self.context = 0
        self.padding = torch.zeros((), device=self.world.device)

    def log_values(self):
        """Return what the batches held since the last call; every process calls it.

        waiting: samples in buckets that are not full. broken: samples found unreadable so far.
        padding: its share of the context tokens. share_*: each source's share of the samples.
        Raises ValueError where too many samples are broken.
        """
        self.broken = self.world.gather(self.broken)
        self.dataset.check(self.broken, self.c.max_broken)
        values = {"waiting": self.waiting, "broken": len(self.broken)}
        if self.context:
            padding = self.world.sum(self.padding).item()
            values["padding"] = padding / (self.context * self.world.size)
        sources = self.dataset.sources
        # A producer's batches are read ahead, so that there may be none since the last row.
        if len(sources) > 1 and self.seen:
            counts = np.bincount(np.concatenate([batch.source for batch in self.seen]),
                                 minlength=len(sources))
            for source, count in zip(sources, counts):
                values[f"share_{source.name}"] = count / counts.sum()
        self.reset()
        return values

    def average_metrics(self, sums, steps):
        """Return log values from the metrics' sums over steps and processes."""
        return {name: (value / steps / self.world.size).item() for name, value in sums.items()}

    def flops(self):
        """Return the FLOP of this process's steps since the last log row; 0: not counted."""
        return 0

    # --- validation ------------------------------------------------------------------------------

    def complete(self):
        """Measure what is exported beside the trained weights: only the VAE has such values."""

    def unseen(self, count):
        """Return a Mixture of scenes that training does not see, or else the own data."""
        scenes = self.dataset.scenes
        if scenes is None:
            return self.dataset
        return Mixture([type(scenes)(scenes.size, self.c.seed, "val", scenes.tasks, scenes.grid,
                                     count)])

    def validation_batch(self, count):
        """Return the tensors of up to `count` unseen samples of the model's size."""
        data = self.unseen(count)
        return self.load(data, *data.samples(count, validation=True))

    def load(self, data, source, index):
        """Return the tensors of samples of a Mixture, all in the model's size."""
        size = self.model.config.size
        bucket = Bucket(0, size, size, self.model.config.max_tokens)
        (_, tensors, _), = self.loader(data).batches([Batch(source, index, bucket)])
        return tensors


class VaeStage(Stage):
    """The autoencoder: it learns to reconstruct pictures."""

    def trained(self):
        return self.model.vae

    def count_lengths(self):
        return [0] * len(self.dataset.sources)

    def inputs(self, step):
        (pictures,) = self.next_batch()
        sides = [side // self.model.vae.factor for side in pictures.shape[2:]]
        noise = torch.randn(self.c.batch, self.model.config.vae_channels, *sides,
                            generator=self.generator(step), device=self.world.device)
        return pictures, noise[self.share]

    def forward(self, pictures, noise):
        return self.model.vae.loss(pictures, noise, self.c.kl_weight)

    @torch.no_grad()
    def complete(self):
        """Measure the mean and deviation by which latents are normalised.

        In the small world this is done on validation pictures, of own data on training pictures:
        few of them may be held back.
        """
        vae = self.model.vae
        (self.val,) = self.validation_batch(200)
        self.val_latents = [vae.posterior(part)[0] for part in self.val.split(50)]
        latents = self.val_latents
        if not self.dataset.scenes:
            (pictures,) = self.load(self.dataset, *self.dataset.samples(200, validation=False))
            latents = [vae.posterior(part)[0] for part in pictures.split(50)]
        std, mean = torch.std_mean(torch.cat(latents), (0, 2, 3))
        vae.set_statistics(mean, std)

    @torch.no_grad()
    def validate(self, step, folder):
        vae = self.model.vae
        true = self.val
        reconstructed = torch.cat([vae.reconstruct(part) for part in self.val_latents])
        reconstructed = reconstructed.clamp(-1, 1)
        error = (reconstructed - true).square().mean()
        if self.world.first:
            save_sheet(folder / f"vae_{step:06d}.png", true[:8], reconstructed[:8])
        values = {"val_psnr": (10 * torch.log10(4 / error)).item()}
        if self.dataset.scenes:
            right, _ = scores.score_judge(100, vae=vae, seed=1, split="val")
            values["val_judge"] = right / 100
        return values


class UnderstandStage(Stage):
    """The small language model: next tokens of captions alone, and of texts about pictures."""

    def trained(self):
        return self.model.understanding

    def count_lengths(self):
        longest = self.model.config.max_tokens - 1  # without <eos>
        return [n + 1 for n in self.dataset.lengths(self.model.tokenizer, longest)]

    def inputs(self, step):
        return self.next_batch()

    def forward(self, pictures, captions, caption_targets, about, about_targets):
        U = self.model.understanding
        caption_loss, _ = U.loss(captions, caption_targets)
        picture_loss, metrics = U.loss(about, about_targets, pictures)
        metrics = {"caption_loss": caption_loss.detach(), "picture_loss": picture_loss.detach(),
                   **metrics}
        return caption_loss + picture_loss, metrics

    @torch.no_grad()
    def validate(self, step, folder):
        inputs = self.validation_batch(200)
        with autocast(self.world.device):
            loss, _ = self(*inputs)
        values = {"val_loss": loss.item()}
        if self.dataset.scenes:
            values["val_answers"] = scores.score_understanding(self.model, 400) / 400
        return values


class Flow(NamedTuple):
    """What `MoS.loss` takes for B samples.

    z0 and noise z1: (B, C, h, w), tokens: (B, S), t: (B,), explore: (B, S, M + 1, N) in [0, 1).
    """
    z0: torch.Tensor
    tokens: torch.Tensor
    t: torch.Tensor
    z1: torch.Tensor
    explore: torch.Tensor


class ImageStage(Stage):
    """The main stage: router and generation tower learn, on latents; everything else is frozen."""

    states = None  # a Producer or a Cache, where prompts' states are not made in the step

    def trained(self):
        return nn.ModuleList([self.model.router, self.model.generation])

    def used(self):
        return [self.model.understanding, self.trained()]

    def without_gradient(self):
        return [self.model.generation.reference]  # the mark on reference pictures, of edits

    # --- data ------------------------------------------------------------------------------------

    def begin(self, step):
        c = self.c
        self.ahead = deque()
        self.prepare()
        self.compare_with_vae()
        if c.states == "producer":
            self.states = Producer(self.model, c.init, c.tower_device or self.world.device)
        elif c.states != "step":
            captions = (text for source in self.dataset.sources for text in source.captions)
            self.states = Cache(c.states, self.model, captions, c.init, self.world)
        plan = super().begin(step)
        visual, context = np.max([self.token_counts(bucket) for bucket in plan.buckets], 0)
        self.world.print0(f"tokens a step, at most: {c.batch * visual:,} visual, "
                          f"{c.batch * context:,} context (with padding)")
        return plan

    def encoder(self):
        return partial(encode, self.model.vae)

    def prepare(self):
        """Encode or open the training latents, and keep up to 256 samples for validation."""
        c = self.c
        longest = self.model.config.max_tokens
        if c.latents == "memory":
            self.load_into_memory()
        elif c.latents != "step" and not isinstance(self.dataset.sources[0], Stored):
            pieces = self.dataset.pieces(longest)
            stored = store(Path(c.latents), self.dataset, self.loader(), pieces,
                           rules=Rules(c.max_broken, c.holdout), world=self.world)
            self.dataset = Mixture(stored, self.dataset.weights, self.dataset.scenes)
            self.prompt_lengths = self.count_lengths()
            self.broken = {}
        else:
            self.prompt_lengths = [
                count_tokens(self.model.tokenizer, source.captions, longest)
                if np.ndim(lengths) == 0 else lengths
                for lengths, source in zip(self.prompt_lengths, self.dataset.sources)]
        (z0, tokens), self.val_texts = self.validation_samples()
        self.val = z0, trim(tokens)

    def load_into_memory(self):
        """Encode all pictures and keep the latents on the device."""
        pieces = [piece for piece in self.dataset.pieces(self.model.config.max_tokens)
                  if not self.dataset.is_validation(piece)]
        self.memory = Memory(self.dataset, self.loader().batches(pieces), self.world.device)
        self.prompt_lengths = self.memory.lengths()
        self.world.print0(f"encoded {sum(len(piece.index) for piece in pieces)} samples")

    def batches_from(self, planned):
        if self.c.latents == "memory":
            return self.memory.batches(planned, self.share)
        return super().batches_from(planned)

    def token_counts(self, bucket):
        """Return the visual and the context tokens of a sample."""
        side = self.model.vae.factor * self.model.config.gen_patch  # of a visual token, in pixels
        return bucket.height * bucket.width // side ** 2, bucket.length

    # --- one step --------------------------------------------------------------------------------

    def inputs(self, step):
        """Return this process's latents and prompts of a step, and all that is random."""
        if not self.states:
            z0, tokens = self.next_batch()
            return self.random_inputs(z0, tokens, self.generator(step))
        return self.inputs_with_states(step)

    def random_inputs(self, z0, tokens, generator, image_tokens=0, empty_ids=None):
        """Draw t, noise, exploration and prompt dropout for the global batch.

        image_tokens: how many stand before each text. empty_ids: the token ids of a dropped text,
        None: of a prompt. Returns the Flow of this process's slice.
        """
        empty_ids = self.empty_ids if empty_ids is None else empty_ids
        m = self.model.config
        c = self.c
        share = self.share
        options = dict(generator=generator, device=generator.device)
        t = sample_t(c.batch, m.t_sampling, m.shift, generator)               # (batch,)
        z1 = torch.randn(c.batch, *z0.shape[1:], **options)
        explore = torch.rand(c.batch, image_tokens + tokens.shape[1], m.und_depth + 1, m.gen_depth,
                             **options)
        dropped = torch.rand(c.batch, **options) < c.prompt_dropout           # (batch,)
        empty = torch.full_like(tokens, Tokenizer.PAD)                        # (B, S)
        empty[:, :len(empty_ids)] = empty_ids
        tokens = torch.where(dropped[share, None], empty, tokens)             # (B, S)
        # Copies: a slice would keep what the other processes need in memory.
        return Flow(z0, tokens, t[share], z1[share].clone(), explore[share].clone())

    @cached_property
    def empty_ids(self):
        """The token ids of the empty prompt."""
        return torch.tensor(self.model.tokenizer.encode(""), device=self.world.device)

    def forward(self, z0, tokens, t, z1, explore, *states):
        """The fields of a Flow; states: the prompts' embeddings and states, if made elsewhere."""
        context = None
        if states:
            context = Context(states[0], *cast(states[1]), Keys(tokens != Tokenizer.PAD))
        losses = self.model.loss(z0, tokens, t, z1, explore, context)             # (B,)
        return losses.mean(), self.losses_by_bin(losses.detach(), t)

    def losses_by_bin(self, losses, t):
        """Return sums of the losses (B,) in ten bins of their times t (B,), and their counts."""
        bins = nn.functional.one_hot((t * 10).long().clamp(max=9), 10).type_as(losses)  # (B, 10)
        return {"bins": losses @ bins, "counts": bins.sum(0)}

    def inputs_with_states(self, step):
        """Return the inputs of a step and the states of its prompts, which are asked for ahead."""
        while len(self.ahead) <= self.states.ahead and step + len(self.ahead) < self.c.steps:
            z0, tokens = self.next_batch()
            flow = self.random_inputs(z0, tokens, self.generator(step + len(self.ahead)))
            self.ahead.append(flow)
            self.states.ask(flow.tokens)
        return *self.ahead.popleft(), *self.states.answer(self.world.device)

    # --- log -------------------------------------------------------------------------------------

    def average_metrics(self, sums, steps):
        means = (sums["bins"] / sums["counts"]).tolist()
        return {f"loss_t{i}": mean for i, mean in enumerate(means)}

    def flops(self):
        """Three forward passes a sample, as usual: backward counts two. Recomputation is left out.
        """
        samples = self.c.batch / self.world.size
        return sum(3 * samples * self.sample_flops(batch.bucket) for batch in self.seen)

    def sample_flops(self, bucket):
        """Return the forward FLOP of one sample of a bucket."""
        factor = self.model.vae.factor
        size = bucket.height // factor, bucket.width // factor
        return self.model.flops(bucket.length, size)

    # --- validation ------------------------------------------------------------------------------

    def validation_samples(self):
        """Return the tensors and texts of up to 256 samples of one source and size.

        Training does not see them, unless none of the own pictures are held back.
        """
        data = self.unseen(256)
        pieces = data.pieces(self.model.config.max_tokens)
        pieces = [piece for piece in pieces if data.is_validation(piece)] or \
            [piece for piece in pieces if piece.source[0] == 0]
        return self.load_largest(data, pieces, 256)

    def load_largest(self, data, pieces, most):
        """Return the tensors and texts of the largest piece's first samples, at most so many."""
        piece = max(pieces, key=lambda piece: len(piece.index))
        piece = piece._replace(source=piece.source[:most], index=piece.index[:most])
        (_, tensors, texts), = self.loader(data).batches([piece])
        return tensors, texts

    def compare_with_vae(self):
        """Print a warning where own pictures are unlike those that the VAE was trained on.

        The latents of the latter have mean 0 and standard deviation 1 in each channel. A warning
        comes where, averaged over the channels, the mean is more than 0.5 away from 0, or the
        deviation is outside 0.5 to 2.
        """
        data = self.dataset
        pieces = [piece for piece in data.pieces(self.model.config.max_tokens)
                  if piece.bucket.kind and not data.is_validation(piece)]
        if not pieces:
            return
        (latents, *_), _ = self.load_largest(data, pieces, 64)
        std, mean = torch.std_mean(latents.movedim(-3, 0).flatten(1), 1)       # (C,) each
        mean = mean.abs().mean().item()
        std = std.mean().item()
        if mean > 0.5 or not 0.5 <= std <= 2:
            self.world.print0(f"warning: the VAE was not trained on pictures like these: their "
                              f"latents' mean is {mean:.2f} away from 0, and their standard "
                              f"deviation is {std:.2f}, not 1 (averages over the channels); train "
                              "it on them first (--stage vae), or take another (--vae-folder)")

    @torch.no_grad()
    def routing(self):
        """Return the router's entropy in nats (N,), and how often each layer is chosen (N, M).

        At t = 1/2, over the real tokens of the validation prompts.
        """
        model = self.model
        z0, tokens = self.val
        z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0.device)
        with autocast(self.world.device):
            context = model.understand(tokens)
            x, positions = model.generation.patchify((z0 + z1) / 2)     # (B, T, Dg), (T, 3)
            t = torch.full_like(z0[:, 0, 0, 0], 0.5)                              # (B,)
            weights = model.route(x, positions, t, context)
        weights = weights[context.keys.mask]                                           # (P, M, N)
        chosen = torch.zeros_like(weights).scatter(1, weights.topk(model.config.k, 1).indices, 1)
        return torch.special.entr(weights).sum(1).mean(0), chosen.mean(0).T

    @torch.no_grad()
    def validate(self, step, folder):
        losses = scores.losses_by_time(self.model, *self.val).mean(1)
        values = {"val_loss": losses.mean().item()}
        values |= {f"val_t{i}": loss for i, loss in enumerate(losses.tolist())}
        entropy, usage = self.routing()
        values |= {f"entropy_{j}": value for j, value in enumerate(entropy.tolist())}
        for j, shares in enumerate(usage.tolist()):
            values |= {f"usage_{j}_{m}": share for m, share in enumerate(shares)}
        trained = getattr(self.dataset.scenes, "tasks", ())
        tasks = [task for task in shapes.TASKS if task in trained]  # "dense" has no benchmark
        prompts = [text for text, _ in self.val_texts[:8]]
        if tasks:
            prompts = [prompt.text for task in tasks
                       for prompt in shapes.benchmark(task, 24 // len(tasks), 9)]
            table = scores.score_tasks(self.model, self.c.eval_prompts, 1, seed=7, batch=256,
                                       splits=("seen",), tasks=tasks, steps=25)
            values["score"] = scores.overall(table, "seen")
            for task, row in table.items():
                right, count, _ = row["seen"]
                values[f"score_{task.replace(' ', '_')}"] = right / count
        images = self.model.generate(prompts, seed=0, steps=25)
        if self.world.first:
            rows = [images[i:i + 8] for i in range(0, len(images), 8)]
            save_sheet(folder / f"{self.c.stage}_{step:06d}.png", *rows)
        return values


class EditStage(ImageStage):
    """Edits (MoS sec. 3.4), and pictures from text so that these are not unlearned: half and half.

    The stage's own batch counts pairs of both. Prompt dropout takes the instruction from an edit,
    and its picture stays; in the other half nothing stays: guidance with two scales compares them.
    A sample has three pictures: before and after the edit, and the one to be drawn from text. In
    the small world their latents stay in memory, and the picture that the tower reads is drawn
    anew. Own pictures are read and encoded when their batch comes. Raises ValueError for a tower
    that reads no pictures.
    """

    samples_per_row = 2

    def __init__(self, model, dataset, c, world):
        self.sees = "understanding" in model.config.edit_inputs  # whether the tower reads pictures
        if self.sees and not model.understanding.vision:
            raise ValueError("stage edit needs an understanding tower that reads pictures (see "
                             "--und-images), or --edit-inputs generation")
        latents = "memory" if dataset is None or dataset.scenes else "step"
        c = replace(c, batch=c.batch // 2, latents=latents, states="step")
        super().__init__(model, dataset, c, world)

    @cached_property
    def placeholders(self):
        """The number of image tokens that an instruction itself must hold, see `Understanding`."""
        U = self.model.understanding
        return U.vision.tokens if self.sees and U.image_token is not None else 0

    @cached_property
    def empty_instruction(self):
        """The token ids of the empty instruction, which the picture's placeholders precede."""
        ids = self.model.tokenizer.encode("", self.placeholders)
        return torch.tensor(ids, device=self.world.device)

    def image_tokens(self, height, width):
        """Return the number of image tokens that stand before an instruction."""
        if self.placeholders or not self.sees:
            return 0
        return height * width // self.model.understanding.vision.patch ** 2

    def count_lengths(self):
        lengths = super().count_lengths()
        if self.dataset.scenes:  # whose texts are not known yet
            return lengths
        source, = self.dataset.sources
        instructions = count_tokens(self.model.tokenizer, source.instructions,
                                    self.model.config.max_tokens, self.placeholders)
        return [np.maximum(*lengths, instructions)]

    def without_gradient(self):
        uses_reference = "generation" in self.model.config.edit_inputs
        return [] if uses_reference else super().without_gradient()

    def token_counts(self, bucket):
        visual, context = super().token_counts(bucket)
        before = self.image_tokens(bucket.height, bucket.width)
        return 3 * visual, 2 * context + self.placeholders + before

    def encoder(self):
        def encode_three(pictures):
            latents = encode(self.model.vae, pictures.flatten(0, 1))            # (3*B, C, h, w)
            return latents.unflatten(0, (-1, 3))                                # (B, 3, C, h, w)
        return encode_three

    def prepare(self):
        if self.c.latents == "memory":
            self.load_into_memory()
        tensors, self.val_texts = self.validation_samples()
        latents, prompts, sources, instructions = tensors
        before, after, scene = latents.unbind(1)                                # (B, C, h, w) each
        self.val = scene, trim(prompts)
        self.val_edits = after, trim(instructions), self.images(sources), before
        self.val_sources = sources[:8]

    def load_into_memory(self):
        super().load_into_memory()
        _, self.sources, instructions = self.memory.tables
        self.instructions = trim(instructions).to(self.world.device)
        lengths = (instructions != Tokenizer.PAD).sum(1).numpy() - self.placeholders
        self.prompt_lengths = [np.maximum(lengths, *self.prompt_lengths)]

    def batches_from(self, planned):
        for batch, (latents, prompts, *others), *_ in super().batches_from(planned):
            sources, instructions = others or self.from_memory(batch)
            yield batch, (latents, prompts, self.images(sources), instructions)

    def from_memory(self, batch):
        """Return the packed scenes that a batch edits, and its instructions."""
        index = torch.from_numpy(batch.index[self.share])
        length = batch.bucket.length + self.placeholders
        rows = index.to(self.world.device, non_blocking=True)
        return self.sources[index], self.instructions[rows, :length]

    def images(self, sources):
        """Return the pictures (B, 3, H, W) that the tower reads, from what the data set holds."""
        images = self.dataset.sources[0].to_pixels(sources, self.world.device)    # (B, 3, H, W)
        if self.placeholders:
            images, _ = self.model.understanding.vision.resize(images)
        return images

    def inputs(self, step):
        """Return the Flow of pictures from text, then images, reference and Flow of edits: flat."""
        latents, prompts, images, instructions = self.next_batch()
        before, after, scene = latents.unbind(1)                                # (B, C, h, w) each
        generator = self.generator(step)
        drawing = self.random_inputs(scene, prompts, generator)
        before_text = self.image_tokens(*images.shape[2:])
        editing = self.random_inputs(after, instructions, generator, before_text,
                                     self.empty_instruction)
        return *drawing, images, before, *editing

    def forward(self, *inputs):
        drawing = Flow(*inputs[:5])
        images, reference = inputs[5:7]
        editing = Flow(*inputs[7:])
        drawn = self.model.loss(*drawing)                                         # (B,)
        edited = self.model.loss(*editing, images=images, reference=reference)    # (B,)
        losses = torch.cat((drawn, edited))                                       # (2*B,)
        t = torch.cat((drawing.t, editing.t))                                     # (2*B,)
        means = {"draw": drawn.mean().detach(), "edit": edited.mean().detach()}
        return losses.mean(), means | self.losses_by_bin(losses.detach(), t)

    def average_metrics(self, sums, steps):
        means = Stage.average_metrics(self, {"draw_loss": sums["draw"], "edit_loss": sums["edit"]},
                                      steps)
        return super().average_metrics(sums, steps) | means

    def sample_flops(self, bucket):
        factor = self.model.vae.factor
        size = bucket.height // factor, bucket.width // factor
        length = self.placeholders + bucket.length
        if self.c.latents == "memory":
            length = min(length, self.instructions.shape[1])
        length += self.image_tokens(bucket.height, bucket.width)
        edit = self.model.flops(length, size, edit=True)
        return super().sample_flops(bucket) + edit

    @torch.no_grad()
    def validate(self, step, folder):
        values = super().validate(step, folder)
        losses = scores.losses_by_time(self.model, *self.val_edits).mean(1)
        values["val_edit"] = losses.mean().item()
        values |= {f"edit_t{i}": loss for i, loss in enumerate(losses.tolist())}
        if self.dataset.scenes:
            table = scores.score_edits(self.model, self.c.eval_prompts, seed=9, splits=("seen",),
                                       steps=25)
            values["edits"] = scores.overall(table, "seen, both")
            for kind, rows in table.items():
                right, count, _ = rows["seen, both"]
                values[f"edits_{kind}"] = right / count
        before, texts, wanted = self.examples()
        after = self.model.edit(before, texts, steps=25)
        if self.world.first:
            save_sheet(folder / f"edited_{step:06d}.png", before, after, *wanted)
        return values

    def examples(self):
        """Return pictures to edit, instructions, and rows of what the pictures should become.

        In the small world these are one edit of each type, and no row. Of own data they are the
        first edits that are kept for validation, and one row.
        """
        if self.dataset.scenes:
            examples = [edits.edit_benchmark(kind, 1)[0] for kind in edits.TYPES]
            size = self.model.config.size
            scenes = shapes.pack([example.source for example in examples])
            before = shapes.render(scenes, size, size)
            return list(map(to_image, before)), [example.text for example in examples], []
        source, = self.dataset.sources
        before = source.to_pixels(self.val_sources, self.world.device)
        wanted = self.model.vae.decode(self.val_edits[0][:8])
        texts = [instruction for _, instruction in self.val_texts[:8]]
        return list(map(to_image, before)), texts, [wanted]


KINDS = {"vae": VaeStage, "understand": UnderstandStage, "image": ImageStage, "edit": EditStage}


def trim(tokens):
    """Return token ids (B, S) without the columns that are padding in every row."""
    return tokens[:, :(tokens != Tokenizer.PAD).any(0).sum()]


def save_sheet(path, *rows):
    """Write rows of pictures, tensors (3, H, W) or PIL images, as one PNG, or print why not."""
    rows = [[to_image(picture) if isinstance(picture, torch.Tensor) else picture
             for picture in row] for row in rows]
    with going_on(f"write {path}"), replacing(path) as temporary:
        contact_sheet(rows).save(temporary, "PNG")
