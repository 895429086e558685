"""Published parts by path: tokenizers, templates, and a whole model on top of them, no download."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from checkpoint import load_parts, read_tokenizer
from conftest import SMALL, make_config
from mos import MoS
from pretrained.folders import FolderTokenizer, load_tower, load_vae
from towers import Bytes, Tokenizer, Understanding
from vae import VAE

WORDS = "<pad> <bos> <eos> <user> <tower> a red blue circle square above : in detail".split()
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message.role != 'user' %}"
            "{{ raise_exception('no') }}{% endif %}<user>{{ message['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<tower>{% endif %}")
TOWER = dict(width=40, depth=5, heads=5, kv_heads=1, hidden=48)
MODEL = {name: value for name, value in SMALL.items() if not name.startswith(("vae_w", "vae_d"))}


def write_tower(folder):
    """A random Qwen2 in Hugging Face's layout, with its tokenizer."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    folder.mkdir()
    torch.manual_seed(0)
    tower = Understanding(len(WORDS), **TOWER, bias=True)
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "embedding":
             "embed_tokens", "out": "self_attn.o_proj", "ffn.down": "mlp.down_proj"}
    tensors = {}
    for name, p in tower.named_parameters():
        name, p = name.replace("blocks", "layers"), 5 * p.detach()
        for own, theirs in names.items():
            name = name.replace(f"{own}.", f"{theirs}.")
        for packed, parts, sizes in (("qkv", ("q", "k", "v"), (40, 8, 8)),
                                     ("ffn.gate_up", ("gate", "up"), (48, 48))):
            if packed in name:
                home = "self_attn" if packed == "qkv" else "mlp"
                tensors |= {"model." + name.replace(packed, f"{home}.{part}_proj"): rows.clone()
                            for part, rows in zip(parts, p.split(sizes))}
                break
        else:
            tensors["lm_head.weight" if name == "head.weight" else f"model.{name}"] = p.clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen2", vocab_size=len(WORDS), hidden_size=40, num_hidden_layers=5,
        num_attention_heads=5, num_key_value_heads=1, intermediate_size=48, rms_norm_eps=1e-6,
        eos_token_id=2)))
    library = Library(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    library.pre_tokenizer = Whitespace()
    library.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    library.add_special_tokens([AddedToken(word) for word in WORDS[:5]])
    library.enable_padding()
    library.enable_truncation(4)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        chat_template=TEMPLATE, bos_token="<bos>", eos_token=dict(content="<eos>"))))
    return tower


def write_vae(folder):
    """A random VAE in diffusers' layout."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(dict(VAE(6, 4, 4).named_parameters()), folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        z_dim=6, base_dim=4, decoder_base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
        latents_mean=[0.1 * i for i in range(6)], latents_std=[1 + 0.1 * i for i in range(6)])))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tower and a VAE, as settings of a model."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("parts")
    write_tower(root / "tower")
    write_vae(root / "vae")
    return dict(und_folder=str(root / "tower"), vae_folder=str(root / "vae"))


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """A checkpoint whose tower and VAE lie elsewhere."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = make_config(**MODEL, **parts)
    model = MoS(config, read_tokenizer(config, folder))
    with torch.no_grad():
        for p in model.generation.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def test_tokenizer(parts):
    """<bos> is kept, padding and truncation are off, a template may stand around a text."""
    words = FolderTokenizer(parts["und_folder"])
    assert len(words) == len(WORDS) and words.stops == (2,)
    assert words.encode("a red circle above a blue square") == [1, 5, 6, 8, 10, 5, 7, 9]
    assert words.batch(["a red", "a"]).tolist() == [[1, 5, 6], [1, 5, Tokenizer.PAD]]
    assert words.decode([5, 6, 2]) == "a red"
    chat = FolderTokenizer(parts["und_folder"], chat=True)
    assert chat.encode("a red") == [1, 3, 5, 6, 2, 4] and chat.encode("") == [1, 3, 2, 4]


def test_template_equals_transformers(parts):
    """The same ids as transformers' own rendering of the template."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=parts["und_folder"] + "/tokenizer.json", bos_token="<bos>",
        eos_token="<eos>", chat_template=TEMPLATE)
    found = theirs.apply_chat_template([dict(role="user", content="a red circle")],
                                       add_generation_prompt=True)["input_ids"]
    assert FolderTokenizer(parts["und_folder"], chat=True).encode("a red circle") == found


def test_no_words(parts, monkeypatch, tmp_path):
    """A missing package, file or template is one clear line."""
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        FolderTokenizer(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((path_of(parts) / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no chat template; leave out --und-chat"):
        FolderTokenizer(tmp_path, chat=True)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="package tokenizers is needed: pip install tokenizers"):
        FolderTokenizer(parts["und_folder"])


def path_of(parts):
    """The tower's folder."""
    return Path(parts["und_folder"])


def test_checkpoint_holds_its_own_parts_only(checkpoint, parts):
    """Tower and VAE stay in their folders, and come from there with their values."""
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "mos.safetensors"]
    model = MoS.from_pretrained(checkpoint)
    assert model.understanding.embedding.weight.dtype == torch.bfloat16
    theirs = load_file(path_of(parts) / "model.safetensors")
    qkv = torch.cat([theirs[f"model.layers.3.self_attn.{x}_proj.weight"] for x in "qkv"])
    torch.testing.assert_close(model.understanding.blocks[3].qkv.weight, qkv.bfloat16())
    torch.testing.assert_close(model.vae.latents_std.flatten(), 1 + 0.1 * torch.arange(6))
    wan = load_vae(parts["vae_folder"])
    assert torch.equal(model.vae.decoder.conv_in.weight, wan.decoder.conv_in.weight)
    assert len(load_tower(parts["und_folder"]).blocks) == 5


