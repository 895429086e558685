"""Folders of published towers and VAEs: tokenizers, templates, and models that use them by path."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from checkpoint import fingerprint, load_parts, read_tokenizer
from conftest import SMALL, make_config
from mos import MoS
from pretrained.folders import FolderTokenizer, load_tower, load_vae
from towers import Tokenizer, Understanding
from vae import VAE

WORDS = "<pad> <bos> <eos> <user> <tower> a red blue circle square above : in detail".split()
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message.role != 'user' %}"
            "{{ raise_exception('no') }}{% endif %}<user>{{ message['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<tower>{% endif %}")
TOWER = dict(width=40, depth=5, heads=5, kv_heads=1, hidden=48)
MODEL = {name: value for name, value in SMALL.items() if not name.startswith(("vae_w", "vae_d"))}


QWEN2_NAMES = {  # our modules, and Qwen2's of which each is made
    "embedding": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"],
    "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.o_proj"], "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn.down": ["mlp.down_proj"]}


def qwen2_tensors(tower):
    """Return five times the parameters of a tower, named and split as in Qwen2."""
    tensors = {}
    for name, p in tower.named_parameters():
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("blocks."):
            _, block, module = module.split(".", 2)
            prefix = f"model.layers.{block}."
        names = QWEN2_NAMES[module]
        rows = [40, 8, 8] if module == "qkv" else len(p) // len(names)
        for theirs, values in zip(names, p.detach().split(rows)):
            tensors[f"{prefix}{theirs}.{kind}"] = 5 * values
    return tensors


def write_tokenizer(folder):
    """Write a tokenizer of WORDS that, unlike ours, pads and truncates, and a chat template."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    library = Library(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    library.pre_tokenizer = Whitespace()
    library.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    library.add_special_tokens([AddedToken(word) for word in WORDS[:5]])
    library.enable_padding()
    library.enable_truncation(4)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        chat_template=TEMPLATE, bos_token="<bos>", eos_token=dict(content="<eos>"))))


def write_tower(folder):
    """Write a random Qwen2 in Hugging Face's layout, with its tokenizer."""
    folder.mkdir()
    torch.manual_seed(0)
    tower = Understanding(len(WORDS), **TOWER, bias=True)
    save_file(qwen2_tensors(tower), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen2", vocab_size=len(WORDS), hidden_size=40, num_hidden_layers=5,
        num_attention_heads=5, num_key_value_heads=1, intermediate_size=48, rms_norm_eps=1e-6,
        eos_token_id=2)))
    write_tokenizer(folder)


def write_vae(folder):
    """Write a random VAE in diffusers' layout."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(dict(VAE(6, 4, 4).named_parameters()), folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        z_dim=6, base_dim=4, decoder_base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
        latents_mean=[0.1 * i for i in range(6)], latents_std=[1 + 0.1 * i for i in range(6)])))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folders of a tower and of a VAE, as settings of a model."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("parts")
    write_tower(root / "tower")
    write_vae(root / "vae")
    return dict(und_folder=str(root / "tower"), vae_folder=str(root / "vae"))


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """The folder of a model whose tower and VAE are in other folders."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = make_config(**MODEL, **parts)
    model = MoS(config, read_tokenizer(config, folder))
    with torch.no_grad():
        for p in model.generation.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def test_tokenizer(parts):
    """<bos> is kept, padding and truncation are off, and texts may be put into a template."""
    tokenizer = FolderTokenizer(parts["und_folder"])
    assert len(tokenizer) == len(WORDS)
    assert tokenizer.stops == (2,)
    assert tokenizer.encode("a red circle above a blue square") == [1, 5, 6, 8, 10, 5, 7, 9]
    assert tokenizer.batch(["a red", "a"]).tolist() == [[1, 5, 6], [1, 5, Tokenizer.PAD]]
    assert tokenizer.decode([5, 6, 2]) == "a red"
    chat = FolderTokenizer(parts["und_folder"], chat=True)
    assert chat.encode("a red") == [1, 3, 5, 6, 2, 4]
    assert chat.encode("") == [1, 3, 2, 4]


