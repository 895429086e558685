"""Draw pictures from prompts, or edit one, with a trained MoS.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "three stars" "a white ring" --num 4 --out grid.png
    python sample.py --prompt "two rings" --rewrite --temperature 1
    python sample.py --image out.png --prompt "make the circle green"
"""

import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import PngImagePlugin

from checkpoint import PARTS, load_parts, read_vocabulary
from common import (ROOT, CommandLine, contact_sheet, pick_device, replacing, run, to_tensor,
                    tqdm_or_none)
from config import SCHEDULES, check_size, read_config
from data.buckets import choose_resolutions, crop_to_fill
from data.pictures import Unreadable, open_as_seen
from mos import MoS
from world.judge import judge


def read_flags(arguments):
    """Return the flags as the command line gives them."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", nargs="+", default=[], help="one text or several")
    parser.add_argument("--image", type=Path, help="picture to edit: each prompt then says what to "
                        "change in it")
    parser.add_argument("--fit", action="store_true", help="scale --image to about the area of the "
                        "model's training pictures, and crop its centre to the nearest shape")
    parser.add_argument("--negative", default="", help="text that guidance moves away from")
    parser.add_argument("--rewrite", action="store_true", help="let the understanding tower write "
                        "a detailed caption of each prompt first, print it and draw that")
    parser.add_argument("--temperature", type=float, help="of the rewriting; default 0: the "
                        "likeliest words")
    parser.add_argument("--num", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--steps", type=int, help="denoising steps; this and the next five default "
                        "to the checkpoint's own settings")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 turns it off")
    parser.add_argument("--image-guidance", type=float, help="more than 1 stays closer to --image")
    parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
    parser.add_argument("--schedule", help=" or ".join(SCHEDULES))
    parser.add_argument("--size", help="SIDE or HEIGHTxWIDTH in pixels, multiples of 32")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others "
                        "have those after it")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="file to write")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights",
                        help="folder of a trained model")
    parser.add_argument("--und-folder", help="folder of its understanding tower, if that is a "
                        "published model; this and the next default to what the checkpoint names")
    parser.add_argument("--vae-folder", help="folder of its VAE, if that is Wan 2.2's")
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="float32",
                        help="bfloat16 is faster and smaller")
    parser.add_argument("--tower-device", help="where the understanding tower runs, for example "
                        "cpu; default: with the rest")
    parser.add_argument("--drop-tower", action="store_true", help="load the rest only after the "
                        "prompts are read and the understanding tower is gone: both need not fit")
    return parser.parse_args(arguments)


def parse(arguments=None):
    """Return the flags, checked and completed. Raises ValueError for those that make no picture."""
    args = read_flags(arguments)
    if not args.prompt:
        raise ValueError("--prompt is missing: say what to draw")
    refuse(args, "with --image", args.image, ("rewrite", "drop_tower", "size"))
    refuse(args, "without --image", not args.image, ("image_guidance", "fit"))
    refuse(args, "without --rewrite", not args.rewrite, ("temperature",))
    args.temperature = args.temperature or 0.0
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature must be a finite number from 0, got {args.temperature}")
    if abs(args.seed) >= 2 ** 62:
        raise ValueError(f"--seed must lie between -2^62 and 2^62, got {args.seed}")
    try:
        torch.zeros(1, device=args.tower_device).item()
    except (RuntimeError, AssertionError):  # unknown, without memory, or not in this PyTorch
        raise ValueError(f"--tower-device must be a device of this machine, cpu or cuda, got "
                         f"{args.tower_device!r}") from None
    check_writable(args.out)
    args.size = parse_size(args.size) if args.size else None
    if args.image:
        size = read_config(args.checkpoint).size if args.fit else None
        args.picture = read_picture(args.image, size)
    return args


def refuse(args, when, condition, flags):
    """Raise ValueError where the condition holds and one of the flags is given nevertheless."""
    for flag in flags:
        if condition and getattr(args, flag) not in (None, False):
            raise ValueError(f"--{flag.replace('_', '-')} cannot be used {when}; leave it out")


def parse_size(text):
    """Return "128" or "128x256" (height x width) as a pair."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise ValueError(f"--size must be SIDE or HEIGHTxWIDTH, got {text!r}") from None
    return check_size((height, width))


