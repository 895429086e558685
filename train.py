"""Train a MoS from nothing: the VAE, the understanding tower, then to draw, then to edit.

    python train.py                                      # all stages, defaults for this machine
    torchrun --nproc-per-node 8 train.py                 # the same on eight GPUs
    python train.py --data my_pictures --out runs/mine   # own pictures
"""

import contextlib
import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from common import (
    CommandLine,
    full_tensor,
    initialise,
    local_bytes,
    pick_device,
    replacing,
    run,
    setting,
    tqdm_or_none,
)
from config import PRESETS, MoSConfig, read_config
from data.sources import build_tokenizer, open_sources
from kernels import autocast, fused
from mos import MoS, read_tokenizer
from stages import KINDS
from tools import estimate
from world import shapes

PART = {"vae": "vae", "understand": "understanding", "image": "mos", "edit": "mos"}  # their files
STAGES = tuple(PART)
GENERATING = ("image", "edit")  # those of router and generation tower


@dataclass
class TrainConfig:
    """How to train. What is None comes from the stage's recipe for this machine."""
    stage: str = setting("", "vae, understand, image or edit; empty: one after the other, edit for "
                             "shapes only")
    preset: str = setting("", "model preset; empty: tiny on a GPU, laptop on a CPU")
    phase: str = setting("", "the paper's phase of stage image: 512, 1024, aesthetic or 2048")
    out: str = setting("runs/mos", "folder for checkpoint, log, plot and pictures")
    init: str = setting("", "folder of the stages, or of the phase, before, or of a VAE that stage "
                            "vae shall go on from; empty: --out")
    data: str = setting("shapes", "shapes, a folder of pictures with captions, one of tar shards "
                                  "or their pattern; several by weight: a=0.7,b=0.3")
    where: str = setting(None, "use own pictures whose fields fulfil this: 'aesthetic >= 6'")
    max_broken: float = setting(0.05, "largest share of own pictures that cannot be used")
    sizes: tuple = setting((), "own pictures are drawn at about these sizes, each at the largest "
                               "that its area has; empty: the model's size")
    length_step: int = setting(None, "pad prompts to multiples of this, and batch those of one "
                                     "length; 0: to the longest, one shape for the compiler")
    latents: str = setting(None, "stage image: encode all at the start and keep it in memory; "
                                     "in each step (step); or once, into this folder")
    states: str = setting("step", "stage image: the prompts' states come from the tower in each "
                                  "step (step), from one in a process of its own that is ahead "
                                  "(producer), or are made once, into this folder")
    tower_device: str = setting("", "where a producer's tower works; empty: beside training")
    tasks: tuple = setting((), "train on these tasks of the small world only")
    grid: int = setting(shapes.GRID, "objects of the small world stand on multiples of 1/grid")
    estimate: bool = setting(False, "print what a step of stage image needs on GPUs, and stop")
    world: int = setting(1, "processes to estimate for")
    resume: bool = setting(False, "go on from the last state in --out")
    export: bool = setting(False, "write the checkpoint of the last state in --out, and stop")
    seed: int = setting(0, "of weights, data order and noise")
    steps: int = setting(None, "optimizer steps")
    batch: int = setting(None, "global batch size")
    micro_batch: int = setting(None, "largest batch for one process; the rest is accumulated")
    lr: float = setting(None, "peak learning rate")
    final_lr: float = setting(None, "last learning rate, as a share of the peak")
    warmup: int = setting(None, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "AdamW's; not on norms, biases, registers, embeddings")
    clip: float = setting(1.0, "largest gradient norm")
    ema: float = setting(None, "decay of the averaged weights, which are what is saved; 0: none")
    prompt_dropout: float = setting(0.1, "share of empty prompts, for guidance")
    kl_weight: float = setting(1e-4, "of the VAE's KL term")
    scenes: int = setting(None, "scenes in the table of latents of stages image and edit")
    parallel: str = setting(None, "none, or how processes share the work: ddp, fsdp or hsdp")
    shards: int = setting(0, "processes that share one copy of the model under hsdp; 0: a node's")
    recompute: bool = setting(None, "stages image and edit: activation checkpointing of the "
                                    "tower's blocks")
    compile: bool = setting(None, "use torch.compile")
    workers: int = setting(None, "data processes")
    log_every: int = setting(50, "steps between rows of the log")
    eval_every: int = setting(None, "steps between validations with pictures and scores")
    eval_prompts: int = setting(8, "prompts of each task in a validation")
    save_every: int = setting(None, "steps between states, from which --resume goes on")
    keep: int = setting(2, "states kept")
    patience: int = setting(600, "seconds after which a process that does not answer is given up")


