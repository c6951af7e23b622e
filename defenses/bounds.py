"""Confidence bounds for vote counts, and the radii that they prove (methods 7.1, 7.3, 7.5). Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided Clopper-Pearson bound: P(lower > p) <= alpha for k successes in n draws; 0 at k = 0."""
    k, n = np.asarray(k, float), np.asarray(n, float)
    bound = special.betaincinv(np.maximum(k, 1), n - np.maximum(k, 1) + 1, alpha)
    return np.where(k == 0, 0.0, bound)


def upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Floats:
    """One-sided Clopper-Pearson bound: P(upper < p) <= alpha; 1 at k = n."""
    return 1 - lower(np.asarray(n, float) - np.asarray(k, float), n, alpha)


def randomised_lower(k: ArrayLike, n: ArrayLike, alpha: float, chance: ArrayLike) -> Floats:
    """The p with P(Bin(n, p) > k) + chance P(Bin(n, p) = k) = alpha; exact, so never below :func:`lower`.

    Args:
        k, n: successes, draws.
        alpha: error probability.
        chance: one number of U[0, 1] for each count, drawn before the count was seen. 1 gives :func:`lower`.

    Its error is alpha exactly: given p, the randomised survival function is uniform (Stevens 1950; Voracek 2024).
    """
    k, n, chance = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float), np.asarray(chance, float))

    def excess(p: Floats) -> Floats:
        """P(Bin > k) + chance P(Bin = k) - alpha, rising in p; the mixture of the tails from k + 1 and from k."""
        return (1 - chance) * _tail(k + 1, n, p) + chance * _tail(k, n, p) - alpha

    # Between Clopper-Pearson's bound and 1: at k = n nothing is above k, and even p = 1 gives no more than chance.
    bound = _bisect(lambda p: excess(p) < 0, lower(k, n, alpha), np.ones_like(k))
    return np.minimum(bound, np.nextafter(1, 0))  # chance <= alpha proves p = 1; a hair less keeps radii finite


def _tail(k: Floats, n: Floats, p: Floats) -> Floats:
    """P(Bin(n, p) >= k)."""
    inside = (k >= 1) & (k <= n)
    found = special.betainc(np.where(inside, k, 1), np.where(inside, n - k + 1, 1), p)
    return np.where(inside, found, (k < 1).astype(float))


def log_wealth(k: ArrayLike, n: ArrayLike, p: ArrayLike) -> Floats:
    """ln W_n(p), the log of what a Krichevsky-Trofimov bettor against success probability p owns after k successes in n draws.

    W is a non-negative martingale of mean 1 if p is the truth, so it exceeds 1/alpha at any time with probability at most alpha
    (Ville 1939; Voracek 2024).
    """
    k, n, p = np.asarray(k, float), np.asarray(n, float), np.asarray(p, float)
    mixture = special.gammaln(k + 0.5) + special.gammaln(n - k + 0.5) - 2 * special.gammaln(0.5) - special.gammaln(n + 1)
    return mixture - special.xlogy(k, p) - special.xlog1py(n - k, -p)


def anytime_lower(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """The p below k/n with ln W_n(p) = ln(1/alpha): below the truth at all n together with probability 1 - alpha."""
    k, n = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    wealthy = -np.log(alpha)
    return _bisect(lambda p: log_wealth(k, n, p) >= wealthy, np.zeros_like(k), k / np.maximum(n, 1))


def anytime_upper(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """The mirror image of :func:`anytime_lower`."""
    return 1 - anytime_lower(np.asarray(n, float) - np.asarray(k, float), n, alpha)


def most(share: ArrayLike, n: int, error: float) -> Floats:
    """Successes among the first n of more draws, of which a share are successes, that are exceeded with probability at most
    ``error``, in whatever order they came (Hoeffding 1963, section 6: n KL(q, share) >= ln(1/error))."""
    share = np.asarray(share, float)

    def usual(q: Floats) -> Floats:
        return n * (special.kl_div(q, share) + special.kl_div(1 - q, 1 - share)) <= -np.log(error)

    return np.floor(n * _bisect(usual, share, np.ones_like(share)) + 1e-6)  # bisection ends a hair below whole numbers


def _bisect(excluded, low: Floats, high: Floats, halvings: int = 52) -> Floats:  # type: ignore[no-untyped-def]
    """The largest excluded p, from below: ``excluded`` holds up to some point between low and high. Never above that point."""
    low, high = low.copy(), high.copy()
    for _ in range(halvings):
        middle = (low + high) / 2
        out = excluded(middle)
        low, high = np.where(out, middle, low), np.where(out, high, middle)
    return low


def radius(p: ArrayLike, sigma: float) -> Floats:
    """sigma * Phi^-1(p), the l2 radius within which a class of noise probability at least p > 1/2 stays (Cohen et al. 2019)."""
    return sigma * special.ndtri(np.asarray(p, float))


def ceiling(sigma: float, n: int, alpha: float) -> float:
    """The largest radius that n draws can certify at level alpha: all of them agree (invariant I7); 0 if even then none."""
    return max(0.0, float(radius(alpha ** (1 / n), sigma)))


def two_sided(first: ArrayLike, second: ArrayLike) -> Floats:
    """p-value of the exact two-sided binomial test that two counts, first >= second, have equal probability."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    tail = special.betainc(np.maximum(first, 1), second + 1, 0.5)  # P(Bin(first + second, 1/2) >= first)
    return np.where(first <= 0, 1.0, np.minimum(1.0, 2 * tail))


def wald(p: ArrayLike, p_r: ArrayLike, alpha: float, beta: float) -> Floats:
    """Draws that no sequential test of "p >= p_r" can do without, on average, if it knew the truth p (Wald 1945).

    ln(1/error) over the information of a draw, KL(p, p_r): errors alpha where p is above p_r, beta where it is below.
    """
    p, p_r = np.broadcast_arrays(np.asarray(p, float), np.asarray(p_r, float))
    information = special.kl_div(p, p_r) + special.kl_div(1 - p, 1 - p_r)
    with np.errstate(divide="ignore"):
        return np.where(p >= p_r, -np.log(alpha), -np.log(beta)) / information
