"""The command `vit_jax VERB`, also `python -m vit_jax VERB`."""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

from vit_jax import __version__

PACKAGE = Path(__file__).parent
# Each module also runs with `python -m`.
VERBS = {
    **{
        verb: f"vit_jax.{verb}" for verb in ("pretrain", "transfer", "predict", "embed", "evaluate")
    },
    **{verb: f"vit_jax.{verb}" for verb in ("convert", "prepare", "plan", "visualize", "replay")},
    "scaling": "experiments.scaling.__main__",
    "quickstart": "experiments.quickstart",
    "recipes": "vit_jax.list_recipes",
    "models": "vit_jax.list_models",
    "doctor": "vit_jax.doctor",
}


def shipped() -> Path:
    """Returns the parent of experiments/: the same as `recipes.ROOT`, without its slow imports."""
    return folder if (folder := PACKAGE / "shipped").is_dir() else PACKAGE.parent


def usage() -> str:
    """Lists all verbs with the first line of their modules' docstrings, without importing them."""
    lines = ["usage: vit_jax VERB [ARGUMENT ...] [--flag=value ...]", ""]
    for verb, module in VERBS.items():
        parts = module.split(".")
        root = PACKAGE.parent if parts[0] == PACKAGE.name else shipped()
        text = root.joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")
        lines.append(f"  {verb:11} {ast.get_docstring(ast.parse(text)).splitlines()[0]}")
    return "\n".join([*lines, "", "vit_jax VERB --help explains one; vit_jax --version"])


def main() -> None:
    """Runs a verb's module as the program."""
    try:
        _main(*sys.argv[1:2], arguments=sys.argv[2:])
    except KeyboardInterrupt:  # during an import; later, `command_line.run` handles it
        sys.stderr.write("\nstopped\n")
        os._exit(130)


def _main(verb: str = "help", *, arguments: list[str]) -> None:
    if verb in ("help", "-h", "--help", "-help"):
        print(usage())
    elif verb in ("--version", "version"):
        print(f"vit_jax {__version__}")
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        sys.exit(f"error: unknown verb {verb!r}: {hint}Known: {', '.join(VERBS)}")
    else:
        if verb in ("scaling", "quickstart"):
            sys.path.insert(0, str(shipped()))
        sys.argv = [f"vit_jax {verb}", *arguments]
        runpy.run_module(VERBS[verb], run_name="__main__")


if __name__ == "__main__":
    main()
