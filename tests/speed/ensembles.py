"""What a training step of each joint defense costs, as a ratio to members trained by cross-entropy; and how to spend less.

    python -m tests.speed.ensembles [--architecture lenet5|resnet20|resnet18] [--members 3] [--batch N] [--rounds R]
                                    [--defenses adp,gal] [--compile] [--out FILE.json]

A step is the defense's own loss on random images, its backward pass and the optimiser's step. Then three comparisons of the
same members: all as one network (grouped, or by vmap) against one after the other; GAL and EDLCM with one forward pass against
the forms with one more; with ``--compile`` GAL through torch.compile. Works are interleaved, and a ratio is the median of the
rounds' ratios. Time is CPU time of one thread (on CUDA: wall time, synchronised). DVERGE's rounds go through the layers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, stack_module_state, vmap

from bench.registry import registered
from defenses.api import Task
from defenses.edlcm import edlcm, modeless
from defenses.ensemble import Ensemble
from defenses.features import layers
from defenses.gal import GradientAlignment, alignment, gal
from defenses.joint import TrainedTogether, assembled, pair_cosines
from defenses.nets import lay_out
from defenses.together import grouped, one_by_one
from defenses.training import Batch
from tests.speed.timing import Step, Work, arguments, batch_of, report, rows_of

DEFENSES = "naive,adp,gal,smd,dverge,smd_plus,deg,pdd,pdd_deg,edlcm,edlcm_lr,edlcm_lg"
PUBLIC = "two forwards, channels first"
"""How public code of GAL runs, with torch's BatchNorm."""

Loss = Callable[[Ensemble, Batch, Sequence[Any]], dict[str, Tensor]]
Run = Callable[[Any], Tensor]
"""Images that all members see (n c h w), or one batch for each -> logits (m n k)."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None, DEFENSES)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also GAL through torch.compile; minutes of compiling")
    report(parser, {"steps": steps, "arrangements": arrangements, "forms": forms})


# Steps of the defenses


def steps(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each defense: its step, as training takes it, over that of naive."""
    found = registered()
    works: dict[str, Work] = {}
    for name in dict.fromkeys(["naive", *options.defenses.split(",")]):
        known: Any = found[name][0]
        assert isinstance(known, TrainedTogether), f"{name} is no joint defense"
        defense = replace(known, members=options.members)
        part = defense.part(task, 0)
        loss, net = part.loss, part.untrained(task)
        works[name] = Step(net, loss, batch_of(task), _epochs(loss, net, options.rounds))
    return rows_of(works, "naive", options)


def _epochs(loss: Any, net: Ensemble, rounds: int) -> list[int]:
    """Epochs whose distilled layers are spread over the network, for losses that draw one; else the first for ever."""
    if not hasattr(loss, "layer"):
        return [0]
    member: Any = net.members[0]
    wanted = torch.linspace(1, layers(member), rounds).round().tolist()
    return [next(epoch for epoch in itertools.count() if loss.layer(member, epoch) == layer) for layer in wanted]


# Members together


def arrangements(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each work and arrangement of members."""
    nets = list(assembled(task, options.members).train().members)
    weights = [weight for net in nets for weight in net.parameters()]
    stacked, copies = _stacked(nets)
    runs: dict[str, Run] = {"loop": partial(one_by_one, nets), "grouped": partial(grouped, nets), "vmap": stacked}
    own = {"loop": weights, "grouped": weights, "vmap": copies}
    kinds: dict[str, Callable[..., None]] = {"forward": forward, "step": step, "attack": attack}
    kinds["gal"] = partial(aligned, len(nets))
    rows = []
    for name, work in kinds.items():
        works: dict[str, Work] = {way: partial(work, run, own[way], batch_of(task)) for way, run in runs.items()}
        rows += [{"work": name, **row} for row in rows_of(works, "loop", options, calls=3)]
    return rows


def _stacked(nets: Sequence[Any]) -> tuple[Run, list[Tensor]]:
    """The members under vmap, which knows no channels_last, and their stacked weights."""
    copies = [copy.deepcopy(nn.Sequential(net.normalise, net.body)).to(memory_format=torch.contiguous_format) for net in nets]
    weights, buffers = stack_module_state(copies)

    def run(images: Any) -> Tensor:
        shared = isinstance(images, Tensor)
        seen = images if shared else torch.stack(list(images))
        ask = vmap(lambda *given: functional_call(copies[0], given[:2], given[2]), in_dims=(0, 0, None if shared else 0))
        return ask(weights, buffers, seen)

    return run, list(weights.values())


def _errors(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropies (m n) of logits (m n k)."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(len(logits), -1)


def forward(run: Run, weights: Sequence[Tensor], batch: Batch) -> None:
    with torch.no_grad():
        run(batch.x)


def step(run: Run, weights: Sequence[Tensor], batch: Batch) -> None:
    """Gradients of the weights by cross-entropy."""
    torch.autograd.grad(_errors(run(batch.x), batch.y).mean(1).sum(), weights)


def attack(run: Run, weights: Sequence[Tensor], batch: Batch) -> None:
    """The gradient of all members' cross-entropy by the images that they share."""
    x = batch.x.clone().requires_grad_()
    torch.autograd.grad(_errors(run(x), batch.y).sum(), x)


def aligned(members: int, run: Run, weights: Sequence[Tensor], batch: Batch) -> None:
    """Gradients of the weights by GAL, whose loss holds the gradients by the images of each member."""
    leaves = [batch.x.clone().requires_grad_() for _ in range(members)]
    errors = _errors(run(leaves), batch.y)
    gradients = torch.autograd.grad(errors.sum(), leaves, create_graph=True)
    cosines = pair_cosines(torch.stack([gradient.flatten(1) for gradient in gradients]))
    torch.autograd.grad(errors.mean() + 0.5 * cosines.logsumexp(0).mean(), weights)


# Forms of the same loss


def two_forwards(net: Ensemble, batch: Batch, needs: Sequence[Any]) -> dict[str, Tensor]:
    """GAL as public code has it: a forward pass for the gradients, another for cross-entropy, cosines pair by pair."""
    ways = []
    for member in net.members:
        x = batch.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(member(x), batch.y), x, create_graph=True)
        ways.append(gradient.flatten(1))
    cosines = torch.stack([F.cosine_similarity(one, other, dim=-1) for one, other in itertools.combinations(ways, 2)])
    ce = torch.stack([F.cross_entropy(member(batch.x), batch.y) for member in net.members]).mean()
    return {"ce": ce, "alignment": gal.weight * cosines.logsumexp(0).mean()}


