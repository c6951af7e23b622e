"""Square attack (Andriushchenko et al. 2020): random search with squares, from scores alone (methods 8.8).

Known differences from the authors' code: every image has its own proposals; a square may also touch the last row and column; a
proposal that changes nothing is not asked about (nor counted); an image leaves when it is broken. In l_2 the mass that a window
receives is the authors' rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.api import Attack, Best, Search
from attacks.losses import margin
from attacks.norms import check_eps, per_row, put
from attacks.norms import norm as norm_named
from attacks.oracle import Oracle
from attacks.streams import Streams

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these proposals (of 10,000, and unscaled by default) the area of a square halves."""

AHEAD = {"linf": (1, 1, 2, 2, 2, 2, 4), "l2": (1, 1, 2)}
"""Proposals asked about at once after so many halvings, then as the last says; four times as many on a GPU.

Of the proposals 20 to 35 % are accepted at first, then 3 to 6 % in l_inf and 5 to 10 % in l_2 (LeNet-5 on MNIST): what was
asked beyond an accepted one is wasted, here 2 to 5 %.
"""

STRETCH = 500
"""Proposals whose random numbers are drawn at once."""


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack (Andriushchenko et al. 2020): black-box random search; uses no gradient, so that masking cannot stop it.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in pixel space.
        proposals: squares tried per run; each costs at most one forward pass.
        restarts: runs.
        area: share of the image that the first squares cover (p_init).
        rescale: stretch the schedule of areas, made for 10,000 proposals, to ``proposals``.
        engine: "native", or "autoattack" for the authors' code.
    """

    norm: str
    eps: float
    proposals: int = 5000
    restarts: int = 1
    area: float = 0.8
    rescale: bool = False
    engine: str = "native"

    def __post_init__(self) -> None:
        if self.norm not in MOVES:
            raise ValueError(f"Square knows the norms {', '.join(MOVES)}, got {self.norm!r}")
        check_eps(self.eps)
        if self.proposals < 1 or self.restarts < 1 or not 0 < self.area <= 1:
            raise ValueError(
                f"needed: proposals and restarts >= 1, 0 < area <= 1; got {self.proposals}, {self.restarts}, {self.area}"
            )

    def halvings(self, proposal: int) -> int:
        """How often the area of a square has halved before a proposal (from 0)."""
        at = int(proposal / self.proposals * 10_000) if self.rescale else proposal
        return sum(at > limit for limit in HALVINGS)

    def side(self, proposal: int, shape: torch.Size) -> int:
        """Side of the squares of a proposal (from 0) on images (c h w)."""
        side = round(math.sqrt(self.area / 2 ** self.halvings(proposal) * shape[1] * shape[2]))
        if self.norm == "l2":  # two halves of opposite sign around a middle
            side = max(side, 3)
            side += 1 - side % 2
        return max(1, min(side, *shape[1:]))

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, streams: Streams | None) -> Search:
        if streams is None:
            raise ValueError("Square searches at random: pass streams")
        best = Best(x)
        for restart in range(self.restarts):
            rows = best.standing()
            if len(rows):
                self._search(oracle.take(rows), x[rows], y[rows], rows, best, streams.take(rows).child("restart", restart))
        return Search(best.x_adv)

    def _search(self, oracle: Oracle, x: Tensor, y: Tensor, rows: Tensor, best: Best, streams: Streams) -> None:
        """One run around images ``x``, which are numbers ``rows`` of ``best``.

        Proposals do not depend on what was accepted before, so that several can be asked about at once: the first that
        is better is taken, and what follows is asked anew from there. The end is that of one at a time.
        """
        start, move = MOVES[self.norm]
        # Images of any shape are pictures (c h w): what is missing has length one.
        picture = torch.Size([1] * (3 - (x.ndim - 1)) + list(x.shape[1:]))
        phases = [self.halvings(proposal) for proposal in range(self.proposals)]
        phase = torch.tensor(phases, device=x.device)
        numbers = self._numbers(streams, picture[0]).to(x)
        alive = torch.arange(len(x), device=x.device)
        centre = x.view(-1, *picture)
        here = start(centre, self.eps, streams.child("start"))
        affords = oracle.affords(alive)
        if affords is not None:
            alive, centre, here = alive[affords], centre[affords], here[affords]
            if len(alive) == 0:
                return
        score = self._ask(oracle, here.view(-1, *x.shape[1:]), y, alive)
        at = torch.zeros_like(alive)
        while True:
            over = (at >= self.proposals - 1) | (score > 0 if not oracle.randomized else False)
            affords = oracle.affords(alive)
            over = over if affords is None else over | ~affords
            if over.any():
                won = None if oracle.randomized else score[over] > 0
                best.offer(rows[alive[over]], here[over].view(-1, *x.shape[1:]), score[over], won)
                alive, centre, here, score, at = (state[~over] for state in (alive, centre, here, score, at))
            if len(alive) == 0:
                return
            # Who has accepted more lags behind; squares of one size go together.
            now = phase[at]
            group = (now == now.min()).nonzero().flatten()
            first = int(at[group[0]])
            ahead = self._ahead(phases[first], x.device) if affords is None else 1
            turn = at[group, None] + torch.arange(ahead, device=x.device)
            end = len(phases) - 1 if phases[-1] == phases[first] else next(n for n, p in enumerate(phases) if p > phases[first])
            valid = turn < end
            spot = numbers[alive[group, None], turn.clamp_max(end)].flatten(0, 1)
            base, middle = (state[group].repeat_interleave(ahead, 0) for state in (here, centre))
            proposed, changed = move(base, middle, self.eps, self.side(first, picture), spot)
            asked = (changed & valid.flatten()).nonzero().flatten()
            gain = torch.full_like(base[:, 0, 0, 0], -torch.inf)
            if len(asked):
                who = alive[group].repeat_interleave(ahead)[asked]
                gain[asked] = self._ask(oracle, proposed[asked].view(-1, *x.shape[1:]), y, who)
            better = gain.view(-1, ahead) > score[group, None]
            taken, which = better.any(1), better.int().argmax(1)
            pick = torch.arange(0, len(gain), ahead, device=x.device) + which
            put(here, group, proposed[pick], taken)
            put(score, group, gain[pick], taken)
            at[group] = torch.where(taken, at[group] + which + 1, (at[group] + ahead).clamp_max(end))

    def _ahead(self, phase: int, device: torch.device) -> int:
        """How many proposals are asked about at once."""
        plan = AHEAD[self.norm]
        return plan[min(phase, len(plan) - 1)] * (1 if device.type == "cpu" else 4)

    def _numbers(self, streams: Streams, channels: int) -> Tensor:
        """Uniform numbers (n proposals 5 + c): two places of a window each, a turn, and a sign for every channel."""
        blocks = range(-(-self.proposals // STRETCH))
        return torch.cat([streams.child("stretch").uniform((STRETCH, 5 + channels), block) for block in blocks], 1)

    def _ask(self, oracle: Oracle, points: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """How far the best wrong class leads (n); above 0 where the image is misclassified."""
        with torch.no_grad():
            return margin(oracle.scores(points, rows), y[rows])


def _stripes(centre: Tensor, eps: float, streams: Streams) -> Tensor:
    """Vertical stripes of -eps or eps."""
    signs = streams.signs((centre.shape[1], 1, centre.shape[3])).to(centre)
    return (centre + eps * signs).clamp(0, 1)


def _tiles(centre: Tensor, eps: float, streams: Streams) -> Tensor:
    """Five by five tiles of random sign, scaled to the edge of the ball."""
    _, channels, height, width = centre.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    signs = streams.signs((channels, down, across)).to(centre)
    tiles = signs.repeat_interleave(side, 2).repeat_interleave(side, 3) * _bump(side).to(centre).repeat(down, across)
    delta = torch.zeros_like(centre)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = tiles
    return _to_edge(centre, delta, eps)


def _to_edge(centre: Tensor, delta: Tensor, eps: float) -> Tensor:
    length = norm_named("l2").length(delta) + 1e-12
    return (centre + delta * per_row(eps / length, delta)).clamp(0, 1)


def _window(first: Tensor, second: Tensor, side: int, like: Tensor) -> Tensor:
    """Pixel numbers (n c side^2) of a square window at random places, given by uniform numbers (n)."""
    _, channels, height, width = like.shape
    steps = torch.arange(side, device=like.device)
    rows = ((first * (height - side + 1)).long().clamp_max(height - side))[:, None] + steps
    columns = ((second * (width - side + 1)).long().clamp_max(width - side))[:, None] + steps
    return (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None].expand(-1, channels, -1)


def _signs(numbers: Tensor) -> Tensor:
    return (numbers < 0.5).to(numbers).mul_(2).sub_(1)[:, :, None]


def _shift(here: Tensor, centre: Tensor, eps: float, side: int, spot: Tensor) -> tuple[Tensor, Tensor]:
    """l_inf: every channel of a window moves by 2 eps up or down, as far as ball and box allow."""
    window = _window(spot[:, 0], spot[:, 1], side, here)
    flat, middle = here.flatten(2), centre.flatten(2).gather(2, window)
    old = flat.gather(2, window)
    moved = (middle + (old - middle + 2 * eps * _signs(spot[:, 5:])).clamp_(-eps, eps)).clamp_(0, 1)
    # A square that ball or box turn into nothing has the score of the present point.
    return flat.scatter(2, window, moved).view_as(here), (moved != old).flatten(1).any(1)


def _carry(here: Tensor, centre: Tensor, eps: float, side: int, spot: Tensor) -> tuple[Tensor, Tensor]:
    """l_2: the mass of one window, and what the ball has left, goes to another, in the shape of a bump and its mirror image."""
    window, giver = _window(spot[:, 0], spot[:, 1], side, here), _window(spot[:, 2], spot[:, 3], side, here)
    delta = (here - centre).flatten(2)
    union = torch.zeros_like(delta).scatter_(2, window, 1.0).scatter_(2, giver, 1.0)
    energy = delta.square()
    left = (eps**2 - energy.sum((1, 2))).clamp_min(0) / delta.shape[1]
    mass = (left[:, None] + (energy * union).sum(2)).sqrt()[:, :, None]
    bump = _bump(side).to(delta)
    shape = torch.where((spot[:, 4] < 0.5)[:, None], bump.flatten(), bump.T.flatten())[:, None]
    old = delta.gather(2, window)
    new = shape * _signs(spot[:, 5:]) + old / (1e-12 + old.norm(dim=2, keepdim=True))
    new = new / (1e-12 + new.norm(dim=2, keepdim=True)) * mass
    moved = _to_edge(centre, delta.scatter(2, giver, 0.0).scatter(2, window, new).view_as(here), eps)
    return moved, torch.ones_like(left, dtype=torch.bool)


@functools.cache
def _bump(side: int) -> Tensor:
    """A hill over the upper half of a square and its negative over the lower, of l_2 norm one (side side)."""
    if side < 2:
        return torch.ones(side, side)
    half = torch.cat([_hill(side // 2, side), -_hill(side - side // 2, side)])
    return half / half.norm()


def _hill(height: int, width: int) -> Tensor:
    """Rings around the middle, ring k being the sum of 1 / j^2 from k on; of l_2 norm one."""
    hill = torch.zeros(height, width, dtype=torch.float64)
    middle = height // 2, width // 2
    for ring in range(max(middle) + 1):
        top, left = max(middle[0] - ring, 0), max(middle[1] - ring, 0)
        hill[top : middle[0] + ring + 1, left : middle[1] + ring + 1] += 1 / (ring + 1) ** 2
    return hill / hill.norm()


Start = Callable[[Tensor, float, Streams], Tensor]
Move = Callable[[Tensor, Tensor, float, int, Tensor], tuple[Tensor, Tensor]]

MOVES: dict[str, tuple[Start, Move]] = {"linf": (_stripes, _shift), "l2": (_tiles, _carry)}
"""How a search starts, and proposes: new points, and which of them differ from the present ones; by norm."""
