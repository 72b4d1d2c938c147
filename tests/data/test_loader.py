import numpy as np
import pytest
import timm
import torch
from torch.utils.data import Dataset

from event_files import random_events, write_atis
from timm_qkformer.data import EventAugment, EventDataset, EventMixup, FrameSpec, create_event_loader


@pytest.fixture
def data(tmp_path):
    recordings = [(write_atis(tmp_path / f"{i}.bin", random_events(400, seed=i)), i % 3) for i in range(10)]
    return EventDataset(recordings, "abc", FrameSpec(2), (34, 34), transform=EventAugment())


class RandomNumbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([torch.rand(1).item(), np.random.rand(), index]), 0


def numbers(loader):
    return torch.cat([x for x, _ in loader])


def test_batches(data):
    train = list(create_event_loader(data, 4, is_training=True, num_workers=0))
    assert [clips.shape for clips, _ in train] == [(4, 2, 2, 34, 34)] * 2
    evaluation = list(create_event_loader(data, 4, num_workers=0))
    assert [len(clips) for clips, _ in evaluation] == [4, 4, 2]
    assert torch.cat([targets for _, targets in evaluation]).tolist() == data.targets
    clips, targets = train[0]
    assert clips.dtype == torch.float32
    assert targets.dtype == torch.int64


def test_an_epoch_repeats_and_epochs_differ(data):
    epochs = []
    loader = create_event_loader(data, 5, is_training=True, num_workers=2)
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([clips for clips, _ in loader])
    resumed = create_event_loader(data, 5, is_training=True, num_workers=2)
    resumed.set_epoch(1)
    epochs.append([clips for clips, _ in resumed])

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(epochs[a], epochs[b], strict=True))

    assert same(0, 2)
    assert same(1, 3)
    assert not same(0, 1)


def test_workers_draw_different_numbers_of_torch_and_numpy():
    loader = create_event_loader(RandomNumbers(), 2, num_workers=2)
    first = numbers(loader)
    assert len(first[:, 0].unique()) == 8
    assert len(first[:, 1].unique()) == 8
    loader.set_epoch(0)
    assert torch.equal(numbers(loader), first)
    loader.set_epoch(1)
    assert not torch.equal(numbers(loader), first)
    assert not torch.equal(numbers(create_event_loader(RandomNumbers(), 2, seed=1, num_workers=2)), first)


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        loader = create_event_loader(RandomNumbers(), 8, is_training=True, seed=seed, num_workers=0)
        loader.set_epoch(epoch)
        return tuple(numbers(loader)[:, 2].tolist())

    orders = {(s, e): order(s, e) for s in (0, 1, 2) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 9
    assert order(1, 2) == orders[1, 2]


def test_distributed_parts(monkeypatch, data):
    parts, seeds = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        loader = create_event_loader(RandomNumbers(), 2, is_training=True, num_workers=1, distributed=True)
        loader.set_epoch(3)
        out = numbers(loader)
        parts.append(set(out[:, 2].tolist()))
        seeds.append(out[0, 0].item())
        with pytest.raises(ValueError, match="batch_size=6 is more than the 4"):
            create_event_loader(RandomNumbers(), 6, is_training=True, distributed=True)
    assert parts[0] | parts[1] == set(range(8))
    assert not parts[0] & parts[1]
    assert seeds[0] != seeds[1]


def test_a_recording_spoilt_in_the_middle_of_an_epoch(data):
    data.recordings[7][0].write_bytes(b"123")
    with pytest.raises(RuntimeError, match=r"7\.bin: has 3 bytes"):
        list(create_event_loader(data, 5, num_workers=1))
    data.on_error = "skip"
    assert [len(clips) for clips, _ in create_event_loader(data, 5, num_workers=1)] == [5, 5]


@pytest.mark.parametrize(("batch_size", "message"), [(0, "batch_size=0"), (11, "more than the 10 recordings")])
def test_bad_batch_size(batch_size, message, data):
    with pytest.raises(ValueError, match=message):
        create_event_loader(data, batch_size, is_training=True)


def test_a_model_trains_on_the_batches(data):
    model = timm.create_model("qkformer_hst2_256", num_classes=3, embed_dims=(8, 16, 32), num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mixup = EventMixup(mixup_alpha=0.5, cutmix_alpha=1.0, num_classes=3)
    before = [p.detach().clone() for p in model.parameters()]
    for clips, targets in create_event_loader(data, 4, is_training=True, num_workers=1):
        clips, soft = mixup(clips, targets)
        logits = model(clips)
        assert logits.shape == (4, 3)
        loss = -(soft * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
