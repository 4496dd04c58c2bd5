"""What several tests share: a check of error messages, and real images where they lie beside the checkout."""

import functools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# lightning 2.6 calls names that jsonargparse 4.5 has given others, and warnings are errors here.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# Tensors here are small: a second thread gains little, and costs a multiple where anything else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"


def pytest_collection_modifyitems(items):
    """Mark what waits for real images to be unpacked as slow; skip what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("cuda")]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    for item in items:
        if {"cifar_root", "tiny_root", "imagenet_root"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def default_precision():
    """Undo what the ``ftd`` command sets for its process: files record it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_float32_matmul_precision("highest")


@pytest.fixture
def doubles():
    """Compute in float64."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """Give the user's cache folder of this session, which decoded images and whitenings go to."""
    folder = tmp_path_factory.mktemp("cache")
    # matplotlib would look for all fonts again.
    os.environ.setdefault(
        "MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "matplotlib").expanduser())
    )
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder / "ftd_lightning"


@pytest.fixture
def command():
    """Give ``command(*arguments, cwd=None, env=None)``, which runs ``ftd`` in a process of its own that starts at once.

    It gives a ``subprocess.CompletedProcess`` with the exit code (negative for a signal), stdout and stderr as text::

        done = command("info", path, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "ftd: error: ...")

    ``command.start(...)`` gives the ``processes.Running`` instead, with poll, send_signal, wait_for(condition) and
    wait; what still runs at the end of the test is killed. ``processes.on_ranks(function, ...)`` does the same for
    several ranks of DDP. Most tests need no process: ``cli.main([...])`` with ``pytest.raises(SystemExit)`` is faster.
    """
    from processes import start_ftd

    running = []

    def start(*arguments, **options):
        running.append(start_ftd(*arguments, **options))
        return running[-1]

    def run(*arguments, timeout=300, **options):
        return start(*arguments, **options).wait(timeout)

    run.start = start
    yield run
    for one in running:
        one.close()


@pytest.fixture(scope="session")
def refused():
    """Give ``refused(*parts)``: a block has to raise an InputError of one line in which every part occurs."""
    from ftd_lightning.errors import InputError

    @contextmanager
    def check(*parts):
        with pytest.raises(InputError) as caught:
            yield caught
        message = str(caught.value)
        assert message.strip()
        assert "\n" not in message
        for part in parts:
            assert str(part) in message

    return check


def unpacked(root, name, title):
    """Unpack a set of real images into a folder, or skip."""
    if not UNPACK.is_file():
        pytest.skip(f"real {title} images are not there: no shared/data/unpack.py beside the checkout")
    subprocess.run([sys.executable, UNPACK, root, name], check=True)
    return root


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory):
    """Give a folder in which torchvision finds CIFAR-10; rebuilding it takes under a minute."""
    return unpacked(tmp_path_factory.mktemp("cifar"), "cifar10", "CIFAR-10")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """Give a folder with tiny-imagenet-200: 10 of its classes, 500 images to train and 50 to test of each."""
    return unpacked(tmp_path_factory.mktemp("tiny"), "tiny", "Tiny ImageNet")


@pytest.fixture(scope="session")
def imagenet_root(tmp_path_factory):
    """Give a folder with imagenet/{train,val}: the classes of imagenette, 50 and 20 images of each."""
    return unpacked(tmp_path_factory.mktemp("ilsvrc"), "imagenet", "ImageNet")


@pytest.fixture(scope="session")
def merged():
    """Give ``merged(config, *arguments)``: what ``ftd fit --config`` reads, with all defaults, as plain values.

    The parser is built once, and nothing is instantiated.
    """
    from lightning.pytorch import LightningDataModule, LightningModule

    from ftd_lightning.lightning_cli import FTDCLI

    class ParserOnly(FTDCLI):
        def parse_arguments(self, parser, args):
            raise StopIteration(parser)

    try:
        ParserOnly(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=[])
    except StopIteration as stop:
        parser = stop.value

    @functools.cache
    def read(config, *arguments):
        return parser.parse_args(["fit", "--config", str(config), *arguments]).as_dict()["fit"]

    return read


@pytest.fixture(scope="session")
def image_folder():
    """Give ``image_folder(root, classes, ...)``, which writes noise as images, a folder a class, and gives root."""
    import numpy as np
    from PIL import Image

    def write(root, classes, *, count=4, size=(12, 12), mode="RGB", ending="png", inner="", seed=0):
        numbers = np.random.default_rng(seed)
        for name in classes:
            (root / name / inner).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                image = Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8))
                image.save(root / name / inner / f"{name}_{i}.{ending}", "JPEG" if ending == "JPEG" else "PNG")
        return root

    return write


@pytest.fixture(scope="session")
def run_phases():
    """Give ``run_phases(folder, depth, **data)``: teachers, two iterations and an evaluation on a part of some images.

    It gives the store, the set and the accuracies of the evaluation.
    """
    from fits import make_trainer

    from ftd_lightning import (
        DistillationDataModule,
        FlatTeacher,
        SyntheticEvaluation,
        SyntheticSet,
        TrajectoryMatching,
        TrajectoryStore,
    )
    from ftd_lightning.callbacks import SyntheticSetWriter, TrajectoryRecorder

    def run(folder, depth, **options):
        def data(**more):
            part = {"max_per_class": 10, "batch_size": 32, "download": False}
            return DistillationDataModule(**{**part, **options, **more})

        network = {"network_options": {"width": 8, "depth": depth}}
        teacher = FlatTeacher(**network, teachers=1, epochs=2, lr=0.02, rho=0.01)
        make_trainer(folder, callbacks=[TrajectoryRecorder()]).fit(teacher, datamodule=data())
        matching = TrajectoryMatching(
            str(folder / "trajectories"), syn_steps=2, expert_epochs=1, max_start_epoch=1, iterations_per_epoch=2
        )
        make_trainer(folder, callbacks=[SyntheticSetWriter()], max_steps=2).fit(matching, datamodule=data())
        evaluation = SyntheticEvaluation(**network, networks=1)
        trainer, images = make_trainer(folder, max_epochs=2), data(synthetic=str(folder / "set.safetensors"))
        trainer.fit(evaluation, datamodule=images)
        trainer.test(evaluation, datamodule=images, verbose=False)
        synthetic = SyntheticSet.load(folder / "set.safetensors")
        return TrajectoryStore(folder / "trajectories"), synthetic, evaluation.results["each"]

    return run


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of two plain teachers of four epochs on digits."""
    from fits import record

    return record(tmp_path_factory.mktemp("teachers"))
