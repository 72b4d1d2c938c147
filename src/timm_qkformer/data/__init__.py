"""Event streams: recordings to clips [B, T, 2, H, W], their augmentation and loading."""

from .augment import RELEASE_AUGMENTATIONS, EventAugment, EventMixup, cutout, roll, rotate, shear_x, translate
from .cache import FrameCache
from .convert import convert_events
from .dataset import EventDataset
from .events import EventFileError, Events, FrameSpec, check_events, events_to_frames
from .formats import EVENT_SUFFIXES, EventFileWarning, Recording, iter_events, open_events, read_events
from .loader import create_event_loader
from .representations import ToFrames, ToTimeSurface, ToVoxelGrid, as_clip, time_surface, voxel_grid
from .sampling import SharedRandomSampler, split_by_class
from .sources import create_event_dataset
from .summary import Summary, summarize
from .windows import Window, count_windows, iter_clips, slice_windows, time_windows

__all__ = [
    "EVENT_SUFFIXES",
    "RELEASE_AUGMENTATIONS",
    "EventAugment",
    "EventDataset",
    "EventFileError",
    "EventFileWarning",
    "EventMixup",
    "Events",
    "FrameCache",
    "FrameSpec",
    "Recording",
    "SharedRandomSampler",
    "Summary",
    "ToFrames",
    "ToTimeSurface",
    "ToVoxelGrid",
    "Window",
    "as_clip",
    "check_events",
    "convert_events",
    "count_windows",
    "create_event_dataset",
    "create_event_loader",
    "cutout",
    "events_to_frames",
    "iter_clips",
    "iter_events",
    "open_events",
    "read_events",
    "roll",
    "rotate",
    "shear_x",
    "slice_windows",
    "split_by_class",
    "summarize",
    "time_surface",
    "time_windows",
    "translate",
    "voxel_grid",
]
