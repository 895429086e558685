"""Kill training at random moments again and again, and check that nothing is lost.

    python -m tools.drill --kills 50

A small VAE is trained twice on a CPU: once without harm, and once with SIGKILL sent to one process
or to all. Every third kill hits while a checkpoint is being written; now and then the newest
checkpoint is damaged, too. A kill may cost the steps since the last checkpoint, or since the one
before if the last was still being written. At the end both runs must hold the same bits.
"""

import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoint import checkpoints, find_fault
from common import ROOT, CommandLine, run, tqdm_or_none

SAVE_EVERY, KEEP = 4, 3
MOST_LOST = 2 * SAVE_EVERY  # steps: one checkpoint may be unfinished
SETTINGS = dict(recipe="laptop", stage="vae", save_every=SAVE_EVERY, keep=KEEP, log_every=1,
                eval_every=10 ** 7, warmup=0, final_lr=1,  # so the rate is the same for any --steps
                vae_channels=6, vae_width=4, vae_decoder_width=4, size=64)
SAVED = "checkpoints/vae"  # where train.py keeps checkpoints in its --out folder


def start(folder, args, steps):
    """Start or resume train.py in the background; its output goes to log.txt."""
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={args.processes}"]
    command += [ROOT / "train.py", "--resume"]
    settings = SETTINGS | dict(out=folder, steps=steps, batch=args.processes)
    if args.processes > 1:
        settings["parallel"] = args.parallel
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def training_ids(process, args):
    """Return the ids of the processes that train: torchrun's children, or the process itself."""
    if args.processes == 1:
        return [process.pid]
    ids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                         text=True).stdout.split()
    return [int(i) for i in ids] or [process.pid]  # torchrun itself, if it has started none yet


def is_saving(folder, since):
    """Return whether a checkpoint is being written, or was when training was killed."""
    return any(path.stat().st_mtime > since for path in (folder / SAVED).glob(".[0-9]*"))


def kill(folder, process, args, rng, while_saving):
    """Kill one training process or all at a random moment; return whether they were saving.

    One time in four the moment may lie before the first step, otherwise it lies within training.
    """
    begin = time.time()
    log = folder / "vae.csv"

    def wait(condition):
        while process.poll() is None and not condition():
            time.sleep(0.001)

    seconds = 10
    if rng.random() >= 0.25:
        wait(lambda: log.is_file() and log.stat().st_mtime > begin)
        seconds = 3
    moment = time.time() + rng.uniform(0, seconds)
    wait(lambda: time.time() > moment)
    wait(lambda: not while_saving or is_saving(folder, begin))
    if process.poll() is not None:
        raise ValueError(f"training ended by itself, see {folder / 'log.txt'}")
    ids = training_ids(process, args)
    ids = [rng.choice(ids)] if rng.random() < 0.5 else [process.pid, *ids]
    for i in ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(i, signal.SIGKILL)
    process.wait()  # of several processes torchrun ends the others
    return is_saving(folder, begin)


def lost_steps(folder):
    """Return how many steps in the log are newer than the newest good checkpoint, and its step."""
    log = folder / "vae.csv"
    rows = list(csv.DictReader(log.open())) if log.is_file() else []
    logged = max([int(row["step"]) for row in rows], default=0)
    saved = next((int(c.name) for c in checkpoints(folder / SAVED) if not find_fault(c)), 0)
    return logged - saved, saved


def damage(checkpoint, rng):
    """Cut a file of a checkpoint short, or flip one of its bits."""
    path = rng.choice(sorted(checkpoint.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    position = rng.randrange(len(data))
    if rng.random() < 0.5:
        del data[position:]
    else:
        data[position] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def newest_tensors(folder):
    """Return the tensors of the newest checkpoint, {(step, file, name): tensor}."""
    newest = checkpoints(folder / SAVED)[0]
    return {(newest.name, path.name, name): tensor for path in newest.glob("*.safetensors")
            for name, tensor in load_file(path).items()}


def main():
    """Run the command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often training is killed")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    parser.add_argument("--parallel", default="fsdp", choices=("ddp", "fsdp", "hsdp"),
                        help="how they share the work")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="emptied first")
    args = parser.parse_args()
    if args.kills < 1 or args.processes < 1:
        raise ValueError("--kills and --processes must be at least 1")
    rng = random.Random(args.seed)
    killed, unharmed = args.out / "killed", args.out / "unharmed"
    for folder in (killed, unharmed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    damaged = while_saving = most_lost = 0
    for i in tqdm_or_none(iterable=range(args.kills), unit="kill") or range(args.kills):
        while_saving += kill(killed, start(killed, args, 10 ** 6), args, rng, i % 3 == 0)
        lost, step = lost_steps(killed)
        most_lost = max(most_lost, lost)
        if lost > MOST_LOST:
            raise ValueError(f"{lost} steps were lost, at most {MOST_LOST} may be")
        kept = checkpoints(killed / SAVED)
        if i % 5 == 4 and len(kept) == KEEP:
            damage(kept[0], rng)
            (killed / "vae.csv").unlink()  # its last steps are lost on purpose
            damaged += 1
            step = int(kept[1].name)
    steps = step + 2 * SAVE_EVERY
    for folder in (killed, unharmed):
        if start(folder, args, steps).wait():
            raise ValueError(f"training failed, see {folder / 'log.txt'}")
    passed = (killed / "log.txt").read_text().count("passed over")
    tensors, expected = newest_tensors(killed), newest_tensors(unharmed)
    equal = tensors.keys() == expected.keys() and all(
        torch.equal(tensors[key], expected[key]) for key in expected)
    print(f"{args.kills} kills of {args.processes} processes, {while_saving} while saving; "
          f"{damaged} checkpoints damaged, {passed} passed over; at most {most_lost} steps lost\n"
          f"after {steps} steps the checkpoints of the killed and of the unharmed run are "
          f"{'equal' if equal else 'DIFFERENT'}")
    sys.exit(not equal)


if __name__ == "__main__":
    run(main)
