"""KIP and FRePo on two processes: real images of their own, one set, one pool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # processes

RUN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from fits import SMALL, make_trainer, small_data
from lightning.pytorch import Callback
from ftd_lightning import modules

class Draws(Callback):
    def on_train_end(self, trainer, pl_module):
        self.images = pl_module.real_batch(0)[0]

folder = Path({folder!r})
for name, options in (("KernelInducingPoints", dict()), ("FeatureRegression", dict(pool_size=2))):
    draws = Draws()
    module = getattr(modules, name)(network_options=SMALL, batch_target=16, learn_labels=True, **options)
    trainer = make_trainer(folder / name, callbacks=[draws], max_steps=6, strategy="ddp", devices=2)
    trainer.fit(module, datamodule=small_data())
    pool = [] if name != "FeatureRegression" else [
        value for place in range(2) for value in module.pool[place].state_dict().values()
    ]
    found = dict(images=module.images.detach(), targets=module.targets.detach(), draws=draws.images, pool=pool)
    found["start"], found["scores"] = module.initial_images, module.synthetic_set().metadata["scores"]
    torch.save(found, folder / f"{{name}}{{trainer.global_rank}}.pt")
"""


def test_ranks_draw_apart_and_learn_together(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("KernelInducingPoints", "FeatureRegression"):
        one, two = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        assert not torch.equal(one["draws"], two["draws"])
        assert torch.equal(one["images"], two["images"])
        assert torch.equal(one["targets"], two["targets"])
        assert not torch.equal(one["images"], one["start"])
        assert all(torch.equal(a, b) for a, b in zip(one["pool"], two["pool"], strict=True))
        assert one["scores"] == two["scores"]
