"""Spike counts: what is known of a tensor, and its packed form."""

import copy
import io

import pytest
import torch

from timm_qkformer.layers import LIF
from timm_qkformer.layers.counts import add_counts, counts_bound, move_note, note_counts, pack, packed, unpack


@pytest.mark.parametrize("bound", [1, 2, 3, 4, 15, 16, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7), (1, 1, 1, 1), (3, 8, 4, 4), (1, 3, 2, 1)])
def test_packing_loses_nothing(bound, dtype, shape):
    x = torch.randint(0, bound + 1, shape).to(dtype)
    x.view(-1)[-1] = bound
    bits = next(bits for bits in (1, 2, 4, 8) if bound < 2**bits)
    for given in (x, x.movedim(-3, -1).contiguous().movedim(-1, -3), x.flip(-1)):
        data = pack(given, bound)
        assert data.dtype == torch.uint8
        assert data.numel() == -(-x.numel() * bits // 8)
        again = unpack(data, bound, given.shape, dtype)
        assert again.dtype == dtype
        assert torch.equal(again, given)
        assert again.movedim(-3, -1).is_contiguous()


def test_empty_tensors_pack():
    x = torch.zeros(4, 0, 3, 2, 2)
    assert unpack(pack(x, 1), 1, x.shape, x.dtype).shape == x.shape


def test_notes():
    spikes = LIF()(torch.rand(2, 3, 4, 5, 5) * 4)
    assert counts_bound(spikes) == 1
    total = add_counts(spikes, add_counts(spikes, spikes))
    assert counts_bound(total) == 3
    assert counts_bound(spikes + spikes) is None
    assert counts_bound(add_counts(spikes, torch.rand_like(spikes))) is None
    assert counts_bound(move_note(total, total.flatten(0, 1))) == 3
    assert counts_bound(note_counts(torch.zeros(1), 256)) is None
    large = note_counts(torch.full((2,), 255.0), 255)
    assert counts_bound(large) == 255
    assert counts_bound(add_counts(large, note_counts(torch.ones(2), 1))) is None


def test_a_note_is_void_once_the_tensor_changes():
    spikes = LIF()(torch.rand(2, 3, 4, 5, 5) * 4)
    spikes.mul_(0.5)
    assert counts_bound(spikes) is None


def test_layers_share_one_packed_form():
    spikes = note_counts((torch.rand(2, 3, 4, 5, 5) > 0.5).float(), 1)
    assert packed(spikes) is packed(spikes)
    assert torch.equal(unpack(packed(spikes), 1, spikes.shape, spikes.dtype), spikes)


def test_notes_do_not_travel_with_copies():
    x = note_counts(torch.ones(2, 1, 2, 2), 1)
    assert counts_bound(copy.deepcopy(x)) is None
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)


def test_inference_tensors_are_left_alone():
    with torch.inference_mode():
        assert counts_bound(LIF()(torch.rand(2, 3))) is None
