import numpy as np
import pytest
import torch
from timm.data import Mixup

from timm_qkformer.data import EventMixup

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
        out, target = EventMixup(**{**ALPHAS, "cutmix_alpha": 1.0}, mode=mode, label_smoothing=0.0)(
            x.clone(), torch.tensor([0, 1, 2, 3])
        )
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
