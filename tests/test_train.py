"""Training: all stages from nothing, exact resume, broken runs, one process and two."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from training import (LONG, MODEL, QUICK, alone, at_step, contents, ctrl_c, curve, go, launch,
                      lighten, near, prepare, saved, settings, start, state, validate_on_few)

import checkpoint
import config
import stages
import train
from checkpoint import read_vocabulary
from config import MoSConfig, plan, read_recipe, write_settings
from conftest import ROOT, make_config
from data.sources import Mixture
from mos import MoS, unfilled
from tools import ablate
from towers import Tokenizer
from world import scores
from world.dataset import WORLDS, Shapes

every_stage = pytest.mark.parametrize("stage", config.STAGES)
first_and_last = pytest.mark.parametrize("stage", (  # the others' inputs are compared in any case
    "vae", "edit", *(pytest.param(stage, marks=pytest.mark.slow)
                     for stage in ("understand", "image"))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages with everything real, but a tenth of the validation's pictures."""
    folder = tmp_path_factory.mktemp("trained")
    judge, ask, tokenizer = scores.score_judge, scores.score_understanding, train.build_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        validate_on_few(patch.setattr, 12)
        patch.setattr(train, "build_tokenizer", lambda dataset: tokenizer(dataset, 500))
        patch.setattr(scores, "score_judge", lambda number, **rest: judge(number // 10, **rest))
        patch.setattr(scores, "score_understanding", lambda model, n: ask(model, n // 10))
        assert all(go(stage, folder) for stage in config.STAGES)
    return folder


@pytest.fixture(scope="module")
def precise(trained, tmp_path_factory):
    """precise(stage): the folder of that stage in one process in float64, 20 steps."""
    @cache
    def run(stage):
        folder = tmp_path_factory.mktemp(stage)
        with pytest.MonkeyPatch.context() as patch:
            lighten(patch.setattr)
            torch.set_default_dtype(torch.float64)
            try:
                assert go(stage, folder, init=str(trained), **LONG)
            finally:
                torch.set_default_dtype(torch.float32)
        return folder
    return run


def test_all_stages(trained):
    """Training from nothing leaves exactly the promised files, and a folder that draws."""
    names = {"config.json", "vocab.json", "checkpoints", "edited_000006.png"}
    names |= {f"{stage}_000006.png" for stage in ("vae", "image", "edit")}
    for stage, columns in (
            ("vae", "val_psnr val_judge"), ("understand", "val_loss val_answers"),
            ("edit", "val_loss val_t0 val_edit edit_t7 edits edits_style edits_hybrid score"),
            ("image", "val_loss val_t0 loss_t9 score score_position entropy_2")):
        names |= {f"{stage}.csv", f"{stage}.toml", f"{checkpoint.TRAINED[stage]}.safetensors"}
        losses, last = curve(trained, stage)
        assert [step for step, *_ in losses] == [1, 2, 3, 4, 5, 6]
        assert all(last[name] for name in columns.split() if name != "loss_t9")
    for j in range(MODEL["gen_depth"]):  # k = 2 layers for each token
        assert 0 < float(last[f"entropy_{j}"]) <= math.log(MODEL["und_depth"])
        used = [float(last[f"usage_{j}_{m}"]) for m in range(MODEL["und_depth"])]
        assert sum(used) == pytest.approx(2, abs=1e-4) and max(used) <= 1
    assert {p.name for p in trained.iterdir()} == names
    assert Image.open(trained / "vae_000006.png").size == (8 * 68 - 4, 2 * 68 - 4)
    assert Image.open(trained / "image_000006.png").size == (8 * 68 - 4, 3 * 68 - 4)
    assert Image.open(trained / "edited_000006.png").size == (9 * 68 - 4, 2 * 68 - 4)
    model = MoS.from_pretrained(trained)
    assert model.generate(["a red circle above a blue star"], size=(64, 96))[0].size == (96, 64)
    assert not torch.equal(model.vae.latents_std, torch.ones_like(model.vae.latents_std))
    average = state(trained)[1]["average/encoder.conv_in.weight"]
    assert torch.equal(model.vae.encoder.conv_in.weight, average.bfloat16().float())


@first_and_last
def test_resume_is_exact(stage, light, trained, tmp_path, monkeypatch, capsys):
    """Ctrl-C in step 3 of 6 saves and says how to go on; resumed, all ends bit-identical."""
    whole, tmp_path = tmp_path / "whole", tmp_path / "resumed"
    init, handler = {"init": str(trained)}, signal.getsignal(signal.SIGINT)
    assert go(stage, whole, **init)
    with monkeypatch.context() as patch:
        at_step(patch, stage, 2, ctrl_c)
        assert not go(stage, tmp_path, **init) and state(tmp_path, stage)[0] == 3
    assert "stopped at step 3; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert go(stage, tmp_path, **init, resume=True)
    (step, a), (_, b) = state(whole, stage), state(tmp_path, stage)
    assert step == 6 and a.keys() == b.keys()
    assert {name.split("/")[0] for name in a} == {"weight", "average", "exp_avg", "exp_avg_sq"}
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert curve(whole, stage)[0] == curve(tmp_path, stage)[0]
    part = f"{checkpoint.TRAINED[stage]}.safetensors"
    assert (whole / part).read_bytes() == (tmp_path / part).read_bytes()


@first_and_last
def test_accumulation(stage, light, trained, tmp_path):
    """The gradient of two micro-batches is one batch's, in float64 to 1e-9 of its norm."""
    torch.set_default_dtype(torch.float64)
    try:
        for size in "24":
            assert go(stage, tmp_path / size, init=str(trained), micro_batch=int(size), steps=1)
    finally:
        torch.set_default_dtype(torch.float32)
    two, one = (curve(tmp_path / size, stage)[0] for size in "24")
    assert two == [pytest.approx(one[0], rel=1e-5)]  # the log is rounded
    (_, a), (_, b) = (state(tmp_path / size, stage) for size in "24")
    names = [name for name in a if name.startswith("exp_avg/")]  # a tenth of the gradient
    wrong, whole = (torch.stack(values).norm() for values in zip(
        *((torch.norm(a[name] - b[name]), torch.norm(b[name])) for name in names)))
    assert 0 < whole and wrong <= 1e-9 * whole


def test_recompute(model):
    """With activation checkpointing the gradients are the same bits, and less is kept for them."""
    z0, z1 = torch.randn(2, 2, model.config.vae_channels, 4, 4)
    tokens = model.tokenizer.batch(["a red circle", "two stars"])
    kept, found = {}, {}
    for recompute in (False, True):
        for block in model.generation.blocks:
            block.recompute = recompute
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                         lambda x: x)
        with hooks:
            loss = model.loss(z0, tokens, torch.tensor([0.3, 0.8]), z1, reference=z0).mean()
        kept[recompute] = sum(sizes)
        found[recompute] = torch.autograd.grad(loss, list(model.generation.parameters()))
    assert all(map(torch.equal, found[False], found[True]))
    assert kept[True] < kept[False] / 2


FSDP = dict(parallel="fsdp", micro_batch=1, recompute="")


@pytest.mark.parametrize("stage, flags", (
    ("edit", dict(parallel="ddp")), ("image", FSDP),
    *(pytest.param(stage, flags, marks=pytest.mark.slow) for stage, flags in (
        ("vae", dict(parallel="ddp")), ("understand", dict(parallel="ddp")), ("vae", FSDP),
        ("image", dict(parallel="ddp")), ("understand", FSDP), ("edit", FSDP)))))
def test_two_processes(stage, flags, trained, precise, tmp_path):
    """Two processes, whole models or shards, accumulating or not, do what one does."""
    launch(tmp_path, 2, "1", init=trained, stage=stage, **LONG, **flags)
    near(precise(stage), tmp_path, stage, 1e-10)


@pytest.mark.slow
def test_four_processes(trained, precise, tmp_path):
    """Two copies of two shards, too; they go on bit-identically, and one process reads them."""
    flags = dict(stage="image", init=trained, save_every=3, **LONG)
    four, one, hsdp = tmp_path / "four", tmp_path / "one", dict(parallel="hsdp", shards=2)
    four.mkdir()
    launch(four, 4, "1", **flags, **hsdp)
    near(precise("image"), four, "image", 1e-10)
    _, whole = state(four, "image")
    shutil.rmtree(saved(four, "image")[0])
    (four / "mos.safetensors").unlink()  # or the stage would count as finished
    shutil.copytree(four, one)
    launch(four, 4, "1", resume="", **flags, **hsdp)
    step, again = state(four, "image")
    assert step == 6 and all(torch.equal(whole[name], again[name]) for name in whole)
    launch(one, 1, "1", resume="", **flags)
    near(precise("image"), one, "image", 1e-10)


def test_killed(light, tmp_path):
    """SIGKILL amid a save loses less than twice save_every steps, and --resume goes on.

    Twice: the newest checkpoint may still be on its way to the disk, never more than that one.
    """
    run, folder = start(tmp_path, stage="vae", steps=5000, save_every=2), tmp_path / "checkpoints"
    while not (saved(tmp_path) and [*folder.glob("vae/.0*")]):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.001)
    run.kill()
    run.communicate()
    logged, kept = int(curve(tmp_path)[1]["step"]), state(tmp_path)[0]
    assert logged - 4 < kept <= logged and kept % 2 == 0
    assert go("vae", tmp_path, steps=kept + 2, resume=True) and state(tmp_path)[0] == kept + 2
    assert not [*folder.glob("vae/.*")]


@pytest.mark.slow
def test_shards_are_validated_and_exported(trained, tmp_path, monkeypatch):
    """With real validations two processes that hold shards log and export what one does."""
    flags = dict(stage="image", init=str(trained), eval_every=3)
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    assert go(out=one, **flags)
    monkeypatch.setenv("REAL", "1")
    launch(two, 2, parallel="fsdp", **flags)
    a, b = curve(one, "image")[1], curve(two, "image")[1]
    names = [name for name in a if name.startswith(("val_", "entropy", "score"))]
    assert len(names) > 10 and all(a[name] for name in names)
    for name in names:
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = (load_file(folder / "mos.safetensors") for folder in (one, two))
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-3) for name in a)


