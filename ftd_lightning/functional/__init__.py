"""Tensors in, tensors out: the mathematics of trajectory matching, on torch alone."""

from ftd_lightning.functional.augment import dsa
from ftd_lightning.functional.gsam import gsam_direction, gsam_perturbation
from ftd_lightning.functional.matching import normalized_distance, trajectory_matching_loss
from ftd_lightning.functional.robust import start_noise
from ftd_lightning.functional.seeding import derive_seed, make_generator, seeded
from ftd_lightning.functional.trajectory_error import (
    accumulated_error,
    initialization_error,
    matching_error,
    trajectory_errors,
)
from ftd_lightning.functional.unroll import chunked_permutations, flatten_parameters, load_flat, unroll

__all__ = [
    "accumulated_error",
    "chunked_permutations",
    "derive_seed",
    "dsa",
    "flatten_parameters",
    "gsam_direction",
    "gsam_perturbation",
    "initialization_error",
    "load_flat",
    "make_generator",
    "matching_error",
    "normalized_distance",
    "seeded",
    "start_noise",
    "trajectory_errors",
    "trajectory_matching_loss",
    "unroll",
]
