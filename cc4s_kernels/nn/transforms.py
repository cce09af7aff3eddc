"""Transforms of an image as seen on its grid of feature cells: which positions two views of it share.

A view has its positions in row-major order, (B, N, ...). `of_image` takes what belongs to the image,
`of_target` what belongs to the transformed image; both return the common positions, in the image's order.
Only indices move: no permutation matrix is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cc4s_kernels._validation import check_number, describe


def _grid(name: str, x: Tensor, height: int, width: int) -> Tensor:
    """(B, N, ...) as (B, height, width, ...)."""
    if x.dim() < 2 or x.shape[1] != height * width:
        raise ValueError(
            f"{name}: got {describe(x)}, expected (B, N, ...) with N = {height * width} "
            f"(the {height} x {width} cells of the transform)"
        )
    return x.unflatten(1, (height, width))


@dataclass(frozen=True)
class Flip:
    """The transformed image is the image mirrored left to right.

    Args:
        height: rows of the feature grid. width: its columns.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_number(name, getattr(self, name), low=1, integer=True)

    def of_image(self, x: Tensor, name: str = "x") -> Tensor:
        """(B, height * width, ...) as it is."""
        return _grid(name, x, self.height, self.width).flatten(1, 2)

    def of_target(self, x: Tensor, name: str = "x") -> Tensor:
        """(B, height * width, ...) mirrored back."""
        return _grid(name, x, self.height, self.width).flip(2).flatten(1, 2)


@dataclass(frozen=True)
class Crop:
    """The transformed image is a window of the image that starts on a feature cell.

    With output stride s and align_corners=True: a window whose corner is a multiple of s pixels and whose
    sides are s * m + 1 pixels has m + 1 cells along that side.

    Args:
        height: rows of the image's feature grid. width: its columns.
        top: first row of the window, in cells. left: first column of the window.
        crop_height: rows of the window. crop_width: columns of the window.
    """

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("crop_height", self.crop_height, low=1, high=self.height, integer=True)
        check_number("crop_width", self.crop_width, low=1, high=self.width, integer=True)
        check_number("top", self.top, low=0, high=self.height - self.crop_height, integer=True)
        check_number("left", self.left, low=0, high=self.width - self.crop_width, integer=True)

    def of_image(self, x: Tensor, name: str = "x") -> Tensor:
        """(B, height * width, ...) -> (B, crop_height * crop_width, ...), the window."""
        grid = _grid(name, x, self.height, self.width)
        rows = slice(self.top, self.top + self.crop_height)
        columns = slice(self.left, self.left + self.crop_width)
        return grid[:, rows, columns].flatten(1, 2)

    def of_target(self, x: Tensor, name: str = "x") -> Tensor:
        """(B, crop_height * crop_width, ...) as it is."""
        return _grid(name, x, self.crop_height, self.crop_width).flatten(1, 2)


Transform = Flip | Crop
