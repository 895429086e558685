"""Measuring on a GPU: what the benchmarks share."""

import gc
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kernels
from common import randomise, replayed, revision
from mos import unfilled
from towers import Tokenizer

DEVICE, DTYPE = "cuda", torch.bfloat16
SETS = 3  # sets of inputs that calls go through in turn, so that no cache serves them
GIB = 2**30
ALL_PARTS = ("understanding", "router", "generation", "vae")


# --- What is measured ----------------------------------------------------------------------------
def normal(*shape):
    """Return standard normal values in bf16 on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def random_model(config, parts=ALL_PARTS, device=DEVICE, dtype=DTYPE, vae_dtype=torch.float32):
    """Return a model at its full size with random weights: it draws noise, but its cost is real.

    parts: which get weights, the VAE's in vae_dtype, the others' in dtype; the rest has no memory.
    """
    model = unfilled(config)
    model.tokenizer = Bytes(model.tokenizer.words)
    for name in parts:
        randomise(device, getattr(model, name).to(vae_dtype if name == "vae" else dtype))
    if "vae" in parts:
        ones = torch.ones(config.vae_channels, device=device)
        model.vae.set_statistics(0 * ones, ones)
        model.vae.to(memory_format=torch.channels_last)
    return model.eval()


class Bytes(Tokenizer):
    """A tokenizer of bytes, with which a model with random weights reads any text."""

    def encode(self, text, image_tokens=0):
        return [self.BOS, *(len(self.SPECIAL) + byte for byte in text.encode())]


def euler_step(model, context, guidance):
    """Return the function (z, t, t_next) -> next z: a denoising step as `MoS.denoise` takes it."""
    def step(z, t, t_next):
        v = model.guided(z, t, context, guidance=guidance, rescale=0.7)
        return z + (t_next - t) * v
    return step


# --- Clocks and memory ---------------------------------------------------------------------------
def record_kernels(call):
    """Return the profile of the kernels that a call launches."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        call()
        torch.cuda.synchronize()
    return record


def device_time(prepare, calls=10):
    """Return the microseconds that a call's kernels take on the GPU, the median of many calls.

    prepare: i -> the i-th call, ready to run; preparing is not timed. Raises RuntimeError where the
    profiler sees no kernels.
    """
    for i in range(SETS):  # compiles
        prepare(i)()
    ready = [prepare(i) for i in range(calls)]
    torch.cuda.synchronize()
    record = record_kernels(lambda: [call() for call in ready])
    events = sorted((e.time_range.start, e.time_range.elapsed_us()) for e in record.events()
                    if e.device_type == DeviceType.CUDA and not e.is_user_annotation
                    and not e.name.endswith(" Sync"))  # which is waiting, not work
    if not events:
        raise RuntimeError("the profiler saw no kernels")
    times = [microseconds for _, microseconds in events]
    count = len(times) // calls  # kernels in each call
    if len(times) != count * calls:  # calls launch different kernels: nothing says which is whose
        return sum(times) / calls
    return median(sum(times[i * count:(i + 1) * count]) for i in range(calls))


def clock_time(call, calls=10, warmup=3, wait=True):
    """Return the milliseconds of a call by the clock, a median: launches and kernels.

    wait: for the kernels to end; without it only until the call returns to the host.
    """
    times = []
    for _ in range(warmup + calls):
        if wait:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if wait:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return median(times[warmup:])


def replay_time(function, *inputs, calls=20, warmup=3):
    """Return the milliseconds of a CUDA graph's replay by device events: a median."""
    replay = replayed(function, *inputs)
    times = []
    for _ in range(warmup + calls):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        replay(*inputs)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[warmup:])


def ceilings():
    """Return what this GPU can do at most: bytes/s of a copy, read plus written, and FLOP/s."""
    sources = [normal(2**29) for _ in range(SETS)]
    target = normal(2**29)
    copy = device_time(lambda i: partial(target.copy_, sources[i % SETS]), 30)
    factors = [normal(8192, 8192) for _ in range(SETS)]
    product = device_time(lambda i: partial(torch.mm, factors[i % SETS], factors[0]), 60)
    return 2e6 * target.nbytes / copy, 2e6 * 8192**3 / product


def free_memory():
    """Give the memory that no tensor uses any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def attempt(label, measure, *arguments):
    """Return measure(*arguments); where it fails print the reason to stderr and return None."""
    try:
        return measure(*arguments)
    except Exception as e:  # the others may still work
        reason = f"{e} ".splitlines()[0]
        print(f"{label}: {type(e).__name__}: {reason}", file=sys.stderr, flush=True)
    finally:
        free_memory()


def print_header():
    """Print on which GPU and with which versions the measurement runs."""
    versions = [f"torch {torch.__version__}", f"triton {kernels.triton.__version__}"]
    for package in ("liger_kernel", "diffusers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    print(f"{torch.cuda.get_device_name()}, {', '.join(versions)}, revision {revision()}")
