"""One training stage: from its start to its checkpoint, continued wherever it was interrupted."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cc4s import config as configuration
from cc4s import transforms
from cc4s.config import Config, StageConfig
from cc4s.data import Dataset, StepSampler, TrainingSet, label_counts, worker_init
from cc4s.engine import checkpoint
from cc4s.engine.meter import peak_memory_mb, reset_peak_memory
from cc4s.engine.runfolder import RunFolder
from cc4s.engine.runtime import Runtime, derive_seed, seed_everything
from cc4s.errors import OutOfTime, UserError
from cc4s.losses import Batch, StageLoss, balanced_weights
from cc4s.models import build_model, synchronize
from cc4s.progress import progress_bar


def stage_steps(config: Config, stage: StageConfig, images: int) -> int:
    """Optimiser steps of a stage: `train.iterations`, or `train.epochs` passes over the images, times its share."""
    steps = config.train.iterations or config.train.epochs * math.ceil(images / config.train.batch_size)
    return max(1, round(stage.share * steps))


def learning_rate(config: Config, stage: StageConfig, step: int, steps: int) -> float:
    """Polynomial decay per iteration: lr (1 - step/steps)^power."""
    return stage.lr * config.train.lr_factor * (1 - step / steps) ** config.train.poly_power


def new_optimizer(config: Config, stage: StageConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `train.optimizer` for what is trainable in a network."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if config.train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=config.train.weight_decay)
    return torch.optim.SGD(
        parameters, lr=stage.lr, momentum=config.train.momentum, weight_decay=config.train.weight_decay
    )


def new_network(config: Config, stage: StageConfig, num_classes: int) -> nn.Module:
    """The stage's network with fresh weights (and those of `model.backbone_weights`), the same for every stage."""
    seed_everything(config.seed, "weights")
    return build_model(
        config.model, num_classes=num_classes, in_channels=config.data.channels, random_walk=stage.random_walk
    )


