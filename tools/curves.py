"""Draw the curves of a training run, and compare them with those of other seeds.

    python -m tools.curves runs/laptop                                # with three kept seeds
    python -m tools.curves runs/0 runs/1 runs/2 --save kept.csv       # keep runs for --beside

Every column of a run's log is drawn into a picture beside the log, for example runs/x/image.png.
The most important columns are compared with the kept runs, in a table and in a second picture.
"""

import csv
from pathlib import Path

import numpy as np

from common import ROOT, CommandLine, replacing, run
from config import STAGES

COLUMNS = ("loss", "val_loss", "score", "grad_norm")  # those that are kept and compared
SEEDS = ROOT / "assets" / "laptop.csv"  # stage image of recipe laptop, three seeds
GROUPS = {"loss_t": "loss by t", "val_t": "val_loss by t", "edit_t": "val_edit by t",
          "entropy_": "entropy by block", "score_": "score by task", "edits_": "edits by type",
          "share_": "share by source"}  # beginnings of columns that share a panel


def read(path):
    """Return {run: {column: {step: value}}} of a CSV; without a column "run" it holds one run."""
    if not path.is_file():
        raise ValueError(f"no {path.name} in {path.parent}: expected what train.py or --save wrote")
    runs = {}
    try:
        for row in csv.DictReader(path.read_text().splitlines()):
            curves = runs.setdefault(row.pop("run", str(path.parent)), {})
            step = int(row.pop("step"))
            for name, text in row.items():
                if text:
                    curves.setdefault(name, {})[step] = float(text)
    except (KeyError, TypeError, ValueError, csv.Error):
        runs = {}
    if not any(runs.values()):
        raise ValueError(f"{path} is no log of train.py")
    return runs


def save(runs, path):
    """Write the columns to be compared of several runs into one CSV."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", *COLUMNS))
        for name, curves in runs.items():
            kept = [curves.get(column, {}) for column in COLUMNS]
            for step in sorted({step for curve in kept for step in curve}):
                writer.writerow((name, step, *(curve.get(step, "") for curve in kept)))


def print_table(column, runs, steps):
    """Print one column of all runs, at those of the steps that any of them has."""
    curves = {name: curves.get(column, {}) for name, curves in runs.items()}
    steps = [step for step in steps if any(step in curve for curve in curves.values())]
    if steps:
        width = max(map(len, [column, *curves])) + 2
        print(f"\n{column:{width}}" + "".join(f"{step:>9}" for step in steps))
        for name, curve in curves.items():
            print(f"{name:{width}}" + "".join(
                f"{curve[step]:9.4f}" if step in curve else f"{'-':>9}" for step in steps))


def group(curves):
    """Return the panels of one run, {title: {label: curve}}, and its table of layers chosen.

    The table {(block, layer): share} holds the last value of each column usage_BLOCK_LAYER.
    """
    panels = {}
    usage = {}
    for name, curve in curves.items():
        if name.startswith("usage_"):
            block, layer = map(int, name.split("_")[1:])
            usage[block, layer] = list(curve.values())[-1]
            continue
        prefix = next((prefix for prefix in GROUPS if name.startswith(prefix)), name)
        panels.setdefault(GROUPS.get(prefix, name), {})[name.removeprefix(prefix)] = curve
    return panels, usage


def draw(path, panels, across, grey=(), usage=None):
    """Draw panels {title: {label: {step: value}}} into a PNG, `across` of them in a row.

    grey: labels of the curves to compare with. usage: see `group`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is missing")  # the numbers must do
        return
    rows = -(-(len(panels) + bool(usage)) // across)
    figure = Figure(figsize=(3.75 * across, 3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, across, squeeze=False).flat)
    for title, curves in panels.items():
        axis = axes.pop(0)
        for label, curve in curves.items():
            style = dict(color="0.6", lw=1, zorder=1) if label in grey else dict(lw=1.5)
            marks = ".-" if len(curve) < 30 else "-"
            axis.plot(list(curve), list(curve.values()), marks, label=label, **style)
        axis.set(title=title, xlabel="step", yscale="log" if "loss" in title else "linear")
        if len(curves) > 1:
            axis.legend(fontsize=6, ncols=1 + (len(curves) > 4))
    if usage:
        blocks, layers = 1 + np.max(list(usage), 0)
        shares = np.reshape([usage[key] for key in sorted(usage)], (blocks, layers))
        axis = axes.pop(0)
        axis.imshow(shares, vmin=0, extent=(0.5, layers + 0.5, blocks + 0.5, 0.5))
        axis.set(title="layers chosen", xlabel="layer", ylabel="block")
    for axis in axes:
        axis.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    print(f"wrote {path}")


def parse():
    """Return the flags. Raises ValueError for a file that cannot be written."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--stage", default="image", choices=STAGES, help="stage whose log is read")
    parser.add_argument("--beside", type=Path, help="a CSV that --save wrote, to compare with; "
                        "for stage image three seeds of recipe laptop are the default")
    parser.add_argument("--save", type=Path, help="write the runs into this CSV, and draw nothing")
    parser.add_argument("--steps", type=int, nargs="+", help="columns of the table",
                        default=(50, 500, 1500, 3000, 4500, 6000))
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the comparison")
    args = parser.parse_args()
    for path, suffix in ((args.save, ".csv"), (args.out, ".png")):
        if path and (path.suffix != suffix or path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"cannot write {path}: expected a {suffix} file in an existing folder")
    args.logs = [folder / f"{args.stage}.csv" for folder in args.runs]
    if args.save and args.save.resolve() in [log.resolve() for log in args.logs]:
        raise ValueError(f"--save {args.save} is the log of a run; choose another name")
    return args


def main():
    """Run the command."""
    args = parse()
    runs = {str(log.parent): list(read(log).values())[-1] for log in args.logs}
    if args.save:
        save(runs, args.save)
        return
    others = {}
    if args.beside or args.stage == "image":
        others = read(args.beside or SEEDS)
    mark = " (yours)" if runs.keys() & others.keys() else ""
    both = {name + mark: curves for name, curves in runs.items()} | others
    steps = {step for curves in both.values() for curve in curves.values() for step in curve}
    if not steps & set(args.steps):
        raise ValueError(f"--steps: nothing was logged at {', '.join(map(str, args.steps))}; "
                         f"expected steps such as {', '.join(map(str, sorted(steps)[:3]))}")
    for column in COLUMNS:
        print_table(column, both, args.steps)
    print()
    for folder, curves in runs.items():
        panels, usage = group(curves)
        draw(Path(folder, f"{args.stage}.png"), panels, across=5, usage=usage)
    if len(both) > 1:
        panels = {column: {name: curves[column] for name, curves in both.items()
                           if column in curves} for column in COLUMNS}
        draw(args.out, panels, across=4, grey=others)


if __name__ == "__main__":
    run(main)
