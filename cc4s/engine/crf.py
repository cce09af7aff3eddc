"""Dense CRF post-processing of probabilities (METHOD 6) through an installed lattice package."""

from __future__ import annotations

import importlib.util

import numpy as np

from cc4s.errors import UserError

ITERATIONS = 10
# Standard deviations and compatibilities of the published post-processing: position (pixels), colour (levels).
GAUSSIAN = {"sxy": 3, "compat": 3}
BILATERAL = {"sxy": 80, "srgb": 13, "compat": 10}


def require() -> None:
    """Raises UserError unless pydensecrf is installed."""
    if importlib.util.find_spec("pydensecrf") is None:
        raise UserError("keys inference.crf, pseudo.crf: need the package pydensecrf (pip install pydensecrf2)")


def dense_crf(probability: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Mean-field inference in a fully connected CRF (Krähenbühl and Koltun 2011).

    Args:
        probability: (C, H, W) float32, sums to 1 over C.
        image: (H, W, 3) uint8 RGB.

    Returns:
        (C, H, W) float32 refined probabilities.

    Raises:
        UserError: pydensecrf is not installed.
    """
    require()
    from pydensecrf import densecrf
    from pydensecrf.utils import unary_from_softmax

    classes, height, width = probability.shape
    field = densecrf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probability)))
    field.addPairwiseGaussian(**GAUSSIAN)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **BILATERAL)
    return np.asarray(field.inference(ITERATIONS), dtype=np.float32).reshape(probability.shape)
