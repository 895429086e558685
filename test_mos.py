"""What MoS must compute: routing, its exact identities, flow, towers, sampling.

The oracle is plain numpy in float64, written from the paper's equations (3) and (4) alone.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mos
from config import SCHEDULES
from conftest import make_model, same
from kernels import Keys, apply_rope, mix_states, rope_table
from mos import guide, make_schedule, mode_density, sample_t, shift_time
from router import INPUTS, routing_weights, select
from towers import Tokenizer

PROMPTS = ["a red circle", "a photo of two stars on the gray background",
           "a blue square left of the green star"]
close = torch.testing.assert_close
TIGHT = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(model, height=4, width=6):
    """Arguments of MoS.loss, the same at every call: z0, tokens, t, z1, uniform."""
    g, c = torch.Generator().manual_seed(1), model.config
    tokens = model.tokenizer.batch(PROMPTS)
    z0, z1 = torch.randn(2, 3, c.vae_channels, height, width, generator=g)
    uniform = torch.rand(*tokens.shape, c.und_depth + 1, c.gen_depth, generator=g)
    return z0, tokens, torch.rand(3, generator=g), z1, uniform


def logits_of(model, context, z, t):
    return model.router(context.inputs, context.keys, *model.generation.patchify(z), t)


def explore(weights, k, epsilon):
    """`select` with fresh random numbers."""
    B, S, M, N = weights.shape
    return select(weights, k, epsilon, torch.rand(B, S, M + 1, N))


# --- A. the oracle -------------------------------------------------------------------------------

def oracle(logits, states, k, upstream):
    """Weights, choice, mixtures (B, S, N, D); gradient of sum(upstream * mixtures) by logits."""
    w = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)                # eq. (3)
    chosen, gradient = np.zeros(w.shape, bool), np.zeros(w.shape)
    mixtures = np.zeros(upstream.shape)
    for b, s, j in np.ndindex(w.shape[0], w.shape[1], w.shape[3]):
        p, state, g = w[b, s, :, j], states[b, s], np.zeros(w.shape[2])
        top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        chosen[b, s, top, j] = True
        mixtures[b, s, j] = sum(p[i] * state[i] for i in top)                # eq. (4)
        g[top] = state[top] @ upstream[b, s, j]                              # by the weights
        gradient[b, s, :, j] = p * (g - p @ g)                               # through the softmax
    return w, chosen, mixtures, gradient


@pytest.mark.parametrize("k", [1, 2, 7])
def test_routing_matches_the_oracle(k):
    """Weights, choice, mixture, gradient are those of eq. 3 and 4; k = M is the dense mixture."""
    rng = np.random.default_rng(k)
    logits, states, upstream = (rng.normal(size=(2, 3, *s)) for s in ((7, 4), (7, 5), (4, 5)))
    w, chosen, mixtures, gradient = oracle(logits, states, k, upstream)
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    weights = routing_weights(x)
    weights.retain_grad()
    index, weight = select(weights, k)
    mixed = torch.stack([mix_states(torch.tensor(states).float(), index[..., j], weight[..., j])
                         for j in range(4)], 2)
    mixed.backward(torch.tensor(upstream).float())
    assert (torch.zeros(w.shape, dtype=bool).scatter(2, index, True).numpy() == chosen).all()
    for ours, theirs in ((weights, w), (mixed, mixtures), (x.grad, gradient)):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, **TIGHT)
    assert ((weights.grad.numpy() != 0) == chosen).all()
    assert (x.grad != 0).all()  # through the softmax, the layers that were not chosen learn, too
    if k == 7:
        np.testing.assert_allclose(mixtures, np.einsum("bsmn,bsmd->bsnd", w, states), **TIGHT)


# --- B. routing ----------------------------------------------------------------------------------

def test_softmax_is_fp32(model):
    """Eq. 3 turns bf16 logits into fp32 weights; autocast leaves the router's logits in fp32."""
    half = torch.randn(2, 3, 5, 4).bfloat16()
    assert torch.equal(routing_weights(half), half.float().softmax(2))
    z, tokens, t, *_ = draw(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(model, model.understand(tokens), z, t)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("epsilon", [0, 0.5, 1])
@pytest.mark.parametrize("ties", [False, True])
def test_k_distinct_layers_keep_their_weights(epsilon, ties):
    """However chosen: k different layers with eq. 3's weights, sum below 1 unless renormalised."""
    weights = torch.full((4, 5, 6, 7), 1 / 6) if ties else torch.randn(4, 5, 6, 7).softmax(2)
    index, weight = explore(weights, 3, epsilon)
    assert index.shape == (4, 5, 3, 7) and (index.sort(2).values.diff(dim=2) > 0).all()
    assert torch.equal(weight, weights.gather(2, index)) and (weight.sum(2) < 1).all()
    index, weight = select(weights, 3)
    same, scaled = select(weights, 3, renormalize=True)
    assert torch.equal(index, same)
    close(scaled * weight.sum(2, keepdim=True), weight)
    close(scaled.sum(2), torch.ones(4, 5, 7))


def test_epsilon_zero_is_deterministic():
    """epsilon 0 is top-k whatever the random numbers, in the model, too; epsilon 1 is not."""
    weights = torch.rand(2, 3, 6, 4)
    assert torch.equal(explore(weights, 2, 0)[0], weights.topk(2, 2).indices)
    never, always = make_model(epsilon=0.0), make_model(epsilon=1.0)
    *arguments, uniform = draw(never)
    expected = never.loss(*arguments)
    assert torch.equal(never.loss(*arguments, uniform), expected)
    assert torch.equal(always.loss(*arguments), expected)  # sampling and validation never explore
    assert not torch.allclose(always.loss(*arguments, uniform), expected, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
def test_exploration_is_uniform(epsilon):
    """Whoever explores draws all pairs of layers equally often (4 sigma), good or bad."""
    weights = torch.tensor([.4, .3, .15, .1, .05]).view(1, 1, 5, 1).expand(9000, 2, 5, 3)
    index, _ = explore(weights, 2, epsilon)
    n = index.numel() // 2
    pairs = (2 ** index).sum(2).flatten().bincount()
    p = torch.full((10,), epsilon / 10)
    p[0] += 1 - epsilon  # layers 0 and 1, the best
    counts = pairs[pairs > 0]
    assert counts.shape == p.shape and ((counts - n * p).abs() < 4 * (n * p).sqrt()).all()


def test_exploration_rate_and_independence():
    """A share epsilon explores (3 sigma), each token and block for itself (5 sigma)."""
    weights, n = torch.rand(1, 1, 60, 1).expand(4000, 3, -1, 4), 4000
    index, _ = explore(weights, 2, 0.3)
    random = (index.sort(2).values != weights.topk(2, 2).indices.sort(2).values).any(2).flatten(1)
    p = 0.3 * (1 - 1 / math.comb(60, 2))  # a random pair may be the best one
    assert abs(random.float().mean() - p) < 3 * (p * (1 - p) / (12 * n)) ** 0.5
    assert (torch.corrcoef(random.float().T) - torch.eye(12)).abs().max() < 5 / n ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("projected", [False, True])
def test_what_is_never_read(projected, monkeypatch):
    """NaN in unrouted states and garbage in the padding change no bit; more padding hardly any."""
    model = make_model(und_depth=9)
    choices = []

    def spy(*arguments):
        choices.append(select(*arguments))
        return choices[-1]

    monkeypatch.setattr(mos, "select", spy)
    z, tokens, t, *_ = draw(model)
    context = model.understand(tokens)

    def velocity(context, **changes):
        context = context._replace(**changes)
        return model(z, t, model.project(context) if projected else context)

    def garbage(where):
        return velocity(context, inputs=context.inputs + 9 * where[..., None],
                        states=context.states + 9 * torch.randn(9, 40) * where[..., None, None])

    expected = velocity(context)
    unrouted = torch.ones(context.states.shape[:3]).scatter(2, choices[0][0].flatten(2), 0).bool()
    holed = context.states.masked_fill(unrouted[..., None], torch.nan)
    assert unrouted.any(2).all() and torch.equal(velocity(context, states=holed), expected)
    real = context.keys.mask
    assert (~real).any() and torch.equal(garbage(~real), expected)
    assert not torch.allclose(garbage(real), expected, rtol=1e-2)
    close(velocity(model.understand(F.pad(tokens, (0, 5), value=Tokenizer.PAD))), expected, **TIGHT)


def router_logits(change=None, **settings):
    """The router's logits of a small model, after a change of one of its inputs."""
    model = make_model(**settings)
    z, tokens, t, *_ = draw(model)
    context = model.understand(tokens)
    if change == "latent":
        z = z + 1
    if change == "time":
        t = 1 - t
    if change == "prompt":
        context = context._replace(inputs=context.inputs.roll(1, 0))
    return logits_of(model, context, z, t)


@torch.no_grad()
@pytest.mark.parametrize("tokenwise", [True, False])
@pytest.mark.parametrize("inputs", [("prompt",), ("prompt", "time"), ("prompt", "latent"), INPUTS])
def test_the_router_uses_every_input_it_has(inputs, tokenwise):
    """Another prompt, latent or time changes the logits where the router sees it."""
    settings = dict(router_inputs=inputs, tokenwise=tokenwise)
    expected = router_logits(**settings)
    for name in inputs:
        assert not torch.allclose(router_logits(name, **settings), expected, rtol=1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("tokenwise", [True, False])
@pytest.mark.parametrize("removed", ["latent", "time"])
def test_the_router_ignores_an_input_that_was_removed(removed, tokenwise):
    """Without an input nothing of it reaches the logits."""
    settings = dict(router_inputs=[name for name in INPUTS if name != removed],
                    tokenwise=tokenwise)
    assert torch.equal(router_logits(removed, **settings), router_logits(**settings))


@torch.no_grad()
def test_sample_wise_routing_is_one_route_for_all_tokens():
    """With the [CLS] token all tokens of a prompt share a route; without it each has its own."""
    shared, apart = router_logits(tokenwise=False), router_logits(tokenwise=True)
    assert torch.allclose(shared, shared[:, :1], rtol=1e-3)
    assert not torch.allclose(apart, apart[:, :1], rtol=1e-3)
    assert not torch.allclose(shared[0], shared[1], rtol=1e-3)  # each prompt has its own


@torch.no_grad()
def velocities_at_two_scales(norm):
    """Velocities of a model whose states are 100 times, or 1 to 100 times by layer, as large."""
    model = make_model(state_norm=norm)
    z, tokens, t, *_ = draw(model)
    tower = model.understanding.forward
    result = []
    for scale in (torch.full((5,), 100.0), torch.logspace(2, 4, 5)):
        model.understanding.forward = lambda x: tower(x) * scale[:, None]
        result.append(model(z, t, model.understand(tokens)))
    return result


def test_state_norm_pre_forgets_the_scale():
    """State norms that grow by layer are irrelevant with "pre", and only with "pre"."""
    assert torch.allclose(*velocities_at_two_scales("pre"), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(*velocities_at_two_scales("post"), rtol=1e-3, atol=1e-4)


# --- C. exact identities -------------------------------------------------------------------------

def test_a_context_without_queries_equals_a_full_block(model):
    """Identity 1: the block of [x; context], all tokens treated alike, its context then dropped."""
    axes, block = model.generation.axes, model.generation.blocks[1]
    B, S, L, H, D = 2, 4, 9, block.heads, block.head_width
    c, x, places = torch.randn(B, S, 64), torch.randn(B, L, 64), torch.randint(0, 9, (L, 3))
    mask = torch.rand(B, S + L) < 0.7
    qkv = block.qkv(torch.cat((block.norm1(x), block.norm_context(c)), 1)).view(B, L + S, -1, D)
    kv_heads = (qkv.shape[2] - H) // 2
    q, k, v = qkv.split([H, kv_heads, kv_heads], 2)
    k = torch.cat((block.k_norm(k[:, :L]), block.k_norm_context(k[:, L:])), 1)
    rope = rope_table(F.pad(places, (0, 0, 0, S)), axes)  # position 0: the context is not rotated
    q, k = apply_rope(block.q_norm(q), rope), apply_rope(k, rope)
    k, v = (a.repeat_interleave(H // kv_heads, 2) for a in (k, v))
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    a = (q @ k.mT / D ** 0.5).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v
    full = torch.cat((x, c), 1) + block.out(a.transpose(1, 2).flatten(2))
    full = full + block.ffn(block.norm2(full))
    close(block(x, c, rope_table(places, axes), Keys(mask)), full[:, :L], **TIGHT)


def test_projecting_first_equals_mixing_first(model):
    """Identity 2: Proj before or after the mixture, bias once; never where a gradient is due."""
    z, tokens, t, *_ = draw(model)
    context = model.understand(tokens)
    with pytest.raises(RuntimeError, match="no_grad"):
        model.project(context)
    index, weight = select(routing_weights(logits_of(model, context, z, t)), 2)
    with torch.no_grad():
        projected = model.project(context)
        assert projected.states.shape[-1] == 64
        close(model.mix(context, index[..., 1], weight[..., 1]),
              model.mix(projected, index[..., 1], weight[..., 1]), **TIGHT)
        close(model(z, t, context), model(z, t, projected), **TIGHT)


def test_the_loss(model):
    """z runs straight from z0 to z1; identity 3 in float64: the loss on z0 is t^2 that on v."""
    z0, tokens, t, z1, _ = (a.double() if a.is_floating_point() else a for a in draw(model))
    v = torch.randn(z0.shape)
    seen = []

    def velocity(z, *_):
        seen.append(z)
        return v

    model.forward = velocity
    loss = model.loss(z0, tokens, t, z1)
    time = t[:, None, None, None]
    assert loss.shape == (3,) and (loss > 0.1).all()
    close(seen[0], z0 + time * (z1 - z0))
    close((seen[0] - time * v - z0).square().mean((1, 2, 3)), t ** 2 * loss, rtol=1e-12, atol=0)
    model.loss(z0, tokens, torch.tensor([0.0, 1, 1]), z1)
    assert torch.equal(seen[1][0], z0[0]) and torch.equal(seen[1][1:], z1[1:])
    model.forward = lambda *_: (z1 - z0)
    assert (model.loss(z0, tokens, t, z1) < 1e-12).all()  # fp32 rounding of v, squared


def test_hand_crafted_routing_is_one_hot_routing(model):
    """Identity 4: a one-hot weight picks its state exactly, then Proj."""
    context = model.understand(draw(model)[1])
    for layer in range(5):
        hot = torch.eye(5)[layer].view(5, 1).expand(*context.states.shape[:3], 1)
        index, weight = (a[..., 0] for a in select(hot, 1))
        state = context.states[:, :, layer]
        assert torch.equal(mix_states(context.states, index, weight), state)
        assert torch.equal(model.mix(context, index, weight), model.generation.proj(state))


# --- D. flow -------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 5])
def test_euler_is_exact_on_a_straight_line(schedule, steps):
    """The true constant velocity leads from noise to z0 in any number of steps of any schedule."""
    model, z0, times, v, ends = make_model(shift=3.0), torch.randn(3, 6, 4, 4), [], [], []

    def forward(z, t, context, reference):
        times.append(t[0].item())
        v.append((z[:3] - z0).repeat(2, 1, 1, 1))
        return v[0]

    model.forward = forward
    model.vae.decode = lambda z: ends.append(z) or torch.zeros(3, 3, 64, 64)
    model.generate(PROMPTS, steps=steps, schedule=schedule)
    close(ends[0], z0, rtol=0, atol=1e-5)
    assert times == pytest.approx(make_schedule(steps, schedule, 3)[:-1])


def test_schedules_and_densities():
    """Golden values; the shares of t below its quantiles are right (4 sigma)."""
    golden = [1, .99375, .9875, .98125, .975, .909375, .725, .421875, 0]
    for n, expected in ((8, golden), (1, [1, 0]), (2, [1, .975, 0])):  # it knows no shift
        assert make_schedule(n, "linear-quadratic", 3) == pytest.approx(expected, abs=1e-12)
    assert make_schedule(4) == [1, .75, .5, .25, 0]
    assert make_schedule(4, "uniform", 3) == pytest.approx([1, .9, .75, .5, 0])
    assert [shift_time(t, 3) for t in (.5, .25, .1)] == pytest.approx([.75, .5, .25])
    golden = torch.tensor([.839577, .667157, .5, .160423])
    close(mode_density(torch.tensor([.1, .25, .5, .9])), golden, rtol=0, atol=1e-6)
    quantiles = {"logit-normal": ((.5, .5), (.268941, .158655), (.731059, .841345)),
                 "mode": ((.5, .5), (.160423, .1), (.667157, .75))}
    for how, shift in ((how, shift) for how in quantiles for shift in (1, 3)):
        t = sample_t(20000, how, shift, torch.Generator().manual_seed(0))
        for value, share in quantiles[how]:
            below = (t < shift_time(value, shift)).double().mean()
            assert abs(below - share) < 4 * (share * (1 - share) / 20000) ** 0.5, (how, value)


def test_guidance():
    """The formula on all channels, the limits of rescale, each sample for itself; 0 stays 0."""
    c, u = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    plain, full = guide(c, u, 5, 0), guide(c, u, 5, 1)
    close(plain, u + 5 * (c - u))
    close(full, plain * (c.flatten(1).std(1) / plain.flatten(1).std(1))[:, None, None, None])
    close(guide(c, u, 5, .7), .7 * full + .3 * plain)
    close(guide(c, u, 5, .7)[1:2], guide(c[1:2], u[1:2], 5, .7))
    close(guide(c, u, 1, .7), c)
    assert (guide(0 * c, 0 * c, 5, .7) == 0).all()  # an untrained model's velocity


# --- E. the towers -------------------------------------------------------------------------------

@torch.no_grad()
def test_states_are_the_raw_residual_stream(model):
    """M states: the outputs of blocks 1 to M, without the embedding, the last one not normed."""
    tower, outputs, tokens = model.understanding, [], draw(model)[1]
    for block in tower.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    context = model.understand(tokens)
    assert torch.equal(context.states, torch.stack(outputs, 2)) and len(outputs) == 5
    assert not torch.allclose(outputs[0], context.inputs, rtol=1e-3)
    assert not torch.allclose(outputs[-1], tower.norm(outputs[-1]), rtol=1e-2)
    assert torch.equal(context.inputs, tower.embedding(tokens.clamp_min(0)))
    assert torch.equal(context.keys.mask, tokens != Tokenizer.PAD)


@torch.no_grad()
def test_understanding_is_causal_with_pictures_in_front(model):
    """Later tokens change no earlier state; a picture stands before the text and changes it."""
    tower, tokens, images = model.understanding, draw(model)[1], torch.rand(3, 3, 32, 48)
    for front, pictures in ((0, None), (6, images)):  # 2*3 tokens
        a, b = (tower(tower.embed(text, pictures)) for text in
                (tokens, torch.where(torch.arange(tokens.shape[1]) < 4, tokens, 5)))
        close(a[:, :front + 4], b[:, :front + 4], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(a[:, front + 4:], b[:, front + 4:], rtol=1e-2)
    assert torch.equal(tower.embed(tokens, images)[:, 6:], tower.embed(tokens))
    assert not torch.allclose(tower(tower.embed(tokens, -images))[:, 6:], a[:, 6:], rtol=1e-3)


def test_frozen_and_trained_parts(model):
    """Every router and generation parameter gets a gradient, twice; tower and VAE never change."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(*draw(model), reference=draw(model)[0]).mean().backward()
        for name, p in model.named_parameters():
            if name.startswith(("router", "generation")):
                assert p.requires_grad and p.grad.isfinite().all() and p.grad.any(), name
            else:
                assert not p.requires_grad and p.grad is None, name
        optimizer.step()
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith(("router", "generation"))}


# --- F. learning ---------------------------------------------------------------------------------

def test_one_batch_is_learned_through_the_prompt():
    """The loss falls tenfold though noise and t are the same: the prompt alone tells targets."""
    model = make_model()
    torch.nn.init.zeros_(model.generation.head.weight)
    tokens, losses = model.tokenizer.batch([*PROMPTS, "two stars"]), []
    z0, z1 = torch.randn(4, 6, 4, 4), torch.randn(1, 6, 4, 4).expand(4, -1, -1, -1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 3e-3)
    for _ in range(60):
        losses.append(model.loss(z0, tokens, torch.ones(4), z1).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < losses[0] / 10


# --- G. sampling ---------------------------------------------------------------------------------

def test_pictures_do_not_depend_on_the_batch(painter):
    """Picture i of seed s is that of seed s + i alone, or of a list of seeds; seeds differ."""
    batch = painter.generate(PROMPTS, seed=5)
    for i, prompt in enumerate(PROMPTS):
        assert same(batch[i:i + 1], painter.generate([prompt], seed=5 + i))
        assert not same(batch[i:i + 1], painter.generate([prompt], seed=8))
    for seeds in ([7, 6, 5], np.array([7, 6, 5])):
        assert same(batch[::-1], painter.generate(PROMPTS[::-1], seed=seeds))
    assert same(batch, painter.generate(PROMPTS, seed=np.int64(5), size=np.int64(64)))


def test_what_changes_a_picture(painter):
    """Prompt, negative prompt, guidance, rescale do; the size is height by width; branches."""
    call = dict(prompts=PROMPTS[:1], seed=1, steps=2, guidance=3.0, negative="", rescale=0.0)
    first = painter.generate(**call)
    assert np.asarray(first[0]).std() > 10 and same(first, painter.generate(**call))
    for change in (dict(prompts=PROMPTS[1:2]), dict(negative="a blue star"), dict(guidance=5.0),
                   dict(rescale=1.0), dict(steps=3), dict(schedule="linear-quadratic")):
        assert not same(first, painter.generate(**{**call, **change})), change
    assert same(first, painter.generate(**{**call, "negative": None}))
    for size, expected in ((None, (64, 64)), (32, (32, 32)), ((32, 96), (96, 32))):
        assert painter.generate(**call, size=size)[0].size == expected
    branches, forward = [], painter.forward

    def spy(z, *rest, **more):
        branches.append(len(z))
        return forward(z, *rest, **more)

    painter.forward = spy
    one, nearly = (painter.generate(**{**call, "guidance": g}) for g in (1, 1 + 1e-7))
    assert branches == [1, 1, 2, 2] and same(one, nearly)  # guidance 1 is the conditional branch


def test_what_cannot_be_drawn_is_refused(painter):
    """A ValueError that names the setting."""
    for match, change in (
            ("size .*32x48", dict(size=(32, 48))), ("size", dict(size=(32, 0))),
            ("steps", dict(steps=0)),
            ("guidance", dict(guidance=math.nan)), ("rescale", dict(rescale=1.1)),
            ("schedule", dict(schedule="quick")), ("list", dict(prompts="a star")),
            ("words", dict(prompts=["a star", " "])), ("'zebra'", dict(prompts=["a zebra"])),
            ("too long, at most 16 .*'red red", dict(prompts=["red " * 30])),
            ("too long, at most 16 .*'red red", dict(negative="red " * 30)),
            ("seed", dict(seed=[1])), ("prompts", dict(prompts=[])), ("prompts", dict(prompts=3)),
            ("context holds 2 texts, expected 2 for each of 2",
             dict(context=painter.read(PROMPTS[:2]))),
            *(("texts with words, got", dict(prompts=["a star", text]))
              for text in (".", " . . ", "<eos>", "<PAD> <bos>", None)),
            *(("size must be a whole number or a pair", dict(size=size))
              for size in (64.0, "64", (64, 32.0), (32, 32, 32))),
            *(("seed must be a whole number, or a list", dict(seed=seed))
              for seed in (1.0, None, "12", [1, 2.5]))):
        with pytest.raises(ValueError, match=match):
            painter.generate(**{"prompts": PROMPTS[:2], "steps": 1, **change})