@pytest.mark.slow
def test_a_process_that_stops_answering(light, tmp_path):
    """The others end after their patience with a line that names it, and states stay good."""
    run = start(tmp_path, 2, stage="vae", steps=5000, save_every=2, patience=5)
    while not saved(tmp_path):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True,
                             text=True).stdout.split()
    os.kill(int(workers[1]), signal.SIGSTOP)
    text, _ = run.communicate(timeout=120)
    assert run.returncode and re.search("error: process 1 of 2 does not answer any more", text)
    assert state(tmp_path)[0] >= 2


@pytest.mark.parametrize("error", (OSError("disk full"), CheckpointException(
    "save", {0: _wrap_exception(OSError("disk full"))})))
def test_torn_save(error, light, tmp_path, monkeypatch, capsys):
    """A save that dies half-way leaves the last checkpoint as it was, and nothing beside it.

    Training goes on, and at its end exports the model and says what is missing.
    """
    def torn(tensors, storage_writer, **_):
        (storage_writer.path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
        raise error
    assert go("vae", tmp_path, steps=2)
    before = contents(tmp_path / "checkpoints")
    monkeypatch.setattr(dcp, "save", torn)
    with pytest.raises(OSError, match="step 4 could not be written .* older ones are kept: .*full"):
        go("vae", tmp_path, steps=4, save_every=1, resume=True)
    assert contents(tmp_path / "checkpoints") == before and len(before) == 2
    assert re.search("step 3 could not be written .* goes on", capsys.readouterr().out)
    assert curve(tmp_path)[0][-1][0] == 4  # it went on, there might have been room again
    with safe_open(tmp_path / "vae.safetensors", "pt") as file:
        assert file.metadata() == {"trained": "vae 4"}


def test_saving_in_the_background(light, tmp_path, monkeypatch):
    """Training goes on while a state is written, and the state is still that of its step."""
    written, own = threading.Event(), dcp.save

    def slow(*arguments, **rest):
        assert written.wait(30), "training waited for the state to be written"
        return own(*arguments, **rest)
    for name in "ab":
        with monkeypatch.context() as patch:
            if name == "b":
                at_step(patch, "vae", 4, lambda batch: written.set() or batch)
                patch.setattr(dcp, "save", slow)
            assert go("vae", tmp_path / name, save_every=3)
    one, two = (saved(tmp_path / name)[1] for name in "ab")
    assert checkpoint.find_fault(two) is None and two.name == "00000003"
    one, two = (load_file(next(path.glob("*.safetensors"))) for path in (one, two))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_state(light, tmp_path, capsys):
    """A damaged state is passed over and said so; training from the one before ends the same."""
    assert go("vae", tmp_path, save_every=2)
    whole, (newest, before) = state(tmp_path)[1], saved(tmp_path)
    assert [path.name for path in (newest, before)] == ["00000006", "00000004"]  # the last two
    flip(next(newest.glob("*.safetensors")))
    assert go("vae", tmp_path, save_every=2, resume=True)
    assert re.search(f"{newest} is damaged .*safetensors is not what was written.*passed over",
                     capsys.readouterr().out)
    again = state(tmp_path)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for path in saved(tmp_path):
        flip(next(path.glob("*.safetensors")))
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .*another --out"):
        go("vae", tmp_path, resume=True)


@pytest.mark.parametrize("name, harm, fault", (
    ("a.safetensors", lambda path: path.write_bytes(b"abc"), "a.safetensors is not what was writt"),
    ("a.safetensors", Path.unlink, "No such file"), ("manifest.json", Path.unlink, "No such file"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json: "),
    ("manifest.json", lambda path: path.write_text("{"), "manifest.json: "),
    ("manifest.json", lambda path: path.write_text("{}"), "manifest.json: ")))
def test_damage_is_found(name, harm, fault, tmp_path):
    """A file of a checkpoint that is cut off, changed or missing is named."""
    folder = tmp_path / "00000003"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"abcd")
    sums = {"a.safetensors": checkpoint.checksum(folder / "a.safetensors")}
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "files": sums, "run": {}}))
    assert checkpoint.find_fault(folder) is None
    copy = folder.rename(tmp_path / "20261128")
    assert "another step: this is a copy" in checkpoint.find_fault(copy)
    copy.rename(folder)
    harm(folder / name)
    assert fault in checkpoint.find_fault(folder)