def unshared(loss: Loss, *given: Any) -> dict[str, Tensor]:
    """EDLCM with a forward pass of its own for cross-entropy, also where the regulariser's first one would do."""
    with patch("defenses.edlcm.modeless", return_value=False):
        return loss(*given)


def forms(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each form of a loss, over the one with most passes, in the layout of training unless it says else."""
    batch = batch_of(task)
    nets = [replace(defense, members=options.members).part(task, 0).untrained(task).train() for defense in (gal, edlcm)]
    public, still = assembled(task, options.members, gal.slope).train(), copy.deepcopy(nets[0])
    lay_out(public, torch.contiguous_format)
    works: dict[str, Work] = {
        PUBLIC: Step(public, two_forwards, batch),
        "two forwards": Step(nets[0], two_forwards, batch),
        "one forward": Step(nets[0], GradientAlignment(gal.weight, 0.0), batch),
    }
    if options.compile:
        for way, half in (("compiled", False), ("compiled bfloat16", True)):
            # Without running statistics, which torch.func.grad would refuse to move; a batch in train mode does not use them.
            steady = replace_all_batch_norm_modules_(copy.deepcopy(still))
            works[way] = partial(_called, torch.compile(grad(partial(_functional, steady, half))), steady, batch)
    rows = [{"loss": "gal", **row} for row in rows_of(works, PUBLIC, options, calls=3)]
    for row in rows:
        if row["way"].startswith("compiled"):
            row["difference"] = _difference(works[row["way"]](), still, batch)
    if all(modeless(member) for member in nets[1].members):
        loss = edlcm.loss(task)
        works = {"own forward": Step(nets[1], partial(unshared, loss), batch), "shared": Step(nets[1], loss, batch)}
        rows += [{"loss": "edlcm", **row} for row in rows_of(works, "own forward", options, calls=3)]
    return rows


def _called(fast: Callable[..., Any], net: Ensemble, batch: Batch) -> Any:
    return fast([dict(member.named_parameters()) for member in net.members], batch.x, batch.y)


def _difference(found: Any, net: Ensemble, batch: Batch) -> float:
    """Distance of gradients of the weights, one dictionary a member, from the eager ones, over the length of these."""
    parts = GradientAlignment(gal.weight, 0.0)(net, batch, [])
    exact = torch.autograd.grad(torch.stack(list(parts.values())).sum(), [*net.parameters()])
    named = zip(found, net.members, strict=True)
    own = [gradients[name] for gradients, member in named for name, _ in member.named_parameters()]
    one, other = (torch.cat([gradient.detach().flatten() for gradient in way]) for way in (own, exact))
    return float((one - other).norm() / other.norm())


def _functional(net: Ensemble, half: bool, weights: Sequence[dict[str, Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """GAL with torch.func.grad inside, the only form that torch.compile takes as a whole; ``half``: networks under autocast."""

    def summed(x: Tensor, member: nn.Module, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = functional_call(member, own, (x,))
        errors = F.cross_entropy(logits.float(), y, reduction="none")
        return errors.sum(), errors.mean()

    found = [grad(summed, has_aux=True)(x, member, own) for member, own in zip(net.members, weights, strict=True)]
    ways = torch.stack([gradient.flatten(1) for gradient, _ in found])
    return torch.stack([ce for _, ce in found]).mean() + gal.weight * alignment(ways).mean()


if __name__ == "__main__":
    main()
