from pathlib import Path

import pytest
import torch
from fits import Losses, distil, make_trainer, record, small_data, small_matching
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from ftd_lightning import SyntheticSet, TrajectoryStore
from ftd_lightning.callbacks import SyntheticEMA, SyntheticSetWriter
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional import chunked_permutations, make_generator, trajectory_matching_loss
from ftd_lightning.functional.matching import Match
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import trajectory_matching
from ftd_lightning.rules import ClosestStep, LearnedLabels, MatchingRule


def test_two_iterations_are_two_steps_of_sgd_with_momentum(tmp_path: Path, trajectories: Path) -> None:
    """Against the full-graph loss and the update rule written out."""
    module = distil(tmp_path, trajectories, steps=2, syn_batch=4)
    store, network = TrajectoryStore(trajectories), ConvNet(1, 10, 8, width=4, depth=1)
    images, step_size = module.initial_images.clone(), torch.tensor(0.1)
    velocity = [torch.zeros_like(images), torch.zeros(())]
    loader = module.train_dataloader()
    for iteration in range(2):
        segment = loader.draw(iteration)
        inputs = [images.requires_grad_(), step_size.requires_grad_()]
        loss = trajectory_matching_loss(
            network,
            *store.segment(segment["teacher"], segment["start_epoch"], 1),
            images,
            module.labels,
            step_size,
            batches=chunked_permutations(10, 3, make_generator(0, "batches", iteration, 0), batch_size=4),
            unroll="graph",
        )
        gradients = torch.autograd.grad(loss, inputs)
        velocity = [0.5 * v + g for v, g in zip(velocity, gradients, strict=True)]
        images = images.detach() - 10.0 * velocity[0]
        step_size = step_size.detach() - 1e-3 * velocity[1]
    torch.testing.assert_close(module.images.detach(), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.step_size.detach(), step_size, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, trajectories: Path) -> None:
    seen = Losses()
    distil(tmp_path, trajectories, steps=80, callbacks=[seen])
    assert sum(seen.losses[-20:]) < 0.9 * sum(seen.losses[:20])


