"""Sliding windows, scales and flips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cc4s_kernels as ck
from cc4s.config import CrfConfig, DataConfig, InferenceConfig
from cc4s.engine import crf
from cc4s.engine.evaluation import pseudo_label
from cc4s.engine.inference import Predictor, window_corners
from cc4s.errors import UserError
from cc4s.models import SegmenterOutput

PLAIN = DataConfig(mean=[0.0], std=[1.0])


class Pixelwise(nn.Module):
    """Logits are a linear map of every 8th pixel, as a segmenter without receptive field would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0]]))
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SegmenterOutput:
        self.seen.append((x.shape[-2], x.shape[-1]))
        logits = torch.einsum("kc,bchw->bkhw", self.weight, x[..., ::8, ::8])
        return SegmenterOutput(logits, None, None, logits, (1, 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    window=st.integers(17, 90),
    stride=st.floats(0.05, 1.0),
)
def test_windows_cover_every_pixel_and_stay_inside(height: int, width: int, window: int, stride: float) -> None:
    seen = torch.zeros(height, width)
    for top, left in window_corners(height, width, window, stride):
        assert 0 <= top <= max(0, height - window)
        assert 0 <= left <= max(0, width - window)
        seen[top : top + window, left : left + window] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (65, 65), (70, 131)])
def test_constant_images_give_the_softmax_of_their_logits(size: tuple[int, int]) -> None:
    """Averages over windows, scales and flips of one and the same distribution are that distribution."""
    inference = InferenceConfig(scales=[0.5, 1.0, 1.3], flip=True, long_side=0, window=33)
    image = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, *size)
    network = Pixelwise()
    found = Predictor(network, inference, PLAIN).probabilities(image)
    expected = (network.weight @ torch.tensor([0.2, 0.5, 0.9])).softmax(0)
    assert found.shape == (4, *size)
    # Float32 rounding of a few averages.
    torch.testing.assert_close(found, expected[:, None, None].expand(4, *size), rtol=0, atol=1e-6)


def test_long_side_and_window() -> None:
    network = Pixelwise()
    inference = InferenceConfig(scales=[1.0], flip=False, long_side=64, window=48)
    found = Predictor(network, inference, PLAIN).probabilities(torch.rand(3, 100, 200))
    assert found.shape == (4, 100, 200)
    # 200 -> 64, 100 -> 32: windows of 32 x 48 at columns 0 and 16.
    assert network.seen == [(32, 48), (32, 48)]
    torch.testing.assert_close(found.sum(0), torch.ones(100, 200))


def test_flip_makes_predictions_equivariant() -> None:
    torch.manual_seed(0)
    inference = InferenceConfig(scales=[1.0], flip=True, long_side=0, window=500)
    predictor = Predictor(Pixelwise(), inference, PLAIN)
    image = torch.rand(3, 41, 57)
    found, mirrored = predictor.probabilities(image), predictor.probabilities(image.flip(-1))
    torch.testing.assert_close(mirrored.flip(-1), found)


def crf_input() -> tuple[torch.Tensor, np.ndarray]:
    """Two halves of one colour each, and probabilities with a wrong spot in the left one."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, 16:] = 200
    probability = torch.full((2, 24, 32), 0.3)
    probability[0, :, :16] = probability[1, :, 16:] = 0.7
    probability[:, 10:12, 6:8] = torch.tensor([0.45, 0.55])[:, None, None]
    return probability, image


@pytest.mark.parametrize("size", [0, 16])
def test_crf_on_a_grid_and_at_full_size(size: int) -> None:
    probability, image = crf_input()
    refined = crf.refine(probability, image, CrfConfig(cpu_size=size))
    torch.testing.assert_close(refined.sum(0), torch.ones(24, 32))
    # Both correct the spot and keep the edge of the image.
    assert torch.equal(refined.argmax(0), (torch.arange(32) >= 16).long().expand(24, 32))
    if size == 0:
        rgb = torch.from_numpy(image).permute(2, 0, 1)[None]
        assert torch.equal(refined, ck.dense_crf(probability[None], rgb)[0])


def test_a_grid_as_large_as_the_image_is_the_full_size() -> None:
    probability, image = crf_input()
    full, grid = (crf.refine(probability, image, CrfConfig(cpu_size=size)) for size in (0, 32))
    assert torch.equal(full, grid)


def test_crf_says_how_it_runs() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "at most 128 pixels" in crf.describe(CrfConfig(), cpu)
    assert crf.describe(CrfConfig(cpu_size=0), cpu) == crf.describe(CrfConfig(), gpu) == "exact, full size"
    assert crf.describe(CrfConfig(method="lattice"), gpu) == "lattice (pydensecrf), full size"
    with pytest.raises(UserError, match=r"crf\.method: lattice needs the package pydensecrf"):
        crf.refine(*crf_input(), CrfConfig(method="lattice"))


def test_pseudo_labels_threshold_and_scribbles() -> None:
    probability = torch.tensor([[[0.9, 0.6, 0.3]], [[0.1, 0.4, 0.7]]])
    scribble = torch.tensor([[255, 255, 0]]).numpy()
    assert pseudo_label(probability, None, 0.65, 255).tolist() == [[0, 255, 1]]
    assert pseudo_label(probability, scribble, 0.65, 255).tolist() == [[0, 255, 0]]
    # The threshold itself is enough.
    assert pseudo_label(torch.tensor([[[0.5]], [[0.5]]]), None, 0.5, 255).tolist() == [[0]]
