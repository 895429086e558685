"""Speed: the kernels beside their rivals, measured in one run on one NVIDIA GPU.

    python -m tools.bench kernels    # norms, QK-norm + RoPE, SwiGLU, mixing, feed-forward network
    python -m tools.bench tower      # a denoising step of MoS-S at 1024x1024, as sample.py runs it
    python -m tools.bench train      # training steps of --recipe mos_s, or of a small one
    python -m tools.bench latency    # from prompt to picture, stage by stage, and other models
    python -m tools.bench loading    # reading a tower of 16 GB from its folder

All is bf16 on random data (zeros are faster); `train` has fp32 weights under autocast. `kernels`
prints device time: the sum over a call's kernels as the profiler sees them, the median of 10 calls
that take turns with SETS sets of inputs, so that no cache serves them. "-": does not apply or is
not installed; "failed": stderr says why; "?": the results differ from ours by more than 2 %.

Letters as in `mos.py`, and for the feed-forward network T tokens, D its width, F its hidden width.
"""

import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as nnf
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from common import ROOT, CommandLine, World, randomise, replacing, run
from config import MoSConfig, TrainConfig, read_recipe
from kernels import Keys, autocast
from mos import Context
from tools.estimate import estimate
from tools.latency import TOKENS, bench_latency, bench_loading
from tools.timing import (DEVICE, DTYPE, GIB, SETS, attempt, ceilings, clock_time, device_time,
                          euler_step, free_memory, normal, print_header, random_model,
                          record_kernels, replay_time)
from train import prepare

try:
    from liger_kernel import ops as liger
except ImportError:
    liger = None

EPS = 1e-6
RIVALS = ("torch.compile", "eager", "Liger", "built-in")


# --- The cases -----------------------------------------------------------------------------------
class Case(NamedTuple):
    """An operation, its rivals, and what it costs at least."""
    name: str
    make: Callable  # () -> a fresh set of inputs; the backward pass is for those that require grad
    twin: Callable  # inputs -> outputs in plain PyTorch: the rivals "eager" and "torch.compile"
    rivals: dict    # {name: the same by other means}; Liger last: it writes into its gradients
    passes: dict    # {pass: (values that must move, our operator, (*inputs, *gradients of the
    #                         twin's outputs) -> its arguments)}


def leaf(*shape):
    """Return standard normal values that require a gradient."""
    return normal(*shape).requires_grad_()


