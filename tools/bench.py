"""Speed: the kernels beside their rivals, measured in one run on one NVIDIA GPU.

    python bench.py kernels    # norms, QK-norm + RoPE, SwiGLU, state mixing, feed-forward network
    python bench.py tower      # a denoising iteration of MoS-S at 1024x1024, as sample.py runs it
    python bench.py train      # training steps of --preset mos_s, or of a small one
    python bench.py latency    # from prompt to picture, stage by stage, and other models
    python bench.py loading    # reading a tower of 16 GB from its folder

Everything is bf16 on random data (zeros are faster than data); `train` has fp32 weights under
autocast. `kernels` prints device time: the sum over a call's kernels as the profiler sees them, the
median of CALLS calls, which go through SETS sets of inputs in turn so that no cache serves them.
(Compiled backward passes do not always survive capture in a CUDA graph, so nothing is captured.)
What a call costs the host is another column. `tower` and `latency` time a graph's replay by
device events, `train` whole steps by the clock.

"-": does not apply or is not installed; "failed": stderr says why, the run goes on; "?": the
rival's results differ from ours by more than 2 %.

Letters as in `mos.py`, and for the feed-forward network T tokens, D its width, F its hidden width.
"""

import gc
import math
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as nnf
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import kernels
from common import ROOT, CommandLine, randomise, replacing, run
from config import PRESETS
from kernels import autocast
from mos import Context, unfilled
from tools.estimate import Products, estimate
from tools.latency import bench_latency, bench_loading
from tools.timing import (DEVICE, DTYPE, SETS, call_time, ceilings, device_time, header,
                          large_model, normal, replay_time, save, show_profile)
from train import LARGE, TrainConfig, World, complete, prepare

try:
    from liger_kernel import ops as liger
except ImportError:
    liger = None

EPS = 1e-6
RIVALS = ("torch.compile", "eager", "Liger", "built-in")


# ------------------------------------------------------------------------------------------------
# The cases

class Case(NamedTuple):
    """An operation, its rivals, and what it costs at least."""
    name: str
    make: Callable  # () -> a fresh set of inputs; the backward pass is for those that require grad
    twin: Callable  # inputs -> outputs in plain PyTorch: the rivals "eager" and "torch.compile"
    rivals: dict    # {name: the same by other means}; Liger last: it writes into its gradients
    passes: dict    # {pass: (values that must move, our operator,
    #                         inputs and gradients of the twin's outputs -> its arguments)}


def leaf(*shape):
    """Standard normal values that require a gradient."""
    return normal(*shape).requires_grad_()


def liger_norm(x, w):
    """Liger's RMSNorm, told to leave the gradient that it is given as it is, like all others."""
    return liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def norm_case(rows, width):
    """RMSNorm: read x, write y; backward: read x and dy, write dx."""
    n = rows * width
    return Case(
        f"RMSNorm {rows}x{width}",
        make=lambda: (leaf(rows, width), leaf(width)),
        twin=lambda x, w: kernels.rms_norm_twin(x, w, None, EPS),
        rivals={"built-in": lambda x, w: nnf.rms_norm(x, w.shape, w, EPS), "Liger": liger_norm},
        passes={
            "forward": (2 * n, kernels.rms_norm_forward, lambda x, w, dy: (x, w, None, EPS)),
            "backward": (3 * n, kernels.rms_norm_backward, lambda x, w, dy: (x, w, None, dy, EPS))})


def add_norm_case(rows, width):
    """s = x + r, then RMSNorm: read x, r, write s, y; backward: read s, ds, dy, write dx.

    The gradient of r is that of x, the same tensor: only x requires it here.
    """
    def built_in(x, r, w):
        s = x + r
        return s, nnf.rms_norm(s, w.shape, w, EPS)

    n = rows * width
    return Case(
        f"residual + RMSNorm {rows}x{width}",
        make=lambda: (leaf(rows, width), normal(rows, width), leaf(width)),
        twin=lambda x, r, w: kernels.rms_norm_twin(x, w, r, EPS),
        rivals={"built-in": built_in, "Liger": lambda x, r, w:
                liger.LigerFusedAddRMSNormFunction.apply(x, r, w, EPS)[::-1]},
        passes={
            "forward": (4 * n, kernels.rms_norm_forward, lambda x, r, w, ds, dy: (x, w, r, EPS)),
            "backward": (4 * n, kernels.rms_norm_backward, lambda x, r, w, ds, dy:
                         (x + r, w, ds, dy, EPS))})


