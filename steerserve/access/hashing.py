"""scrypt of a key's secret, at the cost that its entry records."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

__all__ = ["DEFAULT_COST", "HASH_BYTES", "SALT_BYTES", "Cost", "hash_secret", "matches", "new_salt"]

SALT_BYTES = 16
HASH_BYTES = 32


class Cost(NamedTuple):
    """scrypt's parameters; it takes 128·n·r bytes."""

    n: int
    r: int
    p: int

    @property
    def memory(self) -> int:
        """Bytes that one hash takes, with room for what OpenSSL adds."""
        return 128 * self.r * (self.n + self.p + 2) + 65_536


DEFAULT_COST = Cost(n=2**14, r=8, p=1)


def new_salt() -> bytes:
    """A random salt."""
    return secrets.token_bytes(SALT_BYTES)


def hash_secret(secret: str, salt: bytes, cost: Cost) -> bytes:
    """scrypt of the secret, `HASH_BYTES` long."""
    n, r, p = cost
    return hashlib.scrypt(secret.encode(), salt=salt, n=n, r=r, p=p, maxmem=cost.memory, dklen=HASH_BYTES)


def matches(secret: str, salt: bytes, cost: Cost, expected: bytes) -> bool:
    """Whether the secret has this hash, compared in constant time."""
    return hmac.compare_digest(hash_secret(secret, salt, cost), expected)
