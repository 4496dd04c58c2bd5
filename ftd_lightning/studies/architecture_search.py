"""Architecture search with a synthetic set as proxy (Sec. 4.4, Table 5): the space, a measurement, the correlation."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.regression import spearman_corrcoef

from ftd_lightning.errors import InputError
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.models.convnet import Activation, Pooling
from ftd_lightning.models.layers import Norm
from ftd_lightning.training.evaluation_protocol import accuracy, mean_and_std, train_fresh_networks
from ftd_lightning.training.fresh_networks import FreshNetworks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ftd_lightning.contracts import DataSource, Images
    from ftd_lightning.training.evaluation_protocol import EvaluationProtocol

DEPTHS, WIDTHS = (1, 2, 3, 4), (32, 64, 128, 256)
TOPS = (5, 10, 20)


class Architecture(NamedTuple):
    """A ConvNet of the space."""

    depth: int
    width: int
    activation: str
    norm: str
    pooling: str

    @property
    def name(self) -> str:
        """Its options, joined by "-"."""
        return "-".join(map(str, self))


def search_space(depths: Sequence[int] = DEPTHS, widths: Sequence[int] = WIDTHS) -> list[Architecture]:
    """List the ConvNets of Table 5: depth x width x 3 activations x 5 norms x 3 poolings, 720 in all.

    Example:
        >>> len(search_space()), search_space()[0].name
        (720, '1-32-sigmoid-none-none')
    """
    choices = (get_args(kind) for kind in (Activation, Norm, Pooling))
    return [Architecture(*options) for options in itertools.product(depths, widths, *choices)]


def sample_architectures(space: Sequence[Architecture], count: int | None, *, seed: int) -> list[Architecture]:
    """Draw some without replacement, in the space's order; None takes all. A smaller draw is part of a larger one.

    Raises:
        InputError: for more than there are, or fewer than 2, which have no rank.

    Example:
        >>> len(sample_architectures(search_space(), 36, seed=0))
        36
    """
    if count is None:
        return list(space)
    if not 2 <= count <= len(space):
        raise InputError(f"{count} architectures are asked for, the space has {len(space)}: ask for 2 to {len(space)}")
    drawn = torch.randperm(len(space), generator=make_generator(seed, "architectures"))[:count]
    return [space[index] for index in sorted(drawn.tolist())]


def training_flops(network: nn.Module, image: Tensor) -> int:
    """Count the floating-point operations that training takes for one image: three forward passes.

    Args:
        network: any.
        image: (1, C, H, W).

    Example:
        >>> import torch
        >>> training_flops(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))
        48
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return 3 * int(counter.get_total_flops())


def rank_correlations(
    proxy: Sequence[float], real: Sequence[float], *, tops: Sequence[int] = TOPS
) -> dict[str, float | None]:
    """Correlate two rankings of the same architectures (Spearman), over the best ones and over all.

    Convention: the top k are the k best *by the real data*, as the paper's question is how well the proxy orders good
    architectures; the paper does not say whose top it takes. Equal accuracies share their mean rank.

    Args:
        proxy: accuracy of each when trained on the synthetic set.
        real: accuracy of each when trained on real images.
        tops: values of k; those above the number of architectures are left out.

    Returns:
        {"top 5": .., "all": ..}, in [-1, 1]; None where all accuracies of one side are equal.

    Example:
        >>> correlations = rank_correlations([0.1, 0.3, 0.2, 0.4], [0.5, 0.6, 0.7, 0.8], tops=[2])
        >>> {top: round(value, 3) for top, value in correlations.items()}
        {'top 2': 1.0, 'all': 0.8}
    """
    ours, theirs = torch.tensor(proxy, dtype=torch.float64), torch.tensor(real, dtype=torch.float64)
    best = theirs.argsort(descending=True, stable=True)
    counts = {f"top {k}": k for k in tops if k < len(best)} | {"all": len(best)}
    result: dict[str, float | None] = {}
    for name, count in counts.items():
        a, b = ours[best[:count]], theirs[best[:count]]
        tied = bool((a == a[0]).all() or (b == b[0]).all())
        result[name] = None if tied else float(spearman_corrcoef(a, b))
    return result


def measure_architecture(
    architecture: Architecture,
    data: DataSource,
    images: Images,
    protocol: EvaluationProtocol,
    *,
    side: str,
    networks: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train networks of one architecture together on images and measure them on the test images.

    Args:
        architecture: what to build.
        data: set up; gives shapes and test images.
        images: synthetic or real ones to train on, on the device.
        protocol: of the training.
        side: name of what they are, "proxy" or "real": both draw initialisations and augmentation of their own, so that
            chance does not correlate them.
        networks: how many, trained together.
        seed: decides initialisations, batches and augmentation.
        device: where to train.

    Returns:
        {"mean", "std", "n", "seconds"}.
    """
    began = time.perf_counter()
    fresh = FreshNetworks("convnet", architecture._asdict(), data.description().shape)
    built = [fresh.build(seed, side, architecture.name, index).to(device) for index in range(networks)]
    draws = derive_seed(seed, side, architecture.name, "training")
    # Not compiled: each architecture would be compiled anew for a few hundred steps.
    train_fresh_networks(built, *images, protocol, seed=draws, compile=False)
    test = [part.to(device) for part in data.part("test")]
    accuracies = torch.tensor([accuracy(network, *test) for network in built])
    return {**mean_and_std(accuracies), "seconds": round(time.perf_counter() - began, 3)}


def nas_table(results: Mapping[str, Any]) -> str:
    """Lay correlations and times out as a Markdown table.

    Example:
        >>> print(nas_table({"correlation": {"all": 0.5}, "minutes": {"proxy": 2.0, "real": 9.0}, "compared": 4}))
        | trained on | architectures | all | minutes |
        | --- | --- | --- | --- |
        | synthetic set | 4 | 0.50 | 2.0 |
        | real images | 4 | 1.00 | 9.0 |
        <BLANKLINE>
        Accuracy on the test images makes both rankings, as in the paper; top k: the k best by real images.
    """
    tops = list(results["correlation"])
    lines = [["trained on", "architectures", *tops, "minutes"], ["---"] * (len(tops) + 3)]
    for name, side, values in (
        ("synthetic set", "proxy", list(results["correlation"].values())),
        ("real images", "real", [1.0] * len(tops)),
    ):
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append([name, str(results["compared"]), *cells, f"{results['minutes'][side]:.1f}"])
    note = "Accuracy on the test images makes both rankings, as in the paper; top k: the k best by real images."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])
