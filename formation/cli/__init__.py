"""The command line: a client of one node's HTTP API, and nothing more.

Rules of the room:
1. `formation --help` answers well under 250 ms, so no module here imports anything heavy at its top: no trio, msgspec,
   nacl or rich. What a command needs, it imports when it runs; node code is imported by `node` and `demo` only.
2. The result goes to stdout, everything else (progress, hints, warnings, errors) to stderr.
3. Text that came from the network is made printable before it reaches a terminal (`output.printable`).
4. What a command waits for goes on in the network without it: an interrupted or timed-out command says how to look again.

`command.py` registers commands, `context.py` is what each of them gets, one file holds each noun, `watch.py` is the pure
judge of how a wish fares and `follow.py` its shell; `tui/` is `formation top`.
"""
