"""The configuration of a run: one schema with a default and a meaning for every key.

A run's configuration is the schema's defaults, then the recipe (`recipes/<dataset>.yaml`), then the recipe's
section for the budget, then the method, then the preset, then the command line's key=value words; later ones win.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cc4s.errors import UserError
from cc4s_kernels.ops.potts import RELAXATIONS

DATASETS = ("voc2012", "pascal_context", "acdc", "msrc21", "folder", "synthetic")
METHODS = (
    "cc4s",
    "pce",
    "rw",
    "entropy",
    "consistency",
    "pseudo",
    "full",
    "urss",
    "potts",
    "rawks",
    "selflabel",
    "densecrf",
    "ncl",
    "kcl",
    "gatedcrf",
    "tel",
)
PRESETS = ("clean", "released")
BUDGETS = ("smoke", "short", "cpu", "full")
KERNELS = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass
class DataConfig:
    """What is read, and from where."""

    # Layout on disk: folder (images/, labels/, scribbles/, *.txt), voc, pascal_context, synthetic (generated).
    format: str = "folder"
    # The data folder; never written to.
    root: str = ""
    # Number of classes; 0 takes it from classes.json.
    num_classes: int = 0
    # Class names; empty takes them from classes.json.
    classes: list[str] = field(default_factory=list)
    # Channels of the images given to the network: 3, 1, or n for n-channel files.
    channels: int = 3
    # Where training scribbles come from: a folder name under root, an absolute path, or "generate" (from the masks).
    scribbles: str = "scribbles"
    # Split lists, without ".txt". An empty train_list is VOC's train_aug, or train where there is none (voc only); an
    # empty eval_list is test, or val where there is no test.
    train_list: str = "train"
    eval_list: str = ""
    # Resize training images and their labels so that the long side is this many pixels; 0 keeps the size. Evaluation
    # is at the images' own size, whatever inference.long_side predicts at.
    long_side: int = 0
    # Use only this many images, spread evenly over the list; 0 uses all.
    limit_train: int = 0
    limit_eval: int = 0
    # Classes left out of means (not out of the confusion matrix): the background of medical sets.
    exclude_from_mean: list[int] = field(default_factory=list)
    # A regular expression whose first group names the volume of a slice; empty: no per-volume numbers.
    volume_pattern: str = ""
    # Channel statistics of images scaled to [0, 1]; ImageNet's by default. One value serves all channels.
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    # Generated sets (format: synthetic): images per split and side in pixels.
    synthetic_train: int = 48
    synthetic_eval: int = 24
    synthetic_size: int = 96


@dataclass
class AugmentConfig:
    """Training augmentation (METHOD 9)."""

    # Side of the square training crop in pixels; 8m+1 puts feature cells on the corners.
    crop: int = 465
    scale_min: float = 0.5
    scale_max: float = 2.0
    rotation: float = 10.0
    rotation_prob: float = 0.5
    blur_prob: float = 0.5
    flip_prob: float = 0.5


@dataclass
class ModelConfig:
    """The network (METHOD 1)."""

    # resnet18 | resnet34 | resnet50 | resnet101 | resnet152, or timm/<name>, torchvision/<name>, smp/<name>; unet is a
    # whole network, without a head of its own.
    backbone: str = "resnet50"
    # Channels of the backbone's first stage; 64 is the published ResNet, 16 the usual U-Net. Own networks only.
    width: int = 64
    # The level of the U-Net that the walk runs on: stride 2^level; 4 is the bottleneck.
    walk_level: int = 3
    # A local file with torchvision-named ResNet weights; empty starts from scratch.
    backbone_weights: str = ""
    # cc4s: random-walk head; aspp: the authors' baseline head.
    head: str = "cc4s"
    # D, the channels of the features the walk runs on.
    head_channels: int = 512
    # d, the channels of queries and keys; 0 is D / 8.
    key_channels: int = 0
    # Shrink factor of the random walk.
    shrink: int = 1
    dropout: float = 0.1
    # batch | group | frozen
    norm: str = "batch"
    # Take padding out of the walk.
    mask_padding: bool = True


def cell_pitch(model: ModelConfig) -> int:
    """Pixels between the positions of the random walk."""
    return (2**model.walk_level if model.backbone == "unet" else 8) * model.shrink


@dataclass
class ConsistencyConfig:
    """Self-supervision on the neural eigenspace (METHOD 5)."""

    kl: float = 1.0
    trace: float = 1.0
    # row | column
    normalize: str = "row"
    # Transforms drawn with equal chance: flip, crop, bands (the released full-width row bands).
    transforms: list[str] = field(default_factory=lambda: ["flip", "crop"])
    # Shares of the crop's side that a crop transform keeps; rounded to sides 8m+1.
    crop_shares: list[float] = field(default_factory=lambda: [0.6, 0.8])
    # clean: mean over rows, trace / N. released: METHOD 8.
    reduction: str = "clean"
    # Update batch-norm statistics in the target pass as well (the released behaviour).
    update_statistics: bool = False


@dataclass
class TermConfig:
    """A peer's loss term (docs/methods.md); which stages have it is up to them."""

    weight: float = 1.0


