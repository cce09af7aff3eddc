"""`bilateral_filter` against loops over pairs of pixels, and its properties."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cc4s_kernels as ck
from cc4s_kernels import _triton, backends
from tests.ops.tester import OpTester, assert_matches, backend_params, eps, generator, randn
from tests.peak_memory import printed_by

SIGMAS = {"sigma_xy": 3.0, "sigma_rgb": 40.0}


def draw_image(batch, height, width, seed, device="cpu"):
    """Smooth colours with noise: far pairs of every similarity."""
    random = generator(seed)
    rough = torch.randint(0, 200, (batch, 3, -(-height // 4), -(-width // 4)), generator=random)
    smooth = rough.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width]
    noise = torch.randint(0, 56, smooth.shape, generator=random)
    return (smooth + noise).to(torch.uint8).to(device)


def draw_mask(batch, height, width, seed):
    """About a third masked; the second image of the batch has no valid pixel."""
    mask = torch.rand(batch, height, width, generator=generator(seed)) > 0.33
    mask[1:2] = False
    return mask


def naive_bilateral_filter(values, image, *, sigma_xy, sigma_rgb, mask=None, include_self=False):
    batch, _, height, width = values.shape
    colors = image.double() * (255 if image.is_floating_point() else 1)
    out = torch.zeros(values.shape, dtype=torch.float64)
    for b in range(batch):
        valid = [(y, x) for y in range(height) for x in range(width) if mask is None or mask[b, y, x]]
        pixels = [(y, x, colors[b, :, y, x].tolist()) for y, x in valid]
        if not valid:
            continue
        column = torch.stack([values[b, :, y, x].double() for y, x in valid])
        for i, (y, x, color) in enumerate(pixels):
            row = []
            for j, (y2, x2, color2) in enumerate(pixels):
                position = (y - y2) ** 2 + (x - x2) ** 2
                distance = sum((p - q) ** 2 for p, q in zip(color, color2, strict=True))
                weight = math.exp(-position / (2 * sigma_xy**2) - distance / (2 * sigma_rgb**2))
                row.append(weight if i != j or include_self else 0.0)
            out[b, :, y, x] = torch.tensor(row, dtype=torch.float64) @ column
    return (out,)


class TestBilateralFilter(OpTester):
    op_name = "bilateral_filter"
    # Rows of 11: patches of 8 x 16 pixels, and of 2 x 16 in Triton's interpreter, that do not fill the image.
    sizes = (1, 7) if _triton.INTERPRETED else (1, 7, 17)
    # One interpreted patch, where the size does not matter.
    common_size = 4 if _triton.INTERPRETED else 7
    differentiable = (0,)
    variants: ClassVar = {
        "plain": {"sigma_xy": 3.0, "sigma_rgb": 40.0},
        "self": {"sigma_xy": 20.0, "sigma_rgb": 15.0, "include_self": True},
    }
    representatives = ("plain",)

    def make_inputs(self, dtype, device, size, seed):
        width = 1 if size == 1 else min(size, 11)
        values = randn(2, 3, size, width, dtype=dtype, device=device, seed=seed)
        return (values, draw_image(2, size, width, seed, device)), dict(SIGMAS)

    naive = staticmethod(naive_bilateral_filter)

    def custom_op_calls(self):
        (values, image), _ = self.make_inputs(torch.float32, "cpu", 5, 1)
        op = torch.ops.cc4s_kernels.bilateral_filter.default
        return [(op, (values.requires_grad_(), image.float(), draw_mask(2, 5, 5, 0), 3.0, 40.0, True), {})]

    def test_second_derivative(self, backend, variant, device):
        """The filter is linear and its own gradient: the gradient of the gradient is the filter once more."""
        (values, image), kwargs = self.inputs(variant, self.work_dtype, device)
        values, cotangent = values.requires_grad_(), torch.ones_like(values).requires_grad_()
        with ck.use_backend(backend):
            (first,) = torch.autograd.grad(
                ck.bilateral_filter(values, image, **kwargs), values, cotangent, create_graph=True
            )
            (second,) = torch.autograd.grad(first, cotangent, values.detach())
            expected = ck.bilateral_filter(values.detach(), image, **kwargs)
        assert torch.equal(second, expected)


class TestMaskedFloatImage(TestBilateralFilter):
    """A floating image that is not a multiple of 1/255, and padding."""

    representatives = ("self",)

    def make_inputs(self, dtype, device, size, seed):
        (values, image), kwargs = super().make_inputs(dtype, device, size, seed)
        offset = torch.rand(image.shape, generator=generator(seed)).to(device)
        # float32 for every dtype of values: colours in bfloat16 would be other colours.
        image = (image.float() + offset) / 256
        mask = draw_mask(*image.shape[:1], *image.shape[2:], seed).to(device)
        return (values, image.double() if dtype == torch.float64 else image), {**kwargs, "mask": mask}


def inputs(batch=2, channels=3, height=6, width=5, dtype=torch.float64):
    values = randn(batch, channels, height, width, dtype=dtype, device="cpu", seed=1)
    return values, draw_image(batch, height, width, 2)


def all_backends(test):
    return pytest.mark.parametrize(("backend", "device"), backend_params("bilateral_filter"))(test)


@all_backends
def test_many_patches_and_channels(backend, device):
    """Several tiles in each direction, more channels than a tile has, ragged at every edge."""
    height, width = (5, 18) if _triton.INTERPRETED else (45, 37)
    values = randn(1, 37, height, width, dtype=torch.float32, device=device, seed=1)
    image = draw_image(1, height, width, 2, device)
    with ck.use_backend("reference"):
        truth = ck.bilateral_filter(values.double(), image, **SIGMAS)
        eager = ck.bilateral_filter(values, image, **SIGMAS)
    with ck.use_backend(backend):
        got = ck.bilateral_filter(values, image, **SIGMAS)
    # The rule of the tester: twice the error of eager PyTorch, plus the rounding of the largest entry.
    bound = 2 * float((eager - truth).abs().max()) + 2 * eps(torch.float32) * float(truth.abs().max())
    assert_matches("filtered", got, truth, atol=bound)


@all_backends
@pytest.mark.parametrize("sigmas", [(0.4, 1e6), (1e6, 2.0), (1.5, 8.0)])
def test_far_pairs_that_are_skipped_count_nothing(backend, device, sigmas):
    """Small standard deviations: exp is 0 in float32 for most pairs of patches."""
    height, width = (5, 18) if _triton.INTERPRETED else (40, 36)
    values = randn(1, 2, height, width, dtype=torch.float32, device=device, seed=3)
    image = draw_image(1, height, width, 4, device)
    kwargs = {"sigma_xy": sigmas[0], "sigma_rgb": sigmas[1]}
    with ck.use_backend("reference"):
        truth = ck.bilateral_filter(values.double(), image, **kwargs)
        eager = ck.bilateral_filter(values, image, **kwargs)
    with ck.use_backend(backend):
        got = ck.bilateral_filter(values, image, **kwargs)
    bound = 2 * float((eager - truth).abs().max()) + 2 * eps(torch.float32) * float(truth.abs().max())
    assert_matches("filtered", got, truth, atol=bound)


@all_backends
def test_an_isolated_pixel_keeps_its_small_sum(backend, device):
    """Without the pair (i, i) the sum of a grey pixel on black is tiny, and not lost in a difference of large ones."""
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device=device)
    image[0, :, 1, 1] = 100
    values = torch.full((1, 1, 4, 4), 1000.0, device=device)
    with ck.use_backend(backend):
        out = ck.bilateral_filter(values, image, sigma_xy=1e6, sigma_rgb=20.0)
    # 15 others, each at 3 * 100^2 squared levels; the exponent 37.5 has a rounding of 2^-20 of it.
    assert float(out[0, 0, 1, 1]) == pytest.approx(15e3 * math.exp(-37.5), rel=1e-5)


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    sigma_xy=st.floats(0.3, 30),
    sigma_rgb=st.floats(1, 100),
    include_self=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_the_kernel_is_symmetric_and_positive(height, width, sigma_xy, sigma_rgb, include_self, seed):
    a = randn(1, 2, height, width, dtype=torch.float64, device="cpu", seed=seed)
    b = randn(1, 2, height, width, dtype=torch.float64, device="cpu", seed=seed + 1)
    image = draw_image(1, height, width, seed)
    mask = torch.rand(1, height, width, generator=generator(seed)) > 0.3

    def filtered(x, include_self=include_self):
        return ck.bilateral_filter(
            x, image, sigma_xy=sigma_xy, sigma_rgb=sigma_rgb, mask=mask, include_self=include_self
        )

    # float64 sums of up to 36 terms, each at most 1 times a normal value.
    assert abs(float((a * filtered(b)).sum() - (b * filtered(a)).sum())) <= 1e-12
    # A Gaussian kernel is positive semidefinite, with its diagonal.
    assert float((a * filtered(a, True)).sum()) >= -1e-12
    with_self = filtered(a, False) + a * mask[:, None]
    assert_matches("with self", filtered(a, True), with_self, atol=1e-12)


def test_wide_deviations_give_the_sum():
    values, image = inputs()
    out = ck.bilateral_filter(values, image, sigma_xy=1e9, sigma_rgb=1e9, include_self=True)
    assert_matches("sum", out, values.sum((2, 3), keepdim=True).expand_as(out), atol=1e-12)


@all_backends
def test_masked_pixels_change_nothing(backend, device):
    values, image = inputs(dtype=torch.float32)
    values, image = values.to(device), (image / 255).to(device)
    mask = draw_mask(2, 6, 5, seed=4).to(device)
    dirty = [t.masked_fill(~mask[:, None], torch.nan) for t in (values, image)]
    cotangent = torch.ones_like(values)
    found = []
    with ck.use_backend(backend):
        for v, picture in ((values, image), dirty):
            leaf = v.clone().requires_grad_()
            out = ck.bilateral_filter(leaf, picture, mask=mask, **SIGMAS)
            found.append((out.detach(), *torch.autograd.grad(out, leaf, cotangent)))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)
        assert bool((clean * ~mask[:, None] == 0).all())


def test_float_and_byte_images_agree():
    values, image = inputs(dtype=torch.float32)
    expected = ck.bilateral_filter(values, image, **SIGMAS)
    # image / 255 * 255 is off by a rounding of up to 255; its square enters an exponent of a few units.
    assert_matches("out", ck.bilateral_filter(values, image / 255, **SIGMAS), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    """A level that the machine does not have runs its highest one."""
    monkeypatch.setenv("CC4S_KERNELS_CPU", isa)
    values, image = inputs(1, 5, 19, 21, torch.float32)
    with ck.use_backend("cpu"):
        got = ck.bilateral_filter(values, image, **SIGMAS)
    with ck.use_backend("reference"):
        expected = ck.bilateral_filter(values.double(), image, **SIGMAS)
    # Sums of 399 terms of order 1 in float32.
    assert_matches("out", got, expected, atol=0, rtol=16 * eps(torch.float32))


def test_bits_do_not_depend_on_threads():
    values, image = inputs(1, 5, 40, 40, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with ck.use_backend("cpu"):
                found.append(ck.bilateral_filter(values, image, **SIGMAS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


LARGE = """
import torch
import cc4s_kernels as ck
from tests.peak_memory import grown_mb

