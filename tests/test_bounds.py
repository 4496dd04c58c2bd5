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

from ftd_lightning import cli
from ftd_lightning.bounds import BOUNDS, Count, check_bounds
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA, SyntheticSetWriter, TensorBoardPictures
from ftd_lightning.commands.import_set import import_set
from ftd_lightning.contracts import ImageShape
from ftd_lightning.core.evaluation import EvaluationProtocol
from ftd_lightning.core.networks import NetworkFactory
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.functional import InnerAdam, InnerSGD
from ftd_lightning.models import VGG11, AlexNet, ConvNet, ResNet18
from ftd_lightning.modules import (
    BilevelDistillation,
    DistributionMatching,
    FeatureAlignment,
    FeatureRegression,
    FlatTeacher,
    GradientMatching,
    KernelInducingPoints,
    SyntheticEvaluation,
    TrajectoryMatching,
)
from ftd_lightning.modules.feature_alignment import Loops
from ftd_lightning.optim import GSAM
from ftd_lightning.rules import (
    DropLargest,
    DropShallow,
    DropSmallest,
    KeepSimilar,
    LearnedLabels,
    LossGate,
    RobustStart,
    StartWindow,
)
from ftd_lightning.studies.compare import compare
from ftd_lightning.studies.distill import distill_source
from ftd_lightning.studies.distill_datasets import distill
from ftd_lightning.studies.label import label
from ftd_lightning.studies.nas import SearchSettings
from ftd_lightning.studies.rank import RankSettings
from ftd_lightning.studies.reproduce import reproduce
from ftd_lightning.studies.trajectory_error import trajectory_error

SHAPE = {"in_channels": 3, "num_classes": 10, "image_size": 32}

# What asks the table, with the arguments that it cannot do without.
OWNERS = {
    FlatTeacher: {},
    TrajectoryMatching: {"trajectories": "store"},
    GradientMatching: {},
    DistributionMatching: {},
    FeatureAlignment: {},
    FeatureRegression: {},
    KernelInducingPoints: {},
    SyntheticEvaluation: {},
    DistillationDataModule: {},
    EvaluateSynthetic: {},
    SyntheticSetWriter: {},
    SyntheticEMA: {},
    TensorBoardPictures: {},
    EvaluationProtocol: {},
    Loops: {},
    RobustStart: {"kappa": 0.1},
    DropLargest: {"rate": 0.1},
    DropShallow: {"rate": 0.1},
    DropSmallest: {"rate": 0.1},
    LearnedLabels: {"lr": 1.0},
    LossGate: {"threshold": 1.0},
    StartWindow: {},
    InnerSGD: {},
    InnerAdam: {},
    BilevelDistillation: {},
    KeepSimilar: {"epsilon": 0.1},
    ConvNet: SHAPE,
    AlexNet: SHAPE,
    VGG11: SHAPE,
    ResNet18: SHAPE,
    GSAM: {"params": [nn.Parameter(torch.ones(1))], "base_optimizer": torch.optim.SGD},
    SearchSettings: {"out": "nas"},
    RankSettings: {},
}
COMMANDS = [compare, distill, distill_source, label, reproduce, trajectory_error, import_set]
# Public, but made by the library of numbers that are checked or measured, or checked against more than a range.
OTHERS = {
    *("ImageShape", "DataDescription", "BatchPlan", "TeacherProgress"),  # contracts
    *("ImageDataset", "Request", "Standardization", "Whitening"),  # data: what was found in files
    "SegmentLoader",  # refuses numbers itself
    "FitProgress",  # how often a bar is drawn decides nothing
}


def public_classes():
    names = json.loads((Path(__file__).parent / "public_names.json").read_text())
    for module, public in names.items():
        found = (getattr(importlib.import_module(module), name) for name in public)
        classes = (one for one in found if inspect.isclass(one) and not typing.is_typeddict(one))
        yield from (one for one in classes if one.__name__ not in OTHERS)


def numbers(owner):
    """Names of the arguments that are numbers, or lists of numbers."""
    parameters = inspect.signature(owner).parameters.values()
    return [p.name for p in parameters if re.search(r"\b(int|float)\b", str(p.annotation))]


def outside(bound):
    """Values on either side of a range, and such as are on neither."""
    if isinstance(bound, Count):
        return [bound.least - 1, bound.most + 1, bound.least + 0.5, math.nan, math.inf, "3", True, torch.ones(2)]
    least = bound.least if bound.open_least else math.nextafter(bound.least, -math.inf)
    most = bound.most if bound.open_most or math.isinf(bound.most) else math.nextafter(bound.most, math.inf)
    return [least, most, math.nan, -math.inf, math.inf, 10**400, "0.5", True, torch.ones(2)]