@dataclass
class PottsConfig(TermConfig):
    """Potts energy of the prediction on the pixel grid with Gaussian colour weights."""

    relaxation: str = "quadratic"
    # 4 | 8
    connectivity: int = 8
    # In 8-bit levels.
    sigma_color: float = 15.0


@dataclass
class RandomWalkerConfig(TermConfig):
    """Cross-entropy against scribbles that random walkers propagate."""

    beta: float = 130.0
    # How fast the weight of a pixel falls with the entropy of its label.
    alpha: float = 1.0
    # The walk is on cells of so many pixels a side: 16 times less work.
    stride: int = 4


@dataclass
class SelfLabelConfig(TermConfig):
    """Collision cross-entropy against soft labels that are made anew from every prediction."""

    # Weight of the Potts energy of the labels.
    potts: float = 1.0
    relaxation: str = "collision_divergence"
    connectivity: int = 8
    sigma_color: float = 15.0
    # Steps of mirror descent, and their size.
    steps: int = 10
    rate: float = 0.25


@dataclass
class DenseConfig(TermConfig):
    """The bilateral kernel of all pairs of pixels, at a share of the image's size."""

    # In pixels and in 8-bit levels.
    sigma_xy: float = 100.0
    sigma_rgb: float = 15.0
    scale: float = 0.5


@dataclass
class DenseCRFConfig(DenseConfig):
    """Energy of a dense CRF per pixel."""

    # The released weight, 2e-9 of a sum over pixels, for half a crop of 465.
    weight: float = 1e-4


@dataclass
class NormalizedCutConfig(DenseConfig):
    """Normalised cut."""

    weight: float = 0.1


@dataclass
class KernelCutConfig(DenseConfig):
    """Normalised cut and dense CRF."""

    weight: float = 0.1
    normalized_cut: float = 1.0
    dense_crf: float = 1e-3


@dataclass
class GatedCRFConfig(TermConfig):
    """Gated CRF: the kernel within a window."""

    weight: float = 0.1
    radius: int = 5
    # In pixels, and in units of colours from 0 to 1.
    sigma_xy: float = 6.0
    sigma_rgb: float = 0.1


@dataclass
class TreeEnergyConfig(TermConfig):
    """Tree energy: the tree of the colours, then that of the features."""

    weight: float = 0.4
    sigma: float = 0.02
    # Use the tree of the features.
    features: bool = True


@dataclass
class LossConfig:
    """Weights of the loss terms; which terms are on is up to each stage."""

    cross_entropy: float = 1.0
    # Classes weigh in the cross-entropy by (1 / their share of the stage's labelled pixels) to this power; 0 is off, 1
    # gives every class the same weight in total. Masks of small organs are nearly all background, scribbles are not.
    class_balance: float = 0.0
    entropy: float = 1.0
    # At 5 the colour term pulls on 21 classes about as hard as the entropy does at 1 (docs/training.md).
    color: float = 5.0
    # Leave superpixel boundaries out of the entropy.
    entropy_skip_boundaries: bool = True
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    superpixels: int = 800
    compactness: float = 10.0
    # sum | frobenius
    color_norm: str = "sum"
    relaxation: str = "quadratic"
    # Terms of peers, each under its own name.
    potts: PottsConfig = field(default_factory=PottsConfig)
    rawks: RandomWalkerConfig = field(default_factory=RandomWalkerConfig)
    selflabel: SelfLabelConfig = field(default_factory=SelfLabelConfig)
    densecrf: DenseCRFConfig = field(default_factory=DenseCRFConfig)
    ncl: NormalizedCutConfig = field(default_factory=NormalizedCutConfig)
    kcl: KernelCutConfig = field(default_factory=KernelCutConfig)
    gatedcrf: GatedCRFConfig = field(default_factory=GatedCRFConfig)
    tel: TreeEnergyConfig = field(default_factory=TreeEnergyConfig)


