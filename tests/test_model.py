"""Parts of a model by value: settings, places of tokens, what the router reads, words, pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from common import contact_sheet, to_image, to_tensor
from conftest import make_model, same
from router import select
from towers import Understanding

close = torch.testing.assert_close
TIGHT = dict(rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch", (1, 2))
def test_tokens_of_an_oblong_picture(patch):
    """Row by row: token i is read off, and its velocity written to, the patch at its position."""
    model, p = make_model(gen_patch=patch), patch
    G, z = model.generation, torch.randn(2, 6, 2 * p, 3 * p)
    x, positions = G.patchify(z, reference=-z)
    corners = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert positions.tolist() == [[image, *corner] for image in (0, 1) for corner in corners]
    v = G.unpatchify(torch.cat((torch.randn(2, 3, 64), x), 1), 2 * p, 3 * p)  # after 3 registers
    for i, (row, column) in enumerate(corners):
        where = ..., slice(row * p, (row + 1) * p), slice(column * p, (column + 1) * p)
        close(x[:, i], G.embed(z[where].flatten(1)), **TIGHT)
        close(x[:, 6 + i], G.embed(-z[where].flatten(1)) + G.reference, **TIGHT)
        close(v[where].flatten(1), G.head(G.norm(x[:, i])), **TIGHT)


@torch.no_grad()
def test_options_of_the_choice_reach_the_model(monkeypatch):
    """k, epsilon and renormalize are what `select` gets; each changes the velocity."""
    asked, velocities = [], []

    def spy(weights, k, epsilon, explore, renormalize):
        asked.append((k, epsilon, renormalize))
        return select(weights, k, epsilon, explore, renormalize)

    monkeypatch.setattr("mos.select", spy)
    options = [(2, 0.5, False), (2, 0.5, True), (3, 0.5, False), (2, 0.9, False)]
    for k, epsilon, renormalize in options:
        model = make_model(k=k, epsilon=epsilon, renormalize=renormalize)
        torch.manual_seed(1)
        z, explore = torch.randn(1, 6, 4, 4), torch.rand(1, 4, 6, 3)
        context = model.understand(model.tokenizer.batch(["a red circle"]))
        velocities.append(model(z, torch.tensor([0.5]), context, explore))
    assert asked == options
    assert not any(torch.allclose(velocities[0], v, rtol=1e-3, atol=1e-3) for v in velocities[1:])


def test_impossible_settings_are_refused():
    """Too many states, unknown inputs and options, widths that do not fit: clear ValueErrors."""
    with pytest.raises(ValueError, match="k=6 .* M=5"):
        select(torch.rand(1, 1, 5, 1), 6)
    for match, changes in (("k=6 .* und_depth=5", dict(k=6)), ("k must .* 0", dict(k=0)),
                           ("state_norm .* pre, post.*'both'", dict(state_norm="both")),
                           ("epsilon .*1.5", dict(epsilon=1.5)), ("schedule", dict(schedule="no")),
                           ("inputs.*sound", dict(router_inputs=("prompt", "sound"))),
                           ("hold .*prompt", dict(router_inputs=("latent",))),
                           ("heads .*router", dict(router_width=48))):
        with pytest.raises(ValueError, match=match):
            make_model(**changes)


def test_settings_of_sampling():
    """What is not given comes from the configuration, guidance of edits from their own."""
    model = make_model(sampling_steps=4, guidance=2.5, edit_guidance=1.25, image_guidance=1.75,
                       rescale=0.25, schedule="linear-quadratic")
    plain = dict(steps=4, guidance=2.5, rescale=0.25, schedule="linear-quadratic")
    assert model.settings() == plain
    assert model.settings(edit=True) == plain | dict(guidance=1.25, image_guidance=1.75)
    given = dict(steps=9, guidance=7.0, rescale=0.0, schedule="uniform")
    assert model.settings(**given) == given
    edit = given | dict(image_guidance=3.0)
    assert model.settings(edit=True, **edit) == edit


@torch.no_grad()
@pytest.mark.parametrize("inputs, cls", ((("prompt", "latent", "time"), 1), (("prompt",), 0)))
@pytest.mark.parametrize("tokenwise", (True, False))
def test_where_the_router_reads_its_logits(tokenwise, inputs, cls):
    """Off the prompt's tokens, which come last, or for all of them off [CLS], after the time."""
    model, seen = make_model(router_inputs=inputs, tokenwise=tokenwise), []
    R, tokens = model.router, model.tokenizer.batch(["a red circle", "two stars"])
    R.blocks[-1].register_forward_hook(lambda module, given, x: seen.append(x))
    x, positions = model.generation.patchify(torch.randn(2, 6, 2, 3))
    context = model.understand(tokens)
    logits = R(context.inputs, context.keys, x, positions, torch.rand(2))   # (B, S, M, N)
    S = tokens.shape[1]
    read = seen[0][:, -S:] if tokenwise else seen[0][:, [cls] * S]
    close(logits, R.logits(R.norm(read)).view(2, S, 5, 3), **TIGHT)


