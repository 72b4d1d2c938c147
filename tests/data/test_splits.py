import pytest

from timm_qkformer.data import split_by_class

TARGETS = [0] * 25 + [2, 1] * 17 + [2] * 3


def test_equals_the_release():
    from spikingjelly.datasets.utils import split_to_train_test_set

    train, test = split_to_train_test_set(0.9, [(None, t) for t in TARGETS], 3)
    assert split_by_class(TARGETS, 0.9) == (train.indices, test.indices)


def test_cifar10_dvs_sizes():
    train, test = split_by_class([i // 1000 for i in range(10_000)])
    assert (len(train), len(test)) == (9000, 1000)
    assert train[:2] == [0, 1]
    assert test[:2] == [900, 901]


def test_seed():
    first, again, other = (split_by_class(TARGETS, 0.5, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first[0] + first[1]) == list(range(len(TARGETS)))
    for target in range(3):
        assert sum(TARGETS[i] == target for i in first[0]) == -(-TARGETS.count(target) // 2)


@pytest.mark.parametrize("ratio", [0, 1, -0.1])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match="train_ratio="):
        split_by_class(TARGETS, ratio)
