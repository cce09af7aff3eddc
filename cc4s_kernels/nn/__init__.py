"""Modules and losses on top of the ops."""

from cc4s_kernels.nn._reduce import global_count
from cc4s_kernels.nn.consistency import EigenspaceConsistencyLoss
from cc4s_kernels.nn.dense import DenseCRFLoss, KernelCutLoss, NormalizedCutLoss
from cc4s_kernels.nn.gated_crf import GatedCRFLoss
from cc4s_kernels.nn.losses import (
    ColorConstraintLoss,
    Counts,
    PartialCrossEntropyLoss,
    PottsLoss,
    ScribbleLoss,
    ScribbleTerms,
    SoftEntropyLoss,
    global_counts,
)
from cc4s_kernels.nn.propagation import CollisionCrossEntropyLoss, RandomWalkerLoss
from cc4s_kernels.nn.random_walk import RandomWalk2d
from cc4s_kernels.nn.transforms import Crop, Flip
from cc4s_kernels.nn.tree_energy import TreeEnergyLoss

__all__ = [
    "CollisionCrossEntropyLoss",
    "ColorConstraintLoss",
    "Counts",
    "Crop",
    "DenseCRFLoss",
    "EigenspaceConsistencyLoss",
    "Flip",
    "GatedCRFLoss",
    "KernelCutLoss",
    "NormalizedCutLoss",
    "PartialCrossEntropyLoss",
    "PottsLoss",
    "RandomWalk2d",
    "RandomWalkerLoss",
    "ScribbleLoss",
    "ScribbleTerms",
    "SoftEntropyLoss",
    "TreeEnergyLoss",
    "global_count",
    "global_counts",
]
