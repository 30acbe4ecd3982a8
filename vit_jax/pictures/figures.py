"""Draws Figures 6, 7, 10, 11 and 14 of arXiv 2010.11929 with matplotlib."""

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter


def overlay(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Darkens an image uint8 [H, W, 3] where the attention map `seen` [rows, columns] is low.

    As in Figures 6 and 14 (google-research/vision_transformer, issue 27): enlarges the map
    (Lanczos), blurs it by one patch, scales it to [0, 1] and multiplies.
    """
    return np.uint8(np.round(image * _enlarge(seen, *image.shape[:2])[..., None]))


def heat(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Colours a greyed image uint8 [H, W, 3] by the attention map `seen` [rows, columns].

    Unlike `overlay`, it stays visible where the image is dark or the attention low.
    """
    colours = mpl.colormaps["inferno"](_enlarge(seen, *image.shape[:2]))[..., :3]
    grey = image.mean(axis=-1, keepdims=True) / 255
    return np.uint8(np.round(255 * (0.45 * grey + 0.55 * colours)))


def _enlarge(seen: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map of this size with values in [0, 1]."""
    mask = Image.fromarray((seen / seen.max()).astype(np.float32))
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    # Pillow blurs only 8-bit images.
    mask = Image.fromarray(np.uint8(255 * np.clip(np.asarray(mask), 0, 1)))
    mask = mask.filter(ImageFilter.GaussianBlur(height / seen.shape[0]))
    mask = np.asarray(mask, np.float32)
    low, high = mask.min(), mask.max()
    return (mask - low) / (high - low) if high > low else np.ones_like(mask)


def draw_rollout(images: np.ndarray, maps: np.ndarray, columns: int = 4) -> Figure:
    """Draws images uint8 [B, H, W, 3] beside their attention maps [B, rows, cols]."""
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
    """Draws principal components [n, side, side, 3], scaled to [0, 1] each (Figure 7, left)."""
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
    """Draws cosine similarities of positions, [rows, cols, rows, cols] (Figure 7, centre)."""
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
    """Draws mean attention distances [L, H], in pixels, over depth (Figure 7, right)."""
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
