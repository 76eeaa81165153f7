"""Datasets by name: small images in memory and event frames, augmented in batches; bigger ones by timm's readers."""

from spikezoo.data.catalogue import create_loader, dataset_info, list_datasets, load_arrays, natural_dataset
from spikezoo.data.events import is_event_dataset
from spikezoo.data.images import is_read_by_timm
from spikezoo.data.info import Batch, DatasetInfo, Loader
from spikezoo.data.loaders import ArrayLoader, EventLoader, TimmLoader
from spikezoo.data.options import LoaderOptions

__all__ = [
    "ArrayLoader",
    "Batch",
    "DatasetInfo",
    "EventLoader",
    "Loader",
    "LoaderOptions",
    "TimmLoader",
    "create_loader",
    "dataset_info",
    "is_event_dataset",
    "is_read_by_timm",
    "list_datasets",
    "load_arrays",
    "natural_dataset",
]
