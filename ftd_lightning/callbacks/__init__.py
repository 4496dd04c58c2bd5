"""What watches and records a fit: trajectories, moving averages, files, evaluation, pictures, progress."""

from ftd_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from ftd_lightning.callbacks.evaluation import EvaluateSynthetic
from ftd_lightning.callbacks.progress import FitProgress, PeakMemory
from ftd_lightning.callbacks.set_writer import SyntheticSetWriter
from ftd_lightning.callbacks.synthetic_ema import SyntheticEMA
from ftd_lightning.callbacks.tensorboard import HyperparameterReport, TensorBoardPictures
from ftd_lightning.callbacks.trajectory_recorder import TrajectoryRecorder

__all__ = [
    "AtomicCheckpointIO",
    "EvaluateSynthetic",
    "FitProgress",
    "HyperparameterReport",
    "PeakMemory",
    "SyntheticEMA",
    "SyntheticSetWriter",
    "TensorBoardPictures",
    "TrajectoryRecorder",
]
