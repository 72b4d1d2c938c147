import numpy as np
import pytest
import torch
from timm.data import Mixup

from timm_qkformer.data import RELEASE_AUGMENTATIONS, EventAugment, EventMixup, cutout, roll, rotate, shear_x, translate

EVERYTHING = (*RELEASE_AUGMENTATIONS, "roll_x", "roll_y")


def clip(steps=3, height=12, width=10):
    return torch.rand(steps, 2, height, width) + 0.5


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_step_and_channel_is_transformed_alike(name):
    frame = clip(1)[:, :1]
    still = frame.expand(5, 2, -1, -1).clone()
    before = still.clone()
    augment = EventAugment(operations=(name,))
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        out = augment(still)
        assert out.shape == still.shape
        assert out.dtype == still.dtype
        assert (out == out[:1, :1]).all()
        assert torch.equal(still, before)
        changed += not torch.equal(out, still)
    assert changed > 0


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (-2, 0), (0, 3), (0, -3), (1, -2), (0, 0), (10, 0), (0, -12)])
def test_translate(dx, dy):
    x = clip()
    out = translate(x, dx, dy)
    for row in range(12):
        for column in range(10):
            inside = 0 <= row - dy < 12 and 0 <= column - dx < 10
            expected = x[..., row - dy, column - dx] if inside else torch.zeros(3, 2)
            assert torch.equal(out[..., row, column], expected)


def test_roll_wraps_around():
    x = clip()
    out = roll(x, 2, -1)
    assert torch.equal(out[..., 0, 2], x[..., 1, 0])
    assert torch.equal(out[..., 0, 0], x[..., 1, -2])
    assert torch.equal(roll(out, -2, 1), x)


def test_rotate_by_a_quarter_is_exact():
    x = clip(height=9, width=9)
    assert torch.equal(rotate(x, 90.0), torch.rot90(x, 1, (-2, -1)))


def test_shear_moves_rows_by_their_distance_from_the_centre():
    x = torch.zeros(1, 2, 21, 21)
    x[..., 10] = 1
    columns = shear_x(x, 0.3)[0, 0].argmax(-1)
    assert columns[10] == 10
    shift = (columns - 10).tolist()
    assert {abs(shift[0]), abs(shift[-1])} == {3}
    assert shift == sorted(shift) or shift == sorted(shift, reverse=True)


def test_cutout_erases_one_square():
    x = clip(height=32, width=32)
    areas = set()
    for _ in range(50):
        erased = cutout(x)[0, 0] == 0
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert rows == columns
        assert erased.sum() == rows * columns
        areas.add(rows * columns / 32**2)
    assert max(areas) <= 0.13
    assert len(areas) > 3


def test_the_flip():
    x = clip()
    always, never = EventAugment(1.0, ()), EventAugment(0.0, ())
    for _ in range(5):
        assert torch.equal(always(x), x.flip(-1))
        assert torch.equal(never(x), x)
    often = sum(not torch.equal(EventAugment(0.5, ())(x), x) for _ in range(200))
    assert 60 < often < 140


def test_torchs_seed_decides():
    x, augment = clip(), EventAugment(operations=EVERYTHING)
    first, second = [], []
    for outs in (first, second):
        torch.manual_seed(3)
        outs += [augment(x) for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, first[0]) for a in first)


def test_strengths_stay_within_the_releases():
    x = torch.zeros(1, 2, 31, 31)
    x[..., 15, 15] = 1
    seen = set()
    for _ in range(300):
        out = EventAugment(0.0, ("translate_x",))(x)[0, 0]
        seen.add(out.argmax().item() % 31 - 15)
    assert seen == set(range(-5, 6))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"operations": ("rotate", "solarize")}, "solarize"),
        ({"flip_prob": 1.5}, "flip_prob=1.5"),
        ({"bins": 1}, "bins=1"),
        ({}, r"\[T, C, H, W\]"),
    ],
)
def test_bad_arguments_and_a_batch(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EventAugment(**kwargs)(torch.zeros(2, 3, 2, 8, 8))


ALPHAS = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "prob": 1.0, "num_classes": 4}


def batch():
    return torch.rand(4, 3, 2, 16, 12), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_is_timms(mode):
    x, target = batch()
    results = []
    for kind in (EventMixup, Mixup):
        np.random.seed(0)
        results.append(kind(**{**ALPHAS, "mixup_alpha": 0.5}, mode=mode)(x.clone(), target))
    for ours, timms in zip(*results, strict=True):
        assert torch.equal(ours, timms)
    assert not torch.equal(results[0][0], x)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_pastes_one_box_in_every_step(mode):
    x = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 16, 12).clone()
    for seed in range(10):
        np.random.seed(seed)
        mixup = EventMixup(**{**ALPHAS, "cutmix_alpha": 1.0}, mode=mode, label_smoothing=0.0)
        out, target = mixup(x.clone(), torch.tensor([0, 1, 2, 3]))
        assert (out == out[:, :1, :1]).all()
        for i in range(4):
            pasted = out[i, 0, 0] == 3 - i
            rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
            assert pasted.sum() == rows * columns
            assert target[i, 3 - i].item() == pytest.approx(pasted.float().mean().item(), abs=1e-6)


def test_the_layout_of_the_clips_does_not_matter():
    x, target = batch()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for clips in (x.clone(), strided):
        np.random.seed(1)
        results.append(EventMixup(**{**ALPHAS, "cutmix_alpha": 1.0})(clips, target)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 2, 8, 8), r"\[B, T, C, H, W\]"),
        (torch.zeros(3, 2, 2, 8, 8), "even batch size, got 3"),
        (torch.zeros(4, 2, 2, 8, 8, dtype=torch.uint8), "floating point"),
    ],
)
def test_bad_batches(x, message):
    with pytest.raises(ValueError, match=message):
        EventMixup(**{**ALPHAS, "mixup_alpha": 0.5})(x, torch.zeros(len(x), dtype=torch.long))