def test_template_equals_transformers(parts):
    """The ids of a text in a template equal those of transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=parts["und_folder"] + "/tokenizer.json", bos_token="<bos>",
        eos_token="<eos>", chat_template=TEMPLATE)
    expected = theirs.apply_chat_template([dict(role="user", content="a red circle")],
                                          add_generation_prompt=True)["input_ids"]
    assert FolderTokenizer(parts["und_folder"], chat=True).encode("a red circle") == expected


def test_no_words(parts, monkeypatch, tmp_path):
    """A missing package, file or template is an error of one line."""
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        FolderTokenizer(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(Path(parts["und_folder"]) / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no chat template; leave out --und-chat"):
        FolderTokenizer(tmp_path, chat=True)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="package tokenizers is needed: pip install tokenizers"):
        FolderTokenizer(parts["und_folder"])


def test_checkpoint_holds_its_own_parts_only(checkpoint, parts):
    """A saved model leaves tower and VAE in their folders, and loads them from there."""
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "mos.safetensors"]
    model = MoS.from_pretrained(checkpoint)
    assert model.understanding.embedding.weight.dtype == torch.bfloat16
    theirs = load_file(Path(parts["und_folder"]) / "model.safetensors")
    qkv = torch.cat([theirs[f"model.layers.3.self_attn.{x}_proj.weight"] for x in "qkv"])
    torch.testing.assert_close(model.understanding.blocks[3].qkv.weight, qkv.bfloat16())
    torch.testing.assert_close(model.vae.latents_std.flatten(), 1 + 0.1 * torch.arange(6))
    vae = load_vae(parts["vae_folder"])
    assert torch.equal(model.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    assert len(load_tower(parts["und_folder"]).blocks) == 5


def test_generation(checkpoint):
    """Pictures depend on the prompt, and not on whether the tower is still loaded."""
    model = MoS.from_pretrained(checkpoint)
    circle, = model.generate(["a red circle"])
    square, = model.generate(["a blue square"])
    assert circle.tobytes() != square.tobytes()
    model = MoS.from_pretrained(checkpoint, parts=("understanding",))
    assert model.generation.registers.is_meta
    assert model.vae.decoder.conv_in.weight.is_meta
    context = model.read(["a red circle"], "")
    model.understanding.to("meta")
    load_parts(model, checkpoint, ("vae", "mos"), "cpu")
    again, = model.generate(["a red circle"], context=context)
    assert again.tobytes() == circle.tobytes()


def test_rewriting(checkpoint, model):
    """The tower continues a request; with temperature 0 only the prompt decides how."""
    published = MoS.from_pretrained(checkpoint, und_chat=True)
    prompts = []
    published.tokenizer.request = lambda prompt: (prompts.append(prompt) or [1, 3, 5], "")
    text = published.rewrite("a red circle")
    assert prompts == ["a red circle"]
    assert text == published.rewrite("a red circle")
    assert len({published.rewrite("a red circle", 5.0, seed) for seed in range(4)}) > 1
    model.tokenizer.stops = ()  # a small tower that was not trained to rewrite continues the prompt
    text = model.rewrite("a red circle")
    assert text.startswith("a red circle ")
    assert len(model.tokenizer.encode(text)) == model.config.max_tokens
    tokenizer = Tokenizer(["in", "detail", ":", "a", "red", "circle"])  # of one that was
    ids, beginning = tokenizer.request("a red circle")
    assert tokenizer.decode(ids[1:]) == "in detail : a red circle"
    assert beginning == ""


def test_commands(checkpoint, parts, tmp_path, monkeypatch, capsys):
    """train.py and sample.py take the folders of tower and VAE as flags."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, text in enumerate(("a red circle", "a blue square")):
        sample.Image.new("RGB", (64, 64), text.split()[1]).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(text)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in
             {**MODEL, **parts, "data": pictures, "out": tmp_path / "run", "latents": "step",
              "states": tmp_path / "states", "parallel": "none", "stage": "image"}.items()]
    options = "--steps=3 --batch=2 --scenes=1 --warmup=1 --max-broken=1 --seed=1".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *options])
    train.main()
    out = tmp_path / "out.png"
    command = ["sample.py", "--prompt", "a red circle", "--checkpoint", str(tmp_path / "run"),
               "--out", str(out)]

    def draw(*flags):
        """Return the pixels that sample.py draws with some more flags."""
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        sample.main()
        return sample.Image.open(out).convert("RGB").tobytes()

    picture = draw()
    assert draw("--drop-tower") == picture
    assert draw("--tower-device", "cpu") == picture
    assert draw("--vae-dtype", "bfloat16") != picture
    monkeypatch.setattr(sys, "argv", command + ["--und-folder", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        sample.main()


def test_other_folders(parts):
    """A tower or VAE whose size differs from the configuration is refused."""
    for change in (dict(und_width=80), dict(und_depth=4), dict(vae_channels=8)):
        config = make_config(**{**MODEL, **parts, **change})
        with pytest.raises(ValueError, match="but the configuration .*give another folder"):
            MoS(config, read_tokenizer(config, ""))


def copy_folder(parts, tmp_path, part, **changes):
    """Copy the folder of a part, with changes of its config.json; None removes a value."""
    folder = shutil.copytree(parts[f"{part}_folder"], tmp_path / part)
    values = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        values[name] = value
        if value is None:
            del values[name]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def rewrite_tensor(folder, name):
    """Change one value of a tensor in a folder's weights, in place: names and sizes stay."""
    path, = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, path)


@pytest.mark.parametrize("part, tensor, value", (
    ("understanding", "model.layers.3.mlp.up_proj.weight", dict(rope_theta=1e6)),
    ("vae", "decoder.conv_out.weight", dict(latents_std=[1.0] * 6))))
def test_fingerprint(part, tensor, value, parts, tmp_path):
    """It follows from what a folder's model computes with, and from nothing else."""
    name = "und" if part == "understanding" else part
    folder = copy_folder(parts, tmp_path, name)

    def now():
        return fingerprint(make_config(**{f"{name}_folder": str(folder)}), "", part)

    before = now()
    assert before == fingerprint(make_config(**parts), "", part)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | dict(transformers_version="9")))
    (folder / "notes.txt").write_text("something else")
    assert now() == before
    (folder / "config.json").write_text(json.dumps(values | value))
    changed = now()
    assert changed != before
    rewrite_tensor(folder, tensor)
    assert now() not in (before, changed)


