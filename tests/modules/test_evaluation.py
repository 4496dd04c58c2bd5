import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import SMALL, make_trainer, small_data
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from ftd_lightning import SyntheticEvaluation, SyntheticSet
from ftd_lightning.core.evaluation import EvaluationProtocol, accuracies, mean_and_std, train_fresh_networks
from ftd_lightning.core.results import stalls
from ftd_lightning.errors import InputError
from ftd_lightning.files.schema import per_cent
from ftd_lightning.functional import Augmentation, flatten_parameters, seeded
from ftd_lightning.models import ConvNet

NONE = Augmentation("")


def fresh(seed: int = 0) -> ConvNet:
    with seeded(seed):
        return ConvNet(1, 10, 8, **SMALL)


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    data = small_data(synthetic="random", ipc=2)
    data.setup()
    return data.synthetic_set.images, data.synthetic_set.labels


def test_the_protocol_is_what_it_says() -> None:
    """Against the update rule written out: momentum 0.9, weight decay 5e-4, x0.1 at half way."""
    images, labels = images_and_labels()
    network, reference = fresh(), fresh()
    train_fresh_networks([network], images, labels, EvaluationProtocol(epochs=6, lr=0.05, augment=NONE))
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for epoch in range(6):
        loss = torch.nn.functional.cross_entropy(reference(images), labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        lr = 0.05 if epoch < 3 else 0.005
        with torch.no_grad():
            for p, g, v in zip(reference.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * v)
    torch.testing.assert_close(flatten_parameters(network), flatten_parameters(reference), rtol=1e-4, atol=1e-6)


def evaluate(folder: Path, data, *, epochs: int = 5, **options) -> SyntheticEvaluation:
    module = SyntheticEvaluation(**{"network_options": SMALL, "networks": 3, "augment": "", **options})
    trainer = make_trainer(folder, max_epochs=epochs)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module


def test_module_and_function_train_the_same_networks(tmp_path: Path) -> None:
    data = small_data(synthetic="random", ipc=2)
    module = evaluate(tmp_path, data)
    with seeded(0, "fresh", 1):
        network = ConvNet(1, 10, 8, **SMALL)
    train_fresh_networks([network], *images_and_labels(), EvaluationProtocol(epochs=5, lr=0.01, augment=NONE))
    torch.testing.assert_close(flatten_parameters(module.networks[1]), flatten_parameters(network))
    assert module.results["each"][1] == pytest.approx(accuracies([network], *data.test)[0])


def test_results_are_written_with_seeds_and_all(tmp_path: Path, caplog) -> None:
    with caplog.at_level("INFO"):
        results = evaluate(tmp_path, small_data(synthetic="random", ipc=1)).results
    accuracy = per_cent(results["accuracy"]["random"])
    assert f"wrote {tmp_path / 'evaluation.json'}: test accuracy {accuracy} %" in caplog.text
    assert results == json.loads((tmp_path / "evaluation.json").read_text())
    assert results["accuracy"]["random"] == mean_and_std(torch.tensor(results["each"]))
    assert len(set(results["seeds"])) == results["accuracy"]["random"]["n"] == 3
    assert results["set"]["dataset"]["name"] == "digits"


def test_a_tested_checkpoint_gives_the_results_of_its_fit(tmp_path: Path) -> None:
    data = small_data(synthetic="random")
    options = {"network_options": SMALL, "networks": 2, "augment": "", "measure_every": 2}
    module, again = SyntheticEvaluation(**options), SyntheticEvaluation(**options)
    trainer = make_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    trainer.test(module, datamodule=data, verbose=False)
    tester = make_trainer(tmp_path)
    tester.test(again, datamodule=small_data(synthetic="random"), ckpt_path=tmp_path / "done.ckpt", verbose=False)
    assert module.results["epochs"] == 4
    assert again.results == module.results
    logits = torch.cat(tester.predict(again, datamodule=data, ckpt_path=tmp_path / "done.ckpt"))
    images, labels = data.test
    assert again(images).shape == (2, len(images), 10)
    torch.testing.assert_close(logits, sum(network(images) for network in module.networks) / 2)
    each = (again(images).argmax(2) == labels).float().mean(1)
    torch.testing.assert_close(each, torch.tensor(module.results["each"]))


def test_untrained_networks_are_not_measured(tmp_path: Path, refused) -> None:
    """The result of a fit would be overwritten by theirs."""
    data, module = small_data(synthetic="random"), SyntheticEvaluation(network_options=SMALL, networks=1)
    for verb in ("test", "validate", "predict"):
        with refused("this SyntheticEvaluation is not trained", "--ckpt_path last"):
            getattr(make_trainer(tmp_path), verb)(module, datamodule=data)
    assert not list(tmp_path.iterdir())
    with refused("no training images are held out", "data.val_fraction"):
        make_trainer(tmp_path).validate(module, datamodule=small_data(synthetic="random", val_fraction=0.0))


def test_other_iterates_are_reported_under_their_own_names(tmp_path: Path) -> None:
    """The last one is the result; one chosen on held-out images and the best on test stand beside it."""
    module = SyntheticEvaluation(network_options=SMALL, networks=2, augment="", lr=0.05, measure_every=2)
    data = small_data(synthetic="random", ipc=2)
    trainer = make_trainer(tmp_path, max_epochs=6)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    results = module.results
    assert [entry["epoch"] for entry in module.history] == [2, 4, 6]
    assert module.history[-1]["test"] == pytest.approx(results["each"]), "measured twice, by loop and by function"
    held_out, test = (np.array([entry[part] for entry in module.history]) for part in ("held_out", "test"))
    chosen = test[held_out.argmax(0), [0, 1]]
    assert results["chosen_on_held_out"]["mean"] == pytest.approx(chosen.mean())
    assert results["best_on_test"]["mean"] == pytest.approx(test.max(0).mean())
    table = (tmp_path / "evaluation.md").read_text().splitlines()
    assert table[0].startswith("| set | network | networks | last iterate | chosen on held-out images | best on test")
    assert table[2].startswith("| random | convnet | 2 | ")


def test_training_ends_once_held_out_accuracy_levels_off(tmp_path: Path, refused) -> None:
    """The rate drops at the first stall, the fit ends at the second, and a resumed one does the same."""
    options = {"networks": 1, "augment": "", "lr": 0.05, "measure_every": 1, "patience": 3}
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, **held_out) -> SyntheticEvaluation:
        module = SyntheticEvaluation(network_options=SMALL, **options)
        data = small_data(synthetic="random", ipc=2, **held_out)
        trainer = make_trainer(folder, max_epochs=epochs, callbacks=[Rates()])
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        trainer.test(module, datamodule=data, verbose=False)
        return module

    whole = fit(tmp_path / "whole", 100)
    held_out = [sum(entry["held_out"]) for entry in whole.history]
    assert whole.results["levelled_off"] is True
    assert whole.results["epochs"] == len(held_out) == len(rates) < 100
    assert stalls(held_out, 3) == 2
    assert stalls(held_out[:-1], 3) == 1
    dropped = next(count for count in range(len(held_out)) if stalls(held_out[:count], 3) == 1)
    assert rates == pytest.approx([0.05] * dropped + [0.005] * (len(rates) - dropped))
    cut = fit(tmp_path / "cut", dropped)
    assert cut.results["levelled_off"] is False
    resumed = fit(tmp_path / "resumed", 100, tmp_path / "cut" / "last.ckpt")
    assert resumed.history == whole.history
    rates.clear()
    fit(tmp_path / "nothing held out", 4, val_fraction=0.0)
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005])
    with refused("patience counts measurements on held-out images: give measure_every, too"):
        SyntheticEvaluation(measure_every=0, patience=3)


