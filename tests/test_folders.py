"""Folders of published towers and VAEs: tokenizers, templates, and models that use them by path."""

import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from published import SMOLLM2, TEMPLATE, WORDS, write_json, write_tower, write_vae
from safetensors.torch import load_file, save_file

import sample
import train
from checkpoint import fingerprint, load_parts, read_tokenizer
from config import read_config
from conftest import SMALL, make_config
from mos import MoS
from pretrained.folders import REQUEST, FolderTokenizer, build_tower, load_tower, load_vae
from tools import evaluate
from towers import Tokenizer

MODEL = {name: value for name, value in SMALL.items() if not name.startswith(("vae_w", "vae_d"))}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folders of a tower and of a VAE, as settings of a model."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("parts")
    return dict(und_folder=str(write_tower(root / "tower")),
                vae_folder=str(write_vae(root / "vae")))


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
    for one in (tokenizer, chat):  # as a second process gets it, that of --states producer
        assert pickle.loads(pickle.dumps(one)).encode("a red") == one.encode("a red")


SAY = "{% for m in messages %}{{ m.content }}{% endfor %}"
DEFAULT = [dict(name="tool_use", template="tools"), dict(name="default", template="named " + SAY)]
TEMPLATES = {  # what tokenizer_config.json holds, other files, and what "a <red>" becomes
    "a token that is null": (dict(chat_template="{{ bos_token }}" + SAY, bos_token=None), {},
                             "a <red>"),
    "named templates": (dict(chat_template=DEFAULT), {}, "named a <red>"),
    "an older file": (dict(chat_template=None),
                      {"chat_template.json": json.dumps(dict(chat_template="json " + SAY))},
                      "json a <red>"),
    "a newer file": (dict(chat_template="older"), {"chat_template.jinja": "jinja " + SAY},
                     "jinja a <red>"),
    "an older file of tokens": (dict(chat_template="{{ bos_token }}" + SAY, bos_token=None),
                                {"special_tokens_map.json": '{"bos_token": {"content": "<s>"}}'},
                                "<s>a <red>"),
    "the newer file of tokens": (
        dict(chat_template="{{ bos_token }}" + SAY, bos_token=None, added_tokens_decoder={}),
        {"special_tokens_map.json": '{"bos_token": "<s>"}'}, "a <red>"),
    "answers are marked": (
        dict(chat_template="{% generation %}\n" + SAY + "{% endgeneration %}\n!"), {}, "a <red>!"),
    "no tools": (dict(chat_template="{% if tools is not none or documents is not none %}tools"
                                    "{% endif %}" + SAY), {}, "a <red>"),
    "JSON": (dict(chat_template="{{ {'b': 1, 'a': '<é>'} | tojson }}{{ [1] | tojson(indent=1) }}"),
             {}, '{"b": 1, "a": "<é>"}[\n 1\n]'),
    "a loop that ends early": (
        dict(chat_template="{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"), {}, "1")}


def write_template(parts, tmp_path, config, files):
    """Return a copy of a tower's folder with another tokenizer_config.json and other files."""
    folder = copy_folder(parts, tmp_path, "und")
    values = json.loads((folder / "tokenizer_config.json").read_text()) | config
    write_json(folder, "tokenizer_config.json", values)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates(kind, parts, tmp_path):
    """Templates are found and filled as they are published."""
    config, files, expected = TEMPLATES[kind]
    folder = write_template(parts, tmp_path, config, files)
    assert FolderTokenizer(folder, chat=True).template("a <red>") == expected


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_equal_transformers(kind, parts, tmp_path):
    """The texts are those of transformers."""
    transformers = pytest.importorskip("transformers")
    config, files, expected = TEMPLATES[kind]
    if kind == "an older file":  # which transformers reads with a picture's processor only
        files = {"chat_template.jinja": json.loads(files["chat_template.json"])["chat_template"]}
    folder = write_template(parts, tmp_path, config, files)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.apply_chat_template([dict(role="user", content="a <red>")], tokenize=False,
                                      add_generation_prompt=True) == expected


