import hashlib
import multiprocessing
import socket
import zipfile

import numpy as np
import pytest
import timm
import torch
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS, CIFAR10DVS_CLASS_NAMES
from spikingjelly.datasets.utils import split_to_train_test_set

from event_files import (
    random_events,
    real_aedat4,
    unpack_real_nmnist,
    write_aedat2,
    write_aedat3,
    write_aedat4,
    write_atis,
    write_npz,
)
from timm_qkformer.data import FrameSpec, create_event_dataset, create_event_loader, events_to_frames, split_by_class

DVS = (128, 128)
pytestmark = pytest.mark.filterwarnings("ignore:.* recordings are there")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def names(data):
    return [f"{path.parent.name}/{path.stem}" for path, _ in data.recordings]


def cifar10_dvs_events(root, per_class=12):
    for target, name in enumerate(CIFAR10DVS_CLASS_NAMES):
        for i in range(per_class):
            events = random_events(100, DVS, seed=target * 100 + i)
            write_npz(root / "events_np" / name / f"cifar10_{name}_{i}.npz", events)


# Splits

TARGETS = [0] * 25 + [2, 1] * 17 + [2] * 3


def test_the_split_is_the_releases():
    train, test = split_to_train_test_set(0.9, [(None, t) for t in TARGETS], 3)
    assert split_by_class(TARGETS, 0.9) == (train.indices, test.indices)


