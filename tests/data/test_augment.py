import pytest
import torch

from timm_qkformer.data import RELEASE_AUGMENTATIONS, EventAugment, cutout, roll, rotate, shear_x, translate

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


def test_translate_is_torchvisions():
    from torchvision.transforms.functional import affine

    x = clip()
    assert torch.equal(translate(x, 3, -2), affine(x, angle=0.0, translate=[3, -2], scale=1.0, shear=[0.0, 0.0]))


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
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EventAugment(**kwargs)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\[T, C, H, W\]"):
        EventAugment()(torch.zeros(2, 3, 2, 8, 8))
