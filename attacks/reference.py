"""The same attacks by other libraries: AutoAttack's authors' code (pyautoattack, or autoattack), and AdverTorch.

Both have traps, which end here (each is known from running them): they reseed the global generators, one stops the debugger
and coverage, one fills the gradients of parameters, one prints, one needs a function that torch no longer has; FAB returns
points outside the ball; the classes are assumed to be ten. What they return depends on the batch, so that it goes with a record
that says ``rng: foreign``. Forwards and backwards are counted as they are asked, and shared out evenly over the batch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.apgd import Apgd
from attacks.api import Attack, Search
from attacks.fab import Fab
from attacks.gradient import Fgsm, Pgd, step_size
from attacks.losses import loss as loss_named
from attacks.minimum_norm import Ddn, MinimumNorm
from attacks.norms import norm as norm_named
from attacks.norms import per_row
from attacks.oracle import Oracle
from attacks.square import Square
from attacks.streams import Streams, generator

PACKAGES = {"autoattack": ("pyautoattack", "autoattack"), "advertorch": ("advertorch",)}
"""Packages that provide an engine, the preferred one first."""

SLACK = 1e-5
"""Part of the radius by which the rounding of other libraries may miss a ball; more is a breach of the contract."""


class EngineError(ValueError):
    """An engine that is unknown, not installed, or has no such attack."""


def installed() -> dict[str, str]:
    """Engines at hand, each with the package and version that provides it."""
    found = {}
    for engine, packages in PACKAGES.items():
        for package in reversed(packages):
            with contextlib.suppress(PackageNotFoundError):
                found[engine] = f"{package} {version(package)}"
    return found


def check(attack: Attack) -> None:
    """Refuse an attack whose engine cannot run it.

    Raises:
        EngineError: says what is missing, and what there is.
    """
    engine = getattr(attack, "engine", "native")
    if engine == "native":
        return
    known = [name for name, kinds in COUNTERPARTS.items() if any(isinstance(attack, kind) for kind in kinds)]
    if attack.foreign and engine not in known:  # a cascade only hands its engine on
        raise EngineError(
            f"{type(attack).__name__} has no engine {engine!r}; it has native{''.join(f', {name}' for name in known)}"
        )
    if engine not in installed():
        raise EngineError(f"engine {engine!r} is not installed: pip install 'cear-bench[reference]'")


def search(attack: Attack, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
    """Run the attack's counterpart of its engine.

    Raises:
        EngineError: if there is none, or for a model or a limit that it cannot deal with.
    """
    check(attack)
    engine = attack.engine  # type: ignore[attr-defined]
    if oracle.randomized:
        raise EngineError(f"engine {engine!r} judges a noisy model by single passes; use the native engine")
    if oracle.meter is not None and oracle.meter.queries is not None:
        raise EngineError(f"engine {engine!r} keeps no limit of queries; use the native engine")
    attack = _for_classes(attack, oracle.classes(x))
    make = next(make for kind, make in COUNTERPARTS[engine].items() if isinstance(attack, kind))
    seed = int(generator(streams.seed if streams else 0, *(streams.purpose if streams else ())).initial_seed() % 2**31)
    asked = Counted(oracle.model)
    with _contained(oracle.model, seed):
        x_adv = make(attack, asked, x, seed)(x.clone(), y.clone()).detach()
    _share_out(oracle, asked, len(x))
    ball, delta = norm_named(attack.norm), x_adv - x
    length = ball.length(delta)
    # Minimum-norm attacks of these libraries return the nearest point, be it in the ball or not.
    near = (length <= attack.eps * (1 + SLACK)) | isinstance(attack, Fab | MinimumNorm)
    return Search(torch.where(per_row(near, x), (x + ball.project(delta, attack.eps)).clamp(0, 1), x_adv))


def _for_classes(attack: Attack, classes: int) -> Attack:
    """With no more targets than there are wrong classes; the libraries assume ten classes."""
    if isinstance(attack, Apgd) and attack.loss_for(classes) != attack.loss:
        raise EngineError(f"{classes} classes do not define the loss {attack.loss!r}; use the native engine")
    if isinstance(attack, Apgd | Fab) and attack.targets > classes - 1:
        return replace(attack, targets=classes - 1)
    return attack


class Counted(nn.Module):
    """A model that counts its own images, forwards and backwards."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = [model]  # in a list: parameters that are found would be differentiated
        self.forwards = self.backwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.model[0](x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._passed(len(gradient)))
        return logits

    def _passed(self, images: int) -> None:
        self.backwards += images