@pytest.mark.parametrize("what, step", (("loss", 2), ("gradient", 3)))
def test_not_finite(what, step, light, tmp_path, monkeypatch, capsys):
    """A loss or gradient that is not finite ends the run; state and export stay good."""
    def spoil(batch):
        if what == "loss":
            return batch[0] * torch.nan, *batch[1:]
        own = stages.VaeStage.forward

        def forward(self, *batch):  # + sqrt(0): no change to the loss, NaN as its gradient
            loss, metrics = own(self, *batch)
            return loss + (0 * self.model.vae.quant_conv.weight).sum().sqrt(), metrics
        monkeypatch.setattr(stages.VaeStage, "forward", forward)
        return batch
    at_step(monkeypatch, "vae", step, spoil)
    with pytest.raises(SystemExit) as stop:
        go("vae", tmp_path, save_every=2, eval_every=1, log_every=50)
    assert stop.value.code not in (0, None) and state(tmp_path)[0] == 2
    assert "checkpoints of earlier steps stay" in "".join(capsys.readouterr())
    for path in tmp_path.glob("**/*.safetensors"):
        assert all(p.isfinite().all() for p in load_file(path).values()), path.name


def test_frozen_parts(light, trained, tmp_path, monkeypatch):
    """The image stage changes router and generation tower, and no bit of VAE and understanding."""
    kept = []
    save = checkpoint.save_model
    monkeypatch.setattr(checkpoint, "save_model",
                        lambda model, *rest: kept.append(model) or save(model, *rest))
    assert go("image", tmp_path, init=str(trained), steps=2, weight_decay=1.0)
    old, new = MoS.from_pretrained(trained).state_dict(), kept[-1].state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"router", "generation"}


