"""Network manifest: who is in a network from its first moment (design/state section 2, "genesis").

The manifest's identity is the SHA-256 of its deterministic CBOR; that is the network id, which every signature of the
network covers. People keep it as TOML in `peers/`; the founders' signatures stand beside the value. A *draft* is the
same file without keys: `formation demo` and `formation init` complete it. While founders on several machines sign, the
file has all keys and some signatures (`Founding`); nothing but `formation network` takes it for a network before all have.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from formation.core.codec import Context, Verify, decode, encode, sha256, sign_value, signed_bytes, verify_ed25519
from formation.core.errors import DecodeError, NotFoundError, UsageError
from formation.core.ids import PUBLIC_KEY_SIZE_BYTES, NetworkId, NodeId, check_label, node_id_of, public_key_of_node
from formation.core.keys import KeyPair

FORMAT = 1
# Committees above 31 belong into cells (design/state section 7).
VOTER_COUNT_MAX = 31
_FILE_SIZE_MAX_BYTES = 64 * 1024
_FOUNDED_MS_MAX = (1 << 48) - 1
# Printable ASCII without space, quote and backslash: it stands in TOML, logs and tables as it is.
_MULTIADDR = re.compile(r"/[!#-\[\]-~]+")


class Voter(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A founding member of the committee; array of three."""

    name: str
    public_key: bytes
    addresses: tuple[str, ...]
    """Multiaddrs without /p2p."""

    @property
    def node_id(self) -> NodeId:
        """Its PeerId."""
        return node_id_of(self.public_key)


