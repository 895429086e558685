"""Kill training at random moments again and again, and check that nothing is lost.

    python -m pytest -m slow tests/test_drill.py
    DRILL_KILLS=50 DRILL_PROCESSES=2 python -m pytest -s -m slow tests/test_drill.py

A small VAE is trained twice on a CPU: once undisturbed, and once with SIGKILL sent to one process
or to all. Every third kill hits while a checkpoint is being written; after every fifth the newest
checkpoint is damaged, too.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from training import saved, state

from checkpoint import find_fault
from conftest import ROOT

KILLS = int(os.environ.get("DRILL_KILLS", 6))
PROCESSES = int(os.environ.get("DRILL_PROCESSES", 1))
PARALLEL = os.environ.get("DRILL_PARALLEL", "fsdp")  # of several processes
SAVE_EVERY = 4  # steps
KEEP = 3
MOST_LOST = 2 * SAVE_EVERY  # steps: the newest checkpoint may be unfinished
SETTINGS = dict(recipe="laptop", stage="vae", save_every=SAVE_EVERY, keep=KEEP, log_every=1,
                eval_every=10 ** 7, warmup=0, final_lr=1,  # so the rate is the same for any --steps
                vae_channels=6, vae_width=4, vae_decoder_width=4, size=64, batch=PROCESSES)


def start(folder, steps):
    """Start or resume train.py in the background; its output goes to log.txt."""
    command = [sys.executable, ROOT / "train.py", "--resume"]
    settings = SETTINGS | dict(out=folder, steps=steps)
    if PROCESSES > 1:
        settings["parallel"] = PARALLEL
        command[1:1] = ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc-per-node={PROCESSES}"]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def training_ids(process):
    """Return the ids of the processes that train: torchrun's children, or the process itself."""
    if PROCESSES == 1:
        return [process.pid]
    ids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                         text=True).stdout.split()
    return [int(i) for i in ids] or [process.pid]  # torchrun itself, if it has started none yet


def is_saving(folder, since):
    """Return whether a checkpoint is being written, or was when training was killed."""
    return any(path.stat().st_mtime > since for path in folder.glob("checkpoints/vae/.[0-9]*"))


def kill(folder, process, rng, while_saving):
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
    assert process.poll() is None, f"training ended by itself, see {folder / 'log.txt'}"
    ids = training_ids(process)
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
    logged = max((int(row["step"]) for row in rows), default=0)
    step = next((int(path.name) for path in saved(folder) if not find_fault(path)), 0)
    return logged - step, step


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


@pytest.mark.slow
def test_killed_training_loses_nothing(tmp_path):
    """A kill costs at most MOST_LOST steps, and the run ends like an undisturbed one, bit for bit.

    A damaged checkpoint is passed over.
    """
    rng = random.Random(0)
    killed = tmp_path / "killed"
    undisturbed = tmp_path / "undisturbed"
    killed.mkdir()
    undisturbed.mkdir()
    damaged = while_saving = most_lost = 0
    for i in range(KILLS):
        while_saving += kill(killed, start(killed, 10 ** 6), rng, while_saving=i % 3 == 0)
        lost, step = lost_steps(killed)
        most_lost = max(most_lost, lost)
        assert lost <= MOST_LOST
        kept = saved(killed)
        if i % 5 == 4 and len(kept) == KEEP:
            damage(kept[0], rng)
            (killed / "vae.csv").unlink()  # its last steps are lost on purpose
            damaged += 1
            step = int(kept[1].name)
    steps = step + 2 * SAVE_EVERY
    for folder in (killed, undisturbed):
        assert start(folder, steps).wait() == 0, (folder / "log.txt").read_text()[-3000:]
    passed_over = (killed / "log.txt").read_text().count("passed over")
    print(f"{KILLS} kills of {PROCESSES} processes, {while_saving} while saving; {damaged} "
          f"checkpoints damaged, {passed_over} passed over; at most {most_lost} steps lost")
    assert passed_over >= damaged
    ends, tensors = state(killed)
    also_ends, expected = state(undisturbed)
    assert ends == also_ends == steps and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
