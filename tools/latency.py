"""From prompt to picture: what each stage of a large model costs, beside other models.

    python -m tools.bench latency    # the table of stages, other models, other towers and VAEs
    python -m tools.bench loading    # reading a tower of 16 GB from its folder
    python -m tools.latency draw --recipe mos_s --size 1024    # one picture, on any device

Random weights, bf16, a prompt of 128 tokens. A denoising step is the replay of a CUDA graph, as
`MoS.generate` runs it, with guidance and without; the rest is timed by the clock, launches
included. The other models are those of diffusers and transformers, eager, in the published sizes.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import save_model
from common import ROOT, CommandLine, peak_memory, pick_device, randomise, replacing, run
from config import MoSConfig, read_recipe
from kernels import autocast
from pretrained.folders import load_tower
from sample import check_writable, parse_size, progress
from tools.timing import (DEVICE, DTYPE, GIB, attempt, clock_time, euler_step, free_memory, normal,
                          random_model, replay_time)
from vae import VAE

TOKENS, STEPS, SIZES = 128, 50, (512, 1024, 2048)
LLAMA = dict(model_type="llama", vocab_size=128_256, hidden_size=4096, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, intermediate_size=14_336,
             rms_norm_eps=1e-5, rope_theta=5e5)
WAN = dict(z_dim=48, base_dim=160, decoder_base_dim=256, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
           temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
           latents_mean=[0.0] * 48, latents_std=[1.0] * 48)


# --- MoS -----------------------------------------------------------------------------------------
def with_memory(modules, measure, *arguments):
    """Return measure(*arguments), and the GiB of modules' weights and of what it needs on top."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = measure(*arguments)
    needed = torch.cuda.max_memory_allocated() - before
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    return value, (needed + weights) / GIB


@torch.no_grad()
def denoising_times(model, text, z, guidance):
    """Return the milliseconds of a denoising step, and how many of them the router takes."""
    c = model.config
    with autocast(torch.device(DEVICE)):
        context = model.project(model.read([text], "" if guidance != 1 else None))
        step = euler_step(model, context, guidance)
        inputs = z, *torch.tensor([0.6, 0.5], device=DEVICE)
        total = replay_time(step, *inputs)
        logits = torch.randn(len(context.states), TOKENS, c.und_depth, c.gen_depth, device=DEVICE)
        model.router.forward = lambda *_: logits
        try:
            return total, total - replay_time(step, *inputs)
        finally:
            del model.router.forward


@torch.no_grad()
def stages(model, size, guidance, out):
    """Return the cells of a row of the table: milliseconds and GiB, total in seconds."""
    text = "x" * (TOKENS - 1)
    z = torch.randn(1, model.config.vae_channels, size // 16, size // 16, device=DEVICE)
    encode, encode_gib = with_memory([model.understanding], clock_time, lambda: model.read([text]))
    (step, router), step_gib = with_memory([model.router, model.generation],
                                           denoising_times, model, text, z, guidance)
    decode, decode_gib = with_memory([model.vae], clock_time, lambda: model.vae.decode(z))

    def draw():
        (image,) = model.generate([text], STEPS, guidance, size=size)
        image.save(out, compress_level=1)

    return dict(encode=encode, router=router, tower=step - router, share=router / step,
                decode=decode, total=clock_time(draw, calls=2, warmup=1) / 1e3,
                encode_gib=encode_gib, step_gib=step_gib, decode_gib=decode_gib)


@torch.no_grad()
def replayed_encode(model):
    """Return the milliseconds of the tower when a CUDA graph replays it: no wait for the host."""
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device=DEVICE)
    with autocast(torch.device(DEVICE)):
        return replay_time(lambda tokens: model.understand(tokens).states, tokens)


# --- Other towers and VAEs -----------------------------------------------------------------------
def random_rival(make, dtype=DTYPE):
    """Return the model that `make` makes, on the GPU and with random weights of this type."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def transformers_encode():
    """Return the milliseconds of transformers' Llama-3.1-8B to all states of 128 tokens."""
    from transformers import LlamaConfig, LlamaModel
    model = random_rival(lambda: LlamaModel(LlamaConfig(**LLAMA)))
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device=DEVICE)
    return clock_time(lambda: model(tokens, output_hidden_states=True, use_cache=False))


def diffusers_vae():
    """Return diffusers' AutoencoderKLWan in the size of Wan 2.2, with random weights."""
    from diffusers import AutoencoderKLWan
    return random_rival(lambda: AutoencoderKLWan(**WAN, in_channels=12, out_channels=12,
                                                 scale_factor_spatial=16), torch.float32)


