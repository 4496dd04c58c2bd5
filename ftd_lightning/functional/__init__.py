"""Tensors in, tensors out: the mathematics of trajectory matching, on torch alone."""

from ftd_lightning.functional.augment import dsa
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.distribution_matching import distribution_distance, embed, feature_levels
from ftd_lightning.functional.feature_alignment import (
    Watcher,
    alignment_loss,
    class_means,
    discrimination_loss,
    level_weights,
)
from ftd_lightning.functional.gradient_matching import gradient_distance, loss_gradients
from ftd_lightning.functional.gsam import gsam_direction, gsam_perturbation
from ftd_lightning.functional.inner_step import compile_seconds
from ftd_lightning.functional.matching import normalized_distance, trajectory_matching_loss
from ftd_lightning.functional.pruning import keep_mask, pruned_distance
from ftd_lightning.functional.robust import start_noise
from ftd_lightning.functional.seeding import derive_seed, make_generator, seeded
from ftd_lightning.functional.selection import herding, k_center
from ftd_lightning.functional.trajectory_error import (
    accumulated_error,
    initialization_error,
    matching_error,
    trajectory_errors,
)
from ftd_lightning.functional.unroll import chunked_permutations, flatten_parameters, load_flat, unroll

__all__ = [
    "Watcher",
    "accumulated_error",
    "alignment_loss",
    "chunked_permutations",
    "class_means",
    "compile_seconds",
    "compiled",
    "derive_seed",
    "discrimination_loss",
    "distribution_distance",
    "dsa",
    "embed",
    "feature_levels",
    "flatten_parameters",
    "gradient_distance",
    "gsam_direction",
    "gsam_perturbation",
    "herding",
    "initialization_error",
    "k_center",
    "keep_mask",
    "level_weights",
    "load_flat",
    "loss_gradients",
    "make_generator",
    "matching_error",
    "normalized_distance",
    "pruned_distance",
    "seeded",
    "start_noise",
    "trajectory_errors",
    "trajectory_matching_loss",
    "unroll",
]
