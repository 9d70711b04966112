"""Peers, streams and gossip: how nodes find each other and talk.

| file | is |
|---|---|
| `transport` | the port: what this room needs of a peer-to-peer library |
| `loopback` | its in-memory twin, with seeded delay, loss, partition and crash |
| `libp2p_host` and the other `libp2p_*` | its adapter: the only files that import libp2p; `libp2p_patches` mends it |
| `frames`, `calls`, `router`, `backoff` | pure machines: framing, the request protocol, who is where, when to try again |
| `discovery`, `presence` | dials known peers, looks lost ones up; waits for peers to come and go |
| `kad`, `kad_wire`, `kad_table`, `kad_lookup` | Kademlia: its shell, messages, buckets, walks |
| `kad_records`, `kad_scope` | Kademlia: provider records; who may tell of which addresses |
| `mdns`, `mdns_wire` | peers on the LAN: the shell with its socket; packets (pure) |
| `link` | long-lived direct streams between voters |
| `requests`, `serving`, `slots` | one question and one answer; how handlers of streams are run; how many at a time |
| `publisher`, `subscriber` | gossip out and in |
| `service` | the one door for the rooms above |
"""
