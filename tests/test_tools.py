"""The tools: the routing picture, the trace, the estimates, and the curves of a run."""

import math
import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from config import MoSConfig, read_recipe
from conftest import ROOT, make_config, make_model
from mos import Context, unfilled
from router import routing_weights, select
from tools import curves, estimate, routing, trace

PROMPT = "a red circle above two stars"
TIMES = [0.9, 0.5, 0.1]


# ------------------------------------------------------------------------------------------------
# The routing picture

@pytest.mark.parametrize("k", (1, 2))
def test_routes_are_the_routers(k):
    """`routes` returns what the router and `select` choose for each noisy picture alone."""
    model = make_model(k=k)
    index, weight, z = routing.routes(model, PROMPT, TIMES, seed=3)
    c = model.config
    tokens = len(model.tokenizer.encode(PROMPT))
    assert index.shape == weight.shape == (3, tokens, k, c.gen_depth)
    context = model.read([PROMPT])
    for i, t in enumerate(TIMES):
        with torch.no_grad():
            x, positions = model.generation.patchify(z[i:i + 1])
            logits = model.router(context.inputs, context.keys, x, positions, torch.tensor([t]))
        expected, weights = select(routing_weights(logits), k)
        assert torch.equal(index[i], expected[0])
        torch.testing.assert_close(weight[i], weights[0])


def test_noisy_pictures_are_of_the_prompt():
    """At t = 0 the latents are those of the model's own picture, at t = 1 they are noise."""
    model = make_model()
    _, _, z = routing.routes(model, PROMPT, [0.0, 0.25, 1.0], seed=3)
    image, = model.generate([PROMPT], seed=3)
    with torch.no_grad():
        z0, = model.vae.encode(routing.to_tensor(image)[None])
    z1 = torch.randn(z0.shape, generator=torch.Generator().manual_seed(3))
    for latents, expected in zip(z, (z0, 0.75 * z0 + 0.25 * z1, z1)):
        torch.testing.assert_close(latents, expected)


def test_what_is_drawn_is_what_is_chosen(command, tmp_path, monkeypatch, capsys):
    """Every cell shows the layers that were chosen, counted from 1; the rows are the words."""
    pytest.importorskip("matplotlib")
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    figures = []
    draw = routing.draw
    monkeypatch.setattr(routing, "draw", lambda *a: figures.append(draw(*a)) or figures[-1])
    command(routing, "--checkpoint", "model", "--prompt", PROMPT, "--out", "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    model = routing.MoS.from_pretrained(tmp_path / "model")
    index, weight, _ = routing.routes(model, PROMPT, TIMES)
    tables = figures[0].axes[3:]
    assert len(tables) == 3
    for chosen, table in zip(index, tables):
        texts = [text.get_text() for text in table.texts]
        expected = (1 + chosen).permute(0, 2, 1).flatten(0, 1)              # (S*N, K)
        assert texts == [str(layer) for layers in expected.tolist() for layer in layers]
    labels = [label.get_text() for label in tables[0].get_yticklabels()]
    assert labels == ["<bos>", *PROMPT.split()]
    for row, line in zip(routing.shares(index, weight, 5),
                         capsys.readouterr().out.splitlines()[1:4]):
        assert [float(share) for share in line.split(":")[1].split()] == pytest.approx(
            row.tolist(), abs=0.006)
        assert row.sum().item() == pytest.approx(1)


def test_routing_without_matplotlib(command, tmp_path, monkeypatch, capsys):
    """Without matplotlib one line says what to install."""
    make_model().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="^2$"):
        command(routing, "--checkpoint", "model", "--prompt", PROMPT, "--out", "a.png")
    assert capsys.readouterr().err == (
        "error: drawing needs the package matplotlib: pip install matplotlib\n")
    assert not (tmp_path / "a.png").exists()


# ------------------------------------------------------------------------------------------------
# The trace

