"""Every shape comment, such as `# (B, S, Dg)`, held against real tensors while a small model runs.

A comment speaks of the tensors that its statement assigns, appends or returns: one shape for each
of them, or one for all with `each`; `or` separates alternatives. Letters are those of `mos.py`; the
run knows them. Others (O, L, C') are bound where a call of a function first uses them, and stay.
"""

import ast
import io
import random
import re
import runpy
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from training import MODEL, WORDS, prepare

import kernels
import train
import vae
from config import STAGES
from conftest import ROOT, make_config, make_model, product_files
from data.pictures import Pictures, Rules
from mos import MoS
from pretrained import encoders
from tools import routing
from towers import Patches, Tokenizer
from world import shapes
from world.judge import judge

FILES = ("mos.py router.py dit.py towers.py kernels.py vae.py world/shapes.py world/judge.py "
         "data/pictures.py pretrained/encoders.py tools/routing.py").split()
TRAINING = ("stages.py", "data/sources.py", "data/latents.py")
UNREACHED = set()  # "file.py: commented source text" that no run on the CPU can reach
ONE = r"\([^()]*,[^()]*\)"
COMMENT = re.compile(rf"# ({ONE}(?:,(?: or)? {ONE})*)( each)?")


class Note(NamedTuple):
    """A commented statement: where it is, what to look at (None: what it returns), its shapes."""
    place: str
    code: str
    lines: range
    subject: str | None
    options: tuple  # of tuples of shapes, which are tuples of texts
    each: bool
    comment: str


def read_notes(name, source):
    """The notes of a source file, each with the name of the class whose field it is, or None."""
    nodes = list(ast.walk(ast.parse(source)))
    kinds = ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr
    owners = {child: n.name for n in nodes if isinstance(n, ast.ClassDef) for child in n.body}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = COMMENT.match(token.string)
        if token.type != tokenize.COMMENT or not match:
            continue
        node, = (n for n in nodes if isinstance(n, kinds)
                 and n.lineno <= token.start[0] <= n.end_lineno)
        subject = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        subject = subject and ast.unparse(subject)
        if isinstance(node, ast.Expr):  # tokens.append(...)
            subject = ast.unparse(node.value.func.value) + "[-1]"
        text = re.sub(r"(\d)([A-Za-z])", r"\1*\2", match[1].replace("'", "_"))  # 2H is 2*H
        options = tuple(tuple(tuple(filter(None, re.split(r"[(),]\s*", shape))) for shape in
                              re.findall(ONE, option)) for option in text.split(", or "))
        yield owners.get(node), Note(
            f"{name}:{node.lineno}", f"{name}: {token.line.split('#')[0].strip()}",
            range(node.lineno, node.end_lineno + 1), subject, options, bool(match[2]), match[0])


def solve(constraints, letters):
    """Bind what single (dim, size) pairs decide; returns the undecided, or None if one is wrong."""
    def holds(dim, size, **more):
        return any(eval(option, {}, letters | more) == size for option in dim.split(" or "))

    left = []
    for dim, size in constraints:
        unknown = set(re.findall(r"[A-Za-z]\w*", dim.replace(" or ", " "))) - letters.keys()
        if len(unknown) == 1:
            letter, = unknown
            values = (size, *range(1, 16 * min(size, 256) + 1))
            letters[letter] = next((n for n in values if holds(dim, size, **{letter: n})), -1)
        if len(unknown) > 1:
            left.append((dim, size))
        elif not holds(dim, size):
            return None
    return left if len(left) == len(constraints) else solve(left, letters)