def test_phases(light, trained, tmp_path):
    """A phase changes size and sampling, has its own schedule, starts from the weights before."""
    given = settings("image", recipe="mos_s", phase="1024")
    assert (given.recompute, given.batch, given.steps) == (True, 4, 6)  # a flag goes above a phase
    recipe = read_recipe("mos_s", "1024")
    values = [recipe["model"][name] for name in ("size", "t_sampling", "shift")]
    assert values == [1024, "mode", 3.0]
    (paper, _), = plan({"data": "shards"}, read_recipe("mos_s", "aesthetic"))
    assert (paper.lr, paper.warmup, paper.steps, paper.batch) == (1e-4, 4000, 50_000, 1024)
    assert paper.latents == "step" and "aesthetic >= 6" in paper.where and not given.where
    assert train.learning_rate(paper.steps, paper) == pytest.approx(1.5e-5)
    small = dict(recipe="mos_s", und_folder="", vae_folder="", latents="memory", length_step=0,
                 workers=0)
    assert train.run_stage(prepare("image", tmp_path / "a", init=str(trained), phase="512",
                                   **small | {"steps": 2}))
    for lr, same in ((0.0, True), (1e-3, False)):
        out = tmp_path / str(lr)
        assert train.run_stage(prepare("image", out, init=str(tmp_path / "a"), phase="1024", lr=lr,
                                       ema=0.0, **small | {"steps": 2}))
        a, b = (load_file(folder / "mos.safetensors") for folder in (tmp_path / "a", out))
        assert all(torch.equal(a[name], b[name]) for name in a) == same
    with pytest.raises(FileNotFoundError, match="no mos.safetensors in"):
        shutil.copytree(tmp_path / "a", tmp_path / "c", ignore=shutil.ignore_patterns("mos.*"))
        prepare("image", tmp_path / "b", init=str(tmp_path / "c"), phase="2048", **small)


