"""Shared by all commands: flags, recipes by name, positional arguments, help, errors, Ctrl-C."""

import contextlib
import glob
import importlib.util
import inspect
import logging as standard_logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from vit_jax.config import WORKFLOW, InputError, explained_errors, printable
from vit_jax.recipes import fault_in, find_recipe, list_recipes

INTERRUPTED = 130  # exit code after Ctrl-C, as a shell reports it
_NO_RECIPE = "--config is missing: name a recipe (vit_jax recipes lists them) or a file"
# Loggers that report every attempt; our errors have the relevant part.
CHATTY = ("jax._src.xla_bridge", "gcsfs", "google.auth", "fsspec", "asyncio")
# Words in errors of collectives and of jax's service when another process has ended.
_OTHERS = re.compile("gloo|nccl|mpi|coordination|barrier|heartbeat|unavailable|by peer", re.I)
_LINGER_SECONDS = 5  # so that each process can report an error that all have
# Called with the exit code before a process ends without Python's own cleaning up.
before_exit: list[Callable[[int], Any]] = []
HELP = ("-h", "-help", "--help", "--helpshort")
flags.DEFINE_bool("offline", False, "Download nothing, use the cache; same as VIT_JAX_OFFLINE=1.")


def define_config_flag() -> flags.FlagHolder:
    """Defines --config=RECIPE, and --config.field=value for any field of the recipe.

    Fields that the recipe leaves at their defaults may be set too; `build` rejects unknown ones.
    """
    return config_flags.DEFINE_config_file(
        "config",
        help_string="A recipe's name, such as pretrain/paper:ViT-B/16, or a file with get_config.",
        lock_config=False,
        accept_new_attributes=True,
    )


def run(
    main: Callable[[list[str]], Any],
    *positional: str,
    rest: str = "",
    recipe: str = "",
    required: bool = True,
) -> None:
    """Runs a command: parses its flags, calls `main`, ends the process.

    Args:
      main: called with [the command as typed, *positional arguments that no flag took].
      *positional: flags that positional arguments fill in this order, unless they are set.
      rest: name of the other positional arguments in the usage; "": none are allowed.
      recipe: the recipe without --config; "": --config is required.
      required: whether all of `positional` must be given, as flags or as arguments.

    Exits with code 2 and the usage if arguments are needed and there are none, 1 and a line that
    begins with "error:" for a mistake, 130 after Ctrl-C.
    """
    needs = tuple(positional) if required else ()

    def parse(argv: list[str]) -> list[str]:
        typed = shlex.join([_program(), *argv[1:]])
        usage = _usage(positional, rest, required)
        if any(text in HELP for text in argv[1:]):
            print(_help(main, usage, recipe))
            sys.exit(0)
        has_config = "config" in flags.FLAGS
        if len(argv) == 1 and (positional or has_config):
            print(f"{usage}\n{_program()} --help explains it", file=sys.stderr)
            sys.exit(2)
        if has_config:
            _settle_config(argv, recipe)
        arguments = _fill(positional, parse_flags(argv)[1:])
        if has_config and flags.FLAGS["config"].value is None:
            given = flags.FLAGS["config"].present
            raise InputError("the recipe's get_config returns None" if given else _NO_RECIPE)
        if missing := [name for name in needs if flags.FLAGS[name].value is None]:
            raise InputError(f"--{missing[0]} is missing\n{usage}")
        if arguments and not rest:
            raise InputError(f"unexpected {' '.join(arguments)}\n{usage}")
        return [typed, *arguments]

    try:
        with stoppable(), explained_errors():
            app.run(main, flags_parser=parse)
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        _fail(ended.code)
    except Exception as error:
        _fail(_explained(error))


