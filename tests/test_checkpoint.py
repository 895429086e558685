"""Folders of models: what is saved comes back, and damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import alone

import checkpoint
from checkpoint import PARTS
from conftest import make_model
from mos import MoS


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_and_load(model, tmp_path):
    """Parameters return rounded to bf16, buffers exactly, from safetensors and JSON alone."""
    model.vae.set_statistics(torch.rand(6), torch.rand(6) + 0.5)
    model.save_pretrained(tmp_path)
    files = contents(tmp_path)
    assert files.keys() == {"config.json", "vocab.json", *(f"{p}.safetensors" for p in PARTS)}
    loaded, parameters = MoS.from_pretrained(tmp_path), dict(model.named_parameters())
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert name == other and b.dtype == torch.float32
        assert torch.equal(a.bfloat16().float() if name in parameters else a, b), name
    assert loaded.config == model.config and loaded.tokenizer.words == model.tokenizer.words
    loaded.save_pretrained(tmp_path)
    assert not loaded.training and contents(tmp_path) == files


HEAD = "generation.head.weight"


@pytest.mark.parametrize("name, damage, match", [
    ("mos.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
    ("mos.safetensors", lambda path: path.write_bytes(b""), "damaged"),
    ("mos.safetensors", {HEAD: None}, f"{HEAD} is missing"),
    ("mos.safetensors", {"more": torch.ones(2)}, "more is not part"),
    ("mos.safetensors", {HEAD: torch.ones(5, 64)}, rf"{HEAD} has shape \(5, 64\).*\(6, 64\)"),
    ("config.json", lambda path: path.write_text("{"), ""),
    ("config.json", lambda path: path.write_text("[]"), ""),
    ("config.json", lambda path: path.write_text('{"depth": 3}'), "unknown.*depth"),
    ("vocab.json", lambda path: path.write_text('["a",'), "")])
def test_damaged_files(model, tmp_path, name, damage, match):
    """Whatever is damaged or missing, the error names the file and what is wrong with it."""
    model.save_pretrained(tmp_path)
    path = tmp_path / name
    if callable(damage):
        damage(path)
    else:
        save_file({n: p for n, p in (load_file(path) | damage).items() if p is not None}, path)
    with pytest.raises(ValueError, match=f"{name}.*{match}"):
        MoS.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MoS.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    """A disk that fills up while saving costs no old file and leaves no half a new one."""
    model.save_pretrained(tmp_path)
    old = contents(tmp_path)

    def full(tensors, path, about):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        make_model(1).save_pretrained(tmp_path)
    assert contents(tmp_path) == old


def test_a_training_checkpoint_fits_one_run(tmp_path):
    """Values and step come back; a tensor more, a tensor less and another shape are refused."""
    kept = {"a": torch.rand(2, 3), "b": torch.rand(4)}
    checkpoint.save(tmp_path, 7, kept, alone(), 1, {})
    folder, = checkpoint.checkpoints(tmp_path)
    tensors = {name: torch.zeros_like(values) for name, values in kept.items()}
    assert checkpoint.load(folder, tensors) == 7
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    for wrong, message in (({"a": tensors["a"]}, "also holds b"),
                           ({**tensors, "c": torch.zeros(1)}, "does not fit"),
                           ({**tensors, "b": torch.zeros(5)}, "does not fit")):
        with pytest.raises(ValueError, match=message):
            checkpoint.load(folder, wrong)
