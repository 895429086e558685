"""List the files and functions of this repository that one training step runs, and one picture.

    python -m tools.trace

What a reader has to read: first a step of stage image on a CPU, not the first one of a run, then a
call of `MoS.generate`, from the prompt to the picture.
"""

import contextlib
import io
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import train
from common import ROOT, CommandLine, World, run
from config import plan, read_recipe
from mos import MoS

INNER = r"(\.<locals>)?\.<(lambda|\w+comp|genexpr)>"


def trace(call):
    """Return {file: {function: lines}} of what a call runs, in the order of the first calls.

    file: a path in the repository, function: its qualified name, lines: the set of the numbers of
    the lines that were executed. Lambdas and comprehensions count to the function around them.
    """
    files = {}

    def record(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT) or "site-packages" in path.parts:
            return None
        function = re.sub(INNER, "", frame.f_code.co_qualname)
        lines = files.setdefault(str(path.relative_to(ROOT)), {}).setdefault(function, set())
        if event == "line":
            lines.add(frame.f_lineno)
        return record

    before = sys.gettrace()
    sys.settrace(record)
    try:
        call()
    finally:
        sys.settrace(before)
    return files


def totals(files):
    """Return the numbers of files, functions and lines that `trace` found."""
    functions = [lines for functions in files.values() for lines in functions.values()]
    return len(files), len(functions), sum(map(len, functions))


def training_step():
    """Trace the second step of a small run of stage image."""
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(stage="image", init=str(ROOT / "weights"), out=folder, tasks=("colours",),
                     scenes=16, batch=4, steps=2)
        (c, values), = plan(flags, read_recipe("laptop"))
        trainer = train.prepare(c, values, flags, World(0, 1, torch.device("cpu")))
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            trainer.begin()
        trainer.step(0)
        return trace(partial(trainer.step, 1))


def picture():
    """Trace the drawing of a picture in two denoising steps."""
    model = MoS.from_pretrained(ROOT / "weights")
    return trace(partial(model.generate, ["a red circle above a blue square"], steps=2))


def main():
    """Run the command."""
    CommandLine(__doc__.split("\n\n")[0]).parse_args()
    for title, call in (("one training step of stage image", training_step),
                        ("from prompt to picture", picture)):
        files = call()
        print("{}: {} files, {} functions, {} lines".format(title, *totals(files)))
        for file, functions in files.items():
            print(f"  {file}")
            for function, lines in functions.items():
                print(f"    {function:50}{len(lines):4} lines")


if __name__ == "__main__":
    run(main)
