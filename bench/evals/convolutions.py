"""What evaluations of one network's convolutions share: which models have them, and which attacks they can be asked about."""

from __future__ import annotations

from torch import nn

from bench.evals.api import Skipped, Subject, refuse_nearest
from defenses.nets import Network


def one_network(subject: Subject) -> Network:
    """The subject's network.

    Raises:
        Skipped: if the classifier is not a single network of :mod:`defenses.nets`, or has no convolution.
    """
    model = subject.model
    if len(model.members) > 1:
        raise Skipped(f"this looks into the convolutions of one network, the defense has {len(model.members)}")
    if not isinstance(model, Network):
        raise Skipped(f"this looks into the convolutions of a network of the project's own, not into a {type(model).__name__}")
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise Skipped(f"{model.architecture} has no convolution to look into")
    return model


def quiet_network(subject: Subject) -> Network:
    """The subject's network, which draws no noise.

    Raises:
        Skipped: also if it does.
    """
    net = one_network(subject)
    if net.randomized:
        raise Skipped("the network draws noise of its own in evaluation; its variant with inference_noise=none can be asked")
    return net


def check_uses_budget(place: str, attack: str) -> None:
    """Refuse attacks that stop at the nearest adversarial point: next to the boundary any change repairs.

    Raises:
        ValueError: names the key.
    """
    refuse_nearest(place, attack, "where any change makes the network right again", "autoattack or pgd")
