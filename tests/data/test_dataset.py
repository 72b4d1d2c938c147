"""Data sets of recordings and the loaders of their clips."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import Dataset

from event_files import random_events, write_aedat4, write_atis, write_npz
from timm_qkformer.data import (
    EventAugment,
    EventDataset,
    EventFileError,
    EventMixup,
    FrameSpec,
    create_event_loader,
    events_to_frames,
)

SIZE = (34, 34)
SPEC = FrameSpec(4, size=(16, 16))


@pytest.fixture
def recordings(tmp_path):
    return [(write_atis(tmp_path / f"{i}.bin", random_events(500 + i, seed=i)), i % 2) for i in range(6)]


@pytest.fixture
def spoilt(recordings, tmp_path):
    """Recordings 1, 2 and 4 are truncated, empty and missing."""
    recordings[1][0].write_bytes(recordings[1][0].read_bytes()[:-3])
    recordings[2][0].write_bytes(b"")
    recordings[4][0].unlink()
    return recordings


def dataset(recordings, spec=SPEC, sensor_size=SIZE, **kwargs):
    return EventDataset(recordings, ("even", "odd"), spec, sensor_size, **kwargs)


@pytest.mark.parametrize("cached", [False, True])
def test_clips(cached, recordings, tmp_path):
    data = dataset(recordings, cache_dir=tmp_path / "cache" if cached else None)
    assert len(data) == 6
    assert data.targets == [0, 1] * 3
    for i in range(6):
        clip, target = data[i]
        assert clip.dtype == torch.float32
        assert clip.shape == (4, 2, 16, 16)
        expected = events_to_frames(random_events(500 + i, seed=i), SPEC, SIZE)
        np.testing.assert_array_equal(clip.numpy(), expected)
        assert target == i % 2
    assert torch.equal(data[-1][0], data[5][0])
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]


def test_the_transform_sees_each_clip(recordings):
    data = dataset(recordings, transform=lambda clip: clip * 2)
    assert torch.equal(data[3][0], dataset(recordings)[3][0] * 2)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_recordings_are_refused_by_name_and_number(cached, spoilt, tmp_path):
    with pytest.raises(ValueError, match="3 of 6 recordings cannot be used") as caught:
        dataset(spoilt, cache_dir=tmp_path / "cache" if cached else None)
    for text in ("1.bin: has 2502 bytes", "2.bin: the file is empty", "4.bin: no such file", "on_error='skip'"):
        assert text in str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_recordings_are_skipped_by_name_and_number(cached, spoilt, tmp_path):
    for _ in range(2):  # the second time with a cache that knows the good ones
        with pytest.warns(
            UserWarning, match=r"3 of 6 recordings cannot be used: .*1\.bin: .*2\.bin: .*4\.bin: "
        ) as seen:
            data = dataset(spoilt, on_error="skip", cache_dir=tmp_path / "cache" if cached else None)
        assert len(seen) == 1
        assert [path.name for path, _ in data.recordings] == ["0.bin", "3.bin", "5.bin"]
        assert data.targets == [0, 1, 1]
        assert {path.name for path in data.skipped} == {"1.bin", "2.bin", "4.bin"}
        assert len([data[i] for i in range(len(data))]) == 3


def test_long_lists_of_bad_recordings_are_cut(tmp_path):
    with pytest.raises(ValueError, match="and 15 more"):
        dataset([(tmp_path / f"{i}.bin", 0) for i in range(25)])


def test_a_class_that_loses_all_its_recordings_is_named(recordings):
    for path, target in recordings:
        if target == 1:
            path.unlink()
    with pytest.warns(UserWarning, match="of odd none is left"):
        assert len(dataset(recordings, on_error="skip")) == 3


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 recordings cannot be used"):
        dataset([(tmp_path / "a.bin", 0)], on_error="skip")
    with pytest.raises(ValueError, match="no recordings"):
        dataset([])


def test_events_off_the_sensor_are_a_bad_recording(recordings):
    with pytest.raises(ValueError, match=r"6 of 6 recordings .* outside the sensor"):
        dataset(recordings, FrameSpec(4), (16, 16))


def test_a_recording_spoilt_after_the_start(recordings):
    data = dataset(recordings)
    recordings[3][0].write_bytes(b"123")
    with pytest.raises(EventFileError, match=r"3\.bin"):
        data[3]
    data.on_error = "skip"
    with pytest.warns(UserWarning, match=r"next recording takes its place: .*3\.bin"):
        clip, target = data[3]
    assert torch.equal(clip, data[4][0])
    assert target == 0


def test_all_recordings_gone_after_the_start(recordings):
    data = dataset(recordings, on_error="skip")
    for path, _ in recordings:
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of the 6 recordings"):
            data[0]


def test_a_cache_spares_the_reading(recordings, tmp_path, monkeypatch):
    first = dataset(recordings, cache_dir=tmp_path / "cache")
    clips = [first[i][0] for i in range(6)]

    def never(path, **options):
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr("timm_qkformer.data.dataset.open_events", never)
        again = dataset(recordings, cache_dir=tmp_path / "cache")
        assert all(torch.equal(again[i][0], clips[i]) for i in range(6))
    # Other parameters have their own entries.
    other = dataset(recordings, FrameSpec(4, "time", (16, 16)), cache_dir=tmp_path / "cache")
    assert not torch.equal(other[0][0], clips[0])


def test_the_size_of_the_sensor(tmp_path):
    npz = [(write_npz(tmp_path / "a.npz", random_events(100)), 0)]
    with pytest.raises(ValueError, match=r"sensor_size=\(height, width\) is needed: a\.npz"):
        dataset(npz, sensor_size=None)
    with pytest.raises(ValueError, match="larger than the sensor"):
        dataset(npz, FrameSpec(4, size=(64, 64)))


def test_cameras_of_several_sizes(tmp_path):
    pytest.importorskip("aedat")
    recordings = [
        (write_aedat4(tmp_path / f"{size[0]}.aedat4", random_events(100, size)), 0) for size in ((20, 30), (24, 32))
    ]
    with pytest.raises(ValueError, match=r"several sizes, \[\(20, 30\), \(24, 32\)\]"):
        dataset(recordings, FrameSpec(4), None)
    assert dataset(recordings, FrameSpec(4, size=(16, 16)), None)[1][0].shape == (4, 2, 16, 16)
    with pytest.raises(ValueError, match=r"1 of 2 recordings .*20\.aedat4: size=\(22, 22\) is larger"):
        dataset(recordings, FrameSpec(4, size=(22, 22)), None)


def test_bad_on_error(recordings):
    with pytest.raises(ValueError, match="on_error='ignore'"):
        dataset(recordings, on_error="ignore")


def test_paths_may_be_relative(recordings, monkeypatch):
    monkeypatch.chdir(recordings[0][0].parent)
    assert len(dataset([(Path("0.bin"), 0)], cache_dir="cache")) == 1


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
