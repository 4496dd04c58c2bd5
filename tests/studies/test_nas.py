import json
from pathlib import Path

import pytest

import ftd_lightning
from ftd_lightning import DistillationDataModule
from ftd_lightning.errors import InputError
from ftd_lightning.studies import nas
from ftd_lightning.studies.fits import held

WORDS = ["--data.synthetic", "random", "--data.ipc", "2", "--data.max_per_class", "14", "--depths", "[1]", "--widths"]
WORDS += ["[4]", "--epochs", "4", "--real_epochs", "1", "--architectures", "6", "--augment", "crop", "--threads", "1"]


def search(out: Path, *words: str) -> dict:
    nas.main(["--out", str(out), *WORDS, *words])
    return json.loads((out / "nas.json").read_text())


def numbers(results: dict) -> dict:
    return {name: {side: value["mean"] for side, value in sides.items()} for name, sides in results["measured"].items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("nas")
    return folder, search(folder)


def test_a_search_ends_in_correlations_a_table_and_a_plot(straight) -> None:
    folder, results = straight
    assert set(results["correlation"]) == {"top 5", "all"}
    assert (results["compared"], results["of"], results["epochs"]) == (6, 45, {"proxy": 4, "real": 1})
    assert results["chosen"]["architecture"] in results["measured"]
    assert "| synthetic set | 6 |" in (folder / "nas.md").read_text()
    assert (folder / "nas.png").read_bytes().startswith(b"\x89PNG")


def test_the_cost_is_told_before_it_is_paid(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nas, "measure_architecture", stop)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path)
    assert "12 trainings of 6 architectures, 12 left: " in capsys.readouterr().out


def test_a_search_that_was_ended_goes_on_where_it_was(straight, tmp_path: Path, monkeypatch) -> None:
    measure, done = nas.measure_architecture, []

    def until_the_fifth(*args, **kwargs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(args[0])
        return measure(*args, **kwargs)

    monkeypatch.setattr(nas, "measure_architecture", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path)
    monkeypatch.setattr(nas, "measure_architecture", lambda *a, **k: done.append(a[0]) or measure(*a, **k))
    resumed = search(tmp_path)
    assert len(done) == 12, "none twice"
    assert numbers(resumed) == numbers(straight[1])
    assert resumed["correlation"] == straight[1]["correlation"]


def test_a_share_may_be_trained_on_real_images_and_the_result_says_so(tmp_path: Path) -> None:
    results = search(tmp_path, "--real_architectures", "3")
    assert results["compared"] == 3
    assert sum("real" in sides for sides in results["measured"].values()) == 3
    assert len(results["measured"]) == 6


def test_another_search_does_not_mix_with_it(straight) -> None:
    with pytest.raises(InputError, match="of a search with another epochs"):
        search(straight[0], "--epochs", "5")
    with pytest.raises(InputError, match="of a search with another data"):
        search(straight[0], "--data.seed", "1")
    with held(straight[0]), pytest.raises(InputError, match="another process is at work there"):
        search(straight[0])


def test_a_search_is_known_by_its_pictures(tmp_path: Path, image_folder, monkeypatch) -> None:
    """Not by where they lie, nor by where they are decoded to."""
    one, other = (image_folder(tmp_path / name, ["cat", "dog"], seed=seed) for seed, name in enumerate("ab"))
    settings = nas.SearchSettings(out=str(tmp_path), depths=[1], widths=[4], architectures=2)

    def search_in(root: Path, **options) -> nas.Search:
        return nas.Search(settings, DistillationDataModule("folder", str(root), synthetic="random", **options))

    search_in(one).write({})
    search_in(one.rename(tmp_path / "moved"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="of a search with another data, set"):
        search_in(other)
    monkeypatch.setattr(ftd_lightning, "__version__", "9.1.0")
    with pytest.raises(InputError, match="of a search with another version"):
        search_in(tmp_path / "moved")
    for broken in ("[]", "null", '{"settings"', '{"settings": 1, "measured": []}'):
        (tmp_path / "nas.json").write_text(broken)
        assert search_in(tmp_path / "moved").measured == {}


def test_without_a_set_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give data\.synthetic"):
        nas.main(["--out", str(tmp_path), "--data.max_per_class", "14"])