def vae_times():
    """Return {precision: [milliseconds of encode and decode at 1024x1024, diffusers' too, dB]}.

    dB: how close our picture in this precision is to that of IEEE fp32.
    """
    ours = VAE()
    randomise(DEVICE, ours)
    for p in ours.parameters():  # pictures with some contrast
        p.data.mul_(2.0 if p.ndim > 3 else 1.0)
    ours.set_statistics(torch.zeros(48), torch.ones(48))
    ours.to(memory_format=torch.channels_last)
    x = 2 * torch.rand(1, 3, 1024, 1024, device=DEVICE) - 1
    z = torch.randn(1, 48, 64, 64, device=DEVICE)
    theirs = attempt("diffusers' VAE", diffusers_vae)
    rows = {}
    pictures = {}
    for name, dtype, tf32 in (("fp32 with TF32", torch.float32, True),
                              ("fp32, IEEE", torch.float32, False), ("bf16", DTYPE, True)):
        torch.backends.cudnn.allow_tf32 = tf32
        ours.to(dtype)
        rows[name] = [clock_time(lambda: ours.encode(x)), clock_time(lambda: ours.decode(z))]
        pictures[name] = ours.decode(z).double()
        if theirs:
            theirs.to(dtype)
            clip = x[:, :, None].to(dtype)
            latents = z[:, :, None].to(dtype)
            rows[name] += [clock_time(lambda: theirs.encode(clip)),
                           clock_time(lambda: theirs.decode(latents))]
    for name, picture in pictures.items():
        error = (picture - pictures["fp32, IEEE"]).square().mean()
        rows[name].append((10 * torch.log10(4 / error)).item())
    return rows


# --- Other generation towers, at 1024x1024 -------------------------------------------------------
# {name: (diffusers' class, its settings, a function that returns the inputs of a forward pass)}
RIVALS = {
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, lambda: dict(
        hidden_states=normal(1, 4096, 64), encoder_hidden_states=normal(1, TOKENS, 3584),
        encoder_hidden_states_mask=torch.ones(1, TOKENS, dtype=torch.bool, device=DEVICE),
        timestep=normal(1), img_shapes=[[(1, 64, 64)]])),
    "FLUX.1-dev": ("FluxTransformer2DModel", dict(guidance_embeds=True), lambda: dict(
        hidden_states=normal(1, 4096, 64), encoder_hidden_states=normal(1, 512, 4096),
        pooled_projections=normal(1, 768), timestep=normal(1), guidance=normal(1),
        img_ids=torch.zeros(4096, 3, device=DEVICE), txt_ids=torch.zeros(512, 3, device=DEVICE))),
    "SD3.5-large": ("SD3Transformer2DModel", dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
        pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm"), lambda: dict(
        hidden_states=normal(2, 16, 128, 128), encoder_hidden_states=normal(2, 333, 4096),
        pooled_projections=normal(2, 2048), timestep=normal(2))),
    "SANA-1.5": ("SanaTransformer2DModel", dict(
        num_attention_heads=70, num_layers=60, num_cross_attention_heads=20,
        cross_attention_dim=2240, qk_norm="rms_norm_across_heads"), lambda: dict(
        hidden_states=normal(2, 32, 32, 32), encoder_hidden_states=normal(2, 300, 2304),
        timestep=normal(2))),
    "Lumina-Image-2.0": ("Lumina2Transformer2DModel", dict(
        hidden_size=2304, num_layers=26, num_attention_heads=24, num_kv_heads=8,
        axes_dim_rope=(32, 32, 32), axes_lens=(300, 512, 512), cap_feat_dim=2304), lambda: dict(
        hidden_states=normal(2, 16, 128, 128), encoder_hidden_states=normal(2, 256, 2304),
        encoder_attention_mask=torch.ones(2, 256, dtype=torch.bool, device=DEVICE),
        timestep=torch.rand(2, device=DEVICE)))}


@torch.no_grad()
def rival_step(name):
    """Return billions of parameters, all random, and milliseconds of a step with guidance.

    Guidance is a batch of two, in Qwen-Image a second forward pass, in FLUX.1-dev an input.
    """
    import diffusers
    kind, settings, make_inputs = RIVALS[name]
    model = random_rival(lambda: getattr(diffusers, kind)(**settings))
    inputs = make_inputs()

    def step():
        for _ in range(2 if name == "Qwen-Image" else 1):
            model(**inputs)

    return sum(p.numel() for p in model.parameters()) / 1e9, clock_time(step, 5)


