"""On a GPU: the numbers of the CPU, no wait within a step, memory that does not grow with the inner steps."""

import copy
from functools import partial

import pytest
import torch
from fits import make_trainer, record, small_data, small_matching, small_teacher

from ftd_lightning import SyntheticEvaluation
from ftd_lightning.core.losses import CompiledPass, CompiledStep
from ftd_lightning.files.transforms import Whitening
from ftd_lightning.functional import (
    Augmentation,
    chunked_permutations,
    flatten_parameters,
    make_generator,
    trajectory_matching_loss,
)
from ftd_lightning.functional.augment import OPERATIONS
from ftd_lightning.models import ConvNet
from ftd_lightning.optim import GSAM
from ftd_lightning.rules import ClosestStep, DropShallow, DropSmallest, LearnedLabels, LossGate, StartWindow

pytestmark = pytest.mark.cuda
DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def full_precision():
    """float32 products are TF32 nowhere but where a test says so."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", OPERATIONS)
def test_augmentation_is_that_of_the_cpu(name):
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    results = [Augmentation(name)(images.to(device), make_generator(0)).cpu() for device in DEVICES]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_tf32_and_autocast_do_not_move_the_sampling_grid(name):
    images = torch.rand(5, 3, 32, 32, device="cuda")
    exact = Augmentation(name)(images, make_generator(0))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = Augmentation(name)(images, make_generator(0))
    torch.testing.assert_close(mixed, exact, rtol=0, atol=1e-6)


def matched(device, *, dtype=torch.float64, steps=6, soft=False, **options):
    """Loss, and its gradients in images and step size, of a small student."""
    torch.manual_seed(0)
    network = ConvNet(3, 4, 16, width=8, depth=2).to(dtype)
    start = flatten_parameters(network)
    images = torch.randn(8, 3, 16, 16, dtype=dtype, device="cpu")
    network, start = network.to(device), start.to(device)
    target = start + 0.1 * torch.randn(start.shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    images, lr = images.to(device).requires_grad_(), torch.tensor(0.1, dtype=dtype, device=device, requires_grad=True)
    labels, batches = torch.arange(8) % 4, chunked_permutations(8, steps, make_generator(0), batch_size=3)
    labels = torch.nn.functional.one_hot(labels).to(device, dtype).mul(0.9).add(0.025) if soft else labels.to(device)
    settings = {"batches": batches, "augment": Augmentation(), "compile": False, **options}
    loss = trajectory_matching_loss(network, start, target, images, labels, lr, **settings)
    return [value.detach().cpu() for value in (loss, *torch.autograd.grad(loss, (images, lr)))]


def test_matching_is_that_of_the_cpu_and_of_the_full_graph():
    expected = matched("cpu")
    for options in ({}, {"unroll": "graph"}):
        for value, wanted in zip(matched("cuda", **options), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-11)


IDEAS = {
    "mask by depth": [DropShallow(rate=0.3)],
    "mask by error": [DropSmallest(rate=0.25)],
    "choice of the step": [ClosestStep()],
}


@pytest.mark.parametrize("rules", IDEAS.values(), ids=IDEAS)
def test_ideas_are_those_of_the_cpu(rules):
    expected = matched("cpu", rules=rules, soft=True)
    for value, wanted in zip(matched("cuda", rules=rules, soft=True), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-11)


def test_memory_of_datm_with_fifty_images_of_a_hundred_classes():
    """Its settings for CIFAR-100, where the published code runs out of 80 GB; see also test_stand_in.py."""
    network = ConvNet(3, 100, 32, width=128, depth=3).cuda()
    start = flatten_parameters(network)
    images = torch.randn(5000, 3, 32, 32, device="cuda", requires_grad=True)
    logits = torch.randn(5000, 100, device="cuda", requires_grad=True)
    lr = torch.tensor(0.01, device="cuda", requires_grad=True)
    batches = chunked_permutations(5000, 80, make_generator(0), batch_size=1000)
    torch.cuda.reset_peak_memory_stats()
    loss = trajectory_matching_loss(
        *(network, start, start + 0.01, images, torch.softmax(logits, 1), lr),
        batches=batches,
        augment=Augmentation(),
        compile=False,
    )
    loss.backward()
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"peak of an iteration: {gib:.2f} GiB")
    assert gib < 6
    assert float(logits.grad.norm()) > 0


@pytest.mark.parametrize("compiles", [True, "cuda_graphs"])
def test_compiled_matching_is_the_eager_one(compiles):
    expected = matched("cuda", dtype=torch.float32)
    for _ in range(2):  # CUDA graphs are recorded first and replayed then
        found = matched("cuda", dtype=torch.float32, compile=compiles)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)


def test_memory_is_level_in_the_inner_steps():
    def peak(steps):
        torch.cuda.reset_peak_memory_stats()
        matched("cuda", dtype=torch.float32, steps=steps)
        return torch.cuda.max_memory_allocated()

    matched("cuda", dtype=torch.float32)  # what libraries keep for good
    assert peak(40) < 1.3 * peak(4)


def test_gsam_is_that_of_the_cpu():
    network = ConvNet(1, 4, 8, width=4, depth=1).double()
    images, labels = torch.randn(6, 1, 8, 8).double(), torch.arange(6) % 4
    trained = []
    for device in DEVICES:
        own = copy.deepcopy(network).to(device)
        optimizer = GSAM(own.parameters(), partial(torch.optim.SGD, lr=0.1), rho=0.05, alpha=0.3)

        def closure(own=own, device=device):
            loss = torch.nn.functional.cross_entropy(own(images.to(device)), labels.to(device))
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        trained.append(flatten_parameters(own).cpu())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-8, atol=1e-10)


def test_compiled_steps_of_gsam_are_the_eager_ones():
    torch.manual_seed(0)
    network = ConvNet(1, 4, 8, width=4, depth=1).cuda()
    images, labels = torch.randn(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 4
    trained = []
    for whole in (False, True):
        own = copy.deepcopy(network)
        optimizer = GSAM(own.parameters(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), rho=0.05, alpha=0.3)
        step = CompiledStep(own, optimizer, images.device, len(labels))
        eager = CompiledPass(own, False, images.device)

        def closure(whole=whole, step=step, eager=eager, optimizer=optimizer):
            if whole:
                return step(images, labels)[0]
            return eager(images, labels, perturbed=optimizer.perturbed, backward=torch.Tensor.backward)[0]

        for _ in range(4):  # CUDA graphs are recorded first and replayed then
            optimizer.step(closure)
        trained.append(flatten_parameters(own))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-5)


def test_whitening_is_that_of_the_cpu():
    whitening = Whitening.fit(torch.rand(200, 3, 8, 8), eps=0.1)
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(whitening.apply(images.cuda()).cpu(), whitening.apply(images), rtol=1e-3, atol=1e-4)


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """What is recorded before a teacher's first step has to leave the device; a step does not."""
    from lightning.pytorch import Callback

    from ftd_lightning import FlatTeacher

    class NoWait(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx:  # counts and logged values are moved to the device in the first iteration
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    def without_waiting(step):
        def training_step(self, *args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return training_step

    monkeypatch.setattr(FlatTeacher, "training_step", without_waiting(FlatTeacher.training_step))
    trajectories = record(tmp_path, epochs=4)
    teacher = small_teacher(epochs=1, rho=0.05, augment="crop_flip", compile=False)
    rules = [LearnedLabels(lr=1.0), StartWindow(ceiling=1, growth_iterations=3), LossGate(threshold=2.0)]
    evaluation = {"max_epochs": 3, "limit_val_batches": 0, "callbacks": [NoWait()]}
    fits = [
        (teacher, {}, {}),  # its whole step is its training_step
        (small_matching(trajectories, compile=False), {}, {"max_steps": 4, "callbacks": [NoWait()]}),
        (small_matching(trajectories, compile=False, rules=rules), {}, {"max_steps": 4, "callbacks": [NoWait()]}),
        (SyntheticEvaluation(networks=2), {"synthetic": "random"}, evaluation),
    ]
    for index, (module, data, options) in enumerate(fits):
        settings = {"accelerator": "gpu", "max_epochs": -1, **options}
        make_trainer(tmp_path / str(index), **settings).fit(module, datamodule=small_data(**data))
