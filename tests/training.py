"""What several test files need: stages of a tiny model, trained in this process or in others."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import checkpoint
import stages
import train
from checkpoint import read_vocabulary
from common import World
from config import plan, read_recipe
from conftest import ROOT, SMALL
from towers import Tokenizer
from world import edits

MODEL = {**SMALL, "max_tokens": 80}
QUICK = dict(steps=6, batch=4, lr=3e-4, warmup=2, scenes=16, log_every=1, eval_every=100,
             save_every=100, eval_prompts=1)
LONG = dict(steps=6, lr=1e-3, warmup=0, ema=0.9)
WORDS = [*read_vocabulary(ROOT / "weights").words, *edits.words(), *"in detail : drawn".split()]
DRIVER = f"""import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, checkpoint, common, train, training
if os.environ.get("DOUBLE"):
    torch.set_default_dtype(torch.float64)
if not os.environ.get("REAL"):
    training.lighten(setattr)
if os.environ.get("RANK", "0") != "0" and not os.environ.get("SHARED"):
    common.replacing.__init__ = None  # this process cannot write, but for shards of latents
load = checkpoint.load_or_initialise
def load_or_initialise(stage, c):  # nothing has memory before it is sharded
    assert all(p.is_meta for p in stage.model.parameters())
    load(stage, c)
    assert all(p.to_local().numel() < p.numel() for p in stage.parameters() if p.ndim > 1
               and "fsdp" in c.parallel and hasattr(p, "to_local"))
checkpoint.load_or_initialise = load_or_initialise
common.run(train.main)
"""


def alone(rank=0, size=1):
    """One process of several, none of which talks to the others."""
    return World(rank, size, torch.device("cpu"))


def flags_of(stage, out, changes):
    """The flags of a quick stage: settings of the tiny model and of its training."""
    return {**MODEL, **QUICK, **changes, "stage": stage, "out": str(out)}


def settings(stage, out="runs/none", recipe="laptop", **changes):
    """The TrainConfig of a quick stage."""
    flags = flags_of(stage, out, changes)
    return plan(flags, read_recipe(recipe, changes.get("phase", "")))[0][0]


def prepare(stage, out, recipe="laptop", resume=False, export=False, **changes):
    """The Trainer of a quick stage."""
    flags = flags_of(stage, out, changes)
    (c, values), = plan(flags, read_recipe(recipe, changes.get("phase", "")), resume or export)
    if not resume and not export:
        checkpoint.check_free(c)
    return train.prepare(c, values, flags, alone(), resume, export)


def go(stage, out, resume=False, export=False, **changes):
    """Train one stage of the tiny model in this process; returns whether it finished."""
    return train.run_stage(prepare(stage, out, resume=resume, export=export, **changes), export)


def start(folder, processes=1, double="", **values):
    """Train in processes of their own, by way of DRIVER; double: in float64."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node".split() + [str(processes)]
    launcher = launcher if processes > 1 else []
    (folder / "driver.py").write_text(DRIVER)
    flags = [str(a) for k, v in {**QUICK, **MODEL, **values, "out": folder}.items()
             for a in ("--" + k.replace("_", "-"), v) if a != ""]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DOUBLE": double}
    return subprocess.Popen([sys.executable, *launcher, folder / "driver.py", "--recipe", "laptop",
                             *flags], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def launch(folder, *arguments, **values):
    """The same, to a good end."""
    process = start(folder, *arguments, **values)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text[-3000:]


def validate_on_few(patch, most=8):
    """Eight pictures are enough to validate on."""
    few = stages.Stage.unseen
    patch(stages.Stage, "unseen", lambda self, count: few(self, min(count, most)))


def lighten(patch):
    """Cheap validations, no matrix product to time, the world's words without 5,000 scenes."""
    validate_on_few(patch)
    patch(train, "product_rate", lambda _: 1e12)
    build = train.build_tokenizer
    patch(train, "build_tokenizer", lambda dataset: build(dataset) if not dataset.scenes
          else Tokenizer(WORDS))
    for kind in train.KINDS.values():
        patch(kind, "validate", lambda *_: {"val_loss": 1.0})


def at_step(patch, stage, step, change):
    """Let `change` see and replace the inputs of one step."""
    inputs = train.KINDS[stage].inputs
    patch.setattr(train.KINDS[stage], "inputs", lambda self, now:
                  change(inputs(self, now)) if now == step else inputs(self, now))


def ctrl_c(batch):
    """Interrupt this process as Ctrl-C does, and pass the batch on."""
    os.kill(os.getpid(), signal.SIGINT)
    return batch


def curve(folder, stage="vae"):
    """Step, loss and gradient norm of every logged step, and the last row of the log."""
    with open(Path(folder) / f"{stage}.csv") as file:
        rows = list(csv.DictReader(file))
    return [[float(row[k]) for k in ("step", "loss", "grad_norm")] for row in rows
            if row["loss"]], rows[-1]


def saved(folder, stage="vae"):
    """The folders of a stage's checkpoints, the newest first."""
    return checkpoint.checkpoints(Path(folder) / "checkpoints" / stage)


def state(folder, stage="vae"):
    """Step and tensors of the newest checkpoint, put together from its shards."""
    newest = saved(folder, stage)[0]
    about = HuggingFaceStorageReader(newest).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype)
               for name, one in about.items()}
    assert checkpoint.find_fault(newest) is None
    return checkpoint.load(newest, tensors), tensors


def contents(folder, pattern="**/*"):
    """{path: bytes} of the files in a folder."""
    return {p: p.read_bytes() for p in Path(folder).glob(pattern) if p.is_file()}


def near(folder, other, stage, tolerance):
    """Losses, gradients' norms and all tensors of the newest checkpoints are the same."""
    for a, b in zip(curve(folder, stage)[0], curve(other, stage)[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # the log is rounded
    (step, a), (again, b) = state(folder, stage), state(other, stage)
    assert step == again and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)
