"""Mixture of States: understand the prompt once, then route and generate at every step.

    B batch        S context tokens    M understanding layers   Du width of the understanding tower
    K chosen       T visual tokens     N generation blocks      Dg width of the generation tower
    C channels     R registers         H, Hk heads, key-value   Dr width of the router
    L sequence     E extra tokens      Dh width of a head

In shapes of pictures H, W are pixels, in those of latents h, w are latent pixels. In edits image
tokens are among the S, and a reference picture's tokens among the T.

Time: t = 0 is data, t = 1 is noise; z_t = (1 - t) z0 + t z1 and v = z1 - z0.
"""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import full_tensor, move, replacing, replayed
from config import check_sampling, check_size, read_config, require
from dit import Generation, rope_axes
from kernels import at_least_fp32, autocast, cast, keys_behind, mix_project, mix_states, rms_norm
from pretrained.folders import (
    FolderTokenizer,
    copy_tensors,
    fill_tower,
    fill_vae,
    read_tower,
    read_vae,
)
from router import Router, routing_weights, select
from towers import Bytes, Patches, Tokenizer, Understanding
from vae import VAE


class Context(NamedTuple):
    """What the understanding tower says about B prompts."""
    inputs: torch.Tensor  # (B, S, Du) its input embeddings, for the router
    states: torch.Tensor  # (B, S, M, Du), or (B, S, M, Dg) once projected
    mask: torch.Tensor    # (B, S) True at real tokens
    projected: bool = False
    runs: list | None = None  # how many samples, how many real tokens: see `attention`


