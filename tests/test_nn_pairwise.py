"""`RandomWalk2d`, `EigenspaceConsistencyLoss` and the transforms against dense definitions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import cc4s_kernels as ck
from cc4s_kernels.nn import Crop, EigenspaceConsistencyLoss, Flip, RandomWalk2d, global_count
from tests.ops.tester import CountingBackend, assert_gradients_match, assert_matches, generator, randn

HEIGHT, WIDTH, KEYS = 4, 5, 6


def features(*shape, seed, dtype=torch.float64):
    return randn(*shape, dtype=dtype, device="cpu", seed=seed)


def draw_views(batch=2, height=HEIGHT, width=WIDTH, dtype=torch.float64, target_size=None):
    """q, k of an image and unrelated q, k of a transformed one."""
    size = height * width
    target_size = size if target_size is None else target_size
    q, k = (features(batch, size, KEYS, seed=s, dtype=dtype) for s in (1, 2))
    q_target, k_target = (features(batch, target_size, KEYS, seed=s, dtype=dtype) for s in (3, 4))
    return q.requires_grad_(), k.requires_grad_(), q_target, k_target


def flip_permutation(height, width):
    """Dense T (N, N): (T x) is x mirrored left to right."""
    matrix = torch.zeros(height * width, height * width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            matrix[y * width + x, y * width + width - 1 - x] = 1
    return matrix


def crop_selection(crop):
    """Dense (N', N): rows of the window out of those of the image."""
    matrix = torch.zeros(crop.crop_height * crop.crop_width, crop.height * crop.width, dtype=torch.float64)
    for y in range(crop.crop_height):
        for x in range(crop.crop_width):
            matrix[y * crop.crop_width + x, (y + crop.top) * crop.width + x + crop.left] = 1
    return matrix


def dense_loss(p, target, kl_weight, trace_weight):
    """The clean loss from (B, N, N) row-stochastic matrices at common positions."""
    size = p.shape[-1]
    kl = torch.xlogy(target, target / p).sum(-1).mean()
    trace = (torch.einsum("bii->b", p) - torch.einsum("bii->b", target)).abs().mean()
    return kl_weight * kl + trace_weight * trace / size


CROP = Crop(HEIGHT, WIDTH, top=1, left=2, crop_height=3, crop_width=2)


# ---- transforms


def test_flip_moves_positions():
    x = torch.arange(6).reshape(1, 6)
    flip = Flip(2, 3)
    assert torch.equal(flip.of_image(x), x)
    assert flip.of_target(x).tolist() == [[2, 1, 0, 5, 4, 3]]
    assert torch.equal(flip.of_target(flip.of_target(x)), x)


def test_crop_selects_positions():
    x = torch.arange(HEIGHT * WIDTH).reshape(1, -1, 1)
    assert CROP.of_image(x)[0, :, 0].tolist() == [7, 8, 12, 13, 17, 18]
    window = torch.arange(6).reshape(1, 6, 1)
    assert torch.equal(CROP.of_target(window), window)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "height: got 0", lambda: Flip(0, 3)),
        (TypeError, "width: got float", lambda: Flip(2, 3.0)),
        (ValueError, r"left: got 2.*\[0, 1\]", lambda: Crop(4, 5, 0, 2, 2, 4)),
        (ValueError, r"crop_height: got 5.*\[1, 4\]", lambda: Crop(4, 5, 0, 0, 5, 4)),
        (ValueError, "top: got -1", lambda: Crop(4, 5, -1, 0, 2, 4)),
        (ValueError, r"x: got shape \(1, 7\).*N = 6", lambda: Flip(2, 3).of_target(torch.zeros(1, 7))),
        (ValueError, r"x: .*N = 8", lambda: Crop(4, 5, 0, 0, 2, 4).of_target(torch.zeros(1, 20))),
    ],
)
def test_transform_errors(error, message, make):
    with pytest.raises(error, match=message):
        make()


# ---- consistency loss


