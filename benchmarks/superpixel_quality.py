"""Quality of `slic` beside scikit-image's: python -m benchmarks.superpixel_quality --data ../shared/data

Of every image of a folder with images/ and labels/ (255 = not known), at equal numbers of segments: ours are as many as
scikit-image really made when it was asked for 200, 400 or 800, or as nearly so as four trials give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

import cc4s_kernels as ck

UNKNOWN = 255


class Quality(NamedTuple):
    """segments: how many. recall: share of the true boundary with a boundary of segments within 2 pixels (higher is
    better). error: corrected under-segmentation error, the share of pixels that are not of the class that most pixels
    of their segment have (lower is better)."""

    segments: float
    recall: float
    error: float


def boundaries(ids: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose left or upper neighbour has another id."""
    out = np.zeros(ids.shape, bool)
    out[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    out[1:] |= ids[1:] != ids[:-1]
    return out


def quality(ids: np.ndarray, truth: np.ndarray) -> Quality:
    """ids (H, W) from 0, truth (H, W) of classes. NaN where `truth` has no boundary, or no known pixel."""
    true = boundaries(truth)
    near = ndimage.binary_dilation(boundaries(ids), np.ones((5, 5), bool))
    known = truth != UNKNOWN
    inside = np.zeros((int(ids.max()) + 1, 256), np.int64)
    np.add.at(inside, (ids[known], truth[known]), 1)
    wrong = int((inside.sum(1) - inside.max(1)).sum())
    recall = (true & near).sum() / true.sum() if true.any() else np.nan
    return Quality(int(ids.max()) + 1, float(recall), wrong / known.sum() if known.any() else np.nan)


def pairs_of(folder: Path, names: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image (H, W, 3) and truth (H, W) of each name."""
    from PIL import Image

    for name in names:
        with (
            Image.open(folder / "images" / f"{name}.jpg") as image,
            Image.open(folder / "labels" / f"{name}.png") as truth,
        ):
            yield np.array(image.convert("RGB")), np.array(truth)


def compare(image: np.ndarray, truth: np.ndarray, wanted: int) -> tuple[Quality, Quality]:
    """Ours and scikit-image's, which was asked for `wanted` segments; ours are as many as it made, or nearly so."""
    from skimage.segmentation import slic

    theirs = slic(image, wanted, compactness=10, start_label=0)
    goal = asked = int(theirs.max()) + 1
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    trials = []
    # Both unite small regions: ours too is asked for more than it should make.
    for _ in range(4):
        ids = ck.slic(pixels, max(asked, 1))[0].numpy()
        found = int(ids.max()) + 1
        trials.append((abs(found - goal), found, ids))
        asked += goal - found
    ours = min(trials, key=lambda trial: trial[:2])[2]
    return quality(ours, truth), quality(theirs, truth)


def means(folder: Path, wanted: list[int]) -> dict[int, tuple[Quality, Quality]]:
    """Ours and scikit-image's for each number of segments, means over all images of `folder`."""
    from tqdm import tqdm

    names = sorted(path.stem for path in (folder / "labels").glob("*.png"))
    found: dict[int, list[tuple[Quality, Quality]]] = {k: [] for k in wanted}
    for image, truth in tqdm(pairs_of(folder, names), folder.name, len(names), file=sys.stderr, disable=None):
        for k in wanted:
            found[k].append(compare(image, truth, k))
    averages = {k: np.nanmean(np.array(pairs), 0) for k, pairs in found.items()}
    return {k: (Quality(*ours), Quality(*theirs)) for k, (ours, theirs) in averages.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--set", action="append", help="folder in it; msrc21 and grabcut20 by default")
    parser.add_argument("--segments", type=int, action="append", help="200, 400 and 800 by default")
    options = parser.parse_args(arguments)
    print("| images | asked for | segments, ours / theirs | recall, ours / theirs | error, ours / theirs |")
    print("|---|---|---|---|---|")
    for name in options.set or ["msrc21", "grabcut20"]:
        for k, pair in means(options.data / name, options.segments or [200, 400, 800]).items():
            parts = (f"{a:{form}} / {b:{form}}" for a, b, form in zip(*pair, (".0f", ".4f", ".4f"), strict=True))
            print(f"| {name} | {k} | {' | '.join(parts)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
