"""Network namespaces: a public segment, and sites behind real nftables NATs.

203.0.113.0/24 is the public segment (a bridge in a namespace of its own); public node i has .100+i, the router of site i .10+i,
and behind it the host 192.168.i.2. Names carry this process's id, so that runs do not meet; `close` removes all of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

PORT = 4700
# What the router does; it drops what nobody asked for, as home routers do: a stray conntrack entry would take the port.
EASY, HARD = "masquerade", "masquerade fully-random"
_RULES = """
table ip nat {{
  chain pre {{
    type nat hook prerouting priority dstnat
    {forward}
  }}
  chain post {{
    type nat hook postrouting priority srcnat
    oifname "wan" {nat}
  }}
}}
table ip filter {{
  chain input {{
    type filter hook input priority filter; policy drop
    iifname "lan" accept
    ct state established,related accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop
    iifname "lan" accept
    ct state established,related accept
    ct status dnat accept
  }}
}}
"""


def why_not() -> str:
    """Why this machine cannot have a lab; "" if it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool, path=path) is None]
    if missing:
        return f"this machine lacks {', '.join(missing)}: ./bootstrap setup says how to get it"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"fnq{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "this machine lets nobody make network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return ""


class NatLab:
    """See above."""

    def __init__(self) -> None:
        self._prefix = f"fn{os.getpid()}"
        self._names: list[str] = []
        self._fabric = f"{self._prefix}f"

    def __enter__(self) -> NatLab:
        try:
            self._netns("f")
            sh(f"ip -n {self._fabric} link add br0 type bridge", f"ip -n {self._fabric} link set br0 up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove it all; a process that still runs in a namespace keeps it, without a name, until it ends."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _netns(self, name: str) -> str:
        full = f"{self._prefix}{name}"
        self._names.append(full)
        sh(f"ip netns add {full}", f"ip -n {full} link set lo up")
        return full

    def _plug(self, netns: str, device: str, port: str, address: str) -> None:
        fabric = self._fabric
        sh(
            f"ip link add {port} netns {fabric} type veth peer name {device} netns {netns}",
            f"ip -n {fabric} link set {port} master br0 up",
            f"ip -n {netns} link set {device} up",
            f"ip -n {netns} addr add {address}/24 dev {device}",
        )

    def public(self, number: int) -> str:
        """The namespace of a host on the public segment."""
        netns = self._netns(f"p{number}")
        self._plug(netns, "eth0", f"p{number}", public_ip(number))
        return netns

    def site(self, number: int, nat: str) -> str:
        """The namespace of a host behind a NAT of its own."""
        router, host = self._netns(f"r{number}"), self._netns(f"h{number}")
        self._plug(router, "wan", f"r{number}", router_ip(number))
        lan = f"192.168.{number}"
        sh(
            f"ip link add lan netns {router} type veth peer name eth0 netns {host}",
            f"ip -n {router} link set lan up",
            f"ip -n {router} addr add {lan}.1/24 dev lan",
            f"ip -n {host} link set eth0 up",
            f"ip -n {host} addr add {lan}.2/24 dev eth0",
            f"ip -n {host} route add default via {lan}.1",
            f"ip netns exec {router} sysctl -qw net.ipv4.ip_forward=1",
        )
        self._load(number, nat, "")
        return host

    def forward_port(self, number: int, nat: str = EASY) -> None:
        """Forward PORT of a site's router to its host."""
        self._load(number, nat, f'iifname "wan" tcp dport {PORT} dnat to 192.168.{number}.2')

    def _load(self, number: int, nat: str, forward: str) -> None:
        rules = "flush ruleset\n" + _RULES.format(nat=nat, forward=forward)
        subprocess.run(
            ["ip", "netns", "exec", f"{self._prefix}r{number}", "nft", "-f", "-"], input=rules, text=True, check=True
        )


def public_ip(number: int) -> str:
    return f"203.0.113.{100 + number}"


def router_ip(number: int) -> str:
    return f"203.0.113.{10 + number}"


def sh(*lines: str) -> None:
    for line in lines:
        subprocess.run(line.split(), check=True)
