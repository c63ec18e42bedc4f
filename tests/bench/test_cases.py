"""The routings have the distributions that they promise."""

import numpy as np
import pytest

from freeio_jax.bench.cases import ROUTINGS, Shape, loads, zipf_routing


def draw(routing, num_ranks, num_tokens, top_k, num_experts, seed=0):
    shape = Shape(num_ranks, num_tokens, 8, top_k, num_experts)
    return shape, ROUTINGS[routing](shape, seed)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", [(4, 33, 8, 64), (2, 5, 3, 8), (1, 7, 4, 4), (4, 9, 1, 4)])
def test_ids_are_distinct_and_in_range(routing, sizes):
    shape, topk_idx = draw(routing, *sizes)
    assert topk_idx.shape == (shape.num_ranks * shape.num_tokens, shape.top_k)
    assert topk_idx.dtype == np.int32
    assert topk_idx.min() >= 0
    assert topk_idx.max() < shape.num_experts
    assert all(len(set(ids)) == shape.top_k for ids in topk_idx.tolist())
    np.testing.assert_array_equal(topk_idx, ROUTINGS[routing](shape, 0))
    assert (topk_idx != ROUTINGS[routing](shape, 1)).any() or shape.num_experts == shape.top_k


def frequencies(ids, num_experts):
    return np.bincount(ids.reshape(-1), minlength=num_experts) / ids.size


def test_uniform():
    _, topk_idx = draw("uniform", 4, 5000, 4, 16)
    np.testing.assert_allclose(frequencies(topk_idx, 16), 1 / 16, rtol=0.05)


@pytest.mark.parametrize("top_k", [1, 4, 5])
def test_half_goes_to_one_rank(top_k):
    shape, topk_idx = draw("half", 4, 5000, top_k, 32)
    pairs = loads(topk_idx, shape)
    assert pairs.sum() == 4 * 5000 * top_k
    np.testing.assert_array_equal(pairs[:, 0] * 2, 5000 * top_k)
    share = frequencies(topk_idx, 32)
    np.testing.assert_allclose(share[:8], 0.5 / 8, rtol=0.1)
    np.testing.assert_allclose(share[8:], 0.5 / 24, rtol=0.1)


def test_zipf():
    shape = Shape(4, 10000, 8, 3, 16)
    first = np.sort(frequencies(zipf_routing(shape, 3)[:, 0], 16))[::-1]
    weight = 1 / np.arange(1, 17)
    np.testing.assert_allclose(first, weight / weight.sum(), rtol=0.1)
    # Popular experts are spread over the ranks.
    tops = [np.bincount(zipf_routing(shape, seed)[:, 0]).argmax() // 4 for seed in range(12)]
    assert len(set(tops)) > 1


def test_loads():
    shape = Shape(2, 2, 8, 2, 4)
    topk_idx = np.array([[0, 1], [1, 2], [3, 2], [0, 3]])
    np.testing.assert_array_equal(loads(topk_idx, shape), [[3, 1], [1, 3]])
