"""Remove passwords and tokens from network addresses before they are shown or logged."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit


def without_secrets(url: str) -> str:
    """Return an address without user, password, query and fragment."""
    scheme, mark, rest = re.split("[?#]", url, maxsplit=1)[0].rpartition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"


def without_password(url: str) -> str:
    """Return a camera's address without user name, password and query.

    Many cameras take the password in the query, so a query is shown as "…".
    """
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=host, query="…" if parts.query else ""))
    except ValueError:
        return url.rpartition("@")[2].partition("?")[0]
