"""Names of things: how each is derived, written and checked.

| id | form | from |
|---|---|---|
| NodeId | libp2p PeerId, `12D3KooW…` | the node's Ed25519 public key (libp2p peer-ids: identity multihash) |
| AccountId | `did:key:z6Mk…` | the account's Ed25519 public key (W3C did:key, multicodec 0xed) |
| VmId | `vm-` + 16 base32 letters | SHA-256 of the intent that asked for it, so asking twice names one VM |
| Digest | `sha256:` + 64 hex | content |
| TraceId | 16 hex | the intent; one for everything that follows from one command |
| NetworkId | 32 bytes | SHA-256 of the manifest |
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from typing import NewType

import base58

from formation.core.errors import ConflictError, NotFoundError, UsageError

NodeId = NewType("NodeId", str)
AccountId = NewType("AccountId", str)
VmId = NewType("VmId", str)
Digest = NewType("Digest", str)
TraceId = NewType("TraceId", str)
NetworkId = NewType("NetworkId", bytes)

PUBLIC_KEY_SIZE_BYTES = 32
# multihash identity (0x00), 36 bytes (0x24), protobuf PublicKey{type=Ed25519 (08 01), data (12 20)}
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_DID_KEY_PREFIX = bytes.fromhex("ed01")
# Matched by `fullmatch`: `$` would let a line end pass.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VM_ID = re.compile(r"vm-[a-z2-7]{16}")
# A PeerId has 52 letters, the key part of a did:key 47. Base58 takes quadratic time, so nothing longer is tried.
_BASE58_LENGTH_MAX = 64
# Shorter prefixes hit by chance: with 100 VMs, 4 base32 letters collide once in 200 look-ups.
PREFIX_LENGTH_MIN = 4


def node_id_of(public_key: bytes) -> NodeId:
    """The PeerId of a 32-byte Ed25519 public key."""
    assert len(public_key) == PUBLIC_KEY_SIZE_BYTES
    return NodeId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


def public_key_of_node(node_id: str) -> bytes:
    """The 32-byte Ed25519 key inside a PeerId.

    Raises:
      UsageError: not the PeerId of an Ed25519 key.
    """
    raw = _base58(node_id)
    if len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_SIZE_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise UsageError(
            f"{node_id[:80]!r} is not a node id", hint="a node id looks like 12D3KooW… (formation status shows yours)"
        )
    return raw[len(_PEER_ID_PREFIX) :]


def peer_id_bytes(node_id: NodeId) -> bytes:
    """A PeerId as libp2p's messages carry it: its multihash.

    Raises:
      UsageError: not the PeerId of an Ed25519 key.
    """
    return _PEER_ID_PREFIX + public_key_of_node(node_id)


def node_id_from_bytes(raw: bytes) -> NodeId:
    """The PeerId whose multihash this is.

    Raises:
      UsageError: not that of an Ed25519 key.
    """
    if len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_SIZE_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise UsageError(f"{len(raw)} bytes that are no node id", hint="only Ed25519 keys name nodes")
    return NodeId(base58.b58encode(raw).decode())


def account_id_of(public_key: bytes) -> AccountId:
    """The did:key of a 32-byte Ed25519 public key."""
    assert len(public_key) == PUBLIC_KEY_SIZE_BYTES
    return AccountId("did:key:z" + base58.b58encode(_DID_KEY_PREFIX + public_key).decode())


def public_key_of_account(account_id: str) -> bytes:
    """The 32-byte Ed25519 key inside a did:key.

    Raises:
      UsageError: not the did:key of an Ed25519 key.
    """
    raw = _base58(account_id.removeprefix("did:key:z")) if account_id.startswith("did:key:z") else b""
    if len(raw) != len(_DID_KEY_PREFIX) + PUBLIC_KEY_SIZE_BYTES or not raw.startswith(_DID_KEY_PREFIX):
        raise UsageError(
            f"{account_id[:80]!r} is not an account id", hint="an account id looks like did:key:z6Mk… (formation key list)"
        )
    return raw[len(_DID_KEY_PREFIX) :]


def _base58(text: str) -> bytes:
    """The bytes of canonical base58; empty for anything else."""
    if len(text) > _BASE58_LENGTH_MAX:
        return b""
    try:
        raw = bytes(base58.b58decode(text))
    except ValueError:
        return b""
    # The library forgives trailing white space; one id must not have two spellings.
    return raw if base58.b58encode(raw).decode() == text else b""


def vm_id_of(intent_digest: bytes) -> VmId:
    """The id of the VM that an intent (32-byte SHA-256 of its signed bytes' payload) asks for."""
    return VmId("vm-" + base64.b32encode(intent_digest[:10]).decode().lower())


def trace_id_of(intent_digest: bytes) -> TraceId:
    """The trace that everything following from this intent carries."""
    return TraceId(intent_digest[:8].hex())


def digest_of(data: bytes) -> Digest:
    """`sha256:…` of bytes."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def check_digest(text: str) -> Digest:
    """The text as a Digest.

    Raises:
      UsageError: not `sha256:` and 64 hex digits.
    """
    if not _DIGEST.fullmatch(text):
        raise UsageError(f"{text[:80]!r} is not a digest", hint="a digest is sha256: and 64 hex digits")
    return Digest(text)


def is_vm_id(text: str) -> bool:
    """Whether the text has the form of a VM id (no such VM need exist)."""
    return _VM_ID.fullmatch(text) is not None


def check_label(text: str, *, what: str) -> str:
    """The text, if it is a DNS label (RFC 1123 section 2.1: 1-63 of a-z, 0-9 and inner hyphens).

    Raises:
      UsageError: it is not one.
    """
    if not _LABEL.fullmatch(text):
        raise UsageError(
            f"{what}: {text[:80]!r} is not a valid name",
            hint="use 1 to 63 of a-z, 0-9 and -, starting and ending with a letter or digit",
        )
    return text


def pick_by_name_or_prefix(wanted: str, *, candidates: Iterable[tuple[str, str]], what: str) -> str:
    """The id of the one candidate (id, name) that `wanted` means: exact id, exact name, or unique prefix of the id.

    A prefix counts with or without its kind (`vm-`, `sha256:`) from `PREFIX_LENGTH_MIN` characters on.

    Raises:
      NotFoundError: none matches.
      ConflictError: several match.
    """
    pairs = list(candidates)
    # An id wins over names: else somebody's VM named like the id of yours would make yours ambiguous.
    if any(identity == wanted for identity, _ in pairs):
        return wanted
    exact = [identity for identity, name in pairs if name == wanted]
    if len(exact) == 1:
        return exact[0]
    found = exact or [
        identity
        for identity, _ in pairs
        if len(wanted) >= PREFIX_LENGTH_MIN
        and (identity.startswith(wanted) or re.sub(r"^(vm-|sha256:)", "", identity).startswith(wanted))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFoundError(f"no {what} matches {wanted!r}", hint=f"formation {what} list")
    names = ", ".join(sorted(found)[:5])
    raise ConflictError(f"{wanted!r} matches {len(found)} of kind {what}: {names}", hint="give the full id")