PEER_TERMS = tuple(name for name, value in vars(LossConfig()).items() if isinstance(value, TermConfig))
"""Names of the peers' loss terms: keys of `LossConfig`, and words of a stage's losses."""


@dataclass
class StageConfig:
    """One training stage."""

    name: str = "ur"
    # Starts from: "backbone" (fresh head), or the name of an earlier stage.
    init: str = "backbone"
    # scribbles | pseudo | masks
    labels: str = "scribbles"
    # Any of: entropy, consistency, color, and peers' terms (PEER_TERMS). Cross-entropy is always on.
    losses: list[str] = field(default_factory=list)
    random_walk: bool = True
    lr: float = 1e-3
    # Length in units of train.epochs / train.iterations.
    share: float = 1.0


@dataclass
class TrainConfig:
    """Optimisation (METHOD 9)."""

    # Global batch size, over all processes and accumulation steps.
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 50
    # Optimiser steps of a stage; 0 derives them from epochs.
    iterations: int = 0
    # sgd (the published one) | adamw: networks from scratch learn small structures with it in far fewer steps.
    optimizer: str = "sgd"
    # Of sgd.
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # Multiplies every stage's lr; networks from scratch need more than pretrained ones.
    lr_factor: float = 1.0
    # Exponent of the polynomial decay; 0 is a constant rate.
    poly_power: float = 0.9
    # Largest gradient norm; 0 does not clip.
    clip_grad: float = 0.0
    # Decay of the exponential moving average of the weights; 0 is off.
    ema: float = 0.0
    # 32-true | bf16-mixed
    precision: str = "32-true"
    compile: bool = False
    # Optimiser steps between checkpoints.
    checkpoint_every: int = 200
    log_every: int = 10
    # Loader processes; 0 loads in the training process.
    workers: int = 2


@dataclass
class InferenceConfig:
    """Sliding-window, multi-scale inference (METHOD 9)."""

    scales: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])
    flip: bool = False
    # Long side of the image at scale 1; 0 keeps the image's own.
    long_side: int = 512
    window: int = 465
    # Window stride as a share of the window.
    stride: float = 0.6666666666666666
    # Dense CRF on the averaged probabilities.
    crf: bool = False


@dataclass
class PseudoConfig:
    """Pseudo-labels (METHOD 6)."""

    # Least mean probability of a label; below it the pixel is ignored.
    threshold: float = 0.8
    crf: bool = False
    # Retraining starts from the backbone's weights, as in the paper. False goes on from the stage before: for
    # backbones without pretrained weights, which would have to learn everything again.
    fresh_start: bool = True


@dataclass
class CrfConfig:
    """The dense CRF that inference.crf and pseudo.crf switch on (METHOD 6)."""

    # exact: every pair of pixels counts. lattice: the approximation of the package pydensecrf.
    method: str = "exact"
    # Long side of the grid of exact inference on a CPU, in pixels; 0 is the image's own size, minutes per image.
    cpu_size: int = 128


@dataclass
class ReportConfig:
    """The pictures of report.html."""

    # Images shown with overlays.
    images: int = 4
    # Evaluate after every stage, not only after the last.
    every_stage: bool = True
    # Leading eigenvectors of P shown per image.
    eigenvectors: int = 4
    tensorboard: bool = False
    wandb: bool = False


