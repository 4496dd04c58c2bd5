"""``ftd reproduce``: the comparison of a cell of the published tables."""

from pathlib import Path

from fits import refusal

from ftd_lightning.studies.comparison import Comparison
from ftd_lightning.studies.fits import resolved
from ftd_lightning.studies.reproduce import plan


def folders(job: Comparison, row: str = "ftd") -> list[Path]:
    """Folders of the teachers, the distillation and the evaluation."""
    return [fit.folder for fit in job.fits_of(row).each()]


def test_cells_that_want_the_same_teachers_share_them(here: Path) -> None:
    plain, iterations = plan("digits", 1, "ftd"), plan("digits", 1, "ftd", iterations=7)
    assert list(plain.rows) == ["ftd", "ftd-chosen", "ftd-ema", "ftd-ema-chosen"]
    assert plain.folder == Path("runs/digits/reproduce_ftd_ipc1_published")
    assert plain.folder != iterations.folder
    assert folders(plain)[0] == folders(iterations)[0]
    assert folders(plain)[0].parent == Path("runs/digits/fits")
    assert folders(plain)[1] != folders(iterations)[1]
    assert len({folders(plain, row)[1] for row in plain.rows}) == 1
    assert len({folders(plain, row)[2] for row in plain.rows}) == 4
    elsewhere = plan("digits", 1, "ftd", overrides=["--data.root=/elsewhere", "--data.num_workers", "2"])
    assert folders(elsewhere) == folders(plain)
    assert list(plan("digits", 1, "mtt").rows) == ["mtt", "mtt-chosen"], "it keeps no average"


def length(*overrides: str, ipc: int, **cell) -> int:
    """The epochs that a teacher of CIFAR-10 is trained for."""
    fit = plan("cifar10", ipc, "mtt", overrides=overrides, **cell).fits_of("mtt").teachers
    return resolved(fit.config, fit.options)["model"]["init_args"]["epochs"]


def test_teachers_are_as_long_as_they_are_read(here: Path) -> None:
    assert [length(ipc=ipc) for ipc in (1, 10, 50)] == [3, 21, 41]
    assert length("--distill.model.max_start_epoch", "4", ipc=1) == 5
    assert length("--teacher.model.epochs=7", ipc=1) == 7
    assert length(ipc=1, teacher_epochs=9) == 9
    assert length(ipc=1, teacher_epochs=0) == 50


def test_nothing_is_chosen_where_no_images_are_held_out(here: Path) -> None:
    assert list(plan("digits", 1, "mtt").rows) == ["mtt", "mtt-chosen"]
    assert list(plan("digits", 1, "mtt", overrides=["--data.val_fraction", "0"]).rows) == ["mtt"]


def test_subsets_share_configs(here: Path) -> None:
    woof = plan("imagewoof", 10, "ftd")
    assert woof.folder.parent == Path("runs/imagewoof")
    for fit in woof.fits_of("ftd-ema").each():
        assert fit.config.parent.name == "imagenet"
        assert "--data.dataset=imagewoof" in fit.options


def test_bad_input_is_one_line(here: Path, capsys) -> None:
    assert "digits/distill_ftd_ipc7: no such config; there are digits/distill_att_ipc1" in refusal(
        capsys, "reproduce", "--dataset=digits", "--ipc=7", "--method=ftd"
    )
    assert "has no teachers" in refusal(capsys, "reproduce", "--dataset=digits", "--ipc=1", "--method=dm")
    assert "digit: no settings ship for it; there are cifar10" in refusal(capsys, "reproduce", "--dataset=digit")
    assert "teachers=0 must be at least 1" in refusal(
        capsys, "reproduce", "--dataset=digits", "--ipc=1", "--teachers=0"
    )
    assert not Path("runs").exists()
