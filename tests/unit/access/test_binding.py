import socket
from typing import Any

import pytest

from steerserve.access import binding
from steerserve.access.binding import check_binding
from steerserve.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_a_loopback_host_needs_no_keys(host: str) -> None:
    check_binding(host, None, guarded=False, open_to_all=False)


@pytest.mark.parametrize("host", [None, "", "0.0.0.0", "::", "0", "10.1.2.3", "[::]", "2001:db8::1"])
def test_a_host_that_others_reach_needs_keys(host: str | None) -> None:
    with pytest.raises(ConfigError, match=r"expected keys, or a loopback host, got no keys"):
        check_binding(host, None, guarded=False, open_to_all=False)
    check_binding(host, None, guarded=True, open_to_all=False)
    check_binding(host, None, guarded=False, open_to_all=True)


def test_a_unix_socket_is_nobodys_network() -> None:
    check_binding("0.0.0.0", "/run/steerserve.sock", guarded=False, open_to_all=False)


@pytest.mark.parametrize(
    ("addresses", "fine"), [(["127.0.0.1", "::1"], True), (["127.0.0.1", "10.0.0.1"], False), ([], False)]
)
def test_every_address_of_a_name_must_be_loopback(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], fine: bool
) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(binding.socket, "getaddrinfo", resolve)
    if fine:
        check_binding("machine", None, guarded=False, open_to_all=False)
    else:
        with pytest.raises(ConfigError):
            check_binding("machine", None, guarded=False, open_to_all=False)


@pytest.mark.parametrize("host", ["a..b", "x" * 300])
def test_a_name_that_does_not_resolve_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="expected a host that resolves"):
        check_binding(host, None, guarded=False, open_to_all=False)