def inside(bound):
    """The values at the edges that are in range."""
    if isinstance(bound, Count):
        return [bound.least, bound.most]
    edges = [] if bound.open_least else [bound.least]
    edges += [] if bound.open_most or math.isinf(bound.most) else [bound.most]
    return [*edges, math.nextafter(bound.least, math.inf)]


def test_every_number_that_a_user_may_choose_has_a_bound():
    """Whoever adds an argument says in ``bounds.py`` what it may be, and a class that it is asked, in ``OWNERS``."""
    numeric = [owner for owner in public_classes() if numbers(owner)]
    assert {owner.__name__ for owner in numeric} <= {owner.__name__ for owner in OWNERS}
    unbounded = [f"{owner.__name__}.{name}" for owner in (*OWNERS, *COMMANDS) for name in numbers(owner)
                 if name not in BOUNDS]  # fmt: skip
    assert not unbounded


def test_no_bound_is_left_over():
    assert not BOUNDS.keys() - {name for owner in (*OWNERS, *COMMANDS) for name in numbers(owner)}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_range_ends_at_its_edges(name):
    def owner(**_):
        """Take one argument by its name."""

    owner.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)])
    for value in inside(BOUNDS[name]):
        check_bounds(owner, {name: value})
    for value in outside(BOUNDS[name]):
        with pytest.raises(InputError, match=rf"^owner: {name}=.* must .*$"):
            check_bounds(owner, {name: value})


@pytest.mark.parametrize("owner", OWNERS)
def test_constructors_ask(owner, refused):
    for name in numbers(owner):
        listed = "list" in str(inspect.signature(owner).parameters[name].annotation)
        for value in outside(BOUNDS[name])[:4]:
            with refused(f"{owner.__name__}: {name}{'[0]' * listed}={value!r} must "):
                owner(**{**OWNERS[owner], name: [value] if listed else value})
    owner(**OWNERS[owner])


@pytest.mark.parametrize(
    ("owner", "options", "message"),
    [
        (FlatTeacher, {"lr": -1.0}, "lr=-1.0 must be above 0 and finite"),
        (FlatTeacher, {"momentum": 2.0}, "momentum=2.0 must lie in [0, 1)"),
        (FlatTeacher, {"teachers": 2.5}, "teachers=2.5 must be a whole number"),
        (FlatTeacher, {"lr": "0.1"}, "lr='0.1' must be a number"),
        (FlatTeacher, {"lr": None}, "lr=None must be a number"),
        (FeatureAlignment, {"lr_milestones": [3, -1]}, "lr_milestones[1]=-1 must be at least 0"),
        (DistillationDataModule, {"image_size": 100_000}, "image_size=100000 must be at most 1024"),
        (DistillationDataModule, {"val_fraction": 0.999}, "val_fraction=0.999 must lie in [0, 0.9]"),
        (DistillationDataModule, {"seed": -1, "batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_the_message_names_the_argument_and_its_range(owner, options, message):
    with pytest.raises(InputError) as caught:
        owner(**options)
    assert str(caught.value) == f"{owner.__name__}: {message}"


def test_none_is_fine_where_it_is_the_default():
    assert SyntheticEvaluation(lr=None).hparams["lr"] is None
    assert GradientMatching(outer_loops=None).outer_loops == 1


def test_numbers_of_other_kinds_are_numbers():
    module = FlatTeacher(lr=torch.tensor(0.5), teachers=torch.tensor(3), rho=1)
    assert (float(module.hparams["lr"]), int(module.teachers)) == (0.5, 3)


@pytest.mark.parametrize(("option", "value"), [("width", -4), ("width", 0), ("depth", 10**6)])
def test_options_of_a_named_network_are_arguments_too(option, value, refused):
    with refused(f"ConvNet: {option}={value} must be at "):
        NetworkFactory("convnet", {option: value}, ImageShape(**SHAPE)).build(0)


def test_options_of_ones_own_images_are_checked_before_they_are_read(refused):
    with refused("batch_size=0 must be at least 1"):
        DistillationDataModule.from_datasets(None, None, batch_size=0)


def test_a_fit_from_the_command_line_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config=digits/teacher_ftd", "--model.rho=.nan"])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error == "ftd: error: FlatTeacher: rho=nan must be at least 0 and finite\n"