def case(size):
    values = torch.rand(1, 4, size, size, requires_grad=True)
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)

    def run():
        # Small deviations: most tiles are skipped, and it takes no time; what is allocated does not depend on that.
        with ck.use_backend("cpu"):
            ck.bilateral_filter(values, image, sigma_xy=0.5, sigma_rgb=15.0).sum().backward()

    return run

case(32)()
print(grown_mb(case(300)))
"""


def test_memory_does_not_grow_with_pairs():
    """At 90,000 pixels the matrix would be 32 GB; in and out, and their packed copies, are some MB."""
    assert float(printed_by(LARGE)) < 64


VALUES, IMAGE = inputs(dtype=torch.float32)
MASK = torch.ones(2, 6, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "values: got list", ([1.0], IMAGE), {}),
        (TypeError, "values: .*int64.*expected a floating dtype", (VALUES.long(), IMAGE), {}),
        (ValueError, r"values: got shape \(3, 6, 5\)", (VALUES[0], IMAGE), {}),
        (ValueError, r"image: got shape \(2, 3, 5, 5\).*expected shape \(2, 3, 6, 5\)", (VALUES, IMAGE[:, :, 1:]), {}),
        (ValueError, r"image: got shape \(2, 1, 6, 5\).*expected", (VALUES, IMAGE[:, :1]), {}),
        (TypeError, "image: .*int32.*expected torch.uint8, or a floating dtype", (VALUES, IMAGE.int()), {}),
        (ValueError, r"image: got values from \d+.0 to \d+.*expected \[0, 1\]", (VALUES, IMAGE.float()), {}),
        (ValueError, "image: got values from nan", (VALUES, IMAGE / 255 * torch.nan), {}),
        (ValueError, r"image: requires a gradient.*image.detach\(\)", (VALUES, (IMAGE / 255).requires_grad_()), {}),
        (ValueError, "image: .*meta.*expected device cpu", (VALUES, IMAGE.to("meta")), {}),
        (TypeError, "mask: .*float32.*expected one of torch.bool", (VALUES, IMAGE), {"mask": MASK.float()}),
        (ValueError, r"mask: .*expected shape \(2, 6, 5\)", (VALUES, IMAGE), {"mask": MASK[:1]}),
        (ValueError, "sigma_xy: got 0, expected a value greater than 0", (VALUES, IMAGE), {"sigma_xy": 0}),
        (ValueError, "sigma_xy: got nan", (VALUES, IMAGE), {"sigma_xy": math.nan}),
        (ValueError, "sigma_rgb: got -1", (VALUES, IMAGE), {"sigma_rgb": -1}),
        (TypeError, "sigma_rgb: got str", (VALUES, IMAGE), {"sigma_rgb": "15"}),
        (TypeError, "include_self: got int 1", (VALUES, IMAGE), {"include_self": 1}),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        ck.bilateral_filter(*args, **{**SIGMAS, **kwargs})


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    values = torch.zeros(shape, requires_grad=True)
    image = torch.zeros(shape[0], 3, *shape[2:], dtype=torch.uint8)
    for backend in backends.available("bilateral_filter"):
        with ck.use_backend(backend):
            out = ck.bilateral_filter(values, image, **SIGMAS)
        assert out.shape == shape
        (gradient,) = torch.autograd.grad(out.sum(), values)
        assert gradient.shape == shape
