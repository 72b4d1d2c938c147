"""Data sets from their own files, in folders laid out as the downloads are."""

import warnings

import numpy as np
import pytest
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS_CLASS_NAMES

from event_files import random_events, write_aedat2, write_aedat3, write_atis
from event_formats import write_dat, write_evt3, write_mat, write_seconds
from timm_qkformer.data import Events, FrameSpec, create_event_dataset, events_to_frames

DVS = (128, 128)
pytestmark = pytest.mark.filterwarnings("ignore:.* recordings are there")


def cifar10_dvs(root, per_class=2):
    """As the archives unpack."""
    for target, name in enumerate(CIFAR10DVS_CLASS_NAMES):
        for i in range(per_class):
            write_aedat2(root / name / f"cifar10_{name}_{i}.aedat", random_events(60, DVS, seed=10 * i + target))


@pytest.mark.parametrize("folder", [".", "extract"])
def test_cifar10_dvs_from_its_recordings_is_spikingjellys(folder, tmp_path):
    from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS

    cifar10_dvs(tmp_path / folder)
    data = create_event_dataset("cifar10dvs", tmp_path, "train", time_steps=2, train_ratio=0.5)
    assert [path.suffix for path, _ in data.recordings] == [".aedat"] * 10
    assert data.split == "train, 0.5 of each class in the order of names"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    CIFAR10DVS.create_raw_from_extracted(tmp_path / folder, theirs) if folder == "extract" else None
    for target, (clip, label) in enumerate(data):
        assert label == target
        events = random_events(60, DVS, seed=target)
        if folder == "extract":
            name = CIFAR10DVS_CLASS_NAMES[target]
            loaded = np.load(theirs / name / f"cifar10_{name}_0.npz")
            np.testing.assert_array_equal(loaded["x"], events.x)
        np.testing.assert_array_equal(clip.numpy(), events_to_frames(events, FrameSpec(2), DVS))


def test_what_is_missing_of_cifar10_dvs_is_listed(tmp_path):
    cifar10_dvs(tmp_path, 1)
    with pytest.warns(UserWarning, match=r"CIFAR10-DVS in .*: 10 of 10,000 recordings are there"):
        create_event_dataset("cifar10dvs", tmp_path, time_steps=2)
    for name in ("dog", "ship"):
        (tmp_path / name / f"cifar10_{name}_0.aedat").unlink()
        (tmp_path / name).rmdir()
    with pytest.raises(FileNotFoundError, match="lacks the class folders dog, ship"):
        create_event_dataset("cifar10dvs", tmp_path)


def dvs128_gesture(root):
    folder = root / "DvsGesture"
    for user, split in (("user01_led", "train"), ("user24_led", "test")):
        write_aedat3(folder / f"{user}.aedat", random_events(2000, DVS, seed=len(user), span=1_200_000))
        lines = [f"{i + 1},{i * 100_000},{(i + 1) * 100_000}" for i in range(11)]
        (folder / f"{user}_labels.csv").write_text("\n".join(["class,startTime_usec,endTime_usec", *lines]))
        (folder / f"trials_to_{split}.txt").write_text(f"{user}.aedat\n")
    return folder


