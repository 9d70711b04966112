"""Making a libp2p host, and the addresses it is told: what does not change while it runs."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import structlog
from cryptography import x509
from cryptography.x509.oid import NameOID
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.security.tls.transport import IdentityConfig, TLSTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from multiaddr import Multiaddr  # type: ignore[import-untyped]
from multiaddr.utils import get_thin_waist_addresses  # type: ignore[import-untyped]

from formation.core.errors import HostError, UsageError
from formation.core.ids import NodeId
from formation.core.keys import KeyPair
from formation.p2p.libp2p_admission import HANDSHAKE_TIMEOUT_S, Admission
from formation.p2p.libp2p_muxer import Muxer
from formation.p2p.peer_book import is_dialable

# Asked for with each message of the library's; a laptop that changed its network is told of within a minute.
INTERFACES_TTL_S = 60.0
# The library's own limits refuse whoever comes last; `admission` decides long before they are reached.
_UNLIMITED = 1 << 20
_CERTIFICATE_AGE, _CERTIFICATE_VALIDITY = timedelta(days=1), timedelta(days=36_500)

Security = Literal["noise", "tls", "both"]
"""What connections are secured by; both: Noise, or TLS with peers that have no Noise."""

_logger = structlog.get_logger(__name__)


def make_host(
    key: KeyPair,
    listen: Sequence[Multiaddr],
    announce: Sequence[Multiaddr],
    *,
    security: Security = "noise",
    network_key: bytes | None = None,
) -> Any:
    """A libp2p host that does not run yet: TCP, Noise or TLS, Yamux, and limits of ours."""
    key_pair = create_new_key_pair(key.seed)
    host = new_host(
        key_pair=key_pair,
        listen_addrs=list(listen),
        announce_addrs=list(announce) or None,
        addrs_factory=None if announce else _Announced(),
        sec_opt=_secured_by(key_pair, security),
        psk=None if network_key is None else network_key.hex(),
        muxer_opt={YAMUX: Muxer},
        # The defaults limit to 10 connections per second, shrink limits under load, and keep statistics of all.
        resource_manager=ResourceManager(
            limits=ResourceLimits(max_connections=_UNLIMITED, max_streams=_UNLIMITED),
            enable_rate_limiting=False,
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
            enable_metrics=False,
            enable_connection_tracking=False,
        ),
        connection_config=ConnectionConfig(
            max_connections=_UNLIMITED,
            min_connections=0,
            low_watermark=0,
            high_watermark=_UNLIMITED,
            max_connections_per_peer=_UNLIMITED,
            inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
        ),
    )
    network = host.get_network()
    network.retry_config = RetryConfig(max_retries=0)
    network.auto_connector = _NoAutoConnector()
    network.admission = Admission()
    return host


def _secured_by(key_pair: Any, security: Security) -> dict[Any, Any]:
    """What is offered, in this order. None would offer SECIO and plaintext, too: with plaintext a peer takes any identity."""
    offered: dict[Any, Any] = {}
    if security in ("noise", "both"):
        offered[NOISE] = Noise(key_pair, noise_privkey=create_x25519_key_pair().private_key)
    if security in ("tls", "both"):
        offered[TLS] = _Tls(key_pair)
    return offered


class _Tls(TLSTransport):  # type: ignore[misc] # the library is untyped here
    """Symptom: every handshake writes its key into a file of the temporary directory and removes it.

    Cause: OpenSSL reads keys from files only, and the library makes a context per handshake. Cure: one for each side, ever.

    Symptom: js-libp2p refuses our certificate. Cause: it takes the first extension for the one with the peer's key, and the
    library adds two more before it. Cure: a certificate with that one only, which is all that the specification asks for.
    """

    def __init__(self, key_pair: Any) -> None:
        super().__init__(key_pair, identity_config=IdentityConfig(cert_template=_certificate()))
        self._contexts: dict[bool, ssl.SSLContext] = {}

    def create_ssl_context(self, server_side: bool = False) -> ssl.SSLContext:
        """The context of one side."""
        if server_side not in self._contexts:
            self._contexts[server_side] = super().create_ssl_context(server_side)
        return self._contexts[server_side]


def _certificate() -> x509.CertificateBuilder:
    """A certificate's frame (libp2p TLS specification): self-signed, names and dates without meaning."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "libp2p")])
    # In the past by as much as clocks may differ, and to a time that no process sees.
    begins = datetime.now(UTC) - _CERTIFICATE_AGE
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(x509.random_serial_number())
    return builder.not_valid_before(begins).not_valid_after(begins + _CERTIFICATE_VALIDITY)


