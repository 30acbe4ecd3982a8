"""The command `vit_jax`: verbs, help, recipes by name, positional arguments, Ctrl-C, the wheel."""

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from processes import ROOT, commands

from experiments.scaling.study import load_study
from vit_jax import command_line
from vit_jax.__main__ import VERBS, usage
from vit_jax.classifier.workflow import default_workdir
from vit_jax.command_line import stoppable
from vit_jax.config import InputError
from vit_jax.data.sources import is_path
from vit_jax.list_recipes import documented, meanings
from vit_jax.parallel.multihost import Preemption
from vit_jax.recipes import find_recipe, list_recipes, recipe
from vit_jax.training.recipe import TrainConfig

CASES = {  # arguments -> exit code, what is printed
    (): (0, "usage: vit_jax VERB"),
    ("--version",): (0, "vit_jax 0."),
    ("trasnfer",): (1, "unknown verb 'trasnfer': did you mean transfer"),
    ("pretrain", "--config=pretrain/paper:B/16,foo=3"): (1, "error: unknown config argument 'foo'"),
    ("recipes",): (0, "transfer/folder"),
    ("recipes", "transfer/foldr"): (1, "did you mean 'transfer/folder'"),
    ("recipes", "transfer/folder:steps=7"): (0, "steps                    int | None = 7"),
    ("models", "B/16"): (0, "R50+ViT-B/16"),
    ("models", "C/16"): (1, "no model matches *C/16*"),
    ("doctor",): (0, "devices   cpu"),
    ("transfer",): (2, "usage: vit_jax transfer [DATA]"),
    ("transfer", "./nope"): (1, "error: there is no ./nope"),
    ("embed", "./nope", "--output=x.csv"): (1, "error: there is no ./nope"),
    ("predict", "augreg:S/16", "./nope", "gs"): (1, "error: there is no ./nope and no gs"),
    ("transfer", "kaggle:a/b"): (1, "community, kaggle:, runs code of its own"),
    ("transfer", "a", "b"): (1, "2 datasets, a, b: expected one"),
    ("pretrain", "--confg=x"): (1, "Did you mean: config"),
    ("pretrain", "--config.steps=3"): (1, "--config is missing"),
    ("pretrain", "--config=pretrain/papr"): (1, "did you mean 'pretrain/paper'"),
    ("pretrain", "--config=pretrain/formula", "--workdir="): (1, "say where to keep this run"),
    ("pretrain", "--config=pretrain/formula", "--config.evaluators=none", "--check=1"): (
        1,
        "config.evaluators = 'none': expected a group of fields",
    ),
    ("evaluate", "model"): (1, "--dataset is missing"),
    ("evaluate", "model", "digits"): (1, "no checkpoint at model"),
    ("evaluate", "model", "digits", "more"): (1, "unexpected more"),
    ("predict", "model", "tests/golden"): (1, "no images: name files"),
    ("convert", "hf:a/b", "nowhere", "--offline"): (1, "offline, as --offline"),
    **{(verb, "--help"): (0, f"usage: vit_jax {verb}") for verb in VERBS},
}


def test_the_command(tmp_path):
    cases = [("__main__", *arguments) for arguments in CASES]
    shown = {}
    for arguments, (code, out, err) in zip(CASES, commands(tmp_path, cases), strict=True):
        expected, text = CASES[arguments]
        assert code == expected and text in out + err, (arguments, code, out, err)
        assert "Traceback" not in out + err and "FATAL" not in err, (arguments, err)
        shown[arguments] = out
    help_of_transfer = shown["transfer", "--help"]
    assert "--workdir " in help_of_transfer and "(default: transfer/folder)" in help_of_transfer
    assert "  transfer/vtab" in help_of_transfer  # the recipes' names
    assert "--verbosity" not in help_of_transfer  # a flag of absl