class Genesis(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What the founders sign; array of four."""

    format: int
    name: str
    founded_ms: int
    voters: tuple[Voter, ...]


class Signature(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One founder's signature over the genesis."""

    public_key: bytes
    signature: bytes


class SignedGenesis(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The manifest's form in CBOR: array of two."""

    genesis: Genesis
    signatures: tuple[Signature, ...]


class Manifest:
    """A genesis with valid signatures of all its voters; immutable."""

    def __init__(self, genesis: Genesis, signatures: Sequence[Signature], *, verify: Verify = verify_ed25519) -> None:
        """Check the genesis and its signatures.

        Raises:
          UsageError: names what is wrong.
        """
        _check_genesis(genesis)
        self.genesis = genesis
        self.signatures = tuple(signatures)
        message = signed_bytes(Context.MANIFEST, network_id=self.network_id, payload=encode(genesis))
        signed = {s.public_key for s in signatures if verify(s.public_key, message, s.signature)}
        missing = [v.name for v in genesis.voters if v.public_key not in signed]
        if missing:
            raise UsageError(
                f"manifest {genesis.name!r}: no valid signature of {', '.join(missing)}",
                hint="every founding voter signs; a file that was edited by hand must be signed again",
            )

    @cached_property
    def network_id(self) -> NetworkId:
        """SHA-256 of the genesis."""
        return NetworkId(sha256(encode(self.genesis)))

    @property
    def name(self) -> str:
        """The network's name, for people."""
        return self.genesis.name

    @property
    def voters(self) -> tuple[Voter, ...]:
        """The founding committee, in its order."""
        return self.genesis.voters

    @property
    def fault_count_max(self) -> int:
        """f: how many voters may lie or fail."""
        return (len(self.voters) - 1) // 3

    @property
    def quorum_size(self) -> int:
        """2f+1."""
        return 2 * self.fault_count_max + 1

    def to_toml(self) -> str:
        """The file form; `read_manifest` of it gives this manifest."""
        return _to_toml(self.genesis, {s.public_key: s.signature for s in self.signatures})

    def to_cbor(self) -> bytes:
        """CBOR of the SignedGenesis; `parse_manifest` of it gives this manifest."""
        return encode(SignedGenesis(self.genesis, self.signatures))


def parse_manifest(raw: bytes, *, verify: Verify = verify_ed25519) -> Manifest:
    """A manifest from the wire; all signatures are checked.

    Raises:
      DecodeError: it is none.
    """
    value = decode(raw, SignedGenesis, what="manifest")
    if len(value.signatures) > VOTER_COUNT_MAX or any(len(s.signature) != 64 for s in value.signatures):
        raise DecodeError("manifest: signatures out of bounds")
    try:
        return Manifest(value.genesis, value.signatures, verify=verify)
    except UsageError as exc:
        raise DecodeError(exc.message) from exc


class Founding:
    """A genesis that its founders are signing: some signatures may be missing still; immutable."""

    def __init__(self, genesis: Genesis, signatures: Sequence[Signature] = ()) -> None:
        """Check the genesis, and look at each signature.

        Raises:
          UsageError: the genesis is none; names what is wrong.
        """
        _check_genesis(genesis)
        self.genesis = genesis
        message = signed_bytes(Context.MANIFEST, network_id=self.network_id, payload=encode(genesis))
        self.signatures = tuple(s for s in signatures if verify_ed25519(s.public_key, message, s.signature))
        """Those that hold."""
        good = {s.public_key for s in self.signatures}
        given = {s.public_key for s in signatures}
        self.missing = tuple(v.name for v in genesis.voters if v.public_key not in given)
        """Founders who have not signed yet."""
        self.invalid = tuple(v.name for v in genesis.voters if v.public_key in given - good)
        """Founders whose signature is for something else: the file was changed after they signed."""

    @cached_property
    def network_id(self) -> NetworkId:
        """SHA-256 of the genesis."""
        return NetworkId(sha256(encode(self.genesis)))

    @property
    def is_complete(self) -> bool:
        """Whether every founder has signed this very genesis."""
        return not self.missing and not self.invalid

    def sign(self, key: KeyPair) -> Founding:
        """The same with this founder's signature.

        Raises:
          NotFoundError: the key is no founder's.
        """
        if all(voter.public_key != key.public_key for voter in self.genesis.voters):
            raise NotFoundError(
                f"{key.node_id} is not one of the founders of {self.genesis.name!r}",
                hint="formation network node-id prints this machine's; the file must name it",
            )
        value = sign_value(key.sign, Context.MANIFEST, network_id=self.network_id, payload=encode(self.genesis))
        others = (s for s in self.signatures if s.public_key != key.public_key)
        return Founding(self.genesis, (*others, Signature(key.public_key, value.signature)))

    def to_toml(self) -> str:
        """The file form; `read_founding` of it gives this again, and `read_manifest` too, once all have signed."""
        return _to_toml(self.genesis, {s.public_key: s.signature for s in self.signatures})


def _to_toml(genesis: Genesis, signature_of: Mapping[bytes, bytes]) -> str:
    is_complete = all(voter.public_key in signature_of for voter in genesis.voters)
    first = (
        "# A Formation network. Give this file to whoever shall join; it holds no secret."
        if is_complete
        else "# A Formation network that its founders have not all signed yet: formation network sign FILE"
    )
    lines = [
        first,
        f"# network id: {sha256(encode(genesis)).hex()}",
        f"format = {genesis.format}",
        f'name = "{genesis.name}"',
        f"founded_ms = {genesis.founded_ms}",
    ]
    for voter in genesis.voters:
        addresses = ", ".join(f'"{a}"' for a in voter.addresses)
        lines += ["", "[[voter]]", f'name = "{voter.name}"', f'node_id = "{voter.node_id}"', f"addresses = [{addresses}]"]
        if voter.public_key in signature_of:
            lines.append(f'signature = "{signature_of[voter.public_key].hex()}"')
    return "\n".join(lines) + "\n"


def found_network(name: str, *, voters: Sequence[tuple[str, KeyPair, Sequence[str]]], founded_ms: int) -> Manifest:
    """A new network of these (name, key, addresses); needs all their keys, for all must sign.

    Raises:
      UsageError: as `Manifest`.
    """
    genesis = Genesis(
        FORMAT, name, founded_ms, tuple(Voter(n, key.public_key, tuple(addresses)) for n, key, addresses in voters)
    )
    network_id = NetworkId(sha256(encode(genesis)))
    signatures = [
        Signature(
            key.public_key, sign_value(key.sign, Context.MANIFEST, network_id=network_id, payload=encode(genesis)).signature
        )
        for _, key, _ in voters
    ]
    return Manifest(genesis, signatures)


class Draft(msgspec.Struct, frozen=True):
    """A manifest that has no keys yet: a name, and (name, addresses) of each voter to be."""

    name: str
    voters: tuple[tuple[str, tuple[str, ...]], ...]


def read_manifest(path: Path) -> Manifest:
    """The signed manifest in a TOML file.

    Raises:
      NotFoundError: no such file.
      UsageError: names file and place.
    """
    genesis, signatures = _read_genesis(path)
    unsigned = [v.name for v in genesis.voters if all(s.public_key != v.public_key for s in signatures)]
    if unsigned:
        raise UsageError(
            f"{path}: signature of {', '.join(unsigned)} is missing",
            hint="its founders have not all signed: formation network sign, on the machine of each",
        )
    try:
        return Manifest(genesis, signatures)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc.message}", hint=exc.hint) from exc


def read_founding(path: Path) -> Founding:
    """The genesis in a TOML file with what signatures there are.

    Raises:
      NotFoundError: no such file.
      UsageError: names file and place.
    """
    genesis, signatures = _read_genesis(path)
    try:
        return Founding(genesis, signatures)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc.message}", hint=exc.hint) from exc


