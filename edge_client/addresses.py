"""Network addresses as they may be shown and logged: without passwords and tokens."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit


def without_secrets(url: str) -> str:
    """An address without user, password, query and fragment."""
    scheme, mark, rest = re.split("[?#]", url, maxsplit=1)[0].rpartition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"


def without_password(url: str) -> str:
    """An address without the name and password in it: it is shown and logged.

    Many cameras want them behind the question mark, so nothing of that is shown either.
    """
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=place, query="…" if parts.query else ""))
    except ValueError:
        return url.rpartition("@")[2].partition("?")[0]
