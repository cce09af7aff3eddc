"""Why a rung helps or not: the gradient of every loss term, what the walk does, and its eigenvectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cc4s import config as configuration
from cc4s.config import Config, StageConfig
from cc4s.data import Dataset, open_dataset, read_index_png
from cc4s.data.dataset import take_evenly
from cc4s.engine import checkpoint, evaluation
from cc4s.engine.inference import Predictor
from cc4s.engine.pipeline import eigenvectors
from cc4s.engine.runfolder import RunFolder, read_config
from cc4s.engine.runtime import Runtime, kernels, seed_everything
from cc4s.engine.training import StageTraining
from cc4s.errors import UserError
from cc4s.files import atomic_write, atomic_write_json, atomic_write_text, check_output_file
from cc4s.losses import StageLoss
from cc4s.report import ReportImage, contact_sheet, figure_png
from cc4s.report.inspection import inspection_markdown

TERMS = ("cross_entropy", "entropy", "color", "consistency_kl", "consistency_trace")
BATCHES = 4


def inspect_runs(paths: Sequence[Path], out: Path) -> str:
    """Looks at the networks of finished runs and writes what it finds beside each other.

    For the last stage of every run, on the same training batches: the value of every loss term and the norm of its
    gradient at weight 1, whether the stage trained on it or not; the walk's gamma; how much the walk changes the
    features. And the leading eigenvectors of the transition matrix for one image.

    Args:
        paths: folders of runs, or of a ladder (all finished runs in it).
        out: the name of the files without their ending: .json, .md and .png are written.

    Returns:
        The Markdown page.

    Raises:
        UserError: no finished run, or unusable data.
    """
    out = out.with_suffix("")
    check_output_file(out.with_suffix(".json"), "--out")
    rows: dict[str, Any] = {}
    images: list[ReportImage] = []
    dataset: Dataset | None = None
    for path in _run_folders(paths):
        run = RunFolder(path)
        config = configuration.from_dict(read_config(path / "config.yaml"), str(path / "config.yaml"))
        runtime = Runtime(config)
        with kernels(config.kernels):
            dataset = open_dataset(config.data, seed=config.seed, work=run.data, progress=False)
            stage = config.stages[-1]
            network = checkpoint.load_trained(run.checkpoint(stage.name)).network.to(runtime.device)
            rows[path.name] = _look(network, config, stage, dataset, run, runtime)
            images.append(_picture(path.name, network, config, dataset))
    assert dataset is not None
    text = inspection_markdown(rows, f"{out.name}.png")
    sheet = contact_sheet(images, dataset.classes, dataset.palette, eigenvectors=3, skip_eigenvectors=1)
    atomic_write(out.with_suffix(".png"), figure_png(sheet))
    atomic_write_json(out.with_suffix(".json"), rows)
    atomic_write_text(out.with_suffix(".md"), text)
    return text


def _run_folders(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = [path] if (path / "config.yaml").is_file() else sorted(path.glob("*/config.yaml"))
        folders = [folder if folder.is_dir() else folder.parent for folder in inside]
        found += [folder for folder in folders if RunFolder(folder).metrics_file.is_file()]
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no finished run of cc4s here")
    return found


def _look(
    network: nn.Module, config: Config, stage: StageConfig, dataset: Dataset, run: RunFolder, runtime: Runtime
) -> dict[str, Any]:
    """Values and gradient norms of the terms, and the walk, of a stage's network."""
    walk = getattr(network, "walk", None) or getattr(getattr(network, "head", None), "walk", None)
    names = TERMS if walk is not None else TERMS[:3]
    losses = ["entropy", "color", *(["consistency"] if walk is not None else [])]
    training = StageTraining(config, replace(stage, losses=losses), dataset, run, runtime)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    values, norms = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    network.train()
    seen = 0
    for index, batch in zip(range(BATCHES), training.batches(0), strict=False):
        seen += 1
        batch = runtime.fabric.to_device(batch)
        transform = training.draw_transform((config.seed, "inspect", index))
        for name in names:
            loss = StageLoss(_only(config, name), training.stage, len(dataset.classes)).to(runtime.device)
            seed_everything(config.seed, "inspect", index)
            with _kept_statistics(network):
                term = loss(network, batch, transform, loss.global_counts([batch], [transform]))
            gradients = torch.autograd.grad(term["loss"], parameters, allow_unused=True)
            square = sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None)
            values[name] += float(term["loss"].detach())
            norms[name] += square**0.5
    network.eval()
    # A short stage has fewer batches.
    values, norms = ({name: sums[name] / seen for name in names} for sums in (values, norms))
    weights = {name: _weight(config, stage, name) for name in names}
    found: dict[str, Any] = {"values": values, "gradient_norms": norms, "weights": weights}
    if walk is not None:
        found["gamma"] = float(walk.gamma.detach())
        found["walk_share"] = _walk_share(network, walk, batch["image"])
    return found


def _only(config: Config, term: str) -> Config:
    """The configuration with weight 1 for one term and 0 for the others."""
    weights = {name: float(name == term) for name in TERMS}
    consistency = replace(
        config.loss.consistency, kl=weights["consistency_kl"], trace=weights["consistency_trace"], reduction="clean"
    )
    loss = replace(
        config.loss,
        cross_entropy=weights["cross_entropy"],
        entropy=weights["entropy"],
        color=weights["color"],
        consistency=consistency,
    )
    return replace(config, loss=loss)


def _weight(config: Config, stage: StageConfig, term: str) -> float:
    """The weight of a term in a stage; 0 where the stage does not have it."""
    loss = config.loss
    if term == "cross_entropy":
        return loss.cross_entropy
    name, _, part = term.partition("_")
    if name not in stage.losses:
        return 0.0
    return float(getattr(loss.consistency, part) if part else getattr(loss, name))


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Looking at a network leaves its running statistics as they were."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    yield
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])


@torch.no_grad()
def _walk_share(network: nn.Module, walk: nn.Module, image: torch.Tensor) -> float:
    """|z - x| / |x| of the walk: how much of the features comes from other positions."""
    share: list[float] = []

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        x, z = inputs[0], output[0]
        share.append(float((z - x).norm() / x.norm().clamp_min(1e-12)))

    handle = walk.register_forward_hook(watch)
    try:
        network(image)
    finally:
        handle.remove()
    return share[0]


def _picture(name: str, network: nn.Module, config: Config, dataset: Dataset) -> ReportImage:
    """One evaluation image, the same for every run: the middle one of the list."""
    entry = take_evenly(dataset.eval, 3)[1] if len(dataset.eval) > 2 else dataset.eval[0]
    sample = evaluation.EvaluationSet([entry], config.data, len(dataset.classes))[0]
    probability = Predictor(network, config.inference, config.data).probabilities(sample["image"])
    vectors, values = eigenvectors(network, sample["image"], config)
    return ReportImage(
        name=name,
        image=evaluation.as_uint8(sample["image"]),
        prediction=probability.argmax(0).cpu().numpy(),
        label=None if entry.label is None else read_index_png(entry.label, len(dataset.classes)),
        eigenvectors=vectors,
        eigenvalues=values,
    )
