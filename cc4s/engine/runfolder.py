"""The folder of a run: what is in it, whose it is, and what of the run is already done."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cc4s import config as configuration
from cc4s.config import Config
from cc4s.engine.trackers import Tracker
from cc4s.errors import UserError
from cc4s.files import TEMPORARY_PREFIX, atomic_write_json, atomic_write_text

# Keys that change how a run is carried out, not what it computes: they may differ when a run is continued.
_FREE_KEYS = (
    "device",
    "kernels",
    "train.workers",
    "train.compile",
    "train.log_every",
    "train.checkpoint_every",
    "report",
)


def is_free_key(key: str) -> bool:
    """Whether a key of the configuration changes how a run is carried out, not what it computes."""
    return key in _FREE_KEYS or key.startswith("report.")


class RunFolder:
    """Paths and records of one run.

    Layout: config.yaml, log.jsonl, checkpoints/<stage>.pt, checkpoints/running.pt (of the stage in training),
    stages/<stage>.json (its metrics), pseudo_labels/<name>.png, data/ (generated images and scribbles),
    metrics.json, report.html.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.trackers: list[Tracker] = []

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def pseudo_labels(self) -> Path:
        return self.path / "pseudo_labels"

    @property
    def running(self) -> Path:
        return self.path / "checkpoints" / "running.pt"

    def checkpoint(self, stage: str) -> Path:
        return self.path / "checkpoints" / f"{stage}.pt"

    def record(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def check(self, config: Config) -> None:
        """Looks whether the run may go on here; changes nothing.

        Raises:
            UserError: the path is a file, lies in the data folder, or holds something else than this run.
        """
        if config.data.root and config.data.format != "synthetic":
            root = Path(config.data.root).resolve()
            if root == self.path.resolve() or root in self.path.resolve().parents:
                raise UserError(f"--out {self.path}: lies in the data folder {config.data.root}, which is only read")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file, expected a folder")
        stored = self.path / "config.yaml"
        if not stored.is_file():
            # Generated data comes before the configuration: it belongs to the checks.
            if self.path.is_dir() and any(entry.name not in (".lock", "data") for entry in self.path.iterdir()):
                raise UserError(f"--out {self.path}: not empty and not a run of cc4s; choose another folder")
            return
        old = configuration.to_dict(configuration.from_dict(read_config(stored), str(stored)))
        difference = first_difference(old, configuration.to_dict(config))
        if difference is not None:
            key, was, now = difference
            raise UserError(
                f"--out {self.path}: holds another run ({key} was {was!r}, now {now!r});"
                " choose another folder or the same settings"
            )

    def create(self, config: Config) -> None:
        """Makes the folder, records the configuration once, and clears what a killed process left half-written."""
        for folder in (self.path, self.path / "checkpoints", self.path / "stages"):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.rglob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
        if not (self.path / "config.yaml").exists():
            atomic_write_text(self.path / "config.yaml", configuration.to_yaml(config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the system lets go of it when the process ends, however it ends.

        Raises:
            UserError: another process works in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--out {self.path}: another process is working on this run") from error
            try:
                yield
            finally:
                self._forget_empty()

    def _forget_empty(self) -> None:
        """A run that was refused leaves no folder behind."""
        if not (self.path / "config.yaml").exists():
            (self.path / ".lock").unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def write_record(self, stage: str, content: dict[str, Any]) -> None:
        atomic_write_json(self.record(stage), content)

    def read_record(self, stage: str) -> dict[str, Any] | None:
        """The finished record of a stage, or None."""
        path = self.record(stage)
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path}: damaged; delete it to have it made again") from error

    def log(self, **entry: Any) -> None:
        """Appends one line to log.jsonl, and the numbers of a step to the trackers."""
        entry = {key: _finite(value) for key, value in entry.items()}
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if entry["event"] == "step" and isinstance(value, float):
                for track in self.trackers:
                    track(f"{entry['stage']}/{name}", value, entry["step"])

    def mend_log(self) -> None:
        """Ends a line that a killed process left unfinished, so that the next entry starts on its own."""
        if not self.log_file.is_file():
            return
        with self.log_file.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def seconds(self) -> float:
        """Wall-clock seconds of training, evaluation and pseudo-labels, over all sessions.

        Stages that came from a cache count with the time they once took.
        """
        total = 0.0
        session: dict[str, float] = {}
        for entry in self.read_log():
            stage = entry.get("stage", "")
            if entry["event"] == "start":
                total += session.pop(stage, 0.0)
            elif entry["event"] == "step":
                session[stage] = entry["seconds"]
            elif entry["event"] in ("evaluate", "pseudo_labels"):
                total += entry["seconds"]
        return round(total + sum(session.values()), 3)

    def read_log(self) -> list[dict[str, Any]]:
        if not self.log_file.is_file():
            return []
        lines = self.log_file.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise UserError(f"{self.log_file}: damaged; delete it to go on without the curves so far") from error


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: None instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_config(path: Path) -> dict[str, Any]:
    """The content of a run's config.yaml."""
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base class
        raise UserError(f"{path}: damaged; choose another --out") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged; choose another --out")
    return values  # type: ignore[return-value]


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, with both values, in which two configurations compute different things; None if there is none."""
    old, new = _flatten(old), _flatten(new)
    for key in sorted(old.keys() | new.keys()):
        if is_free_key(key):
            continue
        if key == "data.root" and key in old and key in new and Path(old[key]).resolve() == Path(new[key]).resolve():
            continue
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
