"""The Hugging Face Hub: pull checkpoints (client), write their card, push them."""

from spikezoo.hub.card import write_card as write_card
from spikezoo.hub.client import HubError as HubError
from spikezoo.hub.client import check_push as check_push
from spikezoo.hub.client import check_repo_id as check_repo_id
from spikezoo.hub.client import pull as pull
from spikezoo.hub.push import push_all as push_all
from spikezoo.hub.push import push_folder as push_folder
from spikezoo.hub.push import push_to_hub as push_to_hub
