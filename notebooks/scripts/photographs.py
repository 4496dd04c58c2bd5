# %% [markdown]
# # A folder of photographs
#
# Six hundred photographs of three classes become three synthetic images. The photographs are of
# CIFAR-10, written as files in place of your own.

# %%
import json
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")  # before the imports that warn

from pathlib import Path

import torch
from IPython.display import Image
from torchvision.utils import save_image

from ftd_lightning import SyntheticSet
from ftd_lightning.data import get_dataset

torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
cifar10 = get_dataset("cifar10")  # in the folder "data", downloaded into it if it is not there
pictures, labels = cifar10.load()["train"]
for name in ("automobile", "frog", "ship"):
    place = folder / "photographs" / name
    place.mkdir(parents=True)
    chosen = pictures[labels == cifar10.class_names.index(name)][:200]
    for number, picture in enumerate(chosen):
        save_image(picture / 255, place / f"{number:03}.png")
print(*sorted(path.name for path in (folder / "photographs").iterdir()))

# %% [markdown]
# ## One command
#
# One photograph in five is kept for the test. Teachers are trained on the rest, three images
# learn to lead a network along their trajectories, and fresh networks are trained on them,
# on random photographs and on all. Five minutes are little: an hour gives better images.

# %%
command = ["distill", "photographs", "--ipc", "1", "--out", "set", "--minutes", "5"]
done = subprocess.run(
    [sys.executable, "-m", "ftd_lightning", *command],
    cwd=folder,
    capture_output=True,
    text=True,
    check=True,
)
print(done.stdout)

# %%
Image(folder / "set" / "images.png")

# %% [markdown]
# ## Using the set
#
# The file holds three images as networks see them, their classes, and the transform for all
# other images of such networks.

# %%
synthetic = SyntheticSet.load(folder / "set" / "set.safetensors")
print(synthetic)
found = json.loads((folder / "set" / "results.json").read_text())["accuracy"]
for name, accuracy in found.items():
    print(f"{name:8}{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %")

# %% [markdown]
# ## A set for an encoder
#
# Whoever has a trained encoder keeps it, and trains a linear layer on its features. Here the
# encoder is a small network that has seen CIFAR-10's seven other classes. One image of each of
# our classes is learned for it, and linear layers are trained on these images, on random
# photographs, and on all.

# %%
import logging

from lightning.pytorch import Trainer

from ftd_lightning import DistillationDataModule, FlatTeacher, SyntheticEvaluation
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.decoders import Pyramid
from ftd_lightning.modules import BackboneDistillation

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}
names = sorted(path.name for path in (folder / "photographs").iterdir())
seen = [name for name in cifar10.class_names if name not in names]
others = DistillationDataModule("cifar10", classes=seen, max_per_class=1000)
encoder = str(folder / "encoder")
size = {"width": 32, "depth": 3}
teacher = FlatTeacher(
    network_options=size, teachers=1, epochs=6, lr=0.02, momentum=0.9, rho=0.0
)
Trainer(max_epochs=-1, callbacks=[TrajectoryRecorder(encoder)], **quiet).fit(teacher, others)


def photographs(synthetic=None):
    root = str(folder / "photographs")
    return DistillationDataModule("folder", root, image_size=32, synthetic=synthetic)


learner = BackboneDistillation(encoder, decoder=Pyramid(), augment="crop_flip_scale_rotate")
Trainer(max_steps=200, default_root_dir=folder / "probe", **quiet).fit(learner, photographs())
sets = {
    "random": ("random", 300),
    "learned": (learner.synthetic_set(), 300),
    "all": ("real", 60),
}
for name, (synthetic, epochs) in sets.items():
    probes = SyntheticEvaluation(
        "ftd_lightning.core.LinearProbe",
        {"backbone": encoder},
        networks=3,
        lr=1.0,
        augment="crop_flip_scale_rotate",
        measure_every=0,
    )
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder / name, **quiet)
    trainer.fit(probes, photographs(synthetic))
    trainer.test(probes, photographs(synthetic), verbose=False)
    found = torch.tensor(probes.results["each"])
    print(f"{name:8}{100 * found.mean():.1f} ± {100 * found.std(correction=0):.1f} %")
