"""A linear layer on a frozen backbone: networks that somebody else has trained."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ftd_lightning.bounds import check_bounds
from ftd_lightning.data.coresets import teacher_network
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint
from ftd_lightning.files.trajectory_store import TrajectoryStore
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.models.registry import NETWORKS, find_network
from ftd_lightning.sizes import ImageSize, sides

if TYPE_CHECKING:
    from collections.abc import Mapping


def frozen(backbone: nn.Module, head: str | None) -> nn.Module:
    """Return a frozen copy of a network in evaluation mode, without its head; or itself, if it is frozen already."""
    in_use = any(part.training for part in backbone.modules()) or any(w.requires_grad for w in backbone.parameters())
    if head is None and not in_use:
        return backbone
    backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
    if head:
        try:
            backbone.get_submodule(head)
        except AttributeError as error:
            raise InputError(f"head: {type(backbone).__name__} has no submodule {head!r}") from error
        backbone.set_submodule(head, nn.Identity().eval())
    return backbone


def build_backbone(name: str, options: Mapping[str, Any] | None, head: str | None) -> nn.Module:
    """Build a frozen backbone by its name, as ``LinearProbe`` describes it; equal arguments give the same object."""
    folder = Path(name).expanduser().resolve()
    changed = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("teacher_*.safetensors")))
    try:
        return _built(str(folder) if changed else name, json.dumps(options or {}, sort_keys=True), head, changed)
    except InputError:
        raise
    except Exception as error:  # of a function from elsewhere
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"backbone {name!r} with the options {options}: {said:.300}") from error


@lru_cache(maxsize=2)
def _built(name: str, options: str, head: str | None, store: tuple[tuple[str, int], ...]) -> nn.Module:
    if store:
        teacher = teacher_network(TrajectoryStore(name), **({"teacher": 0} | json.loads(options)))
        if batch_norms(teacher):
            raise InputError(f"backbone {name!r}: a store does not hold the running statistics of its BatchNorm layers")
        return frozen(teacher, [name for name, part in teacher.named_modules() if isinstance(part, nn.Linear)][-1])
    if name in NETWORKS:
        raise InputError(f"backbone: {name!r} has no trained weights: name the folder of a trajectory store")
    backbone = find_network(name)(**json.loads(options))
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
        backbone: an ``nn.Module`` that maps images (N, C, H, W) to features (N, D), of which a frozen copy is used (one
            that is frozen and in evaluation mode already is used itself, and moved with the probe); the import path of
            a function or class that returns one; or the folder of a trajectory store, whose teacher is taken after its
            last epoch.
        options: arguments of that function, e.g. ``{"model_name": "vit_small_patch14_dinov2", "pretrained": True,
            "num_classes": 0}`` of ``timm.create_model``; of a store ``teacher`` and ``epoch``.
        head: name of the submodule that makes logits of the features and is left out, such as "fc" of torchvision's
            ResNets; None: the output is features. Of a store, it is the last linear layer.

    Raises:
        InputError: for a backbone that is not found, cannot be built, refuses the images, or returns no features.
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
        found = build_backbone(backbone, options, head) if isinstance(backbone, str) else frozen(backbone, head)
        self._backbone = (found,)  # no submodule: never trained, and not in checkpoints
        images, kind = torch.zeros(1, in_channels, *sides(image_size)), type(found).__name__
        try:
            with torch.no_grad():
                features = found(images.to(self._weight(images)))
        except Exception as error:  # of a network from elsewhere
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"backbone {kind}: refuses images {tuple(images.shape)}: {said:.300}") from error
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != 1:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"backbone {kind}: returned {shape} of one image, features (1, D) are needed")
        self.head = nn.Linear(features.numel(), num_classes)

    def _weight(self, otherwise: Tensor) -> Tensor:
        return next((value for value in self.backbone.parameters() if value.is_floating_point()), otherwise)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, the same object in all probes that were built with it."""
        return self._backbone[0]

    def backbone_fingerprint(self) -> str:
        """Hash the weights of the backbone, and how it is printed: its layers."""
        state = self.backbone.state_dict().values()
        weights = fingerprint(*(value.float() for value in state if isinstance(value, Tensor)))
        layers = re.sub(r" at 0x[0-9a-f]+", "", repr(self.backbone))  # addresses of functions
        return hashlib.blake2b(f"{weights}{layers}".encode(), digest_size=16).hexdigest()

    def features(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the backbone's features, each divided by its length: (N, D)."""
        features = self.backbone(images.to(self._weight(images).dtype))
        return normalize(features.flatten(1).to(self.head.weight.dtype), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        return self.head(self.features(images))  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> LinearProbe:
        """Move and cast the backbone, too."""
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)