RECIPES = {  # (stage, kind of machine): what its None settings become
    ("vae", "gpu"): dict(steps=16_000, batch=256, lr=2e-3, warmup=200, ema=0.999, eval_every=4000,
                         save_every=4000),
    ("understand", "gpu"): dict(steps=6000, batch=512, lr=2e-3, warmup=200, ema=0.995,
                                eval_every=2000, save_every=2000),
    ("image", "gpu"): dict(steps=12_000, batch=1024, lr=1.5e-3, warmup=500, ema=0.9995,
                           scenes=400_000, eval_every=4000, save_every=4000),
    ("edit", "gpu"): dict(steps=14_000, batch=1024, lr=1e-3, warmup=200, ema=0.9995,
                          scenes=300_000, eval_every=7000, save_every=3500),
    ("vae", "cpu"): dict(steps=3000, batch=16, lr=2e-3, warmup=200, ema=0.99, eval_every=500,
                         save_every=250),
    ("understand", "cpu"): dict(steps=2000, batch=16, lr=2e-3, warmup=200, ema=0.99, eval_every=500,
                                save_every=250),
    ("image", "cpu"): dict(steps=6000, batch=32, lr=3e-3, warmup=200, ema=0.998, scenes=4_000,
                           eval_every=1500, save_every=500),
    ("edit", "cpu"): dict(steps=3000, batch=32, lr=1e-3, warmup=200, ema=0.998, scenes=4_000,
                          eval_every=1500, save_every=500),
}
LARGE = ("ablation_1b", "mos_s", "mos_l")
PAPER = dict(lr=1e-4, final_lr=0.15, warmup=4000, batch=2048, micro_batch=32, ema=0.9999,
             steps=400_000, eval_every=10_000, save_every=1000, latents="step", length_step=32,
             compile=False)  # MoS App. A, for large presets
HIGH = dict(t_sampling="mode", shift=3.0, recompute=True, batch=1024, micro_batch=8)
# MoS sec. 3.5 and App. A; each goes on from the weights of the one before. NOTE (ours): the
# conditions, of which the paper says no more than what they are about; for own pictures.
PHASES = {
    "512": dict(size=512, t_sampling="logit-normal", shift=1.0,
                where="width >= 512 and height >= 512"),
    "1024": dict(size=1024, **HIGH, where="width >= 1024 and height >= 1024"),
    "aesthetic": dict(size=1024, **HIGH, steps=50_000,
                      where="width >= 1024 and height >= 1024 and aesthetic >= 6"),
    "2048": dict(size=2048, **HIGH | dict(micro_batch=2), steps=50_000,
                 where="width >= 2048 and height >= 2048"),
}
MACHINES = {"gpu": dict(preset="tiny", micro_batch=1024, compile=True, workers=12),
            "cpu": dict(preset="laptop", micro_batch=64, compile=False, workers=0)}


# ------------------------------------------------------------------------------------------------
# Processes

