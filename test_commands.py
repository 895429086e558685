"""The commands: bad input is one line, good input leaves a picture, and the files are safe."""

import importlib
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from common import run
from conftest import ROOT, make_model, run_script
from data import Shapes
from mos import MoS, MoSConfig, read_vocabulary

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
DRAW = ("--prompt", "a red circle", "--steps", 1)


def arguments(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])


def contents(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small model of random weights."""
    folder = tmp_path_factory.mktemp("small") / "model"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def fail(monkeypatch, capsys, tmp_path):
    """Run a command in tmp_path that must fail as all do and change no file; gives its message."""
    def call(module, *flags, message=""):
        arguments(monkeypatch, module, *flags)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            run(module.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
        assert re.search(message, error), error
        assert contents(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.png").write_bytes(b"an older picture")
    return call


@pytest.fixture
def draw(monkeypatch, tmp_path, small):
    """Run sample.py with the small model in tmp_path; gives the picture."""
    def call(*flags):
        arguments(monkeypatch, sample, "--checkpoint", small, "--out", tmp_path / "a.png", *flags)
        sample.main()
        return Image.open(tmp_path / "a.png")
    return call


# ------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags, message", (
    (["--checkpoint", "missing"], "no config.json in missing"),
    (["--prompt", "a red cirkle"], "unknown word 'cirkle'.*circle"),
    (["--negative", "a red cirkle"], "unknown word 'cirkle'.*circle"),
    (["--prompt", ""], "empty"), (["--prompt", "a star", " "], "empty"), (["--prompt"], "--prompt"),
    (["--prompt", "red " * 20], "21 tokens.*at most 16.*red red"),
    (["--negative", "the " * 20], "21 tokens.*at most 16.*the the"),
    (["--size", 100], "multiple of 32.*100"), (["--size", 0], "multiple of 32"),
    (["--size", -32], "multiple of 32"), (["--size", "big"], "size.*'big'"),
    (["--size", "64x64x64"], "size.*64x64x64"), (["--size", "64x"], "size.*64x"),
    (["--steps", 0], "steps.*0"), (["--steps", -1], "steps.*-1"), (["--steps", "x"], "steps.*'x'"),
    (["--guidance", "nan"], "guidance.*nan"), (["--guidance", "inf"], "guidance.*inf"),
    (["--rescale", 2], "rescale.*2"), (["--rescale", "nan"], "rescale.*nan"),
    (["--schedule", "fast"], "schedule.*uniform, linear-quadratic.*'fast'"),
    (["--num", 0], "--num.*0"), (["--num", -1], "--num.*-1"), (["--seed", 2 ** 70], "seed"),
    (["--out", "missing/a.png"], "missing"), (["--out", "."], "--out"), (["--out", "a.jpg"], "a.jpg"),
    (["--out", "folder.png"], "folder.png"), (["--zebra"], "--zebra"), (["--prom", "a"], "--prom"),
))
def test_sample_refuses(flags, message, fail, small, tmp_path):
    """What sample.py cannot draw or write."""
    (tmp_path / "folder.png").mkdir()
    fail(sample, "--checkpoint", small, *DRAW, *flags, message=message)


def test_sample_needs_a_prompt(fail):
    """A missing --prompt."""
    fail(sample, message="--prompt")


def truncate(folder):
    path = folder / "mos.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def reshape(folder):
    tensors = load_file(folder / "vae.safetensors")
    tensors["vae.quant_conv.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "vae.safetensors")


def configure(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


@pytest.mark.parametrize("spoil, message", (
    (truncate, "mos.safetensors is damaged"),
    (reshape, r"vae.safetensors: tensor vae.quant_conv.weight has shape \(3, 3\)"),
    (lambda f: (f / "vae.safetensors").unlink(), "no vae.safetensors"),
    (lambda f: (f / "vae.safetensors").write_bytes(b""), "vae.safetensors is damaged"),
    (lambda f: (f / "vocab.json").unlink(), "no vocab.json"),
    (lambda f: (f / "vocab.json").write_text("{"), "vocab.json"),
    (lambda f: (f / "vocab.json").write_text("null"), "vocab.json"),
    (lambda f: (f / "vocab.json").write_text("[1, 2]"), "vocab.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json"),
    (configure(zebra=1), "zebra"), (configure(k=6), "k=6"), (configure(k="two"), "k"),
    (configure(size=None), "size"), (configure(size=50), "size"), (configure(gen_depth=-1), "gen_depth"),
    (configure(gen_kv_heads=0), "gen_kv_heads"), (configure(und_depth=4), "understanding"),
    (configure(router_inputs=5), "router_inputs"),
))
def test_damaged_checkpoint(spoil, message, fail, small, tmp_path):
    """A checkpoint that is not whole or does not fit together names the file or field."""
    shutil.copytree(small, tmp_path / "model")
    spoil(tmp_path / "model")
    fail(sample, "--checkpoint", "model", *DRAW, message=message)


@pytest.mark.parametrize("flags, message", (
    (["missing"], "no config.json in missing"), (["--what", "zebra"], "zebra"), (["--zebra"], "--zebra"),
    (["--number", 0], "--number"), (["--number", -1], "--number"), (["--pictures", 0], "--pictures"),
    (["--pictures", -1], "--pictures"), (["--batch", 0], "--batch"), (["--steps", 0], "steps"),
    (["--guidance", "nan"], "guidance"), (["--rescale", 2], "rescale"), (["--schedule", "x"], "schedule"),
    (["--json", "missing/a.json"], "missing"), (["--json", "."], "json"),
))
def test_evaluate_refuses(flags, message, fail, monkeypatch):
    """What evaluate.py cannot score or write; --json is checked before hours of drawing."""
    if "--json" in flags:
        monkeypatch.setattr(evaluate, "score_tasks", lambda *_, **__: pytest.fail("drew before"))
    fail(evaluate, *([] if "--number" in flags else ["--number", 1]), *flags, message=message)


@pytest.mark.parametrize("flags, message", (
    (["--stage", "zebra"], "'zebra'.*vae, understand, image"), (["--preset", "zebra"], "zebra.*laptop"),
    (["--tasks", "zebra"], "'zebra'.*counting"), (["--k", 9], "k=9.*und_depth=8"), (["--k", 0], "k=0"),
    (["--epsilon", 2], "epsilon.*2"), (["--router-inputs", "nonsense"], "nonsense"),
    (["--router-inputs", "time"], "prompt"), (["--schedule", "x"], "schedule"),
    (["--data", "missing"], "missing"), (["--data", "empty"], "empty holds no pictures"),
    (["--data", "bad"], "metadata.jsonl, line 2"), (["--data", "number"], "line 1"),
    (["--stage", "image", "--init", "half"], "no vae.safetensors in half"),
    (["--stage", "image", "--init", "missing"], "missing"), (["--zebra"], "--zebra"),
    (["--steps", 0], "steps"), (["--steps", -1], "steps"), (["--steps", 1.5], "steps"),
    (["--batch", -1], "batch"), (["--micro-batch", 0], "micro_batch"), (["--log-every", 0], "log_every"),
    (["--eval-every", 0], "eval_every"), (["--save-every", -1], "save_every"), (["--lr", -1], "lr"),
    (["--lr", "nan"], "lr"), (["--final-lr", -1], "final_lr"), (["--warmup", -1], "warmup"),
    (["--weight-decay", -1], "weight_decay"), (["--clip", 0], "clip"), (["--ema", -1], "ema"),
    (["--ema", 1.5], "ema"), (["--prompt-dropout", 2], "prompt_dropout"),
    (["--kl-weight", -1], "kl_weight"), (["--workers", -1], "workers"),
    (["--eval-prompts", 0], "eval_prompts"), (["--stage", "image", "--scenes", 0], "scenes"),
    (["--grid", 0], "grid"), (["--size", 48], "size"), (["--size", 0], "size"), (["--size", -32], "size"),
    (["--gen-depth", -1], "gen_depth"), (["--gen-heads", 3], "heads"), (["--gen-heads", 0], "gen_heads"),
    (["--und-heads", 7], "heads"), (["--vae-width", 0], "vae_width"), (["--registers", -1], "registers"),
    (["--max-tokens", 0], "max_tokens"), (["--sampling-steps", 0], "steps"), (["--shift", 0], "shift"),
    (["--guidance", "nan"], "guidance"), (["--rescale", 3], "rescale"), (["--gen-patch", 0], "gen_patch"),
    (["--out", "out.png"], "out.png"),
))
def test_train_refuses(flags, message, fail, small, monkeypatch, tmp_path):
    """What cannot be trained is said before any work and before --out exists."""
    monkeypatch.setattr(train, "vocabulary", lambda _: read_vocabulary(small))
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("went on to train"))
    for name in ("empty", "bad", "number"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad/metadata.jsonl").write_text('\n{"file_name": "a.png"\n')
    (tmp_path / "number/metadata.jsonl").write_text('{"file_name": "a.png", "text": 5}')
    Image.new("RGB", (64, 64)).save(tmp_path / "number/a.png")
    shutil.copytree(small, tmp_path / "half", ignore=shutil.ignore_patterns("vae.*"))
    init = [] if "--init" in flags else ["--init", ROOT / "weights"]
    fail(train, "--stage", "vae", "--preset", "laptop", "--out", "run", *init, *flags, message=message)


@pytest.mark.parametrize("script, flags", (("sample.py", ["--prompt", "a zebra"]),
                                           ("evaluate.py", ["missing"]),
                                           ("train.py", ["--stage", "zebra"])))
def test_refusal_of_a_real_process(script, flags):
    """In a process of its own, too, an error is one line and exit code 2."""
    done = run_script(script, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .+\n", done.stderr)


def test_interrupted(monkeypatch, capsys):
    """Ctrl-C while a command works is one line, too."""
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(MoS, "from_pretrained", interrupt)
    arguments(monkeypatch, sample, *DRAW)
    with pytest.raises(SystemExit) as stop:
        run(sample.main)
    assert stop.value.code == 130 and capsys.readouterr().err.strip().count("\n") == 0


# ------------------------------------------------------------------------------------------------
# Good input

def test_picture_and_metadata(draw):
    """One prompt gives one picture, whose metadata is enough to draw it again."""
    settings = {"negative": "blue", "seed": "5", "steps": "2", "guidance": "2.5", "rescale": "0.25",
                "schedule": "linear-quadratic", "size": "64x96"}
    flags = [a for name, value in settings.items() for a in (f"--{name}", value)]
    picture = draw("--prompt", "a red circle", *flags)
    assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == (96, 64)
    assert picture.info == settings | {"prompt": "a red circle", "checkpoint": "model",
                                       "torch": torch.__version__}
    assert draw("--prompt", "a red circle", *flags).tobytes() == picture.tobytes()
    flags[flags.index("--seed") + 1] = "6"
    assert draw("--prompt", "a red circle", *flags).tobytes() != picture.tobytes()


def test_grid(draw, tmp_path):
    """Several prompts are rows, --num pictures columns; picture i of them has seed + i."""
    grid = draw("--prompt", "a red circle", "two stars", "--num", "3", "--steps", "1", "--seed", "7")
    assert grid.size == (3 * 64, 2 * (64 + 32))
    assert grid.info["prompt"] == "a red circle | two stars" and grid.info["size"] == "64x64"
    alone = draw("--prompt", "two stars", "--steps", "1", "--seed", "11")
    tile = grid.crop((64, 96 + 32, 128, 96 + 96))
    difference = torch.tensor(list(tile.tobytes())) - torch.tensor(list(alone.tobytes()))
    assert difference.abs().max() <= 2  # batches round differently
    assert draw("--prompt", "two stars", "--num", "2", "--steps", "1").size == (128, 96)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


def test_shipped_weights(tmp_path):
    """`sample.py` with nothing but a prompt draws with weights/."""
    done = run_script("sample.py", "--prompt", "a red circle", "--steps", 2, "--out",
                      tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'a.png'}" in done.stdout
    assert Image.open(tmp_path / "a.png").size == (128, 128)


@pytest.mark.parametrize("module, names", (
    (sample, "prompt negative num steps guidance rescale schedule size seed out checkpoint".split()),
    (evaluate, "what tasks number pictures seed batch steps guidance json".split()),
    (train, [*train.TrainConfig.__dataclass_fields__, *MoSConfig.__dataclass_fields__])))
def test_help(module, names, monkeypatch, capsys):
    """--help ends well and names every setting, for train.py every field of both dataclasses."""
    arguments(monkeypatch, module, "--help")
    with pytest.raises(SystemExit) as stop:
        run(module.main)
    assert stop.value.code == 0
    shown = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert shown >= {"--" + name.replace("_", "-") for name in names}


# ------------------------------------------------------------------------------------------------
# Files

def test_shipped_files():
    """weights/ holds JSON and safetensors only: at most 24 MB in all and 15 MB a file."""
    files = list((ROOT / "weights").iterdir())
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    sizes = [p.stat().st_size for p in files]
    assert sum(sizes) <= 24e6 and max(sizes) <= 15e6


def test_no_pickle():
    """Nothing in the repository unpickles."""
    sources = [p for p in ROOT.glob("*.py") if not p.name.startswith("test_")]
    bad = r"torch\.load\b|\bpickle\b|\b(load|loads)\(.*allow_pickle"
    assert len(sources) > 10 and [p.name for p in sources if re.search(bad, p.read_text())] == []


def test_requirements_are_pinned():
    """Every requirement names one version."""
    if not (ROOT / "requirements.txt").is_file():
        pytest.skip("no requirements.txt yet")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([\w-]+)==([\d.]+)(?:;[^#]+)?\s*(?:#.*)?", line).groups()
                for line in lines if line.strip() and not line.startswith("#"))
    assert pins.keys() >= {"torch", "triton", "numpy", "pillow", "safetensors", "pytest"}


def commands():
    """The Python commands of README's code blocks and backticks: file and arguments."""
    shell = "\n".join(re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, re.S | re.M))
    lines = shell.replace("\\\n", " ").splitlines() + re.findall(r"`((?:python|torchrun) [^`]+)`", README)
    for line in lines:
        for words in (shlex.split(part, comments=True) for part in line.split("&&")):
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if words[:1] in (["python"], ["torchrun"]) and script is not None:
                yield words[script], words[script + 1:]