class MoS(nn.Module):
    """The three learned parts of MoS and the VAE. `forward` is the velocity G(z_t, t, R(...)).

    Raises ValueError where a folder holds another tower or VAE than the configuration says.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        c = self.config = config
        self.tokenizer = tokenizer
        self.vae = read_vae(c.vae_folder) if c.vae_folder else \
            VAE(c.vae_channels, c.vae_width, c.vae_decoder_width)
        self.understanding = read_tower(c.und_folder, c.und_images) if c.und_folder else \
            Understanding(c.und_vocabulary or len(tokenizer), c.und_width, c.und_depth, c.und_heads,
                          c.und_kv_heads, c.und_hidden, c.und_tied,
                          Patches(16, c.und_width) if c.und_images else None)
        self.check_folders()
        self.generation = Generation(c.vae_channels, c.und_width, c.gen_width, c.gen_depth,
                                     c.gen_heads, c.gen_kv_heads, c.gen_hidden, c.gen_patch,
                                     c.registers)
        self.router = Router(c.und_width, c.gen_width, c.router_width, c.router_heads, c.und_depth,
                             c.gen_depth, rope_axes(c.router_width // c.router_heads),
                             c.router_depth, c.router_inputs, c.tokenwise)
        self.vae.requires_grad_(False)
        self.understanding.requires_grad_(False)

    def check_folders(self):
        """Raise ValueError where a folder's config.json and the configuration differ."""
        c, U = self.config, self.understanding
        for folder, found, expected in (
                (c.und_folder, dict(und_width=U.norm.weight.shape[0], und_depth=len(U.blocks)),
                 dict(und_width=c.und_width, und_depth=c.und_depth)),
                (c.vae_folder, dict(vae_channels=len(self.vae.latents_mean)),
                 dict(vae_channels=c.vae_channels))):
            if found != expected:
                raise ValueError(f"{folder} has {found}, but the configuration {expected}: give "
                                 "another folder, or other settings")
        if len(self.tokenizer) > U.embedding.num_embeddings:
            raise ValueError(f"the tokenizer of {c.und_folder} has {len(self.tokenizer)} tokens, "
                             f"its tower only {U.embedding.num_embeddings}: not of one model")

    # --- the model -----------------------------------------------------------------------------

    @torch.no_grad()
    def understand(self, tokens, images=None):
        """Read prompts of token ids (B, S) once, pictures (B, 3, H, W) before them. MoS eq. (2).

        Raises ValueError for pictures where the tower reads none.
        """
        if "understanding" not in self.config.edit_inputs:            # MoS App. B.5
            images = None
        if images is not None and self.understanding.vision is None:
            raise ValueError("this understanding tower reads no pictures; edit with one that does, "
                             "or train with edit_inputs generation")
        inputs = self.understanding.embed(tokens, images)             # (B, S, Du)
        states = self.understanding(inputs)                           # (B, S, M, Du)  MoS eq. (2)
        if self.config.state_norm == "pre":
            states = rms_norm(states, states.new_ones(states.shape[-1]))
        (states,) = cast(states)  # once, instead of in every block
        front = inputs.shape[1] - tokens.shape[1]  # image tokens
        return Context(inputs, states, F.pad(tokens != Tokenizer.PAD, (front, 0), value=True))

    def project(self, context):
        """Apply Proj to all states at once: at sampling, they are mixed anew at every step.

        Proj is linear, so mixing after it is exact. It is done where the tower is; only what comes
        out goes to the generation tower's device. Raises RuntimeError where a gradient is due: in
        training M projections cost more than N.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("project() is for sampling: call it under torch.no_grad()")
        proj = self.generation.proj.weight
        states = F.linear(context.states, proj.to(context.states))    # (B, S, M, Dg)
        return context._replace(inputs=context.inputs.to(proj), states=states.to(proj),
                                mask=move(context.mask, proj.device), projected=True)

    def route(self, x, places, t, context):
        """The weights of all states for each token and block: (B, S, M, N). MoS eq. (3).

        x: patchified latents (B, T, Dg) at `places` (T, 3), t: (B,).
        """
        logits = self.router(context.inputs, context.mask, x, places, t, context.runs)
        return routing_weights(logits)                                # (B, S, M, N)  MoS eq. (3)

    def mix(self, context, index, weight):
        """What one block sees of the context: Proj(S_j^c) of MoS eq. (4), (B, S, Dg)."""
        proj = self.generation.proj
        if context.projected:
            return mix_states(context.states, index, weight, proj.bias)            # (B, S, Dg)
        return mix_project(context.states, index, weight, proj.weight, proj.bias)  # (B, S, Dg)

    def forward(self, z, t, context, uniform=None, reference=None):
        """The velocity (B, C, h, w) of latents z (B, C, h, w) at times t (B,).

        uniform: (B, S, M + 1, N) in [0, 1) makes the routing epsilon-greedy; without it the
        routing is deterministic. reference: clean latents (B, C, h, w) of pictures to be edited.
        """
        if "generation" not in self.config.edit_inputs:               # MoS App. B.5
            reference = None
        G = self.generation
        epsilon = 0.0 if uniform is None else self.config.epsilon
        x, places = G.patchify(z, reference)                          # (B, T, Dg), (T, 3)
        weights = self.route(x, places, t, context)                   # (B, S, M, N)  MoS eq. (3)
        index, weight = select(weights, self.config.k, epsilon, uniform,
                               self.config.renormalize)               # (B, S, K, N) each
        x, rope = G.add_registers(x, places)                          # (B, R+T, Dg)
        keys = keys_behind(x.shape[1], context.mask, context.runs)
        h = torch.zeros_like(x)  # what a block leaves for the next one to add
        for j, block in enumerate(G.blocks):
            c = self.mix(context, index[..., j], weight[..., j])      # (B, S, Dg)  MoS eq. (4)
            x, h = block(x, h, c, rope, *keys)                        # (B, R+T, Dg) each
        return G.unpatchify(x + h, *z.shape[2:])                      # (B, C, h, w)

    # --- rectified flow --------------------------------------------------------------------------

    def loss(self, z0, tokens, t, z1, uniform=None, context=None, images=None, reference=None):
        """Squared error of the velocity, a mean for each sample: (B,). MoS eq. (1).

        z0: latents (B, C, h, w), tokens: (B, S), t: (B,), z1: standard normal like z0, context:
        what `understand` says about the tokens, where that is known already. Edits have images
        (B, 3, H, W), the pictures that are edited, and their latents as reference.
        """
        at = t[:, None, None, None]
        z = (1 - at) * z0 + at * z1                                   # MoS sec. 3.1
        context = context or self.understand(tokens, images)
        v = self(z, t, context, uniform, reference)                   # (B, C, h, w)
        return (at_least_fp32(v) - (z1 - z0)).square().mean((1, 2, 3))        # MoS eq. (1)

    @torch.no_grad()
    def read(self, prompts, negative=None, images=None):
        """What the tower says about prompts and, where given, as many negative ones: a Context.

        images: pictures (B, 3, H, W) that stand before the prompts, and before the negative ones.
        Raises ValueError for prompts that are empty or too long, or not as many as pictures.
        """
        if isinstance(prompts, str) or not prompts or not all(p.strip() for p in prompts):
            raise ValueError("prompts must be a list of texts, none of them empty")
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"got {len(images)} pictures for {len(prompts)} prompts")
        texts = [*prompts, *[negative] * (0 if negative is None else len(prompts))]
        return self._read(texts, images)

    def _read(self, texts, images=None):
        """The Context of any texts, and of pictures (B, 3, H, W) in turn."""
        U, places = self.understanding, 0
        device = U.embedding.weight.device
        if images is not None:
            images = images.to(device).repeat(len(texts) // len(images), 1, 1, 1)
            if U.image_token is not None and "understanding" in self.config.edit_inputs:
                images, places = U.vision.fit(images)
        lengths = [len(self.tokenizer.encode(text, places)) for text in texts]
        longest, text = max(zip(lengths, texts))
        if longest - places > self.config.max_tokens:
            raise ValueError(f"prompt of {longest - places} tokens is too long, at most "
                             f"{self.config.max_tokens} are read: {text!r}")
        with autocast(device):
            tokens = self.tokenizer.batch(texts, image_tokens=places).to(device)
            context = self.understand(tokens, images)
        front = context.mask.shape[1] - longest  # image tokens that have no places in the text
        runs = [(len(list(same)), front + length) for length, same in groupby(lengths)]
        # Without a mask attention is faster; but each run is one more call in every block.
        return context._replace(runs=runs if len(runs) <= 2 else None)

    @torch.no_grad()
    def rewrite(self, prompt, temperature=0.0, seed=0):
        """A detailed caption of what the prompt asks for, by the understanding tower. MoS sec. 4.4.

        As long as the tower may read later, at most. temperature: 0 takes the likeliest words.
        """
        U, words, limit = self.understanding, self.tokenizer, self.config.max_tokens
        request, before = words.request(prompt)
        tokens = torch.tensor([request], device=U.embedding.weight.device)
        with autocast(tokens.device):
            ids = list(U.write(tokens, limit, words.stops, temperature, seed))
        while ids and len(words.encode(f"{before} {words.decode(ids)}".strip())) > limit:
            ids.pop()  # for it must be read later, together with what goes before
        return f"{before} {words.decode(ids)}".strip()

    @torch.no_grad()
    def generate(self, prompts, steps=None, guidance=None, rescale=None, schedule=None, seed=0,
                 size=None, negative="", progress=None, context=None):
        """Pictures of prompts, a list of PIL images. MoS Algorithm 2.

        seed: of the first picture; picture i uses seed + i, whatever the batch around it. Or one
        seed for each picture.
        size: side in pixels or (height, width), multiples of 32. negative: what guidance moves
        away from. progress: wraps the iterable of steps, for example tqdm. context: what `read`
        says about the prompts, and about the negative one with guidance, where that is known.
        Settings left out are the config's. Raises ValueError for what cannot be drawn.
        """
        settings = self.settings(steps=steps, guidance=guidance, rescale=rescale, schedule=schedule)
        size = check_size(self.config.size if size is None else size)
        both = settings["guidance"] != 1  # the unguided branch is needed
        context = context or self.read(prompts, negative if both else None)
        if len(context.inputs) != (1 + both) * len(prompts):
            raise ValueError(f"a context of {len(context.inputs)} texts does not fit guidance "
                             f"{settings['guidance']} and {len(prompts)} prompts: read as many "
                             "negative ones, too, but none for guidance 1")
        return self._draw(context, settings, seed, len(prompts), size, progress)

    @torch.no_grad()
    def edit(self, images, instructions, steps=None, guidance=None, rescale=None, schedule=None,
             seed=0, negative="", image_guidance=None, progress=None):
        """Pictures changed as instructions say, a list of PIL images. MoS sec. 3.4, Fig. 4.

        images: PIL images of one size, sides multiples of 32, which is also that of what comes out;
        nothing is pasted from them. Guidance moves away from the negative text with the picture;
        image_guidance, where it is not 1, moves towards what the picture does beside no picture at
        all. Guidance left out is the config's edit_guidance. The rest: as for `generate`.
        Raises ValueError for what cannot be edited.
        """
        settings = self.settings(True, steps=steps, guidance=guidance, rescale=rescale,
                                 schedule=schedule, image_guidance=image_guidance)
        pixels = to_pixels(images)                                    # (B, 3, H, W)
        three = settings["image_guidance"] != 1
        both = three or settings["guidance"] != 1
        context = self.read(instructions, negative if both else None, pixels)
        device = self.generation.registers.device
        with torch.autocast(device.type, enabled=False):              # the VAE runs in fp32
            z = self.vae.encode(pixels.to(device))                    # (B, C, h, w)
        reference = torch.cat((z, z)) if both else z       # (2*B, C, h, w), or (B, C, h, w)
        blank = self._read([negative] * len(images)) if three else None
        return self._draw(context, settings, seed, len(images), pixels.shape[2:], progress,
                          reference, blank)

    def settings(self, edit=False, **given):
        """All settings of sampling: the config's where None is given. Raises ValueError."""
        c = self.config
        own = dict(steps=c.sampling_steps, guidance=c.guidance, rescale=c.rescale,
                   schedule=c.schedule)
        if edit:
            own |= dict(guidance=c.edit_guidance, image_guidance=c.image_guidance)
        found = own | {name: value for name, value in given.items() if value is not None}
        check_sampling(**found)
        return found

    def _draw(self, context, settings, seed, number, size, progress, reference=None, blank=None):
        """So many pictures, from noise to PIL images; context, reference, blank: see `step`."""
        seeds = range(seed, seed + number) if isinstance(seed, int) else seed
        if len(seeds) != number:
            raise ValueError(f"got {len(seeds)} seeds for {number} prompts")
        c, device, (height, width) = self.config, self.generation.registers.device, size
        noise = [torch.randn(c.vae_channels, height // self.vae.factor, width // self.vae.factor,
                             generator=torch.Generator().manual_seed(s)) for s in seeds]
        z = torch.stack(noise).to(device)                             # (B, C, h, w)
        times = make_schedule(settings["steps"], settings["schedule"], c.shift)
        sigmas = torch.tensor(times, device=device)
        with autocast(device):
            step = partial(self.step, self.project(context), settings["guidance"],
                           settings["rescale"], reference=reference,
                           blank=blank and self.project(blank),
                           image_guidance=settings.get("image_guidance", 1.0))
            step = replayed(step, z, *sigmas[:2])
            for now, then in (progress or iter)(list(zip(sigmas, sigmas[1:]))):
                z = step(z, now, then)                                # (B, C, h, w)
        with torch.autocast(device.type, enabled=False):              # the VAE runs in fp32
            pixels = (self.vae.decode(z) + 1) * 127.5                 # (B, 3, H, W)
        pixels = pixels.round().byte().permute(0, 2, 3, 1).cpu()      # (B, H, W, 3)
        return [Image.fromarray(p.numpy()) for p in pixels]

    def step(self, context, guidance, rescale, z, now, then, reference=None, blank=None,
             image_guidance=1.0):
        """One Euler step of latents z (B, C, h, w) from time `now` to `then`, both scalar tensors.

        context: of B prompts, with guidance also of B negative ones behind them. In edits each has
        its reference latents; blank: with image guidance, the negative prompts without pictures.
        """
        both = len(context.inputs) > len(z)
        zz = torch.cat((z, z)) if both else z              # (2*B, C, h, w), or (B, C, h, w)
        v = at_least_fp32(self(zz, now.expand(len(zz)), context, reference=reference))
        if both:
            v_0 = None if blank is None else at_least_fp32(self(z, now.expand(len(z)), blank))
            v = guide(*v.chunk(2), guidance, rescale, v_0, image_guidance)  # (B, C, h, w)
        return z + (then - now) * v

    # --- folders ---------------------------------------------------------------------------------

    PARTS = {"vae": ("vae",), "understanding": ("understanding",), "mos": ("router", "generation")}

    def save_pretrained(self, folder, parts=tuple(PARTS), write=True):
        """Write config.json, vocab.json and a bf16 safetensors file for each part.

        What the configuration names a folder for stays there.

        Where parameters are sharded every process must call it, and all but one not `write`.
        """
        c, folder = self.config, Path(folder)
        elsewhere = {"understanding": c.und_folder, "vae": c.vae_folder}
        tensors = {part: {} for part in parts if not elsewhere.get(part)}
        for part, own in tensors.items():
            for module in self.PARTS[part]:
                for name, p in getattr(self, module).named_parameters():
                    p = full_tensor(p.detach())
                    if write:
                        own[f"{module}.{name}"] = p.bfloat16().contiguous().cpu()
                for name, p in getattr(self, module).named_buffers():
                    own[f"{module}.{name}"] = p.contiguous().cpu()  # latents' statistics: fp32
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for part, own in tensors.items():
            with replacing(folder / f"{part}.safetensors") as path:
                try:
                    save_file(own, path)
                except SafetensorError as e:
                    raise OSError(f"cannot write {part}.safetensors to {folder}: {e}") from None
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(asdict(c), indent=1))
        if not c.und_folder:
            with replacing(folder / "vocab.json") as path:
                self.tokenizer.save(path)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", tower_device=None, parts=tuple(PARTS),
                        vae_dtype=torch.float32, **changes):
        """The model of a folder that `save_pretrained` wrote, ready to sample.

        Everything is stored in bf16; on a GPU towers and router stay so, and so does a folder's
        tower anywhere; the VAE gets vae_dtype, all else fp32.
        tower_device: of the understanding tower, the others' if None. parts: what to load; the
        rest has no memory until `load` is called. changes: of the configuration.
        Raises FileNotFoundError or ValueError that names what is missing, broken or misshaped.
        """
        config = replace(read_config(folder), **changes)
        with torch.device("meta"):
            model = cls(config, read_tokenizer(config, folder))
        model.load(folder, parts, device, tower_device, vae_dtype)
        return model

    def load(self, folder, parts, device, tower_device=None, vae_dtype=torch.float32):
        """Give parts of a model that was built on the meta device memory and a folder's values."""
        for part in parts:
            tower = part == "understanding"
            on = torch.device(tower_device or device if tower else device)
            half = on.type == "cuda" or tower and self.config.und_folder
            dtype = vae_dtype if part == "vae" else torch.bfloat16 if half else torch.float32
            for name in self.PARTS[part]:
                getattr(self, name).to(dtype).to_empty(device=on)
            self.load_part(folder, part)
        self.vae.to(memory_format=torch.channels_last)  # or convolutions would reorder at each call
        self.eval()

    def load_part(self, folder, part):
        """Load one of PARTS from a folder, or from the one that the configuration names for it.

        Raises FileNotFoundError, or ValueError for a damaged file and for names or shapes that
        differ from the configuration's.
        """
        c = self.config
        if part == "understanding" and c.und_folder:
            fill_tower(self.understanding, c.und_folder)
        elif part == "vae" and c.vae_folder:
            fill_vae(self.vae, c.vae_folder)
        else:
            copy_tensors({name: p for module in self.PARTS[part] for name, p in
                          getattr(self, module).state_dict(prefix=module + ".").items()},
                         [require(Path(folder) / f"{part}.safetensors")])


