"""Batch norm and dropout over processes, frozen statistics, group norm."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cc4s.errors import UserError
from cc4s.models.dropout import Dropout2d
from cc4s.models.norm import (
    BatchNorm2d,
    FrozenBatchNorm2d,
    frozen_statistics,
    group_norm,
    norm_layer,
    synchronize,
)

WORLD = 2
SEED = 5
# float64 sums over another order of 4*3*5*6 terms; float32 accordingly.
TOLERANCE = {torch.float64: dict(rtol=1e-11, atol=1e-12), torch.float32: dict(rtol=1e-5, atol=2e-6)}
SHARDS = {"even": (2, 2), "uneven": (3, 1), "empty": (4, 0)}


def norm_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    # A mean far from zero, where E[x^2] - E[x]^2 would lose digits.
    x = torch.tensor(rng.normal(20, 2, (4, 3, 5, 6)), dtype=dtype)
    return x, torch.tensor(rng.normal(size=(4, 3, 5, 6)), dtype=dtype)


def with_affine(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -0.3]))
    return layer


def tiny_network(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, stride=2, bias=False),
        norm(6),
        nn.ReLU(),
        Dropout2d(0.4),
        nn.Conv2d(6, 3, 1),
    )


def network_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 2, 8, 8, generator=generator), torch.randint(0, 3, (4, 4, 4), generator=generator)


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, world: int) -> list[float]:
    """Three steps; the loss is divided by the global count, as the losses of this project are."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(network(images), labels, reduction="sum") / (4 * 4 * 4)
        optimizer.zero_grad()
        (world * loss).backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    results: dict[str, object] = {}
    for dtype in (torch.float64, torch.float32):
        x, upstream = norm_case(dtype)
        for shards, sizes in SHARDS.items():
            rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            layer = with_affine(BatchNorm2d(3), dtype)
            mine = x[rows].clone().requires_grad_()
            out = layer(mine)
            out.backward(upstream[rows])
            for p in layer.parameters():
                dist.all_reduce(p.grad)
            grads = [mine.grad, layer.weight.grad, layer.bias.grad]
            results[f"{dtype}-{shards}"] = [out.detach(), grads, layer.state_dict()]

    x, _ = norm_case(torch.float32)
    rows = slice(2 * rank, 2 * rank + 2)
    layer = with_affine(BatchNorm2d(3), torch.float32)
    with frozen_statistics(layer):
        results["frozen"] = [layer(x[rows]).detach(), {k: v.clone() for k, v in layer.state_dict().items()}]
    results["channels_last"] = layer(x[rows].contiguous(memory_format=torch.channels_last)).detach()
    half = layer(x[rows].bfloat16())
    results["bfloat16"] = [half.dtype, half.detach()]

    # A layer of another package, made global by synchronize, with the cumulative average of momentum=None.
    plain = with_affine(nn.BatchNorm2d(3, momentum=None), torch.float32)
    converted = synchronize(nn.Sequential(plain))
    converted(x[rows])
    converted(x[rows] + 1)
    results["converted"] = [type(converted[0]).__name__, converted[0] is plain, converted.state_dict()]

    class Fused(nn.BatchNorm2d):
        pass

    try:
        synchronize(nn.Sequential(Fused(3)))
    except UserError as error:
        results["fused"] = str(error)
    try:
        BatchNorm2d(3)(torch.ones(1 - rank, 3, 1, 1))
    except ValueError as error:
        results["single"] = str(error)

    torch.manual_seed(SEED)
    results["dropout"] = Dropout2d(0.5)(torch.ones(2, 8, 2, 2))

    images, labels = network_batch()
    network = DistributedDataParallel(tiny_network(BatchNorm2d))
    results["losses"] = train(network, images[rows], labels[rows], WORLD)
    results["network"] = network.module.state_dict()

    torch._dynamo.reset()
    compiled = torch.compile(tiny_network(BatchNorm2d), backend="aot_eager")
    torch.manual_seed(SEED)
    results["compiled"] = compiled(images[rows]).detach()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shards", list(SHARDS))
