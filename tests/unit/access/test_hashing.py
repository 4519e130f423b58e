import hashlib

import pytest

from steerserve.access import hashing
from steerserve.access.hashing import DEFAULT_COST, Cost, hash_secret, matches, new_salt

CHEAP = Cost(n=1024, r=1, p=1)


def test_the_hash_is_scrypt_at_the_cost_that_is_recorded() -> None:
    expected = hashlib.scrypt(b"secret", salt=b"salt", n=2**14, r=8, p=1, dklen=32)
    assert hash_secret("secret", b"salt", DEFAULT_COST) == expected


@pytest.mark.parametrize("cost", [CHEAP, Cost(2**15, 8, 1), Cost(1024, 8, 4), Cost(1024, 64, 1)])
def test_every_allowed_cost_finds_its_memory(cost: Cost) -> None:
    assert len(hash_secret("secret", b"salt", cost)) == 32


def test_only_the_same_secret_and_salt_match() -> None:
    digest = hash_secret("secret", b"salt", CHEAP)
    assert matches("secret", b"salt", CHEAP, digest)
    assert not matches("Secret", b"salt", CHEAP, digest)
    assert not matches("secret", b"salz", CHEAP, digest)
    assert not matches("secret", b"salt", CHEAP, digest[:-1])


def test_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return True

    monkeypatch.setattr(hashing.hmac, "compare_digest", compare)
    digest = hash_secret("secret", b"salt", CHEAP)
    assert matches("secret", b"salt", CHEAP, digest)
    assert compared == [(digest, digest)]


def test_salts_differ() -> None:
    assert len({new_salt() for _ in range(50)}) == 50