def test_trace_counts_functions_and_lines():
    """Comprehensions and lambdas count to their function; other files than ours do not count."""
    files = trace.trace(lambda: kernels.pad_keys(2, kernels.Keys(None, [(1, 3), (2, 4)])))
    files.pop("tests/test_tools.py")  # the lambda above
    assert files.keys() == {"kernels.py"} and files["kernels.py"].keys() == {"pad_keys"}
    assert trace.totals(files) == (1, 1, 2)
    assert trace.trace(lambda: None).keys() == {"tests/test_tools.py"}


def test_a_training_step_is_short():
    """A step of stage image runs at most 8 files, 60 functions and 280 lines."""
    files, functions, lines = trace.totals(trace.training_step())
    assert files <= 8 and functions <= 60 and lines <= 280


def test_a_picture_is_short():
    """From the prompt to the picture at most 8 files are run."""
    assert trace.totals(trace.picture())[0] <= 8


# ------------------------------------------------------------------------------------------------
# FLOP and memory

def attention_flops(query, key, *_, **__):
    """FLOP of attention on a CPU, which PyTorch's counter leaves out; shapes are (B, H, L, Dh)."""
    return 4 * math.prod(query) * key[2]


def check_flops(config, shapes):
    """The closed form equals PyTorch's counter on tensors without content, for each shape.

    shapes: (context tokens, size of the latents, whether there is a reference picture).
    """
    model = unfilled(config)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        estimate.replace_parameters(model, torch.float32)
        for tokens, size, edit in shapes:
            states = torch.empty(1, tokens, config.und_depth, config.und_width)
            context = Context(states[:, :, 0], states, kernels.Keys(None, [(1, tokens)]))
            z = torch.empty(1, config.vae_channels, *size)
            with FlopCounterMode(display=False, custom_mapping={attention: attention_flops}) as c:
                model(z, torch.empty(1), context, reference=z if edit else None)
            assert model.flops(tokens, size, edit) == c.get_total_flops()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.toml")))
def test_flops_of_every_recipe(name):
    """A picture and an edit of every recipe; the blocks are alike, so two will do."""
    values = read_recipe(name)["model"]
    shapes = [(128, (32, 32), False), (21, (8, 16), True)]
    check_flops(MoSConfig(**values | {"gen_depth": 2}), shapes)
    if name == "laptop":
        check_flops(MoSConfig(**values), shapes[:1])


@pytest.mark.parametrize("changes", (
    dict(router_inputs=("prompt",)), dict(router_inputs=("prompt", "latent")),
    dict(router_inputs=("prompt", "time")), dict(tokenwise=False), dict(registers=0, k=1),
    dict(tokenwise=False, router_inputs=("prompt",)), dict(edit_inputs=("understanding",))))
def test_flops_of_ablations(changes):
    """The same for routers that see less or decide for all tokens at once, and for edits' arms."""
    check_flops(make_config(**changes, gen_depth=2),
                [(21, (8, 16), edit) for edit in (False, True)])