def _read_genesis(path: Path) -> tuple[Genesis, list[Signature]]:
    document = _read_toml(path)
    rows = _voter_rows(path, document)
    voters, signatures = [], []
    for index, row in enumerate(rows, start=1):
        where = f"{path}: voter {index}"
        node_id, signature_hex = row.get("node_id"), row.get("signature", "")
        if not isinstance(node_id, str) or not isinstance(signature_hex, str):
            raise UsageError(
                f"{where}: node_id or signature is missing",
                hint="this is a draft: formation demo or formation init completes it",
            )
        try:
            public_key, signature = public_key_of_node(node_id), bytes.fromhex(signature_hex)
        except (UsageError, ValueError) as exc:
            raise UsageError(f"{where}: {exc}", hint="copy the file again from whoever gave it to you") from exc
        voters.append(Voter(_text(where, row, "name"), public_key, _addresses(where, row)))
        if "signature" in row:
            signatures.append(Signature(public_key, signature))
    founded_ms = document.get("founded_ms")
    if not isinstance(founded_ms, int) or isinstance(founded_ms, bool):
        raise UsageError(
            f"{path}: founded_ms is missing or not a whole number", hint="copy the file again from whoever gave it to you"
        )
    return Genesis(FORMAT, _text(str(path), document, "name"), founded_ms, tuple(voters)), signatures


def read_draft(path: Path) -> Draft:
    """The draft in a TOML file.

    Raises:
      NotFoundError, UsageError: as `read_manifest`.
    """
    document = _read_toml(path)
    rows = _voter_rows(path, document)
    voters = tuple(
        (_text(f"{path}: voter {i}", row, "name"), _addresses(f"{path}: voter {i}", row)) for i, row in enumerate(rows, start=1)
    )
    _check_voter_count(str(path), len(voters))
    return Draft(check_label(_text(str(path), document, "name"), what=f"{path}: name"), voters)


def _check_genesis(genesis: Genesis) -> None:
    where = f"manifest {genesis.name[:63]!r}"
    check_label(genesis.name, what="manifest name")
    if genesis.format != FORMAT:
        raise UsageError(f"{where}: format {genesis.format}, this version knows {FORMAT}", hint="upgrade formation")
    if not 0 <= genesis.founded_ms <= _FOUNDED_MS_MAX:
        raise UsageError(f"{where}: founded_ms is out of range", hint="it counts milliseconds since 1970")
    _check_voter_count(where, len(genesis.voters))
    for voter in genesis.voters:
        check_label(voter.name, what=f"{where}: voter name")
        if len(voter.public_key) != PUBLIC_KEY_SIZE_BYTES:
            raise UsageError(f"{where}: voter {voter.name}: the key is not 32 bytes", hint="give an Ed25519 key")
        if not voter.addresses or not all(_MULTIADDR.fullmatch(a) for a in voter.addresses):
            raise UsageError(
                f"{where}: voter {voter.name}: addresses must be multiaddrs", hint="write it like /ip4/192.0.2.1/tcp/4700"
            )
    for what, values in (("name", [v.name for v in genesis.voters]), ("key", [str(v.node_id) for v in genesis.voters])):
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise UsageError(f"{where}: voter {what} {twice[0]} occurs twice", hint="each voter stands once")


def _check_voter_count(where: str, count: int) -> None:
    if count not in range(1, VOTER_COUNT_MAX + 1) or count % 3 != 1:
        raise UsageError(
            f"{where}: {count} voters", hint=f"n = 3f+1: have 1, 4, 7, … up to {VOTER_COUNT_MAX} (4 survive one liar, 7 two)"
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_SIZE_MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"no manifest at {path}", hint="formation init makes one, or get the file from a member of the network"
        ) from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc
    if len(data) > _FILE_SIZE_MAX_BYTES:
        raise UsageError(f"{path}: larger than {_FILE_SIZE_MAX_BYTES} bytes", hint="is this a manifest?")
    try:
        document = tomllib.loads(data.decode())
    # Its own errors and those of int() are ValueErrors; a thousand brackets exhaust the stack.
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path}: not TOML: {exc}", hint="see peers/README.md for the form") from exc
    # `true` and 1.0 equal 1 in Python.
    if type(document.get("format")) is not int or document["format"] != FORMAT:
        raise UsageError(
            f"{path}: format is {document.get('format')!r}, this version knows {FORMAT}",
            hint="upgrade formation, or is this a manifest?",
        )
    unknown = sorted(set(document) - {"format", "name", "founded_ms", "voter"})
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}", hint="see peers/README.md for the form")
    return document


def _voter_rows(path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    rows = document.get("voter")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: no [[voter]]", hint="see peers/README.md for the form")
    for index, row in enumerate(rows, start=1):
        unknown = sorted(set(row) - {"name", "node_id", "addresses", "signature"})
        if unknown:
            raise UsageError(f"{path}: voter {index}: unknown key {unknown[0]!r}", hint="see peers/README.md for the form")
    return rows


def _text(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} is missing or not text", hint="see peers/README.md for the form")
    return value


def _addresses(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    value = row.get("addresses")
    if not isinstance(value, list) or not value or not all(isinstance(a, str) and _MULTIADDR.fullmatch(a) for a in value):
        raise UsageError(
            f"{where}: addresses must be a list of multiaddrs", hint='write addresses = ["/ip4/192.0.2.1/tcp/4700"]'
        )
    return tuple(value)