@pytest.mark.parametrize("transform", [None, Flip(HEIGHT, WIDTH), CROP])
@pytest.mark.parametrize("normalize", ["row", "column"])
def test_loss_and_gradient_are_those_of_dense_matrices(transform, normalize):
    size = 6 if isinstance(transform, Crop) else None
    q, k, q_target, k_target = draw_views(target_size=size)
    loss = EigenspaceConsistencyLoss(kl_weight=0.7, trace_weight=1.9, normalize=normalize)
    got = loss(q, k, q_target, k_target, transform=transform)
    scores, target_scores = q @ k.mT, q_target @ k_target.mT
    if isinstance(transform, Flip):
        flip = flip_permutation(HEIGHT, WIDTH)
        target_scores = flip @ target_scores @ flip.mT
    elif isinstance(transform, Crop):
        select = crop_selection(transform)
        scores = select @ scores @ select.mT
    if normalize == "column":
        scores, target_scores = scores.mT, target_scores.mT
    expected = dense_loss(torch.softmax(scores, -1), torch.softmax(target_scores, -1), 0.7, 1.9)
    # float64 sums of 400 terms.
    assert_matches("loss", got.detach(), expected.detach(), atol=1e-13)
    assert_gradients_match(torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)), atol=1e-13)


@pytest.mark.parametrize("preset", ["clean", "released"])
def test_equivariant_features_have_no_loss(preset):
    """What a network that commutes with flips and crops would give: loss 0; divergence with gradient 0."""
    x = features(2, HEIGHT, WIDTH, KEYS, seed=0, dtype=torch.float32)
    q, k = x.flatten(1, 2).requires_grad_(), x.sin().flatten(1, 2).requires_grad_()
    loss = EigenspaceConsistencyLoss(preset=preset)
    # The trace term is an absolute value: its gradient at 0 is a sign times a gradient.
    divergence = EigenspaceConsistencyLoss(trace_weight=0.0, preset=preset)
    window = (slice(None), slice(1, 4), slice(2, 4))
    cases = {
        Flip(HEIGHT, WIDTH): [t.flip(2).flatten(1, 2) for t in (x, x.sin())],
        CROP: [t[window].flatten(1, 2) for t in (x, x.sin())],
    }
    for transform, (q_target, k_target) in cases.items():
        value = loss(q, k, q_target, k_target, transform=transform)
        # The same numbers at the same positions, up to the rounding of another memory layout.
        assert abs(value.item()) < 1e-6
        value = divergence(q, k, q_target, k_target, transform=transform)
        for gradient in torch.autograd.grad(value, (q, k)):
            assert float(gradient.abs().max()) < 1e-6


def released_flip_loss(q, k, q_target, k_target, height, width):
    """The released code's consistency: column softmax, dense permutation, element means."""
    permutation = flip_permutation(height, width)
    p = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=1)
    p_target = F.softmax(torch.bmm(q_target, k_target.transpose(1, 2)), dim=1)
    p_target = torch.matmul(torch.matmul(permutation, p_target), permutation.t()).detach()
    divergence = F.kl_div(torch.log(p), p_target, reduction="none").mean()
    trace = torch.stack([torch.trace(m) for m in p])
    trace_target = torch.stack([torch.trace(m) for m in p_target])
    return divergence + 1e-2 * F.l1_loss(trace, trace_target)


def test_released_preset_is_the_released_code():
    q, k, q_target, k_target = draw_views(batch=3)
    got = EigenspaceConsistencyLoss(preset="released")(q, k, q_target, k_target, transform=Flip(HEIGHT, WIDTH))
    expected = released_flip_loss(q, k, q_target, k_target, HEIGHT, WIDTH)
    assert_matches("loss", got.detach(), expected.detach(), atol=1e-14)
    assert_gradients_match(torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)), atol=1e-14)


