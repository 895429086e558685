"""From prompt to picture: what each stage of a large model costs, beside other models.

    python -m tools.bench latency    # the table of stages, other models, other towers and VAEs
    python -m tools.bench loading    # reading a tower of 16 GB from its folder
    python -m tools.latency draw --recipe mos_s --size 1024    # one picture, random weights

Random weights, bf16, a prompt of 128 tokens. A denoising step is the replay of a CUDA graph, as
`MoS.generate` runs it, with guidance and without; the rest is timed by the clock, launches
included. The other models are those of diffusers and transformers, eager, with random weights of
the published sizes. `draw` runs on any device.
"""

import gc
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
from tools.timing import (ALL_PARTS, DEVICE, DTYPE, clock_time, euler_step, header, normal,
                          random_model, replay_time, save)
from vae import VAE

TOKENS, STEPS, SIZES = 128, 50, (512, 1024, 2048)
GIB = 2**30
# Milliseconds on an A100, MoS Fig. 7 (MoS-S, 1024x1024): the labels of the bars.
PAPER = "paper, MoS-S 1024, A100: encode 94, router 7-8, tower 121 a step, decode 16"

LLAMA = dict(model_type="llama", vocab_size=128_256, hidden_size=4096, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, intermediate_size=14_336,
             rms_norm_eps=1e-5, rope_theta=5e5)
WAN = dict(z_dim=48, base_dim=160, decoder_base_dim=256, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
           temperal_downsample=[False, True, True], is_residual=True, patch_size=2,
           latents_mean=[0.0] * 48, latents_std=[1.0] * 48)


class Peak:
    """Measures the GiB that a block of code needs, without what was on the GPU before."""

    def __enter__(self):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        self.gib = (torch.cuda.max_memory_allocated() - self.before) / GIB


def weights(*modules):
    """Return the GiB of modules' parameters."""
    return sum(p.nbytes for module in modules for p in module.parameters()) / GIB


def attempt(measure, *arguments):
    """Return what `measure` returns; where it fails print the reason to stderr, return None."""
    try:
        return measure(*arguments)
    except Exception as e:  # the others may still work
        print(f"{arguments}: {type(e).__name__}: {f'{e} '.splitlines()[0]}", file=sys.stderr,
              flush=True)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------
# MoS

@torch.no_grad()
def stages(model, size, guidance, out):
    """Return the milliseconds and GiB of each stage, and the seconds from prompt to PNG."""
    c = model.config
    text = "x" * (TOKENS - 1)
    row = dict(size=size, guidance=guidance)
    z = torch.randn(1, c.vae_channels, size // 16, size // 16, device=DEVICE)
    with Peak() as peak:
        row["encode"] = clock_time(lambda: model.read([text]))
    row["encode GiB"] = weights(model.understanding) + peak.gib
    with Peak() as peak, autocast(torch.device(DEVICE)):
        context = model.project(model.read([text], "" if guidance != 1 else None))
        step = euler_step(model, context, guidance)
        inputs = z, *torch.tensor([0.6, 0.5], device=DEVICE)
        row["step"] = replay_time(step, *inputs) / 1e3
        logits = torch.randn(len(context.states), TOKENS, c.und_depth, c.gen_depth, device=DEVICE)
        model.router.forward = lambda *_: logits
        try:
            row["router"] = row["step"] - replay_time(step, *inputs) / 1e3
        finally:
            del model.router.forward
    row["step GiB"] = weights(model.router, model.generation) + peak.gib
    with Peak() as peak:
        row["decode"] = clock_time(lambda: model.vae.decode(z))
    row["decode GiB"] = weights(model.vae) + peak.gib

    def draw_one():
        (image,) = model.generate([text], STEPS, guidance, size=size)
        image.save(out, compress_level=1)

    row["total"] = clock_time(draw_one, calls=2, warmup=1) / 1e3
    return row


@torch.no_grad()
def replayed_encode(model):
    """Return the milliseconds of the tower when a CUDA graph replays it: no wait for the host."""
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device=DEVICE)
    with autocast(torch.device(DEVICE)):
        return replay_time(lambda tokens: model.understand(tokens).states, tokens) / 1e3


def print_row(row):
    """Print a line of the table of stages."""
    print(f"{row['recipe']:8}{row['size']:6}{row['guidance']:6.1f}{row['encode']:9.1f}"
          f"{row['router']:8.2f}{row['step'] - row['router']:8.2f}"
          f"{row['router'] / row['step']:7.1%}{row['decode']:9.1f}{row['total']:8.2f}"
          f"{row['encode GiB']:8.1f}{row['step GiB']:7.1f}{row['decode GiB']:7.1f}", flush=True)


