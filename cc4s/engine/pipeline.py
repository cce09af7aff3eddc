"""A whole run: stages, pseudo-labels, evaluation and report, in one folder that can be continued at any point."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import cc4s_kernels as ck
from cc4s.config import Config, StageConfig, to_dict
from cc4s.data import Dataset, Entry, check_dataset, normalize, open_dataset, read_index_png, read_scribble
from cc4s.data.dataset import take_evenly
from cc4s.engine import checkpoint, crf, evaluation, trackers
from cc4s.engine.inference import Predictor
from cc4s.engine.runfolder import RunFolder
from cc4s.engine.runtime import Runtime, kernels
from cc4s.engine.stagecache import StageCache
from cc4s.engine.training import StageTraining
from cc4s.errors import OutOfTime, UserError
from cc4s.files import atomic_write_json
from cc4s.report import ReportImage, write_report

logger = logging.getLogger("cc4s")


class Run:
    """One run of a method on a dataset.

    Everything is checked before anything is written. Finished parts are recorded in the folder and never repeated.

    Args:
        config: the resolved configuration.
        out: the run's folder, new or of this very run.
        runtime: devices and processes; made from the configuration if None.
        cache: where stages are looked up before they are trained and left afterwards; None has none.

    Raises:
        UserError: the folder holds something else, or the data is unusable.
    """

    def __init__(
        self, config: Config, out: Path, runtime: Runtime | None = None, cache: StageCache | None = None
    ) -> None:
        self.config = config
        self.cache = cache
        self.folder = RunFolder(out)
        self.dataset: Dataset | None = None
        self.runtime = runtime or Runtime(config)
        # The main process alone looks: another one might see what it is just creating.
        self.runtime.on_main(lambda: self.folder.check(config))

    def execute(self, *, until: str | None = None, report: bool = True) -> dict[str, Any]:
        """Runs what is not done yet.

        Args:
            until: name of the last stage to train; None runs all.
            report: evaluate every stage and write metrics.json and report.html. False only trains.

        Returns:
            The content of metrics.json ({} without report).

        Raises:
            UserError: bad input, or a backend that cannot run here.
            OutOfTime: the runtime's deadline is over; the same call goes on.
        """
        stages = self._stages(until)
        # One process owns the folder; the others only read it.
        with ExitStack() as stack:
            stack.enter_context(kernels(self.config.kernels))
            self.runtime.on_main(lambda: stack.enter_context(self.folder.lock()))
            self.dataset = dataset = self._open_data(report)
            if self.runtime.is_main:
                self.folder.mend_log()
                self._announce()
            began = time.perf_counter()
            keys = self.cache.keys(self.config, dataset) if self.cache is not None and self.runtime.is_main else {}
            for index, stage in enumerate(stages):
                self._fetch(stage, keys)
                if self.runtime.out_of_time():
                    raise OutOfTime(f"stopped before stage {stage.name}")
                if stage.labels == "pseudo":
                    self._pseudo_labels(stage.name, stages[index - 1].name, dataset)
                network = self._train(stage, dataset)
                if report and (self.config.report.every_stage or stage is stages[-1]):
                    self._evaluate(stage.name, network, dataset)
                self._store(stage, keys)
            if not report:
                return {}
            metrics = self._collect(stages, dataset)
            if self.runtime.is_main:
                atomic_write_json(self.folder.metrics_file, metrics)
                self.write_report(metrics, self.pictures())
                self.folder.log(event="end", seconds=round(time.perf_counter() - began, 3))
            self.runtime.barrier()
            return metrics

    def _announce(self) -> None:
        """What a reader of the numbers should know."""
        if not self.config.model.backbone_weights:
            logger.info("the backbone starts from random weights: model.backbone_weights is empty")
        if self.config.budget == "smoke":
            logger.info("budget=smoke shows that everything runs; its numbers mean nothing")

    def _stages(self, until: str | None) -> list[StageConfig]:
        names = [stage.name for stage in self.config.stages]
        if until is None:
            return self.config.stages
        if until not in names:
            raise UserError(f"--stage: got {until!r}, expected one of {', '.join(names)}")
        return self.config.stages[: names.index(until) + 1]

    def _open_data(self, need_eval: bool) -> Dataset:
        """Opens the data; the main process first checks every file of it, before the run writes anything."""
        config = self.config
        splits = ("train", "eval") if need_eval else ("train",)

        def opened() -> Dataset:
            return open_dataset(
                config.data, seed=config.seed, work=self.folder.data, splits=splits, progress=self.runtime.is_main
            )

        dataset = self.runtime.on_main(lambda: self._checked(opened()))
        return opened() if dataset is None else dataset

    def _checked(self, dataset: Dataset) -> Dataset:
        """Creates the run's folder once everything the run will need is known to be there."""
        config, kinds = self.config, {stage.labels for stage in self.config.stages}
        check_dataset(dataset, config.data, labels="masks" in kinds, scribbles="scribbles" in kinds, progress=True)
        for stage in config.stages:
            StageTraining(config, stage, dataset, self.folder, self.runtime).check()
        evaluation.new_metrics(dataset, config)
        if config.inference.crf or config.pseudo.crf:
            crf.require(config.crf)
        trackers.require(config)
        self.folder.create(config)
        self.folder.trackers = trackers.open_trackers(config, self.folder.path)
        return dataset

    def _train(self, stage: StageConfig, dataset: Dataset) -> nn.Module | None:
        """The stage's network if it was trained just now, None if its checkpoint was there."""
        if self.folder.checkpoint(stage.name).is_file():
            logger.info("stage %s: already trained", stage.name)
            return None
        return StageTraining(self.config, stage, dataset, self.folder, self.runtime).run()

    def _fetch(self, stage: StageConfig, keys: dict[str, str]) -> None:
        if self.cache is not None and self.runtime.is_main and self.cache.fetch(keys[stage.name], stage, self.folder):
            logger.info("stage %s: shared with another run", stage.name)
        self.runtime.barrier()

    def _store(self, stage: StageConfig, keys: dict[str, str]) -> None:
        if self.cache is not None and self.runtime.is_main:
            self.cache.store(keys[stage.name], self.config, stage, self.folder)
        self.runtime.barrier()

    def _network(self, stage: str) -> nn.Module:
        trained = checkpoint.load_trained(self.folder.checkpoint(stage))
        return trained.network.to(self.runtime.device)

    def _record(self, name: str, content: dict[str, Any]) -> None:
        if self.runtime.is_main:
            self.folder.write_record(name, content)
        self.runtime.barrier()

    def _evaluate(self, stage: str, network: nn.Module | None, dataset: Dataset) -> None:
        if self.folder.read_record(stage) is not None:
            return
        began = time.perf_counter()
        result = evaluation.evaluate(
            network or self._network(stage),
            dataset,
            self.config,
            self.runtime,
            label=f"{stage:>5} evaluation",
        )
        result["seconds"] = round(time.perf_counter() - began, 3)
        if self.runtime.is_main:
            self.folder.log(
                event="evaluate",
                stage=stage,
                miou=result["miou"],
                pixel_accuracy=result["pixel_accuracy"],
                seconds=result["seconds"],
            )
            logger.info("stage %s: mIoU %.1f", stage, 100 * (result["miou"] or 0.0))
        self._record(stage, result)

    def _pseudo_labels(self, stage: str, source: str, dataset: Dataset) -> None:
        """Pseudo-labels for a stage from the one before, unless they are complete."""
        if self.folder.read_record("pseudo_labels") is not None:
            return
        began = time.perf_counter()
        result = evaluation.write_pseudo_labels(
            self._network(source), dataset, self.config, self.runtime, self.folder.pseudo_labels
        )
        result |= {"source": source, "seconds": round(time.perf_counter() - began, 3)}
        if self.runtime.is_main:
            self.folder.log(
                event="pseudo_labels",
                stage=stage,
                source=source,
                coverage=result["coverage"],
                miou=result.get("miou"),
                seconds=result["seconds"],
            )
        self._record("pseudo_labels", result)

    def _collect(self, stages: list[StageConfig], dataset: Dataset) -> dict[str, Any]:
        """The content of metrics.json: the metrics of the evaluated stages, and the last one's as the final ones."""
        found = {stage.name: self.folder.read_record(stage.name) for stage in stages}
        records = {name: record for name, record in found.items() if record is not None}
        final = records[stages[-1].name] or {}
        metrics: dict[str, Any] = {
            "dataset": self.config.dataset,
            "method": self.config.method,
            "preset": self.config.preset,
            "budget": self.config.budget,
            "seed": self.config.seed,
            "classes": list(dataset.classes),
            "eval_split": dataset.eval_name,
            "stages": records,
            "final": final,
        }
        metrics |= {key: final[key] for key in final if key not in ("seconds", "images")}
        pseudo = self.folder.read_record("pseudo_labels")
        if pseudo is not None:
            metrics["pseudo_labels"] = pseudo
        return metrics

    def pictures(self) -> list[ReportImage]:
        """Overlays and eigenvectors for `report.images` training and as many evaluation images of a finished run."""
        dataset, count = self.dataset, self.config.report.images
        assert dataset is not None, "execute comes first"
        network = self._network(self.config.stages[-1].name)
        made = []
        for entries, training in ((dataset.train, True), (dataset.eval, False)):
            chosen = take_evenly(entries, count) if count else []
            made += [self._picture(network, entry, dataset, training=training) for entry in chosen]
        return made

    def write_report(
        self,
        metrics: dict[str, Any],
        images: list[ReportImage],
        path: Path | None = None,
        table: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Writes report.html of a finished run.

        Args:
            metrics: the content of metrics.json. images: from `pictures`.
            path: the file; the run's own report.html if None.
            table: metrics of other runs to compare with, by name.
        """
        assert self.dataset is not None, "execute comes first"
        write_report(
            path or self.folder.report_file,
            title=f"{self.config.dataset}: {self.config.method}",
            config=to_dict(self.config),
            metrics=metrics,
            log=self.folder.read_log(),
            images=images,
            classes=list(self.dataset.classes),
            palette=self.dataset.palette,
            table=table,
        )

    def _picture(self, network: nn.Module, entry: Entry, dataset: Dataset, *, training: bool) -> ReportImage:
        num_classes = len(dataset.classes)

        def mask(path: Path | None) -> np.ndarray | None:
            return read_index_png(path, num_classes) if path is not None and path.is_file() else None

        sample = evaluation.EvaluationSet([entry], self.config.data, num_classes)[0]
        probability = Predictor(network, self.config.inference, self.config.data).probabilities(sample["image"])
        scribble = None
        if training and entry.scribble is not None:
            scribble = read_scribble(entry.scribble, entry.classes, num_classes)
        vectors, values = eigenvectors(network, sample["image"], self.config)
        return ReportImage(
            name=f"{entry.name} ({'train' if training else dataset.eval_name})",
            image=evaluation.as_uint8(sample["image"]),
            scribble=scribble,
            pseudo_label=mask(self.folder.pseudo_labels / f"{entry.name}.png") if training else None,
            prediction=probability.argmax(0).cpu().numpy(),
            label=mask(entry.label),
            eigenvectors=vectors,
            eigenvalues=values,
        )


@torch.no_grad()
def eigenvectors(
    network: nn.Module, image: torch.Tensor, config: Config
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Leading eigenvectors of P's symmetric form for one image, as maps over the positions of the walk.

    The symmetric form (docs/method.md section 2) has real eigenpairs. The image is resized so that its long side is
    the training crop.

    Returns:
        (num, rows, columns) and (num,), or (None, None) where the network has no random walk.
    """
    device = next(network.parameters()).device
    pixels = normalize(image.to(device), config.data)[None]
    factor = config.augment.crop / max(pixels.shape[-2:])
    size = [max(9, round(side * factor)) for side in pixels.shape[-2:]]
    output = network.eval()(
        F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=factor < 1)
    )
    count = config.report.eigenvectors
    if output.q is None or count == 0:
        return None, None
    count = min(count, output.q.shape[1])
    values, vectors = ck.neural_eigenspace(output.q.float(), output.k.float(), count, normalize="symmetric")
    rows, columns = output.grid
    maps = vectors[0].T.reshape(count, rows, columns)
    return maps.cpu().numpy(), values[0].cpu().numpy()
