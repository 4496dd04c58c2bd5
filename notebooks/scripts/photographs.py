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