def test_states_are_cast_once(model):
    """Under autocast the states come in the type of the products, so that no block casts them."""
    tokens = model.tokenizer.batch(["a red circle", "two stars"])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.understand(tokens).states.dtype == torch.bfloat16
    assert model.understand(tokens).states.dtype == torch.float32


@pytest.mark.parametrize("temperature", (0.5, 2.0))
def test_temperature(temperature):
    """Words are drawn from softmax(logits / temperature), by the seed (4 sigma)."""
    tower, logits = Understanding(5, 8, 1, 1, 1, 8), torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0])
    tower.logits = lambda states: logits.expand(1, states.shape[1], 5)
    draws, start = 300, torch.zeros(1, 1, dtype=torch.long)
    words = list(tower.write(start, draws, (), temperature, seed=3))
    expected = np.exp(logits.numpy() / temperature)
    expected /= expected.sum()
    spread = 4 * (draws * expected * (1 - expected)) ** 0.5
    assert (abs(np.bincount(words, minlength=5) - draws * expected) < spread).all()
    assert list(tower.write(start, 50, (), temperature, seed=3)) == words[:50]
    assert list(tower.write(start, 50, (), temperature, seed=4)) != words[:50]
    assert list(tower.write(start, 4, ())) == [2] * 4 and not [*tower.write(start, 4, (2,))]


def test_pixels_are_rounded():
    """A value between two levels becomes the nearer one; all levels come back as they were."""
    levels = torch.arange(256.0).expand(3, 2, 256)
    for off in (0, 0.45, -0.45):
        drawn = to_image((levels + off).clamp(0, 255) / 127.5 - 1)
        assert drawn.size == (256, 2)
        assert torch.equal(torch.from_numpy(np.array(drawn)).movedim(2, 0), levels.byte())
        assert torch.equal(to_tensor(drawn), levels / 127.5 - 1)


def test_sheets_of_pictures():
    """Rows by columns, each row's label above it; two labels are not those of other rows."""
    colours = ["red", "green", "blue", "black", "gray", "white"]
    tiles = [Image.new("RGB", (40, 20), colour) for colour in colours]
    sheet = contact_sheet([tiles[:3], tiles[3:]], ["words of one", "of two"])
    assert sheet.size == (3 * 44 - 4, 2 * (20 + 4 + 32) - 4)
    for i, tile in enumerate(tiles):
        x, y = i % 3 * 44, i // 3 * 56 + 32
        assert same([sheet.crop((x, y, x + 40, y + 20))], [tile])
    for row, label in enumerate(("words of one", "of two")):
        alone = contact_sheet([tiles[:3]], [label])
        assert same([sheet.crop((0, 56 * row, 128, 56 * row + 32))],
                    [alone.crop((0, 0, 128, 32))])
