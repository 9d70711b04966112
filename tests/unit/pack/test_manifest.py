from __future__ import annotations

from pathlib import Path

import msgspec
import pycddl
import pytest

from formation.core.codec import encode
from formation.core.errors import DecodeError
from formation.pack.manifest import (
    FORMAT,
    MANIFEST_SIZE_MAX_BYTES,
    MEDIA_INITRAMFS,
    MEDIA_KERNEL,
    MEDIA_LAYER,
    BlobRef,
    EnvVar,
    ImageConfig,
    ImageManifest,
    UserAccount,
    manifest_bytes,
    manifest_digest,
    parse_manifest,
)
from formation.pack.transfer import BlobAnswer, BlobRequest

SCHEMA = (Path(__file__).parents[3] / "schemas" / "image.cddl").read_text()
D = ["sha256:" + letter * 64 for letter in "abcd"]
CONFIG = ImageConfig(
    name="web",
    description="é",
    vcpus=1,
    memory_mib=256,
    disk_gib=2,
    entrypoint=("httpd", "-f"),
    workdir="/www",
    env=(EnvVar("system", "A", "1"),),
    users=(UserAccount(name="ada", password_hash=""),),
    expose=((80, "tcp"),),
    disable_root=False,
)
MANIFEST = ImageManifest(
    format=FORMAT,
    architecture="x86_64",
    base="busybox",
    kernel=BlobRef(MEDIA_KERNEL, D[0], 53_000_000),
    initrds=(BlobRef(MEDIA_INITRAMFS, D[1], 3_000_000), BlobRef(MEDIA_LAYER, D[2], 4096)),
    config=CONFIG,
    built_from=D[3],
)


def fits(rule: str, data: bytes) -> None:
    pycddl.Schema(f"start = {rule}\n{SCHEMA}").validate_cbor(data)


def test_a_manifest_survives_its_bytes_and_fits_its_schema() -> None:
    """decode(encode(m)) == m, and the bytes are what schemas/image.cddl says."""
    data = manifest_bytes(MANIFEST)
    assert parse_manifest(data) == MANIFEST
    fits("image-manifest", data)
    assert MANIFEST.size_bytes == 56_004_096
    assert (CONFIG.resources.vcpus, CONFIG.resources.memory_mib, CONFIG.resources.disk_gib) == (1, 256, 2)


def test_the_digest_of_a_manifest_is_fixed() -> None:
    """Golden: the same manifest has this digest for ever, or images of the network lose their names."""
    assert manifest_digest(MANIFEST) == "sha256:c1a14959c79f79420c52b36379b583909ee859fe7a5f6e0ed7b8949d2d5e5a0e"


def test_messages_fit_their_schema() -> None:
    """Requests and answers for blobs are what schemas/image.cddl says."""
    fits("blob-request", encode(BlobRequest(D[0], 7)))
    for status in ("ok", "absent", "busy"):
        fits("blob-answer", encode(BlobAnswer(status, 9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": msgspec.structs.replace(CONFIG, name="No Label")}, "not a valid name"),
        ({"kernel": BlobRef(MEDIA_LAYER, D[0], 1)}, "not a PVH kernel"),
        ({"kernel": BlobRef(MEDIA_KERNEL, "../../etc/passwd", 1)}, "not a digest"),
        ({"initrds": (BlobRef("text/plain", D[0], 1),)}, "unknown kind of initrd"),
        ({"initrds": (BlobRef(MEDIA_LAYER, D[0], 1),) * 17}, "17 initrds, the limit is 16"),
        ({"config": msgspec.structs.replace(CONFIG, entrypoint=("a",) * 257)}, "257 entrypoint"),
        ({"config": msgspec.structs.replace(CONFIG, vcpus=0)}, "vcpus|config|>="),
        ({"config": msgspec.structs.replace(CONFIG, expose=((0, "tcp"),))}, ">= 1"),
        ({"kernel": BlobRef(MEDIA_KERNEL, D[0], 1 << 40)}, "<="),
        ({"config": msgspec.structs.replace(CONFIG, description="x" * MANIFEST_SIZE_MAX_BYTES)}, "the limit is 65536"),
    ],
)
def test_a_hostile_manifest_is_refused(change: dict[str, object], message: str) -> None:
    """Every limit of a manifest is checked before anybody acts on it."""
    with pytest.raises(DecodeError, match=message):
        parse_manifest(manifest_bytes(msgspec.structs.replace(MANIFEST, **change)))