@dataclass
class World:
    """This process among all: rank 0 writes and speaks."""
    rank: int
    size: int
    device: torch.device
    others: object = None  # a group for asking who is still there, whatever the others do
    writers: object = None  # a group for those that write states in the background
    group: object = None  # the one that `wait` and `gather` talk in; None: that of training

    @classmethod
    def join(cls, patience):
        """Join the group that torchrun announces, or stay alone. patience: in seconds."""
        device = pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_torchelastic_launched():
            return cls(0, 1, device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
        others, writers = (dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
                           for seconds in (15, patience))
        return cls(dist.get_rank(), dist.get_world_size(), device, others, writers)

    def for_background(self):
        """The same processes, for threads that must not disturb training."""
        return replace(self, group=self.writers)

    @property
    def first(self):
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def print0(self, text):
        """Print, once for all processes."""
        if self.first:
            print(text, flush=True)

    def share(self, batch):
        """This process's slice of a global batch."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def sum(self, tensor):
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, interrupted, step):
        """Whether any process was interrupted; several ask each other every ten steps only."""
        if self.size == 1:
            return bool(interrupted)
        count = torch.tensor(float(len(interrupted)), device=self.device)
        return step % 10 == 0 and bool(self.sum(count))

    def wait(self):
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(self.group)

    def explain_hang(self, error):
        """The error of a step; where processes do not answer, one that names them instead."""
        reason = f"{error} ".splitlines()[0]
        if self.size == 1 or not (isinstance(error, dist.DistError)
                                  or re.search("gloo|NCCL", str(error))):
            return error
        try:
            dist.monitored_barrier(self.others, timedelta(seconds=10), wait_all_ranks=True)
        except RuntimeError as e:
            silent = re.findall(r"Ranks? ([\d, ]+) failed", str(e))
            who = f"process {silent[0]} of {self.size} does not answer any more" if silent else \
                "process 0 does not answer any more, or says which one does not"
            return OSError(f"{who}; start again with --resume ({reason})")
        return error

    def gather(self, values):
        """The union of a dict of each process."""
        parts = [values]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, values, self.group)
        return {key: value for part in parts for key, value in part.items()}

    def mesh(self, c):
        """Processes as fully_shard wants them: one row, or with hsdp a row for each copy."""
        if c.parallel == "fsdp":
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shards = c.shards or int(os.environ["LOCAL_WORLD_SIZE"])
        if self.size % shards:
            raise ValueError(f"shards must divide the {self.size} processes, got {shards}")
        return init_device_mesh(self.device.type, (self.size // shards, shards),
                                mesh_dim_names=("copy", "shard"))


# ------------------------------------------------------------------------------------------------
# The engine

def decayed_groups(module, weight_decay):
    """AdamW's two groups: matrices decay; norms, biases, registers and embeddings do not."""
    decay, rest = [], []
    for name, p in module.named_parameters():
        plain = p.ndim < 2 or "registers" in name or "embedding" in name or "gamma" in name
        (rest if plain else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def learning_rate(step, c):
    """Linear warm-up, then a cosine from lr to final_lr * lr. MoS App. A."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return c.lr * (c.final_lr + (1 - c.final_lr) * cosine)


class Average:
    """An exponential moving average of parameters; with decay 0 it is the parameters themselves."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = list(parameters), decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # young averages forget their start
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """The averaged weights stand in the model within this block."""
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
    """Cut what a stage uses into shards, a block at a time (FSDP2); the rest stays whole.

    fp32 shards; on a GPU gathered in bf16, gradients summed in fp32. MoS App. A.
    """
    policy = MixedPrecisionPolicy()
    if mesh.device_type == "cuda":  # times, noise and targets stay as they are
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh, mp_policy=policy)
    for part in stage.used():
        for name, module in list(part.named_modules()):
            if re.search(r"blocks\.\d+$", name):
                fully_shard(module, **options)
        if not any(p.requires_grad for p in part.parameters()):  # a shard has one type: apart
            fully_shard(part, **options)
            register_fsdp_forward_method(part, "embed")
    fully_shard(stage, reshard_after_forward=False, **options)


def fill(stage, c):
    """Give the parts that a stage needs memory on its device, and values: new ones, or a file's."""
    model = stage.model
    stage.to_empty(device=stage.world.device)
    if c.stage in GENERATING:
        model.vae.to_empty(device=stage.world.device)
    before = ("vae", "understanding") if c.stage in GENERATING else ()
    loaded = (*before, PART[c.stage]) if goes_on(c) else before
    for part in loaded:
        model.load_part(c.init, part)
    if PART[c.stage] not in loaded:
        for name in MoS.PARTS[PART[c.stage]]:
            initialise(getattr(model, name), c.seed)
    if c.stage == "vae":  # until validation measures them
        model.vae.set_statistics(torch.zeros(model.config.vae_channels),
                                 torch.ones(model.config.vae_channels))


PANELS = ("loss_t", "val_t", "edit_t", "entropy_", "score_", "edits_",
          "share_")  # what one panel of the plot shows


class Log:
    """A CSV with a row for each log point and for each validation, and a plot; rank 0 only."""

    def __init__(self, path, start):
        self.path, self.rows = path, []
        if start and path.is_file():
            with path.open() as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def add(self, step, **values):
        self.rows.append({"step": step} | {k: f"{v:.6g}" for k, v in values.items()})
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self):
        """Every column over the steps; without matplotlib the CSV has to do."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        panels, usage = {}, {}
        for name in dict.fromkeys(name for row in self.rows for name in row if name != "step"):
            points = [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]
            if name.startswith("usage_"):
                usage[name] = points[-1][1]
            elif points:
                title = next((p for p in PANELS if name.startswith(p)), name)
                panels.setdefault(title, []).append((name[len(title):], points))
        height = -(-(len(panels) + bool(usage)) // 5)
        figure, axes = plt.subplots(height, 5, figsize=(18, 2.6 * height), squeeze=False)
        for axis, (title, lines) in zip(axes.flat, panels.items()):
            for label, points in lines:
                axis.plot(*zip(*points), ".-" if len(points) < 30 else "-", lw=1, label=label)
            axis.set(title=title.rstrip("_"), yscale="log" if "loss" in title else "linear")
            if len(lines) > 1:
                axis.legend(fontsize=6, ncols=2)
        for axis in list(axes.flat)[len(panels):]:
            axis.axis("off")
        if usage:  # how often each layer is chosen for each block
            blocks = 1 + max(int(name.split("_")[1]) for name in usage)
            axes[-1, -1].axis("on")
            axes[-1, -1].imshow(torch.tensor([*usage.values()]).view(blocks, -1).numpy(), vmin=0)
            axes[-1, -1].set(title="layers chosen", xlabel="layer", ylabel="block")
        figure.tight_layout()
        with replacing(self.path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


class Run:
    """A stage under way: its optimizer, averaged weights and log, from the last state on."""

    def __init__(self, stage, c, model, folder):
        self.stage, self.c, self.model, self.folder = stage, c, model, folder
        self.world = stage.world
        model.requires_grad_(False)
        self.module = stage.trained().requires_grad_(True).train()
        for p in stage.idle():
            p.requires_grad_(False)
        self.sharded = c.parallel in ("fsdp", "hsdp")
        if self.sharded:
            shard(stage, self.world.mesh(c))
        fill(stage, c)  # not before: no process ever holds the whole model
        self.named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.average = Average((p for _, p in self.named), c.ema)
        groups = decayed_groups(self.module, c.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95),
                                           fused=self.world.device.type == "cuda")
        micro_batch = max(c.micro_batch, stage.unit)
        self.accumulate = -(-c.batch // (self.world.size * micro_batch))
        if c.batch % (self.world.size * self.accumulate * stage.unit):
            raise ValueError(f"batch {c.batch} cannot be cut into {self.world.size} processes x "
                             f"{self.accumulate} equal micro-batches" + " of pairs"
                             * (stage.unit > 1) + "; change batch or micro_batch")
        self.states, self.start = folder / f"{c.stage}.states", 0
        self.writer = checkpoint.Writer(self.states, self.world, c.keep)
        state = checkpoint.newest(self.states, self.world) if c.resume else None
        if state:
            self.start = checkpoint.load(state, self.tensors())
            for values in self.optimizer.state.values():
                values["step"].fill_(self.start)

    def tensors(self):
        """All that a bit-exact resume needs, by name; random states follow from the step."""
        if not self.optimizer.state:  # as AdamW itself begins
            on = self.world.device if self.optimizer.defaults["fused"] else "cpu"
            for _, p in self.named:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), device=on), "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p)}
        named = {}
        for (name, p), shadow in zip(self.named, self.average.shadow):
            own = self.optimizer.state[p]
            for kind, tensor in (("weight", p.detach()), ("average", shadow),
                                 ("exp_avg", own["exp_avg"]), ("exp_avg_sq", own["exp_avg_sq"])):
                named[f"{kind}/{name}"] = tensor
        return named

    def begin(self):
        """Open data, log and bar; wrap the stage for several processes and for the compiler."""
        c = self.c
        self.stage.start(self.start)
        self.wrapped = DistributedDataParallel(self.stage) if c.parallel == "ddp" else self.stage
        self.compute = torch.compile(self.wrapped) if c.compile else self.wrapped
        self.log = Log(self.folder / f"{c.stage}.csv", self.start)
        self.bar = tqdm_or_none(total=c.steps, initial=self.start, mininterval=5,
                                disable=not self.world.first)
        self.rate = estimate.product_rate(self.world.device)
        self.restart(self.start)

    def restart(self, done):
        """Begin to collect the next row of the log."""
        self.sums, self.since, self.clock, self.waited, self.flops = {}, done, time.time(), 0.0, 0

    def step(self, step):
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.c)
        metrics = self.backward(step)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.c.clip)
        metrics["grad_norm"] = full_tensor(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def backward(self, step):
        """Gradients of this step's micro-batches; those of all processes meet once, at the last."""
        begin = time.time()
        inputs = [a.chunk(self.accumulate) for a in self.stage.inputs(step)]
        self.waited += time.time() - begin
        begin = time.time()
        self.flops += 3 * self.stage.flops(*(part[0] for part in inputs)) * self.accumulate
        self.clock += time.time() - begin  # a new shape takes seconds to count
        total = {}
        for i, part in enumerate(zip(*inputs)):
            alone = self.world.size > 1 and i + 1 < self.accumulate
            if self.sharded:
                self.stage.set_requires_gradient_sync(not alone)
            with (self.wrapped.no_sync() if alone and not self.sharded
                  else contextlib.nullcontext()):
                with autocast(self.world.device):
                    loss, metrics = self.compute(*part)
                (loss / self.accumulate).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                total[name] = total.get(name, 0) + value / self.accumulate
        return total

    def row(self, done):
        """Write the averages since the last row; stop where the loss is not finite."""
        steps, world = done - self.since, self.world
        self.writer.check()
        loss = (world.sum(self.sums.pop("loss")) / steps / world.size).item()
        norm = (self.sums.pop("grad_norm") / steps).item()
        if not math.isfinite(loss + norm):
            self.writer.wait()
            world.print0(f"the loss is {loss}, its gradient's norm {norm} at step {done}; the last "
                      f"good state is kept in {self.states}; try a smaller --lr")
            sys.exit(1)
        sums = {name: world.sum(value) for name, value in self.sums.items()}
        data = self.stage.tell()
        elapsed = time.time() - self.clock
        rate = steps * self.c.batch / elapsed
        if world.first:
            self.log.add(done, lr=learning_rate(done - 1, self.c), loss=loss, grad_norm=norm,
                         images_per_s=rate, data_wait=self.waited / elapsed,
                         peak_gib=peak_memory(world.device) / 2**30,
                         **({"mfu": self.flops / elapsed / self.rate} if self.flops else {}),
                         **self.stage.report(sums, steps), **data)
        if self.bar:
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        self.restart(done)

    def validate(self, done):
        """Score, draw and export the averaged weights; every process does, the first one writes."""
        with self.average.applied():
            if self.sharded:
                self.stage.unshard()
            values = self.stage.validate(done, self.folder)
            if self.sharded:
                self.stage.reshard()
            export(self.model, self.c.stage, self.folder, self.world)
        if self.world.first:
            self.log.add(done, **values)
            self.log.plot()
            told = ", ".join(f"{name} {value:.4g}" for name, value in values.items()
                             if not name.startswith(("usage", "entropy")))
            self.world.print0(f"\n{self.c.stage} step {done}: {told}")
        self.world.wait()
        self.clock = time.time()

    def save(self, done):
        """Begin to write the state from which --resume goes on."""
        self.writer.save(done, self.tensors())
        self.clock = time.time()


