"""Nothing trained is lost: what a run keeps, what --resume and --export refuse, how a run ends."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, make_config
from PIL import Image
from safetensors.torch import load_file, save_file
from training import MODEL, alone, at_step, contents, curve, go, saved, settings, state

import checkpoint
import common
import config
import stages
import train
from checkpoint import read_vocabulary, save_model
from config import plan, read_config, read_recipe
from mos import MoS

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a small model (init) and three pictures with captions (pictures)."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    MoS(make_config(**MODEL), read_vocabulary(ROOT / "weights")).save_pretrained(root / "init")
    (root / "pictures").mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 64), colour).save(root / f"pictures/{i}.png")
        (root / f"pictures/{i}.txt").write_text(f"a {colour} square")
    return root


@pytest.fixture
def work(root, tmp_path, light):
    """A copy of it, for one test."""
    shutil.copytree(root, tmp_path / "work")
    return tmp_path / "work"


def stop_at(patch, stage, step, number=signal.SIGINT):
    """Send this process a signal within a step."""
    at_step(patch, stage, step, lambda batch: os.kill(os.getpid(), number) or batch)


def stopped(work, stage, monkeypatch, **changes):
    """Train a stage on the pictures, stop it in its second step; return its settings."""
    changes = dict(init=str(work / "init"), data=str(work / "pictures")) | changes
    with monkeypatch.context() as patch:
        stop_at(patch, stage, 1)
        assert not go(stage, work / "run", **changes)
    return changes


# --- What a resumed run learns from ---------------------------------------------------------------

def test_weights_without_a_checkpoint_are_kept(work):
    """--resume never begins anew where weights are: not those of a run, nor those of a copy."""
    for stage, out in (("vae", "init"), ("understand", "init"), ("image", "init")):
        before = contents(work / out)
        with pytest.raises(ValueError, match="is trained, but there is no checkpoint of stage"):
            go(stage, work / out, resume=True)
        with pytest.raises(ValueError, match=f"stage {stage} would overwrite .*safetensors"):
            go(stage, work / out)
        assert contents(work / out) == before


def test_a_folder_without_a_run_is_said(work, capsys):
    """A mistyped --out does not begin a run without a word."""
    assert go("vae", work / "rum", resume=True)
    assert "no checkpoint of stage vae" in capsys.readouterr().out


def other_word(work):
    (work / "pictures/0.txt").write_text("a zinnober square")


def other_order(work):
    (work / "pictures/0.txt").write_text("a square red")


def other_weights(name):
    def change(work):
        path = work / "init" / f"{name}.safetensors"
        tensors = load_file(path)
        first = min(tensors)
        save_file(tensors | {first: tensors[first] + 1}, path)
    return change


def other_words(work):
    path = work / "init/vocab.json"
    path.write_text(json.dumps(["zebra", *json.loads(path.read_text())[1:]]))


@pytest.mark.parametrize("stage, change, message", (
    ("understand", other_word, r"another tokenizer \('red' is gone\)"),
    ("understand", other_order, "other captions"), ("image", other_order, "other captions"),
    ("image", other_words, "another tokenizer"),
    ("image", other_weights("vae"), "another VAE"),
    ("image", other_weights("understanding"), "another understanding tower")))
def test_what_a_run_has_learned_from_cannot_change(stage, change, message, work, monkeypatch):
    """Other captions, words or frozen weights are refused by name, and nothing is written."""
    changes = stopped(work, stage, monkeypatch)
    kept = contents(work / "run")
    change(work)
    for how in ({"resume": True}, {"export": True}):
        if message != "other captions" or "resume" in how:  # to export needs no data
            if "export" not in how or stage == "image":
                with pytest.raises(ValueError, match=f"was trained with {message}"):
                    go(stage, work / "run", **changes, **how)
    assert contents(work / "run") == kept


def test_settings_stand_in_each_checkpoint(work, monkeypatch):
    """Without OUT/STAGE.toml a checkpoint still refuses another seed, and goes on with its own."""
    changes = stopped(work, "vae", monkeypatch, seed=3)
    (work / "run/vae.toml").unlink()
    with pytest.raises(ValueError, match="^seed is 3 in .*manifest.json and cannot become 4"):
        go("vae", work / "run", resume=True, **changes | {"seed": 4})
    assert go("vae", work / "run", resume=True, **changes)


def test_the_vae_may_be_captioned_anew(work, monkeypatch):
    """The VAE learns from pictures alone: captions may change."""
    changes = stopped(work, "vae", monkeypatch)
    other_word(work)
    assert go("vae", work / "run", resume=True, **changes)


# --- What a stage may write -----------------------------------------------------------------------

def test_a_stage_writes_what_is_its_own(tmp_path):
    """Weights, settings and words of other parts stay as they are in a model's folder."""
    vocabulary = read_vocabulary(ROOT / "weights")
    MoS(make_config(**SMALL), vocabulary).save_pretrained(tmp_path)
    before = contents(tmp_path)
    changed = make_config(**SMALL | dict(vae_width=8, und_hidden=96, gen_hidden=96, shift=2.0))
    other = MoS(changed, type(vocabulary)(["more", *vocabulary.words]))
    for part, settings_of, files in (("vae", "vae_width", {"vae.safetensors"}),
                                     ("understanding", "und_hidden",
                                      {"understanding.safetensors", "vocab.json"})):
        save_model(other, tmp_path, (part,))
        after = contents(tmp_path)
        assert {p.name for p in after if after[p] != before[p]} == {"config.json"} | files
        values = vars(read_config(tmp_path)), vars(make_config(**SMALL))
        names = {name for name in values[0] if values[0][name] != values[1][name]}
        assert names == {settings_of}
        (tmp_path / "config.json").write_bytes(before[tmp_path / "config.json"])
        before = after | {tmp_path / "config.json": before[tmp_path / "config.json"]}