def test_template_equals_transformers(parts):
    """The ids of a text in a template equal those of transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=parts["und_folder"] + "/tokenizer.json", bos_token="<bos>",
        eos_token="<eos>", chat_template=TEMPLATE)
    expected = theirs.apply_chat_template([dict(role="user", content="a red circle")],
                                          add_generation_prompt=True)["input_ids"]
    assert FolderTokenizer(parts["und_folder"], chat=True).encode("a red circle") == expected


def test_date_and_thinking(parts, tmp_path):
    """A template that asks for the date gets one that stays; a tower that rewrites does not think.
    """
    source = ("{{ strftime_now('%d %b %Y') }} {{ enable_thinking | default('either') }}: "
              "{{ messages[0].content }}")
    folder = write_template(parts, tmp_path, dict(chat_template=source), {})
    tokenizer = FolderTokenizer(folder, chat=True)
    assert tokenizer.template("a red") == "26 Jul 2024 either: a red"
    texts = []
    render = tokenizer.template
    tokenizer.template = lambda *a, **options: (texts.append(render(*a, **options)) or "a red")
    tokenizer.request("a red")
    assert texts == [f"26 Jul 2024 False: {REQUEST}a red"]


@pytest.mark.parametrize("source, message", (
    ("{% if %}", "is damaged: "),
    ("{{ raise_exception('no') }}", r"cannot be filled \(no\); leave out --und-chat"),
    ("{{ nothing.more }}", "cannot be filled"), ("{{ nothing | tojson }}", "cannot be filled"),
    ([dict(name="tool_use", template="x")], "has no chat template; leave out --und-chat")))
def test_spoiled_templates(source, message, parts, tmp_path):
    """A template that cannot be read or filled is an error of one line."""
    folder = write_template(parts, tmp_path, dict(chat_template=source), {})
    with pytest.raises(ValueError, match=message):
        FolderTokenizer(folder, chat=True).encode("a red")


def test_marks_of_editors(parts, tmp_path):
    """A byte order mark in front of JSON files, which some editors write, is no part of them."""
    folder = copy_folder(parts, tmp_path, "und")
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert FolderTokenizer(folder, chat=True).encode("a red") == [1, 3, 5, 6, 2, 4]
    assert len(load_tower(folder).blocks) == 5


def test_gaps_in_a_vocabulary(parts, tmp_path):
    """What counts is the largest id, not how many there are: the embedding has a row for each."""
    folder = copy_folder(parts, tmp_path, "und")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["red"] = 99
    write_json(folder, "tokenizer.json", values)
    config = make_config(**{**MODEL, **parts, "und_folder": str(folder)})
    assert FolderTokenizer(folder).encode("a red") == [1, 5, 99]
    with pytest.raises(ValueError, match="has ids for 100 tokens, .* only for 14: they are not"):
        MoS(config, read_tokenizer(config, ""))


def test_pictures_need_a_placeholder(parts):
    """A tokenizer without one says so."""
    with pytest.raises(ValueError, match="no placeholder for image tokens: expected <IMG_CONTEXT>"):
        FolderTokenizer(parts["und_folder"]).encode("a red", image_tokens=4)


def test_vision_without_a_placeholder(parts, tmp_path):
    """A tower that reads pictures must say where they stand in a text."""
    vision = dict(model_type="internvl_vision", hidden_size=32, num_hidden_layers=1,
                  num_attention_heads=2, intermediate_size=48, image_size=56, patch_size=14)
    folder = copy_folder(parts, tmp_path, "und", vision_config=vision)
    with pytest.raises(ValueError, match="names no placeholder for image tokens: expected image_t"):
        load_tower(folder)
    write_json(folder, "config.json", json.loads((folder / "config.json").read_text())
               | dict(downsample_ratio=0.25))
    with pytest.raises(ValueError, match="und: its config.json has downsample_ratio 0.25"):
        load_tower(folder)
    write_json(folder, "config.json", dict(vision_config=vision, image_token_id=3,
                                           text_config=dict(model_type="qwen2")))
    with torch.device("meta"):  # a width that is left out holds for both
        tower = build_tower(folder)
    assert tower.vision.projector[2].out_features == len(tower.norm.weight) == 4096


def test_hidden_files(parts, tmp_path):
    """Files that begin with a dot, as macOS leaves them beside others, are not looked at."""
    folder = copy_folder(parts, tmp_path, "vae")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(b"something else")
    assert load_vae(folder).latents_mean.shape == (6, 1, 1)


def test_what_may_have_been_meant(parts, tmp_path):
    """An adapter, a pipeline and a pointer of Git LFS are recognised."""
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter", "adapter_config.json", {})
    with pytest.raises(FileNotFoundError, match="this is a LoRA adapter: merge it into its model"):
        load_tower(tmp_path / "adapter")
    copy_folder(parts, tmp_path / "pipeline", "vae")
    with pytest.raises(FileNotFoundError, match="layout; it may be in one of its folders vae$"):
        load_vae(tmp_path / "pipeline")
    folder = copy_folder(parts, tmp_path, "und")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for read in (load_tower, FolderTokenizer):
        with pytest.raises(ValueError, match="is only a pointer of Git LFS; fetch .* git lfs pull"):
            read(folder)


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
    published.understanding.write = lambda *_: iter(())
    assert published.rewrite("a red circle") == "a red circle"
    model.understanding.write = lambda tokens, limit, *_: iter([5] * limit)
    text = model.rewrite("a red circle")  # a tower that was not trained to rewrite continues it
    assert text.startswith("a red circle ")
    assert len(model.tokenizer.encode(text)) == model.config.max_tokens
    tokenizer = Tokenizer(["in", "detail", ":", "a", "red", "circle"])  # of one that was
    ids, beginning = tokenizer.request("a red circle")
    assert tokenizer.decode(ids[1:]) == "in detail : a red circle"
    assert beginning == ""


def write_pictures(folder):
    """Write two pictures with captions; return the folder."""
    folder.mkdir()
    for i, text in enumerate(("a red circle", "a blue square")):
        Image.new("RGB", (64, 64), text.split()[1]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


def train_flags(**settings):
    """Return the flags of a few steps of stage image, with a small generation tower."""
    own = {name: value for name, value in SMALL.items() if not name.startswith(("und_", "vae_"))}
    values = {**own, "stage": "image", "steps": 2, "batch": 2, "scenes": 1, "warmup": 1, "seed": 1,
              "max_broken": 1, "data": "pictures", "latents": "memory", "out": "run", **settings}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def stop(command, capsys, *arguments):
    """Return the one line with which a command stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        command(*arguments)
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def smollm2(command, tmp_path):
    """In an empty folder: pictures, the narrow SmolLM2 and a VAE, and the two as flags."""
    pytest.importorskip("tokenizers")
    write_pictures(tmp_path / "pictures")
    write_tower(tmp_path / "parts/tower", SMOLLM2)
    write_vae(tmp_path / "parts/vae")
    return dict(und_folder="parts/tower", vae_folder="parts/vae")


