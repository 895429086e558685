"""Measuring on a GPU: what the benchmarks share."""

import json
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kernels
from common import randomise, replacing, replayed
from config import PRESETS, MoSConfig
from mos import unfilled
from train import revision

DEVICE, DTYPE = "cuda", torch.bfloat16
SETS, CALLS = 3, 10


def normal(*shape):
    """Standard normal values."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def device_time(prepare, calls=CALLS):
    """Microseconds on the device of a call's kernels, the median of many calls.

    prepare: i -> the i-th call, ready to run; what `prepare` itself does is not timed.
    """
    for i in range(SETS):  # compiles
        prepare(i)()
    ready = [prepare(i) for i in range(calls)]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        for call in ready:
            call()
        torch.cuda.synchronize()
    kernels_seen = sorted((e.time_range.start, e.time_range.elapsed_us()) for e in record.events()
                          if e.device_type == DeviceType.CUDA and not e.is_user_annotation
                          and not e.name.endswith(" Sync"))  # waiting for the device, not work
    if not kernels_seen:
        raise RuntimeError("the profiler saw no kernels")
    times, each = [t for _, t in kernels_seen], len(kernels_seen) // calls
    if len(times) != each * calls:  # the calls differ in their kernels and cannot be told apart
        return sum(times) / calls
    return median(sum(times[i * each:(i + 1) * each]) for i in range(calls))


def call_time(call, calls=50):
    """Microseconds until a call is back on the host, its kernels still waiting or at work."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(times) * 1e6


def ceilings():
    """What this GPU can do: copies in bytes/s, read plus written, and products in FLOP/s."""
    sources, target = [normal(2**29) for _ in range(SETS)], normal(2**29)
    copy = device_time(lambda i: partial(target.copy_, sources[i % SETS]), 30)
    factors = [normal(8192, 8192) for _ in range(SETS)]
    product = device_time(lambda i: partial(torch.mm, factors[i % SETS], factors[0]), 60)
    return 2e6 * target.nbytes / copy, 2e6 * 8192**3 / product


def large_model(dtype, preset="mos_s"):
    """Router and generation tower of a large preset; its other parts stay without memory."""
    model = unfilled(MoSConfig(**PRESETS[preset]))
    randomise(DEVICE, model.router.to(dtype), model.generation.to(dtype))
    return model


def whole_time(call, calls=10, before=3):
    """Milliseconds of a call by the clock, launches and all kernels: the median after `before`."""
    times = []
    for _ in range(before + calls):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times[before:])


def show_profile(call, rows=16):
    """Print which kernels a call spends its time in: share, milliseconds, launches, name."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        call()
        torch.cuda.synchronize()
    found = [(e.self_device_time_total, e.count, e.key) for e in record.key_averages()
             if e.self_device_time_total]
    total = sum(spent for spent, *_ in found)
    print(f"profile: {total / 1e3:.2f} ms in kernels")
    for spent, count, name in sorted(found, reverse=True)[:rows]:
        print(f"{spent / total:7.1%} {spent / 1e3:8.3f} {count:5} {name[:80]}")


def replay_time(function, *inputs, calls=20):
    """Microseconds of a CUDA graph's replay: the median of many, by device events."""
    replay = replayed(function, *inputs)
    times = []
    for _ in range(calls + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay(*inputs)
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return median(times[3:])


def installed(package):
    """The version of a package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def header():
    """Print and return what was measured with."""
    result = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                  triton=kernels.triton.__version__, revision=revision(),
                  liger=installed("liger_kernel"), diffusers=installed("diffusers"))
    print("{gpu}, torch {torch}, triton {triton}, Liger {liger}, diffusers {diffusers}, revision "
          "{revision}".format(**result))
    return result


def save(result, path):
    """Write a result as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
