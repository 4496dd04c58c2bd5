"""Two processes with gloo on the CPU: what every rank ends with, and what one process would have got."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import make_trainer, record, small_data, small_matching
from lightning.pytorch import Callback

from ftd_lightning import SyntheticSet
from ftd_lightning.callbacks import SyntheticEMA

pytestmark = pytest.mark.slow  # processes

RUN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from fits import make_trainer, small_data, small_matching
from ftd_lightning.callbacks import EvaluateSynthetic, SyntheticEMA, SyntheticSetWriter
from ftd_lightning.functional import InnerAdam
from ftd_lightning.modules import BilevelDistillation

folder = Path({folder!r})
parallel = dict(strategy="ddp", devices=2)
module = {module}
callbacks = [SyntheticEMA(0.9), EvaluateSynthetic(every_n_epochs=1, networks=1, epochs=1), SyntheticSetWriter()]
trainer = make_trainer(folder, callbacks=callbacks, max_steps=5, **parallel)
trainer.fit(module, datamodule=small_data())
final = torch.cat([module.images.detach().flatten(), module.step_size.detach().flatten()])
torch.save(final, folder / f"rank{{trainer.global_rank}}.pt")
"""


def run_on_two(
    folder: Path, *, trajectories: Path | None = None, rules: Sequence[dict[str, Any]] = (), module: str = ""
) -> list[torch.Tensor]:
    """Run a matching on two processes, or another module, given as an expression."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "run.py"
    tests = str(Path(__file__).parent)
    matching = f'small_matching({str(trajectories)!r}, augment="crop_scale", rules={list(rules)!r})'
    text = RUN.format(tests=tests, folder=str(folder), module=module or matching)
    script.write_text(text)
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


class Losses(Callback):
    """Notes the loss of every iteration."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(float(outputs["loss"]))


def test_ranks_match_segments_of_their_own_and_share_the_images(tmp_path: Path) -> None:
    trajectories = record(tmp_path / "teachers")
    first, second = run_on_two(tmp_path / "distil", trajectories=trajectories)
    assert torch.equal(first, second)
    assert {"set.safetensors", "best.safetensors"} <= {path.name for path in (tmp_path / "distil").iterdir()}
    # One process with both segments in every step.
    one = small_matching(trajectories, augment="crop_scale", segments_per_step=2)
    make_trainer(tmp_path / "one", max_steps=5, callbacks=[SyntheticEMA(0.9)]).fit(one, datamodule=small_data())
    expected = torch.cat([one.images.detach().flatten(), one.step_size.detach().view(1)])
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    loaded = SyntheticSet.load(tmp_path / "distil" / "set.safetensors")
    torch.testing.assert_close(loaded.ema_images, one.ema_images, rtol=0, atol=1e-6)
    assert loaded.metadata["settings"]["segments_per_step"] == 2
    alone = small_matching(trajectories, augment="crop_scale")
    make_trainer(tmp_path / "alone", max_steps=5).fit(alone, datamodule=small_data())
    assert (alone.images - one.images).abs().max() > 1e-3, "the second rank's segments must matter"


@pytest.mark.parametrize(
    "labels", [{"class_path": "LearnedLabels", "init_args": {"lr": 2.0}}, {"class_path": "TargetLabels"}]
)
def test_ideas_on_two_ranks_are_those_of_one_process(tmp_path: Path, labels: dict[str, Any]) -> None:
    """Labels, window, choice of the step, and a gate that judges the mean loss: some steps pass it, some do not."""
    trajectories = record(tmp_path / "teachers", epochs=8, lr=0.2)
    ideas = [
        labels,
        {"class_path": "StartWindow", "init_args": {"ceiling": 1, "growth_iterations": 3}},
        {"class_path": "ClosestStep"},
    ]
    losses = Losses()
    one = small_matching(trajectories, augment="crop_scale", segments_per_step=2, rules=ideas)
    make_trainer(tmp_path / "ungated", max_steps=5, callbacks=[losses]).fit(one, datamodule=small_data())
    threshold = sorted(losses.seen)[3] * 1.0001  # refuses one of five
    ideas.append({"class_path": "LossGate", "init_args": {"threshold": threshold}})
    first, second = run_on_two(tmp_path / "distil", trajectories=trajectories, rules=ideas)
    assert torch.equal(first, second)
    one = small_matching(trajectories, augment="crop_scale", segments_per_step=2, rules=ideas)
    make_trainer(tmp_path / "one", max_steps=5, callbacks=[]).fit(one, datamodule=small_data())
    expected = torch.cat([one.images.detach().flatten(), one.step_size.detach().view(1)])
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    loaded, own = SyntheticSet.load(tmp_path / "distil" / "set.safetensors"), one.synthetic_set()
    torch.testing.assert_close(loaded.labels, own.labels, rtol=0, atol=1e-6)
    assert loaded.metadata["gated_steps"] == own.metadata["gated_steps"] >= 1


BILEVEL = {
    "dd": 'schedule="fixed", augment="crop_scale"',
    "rat": "optimizer=InnerAdam(), window=2, clip=1.0, step_size_init=0.01",
}


@pytest.mark.parametrize("options", BILEVEL.values(), ids=BILEVEL)
def test_two_ranks_learn_without_teachers_what_one_process_with_two_networks_does(tmp_path: Path, options: str) -> None:
    from fits import SMALL

    from ftd_lightning.functional import InnerAdam
    from ftd_lightning.modules import BilevelDistillation

    shared = f"network_options={SMALL!r}, syn_steps=4, batch_real=32, {options}"
    first, second = run_on_two(tmp_path / "two", module=f"BilevelDistillation({shared})")
    assert torch.equal(first, second)
    named = {"BilevelDistillation": BilevelDistillation, "InnerAdam": InnerAdam}
    one = eval(f"BilevelDistillation({shared}, networks_per_step=2)", named)
    make_trainer(tmp_path / "one", max_steps=5).fit(one, datamodule=small_data())
    expected = torch.cat([one.images.detach().flatten(), one.step_size.detach().flatten()])
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    loaded = SyntheticSet.load(tmp_path / "two" / "set.safetensors")
    assert loaded.metadata["settings"]["networks_per_step"] == 2