class Checker:
    """Compares the comments of source files {path: text} with what happens in `watch`."""

    def __init__(self, sources):
        notes = {path: list(read_notes(path.name, source)) for path, source in sources.items()}
        self.fields = {(owner, n.subject): n for path in notes for owner, n in notes[path] if owner}
        self.lines = {str(path): {line: n for _, n in notes[path] for line in n.lines}
                      for path in notes}
        self.unreached = {n for path in notes for _, n in notes[path]}
        self.checked, self.errors, self.known = set(), {}, {}

    def watch(self, known, run, *arguments):
        """Call `run`; known: {"file.py" or "file.py Class": {letter: value}}."""
        self.known, before = known, sys.gettrace()
        sys.settrace(self.call)
        try:
            return run(*arguments)
        finally:
            sys.settrace(before)

    def call(self, frame, event, _):
        """The tracer of a call. A statement is done where another one or the end is reached."""
        code, lines = frame.f_code, self.lines.get(frame.f_code.co_filename)
        if lines is None or code.co_name.startswith("<"):  # not ours, or a comprehension
            return None
        letters, binders, left, now = {}, {}, [], None

        def local(frame, event, value):
            nonlocal left, now
            here = lines.get(frame.f_lineno) if event == "line" else None
            if here is not now and now and (now.subject or event == "return"):
                if now.subject:
                    value = eval(now.subject, frame.f_globals, frame.f_locals)
                for letter in [a for a in letters if binders[a] is now]:
                    del letters[letter], binders[letter]  # a loop comes round: bind again
                left = self.compare(now, value, frame, letters, left)
                binders.update({a: now for a in letters if a not in binders})
            now = here
            if event == "return" and left:
                self.errors[code] = f"{code.co_filename}, {code.co_name}: what is {dict(left)}?"
            return local

        for value in list(frame.f_locals.values()):  # named tuples with commented fields
            for field in getattr(value, "_fields", ()):
                if note := self.fields.get((type(value).__name__, field)):
                    self.compare(note, getattr(value, field), frame, {}, [])
        return local

    def compare(self, note, value, frame, letters, left):
        """Check one statement; binds letters. Returns the constraints that are still undecided."""
        name, own = note.place.split(":")[0], type(frame.f_locals.get("self")).__name__
        known = self.known.get(name, {}) | self.known.get(f"{name} {own}", {})
        known |= {a: n for a, n in frame.f_locals.items() if type(n) is int}
        values = value if isinstance(value, (tuple, list)) else [value]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        self.checked.add(note.place)
        self.unreached.discard(note)
        for wanted in note.options:
            wanted *= len(tensors) if note.each else 1
            if [len(w) for w in wanted] == [v.ndim for v in tensors] and len(tensors) > note.each:
                trial = letters | known
                rest = solve(left + [pair for w, v in zip(wanted, tensors)
                                     for pair in zip(w, v.shape)], trial)
                if rest is not None:
                    letters.update({a: n for a, n in trial.items() if a not in known})
                    return rest
        self.errors[note] = f"{note.place}: {note.comment} is {[tuple(v.shape) for v in tensors]}"
        return left


def run_everything(watch, folder):
    """All code that carries comments, with a size of its own for every letter."""
    sizes = dict(und_width=48, und_heads=6, und_kv_heads=2, gen_width=288, gen_heads=9, k=3,
                 gen_kv_heads=3, gen_depth=7, gen_patch=2, registers=8, router_width=96,
                 router_heads=3)
    tokenwise, model = make_model(**sizes), make_model(**sizes, tokenwise=False)
    prompts = ["a photo of two stars on the gray background", "a red circle"]
    common = dict(M=5, N=7, K=3, R=8, Du=48, Dg=288, Dr=96, S=10, T=60, h=12, w=20)
    tower = dict(M=5, H=6, Hk=2, Dh=8, Du=48, p=16, V=len(model.tokenizer))
    known = {"mos.py": common | dict(C=6), "vae.py VAE": dict(C=6), "vae.py": {},
             "dit.py": common | dict(H=9, Hk=3, Dh=32, C=6, p=2), "towers.py": tower,
             "router.py": common | dict(H=3, Dh=32), "kernels.py": dict(M=5, K=3)}
    two = {file: letters | dict(B=2) for file, letters in known.items()}
    tokens, z = model.tokenizer.batch(prompts), torch.randn(2, 6, 12, 20)
    images = torch.rand(2, 3, 64, 80)
    for m in (tokenwise, model):
        loss = watch(two, m.loss, z, tokens, torch.rand(2), z.roll(1, 0), torch.rand(2, 10, 6, 7))
        watch(two, loss.mean().backward)
    for texts in (prompts, prompts[:1]):  # with a mask, and without
        watch(known, lambda: model.generate(texts, steps=1, size=(192, 320)))
    watch(two, lambda: model.vae.decode(model.vae.encode(images)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "UNTILED", 1)
        watch(two, lambda: model.vae.decode(model.vae.encode(images)))
    watch(two, model.vae.loss, images, torch.randn(2, 6, 4, 5), 1.0)
    pictures = [Image.new("RGB", (96, 64)), Image.new("RGB", (96, 64), "red")]
    edit = dict(S=34, T=12, h=4, w=6)  # 24 image tokens, 6 of the reference
    edit = known | {file: known[file] | edit for file in ("mos.py", "dit.py", "router.py")}
    watch(edit, lambda: model.edit(pictures, prompts, steps=1))
    letters = known | {"routing.py": dict(M=5, N=7, K=3, S=4, C=6, times=2)}
    for name in ("mos.py", "dit.py", "router.py"):
        letters[name] = letters[name] | dict(S=4, T=4, h=4, w=4)
    index, weight, _ = watch(letters, routing.routes, model, "a red circle", [0.9, 0.1])
    watch(letters, routing.shares, index, weight, 5)
    watch(letters, routing.draw, [*"abcd"], index, 5, pictures)
    U = model.understanding
    watch(two, U.loss, tokens, tokens.clamp_min(0), images)
    watch(known | {"towers.py": tower | dict(B=1)}, lambda: list(U.write(tokens[:1], 2, ())))
    U.image_token = 1
    watch(two, U.embed, torch.ones(2, 20, dtype=torch.int64), images)
    scenes = shapes.pack([shapes.draw_scene(random.Random(i), "dense")._replace(style=style)
                          for i, style in enumerate(shapes.STYLES)])
    size = dict(B=2, H=96, W=112)
    watch({"shapes.py": size, "judge.py": size}, lambda: judge(shapes.render(scenes, 96, 112)))
    for i in range(2):
        deep = Image.new("I;16", (40 + i, 50))
        deep.save(folder / f"{i}.png", "TIFF", tiffinfo={262: 0})  # 0 is white
        (folder / f"{i}.txt").write_text("a star")
    own = Pictures(str(folder), [32], train.World(0, 1, torch.device("cpu")), Rules(0.0, 0.0))
    for height, width in ((64, 96), (96, 32)):
        watch({}, own.load, 0, height, width)
    letters = {"kernels.py": dict(B=2, S=10, D=48, F=64, K=3, Du=48, Dg=32)}
    x, matrices = torch.randn(2, 10, 48), [torch.randn(s) for s in ((128, 48), (48, 64), (32, 48))]
    chosen = torch.zeros(2, 10, 3, dtype=torch.int64), torch.rand(2, 10, 3), matrices[2]
    for function, inputs in ((kernels.FusedFeedForward, (x, *matrices[:2])),
                             (kernels.FusedMixProject, (x[:, :, None], *chosen, torch.ones(32)))):
        inputs = [a.requires_grad_() if getattr(a, "is_leaf", False) and a.is_floating_point()
                  else a for a in inputs]
        y = watch(letters, function.apply, *inputs)
        watch(letters, y.sum().backward)
    watch({"towers.py": dict(B=2, p=16, Du=44)}, Patches(16, 44), images)
    letters = {"encoders.py": dict(B=2, P=12, Du=44, Dv=24, Dh=8, n=4),
               "encoders.py EncoderBlock": dict(H=3)}
    for encoder in (encoders.PerceptionEncoder(24, 1, 3, 40, 44, True, 56),
                    encoders.PerceptionEncoder(24, 1, 3, 40, 44, False, 56),
                    encoders.InternVision(24, 1, 3, 40, 44, True, 56)):
        watch(letters, encoder, torch.rand(2, 3, 84, 112))


def run_stages(watch, folder):
    """The code of data and of all stages: a validation and a step of each, on a tiny model."""
    torch.manual_seed(0)
    MoS(make_config(**MODEL), Tokenizer(WORDS)).save_pretrained(folder / "init")
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "pictures" / "0.png")
    (folder / "pictures" / "0.txt").write_text("a star")
    for stage in STAGES:
        flags = {} if stage == "vae" else dict(init=str(folder / "init"))
        latents = dict(latents=str(folder / "latents"))
        pictures = dict(data=str(folder / "pictures"))
        for more in ({}, latents, pictures) if stage == "image" else ({},):
            trainer = prepare(stage, folder / stage, **flags, **more)
            watch({}, trainer.begin)
            watch({}, trainer.step, 0)
    watch({}, trainer.stage.routing)


