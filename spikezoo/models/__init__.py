"""Model families; importing this package registers them."""

from spikezoo.models import autost as autost
from spikezoo.models import metaspikeformer as metaspikeformer
from spikezoo.models import ms_resnet as ms_resnet
from spikezoo.models import plif as plif
from spikezoo.models import qkformer as qkformer
from spikezoo.models import sdt as sdt
from spikezoo.models import sew_resnet as sew_resnet
from spikezoo.models import spikformer as spikformer
from spikezoo.models import spiking_mlp as spiking_mlp
from spikezoo.models import spiking_resnet as spiking_resnet
from spikezoo.models import spiking_vgg as spiking_vgg
from spikezoo.models import spikingformer as spikingformer
from spikezoo.models import spikingresformer as spikingresformer
from spikezoo.models._base import SpikingModel as SpikingModel
