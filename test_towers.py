"""Real towers: parity with Hugging Face transformers, random weights, every layer, offline."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from towers import load_tower

transformers = pytest.importorskip("transformers")
SMALL = dict(vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, intermediate_size=80, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama, tied, llama3 frequencies": ("Llama", dict(tie_word_embeddings=True,
                                                      rope_parameters=LLAMA3)),
    "llama, wide heads": ("Llama", dict(head_dim=16)),
    "qwen2": ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("Qwen3", dict(head_dim=8)),
}


def make(kind, folder):
    """A random model of a family, every weight and bias of it, saved in several files."""
    name, changes = FAMILIES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return model


@pytest.fixture
def folder(tmp_path):
    make("qwen2", tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", FAMILIES)
def test_parity(kind, tmp_path):
    """The states after every block and the logits are transformers'."""
    model = make(kind, tmp_path)
    tower = load_tower(tmp_path, dtype=torch.float32)
    tokens = torch.randint(61, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens, output_hidden_states=True)
        states = tower(tower.embed(tokens))
    for m, expected in enumerate(theirs.hidden_states[1:-1]):
        torch.testing.assert_close(states[:, :, m], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.norm(states[:, :, -1]), theirs.hidden_states[-1], rtol=1e-5,
                               atol=1e-5)
    torch.testing.assert_close(tower.logits(states), theirs.logits, rtol=1e-4, atol=1e-4)


def test_bf16(folder):
    """A tower is bf16 unless told otherwise, and frozen."""
    tower = load_tower(folder)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("damage, blame", (
    (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
    (lambda t: t.pop("lm_head.weight"), "head.weight is missing"),
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), "blocks.1.qkv.bias is missing, or"),
    (lambda t: t.update({"model.layers.1.more.weight": torch.ones(1)}), "more.weight is not part"),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}), "is not part of"),
    (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"shape \(1,\), .*for \(48,\)")))
def test_damaged_tensors(damage, blame, folder):
    """A tensor that is missing, too much or misshaped is named."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=blame):
        load_tower(folder)


def test_parts_of_others_are_left(folder):
    """What reads pictures is passed over, under either spelling of the tower's own names."""
    expected = load_tower(folder).state_dict()
    for prefix in ("language_model.model.", "model.language_model."):
        tensors = {"vision_model.x": torch.ones(1), "mlp1.0.weight": torch.ones(1)}
        for path in folder.glob("*.safetensors"):
            tensors |= {name.replace("model.language_model.", "model.").replace(
                "language_model.model.", "model.").replace("model.", prefix, 1): p
                for name, p in load_file(path).items() if name.startswith(("model.", "lang", "lm"))}
            path.unlink()
        save_file(tensors, folder / "model.safetensors")
        found = load_tower(folder).state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("change, blame", (
    (dict(model_type="bert"), "model_type 'bert'; expected one of llama, qwen2, qwen3"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_type 'yarn'"),
    (dict(use_sliding_window=True), "a sliding window")))
def test_other_families(change, blame, folder):
    """What this decoder is not is refused by name."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=blame):
        load_tower(folder)


def test_no_folder(folder):
    """A folder without config.json or without weights is a clear error."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors files in"):
        load_tower(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no config.json in .*Hugging Face's layout"):
        load_tower(folder)