def test_two_processes_are_one_batch(ranks: list[dict], dtype: torch.dtype, shards: str) -> None:
    x, upstream = norm_case(dtype)
    one = with_affine(nn.BatchNorm2d(3), dtype)
    x.requires_grad_()
    out = one(x)
    out.backward(upstream)
    results = [r[f"{dtype}-{shards}"] for r in ranks]
    close = TOLERANCE[dtype]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([r[1][0] for r in results]), x.grad, **close)
    for result in results:
        torch.testing.assert_close(result[1][1], one.weight.grad, rtol=close["rtol"], atol=20 * close["atol"])
        torch.testing.assert_close(result[1][2], one.bias.grad, rtol=close["rtol"], atol=20 * close["atol"])
        for key, value in one.state_dict().items():
            torch.testing.assert_close(result[2][key], value, **close, msg=key)


def test_statistics_by_hand() -> None:
    """The one-process layer, and with it the comparison above, against the formula in NumPy."""
    x, _ = norm_case(torch.float64)
    layer = BatchNorm2d(3).double()
    out = layer(x).detach().numpy()
    values = x.numpy()
    for c in range(3):
        channel = values[:, c].ravel()
        expected = (values[:, c] - channel.mean()) / np.sqrt(channel.var() + 1e-5)
        np.testing.assert_allclose(out[:, c], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(layer.running_mean[c], 0.1 * channel.mean())
        np.testing.assert_allclose(layer.running_var[c], 0.9 + 0.1 * channel.var(ddof=1))


def test_frozen_statistics_over_processes(ranks: list[dict]) -> None:
    x, _ = norm_case(torch.float32)
    one = with_affine(nn.BatchNorm2d(3), torch.float32)
    before = {k: v.clone() for k, v in one.state_dict().items()}
    out = one(x).detach()
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["frozen"][0], out[2 * rank : 2 * rank + 2], rtol=1e-5, atol=2e-6)
        for key, value in before.items():
            assert torch.equal(result["frozen"][1][key], value), key
        channels_last = result["channels_last"]
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(channels_last, out[2 * rank : 2 * rank + 2], rtol=1e-5, atol=2e-6)
        dtype, half = result["bfloat16"]
        assert dtype == torch.bfloat16
        # 8 bits of mantissa on inputs near 20 with deviation 2: errors of 0.06 before the scale of up to 1.
        torch.testing.assert_close(half.float(), out[2 * rank : 2 * rank + 2], rtol=0.02, atol=0.15)


def test_synchronize_over_processes(ranks: list[dict]) -> None:
    x, _ = norm_case(torch.float32)
    one = with_affine(nn.BatchNorm2d(3, momentum=None), torch.float32)
    one(x)
    one(x + 1)
    for result in ranks:
        name, same, state = result["converted"]
        assert name == "BatchNorm2d"
        assert same
        for key, value in one.state_dict().items():
            torch.testing.assert_close(state[f"0.{key}"], value, rtol=1e-5, atol=1e-5)
        assert "Fused" in result["fused"]
        assert "model.norm" in result["fused"]
        assert "more than 1 value per channel" in result["single"]


def test_dropout_over_processes(ranks: list[dict]) -> None:
    torch.manual_seed(SEED)
    one = Dropout2d(0.5)(torch.ones(4, 8, 2, 2))
    assert 0 < (one == 0).float().mean() < 1
    assert torch.equal(torch.cat([r["dropout"] for r in ranks]), one)


def test_training_over_processes(ranks: list[dict]) -> None:
    images, labels = network_batch()
    network = tiny_network(nn.BatchNorm2d)
    losses = train(network, images, labels, 1)
    assert losses[2] != losses[0]
    for result in ranks:
        # Three float32 steps.
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(result["network"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_compiled_over_processes(ranks: list[dict]) -> None:
    network = tiny_network(nn.BatchNorm2d)
    torch.manual_seed(SEED)
    out = network(network_batch()[0]).detach()
    compiled = torch.cat([r["compiled"] for r in ranks])
    torch.testing.assert_close(compiled, out, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_statistics(kind: type[nn.Module]) -> None:
    x, _ = norm_case(torch.float32)
    network = nn.Sequential(kind(3), nn.Sequential(kind(3), nn.BatchNorm2d(3, track_running_stats=False)))
    network(x)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert before["0.num_batches_tracked"] == 1
    with frozen_statistics(network):
        inside = network(x)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The same batch statistics as in an ordinary training pass, which updates the buffers again.
    assert torch.equal(network(x), inside)
    assert network[0].num_batches_tracked == 2
    assert not network[1][1].track_running_stats

    with pytest.raises(RuntimeError, match="inside"), frozen_statistics(network):
        raise RuntimeError("inside")
    assert network[0].track_running_stats
    with frozen_statistics(network), frozen_statistics(network):
        pass
    assert network[0].track_running_stats

    network[0].eval()
    expected = network[0](x)
    with frozen_statistics(network):
        assert torch.equal(network[0](x), expected)


def test_frozen_statistics_compiled() -> None:
    torch._dynamo.reset()
    x, _ = norm_case(torch.float32)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3), nn.ReLU())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for count in (1, 2, 3):
        compiled(x)
        assert network[1].num_batches_tracked == count
        before = {k: v.clone() for k, v in network.state_dict().items()}
        with frozen_statistics(network), torch.no_grad():
            out = compiled(x)
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key]), key
        with frozen_statistics(network):
            torch.testing.assert_close(out, network(x), rtol=1e-5, atol=1e-5)


