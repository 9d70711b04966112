"""Makes wishes: an event, signed by the account for the network that the node belongs to."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formation.core.errors import UnavailableError

if TYPE_CHECKING:
    from formation.cli.context import Cli
    from formation.core.event import Event
    from formation.core.intent import SignedIntent

_NETWORK_ID_SIZE_BYTES = 32
_MS_PER_S = 1000


@dataclass(frozen=True, slots=True)
class Made:
    """A signed wish and what can be told of it beforehand."""

    wish: SignedIntent
    object_id: str
    trace_id: str


def make_wish(cli: Cli, event: Event, *, object_id: str = "") -> Made:
    """Sign an event as an intent of the account; not sent yet.

    Args:
      cli: gives the key and the node, whose network the intent is for.
      event: what is wished.
      object_id: what it is about; empty where the wish makes a VM.

    Raises:
      NotFoundError, UsageError: no usable account key.
      UnavailableError: no node to ask for its network.
    """
    from formation.core.event import event_body
    from formation.core.ids import NetworkId, trace_id_of, vm_id_of
    from formation.core.intent import LIFETIME_MS, NONCE_SIZE_BYTES, Intent, sign_intent

    key = cli.key()
    network_id = NetworkId(_network_id(cli.client.get("/v1/status"), cli.client.host))
    now_ms = int(time.time() * _MS_PER_S)
    intent = Intent(
        account=key.public_key,
        verb=event.verb,
        object_id=object_id,
        body=event_body(event),
        nonce=secrets.token_bytes(NONCE_SIZE_BYTES),
        created_ms=now_ms,
        expires_ms=now_ms + LIFETIME_MS,
    )
    wish = sign_intent(key.sign, intent, network_id=network_id)
    return Made(wish, object_id or vm_id_of(wish.digest), trace_id_of(wish.digest))


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
