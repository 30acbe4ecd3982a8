"""Runs scaling studies, draws their figures and the paper's, fits laws.

vit_jax scaling COMMAND --study=mini, which is python -m experiments.scaling

expand    lists the runs of a study
cost      estimates exaFLOPs, chip-hours and price per run on a given slice
run       runs what is missing; can be killed and restarted, and run on several machines at once
status    shows the state of every run
figures   draws the paper's figures with the study's results
fit       fits laws, frontiers and crossings and predicts larger runs, with intervals
tune      finds a recipe's learning rate on a narrower model, and writes the recipe with it
advise    says what to train for a budget of chip-hours, and the accuracy to expect
"""

import argparse
import ast
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from experiments.scaling.runner import Store, commands, statuses, train, work
from experiments.scaling.study import Study, expand, load_study
from vit_jax.command_line import stoppable
from vit_jax.config import InputError, explained_errors
from vit_jax.parallel.run_files import as_path

RESULTS = Path(__file__).parent / "results"

OF_THE_PAPER = Path("runs/scaling/paper")  # figures and fits of the paper's own numbers


def _path(text: str) -> Path:
    """A path on a disk or in a bucket, as an argument."""
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vit_jax scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, **kwargs) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name)
        command.add_argument("--study", help="name in studies/ or file, then :ARG", **kwargs)
        command.add_argument("--folder", type=_path, help="runs; default runs/scaling/STUDY")
        command.add_argument("--results", type=_path, help="default results.jsonl in the folder")
        return command

    add("expand", required=True)
    cost = add("cost", required=True)
    cost.add_argument("--topology", default="v3:4x4", help="v5e:16x16, h100:8, ...")
    cost.add_argument("--num_slices", type=int, default=1)
    cost.add_argument("--mfu", type=float, default=0.4)
    cost.add_argument("--price_per_chip_hour", type=float)
    cost.add_argument("--compile", action="store_true", help="estimate with the compiler")
    run = add("run", required=True)
    run.add_argument("--print", action="store_true", help="only print commands for a cluster")
    run.add_argument("--only", help="name of a single run")
    run.add_argument("--minutes", type=float, default=float("inf"), help="then start no more runs")
    run.add_argument("--workers", type=int, default=1, help="processes, each with one GPU")
    run.add_argument("--retry_failed", action="store_true")
    run.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                     help="a field of this machine: mesh.fsdp=8, data.data_dir=/data")  # fmt: skip
    status = add("status", required=True)
    status.add_argument("--all", action="store_true", help="also show finished runs")
    figures = add("figures")
    figures.add_argument(
        "--output", type=_path, help="folder; default beside the results, or runs/scaling/paper"
    )
    fit = add("fit")
    fit.add_argument("--output", type=_path, help="folder; by default of the results")
    tune = subparsers.add_parser("tune")
    tune.add_argument("--recipe", required=True, help="pretrain/paper:ViT-B/16, or a file")
    tune.add_argument("--width", type=int, help="of the proxy; default a quarter, in whole heads")
    tune.add_argument("--steps", type=int, help="of the proxy; default the recipe's")
    tune.add_argument("--rates", type=float, nargs="+", help="default 7 around the recipe's")
    tune.add_argument("--seeds", type=int, default=1, help="runs per rate")
    tune.add_argument("--folder", type=_path, help="default runs/scaling/tune/RECIPE")
    tune.add_argument("--topology", default="v5e:4x4", help="of the costs")
    tune.add_argument("--mfu", type=float, default=0.4)
    tune.add_argument("--print", action="store_true", help="only print the proxy and the costs")
    tune.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                      help="a field of this machine, as of run")  # fmt: skip
    advise = add("advise")
    advise.add_argument("--budget", type=float, required=True, help="chip-hours")
    advise.add_argument("--topology", required=True, help="v5e:16x16, h100:8, ...")
    advise.add_argument("--images", type=int, help="in your pretraining set")
    advise.add_argument("--task", help="whose accuracy counts")
    advise.add_argument("--mfu", type=float, default=0.4)
    return parser.parse_args(arguments)


def open_store(options: argparse.Namespace, study: Study) -> Store:
    """Opens the study's folder; results kept in the repository stay there."""
    folder = options.folder or Path("runs/scaling") / study.name
    kept = RESULTS / study.name / "results.jsonl"
    return Store(folder, options.results or (kept if kept.exists() else None))