def _share_out(oracle: Oracle, asked: Counted, images: int) -> None:
    if oracle.meter is None:
        return
    places = torch.arange(images, device=oracle.meter.forwards.device)
    places = places if oracle.places is None else oracle.places
    oracle.meter.forwards[places] += -(-asked.forwards // images)
    oracle.meter.backwards[places] += -(-asked.backwards // images)


@contextlib.contextmanager
def _contained(model: object, seed: int) -> Iterator[None]:
    """Global generators, tracing, printing and the model's gradients, all as they were, whatever the library does."""
    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [weight.requires_grad for weight in weights]
    numbers, others, trace = np.random.get_state(), random.getstate(), sys.gettrace()
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            for weight in weights:
                weight.requires_grad_(False)
            yield
        finally:
            for weight, want in zip(weights, wanted, strict=True):
                weight.requires_grad_(want)
            sys.settrace(trace)
            np.random.set_state(numbers)
            random.setstate(others)


Perturb = Callable[[Tensor, Tensor], Tensor]
NAMES = {"linf": "Linf", "l2": "L2"}


def _authors(module: str) -> Any:
    """A module of the authors' code, from whichever package has it."""
    package = installed()["autoattack"].split()[0]
    return importlib.import_module(f"{package}.{module}")


def _apgd(attack: Apgd, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    names, code = NAMES, _authors("autopgd_base")
    common = dict(norm=names[attack.norm], eps=attack.eps, n_iter=attack.steps, n_restarts=attack.restarts)
    common |= dict(seed=seed, rho=attack.rho, device=x.device)
    if not attack.targets:
        if attack.loss not in ("ce", "dlr"):
            raise EngineError(f"the engine 'autoattack' has the losses ce and dlr, got {attack.loss!r}")
        return code.APGDAttack(model, loss=attack.loss, **common).perturb
    if attack.loss != "dlr":
        raise EngineError(f"the engine 'autoattack' aims at classes with the loss dlr only, got {attack.loss!r}")
    return code.APGDAttack_targeted(model, n_target_classes=attack.targets, **common).perturb


def _fab(attack: Fab, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    kind = _authors("fab_pt").FABAttack_PT
    common = dict(norm=NAMES[attack.norm], eps=min(attack.eps, 1e4), n_iter=attack.steps, n_restarts=attack.restarts)
    common |= dict(alpha_max=attack.bias, eta=attack.overshoot, beta=attack.backward, seed=seed, device=x.device)
    return kind(model, targeted=attack.targets > 0, n_target_classes=attack.targets or 9, **common).perturb


def _square(attack: Square, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    kind = _authors("square").SquareAttack
    common = dict(norm=NAMES[attack.norm], eps=attack.eps, n_queries=attack.proposals, n_restarts=attack.restarts)
    return kind(model, p_init=attack.area, resc_schedule=attack.rescale, seed=seed, device=x.device, **common).perturb


def _advertorch() -> Any:
    """AdverTorch's attacks; it imports a function that torch no longer has, and gets one of ours."""
    importlib.import_module("torch.autograd.gradcheck")
    place = sys.modules["torch.autograd.gradcheck"]
    if not hasattr(place, "zero_gradients"):
        place.zero_gradients = _zero_gradients  # type: ignore[attr-defined]
    return importlib.import_module("advertorch.attacks")


def _zero_gradients(x: Tensor) -> None:
    if isinstance(x, Tensor) and x.grad is not None:
        x.grad.detach_().zero_()


def _pgd(attack: Pgd, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    code = _advertorch()
    function = loss_named(attack.loss)
    common: dict[str, Any] = dict(loss_fn=lambda logits, y: function(logits, y).sum(), eps=attack.eps)
    starts = {"clean": False, {"linf": "random", "l2": "random_images"}[attack.norm]: True}
    if attack.start not in starts:
        raise EngineError(f"in {attack.norm} AdverTorch starts at {' or '.join(starts)}, got {attack.start!r}")
    if isinstance(attack, Fgsm):
        if attack.start != "clean" or attack.norm != "linf":
            raise EngineError("AdverTorch's one-step attack is linf and starts at the image; use the native engine")
        return code.GradientSignAttack(model, **common).perturb
    common |= dict(nb_iter=attack.steps, eps_iter=step_size(attack.step, attack.eps, attack.steps))
    if attack.momentum:
        if attack.norm != "linf":
            raise EngineError("AdverTorch's l2 momentum divides by pixels that did not move: NaN; use the native engine")
        return code.LinfMomentumIterativeAttack(model, decay_factor=attack.momentum, **common).perturb
    kind = {"linf": code.LinfPGDAttack, "l2": code.L2PGDAttack}[attack.norm]
    one = kind(model, rand_init=starts[attack.start], **common).perturb

    def restarts(images: Tensor, y: Tensor) -> Tensor:
        found = one(images, y)
        for _ in range(attack.restarts - 1):
            with torch.no_grad():
                still = model(found).argmax(1) == y
            if not still.any():
                break
            found[still] = one(images[still], y[still])
        return found

    return restarts


def _old_fab(attack: Fab, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    if attack.targets:
        raise EngineError("AdverTorch's FAB is untargeted; use the engine 'autoattack' or the native one")
    common = dict(norm=NAMES[attack.norm], eps=min(attack.eps, 1e4), n_iter=attack.steps, n_restarts=attack.restarts)
    common |= dict(alpha_max=attack.bias, eta=attack.overshoot, beta=attack.backward)
    return _advertorch().FABAttack(model, **common).perturb


def _ddn(attack: Ddn, model: nn.Module, x: Tensor, seed: int) -> Perturb:
    # `quantize` would round every point to 256 levels; ours does not.
    made = _advertorch().DDNL2Attack(model, nb_iter=attack.steps, gamma=attack.gamma, quantize=False)
    return made.perturb


Make = Callable[[Any, nn.Module, Tensor, int], Perturb]

COUNTERPARTS: dict[str, dict[type[Attack], Make]] = {
    "autoattack": {Apgd: _apgd, Fab: _fab, Square: _square},
    "advertorch": {Pgd: _pgd, Fab: _old_fab, Ddn: _ddn},
}
"""Which attacks an engine has, and how its attack of the same settings is made: (attack, model, images, seed) -> perturb."""
