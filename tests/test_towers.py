"""Published towers equal Hugging Face transformers' in every layer, with random weights."""

import json
import shutil

import pytest
import torch
from PIL import Image
from published import tower_tensors, write_internvl, write_json, write_tower
from safetensors.torch import load_file, save_file

from conftest import SMALL as SMALL_MODEL
from conftest import make_config
from mos import MoS
from pretrained import folders
from pretrained.folders import FolderTokenizer, load_tower, load_tower_weights
from towers import Tokenizer

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
    transformers = pytest.importorskip("transformers")
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


QWEN2 = SMALL | dict(model_type="qwen2", eos_token_id=2)


@pytest.fixture
def folder(tmp_path):
    """The folder of a random Qwen2 in three files, written without transformers."""
    return write_tower(tmp_path / "tower", QWEN2, shards=3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_written_tensors_are_named_as_theirs(kind, tmp_path):
    """The random folders of other tests have the names and shapes of transformers' own."""
    expected = {name: p.shape for name, p in make(kind, tmp_path).state_dict().items()}
    config = json.loads((tmp_path / "config.json").read_text())
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert {name: p.shape for name, p in tower_tensors(config).items()} == expected


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


def take_tensors(folder):
    """Return all tensors of a folder, and delete its weight files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return tensors


@pytest.mark.parametrize("damage, message", (
    (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
    (lambda t: t.update({"model.norm.weight": torch.ones(48).char()}), "norm.weight has type I8; "),
    (lambda t: t.update({"lm_head.weight": torch.ones(61, 48).to(torch.float8_e4m3fn)}),
     "tensor lm_head.weight has type F8_E4M3; expected BF16, F16 or F32"),
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
     r"1.self_attn.q_proj.bias with .*1.self_attn.v_proj.bias has shape \(64,\), .*\(80,\)"),
    (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), r"has shape \(80, 48\), "),
    (lambda t: t.update({"model.layers.1.more.weight": torch.ones(1)}), "more.weight is not part"),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}), "is not part of"),
    (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"shape \(1,\), .*for \(48,\)")))
def test_damaged_tensors(damage, message, folder):
    """A tensor that is missing, unknown, of a wrong shape or of few bits is named."""
    tensors = take_tensors(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_tower(folder)


def test_parts_of_others_are_left(folder):
    """An unused image encoder's tensors are skipped, and tower names may have other prefixes."""
    expected = load_tower(folder).state_dict()
    originals = take_tensors(folder)
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
    (dict(quantization_config=dict(quant_method="fp8")), "a quantization_config; .*BF16"),
    (dict(use_sliding_window=True), "a sliding window")))
def test_other_families(change, message, folder):
    """A model that this decoder cannot compute is refused, with the reason."""
    write_json(folder, "config.json", QWEN2 | change)
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


def test_shards_of_an_index(folder):
    """The files that index.json names are read, and no others; a missing one is named."""
    expected = load_tower(folder).state_dict()
    for name in ("consolidated", "adapter_model", "._model-00001-of-00003"):
        (folder / f"{name}.safetensors").write_bytes(b"something else")
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-copy.safetensors")
    found = load_tower(folder).state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model-00002-of-00003.safetensors in .*: by "
                       "model.safetensors.index.json it holds model.+weight and 12 other tensors"):
        load_tower(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no model as it is published .*weight_map"):
        load_tower(folder)


@pytest.mark.parametrize("shards", (1, 3))
def test_files_without_an_index(shards, tmp_path):
    """The file of the usual name is read alone, or the numbered ones; a variant is left, too."""
    folder = write_tower(tmp_path, QWEN2, shards=shards)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    expected = load_tower(folder).state_dict()
    other = {"lm_head.lora_A.weight": torch.ones(1)}
    for name in ("consolidated", "adapter_model", "model.fp16"):
        save_file(other, folder / f"{name}.safetensors")
    if shards == 1:
        shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
        (folder / "broken.safetensors").write_bytes(b"something else")
    found = load_tower(folder).state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    if shards == 3:
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="holds 2 of the 3 files model-...-of-00003"):
            load_tower(folder)


@pytest.mark.parametrize("rope", ({}, dict(rope_parameters=dict(rope_type="default"))))
@pytest.mark.parametrize("family, heads, kv_heads, head_width", (
    ("llama", 8, 8, 8), ("qwen2", 32, 32, 2), ("qwen3", 32, 32, 128)))
