"""Tensors in, tensors out: the mathematics of trajectory matching, on torch alone."""

from ftd_lightning.functional.augment import dsa
from ftd_lightning.functional.gsam import gsam_direction, gsam_perturbation
from ftd_lightning.functional.matching import normalized_distance, trajectory_matching_loss
from ftd_lightning.functional.seeding import derive_seed, make_generator, seeded
from ftd_lightning.functional.unroll import chunked_permutations, flatten_parameters, load_flat, unroll

__all__ = [
    "chunked_permutations",
    "derive_seed",
    "dsa",
    "flatten_parameters",
    "gsam_direction",
    "gsam_perturbation",
    "load_flat",
    "make_generator",
    "normalized_distance",
    "seeded",
    "trajectory_matching_loss",
    "unroll",
]
