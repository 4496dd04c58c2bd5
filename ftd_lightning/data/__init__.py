"""Real images, teacher trajectories and synthetic sets: what flows between the three phases."""

from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.datamodule import DistillationDataModule
from ftd_lightning.data.datasets import DATASETS, get_dataset
from ftd_lightning.data.images import ImageDataset, Pictures, Request
from ftd_lightning.data.segments import SegmentBatch, SegmentLoader
from ftd_lightning.data.synthetic_set import SyntheticSet
from ftd_lightning.data.trajectory_store import Segment, TrajectoryStore, check_compatible, write_teacher
from ftd_lightning.data.transform import ImageTransform, Standardization, Whitening

__all__ = [
    "DATASETS",
    "DistillationDataModule",
    "ImageDataset",
    "ImageTransform",
    "Pictures",
    "Request",
    "Segment",
    "SegmentBatch",
    "SegmentLoader",
    "Standardization",
    "SyntheticSet",
    "TrajectoryStore",
    "Whitening",
    "check_compatible",
    "get_dataset",
    "random_real_images",
    "write_teacher",
]
