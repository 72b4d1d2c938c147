"""Event streams: recordings to clips [B, T, 2, H, W], their augmentation and loading."""

from .augment import RELEASE_AUGMENTATIONS, EventAugment, cutout, roll, rotate, shear_x, translate
from .cache import FrameCache
from .dataset import EventDataset
from .events import EVENT_SUFFIXES, EventFileError, Events, check_events, read_events
from .frames import FrameSpec, events_to_frames
from .loader import EventLoader, create_event_loader
from .mixup import EventMixup
from .sampling import SharedRandomSampler
from .sources import EVENT_DATASETS, create_event_dataset
from .splits import split_by_class

__all__ = [
    "EVENT_DATASETS",
    "EVENT_SUFFIXES",
    "RELEASE_AUGMENTATIONS",
    "EventAugment",
    "EventDataset",
    "EventFileError",
    "EventLoader",
    "EventMixup",
    "Events",
    "FrameCache",
    "FrameSpec",
    "SharedRandomSampler",
    "check_events",
    "create_event_dataset",
    "create_event_loader",
    "cutout",
    "events_to_frames",
    "read_events",
    "roll",
    "rotate",
    "shear_x",
    "split_by_class",
    "translate",
]
