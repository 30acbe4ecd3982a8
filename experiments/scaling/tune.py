"""Tunes a recipe's learning rate on a narrow proxy, which shares it by the width rule."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from experiments.scaling.cost import dataset_of, estimate, line, total
from experiments.scaling.paper_recipes import family
from experiments.scaling.runner import Store, train, work
from experiments.scaling.study import (
    Budget,
    Choice,
    Grid,
    Model,
    PretrainingSet,
    Run,
    Study,
    expand,
)
from experiments.scaling.table import last_loss
from vit_jax.config import InputError, build
from vit_jax.costs.topology import parse_topology
from vit_jax.models.variants import ModelConfig, build_model
from vit_jax.recipes import merge, recipe

NARROWER = 4  # times, where the heads allow it
FACTORS = tuple(2.0**k for k in range(-3, 4))  # of the recipe's learning rate


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A target recipe and the study of its proxy."""

    name: str  # of the target's recipe
    target: Run
    rule: dict[str, Any]  # fields that both recipes have
    study: Study


def propose(
    name: str, width: int | None, steps: int | None, rates: tuple[float, ...], seeds: int
) -> Tuning:
    """Returns the proxy of a pretraining recipe: heads of the same width, but fewer of them.

    Args:
      name: a recipe's name or file, with its argument.
      width: of the proxy; None: a quarter of the model's, or as near as whole heads allow.
      steps: of the proxy; None: the recipe's. Warm-up and cooldown shrink in proportion.
      rates: learning rates to try; empty: 7 around the recipe's, a factor of 2 apart.
      seeds: runs per learning rate.

    Raises:
      ValueError: a recipe of fine-tuning, a model without a width rule, or no such proxy.
    """
    target = recipe(name).to_dict()
    if target.get("workflow") or "init" in target:
        raise InputError(f"{name} fine-tunes a model of a given width: tune a pretraining recipe")
    size = (target["image_size"],) * 2
    model = build_model(build(ModelConfig, target["model"]), 0, size)
    config = model.config
    if model.grid is None:
        raise InputError(
            f"{config.variant} has no width rule, only ViTs and hybrids do: tune it at its own size"
        )
    heads = proxy_heads(config.width, config.num_heads, width)
    narrow = heads * config.width // config.num_heads
    rule = {"width_rule": "mup", "base_width": narrow, "base_heads": heads}
    rule = {f"optimizer.{field}": value for field, value in rule.items()}

    if seeds < 1 or (steps is not None and steps < 1) or any(not 0 < r < math.inf for r in rates):
        raise InputError(f"seeds={seeds}, steps={steps}, rates={rates}: expected more than 0")
    examples = dataset_of(target)[1]
    long = target.get("steps") or math.ceil(target["epochs"] * examples / target["batch_size"])
    steps = steps or long
    schedule = target["schedule"]
    fields = rule | {
        "epochs": None,
        "model.width": narrow,
        "model.num_heads": heads,
        "model.mlp_dim": round(config.mlp_dim * narrow / config.width),
        **{
            f"schedule.{part}": round(schedule[part] * steps / long)
            for part in ("warmup", "cooldown")
            if part in schedule
        },
    }
    if config.representation_size == config.width:
        fields["model.representation_size"] = -1
    peak = schedule["peak"]
    rates = rates or tuple(peak * factor for factor in FACTORS)
    model = Model(f"width {narrow}", family(config.variant), {})
    images = PretrainingSet(target["data"]["dataset"], max(examples, 1), {})
    grid = Grid(
        merge(target, fields),
        models=(model,),
        sets=(images,),
        budgets=(Budget(steps),),
        seeds=tuple(range(seeds)),
        sweep=tuple(
            Choice(f"lr {rate:.3g}", {"schedule.peak": rate}) for rate in sorted(set(rates))
        ),
    )
    whole = Run("pretrain", {"model": config.variant}, target)
    return Tuning(name, whole, rule, Study("tune", (grid,)))


def proxy_heads(width: int, heads: int, wanted: int | None) -> int:
    """Returns the proxy's heads, which have the target's width of a head; see `propose`."""
    each = width // heads
    if wanted is None:
        if heads == 1:
            raise InputError(f"width {width} has 1 head: no narrower model has whole heads")
        return max(1, round(heads / NARROWER))
    if wanted % each or not 0 < wanted < width:
        below = min(max(wanted // each, 1), heads - 1) * each
        raise InputError(
            f"width = {wanted}: the model's {heads} heads are {each} wide: use a multiple of "
            f"{each} below {width}" + (f", such as {below}" if below else "")
        )
    return wanted // each


def show_tuning(options: argparse.Namespace, store: Store, free: dict[str, Any]) -> int:
    """Proposes, runs and evaluates a tuning in a store; returns 1 if no run finished."""
    rates = tuple(options.rates or ())
    tuning = propose(options.recipe, options.width, options.steps, rates, options.seeds)
    runs, topology = expand(tuning.study), parse_topology(options.topology)
    costs = [estimate(run, topology, options.mfu, None) for run in (*runs, tuning.target)]
    model, budget = runs[0].labels["model"], runs[0].labels["budget"]
    print(line(f"proxy: {model}, {budget}, {len(runs)} runs", total(costs[:-1])))
    print(line(f"target: {tuning.target.labels['model']}", costs[-1]))
    if options.print:
        return 0
    work(tuning.study, store, train, free=free)
    losses = measured(runs, store)
    for rate, loss in losses.items():
        print(
            f"learning rate {rate:<9.3g} " + (f"loss {loss:.4f}" if loss < math.inf else "failed")
        )
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        print(f"no learning rate has a finished run: {store.folder / 'records'} says why")
        return 1
    if len(losses) > 1 and best in (min(losses), max(losses)):
        print(f"the best rate, {best:.3g}, is at the end of those tried: widen --rates")
    print(f"target's recipe: {write_target(tuning, best, store.folder)}")
    return 0


def measured(runs: list[Run], store: Store) -> dict[float, float]:
    """Returns the mean `last_loss` of each learning rate."""
    records, found = store.records(), {}
    for run in runs:
        loss = last_loss(records.get(run.name, {"status": "missing"}))
        found.setdefault(run.config["schedule"]["peak"], []).append(loss)
    return {rate: sum(losses) / len(losses) for rate, losses in sorted(found.items())}


def write_target(tuning: Tuning, rate: float, folder: Path) -> Path:
    """Writes the target's recipe with the width rule and the learning rate."""
    path, _, argument = tuning.name.partition(":")
    if Path(path).is_file():
        path = str(Path(path).resolve())
    name = f"{path}:{argument}" if argument else path
    fields = tuning.rule | {"schedule.peak": rate}
    lines = "".join(f"    {field!r}: {value!r},\n" for field, value in fields.items())
    written = folder / "target.py"
    written.write_text(
        f'"""{tuning.name} with a learning rate tuned at width '
        f"{tuning.rule['optimizer.base_width']}.\n\n"
        f'vit_jax pretrain --config={written} --workdir=WORKDIR\n"""\n\n'
        f"from vit_jax.recipes import recipe\n\nFIELDS = {{\n{lines}}}\n\n\n"
        f"def get_config(arg=None):\n    return recipe({name!r}, **FIELDS)\n"
    )
    return written