def _fail(message: str) -> NoReturn:
    """Prints the message and ends the process immediately.

    On an ordinary exit, threads and libraries would print more, and jax would wait for the other
    processes, which wait for this one.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    for tell in before_exit:
        tell(1)
    distributed = sys.modules.get("jax._src.distributed")
    if distributed and distributed.global_state.service:  # on process 0; the others end with it
        time.sleep(_LINGER_SECONDS)
    os._exit(1)


def _explained(error: Exception) -> str:
    """Returns the traceback, or one line if the cause is that another process has ended."""
    distributed = sys.modules.get("jax._src.distributed")
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    if distributed and distributed.global_state.client and _OTHERS.search(first):
        time.sleep(_LINGER_SECONDS + 1)  # `peers` knows which one, and ends this process
        return (
            "error: another process of this run has ended; its log says why. Start the same "
            "command on all to resume from the newest checkpoint, if there is one "
            f"({printable(first)})"
        )
    return "".join(traceback.format_exception(error)).rstrip()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ends the process after Ctrl-C with exit code 130 and one line, without a traceback.

    `preemption.Preemption` saves after the first Ctrl-C; the second then ends the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'stopped'}", file=sys.stderr, flush=True)
        if error.args:  # `loop.train` has saved
            sys.exit(INTERRUPTED)
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # doesn't wait for threads


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_now(number: int, frame: types.FrameType | None) -> None:
    os.write(sys.stderr.fileno(), b"\nstopped\n")
    os._exit(INTERRUPTED)


_interrupt.again = _end_now


def _settle_config(argv: list[str], recipe: str) -> None:
    """Sets --config to the recipe's file, in place since config_flags reads sys.argv itself."""
    for i, text in enumerate(argv):
        if text in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = _with_file(argv[i + 1])
            return
        if match := re.match(r"--?config=", text):
            argv[i] = match[0] + _with_file(text[match.end() :])
            return
    if recipe:
        argv.insert(1, f"--config={_with_file(recipe)}")
    elif any(re.match(r"--?config\.", text) for text in argv):
        raise InputError(_NO_RECIPE)


def _with_file(recipe: str) -> str:
    name, colon, argument = recipe.partition(":")
    return f"{find_recipe(name)}{colon}{argument}"


def _fill(names: Sequence[str], arguments: list[str]) -> list[str]:
    """Assigns the first arguments to the flags that aren't set; returns the others."""
    for name in names:
        if arguments and not flags.FLAGS[name].present:
            flags.FLAGS[name].parse(arguments.pop(0))
    return arguments


_MOVED = [  # flags' names of earlier versions
    (re.compile(r"^--?config\.(classification|fewshot)(?=\.)"), "--config.evaluators"),
    (re.compile(rf"^--?config\.({'|'.join(WORKFLOW)})(?=[.=]|$)"), r"--config.workflow.\1"),
]