# ------------------------------------------------------------------------------------------------
# Other towers and VAEs

def transformers_encode():
    """Return the milliseconds of transformers' Llama-3.1-8B to all states of 128 tokens."""
    from transformers import LlamaConfig, LlamaModel
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**LLAMA)).to(DTYPE)
        rotary = type(model.rotary_emb)
    randomise(DEVICE, model.eval())
    model.rotary_emb = rotary(model.config).to(DEVICE)
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device=DEVICE)
    return clock_time(lambda: model(tokens, output_hidden_states=True, use_cache=False))


VAES = (("fp32 with TF32", torch.float32, True), ("fp32, IEEE", torch.float32, False),
        ("bf16", DTYPE, True))


def vae_times():
    """Return {precision: [milliseconds of encode and decode at 1024x1024, diffusers' too, dB]}.

    dB: how close our picture in this precision is to that of IEEE fp32.
    """
    ours = VAE()
    randomise(DEVICE, ours)
    for name, p in ours.named_parameters():  # pictures with some contrast
        p.data.mul_(2.0 if p.ndim > 3 else 1.0)
    ours.set_statistics(torch.zeros(48), torch.ones(48))
    ours.to(memory_format=torch.channels_last)
    x = 2 * torch.rand(1, 3, 1024, 1024, device=DEVICE) - 1
    z = torch.randn(1, 48, 64, 64, device=DEVICE)
    theirs = attempt(diffusers_vae)
    rows = {}
    pictures = {}
    for name, dtype, tf32 in VAES:
        torch.backends.cudnn.allow_tf32 = tf32
        ours.to(dtype)
        rows[name] = [clock_time(lambda: ours.encode(x)), clock_time(lambda: ours.decode(z))]
        pictures[name] = ours.decode(z).double()
        if theirs:
            theirs.to(dtype)
            clip, latents = x[:, :, None].to(dtype), z[:, :, None].to(dtype)
            rows[name] += [clock_time(lambda: theirs.encode(clip)),
                           clock_time(lambda: theirs.decode(latents))]
    torch.backends.cudnn.allow_tf32 = True
    for name, picture in pictures.items():
        error = (picture - pictures["fp32, IEEE"]).square().mean()
        rows[name].append((10 * torch.log10(4 / error)).item())
    return rows


def diffusers_vae():
    """Return diffusers' AutoencoderKLWan in the size of Wan 2.2, with random weights."""
    from diffusers import AutoencoderKLWan
    with torch.device("meta"):
        vae = AutoencoderKLWan(**WAN, in_channels=12, out_channels=12, scale_factor_spatial=16)
    randomise(DEVICE, vae.eval())
    return vae


# ------------------------------------------------------------------------------------------------
# Other generation towers, at 1024x1024. make: `random_rival`

def qwen_image(make):
    """Return Qwen-Image, 20 B, and its step: two forward passes with guidance."""
    from diffusers import QwenImageTransformer2DModel
    model = make(QwenImageTransformer2DModel)
    x, text, t = normal(1, 4096, 64), normal(1, TOKENS, 3584), normal(1)
    mask = torch.ones(1, TOKENS, dtype=torch.bool, device=DEVICE)

    def step():
        for _ in range(2):
            model(hidden_states=x, encoder_hidden_states=text, timestep=t,
                  encoder_hidden_states_mask=mask, img_shapes=[[(1, 64, 64)]])
    return model, step


def flux(make):
    """Return FLUX.1-dev, 12 B, and its step: one forward pass, since its guidance is distilled."""
    from diffusers import FluxTransformer2DModel
    model = make(FluxTransformer2DModel, guidance_embeds=True)
    x, text, pooled, t = normal(1, 4096, 64), normal(1, 512, 4096), normal(1, 768), normal(1)
    image_ids = torch.zeros(4096, 3, device=DEVICE)
    text_ids = torch.zeros(512, 3, device=DEVICE)
    return model, lambda: model(hidden_states=x, encoder_hidden_states=text, timestep=t, guidance=t,
                                pooled_projections=pooled, img_ids=image_ids, txt_ids=text_ids)


def sd3(make):
    """Return Stable Diffusion 3.5 large, 8 B, and its step: a batch of two."""
    from diffusers import SD3Transformer2DModel
    model = make(SD3Transformer2DModel, num_layers=38, num_attention_heads=38,
                 caption_projection_dim=2432, pooled_projection_dim=2048, pos_embed_max_size=192,
                 qk_norm="rms_norm")
    x, text, pooled, t = (normal(2, 16, 128, 128), normal(2, 333, 4096), normal(2, 2048), normal(2))
    return model, lambda: model(hidden_states=x, encoder_hidden_states=text,
                                pooled_projections=pooled, timestep=t)


