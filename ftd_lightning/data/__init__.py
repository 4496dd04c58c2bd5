"""Real images and the loaders of all phases."""

from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.datamodule import DistillationDataModule
from ftd_lightning.data.datasets import DATASETS, get_dataset
from ftd_lightning.data.loaders import SegmentBatch, SegmentLoader
from ftd_lightning.data.sources import ImageDataset, Pictures, Request

__all__ = [
    "DATASETS",
    "DistillationDataModule",
    "ImageDataset",
    "Pictures",
    "Request",
    "SegmentBatch",
    "SegmentLoader",
    "get_dataset",
    "random_real_images",
]
