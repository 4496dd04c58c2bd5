"""Dataset distillation by trajectory matching, as PyTorch Lightning modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.7.1"

if TYPE_CHECKING:
    from ftd_lightning.data import DistillationDataModule
    from ftd_lightning.files import Standardization, SyntheticSet, TrajectoryStore, Whitening
    from ftd_lightning.modules import FlatTeacher, SyntheticEvaluation, TrajectoryMatching
    from ftd_lightning.studies.distill import distill

# Imported when first asked for: `ftd_lightning.functional` alone needs torch and nothing else.
_HOMES = {
    "DistillationDataModule": "ftd_lightning.data",
    "FlatTeacher": "ftd_lightning.modules",
    "Standardization": "ftd_lightning.files",
    "SyntheticEvaluation": "ftd_lightning.modules",
    "SyntheticSet": "ftd_lightning.files",
    "TrajectoryMatching": "ftd_lightning.modules",
    "TrajectoryStore": "ftd_lightning.files",
    "Whitening": "ftd_lightning.files",
    "distill": "ftd_lightning.studies.distill",
}

__all__ = [
    "DistillationDataModule",
    "FlatTeacher",
    "Standardization",
    "SyntheticEvaluation",
    "SyntheticSet",
    "TrajectoryMatching",
    "TrajectoryStore",
    "Whitening",
    "__version__",
    "distill",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
