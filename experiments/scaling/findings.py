"""Fits laws, crossings and compute ratios to the results of a study or of the paper."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.scaling.extrapolate import LEVEL, Cell, Predictor, calibrate, make_cells, predict
from experiments.scaling.figures import IMAGES, paper
from experiments.scaling.fits import NAMES, compute_ratio, crossing, fit_simplest, frontier
from experiments.scaling.isoflops import show_isoflops
from experiments.scaling.runner import Store
from experiments.scaling.study import Study
from experiments.scaling.style import HUES, OTHERS, new_figure, save
from experiments.scaling.table import Point, average_tasks, grouped, kind_of, points
from vit_jax.config import InputError


def show_fits(study: Study | None, store: Store | None, folder: Path) -> None:
    """Prints all fits, or why one isn't possible; writes fits.json and fits.png to `folder`.

    Without a study, fits the paper's numbers. Raises ValueError if there is nothing to fit.
    """
    found = points(study, store.records()) if study else paper_points()
    found = [point for point in found if point.examples]  # laws need pretraining
    if not found:
        raise InputError(f"study {study.name} has no finished run: `run` makes them")
    results: dict[str, dict] = {"laws": {}, "crossings": {}}
    drawn, failed = [], {}
    for task, of_task in _tasks(found).items():
        for name, x, unit, of in _law_data(of_task):
            title = f"{task}: {name}"
            cells = sorted(grouped(of, x).items())
            at = np.array([value for value, _ in cells])
            error = np.array([1 - np.mean([p.accuracy for p in c]) / 100 for _, c in cells])
            if unit == "exaFLOPs":
                kept = frontier(at, error)
                at, error = at[kept], error[kept]
            try:
                law = fit_simplest(at, error)
            except ValueError as problem:
                failed.setdefault(str(problem), []).append(title)
                continue
            print(f"{title}, x in {unit}: {law.describe()}")
            results["laws"][title] = {
                **{key: getattr(law, key) for key in NAMES},
                "intervals": law.intervals,
                "undetermined": law.undetermined,
                "x": at.tolist(),
                "error": error.tolist(),
                "residuals": law.residuals.tolist(),
            }
            drawn.append((title, unit, at, error, law))
        for name, text, values in (*_crossings(of_task), *_ratios(of_task)):
            print(f"{task}: {name}: {text}")
            results["crossings"][f"{task}: {name}"] = values
    for problem, titles in failed.items():
        print(f"\nno law of {len(titles)}: {problem}\n  " + ", ".join(titles))
    results["predictions"] = show_predictions(found)
    folder.mkdir(parents=True, exist_ok=True)
    results["isoflops"] = show_isoflops(prediction_cells(found).get("exaFLOPs", []), folder)
    (folder / "fits.json").write_text(json.dumps(results, indent=1) + "\n")
    if drawn:
        draw_fits(drawn, folder)


def show_predictions(found: list[Point]) -> dict[str, dict]:
    """Prints the errors at 3 and 10 times the largest scale, or why there is no prediction.

    Also predicts the largest model from all others, which tests the prediction of new models.
    """
    results = {}
    for unit, cells in prediction_cells(found).items():
        print(f"\npredictions by {unit}")
        for known, kind in ((True, "models of the study"), (False, "other models")):
            try:
                predictor = calibrate(cells, known)
            except InputError as problem:
                print(f"no prediction of {kind}: {problem}")
                continue
            print(f"{kind}: {predictor.describe()}")
            values = dataclasses.asdict(predictor) | {"level": LEVEL, "predictions": []}
            for task, of in grouped(cells, lambda c: c.task).items():
                for line, value in predicted(predictor, of, known, unit):
                    print(f"  {task}: {line}")
                    values["predictions"].append({"task": task, **value})
            results[f"{kind}, by {unit}"] = values
    return results


def prediction_cells(found: list[Point]) -> dict[str, list[Cell]]:
    """Returns the cells to predict from, by the unit of their scale.

    With compute these are the runs on the largest pretraining set.
    """
    largest = max(p.examples for p in found)
    computed = [p for p in found if p.exaflops > 0 and p.examples == largest]
    by_images = [p for p in found if np.isnan(p.exaflops)]
    return {
        unit: make_cells(of) for unit, of in (("exaFLOPs", computed), ("images", by_images)) if of
    }


def predicted(predictor: Predictor, cells: list[Cell], known: bool, unit: str):
    """Yields (text, values) of the predictions of one task."""
    largest = max(cells, key=lambda cell: cell.scale)
    if not known:
        fitted = [cell for cell in cells if cell.model != largest.model]
        targets = [("held out", largest)] if fitted else []
    else:
        fitted, last = cells, {c.model: c for c in sorted(cells, key=lambda c: c.scale)}
        targets = []
        for times in (3, 10):
            longer = [c.times(times * largest.scale / c.scale) for c in last.values()]
            errors = predict(predictor.form, cells, longer)
            if np.isfinite(errors).any():
                targets.append((f"{times} times", longer[int(np.nanargmin(errors))]))
    for name, target in targets:
        try:
            error, low, high = predictor(fitted, target)
        except InputError as problem:
            yield f"{target.model}: no prediction: {problem}", {"problem": str(problem)}
            continue
        truth = f", measured {target.error:.2%}" if not known else ""
        yield (
            f"error {error:.2%} [{low:.2%}, {high:.2%}] at {target.scale:.3g} {unit} ({name}), "
            f"{target.model}{truth}",
            {"model": target.model, "scale": target.scale, "error": error, "interval": [low, high]},
        )


def paper_points() -> list[Point]:
    """Returns Table 6 and Figure 4 of the paper as points of a study."""
    nothing = {"sweep": "", "seed": 0, "parameters": 0, "img_per_sec": 0.0}
    families = {"vit": "ViT", "resnet": "ResNet", "hybrid": "hybrid"}
    found = []
    for row in paper("table6"):
        for task, column in (("average of 5", "avg5_computed"), ("ImageNet", "ImageNet")):
            found.append(
                Point(
                    row["name"],
                    families[row["family"]],
                    "JFT-300M",
                    303_000_000,
                    f"{row['epochs']} epochs",
                    task=task,
                    accuracy=float(row[column]),
                    noise=0.05,
                    exaflops=float(row["exaFLOPs"]),
                    images_seen=int(row["epochs"]) * 303_000_000,
                    **nothing,
                )
            )
    for row in paper("fig4"):
        family = "ResNet" if "ResNet" in row["model"] else "ViT"
        for size, images in IMAGES.items():
            found.append(
                Point(
                    row["model"],
                    family,
                    size,
                    int(images),
                    "best",
                    task="ImageNet 5-shot",
                    accuracy=float(row[size]),
                    noise=0.2,
                    exaflops=np.nan,
                    images_seen=0,
                    **nothing,
                )
            )
    return found


def _tasks(found: list[Point]) -> dict[str, list[Point]]:
    tasks = grouped(found, lambda p: p.task)
    for kind in sorted({kind_of(task) for task in tasks if task.endswith("-shot")}):
        if sum(kind_of(task) == kind for task in tasks) > 1:
            tasks[f"average {kind}"] = average_tasks(found, kind)
    return tasks


def _law_data(found: list[Point]):
    """Yields the laws to fit: name, x of a point, its unit, points."""

    def compute(point):
        return point.exaflops

    largest = max(p.examples for p in found)
    at_largest = [p for p in found if p.examples == largest and np.isfinite(p.exaflops)]
    if at_largest:
        for family, of in grouped(at_largest, lambda p: p.family).items():
            yield f"frontier of {family}s", compute, "exaFLOPs", of
        yield "frontier of all", compute, "exaFLOPs", at_largest
    if len({p.examples for p in found}) > 1:
        for model, of in grouped(_one_budget(found), lambda p: p.model).items():
            yield f"{model} by images", lambda p: p.examples, "images", of


def _one_budget(found: list[Point]) -> list[Point]:
    """Returns the points of the budget that most sizes have."""
    budgets = grouped(found, lambda p: p.budget)
    return max(budgets.values(), key=lambda of: (len({p.examples for p in of}), len(of)))


def _crossings(found: list[Point]):
    """Yields (name, text, values): images from which a ViT or hybrid is better than a ResNet."""
    found = _one_budget(found)
    models = grouped(found, lambda p: p.model)
    rivals = [m for m, of in models.items() if of[0].family == "ResNet"]
    for model, of in models.items():
        for rival in rivals if model not in rivals else ():
            sizes = sorted({p.examples for p in of} & {p.examples for p in models[rival]})
            if len(sizes) < 2:
                continue
            curves = [
                [[p.accuracy for p in points_ if p.examples == size] for size in sizes]
                for points_ in (of, models[rival])
            ]
            single = any(len(v) < 2 for curve in curves for v in curve)
            noise = float(np.sqrt(np.mean([p.noise**2 for p in (*of, *models[rival])])))
            found_at = crossing(sizes, *curves, noise=noise if single else 0.0)
            name = f"{model} overtakes {rival}"
            yield name, found_at.describe(" images"), dataclasses.asdict(found_at)


def _ratios(found: list[Point]):
    """Yields (name, text, values): relative compute of two families at equal error."""
    largest = max(p.examples for p in found)
    families = grouped([p for p in found if p.examples == largest], lambda p: p.family)
    curves = {}
    for family, of in families.items():
        cells = sorted(grouped(of, lambda p: (p.exaflops, p.model)).items())
        errors = [1 - float(np.mean([p.accuracy for p in c])) / 100 for _, c in cells]
        if all(np.isfinite(p.exaflops) for p in of):
            curves[family] = [at for (at, _), _ in cells], errors
    for family, rival in (("ViT", "ResNet"), ("hybrid", "ViT")):
        if family in curves and rival in curves:
            name = f"compute of {rival}s for the quality of {family}s"
            try:
                low, middle, high = compute_ratio(curves[family], curves[rival])
            except ValueError as problem:
                yield name, str(problem), {"problem": str(problem)}
                continue
            values = {"lowest": low, "median": middle, "highest": high}
            yield name, f"{middle:.2g} times as much ({low:.2g} to {high:.2g})", values


def draw_fits(drawn: list[tuple], folder: Path) -> None:
    """Draws each law with its points, and residuals below."""
    shown = [d for d in drawn if d[0].startswith("average")][:8] or drawn[:8]
    figure, axes = new_figure(2, 5.2, 4.2)
    colours = (*HUES.values(), *OTHERS)
    for number, (title, unit, at, error, law) in enumerate(shown):
        # Frontiers share points: later ones are smaller, so that earlier ones show as rings.
        style = {"color": colours[number], "ms": 10 - number}
        line = np.geomspace(at.min(), at.max(), 100)
        open_ = " (not determined)" if law.undetermined else ""
        axes[0].plot(line, law(line), color=colours[number], ls="--" if law.undetermined else "-")
        axes[0].plot(at, error, "o", **style, label=f"{title}{open_}")
        axes[1].plot(at, law.residuals, "o", **style)
        for ax in axes:
            ax.set(xscale="log", xlabel=unit)
    axes[0].set(yscale="log", ylabel="error")
    axes[1].axhline(0, color="0.5", lw=0.8)
    axes[1].set(ylabel="residual of log error")
    axes[0].legend(fontsize=6)
    save(figure, folder, "fits")
