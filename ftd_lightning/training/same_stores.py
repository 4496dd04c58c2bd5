"""Stores of one name on several nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftd_lightning.errors import InputError
from ftd_lightning.training.ranks import all_ranks

if TYPE_CHECKING:
    from ftd_lightning.data.trajectory_store import TrajectoryStore


def refuse_other_stores(store: TrajectoryStore) -> None:
    """Refuse nodes whose stores have other teachers: the ranks would follow them unnoticed.

    Raises:
        InputError: on all ranks.
    """
    teachers = [(file.name, store.teacher_metadata(index)) for index, file in enumerate(store.files)]
    ranks = all_ranks(teachers)
    other = next((rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]), None)
    if other is not None:
        raise InputError(
            f"{store.path}: process 0 has {len(ranks[0])} teachers, process {other} has {len(ranks[other])} or "
            "others: copy this folder from one node to the others"
        )