def test_same_seed_gives_the_same_bits(tmp_path: Path, trajectories: Path) -> None:
    settings = {"steps": 6, "augment": "crop_scale_rotate", "ipc": 2, "syn_batch": 7}
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        writer = SyntheticSetWriter(str(tmp_path / f"{name}.safetensors"))
        distil(tmp_path, trajectories, callbacks=[SyntheticEMA(0.9), writer], **settings, seed=seed)
        files.append(writer.path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_images_start_as_real_ones_of_their_class(tmp_path: Path, trajectories: Path) -> None:
    data = small_data()
    module = distil(tmp_path, trajectories, steps=1, ipc=3, data=data)
    assert torch.equal(module.labels, torch.arange(10).repeat_interleave(3))
    real = data.train.images.flatten(1)
    for image, label in zip(module.initial_images.flatten(1), module.labels, strict=True):
        match = (real == image).all(1).nonzero().squeeze(1)
        assert label in data.train.labels[match]


def test_the_step_size_stays_positive(tmp_path: Path, trajectories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that grows with it, and a learning rate that would take it below 0 at once."""

    def loss(network, start, target, images, labels, step_size, **kwargs):
        return Match(step_size + 0 * images.sum(), 3)

    monkeypatch.setattr(trajectory_matching, "match", loss)
    module = distil(tmp_path, trajectories, steps=3, lr_step_size=1.0)
    assert float(module.step_size.detach()) == pytest.approx(1e-8)


def break_iterations(monkeypatch: pytest.MonkeyPatch, broken: set[int], *, what: str = "loss") -> None:
    """Make the loss, or its gradient alone, NaN in some iterations."""
    real, count = trajectory_matching.match, iter(range(10_000))

    def match(*args, **kwargs):
        value, steps = real(*args, **kwargs)
        if next(count) in broken:
            if what == "loss":
                value = value * float("nan")
            value.register_hook(lambda gradient: gradient * float("nan"))
        return Match(value, steps)

    monkeypatch.setattr(trajectory_matching, "match", match)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(tmp_path, trajectories, monkeypatch, what) -> None:
    break_iterations(monkeypatch, {1, 2}, what=what)
    seen = Losses()
    module = distil(tmp_path, trajectories, steps=4, callbacks=[seen])
    assert torch.equal(seen.images[0], seen.images[1])
    assert torch.equal(seen.images[1], seen.images[2]), "momentum must not move the images either"
    assert not torch.equal(seen.images[2], seen.images[3])
    assert (module.skipped_steps, module.global_step) == (2, 4)
    assert float(module.trainer.callback_metrics["matching/skipped_steps"]) == 2
    assert torch.isfinite(module.images).all()


def test_ten_in_a_row_end_the_run_with_the_last_good_set_on_disk(tmp_path, trajectories, monkeypatch) -> None:
    break_iterations(monkeypatch, set(range(7, 100)))
    writer = SyntheticSetWriter(str(tmp_path / "set.safetensors"))
    seen = Losses()
    with pytest.raises(DivergenceError, match="10 iterations in a row, the last one 16"):
        distil(tmp_path, trajectories, steps=50, callbacks=[seen, writer])
    assert torch.equal(SyntheticSet.load(writer.path).images, seen.images[6])


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"max_start_epoch": 4, "expert_epochs": 2}, {}, "reaches epoch 5, but 4 were recorded"),
        ({"ipc": 14}, {}, r"class 0 has 13 images to train on; this works: \[13,13,"),
        ({"network": "convnet", "network_options": {"width": 8}}, {}, r"its teachers are convnet\(.*width=4"),
        ({}, {"zca": True}, "its teachers have transform .*standardization.* but .*zca"),
        ({"trajectories": Path("nowhere")}, {}, "nowhere: no teachers here"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, trajectories, options, data, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        distil(
            tmp_path, options.pop("trajectories", trajectories), data=small_data(root=str(tmp_path), **data), **options
        )
    assert "\n" not in str(caught.value)


def test_flat_teachers_make_it_ftd(tmp_path: Path, trajectories: Path) -> None:
    assert distil(tmp_path, trajectories, steps=1).method == "mtt"
    flat = record(tmp_path, rho=0.05)
    assert distil(tmp_path / "flat", flat, steps=1).synthetic_set().metadata["method"] == "ftd"


def test_the_set_carries_what_its_use_needs(tmp_path: Path, trajectories: Path) -> None:
    module = distil(tmp_path, trajectories, steps=2, callbacks=[SyntheticEMA(0.9)])
    synthetic = module.synthetic_set()
    assert torch.equal(synthetic.images, module.images)
    assert synthetic.images.data_ptr() != module.images.data_ptr()
    assert torch.equal(synthetic.step_size, module.step_size.detach())
    assert synthetic.ema_images is not None
    assert synthetic.class_names == list("0123456789")
    assert synthetic.metadata["iterations"] == 2
    assert synthetic.metadata["settings"]["syn_steps"] == 3
    assert synthetic.metadata["augmentation"] == {"strategy": "", "mode": "single"}
    assert str(trajectories) not in str(synthetic.metadata), "where the teachers lay is no property of the set"


@pytest.mark.slow
def test_a_compiled_fit_learns_the_same(tmp_path, trajectories) -> None:
    eager = distil(tmp_path, trajectories, steps=3, augment="crop_scale")
    compiled = distil(tmp_path, trajectories, steps=3, augment="crop_scale", compile=True)
    torch.testing.assert_close(compiled.images, eager.images, rtol=1e-3, atol=1e-4)
    assert not torch.equal(compiled.images, eager.images), "nothing was compiled"


@pytest.mark.parametrize("rules", [[], [LearnedLabels(lr=1.0), ClosestStep()]], ids=["plain", "rules"])
def test_steps_in_bf16(tmp_path: Path, trajectories: Path, rules: list[MatchingRule]) -> None:
    """Images move as in float32, nearly; the set says so; a resumed fit has the same bits."""
    options = {"augment": "crop_scale", "step_size_init": 0.02, "rules": rules}
    float32, module = (distil(tmp_path / p, trajectories, **options, precision=p) for p in ("float32", "bf16"))
    moved, alike = (m.images.detach() - m.initial_images for m in (module, float32))
    assert 0.99 < float(torch.cosine_similarity(moved.flatten(), alike.flatten(), dim=0)) < 1 - 1e-6
    assert module.images.dtype == module.step_size.dtype == torch.float32
    assert module.synthetic_set().metadata["settings"]["precision"] == "bf16"
    half = distil(tmp_path / "half", trajectories, steps=3, **options, precision="bf16")
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = small_matching(trajectories, **options, precision="bf16")
    trainer = make_trainer(tmp_path / "rest", max_steps=5)
    trainer.fit(resumed, datamodule=small_data(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.images.equal(module.images)
    assert resumed.step_size.equal(module.step_size)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_what_would_make_another_optimization_of_it_is_refused(tmp_path, trajectories, refused) -> None:
    with refused("accumulate_grad_batches must be 1", "segments_per_step"):
        distil(tmp_path, trajectories, trainer={"accumulate_grad_batches": 2})

    class Own(LightningDataModule):
        in_channels, num_classes, image_size = 1, 10, 8

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4).long()))

    real = (torch.rand(20, 1, 8, 8), torch.arange(10).repeat(2))
    with refused("iterates over its own loader", "from_datamodule"):
        distil(tmp_path, trajectories, real=real, data=Own())


def test_autocast_changes_nothing(tmp_path: Path, trajectories: Path) -> None:
    plain = distil(tmp_path, trajectories, steps=2)
    mixed = distil(tmp_path, trajectories, steps=2, trainer={"precision": "bf16-mixed"})
    assert torch.equal(plain.images, mixed.images)


def test_gradient_clip_val_clips_images_and_step_size_each_by_its_own_norm(tmp_path: Path, trajectories: Path) -> None:
    """In a joint norm the step size's gradient, larger by orders of magnitude, would scale the images' to nothing."""

    def norms(**trainer) -> dict[str, float]:
        module = distil(tmp_path, trajectories, steps=1, trainer=trainer)
        return {name: float(value.grad.norm()) for name, value in module.learned().items()}

    free = norms()
    limit = free["images"] / 2
    assert free["step_size"] > 2 * limit
    assert norms(gradient_clip_val=limit) == pytest.approx({"images": limit, "step_size": limit}, rel=1e-4)
