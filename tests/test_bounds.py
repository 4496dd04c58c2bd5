"""Numbers out of range are refused where they enter, by the one table of ranges, before anything is trained."""

import importlib
import inspect
import json
import math
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from ftd_lightning.bounds import BOUNDS, Count, check_bounds
from ftd_lightning.commands.import_set import import_set
from ftd_lightning.core.evaluation import EvaluationProtocol
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.modules import FeatureAlignment, FlatTeacher
from ftd_lightning.modules.feature_alignment import Loops
from ftd_lightning.studies.compare import compare
from ftd_lightning.studies.distill import distill, distill_source
from ftd_lightning.studies.label import label
from ftd_lightning.studies.nas import SearchSettings
from ftd_lightning.studies.rank import RankSettings
from ftd_lightning.studies.reproduce import reproduce
from ftd_lightning.studies.trajectory_error import trajectory_error

# Arguments that some classes cannot do without.
NEEDED = {
    "in_channels": 3,
    "num_classes": 10,
    "image_size": 32,
    "network": "encoders.mine",
    "backbone": torch.nn.Flatten(),
    "kappa": 0.1,
    "rate": 0.1,
    "lr": 1.0,
    "threshold": 1.0,
    "epsilon": 0.1,
    "trajectories": "store",
    "out": "nas",
    "base_optimizer": torch.optim.SGD,
    "params": [nn.Parameter(torch.ones(1))],
}
COMMANDS = [compare, distill, distill_source, label, reproduce, trajectory_error, import_set]
# Public, but made by the library of numbers that are checked or measured, or checked against more than a range.
OTHERS = {
    *("ImageShape", "DataDescription", "BatchPlan", "TeacherProgress"),  # contracts
    *("ImageDataset", "Request", "Standardization", "Whitening"),  # data: what was found in files
    "SegmentLoader",  # refuses numbers itself
    "FitProgress",  # how often a bar is drawn decides nothing
}


def numbers(owner):
    """Names of the arguments that are numbers, or lists of numbers."""
    parameters = inspect.signature(owner).parameters.values()
    return [p.name for p in parameters if re.search(r"\b(int|float)\b", str(p.annotation))]


def owners():
    """All classes with numbers that a user may choose."""
    names = json.loads((Path(__file__).parent / "public_names.json").read_text())
    found = [getattr(importlib.import_module(module), name) for module, public in names.items() for name in public]
    classes = {one for one in found if inspect.isclass(one) and not typing.is_typeddict(one)}
    classes |= {EvaluationProtocol, Loops, SearchSettings, RankSettings}
    return sorted((one for one in classes if one.__name__ not in OTHERS and numbers(one)), key=lambda one: one.__name__)


def outside(bound):
    """Values beyond a range."""
    if isinstance(bound, Count):
        return [bound.least - 1, bound.most + 1, bound.least + 0.5, math.nan, "3", True]
    least = bound.least if bound.open_least else math.nextafter(bound.least, -math.inf)
    most = bound.most if bound.open_most or math.isinf(bound.most) else math.nextafter(bound.most, math.inf)
    return [least, most, math.nan, math.inf, 10**400, "0.5", True, torch.ones(2)]


def test_every_number_that_a_user_may_choose_has_a_bound():
    """Whoever adds an argument gives its range in ``bounds.py``."""
    named = [(owner.__name__, name) for owner in (*owners(), *COMMANDS) for name in numbers(owner)]
    assert not [(owner, name) for owner, name in named if name not in BOUNDS]
    assert not BOUNDS.keys() - {name for _, name in named}, "left over"


@pytest.mark.parametrize("owner", owners(), ids=lambda owner: owner.__name__)
def test_constructors_refuse_what_is_out_of_range(owner, refused):
    parameters = inspect.signature(owner).parameters
    given = {name: NEEDED[name] for name, p in parameters.items() if p.default is p.empty and name in NEEDED}
    for name in numbers(owner):
        listed = "list" in str(parameters[name].annotation)
        for value in outside(BOUNDS[name]):
            with refused(f"{owner.__name__}: {name}{'[0]' * listed}={value!r} must "):
                check_bounds(owner, {name: [value] if listed else value})
        with refused(f"{owner.__name__}: {name}{'[0]' * listed}=nan must "):
            owner(**{**given, name: [math.nan] if listed else math.nan})
    owner(**given)


@pytest.mark.parametrize(
    ("owner", "options", "message"),
    [
        (FlatTeacher, {"lr": -1.0}, "lr=-1.0 must be above 0 and finite"),
        (FlatTeacher, {"momentum": 2.0}, "momentum=2.0 must lie in [0, 1)"),
        (FlatTeacher, {"teachers": 2.5}, "teachers=2.5 must be a whole number"),
        (FlatTeacher, {"lr": None}, "lr=None must be a number"),
        (FeatureAlignment, {"lr_milestones": [3, -1]}, "lr_milestones[1]=-1 must be at least 0"),
        (DistillationDataModule, {"image_size": 100_000}, "image_size=100000 must be at most 1024"),
        (DistillationDataModule, {"seed": -1, "batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_the_message_names_the_argument_and_its_range(owner, options, message):
    with pytest.raises(InputError) as caught:
        owner(**options)
    assert str(caught.value) == f"{owner.__name__}: {message}"
