"""The house keeps its plan: imports run one way, and some packages have one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_jax"

# A module may import from its own floor and from those below it.
FLOORS = [
    {
        *("pretrain", "transfer", "evaluate", "predict", "convert", "plan", "prepare"),
        "visualize",
    },
    {"training.finetune"},
    {"training.sweep", "training.memory"},
    {"training.loop", "training.initial", "training.recipe", "evaluation"},
    {"training.step", "training.checkpoint", "training.optimizer", "training.workdir"},
    {
        "data",
        "weights",
        "analysis",
        "training.augmentation",
        "training.clock",
        "training.early_stopping",
        "training.fields",
        "training.masked",
        "training.metrics",
        "training.profile",
    },
    {"models"},
    {"parallel"},
    {"config"},
]
ONE_DOOR = {"flax": "models", "orbax": "training.checkpoint", "grain": "data"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name, room):
    return name == room or name.startswith(room + ".")


def floor(name):
    for number, rooms in enumerate(FLOORS):
        if any(inside(name, room) for room in rooms):
            return number
    return None


@pytest.mark.parametrize(("name", "path"), [m for m in modules() if "__init__" not in m[0]])
def test_imports_run_one_way(name, path):
    assert floor(name) is not None, f"{name} has no floor: add it to FLOORS"
    for imported in imports(path):
        assert not inside(imported, "experiments"), f"{name} imports {imported}"
        if inside(imported, "vit_jax") and imported != "vit_jax.config":
            below = floor(imported.removeprefix("vit_jax."))
            assert below is None or below >= floor(name), f"{name} imports {imported}"
        for package, room in ONE_DOOR.items():
            assert not inside(imported, package) or inside(name, room), f"{name} imports {imported}"
        assert not (inside(name, "data") and inside(imported, "jax")), f"{name} imports {imported}"


def test_no_file_is_a_house_of_its_own():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.stem)
def test_recipes_import_nothing_heavy(recipe):
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['get_config']();"
        "heavy = {'jax', 'flax', 'numpy', 'grain', 'tensorflow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, recipe], check=True, cwd=ROOT)