@dataclass
class Config:
    """A whole run."""

    dataset: str = "folder"
    method: str = "cc4s"
    # clean | released
    preset: str = "clean"
    # smoke | short | cpu | full
    budget: str = "full"
    seed: int = 0
    # auto | cpu | cuda
    device: str = "auto"
    # auto | reference | cpu | triton | cuda
    kernels: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: list[StageConfig] = field(default_factory=list)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    crf: CrfConfig = field(default_factory=CrfConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such recipe file") from error
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base class
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable YAML recipe: {reason}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: got a {type(loaded).__name__}, expected a mapping of configuration keys")
    return loaded


def _packaged(name: str) -> DictConfig:
    with resources.as_file(resources.files("cc4s") / "recipes" / name) as path:
        return _read_yaml(path)


def search_space() -> dict[str, dict[str, Any]]:
    """The keys that `cc4s tune` searches, each with how its values are drawn: recipes/tuning.yaml."""
    return OmegaConf.to_container(_packaged("tuning.yaml"))  # type: ignore[return-value]


def _merge(config: DictConfig, layer: Any, source: str) -> DictConfig:
    """Merges one layer, turning a wrong key or type into one line that names it and its source."""
    try:
        return OmegaConf.merge(config, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or str(error.key or "")
        message = str(error.msg or error).splitlines()[0]
        if "not in" in message or "is not a valid" in message or "Key" in message:
            raise UserError(_unknown_key(key, source)) from error
        raise UserError(f"{source}: key {key}: {message}") from error


def _unknown_key(key: str, source: str) -> str:
    known = list(_flat_keys(asdict(Config())))
    # A misspelt section, or a misspelt key in some section.
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(k for k in known if '.' not in k)}"
    return f"{source}: unknown key {key}{hint}"


def _flat_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")


def load_config(recipe: str, overrides: list[str] | None = None, **fixed: Any) -> Config:
    """The resolved configuration of a run.

    Args:
        recipe: a packaged recipe (`DATASETS`) or the path of a YAML file with the same keys.
        overrides: key=value words; values are YAML. Lists are indexed as in `stages.0.lr=1e-3`.
        **fixed: overrides from named command-line options, dots written as "__" (`data__root="x"`); None is left out.

    Raises:
        UserError: unknown recipe, key or choice, or a value of the wrong type or range.
    """
    is_file = recipe.endswith((".yaml", ".yml"))
    if not is_file and recipe not in DATASETS:
        raise UserError(f"recipe: got {recipe!r}, expected one of {', '.join(DATASETS)} or a .yaml file")
    source = recipe if is_file else f"recipe {recipe}"
    layer = _read_yaml(Path(recipe)) if is_file else _packaged(f"{recipe}.yaml")
    budgets = layer.pop("budgets", None) or {}
    words = _parse_overrides(overrides or [])
    words += [(key.replace("__", "."), value) for key, value in fixed.items() if value is not None]

    schema = OmegaConf.structured(Config)
    choices = {key: str(value) for key, value in words if key in ("budget", "method", "preset")}
    budget = choices.get("budget", layer.get("budget", schema.budget))
    method = choices.get("method", layer.get("method", schema.method))
    preset = choices.get("preset", layer.get("preset", schema.preset))
    _check_choice("budget", budget, BUDGETS)
    _check_choice("method", method, METHODS)
    _check_choice("preset", preset, PRESETS)

    config = _merge(schema, layer, source)
    if budget in budgets:
        config = _merge(config, budgets[budget], f"{source}, budget {budget}")
    if not layer.get("stages"):
        config = _merge(config, {"stages": _packaged("methods.yaml")[method]}, f"method {method}")
    config = _merge(config, _packaged("presets.yaml")[preset], f"preset {preset}")
    config = _merge(config, {"budget": budget, "method": method, "preset": preset}, "command line")
    for key, value in words:
        config = _override(config, key, value)
    resolved: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    if not resolved.pseudo.fresh_start:
        for before, stage in zip(resolved.stages, resolved.stages[1:], strict=False):
            if stage.labels == "pseudo" and stage.init == "backbone":
                stage.init = before.name
    validate(resolved)
    return resolved


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    parsed = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"command line: got {word!r}, expected key=value")
        try:
            parsed.append((key, OmegaConf.from_dotlist([f"value={text}"]).value))
        except Exception as error:
            raise UserError(f"command line: key {key}: {text!r} is not a YAML value") from error
    return parsed


def _override(config: DictConfig, key: str, value: Any) -> DictConfig:
    result = config.copy()
    try:
        OmegaConf.select(config, key, throw_on_missing=True)
        OmegaConf.update(result, key, value, merge=not isinstance(value, list))
    except OmegaConfBaseException as error:
        message = str(error.msg or error).splitlines()[0]
        if "not in" in message or "Key" in message or "index" in message:
            raise UserError(_unknown_key(key, "command line")) from error
        raise UserError(f"command line: key {key}: {message}") from error
    except (IndexError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"command line: key {key}: cannot be set to {value!r}: {error}") from error
    return result


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"key {key}: got {value!r}, expected one of {', '.join(choices)}")