def test_memory_and_time_of_a_step():
    """The 74.7 GiB and 0.506 s that `tools.bench train` measured on an H100 are met within 5 %."""
    config = MoSConfig(**read_recipe("mos_s")["model"])
    found = estimate.estimate(config, micro_batch=48, ema=False)
    peak = found["peak"] - found["understanding tower"] - found["VAE"]  # not there when measured
    assert peak / 2**30 == pytest.approx(74.7, rel=0.05)
    assert found["flops"] / estimate.RATE == pytest.approx(0.506, rel=0.05)
    cut = estimate.estimate(config, "fsdp", 8, micro_batch=48, ema=False)
    assert all(cut[name] == found[name] // 8 for name in ("weights", "optimizer"))
    light = estimate.estimate(config, "fsdp", 8, micro_batch=48, ema=False, recompute=True)
    assert light["gradients, or activations"] < cut["gradients, or activations"] / 2
    assert light["flops"] == cut["flops"] == found["flops"]
    assert estimate.estimate(config, "hsdp", 4)["weights"] == found["weights"] // 4
    with pytest.raises(ValueError, match="shards must divide the 8 processes, got 3"):
        estimate.estimate(config, "hsdp", 8, 3)


def test_estimate_restores_the_kernels():
    """What `estimate` changes in kernels.py is as before, even after an error."""
    before = kernels.fused
    with pytest.raises(ZeroDivisionError), estimate.gpu_kernels():
        assert kernels.fused(None)
        1 / 0
    assert kernels.fused is before


def test_estimate_prints_a_recipe(command, capsys):
    """The command takes every setting of train.py, and a recipe's values where none is given."""
    command(estimate, "mos_s", "--phase", 512, "--parallel", "fsdp", "--processes", 64)
    assert capsys.readouterr().out == """\
mos_s, 512x512, 64 processes, fsdp, micro-batch 32: GiB in each
weights                          0.17
optimizer                        0.34
average                          0.17
understanding tower              0.23
VAE                              0.94
gathered                         0.44
DDP's buckets                    0.00
gradients, or activations       24.43
peak                            26.73
a step of 2048: 164.1 TFLOP in each, 0.342 s at 480 TFLOP/s, without communication
"""
    command(estimate, "laptop", "--processes", 2, "--size", 64, "--batch", 12, "--micro-batch", 4,
            "--ema", 0, "--recompute")
    printed = capsys.readouterr().out
    assert "laptop, 64x64, 2 processes, ddp, micro-batch 3: GiB in each" in printed
    assert re.search("average +0.00", printed) and "a step of 12: " in printed


# ------------------------------------------------------------------------------------------------
# Curves

COLUMNS = ("step,lr,loss,loss_t0,loss_t1,val_loss,score,score_two_objects,"
           "usage_0_0,usage_0_1,usage_1_0,usage_1_1")
LOG = f"""{COLUMNS}
50,1,0.5,0.1,0.2,,,,,,,
100,1,0.25,0.3,0.4,,,,,,,
100,,,,,0.75,0.5,0.25,0,1,0.25,0.75
"""


def test_panels(tmp_path):
    """Every column is drawn: by name, in the panel of its group, or as the layers chosen."""
    path = tmp_path / "image.csv"
    path.write_text(LOG)
    (run, log), = curves.read(path).items()
    assert run == str(tmp_path) and len(log) == COLUMNS.count(",")
    panels, usage = curves.group(log)
    assert panels == {
        "lr": {"": {50: 1, 100: 1}}, "loss": {"": {50: 0.5, 100: 0.25}},
        "loss by t": {"0": {50: 0.1, 100: 0.3}, "1": {50: 0.2, 100: 0.4}},
        "val_loss": {"": {100: 0.75}}, "score": {"": {100: 0.5}},
        "score by task": {"two_objects": {100: 0.25}}}
    assert usage == {(0, 0): 0, (0, 1): 1, (1, 0): 0.25, (1, 1): 0.75}


@pytest.mark.parametrize("stage, written", (("image", ("image.png", "curves.png")),
                                            ("edit", ("edit.png",)), ("vae", ("vae.png",))))
def test_what_is_drawn(stage, written, command, capsys, tmp_path):
    """Only stage image is compared with the kept seeds, unless --beside names other runs."""
    (tmp_path / f"{stage}.csv").write_text(LOG)
    command(curves, ".", "--stage", stage)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "wrote" in line] == [
        f"wrote {name}" for name in written]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(written)
    assert ("seed 0" in printed) == (stage == "image")


def test_curves_without_matplotlib(command, monkeypatch, capsys, tmp_path):
    """Without matplotlib the table has to do."""
    (tmp_path / "image.csv").write_text(LOG)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command(curves, ".")
    printed = capsys.readouterr().out
    assert "seed 0" in printed and printed.count("matplotlib is missing") == 2
    assert not list(tmp_path.glob("*.png"))
