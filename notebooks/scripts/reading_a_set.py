# %% [markdown]
# # Reading a distilled set
#
# A set is one file that says what it is. This notebook makes a small one on whitened digits,
# and then forgets how: all that follows reads the file alone (and, for the last part, the
# teachers' store).

# %%
import json
import logging
import subprocess
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")  # before the imports that warn

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticSet,
    TrajectoryMatching,
)
from ftd_lightning.callbacks import SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.functional import Augmentation
from ftd_lightning.models import build_network
from ftd_lightning.core import EvaluationProtocol, accuracies, train_fresh_networks

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def whitened():
    return DistillationDataModule(dataset="digits", root=str(folder), batch_size=128, zca=True)


size = {"network": "convnet", "network_options": {"width": 16, "depth": 2}}
teachers = FlatTeacher(
    **size, teachers=3, epochs=12, lr=0.05, rho=0.02, augment="crop_scale_rotate"
)
recorder = TrajectoryRecorder(str(folder / "teachers"))
fit = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **quiet}
Trainer(max_epochs=-1, callbacks=[recorder], **fit).fit(teachers, whitened())
settings = {"syn_steps": 10, "max_start_epoch": 8, "lr_images": 30.0, "step_size_init": 0.05}
matching = TrajectoryMatching(str(folder / "teachers"), **settings, augment="crop_scale_rotate")
Trainer(
    max_steps=150, callbacks=[SyntheticSetWriter(str(folder / "set.safetensors"))], **quiet
).fit(matching, whitened())

# %% [markdown]
# ## What it says of itself

# %%
synthetic = SyntheticSet.load(folder / "set.safetensors")
print(tuple(synthetic.images.shape), "classes", "".join(synthetic.class_names))
print(f"step size {float(synthetic.step_size):.4f}")
for key in ("method", "dataset", "network", "augmentation", "teachers", "iterations"):
    print(f"{key:14}{synthetic.metadata[key]}")

# %% [markdown]
# ## What networks see, and what people see
#
# The networks were trained on whitened images: neighbouring pixels no longer share information,
# which is why the values below look like noise with edges. The set contains the inverse of the
# whitening, and with it the pictures.

# %%
values = (synthetic.images - synthetic.images.amin()) / (
    synthetic.images.amax() - synthetic.images.amin()
)
figure, axes = plt.subplots(2, 1, figsize=(7, 2.2), dpi=100, layout="constrained")
for axis, title, pictures in zip(
    axes, ("values", "pictures"), (values, synthetic.pictures()), strict=True
):
    axis.imshow(make_grid(pictures, nrow=10, padding=1).permute(1, 2, 0))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
plt.show()
print("transform:", synthetic.transform.describe()["kind"])

# %% [markdown]
# ## Another network
#
# The set was distilled for one network. How much of it serves another? The test images go
# through the set's own transform, which the data module takes from the file.

# %%
data = DistillationDataModule(
    dataset="digits", root=str(folder), synthetic=str(folder / "set.safetensors")
)
data.setup()
others = {
    "ConvNet, as distilled": {"width": 16, "depth": 2},
    "ConvNet, wider": {"width": 64, "depth": 2},
    "ConvNet, no norm": {"width": 16, "depth": 2, "norm": "none"},
    "ConvNet, max pooling": {"width": 16, "depth": 2, "pooling": "max"},
}
step_size = float(synthetic.step_size)
protocol = EvaluationProtocol(
    epochs=200, lr=step_size, augment=Augmentation("crop_scale_rotate")
)
for name, options in others.items():
    fresh = []
    for seed in range(3):
        torch.manual_seed(seed)
        fresh.append(build_network("convnet", 1, 10, 8, **options))
    train_fresh_networks(fresh, synthetic.images, synthetic.labels, protocol)
    measured = torch.tensor(accuracies(fresh, *data.test))
    print(f"{name:24}{100 * measured.mean():.1f} ± {100 * measured.std(correction=0):.1f} %")

# %% [markdown]
# ## The accumulated trajectory error
#
# The paper's question: a student that runs through all segments on the set alone drifts away
# from the teacher. How far?

# %%
command = [sys.executable, "-m", "ftd_lightning", "trajectory-error", "--teachers", "3"]
command += [folder / "set.safetensors", folder / "teachers", "--out", folder]
subprocess.run(command, check=True, capture_output=True)
curve = json.loads((folder / "curve.json").read_text())
figure, axis = plt.subplots(figsize=(5, 2.6), dpi=100, layout="constrained")
labels = {"evaluation": "running through", "distillation": "started afresh from the teacher"}
for key, label in labels.items():
    axis.plot(curve["epochs"], curve["mean"][key], marker=".", label=label)
axis.set(xlabel="teacher epoch", ylabel="loss above the teacher's")
axis.legend(fontsize=8)
plt.show()
mean, std = (curve[key]["epsilon"][-1] for key in ("mean", "std"))
print(f"accumulated error after {curve['epochs'][-1]} epochs: {mean:.2f} ± {std:.2f}")

# %% [markdown]
# ## A set of all of CIFAR-10
#
# Some sets come with these notebooks, each as a file of what was learned alone: here ten
# images, a grid of four small ones each. `ftd import` makes a set of it, which is then what the
# set above is: something to look at, to rank, and to train networks on.

# %%
sets = next(path for path in (Path("sets"), Path("notebooks/sets")) if path.is_dir())
small = sets / "cifar10_ipc1_multi_formation.safetensors"
for command in (["import", small, folder / "cifar.safetensors"], ["info", small]):
    command = [sys.executable, "-m", "ftd_lightning", *map(str, command)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %%
imported = SyntheticSet.load(folder / "cifar.safetensors")
two = imported.pictures().unflatten(0, (10, 4))[:, :2]  # of the four of each class
to_pil_image(make_grid(two.transpose(0, 1).flatten(0, 1), nrow=10, padding=1))