def test_a_run_keeps_its_settings(light, tmp_path, monkeypatch):
    """--resume needs --out alone: all settings stand in the folder, those of the model, too."""
    at_step(monkeypatch, "vae", 2, ctrl_c)
    assert not go("vae", tmp_path, seed=3)
    recipe = read_recipe("laptop")
    flags = {name: value for name, value in QUICK.items() if name != "scenes"}
    (c, values), = plan({"out": str(tmp_path)}, recipe, resume=True)
    assert (c, values) == (settings("vae", tmp_path, seed=3),
                           recipe["model"] | {name: MODEL[name] for name in MODEL})
    assert {name: getattr(c, name) for name in flags} == flags
    again, = plan({"out": str(tmp_path), "stage": "vae"}, read_recipe(f"{tmp_path}/vae.toml"))
    assert again == (c, values)  # the file is a recipe
    monkeypatch.undo()
    lighten(monkeypatch.setattr)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
    train.main()
    assert state(tmp_path)[0] == QUICK["steps"]
    (tmp_path / "vae.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["train.py", "--export", "--out", str(tmp_path)])
    train.main()
    assert (tmp_path / "vae.safetensors").is_file()


@pytest.mark.parametrize("name, value", (("seed", 4), ("vae_width", 8), ("data", "pictures"),
                                         ("grid", 8), ("tasks", ("dense",)), ("recipe", "tiny")))
def test_a_resumed_run_refuses_other_settings(name, value, tmp_path):
    """A flag that would change what a run has learned from is refused by its name."""
    c = settings("vae", tmp_path)
    write_settings(c, make_config(**MODEL))
    with pytest.raises(ValueError, match=f"^{name} is .*vae.toml and cannot become "):
        plan({name: value, "out": str(tmp_path)}, read_recipe("laptop"), resume=True)


def test_a_resumed_run_may_change_how_it_trains(tmp_path):
    """More steps, another rate, other processes: what a run has learned stays true."""
    write_settings(settings("vae", tmp_path), make_config(**MODEL))
    changes = dict(steps=9, lr=1e-5, batch=8, parallel="none", workers=1, init=str(tmp_path))
    (c, _), = plan({"out": str(tmp_path), **changes}, read_recipe("laptop"), resume=True)
    assert {name: getattr(c, name) for name in changes} == changes


def test_one_process_resumes_what_several_have_trained(tmp_path):
    """Without torchrun a kept --parallel and --shards give way; what was given stays an error."""
    c = settings("image", tmp_path, parallel="hsdp", shards=2)
    write_settings(c, make_config(**MODEL))
    assert 'parallel = "hsdp"' in (tmp_path / "image.toml").read_text()
    (c, _), = plan({"out": str(tmp_path)}, read_recipe("laptop"), resume=True)
    assert (c.parallel, c.shards) == ("", 0)
    (c, _), = plan({"out": str(tmp_path), "parallel": "fsdp"}, read_recipe("laptop"), resume=True)
    assert c.parallel == "fsdp"


def test_all_stages_of_a_run_keep_their_settings(light, tmp_path, monkeypatch):
    """Interrupted in its first stage, a run of all stages goes on through the later ones."""
    at_step(monkeypatch, "vae", 2, ctrl_c)
    flags = [str(a) for k, v in {**QUICK, **MODEL, "out": tmp_path, "recipe": "laptop"}.items()
             for a in ("--" + k.replace("_", "-"), v)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    assert {path.stem for path in tmp_path.glob("*.toml")} == {*config.STAGES}
    monkeypatch.undo()
    lighten(monkeypatch.setattr)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
    train.main()
    assert [state(tmp_path, stage)[0] for stage in config.STAGES] == [QUICK["steps"]] * 4


def test_recipes_are_complete(tmp_path):
    """A recipe gives a value to every setting; what it lacks or does not know is named."""
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        recipe = read_recipe(path.stem)
        assert MoSConfig(**recipe.pop("model")) and recipe
        for stage, values in recipe.items():
            assert config.TrainConfig(**values, out="").stage == stage
    text = (ROOT / "recipes" / "laptop.toml").read_text()
    for old, new, message in (("k = 2\n", "", "[model] lacks or does not know: k$"),
                              ("k = 2\n", "k = 2\nzebra = 1\n", "[model] .*: zebra$"),
                              ("[vae]", "[zebra]", "unknown table [zebra]"),
                              ("lr = 0.002\n", "", "lacks or does not know: lr$"),
                              ("[model]", "[model", "is not a TOML file")):
        (tmp_path / "a.toml").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=re.sub(r"([\[\]])", r"\\\1", message)):
            read_recipe(str(tmp_path / "a.toml"))


@pytest.mark.parametrize("recipe, blocks, router", (
    ("ablation_1b", 973_078_528, None), ("mos_s", 2_818_572_288, 105.1),
    ("mos_l", 4_921_491_456, 110.0)))
def test_sizes(recipe, blocks, router):
    """The paper's sizes: the matrices of the generation tower's blocks, and the router in all."""
    model = unfilled(MoSConfig(**read_recipe(recipe)["model"]))
    assert sum(p.numel() for p in model.generation.blocks.parameters() if p.ndim > 1) == blocks
    if router:
        total = sum(p.numel() for p in model.router.parameters())
        assert total / 1e6 == pytest.approx(router, abs=0.05)


def test_help_shows_the_values_that_will_be_used(monkeypatch, capsys):
    """--help names the value of each setting, by stage where stages differ."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "tiny", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        train.main()
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate [vae 0.002, understand 0.002, image 0.0015, edit 0.001]" in text
    assert "largest gradient norm [1.0]" in text and "router [128]" in text


def test_export(light, trained, tmp_path, monkeypatch):
    """A state becomes a checkpoint that samples, by one command; without a state that is told."""
    with pytest.raises(ValueError, match="no checkpoint in .*image to export"):
        go("image", tmp_path, init=str(trained), export=True)
    at_step(monkeypatch, "image", 2, ctrl_c)
    assert not go("image", tmp_path, init=str(trained))
    assert not (tmp_path / "mos.safetensors").exists()
    assert go("image", tmp_path, init=str(trained), export=True)
    step, tensors = state(tmp_path, "image")
    shown = load_file(tmp_path / "mos.safetensors")["generation.embed.weight"]
    assert step == 3 and torch.equal(shown, tensors["average/1.embed.weight"].bfloat16())
    assert MoS.from_pretrained(tmp_path).generate(["a red circle"])


@pytest.mark.slow
@pytest.mark.parametrize("table, rows", (("scale-trap", 16), ("data-weights", 2),
                                         ("sampling", 3)))
def test_ablations(table, rows, light, trained, monkeypatch, capsys):
    """Each table of tools/ablate.py has its rows, with numbers."""
    small = {name: value for name, value in MODEL.items() if not name.startswith(("vae_", "und_"))}
    monkeypatch.setattr(ablate, "OVERRIDES", small | dict(batch=2, scenes=8))
    monkeypatch.setattr(ablate, "SHARES", (0.1, 0.9))
    monkeypatch.setattr(ablate, "SAMPLING", ablate.SAMPLING[1:2])
    monkeypatch.setitem(ablate.TABLES, "sampling", lambda *a: ablate.sampling(*a, 1, 1))
    monkeypatch.setattr(ablate, "pack", lambda *a, pack=ablate.pack: pack(*a[:2], 6))
    monkeypatch.setattr(sys, "argv", f"ablate.py {table} --steps 2 --init {trained}".split())
    ablate.main()
    lines = capsys.readouterr().out.splitlines()[-rows:]
    assert all(math.isfinite(float(line.split()[-1])) for line in lines)


@pytest.mark.parametrize("kept", ("checkpoints", "vae.safetensors"))
def test_no_second_start(kept, light, tmp_path):
    """Without --resume a stage does not start over a state or a trained part; nothing changes."""
    assert go("vae", tmp_path, steps=2)
    for name in {"checkpoints", "vae.safetensors"} - {kept}:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        go("vae", tmp_path, steps=2, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text, message", (("A red star.", ""), ("a zebra", "unknown word 'zebra'"),
                                           ("", "caption"), ("a " * 90, "91 tokens")))
def test_own_pictures(text, message, light, trained, tmp_path):
    """Own pictures train tower and image stage; an unusable caption is one line before any work."""
    (tmp_path / "own").mkdir()
    for i in range(6):
        Image.new("RGB", (90, 70 + 10 * i), "red").save(tmp_path / f"own/{i}.png")
        (tmp_path / f"own/{i}.txt").write_text("A red square." if i else text)
    own, out = dict(data=str(tmp_path / "own"), init=str(trained)), tmp_path / "out"
    if message:
        with pytest.raises(ValueError, match=message) as error:
            go("image", out, workers=1, **own)
        assert "\n" not in str(error.value) and not out.exists()
    else:
        assert go("understand", tmp_path / "tower", **own) and go("image", out, **own)
        assert read_vocabulary(tmp_path / "tower").words[3:] == ["a", "red", "square", "star"]
        assert MoS.from_pretrained(out).generate(["a red square"], steps=1)


@pytest.mark.parametrize("task, scores", (
    pytest.param("counting", {"score_counting"}, marks=pytest.mark.slow), ("dense", set())))
def test_tasks(task, scores, trained, tmp_path, monkeypatch):
    """--tasks trains on, and scores, these tasks only; "dense" has no score of its own."""
    validate_on_few(monkeypatch.setattr)
    assert {Shapes(64, 0, tasks=(task,)).scene(i)[1].task for i in range(20)} == {task}
    assert go("image", tmp_path, init=str(trained), tasks=(task,), steps=1)
    assert {name for name in curve(tmp_path, "image")[1] if name.startswith("score_")} == scores


@every_stage
def test_validation_is_unseen(stage, trained, monkeypatch):
    """No stage validates on a scene that training draws, in a world so small that they recur."""
    def scenes(packed):
        return {tuple(row) for one in packed for row in one.view(-1, 21).tolist()}
    drawn, own, number, unseen = [], Shapes.to_pixels, 800, 30
    data = WORLDS[stage](64, 0, tasks=("colours",), grid=8, number=number)
    seen = [data[i][0] for i in range(number)]
    assert scenes(seen[:-200]) & scenes(seen[-200:])
    validate_on_few(monkeypatch.setattr, unseen)
    kind = train.KINDS[stage](MoS.from_pretrained(trained), Mixture([data]), settings(
        stage, tasks=data.tasks, grid=8), alone())
    monkeypatch.setattr(Shapes, "to_pixels", lambda self, packed, device: drawn.append(
        scenes(packed)) or own(self, packed[:2], device))
    if stage in config.GENERATING:  # their loss is that of latents encoded at the start
        monkeypatch.setattr(kind, "load_into_memory", lambda: None)
        shape = (unseen, 3) if stage == "edit" else (unseen,)
        monkeypatch.setattr(kind, "encoder", lambda: lambda x: torch.zeros(*shape, 6, 4, 4))
        kind.prepare()
    else:
        kind.validation_batch(200)
    assert len(drawn) == 1 + (stage == "edit") and len(drawn[0]) > 20
    assert not set.union(*drawn) & scenes(seen)


@every_stage
def test_inputs_are_a_function_of_seed_and_step(stage, trained, monkeypatch):
    """A batch depends on seed and step, not on where a run began or on how many share it."""
    validate_on_few(monkeypatch.setattr, 2)

    def inputs(step, begin=3, seed=0, **world):
        number = 16 if stage in config.GENERATING else None
        kind = train.KINDS[stage](model, Mixture([WORLDS[stage](64, seed, number=number)]),
                                  settings(stage, seed=seed, batch=12, steps=9), alone(**world))
        kind.begin(begin)
        return [kind.inputs(s) for s in range(begin, step + 1)][-1]

    def same(*others):
        return {torch.equal(a, b) for a, b in zip(whole, *others, strict=True)}
    model = MoS.from_pretrained(trained)
    whole = inputs(3)
    assert same(inputs(3, begin=1)) == {True}
    assert same(inputs(4)) == {False} and same(inputs(3, seed=1)) == {False}
    for size in (2, 3):
        parts = zip(*(inputs(3, rank=rank, size=size) for rank in range(size)))
        assert same([torch.cat(column) for column in parts]) == {True}


def test_prompt_dropout(trained):
    """Every tenth prompt is emptied down to <bos>; the others stay."""
    stage = stages.ImageStage(MoS.from_pretrained(trained), Mixture([Shapes(64, 0, number=16)]),
                              settings("image", batch=8000), alone())
    tokens = torch.arange(5).expand(8000, 5) + 10
    tokens[:, 0] = Tokenizer.BOS
    drawn = stage.random_inputs(torch.zeros(8000, 6, 1, 1), tokens, stage.generator(0)).tokens
    empty = (drawn[:, 1:] == Tokenizer.PAD).all(1)
    assert (drawn[:, 0] == Tokenizer.BOS).all() and torch.equal(drawn[~empty], tokens[~empty])
    assert abs(empty.float().mean() - 0.1) < 0.015


def test_learning_rate():
    """Linear up to the peak, then a falling cosine down to its share of the peak."""
    c = settings("vae", steps=1000, warmup=100, lr=2e-3, final_lr=0.1)
    rates = [train.learning_rate(step, c) for step in range(1000)]
    assert [rates[i] for i in (0, 49, 99, 550)] == pytest.approx([2e-5, 1e-3, 2e-3, 1.1e-3])
    assert rates[99] == rates[100] == max(rates) and rates[-1] == pytest.approx(2e-4, rel=1e-3)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert train.learning_rate(0, settings("vae", warmup=0)) == QUICK["lr"]
    short = settings("vae", steps=40, warmup=100, lr=2e-3)  # a tenth of the steps at most
    assert train.learning_rate(0, short) == 2e-3 / 4 and train.learning_rate(4, short) == 2e-3


def test_decayed_groups(model):
    """Weight decay is for the weights of linear and convolutional layers, and for nothing else."""
    wanted = {m.weight for m in model.modules()
              if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    decayed, rest = train.decayed_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and rest["weight_decay"] == 0
    assert set(decayed["params"]) == wanted
    assert set(rest["params"]) == set(model.parameters()) - wanted


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
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return own(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert go("vae", tmp_path, steps=3, clip=1e-2)
    assert norms == pytest.approx([1e-2] * 3, rel=1e-3)
    assert min(norm for *_, norm in curve(tmp_path)[0]) > 2e-2
