"""Accounts of the web page: names with scrypt hashes of their passwords, in one private file of the home.

The file is `<home>/user_data/.quantdeck/accounts.json`, readable by its owner only. Without a file there are no
accounts. A file that cannot be read is an error everywhere, never "no accounts": a page must not open because
its list of accounts broke.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from backend.errors import ConfigError
from backend.files import write_json
from backend.paths import Home

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
SHORTEST_PASSWORD = 12
LONGEST_PASSWORD = 1024
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**15, 8, 1  # 32 MiB and about 0.1 s per try
KEY_BYTES = 32
MOST_MEMORY = 256 * 2**20  # what a stored record may make a check use; stronger parameters are refused


@dataclass(frozen=True)
class Account:
    """One account as it is stored.

    Attributes:
        name: Who logs in.
        salt: Random bytes of this password, hexadecimal; new with every new password.
        key: scrypt of the password, hexadecimal.
        n, r, p: scrypt's parameters for this record.
        created_at: ISO 8601, UTC.
    """

    name: str
    salt: str
    key: str
    n: int
    r: int
    p: int
    created_at: str


def accounts_file(home: Home) -> Path:
    """Where the accounts of a home are kept."""
    return home.private / "accounts.json"


def add(home: Home, name: str, password: str) -> None:
    """Add an account.

    Raises:
        ConfigError: If the name is taken or has other characters than allowed, or the password is too short or long.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"found {name!r}; an account name has 1 to 64 letters, digits, '.', '_', '@' or '-' and starts with a "
            "letter or digit",
            key="name",
            value=name,
        )
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise ConfigError(  # the password itself is not told: messages end up in logs
            f"it has {len(password)} characters; a password needs {SHORTEST_PASSWORD} to {LONGEST_PASSWORD}",
            key="password",
        )
    salt = secrets.token_bytes(16)
    key = _derive(password, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P)
    with _changing(home) as known:
        if name in known:
            raise ConfigError(
                f"found {name!r}, which is taken; remove that account first to give it a new password",
                key="name",
                value=name,
            )
        made = datetime.now(UTC).isoformat(timespec="seconds")
        known[name] = Account(name, salt.hex(), key.hex(), SCRYPT_N, SCRYPT_R, SCRYPT_P, made)


def remove(home: Home, name: str) -> None:
    """Remove an account; its sessions end with its next request.

    Raises:
        ConfigError: If there is none of that name.
    """
    with _changing(home) as known:
        if name not in known:
            raise ConfigError(f"found {name!r}, which is no account; there are {sorted(known)}", key="name", value=name)
        del known[name]


def names(home: Home) -> list[str]:
    """The names of all accounts, sorted.

    Raises:
        ConfigError: If the file of accounts cannot be read.
    """
    return sorted(load(home))


def verify(home: Home, name: str, password: str) -> Account | None:
    """The account, if there is one of this name with this password.

    An unknown name costs the same work as a wrong password.

    Raises:
        ConfigError: If the file of accounts cannot be read.
    """
    account = load(home).get(name)
    known = account or Account(name, "00" * 16, "00" * KEY_BYTES, SCRYPT_N, SCRYPT_R, SCRYPT_P, "")
    found = _derive(password[: LONGEST_PASSWORD + 1], bytes.fromhex(known.salt), known.n, known.r, known.p)
    right = hmac.compare_digest(found, bytes.fromhex(known.key))
    return account if right else None


def load(home: Home) -> dict[str, Account]:
    """All accounts by name; empty if there is no file.

    Raises:
        ConfigError: If the file is there and is not one of ours.
    """
    path = accounts_file(home)
    try:
        with open(path, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path} can be read by other users of this machine; run: chmod 600 {path}")
            stored = json.load(file)
        if stored["version"] != 1:
            raise ValueError(f"version {stored['version']!r} is not known")
        found = [Account(**row) for row in stored["accounts"]]
        for account in found:
            _check(account)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the accounts in {path} cannot be read: {error}; nobody is let in until they can") from error
    return {account.name: account for account in found}


def _check(account: Account) -> None:
    strings = (account.name, account.salt, account.key, account.created_at)
    numbers = (account.n, account.r, account.p)
    if not all(isinstance(s, str) for s in strings) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError("an account has values of wrong kinds")
    if len(bytes.fromhex(account.key)) != KEY_BYTES or not bytes.fromhex(account.salt):
        raise ValueError(f"account {account.name!r} has no usable hash")
    if 128 * account.n * account.r * account.p > MOST_MEMORY:
        raise ValueError(f"the parameters of account {account.name!r} need too much memory")


def _derive(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # The same characters typed on another keyboard may come as another sequence of code points.
    typed = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    return hashlib.scrypt(typed, salt=salt, n=n, r=r, p=p, maxmem=2 * MOST_MEMORY, dklen=KEY_BYTES)


@contextlib.contextmanager
def _changing(home: Home) -> Iterator[dict[str, Account]]:
    """The accounts, to be changed by one process at a time; they are written if nothing was raised."""
    home.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(home.private / "accounts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = load(home)
        yield known
        rows = [asdict(known[name]) for name in sorted(known)]
        write_json(accounts_file(home), {"version": 1, "accounts": rows})  # 0600: it comes from mkstemp
