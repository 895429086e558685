"""Ablations in miniature: small models trained side by side, and how to sample from a trained one.

    python -m tools.ablate scale-trap    # does the size of the mixture reach the router?
    python -m tools.ablate data-weights  # how much of which data? MoS App. A, data reweighting
    python -m tools.ablate sampling      # steps, guidance, rescale, schedule: MoS App. B.6, Fig. 13

The arms of the first two share data, noise, seed and schedule; the third changes the settings of
one model that can edit.
"""

import contextlib
import json
import math
import tempfile
from pathlib import Path

import torch

import train
from common import ROOT, CommandLine, World, revision, run, to_image
from config import SCHEDULES, plan, read_recipe
from data.sources import Mixture
from mos import MoS
from tools import evaluate
from world import scores
from world.dataset import Shapes

# A block's norm removes the scale of the mixture that Proj hands it, unless Proj adds a bias to it.
# A norm for each state ("pre") comes before the mixture and does not replace it. Each arm with its
# state_norm, and the factor on the first values of Proj's bias:
SCALE_TRAP = {"post, bias N(0, 0.02)": ("post", 1.0), "post, bias 0": ("post", 0.0),
              "pre, bias N(0, 0.02)": ("pre", 1.0), "pre, bias 0": ("pre", 0.0)}
WEIGHED = ("colours", "position")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
# Settings that are changed, one or two at a time, while the others are the model's:
SAMPLING = ((("schedule", "steps"), [(how, n) for how in SCHEDULES for n in (4, 8, 16, 25, 50)]),
            (("guidance",), [(1.0,), (2.0,), (3.0,), (5.0,)]),
            (("rescale",), [(0.0,), (1.0,)]))
SHARED = ("memory", "prompt_lengths", "val", "val_texts")  # arms use those of the first one
OVERRIDES = {}  # settings of recipe laptop that tests change


def prepare(world, **flags):
    """Return the Trainer of an arm: stage image of recipe laptop with these settings."""
    flags = {"stage": "image", "grid": 4, **OVERRIDES, **flags}
    (c, values), = plan(flags, read_recipe("laptop"))
    return train.prepare(c, values, flags, world)


def train_arm(bias, rescaled, shared, world, **flags):
    """Train one arm; return its validation loss, and two norms of the router's gradient.

    The norms are the means of the first and the last tenth of the steps.

    bias: factor on the first values of Proj's bias. rescaled: whether states grow from 1 to 100
    times by layer, as in large models. shared: a dict that the first arm fills for the others.
    """
    trainer = prepare(world, **flags)
    stage, model = trainer.stage, trainer.model
    model.generation.proj.bias.data *= bias
    if rescaled:
        growth = torch.logspace(0, 2, model.config.und_depth, device=world.device)[:, None]
        model.understanding.register_forward_hook(lambda module, inputs, states: states * growth)
    if shared:
        stage.prepare = lambda: vars(stage).update(shared)
    squares = []  # of the router's gradients, before they are clipped
    for p in model.router.parameters():
        p.register_post_accumulate_grad_hook(lambda p: squares[-1].append(p.grad.square().sum()))
    trainer.begin()
    shared.update({name: vars(stage)[name] for name in SHARED})
    for step in range(trainer.c.steps):
        squares.append([])
        trainer.step(step)
    norms = [torch.stack(values).sum().sqrt().item() for values in squares]
    tenth = math.ceil(len(norms) / 10)
    loss = scores.losses_by_time(model, *stage.val).mean().item()
    return loss, sum(norms[:tenth]) / tenth, sum(norms[-tenth:]) / tenth


def scale_trap(args, world):
    """Print the table `scale-trap`."""
    print(f"{'':37} {'':>9} {'router gradient norm':>24}")
    print(f"{'states':12} {'arm':24} {'val loss':>9} {'first tenth':>12} {'last tenth':>11}")
    shared = {}
    for k in (2, 1):
        for rescaled in (False, True):
            for name, (norm, bias) in SCALE_TRAP.items():
                with contextlib.redirect_stdout(None):
                    loss, early, late = train_arm(
                        bias, rescaled, shared, world, k=k, state_norm=norm, init=args.init,
                        seed=args.seed, steps=args.steps, warmup=100, tasks=("colours",))
                states = "1 to 100" if rescaled else "as trained"
                print(f"{states:12} {f'k={k}, {name}':24} {loss:9.4f} {early:12.1e} {late:11.1e}",
                      flush=True)