_FIELD = re.compile(r"^--?config\.([\w.]+)=(.*)$")
_EITHER = (("steps", "epochs"), ("epochs", "steps"))  # setting one unsets the other


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, also those of earlier versions; returns the remaining arguments.

    `--config.field=none` unsets an optional field. Setting one of steps and epochs unsets the
    other. Raises ValueError for a flag that doesn't exist or has a wrong value.
    """
    # --config.data may be a dataset's name. In place, since config_flags reads sys.argv itself.
    argv[:] = [re.sub(r"^--?config\.data(?==|$)", "--config.data.dataset", text) for text in argv]
    for old, new in _MOVED:
        for name in sorted({match[1] for text in argv if (match := old.match(text))}):
            print(
                f"--config.{name} is now {old.sub(new, f'--config.{name}.')[:-1]}", file=sys.stderr
            )
        argv[:] = [old.sub(new, text) for text in argv]
    fields = [match for text in argv if (match := _FIELD.match(text))]
    unset = [match[1] for match in fields if match[2].lower() == "none"]
    argv[:] = [text for text in argv if not ((m := _FIELD.match(text)) and m[1] in unset)]
    named = {match[1] for match in fields} - {*unset}
    unset += [other for one, other in _EITHER if one in named and other not in named]
    try:
        arguments = flags.FLAGS(argv)
        for name in unset:
            _unset(flags.FLAGS["config"].value, name)
    except Exception as error:
        given = [match[1] for text in argv if (match := re.match("--?config=([^:]*)", text))]
        if told := fault_in(given[-1] if given else "", error):
            raise told from error  # by the recipe; absl would show a traceback
        if isinstance(error, flags.Error):
            raise InputError(f"{error}; {_program()} --help lists the flags") from error
        if isinstance(error, KeyError):  # from ConfigDict: --config.group.field without that group
            raise InputError(f"unknown group in --config.group.field: {error.args[0]}") from error
        raise
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        handler = logging.get_absl_handler()
        handler.addFilter(_is_ours)  # orbax logs every part of every save
        handler.setFormatter(standard_logging.Formatter("%(levelname)s: %(message)s"))
        for library in CHATTY:
            standard_logging.getLogger(library).setLevel(standard_logging.CRITICAL)
    if flags.FLAGS["offline"].value:
        os.environ["VIT_JAX_OFFLINE"] = "1"
    skip_absent_tpu()
    return arguments


def _unset(config: ml_collections.ConfigDict, name: str) -> None:
    """Sets a field to "none", which `config.build` converts to None if the field is optional."""
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[field] = "none"


def _is_ours(record: standard_logging.LogRecord) -> bool:
    """Whether a log record is from this package, or an error that isn't also raised."""
    ours = record.pathname.startswith(os.path.dirname(__file__))
    raised = "/orbax/" in record.pathname  # with the traceback of each thread
    return ours or (record.levelno >= standard_logging.ERROR and not raised)


def skip_absent_tpu() -> None:
    """Makes jax use the CPU if libtpu is installed but no TPU and no other plugin exists.

    libtpu, which `plan` needs, would search for a TPU and print to stderr that there is none.
    """
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
    if plugins == ["libtpu"] and not chips and not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if jax := sys.modules.get("jax"):  # has already read the variable
            jax.config.update("jax_platforms", "cpu")


def numbers(name: str, value: Any, kind: type) -> Any:
    """Converts a list flag's strings to a tuple of numbers; returns other values unchanged."""
    if not isinstance(value, list):
        return value
    try:
        return tuple(map(kind, value))
    except ValueError as error:
        raise InputError(f"--{name}={','.join(value)}: expected numbers, {error}") from error


def _program() -> str:
    """Returns how the command was started: "vit_jax transfer" or "python -m vit_jax.transfer"."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    known = sys.argv[0].startswith("vit_jax ") or not module
    return sys.argv[0] if known else f"python -m {module.name}"


def _usage(positional: Sequence[str], rest: str, required: bool) -> str:
    shown = " ".join(positional).upper()
    words = [f"[{shown}]" if shown and not required else shown, f"[{rest}]" if rest else ""]
    return printable(f"usage: {' '.join([_program(), *filter(None, words)])} [--flag=value ...]")


def _help(main: Callable, usage: str, recipe: str) -> str:
    """Returns the usage, the command's docstring, and its flags with their defaults."""
    lines = [usage, "", inspect.cleandoc(main.__globals__["__doc__"]), "", "flags:"]
    own = flags.FLAGS.get_flags_for_module(sys.argv[0])
    if "config" in flags.FLAGS:
        own = [flags.FLAGS["config"], *(flag for flag in own if flag.name != "config")]
    for flag in (*own, flags.FLAGS["offline"]):
        default = recipe if flag.name == "config" else flag.default
        if isinstance(default, list):
            default = ",".join(map(str, default))
        known = f": {', '.join(flag.parser.enum_values)}" if flag.flag_type() == "enum" else ""
        shown = "" if default in (None, "") else f" (default: {default})"
        lines.append(f"  --{flag.name:20} {flag.help}{known}{shown}")
    if "config" in flags.FLAGS:
        lines.append(f"  --{'config.FIELD':20} Any field of the recipe: vit_jax recipes NAME")
        lines += ["", "recipes:", *(f"  {name}" for name in list_recipes())]
    return "\n".join(lines)
