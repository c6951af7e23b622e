"""Named numerics for voting: the float32 network as it is, compiled, or a bfloat16 copy of it.

A vote under bfloat16 is a vote of another network: certify and predict with the same one, and let the record name it. Noise is
added in float32 by the caller in every case; the cast afterwards is then part of the classifier, and the certificate is sound.
Only networks are converted. A vote rule always works in float32 on their logits, as it does without numerics.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from defenses.api import Classifier
from defenses.ensemble import Ensemble

NUMERICS = ("float32", "float32 compiled", "bfloat16", "bfloat16 compiled")


def under(model: Classifier, numerics: str, batch: int = 100) -> Classifier:
    """The same classifier with networks that run under some numerics; it can vote, and has no gradient.

    Args:
        model: left as it is; a network that several models share is converted once.
        numerics: a name of :data:`NUMERICS`; under "float32" the model itself is returned.
        batch: images per forward pass. Smaller inputs are padded to it and larger ones split, so that code is compiled for one
            shape, and no answer depends on the batch.

    Raises:
        ValueError: for unknown numerics, for a classifier that decides in its own way (only networks and ensembles of them are
            taken apart), and for compiled numerics without a C++ compiler.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"unknown numerics {numerics!r}; known are {', '.join(NUMERICS)}")
    if numerics == "float32":
        return model
    if type(model) is Ensemble:
        return Ensemble([under(member, numerics, batch) for member in model.members], model.rule).eval()
    if type(model).predict is not Classifier.predict or model.randomized:
        raise ValueError(
            f"numerics {numerics!r} are for networks and ensembles of them; {type(model).__name__} decides in its own way"
        )
    return Converted.of(model, numerics, batch)


class Converted(Classifier):
    """One network's logits under some numerics: float32 images (n c h w) -> float32 logits (n k)."""

    _known: ClassVar[WeakKeyDictionary[nn.Module, dict[tuple[str, int], Converted]]] = WeakKeyDictionary()

    def __init__(self, network: Classifier, numerics: str, batch: int) -> None:
        super().__init__()
        dtype = torch.bfloat16 if numerics.startswith("bfloat16") else torch.float32
        own = copy.deepcopy(network).to(dtype).eval()
        self._batch = batch
        self._dtype = dtype
        self._answer: Callable[[Tensor], Tensor] = _compiled(own) if numerics.endswith("compiled") else own

    @classmethod
    def of(cls, network: Classifier, numerics: str, batch: int) -> Converted:
        """The conversion of a network, the same object whenever it is asked for."""
        own = cls._known.setdefault(network, {})
        if (numerics, batch) not in own:
            own[numerics, batch] = cls(network, numerics, batch).eval()
        return own[numerics, batch]

    def forward(self, x: Tensor) -> Tensor:
        # Compiled code folds weights in, which must not be tensors of inference mode, and needs no gradient.
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([self._padded(piece) for piece in x.split(self._batch)])

    def _padded(self, x: Tensor) -> Tensor:
        full = x.new_zeros(self._batch, *x.shape[1:], dtype=self._dtype)
        full[: len(x)] = x
        return self._answer(full)[: len(x)].float()


def _compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network as one compiled graph; with BatchNorm folded into the convolutions, where it has any."""
    if shutil.which("g++") is None and shutil.which("c++") is None and not torch.cuda.is_available():
        raise ValueError("compiled numerics need a C++ compiler (g++); there is none, choose float32")
    from torch._inductor import config

    freezing = any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())

    def answer(x: Tensor) -> Tensor:
        return network(x)

    # Compiled code is remembered by code object, at most eight a piece: each network has one of its own.
    answer.__code__ = answer.__code__.replace(co_name=f"answer_{id(network)}")
    fast = torch.compile(answer, dynamic=False, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=freezing):
            return fast(x)

    return run
