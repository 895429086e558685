"""Ablations in miniature: small models trained side by side, and how to sample from a trained one.

    python ablate.py scale-trap    # does the size of the mixture reach the router?
    python ablate.py data-weights  # how much of which data? MoS App. A, data reweighting
    python ablate.py sampling      # steps, guidance, rescale, schedule: MoS App. B.6, Fig. 13

The arms of the first two share data, noise, seed and schedule, and differ in the named respect
alone; the third changes the settings of one checkpoint that can edit.
"""

import contextlib
import io
import json
import math
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import train
from common import ROOT, CommandLine, run
from config import SCHEDULES, MoSConfig
from data.sources import Mixture
from kernels import autocast
from mos import MoS
from stages import ImageStage
from tools import evaluate
from tools.report import averages, figures
from towers import Understanding
from world.dataset import Shapes

# A block's norm removes the scale of the mixture that Proj hands it, unless Proj has a bias or the
# states are normalised one by one. (state_norm, factor on the start of Proj's bias) of each arm:
SCALE_TRAP = {"post, bias N(0, 0.02)": ("post", 1.0), "post, bias 0": ("post", 0.0),
              "pre, bias N(0, 0.02)": ("pre", 1.0)}
WEIGHED, SHARES = ("colours", "position"), (0.1, 0.3, 0.5, 0.7, 0.9)
# Settings that are changed, one or two at a time, while the others are the checkpoint's own:
SAMPLING = ((("schedule", "steps"), [(how, n) for how in SCHEDULES for n in (4, 8, 16, 25, 50)]),
            (("guidance",), [(1.0,), (2.0,), (3.0,), (5.0,)]),
            (("rescale",), [(0.0,), (1.0,)]))
KEPT = "latents tokens rows first lengths val".split()  # what arms share of the first one's stage


class Rescaled(Understanding):
    """A tower whose states grow from 1 to 100 times by layer, as those of large models do."""

    def forward(self, x):
        states = super().forward(x)                                        # (B, S, M, Du)
        growth = torch.logspace(0, 2, states.shape[2], device=x.device)
        return states * growth[:, None]


