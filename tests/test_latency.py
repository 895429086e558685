"""The command that draws with random weights, to see what a model costs."""

import sys
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from common import run
from conftest import SMALL, make_config
from tools import latency
from tools.timing import Bytes, random_model


def test_draw(tmp_path, monkeypatch, capsys):
    """A recipe at its full size draws a picture of the size asked for, without trained weights."""
    out = tmp_path / "noise.png"
    recipe = {"model": asdict(make_config(**SMALL))}
    monkeypatch.setattr(latency, "read_recipe", lambda name: recipe)
    flags = f"draw --recipe small --size 64x96 --steps 2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["latency", *flags.split()])
    run(latency.main)
    assert Image.open(out).size == (96, 64)
    printed = capsys.readouterr().out
    assert "small with random weights" in printed and "peak memory" in printed


def test_draw_refuses_a_file_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Bad flags end in one line, before any model is made."""
    monkeypatch.setattr(sys, "argv", ["latency", "draw", "--out", str(tmp_path / "no" / "x.png")])
    with pytest.raises(SystemExit):
        run(latency.main)
    assert capsys.readouterr().err.startswith("error: cannot write")


def test_random_model_fills_only_the_parts_asked_for():
    """Parts that are not asked for have no memory, and the VAE has a type of its own."""
    model = random_model(make_config(**SMALL), ("router", "vae"), "cpu", torch.bfloat16)
    assert {p.is_meta for p in model.understanding.parameters()} == {True}
    assert {p.is_meta for p in model.generation.parameters()} == {True}
    assert {p.dtype for p in model.router.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


def test_bytes():
    """Towers with random weights read the bytes of any text, after <bos>."""
    tokenizer = random_model(make_config(**SMALL), ()).tokenizer
    assert isinstance(tokenizer, Bytes)
    assert len(tokenizer) == 259
    assert tokenizer.encode("ab") == [1, 100, 101]
    assert tokenizer.encode("\u00e9") == [1, 198, 172]
