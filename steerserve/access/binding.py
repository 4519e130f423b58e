"""A server without keys listens where only this machine can reach it."""

from __future__ import annotations

import ipaddress
import socket

from steerserve.errors import ConfigError

__all__ = ["check_binding"]


def check_binding(host: str | None, uds: str | None, *, guarded: bool, open_to_all: bool) -> None:
    """Refuse an open server on a network that nobody asked for.

    Args:
        host: where it will listen, as given to `--host`; None, "" and "0.0.0.0" are every interface.
        uds: a unix socket instead, which its folder's permissions guard.
        guarded: whether keys are configured.
        open_to_all: whether the operator asked for it.
    Raises: ConfigError if others could reach it, or the name cannot be resolved.
    """
    if uds or guarded or open_to_all or _is_loopback(host or ""):
        return
    raise ConfigError(
        f"expected keys, or a loopback host, got no keys and {repr(host) if host else 'every interface'}: "
        "whoever reaches it could steer. Name a key file, listen on 127.0.0.1, or say that it is open to all"
    )


def _is_loopback(host: str) -> bool:
    if host in ("", "localhost"):
        return host == "localhost"
    addresses = _addresses(host)
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _addresses(host: str) -> set[str]:
    """What the name means, as binding to it would resolve it."""
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"expected a host that resolves, got {host!r}: {error}") from None
    return {str(address[0]) for *_, address in found}
