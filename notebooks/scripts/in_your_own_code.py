# %% [markdown]
# # Your own data set, network and Trainer
#
# Suppose that you have a torchvision-style data set, a network of your own (here with
# BatchNorm) and a way to start a Trainer. This notebook distils your data for your network:
# teachers, distillation with an evaluation on the way, and evaluation are three fits.

# %%
import logging
import tempfile
import warnings

warnings.filterwarnings("ignore")  # before the imports that warn

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torchvision.datasets import VisionDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

# %% [markdown]
# ## What you have


# %%
class YourImages(VisionDataset):
    """Pictures as torchvision's data sets give them: PIL images and classes."""

    classes = tuple("0123456789")

    def __init__(self, train):
        super().__init__(root="")
        part = slice(0, 1400) if train else slice(1400, None)
        with np.load(files("ftd_lightning.data") / "digits.npz") as file:
            images, self.targets = file["images"][part], file["labels"][part].tolist()
        self.images = (images * 15.9375).astype("uint8")

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.targets[index]


def your_network():
    layers = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(256, 10))


# %% [markdown]
# ## The whole job
#
# `from_datasets` reads both data sets once; every phase is then a module in an ordinary Trainer
# with your logger and your checkpoints. The modules add their own recorder and set writer where
# you gave none.

# %%
from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticEvaluation,
    TrajectoryMatching,
)
from ftd_lightning.callbacks import EvaluateSynthetic

folder = Path(tempfile.mkdtemp())


def fit(module, name, *callbacks, synthetic=None, **limits):
    data = DistillationDataModule.from_datasets(
        YourImages(train=True), YourImages(train=False), batch_size=64, synthetic=synthetic
    )
    checkpoint = ModelCheckpoint(folder / name, save_last=True)
    trainer = Trainer(
        logger=CSVLogger(folder, name, version=0),
        callbacks=[checkpoint, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.fit(module, data)
    if isinstance(module, SyntheticEvaluation):
        trainer.test(module, data, verbose=False)
    return type(module).load_from_checkpoint(checkpoint.last_model_path, network=your_network)


teacher = fit(
    FlatTeacher(your_network, teachers=3, epochs=15, lr=0.1, rho=0.02, augment=""),
    "teachers",
    max_epochs=-1,
)
matching = TrajectoryMatching(
    folder / "teachers/version_0/trajectories",
    your_network,
    syn_steps=20,
    max_start_epoch=8,
    lr_images=10.0,
    step_size_init=0.1,
    augment="",
)
distilled = fit(
    matching, "distillation", EvaluateSynthetic(2, networks=2, epochs=100), max_steps=200
)
for synthetic in ("random", str(folder / "distillation/version_0/set.safetensors")):
    evaluation = SyntheticEvaluation(your_network, networks=3, augment="", lr=0.05)
    fit(evaluation, "evaluation", synthetic=synthetic, max_epochs=200)
    for name, accuracy in evaluation.results["accuracy"].items():
        mean, std = 100 * accuracy["mean"], 100 * accuracy["std"]
        print(f"trained on 10 images ({name}): {mean:.1f} ± {std:.1f} %")

# %% [markdown]
# `load_from_checkpoint` gave the modules back, with their networks and images:

# %%
print(teacher.network(torch.zeros(2, 1, 8, 8)).shape)
print(distilled.synthetic_set().pictures().shape, distilled.synthetic_set().class_names)

# %% [markdown]
# ## Parts of it
#
# The mathematics needs torch alone: the matching loss is an ordinary differentiable function,
# and GSAM an optimizer.

# %%
from ftd_lightning.functional import chunked_permutations, flatten_parameters, make_generator
from ftd_lightning.functional import trajectory_matching_loss

torch.manual_seed(0)
net = your_network()
start = flatten_parameters(net)
target = start + 0.01 * torch.randn_like(start)
synthetic = distilled.synthetic_set()
images, step_size = (
    synthetic.images.clone().requires_grad_(),
    torch.tensor(0.1, requires_grad=True),
)
batches = chunked_permutations(len(images), 5, make_generator(0))
loss = trajectory_matching_loss(
    net, start, target, images, synthetic.labels, step_size, batches=batches
)
loss.backward()
print(f"loss {float(loss):.3f}, |d loss / d images| {float(images.grad.norm()):.4f}")
print(f"d loss / d step size {float(step_size.grad):.3f}")
