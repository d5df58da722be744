"""One POST to a host on the public internet, and to nothing else, whatever a name resolves to.

The name is resolved once and every address of it must be public; the connection goes to the address that was
checked, with the certificate of the name. Redirects are not followed, the answer's body is not read, and all
of it is over after ten seconds.
"""

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

SECONDS = 10.0
NAT64 = ip_network("64:ff9b::/96")

Resolve = Callable[[str], list[str]]


class Blocked(Exception):
    """The URL leads to no public host."""


def addresses_of(host: str) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


def require_public(url: str, resolve: Resolve) -> list[str]:
    """The addresses of the URL's host; raises `Blocked`, or `OSError` for a name that resolves to nothing."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "https" and parts.port in (None, 443)
    except ValueError:
        usable = False
    if not usable or not parts.hostname or "@" in parts.netloc:
        raise Blocked("a webhook is an https URL of a host on port 443, without user or password")
    addresses = resolve(parts.hostname)
    if not all(map(is_public, addresses)):
        raise Blocked("a webhook's host must have public addresses only")
    return addresses


def is_public(address: str) -> bool:
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def post(
    url: str, body: bytes, headers: Mapping[str, str], address: str, tls: ssl.SSLContext, port: int = 443
) -> int:
    """The status of the answer; raises `OSError` or `HTTPException` where none came in time."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    connection = http.client.HTTPSConnection(host, timeout=SECONDS)
    with socket.create_connection((address, port), SECONDS) as plain:
        too_late = threading.Timer(SECONDS, plain.shutdown, [socket.SHUT_RDWR])
        too_late.start()
        try:
            with tls.wrap_socket(plain, server_hostname=host) as wire:
                connection.sock = wire
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("POST", path, body, dict(headers))
                return connection.getresponse().status
        finally:
            too_late.cancel()
