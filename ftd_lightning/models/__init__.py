"""Networks of the paper, a dict of their constructors, and anyone's own by import path."""

from ftd_lightning.models.alexnet import AlexNet
from ftd_lightning.models.convnet import ConvNet
from ftd_lightning.models.description import describe_network, parameter_shapes, same_network
from ftd_lightning.models.registry import NETWORKS, build_network, find_network
from ftd_lightning.models.resnet import ResNet18
from ftd_lightning.models.vgg import VGG11

__all__ = [
    "NETWORKS",
    "VGG11",
    "AlexNet",
    "ConvNet",
    "ResNet18",
    "build_network",
    "describe_network",
    "find_network",
    "parameter_shapes",
    "same_network",
]