def test_a_part_that_others_have_learned_from_stays(work):
    """A stage is not trained further in a folder where a later one has learned from its part."""
    c = settings("vae", work / "init")
    with pytest.raises(ValueError, match="mos.safetensors has learned from vae.safetensors"):
        checkpoint.check_unused(c)
    (work / "run/checkpoints/edit").mkdir(parents=True)
    for stage in ("vae", "understand", "image"):
        with pytest.raises(ValueError, match="checkpoints/edit has learned from"):
            checkpoint.check_unused(settings(stage, work / "run"))
    checkpoint.check_unused(settings("edit", work / "run"))
    checkpoint.check_unused(settings("image", work / "init"))


def test_the_check_comes_before_training(work):
    """A finished VAE is not trained further where stage image has used it."""
    shutil.rmtree(work / "init")
    for stage in ("vae", "understand", "image"):
        assert go(stage, work / "run", steps=2)
    before = contents(work / "run")
    assert go("vae", work / "run", resume=True, steps=2)  # finished already
    with pytest.raises(ValueError, match="checkpoints/image has learned from vae.safetensors"):
        go("vae", work / "run", resume=True, steps=4)
    assert contents(work / "run") == before


def test_another_folder_keeps_its_parts(work):
    """Stage image with --init elsewhere would write a VAE: not over the one that is there."""
    shutil.copytree(work / "init", work / "run")
    (work / "run/mos.safetensors").unlink()
    with pytest.raises(ValueError, match="would overwrite .*understanding.safetensors"):
        go("image", work / "run", init=str(work / "init"))


def test_init_is_for_the_first_stage():
    """Later stages of a run start from what the earlier ones have trained."""
    runs = plan({"init": "weights", "out": "new"}, read_recipe("laptop"))
    assert [c.init for c, _ in runs] == ["weights", "new", "new", "new"]


@pytest.mark.parametrize("name, is_one", (
    ("00000003", True), ("00000003_good", False), ("3", False), ("000000030", False)))
def test_only_eight_digits_are_a_checkpoint(name, is_one, tmp_path):
    """Copies that people keep beside the checkpoints are neither read nor deleted."""
    (tmp_path / name).mkdir()
    (tmp_path / "00000009").write_text("a file")
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / name] * is_one


def test_copies_beside_checkpoints(light, tmp_path):
    """The program deletes what it wrote, and nothing else."""
    assert go("vae", tmp_path, steps=2, save_every=1)
    shutil.copytree(saved(tmp_path)[0], tmp_path / "checkpoints/vae/00000001_good")
    shutil.copytree(saved(tmp_path)[0], tmp_path / "checkpoints/vae/20261128")  # named by its day
    (tmp_path / "checkpoints/vae/20261129").mkdir()
    (tmp_path / "checkpoints/vae/.notes").mkdir()
    assert go("vae", tmp_path, steps=4, save_every=1, resume=True)
    assert {p.name for p in (tmp_path / "checkpoints/vae").iterdir()} == {
        "00000001_good", ".notes", "20261128", "20261129", "00000003", "00000004"}


