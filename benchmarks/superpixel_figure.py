"""The picture of superpixels, boundaries and edge weights: python -m benchmarks.superpixel_figure --out FILE

Of a photograph with which scikit-image comes, or of --image FILE.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import cc4s_kernels as ck

OUT = Path(__file__).parents[1] / "docs" / "kernels" / "superpixels.png"
# Weights of docs/method.md section 7 end here.
HIGHEST = 0.8


def figure(image: np.ndarray, num_segments: int) -> Any:
    """image (H, W, 3) uint8 -> four panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    ids = ck.slic(pixels, num_segments)
    graph = ck.color_affinity(pixels, ids, num_segments)
    boundary = ck.superpixel_boundaries(ids)[0].numpy()
    segments = ids[0].numpy()
    present = np.arange(segments.max() + 1)
    mean = np.stack([ndimage.mean(channel, segments, present) for channel in image.transpose(2, 0, 1)], 1)
    # x, y of the middle of each superpixel.
    center = np.array(ndimage.center_of_mass(np.ones(segments.shape), segments, present))[:, ::-1]
    number = int(graph.num_edges[0])
    lines, weight = center[graph.edge_index[0, :, :number].T.numpy()], graph.weight[0, :number].numpy()

    height, width = segments.shape
    made = Figure(figsize=(9, 9 * height / width + 0.4), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(2, 2).ravel()
    titles = ("photograph", f"{len(present)} superpixels", "boundaries", f"{number} edges by weight")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9, loc="left", y=1.0)
        axis.set_axis_off()
    axes[0].imshow(image)
    axes[1].imshow(mean[segments].round().astype(np.uint8), interpolation="nearest")
    axes[2].imshow(np.where(boundary[..., None], [255, 225, 0], image).astype(np.uint8), interpolation="nearest")
    # Dark, so that the lines stand out; the strong ones above the others.
    axes[3].imshow(image.mean(2) * 0.5, cmap="gray", vmin=0, vmax=255)
    order = np.argsort(weight)
    lines, weight = lines[order], weight[order]
    drawn = LineCollection(lines, array=weight, cmap="plasma", linewidths=0.4 + 1.6 * weight / HIGHEST)
    drawn.set_clim(0, HIGHEST)
    # In the line of the title.
    bar = axes[3].inset_axes((0.7, 1.02, 0.22, 0.035))
    made.colorbar(axes[3].add_collection(drawn), cax=bar, orientation="horizontal", ticks=())
    bar.text(-0.05, 0.4, "0", transform=bar.transAxes, fontsize=8, ha="right", va="center")
    bar.text(1.05, 0.4, f"{HIGHEST}", transform=bar.transAxes, fontsize=8, va="center")
    return made


def main(arguments: list[str] | None = None) -> int:
    from PIL import Image
    from skimage.data import coffee

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, metavar="FILE", help="another photograph")
    parser.add_argument("--segments", type=int, default=300)
    parser.add_argument("--out", type=Path, metavar="FILE", default=OUT)
    options = parser.parse_args(arguments)
    image = np.array(Image.open(options.image).convert("RGB")) if options.image else coffee()
    figure(image, options.segments).savefig(options.out, dpi=100)
    # 255 colours: a third of the size.
    Image.open(options.out).convert("RGB").quantize(255, kmeans=1).save(options.out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
