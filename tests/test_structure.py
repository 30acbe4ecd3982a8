"""The package's structure: imports run one way, and few modules import some packages."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_jax"

# A module may import from its own layer and from those below it.
FLOORS = [
    {
        *("__main__", "pretrain", "transfer", "evaluate", "predict", "convert", "plan", "prepare"),
        *("visualize", "replay", "embed", "list_recipes", "list_models", "doctor"),
    },
    {"classifier"},
    {"training"},
    {"evaluation"},
    {"losses", "weights", "costs", "pictures"},
    {"models", "data"},
    {"parallel"},
    {"command_line", "config", "recipes"},
]
# Packages that only these modules may import.
DOORS = {
    "flax": ("models",),
    "orbax": ("training.checkpoint", "weights.trained"),
    "grain": ("data",),
}


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
        for package, doors in DOORS.items():
            allowed = any(inside(name, door) for door in doors)
            assert not inside(imported, package) or allowed, f"{name} imports {imported}"
        assert not (inside(name, "data") and inside(imported, "jax")), f"{name} imports {imported}"


def test_imports_have_no_circles():
    """No cycles between layers or within one: the modules can be sorted topologically."""
    names = {name for name, _ in modules()}
    graph = {}
    for name, path in modules():
        found = (i.removeprefix("vit_jax.") for i in imports(path) if inside(i, "vit_jax"))
        graph[name] = {i if i in names else i.rpartition(".")[0] for i in found} & names
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_no_file_is_a_house_of_its_own():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_each_dependency_is_explained():
    """Those of the default install, in the table of CONTRIBUTING.md."""
    setup = (ROOT / "setup.py").read_text().split("install_requires=[")[1].split("]")[0]
    needed = {re.match(r"[\w-]+", text)[0] for text in re.findall('"([^"]+)"', setup)}
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|[^|]+\| [\d.]+", page, re.MULTILINE)
    explained = [name for row in rows for name in re.findall("`([^`]+)`", row)]
    assert len(needed) > 15 and sorted(explained) == sorted(needed)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.stem)
def test_recipes_import_nothing_heavy(recipe):
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['get_config']();"
        "heavy = {'jax', 'flax', 'numpy', 'grain', 'tensorflow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, recipe], check=True, cwd=ROOT)
