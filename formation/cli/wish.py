"""Makes wishes: an event, signed by the account for the network that the node belongs to."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formation.cli.keystore import Keystore, Signer
from formation.core.errors import NotFoundError, UnavailableError, UsageError

if TYPE_CHECKING:
    from formation.cli.context import Cli
    from formation.core.event import Event
    from formation.core.intent import SignedIntent

_NETWORK_ID_SIZE_BYTES = 32
_MS_PER_S = 1000
# What the holder of a VM asks for before it shows a log or a console to another node.
_PERMIT_VERB = "vm.attach"
# What a node asks for before it shows its status to another.
_READ_VERB = "node.read"
_EMPTY_MAP = b"\xa0"


@dataclass(frozen=True, slots=True)
class Made:
    """A signed wish and what can be told of it beforehand."""

    wish: SignedIntent
    object_id: str
    trace_id: str


def make_permit(cli: Cli, vm_id: str) -> bytes:
    """The account's signed leave to look into its VM, wherever it runs: COSE bytes of an intent that changes nothing.

    Empty without a usable key: the node that is asked may hold the VM itself, and then wants none.
    """
    try:
        return _sign(cli, verb=_PERMIT_VERB, body=_EMPTY_MAP, object_id=vm_id).signed.raw
    except (NotFoundError, UsageError):
        return b""


def make_read_permit(cli: Cli, node_id: str) -> bytes:
    """The account's signed wish to read another node's status; empty without a usable key, and then that node says why not."""
    try:
        return _sign(cli, verb=_READ_VERB, body=_EMPTY_MAP, object_id=node_id).signed.raw
    except (NotFoundError, UsageError):
        return b""


def make_wish(cli: Cli, event: Event, *, object_id: str = "", signer: Signer | None = None) -> Made:
    """Sign an event as an intent of the account; not sent yet.

    Args:
      cli: gives the key and the node, whose network the intent is for.
      event: what is wished.
      object_id: what it is about; empty where the wish makes a VM.
      signer: another account or key than the configured one.

    Raises:
      NotFoundError, UsageError: no usable account key.
      UnavailableError: no node to ask for its network.
    """
    from formation.core.event import event_body
    from formation.core.ids import trace_id_of, vm_id_of

    wish = _sign(cli, verb=event.verb, body=event_body(event), object_id=object_id, signer=signer)
    return Made(wish, object_id or vm_id_of(wish.digest), trace_id_of(wish.digest))


def _sign(cli: Cli, *, verb: str, body: bytes, object_id: str, signer: Signer | None = None) -> SignedIntent:
    from formation.core.ids import NetworkId
    from formation.core.intent import LIFETIME_MS, NONCE_SIZE_BYTES, Intent, sign_intent

    signer = signer or Keystore(cli.path("client.account_key")).signer()
    key = signer.key
    network_id = NetworkId(_network_id(cli.own_client.get("/v1/status"), cli.own_client.host))
    now_ms = int(time.time() * _MS_PER_S)
    intent = Intent(
        account=signer.account_key,
        verb=verb,
        object_id=object_id,
        body=body,
        nonce=secrets.token_bytes(NONCE_SIZE_BYTES),
        created_ms=now_ms,
        expires_ms=now_ms + LIFETIME_MS,
        key=key.public_key,
    )
    return sign_intent(key.sign, intent, network_id=network_id)


def node_names(cli: Cli) -> dict[str, str]:
    """Name of each node by its id, for people; empty when the node cannot say."""
    return {str(node.get("node_id", "")): str(node.get("name", "")) for node in cli.client.rows("/v1/nodes", "nodes")}


def _network_id(status: Any, host: str) -> bytes:
    try:
        network_id = bytes.fromhex(status["network"]["id"])
    except (TypeError, KeyError, ValueError):
        network_id = b""
    if len(network_id) != _NETWORK_ID_SIZE_BYTES:
        raise UnavailableError(f"{host} does not say which network it belongs to", hint="is it a Formation node?")
    return network_id
