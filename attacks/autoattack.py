"""AutoAttack (Croce & Hein 2020): attacks in turn, each on the images that still stand; versions are data (methods 8.10).

Known differences from the authors' code: a randomised model is judged by its mean prediction on fresh draws, never by one pass;
models of two and three classes work, with the margin where a loss is undefined; work that is done survives a kill.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.apgd import Apgd, ApgdT
from attacks.api import Attack, Search
from attacks.fab import Fab, FabT
from attacks.norms import check_eps
from attacks.norms import norm as norm_named
from attacks.oracle import Oracle, decide
from attacks.square import Square
from attacks.state import State, identity
from attacks.streams import Streams

COMPONENTS: dict[str, tuple[type[Attack], Mapping[str, Any]]] = {
    "apgd_ce": (Apgd, {"loss": "ce"}),
    "apgd_dlr": (Apgd, {"loss": "dlr"}),
    "apgd_t": (ApgdT, {}),
    "fab": (Fab, {}),
    "fab_t": (FabT, {}),
    "square": (Square, {}),
}
"""What a cascade is made of: attacks by name, with the settings of the authors' code."""

VERSIONS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "standard": (("apgd_ce", {}), ("apgd_t", {}), ("fab_t", {}), ("square", {})),
    "plus": (
        ("apgd_ce", {"restarts": 5}),
        ("apgd_dlr", {"restarts": 5}),
        ("fab", {"restarts": 5}),
        ("square", {}),
        ("apgd_t", {}),
        ("fab_t", {}),
    ),
    "rand": (("apgd_ce", {}), ("apgd_dlr", {})),
    "cear": (("apgd_ce", {}), ("apgd_dlr", {}), ("fab", {})),
}
"""Components of each version, in order, with what it changes of them. "cear" is the subset that CEAR's paper runs."""

RAND_DRAWS = 20
"""Noise draws per gradient against a randomised model, unless an :class:`attacks.eot.Eot` around the cascade says otherwise."""


@dataclass(frozen=True)
class Plan:
    """What a cascade does to a model: its components, and what had to be changed of them, in words."""

    version: str
    components: tuple[tuple[str, Attack], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020): APGD on two losses, FAB and Square, each on what the others left standing.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        version: a name of :data:`VERSIONS`, or "custom" with ``attacks``. A randomised model always gets "rand".
        attacks: names of :data:`COMPONENTS`, for "custom".
        steps: iterations of APGD and FAB, for reduced budgets; their own 100 unless given.
        proposals: queries of Square, for reduced budgets; its own 5,000 unless given.
        pieces: images after which finished work is kept; changes no result.
        state: folder in which finished work is kept, so that the same call goes on after a kill.
        engine: "native", or "autoattack" for the authors' code in each component.
    """

    norm: str
    eps: float
    version: str = "standard"
    attacks: tuple[str, ...] = ()
    steps: int | None = None
    proposals: int | None = None
    pieces: int = field(default=50, compare=False)
    state: str | Path | None = field(default=None, compare=False)
    engine: str = "native"

    def __post_init__(self) -> None:
        norm_named(self.norm)
        check_eps(self.eps)
        if self.version != "custom" and self.version not in VERSIONS:
            raise ValueError(f"unknown version {self.version!r}; known are {', '.join(VERSIONS)} and custom")
        if (self.version == "custom") != bool(self.attacks):
            raise ValueError(
                f"`attacks` are for version 'custom' only, and it needs them; got {self.version!r}, {self.attacks}"
            )
        if self.engine not in ("native", "autoattack"):
            raise ValueError(f"AutoAttack has the engines native and autoattack, got {self.engine!r}")
        for name in self.attacks:
            if name not in COMPONENTS:
                raise ValueError(f"unknown component {name!r}; known are {', '.join(COMPONENTS)}")
        if any(number is not None and number < 1 for number in (self.pieces, self.steps, self.proposals)):
            raise ValueError(f"needed: pieces, steps, proposals >= 1; got {self.pieces}, {self.steps}, {self.proposals}")

    @property
    def foreign(self) -> bool:
        """The cascade is always ours; its components ask their engines."""
        return False

    def batch(self, device: torch.device) -> int:
        """All of them: the components make their own batches."""
        return sys.maxsize

    def plan(self, classes: int, randomized: bool = False) -> Plan:
        """The cascade for a model with so many classes.

        Raises:
            ValueError: with fewer than two classes.
        """
        if classes < 2:
            raise ValueError(f"a classifier needs at least two classes, the model has {classes}")
        version = "rand" if randomized else self.version
        notes = [f"the model draws noise: version rand instead of {self.version}"] if version != self.version else []
        parts = tuple((name, {}) for name in self.attacks) if version == "custom" else VERSIONS[version]
        components = []
        for name, changes in parts:
            kind, settings = COMPONENTS[name]
            budget = {"proposals": self.proposals} if kind is Square else {"steps": self.steps}
            given = {key: value for key, value in budget.items() if value is not None}
            attack = kind(norm=self.norm, eps=self.eps, **{**settings, **changes, **given})  # type: ignore[call-arg]
            if isinstance(attack, Apgd | Fab) and attack.targets > classes - 1:
                notes.append(f"{name}: {classes - 1} targets instead of {attack.targets}, there are {classes} classes")
                attack = replace(attack, targets=classes - 1)
            if isinstance(attack, Apgd) and attack.loss_for(classes) != attack.loss:
                notes.append(f"{name}: loss margin instead of {attack.loss}, which {classes} classes do not define")
                attack = replace(attack, loss=attack.loss_for(classes))
                if self.engine != "native":
                    notes.append(f"{name}: left out, the engine {self.engine!r} has no such loss")
                    continue
            components.append((name, replace(attack, engine=self.engine)))  # type: ignore[type-var]
        return Plan(version, tuple(components), tuple(notes))

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if streams is None:
            raise ValueError("AutoAttack is random: pass streams")
        plan = self.plan(oracle.classes(x), oracle.randomized)
        if oracle.randomized and oracle.draws is None:
            oracle = replace(oracle, draws=RAND_DRAWS)
        state = State(self.state, identity(self, plan, oracle, x, y, streams)) if self.state else None
        x_adv, broken_by = x.clone(), torch.full_like(y, -1)
        for number, (name, attack) in enumerate(plan.components):
            rows = (broken_by < 0).nonzero().flatten()
            done = state.load(number, oracle, x_adv, broken_by) if state else rows[:0]
            todo = rows[~torch.isin(rows, done)]
            for some in todo.split(self.pieces) if len(todo) else ():
                noise = streams.take(some).child(name)
                ask = oracle.take(some)
                found = attack.search(ask, x[some], y[some], noise)
                wrong = decide(oracle.model, found.x_adv, noise.child("verdict")) != y[some]
                # What no component breaks shows where the first of them came furthest.
                keep = wrong if number else torch.ones_like(wrong)
                x_adv[some[keep]] = found.x_adv[keep]
                broken_by[some[wrong]] = number
                if state:
                    state.keep(number, some, oracle, x_adv, broken_by)
        # Bad luck under one component's noise must not count: a noisy model gets one more verdict, on all.
        return Search(x_adv, {"broken_by": broken_by}, None if oracle.randomized else broken_by >= 0)