@pytest.mark.parametrize("verb", ["doctor", "models", "recipes"])
def test_a_reader_that_has_read_enough_is_no_error(verb):
    """As with `| head -1`: the reader closes the pipe."""
    command = [sys.executable, "-m", "vit_jax", verb]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ}, **pipes)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() != 0


def test_its_help_imports_nothing_that_takes_time():
    code = (
        "import sys; from vit_jax.__main__ import usage; usage();"
        "heavy = {'jax', 'numpy', 'absl', 'ml_collections'} & set(sys.modules); assert not heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert [line.split()[0] for line in usage().splitlines()[2:-2]] == list(VERBS)


def test_recipes_have_a_line_an_argument_and_names_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list_recipes():
        about, argument = documented(find_recipe(name))
        assert about and argument, name
    Path("mine.py").touch()
    assert find_recipe("mine.py") == Path("mine.py")  # a path means a path
    with pytest.raises(FileNotFoundError, match="did you mean 'transfer/folder'"):
        find_recipe("configs/transfer/folder.py")


def test_fields_are_explained_by_their_docstrings_and_comments():
    said = meanings(TrainConfig)
    assert said["image_size"] == "pixels, the side of a square."
    assert said["steps"] == said["epochs"] and "exactly one" in said["steps"]
    of_model = meanings(TrainConfig.__dataclass_fields__["model"].type)
    assert of_model["token_mlp_dim"] == "Mixer"  # beside it
    assert of_model["zero_padded_pool"].endswith("Logits differ in the fourth digit.")  # above it


def test_a_relative_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_path("photos")
    for folder in ("photos/cat", "digits", "cifar10/3.0.2"):
        Path(folder).mkdir(parents=True)
    Path("cifar10/3.0.2/features.json").touch()
    Path("splits.csv").touch()
    assert is_path("photos") and is_path("splits.csv") and is_path("/nowhere")
    assert not is_path("digits") and not is_path("cifar10")  # as before
    assert default_workdir("photos/") == default_workdir("./photos") == Path("runs/photos")
    assert default_workdir("my_set/config:1.0.0") == Path("runs/my_set_config_1.0.0")


def test_interrupts_end_at_a_step_and_the_second_at_once(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Preemption() as preemption:
            with pytest.raises(KeyboardInterrupt):  # nothing to save yet
                signal.raise_signal(signal.SIGINT)
            assert not preemption.reached(1)
            signal.raise_signal(signal.SIGINT)
            assert preemption.reached(2) and preemption.interrupted
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with stoppable(), Preemption() as preemption:  # a command's: the second ends the process
            calls = []
            monkeypatch.setattr(os, "_exit", calls.append)
            preemption.reached(1)
            signal.raise_signal(signal.SIGINT)
            assert not calls
            signal.raise_signal(signal.SIGINT)
            assert calls == [130]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        with Preemption():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_command_has_one_line(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import time\nprint('waits', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "vit_jax", "plan", f"--config={recipe}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1].strip() == "stopped"
    assert process.returncode == 130


def test_the_wheel_has_all_that_the_command_needs(tmp_path):
    pytest.importorskip("setuptools")
    built = tmp_path / "lib"
    build = ["build", f"--build-base={tmp_path}", f"--build-lib={built}"]
    subprocess.run([sys.executable, "setup.py", "-q", *build], check=True, cwd=ROOT)
    files = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    folders = ("configs", "experiments/scaling", "experiments/scaling/studies")
    wanted = [path for at in folders for path in (ROOT / at).rglob("*.py")]
    wanted += (ROOT / "experiments/scaling/paper").glob("*.csv")
    assert len(wanted) > 40
    missing = {f"vit_jax/shipped/{path.relative_to(ROOT)}" for path in wanted} - files
    assert not missing and {"vit_jax/py.typed", "vit_jax/weights/embedded.npz"} <= files
    assert {file.split("/")[0] for file in files} == {"vit_jax"}
    for file in files:  # another project's distribution has that name
        if file.endswith(".py"):
            assert not re.search(r"install.*vit_jax\[", (built / file).read_text("utf-8")), file
    environment = {**os.environ, "PYTHONPATH": str(built)}
    for arguments, expected in ((["recipes"], "transfer/folder"), (["scaling", "-h"], "COMMAND")):
        done = subprocess.run(
            [sys.executable, "-m", "vit_jax", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in done.stdout


@pytest.mark.parametrize(
    ("fault", "last"),
    [
        ("InputError('so it is')", "error: so it is"),
        ("ZeroDivisionError('a fault')", "ZeroDivisionError: a fault"),
    ],
)
def test_an_error_is_the_last_thing_said(fault, last):
    """Behind it come neither what threads and libraries say at an end, nor a wait for them."""
    code = (
        "import atexit, sys, threading, time\n"
        "from vit_jax.command_line import run\n"
        "from vit_jax.config import InputError\n"
        "atexit.register(print, 'noise', file=sys.stderr)\n"
        "threading.Thread(target=time.sleep, args=[600]).start()\n"
        "def main(_):\n"
        "    print('result')\n"
        f"    raise {fault}\n"
        "run(main)"
    )
    command = [sys.executable, "-c", code]
    pipes = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=ROOT, check=False, **pipes)
    assert done.returncode == 1 and done.stdout == "result\n"
    assert done.stderr.strip().splitlines()[-1] == last
    assert ("Traceback" in done.stderr) == (last[:5] != "error")


RECIPES = {  # a recipe's file -> what is said of it
    "def get_config(arg=None):\n    return {}['seed']": "line 2: KeyError: 'seed'",
    "def get_config(arg=None):\n\n    return 1 / 0": "line 3: ZeroDivisionError: division by zero",
    "def get_config(arg=None):\n    int('x')": "line 2: ValueError: invalid literal",
    "import no_such_module": "line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "\ndef get_config(": "line 2: SyntaxError: '(' was never closed",
    "x = 1": "expected get_config(arg=None)",
    "def get_config(): pass": "expected get_config(arg=None)",
    "def get_config(arg=None): pass": "the recipe's get_config returns None",
}


def test_an_error_in_a_recipe_has_its_line(tmp_path):
    """Also in a study's file, by the command of recipes, and in Python."""
    files = [tmp_path / f"{i}.py" for i in range(len(RECIPES))]
    for file, text in zip(files, RECIPES, strict=True):
        file.write_text(text)
    rows = [("pretrain", f"--config={file}:1", f"--workdir={tmp_path / 'run'}") for file in files]
    done = commands(tmp_path, rows)
    for file, said, (code, _, err) in zip(files, RECIPES.values(), done, strict=True):
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: ") and said in last and "Traceback" not in err
        assert str(file) in last or "returns None" in said
    with pytest.raises(InputError, match=r"0.py, line 2: KeyError: 'seed'"):
        recipe(str(files[0]))
    files[0].write_text("def get_study(arg):\n    return arg.grids")
    with pytest.raises(InputError, match=r"0.py, line 2: AttributeError: 'NoneType'"):
        load_study(str(files[0]))
    files[0].write_text("def get_study(arg):\n    return 3")
    with pytest.raises(InputError, match="returned 3: expected a Study"):
        load_study(str(files[0]))


def test_the_loss_of_another_process_is_one_line(monkeypatch):
    distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(client=object()))
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\nmore")
    assert "ValueError: UNKNOWN: Gloo" in command_line._explained(lost)  # the traceback
    monkeypatch.setitem(sys.modules, "jax._src.distributed", distributed)
    monkeypatch.setattr(command_line, "_LINGER_SECONDS", -1)
    said = command_line._explained(lost)
    assert said.startswith("error: another process of this run has ended") and "\n" not in said
    assert command_line._explained(ValueError("a fault")).startswith("ValueError: a fault")
