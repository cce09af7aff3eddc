"""Partial cross-entropy, soft entropy and superpixel pooling of upsampled logits, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from cc4s_kernels import backends
from cc4s_kernels._validation import (
    INTEGER_DTYPES,
    check_number,
    check_shape,
    check_tensor,
    describe,
    may_read_values,
    value_range,
)
from cc4s_kernels.ops.upsample_losses import library
from cc4s_kernels.ops.upsample_losses.reference import UpsampleLosses

__all__ = ["UpsampleLosses", "library", "upsample_losses"]


def upsample_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    superpixels: Tensor | None = None,
    num_superpixels: int | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
    class_weight: Tensor | None = None,
) -> UpsampleLosses:
    """Sums, per image, of what sparse labels and an entropy or colour term need from the upsampled logits.

    The logits are upsampled bilinearly to the size of `labels` (no antialiasing where that is smaller), and
    with p = softmax of the upsampled logits at a pixel, H = -sum_c p_c log p_c and 0 log 0 = 0:

    - cross_entropy = sum of -a_y log p_y over pixels with label y != ignore_index; labelled = sum of a_y
    - entropy = sum of m H over all pixels; weight = sum of m
    - pooled[k] = sum of p over pixels of superpixel k; counts[k] = number of those pixels

    with a = `class_weight` (1 without it) and m = `weight` (1 without it). Nothing is divided: the means,
    over whatever a batch is, are the caller's (`cc4s_kernels.nn` has them as modules). The full-resolution
    logits are an intermediate of the reference backend only.

    Args:
        logits: (B, C, h, w), any floating dtype, finite. float16 and bfloat16 are computed in float32, also
            under autocast.
        labels: (B, H, W), uint8, int16, int32 or int64, values in [0, C) or `ignore_index`.
        weight: (B, H, W), floating and non-negative, or bool (True = 1). A constant: it takes no gradient.
        superpixels: (B, H, W), int16, int32 or int64, ids in [0, num_superpixels), -1 for none.
        num_superpixels: K, required with `superpixels` and only with it.
        ignore_index: the label that means "no label". A value in [0, C) leaves that class out, except for the
            default 255 with more than 255 classes, which raises; more than 255 classes need wider labels too.
        align_corners: as in `torch.nn.functional.interpolate`.
        class_weight: (C,), floating and non-negative, for the cross-entropy only. A constant too.

    Returns:
        `UpsampleLosses` in float32 (float64 for float64 logits), counts included so that they divide sums:
        cross_entropy, labelled, entropy, weight (B,), pooled (B, K, C), counts (B, K); K = 0 without
        superpixels. Only cross_entropy, entropy and pooled carry a gradient. float32 counts are exact up to
        2^24 pixels.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype.
        ValueError: shape, device or option; on the CPU (elsewhere with CC4S_KERNELS_CHECK=1) also a label or
            an id out of range, a negative or non-finite weight. Unchecked, a label out of range counts as
            ignored and an id out of range as -1.

    Source: the paper "CC4S", partial cross-entropy, soft entropy and superpixel probabilities; docs/method.md
    sections 3, 4 and 7.
    """
    _check(logits, labels, weight, superpixels, num_superpixels, ignore_index, class_weight)
    options = {
        "weight": weight,
        "superpixels": superpixels,
        "num_superpixels": num_superpixels,
        "ignore_index": ignore_index,
        "align_corners": align_corners,
        "class_weight": class_weight,
    }
    return backends.select("upsample_losses", logits, labels, **options)(logits, labels, **options)


def _check(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    superpixels: Tensor | None,
    num_superpixels: int | None,
    ignore_index: int,
    class_weight: Tensor | None,
) -> None:
    check_tensor("logits", logits, dims="(B, C, h, w)", floating=True)
    batch, classes, *_ = logits.shape
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits: got {describe(logits)}, expected at least one class and one pixel")
    check_tensor("labels", labels, dims="(B, H, W)", dtypes=INTEGER_DTYPES, device=logits.device)
    size = labels.shape
    check_shape("labels", labels, (batch, *size[1:]), "the batch of logits")
    if 0 in size[1:]:
        raise ValueError(f"labels: got {describe(labels)}, expected at least one pixel")
    check_number("ignore_index", ignore_index, integer=True)
    if classes > 255 and labels.dtype == torch.uint8:
        raise TypeError(f"labels: got {describe(labels)} for {classes} classes, expected int16, int32 or int64")
    if classes > 255 and ignore_index == 255:
        raise ValueError(f"ignore_index: got 255, which is one of {classes} classes; expected another, such as -1")
    _check_labels(labels, classes, ignore_index)
    if weight is not None:
        check_tensor("weight", weight, dims="(B, H, W)", device=logits.device)
        check_shape("weight", weight, size, "the shape of labels")
        _check_weight("weight", weight)
    if class_weight is not None:
        check_tensor("class_weight", class_weight, dims="(C,)", floating=True, device=logits.device)
        check_shape("class_weight", class_weight, (classes,), "the classes of logits")
        _check_weight("class_weight", class_weight)
    if superpixels is None:
        if num_superpixels is not None:
            raise ValueError(f"num_superpixels: got {num_superpixels} without superpixels, expected None")
        return
    check_tensor(
        "superpixels",
        superpixels,
        dims="(B, H, W)",
        dtypes=(torch.int16, torch.int32, torch.int64),
        device=logits.device,
    )
    check_shape("superpixels", superpixels, size, "the shape of labels")
    if num_superpixels is None:
        raise ValueError("num_superpixels: got None, expected the number of superpixel ids")
    check_number("num_superpixels", num_superpixels, low=0, integer=True)
    _check_ids(superpixels, num_superpixels)


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    if not may_read_values(labels) or labels.numel() == 0:
        return
    low, high = value_range(labels, skip=ignore_index)
    if low >= 0 and high < classes:
        return
    # Compared with a uint8 tensor, -1 would be 255.
    wrong = ((labels < 0) | (labels >= classes)) & (labels.long() != ignore_index)
    found = labels[wrong]
    if found.numel():
        raise ValueError(
            f"labels: got {int(found[0])} among {found.numel()} values out of range, "
            f"expected 0 to {classes - 1}, or ignore_index {ignore_index}"
        )


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype == torch.bool:
        return
    if not weight.is_floating_point():
        raise TypeError(f"{name}: got {describe(weight)}, expected a floating dtype or bool")
    if weight.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, expected a constant (detach it)")
    if not may_read_values(weight) or weight.numel() == 0:
        return
    low, high = value_range(weight)
    # A NaN anywhere makes both NaN, and the comparison false.
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"{name}: got values from {low} to {high}, expected finite values >= 0")


def _check_ids(superpixels: Tensor, num_superpixels: int) -> None:
    if not may_read_values(superpixels) or superpixels.numel() == 0:
        return
    low, high = value_range(superpixels)
    if low < -1 or high >= num_superpixels:
        raise ValueError(
            f"superpixels: got ids from {low} to {high}, expected -1 to {num_superpixels - 1} "
            f"(num_superpixels {num_superpixels})"
        )
