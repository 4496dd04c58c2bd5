"""Whitenings that were fitted by earlier runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from ftd_lightning.data.files import fingerprint
from ftd_lightning.data.images import unit_range
from ftd_lightning.data.transform import Whitening
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ftd_lightning.data.cache_folder import CacheFolder


def cached_whitening(pictures: Tensor, name: str, *, eps: float, cache: CacheFolder) -> Whitening:
    """Read the whitening of some pictures from the cache, or fit it and write it there, atomically.

    Args:
        pictures: (N, C, H, W), uint8 or float32 in [0, 1].
        name: of the data set, for the file's name, which says all that a whitening depends on.
        eps: added to the eigenvalues.
        cache: the file lies in its folder ``whitening``.

    Raises:
        InputError: for a broken file, or where it cannot be written.
    """
    data = fingerprint(pictures)
    file = f"zca_{name.replace(' ', '-')}_{data}_{eps}_kornia{version('kornia')}.safetensors"
    path = cache.file("whitening", file)
    if path.is_file():
        return Whitening.load(path)
    values = pictures[0].numel()
    rank_zero_info(f"fitting the whitening, {values} x {values}, on {len(pictures)} images")
    whitening = Whitening.fit(unit_range(pictures), eps=eps, fitted_on=data)
    try:
        whitening.save(path)
    except OSError as error:
        raise InputError(f"{path}: the whitening cannot be written there ({error}); set data.cache_dir") from error
    return whitening
