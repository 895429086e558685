"""Train a MoS from nothing: the VAE, the understanding tower, then to draw, then to edit.

    python train.py                                      # all stages, recipe tiny or laptop
    torchrun --nproc-per-node 8 train.py                 # the same on eight GPUs
    python train.py --data my_pictures --out runs/mine   # own pictures

From here the path leads to:

    recipe and flags -> settings of each stage     config.py, recipes/
    data             -> batches                    data/sources.py, data/latents.py
    batch            -> loss                       stages.py, and from there mos.py: MoS.loss
    loss             -> optimizer step, average    Trainer.step, below
    weights          -> checkpoints, model folder  checkpoint.py
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from common import (CommandLine, World, going_on, interruption, local_bytes, peak_memory,
                    pick_device, product_rate, revision, run, tqdm_or_none)
from config import (DEFAULT_OUT, GENERATING, MoSConfig, TrainConfig, model_config, plan,
                    read_recipe, values_by_stage, write_all_settings, write_settings)
from data.sources import build_tokenizer, open_sources
from kernels import NARROW, autocast, fused
from mos import MoS
from stages import KINDS
from towers import Tokenizer

# --- Optimization ---------------------------------------------------------------------------------

def decayed_groups(module, weight_decay):
    """Return AdamW's two groups: matrices decay; norms, biases, registers, embeddings do not."""
    decay, rest = [], []
    for name, p in module.named_parameters():
        plain = p.ndim < 2 or "registers" in name or "embedding" in name or "gamma" in name
        (rest if plain else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def learning_rate(step, c):
    """Return the rate of a step: linear warm-up, then a cosine to final_lr * lr. MoS App. A.

    NOTE (ours): a short run warms up for a tenth of its steps at most.
    """
    warmup = min(c.warmup, c.steps // 10)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, c.steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return c.lr * (c.final_lr + (1 - c.final_lr) * cosine)


class Average:
    """An exponential moving average of parameters; with decay 0 it is the parameters themselves."""

    def __init__(self, parameters, decay):
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        """Move the average towards the parameters; a young average moves faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Put the averaged weights into the model within this block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange values, not tensors: FSDP knows its shards by their memory."""
        for p, shadow in zip(self.parameters, self.shadow):
            kept = p.clone()
            p.copy_(shadow)
            shadow.copy_(kept)


def shard(stage, mesh):
    """Cut the parts that a stage uses into shards, a block at a time (FSDP2). MoS App. A.

    Shards are fp32; on a GPU they are gathered in bf16, and gradients are summed in fp32.
    """
    policy = MixedPrecisionPolicy()
    if mesh.device_type == "cuda":  # times, noise and targets keep their type
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh, mp_policy=policy)
    for part in stage.used():
        for name, module in list(part.named_modules()):
            if re.search(r"blocks\.\d+$", name):
                fully_shard(module, **options)
        if not any(p.requires_grad for p in part.parameters()):  # frozen: a type of its own
            fully_shard(part, **options)
            register_fsdp_forward_method(part, "embed")
    fully_shard(stage, reshard_after_forward=False, **options)


# --- One stage ------------------------------------------------------------------------------------

class Trainer:
    """A stage in training: its optimizer, averaged weights and log, from the last checkpoint on."""

    def __init__(self, stage, c, model):
        self.stage, self.c, self.model = stage, c, model
        self.world, self.folder = stage.world, Path(c.out)
        model.requires_grad_(False)
        self.module = stage.trained().requires_grad_(True).train()
        for p in stage.without_gradient():
            p.requires_grad_(False)
        self.sharded = c.parallel in ("fsdp", "hsdp")
        if self.sharded:
            shard(stage, self.world.mesh(c))
        checkpoint.load_or_initialise(stage, c)  # after sharding: no process ever holds it all
        self.named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.average = Average((p for _, p in self.named), c.ema)
        self.optimizer = torch.optim.AdamW(decayed_groups(self.module, c.weight_decay), lr=c.lr,
                                           betas=(0.9, 0.95),
                                           fused=self.world.device.type == "cuda")
        micro_batch = max(c.micro_batch, stage.samples_per_row)
        self.accumulate = -(-c.batch // (self.world.size * micro_batch))
        if c.batch % (self.world.size * self.accumulate * stage.samples_per_row):
            raise ValueError(f"batch {c.batch} cannot be cut into {self.world.size} processes x "
                             f"{self.accumulate} equal micro-batches" + " of pairs"
                             * (stage.samples_per_row > 1) + "; change batch or micro_batch")
        self.run = self.world.gather(
            checkpoint.describe_run(c, model, stage.dataset) if self.world.first else {})
        self.writer = checkpoint.Writer(checkpoint.folder_of(c), self.world, c.keep, self.run)
        self.first_step = 0

    def resume(self, last):
        """Go on from a checkpoint. Raises ValueError where it is not one of the same run."""
        checkpoint.check_same_run(last, self.run)
        self.first_step = checkpoint.load(last, self.tensors())
        for values in self.optimizer.state.values():
            values["step"].fill_(self.first_step)

    def tensors(self):
        """Return all that a bit-exact resume needs, by name; random states follow from the step."""
        if not self.optimizer.state:  # as AdamW itself does at its first step
            device = self.world.device if self.optimizer.defaults["fused"] else "cpu"
            for _, p in self.named:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p)}
        named = {}
        for (name, p), shadow in zip(self.named, self.average.shadow):
            named[f"weight/{name}"] = p.detach()
            named[f"average/{name}"] = shadow
            for moment in ("exp_avg", "exp_avg_sq"):
                named[f"{moment}/{name}"] = self.optimizer.state[p][moment]
        return named

    def begin(self):
        """Open data, log and bar; wrap the stage for several processes and for the compiler."""
        c = self.c
        self.stage.begin(self.first_step)
        self.wrapped = DistributedDataParallel(self.stage) if c.parallel == "ddp" else self.stage
        self.compute = torch.compile(self.wrapped) if c.compile else self.wrapped
        self.log = checkpoint.Log(self.folder / f"{c.stage}.csv", self.first_step)
        self.bar = tqdm_or_none(total=c.steps, initial=self.first_step, mininterval=5,
                                disable=not self.world.first)
        self.product_rate = product_rate(self.world.device)
        self.reset(self.first_step)

    def reset(self, step):
        """Begin to collect the next row of the log."""
        self.sums = {}
        self.row_start = step
        self.waited = 0.0
        self.clock = time.time()

    def step(self, step):
        """One optimizer step: batch, loss, backward, clip, step, average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.c)
        begin = time.time()
        inputs = [tensor.chunk(self.accumulate) for tensor in self.stage.inputs(step)]
        self.waited += time.time() - begin
        for i, micro_batch in enumerate(zip(*inputs)):
            self.synchronise(i == self.accumulate - 1)
            with autocast(self.world.device):
                loss, metrics = self.compute(*micro_batch)  # see stages.py
            (loss / self.accumulate).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                self.sums[name] = self.sums.get(name, 0) + value / self.accumulate
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.c.clip)
        norm = norm.full_tensor() if self.sharded else norm
        self.sums["grad_norm"] = self.sums.get("grad_norm", 0) + norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)

    def synchronise(self, last):
        """Let processes exchange gradients only at the last micro-batch of a step."""
        if self.sharded:
            self.stage.set_requires_gradient_sync(last)
        elif self.c.parallel == "ddp":
            self.wrapped.require_backward_grad_sync = last  # as DDP's own no_sync() does

    def train(self):
        """Train, log, validate and save. Returns whether training may go on.

        Raises OSError where the last checkpoint or the model could not be written.
        """
        c = self.c
        with interruption() as interrupted, self.bar or contextlib.nullcontext():
            for step in range(self.first_step, c.steps):
                self.step(step)
                done = step + 1
                last = done == c.steps
                stop = self.world.any(interrupted, done)
                save = done % c.save_every == 0 or last or stop
                if save or done % c.log_every == 0 or done % c.eval_every == 0:
                    self.write_row(done)  # before saving: it stops at a loss that is not finite
                if save:
                    self.writer.save(done, self.tensors())
                    self.clock = time.time()
                if last or stop:
                    self.writer.wait()  # before anything else can fail
                if done % c.eval_every == 0 or last:
                    self.validate(done)
                if stop:
                    break
        remedy = f"make room in {c.out}, then: python train.py --resume --out {c.out}"
        if self.writer.fault:
            raise OSError(f"{self.writer.fault}; {remedy}")
        if not last:
            self.world.print0(f"\nstopped at step {done}; go on with --resume; --export writes the "
                              "model of this step, to draw with")
            return False
        if self.world.first and checkpoint.exported_step(c) < c.steps:
            raise OSError(f"the model could not be exported; {remedy}")
        self.world.print0(f"peak memory {peak_memory(self.world.device) / 2**30:.2f} GiB")
        if self.world.any(interrupted, 0):  # in the last validation
            self.world.print0(f"stopped at the end of stage {c.stage}; go on with --resume")
            return False
        return True

    def write_row(self, step):
        """Write the averages since the last row; end the run where the loss is not finite."""
        steps = step - self.row_start
        world = self.world
        self.writer.check()
        loss = (world.sum(self.sums.pop("loss")) / steps / world.size).item()
        norm = (self.sums.pop("grad_norm") / steps).item()
        if not math.isfinite(loss + norm):
            self.writer.wait()
            world.print0(f"the loss is {loss}, its gradient's norm {norm} at step {step}; try a "
                         "smaller --lr; the checkpoints of earlier steps stay")
            sys.exit(1)
        elapsed = time.time() - self.clock
        rate = steps * self.c.batch / elapsed
        mfu = self.stage.flops() / elapsed / self.product_rate
        sums = {name: world.sum(value) for name, value in self.sums.items()}
        values = self.stage.log_values()
        if world.first:
            self.log.add(step, lr=learning_rate(step - 1, self.c), loss=loss, grad_norm=norm,
                         images_per_s=rate, data_wait=self.waited / elapsed,
                         peak_gib=peak_memory(world.device) / 2**30,
                         **({"mfu": mfu} if mfu else {}),
                         **self.stage.average_metrics(sums, steps), **values)
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        self.reset(step)

    @contextlib.contextmanager
    def averaged(self):
        """Put the averaged weights into the model, in one piece if they are sharded."""
        with self.average.applied():
            if self.sharded:
                self.stage.unshard()
            yield
            if self.sharded:
                self.stage.reshard()

    def export(self, step):
        """Write the model with the weights that are in it now. Raises OSError."""
        self.stage.complete()
        checkpoint.save_model(self.model, self.folder, checkpoint.parts_to_write(self.c),
                              self.world.first, f"{self.c.stage} {step}")

    def validate(self, step):
        """Export the model with averaged weights and validate it; log and print the scores."""
        with self.averaged():
            with going_on(f"export the model to {self.folder}"):
                self.export(step)
            values = self.stage.validate(step, self.folder)
        if self.world.first:
            self.log.add(step, **values)
            shown = [f"{name} {value:.4g}" for name, value in values.items()
                     if not name.startswith(("usage", "entropy"))]
            self.world.print0(f"\n{self.c.stage} step {step}: {', '.join(shown)}")
        self.world.wait()
        self.clock = time.time()


def introduce(trainer):
    """Print the first lines of a log: what runs, on what, and what it will need."""
    c, world = trainer.c, trainer.world
    trainable = sum(p.numel() for p in trainer.module.parameters())
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kernels = "Triton kernels" if fused(next(trainer.module.parameters())) else "plain PyTorch"
    compiled = f"compiled (plain PyTorch below width {NARROW})" if c.compile else "eager"
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type
    world.print0(f"stage {c.stage} | revision {revision()} | torch {torch.__version__} | {device} "
                 f"x {world.size} | {kernels}, {compiled}")
    world.print0(f"model {json.dumps(asdict(trainer.model.config))}")
    world.print0(f"training {json.dumps(asdict(c))}")
    world.print0(f"parameters: {trainable:,} trainable, {parameters - trainable:,} frozen | global "
                 f"batch {c.batch} = {world.size} processes x {trainer.accumulate} accumulated")
    size = sum(local_bytes(p) * (5 if p.requires_grad else 1)
               for p in trainer.model.parameters() if not p.is_meta)
    world.print0(f"memory estimate: weights, gradients, AdamW and average {size / 2**20:.0f} MiB a "
                 "process, activations on top")


# --- The command ----------------------------------------------------------------------------------

def prepare(c, values, flags, world, resume=False, export=False):
    """Return the Trainer of a stage, with weights and the last checkpoint; nothing is written yet.

    values: the recipe's settings of the model. flags: {name: value} of those given on the command
    line. export: only to write the model, which needs no data but for the VAE's statistics.
    """
    world.choose_parallel(c)
    last = checkpoint.find_last(c, world, export) if resume or export else None
    config = model_config(c, values, flags)
    tokenizer = None
    if c.stage in GENERATING:  # before data is read, to refuse wrong frozen parts at once
        tokenizer = checkpoint.read_tokenizer(config, c.init)
        model = checkpoint.unloaded(MoS, config, tokenizer)
    dataset = None
    if not export or c.stage == "vae":  # its statistics are measured on pictures
        dataset = open_sources(c, config, world, tokenizer)
    if c.stage not in GENERATING:
        tokenizer = build_tokenizer(dataset) if dataset else \
            Tokenizer(checkpoint.read_run(last)["tokenizer"])
        model = checkpoint.unloaded(MoS, config, tokenizer)
    if c.stage in GENERATING and world.device.type == "cuda":
        model.understanding.bfloat16()  # MoS App. A
    for block in model.generation.blocks:
        block.recompute = c.recompute
    trainer = Trainer(KINDS[c.stage](model, dataset, c, world), c, model)
    if last:
        trainer.resume(last)
    return trainer


def run_stage(trainer, export=False):
    """Train a stage, or export the model of its last checkpoint. Returns whether it is finished."""
    c, world = trainer.c, trainer.world
    if export:
        with trainer.averaged():
            trainer.export(trainer.first_step)
        world.print0(f"wrote the model of stage {c.stage} at step {trainer.first_step} to {c.out}")
        return True
    if trainer.first_step >= c.steps:
        if checkpoint.exported_step(c) < trainer.first_step:  # the run ended before the export
            trainer.begin()
            trainer.validate(trainer.first_step)
        world.print0(f"stage {c.stage}: finished at step {trainer.first_step} already")
        return True
    if world.first:
        write_settings(c, trainer.model.config)
    introduce(trainer)
    trainer.begin()
    return trainer.train()


def parse(arguments=None):
    """Return {name: value} of the settings given, the recipe, whether to resume and to export."""
    machine = "tiny" if pick_device().type == "cuda" else "laptop"
    first = CommandLine("", add_help=False)
    first.add_argument("--recipe", default=machine)
    first.add_argument("--phase", default="")
    chosen, _ = first.parse_known_args(arguments)
    recipe = read_recipe(chosen.recipe, chosen.phase)
    parser = CommandLine(__doc__.split("\n\n")[0], formatter_class=argparse.HelpFormatter,
                         usage="train.py [--recipe NAME] [--resume | --export] [--SETTING ...]")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in "
                        "--out, with the settings that are kept there")
    parser.add_argument("--export", action="store_true", help="write the model of the "
                        "last checkpoint in --out, and stop")
    parser.add_settings(TrainConfig, "training", values_by_stage(recipe) | {"out": DEFAULT_OUT})
    parser.add_settings(MoSConfig, "model", recipe["model"])
    flags = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(arguments)).items()}
    return flags, recipe, flags.pop("resume"), flags.pop("export")


def main():
    """The command."""
    flags, recipe, resume, export = parse()
    runs = plan(flags, recipe, resume or export)
    if export:
        runs = [run for run in runs if checkpoint.folder_of(run[0]).is_dir()]
        if not runs:
            raise ValueError(f"no checkpoint in {flags.get('out', DEFAULT_OUT)} to export; train "
                             "first, or choose another --out")
    if not resume and not export:
        for c, _ in runs:
            checkpoint.check_free(c)
    world = World.join(runs[0][0].patience)
    torch.set_float32_matmul_precision("high")
    try:
        for number, (c, values) in enumerate(runs):
            exported = checkpoint.exported_step(c)
            if (resume or export and "stage" not in flags) and exported >= c.steps:
                where = f"at step {exported} " if exported < math.inf else ""
                world.print0(f"stage {c.stage}: finished {where}already")
                continue
            trainer = prepare(c, values, flags, world, resume, export)
            if world.first and not export and trainer.first_step < c.steps:
                checkpoint.claim(c)
                write_all_settings(runs[number:], flags)  # --resume then knows those to come
            if not run_stage(trainer, export):
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C changes nothing now
                break
    except RuntimeError as e:
        raise world.explain_hang(e) from None
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort the interpreter's own way out (torch 2.13)


if __name__ == "__main__":
    run(main, "try a smaller --micro-batch, --recompute, or several GPUs with --parallel fsdp")