def liger_norm(x, w):
    """Return Liger's RMSNorm of x. Like all others, it does not write into its gradient here."""
    return liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def norm_case(rows, width):
    """Return the case RMSNorm: read x, write y; backward: read x and dy, write dx."""
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
    """Return the case s = x + r, then RMSNorm: read x, r, write s, y.

    Backward: read s, ds, dy, write dx, which is the gradient of r, too: only x requires it here.
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
    """Return the case of QK-norm and RoPE from a packed projection: H queries, keys, values each.

    Read and write q, k; v stays. Backward: read q, k, dq, dk, dv, write the packed gradient.
    """
    def make():
        positions = torch.arange(L, device=DEVICE)[:, None]
        return (leaf(B, L, 3 * H, Dh), *kernels.rope_table(positions, (Dh,)), leaf(Dh), leaf(Dh))

    def twin(qkv, cos, sin, wq, wk):
        q, k, v = kernels.queries_keys_twin(qkv, (cos, sin), H, (wq, wk, None), None, EPS)
        # Compiled without the network around it, a result that is a view of an input costs a copy
        # in the backward pass. The clone, made where the forward pass is not timed, saves that.
        return q, k, v.clone() if which == "backward" else v

    def built_in(qkv, cos, sin, wq, wk):
        q, k, v = qkv.split(H, 2)
        q, k = nnf.rms_norm(q, wq.shape, wq, EPS), nnf.rms_norm(k, wk.shape, wk, EPS)
        return kernels.apply_rope(q, (cos, sin)), kernels.apply_rope(k, (cos, sin)), v

    def liger_queries_keys(qkv, cos, sin, wq, wk):
        q, k, v = qkv.split(H, 2)  # the norms copy q and k, the rotation works in place
        q, k = liger_norm(q, wq).transpose(1, 2), liger_norm(k, wk).transpose(1, 2)
        q, k = liger.LigerRopeFunction.apply(q, k, cos, sin, None, 1, Dh)
        return q.transpose(1, 2), k.transpose(1, 2), v

    def backward(*inputs):
        dqkv, _, dw = kernels.queries_keys_backward(*inputs)
        return dqkv, dw[0], dw[1]  # of qkv and of the norms of q and k

    n = B * L * H * Dh
    passes = {"forward": (4 * n, kernels.queries_keys_forward, lambda qkv, cos, sin, wq, wk, *_:
                          (qkv, None, cos, sin, wq, wk, None, H, EPS)),
              "backward": (8 * n, backward, lambda qkv, cos, sin, wq, wk, *gradients:
                           (qkv, None, cos, sin, wq, wk, None, *gradients, EPS))}
    return Case(f"QK-norm + RoPE {B}x{L}x{H}x{Dh}", make, twin,
                rivals={"built-in": built_in, "Liger": liger_queries_keys},
                passes={which: passes[which]})


def liger_swiglu(gate_up):
    """Return Liger's SwiGLU, which reads gate and up from one packed tensor."""
    return liger.LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def swiglu_case(T, F):
    """Return the case h = silu(gate) * up: read 2F, write F; backward: read 3F, write 2F, or 3F.

    "back + h" writes h again, too.
    """
    n = T * F
    return Case(
        f"SwiGLU {T}x{F}", make=lambda: (leaf(T, 2 * F),), twin=kernels.swiglu_twin,
        rivals={"Liger": liger_swiglu},
        passes={
            "forward": (3 * n, kernels.swiglu, lambda gate_up, dh: (gate_up, None, True)),
            "backward": (5 * n, kernels.swiglu, lambda gate_up, dh: (gate_up, dh, False)),
            "back + h": (6 * n, kernels.swiglu, lambda gate_up, dh: (gate_up, dh, True))})


def mixing_case(B, S, M, K, Du):
    """Return the case of MoS eq. (4) in one block, K of M states a token: read K rows, write one.

    Backward, to the weights alone: read K states and one gradient.
    """
    def make():
        index = torch.rand(B, S, M, device=DEVICE).topk(K).indices
        return normal(B, S, M, Du), index, torch.rand(B, S, K, device=DEVICE).requires_grad_()

    def dense(states, index, weight):
        zeros = states.new_zeros(states.shape[:3])
        return torch.einsum("bsm,bsmd->bsd", zeros.scatter(2, index, weight.to(DTYPE)), states)

    n = (K + 1) * B * S * Du
    return Case(
        f"mixing {K} of {M} states {B}x{S}x{Du}", make, twin=kernels.mix_states_twin,
        rivals={"built-in": dense},
        passes={
            "forward": (n, kernels.mix_forward, lambda x, index, weight, dy:
                        (x, index, weight, None)),
            "backward": (n, kernels.mix_backward, lambda x, index, weight, dy: (x, index, dy))})


def network_case(T, D, F):
    """Return the case of a feed-forward network, both passes in one: 18 T D F FLOP."""
    def separate(x, gate_up, down):
        gate, up = gate_up.chunk(2)  # joining their gradients again is 0.2 % of the time
        return nnf.linear(nnf.silu(nnf.linear(x, gate)) * nnf.linear(x, up), down)

    def by_liger(x, gate_up, down):
        return nnf.linear(liger_swiglu(nnf.linear(x, gate_up)), down)

    def make():
        gate_up = normal(2 * F, D) * D ** -0.5
        down = normal(D, F) * F ** -0.5
        return leaf(T, D), gate_up.requires_grad_(), down.requires_grad_()

    return Case(
        f"feed-forward network T={T} D={D} F={F}", make, twin=kernels.feed_forward_twin,
        rivals={"ours": kernels.feed_forward, "eager": separate, "Liger": by_liger},
        passes={"both": (18 * T * D * F, None, None)})