def queries_keys_case(which, B, L, H, Dh):
    """QK-norm and RoPE out of a packed projection: H queries, H keys, H values of width Dh.

    Read and write q, k; v stays. Backward: read q, k, dq, dk, dv, write the packed gradient.
    """
    def make():
        positions = torch.arange(L, device=DEVICE)[:, None]
        return (leaf(B, L, 3 * H, Dh), *kernels.rope_table(positions, (Dh,)), leaf(Dh), leaf(Dh))

    def twin(qkv, cos, sin, wq, wk):
        q, k, v = kernels.queries_keys_twin(qkv, (cos, sin), H, (wq, wk, None), None, EPS)
        # Compiled apart from its network, a result that is a view of an input costs a copy going
        # back. The clone, where the forward pass is not timed, spares torch.compile that.
        return q, k, v.clone() if which == "backward" else v

    def built_in(qkv, cos, sin, wq, wk):
        q, k, v = qkv.split(H, 2)
        q, k = nnf.rms_norm(q, wq.shape, wq, EPS), nnf.rms_norm(k, wk.shape, wk, EPS)
        return kernels.apply_rope(q, (cos, sin)), kernels.apply_rope(k, (cos, sin)), v

    def by_liger(qkv, cos, sin, wq, wk):
        q, k, v = qkv.split(H, 2)  # the norms copy q and k, the rotation works in place
        q, k = liger_norm(q, wq).transpose(1, 2), liger_norm(k, wk).transpose(1, 2)
        q, k = liger.LigerRopeFunction.apply(q, k, cos, sin, None, 1, Dh)
        return q.transpose(1, 2), k.transpose(1, 2), v

    def backward(*inputs):
        dqkv, _, dw = kernels.queries_keys_backward(*inputs)
        return dqkv, dw[0], dw[1]  # of qkv and of the norms of q and k

    n = B * L * H * Dh
    return Case(
        f"QK-norm + RoPE {B}x{L}x{H}x{Dh}", make, twin,
        rivals={"built-in": built_in, "Liger": by_liger},
        passes={which: {
            "forward": (4 * n, kernels.queries_keys_forward, lambda qkv, cos, sin, wq, wk, *_:
                        (qkv, None, cos, sin, wq, wk, None, H, EPS)),
            "backward": (8 * n, backward, lambda qkv, cos, sin, wq, wk, *d:
                         (qkv, None, cos, sin, wq, wk, None, *d, EPS))}[which]})


def liger_swiglu(gate_up):
    """Liger's SwiGLU that reads gate and up out of one packed tensor."""
    return liger.LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def swiglu_case(T, F):
    """h = silu(gate) * up: read 2F, write F a token; backward: read 3F, write 2F, or 3F with h."""
    n = T * F
    return Case(
        f"SwiGLU {T}x{F}",
        make=lambda: (leaf(T, 2 * F),),
        twin=kernels.swiglu_twin,
        rivals={"Liger": liger_swiglu},
        passes={
            "forward": (3 * n, kernels.swiglu_forward, lambda gate_up, dh: (gate_up,)),
            "backward": (5 * n, kernels.swiglu_backward, lambda gate_up, dh: (gate_up, dh, False)),
            "back + h": (6 * n, kernels.swiglu_backward, lambda gate_up, dh: (gate_up, dh, True))})


def mixing_case(B, S, M, K, Du):
    """The mixture that one block sees, K of M states a token. MoS eq. (4).

    Read K rows, write one; backward, to the weights alone: read K states and one gradient.
    """
    def make():
        index = torch.rand(B, S, M, device=DEVICE).topk(K).indices
        return normal(B, S, M, Du), index, torch.rand(B, S, K, device=DEVICE).requires_grad_()

    def dense(states, index, weight):
        zeros = states.new_zeros(states.shape[:3])
        return torch.einsum("bsm,bsmd->bsd", zeros.scatter(2, index, weight.to(DTYPE)), states)

    n = (K + 1) * B * S * Du
    return Case(
        f"mixing {K} of {M} states {B}x{S}x{Du}", make,
        twin=kernels.mix_states_twin,
        rivals={"built-in": dense},
        passes={
            "forward": (n, kernels.mix_forward, lambda x, index, weight, dy:
                        (x, index, weight, None)),
            "backward": (n, kernels.mix_backward, lambda x, index, weight, dy: (x, index, dy))})


