"""The key of a private network, as other libp2p programs keep it in a file (`swarm.key`, version 1).

Three lines: `/key/swarm/psk/1.0.0/`, the encoding `/base16/`, and 64 hexadecimal digits. Pure.
"""

from __future__ import annotations

import re

from formation.core.errors import UsageError

# Three lines of some 90 characters; a file much longer is another one.
FILE_SIZE_MAX_BYTES = 1024
_FORM = re.compile(r"/key/swarm/psk/1\.0\.0/\r?\n/base16/\r?\n([0-9a-fA-F]{64})\s*")
HINT = "make one: (echo /key/swarm/psk/1.0.0/; echo /base16/; openssl rand -hex 32) > network.key; chmod 600 network.key"


def parse_network_key(data: bytes, *, what: str) -> bytes:
    """The 32 bytes of a key file; what is wrong is told without a word of its text.

    Raises:
      UsageError: it is no such file; names `what`.
    """
    found = _FORM.fullmatch(data.decode("ascii", "replace")) if len(data) <= FILE_SIZE_MAX_BYTES else None
    if found is None:
        raise UsageError(f"{what} is not the key of a private network", hint=HINT)
    return bytes.fromhex(found[1])
