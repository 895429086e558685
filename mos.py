"""Mixture of States: understand the prompt once, then route and generate at every step.

    B batch        S context tokens    M understanding layers   Du width of the understanding tower
    K chosen       T visual tokens     N generation blocks      Dg width of the generation tower
    C channels     R registers         H, Hk heads, key-value   Dr width of the router
    L sequence     E extra tokens      Dh width of a head

In shapes of pictures H, W are pixels, in those of latents h, w are latent pixels. In edits image
tokens are among the S, and a reference picture's tokens among the T.

Time: t = 0 is data, t = 1 is noise; z_t = (1 - t) z0 + t z1 and v = z1 - z0.
"""

import math
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import frozen_parts, load_model, save_model
from common import on_white, replayed, to_image, to_tensor
from config import check_sampling, check_seeds, check_size
from dit import Generation, rope_axes
from kernels import Keys, at_least_fp32, autocast, cast, mix_project, mix_states, pad_keys, rms_norm
from router import Router, routing_weights, select
from towers import Tokenizer


class Context(NamedTuple):
    """What the understanding tower says about B prompts."""
    inputs: torch.Tensor  # (B, S, Du) its input embeddings, for the router
    states: torch.Tensor  # (B, S, M, Du), or (B, S, M, Dg) once projected
    keys: Keys            # which of the S tokens are real
    projected: bool = False


