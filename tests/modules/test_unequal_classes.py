import pytest
import torch
from fits import SMALL, make_trainer, record, small_matching

from ftd_lightning import DistillationDataModule, SyntheticEvaluation, SyntheticSet, modules
from ftd_lightning.commands.info import describe_set
from ftd_lightning.data import get_dataset

TRAIN, TEST, IPC = [20, 20, 6], [12, 8, 4], [3, 1, 2]
FAMILIES = {
    "dm": ("DistributionMatching", {"batch_real": 8}),
    "dsa": ("GradientMatching", {"batch_real": 8, "outer_loops": 2, "inner_epochs": 1}),
    "cafe": ("FeatureAlignment", {"batch_real": 8, "init": "real", "loops": {"kind": "fixed", "inner_max": 1}}),
    "kip": ("KernelInducingPoints", {"batch_target": 16}),
    "frepo": ("FeatureRegression", {"batch_target": 16, "pool_size": 2}),
    "dd": ("BilevelDistillation", {"schedule": "fixed", "syn_steps": 2, "syn_batch": 3, "compile": False}),
}


def long_tail(**options):
    """Three digits, of which the last has few images."""
    found = get_dataset("digits").load()
    parts = []
    for (pictures, labels), counts in ((found["train"], TRAIN), (found["test"], TEST)):
        index = torch.cat([(labels == label).nonzero()[:count, 0] for label, count in enumerate(counts)])
        parts.append((pictures[index], labels[index]))
    return DistillationDataModule.from_datasets(*parts, **{"val_fraction": 0.0, "batch_size": 16, **options})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record(tmp_path_factory.mktemp("tail"), data=long_tail())


def module_of(family, store, ipc):
    if family == "mtt":
        return small_matching(store, ipc=ipc, compile=False)
    kind, options = FAMILIES[family]
    return getattr(modules, kind)(network_options=SMALL, ipc=ipc, **options)


@pytest.mark.parametrize("family", ["mtt", *FAMILIES])
def test_every_family_learns_as_many_images_of_a_class_as_a_list_names(tmp_path, store, refused, family):
    module = module_of(family, store, IPC)
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=long_tail())
    made = SyntheticSet.load(tmp_path / "set.safetensors")
    assert made.metadata["settings"]["ipc"] == IPC
    assert module.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert bool((made.images != module.initial_images).flatten(1).any(1).all())  # every image has moved
    assert "1 to 3 per class" in dict(describe_set(tmp_path / "set.safetensors").rows)["images"]
    if family == "dd":  # the first image of every class, then the second
        assert [batch.tolist() for batch in module._batches(0, 0)] == [[0, 3, 4], [1, 5, 2]]
    for ipc, words in ((7, "class 2 has 6 images to train on; this works: [7,7,6]"), ([1, 2], "names 2 classes")):
        with refused(words):
            make_trainer(tmp_path / "x", max_steps=1).fit(module_of(family, store, ipc), datamodule=long_tail())


def test_balanced_accuracy_is_the_mean_of_recalls_where_test_classes_are_unequal(tmp_path):
    def evaluated(folder, data):
        module = SyntheticEvaluation(network_options=SMALL, networks=2, augment="", lr=0.05)
        trainer = make_trainer(folder, max_epochs=6)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        return module

    data = long_tail(synthetic="random", ipc=IPC)
    module = evaluated(tmp_path, data)
    assert data.synthetic_set.labels.tolist() == [0, 0, 0, 1, 2, 2]
    with torch.no_grad():
        answers = module.eval()(data.test.images).argmax(2)
    recalls = torch.stack([(answers[:, data.test.labels == k] == k).float().mean(1) for k in range(3)])
    found = module.results["balanced_accuracy"]
    assert abs(found["mean"] - module.results["accuracy"]["random"]["mean"]) > 0.01
    expected = {"mean": recalls.mean(), "std": recalls.mean(0).std(correction=0), "n": 2}
    assert found == pytest.approx({key: float(value) for key, value in expected.items()})
    assert "| last iterate | balanced |" in (tmp_path / "evaluation.md").read_text()
    assert "balanced_accuracy" not in evaluated(tmp_path / "equal", long_tail(max_per_class=4)).results
