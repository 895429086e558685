"""Published towers equal Hugging Face transformers' in every layer, with random weights."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import SMALL as SMALL_MODEL
from conftest import make_config
from mos import MoS
from pretrained.folders import FolderTokenizer, load_tower, load_tower_weights
from towers import Tokenizer

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
    """Save a random model of a family in several files, all its biases and norms random, too."""
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


@pytest.mark.parametrize("length", (100, 37, 1))
@pytest.mark.parametrize("kind", FAMILIES)
def test_parity(kind, length, tmp_path):
    """States after every block, and logits, equal transformers', with right padding or without."""
    model = make(kind, tmp_path)
    tower = load_tower(tmp_path, dtype=torch.float32)
    tokens = torch.randint(61, (3, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, (length + 1) // 2:] = False
    with torch.no_grad():
        theirs = model(tokens, attention_mask=real.long(), output_hidden_states=True)
        states = tower(tower.embed(tokens.where(real, Tokenizer.PAD)))
    for m, expected in enumerate(theirs.hidden_states[1:-1]):
        torch.testing.assert_close(states[:, :, m][real], expected[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.norm(states[:, :, -1])[real], theirs.hidden_states[-1][real],
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.logits(states)[real], theirs.logits[real], rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("kind", ("llama, tied, llama3 frequencies", "qwen2", "qwen3"))
def test_writing(kind, tmp_path):
    """Greedy texts equal transformers', and those of a tower without a cache."""
    model = make(kind, tmp_path)
    tower = load_tower(tmp_path, dtype=torch.float32)
    tokens = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(1))
    ids = list(tower.write(tokens, 40, ()))
    model.generation_config.eos_token_id = None
    theirs = model.generate(tokens, max_new_tokens=40, do_sample=False)
    assert ids == theirs[0, 9:].tolist()
    assert len(set(ids)) > 3
    text = tokens
    for _ in range(40):
        scores = tower.logits(tower(tower.embed(text)))[:, -1]
        text = torch.cat((text, scores.argmax(-1, keepdim=True)), 1)
    assert ids == text[0, 9:].tolist()
    stop = ids[5]
    assert list(tower.write(tokens, 40, (stop,))) == ids[:ids.index(stop)]


def test_bf16(folder):
    """A tower is bf16 by default, and frozen."""
    tower = load_tower(folder)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("damage, message", (
    (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
    (lambda t: t.pop("lm_head.weight"), "head.weight is missing"),
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
     r"1.self_attn.q_proj.bias with .*1.self_attn.v_proj.bias has shape \(64,\), .*\(80,\)"),
    (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), r"has shape \(80, 48\), "),
    (lambda t: t.update({"model.layers.1.more.weight": torch.ones(1)}), "more.weight is not part"),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}), "is not part of"),
    (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"shape \(1,\), .*for \(48,\)")))
def test_damaged_tensors(damage, message, folder):
    """A tensor that is missing, unknown or of a wrong shape is named."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_tower(folder)


def test_parts_of_others_are_left(folder):
    """An unused image encoder's tensors are skipped, and tower names may have other prefixes."""
    expected = load_tower(folder).state_dict()
    originals = {}
    for path in folder.glob("*.safetensors"):
        originals |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for prefix in ("language_model.model.", "model.language_model."):
        tensors = {"vision_model.x": torch.ones(1), "mlp1.0.weight": torch.ones(1)}
        for name, values in originals.items():
            tensors[name.replace("model.", prefix)] = values
        save_file(tensors, folder / "model.safetensors")
        state = load_tower(folder).state_dict()
        assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize("change, message", (
    (dict(model_type="bert"), "model_type 'bert'; expected one of llama, qwen2, qwen3"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_type 'yarn'"),
    (dict(use_sliding_window=True), "a sliding window")))
def test_other_families(change, message, folder):
    """A model that this decoder cannot compute is refused, with the reason."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_tower(folder)


def test_no_folder(folder):
    """A folder without config.json or without weights is an error of one line."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors files in"):
        load_tower(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no config.json in .*Hugging Face's or"):
        load_tower(folder)


def edit_with(folder):
    """Check that pictures of any size reach the tower of a folder through MoS.edit."""
    special = {"<img>": 58, "</img>": 59, "<IMG_CONTEXT>": 60}
    words = {str(i): i for i in range(58)} | special
    added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=True) for token, i in special.items()]
    (folder / "tokenizer.json").write_text(json.dumps(dict(
        added_tokens=added, pre_tokenizer=dict(type="Whitespace"),
        model=dict(type="WordLevel", vocab=words, unk_token="0"))))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    config = make_config(**SMALL_MODEL | dict(und_width=48, und_depth=3, und_folder=str(folder),
                                            edit_inputs=("understanding",)))
    model = MoS(config, FolderTokenizer(folder)).eval()
    load_tower_weights(folder, model.understanding)
    torch.nn.init.normal_(model.generation.head.weight)
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    edited = [model.edit([picture], ["3 4 5"])[0] for picture in pictures]
    assert edited[0].size == (64, 32)
    assert edited[0].tobytes() != edited[1].tobytes()


def test_pictures(tmp_path):
    """With a picture, InternVL's states after every block and its texts equal transformers'."""
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                  image_size=[56, 56], patch_size=[14, 14], layer_norm_eps=1e-6,
                  attention_bias=True)
    text = dict(model_type="qwen2", **SMALL)
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=60, image_seq_length=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    tower = load_tower(tmp_path, dtype=torch.float32)
    tokens = torch.randint(60, (2, 11), generator=torch.Generator().manual_seed(1))
    tokens[:, 2:6] = 60
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    with torch.no_grad():
        theirs = model(input_ids=tokens, pixel_values=(images - mean) / std,
                       output_hidden_states=True)
        states = tower(tower.embed(tokens, 2 * images - 1))
    for m, expected in enumerate(theirs.hidden_states[1:-1]):
        torch.testing.assert_close(states[:, :, m], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.logits(states), theirs.logits, rtol=1e-4, atol=1e-4)
    model.generation_config.eos_token_id = None
    written = model.generate(input_ids=tokens[:1], pixel_values=(images[:1] - mean) / std,
                             max_new_tokens=8, do_sample=False)
    ids = list(tower.write(tokens[:1], 8, (), images=2 * images[:1] - 1))
    assert ids == written[0, -8:].tolist()
    edit_with(tmp_path)
    with pytest.raises(ValueError, match=r"4 image tokens, but the texts have \[4, 0\] place"):
        tower.embed(tokens.where(torch.tensor([[True], [False]]), 1), images)