def network_case(T, D, F):
    """A SwiGLU feed-forward network, 6 T D F FLOP, and twice as many backward: both in one pass."""
    def apart(x, gate_up, down):
        gate, up = gate_up.chunk(2)  # joining their gradients again is 0.2 % of the time
        return nnf.linear(nnf.silu(nnf.linear(x, gate)) * nnf.linear(x, up), down)

    return Case(
        f"feed-forward network T={T} D={D} F={F}",
        make=lambda: (leaf(T, D), *((normal(*size) * size[1] ** -0.5).requires_grad_()
                                    for size in ((2 * F, D), (D, F)))),
        twin=kernels.feed_forward_twin,
        rivals={"ours": kernels.feed_forward,
                "ours, recompute": partial(kernels.feed_forward, recompute=True),
                "eager": apart,
                "eager, checkpoint": partial(checkpoint, apart, use_reentrant=False),
                "Liger": lambda x, gate_up, down:
                    nnf.linear(liger_swiglu(nnf.linear(x, gate_up)), down)},
        passes={"both": (18 * T * D * F, None, None)})


CASES = (partial(norm_case, 36864, 2560), partial(norm_case, 98304, 3072),
         partial(add_norm_case, 36864, 2560),
         partial(queries_keys_case, "forward", B=8, L=4608, H=20, Dh=128),
         partial(queries_keys_case, "backward", B=8, L=4608, H=20, Dh=128),
         partial(swiglu_case, T=36864, F=8192),
         partial(mixing_case, B=16, S=512, M=32, K=2, Du=4096),
         partial(network_case, T=36864, D=3072, F=8192))


# ------------------------------------------------------------------------------------------------
# Measuring

def rival_call(function, which, inputs, gradients):
    """A pass of a differentiable function, ready to run; for "backward" its graph is built here."""
    wanted = [x for x in inputs if x.requires_grad]
    if which == "forward":
        return partial(function, *inputs)
    if which == "backward":
        return partial(grad, function(*inputs), wanted, gradients)
    return lambda: grad(function(*inputs), wanted, gradients)


def kept_bytes(function, inputs):
    """What a forward pass leaves in memory for the backward pass, its output apart."""
    before = torch.cuda.memory_allocated()
    y = function(*inputs)
    return torch.cuda.memory_allocated() - before - y.nbytes


def tensors(results):
    """Results as a list; an empty tensor stands for what an operator was not asked for."""
    return [x for x in ([results] if isinstance(results, torch.Tensor) else results) if x.numel()]