def test_released_crop_band():
    """Full-width bands of rows, as released: renormalised over the band."""
    band = Crop(HEIGHT, WIDTH, top=1, left=0, crop_height=3, crop_width=WIDTH)
    q, k, q_target, k_target = draw_views(target_size=3 * WIDTH)
    got = EigenspaceConsistencyLoss(preset="released")(q, k, q_target, k_target, transform=band)
    p = F.softmax(q[:, WIDTH:] @ k[:, WIDTH:].mT, dim=1)
    target = F.softmax(q_target @ k_target.mT, dim=1)
    expected = (target * (target / p).log()).mean() + 1e-2 * (
        torch.einsum("bii->b", p) - torch.einsum("bii->b", target)
    ).abs().mean()
    assert_matches("loss", got.detach(), expected.detach(), atol=1e-14)


def test_masked_positions_do_not_count():
    q, k, q_target, k_target = draw_views()
    mask = torch.rand(2, HEIGHT, WIDTH, generator=generator(0)) > 0.4
    transform = Flip(HEIGHT, WIDTH)
    loss = EigenspaceConsistencyLoss(kl_weight=0.7, trace_weight=1.9)
    got = loss(q, k, q_target, k_target, transform=transform, mask=mask)
    assert torch.equal(got, loss(q, k, q_target, k_target, transform=transform, mask=mask.flatten(1)))
    total, count = 0.0, 0
    for b in range(2):
        kept = mask[b].flatten()
        back = [t[b].unflatten(0, (HEIGHT, WIDTH)).flip(1).flatten(0, 1)[kept] for t in (q_target, k_target)]
        p = torch.softmax(q[b][kept] @ k[b][kept].mT, -1)
        target = torch.softmax(back[0] @ back[1].mT, -1)
        count += int(kept.sum())
        total = total + int(kept.sum()) * dense_loss(p[None], target[None], 0.7, 1.9)
    expected = total / count
    assert_matches("loss", got.detach(), expected.detach(), atol=1e-14)
    assert_gradients_match(torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)), atol=1e-14)
    assert float(loss.count(q, transform=transform, mask=mask)) == count


@pytest.mark.parametrize("preset", ["clean", "released"])
def test_nothing_in_common(preset):
    q, k, q_target, k_target = draw_views()
    mask = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    value = EigenspaceConsistencyLoss(preset=preset)(q, k, q_target, k_target, mask=mask)
    assert value.item() == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, (q, k)))
    empty = torch.zeros(0, HEIGHT * WIDTH, KEYS, requires_grad=True)
    value = EigenspaceConsistencyLoss(preset=preset)(empty, empty, empty, empty)
    assert value.item() == 0
    value.backward()


@pytest.mark.parametrize("preset", ["clean", "released"])
def test_reductions_and_normalizer(preset):
    q, k, q_target, k_target = draw_views(batch=3)
    mask = torch.rand(3, HEIGHT * WIDTH, generator=generator(1)) > 0.3

    def run(reduction="mean", part=slice(None), normalizer=None):
        loss = EigenspaceConsistencyLoss(reduction=reduction, preset=preset)
        views = [t[part] for t in (q, k, q_target, k_target)]
        return loss(*views, transform=Flip(HEIGHT, WIDTH), mask=mask[part], normalizer=normalizer)

    each = run("none")
    assert each.shape == (3,)
    assert_matches("sum", run("sum").detach(), each.sum().detach(), atol=1e-13)
    count = EigenspaceConsistencyLoss(preset=preset).count(q, mask=mask)
    assert float(count) == (3 if preset == "released" else int(mask.sum()))
    # Micro-batches with the global count add up to the whole batch.
    whole = run()
    parts = run(part=slice(0, 1), normalizer=global_count(count)) + run(part=slice(1, 3), normalizer=int(count))
    assert_matches("micro-batches", parts.detach(), whole.detach(), atol=1e-13)
    assert run(normalizer=0).item() == 0


