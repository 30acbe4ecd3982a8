"""An HTML page about one training step: findings, norms of its layers, images with their losses."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from vit_jax.config import printable


def make_page(
    title: str,
    summary: list[str],
    rows: list[tuple[str, ...]],
    images: Sequence[np.ndarray],
    captions: list[str],
) -> str:
    """Returns the page as self-contained HTML."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary)
    table = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{_png(image)}" height="128">'
        f"<figcaption>{html.escape(printable(caption))}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    style = "body{font:14px sans-serif}figure{display:inline-block}td{padding:0 1em}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1><ul>{lines}</ul>"
        f"<table>{table}</table>{figures}\n"
    )


def _png(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def norms_table(
    steps: Sequence[Mapping[str, float]], before: Mapping, now: Mapping
) -> list[tuple[str, ...]]:
    """Returns each layer's norms in the last step, with the earlier steps' medians in brackets."""
    *earlier, last = steps

    def cell(kind: str, layer: str) -> str:
        if (name := f"{kind} {layer}") not in last:
            return ""
        medians = f" ({np.median([v[name] for v in earlier]):.3g})" if earlier else ""
        return f"{last[name]:.3g}{medians}"

    def activation(layer: str) -> str:
        if layer not in now:
            return ""
        medians = f" ({before[layer][0]:.3g})" if layer in before else ""
        return f"{now[layer][0]:.3g}{medians}"

    layers = [name.removeprefix("gradient ") for name in last if name.startswith("gradient ")]
    layers = list(dict.fromkeys([*now, *layers]))
    head = ("layer", "gradient (before)", "update (before)", "activations' RMS (step before)")
    return [head] + [
        (layer, cell("gradient", layer), cell("update", layer), activation(layer))
        for layer in layers
    ]
