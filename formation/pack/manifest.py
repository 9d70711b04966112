"""Image manifests: what an image is made of, as one deterministic value.

Rules:
1. An image's name in the network is the digest of its manifest: `sha256:` of the manifest's CBOR. A rebuild gives
   another digest and never changes a VM that exists.
2. A manifest names each blob by digest and size, so a holder of the digest alone can check everything it is given.
3. Manifests come from peers: `parse_manifest` checks every limit before anybody acts on one.
4. Shape of bytes: CBOR arrays in field order (`schemas/image.cddl`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError, UsageError
from formation.core.ids import Digest, check_digest, check_label, digest_of
from formation.core.spec import DISK_GIB_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN, VCPUS_MAX, Resources, Transport
from formation.core.units import GIB, KIB

FORMAT: Literal[1] = 1
MEDIA_KERNEL = "application/vnd.formation.kernel.v1.pvh-elf"
MEDIA_INITRAMFS = "application/vnd.formation.initramfs.v1.cpio"
MEDIA_LAYER = "application/vnd.formation.layer.v1.cpio"

# A manifest carries names, an environment and an entrypoint: 128 variables of 16 KiB in all, and slack.
MANIFEST_SIZE_MAX_BYTES = 64 * KIB
# A vmlinux is 53 MB, a layer at most `plan.LAYER_SIZE_MAX_BYTES`; disk layers, later, may be this large.
BLOB_SIZE_MAX_BYTES = 1 * GIB
# Kernel, base and one layer today; stacked layers later (the guest's overlay takes a few dozen).
INITRD_COUNT_MAX = 16
ENTRYPOINT_COUNT_MAX = 256
ENV_COUNT_MAX = 128
USER_COUNT_MAX = 64
EXPOSE_COUNT_MAX = 64


class BlobRef(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A blob by content; array of three."""

    media_type: str
    digest: str
    """`sha256:` and 64 hex digits."""
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=BLOB_SIZE_MAX_BYTES)]


class EnvVar(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One environment variable; array of three."""

    scope: str
    """`system` (logins and the service), `user:NAME` (that user's logins) or `service:NAME` (the service only)."""
    key: str
    value: str


class UserAccount(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user of the guest; array of nine. A password is known by its sha512-crypt hash only."""

    name: str
    password_hash: str
    """`$6$salt$hash`, or empty: no password."""
    ssh_authorized_keys: tuple[str, ...] = ()
    lock_password: bool = True
    sudo: bool = False
    shell: str = "/bin/sh"
    groups: tuple[str, ...] = ()
    ssh_password_auth: bool = False
    password_expired: bool = False


ExposedPort = tuple[Annotated[int, msgspec.Meta(ge=1, le=65535)], Transport]
"""A port that the service listens on."""


class ImageConfig(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What its Formfile says about how an image runs; array of eleven."""

    name: str
    description: str
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=VCPUS_MAX)]
    memory_mib: Annotated[int, msgspec.Meta(ge=MEMORY_MIB_MIN, le=MEMORY_MIB_MAX)]
    disk_gib: Annotated[int, msgspec.Meta(ge=1, le=DISK_GIB_MAX)]
    entrypoint: tuple[str, ...]
    """Program and arguments; never seen by a shell. Empty: the guest runs no service."""
    workdir: str
    env: tuple[EnvVar, ...]
    users: tuple[UserAccount, ...]
    expose: tuple[ExposedPort, ...]
    disable_root: bool

    @property
    def resources(self) -> Resources:
        """What a VM of it needs where its owner says nothing else."""
        return Resources(vcpus=self.vcpus, memory_mib=self.memory_mib, disk_gib=self.disk_gib)


class ImageManifest(msgspec.Struct, array_like=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image; array of seven."""

    format: Literal[1]
    architecture: Literal["x86_64"]
    base: str
    """What its Formfile stands on: `busybox` or `scratch`."""
    kernel: BlobRef
    initrds: tuple[BlobRef, ...]
    """Base first, then layers; the guest's initramfs is their concatenation."""
    config: ImageConfig
    built_from: str
    """Digest of the build plan (all inputs), for people who compare builds."""

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Everything that a holder must have to run it."""
        return (self.kernel, *self.initrds)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs."""
        return sum(blob.size_bytes for blob in self.blobs)


def manifest_bytes(manifest: ImageManifest) -> bytes:
    """The manifest as the deterministic CBOR that its digest names."""
    return encode(manifest)


def manifest_digest(manifest: ImageManifest) -> Digest:
    """The image's name in the network."""
    return digest_of(manifest_bytes(manifest))


def parse_manifest(data: bytes) -> ImageManifest:
    """The manifest in bytes that anybody may have written.

    Raises:
      DecodeError: not a manifest, or beyond a limit.
    """
    if len(data) > MANIFEST_SIZE_MAX_BYTES:
        raise DecodeError(f"image manifest: {len(data)} bytes, the limit is {MANIFEST_SIZE_MAX_BYTES}")
    manifest = decode(data, ImageManifest)
    try:
        _check(manifest)
    except UsageError as exc:
        raise DecodeError(f"image manifest: {exc.message}") from exc
    return manifest


def _check(manifest: ImageManifest) -> None:
    check_label(manifest.config.name, what="name")
    check_digest(manifest.built_from)
    for blob in manifest.blobs:
        check_digest(blob.digest)
    if manifest.kernel.media_type != MEDIA_KERNEL:
        raise DecodeError("image manifest: the kernel is not a PVH kernel")
    if any(blob.media_type not in (MEDIA_INITRAMFS, MEDIA_LAYER) for blob in manifest.initrds):
        raise DecodeError("image manifest: unknown kind of initrd blob")
    config = manifest.config
    _check_count("initrds", len(manifest.initrds), INITRD_COUNT_MAX)
    _check_count("entrypoint", len(config.entrypoint), ENTRYPOINT_COUNT_MAX)
    _check_count("env", len(config.env), ENV_COUNT_MAX)
    _check_count("users", len(config.users), USER_COUNT_MAX)
    _check_count("expose", len(config.expose), EXPOSE_COUNT_MAX)


def _check_count(what: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise DecodeError(f"image manifest: {count} {what}, the limit is {count_max}")