def pack(folder, scenes, count):
    """Write pictures of the small world into a folder, each with its caption beside it."""
    folder.mkdir()
    for i in range(count):
        packed, text, *_ = scenes[i]
        picture, = scenes.to_pixels(packed[None], "cpu")
        to_image(picture).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(text)


def task_loss(stage, task):
    """Return the validation loss on unseen scenes of a task."""
    config = stage.model.config
    unseen = Mixture([Shapes(config.size, stage.c.seed, "val", (task,), stage.c.grid, 128)])
    (_, tensors, _), = stage.loader(unseen).batches(unseen.pieces(config.max_tokens))
    return scores.losses_by_time(stage.model, *tensors).mean().item()


def data_weights(args, world, count=1000):
    """Print the table `data-weights`: two sets of pictures, mixed by a grid of weights."""
    first, second = WEIGHED
    print(f"share of {first:12}" + "".join(f"{name:>14}" for name in (*WEIGHED, "mean")))
    with tempfile.TemporaryDirectory() as folder:
        size = {**read_recipe("laptop")["model"], **OVERRIDES}["size"]
        for task in WEIGHED:
            scenes = Shapes(size, args.seed, tasks=(task,), grid=4)
            pack(Path(folder, task), scenes, count)
        for share in SHARES:
            data = f"{folder}/{first}={share},{folder}/{second}={1 - share:.1f}"
            with contextlib.redirect_stdout(None):
                trainer = prepare(world, data=data, out=f"{folder}/{share}", init=args.init,
                                  latents=f"{folder}/latents", seed=args.seed, steps=args.steps)
                trainer.begin()
            for step in range(trainer.c.steps):
                trainer.step(step)
            with trainer.average.applied():
                losses = [task_loss(trainer.stage, task) for task in WEIGHED]
            print(f"{share:21}" + "".join(f"{loss:14.4f}" for loss in (*losses, sum(losses) / 2)),
                  flush=True)


def sampling(args, world, prompts=20, wanted=6):
    """Print the table `sampling`: shares of unseen prompts, and of edits, that come out right."""
    model = MoS.from_pretrained(args.init, world.device)
    why = evaluate.obstacle("edits", args.init, model)
    if why:
        raise ValueError(f"{args.init} cannot edit: {why}")
    print(f"all else: {json.dumps(model.settings())}, edits {json.dumps(model.settings(True))}\n"
          f"{'':37}{'six tasks':>16}{'nine edits':>16}")
    for names, rows in SAMPLING:
        for values in rows:
            options = dict(zip(names, values)) | dict(seed=args.seed, splits=("seen",))
            tasks = scores.averages(scores.score_tasks(model, prompts, 1, **options))
            edits = scores.averages(scores.score_edits(model, wanted, **options))
            text = ", ".join(f"{name} {value}" for name, value in zip(names, values))
            text = f"{text:37}"
            for average in (tasks["seen"], edits["seen, both"]):
                mean, error, *_ = scores.figures(average)
                text += f"{mean:8.3f} ± {error:.3f}"
            print(text, flush=True)


TABLES = {"scale-trap": scale_trap, "data-weights": data_weights, "sampling": sampling}


def main():
    """Run the command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("table", choices=tuple(TABLES), help="which ablation")
    parser.add_argument("--init", default=str(ROOT / "weights"),
                        help="folder with the trained VAE and tower; for sampling, with all")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm that is trained")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    args = parser.parse_args()
    world = World.join(patience=600)
    trained = "" if args.table == "sampling" else f"{args.steps} steps, "
    print(f"{trained}seed {args.seed}, torch {torch.__version__}, {world.device.type}, "
          f"revision {revision()}")
    TABLES[args.table](args, world)


if __name__ == "__main__":
    run(main)
