"""What a training step of the image stage needs, without building anything.

    python train.py --estimate --preset mos_s --parallel fsdp --world 64 --micro-batch 16

The model is built without memory and its forward pass is run on tensors without content, the way a
GPU runs it (our kernels, bf16 autocast): what autograd keeps is counted, and the products' FLOP.
"""

import math
import time
import unittest.mock
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from mos import Context, unfilled

RATE = 480e12  # FLOP/s of a training step: `bench.py train` measured 486 and 495 on H100s


def product_rate(device):
    """FLOP/s of a large matrix product, the best of a few: what MFU is a share of."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, best = torch.randn(side, side, device=device, dtype=kind), math.inf
    for _ in range(8):
        a.sum().item()  # until all work is done
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


class Products(TorchDispatchMode):
    """Collects the matrix products and attention calls that run inside."""

    KEPT = 3  # calls of a kind that can be run again, each with tensors of its own

    def __init__(self):
        super().__init__()
        self.calls = {}  # what identifies a call: how many there were, arguments of some of them

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__.startswith(("mm", "addmm", "bmm", "_scaled_dot_product")):
            key = str(op), str([(a.shape, a.stride()) if isinstance(a, torch.Tensor) else a
                                for a in args])
            number, kept = self.calls.get(key, (0, []))
            self.calls[key] = number + 1, [*kept, partial(op, *args, **kwargs or {})][:self.KEPT]
        return op(*args, **kwargs or {})

    def flops(self):
        """Of all calls: 2mnk for a product, and for attention that of its two products."""
        total = 0
        for number, (call, *_) in self.calls.values():
            tensors = [a for a in call.args if isinstance(a, torch.Tensor)]
            if "attention" in str(call.func):
                total += number * 4 * tensors[0].numel() * tensors[1].shape[2]
            else:
                total += number * 2 * tensors[-2].numel() * tensors[-1].shape[-1]
        return total

    def all(self, *_):
        """Run every call as often as it was seen, and nothing else."""
        for number, kept in self.calls.values():
            for i in range(number):
                kept[i % len(kept)]()


def count(module, kind=None):
    """Bytes of a module's parameters, of `kind` instead of their own type."""
    return sum(p.numel() * (kind or p.dtype).itemsize for p in module.parameters())


def forward(model, batch, tokens, size, weights, recompute, edit=False):
    """Bytes that autograd keeps of router and generation tower, and the forward pass's FLOP.

    model: on the meta device, tokens: of each context, size: (height, width) of the latents,
    weights: the type of the parameters inside, recompute: whether activations are checkpointed,
    edit: whether there are latents of a reference, too.
    """
    for block in model.generation.blocks:
        block.recompute = recompute
    c, kept = model.config, {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # whatever shares memory counts once
        return x

    with FakeTensorMode():
        for part in (model.router, model.generation):
            for module in part.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        fake = torch.empty(p.shape, dtype=weights, device="cpu")
                        module._parameters[name] = torch.nn.Parameter(fake)
        with torch.device("cpu"):
            state = torch.empty(batch, tokens, c.und_depth, c.und_width, dtype=torch.bfloat16)
            context = Context(state[:, :, 0], state, None, runs=[(batch, tokens)])
            z, t = torch.empty(batch, c.vae_channels, *size), torch.empty(batch)
            explore = torch.empty(batch, tokens, c.und_depth + 1, c.gen_depth)
        with saved_tensors_hooks(pack, lambda x: x), Products() as products, \
                torch.autocast("cpu", torch.bfloat16):
            model(z, t, context, explore, z if edit else None)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(s.nbytes() for key, s in kept.items() if key not in own), products.flops()


def forward_flops(config, tokens, size, edit=False):
    """FLOP of router and generation tower for one picture of latent size (height, width).

    tokens, edit: see `forward`.
    """
    return forward(unfilled(config), 1, tokens, size, torch.float32, False, edit)[1]


def estimate(config, parallel="none", world=1, shards=0, micro_batch=1, tokens=128,
             ema=True, recompute=False):
    """{what: bytes} of one process's memory in a step, "peak" their sum, and "flops".

    Where the backward pass begins, activations are all there and gradients are not; where it ends
    it is the other way round: the larger of the two counts. Stored latents come on top.
    """
    model = unfilled(config)
    parts = torch.nn.ModuleList([model.router, model.generation])
    trained, blocks = count(parts), model.generation.blocks
    tower = count(model.understanding, torch.bfloat16)
    block, others = count(blocks[0], torch.bfloat16), count(parts, torch.bfloat16)
    others -= sum(count(b, torch.bfloat16) for b in (*blocks, *model.router.blocks))
    n = dict(fsdp=world, hsdp=shards or min(8, world)).get(parallel, 1)
    if world % n:
        raise ValueError(f"shards must divide the {world} processes, got {n}")
    sharded = parallel in ("fsdp", "hsdp")
    inside = torch.bfloat16 if sharded else torch.float32
    side = config.size // model.vae.factor
    run = partial(forward, model, micro_batch, tokens, (side, side))
    with unittest.mock.patch.object(kernels, "fused", lambda x: True):  # as on a GPU
        kept, flops = run(inside, recompute)
        if recompute:  # what one block keeps while its backward pass runs
            kept += run(torch.bfloat16, False)[0] // len(blocks)
    memory = {
        "weights": trained // n, "optimizer": 2 * trained // n, "average": ema * trained // n,
        "understanding tower": tower // n, "VAE": count(model.vae),
        "gathered": others + 2 * block if sharded else 0,
        "DDP's buckets": trained if parallel == "ddp" else 0,  # a second copy of the gradients
        "gradients, or activations": max(trained // n, kept)}
    return memory | {"peak": sum(memory.values()), "flops": 3 * flops}


def show(config, c):
    """Print the estimate for a training configuration (train.TrainConfig)."""
    parallel = c.parallel or ("none" if c.world == 1 else "ddp")
    accumulate = math.ceil(c.batch / (c.world * c.micro_batch))
    micro = math.ceil(c.batch / (c.world * accumulate))
    result = estimate(config, parallel, c.world, c.shards, micro, config.max_tokens,
                      c.ema > 0, c.recompute)
    flops = result.pop("flops") * c.batch / c.world / micro
    print(f"{c.preset}, {config.size}x{config.size}, {c.world} processes, {parallel}, "
          f"micro-batch {micro}: GiB in each")
    for name, size in result.items():
        print(f"{name:28}{size / 2**30:9.2f}")
    print(f"a step of {c.batch}: {flops / 1e12:.1f} TFLOP in each, {flops / RATE:.3f} s "
          f"at {RATE / 1e12:.0f} TFLOP/s, without communication")
