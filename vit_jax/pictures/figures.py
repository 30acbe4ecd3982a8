"""Draws what a model learned, as in Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929.

Each function returns a matplotlib figure; nothing here computes more than it must to draw.
"""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter


def overlay(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The image where it is looked at, darkened elsewhere: uint8 [H, W, 3], map [rows, columns].

    As the paper's authors drew Figures 6 and 14 (google-research/vision_transformer, issue 27): the
    map enlarged (Lanczos), blurred by a patch, stretched to [0, 1], and used as a mask.
    """
    height, width = image.shape[:2]
    mask = Image.fromarray((seen / seen.max()).astype(np.float32))
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    # Pillow blurs 8-bit images alone.
    mask = Image.fromarray(np.uint8(255 * np.clip(np.asarray(mask), 0, 1)))
    mask = mask.filter(ImageFilter.GaussianBlur(height / seen.shape[0]))
    mask = np.asarray(mask, np.float32)
    low, high = mask.min(), mask.max()
    mask = (mask - low) / (high - low) if high > low else np.ones_like(mask)
    return np.uint8(np.round(image * mask[..., None]))


def draw_rollout(images: np.ndarray, maps: np.ndarray, columns: int = 4) -> Figure:
    """Pairs of an image and what of it the model looks at: uint8 [B, H, W, 3], [B, rows, cols]."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (image, seen) in enumerate(zip(images, maps, strict=True)):
        row, column = divmod(place, columns)
        axes[row, 2 * column].imshow(image)
        axes[row, 2 * column + 1].imshow(overlay(image, seen))
    for column in range(columns):
        axes[0, 2 * column].set_title("input", fontsize=9)
        axes[0, 2 * column + 1].set_title("attention", fontsize=9)
    return figure


def draw_filters(components: np.ndarray, shares: np.ndarray, columns: int = 7) -> Figure:
    """Principal components [n, side, side, 3], each stretched to [0, 1] (Figure 7, left)."""
    rows = -(-len(components) // columns)
    figure = Figure(figsize=(columns, rows + 0.5), layout="constrained")
    figure.suptitle(
        f"RGB filters: first {len(components)} principal components, "
        f"{shares.sum():.0%} of the variance",
        fontsize=10,
    )
    for axis in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.set_axis_off()
    for axis, component in zip(axes.flat, components, strict=False):
        low, high = component.min(), component.max()
        axis.imshow((component - low) / max(high - low, 1e-12))
    return figure


def draw_positions(similarity: np.ndarray) -> Figure:
    """Cosine similarity of each position to all: [rows, cols, rows, cols] (Figure 7, centre)."""
    rows, columns = similarity.shape[:2]
    figure = Figure(figsize=(7.2, 6.2 * rows / columns + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        drawn = axis.imshow(similarity[row, column], vmin=-1, vmax=1, cmap="viridis")
        axis.set_xticks([])
        axis.set_yticks([])
        if row == rows - 1:
            axis.set_xlabel(column + 1, fontsize=7)
        if column == 0:
            axis.set_ylabel(row + 1, fontsize=7)
    figure.suptitle("position embedding similarity", fontsize=10)
    figure.supxlabel("input patch column", fontsize=9)
    figure.supylabel("input patch row", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
    return figure


def draw_distances(distances: np.ndarray) -> Figure:
    """Mean attention distance of each head over depth: pixels [L, H] (Figure 7, right)."""
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axis = figure.subplots()
    for head, values in enumerate(distances.T):
        label = f"head {head + 1}" if head < 3 else "..." if head == 3 else None
        axis.plot(np.arange(len(values)), values, "o", markersize=4, alpha=0.7, label=label)
    axis.set_xlabel("network depth (layer)")
    axis.set_ylabel("mean attention distance (pixels)")
    axis.set_ylim(0, 1.05 * distances.max())
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)
    return figure
