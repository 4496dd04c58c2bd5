# %% [markdown]
# # The modules in an existing Lightning code base
#
# Suppose that you have a LightningDataModule, a LightningModule and a way to start a Trainer. This notebook distils
# your data for your network without touching either, and then trains your module on the result.

# %%
import logging
import tempfile
import warnings

warnings.filterwarnings("ignore")  # before the imports that warn

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
torch.manual_seed(0)  # your DataLoader shuffles by the global generator
folder = Path(tempfile.mkdtemp())
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## What is there already

# %%
images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


class YourData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*test), batch_size=256)


def your_network():
    layers = [torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))


class YourModule(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.network, self.lr = your_network(), lr

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


# %% [markdown]
# ## Teachers and distillation
#
# Two of our modules and two callbacks, in your Trainer. A network may be an object, a function that builds one, or an
# import path. The distillation needs real images to start from, since your data module does not hold them as tensors.

# %%
from ftd_lightning import FlatTeacher, SyntheticSet, TrajectoryMatching
from ftd_lightning.callbacks import SyntheticSetWriter, TrajectoryRecorder

teachers = FlatTeacher(your_network, teachers=3, epochs=15, lr=0.1, rho=0.02, augment="")
recorder = TrajectoryRecorder(str(folder / "teachers"))
Trainer(max_epochs=-1, callbacks=[recorder], num_sanity_val_steps=0, **quiet).fit(teachers, YourData())

matching = TrajectoryMatching(
    str(folder / "teachers"),
    your_network,
    ipc=1,
    syn_steps=20,
    max_start_epoch=8,
    lr_images=3.0,
    step_size_init=0.1,
    augment="",
    real=train,
)
Trainer(max_steps=200, callbacks=[SyntheticSetWriter(str(folder / "set.safetensors"))], **quiet).fit(matching)

# %% [markdown]
# ## Your module on ten images
#
# A set is a dataset of (image, label) pairs, and brings the learning rate that it was learned for.

# %%
synthetic = SyntheticSet.load(folder / "set.safetensors")


def train_yours(dataset, epochs, lr):
    torch.manual_seed(0)
    module = YourModule(lr)
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, DataLoader(dataset, batch_size=64, shuffle=True))
    return trainer.test(module, YourData(), verbose=False)[0]["accuracy"]


began = TensorDataset(matching.initial_images, synthetic.labels)
step_size = float(synthetic.step_size)
print(f"ten synthetic images, lr {step_size:.3f}: {100 * train_yours(synthetic.dataset(), 200, step_size):.1f} %")
print(f"the ten real ones they began as:  {100 * train_yours(began, 200, step_size):.1f} %")
print(f"all 1,400 real images:            {100 * train_yours(TensorDataset(*train), 15, 0.05):.1f} %")

# %% [markdown]
# ## Parts of it
#
# The mathematics needs torch alone: the matching loss is an ordinary differentiable function, and GSAM an optimizer.

# %%
from ftd_lightning.functional import chunked_permutations, flatten_parameters, make_generator
from ftd_lightning.functional import trajectory_matching_loss

torch.manual_seed(0)
net = your_network()
start = flatten_parameters(net)
target = start + 0.01 * torch.randn_like(start)
ten, lr = synthetic.images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
steps = chunked_permutations(len(ten), 5, make_generator(0))
loss = trajectory_matching_loss(net, start, target, ten, synthetic.labels, lr, batches=steps)
loss.backward()
print(f"loss {float(loss):.3f}, |d loss / d images| {float(ten.grad.norm()):.4f}, d loss / d lr {float(lr.grad):.3f}")