def fit(run, c, world):
    """Train a stage from its last state to the end; returns whether it got there."""
    if c.export:
        if not run.start:
            raise ValueError(f"no state in {run.states} to export")
        run.begin()
        run.validate(run.start)
        return False
    if run.start >= c.steps:
        world.print0(f"stage {c.stage}: finished at step {run.start} already")
        return True
    introduce(run)
    run.begin()
    with interruption() as interrupted:
        for step in range(run.start, c.steps):
            run.step(step)
            done, last = step + 1, step + 1 == c.steps
            stop = world.any(interrupted, done)
            save = done % c.save_every == 0 or last or stop
            if save or done % c.log_every == 0 or done % c.eval_every == 0:
                run.row(done)  # before anything is written: it stops at a loss that is not finite
            if save and not last:
                run.save(done)
            if done % c.eval_every == 0 or last:
                run.validate(done)
            if last:  # a state of the last step means that all is done
                run.save(done)
            if last or stop:
                run.writer.wait()
            if stop:
                world.print0(f"\nstopped at step {done}; go on with --resume")
                return last
    if run.bar:
        run.bar.close()
    world.print0(f"peak memory {peak_memory(world.device) / 2**30:.2f} GiB")
    return True


def peak_memory(device):
    """Most bytes that this process has held: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def interruption():
    """A list that is no longer empty once Ctrl-C was pressed: steps are never cut in two."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