def test_dvs128_gesture_from_its_recordings(tmp_path):
    dvs128_gesture(tmp_path)
    data = create_event_dataset("dvs128gesture", tmp_path, "test", time_steps=2)
    assert data.class_names == ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    assert data.targets == list(range(11))
    assert data.split == "test, the data set's own"
    events = random_events(2000, DVS, seed=len("user24_led"), span=1_200_000)
    inside = (events.t >= 200_000) & (events.t < 300_000)  # the third gesture, class 2, is the fourth name
    third = Events(*(getattr(events, name)[inside] for name in "txyp"))
    np.testing.assert_array_equal(data[3][0].numpy(), events_to_frames(third, FrameSpec(2), DVS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DvsGesture", "events_np"]


def test_what_is_missing_of_dvs128_gesture_is_listed(tmp_path):
    folder = dvs128_gesture(tmp_path)
    (folder / "user01_led_labels.csv").unlink()
    (folder / "trials_to_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 4 files: user01_led_labels\.csv, trials_to_test\.txt"):
        create_event_dataset("dvs128gesture", tmp_path)
    assert not (tmp_path / "events_np").exists()


@pytest.mark.parametrize("line", ["12,0,5", "1,5,5", "1,2", "a,b,c"])
def test_bad_labels(line, tmp_path):
    folder = dvs128_gesture(tmp_path)
    (folder / "user01_led_labels.csv").write_text(f"class,startTime_usec,endTime_usec\n{line}\n")
    with pytest.raises(ValueError, match="line 2 is"):
        create_event_dataset("dvs128gesture", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DvsGesture"]


def test_ncaltech101(tmp_path):
    for name in ("BACKGROUND_Google", "accordion", "airplanes"):
        for i in range(4):
            write_atis(tmp_path / "Caltech101" / name / f"image_{i:04}.bin", random_events(50, (180, 240), seed=i))
    train = create_event_dataset("ncaltech101", tmp_path, "train", time_steps=2, train_ratio=0.5, split_seed=3)
    assert train.class_names == ("BACKGROUND_Google", "accordion", "airplanes")
    assert len(train) == 6
    assert train.split == "train, 0.5 of each class shuffled with seed 3"
    assert train[0][0].shape == (2, 2, 180, 240)


def test_ncars(tmp_path):
    for split in ("train", "test"):
        for name in ("cars", "background"):
            folder = tmp_path / "Prophesee_Dataset_n_cars" / f"n-cars_{split}" / name
            folder.mkdir(parents=True)
            for i in range(2):
                events = random_events(50, (90, 110), seed=i)
                write_dat(folder / f"obj_00000{i}_td.dat", events)
    test = create_event_dataset("ncars", tmp_path, "test", time_steps=2, size=(50, 60))
    assert test.class_names == ("background", "cars")
    assert test.targets == [0, 0, 1, 1]
    assert test[0][0].shape == (2, 2, 50, 60)


def test_asl_dvs_stands_upright(tmp_path):
    size = (180, 240)
    for letter in "abcdefghiklmnopqrstuvwxy":
        (tmp_path / letter).mkdir()
        for i in range(2):
            write_mat(tmp_path / letter / f"{letter}_{i:04}.mat", random_events(50, size, seed=i))
    train = create_event_dataset("asldvs", tmp_path, "train", time_steps=2, train_ratio=0.5)
    assert len(train) == 24
    events = random_events(50, size)
    upright = Events(events.t, 239 - events.x, 179 - events.y, events.p)
    np.testing.assert_array_equal(train[5][0].numpy(), events_to_frames(upright, FrameSpec(2), size))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ncaltech101", "expected Caltech101.zip, unpacked"),
        ("ncars", r"expected .*n-cars_train/\{cars,background\}/\*\.dat"),
        ("asldvs", r"expected .*/a/a_0001\.mat"),
    ],
)
def test_missing_data_says_what_is_expected(name, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        create_event_dataset(name, tmp_path)


def test_folders_of_any_formats(tmp_path):
    size = (180, 240)
    formats = {"clap": ((".raw", write_evt3), (".dat", write_dat)), "wave": ((".txt", write_seconds),) * 2}
    for label, writers in formats.items():
        (tmp_path / label).mkdir()
        for i, (suffix, write) in enumerate(writers):
            write(tmp_path / label / f"{i}{suffix}", random_events(50, size, seed=i))
    data = create_event_dataset("folder", tmp_path, "train", time_steps=2, sensor_size=size)
    assert len(data) == 4
    for index in range(4):
        expected = events_to_frames(random_events(50, size, seed=index % 2), FrameSpec(2), size)
        np.testing.assert_array_equal(data[index][0].numpy(), expected)


def test_the_cache_tells_orientations_apart(tmp_path):
    cifar10_dvs(tmp_path, 1)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = create_event_dataset("cifar10dvs", tmp_path, time_steps=2, cache_dir=tmp_path / "cache")
        expected = events_to_frames(random_events(60, DVS, seed=0), FrameSpec(2), DVS)
        np.testing.assert_array_equal(data[0][0].numpy(), expected)
    key = data._parameters()
    data.orient = ""
    assert key != data._parameters()


def test_the_recipe_trains_on_the_original_recordings(tmp_path, capsys):
    """`timm-qkformer train -c cifar10dvs --data-dir FOLDER`, with a small model and a split by a seed."""
    import yaml

    from timm_qkformer import cli

    cifar10_dvs(tmp_path / "data", 2)
    command = f"train -c cifar10dvs --data-dir {tmp_path / 'data'} --output {tmp_path} --experiment run --device cpu"
    small = (
        "--model-kwargs time_steps=2 embed_dims=[8,16,32] num_heads=4 --input-size 2 32 32 --batch-size 4 --workers 0"
    )
    split = "--event-train-ratio 0.5 --event-split-seed 7 --no-amp --epochs 1 --warmup-epochs 0 --cooldown-epochs 0"
    assert cli.main(f"{command} {small} {split}".split()) == 0, capsys.readouterr().err
    settings = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (settings["event_train_ratio"], settings["event_split_seed"]) == (0.5, 7)
    assert (tmp_path / "run" / "last.pth.tar").is_file()