CASES = (norm_case(36864, 2560), norm_case(98304, 3072), add_norm_case(36864, 2560),
         queries_keys_case("forward", B=8, L=4608, H=20, Dh=128),
         queries_keys_case("backward", B=8, L=4608, H=20, Dh=128),
         swiglu_case(T=36864, F=8192), mixing_case(B=16, S=512, M=32, K=2, Du=4096),
         network_case(T=36864, D=3072, F=8192))


# --- Measuring -----------------------------------------------------------------------------------
def rival_call(function, which, inputs, gradients):
    """Return a pass, ready to run; before "backward" the forward pass has run when this returns."""
    wanted = [x for x in inputs if x.requires_grad]
    if which == "forward":
        return partial(function, *inputs)
    if which == "backward":
        return partial(grad, function(*inputs), wanted, gradients)
    return lambda: grad(function(*inputs), wanted, gradients)


def kept_bytes(function, inputs):
    """Return the bytes that a forward pass keeps for the backward pass, without its output."""
    before = torch.cuda.memory_allocated()
    y = function(*inputs)
    return torch.cuda.memory_allocated() - before - y.nbytes


def tensors(results):
    """Return results as a list, without the empty tensors: those were not asked for."""
    results = [results] if isinstance(results, torch.Tensor) else results
    return [x for x in results if x.numel()]


