"""Tensors in, tensors out: the mathematics of trajectory matching, on torch alone."""

from ftd_lightning.functional.augment import Augmentation, dsa
from ftd_lightning.functional.compiling import compiled
from ftd_lightning.functional.distribution_matching import (
    alignment_loss,
    class_means,
    discrimination_loss,
    distribution_distance,
    embed,
    feature_levels,
    level_weights,
)
from ftd_lightning.functional.gradient_matching import batch_norms, gradient_distance, loss_gradients
from ftd_lightning.functional.gsam import gsam_direction, gsam_perturbation
from ftd_lightning.functional.inner_optimizers import InnerAdam, InnerOptimizer, InnerSGD
from ftd_lightning.functional.inner_step import draws_random_numbers
from ftd_lightning.functional.kernels import (
    centred_targets,
    half_squared_error,
    nngp_kernel,
    ntk_kernel,
    ridge_predictions,
    target_probabilities,
)
from ftd_lightning.functional.linear_probes import centred_class_means, class_mean_loss, ridge_cross_entropy
from ftd_lightning.functional.matching import (
    chunked_permutations,
    normalized_distance,
    pruned_distance,
    trajectory_matching_loss,
)
from ftd_lightning.functional.seeding import derive_seed, make_generator, seeded
from ftd_lightning.functional.selection import herding, k_center
from ftd_lightning.functional.trajectory_error import trajectory_errors
from ftd_lightning.functional.unroll import flatten_parameters, load_flat, roll_out, unroll

__all__ = [
    "Augmentation",
    "InnerAdam",
    "InnerOptimizer",
    "InnerSGD",
    "alignment_loss",
    "batch_norms",
    "centred_class_means",
    "centred_targets",
    "chunked_permutations",
    "class_mean_loss",
    "class_means",
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
    "k_center",
    "level_weights",
    "load_flat",
    "loss_gradients",
    "make_generator",
    "nngp_kernel",
    "normalized_distance",
    "ntk_kernel",
    "pruned_distance",
    "ridge_cross_entropy",
    "ridge_predictions",
    "roll_out",
    "seeded",
    "target_probabilities",
    "trajectory_errors",
    "trajectory_matching_loss",
    "unroll",
]