@pytest.mark.parametrize("script, flags", commands())
def test_readme_commands(script, flags, monkeypatch, tmp_path):
    """Every command in README is accepted by the parser of its script, and its settings are valid."""
    class Reached(Exception):
        pass

    def reached(*_, **__):
        raise Reached
    module = importlib.import_module(script.removesuffix(".py"))
    arguments(monkeypatch, module, *flags)
    monkeypatch.chdir(tmp_path)
    for owner, name in ((MoS, "from_pretrained"), (train.World, "join"), (evaluate, "score_judge")):
        monkeypatch.setattr(owner, name, reached)
    with pytest.raises(SystemExit if "--help" in flags else Reached):
        module.main()
    if module is train and "--help" not in flags:
        c, overrides = train.parse(flags)
        MoSConfig(**overrides)
        Shapes(64, 0, tasks=c.tasks)
        for stage in [c.stage] if c.stage else train.STAGES:
            train.complete(c, stage, torch.device("cpu"))


def test_readme_paths():
    """Every file and folder that README names in backticks exists; runs/ is made by its commands."""
    paths = set(re.findall(r"`([\w./-]+(?:\.py|\.md|/)|LICENSE|requirements\.txt)(?::\w+)?`", README))
    assert bool(paths) == bool(README)
    assert [p for p in sorted(paths) if not p.startswith("runs/") and not (ROOT / p).exists()] == []
