"""Tensors in, tensors out: the mathematics of trajectory matching, on torch alone."""

from ftd_lightning.functional.augment import Augmentation, dsa
from ftd_lightning.functional.batch_norm import batch_norms
from ftd_lightning.functional.closest_step import ClosestStep
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.correct_images import CorrectImages
from ftd_lightning.functional.distribution_matching import distribution_distance, embed, feature_levels
from ftd_lightning.functional.drop_shallow import DropShallow
from ftd_lightning.functional.drop_smallest import DropSmallest
from ftd_lightning.functional.feature_alignment import (
    Watcher,
    alignment_loss,
    class_means,
    discrimination_loss,
    level_weights,
)
from ftd_lightning.functional.gradient_matching import gradient_distance, loss_gradients
from ftd_lightning.functional.gsam import gsam_direction, gsam_perturbation
from ftd_lightning.functional.inner_optimizers import InnerAdam, InnerOptimizer, InnerSGD
from ftd_lightning.functional.inner_step import compile_seconds, draws_random_numbers
from ftd_lightning.functional.kernels import nngp_kernel, ntk_kernel
from ftd_lightning.functional.learned_labels import LearnedLabels
from ftd_lightning.functional.loss_gate import LossGate
from ftd_lightning.functional.matching import normalized_distance, trajectory_matching_loss
from ftd_lightning.functional.mini_batches import chunked_permutations
from ftd_lightning.functional.pruning import DropLargest, KeepSimilar, pruned_distance
from ftd_lightning.functional.ridge import (
    centred_targets,
    half_squared_error,
    ridge_predictions,
    target_probabilities,
)
from ftd_lightning.functional.robust import RobustStart, start_noise
from ftd_lightning.functional.rules import LabelRule, MatchingRule, Teachers
from ftd_lightning.functional.seeding import derive_seed, make_generator, seeded
from ftd_lightning.functional.selection import herding, k_center
from ftd_lightning.functional.start_window import StartWindow
from ftd_lightning.functional.target_labels import TargetLabels
from ftd_lightning.functional.trajectory_error import (
    accumulated_error,
    initialization_error,
    matching_error,
    trajectory_errors,
)
from ftd_lightning.functional.unroll import flatten_parameters, load_flat, roll_out, unroll

__all__ = [
    "Augmentation",
    "ClosestStep",
    "CorrectImages",
    "DropLargest",
    "DropShallow",
    "DropSmallest",
    "InnerAdam",
    "InnerOptimizer",
    "InnerSGD",
    "KeepSimilar",
    "LabelRule",
    "LearnedLabels",
    "LossGate",
    "MatchingRule",
    "RobustStart",
    "StartWindow",
    "TargetLabels",
    "Teachers",
    "Watcher",
    "accumulated_error",
    "alignment_loss",
    "batch_norms",
    "centred_targets",
    "chunked_permutations",
    "class_means",
    "compile_seconds",
    "compiled",
    "derive_seed",
    "discrimination_loss",
    "distribution_distance",
    "draws_random_numbers",
    "dsa",
    "embed",
    "feature_levels",
    "flatten_parameters",
    "gradient_distance",
    "gsam_direction",
    "gsam_perturbation",
    "half_squared_error",
    "herding",
    "initialization_error",
    "k_center",
    "level_weights",
    "load_flat",
    "loss_gradients",
    "make_generator",
    "matching_error",
    "nngp_kernel",
    "normalized_distance",
    "ntk_kernel",
    "pruned_distance",
    "ridge_predictions",
    "roll_out",
    "seeded",
    "start_noise",
    "target_probabilities",
    "trajectory_errors",
    "trajectory_matching_loss",
    "unroll",
]