def agree(ours, theirs):
    """Return whether results are the same up to the rounding of bf16. theirs may be longer."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return all((norm(a - b) <= 0.02 * norm(a)).item() for a, b in zip(ours, theirs))


def measure(case, copy, gemm):
    """Yield a row for each pass of a case; copy and gemm: the ceilings in bytes/s and FLOP/s.

    A row has megabytes: what must move; host: microseconds to launch ours; differ: the names whose
    results are not ours; and by name times: microseconds on the device, None if it failed;
    fractions: of the ceiling; kept: bytes kept between the passes of "both".
    """
    functions = {"ours": None, "torch.compile": torch.compile(case.twin, dynamic=False),
                 "eager": case.twin, **case.rivals}
    if not liger:
        functions.pop("Liger", None)
    sets = []
    for _ in range(SETS):
        inputs = case.make()
        sets.append((inputs, [torch.randn_like(y) for y in tensors(case.twin(*inputs))]))
    for which, (cost, operator, arguments) in case.passes.items():
        size = cost * DTYPE.itemsize
        floor = 1e6 * (cost / gemm if which == "both" else size / copy)  # microseconds
        row = dict(name=case.name, which=which, megabytes=size / 1e6, host=0, differ=[], times={},
                   fractions={}, kept={})
        expected = []
        for name, function in functions.items():
            ours = name == "ours" and operator
            if which == "back + h" and not ours:
                continue

            def prepare(i):
                inputs, gradients = sets[i % SETS]
                if ours:
                    return partial(operator, *arguments(*inputs, *gradients))
                return rival_call(function, which, inputs, gradients)

            def compare():
                results = tensors(prepare(0)())
                if name == "ours":
                    expected.extend(results)
                if not agree(expected, results):
                    row["differ"].append(name)
                if ours:
                    row["host"] = 1e3 * clock_time(prepare(0), 50, warmup=0, wait=False)
                if which == "both":
                    row["kept"][name] = kept_bytes(function, sets[0][0])
                return device_time(prepare)

            with torch.set_grad_enabled(not ours):
                row["times"][name] = attempt(f"{case.name}, {which}, {name}", compare)
        row["fractions"] = {name: floor / t for name, t in row["times"].items() if t}
        yield row


# --- Whole towers, with random weights -----------------------------------------------------------
class Products(TorchDispatchMode):
    """Collects the matrix products and attention calls that run inside, SETS of each kind."""

    def __init__(self):
        super().__init__()
        self.calls = {}  # {operator and shapes: [how many calls, some of them, ready to run]}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.overloadpacket.__name__.startswith(("mm", "addmm", "bmm", "_scaled_dot_product")):
            shapes = [(a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args]
            entry = self.calls.setdefault((str(op), str(shapes)), [0, []])
            entry[0] += 1
            if len(entry[1]) < SETS:
                entry[1].append(partial(op, *args, **kwargs))
        return op(*args, **kwargs)

    def run_all(self, *_):
        """Run every call as often as it was seen, and nothing else."""
        for count, calls in self.calls.values():
            for i in range(count):
                calls[i % len(calls)]()

    def separate_time(self):
        """Return the microseconds of all calls, each kind timed alone."""
        return sum(count * device_time(lambda i: calls[i % len(calls)])
                   for count, calls in self.calls.values())


@torch.no_grad()
def bench_tower(args):
    """Run the command `tower`: one prompt of 512 tokens with guidance, 32 x 32 visual tokens."""
    gemm = ceilings()[1]
    c = MoSConfig(**read_recipe("mos_s")["model"])
    model = random_model(c, ("router", "generation"))
    S = 512
    context = Context(normal(2, S, c.und_width), normal(2, S, c.und_depth, c.gen_width),
                      Keys(None, [(1, S), (1, 1)]), projected=True)  # the negative prompt is empty
    z = torch.randn(1, c.vae_channels, 64, 64, device=DEVICE)
    inputs = z, *torch.tensor([0.6, 0.5], device=DEVICE)
    step = euler_step(model, context, guidance=5.0)
    times = {}
    with autocast(torch.device(DEVICE)):
        times["iteration"] = replay_time(step, *inputs)
        print(record_kernels(partial(step, *inputs)).key_averages().table(
            sort_by="self_device_time_total", row_limit=16, max_name_column_width=80))
        with Products() as products:
            step(*inputs)
        times["products alone"] = products.separate_time() / 1e3
        times["products in one graph"] = replay_time(products.run_all, *inputs)
        logits = torch.randn(2, S, c.und_depth, c.gen_depth, device=DEVICE)
        model.router.forward = lambda *_: logits
        times["without router"] = replay_time(step, *inputs)
        kernels.PLAIN = True
        times["plain, without router"] = replay_time(step, *inputs)
        for block in model.generation.blocks:
            block.forward = torch.compile(block.forward)
        times["plain, blocks compiled, without router"] = replay_time(step, *inputs)
    print(f"MoS-S, 1024x1024, {S} tokens, guidance, one iteration; GEMM {gemm / 1e12:.0f} TFLOP/s")
    for name, milliseconds in times.items():
        ratio = times["iteration"] / milliseconds
        print(f"{name:40} {milliseconds:7.2f} ms, the iteration takes {ratio:.3f} times as long")
    print(f"router {1 - times['without router'] / times['iteration']:.1%}")


class TrainCase(NamedTuple):
    """A way to train a large model for a few steps."""
    name: str
    size: int = 512          # pixels a side; above 512 with activation checkpointing
    encode: bool = False     # states and latents are computed in the step instead of given
    plain: bool = False      # plain PyTorch instead of the kernels

    def seconds(self, model, optimizer, B):
        """Return the median time of a step with batch B."""
        c = model.config
        device = torch.device(DEVICE)
        for block in model.generation.blocks:
            block.recompute = self.size > 512
        side = self.size // model.vae.factor
        context = None  # MoS.loss lets the tower read the tokens
        if not self.encode:
            states = normal(B, TOKENS, c.und_depth, c.und_width)
            context = Context(states[:, :, 0], states, Keys(None, [(B, TOKENS)]))
        tokens = torch.ones(B, TOKENS, dtype=torch.long, device=device)
        pictures = torch.rand(B if self.encode else 0, 3, self.size, self.size, device=device)
        z0, z1 = torch.randn(2, B, c.vae_channels, side, side, device=device)
        t = torch.rand(B, device=device)
        uniform = torch.rand(B, TOKENS, c.und_depth + 1, c.gen_depth, device=device)

        def step(z0=z0):
            if self.encode:
                with torch.no_grad():
                    z0 = torch.cat([model.vae.encode(part) for part in pictures.split(8)])
            with autocast(device):
                loss = model.loss(z0, tokens, t, z1, uniform, context).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        torch.cuda.reset_peak_memory_stats()
        return clock_time(step, calls=3, warmup=2) / 1e3

    def largest(self, model, optimizer):
        """Return the largest batch that fits into the GPU's memory, and the seconds of its step."""
        for B in (96, 64, 48, 40, 32, 24, 16, 12, 8, 4):
            free_memory()
            try:
                return B, self.seconds(model, optimizer, B)
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                optimizer.state.clear()
        raise ValueError(f"{self.name}: not even {B} pictures fit into this GPU's memory")

    def estimated(self, config, B):
        """Return the GiB that tools/estimate.py computes, without the parts that do not run."""
        memory = estimate(replace(config, size=self.size), micro_batch=B, tokens=TOKENS, ema=False,
                          recompute=self.size > 512)
        unused = 0 if self.encode else memory["understanding tower"] + memory["VAE"]
        return math.nan if self.plain else (memory["peak"] - unused) / GIB


