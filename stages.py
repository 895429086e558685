"""What one step of each training stage computes: its loss as a module, its data, its validation.

All randomness is a function of seed and step, and drawn for the global batch, so that the number of
processes and a resume change nothing.
"""

import functools
import time

import torch
import torch.nn as nn
from PIL import Image

import estimate
import evaluate
import shapes
from common import autocast, replacing
from data import Collate, Folder, Shapes, loader
from mos import sample_t
from towers import Tokenizer


@functools.lru_cache(2)
def permutation(length, seed, epoch):
    """The order of one epoch."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def order(step, batch, length, seed):
    """Sample indices of a global step: every epoch is a new permutation, epochs join seamlessly."""
    place = torch.arange(step * batch, (step + 1) * batch)
    epochs = place // length
    return torch.cat([permutation(length, seed, int(epoch))[place[epochs == epoch] % length]
                      for epoch in epochs.unique()])


class Stage(nn.Module):
    """One stage's loss as a module (so that DDP and compile can wrap it) and its data."""

    def __init__(self, model, dataset, c, world):
        super().__init__()
        self.c, self.world, self.dataset = c, world, dataset
        self.__dict__["model"] = model  # not a child: a stage owns what its `forward` uses
        self.parts = nn.ModuleList(self.used())

    def used(self):
        """The parts that `forward` needs."""
        return [self.trained()]

    def flops(self, *inputs):
        """Forward FLOP of a micro-batch, of what is trained; 0: not counted."""
        return 0

    def generator(self, step):
        return torch.Generator(self.world.device).manual_seed(self.c.seed * 1_000_003 + step)

    def start(self, step):
        """Open a data loader whose first batch is that of `step`."""
        collate = Collate(self.c.stage, self.model.tokenizer, self.model.config.max_tokens)
        mine = self.world.share(self.c.batch)
        if isinstance(self.dataset, Folder):
            batches = (order(s, self.c.batch, len(self.dataset), self.c.seed)[mine].tolist()
                       for s in range(step, self.c.steps))
        else:  # the small world never repeats
            batches = (range(s * self.c.batch + mine.start, s * self.c.batch + mine.stop)
                       for s in range(step, self.c.steps))
        self.loader = iter(loader(self.dataset, list(batches), collate, self.c.workers))

    def next(self):
        """The next batch of this process, on its device, pictures drawn."""
        pictures, *rest = next(self.loader)
        return (self.dataset.draw(pictures, self.world.device),
                *(a.to(self.world.device) for a in rest))

    def report(self, sums, steps):
        """Log values from the metrics' sums over steps and processes."""
        return {name: (value / steps / self.world.size).item() for name, value in sums.items()}

    def validation_items(self, number):
        """Items that training does not see: the validation split, or the folder itself."""
        dataset = self.dataset
        if isinstance(dataset, Shapes):
            dataset = Shapes(dataset.size, self.c.seed, "val", dataset.tasks, dataset.grid)
        number = min(number, len(dataset)) if isinstance(dataset, Folder) else number
        return [dataset[i] for i in range(number)]


class VaeStage(Stage):
    """Reconstruct pictures that are drawn as they are needed."""

    def trained(self):
        return self.model.vae

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
        vae, items = self.model.vae, self.validation_items(200)
        true = self.dataset.draw(torch.stack([i[0] for i in items]), self.world.device)
        latents = [vae.posterior(part)[0] for part in true.split(50)]
        seen = torch.cat([vae.reconstruct(part) for part in latents]).clamp(-1, 1)
        error = (seen - true).square().mean()
        std, mean = torch.std_mean(torch.cat(latents), (0, 2, 3))
        vae.set_statistics(mean, std)
        if self.world.first:
            save_grid(torch.cat((true[:8], seen[:8])), folder / f"vae_{step:06d}.png", 8)
        values = {"val_psnr": (10 * torch.log10(4 / error)).item()}
        if isinstance(self.dataset, Shapes):
            right, _ = evaluate.score_judge(100, vae=vae, seed=1, split="val")
            values["val_judge"] = right / 100
        return values


class UnderstandStage(Stage):
    """Next token of captions alone, and of descriptions of and answers about pictures."""

    def trained(self):
        return self.model.understanding

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
        collate = Collate("understand", self.model.tokenizer, self.model.config.max_tokens)
        pictures, *rest = collate(self.validation_items(200))
        with autocast(self.world.device):
            loss, _ = self(self.dataset.draw(pictures, self.world.device),
                           *(a.to(self.world.device) for a in rest))
        values = {"val_loss": loss.item()}
        if isinstance(self.dataset, Shapes):
            values["val_answers"] = evaluate.score_understanding(self.model, 400) / 400
        return values


