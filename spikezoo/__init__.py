"""spikezoo: named spiking neural networks, with weights that load and numbers that can be trusted."""

from spikezoo import models as models
from spikezoo import search as search
from spikezoo._version import __version__ as __version__
from spikezoo.checkpoint import load_sparse_file as load_sparse_file
from spikezoo.convert import convert as convert
from spikezoo.counting import Count as Count
from spikezoo.counting import count as count
from spikezoo.counting import count_loader as count_loader
from spikezoo.deploy import deploy as deploy
from spikezoo.export import export as export
from spikezoo.hub import HubError as HubError
from spikezoo.hub import push_folder as push_folder
from spikezoo.hub import push_to_hub as push_to_hub
from spikezoo.hub import save_checkpoint as save_checkpoint
from spikezoo.neurons import firing_rates as firing_rates
from spikezoo.registry import create_model as create_model
from spikezoo.registry import is_model as is_model
from spikezoo.registry import list_models as list_models
from spikezoo.registry import list_pretrained as list_pretrained
from spikezoo.registry import model_info as model_info
from spikezoo.transforms import apply as apply
from spikezoo.transforms import bake as bake
from spikezoo.transforms import compact as compact
from spikezoo.transforms import fold_bn as fold_bn
from spikezoo.transforms import fold_mpbn as fold_mpbn
from spikezoo.transforms import register_transform as register_transform