def export(model, stage, folder, world):
    """Write what `sample.py` and the next stage read; every process that holds shards calls it."""
    parts = tuple(MoS.PARTS) if stage in GENERATING else (PART[stage],)
    model.save_pretrained(folder, parts, write=world.first)


def introduce(run):
    """The first lines of a log: what runs, on what, and what it will need."""
    c, say, device = run.c, run.world.print0, run.world.device
    trainable = sum(p.numel() for p in run.module.parameters())
    everything = sum(p.numel() for p in run.model.parameters())
    first = next(run.module.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    say(f"stage {c.stage} | revision {revision()} | torch {torch.__version__} | {name} x "
        f"{run.world.size} | {'Triton kernels' if fused(first) else 'plain PyTorch'}, "
        f"{'compiled' if c.compile else 'eager'}")
    say(f"model {json.dumps(asdict(run.model.config))}")
    say(f"training {json.dumps(asdict(c))}")
    say(f"parameters: {trainable:,} trainable, {everything - trainable:,} frozen | global batch "
        f"{c.batch} = {run.world.size} processes x {run.accumulate} accumulated")
    states = sum(local_bytes(p) * (5 if p.requires_grad else 1) for p in run.model.parameters()
                 if not p.is_meta)
    say(f"memory estimate: weights, gradients, AdamW and average {states / 2**20:.0f} MiB a "
        "process, activations on top")


def revision():
    """The git revision of this folder, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------
# The command

def complete(c, stage, device):
    """The configuration of one stage, its open settings filled from the recipe."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    c = replace(c, stage=stage, init=c.init or c.out,
                preset=c.preset or MACHINES[kind]["preset"])
    if c.phase and (stage != "image" or c.phase not in PHASES):
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, and is for --stage image, "
                         f"got {c.phase!r} in stage {stage}")
    recipe = dict(scenes=0, final_lr=0.02, recompute=False, latents="memory", length_step=0)
    recipe |= MACHINES[kind] | RECIPES[stage, kind]
    if stage == "image" and c.preset in LARGE:
        recipe |= PAPER
    recipe |= {name: value for name, value in PHASES.get(c.phase, {}).items() if hasattr(c, name)
               and not (name == "where" and c.data == "shapes")}
    for name, value in recipe.items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    for names, low, high in (
            ("steps batch micro_batch log_every eval_every save_every eval_prompts keep world", 1,
             math.inf),
            ("scenes", int(stage in GENERATING), math.inf), ("clip", 1e-9, math.inf),
            ("workers warmup lr weight_decay kl_weight shards length_step", 0, math.inf),
            ("final_lr ema prompt_dropout max_broken", 0, 1)):
        for name in names.split():
            if not low <= getattr(c, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {getattr(c, name)}")
    if c.parallel not in (None, "none", "ddp", "fsdp", "hsdp"):
        raise ValueError(f"parallel must be none, ddp, fsdp or hsdp, got {c.parallel!r}")
    try:
        torch.device(c.tower_device or "cpu")
    except RuntimeError:
        raise ValueError(f"tower_device must be a device such as cuda:1, got {c.tower_device!r}"
                         ) from None
    if c.preset not in PRESETS:
        raise ValueError(f"unknown preset {c.preset!r}, expected one of: {', '.join(PRESETS)}")
    return c


def model_values(c, overrides):
    """The model's settings by preset, phase and flags; those of the model that is to edit."""
    if c.stage == "edit":
        return {**asdict(read_config(c.init)), **overrides}
    phase = {name: value for name, value in PHASES.get(c.phase, {}).items() if not hasattr(c, name)}
    return {**PRESETS[c.preset], **phase, **overrides}


def goes_on(c):
    """Whether a stage or phase starts from weights of its own kind, those in --init."""
    return (c.stage == "edit" or c.phase not in ("", next(iter(PHASES)))
            or c.stage == "vae" and c.init != c.out)


def build(c, overrides, dataset):
    """The model of a stage by its settings, with what earlier stages decided; no memory yet."""
    values, kinds = model_values(c, overrides), ("vae_",) if goes_on(c) else ()
    if c.stage in GENERATING:
        kinds = tuple(kind for kind in ("vae_", "und_") if not values.get(f"{kind}folder"))
        kinds += ("gen_", "router_", "registers", "tokenwise", "state_norm", "k",
                  "renormalize") if goes_on(c) else ()
    frozen = {name: value for name, value in asdict(read_config(c.init)).items()
              if name.startswith(kinds)} if kinds else {}  # what has been trained stays as it was
    for name in frozen.keys() & overrides.keys():
        if overrides[name] != frozen[name]:
            raise ValueError(f"{name} is {frozen[name]} in {c.init} and cannot become "
                             f"{overrides[name]} in stage {c.stage}")
    config = MoSConfig(**values | frozen)
    words = read_tokenizer(config, c.init) if c.stage in GENERATING else build_tokenizer(dataset)
    with torch.device("meta"):
        return MoS(config, words)


def prepare(c, overrides, world):
    """The Run of a stage, built and filled; nothing is written yet."""
    several = dist.is_initialized()
    c.parallel = c.parallel or ("ddp" if several else "none")
    if several != (c.parallel != "none"):
        raise ValueError(f"parallel is {c.parallel}, but " + (
            "torchrun started this: ddp, fsdp or hsdp" if several else
            "there is one process: start several with torchrun --nproc-per-node N train.py"))
    if c.shards and c.parallel != "hsdp":
        raise ValueError(f"shards is for --parallel hsdp, which is {c.parallel} here")
    folder = Path(c.out)
    made = [folder / f"{c.stage}.states", folder / f"{PART[c.stage]}.safetensors"]
    if c.stage == "edit" and (folder / "image.states").is_dir():
        made.pop()  # stage image's, which `--export --stage image` writes again
    c.resume = c.resume or c.export
    if any(path.exists() for path in made) and not c.resume:
        raise ValueError(f"{folder} already holds a run of stage {c.stage}; add --resume to go on, "
                         "or choose another --out")
    dataset = open_sources(c, MoSConfig(**model_values(c, overrides)).size, world)
    model = build(c, overrides, dataset)
    if c.stage in GENERATING and world.device.type == "cuda":
        model.understanding.bfloat16()  # MoS App. A
    for block in model.generation.blocks:
        block.recompute = c.recompute
    return Run(KINDS[c.stage](model, dataset, c, world), c, model, folder)


def train_stage(c, overrides, world):
    """Build, train and export one stage; returns whether it finished."""
    try:
        stage = prepare(c, overrides, world)
        stage.folder.mkdir(parents=True, exist_ok=True)
        return fit(stage, c, world)
    except RuntimeError as e:
        blame = world.explain_hang(e)
        if blame is e:
            raise
        raise blame from None


def parse(arguments=None):
    """The training configuration and the model's overrides of a command line."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_dataclass(TrainConfig, "training")
    parser.add_dataclass(MoSConfig, "model (defaults: the tiny preset)")
    given = vars(parser.parse_args(arguments))
    training = {f.name for f in fields(TrainConfig)}
    c = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
                       if k in training})
    if c.stage and c.stage not in STAGES:
        raise ValueError(f"unknown stage {c.stage!r}, expected one of: {', '.join(STAGES)}")
    return c, {k: v for k, v in given.items() if k not in training}


def main():
    """The command."""
    c, overrides = parse()
    if c.patience < 1:
        raise ValueError(f"patience must be at least 1 second, got {c.patience}")
    if c.estimate:
        c = complete(c, "image", torch.device("cuda"))
        estimate.show(MoSConfig(**model_values(c, overrides)), c)
        return
    world = World.join(c.patience)
    torch.set_float32_matmul_precision("high")
    for stage in [c.stage] if c.stage else STAGES[:4 if c.data == "shapes" else 3]:
        if not train_stage(complete(c, stage, world.device), overrides, world):
            break
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort the interpreter's own way out (torch 2.13)


if __name__ == "__main__":
    run(main)
