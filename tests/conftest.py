"""What several tests share: a check of error messages, and the real CIFAR-10 where it lies beside the checkout."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# lightning 2.6 calls names that jsonargparse 4.5 has given others, and warnings are errors here.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

UNPACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"


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


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory):
    """Give a folder in which torchvision finds CIFAR-10; rebuilding it takes under a minute."""
    if not UNPACK.is_file():
        pytest.skip("real CIFAR-10 images are not there: no shared/data/unpack.py beside the checkout")
    root = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, UNPACK, root, "cifar10"], check=True)
    return root


@pytest.fixture(scope="session")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of two plain teachers of four epochs on digits."""
    from fits import record

    return record(tmp_path_factory.mktemp("teachers"))
