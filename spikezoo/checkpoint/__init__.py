"""Checkpoints: files written atomically, read with checks, loaded strictly or not at all.

A checkpoint is a folder of ``model.safetensors`` (see :mod:`spikezoo.checkpoint.sparse` for the code of its tensors)
and ``config.json``, which says how to make the model, what was measured, and the sha256 of the weights and of itself.
"""

from spikezoo.checkpoint.config import Config as Config
from spikezoo.checkpoint.config import known_facts as known_facts
from spikezoo.checkpoint.config import read_config as read_config
from spikezoo.checkpoint.files import CONFIG_NAME as CONFIG_NAME
from spikezoo.checkpoint.files import WEIGHTS_NAME as WEIGHTS_NAME
from spikezoo.checkpoint.files import atomic as atomic
from spikezoo.checkpoint.files import check_run_file as check_run_file
from spikezoo.checkpoint.files import check_target as check_target
from spikezoo.checkpoint.files import file_hash as file_hash
from spikezoo.checkpoint.files import find_weights as find_weights
from spikezoo.checkpoint.files import read_metadata as read_metadata
from spikezoo.checkpoint.files import read_table as read_table
from spikezoo.checkpoint.files import write_metadata as write_metadata
from spikezoo.checkpoint.state import load_state as load_state
from spikezoo.checkpoint.state import save_state as save_state
from spikezoo.checkpoint.weights import check_nan as check_nan
from spikezoo.checkpoint.weights import copy_checkpoint as copy_checkpoint
from spikezoo.checkpoint.weights import load_sparse_file as load_sparse_file
from spikezoo.checkpoint.weights import load_weights as load_weights
from spikezoo.checkpoint.weights import read_weights as read_weights
from spikezoo.checkpoint.weights import stored_numbers as stored_numbers
from spikezoo.checkpoint.weights import write_checkpoint as write_checkpoint
