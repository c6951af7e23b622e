"""Random numbers depend on the image's id and the purpose, and on nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attacks.streams import Draws, Streams, drawing, generator, wide_generator


class Noise(Draws):
    """Adds standard normal noise."""

    def forward(self, x):
        return x + self.drawn().normal(x.shape[1:]).to(x)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_numbers_follow_the_id_and_not_the_row(ids, shuffler):
    order = list(range(len(ids)))
    shuffler.shuffle(order)
    numbers = Streams(0, "p", ids=ids).normal((2, 3))
    shuffled = Streams(0, "p", ids=[ids[i] for i in order]).normal((2, 3))
    assert torch.equal(shuffled, numbers[order])


def test_two_images_get_different_numbers():
    a, b = Streams(0, "p", ids=[1, 2]).normal((8,))
    assert not torch.equal(a, b)


def test_the_same_question_gets_the_same_answer():
    streams = Streams(0, "p", ids=[3, 4])
    assert torch.equal(streams.normal((5,)), streams.normal((5,)))
    assert torch.equal(streams.normal((5,)), Streams(0, "p", ids=torch.tensor([3, 4])).normal((5,)))


@pytest.mark.parametrize(
    "other",
    [
        Streams(1, "p", ids=[3]),
        Streams(0, "q", ids=[3]),
        Streams(0, ids=[3]),
        Streams(0, "p", "p", ids=[3]),
        Streams(0, "p", 0, ids=[3]),
        Streams(0, "p", ids=[3]).child("x"),
    ],
    ids=["seed", "purpose", "no purpose", "longer", "number", "child"],
)
def test_seed_and_purpose_separate_streams(other):
    assert not torch.equal(Streams(0, "p", ids=[3]).normal((8,)), other.normal((8,)))


def test_purposes_that_read_alike_when_joined_stay_apart():
    purposes = [("ab",), ("a", "b"), ("a", "b", 1), ("a", "b", "1"), ("a", "b1")]
    assert len({generator(0, *purpose).initial_seed() for purpose in purposes}) == len(purposes)


def test_blocks_are_independent_of_each_other_and_of_the_order_they_are_read_in():
    streams = Streams(0, "p", ids=[3])
    late, early = streams.normal((8,), block=5), streams.normal((8,), block=0)
    assert not torch.equal(early, late)
    assert torch.equal(Streams(0, "p", ids=[3]).normal((8,), block=5), late)
    assert torch.equal(streams.normal((8,)), early), "block 0 is the default"


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=["indices", "mask"])
def test_take_keeps_the_images_numbers(rows):
    streams = Streams(0, "p", ids=[10, 11, 12])
    assert torch.equal(streams.take(rows).normal((4,)), streams.normal((4,))[rows])
    assert len(streams.take(rows)) == 2


def test_take_and_child_commute():
    streams, rows = Streams(0, "p", ids=[10, 11, 12]), torch.tensor([1])
    assert torch.equal(streams.take(rows).child("c", 1).normal((4,)), streams.child("c", 1).take(rows).normal((4,)))


def test_a_child_of_a_child_is_the_child_of_both_names():
    streams = Streams(0, "p", ids=[10])
    assert torch.equal(streams.child("a").child(1).normal((4,)), streams.child("a", 1).normal((4,)))


def test_normal_numbers_have_the_moments_of_the_normal_law():
    z = Streams(0, "p", ids=range(100)).normal((1000,)).double()
    # 100,000 numbers: the standard errors are .0032, .0045 and .031; five of them are allowed.
    assert abs(z.mean()) < 0.016
    assert abs(z.var() - 1) < 0.023
    assert abs((z**4).mean() - 3) < 0.16
    # Rows come from generators of their own; their means must scatter like independent ones.
    assert 0.7 < (z.mean(1) * 1000**0.5).std() < 1.3


def test_uniform_numbers_fill_the_unit_interval():
    u = Streams(0, "p", ids=range(100)).uniform((1000,)).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002


def test_signs_are_fair_and_never_zero():
    s = Streams(0, "p", ids=range(100)).signs((1000,))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(s.mean()) < 0.016


def test_the_generator_family_is_named_for_the_record():
    assert Streams(0, ids=[1]).rng == "torch-cpu"


def test_generators_are_a_pure_function_of_seed_and_purpose():
    assert torch.equal(torch.randn(3, generator=generator(7, "w", 2)), torch.randn(3, generator=generator(7, "w", 2)))
    assert not torch.equal(torch.randn(3, generator=generator(7, "w", 2)), torch.randn(3, generator=generator(7, "w", 3)))


def test_global_generators_are_untouched():
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    streams = Streams(0, "p", ids=[1, 2])
    streams.normal((3,)), streams.uniform((3,)), streams.signs((3,))
    with drawing(Noise(), streams):
        pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


def test_a_layer_without_streams_says_how_to_set_them():
    with pytest.raises(RuntimeError, match=r"Noise draws random numbers.*with drawing\(model, streams\)"):
        Noise()(torch.zeros(1, 2))


def test_drawing_ends_with_its_block_even_after_an_error():
    layer = Noise()
    with pytest.raises(KeyError), drawing(layer, Streams(0, ids=[1])):
        raise KeyError
    with pytest.raises(RuntimeError, match="no streams are in force"):
        layer(torch.zeros(1, 2))


def test_drawing_nests_and_the_outer_streams_come_back():
    layer, x = Noise(), torch.zeros(1, 4)
    with drawing(layer, Streams(0, ids=[1])):
        outer = layer(x)
        with drawing(layer, Streams(1, ids=[1])):
            inner = layer(x)
        assert torch.equal(layer(x), outer)
    assert not torch.equal(inner, outer)


def test_two_noise_layers_draw_different_numbers():
    model, x = nn.ModuleDict({"a": Noise(), "b": nn.Sequential(Noise())}), torch.zeros(2, 4)
    with drawing(model, Streams(0, ids=[1, 2])):
        assert not torch.equal(model["a"](x), model["b"](x))


def test_a_layers_numbers_follow_the_image_through_the_batch():
    layer, x = Noise(), torch.zeros(3, 4)
    with drawing(layer, Streams(0, ids=[1, 2, 3])):
        batch = layer(x)
    with drawing(layer, Streams(0, ids=[2])):
        assert torch.equal(layer(x[:1]), batch[1:2])


def test_the_whole_state_is_keyed_not_only_32_bits_of_a_seed() -> None:
    """Torch's twister, filled from the hash, gives the numbers of NumPy's twister with the same words."""
    gen = wide_generator(7, "layout", 3)
    state = gen.get_state().numpy()
    words = state[24 : 24 + 8 * 624].view("<u8")
    assert (words < 2**32).all() and len(set(words.tolist())) > 600
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    expected = twister.random_raw(2000)[1::2].astype(np.int64) % 2**31  # torch takes the second of two words
    drawn = torch.empty(1000, dtype=torch.int64).random_(0, 2**31, generator=wide_generator(7, "layout", 3))
    np.testing.assert_array_equal(drawn.numpy(), expected)
