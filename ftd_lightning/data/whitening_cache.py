"""Whitenings that were fitted by earlier runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ftd_lightning.data.cache_folder import cache_folder, check_memory
from ftd_lightning.data.files import fingerprint
from ftd_lightning.data.images import unit_range
from ftd_lightning.data.transform import Whitening
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

COPIES = 17  # of the matrix, float32, that fitting takes at its peak, as measured


def cached_whitening(pictures: Tensor, name: str, *, eps: float, cache_dir: str | Path | None) -> Whitening:
    """Read the whitening of some pictures from the cache, or fit it and write it there, atomically.

    It is fitted again where the file is damaged, or something else.

    Args:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].
        name: of the data set, for the file's name, which says all that a whitening depends on.
        eps: added to the eigenvalues.
        cache_dir: the file lies in its folder ``whitening``; None: the user's cache folder.

    Raises:
        InputError: where it would take more memory than the machine has, or cannot be written.
    """
    data = fingerprint(pictures)
    file = f"zca_{name.replace(' ', '-')}_{data}_{eps}_kornia{version('kornia')}.safetensors"
    path = cache_folder(cache_dir) / "whitening" / file
    values = pictures[0].numel()
    if path.is_file():
        try:
            whitening = Whitening.load(path)
            if (whitening.mean.numel(), whitening.eps, whitening.fitted_on) == (values, eps, data):
                return whitening
            reason = f"{path}: is of other pictures"
        except InputError as error:
            reason = str(error).removesuffix("; make it again")
        rank_zero_warn(f"{reason}; the whitening is fitted again")
    what = f"whitening {values:,} values per image, by a matrix of {values:,} x {values:,} ({values**2 * 4:,} bytes),"
    check_memory(COPIES * values**2 * 4, what, "leave out zca, or set data.image_size lower")
    rank_zero_info(f"fitting the whitening, {values} x {values}, on {len(pictures)} images")
    whitening = Whitening.fit(unit_range(pictures), eps=eps, fitted_on=data)
    try:
        whitening.save(path)
    except OSError as error:
        raise InputError(
            f"{path}: the whitening cannot be written there ({error.strerror or error}); set data.cache_dir"
        ) from error
    return whitening
