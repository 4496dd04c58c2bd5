"""``ftd export --format tensors``: what ddranking reads, and the way back through ``ftd import``."""

import re
from pathlib import Path

import pytest
import torch

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.commands.export import as_logits

CLASSES, IPC = 10, 2
SETTINGS = {"method": "datm", "settings": {"ipc": IPC}, "labels_made": "learned", "dataset": {"name": "digits"}}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def in_turns() -> torch.Tensor:
    """Classes 0..9, 0..9: not class by class."""
    return torch.arange(CLASSES).repeat(IPC)


def soft(classes: torch.Tensor) -> torch.Tensor:
    """Probabilities whose largest is that of the class; a third of them are 0."""
    values = random(len(classes), CLASSES, seed=1) * (random(len(classes), CLASSES, seed=2) > 0.33)
    values[torch.arange(len(classes)), classes] = 1.5
    return values / values.sum(1, keepdim=True)


def make_set(labels: torch.Tensor, **changes) -> SyntheticSet:
    data = DistillationDataModule("digits", val_fraction=0)
    fields = {
        "images": random(len(labels), 1, 8, 8) * 4 - 2,
        "labels": labels,
        "step_size": torch.tensor(0.0123),
        "class_names": data.class_names,
        "transform": data.transform,
        "metadata": SETTINGS,
    }
    return SyntheticSet(**{**fields, **changes})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(synthetic: SyntheticSet, *arguments: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    synthetic.save("set.safetensors")
    cli.main(["export", "set.safetensors", "out", "--format", "tensors", *arguments])
    files = (Path("out") / name for name in ("images.pt", "labels.pt", "lr.pt"))
    images, labels, rate = (torch.load(file, weights_only=True) for file in files)
    return images, labels, rate


def brought_back() -> SyntheticSet:
    """Import with the command that README.txt gives."""
    (command,) = re.findall(r"^ftd import (.*)$", Path("out/README.txt").read_text(encoding="utf-8"), re.MULTILINE)
    words = [f"out/{word}" if word.endswith((".pt", ".safetensors")) else word for word in command.split()]
    cli.main(["import", *words])
    return SyntheticSet.load("out/set.safetensors")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_files_are_as_their_reader_takes_them_and_come_back(kind: str, here: Path, capsys) -> None:
    classes = in_turns()
    synthetic = make_set(classes if kind == "hard" else soft(classes))
    images, labels, rate = exported(synthetic)
    assert capsys.readouterr().out == "out: 20 images, images.pt, labels.pt, lr.pt, README.txt\n"
    order = torch.tensor([place for label in range(CLASSES) for place in (label, label + CLASSES)])
    assert torch.equal(images, synthetic.images[order])
    # The reader makes the classes of images itself, out of the number of images per class.
    rebuilt = torch.arange(CLASSES).repeat_interleave(IPC)
    assert torch.equal(labels if kind == "hard" else labels.argmax(1), rebuilt)
    assert labels.dtype == (torch.int64 if kind == "hard" else torch.float32)
    assert (rate.ndim, rate.dtype, float(rate)) == (0, torch.float32, float(synthetic.step_size))
    if kind == "soft":
        assert bool(torch.isfinite(labels).all())
        assert float((labels.softmax(1) - synthetic.labels[order]).abs().max()) <= 1e-7
    text = Path("out/README.txt").read_text(encoding="utf-8")
    assert ("temperature 1 " in text) == (kind == "soft")
    assert f"{kind}_labels: labels.pt" in text
    assert "use_zca false" in text

    back = brought_back()
    assert torch.equal(back.images, synthetic.images[order])
    assert torch.allclose(back.labels.double(), synthetic.labels[order].double(), rtol=0, atol=1e-6)
    assert torch.equal(back.step_size, synthetic.step_size)
    assert back.transform.describe() == synthetic.transform.describe()
    assert back.class_names == synthetic.class_names


def test_a_whitened_set_comes_back_whitened(here: Path) -> None:
    data = DistillationDataModule("digits", val_fraction=0, zca=True, cache_dir=str(here))
    data.prepare_data()
    data.setup()
    images, *_ = exported(make_set(in_turns().sort().values, transform=data.transform))
    assert "use_zca true" in Path("out/README.txt").read_text(encoding="utf-8")
    back = brought_back()
    assert torch.equal(back.images, images)
    assert back.transform.describe() == data.transform.describe()


def test_averaged_images_are_written_where_they_are_asked_for(here: Path) -> None:
    synthetic = make_set(in_turns().sort().values, ema_images=random(20, 1, 8, 8, seed=3))
    images, *_ = exported(synthetic, "--ema")
    assert torch.equal(images, synthetic.ema_images)


def test_several_step_sizes_become_their_mean(here: Path) -> None:
    *_, rate = exported(make_set(in_turns(), step_size=torch.tensor([0.01, 0.03])))
    assert float(rate) == pytest.approx(0.02)
    assert "the mean of several" in Path("out/README.txt").read_text(encoding="utf-8")


def test_learned_labels_that_changed_their_class_stay_with_their_image(here: Path) -> None:
    """A distillation keeps ipc images of each class together, whatever becomes of the labels."""
    labels = soft(in_turns().sort().values)
    labels[0] = labels[0].roll(3)  # the first image of class 0 now is most probably of class 3
    synthetic = make_set(labels)
    images, logits, _ = exported(synthetic)
    assert torch.equal(images, synthetic.images)
    assert int(logits[0].argmax()) == 3


def test_logits_of_certain_labels_are_finite() -> None:
    certain = torch.eye(3)
    logits = as_logits(certain)
    assert float(logits.min()) == pytest.approx(-87.3365, abs=1e-3)
    assert torch.equal(logits.softmax(1).round(), certain)
    assert float((logits.softmax(1) - certain).abs().max()) <= 1e-7


def unequal() -> torch.Tensor:
    labels = soft(in_turns())
    labels[0] = labels[0].roll(3)
    return labels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step_size": None}, "has no step size"),
        ({"labels": torch.tensor([0] * 11 + list(range(1, 10)))}, "has 1 to 11 images per class"),
        ({"labels": torch.arange(20) % 9}, "has 0 to 3 images per class"),
        ({"labels": unequal(), "metadata": {"method": "imported"}}, "has 1 to 3 images per class"),
        ({"labels": torch.randn(20, 10), "metadata": {"label_kind": "target"}}, "targets"),
    ],
)
def test_what_cannot_be_written_so_is_refused_in_one_line(changes: dict, said: str, here: Path, capsys) -> None:
    make_set(**{"labels": in_turns(), **changes}).save("set.safetensors")
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "set.safetensors", "out", "--format", "tensors"])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)
    assert said in shown.err
    assert not Path("out").exists()
