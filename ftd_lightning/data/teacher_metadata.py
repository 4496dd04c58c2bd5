"""What a teacher's file records beside its weights, and when two such records mean comparable teachers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ftd_lightning.models.description import same_network

if TYPE_CHECKING:
    from collections.abc import Mapping

# What each teacher of a store has for itself; the rest is shared.
OWN_KEYS = ("teacher", "seed", "accuracies", "epochs", "versions", "kind", "format")
# What version 0.1 did not record, and what is derived: a record without such a key does not contradict one with it.
OPTIONAL_KEYS = ("method", "batches_per_epoch", "parameters")


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """Name the keys in which recorded metadata is not what is wanted.

    Values are compared as JSON holds them, so tuples equal lists. Networks are the same if their parameters are. A data
    set that version 0.1 recorded without a fingerprint is the one of the same name and settings with any fingerprint.
    Each teacher's own keys are not compared.

    Args:
        recorded: of a teacher, or of a store.
        wanted: the values that it should have.
        whole: whether ``wanted`` is a whole record, so that keys which only ``recorded`` has are differences too.

    Example:
        >>> differences({"rho": 0.01, "betas": [0.9, 0.99], "seed": 3}, {"rho": 0.0, "betas": (0.9, 0.99), "seed": 4})
        ['rho']
    """
    keys = [*wanted, *(key for key in recorded if whole and key not in wanted)]
    return [key for key in keys if key not in OWN_KEYS and _differ(key, recorded, wanted)]


def _differ(key: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if key in OPTIONAL_KEYS and not (key in recorded and key in wanted):
        return False
    theirs, ours = (json.loads(json.dumps(values.get(key))) for values in (recorded, wanted))
    if key == "network":
        return not same_network(theirs, ours)
    if key == "dataset" and _named(theirs) and _named(ours) and not ("fingerprint" in theirs and "fingerprint" in ours):
        theirs.pop("fingerprint", None)
        ours.pop("fingerprint", None)
    return bool(theirs != ours)


def _named(dataset: Any) -> bool:
    return isinstance(dataset, dict) and "name" in dataset
