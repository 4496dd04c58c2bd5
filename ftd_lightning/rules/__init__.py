"""Rules that change a matching: where it starts, what it compares, which labels it learns."""

from ftd_lightning.rules.base import LabelRule, MatchingRule, Teachers
from ftd_lightning.rules.labels import LearnedLabels, TargetLabels
from ftd_lightning.rules.masks import DropLargest, DropShallow, DropSmallest, KeepSimilar
from ftd_lightning.rules.start import ClosestStep, CorrectImages, LossGate, RobustStart, StartWindow, start_noise

__all__ = [
    "ClosestStep",
    "CorrectImages",
    "DropLargest",
    "DropShallow",
    "DropSmallest",
    "KeepSimilar",
    "LabelRule",
    "LearnedLabels",
    "LossGate",
    "MatchingRule",
    "RobustStart",
    "StartWindow",
    "TargetLabels",
    "Teachers",
    "start_noise",
]
