"""``ftd label``: the images of ``synthetic: random`` with the labels of the epoch that held-out images choose."""

from pathlib import Path

import torch
from fits import SMALL, refusal, small_data

from ftd_lightning import SyntheticEvaluation, SyntheticSet, TrajectoryStore, cli
from ftd_lightning.data.coresets import teacher_labels
from ftd_lightning.studies.label import label_random_images

PLAIN = {"--data.max_per_class": "14", "--trainer.accelerator": "cpu", "--trainer.enable_progress_bar": "false"}
PLAIN |= {"--model.network_options": '{"width": 4, "depth": 1}', "--epochs": "3"}


def evaluation(**options) -> SyntheticEvaluation:
    return SyntheticEvaluation(**{"network_options": SMALL, "augment": "", **options})


def test_a_set_is_the_random_images_with_labels_of_the_best_epoch(trajectories: Path) -> None:
    options = {"ipc": 2, "seed": 0, "synthetic": "random"}
    data = small_data(**options, trajectories=str(trajectories), teacher=1)
    made = label_random_images(evaluation(lr=0.1), data, networks=2, epochs=40)
    plain = small_data(**options)
    plain.setup()
    assert torch.equal(made.images, plain.synthetic_set.images)
    by = made.metadata["label_teacher"]
    tried = {one["epoch"]: one["mean"] for one in by["held_out_accuracy"]}
    assert list(tried) == [1, 2, 3, 4]
    assert all(one["n"] == 2 and 0 <= one["mean"] <= 1 for one in by["held_out_accuracy"])
    assert by["epoch"] == min(epoch for epoch, mean in tried.items() if mean == max(tried.values()))
    wanted = teacher_labels(TrajectoryStore(trajectories), made.images, teacher=1, epoch=by["epoch"])
    assert torch.equal(made.labels, wanted)
    assert (by["teacher"], made.metadata["method"], made.metadata["labels_made"]) == (1, "random", "teacher")
    assert made.label_description == "soft (teacher)"
    assert made.step_size is None
    made.check("set")


def words(**changes: str) -> list[str]:
    options = {"--config": "digits/evaluate", "--data.trajectories": "trajectories", **PLAIN, **changes}
    return ["label", "set.safetensors", *(word for pair in options.items() for word in pair)]


def test_the_command_can_be_repeated(trajectories: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trajectories").symlink_to(trajectories)
    cli.main(words())
    shown = capsys.readouterr().out.splitlines()
    first = SyntheticSet.load("set.safetensors")
    by = first.metadata["label_teacher"]
    assert len(by["held_out_accuracy"]) == 4
    assert shown[-1] == f"set.safetensors: 10 random images, labels of teacher 0 after epoch {by['epoch']}"
    assert [line.endswith("chosen") for line in shown[-5:-1]] == [epoch == by["epoch"] for epoch in range(1, 5)]
    cli.main(words())
    again = SyntheticSet.load("set.safetensors")
    assert torch.equal(again.labels, first.labels)
    assert again.metadata == first.metadata


BAD = [
    ({"--data.trajectories": "null"}, "give the store of the teachers as data.trajectories"),
    ({"--data.val_fraction": "0"}, "none are held out: give data.val_fraction above 0"),
    ({"--data.seed": "3"}, "its teachers have dataset"),
    ({"--data.teacher": "9"}, "teacher 9 is asked for"),
    ({"--config": "digits/teacher_mtt"}, "is not a config of a SyntheticEvaluation"),
]


def test_bad_input_is_one_line(trajectories: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trajectories").symlink_to(trajectories)
    for changes, said in BAD:
        given = words(**changes)
        if "digits/teacher_mtt" in given:  # which has no such options
            given = [*given[:4], "--data.max_per_class", "14"]
        assert said in refusal(capsys, *given)
        assert not Path("set.safetensors").exists()
    SyntheticSet(torch.zeros(1, 1, 8, 8), torch.tensor([0])).save("set.safetensors")
    before = Path("set.safetensors").read_bytes()
    assert "is there already, and is another set" in refusal(capsys, *words())
    assert Path("set.safetensors").read_bytes() == before
