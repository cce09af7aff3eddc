"""Fused kernels for pairwise-affinity learning in segmentation.

    import cc4s_kernels as ck

Ops are functions of tensors; `ck.nn` holds modules and losses. `ck.use_backend` chooses an implementation,
`ck.explain` says which one would run.
"""

from cc4s_kernels import backends, distributed, nn
from cc4s_kernels.backends import explain, use_backend
from cc4s_kernels.ops.bilateral_filter import bilateral_filter
from cc4s_kernels.ops.bilateral_filter.dense_crf import dense_crf
from cc4s_kernels.ops.color_affinity import SuperpixelGraph, color_affinity
from cc4s_kernels.ops.gated_crf import gated_crf
from cc4s_kernels.ops.neural_eigenspace import NeuralEigenspace, neural_eigenspace
from cc4s_kernels.ops.potts import PixelGrid, gaussian_grid, pixel_grid, potts
from cc4s_kernels.ops.random_walk import random_walk
from cc4s_kernels.ops.random_walker import random_walker
from cc4s_kernels.ops.slic import slic
from cc4s_kernels.ops.superpixel_boundaries import superpixel_boundaries
from cc4s_kernels.ops.transition_consistency import TransitionConsistency, transition_consistency
from cc4s_kernels.ops.transition_matrix import transition_matrix
from cc4s_kernels.ops.tree_filter import tree_filter
from cc4s_kernels.ops.upsample_losses import UpsampleLosses, upsample_losses
from cc4s_kernels.patching import patch

__all__ = [
    "NeuralEigenspace",
    "PixelGrid",
    "SuperpixelGraph",
    "TransitionConsistency",
    "UpsampleLosses",
    "backends",
    "bilateral_filter",
    "color_affinity",
    "dense_crf",
    "distributed",
    "explain",
    "gated_crf",
    "gaussian_grid",
    "neural_eigenspace",
    "nn",
    "patch",
    "pixel_grid",
    "potts",
    "random_walk",
    "random_walker",
    "slic",
    "superpixel_boundaries",
    "transition_consistency",
    "transition_matrix",
    "tree_filter",
    "upsample_losses",
    "use_backend",
]
