"""Decoders: parameters that distillation learns in place of pixels, and that take less storage."""

from ftd_lightning.decoders.base import Decoder
from ftd_lightning.decoders.bases import Bases, Frequencies, cosine_basis
from ftd_lightning.decoders.gaussians import Gaussians
from ftd_lightning.decoders.generator import Generator
from ftd_lightning.decoders.images import Flip, MultiFormation, Pyramid

__all__ = [
    "Bases",
    "Decoder",
    "Flip",
    "Frequencies",
    "Gaussians",
    "Generator",
    "MultiFormation",
    "Pyramid",
    "cosine_basis",
]