def validate(config: Config) -> None:
    """Checks what types alone cannot: choices, ranges and the order of stages.

    Raises:
        UserError: naming the key, the value and what is allowed.
    """
    _check_choice("method", config.method, METHODS)
    _check_choice("preset", config.preset, PRESETS)
    _check_choice("budget", config.budget, BUDGETS)
    _check_choice("kernels", config.kernels, KERNELS)
    _check_choice("device", config.device, ("auto", "cpu", "cuda"))
    _check_choice("data.format", config.data.format, ("folder", "voc", "pascal_context", "synthetic"))
    _check_choice("model.head", config.model.head, ("cc4s", "aspp"))
    _check_choice("model.norm", config.model.norm, ("batch", "group", "frozen"))
    _check_choice("train.optimizer", config.train.optimizer, ("sgd", "adamw"))
    _check_choice("train.precision", config.train.precision, ("32-true", "bf16-mixed"))
    consistency = config.loss.consistency
    _check_choice("loss.consistency.normalize", consistency.normalize, ("row", "column"))
    _check_choice("loss.consistency.reduction", consistency.reduction, ("clean", "released"))
    _check_choice("loss.relaxation", config.loss.relaxation, RELAXATIONS)
    _check_choice("loss.color_norm", config.loss.color_norm, ("sum", "frobenius"))
    _check_choice("crf.method", config.crf.method, ("exact", "lattice"))
    for term in ("potts", "selflabel"):
        _check_choice(f"loss.{term}.relaxation", getattr(config.loss, term).relaxation, RELAXATIONS)
        if getattr(config.loss, term).connectivity not in (4, 8):
            raise UserError(f"key loss.{term}.connectivity: expected 4 or 8")
    for transform in consistency.transforms:
        _check_choice("loss.consistency.transforms", transform, ("flip", "crop", "bands"))
    for key, low, high in _RANGES:
        value = attrgetter(key)(config)
        for item in value if isinstance(value, list) else [value]:
            if not low <= item <= high:
                raise UserError(f"key {key}: got {item}, expected a value in [{low}, {high}]")
    if not config.inference.scales:
        raise UserError("key inference.scales: got an empty list, expected at least one scale")
    if not consistency.transforms:
        raise UserError("key loss.consistency.transforms: got an empty list, expected flip, crop or bands")
    if config.augment.scale_min > config.augment.scale_max:
        raise UserError(
            f"key augment.scale_min: got {config.augment.scale_min}, expected at most augment.scale_max ="
            f" {config.augment.scale_max}"
        )
    if len(config.data.mean) != len(config.data.std):
        raise UserError(
            f"key data.std: got {len(config.data.std)} values, expected as many as data.mean has:"
            f" {len(config.data.mean)}"
        )
    _validate_stages(config.stages, config.model.head)
    if any("consistency" in stage.losses for stage in config.stages):
        pitch = cell_pitch(config.model)
        if (config.augment.crop - 1) % pitch or config.augment.crop < 2 * pitch + 1:
            raise UserError(
                f"key augment.crop: got {config.augment.crop}, expected {pitch} m + 1 with m of at least 2:"
                " consistency needs the cells of the random walk on pixels"
            )


_SIGMAS = ("sigma_xy", "sigma_rgb")

