"""Estimators: looks, levels, stopping, ceilings, and the replay of stored votes (methods 3.2, 7.2, 7.5)."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from defenses import bounds
from defenses.bounds import anytime_lower, log_wealth, lower, radius, randomised_lower, upper
from defenses.estimators import (
    ESTIMATORS,
    FUTILITY,
    LOOKS,
    Phases,
    Question,
    Sequential,
    Tally,
    UnionBound,
    fixed,
    grid_up_to,
    recount,
    replay,
    sequential,
)

GRID, FIXED, PHASES = ESTIMATORS["grid"], ESTIMATORS["fixed"], ESTIMATORS["phases"]
SEQUENTIAL = [name for name, rule in ESTIMATORS.items() if isinstance(rule, Sequential)]
ROUNDING = [name for name in ESTIMATORS if name not in ("fixed", "randomised")]
CURVE = (0.0, 0.25, 0.5, 0.75)


def ask(name, n=100_000, *, alpha=0.001, radii=CURVE, sigma=0.25):
    """A question that suits an estimator: one that decides one radius gets the first."""
    return Question(sigma, alpha, n, radii[:1] if ESTIMATORS[name].preset else radii)


def tally(count, bound=0.0, chance=1.0):
    count = np.atleast_1d(np.asarray(count, float))
    return Tally(count, np.broadcast_to(bound, count.shape) + 0.0, np.broadcast_to(chance, count.shape))


def whole(radii):
    """Radii with -1 for an abstention."""
    return np.nan_to_num(radii, nan=-1)


# --- questions


@pytest.mark.parametrize(
    "sigma, alpha, n", [(0, 0.001, 9), (-1, 0.001, 9), (float("nan"), 0.001, 9), (1, 0, 9), (1, 0.5, 9), (1, 0.1, 0)]
)
def test_a_question_out_of_range_is_refused(sigma, alpha, n):
    with pytest.raises(ValueError, match=r"sigma > 0, 0 < alpha < 0.5 and n >= 1; got sigma="):
        Question(sigma, alpha, n)


@pytest.mark.parametrize("radii", [(0.5, 0.25), (0.25, 0.25), (-0.1, 0.2), (float("nan"),)])
def test_radii_that_do_not_increase_from_zero_are_refused(radii):
    with pytest.raises(ValueError, match="radii must be non-negative and increasing"):
        Question(0.25, 0.001, 100, radii)


def test_a_radius_needs_the_probability_of_its_quantile():
    np.testing.assert_allclose(Question(0.25, 0.001, 100, CURVE).wanted, stats.norm.cdf([0, 1, 2, 3]), rtol=1e-14)


def test_estimators_that_decide_one_radius_refuse_any_other_number():
    preset = [name for name, rule in ESTIMATORS.items() if rule.preset]
    assert preset == ["group_sequential", "union_bound", "betting", "phases"]
    for name in preset:
        for radii in [(), (0.0, 0.25)]:
            with pytest.raises(ValueError, match=r"decides one radius a run, got radii \("):
                ESTIMATORS[name].check(Question(0.25, 0.001, 1000, radii))
        ESTIMATORS[name].check(Question(0.25, 0.001, 1000, (0.25,)))


def test_the_grid_refuses_no_radii_and_the_others_take_any():
    with pytest.raises(ValueError, match="the grid estimator needs radii"):
        GRID.check(Question(0.25, 0.001, 1000))
    GRID.check(Question(0.25, 0.001, 1000, CURVE))
    for name in ("fixed", "randomised", "anytime"):
        for radii in [(), (0.0,), CURVE]:
            ESTIMATORS[name].check(Question(0.25, 0.001, 1000, radii))


# --- looks and levels


@pytest.mark.parametrize("name", ["fixed", "randomised"])
def test_a_fixed_number_of_draws_is_looked_at_once(name):
    assert ESTIMATORS[name].trials(Question(0.25, 0.001, 777)) == [[777]]
    _, finished = ESTIMATORS[name].look(Question(0.25, 0.001, 777), 0, 0, tally(np.arange(778)))
    assert finished.all()


@pytest.mark.parametrize(
    "name, n, looks",
    [
        ("grid", 1000, [100, 200, 400, 700, 1000]),
        ("grid", 10_000, [100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10_000]),
        ("grid", 100_000, list(LOOKS)),
        ("grid", 100, [100]),
        ("grid", 150, [100, 150]),
    ],
)
def test_looks_above_n_are_dropped_and_the_last_is_n(name, n, looks):
    assert ESTIMATORS[name].trials(ask(name, n)) == [looks]


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("n", [100, 1000, 100_000])
def test_for_one_radius_the_first_level_is_where_agreeing_votes_can_prove_it(r, n):
    rule, question = ESTIMATORS["group_sequential"], Question(0.25, 0.001, n, (r,))
    looks, levels = np.array(rule.looks(question)), rule.levels(question)
    assert levels.sum() == pytest.approx(0.001, rel=1e-12) and looks[-1] == n
    first = int(np.flatnonzero(levels)[0])
    if first < len(looks) - 1:
        assert bounds.lower(looks[first], looks[first], 3e-4) >= stats.norm.cdf(r / 0.25)
        assert looks[first] == 100 or bounds.lower(looks[first] - 100, looks[first] - 100, 3e-4) < stats.norm.cdf(r / 0.25)
        assert levels[first] == pytest.approx(3e-4)
    if looks[0] < looks[first] and r <= rule.ceiling(question):
        _, finished = rule.look(question, 0, 0, tally([0.0, looks[0]]))
        assert finished.tolist() == [True, False], "before it, only the hopeless are finished"


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("n", [50, 100, 101, 150, 1000, 12_345, 100_000])
def test_looks_rise_to_n_in_whole_hundreds(name, n):
    (looks,) = ESTIMATORS[name].trials(ask(name, n))
    assert looks[0] == min(n, 100) and looks[-1] == n
    assert (np.diff(looks) > 0).all()
    assert not any(look % 100 for look in looks[:-1])


def test_looks_of_the_union_bound_grow_by_a_tenth_and_of_the_bettor_by_a_twentieth():
    (geometric,), (steady,) = (ESTIMATORS[name].trials(ask(name)) for name in ("union_bound", "betting"))
    assert geometric[:4] == [100, 200, 300, 400] and steady[:20] == list(range(100, 2001, 100))
    late = np.array([look for look in geometric if 20_000 < look < 100_000])
    assert (np.abs(late[1:] / late[:-1] - 1.1) < 100 / late[:-1]).all()
    late = np.array([look for look in steady if 4000 <= look < 100_000])
    assert (late[1:] <= 1.05 * late[:-1]).all() and (late[1:] > 1.05 * late[:-1] - 100).all()
    assert ESTIMATORS["anytime"].trials(ask("anytime")) == [steady]


def test_phases_are_those_of_the_paper_at_a_hundred_thousand_draws():
    assert PHASES.trials(ask("phases")) == [[1000], [10_000], [125_000]]
    assert Phases((0.01, 0.1, 0.89)).trials(ask("phases", 20_000)) == [[200], [2000], [17_800]]
    assert PHASES.trials(ask("phases", 1000)) == [[100], [100], [1200]]  # at least a hundred, as looks are


def proven_levels(name, question):
    """The error probability that each look of a Clopper-Pearson rule spends: that of its bound when all draws agree."""
    rule, found = ESTIMATORS[name], []
    for trial, looks in enumerate(rule.trials(question)):
        for index, now in enumerate(looks):
            bound, _ = rule.look(question, trial, index, tally(now))
            found.append(float(bound[0]) ** now)
    return np.array(found)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("betting", "anytime")])
@pytest.mark.parametrize("n", [50, 100, 1000, 10_000, 100_000, 250_000])
def test_the_levels_of_all_looks_sum_to_alpha_at_most(name, n):
    spent = proven_levels(name, ask(name, n)).sum()
    assert spent <= 0.001 * (1 + 1e-9)
    if name == "union_bound":  # its sequence goes on for ever: T looks have T / (T + 5) of alpha
        looks = len(ESTIMATORS[name].trials(ask(name, n))[0])
        assert spent == pytest.approx(0.001 * looks / (looks + 5), rel=1e-9)
    else:
        assert spent == pytest.approx(0.001, rel=1e-9)


def test_levels_and_last_bound_of_the_grid_are_those_of_the_methods():
    assert len(LOOKS) == 18
    np.testing.assert_allclose(proven_levels("grid", ask("grid")), [5.882353e-06] * 17 + [9e-4], rtol=1e-7)
    bound, finished = GRID.look(ask("grid"), 0, 17, tally(100_000))
    assert finished.all() and bound[0] == pytest.approx(9e-4**1e-5, rel=1e-12) == pytest.approx(0.9999299, abs=5e-8)


def test_levels_of_the_union_bound_are_those_of_the_methods():
    t = np.arange(1, 60)
    found = proven_levels("union_bound", ask("union_bound"))
    np.testing.assert_allclose(found, 5 * 0.001 / ((t + 4) * (t + 5)), rtol=1e-8)
    many = np.array([UnionBound().level(0.05, index) for index in range(100_000)])
    assert many.sum() == pytest.approx(0.05, rel=1e-4) and many.sum() < 0.05


# --- what a look says


@pytest.mark.parametrize("smallest, n", [(66, 100), (550, 1000), (5156, 10_000), (50_490, 100_000)])
def test_the_smallest_count_that_does_not_abstain(smallest, n):
    question = Question(0.25, 0.001, n)
    bound, finished = FIXED.look(question, 0, 0, tally([smallest - 1, smallest]))
    assert finished.all()
    np.testing.assert_array_equal(np.isnan(FIXED.radius(question, bound)), [True, False])


def test_one_look_gives_the_bounds_of_its_draws():
    question, chance = Question(0.25, 0.001, 1000), np.array([0.2, 0.7])
    found, _ = FIXED.look(question, 0, 0, tally([900, 990]))
    np.testing.assert_array_equal(found, lower([900, 990], 1000, 0.001))
    found, _ = ESTIMATORS["randomised"].look(question, 0, 0, tally([900, 990], chance=chance))
    np.testing.assert_array_equal(found, randomised_lower([900, 990], 1000, 0.001, chance))
    found, _ = ESTIMATORS["anytime"].look(question, 0, 3, tally([390, 400]))
    np.testing.assert_array_equal(found, anytime_lower([390, 400], 400, 0.001))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_bound_never_falls_from_look_to_look(name):
    rule, question = ESTIMATORS[name], ask(name, 1000, radii=(0.0,))
    first, _ = rule.look(question, 0, 0, tally(100))
    second, _ = rule.look(question, 0, 1, tally(150, first))
    third, _ = rule.look(question, 0, 1, tally(200, first))
    assert second[0] == first[0] < third[0]
    last = len(rule.trials(question)[0]) - 1
    assert rule.look(question, 0, last, tally(0, first))[0] == first


def test_a_later_phase_forgets_the_bounds_of_earlier_ones():
    question = ask("phases")
    for trial in range(3):
        with_past, _ = PHASES.look(question, trial, 0, tally([500, 900], 0.99))
        np.testing.assert_array_equal(with_past, PHASES.look(question, trial, 0, tally([500, 900]))[0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_everybody_is_finished_at_the_last_look_and_the_undecided_not_long_before(name):
    rule, question = ESTIMATORS[name], ask(name, 10_000, radii=(0.25,))
    trials = rule.trials(question)
    for trial, looks in enumerate(trials):
        for index, now in enumerate(looks):
            likely = np.floor(now * question.wanted)  # near the wanted probability nothing is proven or excluded
            last = (trial, index) == (len(trials) - 1, len(looks) - 1)
            count = np.append(likely, np.linspace(0, now, 7).round()) if last else likely
            _, finished = rule.look(question, trial, index, tally(count))
            if last:
                assert finished.all()
            elif now <= 5000:  # later, what is left to draw may not suffice
                assert not finished.any()


@pytest.mark.parametrize("name", [*SEQUENTIAL, "phases"])
def test_hopeless_images_stop_at_the_first_look_and_open_ones_do_not(name):
    rule, question = ESTIMATORS[name], Question(0.25, 0.001, 100_000, (0.0,))
    first = rule.trials(question)[0][0]
    count = np.array([0.1, 0.5, 0.55 if first == 100 else 0.52, 1.0]) * first
    bound, finished = rule.look(question, 0, 0, tally(count))
    np.testing.assert_array_equal(finished, [True, False, False, True])
    np.testing.assert_array_equal(np.isnan(rule.radius(question, bound)), [True, True, True, False])


SHARES = {
    "grid": (0.1 / 17, 1 / 17),
    "union_bound": (1 / 6, 1 / 6),
    "phases": (1 / 3, 1 / 2),
}
"""Parts of alpha and of futility that the first look has."""


@pytest.mark.parametrize("name", SHARES)
def test_the_first_look_decides_at_its_shares_of_alpha_and_of_futility(name):
    rule, question = ESTIMATORS[name], Question(0.25, 0.001, 100_000, (0.25,))
    wanted, n = stats.norm.cdf(1), rule.trials(question)[0][0]
    sure, vain = SHARES[name]
    count = np.arange(n + 1.0)
    bound, finished = rule.look(question, 0, 0, tally(count))
    proven = stats.beta.ppf(0.001 * sure, np.maximum(count, 1e-9), n - count + 1) >= wanted
    futile = stats.beta.ppf(1 - 1e-4 * vain, count + 1, np.maximum(n - count, 1e-9)) < wanted
    assert proven.any() and futile.any() and not (proven | futile).all()
    np.testing.assert_array_equal(finished, proven | futile)
    np.testing.assert_array_equal(rule.radius(question, bound) == 0.25, proven)


@pytest.mark.parametrize("name", ["betting", "anytime"])
@pytest.mark.parametrize("index", [0, 12])
def test_the_bettor_decides_when_rich_enough(name, index):
    rule, question = ESTIMATORS[name], Question(0.25, 0.001, 100_000, (0.25,))
    wanted, n = stats.norm.cdf(1), rule.trials(question)[0][index]
    count = np.arange(n + 1.0)
    bound, finished = rule.look(question, 0, index, tally(count))
    wealth = log_wealth(count, n, wanted)
    proven = (count / n > wanted) & (wealth >= np.log(1000))
    futile = (count / n < wanted) & (wealth >= np.log(10_000))
    np.testing.assert_array_equal(finished, proven | futile)
    np.testing.assert_array_equal(rule.radius(question, bound) == 0.25, proven)


def test_phases_decide_at_the_counts_of_the_methods():
    question = Question(0.25, 0.001, 100_000, (0.25,))
    for trial, (n, certified, aborted) in enumerate([(1000, 880, 794), (10_000, 8538, 8269), (125_000, 105_607, None)]):
        count = np.arange(n + 1)
        bound, finished = PHASES.look(question, trial, 0, tally(count))
        proven = PHASES.radius(question, bound) == 0.25
        np.testing.assert_array_equal(proven, count >= certified)
        np.testing.assert_array_equal(finished, proven | (count <= aborted) if aborted else np.ones(n + 1, bool))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_an_image_stops_once_every_radius_is_proven(name):
    _, finished = ESTIMATORS[name].look(Question(0.25, 0.001, 1000, (0.0,)), 0, 0, tally([100, 60]))
    np.testing.assert_array_equal(finished, [True, False])


def test_the_grid_goes_on_while_a_larger_radius_is_open():
    question = Question(0.25, 0.001, 1000, CURVE)
    bound, finished = GRID.look(question, 0, 0, tally([100, 85]))
    np.testing.assert_array_equal(GRID.radius(question, bound), [0.25, 0.0])
    assert not finished.any()


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_an_image_stops_when_all_further_successes_would_not_reach_the_next_radius(name):
    rule = ESTIMATORS[name]
    reach = rule.ceiling(Question(0.25, 0.001, 1000, (0.0,)))
    for r, out in [(reach + 1e-6, True), (reach - 1e-6, False)]:
        radii = (float(r),) if rule.preset else (0.0, float(r))
        bound, finished = rule.look(Question(0.25, 0.001, 1000, radii), 0, 0, tally([100, 99]))
        np.testing.assert_array_equal(finished, [out, True])  # one failure is enough to miss the ceiling
        # Before its first level the rule for one radius has no bound, only futility.
        assert (bound > 0.5).all() or name == "group_sequential"


@settings(deadline=None)
@given(st.sampled_from(SEQUENTIAL), st.integers(2, 40), st.data())
def test_what_is_in_reach_is_the_best_bound_of_all_later_looks(name, hundreds, data):
    rule, question = ESTIMATORS[name], Question(0.25, 0.001, hundreds * 100, (0.0,))
    (looks,) = rule.trials(question)
    index = data.draw(st.integers(0, len(looks) - 2))
    count = np.array([float(data.draw(st.integers(0, looks[index])))])
    best = 0.0
    for then in range(index + 1, len(looks)):
        bound, _ = rule.look(question, 0, then, tally(count + looks[then] - looks[index]))
        best = max(best, float(bound[0]))
    assert rule.reach(question, index, count)[0] == pytest.approx(best, rel=1e-12)


# --- radii


@pytest.mark.parametrize("name", ["fixed", "randomised", "anytime"])
def test_a_bound_of_exactly_one_half_certifies_radius_zero(name):
    found = ESTIMATORS[name].radius(Question(0.25, 0.001, 100), np.array([0.5, np.nextafter(0.5, 0), 0.9, 0.0]))
    np.testing.assert_array_equal(found, [0, np.nan, radius(0.9, 0.25), np.nan])


@pytest.mark.parametrize("name", ["fixed", "randomised"])
def test_radii_of_the_question_do_not_round_what_is_proven_at_once(name):
    found = ESTIMATORS[name].radius(Question(0.25, 0.001, 100, (0.0, 0.25)), np.array([0.9]))
    assert found[0] == radius(0.9, 0.25)


@pytest.mark.parametrize("name", ["grid", "anytime"])
def test_a_grid_certifies_the_largest_radius_whose_probability_is_proven(name):
    question = Question(0.5, 0.001, 1000, (0.25, 0.5, 0.75))
    edges = stats.norm.cdf(np.array([0.25, 0.5, 0.75]) / 0.5)
    bound = np.array([0.6, edges[0] - 1e-12, edges[0] + 1e-12, edges[1] + 1e-12, edges[2] - 1e-12, 0.9999])
    np.testing.assert_array_equal(ESTIMATORS[name].radius(question, bound), [np.nan, np.nan, 0.25, 0.5, 0.5, 0.75])


@pytest.mark.parametrize("name", ROUNDING)
def test_one_radius_is_certified_or_not(name):
    question, edge = Question(0.5, 0.001, 1000, (0.25,)), stats.norm.cdf(0.5)
    found = ESTIMATORS[name].radius(question, np.array([0.0, edge - 1e-12, edge + 1e-12, 1.0]))
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0.25, 0.25])


@pytest.mark.parametrize("name", ROUNDING)
def test_radius_zero_of_a_grid_needs_a_bound_above_one_half(name):
    question = Question(0.5, 0.001, 1000, (0.0,))
    np.testing.assert_array_equal(ESTIMATORS[name].radius(question, np.array([0.5, 0.5 + 1e-12])), [np.nan, 0.0])


@pytest.mark.parametrize("step, sigma", [(0.01, 0.25), (0.05, 0.5), (0.1, 1.0)])
def test_the_grid_ends_at_the_last_step_below_the_ceiling(step, sigma):
    top = GRID.ceiling(Question(sigma, 0.001, 1000))
    radii = grid_up_to(step, top)
    assert radii[0] == 0 and radii[-1] <= top < radii[-1] + step
    np.testing.assert_allclose(np.diff(radii), step)
    assert Question(sigma, 0.001, 1000, radii).radii == radii


# --- ceilings


def test_ceilings_are_the_radii_of_draws_that_all_agree():
    def top(p):
        return pytest.approx(float(radius(p, 0.25)), rel=1e-9)

    found = {name: rule.ceiling(ask(name, radii=(0.0,))) for name, rule in ESTIMATORS.items()}
    assert found["fixed"] == top(0.001**1e-5) == bounds.ceiling(0.25, 100_000, 0.001) == pytest.approx(0.95286, abs=5e-6)
    assert found["grid"] == top(9e-4**1e-5) and found["group_sequential"] == top(1e-3**1e-5)
    assert found["union_bound"] == top((0.005 / (63 * 64)) ** 1e-5)  # 59 looks
    assert found["betting"] == found["anytime"] == pytest.approx(0.911897, abs=5e-7)
    assert found["phases"] == top((0.001 / 3) ** (1 / 125_000))
    assert found["randomised"] == pytest.approx(found["fixed"], rel=1e-9)
    for chance in (0.5, 0.01):
        assert ESTIMATORS["randomised"].ceiling(ask("randomised"), chance) == top((0.001 / chance) ** 1e-5)


def test_too_few_draws_have_no_ceiling_but_zero():
    for name in ("fixed", "grid", "group_sequential", "union_bound", "betting", "anytime"):
        assert ESTIMATORS[name].ceiling(ask(name, 9)) == 0, name


@settings(deadline=None)
@given(st.sampled_from(sorted(ESTIMATORS)), st.integers(1, 3000), st.floats(1e-4, 0.2), st.floats(0, 1), st.data())
def test_no_votes_at_all_lead_above_the_ceiling(name, n, alpha, chance, data):
    rule = ESTIMATORS[name]
    assume(name != "randomised" or chance > alpha)
    radii = (data.draw(st.floats(0, 1.5)),) if rule.preset else tuple(np.linspace(0, 1.5, 200))
    question, misses = Question(0.25, alpha, n, radii), data.draw(st.sampled_from([0, 0, 1, 2, 10, 100]))
    bound = np.zeros(1)
    for trial, looks in enumerate(rule.trials(question)):
        for index, now in enumerate(looks):
            count = max(0, now - misses)
            bound, finished = rule.look(question, trial, index, tally(count, bound, chance))
            if finished.all():
                break
        if finished.all():
            break
    found = whole(rule.radius(question, bound))[0]
    assert found <= rule.ceiling(question, chance) * (1 + 1e-9) + 1e-12
    if name not in ("randomised", "phases"):  # a coin adds radius, phases draw more than n
        assert found <= bounds.ceiling(0.25, n, alpha) * (1 + 1e-9) + 1e-12


# --- stopping


def cast(rule, question, p, images, seed=0):
    """Votes of many images whose class has probability p, all looks of all trials (looks, images), and a coin for each."""
    rng = np.random.default_rng(seed)
    steps = [np.diff([0, *looks])[:, None] for looks in rule.trials(question)]
    return [rng.binomial(step, p, (len(step), images)).cumsum(0).astype(float) for step in steps], rng.random(images)


def race(rule, question, votes, *, stopping=True):
    """Radii, bounds and draws of images with these votes; one that does not stop goes on to the last look."""
    counts, chance = votes
    images = len(chance)
    bound, draws, going = np.zeros(images), np.zeros(images, int), np.arange(images)
    for trial, looks in enumerate(rule.trials(question)):
        before = 0
        for index, now in enumerate(looks):
            draws[going] += now - before
            # Equal (count, bound, chance) have equal answers; asking once for each is what makes this fast.
            known = np.stack([counts[trial][index, going], bound[going], chance[going]])
            triples, inverse = np.unique(known, axis=1, return_inverse=True)
            answers, finished = rule.look(question, trial, index, Tally(*triples))
            bound[going] = answers[inverse]
            going = going[~finished[inverse]] if stopping or index == len(looks) - 1 else going
            before = now
    assert len(going) == 0
    return whole(rule.radius(question, bound)), bound, draws


def patience(monkeypatch):
    """No futility: who is not proven goes on unless all further successes would not do."""
    for module in (fixed, sequential):
        monkeypatch.setattr(module, "FUTILITY", 1e-300)


STEPS = tuple(float(r) for r in np.arange(20) * 0.05)


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("p", [0.3, 0.5, 0.85, 0.97, 0.999, 1.0])
def test_stopping_without_futility_changes_no_radius(name, p, monkeypatch):
    patience(monkeypatch)
    for radii in [(0.0,), (0.25,), (0.5,), (0.6,)] if ESTIMATORS[name].preset else [STEPS]:
        question = Question(0.25, 0.001, 2000, radii)
        votes = cast(ESTIMATORS[name], question, p, 300)
        stopped, _, draws = race(ESTIMATORS[name], question, votes)
        patient, _, most = race(ESTIMATORS[name], question, votes, stopping=False)
        np.testing.assert_array_equal(stopped, patient)
        assert (most == 2000).all() and (draws <= 2000).all()


@pytest.mark.parametrize("name", [*SEQUENTIAL, "phases"])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.85, 0.97, 0.999, 1.0])
def test_futility_never_raises_a_radius_and_hardly_ever_lowers_one(name, p):
    for r in (0.0, 0.25, 0.5) if ESTIMATORS[name].preset else (None,):
        question = Question(0.25, 0.001, 2000, STEPS if r is None else (r,))
        votes = cast(ESTIMATORS[name], question, p, 1000)
        stopped, _, draws = race(ESTIMATORS[name], question, votes)
        with pytest.MonkeyPatch.context() as patch:
            patience(patch)
            patient, _, most = race(ESTIMATORS[name], question, votes)
        assert (stopped <= patient).all() and (draws <= most).all()
        # The probability that an upper bound ever fails; "grid" has one chance in all, however many radii.
        assert np.sum(stopped < patient) <= stats.binom.ppf(1 - 1e-6, 1000, FUTILITY)


@pytest.mark.parametrize("name", [*SEQUENTIAL, "phases"])
def test_futility_saves_most_draws_of_hopeless_images(name):
    question = Question(0.25, 0.001, 10_000, (0.25,))
    _, _, draws = race(ESTIMATORS[name], question, cast(ESTIMATORS[name], question, 0.4, 200))
    assert draws.max() <= 1100


def test_anytime_without_radii_goes_on_to_n_and_gives_whole_radii():
    rule, question = ESTIMATORS["anytime"], Question(0.25, 0.001, 1000)
    votes = cast(rule, question, 0.9, 200)
    found, bound, draws = race(rule, question, votes)
    assert (draws == 1000).all()
    best = np.max([anytime_lower(votes[0][0][index], now, 0.001) for index, now in enumerate(rule.trials(question)[0])], axis=0)
    np.testing.assert_array_equal(bound, best)
    np.testing.assert_array_equal(found, np.where(best < 0.5, -1, radius(np.maximum(best, 0.5), 0.25)))
    given_radii = Question(0.25, 0.001, 1000, STEPS)
    rounded, _, _ = race(rule, given_radii, votes, stopping=False)
    assert (rounded <= found).all() and set(rounded) <= {-1, *STEPS} and (found - rounded < 0.05 + 1e-12).all()


# --- replay

SPREAD = (0.02, 0.3, 0.5, 0.55, 0.7, 0.85, 0.9, 0.97, 0.99, 0.999, 1.0)


def stored(blocks, repeats=4, seed=0):
    """Votes in blocks of 100 draws (images, blocks) as they are stored, and a coin for each image."""
    rng = np.random.default_rng(seed)
    votes = rng.binomial(100, np.repeat(SPREAD, repeats)[:, None], (len(SPREAD) * repeats, blocks)).astype(np.uint8)
    return votes, rng.random(len(votes))


def alone(rule, question, blocks, chance):
    """Radius and draws of one image, its blocks of 100 votes taken one after another."""
    left, draws, bound = [int(votes) for votes in blocks], 0, np.zeros(1)
    for trial, looks in enumerate(rule.trials(question)):
        block, count = left[: looks[-1] // 100], 0
        left = left[looks[-1] // 100 :]
        for now in range(100, looks[-1] + 1, 100):
            count, draws = count + block.pop(0), draws + 100
            if now in looks:
                bound, finished = rule.look(question, trial, looks.index(now), tally(count, bound, chance))
                if finished[0]:
                    return rule.radius(question, bound)[0], draws
    raise AssertionError("never finished")


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("r", [0.0, 0.25, 0.5])
def test_a_replay_says_what_a_run_would_have_said(name, r):
    rule = Phases((0.05, 0.25, 0.7)) if name == "phases" else ESTIMATORS[name]
    question = Question(0.25, 0.001, 4000, (r,) if rule.preset else CURVE)
    votes, chance = stored(40, repeats=2)
    found, draws = replay(rule, question, votes, chance)
    expected = [alone(rule, question, *image) for image in zip(votes, chance)]
    np.testing.assert_array_equal(found, [radius for radius, _ in expected])
    np.testing.assert_array_equal(draws, [spent for _, spent in expected])
    assert len(set(whole(found))) > 1
    assert len(set(draws)) == 1 if name in ("fixed", "randomised") else len(set(draws)) > 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_replay_of_some_images_is_that_of_all(name):
    rule = Phases((0.05, 0.25, 0.7)) if name == "phases" else ESTIMATORS[name]
    question, (votes, chance) = Question(0.25, 0.001, 2000, (0.25,)), stored(20)
    found, draws = replay(rule, question, votes, chance)
    rows = np.array([17, 3, 40])
    some, spent = replay(rule, question, votes[rows], chance[rows])
    np.testing.assert_array_equal(some, found[rows])
    np.testing.assert_array_equal(spent, draws[rows])


def test_phases_count_fresh_votes_in_a_replay():
    """Votes of the first phase are all for the class; those of the second are judged without them."""
    rule, question = Phases((0.1, 0.9)), Question(0.25, 0.001, 1000, (0.5,))
    votes = np.full((2, 10), 50, np.uint8)
    votes[:, 0] = [95, 99]
    found, draws = replay(rule, question, votes, np.ones(2))
    assert np.isnan(found).all() and draws.tolist() == [1000, 1000]
    votes[:, 1:] = 100
    found, draws = replay(rule, question, votes, np.ones(2))
    assert found.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_replay_refuses_too_few_votes(name):
    votes, chance = stored(10)
    question = ask(name, 1100)
    needed = sum(looks[-1] for looks in ESTIMATORS[name].trials(question))
    with pytest.raises(ValueError, match=f"{needed} draws needed in whole hundreds, 1000 are stored"):
        replay(ESTIMATORS[name], question, votes, chance)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "phases"])
def test_a_replay_refuses_to_look_into_a_block(name):
    votes, chance = stored(10)
    with pytest.raises(ValueError, match="950 draws needed in whole hundreds"):
        replay(ESTIMATORS[name], ask(name, 950), votes, chance)


def test_a_replay_refuses_what_the_estimator_refuses():
    votes, chance = stored(10)
    with pytest.raises(ValueError, match="decides one radius"):
        replay(PHASES, Question(0.25, 0.001, 100, (0.0, 0.1)), votes, chance)
    with pytest.raises(ValueError, match="needs radii"):
        replay(GRID, Question(0.25, 0.001, 100), votes, chance)


def test_more_votes_than_needed_are_left_alone():
    votes, chance = stored(30)
    question = Question(0.25, 0.001, 2000, CURVE)
    found, draws = replay(GRID, question, votes, chance)
    enough, spent = replay(GRID, question, votes[:, :20], chance)
    np.testing.assert_array_equal(found, enough)
    np.testing.assert_array_equal(draws, spent)


def test_bounds_of_the_futile_are_upper_ones():
    """Who is given up at the first look could not have the wanted probability, but for one in ten thousand."""
    question = Question(0.25, 0.001, 100_000, (0.25,))
    for name in [*SEQUENTIAL, "phases"]:
        n = ESTIMATORS[name].trials(question)[0][0]
        count = np.arange(n + 1.0)
        bound, finished = ESTIMATORS[name].look(question, 0, 0, tally(count))
        given_up = count[finished & np.isnan(ESTIMATORS[name].radius(question, bound))]
        assert stats.binom.cdf(given_up.max(), n, question.wanted[0]) <= FUTILITY, name
        assert (upper(given_up, n, FUTILITY) < question.wanted).all(), name


# --- what is left of votes


def kept(name, r=0.25, n=4000):
    """A rule and its question; radius, last count and draws of many images, replayed from all of their votes; and coins."""
    rule = Phases((0.05, 0.25, 0.7)) if name == "phases" else ESTIMATORS[name]
    question = Question(0.25, 0.001, n, (r,) if rule.preset else () if name == "anytime" else CURVE)
    votes, chance = stored(n // 100, repeats=20)
    found, draws = replay(rule, question, votes, chance)
    start = np.zeros(len(votes), int)  # of the last trial
    for looks in rule.trials(question)[:-1]:
        start[draws > start + looks[-1]] += looks[-1]
    count = [own[a // 100 : b // 100].sum() for own, a, b in zip(votes, start, draws)]
    return rule, question, found, np.array(count, float), draws.astype(float), chance


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("r", [0.0, 0.25, 0.5])
def test_the_last_count_tells_the_radius_or_what_it_lies_between(name, r):
    rule, question, found, *last = kept(name, r)
    low, high, ended = recount(rule, question, *last, 1e-8)
    assert ended.all() and (whole(low) <= whole(found)).all() and (whole(found) <= whole(high)).all()
    if name in ("fixed", "randomised", "phases"):
        np.testing.assert_array_equal(low, found)
        np.testing.assert_array_equal(high, found)
    # And not between much: half of the votes prove nothing, however they came.
    half = np.full(3, 0.5 * question.n)
    far = recount(rule, question, half, 2 * half, np.ones(3), 1e-8)[1] if name != "phases" else np.full(3, np.nan)
    assert (whole(far) <= 0.1).all()


def test_earlier_votes_are_believed_to_be_higher_the_rarer_it_may_be():
    rule, question, found, *last = kept("anytime")
    low, seldom, _ = recount(rule, question, *last, 0.01)
    _, hardly, _ = recount(rule, question, *last, 1e-8)
    assert (whole(seldom) <= whole(hardly)).all() and (whole(seldom) < whole(hardly)).any()
    assert (whole(found) > whole(low)).any(), "earlier looks matter"
    assert np.mean(whole(found) > whole(seldom)) <= 0.01


@pytest.mark.parametrize("name", ["fixed", "grid", "phases"])
def test_draws_at_which_nobody_looks_or_stops_and_counts_that_cannot_be(name):
    rule, question, _, count, draws, chance = kept(name)
    assert not recount(rule, question, count, draws + 50, chance, 1e-8)[2].any()
    assert not recount(rule, question, draws + 1, draws, chance, 1e-8)[2].any()
    assert not recount(rule, question, -count - 1, draws, chance, 1e-8)[2].any()
    assert not recount(rule, question, 0 * count, 0 * draws, chance, 1e-8)[2].any()


def test_a_grid_would_have_gone_on_while_the_next_radius_was_open():
    question = Question(0.25, 0.001, 4000, CURVE)
    count, draws = np.array([93.0, 100, 20]), np.array([100.0, 100, 100])
    assert recount(GRID, question, count, draws, np.ones(3), 1e-8)[2].tolist() == [False, False, True]
    assert recount(GRID, question, np.array([4000.0]), np.array([4000.0]), np.ones(1), 1e-8)[2].all()


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
def test_the_most_votes_among_the_first_draws_are_exceeded_as_rarely_as_said(n, k, more):
    total = n + more
    k = min(k, total)
    most = bounds.most(k / total, n, 1e-3)
    assert stats.hypergeom.sf(most, total, k, n) <= 1e-3 and most >= np.floor(n * k / total)
