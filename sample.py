"""Draw pictures from prompts with a trained MoS.

    python sample.py --prompt "a red circle above a blue square"
    python sample.py --prompt "three stars" "a white ring" --num 4 --out grid.png
"""

import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from common import CommandLine, pick_device, replacing, run, tqdm_or_none
from mos import SCHEDULES, MoS, check_sampling, check_size


def parse_size(text):
    """"128" or "128x256" (height x width) as a pair."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise ValueError(f"--size must be SIDE or HEIGHTxWIDTH, got {text!r}") from None
    return check_size((height, width))


def label_grid(rows, labels):
    """Rows of pictures under each other, each under its prompt."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (width * len(rows[0]), (height + 32) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, label) in enumerate(zip(rows, labels)):
        lines, line = [], ""
        for word in label.split():
            if line and draw.textlength(f"{line} {word}", font) > sheet.width - 8:
                lines, line = lines + [line], word
            else:
                line = f"{line} {word}".strip()
        text = "\n".join((lines + [line])[:2])  # two lines at most; the metadata has it all
        draw.multiline_text((4, r * (height + 32) + 1), text, "black", font, spacing=2)
        for i, image in enumerate(row):
            sheet.paste(image, (i * width, r * (height + 32) + 32))
    return sheet


def check_writable(out):
    """Raise before any work is done if the picture could not be written."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"cannot write {out}: {out.parent} must be a folder that you may write to")


def progress(steps):
    """The steps under a progress bar; plain silence without tqdm."""
    return tqdm_or_none(iterable=steps, desc="denoising", unit="step") or steps


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", nargs="+", required=True, help="one text or several")
    parser.add_argument("--negative", default="", help="what guidance moves away from")
    parser.add_argument("--num", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--steps", type=int, help="denoising steps; this and the next four default "
                        "to the checkpoint's own settings")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 turns it off")
    parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
    parser.add_argument("--schedule", help=" or ".join(SCHEDULES))
    parser.add_argument("--size", help="SIDE or HEIGHTxWIDTH in pixels, multiples of 32")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, then one more")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="file to write")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "weights",
                        help="folder of a trained model")
    args = parser.parse_args()
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if abs(args.seed) >= 2 ** 62:
        raise ValueError(f"--seed is too large: {args.seed}")
    check_writable(args.out)
    size = parse_size(args.size) if args.size else None
    model = MoS.from_pretrained(args.checkpoint, pick_device())
    c = model.config
    settings = {name: default if given is None else given for name, given, default in (
        ("steps", args.steps, c.sampling_steps), ("guidance", args.guidance, c.guidance),
        ("rescale", args.rescale, c.rescale), ("schedule", args.schedule, c.schedule))}
    check_sampling(**settings)
    prompts = [p for p in args.prompt for _ in range(args.num)]
    images = model.generate(prompts, **settings, seed=args.seed, size=size, negative=args.negative,
                            progress=progress)
    rows = [images[i:i + args.num] for i in range(0, len(images), args.num)]
    picture = images[0] if len(images) == 1 else label_grid(rows, args.prompt)
    info = PngImagePlugin.PngInfo()
    told = dict(prompt=" | ".join(args.prompt), negative=args.negative, seed=args.seed, **settings,
                size="x".join(map(str, size or (c.size, c.size))), checkpoint=args.checkpoint.name,
                torch=torch.__version__)
    for key, value in told.items():
        info.add_text(key, str(value))
    with replacing(args.out) as path:
        picture.save(path, "PNG", pnginfo=info)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
