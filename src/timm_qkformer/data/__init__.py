"""Event streams: recordings to clips [B, T, 2, H, W], their augmentation and loading."""

from .augment import RELEASE_AUGMENTATIONS, EventAugment, EventMixup, cutout, roll, rotate, shear_x, translate
from .cache import FrameCache
from .dataset import EventDataset
from .events import EventFileError, Events, FrameSpec, check_events, events_to_frames
from .formats import EVENT_SUFFIXES, read_events
from .loader import create_event_loader
from .sampling import SharedRandomSampler, split_by_class
from .sources import create_event_dataset

__all__ = [
    "EVENT_SUFFIXES",
    "RELEASE_AUGMENTATIONS",
    "EventAugment",
    "EventDataset",
    "EventFileError",
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
