"""The base URLs of model servers: what one may look like, and which ones the operator allows."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from backend.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `trtllm-serve` and `vllm serve` listen unless they are told otherwise."""


def base_url(text: str) -> str:
    """A base URL in the one form that addresses are compared in: no `/v1` and no slash at its end.

    Raises:
        ValueError: If it is no http or https address, or carries credentials, a query or a fragment.
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or any(sign in text for sign in "@?#\\") or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(
            f"each is http://host:port or https://host:port, perhaps with a path, without a user, password or query; "
            f"{text!r} is not"
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def allowed_url(text: str, urls: Sequence[str]) -> str:
    """A base URL that the operator allows.

    Args:
        text: As somebody asks for it.
        urls: The setting `[served] urls`.

    Raises:
        ConfigError: If it is not among them.
    """
    try:
        url = base_url(text)
    except ValueError as error:
        raise ConfigError(str(error), key="URL", value=text) from None
    if url not in urls:
        known = ", ".join(urls) or "none"
        raise ConfigError(
            f"{url} is not an address that may be contacted; allowed: {known}. The operator can add it to `urls` of "
            "[served] in quantdeck.toml.",
            key="URL", value=text,
        )  # fmt: skip
    return url