@pytest.mark.parametrize("files, run", ((FILES, run_everything), (TRAINING, run_stages)))
def test_shape_comments(files, run, tmp_path, light):
    """Each shape comment of each file is reached and true at every execution."""
    checker = Checker({ROOT / name: (ROOT / name).read_text() for name in files})
    run(checker.watch, tmp_path)
    print(f"{len(checker.checked)} shape comments checked")
    assert not checker.errors, "\n".join(checker.errors.values())
    assert {note.code for note in checker.unreached} == UNREACHED
    assert {place.split(":")[0] for place in checker.checked} == {Path(name).name for name in files}


def test_every_file_with_shape_comments_is_checked():
    """No file of the repository but the tests has a shape comment that is not proved."""
    commented = {str(path.relative_to(ROOT)) for path in product_files()
                 if any(read_notes(path.name, path.read_text()))}
    assert commented == {*FILES, *TRAINING}


TOY = """
def toy(x, parts):
    B, D = x.shape
    for n in range(1, B):
        part = x[:n, :, None]             # (L, D, 1)
        parts.append(part.expand(-1, -1,
                                 n * n))  # (L, D, L*L)
    rows, columns = x, x.mT               # (B, D), (D, B)
    if not D:
        rows = columns                    # (D, B)
    return rows.chunk(2, 1)               # (B, D or D/2) each  eq. (4)
"""


@pytest.mark.parametrize("right, wrong, blame", [
    ("", "", None), ("L, D, 1", "L, 1, D", "toy.py:5:"), ("L*L", "L+L", "toy.py:6:"),
    ("(D, B)", "(B, D)", "toy.py:8:"), ("D or D/2", "B or D", "toy.py:11:"),
    ("D/2) each", "D/2)", "toy.py:11:"), (", (D, B)", ", (X*Y, B)", "what is {'X*Y'")])
def test_wrong_comments_are_found(tmp_path, right, wrong, blame):
    """The checker itself: true comments pass, a false one is blamed, an unreached one is listed."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    checker = Checker({path: TOY.replace(right, wrong)})
    checker.watch({}, runpy.run_path(path)["toy"], torch.ones(5, 4), [])
    assert blame in "".join(checker.errors.values()) if blame else not checker.errors
    assert [note.code for note in checker.unreached] == ["toy.py: rows = columns"]
