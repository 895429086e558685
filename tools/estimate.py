"""Compute what a training step of stage image needs on each GPU: memory and time.

    python -m tools.estimate mos_s --phase 512 --parallel fsdp --processes 64
    python -m tools.estimate mos_s --micro-batch 16 --recompute --ema 0

Nothing is allocated: the forward pass runs on tensors without content, as a GPU would run it (our
kernels, bf16 autocast), and the bytes that autograd keeps for the backward pass are added up. Every
setting of train.py is a flag here, too; the recipe gives the others.
"""

import contextlib
import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import kernels
import train
from common import CommandLine, run
from config import MoSConfig, plan
from mos import Context, unfilled

RATE = 480e12  # FLOP/s of a training step: `tools.bench train` measured 486 and 495 on H100s


def parameter_bytes(module, dtype=None):
    """Return the bytes of a module's parameters, in `dtype` instead of their own type."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in module.parameters())


@contextlib.contextmanager
def gpu_kernels():
    """Let `kernels` take the paths of a GPU within this block, whatever the device."""
    before = kernels.fused
    kernels.fused = lambda *_: True
    try:
        yield
    finally:
        kernels.fused = before


def replace_parameters(module, dtype):
    """Replace the parameters by new ones of a type; under FakeTensorMode they take no memory."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype))


def kept_bytes(model, batch, tokens, dtype, recompute):
    """Return the bytes that autograd keeps in a forward pass of router and generation tower.

    model: on the meta device, tokens: of each prompt, dtype: of the parameters.
    """
    c = model.config
    side = c.size // model.vae.factor  # of the latents
    storages = {}  # tensors that share memory count once

    def keep(x):
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x

    for block in model.generation.blocks:
        block.recompute = recompute
    with FakeTensorMode(), torch.device("cpu"), gpu_kernels():
        replace_parameters(model.router, dtype)
        replace_parameters(model.generation, dtype)
        states = torch.empty(batch, tokens, c.und_depth, c.und_width, dtype=torch.bfloat16)
        context = Context(states[:, :, 0], states, kernels.Keys(None, [(batch, tokens)]))
        z = torch.empty(batch, c.vae_channels, side, side)
        uniform = torch.empty(batch, tokens, c.und_depth + 1, c.gen_depth)
        with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(z, torch.empty(batch), context, uniform)
        for p in model.parameters():
            storages.pop(p.untyped_storage()._cdata, None)  # counted as weights
        return sum(storage.nbytes() for storage in storages.values())


def estimate(config, parallel="none", processes=1, shards=0, micro_batch=1, tokens=128, ema=True,
             recompute=False):
    """Return {name: bytes} of one process's memory in a step, "peak" their sum, and its "flops".

    All activations are there where the backward pass begins, all gradients where it ends: the
    larger of the two counts. Latents kept in memory are not counted. Raises ValueError where shards
    do not divide the processes.
    """
    model = unfilled(config)
    parts = torch.nn.ModuleList([model.router, model.generation])
    blocks = [*model.generation.blocks, *model.router.blocks]
    sharded = parallel in ("fsdp", "hsdp")
    n = {"fsdp": processes, "hsdp": shards or min(8, processes)}.get(parallel, 1)
    if processes % n:
        raise ValueError(f"shards must divide the {processes} processes, got {n}")
    half = torch.bfloat16
    weights = parameter_bytes(parts)
    # FSDP keeps what is in no block gathered, and at most two blocks at a time.
    gathered = parameter_bytes(parts, half) + 2 * parameter_bytes(blocks[0], half)
    gathered -= sum(parameter_bytes(block, half) for block in blocks)
    activations = kept_bytes(model, micro_batch, tokens, half if sharded else torch.float32,
                             recompute)
    if recompute:  # kept: the inputs of all blocks; and all that one block at a time computes again
        everything = kept_bytes(model, micro_batch, tokens, half, recompute=False)
        activations += everything // len(model.generation.blocks)
    memory = {
        "weights": weights // n,
        "optimizer": 2 * weights // n,
        "average": ema * weights // n,
        "understanding tower": parameter_bytes(model.understanding, half) // n,
        "VAE": parameter_bytes(model.vae),
        "gathered": gathered if sharded else 0,
        "DDP's buckets": weights if parallel == "ddp" else 0,  # a second copy of the gradients
        "gradients, or activations": max(weights // n, activations)}
    side = config.size // model.vae.factor
    flops = 3 * micro_batch * model.flops(tokens, (side, side))  # backward: two forward passes
    return memory | {"peak": sum(memory.values()), "flops": flops}


def main():
    """Run the command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("recipe", help="a name in recipes/, or the path of a .toml file; behind it "
                        "any setting of train.py: --phase, --parallel, --batch, --size, ...")
    parser.add_argument("--processes", type=int, default=1, help="GPUs, one process on each")
    args, flags = parser.parse_known_args()
    processes = args.processes
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    given, recipe, *_ = train.parse(["--recipe", args.recipe, *flags, "--stage", "image"])
    (c, model), = plan(given, recipe)
    config = MoSConfig(**model | {name: given[name] for name in given if name in model})
    parallel = c.parallel or ("none" if processes == 1 else "ddp")
    accumulate = math.ceil(c.batch / (processes * c.micro_batch))
    micro_batch = math.ceil(c.batch / (processes * accumulate))
    result = estimate(config, parallel, processes, c.shards, micro_batch=micro_batch,
                      tokens=config.max_tokens, ema=c.ema > 0, recompute=c.recompute)
    flops = result.pop("flops") * c.batch / processes / micro_batch
    print(f"{c.recipe}, {config.size}x{config.size}, {processes} processes, {parallel}, "
          f"micro-batch {micro_batch}: GiB in each")
    for name, size in result.items():
        print(f"{name:28}{size / 2**30:9.2f}")
    print(f"a step of {c.batch}: {flops / 1e12:.1f} TFLOP in each, {flops / RATE:.3f} s "
          f"at {RATE / 1e12:.0f} TFLOP/s, without communication")


if __name__ == "__main__":
    run(main)