def sana(make):
    """Return SANA-1.5, 4.8 B, linear attention at 32x, and its step: a batch of two."""
    from diffusers import SanaTransformer2DModel
    model = make(SanaTransformer2DModel, num_attention_heads=70, num_layers=60,
                 num_cross_attention_heads=20, cross_attention_dim=2240,
                 qk_norm="rms_norm_across_heads")
    x, text, t = normal(2, 32, 32, 32), normal(2, 300, 2304), normal(2)
    return model, lambda: model(hidden_states=x, encoder_hidden_states=text, timestep=t)


def lumina(make):
    """Return Lumina-Image-2.0, 2.6 B, and its step: a batch of two."""
    from diffusers import Lumina2Transformer2DModel
    model = make(Lumina2Transformer2DModel, hidden_size=2304, num_layers=26, num_attention_heads=24,
                 num_kv_heads=8, axes_dim_rope=(32, 32, 32), axes_lens=(300, 512, 512),
                 cap_feat_dim=2304)
    x, text, t = normal(2, 16, 128, 128), normal(2, 256, 2304), torch.rand(2, device=DEVICE)
    mask = torch.ones(2, 256, dtype=torch.bool, device=DEVICE)
    return model, lambda: model(hidden_states=x, timestep=t, encoder_hidden_states=text,
                                encoder_attention_mask=mask)


RIVALS = {"Qwen-Image": qwen_image, "FLUX.1-dev": flux, "SD3.5-large": sd3, "SANA-1.5": sana,
          "Lumina-Image-2.0": lumina}


def random_rival(kind, **settings):
    """Return a model of diffusers with random weights, made on the GPU."""
    with torch.device(DEVICE):
        torch.set_default_dtype(DTYPE)
        try:
            model = kind(**settings)
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval()


@torch.no_grad()
def rival_step(name):
    """Return billions of parameters, milliseconds of a step at 1024x1024, and GiB of both."""
    with Peak() as peak:
        model, step = RIVALS[name](random_rival)
        count = sum(p.numel() for p in model.parameters()) / 1e9
        milliseconds = clock_time(step, 5)
        gib = (torch.cuda.max_memory_allocated() - peak.before) / GIB
        return dict(parameters=count, step=milliseconds, gib=gib)


# ------------------------------------------------------------------------------------------------
# The commands

def bench_latency(folder):
    """Run the command `latency`: a table of stages, then other models, towers and VAEs."""
    result = header() | dict(rows=[], rivals={})
    print(f"{TOKENS} tokens, {STEPS} steps, VAE fp32 with TF32; ms, total in s from prompt to PNG; "
          f"GiB: weights of the stage's parts and what it needs besides\n{PAPER}\n"
          f"{'recipe':8}{'size':>6}{'guid.':>6}{'encode':>9}{'router':>8}{'tower':>8}{'share':>7}"
          f"{'decode':>9}{'total s':>8}{'encode':>8}{'step':>7}{'decode':>7}")
    for recipe in ("mos_s", "mos_l"):
        model = random_model(MoSConfig(**read_recipe(recipe)["model"]))
        result[f"{recipe} encode, replayed"] = replayed_encode(model)
        for size in SIZES:
            for guidance in (5.0, 1.0):
                row = attempt(stages, model, size, guidance, folder / "latency.png")
                if row:
                    row["recipe"] = recipe
                    result["rows"].append(row)
                    print_row(row)
        print(f"{recipe:8}encode, replayed as a CUDA graph: "
              f"{result[f'{recipe} encode, replayed']:.1f} ms", flush=True)
        del model
        save(result, folder / "latency.json")
    print("\na step at 1024x1024, guidance included, eager")
    for name in RIVALS:
        row = result["rivals"][name] = attempt(rival_step, name)
        if row:
            print(f"{name:18}{row['parameters']:6.1f} B {row['step']:8.1f} ms "
                  f"{row['gib']:6.1f} GiB", flush=True)
    with torch.no_grad():
        result["transformers"] = attempt(transformers_encode)
        print(f"\nLlama-3.1-8B, {TOKENS} tokens, by transformers: {result['transformers']} ms")
        result["vae"] = attempt(vae_times) or {}
    print(f"\nVAE at 1024x1024, ms{'encode':>11}{'decode':>11}{'diffusers':>11}{'decode':>11}  "
          "to IEEE")
    for name, (*times, decibel) in result["vae"].items():
        print(f"{name:20}" + "".join(f"{t:11.1f}" for t in times) + f"{decibel:9.1f} dB")
    save(result, folder / "latency.json")


