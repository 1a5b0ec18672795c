"""Who sent a request, for limits and fairness: the name of an API key or, where none is asked for, an address."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

HOST_BITS_V6 = 64  # of an IPv6 address: one machine has all that its network gives it


@dataclass(frozen=True, slots=True)
class Client:
    """One client. name: of the key, never the key itself, or the address."""

    kind: Literal["key", "address"]
    name: str

    def __str__(self) -> str:
        return f"API key '{self.name}'" if self.kind == "key" else f"address {self.name}"

    @property
    def label(self) -> str:
        """The client in metrics: a key's name; all addresses are one, for there is no end to them."""
        return self.name if self.kind == "key" else ""


NOBODY = Client("address", "unknown")  # what no client has asked for


def at_address(host: str) -> Client:
    """The client at an address; IPv6 addresses of one network are one client."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a test's or a Unix socket's
        return Client("address", host[:64])
    if address.version == 4:
        return Client("address", str(address))
    if (inside := address.ipv4_mapped) is not None:
        return Client("address", str(inside))
    return Client("address", str(ipaddress.ip_network((int(address), 128 - HOST_BITS_V6), strict=False)))