def test_named_by_folders_alone(smollm2, command, capsys, monkeypatch, tmp_path):
    """A tower of 9 and 3 heads and a VAE train and draw; config.json holds what they are.

    The model is found from any directory, and may be moved away from its parts.
    """
    command(train, *train_flags(**smollm2))
    config = read_config("run")
    true = dict(und_vocabulary=14, und_width=72, und_depth=4, und_heads=9, und_kv_heads=3,
                und_hidden=96, und_tied=True, und_images=False, vae_channels=6, vae_width=4,
                vae_decoder_width=4, und_folder=str(tmp_path / "parts/tower"),
                vae_folder=str(tmp_path / "parts/vae"))
    assert {name: getattr(config, name) for name in true} == true
    assert sorted(p.name for p in (tmp_path / "run").glob("*.safetensors")) == ["mos.safetensors"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    draw = ["--checkpoint", "../run", "--prompt", "a red circle"]
    command(sample, *draw)
    drawn = Path("out.png").read_bytes()
    command(evaluate, "../run", "--what", "loss", "--number", 1, "--json", "loss.json")
    scored = json.loads(Path("loss.json").read_text())["scores"]["loss"]["mean"]["seen"][0]
    assert 0.1 < scored < 10
    (tmp_path / "parts").rename(tmp_path / "moved")
    message = stop(command, capsys, sample, *draw)
    assert message == (f"error: ../run/config.json names {tmp_path}/parts/tower as its und_folder, "
                       "which is no folder; give its place with --und-folder, or correct it in "
                       "that file")
    message = stop(command, capsys, sample, *draw, "--und-folder", "no", "--vae-folder", "no")
    assert message.startswith("error: no tokenizer.json in no: --und-folder and --vae-folder")
    command(sample, *draw, "--und-folder", "../moved/tower", "--vae-folder", "../moved/vae")
    assert Path("out.png").read_bytes() == drawn
    monkeypatch.chdir(tmp_path)
    command(train, "--resume", "--out", "run", "--und-folder", "moved/tower", "--steps", 3,
            "--vae-folder", "moved/vae")
    assert read_config("run").und_folder == str(tmp_path / "moved/tower")
    write_tower(tmp_path / "other", SMOLLM2, seed=1)
    message = stop(command, capsys, train, "--resume", "--out", "run", "--und-folder", "other",
                   "--steps", 4)
    assert "another understanding tower" in message


@pytest.mark.parametrize("setting, value, found", (
    ("und_width", 80, 72), ("und_depth", 5, 4), ("und_heads", 8, 9), ("und_kv_heads", 1, 3),
    ("und_hidden", 48, 96), ("und_vocabulary", 30, 14), ("vae_channels", 48, 6),
    ("vae_width", 20, 4)))
def test_flags_against_folders(setting, value, found, smollm2, command, capsys):
    """A flag that contradicts a folder is refused by name, before any data is looked at."""
    message = stop(command, capsys, train,
                   *train_flags(**smollm2, **{setting: value, "data": "nowhere"}))
    folder = smollm2[f"{setting[:3]}_folder"]
    assert message == (f"error: {setting} is {found} in {folder} and cannot become {value}; "
                       "leave the flag out")


def test_stages_of_published_parts(smollm2, command, capsys):
    """What a folder holds is not trained: by default the other stages run, asked for it is refused.
    """
    flags = [flag for flag in train_flags(**smollm2) if not flag.startswith("--stage")]
    command(train, *flags)
    assert [path.stem for path in Path("run").glob("*.toml")] == ["image"]
    for stage, part in (("vae", "vae"), ("understand", "tower")):
        message = stop(command, capsys, train, *train_flags(**smollm2, stage=stage, out="other"))
        assert message == (f"error: stage {stage} has nothing to train: that part is the published "
                           f"one in parts/{part}")


def test_frozen_parts_come_before_data(smollm2, command, capsys, tmp_path):
    """What is wrong with a folder, or does not fit its true depth, shows before data is read."""
    message = stop(command, capsys, train, *train_flags(**smollm2, k=5, data="nowhere"))
    assert "k=5 states cannot be chosen from und_depth=4" in message
    command(train, *train_flags(**smollm2, k=4))
    (tmp_path / "parts/tower/tokenizer.json").unlink()
    message = stop(command, capsys, train, *train_flags(**smollm2, data="nowhere", out="other"))
    assert message.startswith("error: no tokenizer.json in ")


def test_stored_latents_and_states(smollm2, command, capsys, tmp_path):
    """They are made from a folder's VAE and tower; those of another one are refused by name.

    The other one has files of the same names and sizes: only what they hold differs.
    """
    stored = dict(**smollm2, latents="latents", states="states")
    command(train, *train_flags(**stored))
    command(train, *train_flags(**stored, out="again"))
    assert "1 of 1 shards made now" in (text := capsys.readouterr().out)
    assert "0 of 1 shards made now" in text
    trained, again = load_file("run/mos.safetensors"), load_file("again/mos.safetensors")
    assert all(torch.equal(values, again[name]) for name, values in trained.items())
    message = stop(command, capsys, train, *train_flags(**stored, out="chat"), "--und-chat")
    assert message.startswith("error: states: states was made with another tokenizer or chat templ")
    other = write_tower(tmp_path / "other", SMOLLM2, seed=1)
    assert [p.stat().st_size for p in sorted(other.iterdir())] == [
        p.stat().st_size for p in sorted(Path("parts/tower").iterdir())]
    message = stop(command, capsys, train,
                   *train_flags(**stored | dict(und_folder="other"), out="tower"))
    assert message.startswith("error: states: states was made with another tower ")
    rewrite_tensor(Path("parts/vae"), "decoder.conv_out.weight")
    message = stop(command, capsys, train, *train_flags(**stored, out="vae"))
    assert message.startswith("error: latents: latents was made with another vae ")


def test_commands(checkpoint, parts, tmp_path, command, capsys):
    """sample.py takes the folders of tower and VAE as flags, and draws the same in every way."""
    def draw(*flags):
        """Return the pixels that sample.py draws with some more flags."""
        command(sample, "--prompt", "a red circle", "--checkpoint", checkpoint, *flags)
        return Image.open("out.png").convert("RGB").tobytes()

    picture = draw()
    assert draw("--drop-tower") == picture
    assert draw("--tower-device", "cpu") == picture
    assert draw("--vae-dtype", "bfloat16") != picture
    assert "--tower-device must be a device" in stop(
        command, capsys, sample, "--prompt", "a", "--checkpoint", checkpoint,
        "--tower-device", "meta")
    assert "no tokenizer.json in" in stop(command, capsys, sample, "--prompt", "a red circle",
                                          "--checkpoint", checkpoint, "--und-folder", tmp_path)


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
    ("vae", dict(latents_std=[1.0] * 5 + [0.0]), "latents_std, the latter above 0"),
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
    with pytest.raises(ValueError, match="has ids for 102 tokens, .* only for 14: they are not"):
        MoS(config, tokenizer)
