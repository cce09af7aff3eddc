"""The definition of `color_affinity` in plain PyTorch, with static shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cc4s_kernels._precision import accumulation_dtype

COLOR_BINS = 25
TEXTURE_BINS = 10


class SuperpixelGraph(NamedTuple):
    """Sparse symmetric affinities between the superpixels of each image; see `cc4s_kernels.color_affinity`.

    edge_index: (B, 2, E) int64, each pair once with i < j, sorted; padding is (0, 0).
    weight: (B, E) floating, 0 on padding.
    num_nodes: K, the same for all images.
    num_edges: (B,) int64, edges before the padding.
    counts: (B, K) int64, pixels of each superpixel; 0 = absent.
    """

    edge_index: Tensor
    weight: Tensor
    num_nodes: int
    num_edges: Tensor
    counts: Tensor


class Histograms(NamedTuple):
    """Pixel counts per superpixel, int64.

    color: (B, K, 75), three channels of 25 bins. texture: (B, K, 20), 10 bins of the x and of the y gradient.
    counts: (B, K).
    """

    color: Tensor
    texture: Tensor
    counts: Tensor


def to_uint8(image: Tensor) -> Tensor:
    """Values in [0, 1] to 0..255, rounded half to even."""
    if image.dtype == torch.uint8:
        return image
    return (image.to(accumulation_dtype(image.dtype)) * 255).round().clamp(0, 255).to(torch.uint8)


def _difference(y: Tensor, valid: Tensor, dim: int) -> Tensor:
    """y[+1] - y[-1] along `dim`; twice the one-sided difference beside one invalid pixel, 0 between two."""
    size = y.shape[dim]
    index = torch.arange(size, device=y.device)
    sides = []
    for step in (-1, 1):
        there = (index + step).clamp(0, size - 1)
        inside = ((index + step) == there).view([-1 if d == dim else 1 for d in range(3)])
        sides.append((y.index_select(dim, there), valid.index_select(dim, there) & inside))
    (before, has_before), (after, has_after) = sides
    both = has_before & has_after
    low, high = before.where(has_before, y), after.where(has_after, y)
    return (high - low) * torch.where(both, 1, 2)


def texture_bins(image: Tensor, valid: Tensor) -> Tensor:
    """image (B, 3, H, W) uint8, valid (B, H, W) -> bins (B, 2, H, W) of the x and y gradients."""
    red, green, blue = image.long().unbind(1)
    y = 299 * red + 587 * green + 114 * blue  # [B, H, W]
    g = torch.stack([_difference(y, valid, 2), _difference(y, valid, 1)], 1)  # [B, 2, H, W]
    # One range for both directions; an image without a valid pixel gets the range 0.
    unused = ~valid[:, None]
    low = g.masked_fill(unused, torch.iinfo(torch.int32).max).amin((1, 2, 3), keepdim=True)
    high = g.masked_fill(unused, torch.iinfo(torch.int32).min).amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp(min=0)
    bins = torch.div((g - low) * TEXTURE_BINS, span.clamp(min=1), rounding_mode="floor")
    return bins.clamp(0, TEXTURE_BINS - 1).where(span > 0, 0)


def histograms(image: Tensor, superpixels: Tensor, num_superpixels: int) -> Histograms:
    """image (B, 3, H, W) uint8, superpixels (B, H, W) int64 -> integer histograms per superpixel."""
    batch, k = image.shape[0], num_superpixels
    valid = (superpixels >= 0) & (superpixels < k)
    # Pixels without a superpixel fall into row k, which is cut off.
    node = superpixels.where(valid, k).flatten(1)  # [B, HW]

    def count(bins: Tensor, number: int) -> Tensor:
        """bins (B, S, H, W) -> (B, K, S * number)."""
        sets = bins.shape[1]
        offset = number * torch.arange(sets, device=bins.device)[:, None]
        index = (node[:, None] * sets * number + offset + bins.flatten(2)).flatten(1)
        total = torch.zeros(batch, (k + 1) * sets * number, dtype=torch.int64, device=bins.device)
        total = total.scatter_add(1, index, torch.ones_like(index))
        return total.view(batch, k + 1, sets * number)[:, :k]

    color = torch.div(image.long() * COLOR_BINS, 255, rounding_mode="floor").clamp(max=COLOR_BINS - 1)
    counts = count(torch.zeros_like(superpixels)[:, None], 1)[:, :, 0]
    return Histograms(count(color, COLOR_BINS), count(texture_bins(image, valid), TEXTURE_BINS), counts)


def adjacency(superpixels: Tensor, num_superpixels: int, max_edges: int) -> tuple[Tensor, Tensor]:
    """The pairs of ids with 4-adjacent pixels: edge_index (B, 2, max_edges), num_edges (B,).

    num_edges is the true number; edges beyond `max_edges` have no place in edge_index.
    """
    batch, k = superpixels.shape[0], num_superpixels

    def keys(a: Tensor, b: Tensor) -> Tensor:
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        # The key k * k is no pair.
        return (low * k + high).where((low >= 0) & (high < k) & (low != high), k * k).flatten(1)

    across = keys(superpixels[:, :, 1:], superpixels[:, :, :-1])
    down = keys(superpixels[:, 1:], superpixels[:, :-1])
    key = torch.cat([across, down], 1).sort(1).values
    before = torch.nn.functional.pad(key, (1, 0), value=-1)[:, :-1]
    new = (key != before) & (key < k * k)  # first of each pair
    num_edges = new.sum(1)
    # Each first goes to its rank, all else to the slot max_edges, which is cut off.
    slot = (new.cumsum(1) - 1).where(new, max_edges).clamp(max=max_edges)
    edge = torch.zeros(batch, max_edges + 1, dtype=torch.int64, device=key.device)
    edge = edge.scatter(1, slot, key.where(new, 0))[:, :max_edges]
    return torch.stack([edge // k, edge % k], 1), num_edges


def edge_weights(histogram: Histograms, edge_index: Tensor, num_edges: Tensor) -> Tensor:
    """Weights (B, E) float64 of the edges, 0 on padding."""
    batch, _, slots = edge_index.shape
    if slots == 0:
        return torch.zeros(batch, 0, dtype=torch.float64, device=edge_index.device)

    def distance(histogram_of: Tensor) -> Tensor:
        h = histogram_of.double() / histogram.counts.clamp(min=1)[..., None]  # [B, K, S]
        i, j = (h.gather(1, index[..., None].expand(-1, -1, h.shape[2])) for index in edge_index.unbind(1))
        return (i - j).square().sum(2).sqrt()

    w = torch.exp(-5 * (distance(histogram.color) / 25 + distance(histogram.texture) / 100))
    real = torch.arange(slots, device=w.device) < num_edges[:, None]
    lowest = w.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    u = (w - 0.8 * lowest).clamp(min=0).where(real, 0)
    # With an edge, the largest u is at least 0.2 min w > 0.
    highest = u.amax(1, keepdim=True)
    return 0.8 * u / highest.where(highest > 0, 1)


def color_affinity(
    image: Tensor, superpixels: Tensor, num_superpixels: int, *, max_edges: int | None = None
) -> SuperpixelGraph:
    """docs/method.md section 7 as it is written; arguments are valid (the public function checks them)."""
    if max_edges is None:
        max_edges = planar_edges(num_superpixels)
    image, superpixels = to_uint8(image.detach()), superpixels.long()
    histogram = histograms(image, superpixels, num_superpixels)
    edge_index, num_edges = adjacency(superpixels, num_superpixels, max_edges)
    weight = edge_weights(histogram, edge_index, num_edges).float()
    # Edges without a place: no silent loss, the energy becomes NaN.
    weight = weight.masked_fill((num_edges > max_edges)[:, None], torch.nan)
    return SuperpixelGraph(edge_index, weight, num_superpixels, num_edges, histogram.counts)


def planar_edges(num_nodes: int) -> int:
    """The largest number of edges of a simple planar graph."""
    return max(num_nodes - 1, 3 * num_nodes - 6)