@pytest.mark.parametrize("preset", ["clean", "released"])
def test_terms_are_the_parts_of_the_loss(preset):
    views = draw_views()
    loss = EigenspaceConsistencyLoss(kl_weight=0.7, trace_weight=1.9, preset=preset)
    terms = loss.terms(*views, transform=Flip(HEIGHT, WIDTH))
    assert torch.equal(terms.total, loss(*views, transform=Flip(HEIGHT, WIDTH)))
    for name, weights in (("kl", (1.0, 0.0)), ("trace", (0.0, 1.0))):
        alone = EigenspaceConsistencyLoss(*weights, preset=preset)(*views, transform=Flip(HEIGHT, WIDTH))
        assert_matches(name, getattr(terms, name).detach(), alone.detach(), atol=1e-15)


def test_half_precision_and_autocast_compute_in_float32():
    views = draw_views(dtype=torch.float32)
    loss = EigenspaceConsistencyLoss()
    plain = loss(*views)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(*views)
    assert torch.equal(plain, under)
    half = [t.detach().bfloat16() for t in views]
    value = loss(*half)
    assert value.dtype == torch.float32
    assert_matches("half", value, loss(*(t.float() for t in half)), atol=1e-6)


@pytest.mark.parametrize("transform", [None, Flip(HEIGHT, WIDTH), CROP])
def test_loss_compiles(transform):
    views = draw_views(dtype=torch.float32, target_size=6 if isinstance(transform, Crop) else None)
    mask = torch.rand(2, HEIGHT, WIDTH, generator=generator(0)) > 0.2
    loss = EigenspaceConsistencyLoss()
    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    expected = loss(*views, transform=transform, mask=mask)
    got = compiled(*views, transform=transform, mask=mask)
    # A few roundings of float32.
    assert_matches("loss", got.detach(), expected.detach(), atol=1e-5)
    assert_gradients_match(torch.autograd.grad(got, views[:2]), torch.autograd.grad(expected, views[:2]), atol=1e-6)
    assert counter.forward == counter.backward == 1


@pytest.mark.parametrize(
    ("error", "message", "options", "changes"),
    [
        (ValueError, "preset: got 'old'", {"preset": "old"}, {}),
        (ValueError, "normalize: got 'symmetric'", {"normalize": "symmetric"}, {}),
        (ValueError, "kl_weight: got -1", {"kl_weight": -1}, {}),
        (ValueError, "trace_weight: got nan", {"trace_weight": math.nan}, {}),
        (ValueError, "reduction: got 'batch'", {"reduction": "batch"}, {}),
        (TypeError, "transform: got str 'flip'", {}, {"transform": "flip"}),
        (ValueError, r"q: got .*N = 6", {}, {"transform": Flip(2, 3)}),
        (ValueError, r"q_target: got .*N = 6", {}, {"transform": CROP}),
        (TypeError, "mask: got .*expected a bool", {}, {"mask": torch.ones(2, 20)}),
        (ValueError, r"mask: got .*N = 20", {}, {"mask": torch.ones(2, 3, 5, dtype=torch.bool)}),
        (ValueError, "k: got", {}, {"k": torch.zeros(2, 19, KEYS)}),
        (ValueError, "normalizer: got one for reduction 'sum'", {"reduction": "sum"}, {"normalizer": 3}),
    ],
)
def test_loss_errors(error, message, options, changes):
    names = ("q", "k", "q_target", "k_target")
    arguments = {**dict(zip(names, draw_views(dtype=torch.float32), strict=True)), **changes}
    with pytest.raises(error, match=message):
        EigenspaceConsistencyLoss(**options)(**arguments)


# ---- RandomWalk2d


def build_walk(channels=16, dtype=torch.float64, gamma=0.7, **options):
    torch.manual_seed(0)
    module = RandomWalk2d(channels, **options).to(dtype)
    with torch.no_grad():
        module.gamma.fill_(gamma)
    return module