# --- The commands --------------------------------------------------------------------------------
def bench_latency(args):
    """Run the command `latency`: a table of stages, then other models, towers and VAEs."""
    print(f"{TOKENS} tokens, {STEPS} steps, VAE fp32 with TF32; ms, total in s from prompt to PNG; "
          "GiB: weights of the stage's parts and what it needs besides\n"
          f"{'recipe':8}{'size':>6}{'guid.':>6}{'encode':>9}{'router':>8}{'tower':>8}{'share':>7}"
          f"{'decode':>9}{'total s':>8}{'encode':>8}{'step':>7}{'decode':>7}")
    line = ("{encode:9.1f}{router:8.2f}{tower:8.2f}{share:7.1%}{decode:9.1f}{total:8.2f}"
            "{encode_gib:8.1f}{step_gib:7.1f}{decode_gib:7.1f}")
    for recipe in ("mos_s", "mos_l"):
        model = random_model(MoSConfig(**read_recipe(recipe)["model"]))
        for size, guidance in itertools.product(SIZES, (5.0, 1.0)):
            name = f"{recipe:8}{size:6}{guidance:6.1f}"
            row = attempt(name, stages, model, size, guidance, args.out / "latency.png")
            if row:
                print(name + line.format(**row), flush=True)
        print(f"{recipe:8}encode, replayed as a CUDA graph: {replayed_encode(model):.1f} ms",
              flush=True)
        del model
    print("\na step at 1024x1024, guidance included, eager")
    for name in RIVALS:
        row = attempt(name, rival_step, name)
        if row:
            print(f"{name:18}{row[0]:6.1f} B {row[1]:8.1f} ms", flush=True)
    with torch.no_grad():
        encode = attempt("transformers", transformers_encode)
        print(f"\nLlama-3.1-8B, {TOKENS} tokens, by transformers: {encode} ms")
        rows = attempt("VAE", vae_times) or {}
    print(f"\nVAE at 1024x1024, ms{'encode':>11}{'decode':>11}{'diffusers':>11}{'decode':>11}  "
          "to IEEE")
    for name, (*times, decibel) in rows.items():
        print(f"{name:20}" + "".join(f"{t:11.1f}" for t in times) + f"{decibel:9.1f} dB")


def write_tower(folder):
    """Write a folder like that of Llama-3.1-8B, with random weights and three words."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = random_rival(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, eos_token_id=2)))
    model.save_pretrained(folder)
    words = dict(type="WordLevel", vocab={"a": 0, "fox": 1, "?": 2}, unk_token="?")
    tokenizer = dict(added_tokens=[], pre_tokenizer=dict(type="Whitespace"), model=words)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_checkpoint(folder):
    """Write a MoS-S with random weights whose tower and VAE stand in folders beside it."""
    write_tower(folder / "tower")
    config = MoSConfig(**read_recipe("mos_s")["model"])
    model = random_model(config, ("router", "generation", "vae"))
    (folder / "vae").mkdir()
    save_file({name: p.cpu() for name, p in model.vae.named_parameters()},
              folder / "vae" / "weights.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps(WAN))
    model.config = replace(config, und_folder=f"{folder}/tower", vae_folder=f"{folder}/vae")
    save_model(model, folder, ("mos",))


def bench_loading(args):
    """Run the command `loading`: read a tower of 16 GB twice, then let sample.py draw with it."""
    with tempfile.TemporaryDirectory(dir=args.out) as home:
        tower = Path(home) / "tower"
        write_checkpoint(Path(home))
        size = sum(path.stat().st_size for path in tower.iterdir()) / 1e9
        for which in ("first", "second"):
            begin = time.time()
            load_tower(tower, DEVICE)
            torch.cuda.synchronize()
            print(f"{size:.1f} GB, {which} time: {time.time() - begin:.1f} s", flush=True)
        free_memory()
        for flags in ("--drop-tower --vae-dtype bfloat16", "--drop-tower", ""):
            command = [sys.executable, ROOT / "sample.py", "--prompt", "a fox", "--size", "1024",
                       "--checkpoint", home, "--out", args.out / "loading.png", *flags.split()]
            begin = time.time()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds = time.time() - begin
            outcome = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
            print(f"sample.py --size 1024 {flags}: exit code {done.returncode}, {outcome}, "
                  f"{seconds:.0f} s", flush=True)


def main():
    """Run the command `draw`: noise by a model of random weights, at the cost of a real one."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("draw",), help="draw noise, at the cost of a real model")
    parser.add_argument("--recipe", default="mos_s", help="a name in recipes/, or a path")
    parser.add_argument("--prompt", nargs="+", default=["a text"], help="one text or several, "
                        "drawn in one batch; the first picture is written")
    parser.add_argument("--size", help="SIDE or HEIGHTxWIDTH in pixels; default: the recipe's")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the recipe's")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the recipe's")
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16 is faster and smaller")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="file to write")
    args = parser.parse_args()
    check_writable(args.out)
    size = parse_size(args.size) if args.size else None
    device = pick_device()
    dtype = DTYPE if device.type == "cuda" else torch.float32
    model = random_model(MoSConfig(**read_recipe(args.recipe)["model"]), device=device, dtype=dtype,
                         vae_dtype=getattr(torch, args.vae_dtype))
    begin = time.time()
    image, *_ = model.generate(args.prompt, size=size, steps=args.steps, guidance=args.guidance,
                               seed=args.seed, progress=progress)
    with replacing(args.out) as path:
        image.save(path, "PNG", compress_level=1)
    print(f"wrote {args.out}: {args.recipe} with random weights, {time.time() - begin:.1f} s")
    print(f"peak memory {peak_memory(device) / GIB:.1f} GiB")


if __name__ == "__main__":
    run(main)