@pytest.mark.parametrize("mask", (0o022, 0o077))
def test_files_have_the_umasks_mode(mask, light, tmp_path):
    """Weights, checkpoints, settings and pictures are for those for whom the umask makes them."""
    before = os.umask(mask)
    try:
        assert go("vae", tmp_path, steps=1)
        with common.replacing(tmp_path / "a.safetensors") as path:
            save_file({"a": torch.ones(2)}, path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    assert len(files) >= 7


# --- How a run ends -------------------------------------------------------------------------------

@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP))
def test_stopped_by_a_scheduler(number, light, tmp_path, monkeypatch, capsys):
    """SIGTERM and a closed terminal do what Ctrl-C does; nohup's choice stays."""
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, "vae", 2, number)
        assert not go("vae", tmp_path)
    assert state(tmp_path)[0] == 3 and signal.getsignal(number) is handler
    assert "stopped at step 3; go on with --resume" in capsys.readouterr().out
    signal.signal(number, signal.SIG_IGN)
    try:
        with common.interruption() as requests:
            os.kill(os.getpid(), number)
            assert not requests
    finally:
        signal.signal(number, handler)


def test_children_leave_one_sigterm_to_their_parent():
    """A scheduler's signal to every process ends no data process; its parent's later one does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        common.leave_stopping_to_parent(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os.write(writing, b"alive")
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as file:
        assert file.read() == "alive" and os.WTERMSIG(status) == signal.SIGTERM


def test_the_state_comes_first(light, tmp_path, monkeypatch):
    """Whatever validation does at the last step, checkpoint and weights are written before it."""
    def fail(*_):
        raise ImportError("no such package")
    monkeypatch.setattr(stages.VaeStage, "validate", fail)
    with pytest.raises(ImportError):
        go("vae", tmp_path, steps=2)
    assert state(tmp_path)[0] == 2
    assert checkpoint.exported_step(settings("vae", tmp_path)) == 2


def test_a_run_without_its_export_is_completed(light, tmp_path, monkeypatch):
    """Where the last export has failed the run says so, and --resume exports without a step."""
    with monkeypatch.context() as patch:
        def full(*_):
            raise OSError("disk full")
        patch.setattr(checkpoint, "save_model", full)
        with pytest.raises(OSError, match="could not be exported; make room .* --resume --out"):
            go("vae", tmp_path, steps=2)
    assert state(tmp_path)[0] == 2 and not (tmp_path / "vae.safetensors").exists()
    rows = curve(tmp_path)[0]
    assert go("vae", tmp_path, steps=2, resume=True)
    assert (tmp_path / "vae.safetensors").is_file() and curve(tmp_path)[0] == rows


def test_edits_weights_are_not_undone(work):
    """`train.py --resume` of a finished run does not put stage image's weights over edit's."""
    (c, _), = plan({"stage": "image", "out": str(work / "init"), "steps": 4}, read_recipe("laptop"))
    for trained, step in ((None, 0), ("image 3", 3), ("edit 2", float("inf")), ("vae 9", 0)):
        save_file({"a": torch.ones(1)}, work / "init/mos.safetensors",
                  trained and {"trained": trained})
        assert checkpoint.exported_step(c) == step


def test_pictures_and_logs_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    """A disk that is full when a sheet or the log is written costs that file alone."""
    def full(*_, **__):
        raise OSError("disk full")
    monkeypatch.setattr(common.replacing, "__enter__", full)
    stages.save_sheet(tmp_path / "a.png", [torch.zeros(3, 8, 8)])
    checkpoint.Log(tmp_path / "vae.csv", 0).add(1, loss=0.5)
    text = capsys.readouterr().out
    assert text.count("training goes on: disk full") == 2 and "a.png" in text and "vae.csv" in text
    assert not list(tmp_path.iterdir())


def test_logs_from_a_spreadsheet(tmp_path):
    """A log that a spreadsheet has saved is read; what is no log is refused by its name."""
    path = tmp_path / "vae.csv"
    log = checkpoint.Log(path, 0)
    for step in (1, 2, 3):
        log.add(step, loss=step / 2)
    saved_again = "\ufeff" + path.read_text().replace(",", ";").replace("1;", "1.0;", 1)
    for text in (path.read_text(), saved_again):
        path.write_text(text, "utf-8")
        rows = checkpoint.Log(path, 2).rows
        assert [(row["step"], row["loss"]) for row in rows] == [(1, "0.5"), (2, "1")]
    for text in ("step;loss\nx;1\n", "a,b\n1,2\n", "step,loss\n,\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="vae.csv is not the log .* move it away"):
            checkpoint.Log(path, 2)


def test_a_lost_reader_does_not_end_a_run(monkeypatch):
    """Where nobody reads standard output any more, training goes on in silence."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    alone().print0("nobody reads this")
    alone().print0("nor this")
    assert sys.stdout.name == os.devnull


