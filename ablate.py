"""Ablations in miniature: small models, trained side by side on the small world.

    python ablate.py scale-trap    # does the size of the mixture reach the router?

The arms share data, noise, seed and schedule, and differ in the named respect alone.
"""

import math
from pathlib import Path

import torch

import train
from common import CommandLine, autocast, run
from data import Mixture, Shapes
from mos import MoSConfig
from stages import ImageStage
from towers import Understanding

# A block's norm removes the scale of the mixture that Proj hands it, unless Proj has a bias or the
# states are normalised one by one. (state_norm, factor on the start of Proj's bias) of each arm:
SCALE_TRAP = {"post, bias N(0, 0.02)": ("post", 1.0), "post, bias 0": ("post", 0.0),
              "pre, bias N(0, 0.02)": ("pre", 1.0)}
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


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("table", choices=("scale-trap",), help="which ablation")
    parser.add_argument("--init", default=str(Path(__file__).parent / "weights"),
                        help="folder with the trained VAE and tower")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    args = parser.parse_args()
    world = train.World.join(train.TrainConfig().patience)
    c = train.TrainConfig(stage="image", preset="laptop", init=args.init, seed=args.seed,
                          tasks=("colours",), grid=4, steps=args.steps, warmup=100)
    c = train.complete(c, "image", world.device)
    print(f"{c.steps} steps of {c.batch}, seed {c.seed}, torch {torch.__version__}, "
          f"{world.device.type}, revision {train.revision()}")
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


if __name__ == "__main__":
    run(main)
