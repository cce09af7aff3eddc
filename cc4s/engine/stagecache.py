"""Stages that several runs share: trained once, found by a hash of all that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from cc4s.config import Config, StageConfig, to_dict
from cc4s.data import Dataset, Entry
from cc4s.engine.runfolder import RunFolder, is_free_key
from cc4s.files import TEMPORARY_PREFIX, atomic_write_json, atomic_write_text

FORMAT = 1


class StageCache:
    """Finished stages in `folder`/<hash>/: checkpoint, log, metrics if any, and the pseudo-labels it learned from.

    The hash is of the resolved configuration of the stage: data, seed, network, optimisation, inference, and those
    weights of the losses that the stage uses; of what it starts from, which is the hash of another stage; and of the
    content of all files of the dataset. `stage.json` in each folder spells it out. Files are linked into the run, not
    copied, and never change.

    Args:
        folder: the cache, on the file system of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def keys(self, config: Config, dataset: Dataset) -> dict[str, str]:
        """The hash of every stage of a run, by the stage's name."""
        data = dataset_digest(dataset)
        keys: dict[str, str] = {}
        for index in range(len(config.stages)):
            keys[config.stages[index].name] = _digest(self._content(config, index, keys, data))
        return keys

    def _content(self, config: Config, index: int, keys: dict[str, str], data: str) -> dict[str, Any]:
        """All that determines a stage."""
        stage = config.stages[index]
        values = {key: value for key, value in to_dict(config).items() if key not in ("method", "preset", "budget")}
        del values["stages"]
        # The content of the files counts, not where they lie.
        del values["data"]["root"], values["data"]["scribbles"]
        values = _without_free(values)
        values["loss"] = _used_weights(config, stage)
        content: dict[str, Any] = {"format": FORMAT, "dataset": data, "config": values, "stage": asdict(stage)}
        if stage.init == "backbone":
            weights = config.model.backbone_weights
            content["stage"]["init"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest() if weights else "fresh"
        else:
            content["stage"]["init"] = keys[stage.init]
        if stage.labels == "pseudo":
            content["pseudo_labels_of"] = keys[config.stages[index - 1].name]
        else:
            del values["pseudo"]
        return content

    def fetch(self, key: str, stage: StageConfig, run: RunFolder) -> bool:
        """Links a finished stage into a run that has not begun it; whether it was there."""
        source = self.folder / key
        if run.checkpoint(stage.name).is_file() or not source.is_dir():
            return False
        if stage.labels == "pseudo":
            _link_folder(source / "pseudo_labels", run.pseudo_labels)
            _link(source / "pseudo_labels.json", run.record("pseudo_labels"))
        if not any(entry.get("stage") == stage.name for entry in run.read_log()):
            with run.log_file.open("a", encoding="utf-8") as file:
                file.write((source / "log.jsonl").read_text("utf-8"))
        if (source / "metrics.json").is_file():
            _link(source / "metrics.json", run.record(stage.name))
        # The checkpoint is last: it says that the stage is done.
        _link(source / "checkpoint.pt", run.checkpoint(stage.name))
        return True

    def store(self, key: str, config: Config, stage: StageConfig, run: RunFolder) -> None:
        """Links a stage that a run has trained into the cache."""
        target = self.folder / key
        if target.is_dir():
            return
        with _published(target) as made:
            _link(run.checkpoint(stage.name), made / "checkpoint.pt")
            if run.record(stage.name).is_file():
                _link(run.record(stage.name), made / "metrics.json")
            if stage.labels == "pseudo":
                _link_folder(run.pseudo_labels, made / "pseudo_labels")
                _link(run.record("pseudo_labels"), made / "pseudo_labels.json")
            entries = [entry for entry in run.read_log() if entry.get("stage") == stage.name]
            atomic_write_text(made / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
            atomic_write_json(made / "stage.json", {"stage": asdict(stage), "loss": _used_weights(config, stage)})


def dataset_digest(dataset: Dataset) -> str:
    """A hash of the classes, the lists, and the content of every image, mask and scribble."""
    total = hashlib.sha256(json.dumps(dataset.classes).encode())

    def add(entry: Entry) -> None:
        total.update(entry.name.encode())
        for path in (entry.image, entry.label, entry.scribble):
            content = path.read_bytes() if path is not None and path.is_file() else b""
            total.update(hashlib.sha256(content).digest())

    for entries in (dataset.train, dataset.eval):
        total.update(f"{len(entries)} entries".encode())
        for entry in entries:
            add(entry)
    return total.hexdigest()


def _used_weights(config: Config, stage: StageConfig) -> dict[str, Any]:
    """The keys of `loss` that the stage's terms depend on."""
    loss = asdict(config.loss)
    entropy, color = "entropy" in stage.losses, "color" in stage.losses and loss["color"] > 0
    used = {key: loss[key] for key in ("cross_entropy", "class_balance")}
    if "consistency" in stage.losses:
        used["consistency"] = loss["consistency"]
    if entropy:
        used |= {key: loss[key] for key in ("entropy", "entropy_skip_boundaries")}
    if color:
        used |= {key: loss[key] for key in ("color", "color_norm", "relaxation")}
    if color or (entropy and loss["entropy_skip_boundaries"]):
        used |= {key: loss[key] for key in ("superpixels", "compactness")}
    return used


def _without_free(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if not is_free_key(prefix + key):
            kept[key] = _without_free(value, f"{prefix}{key}.") if isinstance(value, dict) else value
    return kept


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _link(source: Path, target: Path) -> None:
    """A hard link, replacing what is there; a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _link_folder(source: Path, target: Path) -> None:
    for path in source.iterdir():
        _link(path, target / path.name)


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder that appears under its name complete or not at all."""
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not target.is_dir():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
