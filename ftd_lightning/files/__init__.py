"""Files that describe themselves: synthetic sets, trajectory stores, transforms."""

from ftd_lightning.files.synthetic_set import SyntheticSet
from ftd_lightning.files.trajectory_store import Segment, TrajectoryStore, check_compatible, write_teacher
from ftd_lightning.files.transforms import Standardization, Whitening

__all__ = [
    "Segment",
    "Standardization",
    "SyntheticSet",
    "TrajectoryStore",
    "Whitening",
    "check_compatible",
    "write_teacher",
]