TRAIN_CASES = (TrainCase("states and latents given"), TrainCase("the same, plain", plain=True),
               TrainCase("given, recompute", size=1024),
               TrainCase("encodings in the step", encode=True))


def bench_large(recipe):
    """Time training steps of a recipe's router and generation tower, with AdamW."""
    gemm = ceilings()[1]
    config = MoSConfig(**read_recipe(recipe)["model"])
    model = random_model(config, ("router", "generation"), dtype=torch.float32)
    parameters = [*model.router.parameters(), *model.generation.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    print(f"{recipe}, {TOKENS} tokens a picture; GEMM {gemm / 1e12:.0f} TFLOP/s. MFU: three times "
          "the forward pass of\nrouter and generation tower over the time, recomputation not "
          f"counted\n{'':26}{'side':>5}{'batch':>6}{'s':>8}{'images/s':>9}{'MFU':>7}"
          f"{'peak GiB':>9}{'estimate':>9}")
    for case in TRAIN_CASES:
        if case.encode:
            randomise(DEVICE, model.understanding.bfloat16(), model.vae)
            model.vae.set_statistics(torch.zeros(config.vae_channels),
                                     torch.ones(config.vae_channels))
        kernels.PLAIN = case.plain
        B, seconds = case.largest(model, optimizer)
        peak = torch.cuda.max_memory_allocated()
        side = case.size // model.vae.factor
        mfu = 3 * B * model.flops(TOKENS, (side, side)) / seconds / gemm
        print(f"{case.name:26}{case.size:5}{B:6}{seconds:8.4f}{B / seconds:9.1f}{mfu:7.1%}"
              f"{peak / GIB:9.1f}{case.estimated(config, B):9.1f}", flush=True)


def bench_small(recipe, steps=100, warmup=20):
    """Time the image stage of a small recipe as train.py runs it, on the parts in weights/."""
    print(f"{recipe}, stage image\n{'':20}{'images/s':>9}{'waits':>7}{'loss':>8}")
    values = read_recipe(recipe)
    kernels.NARROW = 0  # the kernels run in compiled models, too: which is faster is the question
    for name in ("plain, eager", "kernels, eager", "plain, compiled", "kernels, compiled"):
        kernels.PLAIN = "plain" in name
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as out:
            changes = dict(out=out, init=str(ROOT / "weights"), compile="compiled" in name,
                           scenes=20_000)
            c = TrainConfig(**values["image"] | changes)
            trainer = prepare(c, values["model"], {}, World.join(600))
            trainer.begin()
            for i in range(warmup + steps):
                if i == warmup:
                    torch.cuda.synchronize()
                    trainer.reset(i)
                trainer.step(i)
            torch.cuda.synchronize()
            elapsed = time.time() - trainer.clock
        print(f"{name:20}{steps * c.batch / elapsed:9.0f}{trainer.waited / elapsed:7.1%}"
              f"{trainer.sums['loss'].item() / steps:8.4f}", flush=True)


def bench_train(args):
    """Run the command `train`: a few steps of a recipe."""
    published = read_recipe(args.recipe)["model"]["und_folder"]
    (bench_large if published else bench_small)(args.recipe)


# --- Tables and pictures -------------------------------------------------------------------------
def print_row(row):
    """Print a line of the table: of rivals the time, and how many times ours they take."""
    times = row["times"]
    ours = times["ours"] or math.nan
    cells = []
    for name in RIVALS:
        t = times.get(name)
        text = "failed" if name in times else "-"
        if t:
            text = f"{t:.1f}{'?' if name in row['differ'] else ''} {t / ours:.2f}x"
        cells.append(f" {text:>14}")
    print(f"{row['name']:31} {row['which']:9}{row['megabytes']:5.0f}{row['host']:5.0f} {ours:7.1f}"
          f"{row['fractions'].get('ours', 0):5.0%}{''.join(cells)}", flush=True)


def print_network(row):
    """Print the table of a feed-forward network."""
    print(f"\n{row['name']:40} {'ms':>7} {'of GEMM':>8} {'MB kept':>8}")
    for name, t in row["times"].items():
        values = "failed"
        if t:
            values = f"{t / 1e3:7.2f} {row['fractions'][name]:8.1%} {row['kept'][name] / 1e6:8.0f}"
        print(f"{name:40} {values}{' ?' if name in row['differ'] else ''}")


def plot(rows, path):
    """Draw the share of its ceiling that each row reaches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 10), layout="tight")
    axis = figure.subplots()
    for i, name in enumerate(("ours", *RIVALS)):
        heights = [row["fractions"].get(name, 0) for row in rows]
        axis.barh([y + 0.16 * i for y in range(len(rows))], heights, 0.15, label=name)
    labels = [f"{row['name']}, {row['which']}" for row in rows]
    axis.set_yticks([y + 0.32 for y in range(len(rows))], labels)
    axis.set(xlabel="of the copy ceiling (feed-forward network: of the GEMM ceiling)")
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def bench_kernels(args):
    """Run the command `kernels`: print tables, draw kernels.png."""
    copy, gemm = ceilings()
    rows = []
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, read plus written; product of two 8192x8192 "
          f"matrices {gemm / 1e12:.0f} TFLOP/s\n")
    print("MB: must move; host: microseconds to launch ours; then device microseconds: ours, its "
          "fraction of the copy\nceiling, rivals and how many times ours they take. built-in: "
          "F.rms_norm; for mixing a dense sum over all states")
    print(f"{'':31} {'':9}{'MB':>5}{'host':>5} {'ours':>7}{'':5}"
          + "".join(f" {name:>14}" for name in RIVALS))
    for case in CASES:
        for row in measure(case, copy, gemm):
            print_result = print_network if row["which"] == "both" else print_row
            print_result(row)
            rows.append(row)
        torch._dynamo.reset()  # the next case has the memory for itself
        free_memory()
    attempt("kernels.png", plot, rows, args.out / "kernels.png")


COMMANDS = {"kernels": bench_kernels, "tower": bench_tower, "train": bench_train,
            "latency": bench_latency, "loading": bench_loading}


def main():
    """Run the command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=tuple(COMMANDS), help="what to measure")
    parser.add_argument("--out", default="runs/bench", type=Path, help="folder for the pictures")
    parser.add_argument("--recipe", default="mos_s", help="for `train`: a name in recipes/, or the "
                        "path of a .toml file")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not torch.version.cuda:
        raise ValueError("tools.bench needs an NVIDIA GPU")
    if kernels.PLAIN:
        raise ValueError("tools.bench needs Triton, and MOS_PLAIN=1 turns the kernels off")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print_header()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    run(main)
