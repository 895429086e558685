"""README.md must stay true: its table, its paths, its numbers that a file can prove."""

import ast
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def names(path):
    """Every function, class and constant that a file defines."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | {
        target.id for node in ast.walk(tree) if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("file, name", sorted(set(re.findall(r"`(\w+\.py):(\w+)`", README))))
def test_table_points_at_code(file, name):
    """Every `file.py:name` of the paper-to-code table exists."""
    assert name in names(ROOT / file)


def test_pictures_exist():
    """Every picture that README shows is in the repository."""
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert shown and all((ROOT / path).is_file() for path in shown)


def test_reading_order_is_complete():
    """README names every module of the repository."""
    modules = [path.name for path in ROOT.glob("*.py")
               if not path.name.startswith("test_") and path.name != "conftest.py"]
    assert len(modules) > 10 and [name for name in modules if f"`{name}`" not in README] == []


def test_parameter_counts():
    """The parameter counts that README states are those of the checkpoint in weights/."""
    from checkpoint import read_vocabulary
    from config import read_config
    from mos import MoS
    model = MoS(read_config(ROOT / "weights"), read_vocabulary(ROOT / "weights"))
    stated = dict(re.findall(r"(\w[\w ]+?) ([\d.]+) M", " ".join(README.split())))
    parts = {"VAE": model.vae, "understanding tower": model.understanding,
             "generation tower": model.generation, "router": model.router}
    for name, part in parts.items():
        assert stated[name] == f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f}", name
