"""README.md and docs/ must stay true: links, commands, quoted code, provable numbers."""

import ast
import csv
import importlib
import inspect
import os
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

import config
import sample
import train
from common import CommandLine, run
from conftest import ROOT
from mos import MoS, unfilled
from world import edits, shapes
from world.dataset import Shapes

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "log.md"  # dated entries: their file names are not links
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"!?\[([^]]*)\]\(([^)]+)\)")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document, language):
    """Return the contents of a document's code blocks in a language."""
    return [body for name, body in BLOCK.findall(document.read_text()) if name == language]


def links(document):
    """Return (text, path) of a document's links to files; addresses of the web are left out."""
    prose = BLOCK.sub("", document.read_text())
    return [(text, Path(os.path.normpath(document.parent / target)))
            for text, target in LINK.findall(prose) if "://" not in target]


# ------------------------------------------------------------------------------------------------
# Files

def test_readme_is_short():
    """README is read at one sitting, from top to bottom."""
    assert 150 <= len(README.read_text().splitlines()) <= 220


@each_document
def test_links_lead_somewhere(document):
    """Every relative link and picture exists, and a link that shows a path leads to that path."""
    for text, path in links(document):
        assert path.exists(), path
        shown = text.partition(":")[0]
        if re.fullmatch(r"[\w./-]+\.\w+", shown):
            assert path in (ROOT / shown, document.parent / shown), text


def test_readme_links_to_the_paper_first():
    """The first sentence says what this is, and links to the paper."""
    paragraph = README.read_text().split("\n\n")[1]
    assert "](https://arxiv.org/abs/2511.12207)" in paragraph


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != LOG],
                         ids=lambda path: path.name)
def test_file_names_are_links(document):
    """In prose the name of a file of the repository is a link; only commands name files plainly."""
    prose = LINK.sub("", BLOCK.sub("", document.read_text()))
    prose = re.sub(r"`(?:python|torchrun|pip|pytest)\b[^`]*`", "", prose)
    names = {name.rstrip(".") for name in re.findall(r"[\w./-]+\.\w+|LICENSE", prose)}
    assert [name for name in sorted(names) if (ROOT / name).is_file()] == []


@each_document
def test_paths_exist(document):
    """Every path in backticks exists, but for what commands write to runs/."""
    paths = re.findall(r"`([\w./-]+(?:\.py|\.md|\.toml|/)|LICENSE|requirements\.txt)(?::\w+)?`",
                       document.read_text())
    missing = {p for p in paths if not p.startswith("runs/") and not (ROOT / p).exists()}
    assert missing == set()


def test_reading_order_is_complete():
    """README links to every Python file at the top, and to every room or into it."""
    targets = {path for _, path in links(README)}
    top = sorted(ROOT.glob("*.py"))
    assert len(top) > 10 and [path.name for path in top if path not in targets] == []
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    rooms += [ROOT / name for name in ("recipes", "tests", "docs", "assets", "weights")]
    for room in rooms:
        assert any(room in (path, *path.parents) for path in targets), room


def test_documents_are_reached_from_readme():
    """README links to every document."""
    assert {path for _, path in links(README)} >= set(DOCUMENTS) - {README}


# ------------------------------------------------------------------------------------------------
# Code

def defined_names(path):
    """Return every function, class and constant that a file defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def paper_table():
    """Return the (file, name) pairs of the paper-to-code table."""
    text = (ROOT / "docs" / "paper.md").read_text()
    return sorted(set(re.findall(r"\[([\w/]+\.py):(\w+)\]", text)))


def test_paper_table_is_there():
    """The paper-to-code table has its entries."""
    assert len(paper_table()) >= 25


@pytest.mark.parametrize("file, name", paper_table())
def test_paper_table_points_at_code(file, name):
    """Every [file.py:name] of the paper-to-code table exists."""
    assert name in defined_names(ROOT / file)


def condensed(code):
    """Return code without comments and white space, and without commas before a bracket."""
    return re.sub(r",(?=[)\]])", "", re.sub(r"\s|#[^\n]*", "", code))


@pytest.mark.parametrize("quote", [code for code in blocks(README, "python")
                                   if "from_pretrained" not in code])
def test_quoted_code_is_the_code(quote):
    """README quotes the lines that run."""
    files = ("router.py", "kernels.py", "mos.py")
    assert any(condensed(quote) in condensed((ROOT / name).read_text()) for name in files)


def test_python_example_calls_what_exists(monkeypatch):
    """The calls in README's example fit the signatures of MoS."""
    (example,) = (code for code in blocks(README, "python") if "from_pretrained" in code)
    model = mock.create_autospec(MoS, instance=True)
    model.generate.return_value = model.edit.return_value = ["picture"]
    monkeypatch.setattr(MoS, "from_pretrained",
                        mock.create_autospec(MoS.from_pretrained, return_value=model))
    exec(example, {})
    assert model.generate.call_count == model.edit.call_count == 1


