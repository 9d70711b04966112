"""Peers, streams and gossip: how nodes find each other and talk.

| file | is |
|---|---|
| `transport` | the port: what this room needs of a peer-to-peer library |
| `loopback` | its in-memory twin, with seeded delay, loss, partition and crash |
| `libp2p_host`, `libp2p_patches` | its adapter: the only files that import libp2p |
| `frames`, `router`, `backoff`, `calls` | pure machines: framing, who is up, when to dial again, the request protocol |
| `discovery` | dials known peers, looks lost ones up, closes dead connections |
| `publisher`, `subscriber` | gossip out and in |
| `link` | long-lived direct streams between voters |
| `service` | the one door for the rooms above |
"""
