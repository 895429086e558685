"""Is my run right? Its curves over those of other seeds, as a plot and as a table.

    python curves.py runs/laptop                                  # over three of ours
    python curves.py "seed 0" "seed 1" "seed 2" --save kept.csv   # keep runs for --beside
"""

import csv
from pathlib import Path

from common import ROOT, CommandLine, replacing, run

COLUMNS = ("loss", "val_loss", "score", "grad_norm")
OURS = ROOT / "assets" / "laptop.csv"  # README's laptop recipe, three seeds


def read(path):
    """The curves of a CSV: {run: {column: {step: value}}}; without a column "run" it is one run's.

    Raises OSError, or ValueError if the file is no such log.
    """
    runs = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                curves = runs.setdefault(row.get("run", str(path.parent)), {})
                for name in COLUMNS:
                    if row.get(name):
                        curves.setdefault(name, {})[int(row["step"])] = float(row[name])
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}: expected what train.py or --save wrote"
                         ) from None
    except (KeyError, TypeError, ValueError, csv.Error):
        runs = {}
    if not any(runs.values()):
        raise ValueError(f"{path} is no log of train.py")
    return runs


def save(runs, path):
    """Write several runs into one CSV, their names its first column."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", *COLUMNS))
        for name, curves in runs.items():
            for step in sorted({step for curve in curves.values() for step in curve}):
                writer.writerow((name, step, *(curves.get(c, {}).get(step, "") for c in COLUMNS)))


def show(column, runs, steps):
    """Print one column of runs at those of the steps that any of them has."""
    curves = {name: curves.get(column, {}) for name, curves in runs.items()}
    steps = [step for step in steps if any(step in curve for curve in curves.values())]
    if steps:
        width = max(map(len, [column, *curves])) + 2
        print(f"\n{column:{width}}" + "".join(f"{step:>9}" for step in steps))
        for name, curve in curves.items():
            print(f"{name:{width}}" + "".join(
                f"{curve[step]:9.4f}" if step in curve else f"{'-':>9}" for step in steps))


def plot(own, others, path):
    """Draw all columns, own runs in colours over the others in grey, and say where.

    Without matplotlib the table has to do.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(15, 3.4))
    for axis, column in zip(axes, COLUMNS):
        for runs, style in ((others, dict(color="0.6", lw=1)), (own, dict(lw=1.5))):
            for name, curves in runs.items():
                curve = curves.get(column, {})
                axis.plot(list(curve), list(curve.values()), ".-" if len(curve) < 30 else "-",
                          label=name, **style)
        axis.set(title=column, xlabel="step", yscale="log" if "loss" in column else "linear")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
    print(f"\n{path}")


def parse():
    """The command line, checked."""
    parser = CommandLine(__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--stage", default="image", choices=("image", "edit"), help="stage whose "
                        "log is read")
    parser.add_argument("--beside", type=Path, default=OURS, help="a CSV that --save wrote")
    parser.add_argument("--save", type=Path, help="write the runs into this CSV, and draw nothing")
    parser.add_argument("--steps", type=int, nargs="+", help="of the table",
                        default=(50, 500, 1500, 3000, 4500, 6000))
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the plot")
    args = parser.parse_args()
    for path, suffix in ((args.save, ".csv"), (args.out, ".png")):
        if path and (path.suffix != suffix or path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"cannot write {path}: expected a file {suffix} in a folder that is "
                             "there")
    for folder in args.runs:
        log = folder / f"{args.stage}.csv"
        if args.save and args.save.exists() and log.exists() and args.save.samefile(log):
            raise ValueError(f"--save {args.save} is the log of a run; choose another name")
    return args


def main():
    """The command."""
    args = parse()
    own = {f"{folder}": curves for folder in args.runs
           for curves in read(folder / f"{args.stage}.csv").values()}
    if args.save:
        save(own, args.save)
        return
    others = read(args.beside)
    if own.keys() & others.keys():
        own = {f"{name} (yours)": curves for name, curves in own.items()}
    logged = {step for curves in (own | others).values() for one in curves.values() for step in one}
    if not logged & set(args.steps):
        raise ValueError(f"--steps: nothing was logged at {', '.join(map(str, args.steps))}; "
                         f"expected steps such as {', '.join(map(str, sorted(logged)[:3]))}")
    for column in COLUMNS:
        show(column, own | others, args.steps)
    plot(own, others, args.out)


if __name__ == "__main__":
    run(main)