# ------------------------------------------------------------------------------------------------
# Commands

def test_test_command_comes_first():
    """The first line with python -m pytest is the test command, as .ci/run takes it."""
    lines = [line for line in README.read_text().splitlines() if "python -m pytest" in line]
    assert lines[0] == "pip install -r requirements.txt && python -m pytest"


def commands():
    """Yield (module, flags) of the Python commands in all documents, `sample` or `tools.bench`.

    They stand in code blocks and in backticks, there also in the middle of a sentence.
    """
    for document in DOCUMENTS:
        lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
        prose = BLOCK.sub("", document.read_text())
        lines += [" ".join(line.split())
                  for line in re.findall(r"`((?:python|torchrun) [^`]+)`", prose)]
        for line in lines:
            for part in line.split("&&"):
                command = parsed_command(shlex.split(part, comments=True))
                if command:
                    yield command


def parsed_command(words):
    """Return (module, flags) of one command's words, or None where it is none of ours."""
    if words[:3] == ["python", "-m", "pytest"]:
        return None
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[:1] in (["python"], ["torchrun"]) and scripts:
        return words[scripts[0]].removesuffix(".py"), words[scripts[0] + 1:]
    return None


def test_documents_hold_commands():
    """The parametrised test below has something to test: commands of every kind."""
    modules = {module for module, _ in commands()}
    assert modules >= {"train", "sample", "tools.evaluate", "tools.bench", "tools.curves",
                       "tools.routing", "tools.trace", "tools.estimate", "tools.latency"}


class Accepted(Exception):
    """The command line was accepted; the work would begin here."""


def begin_work(*_, **__):
    """Stand for a command's work."""
    raise Accepted


def stop_after(function):
    """Return a function that calls another one and then raises Accepted."""
    def call(*arguments, **options):
        function(*arguments, **options)
        raise Accepted
    return call


@pytest.mark.parametrize("module, flags", [
    pytest.param(module, list(flags), id=shlex.join((module, *flags)))
    for module, flags in sorted({(module, tuple(flags)) for module, flags in commands()})])
def test_commands_are_accepted(module, flags, monkeypatch, tmp_path):
    """Every command in README and docs/ is accepted by the real parser, with valid settings."""
    name, module = module, importlib.import_module(module)
    if name.startswith("tools."):
        if hasattr(module, "parse"):  # parses, and checks what it has parsed
            monkeypatch.setattr(module, "parse", stop_after(module.parse))
        else:
            monkeypatch.setattr(CommandLine, "parse_args", stop_after(CommandLine.parse_args))
    monkeypatch.setattr(MoS, "from_pretrained", begin_work)
    monkeypatch.setattr(train.World, "join", begin_work)
    monkeypatch.setattr(sample, "read_picture", begin_work)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.chdir(tmp_path)
    if "--export" in flags:  # which wants something to export
        (tmp_path / "runs" / "mine" / "checkpoints" / "image").mkdir(parents=True)
    with pytest.raises(SystemExit if "--help" in flags else Accepted):
        run(module.main)
    if module is train and "--help" not in flags:
        check_settings(flags)


def check_settings(arguments):
    """Raise ValueError where a training command asks for settings that fit no model or world."""
    flags, recipe, resume, export = train.parse(arguments)
    runs = config.plan(flags, recipe, resume or export)
    for c, values in runs:
        known = {name: value for name, value in flags.items() if name in values}
        config.MoSConfig(**values | known)
        Shapes(64, 0, tasks=c.tasks)
    assert runs