@pytest.mark.parametrize("stage", config.STAGES)
def test_export_reads_no_data(stage, work, monkeypatch):
    """--export writes the model of a stopped run at once; only a VAE's statistics need pictures."""
    init = {"init": str(work / "init")}
    stop_at(monkeypatch, stage, 1)
    assert not go(stage, work / "run", **init)

    def forbidden(*_):
        raise AssertionError("data were opened")
    if stage != "vae":
        monkeypatch.setattr(train, "open_sources", forbidden)
        if stage == "understand":
            monkeypatch.setattr(train, "build_tokenizer", forbidden)
    assert go(stage, work / "run", export=True, **init)
    assert checkpoint.exported_step(settings(stage, work / "run")) == 2


def test_a_stopped_run_says_how_to_look_at_it(light, tmp_path, monkeypatch):
    """sample.py on a run that has not exported yet names the command that does."""
    stop_at(monkeypatch, "vae", 1)
    assert not go("vae", tmp_path)
    with pytest.raises(FileNotFoundError, match="training was stopped: .*--resume.*--export"):
        MoS.from_pretrained(tmp_path)


def test_export_takes_the_last_stage(work, monkeypatch):
    """`--export` of a run that has begun to edit writes the weights of that stage."""
    monkeypatch.setattr(train, "run_stage", lambda trainer, export: exported.append(
        trainer.c.stage) or True)
    exported = []
    save_file({"a": torch.ones(1)}, work / "init/mos.safetensors", {"trained": "image 6"})
    for stage in ("vae", "image", "edit"):
        (work / f"init/checkpoints/{stage}").mkdir(parents=True)
        config.write_settings(settings(stage, work / "init"), make_config(**MODEL))
    monkeypatch.setattr(train, "prepare", lambda c, *_: type("Trainer", (), {"c": c}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--export", "--out", str(work / "init")])
    train.main()
    assert exported == ["vae", "edit"]
    save_file({"a": torch.ones(1)}, work / "init/vae.safetensors", {"trained": "vae 6"})
    train.main()
    assert exported[2:] == ["edit"]  # the VAE's last weights are written already
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stage", "vae"])
    train.main()
    assert exported[3:] == ["vae"]


# --- One line -------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, line", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; try this"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
     "out of memory; try this"),
    (MemoryError(), "out of memory; try this"),
    (RuntimeError("Failed to find C compiler. Please specify"), "there is no working C compiler"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in"), "there is no working C"),
    (subprocess.CalledProcessError(1, ["/opt/gcc/bin/gcc", "a.c"]), "there is no working C comp"),
    (BrokenPipeError(32, "Broken pipe"), "nobody reads the output any more"),
    (ValueError("wrong"), "wrong"), (OSError("disk full"), "disk full")))
def test_errors_of_a_machine_are_one_line(error, line, monkeypatch, capsys):
    """Exit code 2, one line that says what to do, no traceback."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        common.run(main, "try this")
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith(f"error: {line}") and text.count("\n") == 1


def test_other_errors_are_not_hidden():
    """A defect of the code still shows its traceback."""
    def main():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        common.run(main)


def test_commands_run_with_closed_streams(monkeypatch):
    """Job runners may close standard output or error: then there is none in Python."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    common.run(lambda: print("nobody reads this", file=sys.stderr))
    assert sys.stdout.name == sys.stderr.name == os.devnull


def test_a_reader_that_leaves_gets_one_line():
    """`command | head` ends with one line, not with Python's complaint about its own end."""
    code = "import common; common.run(lambda: print('a' * 99999))"
    run = subprocess.run(["bash", "-c", f"{sys.executable} -c \"{code}\" | true; exit "
                          "${PIPESTATUS[0]}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: nobody reads the output")


def test_warm_up_is_a_tenth_at_most():
    """A short run does not spend its steps on a warm-up that is made for a long one."""
    c = settings("image", steps=100, warmup=50, lr=1.0)
    assert [train.learning_rate(step, c) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert train.learning_rate(10, c) == pytest.approx(1.0)
    assert train.learning_rate(0, settings("image", steps=100, warmup=5, lr=1.0)) == 0.2
    assert train.learning_rate(0, settings("image", steps=5, warmup=5, lr=1.0)) == 1.0


def resume_all(folder, patch, *flags):
    """python train.py --resume --out FOLDER"""
    patch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(folder), *flags])
    train.main()