def test_defaults(family, heads, kv_heads, head_width, rope, tmp_path):
    """A value that a config.json leaves out is that of transformers, for each family."""
    lean = dict(model_type=family, vocab_size=61, hidden_size=64, num_hidden_layers=1,
                num_attention_heads=heads, intermediate_size=80)
    write_tower(tmp_path, lean | dict(num_key_value_heads=kv_heads, head_dim=head_width))
    write_json(tmp_path, "config.json", lean | rope)
    tower = load_tower(tmp_path)
    assert tower.theta == 1e4 and tower.rope_scaling is None
    assert tower.norm.eps == tower.blocks[0].eps == 1e-6
    assert tower.head_width == head_width
    assert len(tower.blocks[0].qkv.weight) == (heads + 2 * kv_heads) * head_width


def test_defaults_are_those_of_transformers():
    """Every value that may be left out is what transformers' own configurations hold."""
    transformers = pytest.importorskip("transformers")
    for family, ours in folders.DEFAULTS.items():
        theirs = getattr(transformers, f"{family.capitalize()}Config")()
        assert ours == {name: getattr(theirs, name) for name in ours}
        if "num_key_value_heads" not in ours:
            assert theirs.num_key_value_heads == theirs.num_attention_heads
        assert theirs.rope_parameters == dict(rope_type="default", rope_theta=1e4)


def test_rotary_buffers(folder):
    """The frequencies that old folders store are left out: they follow from config.json."""
    tensors = take_tensors(folder)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file(tensors | buffers, folder / "model.safetensors")
    assert torch.equal(load_tower(folder, dtype=torch.float32).norm.weight,
                       tensors["model.norm.weight"])


def test_no_output_layer(folder):
    """A tower that was saved without one can be read, and says why it cannot write."""
    tensors = take_tensors(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    tower = load_tower(folder)
    assert tower(tower.embed(torch.tensor([[1, 5]]))).shape == (1, 2, 3, 48)
    with pytest.raises(ValueError, match="cannot write: .*no output layer .lm_head.weight."):
        next(tower.write(torch.tensor([[1, 5]]), 4, ()))


def test_dynamic_frequencies(folder):
    """They change nothing up to the length of training; longer texts are refused, also in writing.
    """
    tokens = torch.arange(20)[None]
    plain = load_tower(folder, dtype=torch.float32)
    write_json(folder, "config.json", QWEN2 | dict(
        max_position_embeddings=20, rope_scaling=dict(rope_type="dynamic", factor=2.0)))
    dynamic = load_tower(folder, dtype=torch.float32)
    assert torch.equal(plain(plain.embed(tokens)), dynamic(dynamic.embed(tokens)))
    with pytest.raises(ValueError, match="a text of 21 tokens is too long .* at most 20"):
        dynamic(dynamic.embed(torch.arange(21)[None]))
    assert len(list(dynamic.write(tokens[:, :16], 5, ()))) == 5
    with pytest.raises(ValueError, match="a text of 21 tokens is too long"):
        list(dynamic.write(tokens[:, :16], 6, ()))


def test_pictures(tmp_path):
    """With a picture, InternVL's states after every block and its texts equal transformers'."""
    transformers = pytest.importorskip("transformers")
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
    with pytest.raises(ValueError, match=r"4 image tokens, but the texts have \[4, 0\] place"):
        tower.embed(tokens.where(torch.tensor([[True], [False]]), 1), images)


@pytest.mark.parametrize("named", (True, False))
def test_edits_with_a_published_tower(named, tmp_path):
    """Pictures of any size reach the tower of a folder, whose placeholder either file may name."""
    pytest.importorskip("tokenizers")
    vision = dict(model_type="internvl_vision", hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=4, intermediate_size=48, image_size=[56, 56],
                  patch_size=[14, 14])
    text = SMALL | dict(model_type="qwen2", vocab_size=17, eos_token_id=2)
    place = dict(image_token_id=16) if named else {}
    folder = write_internvl(tmp_path, dict(vision_config=vision, text_config=text, **place))
    config = make_config(**SMALL_MODEL | dict(und_width=48, und_depth=3, und_folder=str(folder),
                                              edit_inputs=("understanding",)))
    model = MoS(config, FolderTokenizer(folder)).eval()
    load_tower_weights(folder, model.understanding)
    torch.nn.init.normal_(model.generation.head.weight)
    pictures = [Image.new("RGB", (64, 32), colour) for colour in ("red", "blue")]
    edited = [model.edit([picture], ["a red circle"])[0] for picture in pictures]
    assert edited[0].size == (64, 32)
    assert edited[0].tobytes() != edited[1].tobytes()
