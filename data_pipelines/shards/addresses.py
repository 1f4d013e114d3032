"""Addresses of what fsspec reads, and how they are shown."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from umm_zoo.errors import UserError

#: Kinds of addresses that are read. fsspec knows more, among them some that chain or unpack what they fetch.
SCHEMES = ("http", "https", "s3", "gs", "memory")

#: Seconds without a byte after which a server is asked again (our choice).
TIMEOUT = 30.0


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address such as ``https://…`` or ``s3://…``."""
    return "://" in path


def shown(address: str) -> str:
    """An address without what may be secret: user, password and query."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def filesystem(path: str) -> Any:
    """The fsspec file system behind a remote address."""
    scheme = path.partition("://")[0]
    if scheme not in SCHEMES or "::" in path:
        raise UserError(shown(path), f"an address of the kind '{scheme}'", f"files and {', '.join(SCHEMES[:-1])}")
    try:
        import fsspec  # optional: only remote shards need it

        if not scheme.startswith("http"):
            return fsspec.core.url_to_fs(path)[0]
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return fsspec.core.url_to_fs(path, client_kwargs={"timeout": patience})[0]
    except ImportError as error:
        needed = error.name or {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, "fsspec[http]")
        extra = scheme if scheme in ("s3", "gs") else "remote"
        found = f"shards at {scheme}:// need {needed}, which is not installed"
        raise UserError(shown(path), found, hint=f"pip install 'umm_zoo[{extra}]'") from error