def unfilled(config):
    """A model without memory, and without a look at the folders that the configuration names."""
    with torch.device("meta"):
        return MoS(replace(config, und_folder="", vae_folder=""), Bytes())


# ------------------------------------------------------------------------------------------------
# Rectified flow: times, schedules, guidance

def sample_t(n, how, shift, generator):
    """n training times in (0, 1) on the generator's device. MoS App. A, Esser et al. 2024.

    how: "logit-normal" or "mode"; both are then moved by shift.
    """
    if how == "logit-normal":
        t = torch.randn(n, generator=generator, device=generator.device).sigmoid()
    else:
        t = mode_density(torch.rand(n, generator=generator, device=generator.device))
    return shift_time(t, shift)


def mode_density(u, scale=0.8):
    """Mode sampling: uniform u to t, denser in the middle for scale > 0 (Esser et al. 2024)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def shift_time(t, shift):
    """Move times towards noise, as higher resolutions need it: more than 1 means more noise."""
    return shift * t / (1 + (shift - 1) * t)


def make_schedule(steps, schedule="uniform", shift=1.0):
    """The steps + 1 times from 1 to 0.

    "uniform" with shift, or "linear-quadratic" (Movie Gen): half of the steps cover the first
    theta = 0.025, the others grow quadratically.
    """
    if schedule == "uniform":
        return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]
    if steps == 1:
        return [1.0, 0.0]
    theta, linear = 0.025, steps // 2
    quadratic = steps - linear
    d = linear - theta * steps
    a, c = d / (linear * quadratic ** 2), d * linear / quadratic ** 2
    b = theta / linear - 2 * d / quadratic ** 2
    past = [i * theta / linear if i < linear else a * i * i + b * i + c for i in range(steps)]
    return [1 - x for x in past] + [0.0]


def guide(v_c, v_u, guidance, rescale, v_0=None, image_guidance=1.0):
    """Classifier-free guidance on all channels (Ho & Salimans), rescaled (Lin et al. 2024).

    v_c, v_u: velocities (B, C, h, w) with and without the text. rescale: 0 keeps plain guidance,
    1 gives the guided velocity the standard deviation of v_c. v_0: without text and picture, for
    v_0 + image_guidance (v_u - v_0) + guidance (v_c - v_u) of InstructPix2Pix (Brooks et al. 2023).
    """
    v = v_u + guidance * (v_c - v_u)
    if v_0 is not None:
        v = v + (image_guidance - 1) * (v_u - v_0)
    ratio = v_c.std((1, 2, 3), keepdim=True) / v.std((1, 2, 3), keepdim=True).clamp_min(1e-8)
    return (rescale * ratio + 1 - rescale) * v


# ------------------------------------------------------------------------------------------------
# Pictures and files

def to_pixels(images):
    """PIL images of one size as a tensor (B, 3, H, W) in [-1, 1].

    Raises ValueError where they differ in size, or a side is no multiple of 32.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError("pictures must be a list of one size, got " + (
            ", ".join(f"{height}x{width}" for width, height in sizes) or "none"))
    height, width = check_size(sizes[0][::-1])
    flat = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            for image in images]
    pixels = torch.stack(flat).view(-1, height, width, 3)             # (B, H, W, 3)
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1                     # (B, 3, H, W)


def read_tokenizer(config, folder):
    """The tokenizer of the configuration's tower, or else the checkpoint's own."""
    if config.und_folder:
        return FolderTokenizer(config.und_folder, config.und_chat)
    return read_vocabulary(folder)


def read_vocabulary(folder):
    """The Tokenizer of a folder. Raises FileNotFoundError, or ValueError for broken JSON."""
    path = require(Path(folder) / "vocab.json")
    try:
        return Tokenizer.load(path)
    except ValueError as e:
        raise ValueError(f"{path} is not a vocabulary: {e}") from None