class ImageStage(Stage):
    """The main stage: router and generation tower on stored latents, everything else frozen."""

    def trained(self):
        return nn.ModuleList([self.model.router, self.model.generation])

    def used(self):
        return [self.model.understanding, self.trained()]

    @torch.no_grad()
    def encode(self, dataset, indices):
        """Latents (L, C, h, w) and prompts (L, S) of these items; the VAE runs in fp32."""
        collate = Collate("image", self.model.tokenizer, self.model.config.max_tokens)
        size = 500 if self.world.device.type == "cuda" else 50
        batches = [indices[i:i + size] for i in range(0, len(indices), size)]
        latents, tokens = [], []
        for pictures, prompts in loader(dataset, batches, collate, self.c.workers):
            latents.append(self.model.vae.encode(dataset.draw(pictures, self.world.device)))
            tokens.append(prompts)
        tokens = torch.cat(tokens)                                                # (L, S)
        longest = (tokens != Tokenizer.PAD).any(0).sum()
        return torch.cat(latents), tokens[:, :longest].to(self.world.device)

    def start(self, step):
        begin, self.costs = time.time(), {}
        number = len(self.dataset) if isinstance(self.dataset, Folder) else self.c.scenes
        self.latents, self.tokens = self.encode(self.dataset, range(number))
        if isinstance(self.dataset, Shapes):
            val = Shapes(self.dataset.size, self.c.seed, "val", self.c.tasks, self.c.grid)
            self.val = self.encode(val, range(256))
        else:
            self.val = self.latents[:256], self.tokens[:256]
        visual = self.latents[0, 0].numel() // self.model.config.gen_patch ** 2
        self.world.say(f"encoded {number} pictures in {time.time() - begin:.0f} s | tokens a step: "
                       f"{self.c.batch * visual:,} visual, {self.c.batch * self.tokens.shape[1]:,} "
                       "context (with padding)")

    def draws(self, batch, tokens, generator):
        """Times, noise, exploration and prompt dropout of a global batch; this process's share."""
        m, c, mine = self.model.config, self.c, self.world.share(batch)
        source = dict(generator=generator, device=generator.device)
        t = sample_t(batch, m.t_sampling, m.shift, generator)
        z1 = torch.randn(batch, *self.latents.shape[1:], **source)
        explore = torch.rand(batch, tokens.shape[1], m.und_depth + 1, m.gen_depth, **source)
        empty = (torch.rand(batch, **source) < c.prompt_dropout)[mine, None]
        blank = tokens.clone()
        blank[:, 1:] = Tokenizer.PAD  # <bos> stays
        return torch.where(empty, blank, tokens), t[mine], z1[mine], explore[mine]

    def inputs(self, step):
        index = order(step, self.c.batch, len(self.latents), self.c.seed)
        index = index[self.world.share(self.c.batch)].to(self.world.device)
        draws = self.draws(self.c.batch, self.tokens[index], self.generator(step))
        return self.latents[index], *draws

    def forward(self, z0, tokens, t, z1, explore):
        each = self.model.loss(z0, tokens, t, z1, explore)                        # (B,)
        bins = nn.functional.one_hot((t.detach() * 10).long().clamp(max=9), 10).type_as(each)
        return each.mean(), {"bins": each.detach() @ bins, "counts": bins.sum(0)}

    def flops(self, z0, tokens, *_):
        shape = tokens.shape[1], tuple(z0.shape[2:])
        if shape not in self.costs:
            self.costs[shape] = estimate.forward_flops(self.model.config, *shape)
        return len(z0) * self.costs[shape]

    def report(self, sums, steps):
        means = (sums["bins"] / sums["counts"]).tolist()
        return {f"loss_t{i}": mean for i, mean in enumerate(means)}

    @torch.no_grad()
    def losses_by_time(self):
        """Validation loss at t = (i + 0.5) / 8, with fixed noise: (8,)."""
        z0, tokens = self.val
        z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1)).to(z0.device)
        times = (torch.full_like(z0[:, 0, 0, 0], (i + 0.5) / 8) for i in range(8))
        with autocast(self.world.device):
            return torch.stack([self.model.loss(z0, tokens, t, z1).mean() for t in times])

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
        tasks = [task for task in shapes.TASKS if task in getattr(self.dataset, "tasks", ())]
        if tasks:  # "dense" has no benchmark
            prompts = [p.text for task in tasks
                       for p in shapes.benchmark(task, 24 // len(tasks), 9)]
            table = evaluate.score_tasks(self.model, self.c.eval_prompts, 1, seed=7, batch=256,
                                         held=(False,), tasks=tasks, steps=25)
            values["score"] = evaluate.overall(table, "seen")
            values |= {f"score_{task.replace(' ', '_')}": row["seen"][0] / row["seen"][1]
                       for task, row in table.items()}
        else:
            prompts = [item[1] for item in self.validation_items(8)]
        images = self.model.generate(prompts, seed=0, steps=25)
        if self.world.first:
            save_grid(torch.stack([evaluate.to_tensor(image) for image in images]),
                      folder / f"image_{step:06d}.png", 8)
        return values


KINDS = {"vae": VaeStage, "understand": UnderstandStage, "image": ImageStage}


def save_grid(pictures, path, columns):
    """Pictures (B, 3, H, W) in [-1, 1] as one PNG, row by row."""
    B, _, H, W = pictures.shape
    sheet = Image.new("RGB", (columns * W, -(-B // columns) * H))
    for i, p in enumerate(((pictures.cpu() + 1) * 127.5).round().byte().permute(0, 2, 3, 1)):
        sheet.paste(Image.fromarray(p.numpy()), (i % columns * W, i // columns * H))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