def run(options: argparse.Namespace, study: Study) -> int:
    """Runs the study; returns 1 if a run failed or was refused, or with --only isn't done."""
    store = open_store(options, study)
    store.keep_compiled()
    if options.retry_failed:
        for name in store.forget_failed():
            print(f"again: {name}")
    if options.print:
        paths = f"--study={options.study} --folder={store.folder} --results={store.results}"
        print("\n".join(commands(statuses(study, store), paths)))
        return 0
    if options.workers > 1:
        return run_workers(options.workers)
    found = work(
        study, store, train,
        free=dict(parse_field(text) for text in options.set),
        only=options.only,
        seconds=60 * options.minutes,
    )  # fmt: skip
    if options.only:
        found = [status for status in found if status.run.name == options.only]
        show(found, everything=True)
        return int(found[0].state != "done")
    show(found, everything=False)
    return int(any(s.state in ("failed", "blocked", "changed", "no data") for s in found))


def run_workers(count: int) -> int:
    """Runs the same command in `count` processes, which share the study by its claims.

    Restarts a process that a signal killed, for example when out of memory. A run that kills
    several processes is recorded as failed.
    """
    arguments = [a for a in sys.argv[1:] if a != "--retry_failed"] + ["--workers=1"]

    def start(index: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "vit_jax", "scaling", *arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(index)}
        return subprocess.Popen(command, env=environment, start_new_session=True)

    workers, codes = {i: start(i) for i in range(count)}, []
    try:
        while workers:
            for i, worker in list(workers.items()):
                if (code := worker.poll()) is None:
                    continue
                if code < 0:
                    print(f"worker {i} was killed by signal {-code}: restarting it")
                    workers[i] = start(i)
                else:
                    codes.append(workers.pop(i).returncode)
            time.sleep(1)
    except KeyboardInterrupt:  # theirs are other sessions, which the terminal doesn't tell
        for worker in workers.values():
            worker.send_signal(signal.SIGINT)
        for worker in workers.values():
            worker.wait()
        raise
    return max(codes)


def parse_field(text: str) -> tuple[str, object]:
    """Parses `mesh.fsdp=8`; a value that isn't a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set={text}: expected FIELD=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def show(found: list, everything: bool) -> None:
    """Prints counts by state, and a line for each run that isn't done."""
    shown = set()
    for status in found:
        if everything or status.state != "done":
            note = "as above" if status.note in shown else status.note.replace("\n", "\n    ")
            print(f"{status.state:11} {status.run.key}" + (f": {note}" if note else ""))
            if "\n" in note or len(note) > 100:
                shown.add(status.note)
    counts = Counter(status.state for status in found)
    print(f"{len(found)} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items()))


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    with explained_errors():
        if options.command == "tune":
            folder = Path("runs/scaling/tune") / options.recipe.replace("/", "_")
            store = Store(options.folder or folder)
            store.keep_compiled()
            from experiments.scaling.tune import show_tuning

            return show_tuning(options, store, dict(parse_field(text) for text in options.set))
        study = load_study(options.study) if options.study else None
        if options.command == "expand":
            for item in expand(study):
                after = item.init or item.trunk
                print(item.name + (f"  after {after}" if after else ""))
        elif options.command == "run":
            return run(options, study)
        elif options.command == "status":
            show(statuses(study, open_store(options, study)), options.all)
        elif options.command == "cost":
            from experiments.scaling.cost import show_cost

            show_cost(study, options)
        elif options.command == "figures":
            from experiments.scaling.figures import draw_paper
            from experiments.scaling.study_figures import draw_study

            if study:
                store = open_store(options, study)
                written = draw_study(study, store, options.output or store.results.parent)
            else:
                written = draw_paper(options.output or OF_THE_PAPER)
            print("\n".join(map(str, written)))
        elif options.command == "advise":
            from experiments.scaling.advise import show_advice

            show_advice(study, open_store(options, study) if study else None, options)
        else:
            from experiments.scaling.findings import show_fits

            store = open_store(options, study) if study else None
            folder = store.results.parent if store else OF_THE_PAPER
            show_fits(study, store, options.output or folder)
    return 0


if __name__ == "__main__":
    with stoppable():
        sys.exit(main(sys.argv[1:]))
