"""``ftd rank SET...``: score synthetic sets against random and against all real images, by one recipe for all.

Learning rates are chosen on held-out training images, for each set and for the random images beside it alike. One
training after the other, each written down when it is done: the same command resumes after a kill.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser
from tqdm.auto import tqdm

from ftd_lightning.command_line import spelled_out
from ftd_lightning.data.files import replacing, versions
from ftd_lightning.data.json_files import write_json
from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.studies.fit_steps import held
from ftd_lightning.studies.rank_evaluation import RankEvaluation
from ftd_lightning.studies.rank_plan import RankedSet, cost
from ftd_lightning.studies.rank_report import draw, in_order, markdown
from ftd_lightning.studies.rank_settings import (
    RankData,
    RankSettings,
    choose_augmentation,
    choose_network,
    read_data,
    read_sets,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MEASURED_ON = "test images, after the last epoch; learning rates are chosen on held-out training images"


def prepare(files: Sequence[str], settings: RankSettings, data: RankData) -> list[RankedSet]:
    """Read everything, and refuse what cannot be ranked, before anything is trained.

    Args:
        files: the sets.
        settings: of the ranking.
        data: where the real images are.

    Raises:
        InputError: for files, sets or data that do not fit.
    """
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is not a folder; give another --out")
    sets = read_sets(files)
    augment = choose_augmentation(sets, settings)
    real = read_data(sets, data)
    fresh = choose_network(sets, settings, next(iter(real.values())).description().shape)
    folder = out / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluations: dict[int, RankEvaluation] = {}
    ranked = []
    for name, synthetic in sets.items():
        source = real[name]
        made = RankEvaluation(source, fresh, settings, augment, folder, device)
        ranked.append(RankedSet(name, synthetic, evaluations.setdefault(id(source), made)))
        ranked[-1].random_images(0)  # refuses a set that has more images of a class than there are real ones
    return ranked


def rank_sets(ranked: Sequence[RankedSet], *, progress: int | None = None) -> dict[str, Any]:
    """Train what is left, and return the content of ``rank.json``.

    Args:
        ranked: from :func:`prepare`.
        progress: show a bar over at most so many trainings; None shows none.
    """
    evaluations = {id(one.evaluation): one.evaluation for one in ranked}.values()
    found = {}
    with tqdm(total=progress, unit="training", dynamic_ncols=True, disable=progress is None) as bar:
        for evaluation in evaluations:
            evaluation.done = bar.update
        for one in ranked:
            bar.set_description(one.name)
            found[one.name] = one.score()
    first = ranked[0].evaluation
    settings = {key: value for key, value in asdict(first.settings).items() if key not in ("out", "threads")}
    return {
        "sets": found,
        "settings": {
            **settings,
            "real_epochs": first.real_epochs,
            "network": first.fresh.describe(),
            "augment": first.augment.plain(),
            "protocol": {
                key: value for key, value in asdict(first.protocol(1.0)).items() if key not in ("lr", "augment")
            },
            "dataset": first.data.describe()["dataset"],
        },
        "seeds": [derive_seed(first.settings.seed, "fresh", index) for index in range(first.settings.networks)],
        "measured_on": MEASURED_ON,
        "device": first.device.type,
        "versions": versions(),
    }


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd rank``."""
    parser = ArgumentParser(prog="ftd rank", description=__doc__, default_env=False)
    parser.add_argument("sets", nargs="+", metavar="SET", help="files of synthetic sets")
    parser.add_class_arguments(RankSettings, as_group=False)
    parser.add_class_arguments(RankData, "data")
    parsed = parser.parse_args(spelled_out(RankSettings, arguments)).as_dict()
    settings = RankSettings(**{option.name: parsed[option.name] for option in fields(RankSettings)})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")
    ranked = prepare(parsed["sets"], settings, RankData(**parsed["data"]))
    with held(Path(settings.out)):
        _run(ranked, Path(settings.out))


def _run(ranked: Sequence[RankedSet], out: Path) -> None:
    """Rank sets, and write what was found."""
    settings = ranked[0].evaluation.settings
    small, large, seconds = cost(ranked)
    first = ranked[0].evaluation
    print(
        f"at most {small} trainings of {settings.epochs} epochs on sets and random images, and {large} of "
        f"{first.real_epochs} epochs on all real images: about {seconds / 60:.1f} min on this machine; those in "
        f"{first.folder} are not repeated",
        flush=True,
    )
    results = rank_sets(ranked, progress=small + large)
    table = markdown(results)
    write_json(out / "rank.json", results)
    with replacing(out / "rank.md") as part:
        part.write_text(table, encoding="utf-8")
    draw(results, out / "rank.png")
    print(f"\n{table}\nbest by LRS: {in_order(results)[0][0]}\nresults   {out}")
