"""Shared by all tests: one thread, and a tiny model with a width of its own for every letter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before the first import of Triton, which reads it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from common import run
from config import MoSConfig, read_recipe
from mos import MoS
from towers import Tokenizer

ROOT = Path(__file__).parent
torch.set_num_threads(1)

WORDS = ("a photo of red blue green circle square star ring above below left right and two three "
         "stars circles on the gray background").split()
SMALL = dict(vae_channels=6, vae_width=4, vae_decoder_width=4, und_width=40, und_depth=5,
             und_heads=5, und_kv_heads=1, und_hidden=48, gen_width=64, gen_depth=3, gen_heads=2,
             gen_kv_heads=1, gen_hidden=72, registers=3, router_width=32, router_heads=1,
             max_tokens=16, size=64, sampling_steps=3)


def product_files():
    """The paths of all Python files of the repository but the tests."""
    paths = [path for room in (".", "world", "data", "pretrained", "tools")
             for path in (ROOT / room).glob("*.py")]
    return [path for path in paths if path.name != "conftest.py"
            and not path.name.startswith("test_")]


def make_config(**changes):
    """A MoSConfig with the values of recipe tiny but for `changes`."""
    return MoSConfig(**read_recipe("tiny")["model"] | changes)


def make_model(seed=0, **changes):
    """A small MoS with random weights everywhere, its output layer and norms included."""
    torch.manual_seed(seed)
    model = MoS(make_config(**SMALL | changes), Tokenizer(WORDS)).eval()
    with torch.no_grad():
        for name, p in [*model.generation.named_parameters(), *model.router.named_parameters()]:
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture
def model():
    """A fresh small model."""
    return make_model()


def same(a, b):
    """Pictures equal up to one level in one of a thousand values."""
    a, b = (np.stack([np.asarray(image, int) for image in images]) for images in (a, b))
    return a.shape == b.shape and abs(a - b).max() <= 1 and (a != b).mean() <= 1e-3


@pytest.fixture
def painter():
    """A model whose random pictures use the whole range of levels."""
    model = make_model()
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.mul_(6)
    return model


@pytest.fixture
def light(monkeypatch):
    """Make training cheap within a test, see `training.lighten`."""
    from training import lighten
    handler = signal.getsignal(signal.SIGINT)
    lighten(monkeypatch.setattr)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Call a command in this process, in an empty folder."""
    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        run(module.main)
    monkeypatch.chdir(tmp_path)
    return call


def run_script(script, *arguments, timeout=120, **environment):
    """Run a command, "train.py" or "tools.evaluate", in a process of its own, single-threaded."""
    command = [ROOT / script] if script.endswith(".py") else ["-m", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env.pop("TRITON_INTERPRET", None)  # for tests that call kernels themselves
    return subprocess.run([sys.executable, *map(str, (*command, *arguments))], env=env, cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout)
