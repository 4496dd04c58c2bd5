"""``ftd nas``: the space of Table 5, the correlation, what is measured once and what anew."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ftd_lightning
from ftd_lightning import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.models import ConvNet
from ftd_lightning.studies import nas
from ftd_lightning.studies.nas import rank_correlations, sample_architectures, search_space

WORDS = ["--data.synthetic", "random", "--data.ipc", "2", "--data.max_per_class", "14", "--depths", "[1]", "--widths"]
WORDS += ["[4]", "--epochs", "4", "--real_epochs", "1", "--architectures", "6", "--augment", "crop"]


def search(out: Path, *words: str) -> dict:
    nas.main(["--out", str(out), *WORDS, *words])
    return json.loads((out / "nas.json").read_text())


def numbers(results: dict) -> dict:
    return {name: {side: value["mean"] for side, value in sides.items()} for name, sides in results["measured"].items()}


@pytest.fixture
def trained(monkeypatch) -> list:
    """What is trained, one entry for each training."""
    train, done = nas.train_fresh_networks, []
    monkeypatch.setattr(nas, "train_fresh_networks", lambda *a, **k: done.append(a) or train(*a, **k))
    return done


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("nas")
    return folder, search(folder)


def test_the_space_is_that_of_table_5() -> None:
    space = search_space()
    assert len(set(space)) == 720 == 4 * 4 * 3 * 5 * 3
    assert {one.activation for one in space} == {"sigmoid", "relu", "leakyrelu"}
    assert {one.norm for one in space} == {"none", "batch", "layer", "instance", "group"}
    assert {one.pooling for one in space} == {"none", "max", "avg"}
    for one in search_space(widths=[4]):
        ConvNet(3, 10, 32, **one._asdict())


def test_a_draw_is_a_part_of_a_larger_draw(refused) -> None:
    space = search_space()
    few, many = (sample_architectures(space, count, seed=3) for count in (36, 100))
    assert len(set(few)) == 36
    assert set(few) < set(many)
    assert few != sample_architectures(space, 36, seed=4)
    assert [space.index(one) for one in few] == sorted(space.index(one) for one in few)
    for count in (1, 721):
        with refused("ask for 2 to 720"):
            sample_architectures(space, count, seed=0)


def test_correlations_are_spearman_s_over_the_best_by_real_data() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(30, generator=generator, dtype=torch.float64)
    proxy = 0.7 * real + 0.3 * torch.rand(30, generator=generator, dtype=torch.float64)
    proxy[3] = proxy[4]  # a tie
    found = rank_correlations(proxy.tolist(), real.tolist())
    best = real.argsort(descending=True)

    def ranks(values):
        return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2

    for name, count in {"top 5": 5, "top 10": 10, "top 20": 20, "all": 30}.items():
        index = best[:count]
        expected = np.corrcoef(ranks(proxy[index].numpy()), ranks(real[index].numpy()))[0, 1]
        assert found[name] == pytest.approx(expected, abs=1e-4)
    assert rank_correlations([0.1, 0.1, 0.1], [0.1, 0.2, 0.3]) == {"all": None}, "ties have no rank"


def test_a_search_ends_in_correlations_a_table_and_a_plot(straight) -> None:
    folder, results = straight
    assert set(results["correlation"]) == {"top 5", "all"}
    assert (results["compared"], results["of"], results["epochs"]) == (6, 45, {"proxy": 4, "real": 1})
    assert results["chosen"]["architecture"] in results["measured"]
    assert all(0 <= sides[side]["mean"] <= 1 for sides in results["measured"].values() for side in ("proxy", "real"))
    assert "| synthetic set | 6 |" in (folder / "nas.md").read_text()
    assert (folder / "nas.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_that_was_ended_goes_on_where_it_was(straight, tmp_path: Path, trained, monkeypatch) -> None:
    counted = nas.train_fresh_networks

    def until_the_fifth(*args, **kwargs):
        if len(trained) == 5:
            raise KeyboardInterrupt
        counted(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nas, "train_fresh_networks", until_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path)
    assert numbers(search(tmp_path)) == numbers(straight[1])
    assert len(trained) == 12, "none twice"


def test_only_what_differs_is_trained_anew(straight, trained) -> None:
    folder, first = straight
    share = search(folder, "--real_architectures", "3")
    assert (share["compared"], len(share["measured"]), trained) == (3, 6, [])
    assert sum("real" in sides for sides in share["measured"].values()) == 3
    longer = search(folder, "--epochs", "5")
    assert len(trained) == 6, "not those on real images"
    assert numbers(longer) != numbers(first)
    search(folder, "--data.seed", "1")
    assert len(trained) == 6 + 12


def test_a_search_is_known_by_its_pictures(tmp_path: Path, image_folder, trained, monkeypatch) -> None:
    """Not by where they lie, nor by where they are decoded to."""
    one, other = (image_folder(tmp_path / name, ["cat", "dog"], seed=seed) for seed, name in enumerate("ab"))
    options = {"depths": [1], "widths": [4], "architectures": 2, "epochs": 1, "real_epochs": 1}
    settings = nas.SearchSettings(out=str(tmp_path), **options)

    def trainings(root: Path, **options) -> int:
        trained.clear()
        nas.search(settings, DistillationDataModule("folder", str(root), synthetic="random", **options))
        return len(trained)

    assert trainings(one) == 4
    assert trainings(one.rename(tmp_path / "moved"), cache_dir=str(tmp_path / "cache")) == 0
    assert trainings(other) == 4
    monkeypatch.setattr(ftd_lightning, "__version__", "9.1.0")
    assert trainings(tmp_path / "moved") == 4


def test_without_a_set_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give data\.synthetic"):
        nas.main(["--out", str(tmp_path), "--data.max_per_class", "14"])
