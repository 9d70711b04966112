"""The replicated state: a BFT-CRDT of signed op-logs ("lanes") with quorum acknowledgements.

Source: Giridharan et al., "Autobahn" (SOSP 2024: lanes); Baudet et al., "FastPay" (2020: broadcast without consensus);
Kleppmann, "Making CRDTs Byzantine Fault Tolerant" (PaPoC 2022).

| file | what it holds |
|---|---|
| `op` | one operation of a block: an event, with its account's intent where it needs one |
| `lane` | signed blocks in a hash chain per node incarnation; what a lane accepts, holds, refuses |
| `ack` | cumulative signed acknowledgements; tally; certificate at 2f+1 |
| `crdt`, `claims` | registers, sets and claims whose result does not depend on order |
| `fold` | judges operations, folds events into cells; one fold per level |
| `replica` | the machine: `handle(event, now_ns) -> effects` |
| `sync` | frontier comparison and bounded range pulls |
| `view`, `feed` | typed records from cells; numbered, resumable changes |
| `store`, `sqlite` | port with its in-memory twin; durable adapter |
| `service` | the shell that drives it all |

Levels: *observed* (valid here), *certified* (2f+1 voters have it on disk; unique per lane). The spine (*final*, class O
operations), checkpoints, membership change and quotas have their places beside these files and come with the
state-layer issue; until then a placement claim is decided by the lowest certified (hlc, lane, seq), which is not safe
against a Byzantine claimant (see `claims`).
"""