@each_document
def test_flags_in_prose_exist(document):
    """A flag in backticks is a flag of train.py, sample.py or a tool."""
    known = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for kind in (config.TrainConfig, config.MoSConfig):
        known |= {"--" + name.replace("_", "-") for name in inspect.signature(kind).parameters}
    prose = BLOCK.sub("", document.read_text())
    flags = set(re.findall(r"`(--[\w-]+)", prose))
    assert flags <= known


# ------------------------------------------------------------------------------------------------
# Numbers

def test_parameter_counts():
    """The parameter counts in docs/results.md are those of the model in weights/."""
    model = MoS.from_pretrained(ROOT / "weights")
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    stated = dict(re.findall(r"(\w[\w ]+?) ([\d.]+) M", text))
    parts = {"VAE": model.vae, "understanding tower": model.understanding,
             "generation tower": model.generation, "router": model.router}
    for name, part in parts.items():
        assert stated[name] == f"{count(part) / 1e6:.2f}", name


def count(module):
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ("ablation_1b", "mos_s", "mos_l"))
def test_parameter_counts_of_the_papers_models(name):
    """The table in docs/towers.md holds what the recipes build; README rounds its sums."""
    values = config.read_recipe(name)["model"]
    model = unfilled(config.MoSConfig(**values))
    table = (ROOT / "docs" / "towers.md").read_text()
    (row,) = (line for line in table.splitlines() if line.startswith(f"| [{name}]"))
    matrices = sum(p.numel() for p in model.generation.blocks.parameters() if p.ndim == 2)
    assert (f", {values['und_depth']}: " in row and f"{matrices / 1e9:.3f} B, "
            f"{count(model.generation) / 1e9:.3f} B | {count(model.router) / 1e6:.1f} M" in row)
    short = {"mos_s": "MoS-S", "mos_l": "MoS-L"}.get(name)
    if short:
        total = (count(model.generation) + count(model.router)) / 1e9
        assert f"| {short} | {total:.1f} B |" in README.read_text()


def test_losses_of_the_laptop_recipe():
    """The losses that README and docs/results.md state are those of assets/laptop.csv."""
    losses = {}
    with (ROOT / "assets" / "laptop.csv").open() as file:
        for row in csv.DictReader(file):
            if row["loss"]:
                losses[row["run"], int(row["step"])] = f"{float(row['loss']):.4f}"
    for document, label in ((README, "{}"), (ROOT / "docs" / "results.md", "loss, {}")):
        lines = document.read_text().splitlines()
        (head,) = (line for line in lines if re.match(r"\| [\w ]*step \| 50 \|", line))
        steps = [int(cell.replace(",", "")) for cell in head.split("|")[2:-1]]
        for seed in ("seed 0", "seed 1", "seed 2"):
            cells = " | ".join(losses[seed, step] for step in steps)
            label = label if seed == "seed 0" else "{}"
            assert f"| {label.format(seed)} | {cells} |" in lines


def test_the_small_world_is_as_large_as_stated():
    """README counts the shapes, colours and backgrounds, and docs/ the types of edits."""
    text = " ".join(README.read_text().split())
    assert (f"{len(shapes.SHAPES)} shapes, {len(shapes.COLOURS)} colours, "
            f"{len(shapes.BACKGROUNDS)} backgrounds") in text
    results = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert len(edits.TYPES) == 9 and f"nine ([world/edits.py](../world/edits.py)): " \
        f"{', '.join(edits.TYPES)}." in results


def test_the_weights_are_as_large_as_stated():
    """README says how many megabytes the trained model has."""
    size = sum(path.stat().st_size for path in (ROOT / "weights").iterdir())
    assert f"a trained model of {size / 1e6:.0f} MB" in " ".join(README.read_text().split())


def test_figures_of_readme_stand_in_the_documents():
    """README repeats figures of docs/, where hardware and command stand beside them."""
    prose = LINK.sub("", BLOCK.sub("", README.read_text()))
    figures = set(re.findall(r"\d+\.\d+", prose))
    figures -= {"3.11", "2.1", "2.9", "5.1"}  # versions; sums, which another test checks
    text = " ".join(path.read_text() for path in DOCUMENTS[1:] if path != LOG)
    assert figures <= set(re.findall(r"\d+\.\d+", text))
