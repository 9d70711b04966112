"""A private network's connections: everything on the wire, the first byte too, under a key that only members have.

The libp2p pre-shared key protocol, version 1 (libp2p specifications, pnet/Private-Networks-PSK-V1): each side sends 24 random
bytes, then its bytes under XSalsa20 of key and nonce. It shuts strangers out before anything is parsed; identity, integrity and
forward secrecy come from Noise or TLS above it. The library's own (0.8.1) takes Salsa20 with 8 bytes, and so speaks with
no other implementation.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from Crypto.Cipher import Salsa20
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection

KEY_SIZE_BYTES = 32
NONCE_SIZE_BYTES = 24
_SIGMA = b"expand 32-byte k"
_ROUND_PAIR_COUNT = 10
_MASK = 0xFFFFFFFF
# Column round, then row round: (to, from, from, rotation) as in the Salsa20 specification, section 4 and 5.
_STEPS = tuple(
    step
    for a, b, c, d in (
        (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
        (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),
    )
    for step in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18))
)  # fmt: skip


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """The 32-byte key that XSalsa20 uses below (Bernstein, Extending the Salsa20 nonce, 2011).

    Args:
      key: 32 bytes.
      nonce: 16 bytes.
    """
    k, n, c = struct.unpack("<8I", key), struct.unpack("<4I", nonce), struct.unpack("<4I", _SIGMA)
    x = [c[0], *k[:4], c[1], *n, c[2], *k[4:], c[3]]
    for _ in range(_ROUND_PAIR_COUNT):
        for to, one, two, rotation in _STEPS:
            total = (x[one] + x[two]) & _MASK
            x[to] ^= ((total << rotation) | (total >> (32 - rotation))) & _MASK
    return struct.pack("<8I", x[0], x[5], x[10], x[15], *x[6:10])


def xsalsa20(key: bytes, nonce: bytes) -> Any:
    """The cipher of one direction: `encrypt` and `decrypt` go on where they ended.

    Args:
      key: KEY_SIZE_BYTES.
      nonce: NONCE_SIZE_BYTES.
    """
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


class ProtectedConnection(RawConnection):  # type: ignore[misc] # the library is untyped here
    """In place of the library's `PskConn`: a raw connection under the network's key."""

    def __init__(self, connection: Any, key_hex: str) -> None:
        self._connection = connection
        self._key = bytes.fromhex(key_hex)
        self._reader: Any = None
        self._writer: Any = None
        self.is_initiator = connection.is_initiator

    async def write(self, data: bytes) -> None:
        """Send all; the first call sends the nonce before it."""
        nonce = b""
        if self._writer is None:
            nonce = os.urandom(NONCE_SIZE_BYTES)
            self._writer = xsalsa20(self._key, nonce)
        await self._connection.write(nonce + self._writer.encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Up to n bytes; empty at the end.

        Raises:
          ConnectionClosedError: it ended within the nonce.
        """
        if self._reader is None:
            nonce = b""
            while len(nonce) < NONCE_SIZE_BYTES:
                part = await self._connection.read(NONCE_SIZE_BYTES - len(nonce))
                if not part:
                    raise ConnectionClosedError("closed within the nonce", transport="tcp")
                nonce += part
            self._reader = xsalsa20(self._key, nonce)
        data: bytes = self._reader.decrypt(await self._connection.read(n))
        return data

    async def close(self) -> None:
        """Close what is below."""
        await self._connection.close()

    def get_remote_address(self) -> Any:
        """Host and port of the other end, if known."""
        return self._connection.get_remote_address()

    def get_transport_addresses(self) -> Any:
        """Multiaddrs of the other end."""
        return self._connection.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self._connection.get_connection_type()
