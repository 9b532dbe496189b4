"""Who may ask: a token beyond this machine, and on it no web page of another site.

A browser lets any page send requests to 127.0.0.1 under a name that the page's owner made point
there; without a token such requests are told by their Host header.
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_k2.engine.server.errors import ApiError

PUBLIC = frozenset({"/health"})
KEY_VARIABLE = "MEGATRON_K2_API_KEY"


class Access:
    """Refuses requests without the token, and strange hosts where there is none.

    Args:
        app: what is protected.
        api_key: the token; empty for none.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            error = self._refusal(Headers(scope=scope))
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._key:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            shown = key.strip().encode("latin-1")  # the bytes as they came
            if scheme.lower() == "bearer" and hmac.compare_digest(shown, self._key):
                return None
            return ApiError(
                401, "wanted the header Authorization: Bearer KEY", code="invalid_api_key"
            )
        host = headers.get("host", "")
        if is_loopback(host_name(host)):
            return None
        return ApiError(403, f"Host {host!r}: without an API key only local names are answered")


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def is_loopback(name: str) -> bool:
    """Return whether a name means this machine alone."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_binding(host: str, api_key: str) -> None:
    """Check that only this machine is served without a token.

    Raises:
        ValueError: others could ask.
    """
    if not api_key and not is_loopback(host):
        raise ValueError(
            f"--host {host} is reached from other machines: give a token with --api-key or the "
            f"variable {KEY_VARIABLE}, or bind to 127.0.0.1"
        )