_RANGES: list[tuple[str, float, float]] = [
    ("seed", 0, 2**31 - 1),
    ("data.num_classes", 0, 65535),
    ("data.channels", 1, 1024),
    ("data.long_side", 0, 65536),
    ("data.limit_train", 0, 2**31),
    ("data.limit_eval", 0, 2**31),
    ("data.std", 1e-6, 1e6),
    ("data.synthetic_train", 1, 100000),
    ("data.synthetic_eval", 1, 100000),
    ("data.synthetic_size", 32, 4096),
    ("augment.crop", 17, 8193),
    ("augment.scale_min", 0.05, 20),
    ("augment.scale_max", 0.05, 20),
    ("augment.rotation", 0, 180),
    ("augment.rotation_prob", 0, 1),
    ("augment.blur_prob", 0, 1),
    ("augment.flip_prob", 0, 1),
    ("model.width", 1, 1024),
    ("model.walk_level", 1, 4),
    ("model.head_channels", 1, 8192),
    ("model.key_channels", 0, 8192),
    ("model.shrink", 1, 64),
    ("model.dropout", 0, 0.99),
    ("loss.cross_entropy", 0, 1e6),
    ("loss.class_balance", 0, 1),
    ("loss.entropy", 0, 1e6),
    ("loss.color", 0, 1e6),
    ("loss.superpixels", 1, 100000),
    ("loss.compactness", 0, 100),
    ("loss.consistency.kl", 0, 1e6),
    ("loss.consistency.trace", 0, 1e6),
    ("loss.consistency.crop_shares", 0.1, 1),
    *((f"loss.{name}.weight", 0.0, 1e6) for name in PEER_TERMS),
    *((f"loss.{name}.sigma_color", 1e-3, 1e6) for name in ("potts", "selflabel")),
    *((f"loss.{name}.{key}", 1e-6, 1e6) for name in ("densecrf", "ncl", "kcl", "gatedcrf") for key in _SIGMAS),
    *((f"loss.{name}.scale", 0.01, 1) for name in ("densecrf", "ncl", "kcl")),
    ("loss.kcl.normalized_cut", 0, 1e6),
    ("loss.kcl.dense_crf", 0, 1e6),
    ("loss.gatedcrf.radius", 1, 15),
    ("loss.tel.sigma", 1e-6, 1e6),
    ("loss.rawks.beta", 0, 1e6),
    ("loss.rawks.alpha", 0, 1e6),
    ("loss.rawks.stride", 1, 64),
    ("loss.selflabel.potts", 0, 1e6),
    ("loss.selflabel.steps", 0, 10000),
    ("loss.selflabel.rate", 1e-6, 1e3),
    ("train.batch_size", 1, 65536),
    ("train.accumulate", 1, 65536),
    ("train.epochs", 1, 1000000),
    ("train.iterations", 0, 10**9),
    ("train.momentum", 0, 0.9999),
    ("train.weight_decay", 0, 10),
    ("train.lr_factor", 1e-9, 1e6),
    ("train.poly_power", 0, 10),
    ("train.clip_grad", 0, 1e9),
    ("train.ema", 0, 0.999999),
    ("train.checkpoint_every", 1, 10**9),
    ("train.log_every", 1, 10**9),
    ("train.workers", 0, 256),
    ("inference.scales", 0.05, 20),
    ("inference.long_side", 0, 65536),
    ("inference.window", 17, 65536),
    ("inference.stride", 0.05, 1),
    ("pseudo.threshold", 0, 1),
    ("crf.cpu_size", 0, 65536),
    ("report.images", 0, 1000),
    ("report.eigenvectors", 0, 64),
]


def _validate_stages(stages: list[StageConfig], head: str) -> None:
    if not stages:
        raise UserError("key stages: got an empty list, expected at least one stage")
    seen: list[str] = []
    for index, stage in enumerate(stages):
        key = f"stages.{index}"
        if not stage.name.isidentifier() or stage.name in (*seen, "backbone", "pseudo", "final"):
            raise UserError(f"key {key}.name: got {stage.name!r}, expected a new identifier")
        _check_choice(f"{key}.init", stage.init, ("backbone", *seen))
        _check_choice(f"{key}.labels", stage.labels, ("scribbles", "pseudo", "masks"))
        if stage.labels == "pseudo" and not seen:
            raise UserError(
                f"key {key}.labels: got 'pseudo' in the first stage, expected an earlier stage to make them"
            )
        for loss in stage.losses:
            _check_choice(f"{key}.losses", loss, ("entropy", "consistency", "color", *PEER_TERMS))
        if "consistency" in stage.losses and (not stage.random_walk or head != "cc4s"):
            raise UserError(
                f"key {key}.losses: consistency needs the random walk (random_walk: true, model.head: cc4s)"
            )
        if not (stage.lr > 0 and stage.share > 0):
            raise UserError(f"key {key}: got lr {stage.lr} and share {stage.share}, expected both positive")
        seen.append(stage.name)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers, for checkpoints and JSON."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as YAML, keys in the schema's order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_dict(values: dict[str, Any], source: str) -> Config:
    """The configuration stored in a checkpoint or a run folder.

    Raises:
        UserError: keys or types that the schema does not know; `source` names the file.
    """
    resolved: Config = OmegaConf.to_object(_merge(OmegaConf.structured(Config), values, source))  # type: ignore[assignment]
    return resolved


def override(config: Config, words: list[str]) -> Config:
    """A copy of `config` with key=value words applied.

    Raises:
        UserError: unknown key, wrong type or range.
    """
    node = OmegaConf.structured(config)
    for key, value in _parse_overrides(words):
        node = _override(node, key, value)
    resolved: Config = OmegaConf.to_object(node)  # type: ignore[assignment]
    validate(resolved)
    return resolved