@pytest.mark.parametrize(("options", "times"), [({}, 0), ({"measure_every": 2}, 2)])
def test_real_images_are_measured_when_they_are_due(tmp_path: Path, options, times) -> None:
    seen = []

    class Counting(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(0 if self.training else len(x))
            return super().forward(x)

    module = SyntheticEvaluation(lambda: Counting(1, 10, 8, **SMALL), networks=1, compile=False, **options)
    data = small_data(synthetic="random")
    trainer = make_trainer(tmp_path, max_epochs=5)
    trainer.fit(module, datamodule=data)
    assert sum(seen) == times * (len(data.val.labels) + len(data.test.labels))
    assert module.networks[0].training
    trainer.validate(module, datamodule=data, verbose=False)
    assert sum(seen) == times * len(data.test.labels) + (times + 1) * len(data.val.labels)


def test_held_out_images_that_the_set_has_seen_are_labelled(tmp_path: Path) -> None:
    data = small_data(val_fraction=0.0)
    data.setup()
    seen = SyntheticSet(
        *images_and_labels(),
        torch.tensor(0.1),
        class_names=data.class_names,
        transform=data.transform,
        metadata={"method": "mtt", **data.describe()},
    )
    seen.save(tmp_path / "seen.safetensors")
    for synthetic, label in ((str(tmp_path / "seen.safetensors"), True), ("random", False)):
        module = SyntheticEvaluation(network_options=SMALL, networks=1, measure_every=1)
        data = small_data(synthetic=synthetic)
        trainer = make_trainer(tmp_path, max_epochs=2)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        assert ("held_out_seen" in module.results) == label
        assert ("(seen by the set)" in (tmp_path / "evaluation.md").read_text()) == label


@pytest.mark.parametrize("limits", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 8}])
def test_the_learning_rate_drops_at_half_of_the_fit_however_it_is_limited(tmp_path: Path, limits) -> None:
    rates = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = SyntheticEvaluation(network_options=SMALL, networks=1, lr=0.5)
    data = small_data(synthetic="random", ipc=2, batch_size=10)
    make_trainer(tmp_path, callbacks=[Watch()], **limits).fit(module, datamodule=data)
    assert rates == pytest.approx([0.5] * 4 + [0.05] * 4)