def test_frozen_norm() -> None:
    x, upstream = norm_case(torch.float32)
    trained = with_affine(nn.BatchNorm2d(3), torch.float32)
    trained(x)
    frozen = FrozenBatchNorm2d(3)
    frozen.load_state_dict(trained.state_dict())
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    x.requires_grad_()
    out = frozen.train()(x)
    out.backward(upstream)
    assert torch.equal(out, trained.eval()(x))
    slope = before["weight"] / torch.sqrt(before["running_var"] + 1e-5)
    torch.testing.assert_close(x.grad, upstream * slope[:, None, None])
    assert not list(frozen.parameters())
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 30, 64, 512, 2048])
def test_group_norm(channels: int) -> None:
    layer = group_norm(channels)
    assert channels % layer.num_groups == 0
    assert layer.num_groups <= 32
    assert channels // layer.num_groups >= min(4, channels)
    assert layer(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_norm_layer() -> None:
    assert isinstance(norm_layer("batch")(8), BatchNorm2d)
    assert isinstance(norm_layer("group")(8), nn.GroupNorm)
    assert isinstance(norm_layer("frozen")(8), FrozenBatchNorm2d)
    with pytest.raises(UserError, match=r"model.norm: got 'layer', expected one of batch, group, frozen"):
        norm_layer("layer")


def test_synchronize_in_one_process() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronize(network) is network
    assert type(network[0]) is nn.BatchNorm2d


def test_synchronize_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of layers; what they compute needs several GPUs."""
    monkeypatch.setattr("cc4s.models.norm.rank_and_world", lambda: (0, 2))
    monkeypatch.setattr("cc4s.models.norm._on_cuda", lambda model: True)
    network = tiny_network(BatchNorm2d)
    network.append(nn.BatchNorm2d(3))
    state = network.state_dict()
    converted = synchronize(network)
    for i in (1, 4, 8):
        assert type(converted[i]) is nn.SyncBatchNorm
    for key, value in converted.state_dict().items():
        assert value.data_ptr() == state[key].data_ptr(), key

    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="0 is a Fused"):
        synchronize(nn.Sequential(Fused(3)))
    Fused.__module__ = "timm.layers.norm_act"
    layers = types.ModuleType("timm.layers")
    layers.convert_sync_batchnorm = lambda model: "converted by timm"
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", layers)
    assert synchronize(nn.Sequential(Fused(3))) == "converted by timm"


def test_dropout() -> None:
    x = torch.randn(3, 5, 4, 2).contiguous(memory_format=torch.channels_last)
    layer = Dropout2d(0.3)
    torch.manual_seed(SEED)
    out = layer(x)
    torch.manual_seed(SEED)
    assert torch.equal(layer(x), out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    kept = out.abs().sum((2, 3)) > 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, x * kept[:, :, None, None] / 0.7)
    assert layer.eval()(x) is x
    assert Dropout2d(0.0)(x) is x
    assert layer.train()(x.bfloat16()).dtype == torch.bfloat16
    # 20000 draws: a deviation of 0.0032 of the share, 5 of them allowed.
    share = (Dropout2d(0.3)(torch.ones(100, 200, 1, 1)) == 0).float().mean()
    assert abs(share - 0.3) < 0.0162
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="p: got"):
            Dropout2d(p)
