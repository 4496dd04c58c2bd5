"""DSA, the differentiable siamese augmentation (Zhao and Bilen, ICML 2021), on whole batches.

All draws come from the generator, in a fixed order, whatever the device of the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ftd_lightning.errors import InputError
from ftd_lightning.functional.dsa_operations import OPERATIONS, SAMPLED

Mode = Literal["single", "multiple"]

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def parse_strategy(strategy: str) -> list[str]:
    """Split a strategy such as "color_crop_flip" into its operations.

    Raises:
        InputError: (a ValueError) for an unknown operation.

    Example:
        >>> parse_strategy("flip_scale")
        ['flip', 'scale']
    """
    names = [name for name in strategy.split("_") if name]
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise InputError(f"DSA has no operation {unknown[0]!r}: choose from {list(OPERATIONS)}")
    return names


def _require_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"DSA mode {mode!r} is unknown: choose from {list(get_args(Mode))}")


def dsa(
    images: Tensor,
    generator: torch.Generator,
    *,
    strategy: str = STRATEGY,
    mode: Mode = "single",
    siamese: bool = False,
    align_corners: bool = True,
) -> Tensor:
    """Augment a batch differentiably: a pure function of the images and the generator's state.

    Args:
        images: (N, C, H, W), standardised or whitened, any floating dtype and device.
        generator: advanced by the draws; with a CPU generator nothing waits for a device.
        strategy: operations joined by "_"; "" returns the images unchanged.
        mode: "single" draws one operation for the whole batch; "multiple" applies all, in the strategy's order.
        siamese: use the same parameters for all images. Real and synthetic images of a matching step (DSA, DM, CAFE)
            are then augmented alike by generators in the same state, however many of each there are.
        align_corners: whether scale and rotate place the corners of the coordinate system at the centres of the
            outermost pixels (MTT, FTD) or at their outer edges (False: DC, DSA, DM, CAFE).

    Returns:
        (N, C, H, W), same dtype and device.

    Raises:
        InputError: (a ValueError) for an unknown operation or mode.

    Example:
        >>> x = torch.randn(4, 3, 8, 8)
        >>> a, b = (dsa(x, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> bool(a.equal(b))
        True
        >>> a, b = (dsa(x[:n], torch.Generator().manual_seed(0), siamese=True) for n in (1, 4))
        >>> bool(a[0].allclose(b[0]))
        True
    """
    _require_mode(mode)
    names = parse_strategy(strategy)
    if mode == "single" and names:
        names = [names[int(torch.randint(len(names), (1,), generator=generator, device=generator.device))]]
    # Below float32 the sampling grid and the draws are too coarse: bfloat16's 8 bits are half a pixel at 128 px.
    result = images.to(torch.promote_types(images.dtype, torch.float32))
    for name in names:
        # Only options that differ from the defaults, so that an operation added to OPERATIONS need not take them.
        options = {"siamese": True} if siamese else {}
        if not align_corners and name in SAMPLED:
            options["align_corners"] = False
        result = OPERATIONS[name](result, generator, **options)
    return result.to(images.dtype)


@dataclass(frozen=True)
class Augmentation:
    """DSA with its settings chosen: a callable ``(images, generator) -> images``, see :func:`dsa`.

    Args:
        strategy: operations joined by "_"; "" is no augmentation, and the only one that is false.
        mode: "single" draws one operation per batch; "multiple" applies all.
        align_corners: convention of scale and rotate; see :func:`dsa`.

    Raises:
        InputError: (a ValueError) for an unknown operation or mode.

    Example:
        >>> flip = Augmentation("flip", mode="multiple")
        >>> flip(torch.zeros(2, 3, 8, 8), torch.Generator()).shape
        torch.Size([2, 3, 8, 8])
        >>> bool(flip), bool(Augmentation(""))
        (True, False)
    """

    strategy: str = STRATEGY
    mode: Mode = "single"
    align_corners: bool = True

    def __post_init__(self) -> None:
        parse_strategy(self.strategy)
        _require_mode(self.mode)

    def __call__(self, images: Tensor, generator: torch.Generator, *, siamese: bool = False) -> Tensor:
        """Augment a batch, (N, C, H, W); see :func:`dsa`."""
        return dsa(images, generator, siamese=siamese, **asdict(self))

    def __bool__(self) -> bool:
        return bool(parse_strategy(self.strategy))

    @classmethod
    def of(cls, value: Augmentation | Mapping[str, Any] | str, *, align_corners: bool = True) -> Augmentation:
        """Build an augmentation from what configurations and files contain.

        Args:
            value: an augmentation, which is returned as it is; its fields as a mapping; or a strategy.
            align_corners: the default for a mapping or strategy that does not specify it.

        Raises:
            InputError: (a ValueError) for an unknown field, operation or mode, or a value of another type.

        Example:
            >>> Augmentation.of({"strategy": "crop_flip", "mode": "multiple"}, align_corners=False)
            Augmentation(strategy='crop_flip', mode='multiple', align_corners=False)
        """
        if isinstance(value, Augmentation):
            return value
        settings = {"strategy": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping):
            raise InputError(
                f'augment={value!r} must be a strategy ("" for none) or a mapping such as {{"strategy": ""}}'
            )
        names = [field.name for field in fields(cls)]
        unknown = [key for key in settings if key not in names]
        if unknown:
            raise InputError(f"augment has no field {unknown[0]!r}: choose from {names}")
        return cls(**{"align_corners": align_corners, **settings})

    def plain(self) -> dict[str, Any]:
        """Return all fields as plain values, from which :meth:`of` builds the same augmentation.

        Example:
            >>> Augmentation("flip").plain()
            {'strategy': 'flip', 'mode': 'single', 'align_corners': True}
        """
        return asdict(self)

    def describe(self) -> dict[str, Any]:
        """Return what stores and sets record: ``align_corners`` only where it is False.

        Descriptions in files of version 0.1.0 lack the field, and must compare equal.

        Example:
            >>> Augmentation("flip").describe()
            {'strategy': 'flip', 'mode': 'single'}
        """
        settings = self.plain()
        if self.align_corners:
            del settings["align_corners"]
        return settings

    def deterministic_on(self, device: torch.device) -> bool:
        """Return whether the gradient in the images is deterministic on a device.

        The backward pass of ``grid_sample``, with which scale and rotate sample, is not on CUDA, where
        ``torch.use_deterministic_algorithms(True)`` makes it an error.

        Example:
            >>> cuda = torch.device("cuda")
            >>> Augmentation().deterministic_on(cuda), Augmentation("crop_flip").deterministic_on(cuda)
            (False, True)
        """
        return device.type != "cuda" or not any(name in SAMPLED for name in parse_strategy(self.strategy))
