"""slic: superpixels of a photograph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import cc4s_kernels as ck
from benchmarks.harness import Case, Provider, Run
from benchmarks.photograph import photograph

OP = "slic"
# The crop and the number of superpixels of the training recipe.
SIZES = ({"B": 1, "H": 465, "W": 465, "K": 800},)
GPU_SIZES = ({**SIZES[0], "B": 16},)


def cases(sizes: Sequence[dict[str, int]] = SIZES, dtypes: Sequence[str] = ("uint8",)) -> list[Case]:
    """Integers only. Least traffic: three bytes of a pixel read, its id written."""
    return [
        Case(OP, size, dtype, "forward", 0, 0, (3 + 4) * size["B"] * size["H"] * size["W"])
        for size in sizes
        for dtype in dtypes
    ]


def explained_variation(image: np.ndarray, ids: np.ndarray) -> float:
    """The share of the variance of the colours (H, W, 3) that the means of the segments `ids` (H, W) keep."""
    pixels, ids = image.reshape(-1, 3).astype(np.float64), ids.ravel()
    count = np.maximum(np.bincount(ids), 1)
    mean = np.stack([np.bincount(ids, channel) / count for channel in pixels.T], 1)
    center = pixels.mean(0)
    return float(((mean[ids] - center) ** 2).sum() / ((pixels - center) ** 2).sum())


def scikit_image(case: Case, device: torch.device) -> Run:
    """Asked for the number of segments that comes closest to ours, which must explain the image as well as its own."""
    from skimage.segmentation import slic

    k = case.size["K"]
    tensor = photograph(*(case.size[key] for key in "BHW"))
    images = tensor.permute(0, 2, 3, 1).numpy()

    def segments(image: np.ndarray, wanted: int) -> np.ndarray:
        return slic(image, wanted, compactness=10, max_num_iter=10, start_label=0)

    ours = ck.slic(tensor[:1], k)[0].numpy()
    # What it makes of a number depends on the image.
    made = {n: segments(images[0], n) for n in range(max(k * 3 // 4, 1), k * 3 // 2, max(k // 40, 1))}
    best = min(made, key=lambda n: abs(int(made[n].max()) - int(ours.max())))
    found, expected = explained_variation(images[0], ours), explained_variation(images[0], made[best])
    # Two good partitions with as many segments differ by less than this in how much of the image they explain.
    assert found >= expected - 0.01, f"segments explain {found:.3f} of the variance, scikit-image's {expected:.3f}"
    return lambda: [torch.from_numpy(segments(image, best)) for image in images]


def fast_slic(case: Case, device: torch.device) -> Run:
    """fast-slic 0.4 with AVX2: another distance and another rule for small components, so no equal result either."""
    from fast_slic.avx2 import SlicAvx2

    images = photograph(*(case.size[key] for key in "BHW")).permute(0, 2, 3, 1).contiguous().numpy()

    def run() -> Sequence[Tensor]:
        made = (SlicAvx2(case.size["K"], compactness=10).iterate(image, max_iter=10) for image in images)
        return [torch.from_numpy(segments) for segments in made]

    return run


def on_backend(name: str, case: Case, device: torch.device) -> Run:
    image = photograph(*(case.size[key] for key in "BHW")).to(device)

    def run() -> Sequence[Tensor]:
        with ck.use_backend(name):
            return (ck.slic(image, case.size["K"]),)

    return run


def providers(case: Case, device: torch.device) -> list[Provider]:
    made = [Provider("scikit-image", scikit_image, note="compared in quality only")]
    made.append(Provider("fast-slic", fast_slic, note="not compared"))
    made.append(Provider("reference", lambda c, d: on_backend("reference", c, d)))
    for name in ck.backends.available(OP):
        if name != "reference":
            # Every backend gives the same bits.
            made.append(Provider(f"cc4s {name}", lambda c, d, name=name: on_backend(name, c, d), "reference", 0.0))
    return made