class _Announced:
    """What to tell others of the addresses listened on: in place of "all interfaces", which nobody can dial, those of each.

    A machine without any but its loopback says that: its nodes find one another.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Multiaddr, ...]] = {}
        self._expires_s = 0.0

    def __call__(self, candidates: Sequence[Multiaddr]) -> list[Multiaddr]:
        if time.monotonic() >= self._expires_s:
            self._known.clear()
            self._expires_s = time.monotonic() + INTERFACES_TTL_S
        return list(dict.fromkeys(told for address in candidates for told in self._expanded(address)))

    def _expanded(self, address: Multiaddr) -> tuple[Multiaddr, ...]:
        text = str(address)
        if not text.startswith(("/ip4/0.0.0.0/", "/ip6/::/")):
            return (address,)
        if text not in self._known:
            loopback = Multiaddr(text.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/"))
            try:
                found = tuple(get_thin_waist_addresses(address))
            except OSError as exc:
                _logger.warning("interfaces not read: only the loopback address is told to others", error=str(exc))
                found = ()
            self._known[text] = found or (loopback,)
        return self._known[text]


class _NoAutoConnector:
    """The library's own dials everything that it has ever heard of; `discovery` does that for us."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def run_background_task(self, nursery: Any) -> None: ...

    async def maybe_connect(self) -> None: ...


def parse_id(node_id: NodeId) -> Any:
    """The library's form of a node id.

    Raises:
      UsageError: it is none.
    """
    try:
        return ID.from_base58(node_id)
    except ValueError as exc:
        raise UsageError(f"{node_id!r} is not a node id", hint="a node id looks like 12D3KooW…") from exc


def parse_address(text: str) -> Multiaddr:
    """A multiaddr with TCP.

    Raises:
      UsageError: it is none.
    """
    try:
        address = Multiaddr(text)
        address.value_for_protocol("tcp")
    except Exception as exc:
        raise UsageError(f"{text!r} is not a TCP multiaddr", hint="write /ip4/192.0.2.1/tcp/4700") from exc
    return address


def listen_address(text: str) -> Multiaddr:
    """A multiaddr to listen on: an IP address and a TCP port.

    Raises:
      UsageError: it is none.
    """
    address = parse_address(text)
    if next(iter(address.protocols())).name not in ("ip4", "ip6"):
        raise UsageError(f"{text!r}: cannot listen on a name", hint="write /ip4/0.0.0.0/tcp/4700")
    return address


def dial_address(text: str, node_id: NodeId) -> Multiaddr:
    """A multiaddr to dial; its last part may be the peer's id.

    Raises:
      UsageError: it is none.
    """
    return parse_address(text.removesuffix(f"/p2p/{node_id}"))


def dialable(node_id: NodeId, addresses: Iterable[Any]) -> tuple[str, ...]:
    """Multiaddrs of the library's as ours, without those that nobody can dial."""
    texts = (str(address).removesuffix(f"/p2p/{node_id}") for address in addresses)
    return tuple(dict.fromkeys(text for text in texts if is_dialable(text)))


def check_free(addresses: Sequence[Multiaddr]) -> None:
    """Refuse a port that another process listens on: the library sets SO_REUSEPORT and would share it silently.

    Raises:
      HostError: it is taken, or not an address of this host.
    """
    for address in addresses:
        protocol = next(iter(address.protocols())).name
        family = socket.AF_INET6 if protocol == "ip6" else socket.AF_INET
        host, port = address.value_for_protocol(protocol), int(address.value_for_protocol("tcp"))
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise HostError(
                    f"cannot listen on {address}: {exc.strerror}", hint="is another node running here? choose another port"
                ) from exc