def agree(ours, theirs):
    """Whether results are the same up to the rounding of bf16; theirs may be more (v, a view)."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return all((norm(a - b) <= 0.02 * norm(a)).item() for a, b in zip(ours, theirs))


def measure(make_case, copy, gemm):
    """Yields a row for each pass of a case; copy and gemm: the ceilings in bytes/s and FLOP/s.

    cost: bytes, or for "both" FLOP; host: microseconds to launch ours; and for each name times:
    microseconds on the device, None if it failed; fractions: what it reaches of the ceiling;
    kept: bytes kept from pass to pass in "both"; differ: the names whose results are not ours.
    """
    case, sets = make_case(), []
    contestants = {"ours": None, "torch.compile": torch.compile(case.twin, dynamic=False),
                   "eager": case.twin, **case.rivals}
    if not liger:
        contestants.pop("Liger", None)
    for _ in range(SETS):
        inputs = case.make()
        sets.append((inputs, [torch.randn_like(y) for y in tensors(case.twin(*inputs))]))
    for which, (cost, operator, arguments) in case.passes.items():
        cost *= 1 if which == "both" else DTYPE.itemsize
        floor = 1e6 * cost / (gemm if which == "both" else copy)
        row = dict(name=case.name, which=which, cost=cost, host=0, times={}, kept={}, differ=[])
        expected = []
        for name, function in contestants.items():
            ours = name == "ours" and operator
            if which == "back + h" and not ours:
                continue

            def prepare(i):
                inputs, d = sets[i % SETS]
                return partial(operator, *arguments(*inputs, *d)) if ours else \
                    rival_call(function, which, inputs, d)

            try:
                with torch.set_grad_enabled(not ours):
                    results = tensors(prepare(0)())
                    if name == "ours":
                        expected = results
                    if not agree(expected, results):
                        row["differ"].append(name)
                    if ours:
                        row["host"] = call_time(prepare(0))
                    if which == "both":
                        row["kept"][name] = kept_bytes(function, sets[0][0])
                    row["times"][name] = device_time(prepare)
            except Exception as e:  # the others may still work
                row["times"][name] = None
                print(f"{case.name}, {which}, {name}: {type(e).__name__}: "
                      f"{f'{e} '.splitlines()[0]}", file=sys.stderr, flush=True)
        row["fractions"] = {name: floor / t for name, t in row["times"].items() if t}
        yield row


# ------------------------------------------------------------------------------------------------
# Whole towers, with random weights

def alone(products):
    """Microseconds of all calls of `Products`, each timed alone."""
    return sum(number * device_time(lambda i: kept[i % len(kept)])
               for number, kept in products.calls.values())


@torch.no_grad()
def bench_tower(folder):
    """The command `tower`: one prompt of 512 tokens with guidance, 32 x 32 visual tokens.

    The other branch is the empty prompt.
    """
    result, gemm = header(), ceilings()[1]
    model, S = large_model(DTYPE), 512
    c = model.config
    context = Context(normal(2, S, c.und_width), normal(2, S, c.und_depth, c.gen_width), None,
                      True, [(1, S), (1, 1)])
    z, times = torch.randn(1, c.vae_channels, 64, 64, device=DEVICE), torch.tensor([0.6, 0.5])
    inputs = z, *times.to(DEVICE)
    step = partial(model.step, context, 5.0, 0.7)
    with autocast(torch.device(DEVICE)):
        result["iteration"] = replay_time(step, *inputs)
        show_profile(partial(step, *inputs))
        with Products() as products:
            step(*inputs)
        result["products alone"] = alone(products)
        result["products in one graph"] = replay_time(products.all, *inputs)
        logits = torch.randn(2, S, c.und_depth, c.gen_depth, device=DEVICE)
        model.router.forward = lambda *_: logits
        result["without router"] = replay_time(step, *inputs)
        kernels.PLAIN = True
        result["plain, without router"] = replay_time(step, *inputs)
        for block in model.generation.blocks:
            block.forward = torch.compile(block.forward)
        result["plain, blocks compiled, without router"] = replay_time(step, *inputs)
    print(f"MoS-S, 1024x1024, {S} tokens, guidance, one iteration; GEMM {gemm / 1e12:.0f} TFLOP/s")
    for name in list(result)[-6:]:
        print(f"{name:40} {result[name] / 1e3:7.2f} ms")
    for name in ("products alone", "products in one graph"):
        result[f"iteration / {name}"] = result["iteration"] / result[name]
        print(f"iteration / {name} {result['iteration'] / result[name]:.3f}")
    result["router share"] = 1 - result["without router"] / result["iteration"]
    print(f"router {result['router share']:.1%}")
    save(result, folder / "tower.json")


class TrainCase(NamedTuple):
    """A way to train a large preset for a few steps."""
    name: str
    size: int = 512          # pixels a side; above 512 with activation checkpointing
    encode: bool = False     # understanding states and latents are made in the step, not given
    plain: bool = False      # plain PyTorch instead of the kernels
    tokens: int = 128        # S

    def seconds(self, model, optimizer, B):
        """The median step of a batch of B, in seconds."""
        c, device = model.config, torch.device(DEVICE)
        for block in model.generation.blocks:
            block.recompute = self.size > 512
        side = self.size // model.vae.factor
        states = None if self.encode else normal(B, self.tokens, c.und_depth, c.und_width)
        tokens = torch.ones(B, self.tokens, dtype=torch.long, device=device)
        pictures = torch.rand(B if self.encode else 0, 3, self.size, self.size, device=device)
        z0, z1 = torch.randn(2, B, c.vae_channels, side, side, device=device)
        t = torch.rand(B, device=device)
        uniform = torch.rand(B, self.tokens, c.und_depth + 1, c.gen_depth, device=device)

        def step(z0=z0):
            if self.encode:
                with torch.no_grad():
                    z0 = torch.cat([model.vae.encode(part) for part in pictures.split(8)])
            with autocast(device):
                context = model.understand(tokens) if self.encode else \
                    Context(states[:, :, 0], states, None, runs=[(B, self.tokens)])
                at = t[:, None, None, None]
                v = model((1 - at) * z0 + at * z1, t, context, uniform)
            (v.float() - (z1 - z0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return median(times[2:])

    def measure(self, model, optimizer, gemm):
        """Of the largest batch that fits: images/s, MFU, peak, and the peak that was computed."""
        kernels.PLAIN = self.plain
        for B in (96, 64, 48, 40, 32, 24, 16, 12, 8, 4):
            gc.collect()
            torch.cuda.empty_cache()
            try:
                seconds = self.seconds(model, optimizer, B)
                break
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                optimizer.state.clear()
        else:
            raise ValueError(f"{self.name}: not even {B} pictures fit into this GPU's memory")
        config, side = replace(model.config, size=self.size), self.size // model.vae.factor
        flops = 3 * B * unfilled(config).flops(self.tokens, (side, side))
        memory = estimate(config, micro_batch=B, tokens=self.tokens, ema=False,
                          recompute=self.size > 512)
        computed = memory["peak"] - (0 if self.encode else
                                     memory["understanding tower"] + memory["VAE"])
        return dict(batch=B, seconds=seconds, images=B / seconds, mfu=flops / seconds / gemm,
                    peak=torch.cuda.max_memory_allocated() / 2**30,
                    computed=math.nan if self.plain else computed / 2**30)


TRAIN_CASES = (TrainCase("states and latents given"), TrainCase("the same, plain", plain=True),
               TrainCase("given, recompute", size=1024),
               TrainCase("encodings in the step", encode=True))


def bench_large(preset, result):
    """Training steps of router and generation tower of a preset, with AdamW."""
    gemm, model = ceilings()[1], large_model(torch.float32, preset)
    parameters = [*model.router.parameters(), *model.generation.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    print(f"{preset}, 128 tokens a picture; GEMM {gemm / 1e12:.0f} TFLOP/s. MFU: three times the "
          "forward pass of\nrouter and generation tower over the time, recomputation not counted")
    print(f"{'':26}{'side':>5}{'batch':>6}{'s':>8}{'images/s':>9}{'MFU':>7}{'peak GiB':>9}"
          f"{'computed':>9}")
    for case in TRAIN_CASES:
        if case.encode:
            randomise(DEVICE, model.understanding.bfloat16(), model.vae)
            model.vae.set_statistics(torch.zeros(model.config.vae_channels),
                                     torch.ones(model.config.vae_channels))
        row = result[case.name] = case.measure(model, optimizer, gemm)
        print(f"{case.name:26}{case.size:5}{row['batch']:6}{row['seconds']:8.4f}"
              f"{row['images']:9.1f}{row['mfu']:7.1%}{row['peak']:9.1f}{row['computed']:9.1f}",
              flush=True)


def bench_small(preset, result, steps=100):
    """The image stage of a small preset as train.py runs it, on the parts in weights/."""
    print(f"{preset}, stage image\n{'':20}{'images/s':>9}{'waits':>7}{'loss':>8}")
    for name, plain, compiled in (("plain, eager", True, False), ("kernels, eager", False, False),
                                  ("plain, compiled", True, True),
                                  ("kernels, compiled", False, True)):
        kernels.PLAIN = plain
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as out:
            c = TrainConfig(stage="image", preset=preset, out=out, compile=compiled, scenes=20_000,
                            init=str(ROOT / "weights"))
            training = prepare(complete(c, "image", torch.device(DEVICE)), {}, World.join(600))
            training.begin()
            for i in range(20 + steps):
                if i == 20:
                    torch.cuda.synchronize()
                    training.restart(i)
                training.step(i)
            torch.cuda.synchronize()
            elapsed = time.time() - training.clock
        row = result[name] = dict(images=steps * training.c.batch / elapsed,
                                  waits=training.waited / elapsed,
                                  loss=training.sums["loss"].item() / steps)
        print(f"{name:20}{row['images']:9.0f}{row['waits']:7.1%}{row['loss']:8.4f}", flush=True)


def bench_train(folder, preset):
    """The command `train`: a few steps of a preset."""
    result = header()
    (bench_large if preset in LARGE else bench_small)(preset, result)
    save(result, folder / f"train_{preset}.json")


# ------------------------------------------------------------------------------------------------
# Showing

def cell(row, name):
    """The time of a rival and how many times as long as ours it is."""
    t, ours = row["times"].get(name), row["times"]["ours"]
    if t is None:
        return "failed" if name in row["times"] else "-"
    return f"{t:.1f}{'?' if name in row['differ'] else ''} {t / ours if ours else math.nan:.2f}x"


def show(row):
    """Print a line of the table of operations, or the table of networks."""
    fraction, cost = row["fractions"], row["cost"] / 1e6
    if row["which"] != "both":
        print(f"{row['name']:31} {row['which']:9}{cost:5.0f}{row['host']:5.0f} "
              f"{row['times']['ours'] or math.nan:7.1f}{fraction.get('ours', 0):5.0%}"
              + "".join(f" {cell(row, name):>14}" for name in RIVALS), flush=True)
        return
    print(f"\n{row['name']:40} {'ms':>7} {'of GEMM':>8} {'MB kept':>8}")
    for name, t in row["times"].items():
        print(f"{name:40} " + (
            f"{t / 1e3:7.2f} {fraction[name]:8.1%} {row['kept'][name] / 1e6:8.0f}"
            f"{' ?' if name in row['differ'] else ''}" if t else " failed"))


def plot(rows, path):
    """What each row reaches of its ceiling, as bars; without matplotlib the JSON has to do."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(10, 10))
    for i, name in enumerate(("ours", *RIVALS)):
        heights = [row["fractions"].get(name, 0) for row in rows]
        axis.barh([y + 0.16 * i for y in range(len(rows))], heights, 0.15, label=name)
    axis.set_yticks([y + 0.32 for y in range(len(rows))],
                    [f"{row['name']}, {row['which']}" for row in rows])
    axis.set(xlabel="of the copy ceiling (feed-forward network: of the GEMM ceiling)")
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def bench_kernels(folder):
    """The command `kernels`: prints tables, writes kernels.json and kernels.png to the folder."""
    start, (copy, gemm) = time.time(), ceilings()
    result = header() | dict(copy=copy, gemm=gemm, rows=[])
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, read plus written; product of two 8192x8192 "
          f"matrices {gemm / 1e12:.0f} TFLOP/s\n")
    print("MB: must move; host: microseconds to launch ours; then device microseconds: ours, its "
          "fraction of the copy\nceiling, rivals and how many times ours they take. built-in: "
          "F.rms_norm; for mixing a dense sum over all states")
    print(f"{'':31} {'':9}{'MB':>5}{'host':>5} {'ours':>7}{'':5}"
          + "".join(f" {name:>14}" for name in RIVALS))
    for make_case in CASES:
        for row in measure(make_case, copy, gemm):
            show(row)
            result["rows"].append(row)
            save(result, folder / "kernels.json")
        torch._dynamo.reset()  # the next case has the memory for itself
        gc.collect()
        torch.cuda.empty_cache()
    plot(result["rows"], folder / "kernels.png")
    print(f"\n{time.time() - start:.0f} s; kernels.json and kernels.png are in {folder}")


COMMANDS = {"kernels": bench_kernels, "tower": bench_tower, "train": bench_train,
            "latency": bench_latency, "loading": bench_loading}


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=tuple(COMMANDS), help="what to measure")
    parser.add_argument("--out", default="runs/bench", help="folder for the results")
    parser.add_argument("--preset", default="mos_s", choices=tuple(PRESETS), help="for `train`")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not torch.version.cuda:
        raise ValueError("bench.py needs an NVIDIA GPU")
    if kernels.PLAIN:
        raise ValueError("bench.py needs Triton, and MOS_PLAIN=1 turns the kernels off")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    COMMANDS[args.what](folder, *([args.preset] if args.what == "train" else []))


if __name__ == "__main__":
    run(main)
