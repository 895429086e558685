"""Break training again and again, and show that nothing is lost.

    python drill.py --kills 50 --processes 2

A small VAE is trained once without harm and once killed by SIGKILL at random moments: one process
or all of them, every third time while a state is being written; now and then the newest state is
damaged, too. After each kill at most the steps since the last state may be missing, or since the
one before if that was still being written, and in the end both runs must hold the same bits. Runs
on a CPU.
"""

import contextlib
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoint import fault, states
from common import ROOT, CommandLine, run, tqdm_or_none

SMALL = dict(vae_channels=6, vae_width=4, vae_decoder_width=4, und_width=40, und_depth=5,
             und_heads=5, und_kv_heads=1, und_hidden=48, gen_width=64, gen_depth=3, gen_heads=2,
             gen_kv_heads=1, gen_hidden=72, router_width=32, router_heads=1, size=64)
SAVE_EVERY, KEEP = 4, 3
MOST = 2 * SAVE_EVERY  # steps that a kill may cost: one state may still have been on its way


def start(folder, args, steps):
    """train.py, with a learning rate that does not depend on the number of steps."""
    flags = dict(stage="vae", steps=steps, batch=args.processes, save_every=SAVE_EVERY, keep=KEEP,
                 log_every=1, eval_every=steps + 1, warmup=0, final_lr=1, out=folder, **SMALL)
    launcher = [] if args.processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    command = [sys.executable, *launcher, ROOT / "train.py", "--resume",
               *(["--parallel", args.parallel] if args.processes > 1 else [])]
    command += [str(a) for k, v in flags.items() for a in ("--" + k.replace("_", "-"), v)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers(process):
    """The processes that train: the children of torchrun, or without it the process itself."""
    if "torch.distributed.run" not in process.args:
        return [process.pid]
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                           text=True).stdout.split()
    return [int(pid) for pid in found] or [process.pid]  # none yet: then torchrun itself


def logged(folder):
    """The last step in the log."""
    path = folder / "vae.csv"
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    return max([int(row["step"]) for row in rows], default=0)


def saved(folder):
    """The step of the newest good state."""
    return next((int(s.name) for s in states(folder / "vae.states") if not fault(s)), 0)


def saving(folder, since):
    """Whether a state is being written, or was when training was killed."""
    return any(path.stat().st_mtime > since for path in (folder / "vae.states").glob(".[0-9]*"))


def kill(folder, process, rng, while_saving):
    """Wait for the moment, then kill one process or all; returns whether they were saving.

    One time in four the moment lies anywhere from the start on, else within training.
    """
    begin, log, early = time.time(), folder / "vae.csv", rng.random() < 0.25
    while process.poll() is None and not early and not (
            log.is_file() and log.stat().st_mtime > begin):
        time.sleep(0.02)
    moment = time.time() + rng.uniform(0, 10 if early else 3)
    while process.poll() is None and (
            time.time() < moment or while_saving and not saving(folder, begin)):
        time.sleep(0.001)
    if process.poll() is not None:
        raise ValueError(f"training ended by itself, see {folder / 'log.txt'}")
    trainers = workers(process)
    if rng.random() < 0.5:
        trainers = [rng.choice(trainers)]  # torchrun ends the others
    else:
        process.kill()
    for pid in trainers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return saving(folder, begin)


def damage(state, rng):
    """Cut a file of a state short, or flip one of its bits."""
    path = rng.choice(sorted(state.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)):]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def same(folder, other):
    """Whether the newest states hold the same bits."""
    a, b = states(folder / "vae.states")[0], states(other / "vae.states")[0]
    if a.name != b.name or [p.name for p in sorted(a.iterdir())] != [
            p.name for p in sorted(b.iterdir())]:
        return False
    return all(torch.equal(tensor, load_file(b / path.name)[name])
               for path in a.glob("*.safetensors") for name, tensor in load_file(path).items())


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--processes", type=int, default=2, help="that train together")
    parser.add_argument("--parallel", default="fsdp", choices=("ddp", "fsdp", "hsdp"),
                        help="how they share the work")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="emptied first")
    args = parser.parse_args()
    if args.kills < 1 or args.processes < 1:
        raise ValueError("--kills and --processes must be at least 1")
    rng, broken, straight = random.Random(args.seed), args.out / "broken", args.out / "straight"
    for folder in (broken, straight):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    harmed, torn, lost = 0, 0, []
    for i in tqdm_or_none(iterable=range(args.kills), unit="kill") or range(args.kills):
        torn += kill(broken, start(broken, args, 10 ** 6), rng, i % 3 == 0)
        lost.append(logged(broken) - saved(broken))
        if lost[-1] > MOST:
            raise ValueError(f"{lost[-1]} steps were lost, at most {MOST} may be")
        found = states(broken / "vae.states")
        if i % 5 == 4 and len(found) == KEEP:
            damage(found[0], rng)
            (broken / "vae.csv").unlink()  # its last steps are lost on purpose
            harmed += 1
    steps = saved(broken) + 2 * SAVE_EVERY
    for folder in (broken, straight):
        if start(folder, args, steps).wait():
            raise ValueError(f"training failed, see {folder / 'log.txt'}")
    passed = len(re.findall("passed over", (broken / "log.txt").read_text()))
    good = same(broken, straight)
    print(f"{args.kills} kills of {args.processes} processes, {torn} while saving; {harmed} states "
          f"damaged, {passed} passed over; at most {max(lost)} steps lost\nafter {steps} steps the "
          f"states of the broken and of the straight run are {'equal' if good else 'DIFFERENT'}")
    sys.exit(not good)


if __name__ == "__main__":
    run(main)
