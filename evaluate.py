"""Score a checkpoint on the small world: GenEval's six tasks, the VAE, and the tower's answers.

    python evaluate.py weights                      # six tasks, seen and held-out combinations
    python evaluate.py weights --what vae           # does the judge see through the VAE?
    python evaluate.py weights --what understanding # questions about pictures, exact match
    python evaluate.py --what judge                 # the judge on its own renders
"""

import json
import math
import random
from pathlib import Path

import torch

import shapes
from common import CommandLine, pick_device, replacing, run
from data import Collate, Shapes
from mos import MoS

GENEVAL_COUNTS = dict(zip(shapes.TASKS, (80, 99, 80, 94, 100, 100)))


def draw_prompts(model, prompts, seeds, batch, **settings):
    """Pictures (P, 3, H, W) in [-1, 1] of prompts, each with its own seed."""
    pictures = []
    for i in range(0, len(prompts), batch):
        texts = [p.text for p in prompts[i:i + batch]]
        pictures += [to_tensor(image) for image in
                     model.generate(texts, seed=seeds[i:i + batch], **settings)]
    return torch.stack(pictures)


def to_tensor(image):
    """A PIL image as (3, H, W) in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def judge_in_parts(pictures, size=64):
    """shapes.judge over many pictures, `size` at a time."""
    return [scene for part in pictures.split(size) for scene in shapes.judge(part)]


def score_tasks(model, prompts=None, pictures=4, seed=0, batch=64, held=(False, True),
                tasks=shapes.TASKS, **settings):
    """The six-task score: {"task": {"seen": [passed, drawn, prompts], "held-out": ...}}.

    prompts: number for each task and split, GenEval's own counts if None; pictures: for each
    prompt; batch: drawn at once; held: which splits, False is seen and True held out; settings:
    as for `MoS.generate`. A picture passes if the judge finds exactly what the prompt asks for.
    "single object" has nothing to hold out.
    """
    table = {}
    for task in tasks:
        table[task] = {}
        for split in held:
            if split and task == "single object":
                continue
            number = prompts or GENEVAL_COUNTS[task]
            wanted = [p for p in shapes.benchmark(task, number, seed, split)
                      for _ in range(pictures)]
            seeds = [seed + i for i in range(len(wanted))]
            drawn = draw_prompts(model, wanted, seeds, batch, **settings)
            passed = sum(map(shapes.satisfies, wanted, judge_in_parts(drawn)))
            table[task]["held-out" if split else "seen"] = [
                passed, len(wanted), len({p.text for p in wanted})]
    return table


def overall(table, split):
    """Mean of the tasks' scores of one split, GenEval's way."""
    scores = [row[split][0] / row[split][1] for row in table.values() if split in row]
    return sum(scores) / len(scores)


def print_tasks(table):
    """The table with binomial standard errors."""
    splits = [s for s in ("seen", "held-out") if any(s in row for row in table.values())]
    print(f"{'task':16}" + "".join(f"{s:>16} {'prompts':>8}" for s in splits))
    for task, row in table.items():
        cells = ""
        for split in splits:
            if split in row:
                passed, drawn, distinct = row[split]
                p = passed / drawn
                cells += f"{p:8.3f} ± {math.sqrt(p * (1 - p) / drawn):.3f} {distinct:8d}"
            else:
                cells += f"{'-':>16} {'-':>8}"
        print(f"{task:16}{cells}")
    print(f"{'overall':16}" + "".join(f"{overall(table, s):8.3f}{'':17}" for s in splits).rstrip())


def same_scene(truth, seen, unit, pixels=2.0):
    """Whether a judged scene equals the true one: every object, each within `pixels`."""
    if len(truth.objects) != len(seen.objects) or truth.background != seen.background:
        return False
    left = list(seen.objects)
    for o in truth.objects:
        near = min(left, key=lambda p: math.hypot(p.x - o.x, p.y - o.y))
        if near[:3] != o[:3] or math.hypot(near.x - o.x, near.y - o.y) * unit > pixels:
            return False
        left.remove(near)
    return True


@torch.no_grad()
def score_judge(number, height=128, width=128, vae=None, seed=0, split="any"):
    """How many of `number` fresh renders the judge reads back without a mistake, and the PSNR.

    With a VAE the judge sees the pictures after encoding and decoding.
    """
    unit, right, error = min(height, width), 0, 0.0
    device = "cpu" if vae is None else next(vae.parameters()).device
    for start in range(0, number, 50):
        scenes = []
        for i in range(start, min(start + 50, number)):
            rng = random.Random(f"judge {seed} {i}")
            task = shapes.draw_task(rng)
            scenes.append(shapes.draw_scene(rng, task, split, width / unit, height / unit))
        true = shapes.render(shapes.pack(scenes), height, width, device)
        seen = true if vae is None else vae.decode(vae.encode(true))
        error += (seen - true).square().mean((1, 2, 3)).sum().item()
        rounded = ((seen.cpu() + 1) * 127.5).round() / 127.5 - 1
        right += sum(same_scene(a, b, unit) for a, b in zip(scenes, shapes.judge(rounded)))
    psnr = 10 * math.log10(4 * number / error) if error else math.inf
    return right, psnr


@torch.no_grad()
def score_understanding(model, number, split="val", seed=0, batch=100):
    """How many of `number` questions about fresh pictures the tower answers word for word."""
    dataset = Shapes(model.config.size, seed, split)
    device = model.understanding.embedding.weight.device
    collate, right = Collate("understand", model.tokenizer), 0
    for start in range(0, 2 * number, 2 * batch):  # every other item of a batch is a question
        items = [dataset[i] for i in range(start, min(start + 2 * batch, 2 * number))]
        pictures, _, _, tokens, target = (a[1::2] for a in
                                         collate(items, model.config.max_tokens))
        _, metrics = model.understanding.loss(tokens.to(device), target.to(device),
                                              dataset.draw(pictures, device))
        right += round(metrics["text_accuracy"].item() * len(tokens))
    return right


def main():
    """The command."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", nargs="?", default=str(Path(__file__).parent / "weights"),
                        help="folder of a trained model")
    parser.add_argument("--what", choices=("tasks", "vae", "understanding", "judge"),
                        default="tasks", help="what to score")
    parser.add_argument("--tasks", nargs="+", choices=shapes.TASKS, default=shapes.TASKS,
                        help="tasks to score")
    parser.add_argument("--number", type=int, help="prompts for each task (GenEval's counts if not "
                        "given), pictures or questions otherwise (2000)")
    parser.add_argument("--pictures", type=int, default=4, help="pictures for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, scenes and noise")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at once")
    parser.add_argument("--steps", type=int, help="sampling steps; this and the next three default "
                        "to the checkpoint's own settings")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--rescale", type=float, help="guidance rescale")
    parser.add_argument("--schedule", help="uniform or linear-quadratic")
    parser.add_argument("--json", help="file for the numbers of --what tasks")
    args = parser.parse_args()
    for name in ("number", "pictures", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise ValueError(f"--json: cannot write {args.json}")
    number, device = args.number or 2000, pick_device()
    if args.what == "judge":
        for height, width in ((128, 128), (96, 96), (160, 160), (256, 256), (128, 256)):
            fresh = number if height == width == 128 else -(-number // 5)
            right, _ = score_judge(fresh, height, width, seed=args.seed)
            print(f"judge on renders {height}x{width}: {right}/{fresh} right")
        return
    model = MoS.from_pretrained(args.checkpoint, device)
    if args.what == "vae":
        right, psnr = score_judge(number, vae=model.vae, seed=args.seed)
        print(f"after the VAE: {psnr:.2f} dB, judge {right}/{number} right ({right / number:.4f})")
    elif args.what == "understanding":
        for split in ("val", "held"):
            right = score_understanding(model, number, split, args.seed)
            print(f"questions, {split} scenes: {right}/{number} right ({right / number:.4f})")
    else:
        settings = {name: getattr(args, name)
                    for name in ("steps", "guidance", "rescale", "schedule")}
        table = score_tasks(model, args.number, args.pictures, args.seed, args.batch,
                            tasks=args.tasks, **settings)
        print_tasks(table)
        if args.json:
            with replacing(args.json) as path:
                path.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    run(main)