def write_tower(folder):
    """Write a folder like that of Llama-3.1-8B, in which all weights are the same."""
    folder.mkdir(parents=True)
    width, hidden = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    sizes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (1024, width),
             "self_attn.v_proj": (1024, width), "self_attn.o_proj": (width, width),
             "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
             "mlp.down_proj": (width, hidden), "input_layernorm": (width,),
             "post_attention_layernorm": (width,)}
    values = {name: torch.full(size, 0.01, dtype=DTYPE) for name, size in sizes.items()}
    for i in range(LLAMA["num_hidden_layers"]):
        save_file({f"model.layers.{i}.{name}.weight": v for name, v in values.items()},
                  folder / f"model-{i:05}.safetensors")
    words = torch.full((LLAMA["vocab_size"], width), 0.01, dtype=DTYPE)
    save_file({"model.embed_tokens.weight": words, "lm_head.weight": words.clone(),
               "model.norm.weight": words[0].clone()}, folder / "model-words.safetensors")
    save(LLAMA | dict(eos_token_id=2), folder / "config.json")
    save(dict(added_tokens=[], pre_tokenizer=dict(type="Whitespace"), model=dict(
        type="WordLevel", vocab={"a": 0, "fox": 1, "?": 2}, unk_token="?")),
        folder / "tokenizer.json")


def write_checkpoint(folder):
    """Write a MoS-S with random weights whose tower and VAE stand in folders beside it."""
    write_tower(folder / "tower")
    config = MoSConfig(**read_recipe("mos_s")["model"])
    model = random_model(config, ("router", "generation", "vae"))
    (folder / "vae").mkdir()
    save_file({name: p.cpu() for name, p in model.vae.named_parameters()},
              folder / "vae" / "weights.safetensors")
    save(WAN, folder / "vae" / "config.json")
    model.config = replace(config, und_folder=str(folder / "tower"),
                           vae_folder=str(folder / "vae"))
    save_model(model, folder, ("mos",))


def bench_loading(folder):
    """Run the command `loading`: read a tower of 16 GB twice, then let sample.py draw with it."""
    result = header()
    with tempfile.TemporaryDirectory(dir=folder) as home:
        checkpoint = Path(home)
        write_checkpoint(checkpoint)
        size = sum(path.stat().st_size for path in (checkpoint / "tower").iterdir()) / 1e9
        for which in ("first", "second"):
            begin = time.time()
            tower = load_tower(checkpoint / "tower", DEVICE)
            torch.cuda.synchronize()
            result[which] = time.time() - begin
            print(f"{size:.1f} GB, {which} time: {result[which]:.1f} s", flush=True)
            del tower
        torch.cuda.empty_cache()
        for flags in (["--drop-tower", "--vae-dtype", "bfloat16"], ["--drop-tower"], []):
            command = [sys.executable, str(ROOT / "sample.py"), "--prompt",
                       "a fox", "--checkpoint", str(checkpoint), "--size", "1024", "--out",
                       str(folder / "loading.png"), *flags]
            begin = time.time()
            done = subprocess.run(command, capture_output=True, text=True)
            outcome = f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()}"[-200:]
            if done.returncode == 0:
                outcome = outcome.splitlines()[-1]
            result[" ".join(flags)] = outcome
            print(f"sample.py --size 1024 {' '.join(flags)}: {outcome}, "
                  f"{time.time() - begin:.0f} s", flush=True)
    save(result, folder / "loading.json")


# ------------------------------------------------------------------------------------------------
# One picture

def draw(config, out, prompts, vae_dtype=torch.float32, **settings):
    """Write a picture by a random model of this configuration: noise, at the cost of a real one.

    settings: of `MoS.generate`. Returns the seconds from prompts to the written file.
    """
    device = pick_device()
    dtype = DTYPE if device.type == "cuda" else torch.float32
    model = random_model(config, ALL_PARTS, device, dtype, vae_dtype)
    begin = time.time()
    image, *_ = model.generate(prompts, progress=progress, **settings)
    with replacing(out) as path:
        image.save(path, "PNG", compress_level=1)
    return time.time() - begin


def main():
    """Run the command `draw`."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("draw",), help="draw noise with random weights, to see "
                        "what a model costs; the tables are printed by tools.bench")
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
    config = MoSConfig(**read_recipe(args.recipe)["model"])
    seconds = draw(config, args.out, args.prompt, getattr(torch, args.vae_dtype), size=size,
                   steps=args.steps, guidance=args.guidance, seed=args.seed)
    print(f"wrote {args.out}: {args.recipe} with random weights, {seconds:.1f} s")
    print(f"peak memory {peak_memory(pick_device()) / GIB:.1f} GiB")


if __name__ == "__main__":
    run(main)