def dense_walk(module, x, mask=None):
    """gamma * P V at the resolution of x, written with matrices."""
    batch, channels, height, width = x.shape

    def project(conv):
        weight = conv.weight[:, :, 0, 0]
        return torch.einsum("kc,bcn->bkn", weight, x.flatten(2)) + conv.bias[:, None]

    q, k, v = project(module.query_conv), project(module.key_conv), project(module.value_conv)
    scores = torch.einsum("bki,bkj->bij", q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask is not None:
        valid = mask.flatten(1).to(x.dtype)
        weights = weights * valid[:, None, :]
    p = weights / weights.sum(-1, keepdim=True)
    if mask is not None:
        p = p * valid[:, :, None]
    y = torch.einsum("bij,bcj->bci", p, v)
    return y.reshape(batch, channels, height, width), q.mT, k.mT


def test_walk_names_and_start():
    module = RandomWalk2d(32)
    assert sorted(dict(module.named_parameters())) == sorted(
        ["gamma", *(f"{n}_conv.{p}" for n in ("query", "key", "value") for p in ("weight", "bias"))]
    )
    assert module.query_conv.weight.shape == module.key_conv.weight.shape == (4, 32, 1, 1)
    assert module.value_conv.weight.shape == (32, 32, 1, 1)
    assert module.gamma.shape == (1,)
    x = features(2, 32, 3, 4, seed=1, dtype=torch.float32)
    z = module(x)
    assert torch.equal(z, x)
    z.square().sum().backward()
    assert float(module.gamma.grad.abs()) > 0
    assert RandomWalk2d(4).query_conv.out_channels == 1


@pytest.mark.parametrize("masked", [False, True])
def test_walk_is_the_dense_definition(masked):
    module = build_walk(key_channels=3)
    x = features(2, 16, 5, 7, seed=1)
    mask = torch.rand(2, 5, 7, generator=generator(2)) > 0.3 if masked else None
    z, q, k = module(x, mask, return_qk=True)
    y, q_expected, k_expected = dense_walk(module, x, mask)
    # float64 sums of 35 terms.
    assert_matches("z", z.detach(), (x + 0.7 * y).detach(), atol=1e-13)
    assert_matches("q", q.detach(), q_expected.detach(), atol=1e-13)
    assert_matches("k", k.detach(), k_expected.detach(), atol=1e-13)
    assert torch.equal(module(x, mask), z)
    if masked:
        outside = ~mask[:, None].expand_as(z)
        assert torch.equal(z[outside], x[outside])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shrink", [2, 3])
def test_shrink(shrink, masked):
    module = build_walk(shrink=shrink)
    # Sides of shrink * m + 1: the coarse grid falls on cells.
    height, width = 2 * shrink + 1, 3 * shrink + 1
    x = features(2, 16, height, width, seed=1)
    mask = torch.rand(2, height, width, generator=generator(2)) > 0.3 if masked else None
    z, q, _ = module(x, mask, return_qk=True)
    assert module.grid(height, width) == (3, 4)
    assert q.shape == (2, 12, 2)
    coarse = x[:, :, ::shrink, ::shrink]
    coarse_mask = mask[:, ::shrink, ::shrink] if masked else None
    if masked:
        assert torch.equal(module.grid_mask(mask), coarse_mask)
    y, _, _ = dense_walk(module, coarse, coarse_mask)
    y = F.interpolate(y, (height, width), mode="bilinear", align_corners=True)
    if masked:
        y = y * mask[:, None]
    assert_matches("z", z.detach(), (x + 0.7 * y).detach(), atol=1e-12)


@pytest.mark.parametrize(("height", "width", "shrink"), [(6, 9, 2), (1, 5, 2), (4, 4, 3), (59, 59, 2), (5, 6, 8)])
def test_shrink_of_any_size(height, width, shrink):
    module = build_walk(channels=8, shrink=shrink)
    x = features(1, 8, height, width, seed=1)
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, :, -1] = False
    z, q, _ = module(x, mask, return_qk=True)
    assert z.shape == x.shape
    assert q.shape[1] == ((height - 1) // shrink + 1) * ((width - 1) // shrink + 1)
    assert bool(torch.isfinite(z).all())
    assert torch.equal(z[..., -1], x[..., -1])


def test_padding_changes_nothing():
    module = build_walk()
    x = features(1, 16, 4, 5, seed=1)
    padded = F.pad(x, (0, 3, 0, 2), value=1e3)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, :4, :5] = True
    z = module(padded, mask)
    assert_matches("z", z[:, :, :4, :5].detach(), module(x).detach(), atol=1e-12)


