from __future__ import annotations

from typing import Any

import msgspec
import pytest

from formation.core.codec import decode, encode
from formation.core.errors import DecodeError, UsageError
from formation.core.ids import digest_of
from formation.core.spec import (
    ENV_COUNT_MAX,
    ENV_SIZE_MAX_BYTES,
    PUBLISH_COUNT_MAX,
    PortMap,
    Resources,
    VmSpec,
    VmStatus,
    check_vm_spec,
)


def spec(**changes: Any) -> VmSpec:
    fields: dict[str, Any] = {
        "name": "web",
        "image": digest_of(b""),
        "image_name": "hello",
        "vcpus": 2,
        "memory_mib": 256,
        "disk_gib": 3,
    }
    return VmSpec(**(fields | changes))


def test_a_good_spec_passes_as_it_is() -> None:
    """check_vm_spec returns what it was given."""
    good = spec(publish=(PortMap(80, "tcp", 0), PortMap(80, "udp", 8080), PortMap(81, "tcp", 8080)), env={"A": "=", "b": ""})
    assert check_vm_spec(good) is good


def test_the_limits_themselves_are_allowed() -> None:
    """Limits are inclusive; any number of ports may be chosen freely (0)."""
    check_vm_spec(spec(vcpus=1, memory_mib=128, disk_gib=1))
    check_vm_spec(spec(vcpus=128, memory_mib=256_000, disk_gib=65_535))
    check_vm_spec(spec(env={f"A{n}": "" for n in range(ENV_COUNT_MAX)}))
    check_vm_spec(spec(env={"A": "x" * (ENV_SIZE_MAX_BYTES - 1)}))
    check_vm_spec(spec(publish=tuple(PortMap(n, "tcp", 0) for n in range(1, PUBLISH_COUNT_MAX + 1))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "-"}, r"^name: "),
        ({"name": "web\n"}, r"^name: "),
        ({"image": "hello"}, "is not a digest"),
        ({"vcpus": 0}, "^vcpus: 0 is out of range"),
        ({"vcpus": 129}, "^vcpus: 129 is out of range"),
        ({"memory_mib": 127}, "^memory_mib: 127 is out of range"),
        ({"memory_mib": 256_001}, "^memory_mib: "),
        ({"disk_gib": 0}, "^disk_gib: "),
        ({"disk_gib": 65_536}, "^disk_gib: "),
        ({"env": {f"A{n}": "" for n in range(ENV_COUNT_MAX + 1)}}, "^env: more than"),
        ({"env": {"A": "x" * ENV_SIZE_MAX_BYTES}}, "^env: more than"),
        ({"env": {"A": "ü" * (ENV_SIZE_MAX_BYTES // 2)}}, "^env: more than"),
        ({"env": {"": "x"}}, "^env: '' cannot be an environment variable"),
        ({"env": {"A=B": "x"}}, "^env: 'A=B'"),
        ({"env": {"A": "x\0"}}, "^env: 'A'"),
        ({"env": {"A\n": "x"}}, "^env: "),
        ({"env": {"A": "x\ny"}}, "^env: 'A'"),
        ({"env": {"A": "\udc80"}}, "^env: a name or value is not UTF-8"),
        ({"publish": tuple(PortMap(n, "tcp", 0) for n in range(1, PUBLISH_COUNT_MAX + 2))}, "^publish: more than"),
        ({"publish": (PortMap(80, "tcp", 1), PortMap(80, "tcp", 2))}, "^publish: the same guest port twice"),
        ({"publish": (PortMap(80, "tcp", 1), PortMap(81, "tcp", 1))}, "^publish: the same host port twice"),
        ({"publish": (PortMap(0, "tcp", 1),)}, "^publish: 1:0 are not ports"),
        ({"publish": (PortMap(1, "tcp", 65_536),)}, "^publish: 65536:1 are not ports"),
    ],
)
def test_a_spec_that_no_node_accepts_is_refused(changes: dict[str, Any], message: str) -> None:
    """The error names the field, and the hint says what is allowed."""
    with pytest.raises(UsageError, match=message) as caught:
        check_vm_spec(spec(**changes))
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"vcpus": 0}, {"memory_mib": 1}, {"disk_gib": 65_536}, {"publish": (PortMap(0, "tcp", 0),)}]
)
def test_a_decoded_spec_keeps_its_limits(changes: dict[str, Any]) -> None:
    """Types refuse what is out of range as well."""
    with pytest.raises(DecodeError):
        decode(encode(spec(**changes)), VmSpec)


def test_the_transport_is_tcp_or_udp() -> None:
    """Nothing else can be published."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([80, "sctp", 0], PortMap)


def test_a_spec_says_what_it_takes() -> None:
    """resources are the spec's own numbers."""
    assert spec().resources == Resources(vcpus=2, memory_mib=256, disk_gib=3)


def test_a_status_comes_back() -> None:
    """decode undoes encode for what nodes say, too."""
    status = decode(
        encode(
            {"phase": "running", "ports": [[80, "tcp", 8080]]}
            | dict.fromkeys(["reason", "address"], "")
            | dict.fromkeys(["since_ms", "generation", "boot_ms"], 1)
        ),
        VmStatus,
    )
    assert status.ports == (PortMap(80, "tcp", 8080),)