def train_arm(c, overrides, bias, rescaled, data, world):
    """Train one arm; returns the validation loss and the router's gradient norm, first and last.

    data: a dict that the first arm fills with latents and prompts for the others.
    """
    dataset = Mixture([Shapes(MoSConfig().size, c.seed, tasks=c.tasks, grid=c.grid,
                              number=c.scenes)])
    model = train.build(c, overrides, dataset)
    stage = ImageStage(model, dataset, c, world)
    train.fill(stage, c)
    model.generation.proj.bias.data *= bias
    if rescaled:
        model.understanding.__class__ = Rescaled
    if not data:
        stage.prepare()
        data.update({name: vars(stage)[name] for name in KEPT})
    vars(stage).update(data)
    stage.batches = stage.follow(stage.plan().batches(0, c.steps))
    module = stage.trained()
    optimizer = torch.optim.AdamW(train.decayed_groups(module, c.weight_decay), betas=(0.9, 0.95))
    norms = []
    for step in range(c.steps):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, c)
        with autocast(world.device):
            loss, _ = stage(*stage.inputs(step))
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.router.parameters()]).norm())
        torch.nn.utils.clip_grad_norm_(module.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tenth = math.ceil(c.steps / 10)
    early, late = (torch.stack(part).mean().item() for part in (norms[:tenth], norms[-tenth:]))
    return stage.losses_by_time().mean().item(), early, late


def scale_trap(c, world):
    """The table `scale-trap`."""
    c = train.complete(replace(c, tasks=("colours",), warmup=100), "image", world.device)
    print(f"{'':37} {'':>9} {'router gradient in the':>24}")
    print(f"{'states':12} {'arm':24} {'val loss':>9} {'first tenth':>12} {'last tenth':>11}")
    data = {}
    for k in (2, 1):
        for rescaled in (False, True):
            for name, (norm, bias) in SCALE_TRAP.items():
                overrides = dict(k=k, state_norm=norm)
                loss, early, late = train_arm(c, overrides, bias, rescaled, data, world)
                states = "1 to 100" if rescaled else "as trained"
                print(f"{states:12} {f'k={k}, {name}':24} {loss:9.4f} {early:12.1e} {late:11.1e}",
                      flush=True)


def pack(path, scenes, number):
    """Write pictures and captions of the small world as a tar shard in WebDataset's layout."""
    with tarfile.open(path, "w") as tar:
        for i in range(number):
            packed, text, *_ = scenes[i]
            pixels = ((scenes.to_pixels(packed[None], "cpu")[0] + 1) * 127.5).round().byte()
            picture = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture, "PNG")
            for suffix, content in ((".png", picture.getvalue()),
                                    (".json", json.dumps({"text": text}).encode())):
                member = tarfile.TarInfo(f"{i:06d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def task_loss(stage, task, c):
    """The validation loss on unseen scenes of a task."""
    size, longest = stage.model.config.size, stage.model.config.max_tokens
    unseen = Mixture([Shapes(size, c.seed, "val", (task,), c.grid, 128)])
    (_, stage.val, _), = stage.read(unseen.pieces(longest), unseen, slice(None))
    return stage.losses_by_time().mean().item()


def data_weights(c, world, number=1000):
    """The table `data-weights`: two sets of tar shards, mixed by a grid of weights."""
    first, second = WEIGHED
    print(f"share of {first:12}" + "".join(f"{name:>14}" for name in (*WEIGHED, "mean")))
    with tempfile.TemporaryDirectory() as folder:
        for task in WEIGHED:
            scenes = Shapes(MoSConfig().size, c.seed, tasks=(task,), grid=c.grid)
            pack(Path(folder, f"{task}.tar"), scenes, number)
        for share in SHARES:
            data = f"{folder}/{first}.tar={share},{folder}/{second}.tar={1 - share:.1f}"
            arm = replace(c, data=data, out=f"{folder}/{share}", latents=f"{folder}/latents")
            arm = train.complete(arm, "image", world.device)
            with contextlib.redirect_stdout(None):
                training = train.prepare(arm, {}, world)
                training.begin()
            for step in range(arm.steps):
                training.step(step)
            with training.average.applied():
                losses = [task_loss(training.stage, task, c) for task in WEIGHED]
            print(f"{share:21}" + "".join(f"{loss:14.4f}" for loss in (*losses, sum(losses) / 2)),
                  flush=True)


def sampling(c, world, prompts=20, wanted=6):
    """The table `sampling`: how many unseen prompts of a task, and edits of a type, come out right.
    """
    model = MoS.from_pretrained(c.init, world.device)
    why = evaluate.obstacle("edits", c.init, model)
    if why:
        raise ValueError(f"{c.init} cannot edit: {why}")
    print(f"all else: {json.dumps(model.settings())}, edits {json.dumps(model.settings(True))}\n"
          f"{'':37}{'six tasks':>16}{'nine edits':>16}")
    for names, rows in SAMPLING:
        for values in rows:
            options = dict(zip(names, values)) | dict(seed=c.seed, held=(False,))
            tables = (evaluate.score_tasks(model, prompts, 1, **options),
                      evaluate.score_edits(model, wanted, **options))
            found = [figures(averages(table)[row])[:2] for table, row in
                     zip(tables, ("seen", "seen, both"))]
            print(f"{', '.join(f'{n} {v}' for n, v in zip(names, values)):37}"
                  + "".join(f"{mean:8.3f} ± {error:.3f}" for mean, error in found), flush=True)


TABLES = {"scale-trap": scale_trap, "data-weights": data_weights, "sampling": sampling}


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("table", choices=tuple(TABLES), help="which ablation")
    parser.add_argument("--init", default=str(ROOT / "weights"),
                        help="folder with the trained VAE and tower; for sampling, with all")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm that is trained")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    args = parser.parse_args()
    world = train.World.join(train.TrainConfig().patience)
    c = train.TrainConfig(stage="image", preset="laptop", init=args.init, seed=args.seed, grid=4,
                          steps=args.steps)
    trained = "" if args.table == "sampling" else f"{c.steps} steps, "
    print(f"{trained}seed {c.seed}, torch {torch.__version__}, {world.device.type}, "
          f"revision {train.revision()}")
    TABLES[args.table](c, world)


if __name__ == "__main__":
    run(main)