def test_a_refused_resume_keeps_all_settings(work, monkeypatch):
    """More steps for the VAE alone are refused where others have learned from it: no file changes.
    """
    for stage in ("vae", "understand", "image"):
        assert go(stage, work / "run", steps=2)
    before = contents(work / "run")
    with pytest.raises(ValueError, match="has learned from vae.* name the stage .* by --stage"):
        resume_all(work / "run", monkeypatch, "--steps", "4")
    assert contents(work / "run") == before
    resume_all(work / "run", monkeypatch, "--steps", "4", "--stage", "image")
    assert state(work / "run", "image")[0] == 4
    resume_all(work / "run", monkeypatch)


def test_a_finished_stage_needs_no_checkpoint(work, monkeypatch, capsys):
    """A stage whose last weights are exported is passed over; a damaged export is written again."""
    for stage in ("vae", "understand"):
        assert go(stage, work / "run", steps=2)
    before = contents(work / "run", "*.*")
    shutil.rmtree(work / "run/checkpoints/vae")
    (work / "run/understanding.safetensors").write_bytes(b"cut")
    resume_all(work / "run", monkeypatch)
    assert "stage vae: finished at step 2 already" in capsys.readouterr().out
    assert contents(work / "run", "*.safetensors").items() <= before.items()
    with pytest.raises(ValueError, match="there is no checkpoint of stage vae"):
        resume_all(work / "run", monkeypatch, "--steps", "3", "--stage", "vae")


def test_two_processes_do_not_train_one_stage(work):
    """The second is refused as long as the first one lives; one process may ask again."""
    checkpoint.claim(settings("vae", work / "run"))
    checkpoint.claim(settings("vae", work / "run"))
    script = ("import sys, checkpoint, types\n"
              "for stage in ('understand', 'vae'):\n"
              "    checkpoint.claim(types.SimpleNamespace(stage=stage, out=sys.argv[1]))")
    refused = subprocess.run([sys.executable, "-c", script, work / "run"], cwd=ROOT,
                             capture_output=True, text=True)
    assert f"ValueError: another process trains stage vae in {work}/run" in refused.stderr


def test_the_command_claims_its_folder(work, monkeypatch):
    """A run that is refused so has written no settings."""
    def refuse(c):
        raise ValueError(f"claimed {c.out}")
    monkeypatch.setattr(checkpoint, "claim", refuse)
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "vae", "--out", str(work / "run")])
    with pytest.raises(ValueError, match=f"claimed {work}/run"):
        train.main()
    assert not (work / "run").exists()


def test_init_may_be_another_name_of_out(work):
    """A link to --out is --out: the settings do not name it, and the folder may move."""
    (work / "link").symlink_to(work / "run")
    assert settings("vae", work / "run", init=str(work / "link")).init == str(work / "run")
    assert settings("vae", work / "run", init=f"{work}/run/").init == str(work / "run")
    assert settings("vae", work / "run", init=str(work / "init")).init == str(work / "init")


def test_init_may_move(work, monkeypatch):
    """--resume takes another --init with the same weights, and refuses one with others."""
    stopped(work, "image", monkeypatch)
    (work / "init").rename(work / "moved")
    flags = dict(data=str(work / "pictures"), init=str(work / "moved"))
    assert go("image", work / "run", resume=True, **flags)
    damage = load_file(work / "moved/vae.safetensors")
    save_file({name: tensor + 1 for name, tensor in damage.items()}, work / "moved/vae.safetensors")
    with pytest.raises(ValueError, match="another VAE"):
        go("image", work / "run", resume=True, steps=9, **flags)


def test_ctrl_c_in_the_last_validation(work, monkeypatch):
    """The stage is finished and exported, and the next one does not begin."""
    monkeypatch.setattr(stages.VaeStage, "validate",
                        lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {"val_psnr": 1.0})
    assert not go("vae", work / "run", steps=2)
    assert checkpoint.exported_step(settings("vae", work / "run")) == 2
    monkeypatch.undo()
    assert state(work / "run")[0] == 2
