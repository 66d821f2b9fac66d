"""The token for the Hub: given once, kept in one private file of the home, never shown.

The file is `<home>/user_data/.quantdeck/hub_token.json`, readable by its owner only. Programs that ask the Hub get it
as `HF_TOKEN`; no other program does. A stored token goes before one of the environment: whoever entered it meant it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

from backend.engines.environments import HUB_TOKENS
from backend.errors import ConfigError
from backend.files import write_json
from backend.jobs.redact import remember_secret
from backend.paths import Home

SHAPE = re.compile(r"[A-Za-z0-9._-]{8,512}")


def token_file(home: Home) -> Path:
    """Where the token of a home is kept."""
    return home.private / "hub_token.json"


def save(home: Home, token: str) -> None:
    """Keep a token, in place of the one before it.

    Raises:
        ConfigError: If it cannot be a token. The message does not tell it.
    """
    token = token.strip()
    if not SHAPE.fullmatch(token):
        raise ConfigError(
            f"the text of {len(token)} characters is no token; one has 8 to 512 letters, digits, dots, '_' and '-', "
            "and those of the Hub begin with 'hf_'. Copy it again from Settings, Access Tokens, on the Hub",
            key="token",
        )
    remember_secret(token)
    home.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(token_file(home), {"version": 1, "token": token, "saved_at": made})  # 0600: it comes from mkstemp


def clear(home: Home) -> bool:
    """Forget the stored token; False if there was none."""
    try:
        token_file(home).unlink()
    except FileNotFoundError:
        return False
    return True


def read(path: Path) -> tuple[str, str] | None:
    """The token in a file and when it was stored; None if there is no file. From now on it is redacted everywhere.

    Raises:
        ConfigError: If the file is not one of ours, or others can read it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path} can be read by other users of this machine; run: chmod 600 {path}")
            stored = json.load(file)
        token, saved_at = stored["token"], stored["saved_at"]
        if not isinstance(saved_at, str) or not isinstance(token, str) or not SHAPE.fullmatch(token):
            raise ValueError("it holds no token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not one of ours"
        raise ConfigError(f"the token for the Hub in {path} cannot be read ({reason}); enter it again") from None
    remember_secret(token)
    return token, saved_at


def variables(path: Path) -> dict[str, str]:
    """What the environment of a program that may see the token needs besides ours; empty without a stored token.

    Raises:
        ConfigError: If the file cannot be read.
    """
    stored = read(path)
    return {} if stored is None else {HUB_TOKENS[0]: stored[0]}


def status(home: Home) -> str:
    """One sentence on whether there is a token; it tells nothing of the token itself.

    Raises:
        ConfigError: If the file cannot be read.
    """
    stored = read(token_file(home))
    if stored is not None:
        return f"A token for the Hub is stored since {stored[1][:10]}"
    if name := next((name for name in HUB_TOKENS if os.environ.get(name)), None):
        return f"No token is stored; the one in {name} is used"
    return "No token for the Hub is stored: gated and private models cannot be used"