@pytest.mark.parametrize(("step_size", "lr", "used"), [(0.07, None, 0.07), (None, None, 0.01), (0.07, 0.3, 0.3)])
def test_the_learned_step_size_is_the_learning_rate(tmp_path, step_size, lr, used) -> None:
    data = small_data()
    data.setup()
    path = tmp_path / "set.safetensors"
    SyntheticSet(
        data.train.images[:10],
        torch.arange(10),
        step_size=None if step_size is None else torch.tensor(step_size),
        class_names=data.class_names,
        transform=data.transform,
    ).save(path)
    module = evaluate(tmp_path, small_data(synthetic=str(path)), epochs=1, lr=lr)
    assert module.results["lr"] == pytest.approx(used)


def test_a_foreign_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    SyntheticSet(torch.zeros(2, 3, 32, 32), torch.arange(2), class_names=["a", "b"]).save(path)
    with pytest.raises(InputError, match=r"set data\.dataset to the set's own"):
        evaluate(tmp_path, small_data(synthetic=str(path)))


class Plain(LightningDataModule):
    """Somebody's own: it knows nothing of synthetic sets, classes or transforms."""

    def loader(self) -> DataLoader:
        images, labels = images_and_labels()
        return DataLoader(TensorDataset(images, labels), batch_size=20)

    train_dataloader = val_dataloader = test_dataloader = loader


def test_it_takes_any_images_and_labels(tmp_path: Path) -> None:
    def network() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    results = evaluate(tmp_path, Plain(), network=network, network_options=None, lr=0.1, epochs=30).results
    assert results["accuracy"]["set"]["mean"] > 0.9, "of the images that it was trained on"
