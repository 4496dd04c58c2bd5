"""``ftd export --format parameters`` and ``ftd import`` of it: the parameters alone give the set, bit for bit."""

from pathlib import Path

import pytest
import torch
from fits import refusal, rewrite, small_data

from ftd_lightning import SyntheticSet, cli
from ftd_lightning.commands.parameters import read_parameters
from ftd_lightning.core.arguments import plain
from ftd_lightning.decoders import Bases, Decoder, Flip, Frequencies, Gaussians, Generator, MultiFormation
from ftd_lightning.files.safetensors_io import TensorFile

SETS = Path(__file__).parents[2] / "notebooks" / "sets"
FILE = "out/parameters.safetensors"
DECODERS = [MultiFormation(2), Flip(), Bases(5, 1), Frequencies(16), Gaussians(3, fit_steps=2), Generator(4, 5, 4)]


def made(decoder: Decoder, *, dataset: str = "digits", **options: object) -> SyntheticSet:
    """A set of a decoder that begins with real digits, as a fit of no steps makes it."""
    data = small_data(**options)
    data.setup()
    count, (images, labels) = decoder.images_per_class(1, data.description().shape), data.train
    order = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(10)])
    decoder.fit(images[order], labels[order])
    codes = decoder.parameters()
    metadata = {"method": "ftd", "decoder": plain(decoder), "dataset": {**data.describe()["dataset"], "name": dataset}}
    metadata |= {"numbers_stored": decoder.numbers(), "bytes_stored": decoder.bytes(), "images_stored": 10}
    names, images = data.class_names, decoder.decode(codes)
    return SyntheticSet(images, labels[order], 0.05, None, names, data.transform, metadata, codes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def there_and_back(synthetic: SyntheticSet, capsys) -> SyntheticSet:
    synthetic.save("set.safetensors")
    cli.main(["export", "set.safetensors", "out", "--format", "parameters"])
    cli.main(["import", "--root", "data", FILE, "back.safetensors"])
    assert f"{len(synthetic.images)} images, bit for bit those that were exported" in capsys.readouterr().out
    return SyntheticSet.load("back.safetensors")


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_the_set_comes_back_bit_for_bit(decoder: Decoder, here: Path, capsys) -> None:
    synthetic = made(decoder)
    back = there_and_back(synthetic, capsys)
    assert Path("back.safetensors").read_bytes() == Path("set.safetensors").read_bytes()
    assert torch.equal(back.images, synthetic.images)
    assert back.codes.keys() == synthetic.codes.keys()
    names = TensorFile(Path(FILE)).names
    assert names == {"labels", "step_size", *(f"codes.{name}" for name in synthetic.codes)}, "no images"


@pytest.mark.parametrize(("dataset", "kept"), [("digits", False), ("own images", True)])
def test_a_whitening_is_left_out_where_it_can_be_fitted_again(dataset: str, kept: bool, here: Path, capsys) -> None:
    synthetic = made(Flip(), zca=True, dataset=dataset)
    back = there_and_back(synthetic, capsys)
    assert back.transform.describe() == synthetic.transform.describe()
    torch.testing.assert_close(back.pictures(), synthetic.pictures(), rtol=0, atol=1e-6)
    assert ("transform.inverse" in TensorFile(Path(FILE)).names) == kept


def test_pixels_are_parameters_too(here: Path, capsys) -> None:
    synthetic = made(Flip(), zca=True)
    synthetic.codes = {}
    synthetic.metadata.pop("decoder")
    there_and_back(synthetic, capsys)
    assert Path("back.safetensors").read_bytes() == Path("set.safetensors").read_bytes()
    assert TensorFile(Path(FILE)).names == {"labels", "step_size", "images"}, "no whitening"


@pytest.mark.parametrize("decoder", [None, Flip()], ids=["pixels", "decoder"])
def test_info_describes_the_set_without_its_data(decoder: Decoder | None, here: Path, capsys) -> None:
    synthetic = made(decoder or Flip(), zca=True)
    if decoder is None:
        synthetic.codes = {}
        synthetic.metadata.pop("decoder")
    there_and_back(synthetic, capsys)
    said = []
    for path in ("set.safetensors", FILE):
        cli.main(["info", path])
        said.append(capsys.readouterr().out.splitlines())
    assert said[1][0] == f"{FILE}: parameters of a synthetic set"
    left_out = "; not in this file: ftd import fits it on the data set's images again"
    assert sum(line.endswith(left_out) for line in said[1]) == 1
    assert [line.removesuffix(left_out) for line in said[1][1:]] == said[0][1:]


@pytest.mark.parametrize("file", sorted(SETS.glob("*.safetensors")), ids=lambda file: file.stem)
def test_sets_that_ship_are_described_and_their_images_come_back(file: Path, here: Path, capsys) -> None:
    assert file.name in (SETS / "README.md").read_text(), "its card"
    cli.main(["info", str(file)])
    assert "cifar10" in capsys.readouterr().out
    images = read_parameters(file)[0].images
    assert images.shape[1:] == (3, 32, 32)
    assert 0.3 < float(images.std()) < 2


def test_a_whitening_of_other_images_is_refused(here: Path, capsys) -> None:
    there_and_back(made(Flip(), zca=True), capsys)
    rewrite(Path(FILE), Path(FILE), lambda tensors, old: {**old, "dataset": {"name": "digits", "max_per_class": 13}})
    assert "was whitened by other images" in refusal(capsys, "import", FILE, "other.safetensors")


def test_accuracies_of_averaged_images_stay_behind_with_them(here: Path, capsys) -> None:
    synthetic, score = made(Flip()), {"mean": 0.5, "std": 0.1, "n": 2}
    synthetic.metadata["scores"] = {"raw images, test images": score, "ema images, test images": score}
    assert there_and_back(synthetic, capsys).metadata["scores"] == {"raw images, test images": score}


def test_soft_labels_stay(here: Path, capsys) -> None:
    synthetic = made(MultiFormation(2))
    synthetic.labels = torch.rand(40, 10).softmax(1)
    assert torch.equal(there_and_back(synthetic, capsys).labels, synthetic.labels)


def wrong(name: str, value: object):
    return lambda tensors, old: {**old, name: value}


def without(name: str):
    def change(tensors: dict, old: dict) -> dict:
        tensors.pop(name)
        return old

    return change


def spoilt(tensors: dict, old: dict) -> dict:
    tensors["codes.positions"] += 1000
    return old


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("codes.positions"), "does not decode to images"),
        (without("labels"), "has no tensor 'labels'"),
        (spoilt, "does not decode to images"),
        (wrong("shape", [1, 8]), "shape is [1, 8], a list of C, H and W, each in 1..1024, is needed"),
        (wrong("shape", [2, 8, 8]), "does not decode to images"),
        (wrong("class_names", []), "a list of at least one name is needed"),
        (wrong("decoder", "canary.Net"), "decoder is 'canary.Net', a mapping of class_path and init_args is needed"),
        (wrong("decoder", {"class_path": "os.system", "init_args": {}}), "'os.system' is no Decoder: choose from"),
        (wrong("decoder", {"class_path": "Frequencies", "init_args": {"kept": "x"}}), "kept"),
        (wrong("decoder", {"class_path": "Bases", "init_args": {"of": 1}}), "unexpected keyword argument 'of'"),
    ],
)
def test_an_odd_file_is_one_line(change, said: str, here: Path, capsys) -> None:
    there_and_back(made(Frequencies(16)), capsys)
    rewrite(Path(FILE), Path("odd.safetensors"), change)
    line = refusal(capsys, "import", "odd.safetensors", "other.safetensors")
    assert "odd.safetensors" in line
    assert said in line
    assert not Path("other.safetensors").exists()


def test_what_is_no_set_of_parameters_is_refused(here: Path, capsys) -> None:
    synthetic = made(Flip())
    synthetic.codes = {"images": synthetic.codes["images"] * float("nan")}
    with pytest.raises(ValueError, match=r"codes\.images has values that are not finite"):
        synthetic.save("set.safetensors")
    synthetic.codes = {}
    with pytest.raises(ValueError, match="codes and the metadata's decoder go together"):
        synthetic.save("set.safetensors")
    synthetic.metadata.pop("decoder")
    synthetic.save("set.safetensors")
    assert "a set parameters is needed here" in refusal(capsys, "import", "set.safetensors", "other.safetensors")
