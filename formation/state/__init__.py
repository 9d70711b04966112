"""The replicated state: a BFT-CRDT of signed op-logs ("lanes") with quorum acknowledgements, and a spine for claims.

Source: Giridharan et al., "Autobahn" (SOSP 2024: lanes and a cut); Baudet et al., "FastPay" (2020: broadcast without
consensus); Chan & Pass, "Simplex Consensus" (TCC 2023: the spine); Kleppmann, "Making CRDTs Byzantine Fault Tolerant"
(PaPoC 2022). `design/state` in the project's notes has the rules with their reasons; each file repeats those it keeps.

| file | what it holds |
|---|---|
| `op`, `lane`, `ack`, `frames` | values of the lanes: operations, signed blocks, cumulative signed acknowledgements |
| `chain`, `lanes` | one lane, and all of them: what joins, what we acknowledge, what is certified, who is convicted |
| `committee`, `spine_values`, `spine_book`, `spine` | who votes; Simplex consensus over cuts of certified heads |
| `order` | from a final cut to blocks in the one order |
| `crdt`, `cells` | registers, sets, maps and counters whose result does not depend on order; objects made of them |
| `judge`, `fold` | what an operation says by itself; the final state, and what is certified beyond it |
| `claims`, `accounts`, `quota` | sections of the final state: leases with fences; keys, roles, delegations; limits |
| `membership`, `handover`, `final_chain` | the next committee: decided, frozen for, handed over to, proven to others |
| `checkpoint`, `joining` | state root, snapshots by piece, and how a newcomer verifies them from the manifest on |
| `sync`, `catchup` | values of the sync protocol; both sides of a round |
| `replica`, `effects` | the machine that joins all of these: `handle(event, now_ns) -> effects` |
| `view`, `feed`, `positions` | typed records; numbered, resumable changes; where operations stand in the order |
| `evidence` | bundles that prove an operation, or a whole state, to somebody without a node |
| `limits` | token buckets per peer |
| `store`, `disk` (`segments`, `segment_frames`, `lane_index`, `disk_files`, `sqlite`) | port with its twin; durable adapter |
| `service`, `syncer`, `gossip` | the shell that drives it all |

| level | when | survives f lying voters | for |
|---|---|---|---|
| observed | the block is valid here | no | progress shown to people |
| certified | 2f+1 voters have it on disk | yes: unique per lane | class C: specs, status, images, values |
| final | below a final cut of the spine | yes: same place everywhere | class O: claims, roles, keys, deletion, committee |
"""
