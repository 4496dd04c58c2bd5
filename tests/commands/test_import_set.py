"""``ftd import``: sets of public code come in whole and checked, and no code that a file carries runs."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import refusal
from safetensors.torch import save_file

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.commands.import_set import in_order_of
from ftd_lightning.files import Whitening
from ftd_lightning.functional.kernels import centred_targets


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ten digits' images and labels, as released: written by torch.save."""
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Parameter(random(10, 1, 8, 8) * 4 - 2), "images.pt")
    torch.save(torch.arange(10), "labels.pt")
    return tmp_path


FILES = ["images.pt", "labels.pt", "out/set.safetensors", "--dataset", "digits"]
WORDS = [*FILES, "--step-size", "0.02", "--standardized"]
NEW = [word.replace("out/", "other/") for word in WORDS]


def imported(*arguments: str) -> SyntheticSet:
    Path("out/set.safetensors").unlink(missing_ok=True)
    cli.main(["import", *arguments])
    return SyntheticSet.load("out/set.safetensors")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run what has to be refused, with nothing written; give the line."""
    before = sorted(Path().rglob("*"))
    line = refusal(capsys, "import", *arguments)
    assert sorted(Path().rglob("*")) == before
    return line


def test_standardised_images_come_in_as_they_are(here: Path, capsys) -> None:
    synthetic = imported(*WORDS)
    assert "out/set.safetensors: 10 images" in capsys.readouterr().out
    assert torch.equal(synthetic.images, random(10, 1, 8, 8) * 4 - 2)
    assert torch.equal(synthetic.labels, torch.arange(10))
    assert float(synthetic.step_size) == pytest.approx(0.02)
    assert synthetic.class_names == [str(digit) for digit in range(10)]
    data = DistillationDataModule("digits", val_fraction=0)
    assert synthetic.transform.describe() == data.transform.describe()
    assert synthetic.metadata["method"] == "imported"
    assert synthetic.metadata["dataset"] == data.describe()["dataset"]
    source = {"images": "images.pt", "labels": "labels.pt", "read_as": "standardized"}
    assert synthetic.metadata["imported"] == source
    assert "is there already" in refused(capsys, *WORDS)


def test_pictures_are_standardised(here: Path) -> None:
    pictures = random(10, 1, 8, 8)
    torch.save(pictures, "images.pt")
    words = [*FILES, "--step-size", "none", "--pictures"]
    synthetic = imported(*words)
    assert synthetic.step_size is None
    assert torch.allclose(synthetic.pictures(), pictures, atol=1e-6)
    assert torch.allclose(synthetic.images, synthetic.transform.apply(pictures))
    torch.save((pictures * 255).to(torch.uint8), "images.pt")
    assert torch.equal(imported(*words).pictures().mul(255).round(), (pictures * 255).floor())


def test_whitened_images_bring_the_whitening_of_the_whole_training_set(here: Path) -> None:
    pictures = random(10, 1, 8, 8)
    data = DistillationDataModule("digits", root="elsewhere", zca=True, zca_eps=0.2, val_fraction=0)
    data.prepare_data()
    data.setup()
    torch.save(data.transform.apply(pictures), "images.pt")
    arguments = [*FILES, "--whitened", "--zca-eps", "0.2", "--step-size", "1e-2"]
    synthetic = imported(*arguments)
    assert isinstance(synthetic.transform, Whitening)
    assert synthetic.transform.describe() == data.transform.describe()
    assert torch.allclose(synthetic.pictures(), pictures, atol=1e-3)


def test_numpy_and_safetensors_files(here: Path) -> None:
    images = random(10, 1, 8, 8)
    np.save("images.npy", images.numpy().astype(">f8"))  # the byte order that torch has not
    save_file({"anything": torch.arange(10)}, "labels.safetensors")
    save_file({"lr": torch.tensor([0.5])}, "lr.safetensors")
    files = ["images.npy", "labels.safetensors", "out/set.safetensors", "--dataset", "digits", "--standardized"]
    synthetic = imported(*files, "--step-size", "lr.safetensors")
    assert torch.equal(synthetic.images, images)
    assert torch.equal(synthetic.labels, torch.arange(10))
    assert float(synthetic.step_size) == 0.5


def test_soft_labels_are_probabilities_or_scores(here: Path, capsys) -> None:
    scores = random(10, 10) * 6 - 3
    torch.save(scores.softmax(1), "labels.pt")
    assert torch.allclose(imported(*WORDS).labels, scores.softmax(1))
    capsys.readouterr()
    torch.save(scores, "labels.pt")
    assert "--logits" in refused(capsys, *NEW)
    synthetic = imported(*WORDS, "--logits")
    assert torch.allclose(synthetic.labels, scores.softmax(1))
    assert synthetic.metadata["imported"]["logits"] is True


def test_targets_of_a_regression_stay_as_they_are(here: Path, capsys) -> None:
    """Centred targets, -0.1 and 0.9 for ten classes, as KIP and FRePo learn them."""
    targets = centred_targets(torch.arange(10), 10)
    torch.save(targets, "labels.pt")
    assert "--targets" in refused(capsys, *NEW)
    synthetic = imported(*WORDS, "--targets")
    assert torch.equal(synthetic.labels, targets)
    assert synthetic.metadata["label_kind"] == "target"
    assert torch.equal(synthetic.training_labels().argmax(1), torch.arange(10))
    assert float(synthetic.training_labels().max()) == 1
    torch.save(torch.arange(10), "labels.pt")
    capsys.readouterr()
    assert "holds classes, --targets is for soft labels" in refused(capsys, *NEW, "--targets")


def test_classes_in_another_order_are_renumbered(here: Path, capsys) -> None:
    backwards = [str(digit) for digit in reversed(range(10))]
    assert imported(*WORDS, "--class-names", *backwards).labels.tolist() == list(reversed(range(10)))
    capsys.readouterr()
    assert "check 'ten'" in refused(capsys, *NEW, "--class-names", "ten", *backwards[1:])
    soft = torch.tensor([[0.5, 0.3, 0.2]])
    assert torch.equal(in_order_of(soft, ["b", "c", "a"], ["a", "b", "c"]), torch.tensor([[0.2, 0.5, 0.3]]))


def test_step_size_and_preprocessing_are_asked_for(here: Path, capsys) -> None:
    assert "pass --step-size" in refused(capsys, *FILES, "--standardized")
    for words in ([], ["--whitened", "--pictures"]):
        assert "pass one of --whitened" in refused(capsys, *FILES, "--step-size", "0.01", *words)
    for value in ("0", "nan", "labels.pt", "much"):
        assert "is a finite number above 0" in refused(capsys, *FILES, "--standardized", "--step-size", value)
    assert "above 0" in refused(capsys, *WORDS, "--zca-eps", "0")


BAD = [
    ("images.pt", torch.zeros(10, 3, 8, 8), ["images.pt", "(10, 3, 8, 8)", "(N, 1, 8, 8)"]),
    ("images.pt", torch.full((10, 1, 8, 8), torch.nan), ["not finite"]),
    ("images.pt", torch.zeros(10, 1, 8, 8, dtype=torch.complex64), ["torch.complex64"]),
    ("images.pt", torch.zeros(3, device="meta"), ["dense numbers are needed"]),
    ("labels.pt", torch.arange(9), ["labels.pt", "(9,)", "10 images"]),
    ("labels.pt", torch.arange(10) + 1, ["from 1 to 10", "0 to 9"]),
    ("labels.pt", torch.eye(10).long(), ["torch.int64"]),
    ("labels.pt", torch.full((10, 10), 0.2), ["sum 1"]),
    ("labels.pt", {"labels": torch.arange(10)}, ["holds a dict"]),
]


def test_tensors_that_do_not_fit_are_one_line(here: Path, capsys) -> None:
    good = {name: Path(name).read_bytes() for name in ("images.pt", "labels.pt")}
    for name, tensor, words in BAD:
        torch.save(tensor, name)
        line = refused(capsys, *WORDS)
        assert all(word in line for word in words), line
        Path(name).write_bytes(good[name])
    assert "pictures are in [0, 1]" in refused(capsys, *FILES, "--step-size", "0.01", "--pictures")


class Malicious:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickled_code_does_not_run(here: Path, capsys) -> None:
    torch.save(Malicious(), "images.pt")
    assert "would run code" in refused(capsys, *WORDS)
    torch.save(Malicious(), "images.pt", _use_new_zipfile_serialization=False)  # as torch before 1.6
    assert "would run code" in refused(capsys, *WORDS)
    Path("images.pt").write_bytes(pickle.dumps(Malicious()))
    assert "would run code" in refused(capsys, *WORDS)
    np.save("images.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    assert "would run code" in refused(capsys, "images.npy", *WORDS[1:])
    assert not Path("pwned").exists()
    # The same file does run it where that is allowed, so the test tests something.
    pickle.loads(Path("images.pt").read_bytes())
    assert Path("pwned").exists()


def test_foreign_and_broken_files_are_one_line(here: Path, capsys) -> None:
    whole = Path("images.pt").read_bytes()
    for content in (b"", whole[:-200]):
        for name in ("images.pt", "images.npy", "images.safetensors"):
            Path(name).write_bytes(content)
            assert f"{name}: not one plain tensor" in refused(capsys, name, *WORDS[1:])
    np.save("images.npy", np.array(["a", "b"]))
    assert "not one plain tensor" in refused(capsys, "images.npy", *WORDS[1:])
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, "images.safetensors")
    assert "not one plain tensor" in refused(capsys, "images.safetensors", *WORDS[1:])
    assert "nowhere.pt: no such file" in refused(capsys, "nowhere.pt", *WORDS[1:])
