"""Dense CRF post-processing of probabilities (METHOD 6): exact, or through an installed lattice package."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import cc4s_kernels as ck
from cc4s.config import CrfConfig
from cc4s.errors import UserError

ITERATIONS = 10
# Of the published post-processing: standard deviations of position (pixels) and colour (levels), then compatibility.
GAUSSIAN = (3, 3)
BILATERAL = (80, 13, 10)
# Smaller probabilities count as this, as in pydensecrf.
LEAST_PROBABILITY = 1e-5


def require(config: CrfConfig) -> None:
    """Raises UserError where the lattice is asked for and pydensecrf is not installed."""
    if config.method == "lattice" and importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            "key crf.method: lattice needs the package pydensecrf (pip install pydensecrf2); exact does not"
        )


def describe(config: CrfConfig, device: torch.device) -> str:
    """How the CRF runs on a device, for logs and results."""
    if config.method == "lattice":
        return "lattice (pydensecrf), full size"
    if device.type == "cpu" and config.cpu_size > 0:
        return f"exact, on a grid with a long side of at most {config.cpu_size} pixels (crf.cpu_size)"
    return "exact, full size"


def refine(probability: Tensor, image: np.ndarray, config: CrfConfig) -> Tensor:
    """Mean-field inference in a fully connected CRF (Krähenbühl and Koltun 2011).

    Args:
        probability: (C, H, W) floating, sums to 1 over C.
        image: (H, W, 3) uint8 RGB.
        config: method, and the grid of exact inference on a CPU.

    Returns:
        (C, H, W) float32 refined probabilities on the same device.

    Raises:
        UserError: pydensecrf is asked for and not installed.
    """
    if config.method == "lattice":
        require(config)
        return torch.from_numpy(_lattice(probability.float().cpu().numpy(), image)).to(probability.device)
    reduced = config.cpu_size if probability.device.type == "cpu" else 0
    rgb = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(probability.device)
    return _exact(probability.float()[None], rgb[None], reduced)[0]


def _exact(probability: Tensor, image: Tensor, reduced: int) -> Tensor:
    """On a grid with a long side of at most `reduced` pixels, or at full size for 0.

    On a grid, the standard deviations of positions shrink with it, and what the CRF changes there in the logarithms
    of the probabilities is upsampled (bilinear) and added at full size: what the network resolved stays.
    """
    size = probability.shape[2:]
    share = min(1.0, reduced / max(size)) if reduced > 0 else 1.0
    if share == 1.0:
        return ck.dense_crf(probability, image, iterations=ITERATIONS, gaussian=GAUSSIAN, bilateral=BILATERAL)
    grid = [max(1, round(side * share)) for side in size]
    coarse = interpolate(probability, grid, mode="area")
    refined = ck.dense_crf(
        coarse,
        interpolate(image / 255, grid, mode="area").clamp(0, 1),
        iterations=ITERATIONS,
        gaussian=(share * GAUSSIAN[0], GAUSSIAN[1]),
        bilateral=(share * BILATERAL[0], *BILATERAL[1:]),
    )
    change = _log(refined) - _log(coarse)
    return (_log(probability) + interpolate(change, size, mode="bilinear")).softmax(1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(LEAST_PROBABILITY, 1.0).log()


def _lattice(probability: np.ndarray, image: np.ndarray) -> np.ndarray:
    from pydensecrf import densecrf
    from pydensecrf.utils import unary_from_softmax

    classes, height, width = probability.shape
    field = densecrf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probability)))
    field.addPairwiseGaussian(sxy=GAUSSIAN[0], compat=GAUSSIAN[1])
    sxy, srgb, compat = BILATERAL
    field.addPairwiseBilateral(sxy=sxy, srgb=srgb, compat=compat, rgbim=np.ascontiguousarray(image))
    return np.asarray(field.inference(ITERATIONS), dtype=np.float32).reshape(probability.shape)
