"""Datasets: layouts on disk, checks, scribbles, augmentation and loading."""

from cc4s.data.check import check_dataset
from cc4s.data.dataset import Dataset, Entry, channel_statistics, open_dataset
from cc4s.data.images import (
    ignore_index,
    read_image,
    read_index_png,
    to_rgb,
    to_unit_float,
    voc_palette,
    write_index_png,
)
from cc4s.data.loading import EvaluationSet, StepSampler, TrainingSet, label_counts, normalize, worker_init
from cc4s.data.scribbles import (
    drop_folder,
    drop_scribbles,
    generate_scribble_folder,
    generate_scribbles,
    shrink_folder,
    shrink_scribbles,
)
from cc4s.data.strokes import read_scribble

__all__ = [
    "Dataset",
    "Entry",
    "EvaluationSet",
    "StepSampler",
    "TrainingSet",
    "channel_statistics",
    "check_dataset",
    "drop_folder",
    "drop_scribbles",
    "generate_scribble_folder",
    "generate_scribbles",
    "ignore_index",
    "label_counts",
    "normalize",
    "open_dataset",
    "read_image",
    "read_index_png",
    "read_scribble",
    "shrink_folder",
    "shrink_scribbles",
    "to_rgb",
    "to_unit_float",
    "voc_palette",
    "worker_init",
    "write_index_png",
]
