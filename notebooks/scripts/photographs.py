# %% [markdown]
# # A folder of photographs
#
# Four hundred photographs in a folder of classes become four synthetic ones. The photographs are
# of CIFAR-10, in place of yours: the first cell writes them as files.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from IPython.display import Image
from torchvision.datasets import CIFAR10
from torchvision.utils import save_image

from ftd_lightning import SyntheticSet
from ftd_lightning.data import get_dataset
from ftd_lightning.functional import dsa, make_generator
from ftd_lightning.models import build_network

folder = Path(tempfile.mkdtemp())
names = ("airplane", "automobile", "deer", "ship")