class StageTraining:
    """Trains one stage in a run folder.

    Args:
        config: of the run. stage: which stage. dataset: what to train on. folder: of the run.
        runtime: devices and processes.
    """

    def __init__(
        self, config: Config, stage: StageConfig, dataset: Dataset, folder: RunFolder, runtime: Runtime
    ) -> None:
        self.config = config
        self.stage = stage
        self.dataset = dataset
        self.folder = folder
        self.runtime = runtime
        self.steps = stage_steps(config, stage, len(dataset.train))
        self.loss = StageLoss(config, stage, len(dataset.classes)).to(runtime.device)

    def check(self) -> None:
        """Builds the network and the sampler once: what the configuration asks for must be possible.

        Raises:
            UserError: weights that do not fit, or a batch that does not divide.
        """
        new_network(self.config, self.stage, len(self.dataset.classes))
        self._sampler(0)

    def run(self) -> nn.Module:
        """Trains to the end, writes the stage's checkpoint and returns the network (EMA weights where on)."""
        config, fabric = self.config, self.runtime.fabric
        self.loss = StageLoss(config, self.stage, len(self.dataset.classes), self._class_weight())
        self.loss.to(self.runtime.device)
        network = new_network(config, self.stage, len(self.dataset.classes))
        running = self._running_checkpoint()
        if running is not None:
            checkpoint.load_weights(network, running, self.folder.running)
        elif self.stage.init != "backbone":
            path = self.folder.checkpoint(self.stage.init)
            checkpoint.load_weights(network, checkpoint.load(path), path)
        network = synchronize(fabric.to_device(network))
        if config.train.compile:
            network.compile()
        optimizer = new_optimizer(config, self.stage, network)
        step = 0
        average = _Average(network, config.train.ema)
        if running is not None:
            optimizer.load_state_dict(running["optimizer"])
            average.load(running["average"])
            step = running["step"]
        module, optimizer = fabric.setup(network, optimizer)
        module.train()
        self._loop(network, module, optimizer, average, step)
        average.copy_to(network)
        if self.runtime.is_main:
            checkpoint.save(self.folder.checkpoint(self.stage.name), self._content(network))
            self.folder.running.unlink(missing_ok=True)
        self.runtime.barrier()
        return network.eval()

    def _running_checkpoint(self) -> dict[str, Any] | None:
        if not self.folder.running.is_file():
            return None
        running = checkpoint.load(self.folder.running)
        # A kill between a stage's end and the removal of its running checkpoint leaves the old one behind.
        return running if running["stage"] == self.stage.name else None

    def _content(self, network: nn.Module) -> dict[str, Any]:
        return {
            "model": {key: value.detach().cpu() for key, value in network.state_dict().items()},
            "config": configuration.to_dict(self.config),
            "classes": list(self.dataset.classes),
            "random_walk": self.stage.random_walk,
            "stage": self.stage.name,
        }

    def _loop(self, network: nn.Module, module: Any, optimizer: Any, average: _Average, start: int) -> None:
        train, runtime = self.config.train, self.runtime
        batches = self.batches(start)
        bar = progress_bar(
            range(start, self.steps),
            f"{self.stage.name:>5}",
            "step",
            show=runtime.is_main,
            initial=start,
            total=self.steps,
        )
        began = time.perf_counter()
        if runtime.is_main and start < self.steps:
            self.folder.log(event="start", stage=self.stage.name, step=start, steps=self.steps)
        reset_peak_memory(runtime.device)
        warm = began
        for step in bar:
            terms, norm, lr = self._step(network, module, optimizer, batches, step)
            average.update(network)
            done = step + 1
            if done == start + 1:
                warm = time.perf_counter()
            stop = done % train.log_every == 0 and done < self.steps and runtime.out_of_time()
            save = stop or (done % train.checkpoint_every == 0 and done < self.steps)
            if done % train.log_every == 0 or done == self.steps or save:
                values = {name: value.item() for name, value in terms.items()}
                values = self._mean_over_processes(values)
                if not math.isfinite(values["loss"]):
                    raise UserError(
                        f"stage {self.stage.name}: the loss is not finite at step {done}; lower train.lr_factor or set"
                        " train.clip_grad"
                    )
                bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                if runtime.is_main:
                    self.folder.log(
                        event="step",
                        stage=self.stage.name,
                        step=done,
                        epoch=step * train.batch_size // len(self.dataset.train),
                        **values,
                        lr=lr,
                        grad_norm=float(norm),
                        seconds=round(time.perf_counter() - began, 3),
                    )
            if save and runtime.is_main:
                content = self._content(network)
                content |= {"optimizer": optimizer.state_dict(), "average": average.state(), "step": done}
                checkpoint.save(self.folder.running, content)
            if stop:
                bar.close()
                raise OutOfTime(f"stage {self.stage.name}: stopped at step {done} of {self.steps}")
        if runtime.is_main and start < self.steps:
            # Without the first step, which warms up.
            self.folder.log(
                event="trained",
                stage=self.stage.name,
                images=(self.steps - start - 1) * train.batch_size,
                seconds=round(time.perf_counter() - warm, 4),
                peak_memory_mb=peak_memory_mb(runtime.device),
            )

    def _step(
        self, network: nn.Module, module: Any, optimizer: Any, batches: Iterator[Batch], step: int
    ) -> tuple[dict[str, Tensor], Tensor, float]:
        """One optimiser step over the micro-batches of a global batch."""
        config, fabric = self.config, self.runtime.fabric
        micro = [fabric.to_device(next(batches)) for _ in range(config.train.accumulate)]
        # Randomness is keyed by its place in the run: neither a resume nor the number of processes changes it.
        places = [(config.seed, self.stage.name, step, index) for index in range(len(micro))]
        drawn = [self.draw_transform(place) for place in places]
        counts = self.loss.global_counts(micro, drawn)
        lr = learning_rate(config, self.stage, step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        for place, batch, transform in zip(places, micro, drawn, strict=True):
            seed_everything(*place)
            with fabric.no_backward_sync(module, enabled=place[-1] < len(micro) - 1):
                new = self.loss(module, batch, transform, counts, network, fabric.autocast())
                fabric.backward(new["loss"])
            for name, value in new.items():
                terms[name] = terms.get(name, torch.zeros_like(value)) + value.detach()
        limit = config.train.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        optimizer.step()
        return terms, norm, lr

    def draw_transform(self, place: tuple[Any, ...]) -> transforms.ImageTransform | None:
        if "consistency" not in self.stage.losses:
            return None
        rng = random.Random(derive_seed(*place, "transform"))
        pitch = configuration.cell_pitch(self.config.model)
        return transforms.draw(self.config.loss.consistency, self.config.augment.crop, pitch, rng)

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if self.runtime.world_size == 1:
            return values
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.runtime.device)
        mean = self.runtime.all_reduce_sum(packed) / self.runtime.world_size
        return dict(zip(values, mean.tolist(), strict=True))

    def _class_weight(self) -> Tensor | None:
        """Class weights from the labels of the stage, over the whole training list."""
        if not self.config.loss.class_balance:
            return None
        pixels = label_counts(self.dataset.train, self._labels(), len(self.dataset.classes))
        return balanced_weights(torch.from_numpy(pixels), self.config.loss.class_balance)

    def _labels(self) -> str | Path:
        return self.folder.pseudo_labels if self.stage.labels == "pseudo" else self.stage.labels

    def batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches of this process from optimiser step `start` on."""
        config = self.config
        samples = TrainingSet(
            self.dataset.train,
            config.data,
            config.augment,
            seed=self._data_seed,
            labels=self._labels(),
            num_classes=len(self.dataset.classes),
            superpixels=config.loss.superpixels if self.loss.needs_superpixels else 0,
            compactness=config.loss.compactness,
        )
        loader = DataLoader(
            samples,
            batch_sampler=self._sampler(start),
            num_workers=config.train.workers,
            pin_memory=self.runtime.device.type == "cuda",
            worker_init_fn=worker_init,
        )
        return iter(loader)

    @property
    def _data_seed(self) -> int:
        """Every stage sees the images in an order of its own, under other augmentations."""
        return derive_seed(self.config.seed, self.stage.name, "data")

    def _sampler(self, start: int) -> StepSampler:
        return StepSampler(
            len(self.dataset.train),
            self.config.train.batch_size,
            seed=self._data_seed,
            start_step=start,
            total_steps=self.steps,
            accumulate=self.config.train.accumulate,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )


class _Average:
    """Exponential moving average of a network's weights and buffers; nothing where the decay is 0."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {key: value.detach().clone() for key, value in network.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        if not self.decay:
            return
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, 1 - self.decay)
            else:
                self.shadow[key].copy_(value)

    def state(self) -> dict[str, Tensor]:
        return {key: value.cpu() for key, value in self.shadow.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            self.shadow[key].copy_(value)

    def copy_to(self, network: nn.Module) -> None:
        if self.decay:
            network.load_state_dict(self.shadow)
