"""Fetching pictures by HTTP, only from hosts that the owner allowed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from functools import cached_property

import httpx

from vlm_collab import __version__
from vlm_collab.openai import ApiError, Url, refuse

_MAX_REDIRECTS = 3
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Fetcher:
    """Fetches pictures by HTTP.

    A host is allowed by its name at the scheme's default port, or as `name:port`. If the name
    resolves to a private address, that address must be allowed as well. Otherwise the owner of the
    name could make this gateway read from the private network.

    Args:
        hosts: the allowed hosts.
        timeout_s: time for one picture.
        max_bytes: largest picture, in bytes.
    """

    def __init__(self, hosts: Collection[str], *, timeout_s: float, max_bytes: int) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        """The HTTP client. Made at its first use, since most gateways fetch nothing."""
        return httpx.AsyncClient(
            # Proxies from the environment would resolve names without our checks.
            trust_env=False,
            timeout=self._timeout_s,
            headers={"User-Agent": f"vlm-collab/{__version__}", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Close the HTTP client."""
        if "_http" in self.__dict__:
            await self._http.aclose()

    async def fetch(self, picture: Url, param: str) -> bytes:
        """Fetch a picture.

        Args:
            picture: its address.
            param: the request's parameter, for the error.

        Returns:
            the encoded picture.

        Raises:
            ApiError: its host is not allowed, or it cannot be fetched.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(picture.url, param)
        except TimeoutError:
            raise _failed(param, f"it did not arrive within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise _failed(param, str(error) or type(error).__name__) from None

    async def _follow(self, address: str, param: str) -> bytes:
        host: str | None = None
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                url = httpx.URL(address)
            except (httpx.InvalidURL, ValueError) as error:
                raise refuse(
                    param, f"{param}: not a valid URL: {error}", "invalid_image_url"
                ) from None
            if host is not None and url.host != host:
                raise _failed(param, f"{host} redirects to another host, {url.host}")
            host = url.host
            resolved = await self._resolve(url, param)
            request = self._http.build_request(
                "GET",
                # Connect to the checked address: the name may resolve to another one by now.
                url.copy_with(host=resolved),
                headers={"Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.host},
            )
            response = await self._http.send(request, stream=True)
            try:
                if response.has_redirect_location:
                    address = str(url.join(response.headers["location"]))
                    continue
                return await self._read(response, param)
            finally:
                await response.aclose()
        raise _failed(param, f"more than {_MAX_REDIRECTS} redirects")

    async def _resolve(self, url: httpx.URL, param: str) -> str:
        """Resolve a URL's host and check its address."""
        if url.scheme not in _DEFAULT_PORTS or url.userinfo:
            raise refuse(param, f"{param}: pictures are fetched only from http(s)://host/path")
        port = url.port or _DEFAULT_PORTS[url.scheme]
        standard = port == _DEFAULT_PORTS[url.scheme]
        names = {f"{url.host}:{port}", *([url.host] if standard else [])}
        if not names & self._hosts:
            named = url.host if standard else f"{url.host}:{port}"
            raise refuse(
                param,
                f"{param}: this gateway may not fetch from {named}; send a data URL, or start the "
                f"gateway with --allow-host {named}",
                "image_url_not_allowed",
            )
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _failed(param, f"unknown host {url.host}") from None
        resolved = str(found[0][4][0])
        address = ipaddress.ip_address(resolved.partition("%")[0])
        public = address.is_global and not address.is_multicast
        if not public and not {resolved, f"{resolved}:{port}"} & self._hosts:
            raise refuse(
                param,
                f"{param}: {url.host} is at {resolved}, which is not a public address; allow it "
                f"with --allow-host {resolved} as well",
                "image_url_not_allowed",
            )
        return resolved

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        if response.status_code != 200:
            raise _failed(param, f"HTTP {response.status_code}")
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > self._max_bytes:
                mib = self._max_bytes / 2**20
                raise refuse(
                    param, f"{param}: the picture has more than {mib:g} MiB", "image_too_large"
                )
        return bytes(data)


def _failed(param: str, why: str) -> ApiError:
    return refuse(param, f"{param}: the picture cannot be fetched: {why}", "image_not_fetched")
