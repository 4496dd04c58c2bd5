"""Initial images that the teachers understand (DATM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ftd_lightning.errors import InputError
from ftd_lightning.functional.rules import MatchingRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ftd_lightning.functional.rules import Teachers

CHUNK = 256  # images that a teacher is asked about at a time


@dataclass(frozen=True)
class CorrectImages(MatchingRule):
    """Start from real images that a teacher classifies correctly (DATM, Guo et al., ICLR 2024, Sec. 3.4).

    Of each class the first images, in random order, that teacher 0 classifies correctly after its last recorded epoch;
    where they are too few, those of teacher 1 that are not chosen yet, and so on.

    Raises:
        InputError: (a ValueError) where all teachers together are right about too few images of a class.
    """

    name: ClassVar[str] = "correct"

    def initial_images(self, candidates: Sequence[Tensor], ipc: int, teachers: Teachers) -> list[Tensor]:
        """Return of each class (ipc,) indices into its candidates."""
        return [self._of_class(label, images, ipc, teachers) for label, images in enumerate(candidates)]

    @torch.no_grad()
    def _of_class(self, label: int, images: Tensor, ipc: int, teachers: Teachers) -> Tensor:
        chosen: dict[int, None] = {}  # in order
        for teacher in range(len(teachers)):
            for first in range(0, len(images), CHUNK):
                right = teachers.logits(teacher, images[first : first + CHUNK]).argmax(1) == label
                chosen |= dict.fromkeys((right.nonzero()[:, 0] + first).tolist())
                if len(chosen) >= ipc:
                    return torch.tensor(list(chosen)[:ipc])
        raise InputError(
            f"CorrectImages: the teachers classify {len(chosen)} images of class {label} correctly, ipc={ipc} are "
            "needed; train them longer, or start from random images"
        )