def test_generation(checkpoint):
    """Pictures depend on the prompt, and not on where or when the tower has read it."""
    model = MoS.from_pretrained(checkpoint)
    (first,), (other,) = (model.generate([text]) for text in ("a red circle", "a blue square"))
    assert first.tobytes() != other.tobytes()
    late = MoS.from_pretrained(checkpoint, parts=("understanding",))
    assert late.generation.registers.is_meta and late.vae.decoder.conv_in.weight.is_meta
    context = late.read(["a red circle"], "")
    late.understanding.to("meta")
    load_parts(late, checkpoint, ("vae", "mos"), "cpu")
    assert late.generate(["a red circle"], context=context)[0].tobytes() == first.tobytes()


def test_rewriting(checkpoint, model):
    """The tower goes on with a request; a temperature of 0 is a function of the prompt alone."""
    real = MoS.from_pretrained(checkpoint, und_chat=True)
    asked = []
    real.tokenizer.request = lambda prompt: (asked.append(prompt) or [1, 3, 5], "")
    text = real.rewrite("a red circle")
    assert asked == ["a red circle"] and text == real.rewrite("a red circle")
    assert len({real.rewrite("a red circle", 5.0, seed) for seed in range(4)}) > 1
    model.tokenizer.stops = ()  # a small tower that has not learned to rewrite goes on
    assert model.rewrite("a red circle").startswith("a red circle ")
    assert len(model.tokenizer.encode(model.rewrite("a red circle"))) == model.config.max_tokens
    taught = Tokenizer(["in", "detail", ":", "a", "red", "circle"])
    assert taught.decode(taught.request("a red circle")[0][1:]) == "in detail : a red circle"


def test_commands(checkpoint, parts, tmp_path, monkeypatch, capsys):
    """train.py and sample.py take tower and VAE by path."""
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
    pictures = []
    for more in ([], ["--drop-tower"], ["--tower-device", "cpu"], ["--vae-dtype", "bfloat16"]):
        monkeypatch.setattr(sys, "argv", command + more)
        sample.main()
        pictures.append(sample.Image.open(out).convert("RGB").tobytes())
    assert pictures[0] == pictures[1] == pictures[2] != pictures[3]
    monkeypatch.setattr(sys, "argv", command + ["--und-folder", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        sample.main()


def test_other_folders(parts):
    """A tower or VAE of other widths than the configuration's is refused."""
    for change in (dict(und_width=80), dict(und_depth=4), dict(vae_channels=8)):
        config = make_config(**{**MODEL, **parts, **change})
        with pytest.raises(ValueError, match="but the configuration .*give another folder"):
            MoS(config, read_tokenizer(config, ""))


def spoiled(parts, tmp_path, part, name="config.json", **changes):
    """A copy of a part's folder in which a JSON file has other values; None: none at all."""
    folder = shutil.copytree(parts[f"{part}_folder"], tmp_path / part)
    values = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


@pytest.mark.parametrize("part, changes, blame", (
    ("und", dict(hidden_size=None), "holds no model as it is published .*hidden_size"),
    ("und", dict(num_key_value_heads=0), "holds no model as it is published .*Zero"),
    ("und", dict(hidden_act="gelu"), "another activation than silu"),
    ("vae", dict(dim_mult=4), "holds no model as it is published .*TypeError"),
    ("vae", dict(latents_std=None), "holds no model as it is published .*latents_std"),
    ("vae", dict(latents_mean=[0.0]), "must have 6 numbers each in latents_mean and")))
def test_spoiled_configurations(part, changes, blame, parts, tmp_path):
    """What config.json lacks, or has of the wrong kind, is told in one line."""
    folder = spoiled(parts, tmp_path, part, **changes)
    with pytest.raises(ValueError, match=blame):
        (load_tower if part == "und" else load_vae)(folder)


def test_spoiled_files(parts, tmp_path):
    """A tensor in two files, no tokenizer, no end of texts, more words than the tower has."""
    folder = spoiled(parts, tmp_path, "und", eos_token_id=[])
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
    with pytest.raises(ValueError, match="config.json must hold a JSON object"):
        load_tower(folder)
    config = make_config(**{**MODEL, **parts})
    words = Tokenizer(map(str, range(99)))
    with pytest.raises(ValueError, match="has 102 tokens, its tower only 14: not of one model"):
        MoS(config, words)


def test_dynamic_frequencies(parts, tmp_path):
    """InternVL3's change of frequencies does nothing up to the length of training."""
    folder = spoiled(parts, tmp_path, "und", rope_scaling=dict(rope_type="dynamic", factor=2.0))
    tokens = torch.tensor([[1, 5, 6, 8]])
    a, b = (load_tower(one, dtype=torch.float32) for one in (parts["und_folder"], folder))
    assert torch.equal(a(a.embed(tokens)), b(b.embed(tokens)))


def test_bytes():
    """The words of towers with random weights."""
    assert Bytes().encode("ab") == [1, 100, 101]
    assert Bytes().decode([100, 101, 2, 5000]) == "ab" and len(Bytes()) == 259
