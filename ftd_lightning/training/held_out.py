"""Whether a set has seen the images that are held out to choose an iterate by."""

from __future__ import annotations

from typing import Any


def held_out_seen(of_set: Any, here: Any) -> bool:
    """Tell whether a set was distilled from images that this data source holds out.

    Both hold out a share of the same training images by a seed; other shares or seeds hold out other images.

    Args:
        of_set: ``metadata["dataset"]`` of the set; anything else than a mapping is unknown data.
        here: the description of the data source.

    Example:
        >>> held_out_seen({"name": "a", "val_fraction": 0.0, "seed": 0}, {"name": "a", "val_fraction": 0.1, "seed": 0})
        True
        >>> held_out_seen({"name": "a", "val_fraction": 0.1, "seed": 0}, {"name": "a", "val_fraction": 0.1, "seed": 0})
        False
    """
    if not isinstance(of_set, dict) or not isinstance(here, dict) or not here.get("val_fraction"):
        return False
    if any(of_set.get(key) != here.get(key) for key in ("name", "fingerprint") if key in of_set and key in here):
        return False
    return any(of_set.get(key) != here.get(key) for key in ("val_fraction", "seed", "max_per_class"))