def test_fingerprint_of_own_parts(model, tmp_path):
    """That of the small world's parts is the checksum of their file."""
    model.save_pretrained(tmp_path)
    for part in ("vae", "understanding"):
        expected = hashlib.sha256((tmp_path / f"{part}.safetensors").read_bytes()).hexdigest()
        assert fingerprint(model.config, tmp_path, part) == expected


@pytest.mark.parametrize("part, changes, message", (
    ("und", dict(hidden_size="wide"), "holds no model as it is published .*str"),
    ("und", dict(num_key_value_heads=0), "holds no model as it is published .*Zero"),
    ("und", dict(hidden_act="gelu"), "another activation than silu"),
    ("vae", dict(dim_mult=4), "holds no model as it is published .*TypeError"),
    ("vae", dict(latents_std=None), "must have 6 numbers each in latents_mean and"),
    ("vae", dict(latents_mean=[0.0]), "must have 6 numbers each in latents_mean and")))
def test_spoiled_configurations(part, changes, message, parts, tmp_path):
    """A value that is missing in config.json, or of a wrong type, is an error of one line."""
    folder = copy_folder(parts, tmp_path, part, **changes)
    with pytest.raises(ValueError, match=message):
        {"und": load_tower, "vae": load_vae}[part](folder)


def test_spoiled_files(parts, tmp_path):
    """A folder without end token, with a tensor in two files, or a broken file, is refused."""
    folder = copy_folder(parts, tmp_path, "und", eos_token_id=[])
    with pytest.raises(ValueError, match="names no eos_token_id"):
        FolderTokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert FolderTokenizer(folder).stops == (4,)
    shutil.copy(folder / "model.safetensors", folder / "twice.safetensors")
    with pytest.raises(ValueError, match="is in model.safetensors, too; keep one of them"):
        load_tower(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        FolderTokenizer(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no model as it is published .*'list' object"):
        load_tower(folder)
    config = make_config(**{**MODEL, **parts})
    tokenizer = Tokenizer(map(str, range(99)))  # of more words than the tower has
    with pytest.raises(ValueError, match="has 102 tokens, its tower only 14: not of one model"):
        MoS(config, tokenizer)


def test_dynamic_frequencies(parts, tmp_path):
    """The "dynamic" frequencies of InternVL3 change nothing up to the length of training."""
    folder = copy_folder(parts, tmp_path, "und", rope_scaling=dict(rope_type="dynamic", factor=2.0))
    tokens = torch.tensor([[1, 5, 6, 8]])
    plain = load_tower(parts["und_folder"], dtype=torch.float32)
    dynamic = load_tower(folder, dtype=torch.float32)
    assert torch.equal(plain(plain.embed(tokens)), dynamic(dynamic.embed(tokens)))