def test_the_split_of_cifar10_dvs():
    train, test = split_by_class([i // 1000 for i in range(10_000)])
    assert (len(train), len(test)) == (9000, 1000)
    assert train[:2] == [0, 1]
    assert test[:2] == [900, 901]


def test_the_seed_of_a_split():
    first, again, other = (split_by_class(TARGETS, 0.5, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first[0] + first[1]) == list(range(len(TARGETS)))
    for target in range(3):
        assert sum(TARGETS[i] == target for i in first[0]) == -(-TARGETS.count(target) // 2)


@pytest.mark.parametrize("ratio", [0, 1, -0.1])
def test_a_bad_ratio(ratio):
    with pytest.raises(ValueError, match="train_ratio="):
        split_by_class(TARGETS, ratio)


# CIFAR10-DVS


def test_cifar10_dvs_is_spikingjellys_with_the_published_split(tmp_path):
    cifar10_dvs_events(tmp_path)
    # As the release makes its data, train.py of cifar10-dvs.
    theirs = CIFAR10DVS(root=tmp_path, data_type="frame", frames_number=4, split_by="number")
    for split, subset in zip(("train", "test"), split_to_train_test_set(0.9, theirs, 10), strict=True):
        ours = create_event_dataset("cifar10dvs", tmp_path, split, time_steps=4)
        assert len(ours) == len(subset) == {"train": 110, "test": 10}[split]
        assert ours.class_names == CIFAR10DVS_CLASS_NAMES
        for (clip, target), (frames, label) in zip(ours, subset, strict=True):
            np.testing.assert_array_equal(clip.numpy(), frames)
            assert target == label


def test_skipping_does_not_move_recordings_between_the_splits(tmp_path):
    cifar10_dvs_events(tmp_path)
    before = [names(create_event_dataset("cifar10dvs", tmp_path, split, time_steps=2)) for split in ("train", "test")]
    (tmp_path / "events_np" / "bird" / "cifar10_bird_0.npz").write_bytes(b"broken")
    after = []
    with pytest.warns(UserWarning, match="1 of 110 recordings"):
        after.append(names(create_event_dataset("cifar10dvs", tmp_path, "train", time_steps=2, on_error="skip")))
    after.append(names(create_event_dataset("cifar10dvs", tmp_path, "test", time_steps=2)))
    before[0].remove("bird/cifar10_bird_0")
    assert after == before


def test_cifar10_dvs_split_by_a_seed(tmp_path):
    cifar10_dvs_events(tmp_path, 4)
    kwargs = {"time_steps": 2, "train_ratio": 0.5, "split_seed": 1}
    train, test = (names(create_event_dataset("cifar10dvs", tmp_path, split, **kwargs)) for split in ("train", "test"))
    assert len(train) == len(test) == 20
    assert not set(train) & set(test)
    assert train != names(create_event_dataset("cifar10dvs", tmp_path, "train", time_steps=2, train_ratio=0.5))


def cifar10_dvs_archives(root, monkeypatch):
    """The original archives, one recording a class, and their checksums in spikingjelly's list."""
    (root / "download").mkdir()
    resources = []
    for target, name in enumerate(CIFAR10DVS_CLASS_NAMES):
        recording = write_aedat2(root / "made" / f"cifar10_{name}_0.aedat", random_events(50, DVS, seed=target))
        archive = root / "download" / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.write(recording, f"{name}/{recording.name}")
        resources.append((archive.name, "https://example.org", hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(CIFAR10DVS, "resource_url_md5", classmethod(lambda cls: resources))


def test_cifar10_dvs_from_the_original_archives(tmp_path, monkeypatch):
    cifar10_dvs_archives(tmp_path, monkeypatch)
    data = create_event_dataset("cifar10dvs", tmp_path, time_steps=2)
    assert len(data) == 10
    for target, (clip, label) in enumerate(data):
        assert label == target
        expected = events_to_frames(random_events(50, DVS, seed=target), FrameSpec(2), DVS)
        np.testing.assert_array_equal(clip.numpy(), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["download", "extract", "made"]


def test_a_damaged_archive_is_named_and_kept(tmp_path, monkeypatch):
    cifar10_dvs_archives(tmp_path, monkeypatch)
    damaged = tmp_path / "download" / "frog.zip"
    damaged.write_bytes(b"half")
    (tmp_path / "download" / "ship.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)frog\.zip is damaged.*ship\.zip is missing"):
        create_event_dataset("cifar10dvs", tmp_path)
    assert damaged.read_bytes() == b"half"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["download", "made"]


def test_an_interrupted_conversion_starts_again(tmp_path, monkeypatch):
    cifar10_dvs_archives(tmp_path, monkeypatch)

    def interrupted(download_root, extract_root):
        (extract_root / "airplane").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10DVS, "extract_downloaded_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create_event_dataset("cifar10dvs", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["download", "made"]
    assert len(create_event_dataset("cifar10dvs", tmp_path, time_steps=2)) == 10


def test_a_conversion_that_fails(tmp_path, monkeypatch):
    cifar10_dvs_archives(tmp_path, monkeypatch)

    def fails(download_root, extract_root):
        raise ValueError("an odd archive")

    monkeypatch.setattr(CIFAR10DVS, "extract_downloaded_files", fails)
    with pytest.raises(ValueError, match=r"CIFAR10-DVS: spikingjelly could not make .*an odd archive"):
        create_event_dataset("cifar10dvs", tmp_path)


def _convert(root, barrier, counts):
    barrier.wait(30)
    counts.put(len(create_event_dataset("cifar10dvs", root, time_steps=2, cache_dir=root / "cache")))


def test_two_processes_convert_at_once(tmp_path, monkeypatch):
    cifar10_dvs_archives(tmp_path, monkeypatch)
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_convert, args=(tmp_path, barrier, counts), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    assert [counts.get(timeout=60) for _ in processes] == [10, 10]
    for process in processes:
        process.join(30)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "file"), [("cifar10dvs", "airplane.zip"), ("dvs128gesture", "DvsGesture.tar.gz"), ("nmnist", "Train.zip")]
)
def test_missing_data_says_what_to_download_and_where(name, file, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        create_event_dataset(name, tmp_path)
    assert f"{file} is missing; it is at https://" in str(caught.value)
    assert f"Download them to {tmp_path / 'download'}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_an_interrupted_spikingjelly(tmp_path):
    cifar10_dvs_events(tmp_path, 1)
    (tmp_path / "events_np.building").touch()
    with pytest.raises(ValueError, match=r"events_np\.building: spikingjelly was interrupted"):
        create_event_dataset("cifar10dvs", tmp_path)


def test_incomplete_classes(tmp_path):
    cifar10_dvs_events(tmp_path, 1)
    (tmp_path / "events_np" / "dog").rename(tmp_path / "events_np" / "train")
    with pytest.raises(FileNotFoundError, match="lacks the class folders dog"):
        create_event_dataset("cifar10dvs", tmp_path)


# DVS128 Gesture


def test_dvs128_gesture_from_the_original_recordings(tmp_path):
    from spikingjelly.datasets.dvs128_gesture import DVS128Gesture

    folder = tmp_path / "extract" / "DvsGesture"
    for user, split in (("user01_led", "train"), ("user24_led", "test")):
        events = random_events(3000, DVS, seed=len(user), span=1_200_000)
        write_aedat3(folder / f"{user}.aedat", events)
        lines = [f"{i + 1},{i * 100_000},{(i + 1) * 100_000}" for i in range(11)]
        (folder / f"{user}_labels.csv").write_text("\n".join(["class,startTime_usec,endTime_usec", *lines]))
        (folder / f"trials_to_{split}.txt").write_text(f"{user}.aedat\n")
    for split in ("train", "test"):
        ours = create_event_dataset("dvs128gesture", tmp_path, split, time_steps=4)
        theirs = DVS128Gesture(tmp_path, train=split == "train", data_type="frame", frames_number=4, split_by="number")
        assert len(ours) == len(theirs) == 11
        assert ours.class_names == tuple(theirs.classes)
        for (clip, target), (frames, label) in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(clip.numpy(), frames)
            assert target == label


# N-MNIST


def test_nmnist_unpacked(tmp_path):
    for split, count in (("Train", 3), ("Test", 1)):
        for digit in range(10):
            for i in range(count):
                write_atis(tmp_path / split / str(digit) / f"{i:05}.bin", random_events(60, seed=digit))
    train = create_event_dataset("nmnist", tmp_path, "train", time_steps=3)
    test = create_event_dataset("nmnist", tmp_path, "test", time_steps=3)
    assert (len(train), len(test)) == (30, 10)
    assert test.targets == list(range(10))
    expected = events_to_frames(random_events(60, seed=7), FrameSpec(3), (34, 34))
    np.testing.assert_array_equal(test[7][0].numpy(), expected)


def test_nmnist_in_lists(tmp_path):
    for sample in (1, 2, 60001):
        write_atis(tmp_path / f"{sample}.bs2", random_events(50, seed=sample))
    (tmp_path / "train1K.txt").write_text("#sample #class\n1\t5\n2\t0\n")
    (tmp_path / "test100.txt").write_text("#sample #class\n60001\t7\n")
    assert create_event_dataset("nmnist", tmp_path, "train", time_steps=2).targets == [5, 0]
    assert create_event_dataset("nmnist", tmp_path, "test", time_steps=2).targets == [7]
    (tmp_path / "2.bs2").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 recordings .*2\.bs2: no such file"):
        create_event_dataset("nmnist", tmp_path, "train", time_steps=2)


@pytest.mark.parametrize("line", ["1 10", "1", "one 1", "1 -1", "1 2 3"])
def test_a_bad_list(line, tmp_path):
    (tmp_path / "train.txt").write_text(f"#sample #class\n{line}\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: expected a sample and a class below 10"):
        create_event_dataset("nmnist", tmp_path)


def test_several_lists(tmp_path):
    for name in ("train1K.txt", "train60K.txt"):
        (tmp_path / name).write_text("1 1\n")
    with pytest.raises(ValueError, match=r"train1K\.txt, train60K\.txt"):
        create_event_dataset("nmnist", tmp_path)


def test_real_nmnist(tmp_path):
    root = unpack_real_nmnist(tmp_path)
    train = create_event_dataset("nmnist", root, "train", time_steps=8, cache_dir=tmp_path / "cache")
    test = create_event_dataset("nmnist", root, "test", time_steps=8, cache_dir=tmp_path / "cache")
    assert (len(train), len(test)) == (1000, 100)
    assert set(train.targets) == set(test.targets) == set(range(10))
    assert train.targets[:5] == [5, 0, 4, 1, 9]
    # 23,405 bytes hold 4,681 events, and none is lost in 8 frames.
    assert train[0][0].sum() == 4681
    # Each frame has its eighth.
    assert set(train[0][0].sum((1, 2, 3)).tolist()) == {585.0, 586.0}
    assert torch.stack([train[i][0] for i in range(50)]).mean((0, 1, 2)).argmax() // 34 in range(8, 26)  # the digit


# Folders of recordings


def test_class_folders(tmp_path):
    for name, count in (("wave", 10), ("clap", 20)):
        for i in range(count):
            write_npz(tmp_path / name / f"{i:02}.npz", random_events(50, (20, 30), seed=i))
    (tmp_path / "clap" / "notes.txt").write_text("not a recording")
    (tmp_path / ".hidden").mkdir()
    kwargs = {"time_steps": 2, "sensor_size": (20, 30)}
    train = create_event_dataset("folder", tmp_path, "train", **kwargs)
    test = create_event_dataset("folder", tmp_path, "test", **kwargs)
    assert train.class_names == ("clap", "wave")
    assert (train.targets, test.targets) == ([0] * 18 + [1] * 9, [0, 0, 1])
    assert names(test) == ["clap/18", "clap/19", "wave/09"]
    assert train[0][0].shape == (2, 2, 20, 30)
    small = create_event_dataset("folder", tmp_path, "train", time_steps=2, sensor_size=(20, 30), size=16)
    assert small[0][0].shape == (2, 2, 16, 16)


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_split_folders(name, tmp_path):
    for label in "abc":
        write_npz(tmp_path / "train" / label / "0.npz", random_events(50))
    write_npz(tmp_path / name / "b" / "1.npz", random_events(50))
    kwargs = {"time_steps": 2, "sensor_size": 34}
    assert create_event_dataset("folder", tmp_path, "train", **kwargs).targets == [0, 1, 2]
    test = create_event_dataset("folder", tmp_path, "test", **kwargs)
    assert test.targets == [1]  # though the folder has no other class
    assert test.class_names == ("a", "b", "c")


def test_a_class_may_be_called_train(tmp_path):
    for label in ("bus", "train"):
        write_npz(tmp_path / label / "0.npz", random_events(50))
    data = create_event_dataset("folder", tmp_path, "train", time_steps=2, sensor_size=34)
    assert data.class_names == ("bus", "train")


def test_a_folder_of_mixed_formats_with_a_real_recording(tmp_path):
    pytest.importorskip("aedat")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "sample.aedat4").symlink_to(real_aedat4())
    write_aedat4(tmp_path / "made" / "a.aedat4", random_events(100, (240, 320)))
    data = create_event_dataset("folder", tmp_path, "train", time_steps=16, split_by="time", size=(128, 128))
    assert data.class_names == ("made", "real")
    assert data[1][0].shape == (16, 2, 128, 128)
    assert data[1][0].sum() == 111_954
    clips, targets = next(iter(create_event_loader(data, 2, num_workers=0)))
    model = timm.create_model("qkformer_hst2_256", num_classes=2, embed_dims=(8, 16, 32), num_heads=4).eval()
    with torch.inference_mode():
        assert model(clips).shape == (2, 2)
    assert targets.tolist() == [0, 1]


def test_bad_folders(tmp_path):
    kwargs = {"sensor_size": 34}
    with pytest.raises(FileNotFoundError, match="no class folders"):
        create_event_dataset("folder", tmp_path, **kwargs)
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' is not a folder"):
        create_event_dataset("folder", tmp_path / "nowhere", **kwargs)
    write_npz(tmp_path / "train" / "a" / "0.npz", random_events(50))
    with pytest.raises(FileNotFoundError, match="has train, expected one of test, val, validation"):
        create_event_dataset("folder", tmp_path, "test", **kwargs)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(ValueError, match="class 'b' has no recordings"):
        create_event_dataset("folder", tmp_path, "train", **kwargs)


def test_an_empty_split(tmp_path):
    write_npz(tmp_path / "a" / "0.npz", random_events(50))
    with pytest.raises(ValueError, match=r"the test split .* is empty"):
        create_event_dataset("folder", tmp_path, "test", sensor_size=34)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mnist", {}, "name='mnist' is unknown, expected one of cifar10dvs, dvs128gesture, nmnist"),
        ("nmnist", {"split": "dev"}, "split='dev'"),
        ("nmnist", {"sensor_size": 28}, "sensor_size=28 is wrong for nmnist"),
    ],
)
def test_bad_arguments(name, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        create_event_dataset(name, tmp_path, **kwargs)
