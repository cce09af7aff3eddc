"""Mean-field inference in a fully connected CRF, on the exact bilateral filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype, without_autocast
from cc4s_kernels._validation import check_number, check_positive, check_tensor, describe
from cc4s_kernels.ops.bilateral_filter import bilateral_filter, check_image

# Probabilities below have this unary energy, as in pydensecrf.
LEAST_PROBABILITY = 1e-5


def dense_crf(
    prob: Tensor,
    image: Tensor,
    *,
    iterations: int = 10,
    gaussian: Sequence[float] | None = (3.0, 3.0),
    bilateral: Sequence[float] | None = (80.0, 13.0, 10.0),
) -> Tensor:
    """Refines class probabilities by mean-field inference in a fully connected CRF, exactly: no lattice.

    Unary energies -log prob (prob at least 1e-5), Potts compatibilities, and two kernels: one of position, one of
    position and colour. With S_m = D_m^-1/2 K_m D_m^-1/2, D_m = diag(K_m 1), the symmetric normalisation that is
    pydensecrf's default, and w_m the compatibilities:

        Q_0 = prob,   Q_{t+1} = softmax over classes of (log prob + sum_m w_m S_m Q_t)

    The pair (i, i) counts in K_m, as in a lattice. The position kernel is a product of one matrix for rows and one
    for columns.

    Args:
        prob: (B, C, H, W) floating, sums to 1 over C.
        image: (B, 3, H, W) uint8 RGB, or floating in [0, 1]; see `cc4s_kernels.bilateral_filter`.
        iterations: number of mean-field steps, at least 0.
        gaussian: (sigma_xy in pixels, compatibility), or None for no such kernel.
        bilateral: (sigma_xy in pixels, sigma_rgb in levels, compatibility), or None.

    Returns:
        (B, C, H, W) refined probabilities in the dtype of `prob`, computed in float32 (float64 for float64). They
        have no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Cost: iterations + 1 exact filters of H W pixels: fast on a GPU; on a CPU minutes for a whole photograph.
    Source: P. Krähenbühl and V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
    Potentials", 2011.
    """
    check_tensor("prob", prob, dims="(B, C, H, W)", floating=True)
    batch, _, height, width = prob.shape
    check_image(image, (batch, 3, height, width), prob.device, None)
    check_number("iterations", iterations, low=0, integer=True)
    sigma_xy, compatibility = _parts("gaussian", gaussian, ("sigma_xy",))
    near_xy, near_rgb, near_compatibility = _parts("bilateral", bilateral, ("sigma_xy", "sigma_rgb"))
    with torch.no_grad(), without_autocast(prob.device):
        dtype = accumulation_dtype(prob.dtype)
        unary = prob.to(dtype).clamp(LEAST_PROBABILITY, 1.0).log()

        def smooth(x: Tensor) -> Tensor:
            rows, columns = (_line_kernel(side, sigma_xy, x) for side in (height, width))
            return rows @ x @ columns

        def near(x: Tensor) -> Tensor:
            return bilateral_filter(x, image, sigma_xy=near_xy, sigma_rgb=near_rgb, include_self=True)

        kernels = [(smooth, compatibility)] if gaussian is not None else []
        kernels += [(near, near_compatibility)] if bilateral is not None else []
        # At least 1 on the diagonal of K: no division by 0.
        scales = [kernel(torch.ones_like(unary[:, :1])).rsqrt() for kernel, _ in kernels]
        refined = unary.softmax(1)
        for _ in range(iterations):
            energy = unary
            for (kernel, weight), scale in zip(kernels, scales, strict=True):
                energy = energy + weight * scale * kernel(scale * refined)
            refined = energy.softmax(1)
        return refined.to(prob.dtype)


def _line_kernel(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length) exp(-(a - b)^2 / (2 sigma^2))."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.exp((position[:, None] - position).square() * (-0.5 / sigma**2))


def _parts(name: str, value: Any, sigmas: Sequence[str]) -> Sequence[float]:
    """The checked numbers of a kernel: standard deviations and compatibility."""
    if value is None:
        return (1.0,) * (len(sigmas) + 1)
    if not isinstance(value, Sequence) or len(value) != len(sigmas) + 1:
        raise ValueError(f"{name}: got {describe(value)}, expected ({', '.join(sigmas)}, compatibility) or None")
    for part, number in zip(sigmas, value, strict=False):
        check_positive(f"{name} {part}", number)
    check_number(f"{name} compatibility", value[-1], low=0)
    return value
