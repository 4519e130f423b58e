"""Ed25519 keys of the audit log, as PEM files."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from steerserve.errors import AuditError

__all__ = [
    "SigningKey",
    "VerifyingKey",
    "make_key",
    "public_path",
    "read_public_key",
    "read_signing_key",
    "show_key",
]

_PRIVATE, _PUBLIC = "an Ed25519 private key in PEM", "an Ed25519 public key in PEM"


@dataclass(frozen=True)
class VerifyingKey:
    """Checks signatures."""

    key: Ed25519PublicKey

    @cached_property
    def id(self) -> str:
        """Names the key in the log: the start of the SHA-256 of the raw key, 32 hexadecimal digits."""
        raw = self.key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return hashlib.sha256(raw).hexdigest()[:32]

    @property
    def pem(self) -> bytes:
        """What `read_public_key` reads."""
        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def accepts(self, signature: str, message: bytes) -> bool:
        """Whether this key's owner signed the message; `signature` is hexadecimal."""
        try:
            self.key.verify(bytes.fromhex(signature), message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """Signs heads."""

    key: Ed25519PrivateKey

    @cached_property
    def public(self) -> VerifyingKey:
        """The half that may be shown to everyone."""
        return VerifyingKey(self.key.public_key())

    def sign(self, message: bytes) -> str:
        """The signature, 128 hexadecimal digits."""
        return self.key.sign(message).hex()


def public_path(path: Path) -> Path:
    """Where the public half of the private key at `path` lies: `audit.pem` → `audit.pub.pem`."""
    return path.with_suffix(".pub.pem")


def make_key(path: Path) -> SigningKey:
    """Make a key: the private half at `path`, for its owner alone, the public half beside it.

    Raises: AuditError if there is a file already, or it cannot be written.
    """
    for taken in (path, public_path(path)):
        if taken.exists():
            raise _taken(taken)
    key = SigningKey(Ed25519PrivateKey.generate())
    pem = key.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _place(path, pem, 0o600)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        raise AuditError(f"expected to write a signing key to {path}: {error.strerror}") from error
    show_key(public_path(path), key.public)
    return key


def show_key(path: Path, key: VerifyingKey) -> None:
    """Put the public key at `path`, where it is not there already.

    Raises: AuditError if another one lies there, or it cannot be written.
    """
    try:
        _place(path, key.pem, 0o644)
    except FileExistsError:
        there = read_public_key(path)
        if there.id != key.id:
            raise AuditError(
                f"expected the public key {key.id} at {path}, got {there.id}: a log keeps one signing key; "
                "begin a new folder for a new one"
            ) from None
    except OSError as error:
        raise AuditError(f"expected to write a public key to {path}: {error.strerror}") from error


def read_signing_key(path: Path) -> SigningKey:
    """Read a private key.

    Raises: AuditError if the file is not one.
    """
    try:
        key = load_pem_private_key(_read(path, _PRIVATE), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuditError(f"expected {_PRIVATE}, without a password, at {path}: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditError(f"expected {_PRIVATE} at {path}, got {type(key).__name__}")
    return SigningKey(key)


def read_public_key(path: Path) -> VerifyingKey:
    """Read a public key.

    Raises: AuditError if the file is not one.
    """
    try:
        key = load_pem_public_key(_read(path, _PUBLIC))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AuditError(f"expected {_PUBLIC} at {path}: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise AuditError(f"expected {_PUBLIC} at {path}, got {type(key).__name__}")
    return VerifyingKey(key)


def _read(path: Path, wanted: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuditError(f"expected {wanted} at {path}: {error.strerror}") from None


def _taken(path: Path) -> AuditError:
    return AuditError(f"expected no file at {path}, there is one: a key is never overwritten")


def _place(path: Path, content: bytes, mode: int) -> None:
    """Write a file that was not there, whole or not at all.

    Raises: FileExistsError: a link, unlike a rename, never replaces what another process wrote meanwhile.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
