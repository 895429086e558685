"""Training: all stages from nothing, exact resume, broken runs, one process and two."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import evaluate
import train
from conftest import ROOT, SMALL
from data import Folder, Shapes
from mos import MoS, read_vocabulary
from towers import Tokenizer

CPU = torch.device("cpu")
MODEL = {**SMALL, "max_tokens": 48}
QUICK = dict(steps=6, batch=4, lr=3e-4, warmup=2, scenes=16, log_every=1, eval_every=100,
             save_every=100, eval_prompts=1)
DRIVER = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, train, test_train
test_train.lighten(setattr)
if os.environ.get("RANK", "0") != "0":
    common.replacing.__init__ = None  # this process cannot write
common.run(train.main)
"""


def settings(stage, out, **changes):
    c = train.TrainConfig(stage=stage, out=str(out), **{**QUICK, **changes})
    return train.complete(c, stage, CPU)


def go(stage, out, **changes):
    """Train one stage of the tiny model in this process."""
    return train.train_stage(settings(stage, out, **changes), MODEL, train.World(0, 1, CPU))


def start(tmp_path, *launcher, **values):
    """Train in processes of their own, by way of DRIVER."""
    (tmp_path / "driver.py").write_text(DRIVER)
    flags = [str(a) for k, v in {**QUICK, **MODEL, **values}.items()
             for a in ("--" + k.replace("_", "-"), v)]
    return subprocess.Popen([sys.executable, *launcher, tmp_path / "driver.py", *flags], text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lighten(patch):
    """Make validations cheap, and the small world's words known without drawing 5,000 scenes."""
    own = train.vocabulary
    patch(train, "vocabulary", lambda dataset: own(dataset) if isinstance(dataset, Folder)
          else read_vocabulary(ROOT / "weights"))
    for kind in train.KINDS.values():
        patch(kind, "validate", lambda *_: {"val_loss": 1.0})


def few(score):
    """The same score of a tenth of the items."""
    return lambda *a, **k: score(*(max(1, x // 10) if isinstance(x, int) else x for x in a), **k)


def at_step(patch, stage, step, change):
    """Let `change` see and replace the inputs of one step."""
    own = train.KINDS[stage].inputs
    patch.setattr(train.KINDS[stage], "inputs", lambda self, now:
                  change(own(self, now)) if now == step else own(self, now))


def ctrl_c(batch):
    os.kill(os.getpid(), signal.SIGINT)
    return batch


def rows(folder, stage):
    with open(folder / f"{stage}.csv") as file:
        return list(csv.DictReader(file))


def curve(folder, stage):
    return [[float(row[k]) for k in ("step", "loss", "grad_norm")] for row in rows(folder, stage)
            if row["loss"]]


def state(folder, stage):
    return folder / f"{stage}.state.safetensors"


def saved_step(folder, stage):
    with safe_open(state(folder, stage), "pt") as file:
        return int(file.metadata()["step"])


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_close(one, other, stage):
    """Loss and gradient norm at every step within 2e-5 (the CSV's digits), weights within 1e-5."""
    for a, b in zip(curve(one, stage), curve(other, stage), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    a, b = load_file(state(one, stage)), load_file(state(other, stage))
    for name in a:
        if name.startswith("weight/"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


@pytest.fixture
def light(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    lighten(monkeypatch.setattr)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All three stages with everything real, but fewer validation pictures and questions."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("score_judge", "score_understanding"):
            patch.setattr(evaluate, name, few(getattr(evaluate, name)))
        for stage in train.STAGES:
            assert go(stage, folder)
    return folder


@pytest.fixture(scope="module")
def straight(trained, tmp_path_factory):
    """Each stage in one go with light validations: what other ways of running must equal."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch.setattr)
        for stage in train.STAGES:
            assert go(stage, folder / stage, init=str(trained))
    return folder


@pytest.fixture(scope="module")
def doubled(trained, tmp_path_factory):
    """The same under torchrun with two processes, of which the second cannot write."""
    folder = tmp_path_factory.mktemp("doubled")
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    run = start(folder, *launcher, out=folder, init=trained)
    text, _ = run.communicate(timeout=200)
    assert run.returncode == 0, text[-3000:]
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of own pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "pink")):
        Image.new("RGB", (90, 70 + 10 * i), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"A {colour} square.")
    return folder


# ------------------------------------------------------------------------------------------------
# Whole runs

def test_all_stages(trained):
    """Training from nothing leaves exactly the promised files, and a folder that draws."""
    names = {"config.json", "vocab.json", "vae_000006.png", "image_000006.png",
             *(f"{part}.safetensors" for part in train.PART.values())}
    for stage in train.STAGES:
        names |= {f"{stage}.csv", state(trained, stage).name}
        names |= {f"{stage}.png"} if find_spec("matplotlib") else set()
        assert [step for step, *_ in curve(trained, stage)] == [1, 2, 3, 4, 5, 6]
        assert set(rows(trained, stage)[-1]) >= {
            "vae": {"val_psnr", "val_judge"}, "understand": {"val_loss", "val_answers"},
            "image": {"val_loss", "val_t0", "loss_t9", "score", "score_position"}}[stage]
    assert {p.name for p in trained.iterdir()} == names
    assert Image.open(trained / "vae_000006.png").size == (8 * 64, 2 * 64)
    assert Image.open(trained / "image_000006.png").size == (8 * 64, 3 * 64)
    model = MoS.from_pretrained(trained)
    assert model.generate(["a red circle above a blue star"], size=(64, 96))[0].size == (96, 64)
    assert not torch.equal(model.vae.latents_std, torch.ones_like(model.vae.latents_std))
    average = load_file(state(trained, "vae"))["average/encoder.conv_in.weight"]
    assert torch.equal(model.vae.encoder.conv_in.weight, average.bfloat16().float())


@pytest.mark.parametrize("stage", train.STAGES)
def test_resume_is_exact(stage, light, trained, straight, tmp_path, monkeypatch):
    """Stopped after 3 of 6 steps and resumed: bit-identical state, log and export."""
    with monkeypatch.context() as patch:
        at_step(patch, stage, 2, ctrl_c)
        assert not go(stage, tmp_path, init=str(trained))
    assert saved_step(tmp_path, stage) == 3
    assert go(stage, tmp_path, init=str(trained), resume=True)
    whole = straight / stage
    a, b = load_file(state(whole, stage)), load_file(state(tmp_path, stage))
    assert a.keys() == b.keys()
    assert {name.split("/")[0] for name in a} == {"weight", "average", "exp_avg", "exp_avg_sq"}
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert curve(whole, stage) == curve(tmp_path, stage)
    part = f"{train.PART[stage]}.safetensors"
    assert (whole / part).read_bytes() == (tmp_path / part).read_bytes()


@pytest.mark.parametrize("stage", train.STAGES)
def test_two_processes(stage, straight, doubled):
    """Two processes under torchrun equal one, and only the first of them writes."""
    assert_close(straight / stage, doubled, stage)


@pytest.mark.parametrize("stage", train.STAGES)
def test_accumulation(stage, light, trained, straight, tmp_path):
    """Two micro-batches equal one batch."""
    assert go(stage, tmp_path, init=str(trained), micro_batch=2)
    assert_close(straight / stage, tmp_path, stage)


def test_killed(light, tmp_path):
    """SIGKILL at a random moment loses at most save_every steps, and --resume goes on."""
    out = tmp_path / "out"
    run = start(tmp_path, stage="vae", out=out, steps=5000, save_every=2)
    while not state(out, "vae").is_file():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    time.sleep(random.random())
    run.kill()
    run.communicate()
    logged, saved = int(rows(out, "vae")[-1]["step"]), saved_step(out, "vae")
    assert logged - 2 <= saved <= logged and saved % 2 == 0
    assert go("vae", out, steps=saved + 2, resume=True)
    assert saved_step(out, "vae") == saved + 2


def test_torn_save(light, tmp_path, monkeypatch):
    """A save that dies half-way leaves the last state as it was, and nothing beside it."""
    def torn(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")
    assert go("vae", tmp_path, steps=2)
    before = {p: data for p, data in contents(tmp_path).items() if p.suffix == ".safetensors"}
    monkeypatch.setattr(train, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        go("vae", tmp_path, steps=4, save_every=1, resume=True)
    assert {p: data for p, data in contents(tmp_path).items() if p.suffix == ".safetensors"} == before


def test_ctrl_c(light, tmp_path, monkeypatch, capsys):
    """Ctrl-C finishes the step, saves, says how to go on, and is Ctrl-C again afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, "vae", 1, ctrl_c)
    assert not go("vae", tmp_path)
    assert saved_step(tmp_path, "vae") == 2
    assert "stopped at step 2; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("what, step", (("loss", 2), ("gradient", 3)))
def test_not_finite(what, step, light, tmp_path, monkeypatch, capsys):
    """A loss or gradient that is not finite ends the run; state and export stay good."""
    def spoil(batch):
        if what == "loss":
            return batch[0] * torch.nan, *batch[1:]
        own = train.VaeStage.forward

        def forward(self, *batch):  # + sqrt(0): no change to the loss, NaN as its gradient
            loss, metrics = own(self, *batch)
            return loss + (0 * self.model.vae.quant_conv.weight).sum().sqrt(), metrics
        monkeypatch.setattr(train.VaeStage, "forward", forward)
        return batch
    at_step(monkeypatch, "vae", step, spoil)
    with pytest.raises(SystemExit) as stop:
        go("vae", tmp_path, save_every=2, eval_every=1, log_every=50)
    assert stop.value.code not in (0, None)
    assert "last good checkpoint" in "".join(capsys.readouterr())
    assert saved_step(tmp_path, "vae") == 2
    for path in (state(tmp_path, "vae"), tmp_path / "vae.safetensors"):
        assert all(p.isfinite().all() for p in load_file(path).values()), path.name


def test_frozen_parts(light, trained, tmp_path, monkeypatch):
    """The image stage changes router and generation tower, and no bit of VAE and understanding."""
    kept = []
    monkeypatch.setattr(train, "export", lambda model, *_: kept.append(model))
    assert go("image", tmp_path, init=str(trained), steps=2, weight_decay=1.0)
    old, new = MoS.from_pretrained(trained).state_dict(), kept[-1].state_dict()
    frozen = [name for name in old if name.startswith(("vae.", "understanding."))]
    assert len(frozen) > 100 and [n for n in frozen if not torch.equal(old[n], new[n])] == []
    assert not torch.equal(old["router.logits.weight"], new["router.logits.weight"])


@pytest.mark.parametrize("held", ("state", "export"))
def test_no_second_start(held, light, tmp_path):
    """Without --resume a stage does not start over a state or a trained part; nothing changes."""
    assert go("vae", tmp_path, steps=2)
    (state(tmp_path, "vae") if held == "export" else tmp_path / "vae.safetensors").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        go("vae", tmp_path, steps=2, seed=1)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# Data

def test_own_pictures(pictures, trained, tmp_path):
    """A folder of pictures trains its own understanding tower, and the image stage of another."""
    assert go("understand", tmp_path / "understand", data=str(pictures))
    words = read_vocabulary(tmp_path / "understand").words
    assert words == ["<pad>", "<bos>", "<eos>", "a", "black", "blue", "green", "pink", "red",
                     "square", "white"]
    assert go("image", tmp_path / "image", data=str(pictures), init=str(trained))
    assert len(MoS.from_pretrained(tmp_path / "image").generate(["a red square"], steps=1)) == 1


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("text, message", (("a zebra", "unknown word 'zebra'"), ("", "caption"),
                                           ("a " * 60, "tokens")))
def test_unusable_caption(text, message, workers, light, pictures, trained, tmp_path):
    """A caption that cannot be used is one line, before any work and any folder."""
    (pictures / "3.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        go("image", tmp_path / "out", data=str(pictures), init=str(trained), workers=workers)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ("counting", "dense"))
def test_tasks(task, trained, tmp_path):
    """--tasks trains on, and scores, these tasks only; "dense" has no score of its own."""
    assert {Shapes(64, 0, tasks=(task,)).scene(i)[1].task for i in range(20)} == {task}
    assert go("image", tmp_path, init=str(trained), tasks=(task,), steps=1)
    scores = {name for name in rows(tmp_path, "image")[0] if name.startswith("score_")}
    assert scores == ({"score_counting"} if task == "counting" else set())


def test_unknown_task(tmp_path):
    """An unknown task is an error that names it and the known ones."""
    with pytest.raises(ValueError, match="'zebra'.*counting.*dense"):
        go("vae", tmp_path / "out", tasks=("zebra",))
    assert not (tmp_path / "out").exists()


def test_validation_is_unseen(trained):
    """No stage validates on a scene that training draws, in a world so small that they recur."""
    def scenes(items):
        return {tuple(item[0].tolist()) for item in items}
    data, model = Shapes(64, 0, tasks=("colours",), grid=8), MoS.from_pretrained(trained)
    drawn = scenes(data[i] for i in range(3000))
    assert drawn & scenes(data[i] for i in range(3000, 3200))
    for stage in train.STAGES:
        c = settings(stage, "", tasks=data.tasks, grid=data.grid)
        kind = train.KINDS[stage](model, data, c, train.World(0, 1, CPU))
        assert not drawn & scenes(kind.validation_items(200))
    seen = []
    kind.encode = lambda dataset, _: (seen.append((dataset.split, dataset.grid))
                                      or (torch.zeros(1, 6, 4, 4), torch.zeros(1, 5)))
    kind.start(0)
    assert seen == [("train", 8), ("val", 8)]


@pytest.mark.parametrize("stage", train.STAGES)
def test_inputs_are_a_function_of_seed_and_step(stage, trained):
    """A batch depends on seed and step, not on where a run began or on how many share it."""
    def inputs(step, begin=None, seed=0, rank=0, size=1):
        c, data = settings(stage, "", seed=seed, batch=6), Shapes(64, seed)
        kind = train.KINDS[stage](model, data, c, train.World(rank, size, CPU))
        if stage == "image":
            kind.latents = torch.arange(16.0)[:, None, None, None].expand(16, 6, 4, 4)
            kind.tokens = torch.arange(80).view(16, 5)
        else:
            kind.start(step if begin is None else begin)
        return [kind.inputs(s) for s in range(step if begin is None else begin, step + 1)][-1]

    def same(one, other):
        return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    model = MoS.from_pretrained(trained)
    whole = inputs(3)
    assert all(same(whole, inputs(3, begin=1)))
    assert not any(same(whole, inputs(2))) and not any(same(whole, inputs(3, seed=1)))
    for size in (2, 3, 6):
        parts = [inputs(3, rank=rank, size=size) for rank in range(size)]
        assert all(same(whole, [torch.cat(column) for column in zip(*parts)])), size


def test_order():
    """Every epoch is another permutation; epochs join seamlessly; shares tile every batch."""
    for length, batch in ((10, 4), (7, 16), (5, 5)):
        steps = [train.order(s, batch, length, 3) for s in range(2 * length)]
        epochs = torch.cat(steps).view(-1, length)
        assert (epochs.sort(1).values == torch.arange(length)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
        for size in (1, 2, 3, 4):
            mine = [steps[1][train.World(r, size, CPU).share(batch)] for r in range(size)]
            assert torch.equal(torch.cat(mine), steps[1])
    assert not torch.equal(train.order(0, 9, 9, 0), train.order(0, 9, 9, 1))


def test_prompt_dropout(trained):
    """Every tenth prompt is emptied down to <bos>; the others stay."""
    c = settings("image", "")
    stage = train.ImageStage(MoS.from_pretrained(trained), None, c, train.World(0, 1, CPU))
    stage.latents = torch.zeros(1, 6, 1, 1)
    tokens = torch.arange(5).expand(8000, 5) + 10
    tokens[:, 0] = Tokenizer.BOS
    drawn, t, *_ = stage.draws(8000, tokens, stage.generator(0))
    empty = (drawn[:, 1:] == Tokenizer.PAD).all(1)
    assert (drawn[:, 0] == Tokenizer.BOS).all() and torch.equal(drawn[~empty], tokens[~empty])
    assert abs(empty.float().mean() - 0.1) < 0.015 and 0 < t.min() < t.max() < 1


# ------------------------------------------------------------------------------------------------
# The engine's parts

def test_learning_rate():
    """Linear up to the peak, then a falling cosine down to its share of the peak."""
    c = settings("vae", "", steps=1000, warmup=100, lr=2e-3, final_lr=0.1)
    rates = [train.learning_rate(step, c) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5) and rates[49] == pytest.approx(1e-3)
    assert rates[99] == rates[100] == max(rates) == pytest.approx(2e-3)
    assert rates[550] == pytest.approx((2e-3 + 2e-4) / 2)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(2e-4, rel=1e-3)
    assert train.learning_rate(0, settings("vae", "", warmup=0)) == QUICK["lr"]


def test_decayed_groups(model):
    """Weight decay is for the weights of linear and convolutional layers, and for nothing else."""
    plain = {m.weight for m in model.modules()
             if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    decayed, rest = train.decayed_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and rest["weight_decay"] == 0
    assert set(decayed["params"]) == plain
    assert set(rest["params"]) == set(model.parameters()) - plain
    assert {model.understanding.embedding.weight, model.generation.registers} <= set(rest["params"])


@pytest.mark.parametrize("decay", (0.0, 0.5))
def test_average(decay):
    """Average = d * average + (1 - d) * weights, d growing to the decay; 0 follows exactly."""
    p = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
    average, expected = train.Average([p], decay), p.detach().clone()
    for step in range(12):
        p.data += torch.tensor([1.0, 0.1])
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * p.detach()
        average.update(step)
    torch.testing.assert_close(average.shadow[0], expected)
    own = p.detach().clone()
    assert torch.equal(own, average.shadow[0]) == (decay == 0)
    with pytest.raises(KeyError), average.applied():
        torch.testing.assert_close(p.detach(), expected)
        raise KeyError
    assert torch.equal(p, own)


def test_clipping(light, tmp_path, monkeypatch):
    """The optimizer never sees a gradient longer than `clip`; the log shows its true length."""
    norms, own = [], torch.optim.AdamW.step

    def step(self, *_):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups
                                for p in g["params"]]).norm().item())
        return own(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert go("vae", tmp_path, steps=3, clip=1e-2)
    assert norms == pytest.approx([1e-2] * 3, rel=1e-3)
    assert min(norm for *_, norm in curve(tmp_path, "vae")) > 2e-2
