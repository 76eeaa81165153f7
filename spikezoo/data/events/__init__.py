"""Event recordings by name: readers of many formats, fixed splits, and frames of events, which are cached."""

from spikezoo.data.events.frames import EventFrames, event_info, open_events
from spikezoo.data.events.readers import read_events
from spikezoo.data.events.recordings import is_event_dataset, list_event_datasets, write_split

__all__ = [
    "EventFrames",
    "event_info",
    "is_event_dataset",
    "list_event_datasets",
    "open_events",
    "read_events",
    "write_split",
]
