"""What commands do with evidence without any node: verify files, and begin a stopped node's state with one.

Beside `node`, the only part of the command line that imports rooms of the house; it is imported when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formation.core.clock import hlc_ms
from formation.core.codec import verify_ed25519
from formation.core.errors import ConflictError, DecodeError, DeniedError, HostError, NotFoundError, UsageError
from formation.core.event import Seat, event_fields
from formation.core.ids import node_id_of
from formation.core.keys import KeyPair
from formation.core.manifest import Manifest, read_manifest
from formation.state.checkpoint import BUCKET_COUNT
from formation.state.disk import DiskStore
from formation.state.evidence import (
    FILE_SIZE_MAX_BYTES,
    OpEvidence,
    Quorum,
    StateEvidence,
    verify_op,
    verify_state,
)
from formation.state.joining import Snapshot
from formation.state.replica import Replica, ReplicaConfig


def verify_state_file(path: Path, manifest: Path | None) -> dict[str, Any]:
    """What a state export proves, as a record.

    Raises:
      NotFoundError, UsageError: no such file, or it cannot be read.
      DeniedError: it proves nothing, or of another network.
    """
    return _shown_state(_state(path, manifest)) | _trust(manifest)


def verify_op_file(path: Path, manifest: Path | None) -> dict[str, Any]:
    """What an op bundle proves, as a record.

    Raises:
      As `verify_state_file`.
    """
    data = _read(path)
    try:
        found = verify_op(data, verify=verify_ed25519)
    except DecodeError as exc:
        raise _refused(path, exc) from exc
    _check_network(path, found.manifest, manifest)
    return _shown_op(found) | _trust(manifest)


def import_state(path: Path, *, data_dir: Path, manifest: Path, key: KeyPair) -> dict[str, Any]:
    """Begin a stopped node's state with an export. What this node has promised so far is kept.

    Raises:
      NotFoundError, UsageError: a file is missing or cannot be read; the store belongs to another network.
      DeniedError: the file proves nothing, or of another network.
      ConflictError: the store is at or beyond the export already.
      HostError: the store is in use, or the disk refused.
    """
    found = _state(path, manifest)
    _install(found, data_dir / "state", key)
    return _shown_state(found) | {"data_dir": str(data_dir)}


def _install(found: StateEvidence, folder: Path, key: KeyPair) -> None:
    network_id = found.manifest.network_id
    founders = tuple(Seat(voter.name, voter.public_key, voter.addresses) for voter in found.manifest.voters)
    config = ReplicaConfig(network_id=network_id, founders=founders, public_key=key.public_key)
    replica = Replica(config, sign=key.sign, verify=verify_ed25519)
    store = DiskStore(folder)
    store.open(bytes(network_id))
    try:
        loaded = store.load()
        try:
            repeat_count = replica.recover_checkpoint(loaded.meta, loaded.buckets)
            for index, record in enumerate(loaded.records):
                replica.recover(record, is_repeat=index < repeat_count)
        except (DecodeError, AssertionError, KeyError) as exc:
            raise HostError(f"the state store {folder} cannot be read back: {exc}", hint="move it away first") from exc
        replica.finish_recovery()
        if replica.state.height >= found.ref.height:
            raise ConflictError(
                f"the state store is at height {replica.state.height} already, and the file at {found.ref.height}",
                hint="formation node goes on from there; an older state would be a step back",
            )
        held = [number for number in range(BUCKET_COUNT) if store.read_bucket(number)]
        buckets = dict.fromkeys(held, b"") | dict(found.buckets)
        snapshot = Snapshot(ref=found.ref, offer=found.offer, buckets=buckets)
        meta, records = replica.install_plan(snapshot)
        store.checkpoint(meta, buckets, records)
    finally:
        store.close()


def _state(path: Path, manifest: Path | None) -> StateEvidence:
    try:
        found = verify_state(_read(path), verify=verify_ed25519)
    except DecodeError as exc:
        raise _refused(path, exc) from exc
    _check_network(path, found.manifest, manifest)
    return found


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise NotFoundError(f"no file {path}", hint="formation state export and formation op bundle make such files") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="check its owner and mode") from exc
    if len(data) > FILE_SIZE_MAX_BYTES:
        raise UsageError(f"{path}: larger than {FILE_SIZE_MAX_BYTES} bytes", hint="is this such a file?")
    return data


def _refused(path: Path, exc: DecodeError) -> DeniedError:
    return DeniedError(f"{path} proves nothing: {exc.message}", hint="get it again, from another node")


def _check_network(path: Path, found: Manifest, wanted: Path | None) -> None:
    if wanted is None:
        return
    own = read_manifest(wanted)
    if own.network_id != found.network_id:
        raise DeniedError(
            f"{path} is of network {found.name!r} ({found.network_id.hex()[:16]}…), and {wanted} is {own.name!r} "
            f"({own.network_id.hex()[:16]}…)",
            hint="is it the right file?",
        )


def _trust(manifest: Path | None) -> dict[str, Any]:
    return {"is_checked_against": "" if manifest is None else str(manifest)}


def _shown_state(found: StateEvidence) -> dict[str, Any]:
    return {
        "network": found.manifest.name,
        "network_id": found.manifest.network_id.hex(),
        "height": found.ref.height,
        "root": found.ref.root.hex(),
        "time_ms": found.time_ms,
        "epoch": found.quorum.epoch,
        "signers": _names(found.manifest, found.quorum),
        "voter_count": len(found.quorum.committee.voters),
        "quorum_size": found.quorum.committee.quorum_size,
        "item_count": sum(found.item_counts.values()),
        "items": dict(found.item_counts),
        "size_bytes": found.size_bytes,
    }


def _shown_op(found: OpEvidence) -> dict[str, Any]:
    op = found.op
    return {
        "network": found.manifest.name,
        "network_id": found.manifest.network_id.hex(),
        "op": f"{op.lane.hex()}-{op.seq}-{op.index}",
        "verb": op.verb,
        "object_id": op.object_id,
        "class": "O" if op.is_ordered else "C",
        "fields": {} if op.event is None else _plain(event_fields(op.event)),
        "node_id": op.node_id,
        "account": op.account,
        "at_ms": hlc_ms(op.hlc),
        "block_hash": found.entry.hash.hex(),
        "void": op.void,
        "certified": _shown_quorum(found.manifest, found.certified),
        "final": _shown_quorum(found.manifest, found.final),
        "final_height_max": found.final_height,
    }


def _shown_quorum(manifest: Manifest, quorum: Quorum | None) -> dict[str, Any] | None:
    if quorum is None:
        return None
    return {
        "epoch": quorum.epoch,
        "signers": _names(manifest, quorum),
        "voter_count": len(quorum.committee.voters),
        "quorum_size": quorum.committee.quorum_size,
    }


def _names(manifest: Manifest, quorum: Quorum) -> list[str]:
    """Founders by name; who came later by the id of its node, for its name is in the state and not in what proves it."""
    names = {voter.public_key: voter.name for voter in manifest.voters}
    keys = [quorum.committee.voters[voter] for voter in quorum.voters]
    return [names.get(key, node_id_of(key)) for key in keys]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