class MoS(nn.Module):
    """The understanding tower, the router, the generation tower, and the VAE.

    `forward` is the velocity G(z_t, t, R(...)). Raises ValueError where a published folder holds
    another tower or VAE than the configuration says.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        c = self.config = config
        self.tokenizer = tokenizer
        self.understanding, self.vae = frozen_parts(config, tokenizer)
        self.router = Router(
            context_width=c.und_width, latent_width=c.gen_width, width=c.router_width,
            heads=c.router_heads, depth=c.router_depth, layers=c.und_depth, blocks=c.gen_depth,
            axes=rope_axes(c.router_width // c.router_heads), inputs=c.router_inputs,
            tokenwise=c.tokenwise)
        self.generation = Generation(
            channels=c.vae_channels, context_width=c.und_width, width=c.gen_width,
            depth=c.gen_depth, heads=c.gen_heads, kv_heads=c.gen_kv_heads, hidden=c.gen_hidden,
            patch=c.gen_patch, registers=c.registers)
        self.understanding.requires_grad_(False)
        self.vae.requires_grad_(False)

    # --- the model -------------------------------------------------------------------------------

    @torch.no_grad()
    def understand(self, tokens, images=None):
        """Read prompts of token ids (B, S) once, pictures (B, 3, H, W) before them. MoS eq. (2).

        Raises ValueError for pictures where the tower reads none.
        """
        if "understanding" not in self.config.edit_inputs:                # MoS App. B.5
            images = None
        if images is not None and self.understanding.vision is None:
            raise ValueError("this understanding tower reads no pictures; edit with one that does, "
                             "or train with edit_inputs generation")
        inputs = self.understanding.embed(tokens, images)                 # (B, S, Du)
        states = self.understanding(inputs)                               # (B, S, M, Du) eq. (2)
        if self.config.state_norm == "pre":
            states = rms_norm(states, states.new_ones(states.shape[-1]))
        (states,) = cast(states)  # once here, instead of in every block
        image_tokens = inputs.shape[1] - tokens.shape[1]
        mask = F.pad(tokens != Tokenizer.PAD, (image_tokens, 0), value=True)  # (B, S)
        return Context(inputs, states, Keys(mask))

    def route(self, x, positions, t, context):
        """Return the weights of all states for each token and block: (B, S, M, N). MoS eq. (3).

        x: patchified latents (B, T, Dg) at `positions` (T, 3), t: (B,).
        """
        logits = self.router(context.inputs, context.keys, x, positions, t)  # (B, S, M, N)
        return routing_weights(logits)                                    # (B, S, M, N) MoS eq. (3)

    def mix(self, context, index, weight):
        """Return what one block reads of the prompt, (B, S, Dg). MoS eq. (4).

        index, weight: the chosen layers of each token and their weights, (B, S, K).
        """
        proj = self.generation.proj
        if context.projected:
            return mix_states(context.states, index, weight, proj.bias)            # (B, S, Dg)
        return mix_project(context.states, index, weight, proj.weight, proj.bias)  # (B, S, Dg)

    def forward(self, z, t, context, explore=None, reference=None):
        """Return the velocity (B, C, h, w) of latents z (B, C, h, w) at times t (B,).

        explore: (B, S, M + 1, N) in [0, 1) makes the routing epsilon-greedy; without it the routing
        is deterministic. reference: clean latents (B, C, h, w) of pictures to be edited.
        """
        if "generation" not in self.config.edit_inputs:                   # MoS App. B.5
            reference = None
        G, c = self.generation, self.config
        epsilon = 0.0 if explore is None else c.epsilon
        x, positions = G.patchify(z, reference)                           # (B, T, Dg), (T, 3)
        weights = self.route(x, positions, t, context)                    # (B, S, M, N) MoS eq. (3)
        index, weight = select(weights, c.k, epsilon, explore,
                               c.renormalize)                             # (B, S, K, N) each
        x, rope = G.add_registers(x, positions)                           # (B, R+T, Dg)
        keys = pad_keys(x.shape[1], context.keys)
        for j, block in enumerate(G.blocks):
            mixture = self.mix(context, index[..., j], weight[..., j])    # (B, S, Dg)   MoS eq. (4)
            x = block(x, mixture, rope, keys)                             # (B, R+T, Dg)
        return G.unpatchify(x, *z.shape[2:])                              # (B, C, h, w)

    def flops(self, S, size, edit=False):
        """Return the FLOP of `forward` for one z of size (h, w) with S context tokens."""
        T = size[0] * size[1] // self.generation.patch ** 2
        reference = edit and "generation" in self.config.edit_inputs
        seen = T * (1 + reference)  # with the reference picture's tokens
        return self.router.flops(S, seen) + self.generation.flops(S, seen, T)

    # --- rectified flow --------------------------------------------------------------------------

    def loss(self, z0, tokens, t, z1, explore=None, context=None, images=None, reference=None):
        """Return the squared error of the velocity, a mean for each sample: (B,). MoS eq. (1).

        z0: latents (B, C, h, w), tokens: (B, S), t: (B,), z1: standard normal like z0, context:
        what `understand` says about the tokens, where that is known already. Edits have images
        (B, 3, H, W), the pictures that are edited, and their latents as reference.
        """
        time = t[:, None, None, None]                                     # (B, 1, 1, 1)
        z = (1 - time) * z0 + time * z1                                   # (B, C, h, w) sec. 3.1
        context = context or self.understand(tokens, images)
        v = self(z, t, context, explore, reference)                       # (B, C, h, w)
        return (at_least_fp32(v) - (z1 - z0)).square().mean((1, 2, 3))    # (B,)     MoS eq. (1)

    # --- from prompts to pictures ----------------------------------------------------------------

    def read(self, prompts, negative=None, images=None):
        """Let the tower read prompts and, where given, as many negative ones: a Context.

        images: pictures (B, 3, H, W) that stand before the prompts, and before the negative ones.
        Raises ValueError for prompts that are empty, too long, or not as many as pictures.
        """
        self.tokenizer.check_prompts(prompts)
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"got {len(images)} pictures for {len(prompts)} prompts")
        negatives = [] if negative is None else [negative] * len(prompts)
        return self.read_texts([*prompts, *negatives], images)

    @torch.no_grad()
    def read_texts(self, texts, images=None):
        """Return the Context of texts, which may be empty; pictures repeat to match them."""
        U = self.understanding
        device = U.embedding.weight.device
        image_tokens = 0  # that the text itself must hold, in towers that mark their places
        if images is not None:
            images = images.to(device).repeat(len(texts) // len(images), 1, 1, 1)
            if U.image_token is not None and "understanding" in self.config.edit_inputs:
                images, image_tokens = U.vision.resize(images)
        lengths = [len(self.tokenizer.encode(text, image_tokens)) for text in texts]
        longest = max(lengths)
        if longest - image_tokens > self.config.max_tokens:
            raise ValueError(f"prompt of {longest - image_tokens} tokens is too long, at most "
                             f"{self.config.max_tokens} are read: "
                             f"{texts[lengths.index(longest)]!r}")
        with autocast(device):
            tokens = self.tokenizer.batch(texts, image_tokens=image_tokens).to(device)
            context = self.understand(tokens, images)
        before = context.inputs.shape[1] - longest  # image tokens that the text does not hold
        runs = [(len(list(same)), before + length) for length, same in groupby(lengths)]
        # Without a mask attention is faster; but each run is one more call in every block.
        keys = context.keys._replace(runs=runs if len(runs) <= 2 else None)
        return context._replace(keys=keys)

    def rewrite(self, prompt, temperature=0.0, seed=0):
        """Return a detailed caption of what a prompt asks for, written by the tower. MoS sec. 4.4.

        temperature: 0 takes the likeliest words.
        """
        return self.understanding.rewrite(self.tokenizer, prompt, self.config.max_tokens,
                                          temperature, seed)

    @torch.no_grad()
    def generate(self, prompts, steps=None, guidance=None, rescale=None, schedule=None, seed=0,
                 size=None, negative="", progress=None, context=None):
        """Draw a picture of each prompt: a list of PIL images. MoS Algorithm 2.

        seed: of the first picture; picture i uses seed + i, whatever the batch around it. Or one
        seed for each picture. size: side in pixels or (height, width), multiples of 32. negative:
        what guidance moves away from. progress: wraps the iterable of steps, for example tqdm.
        context: of `read`, where it is known. Settings left out are the config's.
        Raises ValueError for what cannot be drawn.
        """
        settings = self.settings(steps=steps, guidance=guidance, rescale=rescale, schedule=schedule)
        size = check_size(self.config.size if size is None else size)
        copies = 1 if settings["guidance"] == 1 else 2  # of each prompt: guidance needs a negative
        context = context or self.read(prompts, (negative or "") if copies == 2 else None)
        if len(context.inputs) != copies * len(prompts):
            raise ValueError(f"the context holds {len(context.inputs)} texts, expected {copies} "
                             f"for each of {len(prompts)} prompts with this guidance")
        z1 = self.noise(len(prompts), seed, size)                         # (B, C, h, w)
        return self.denoise(z1, context, settings, progress)

    @torch.no_grad()
    def edit(self, images, instructions, steps=None, guidance=None, rescale=None, schedule=None,
             seed=0, negative="", image_guidance=None, progress=None):
        """Change pictures as instructions say: a list of PIL images. MoS sec. 3.4, Fig. 4.

        images: PIL images of one size, sides multiples of 32; the results have the same size, and
        nothing is pasted. guidance moves away from the negative text with the picture;
        image_guidance, unless it is 1, moves from no picture towards the picture. The rest: as for
        `generate`. Raises ValueError for what cannot be edited.
        """
        settings = self.settings(edit=True, steps=steps, guidance=guidance, rescale=rescale,
                                 schedule=schedule, image_guidance=image_guidance)
        pixels = to_pixels(images)                                        # (B, 3, H, W)
        three = settings["image_guidance"] != 1  # velocities: with text, without, without picture
        two = three or settings["guidance"] != 1
        context = self.read(instructions, (negative or "") if two else None, pixels)
        device = self.generation.registers.device
        with torch.autocast(device.type, enabled=False):                  # the VAE runs in fp32
            z0 = self.vae.encode(pixels.to(device))                       # (B, C, h, w)
        reference = torch.cat((z0, z0)) if two else z0         # (2*B, C, h, w), or (B, C, h, w)
        no_image = self.read_texts([negative or ""] * len(images)) if three else None
        z1 = self.noise(len(images), seed, pixels.shape[2:])              # (B, C, h, w)
        return self.denoise(z1, context, settings, progress, reference, no_image)

    def settings(self, edit=False, **given):
        """Return all settings of sampling, the config's where None is given. Raises ValueError."""
        c = self.config
        settings = dict(steps=c.sampling_steps, guidance=c.guidance, rescale=c.rescale,
                        schedule=c.schedule)
        if edit:
            settings |= dict(guidance=c.edit_guidance, image_guidance=c.image_guidance)
        settings |= {name: value for name, value in given.items() if value is not None}
        check_sampling(**settings)
        return settings

    def noise(self, count, seed, size):
        """Return noise (B, C, h, w) for pictures of size (height, width), one seed for each."""
        seeds = check_seeds(seed, count)
        shape = self.config.vae_channels, *(side // self.vae.factor for side in size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.generation.registers.device)    # (B, C, h, w)

    def denoise(self, z, context, settings, progress=None, reference=None, no_image=None):
        """From noise z (B, C, h, w) to PIL images, step by step. MoS Algorithm 2.

        context, reference, no_image: see `guided`. settings: of `settings`.
        """
        times = make_schedule(settings["steps"], settings["schedule"], self.config.shift)
        times = torch.tensor(times, device=z.device)
        scales = {name: settings[name] for name in ("guidance", "rescale", "image_guidance")
                  if name in settings}
        with autocast(z.device):
            context = self.project(context)
            no_image = no_image and self.project(no_image)

            def euler(z, t, t_next):
                v = self.guided(z, t, context, reference, no_image, **scales)  # (B, C, h, w)
                return z + (t_next - t) * v                                 # (B, C, h, w)

            euler = replayed(euler, z, *times[:2])  # on a GPU as a CUDA graph
            for t, t_next in (progress or iter)(list(zip(times, times[1:]))):
                z = euler(z, t, t_next)                                   # (B, C, h, w)
        with torch.autocast(z.device.type, enabled=False):                # the VAE runs in fp32
            pixels = self.vae.decode(z)                                   # (B, 3, H, W)
        return [to_image(picture) for picture in pixels]

    def project(self, context):
        """Apply Proj to all states at once: in sampling they are mixed anew at every step.

        Proj is linear, so mixing after it is exact. It runs where the tower is, and the result
        moves to the generation tower's device. Raises RuntimeError where a gradient is due: in
        training each mixture is projected, see `mix`.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("project() is for sampling: call it under torch.no_grad()")
        proj = self.generation.proj.weight
        states = F.linear(context.states, proj.to(context.states))        # (B, S, M, Dg)
        keys = context.keys._replace(mask=context.keys.mask.to(proj.device))
        return Context(context.inputs.to(proj), states.to(proj), keys, projected=True)

    def guided(self, z, t, context, reference=None, no_image=None, guidance=1.0, rescale=0.0,
               image_guidance=1.0):
        """Return the guided velocity (B, C, h, w) of latents z at time t, a scalar tensor.

        context: of B prompts; with guidance B negative ones follow them. In edits each has its
        reference latents; no_image: with image guidance, the negative prompts without pictures.
        """
        both = len(context.inputs) > len(z)
        zz = torch.cat((z, z)) if both else z                  # (2*B, C, h, w), or (B, C, h, w)
        v = at_least_fp32(self(zz, t.expand(len(zz)), context, reference=reference))
        if not both:
            return v
        v_0 = None if no_image is None else at_least_fp32(self(z, t.expand(len(z)), no_image))
        v_c, v_u = v.chunk(2)                                             # (B, C, h, w) each
        return guide(v_c, v_u, guidance, rescale, v_0, image_guidance)    # (B, C, h, w)

    def save_pretrained(self, folder):
        """Write the model's folder: configuration, vocabulary and weights."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", **options):
        """Return the model of a folder, ready to sample; options: see `checkpoint.load_model`."""
        return load_model(cls, folder, device, **options)


def unfilled(config):
    """Return a model on the meta device, which has no memory and reads no files."""
    with torch.device("meta"):
        return MoS(replace(config, und_folder="", vae_folder=""), Tokenizer(map(str, range(256))))


# --- Rectified flow: times, schedules, guidance ---------------------------------------------------

def sample_t(n, distribution, shift, generator):
    """Return n training times in (0, 1) on the generator's device. MoS App. A, Esser et al. 2024.

    distribution: "logit-normal" or "mode"; both are then moved by shift.
    """
    options = dict(generator=generator, device=generator.device)
    if distribution == "logit-normal":
        t = torch.randn(n, **options).sigmoid()
    else:
        t = mode_density(torch.rand(n, **options))
    return shift_time(t, shift)


def mode_density(u, scale=0.8):
    """Map uniform u to t by mode sampling: denser in the middle for scale > 0 (Esser et al.)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def shift_time(t, shift):
    """Move times towards noise (shift > 1), as higher resolutions need it."""
    return shift * t / (1 + (shift - 1) * t)


def make_schedule(steps, schedule="uniform", shift=1.0):
    """Return the steps + 1 times from 1 to 0.

    "uniform" with shift, or "linear-quadratic" (Movie Gen): half of the steps cover the first
    theta = 0.025, the others grow quadratically.
    """
    if schedule == "uniform":
        return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]
    if steps == 1:
        return [1.0, 0.0]
    theta = 0.025
    linear = steps // 2
    quadratic = steps - linear
    d = linear - theta * steps
    a = d / (linear * quadratic ** 2)
    b = theta / linear - 2 * d / quadratic ** 2
    c = d * linear / quadratic ** 2
    past = [i * theta / linear if i < linear else a * i * i + b * i + c for i in range(steps)]
    return [1 - x for x in past] + [0.0]


def guide(v_c, v_u, guidance, rescale, v_0=None, image_guidance=1.0):
    """Return the guided velocity (Ho & Salimans), rescaled (Lin et al. 2024), on all channels.

    v_c, v_u: velocities (B, C, h, w) with and without the text. rescale: 0 keeps plain guidance,
    1 gives the guided velocity the standard deviation of v_c. v_0: without text and picture, for
    v_0 + image_guidance (v_u - v_0) + guidance (v_c - v_u) of InstructPix2Pix (Brooks et al. 2023).
    """
    v = v_u + guidance * (v_c - v_u)
    if v_0 is not None:
        v = v + (image_guidance - 1) * (v_u - v_0)
    ratio = v_c.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True).clamp_min(1e-8)
    return (rescale * ratio + 1 - rescale) * v


def to_pixels(images):
    """Return PIL images of one size as a tensor (B, 3, H, W) in [-1, 1].

    Raises ValueError for anything else, and where a side is no multiple of 32.
    """
    try:
        sizes = sorted({(image.height, image.width) for image in images})
    except (AttributeError, TypeError):
        raise ValueError("pictures must be a list of PIL images") from None
    if len(sizes) != 1:
        raise ValueError("pictures must be a list of one size, got " + (
            ", ".join(f"{height}x{width}" for height, width in sizes) or "none"))
    check_size(sizes[0])
    return torch.stack([to_tensor(on_white(image)) for image in images])  # (B, 3, H, W)