def test_channels_last_runs_without_a_copy():
    module = build_walk(dtype=torch.float32).to(memory_format=torch.channels_last)
    x = features(2, 16, 5, 6, seed=1, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    z, q, _ = module(last, return_qk=True)
    assert q.is_contiguous()
    assert z.is_contiguous(memory_format=torch.channels_last)
    # float32 sums in another order.
    assert_matches("z", z.detach(), build_walk(dtype=torch.float32)(x).detach(), atol=1e-5)


def test_walk_under_autocast():
    module = build_walk(dtype=torch.float32)
    x = features(2, 16, 5, 6, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, q, k = module(x, return_qk=True)
        half = module(x.bfloat16())
    assert z.dtype == torch.float32
    assert q.dtype == k.dtype == half.dtype == torch.bfloat16
    # Q, K, V and the result carry the rounding of bfloat16, 2^-9 each.
    assert_matches("z", z.detach(), module(x).detach(), atol=0.05)
    z.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("shrink", [1, 2])
def test_walk_compiles(shrink):
    module = build_walk(dtype=torch.float32, shrink=shrink)
    x = features(2, 16, 5, 6, seed=1, dtype=torch.float32)
    mask = torch.rand(2, 5, 6, generator=generator(2)) > 0.3
    torch._dynamo.reset()
    counter = CountingBackend()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    results = []
    for run in (module, compiled):
        z, q, k = run(x, mask, return_qk=True)
        (z.square().sum() + (q * k).sum()).backward()
        results.append(z.detach())
    # float32 sums in another order.
    assert_matches("z", results[1], results[0], atol=1e-5)
    gradients = [tuple(p.grad for p in m.parameters()) for m in (compiled, module)]
    assert_gradients_match(*gradients, atol=1e-4, rtol=1e-4)
    assert counter.forward == counter.backward == 1


def test_walk_and_loss_together_follow_a_flip():
    """1x1 convolutions commute with a flip: the module's own Q and K are consistent."""
    module = build_walk(dtype=torch.float32)
    x = features(2, 16, HEIGHT, WIDTH, seed=1, dtype=torch.float32)
    z, q, k = module(x, return_qk=True)
    z_flipped, q_flipped, k_flipped = module(x.flip(3), return_qk=True)
    assert_matches("z", z_flipped.flip(3).detach(), z.detach(), atol=1e-5)
    loss = EigenspaceConsistencyLoss()(q, k, q_flipped, k_flipped, transform=Flip(HEIGHT, WIDTH))
    assert abs(loss.item()) < 1e-5
    values = ck.neural_eigenspace(q, k, 3).eigenvalues
    flipped = ck.neural_eigenspace(q_flipped, k_flipped, 3).eigenvalues
    assert_matches("eigenvalues", flipped.abs(), values.abs(), atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (ValueError, "in_channels: got 0", lambda: RandomWalk2d(0)),
        (TypeError, "shrink: got float", lambda: RandomWalk2d(8, shrink=1.5)),
        (ValueError, "shrink: got 0", lambda: RandomWalk2d(8, shrink=0)),
        (
            ValueError,
            r"x: got shape \(2, 7, 3, 3\).*in_channels",
            lambda: RandomWalk2d(8)(torch.ones(2, 7, 3, 3)),
        ),
        (ValueError, "x: .*expected shape", lambda: RandomWalk2d(8)(torch.ones(8, 3, 3))),
        (TypeError, "mask: ", lambda: RandomWalk2d(8)(torch.ones(2, 8, 3, 3), torch.ones(2, 3, 3))),
        (ValueError, "mask: ", lambda: RandomWalk2d(8)(torch.ones(2, 8, 3, 3), torch.ones(2, 3, 4).bool())),
    ],
)
def test_walk_errors(error, message, run):
    with pytest.raises(error, match=message):
        run()
