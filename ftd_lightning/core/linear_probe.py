"""A linear layer on a frozen backbone: networks that somebody else has trained."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ftd_lightning.bounds import check_bounds
from ftd_lightning.data.coresets import teacher_network
from ftd_lightning.errors import InputError
from ftd_lightning.files.trajectory_store import TrajectoryStore
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.models.registry import NETWORKS, find_network
from ftd_lightning.sizes import ImageSize, sides

if TYPE_CHECKING:
    from collections.abc import Mapping


def frozen(backbone: nn.Module, head: str | None) -> nn.Module:
    """Return a frozen copy of a network in evaluation mode, without its classifier; itself, if it is such a one."""
    in_use = any(part.training for part in backbone.modules()) or any(w.requires_grad for w in backbone.parameters())
    if head is None and not in_use:
        return backbone
    backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
    if head:
        try:
            backbone.set_submodule(head, nn.Identity(), strict=True)
        except (AttributeError, ValueError) as error:
            raise InputError(f"head: {type(backbone).__name__} has no submodule {head!r}") from error
    return backbone


@lru_cache(maxsize=2)
def _built(name: str, options: str, head: str | None) -> nn.Module:
    """Build a backbone by its name, once for all probes; ``options`` are JSON."""
    if (folder := Path(name).expanduser()).is_dir():
        teacher = teacher_network(TrajectoryStore(folder), **({"teacher": 0} | json.loads(options)))
        if batch_norms(teacher):
            raise InputError(f"backbone {name!r}: a store does not hold the running statistics of its BatchNorm layers")
        return frozen(teacher, [name for name, part in teacher.named_modules() if isinstance(part, nn.Linear)][-1])
    if name in NETWORKS:
        raise InputError(f"backbone: {name!r} has no trained weights: name the folder of a trajectory store")
    try:
        backbone = find_network(name)(**json.loads(options))
    except TypeError as error:
        raise InputError(f"backbone {name!r}: {error}") from error
    if not isinstance(backbone, nn.Module):
        raise InputError(f"backbone {name!r} returned {type(backbone).__name__}, not an nn.Module")
    return frozen(backbone, head)


class LinearProbe(nn.Module):
    """A backbone, frozen in evaluation mode, and a fresh linear layer on its features, which are of length 1.

    Parameters and state are those of the linear layer alone.

    Evaluate a set by it: ``SyntheticEvaluation("ftd_lightning.core.LinearProbe", {"backbone": ...})``.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: in pixels, or (height, width).
        backbone: an ``nn.Module`` that maps images (N, C, H, W) to features (N, D), of which a frozen copy is used; the
            import path of a function or class that returns one; or the folder of a trajectory store, whose teacher is
            taken after its last epoch.
        options: arguments of that function, e.g. ``{"model_name": "vit_small_patch14_dinov2", "pretrained": True,
            "num_classes": 0}`` of ``timm.create_model``; of a store ``teacher`` and ``epoch``.
        head: name of the submodule that makes logits of the features and is left out, such as "fc" of torchvision's
            ResNets; None: the output is features. Of a store, it is the last linear layer.

    Raises:
        InputError: for a backbone that is not found, cannot be built, or returns no features.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: ImageSize,
        backbone: nn.Module | str,
        options: Mapping[str, Any] | None = None,
        head: str | None = None,
    ) -> None:
        check_bounds(LinearProbe, locals())
        super().__init__()
        if isinstance(backbone, str):
            backbone, head = _built(backbone, json.dumps(options or {}, sort_keys=True), head), None
        self._backbone = (frozen(backbone, head),)  # no submodule: never trained, and not in checkpoints
        weight = next(self.backbone.parameters(), torch.zeros(()))
        with torch.no_grad():
            features = self.backbone(torch.zeros(1, in_channels, *sides(image_size)).to(weight))
        if not isinstance(features, Tensor) or len(features) != 1:
            raise InputError(f"backbone: returned {type(features).__name__}, a tensor of features (N, D) is needed")
        self.head = nn.Linear(features.numel(), num_classes)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, the same object in all probes that were built with it."""
        return self._backbone[0]

    def features(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the backbone's features, each divided by its length: (N, D)."""
        return normalize(self.backbone(images).flatten(1), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        return self.head(self.features(images))  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> LinearProbe:
        """Move and cast the backbone, too."""
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)
