# %% [markdown]
# # A first distillation, with pictures
#
# 1,294 real digits of 8x8 pixels become ten synthetic ones, one per class. Everything runs on a
# CPU in about two minutes: the settings here are smaller than those of `make demo`, and so are
# the results. The last section asks whether the teachers were worth their time.

# %%
import json
import logging
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")  # before the imports that warn

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer
from torchvision.utils import make_grid

from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticSet,
    TrajectoryMatching,
    TrajectoryStore,
)
from ftd_lightning.callbacks import SyntheticEMA, SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.functional import Augmentation, InnerAdam
from ftd_lightning.models import build_network
from ftd_lightning.modules import BilevelDistillation
from ftd_lightning.core import EvaluationProtocol, accuracies, train_fresh_networks

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)  # images this small keep no second thread busy
folder = Path(tempfile.mkdtemp())
quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
network = {"network": "convnet", "network_options": {"width": 16, "depth": 2}}
# A digit is not its mirror image, and 4 of 8 px cut out would hide too much.
strategy = "crop_scale_rotate"
data = DistillationDataModule(dataset="digits", batch_size=128)
data.setup()
len(data.train.labels), len(data.val.labels), len(data.test.labels)

# %% [markdown]
# ## Teachers
#
# Four networks are trained on the real images towards a flat trajectory (GSAM), and their
# weights are recorded after every epoch.

# %%
began = time.perf_counter()
teachers = FlatTeacher(**network, teachers=4, epochs=15, lr=0.05, rho=0.02, augment=strategy)
recorder = TrajectoryRecorder(str(folder / "teachers"))
Trainer(
    max_epochs=-1, callbacks=[recorder], limit_val_batches=0, num_sanity_val_steps=0, **quiet
).fit(teachers, data)
store = TrajectoryStore(folder / "teachers")
print(f"{len(store)} teachers of {store.epochs} epochs, {store.num_parameters:,} weights each")

# %% [markdown]
# ## Distillation
#
# A student starts from a teacher's weights, takes ten SGD steps on the synthetic images, and
# should land where the teacher stood two epochs later. The images and the step size are learned
# through all ten steps.

# %%
matching = TrajectoryMatching(
    str(folder / "teachers"),
    syn_steps=10,
    expert_epochs=2,
    max_start_epoch=8,
    lr_images=30.0,
    lr_step_size=1e-4,
    step_size_init=0.05,
    augment=strategy,
)
callbacks = [SyntheticEMA(0.98), SyntheticSetWriter(str(folder / "set.safetensors"))]
data = DistillationDataModule(dataset="digits")
Trainer(max_steps=200, callbacks=callbacks, **quiet).fit(matching, data)
seconds = time.perf_counter() - began
synthetic = SyntheticSet.load(folder / "set.safetensors")
print(f"learned step size {float(synthetic.step_size):.4f} (it began at 0.05)")

# %%
rows = {
    "where they began: real digits": synthetic.transform.invert(matching.initial_images),
    "distilled": synthetic.pictures(),
    "distilled, moving average": synthetic.pictures(ema=True),
}
figure, axes = plt.subplots(3, 1, figsize=(7, 3.2), dpi=100, layout="constrained")
for axis, (title, pictures) in zip(axes, rows.items(), strict=True):
    axis.imshow(make_grid(pictures.clamp(0, 1), nrow=10, padding=1).permute(1, 2, 0))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Evaluation
#
# Fresh networks, trained on ten images alone, are measured on the 360 real test images.


# %%
def measure(images, labels, lr):
    fresh = []
    for seed in range(3):
        torch.manual_seed(seed)
        fresh.append(build_network("convnet", 1, 10, 8, width=16, depth=2))
    train_fresh_networks(
        fresh,
        images,
        labels,
        EvaluationProtocol(epochs=300, lr=lr, augment=Augmentation(strategy)),
    )
    measured = torch.tensor(accuracies(fresh, *data.test))
    return f"{100 * measured.mean():.1f} ± {100 * measured.std(correction=0):.1f} %"


step_size = float(synthetic.step_size)
print(
    "ten random real digits   ", measure(matching.initial_images, synthetic.labels, step_size)
)
print("distilled                ", measure(synthetic.images, synthetic.labels, step_size))
print("distilled, moving average", measure(synthetic.ema_images, synthetic.labels, step_size))

# %% [markdown]
# ## A set in one hour: with teachers or without?
#
# RaT-BPTT trains no teachers. It minimises what a set is for, the loss of real images after
# training on it, through a random window of that training. Here it has as many seconds as
# teachers and distillation took together, above; what comes out in so few of them depends on
# the machine.

# %%
bilevel = BilevelDistillation(
    **network,
    syn_steps=60,
    window=15,
    optimizer=InnerAdam(),
    step_size_init=0.003,
    batch_real=256,
    lr_images=0.05,
    lr_step_size=0.0,
    clip=2.0,
    augment=strategy,
)
callbacks = [SyntheticSetWriter(str(folder / "rat.safetensors"))]
data = DistillationDataModule(dataset="digits")
Trainer(max_steps=-1, max_time={"seconds": round(seconds)}, callbacks=callbacks, **quiet).fit(
    bilevel, data
)
without = SyntheticSet.load(folder / "rat.safetensors")
print(f"{bilevel.trainer.global_step} iterations without teachers in the same time")
print("with teachers   ", measure(synthetic.images, synthetic.labels, step_size))
print("without teachers", measure(without.images, without.labels, float(without.step_size)))

# %% [markdown]
# On these digits teachers take seconds, and matching them is the faster way. On all of
# CIFAR-10, with networks of width 32 on one CPU core, ten flat teachers of four epochs take
# half an hour. What an hour gave there, as recorded by `ftd compare --config
# cifar10/compare_hour_w32`:

# %%
records = next(path for path in (Path("notebooks/results"), Path("results")) if path.is_dir())
record = json.loads((records / "compare_hour_w32.json").read_text(encoding="utf-8"))
for row in (row for row in record["rows"] if row["state"] == "done"):
    last = row["accuracy"]["last"]
    mean, std = 100 * last["mean"], 100 * last["std"]
    print(f"{row['label']:28}{mean:.1f} ± {std:.1f} %, {last['n']} networks")
