from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formation.core.errors import HostError
from formation.core.spec import PortMap
from formation.net.ports import DYNAMIC_PORT_COUNT, DYNAMIC_PORT_FIRST, plan_ports

transports = st.sampled_from(["tcp", "udp"])
host_ports = st.one_of(st.just(0), st.integers(DYNAMIC_PORT_FIRST, DYNAMIC_PORT_FIRST + 40))
publishes = st.lists(
    st.builds(PortMap, st.integers(1, 65535), transports, host_ports),
    max_size=12,
    unique_by=lambda p: (p.guest_port, p.transport),
)
taken_sets = st.frozensets(st.tuples(transports, st.integers(DYNAMIC_PORT_FIRST, DYNAMIC_PORT_FIRST + 40)), max_size=20)


@given(publishes, taken_sets, taken_sets, st.integers(0, 40))
def test_a_plan_never_doubles_a_port(
    publish: list[PortMap], taken: frozenset[tuple[str, int]], busy: frozenset[tuple[str, int]], start: int
) -> None:
    """Every guest port gets one host port, in order, none of them taken, busy or given twice; fixed ones as asked."""
    try:
        ports = plan_ports(
            publish, previous=(), taken=taken, is_free=lambda transport, port: (transport, port) not in busy, start_index=start
        )
    except HostError:
        fixed = [(p.transport, p.host_port) for p in publish if p.host_port]
        assert len(set(fixed)) < len(fixed) or set(fixed) & (taken | busy)
        return
    assert [(p.guest_port, p.transport) for p in ports] == [(p.guest_port, p.transport) for p in publish]
    pairs = [(p.transport, p.host_port) for p in ports]
    assert len(set(pairs)) == len(pairs)
    assert not set(pairs) & (taken | busy)
    assert all(wish.host_port in (0, got.host_port) for wish, got in zip(publish, ports, strict=True))
    again = plan_ports(publish, previous=ports, taken=taken, is_free=lambda *_: True, start_index=start + 7)
    assert again == ports


def test_a_full_range_is_refused() -> None:
    """When no port is free, the error says so."""
    with pytest.raises(HostError, match="no free tcp port"):
        plan_ports([PortMap(80, "tcp", 0)], previous=(), taken=frozenset(), is_free=lambda *_: False, start_index=0)


def test_the_search_wraps_around() -> None:
    """The last port of the range is followed by the first."""
    last = DYNAMIC_PORT_FIRST + DYNAMIC_PORT_COUNT - 1
    ports = plan_ports(
        [PortMap(80, "tcp", 0)],
        previous=(),
        taken=frozenset({("tcp", last)}),
        is_free=lambda *_: True,
        start_index=DYNAMIC_PORT_COUNT - 1,
    )
    assert ports[0].host_port == DYNAMIC_PORT_FIRST