def read_picture(path, fit=None):
    """Return a picture file as viewers show it. Raises ValueError for what cannot be edited.

    fit: scale and crop it to the nearest shape of about fit x fit pixels.
    """
    try:
        picture = open_as_seen(path)
    except Unreadable as e:
        raise ValueError(f"--image {path} cannot be read: {e}") from None
    if fit:
        widths, heights = np.array(picture.size)[:, None]
        sizes = choose_resolutions(widths, heights, [fit])
        return crop_to_fill(picture, *sizes[0].tolist())
    try:
        check_size(picture.size[::-1])
    except ValueError as e:
        raise ValueError(f"--image {path}: {e}; or let --fit scale and crop it") from None
    return picture


def warn_outside(model, picture):
    """Print a warning if the model knows only the small world, and the picture shows other things.
    """
    weights = ROOT / "weights"
    if model.config.und_folder or not weights.is_dir():
        return
    if not {*model.tokenizer.words} <= {*read_vocabulary(weights).words}:
        return
    picture = picture.reduce(max(1, min(picture.size) // 128))  # the judge was measured near 128
    scene, = judge(to_tensor(picture)[None])
    unknown = any(None in o for o in scene.objects) or None in scene
    if unknown or not 1 <= len(scene.objects) <= 4:
        print("warning: this checkpoint knows only one to four shapes on a plain background; "
              "--image shows something else, which it redraws as shapes", file=sys.stderr)


def check_writable(path):
    """Raise ValueError before any work is done if the picture could not be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {path}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {path.parent} must be a folder that you may write "
                         "to")


def open_model(args, device):
    """Return the model of --checkpoint; with --drop-tower only the part that reads prompts."""
    folders = {"und_folder": args.und_folder, "vae_folder": args.vae_folder}
    changes = {name: folder for name, folder in folders.items() if folder is not None}
    parts = ("understanding",) if args.drop_tower else tuple(PARTS)
    return MoS.from_pretrained(args.checkpoint, device, tower_device=args.tower_device, parts=parts,
                               vae_dtype=getattr(torch, args.vae_dtype), **changes)


def draw(model, args, prompts, settings, device):
    """Return a picture of each prompt, or --image edited as each prompt says."""
    if args.image:
        return model.edit([args.picture] * len(prompts), prompts, **settings, seed=args.seed,
                          negative=args.negative, progress=progress)
    context = model.read(prompts, args.negative if settings["guidance"] != 1 else None)
    if args.drop_tower:
        model.understanding.to("meta")
        load_parts(model, args.checkpoint, ("vae", "mos"), device,
                   vae_dtype=getattr(torch, args.vae_dtype))
    return model.generate(prompts, **settings, seed=args.seed, size=args.size, context=context,
                          progress=progress)


def progress(steps):
    """Return the steps under a progress bar, or as they are without tqdm."""
    return tqdm_or_none(iterable=steps, desc="denoising", unit="step") or steps


def save(args, images, texts, settings):
    """Write one picture, or a labelled sheet of several, with all settings in the PNG's texts."""
    rows = [images[i:i + args.num] for i in range(0, len(images), args.num)]
    picture = images[0] if len(images) == 1 else contact_sheet(rows, args.prompt)
    height, width = images[0].size[::-1]
    notes = dict(prompt=" | ".join(args.prompt), negative=args.negative, seed=args.seed, **settings,
                 size=f"{height}x{width}", checkpoint=args.checkpoint.name,
                 torch=torch.__version__)
    if args.image:
        notes["image"] = args.image.name
    if args.fit:
        notes["fit"] = True
    if args.rewrite:
        notes["rewritten"] = " | ".join(texts)
    info = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        info.add_text(key, str(value))
    with replacing(args.out) as path:
        # Three times as fast as the default, and the file is hardly larger.
        picture.save(path, "PNG", pnginfo=info, compress_level=1)
    print(f"wrote {args.out}")


def main():
    """The command."""
    args = parse()
    device = pick_device()
    model = open_model(args, device)
    settings = model.settings(bool(args.image), steps=args.steps, guidance=args.guidance,
                              rescale=args.rescale, schedule=args.schedule,
                              image_guidance=args.image_guidance)
    texts = args.prompt
    if args.rewrite:
        texts = [model.rewrite(prompt, args.temperature, args.seed) for prompt in args.prompt]
        for prompt, text in zip(args.prompt, texts):
            print(f"{prompt!r} became {text!r}")
    prompts = [text for text in texts for _ in range(args.num)]
    save(args, draw(model, args, prompts, settings, device), texts, settings)
    if args.image:  # at last, so that an error is the only line
        warn_outside(model, args.picture)
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    run(main, "ask for fewer pictures at once or a smaller --size, or try --vae-dtype bfloat16 or "
        "--drop-tower")
