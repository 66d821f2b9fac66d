"""Who is there: sessions, lock-outs, and checking a name and a password.

A session is a random token in a cookie; this process keeps only its SHA-256, so all sessions end with it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from backend import accounts
from backend.errors import ConfigError
from backend.paths import Home
from ui.guard import host_name

COOKIE, SECURE_COOKIE = "quantdeck", "__Host-quantdeck"
MOST_SESSIONS = 10_000
MOST_KEYS = 20_000
CHECKS_AT_ONCE = 2  # each takes 32 MiB
CHECK_WAIT_S = 10.0

log = logging.getLogger("quantdeck")


class Accounts:
    """The accounts of a home as they are now: the file is read again whenever it changed.

    Args:
        home: The home.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._known: dict[str, accounts.Account] = {}
        self._broken = ""

    def now(self) -> dict[str, accounts.Account]:
        """All accounts by name.

        Raises:
            ConfigError: If their file cannot be read.
        """
        with self._lock:
            seen = self._signature()
            if seen != self._seen:
                try:
                    self._known, self._broken = accounts.load(self.home), ""
                except ConfigError as error:
                    self._known, self._broken = {}, error.message
                    log.error("%s", error.message)
                self._seen = seen
            if self._broken:
                raise ConfigError(self._broken)
            return self._known

    def needed(self) -> bool:
        """Whether there are accounts; a file of accounts that cannot be read counts as some."""
        try:
            return bool(self.now())
        except ConfigError:
            return True

    def _signature(self) -> tuple[int, ...]:
        try:
            found = accounts.accounts_file(self.home).stat()
        except FileNotFoundError:
            return ()
        except OSError:
            return (-1,)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


@dataclass(frozen=True)
class Session:
    """One login.

    Attributes:
        name: The account.
        salt: That of the account's password at the time; a new password ends the session.
        ends_at: Seconds since the epoch.
    """

    name: str
    salt: str
    ends_at: float


class Sessions:
    """All logins of this process.

    Args:
        known: The accounts; a removed one's sessions are over at once.
        hours: How long a login lasts.
        clock: Seconds since the epoch.
    """

    def __init__(self, known: Accounts, hours: float, clock: Callable[[], float] = time.time) -> None:
        self.known = known
        self.seconds = hours * 3600
        self.clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()  # oldest first

    def start(self, account: accounts.Account) -> str:
        """A new session; returns its token, which is not kept."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            for digest in [d for d, s in self._sessions.items() if s.ends_at <= self.clock()]:
                del self._sessions[digest]
            while len(self._sessions) >= MOST_SESSIONS:
                self._sessions.popitem(last=False)
            session = Session(account.name, account.salt, self.clock() + self.seconds)
            self._sessions[_digest(token)] = session
        return token

    def name_of(self, token: str | None) -> str | None:
        """The account that a token's session belongs to; None if it has none, or it is over."""
        if not token:
            return None
        digest = _digest(token)
        with self._lock:
            session = self._sessions.get(digest)
        if session is None:
            return None
        try:
            account = self.known.now().get(session.name)
        except ConfigError:
            return None
        if account is None or account.salt != session.salt or session.ends_at <= self.clock():
            self.end(token)
            return None
        return session.name

    def end(self, token: str | None) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(token or ""), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class Lockout:
    """Counts failed tries per key; after the free ones each failure doubles the wait, up to a limit.

    A try is counted before it is checked, so many at once gain nothing; a right one is taken back.

    Args:
        free: Failures without a wait.
        longest_s: The longest wait.
        forget_s: Time without a failure after which a key is forgotten.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        free: int,
        longest_s: float = 900.0,
        forget_s: float = 86_400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.free = free
        self.longest_s = longest_s
        self.forget_s = forget_s
        self.clock = clock
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # key -> failures, time of the last one

    def wait_s(self, key: str) -> float:
        """Seconds until the next try of a key is taken; 0 if it is taken now."""
        with self._lock:
            return self._wait(key)

    def _wait(self, key: str) -> float:
        count, at = self._failures.get(key, (0, 0.0))
        if count < self.free:
            return 0.0
        return max(0.0, at + min(self.longest_s, 2.0 ** min(30, count - self.free)) - self.clock())

    def take(self, key: str) -> bool:
        """Count a try; False if the key has to wait, and then nothing is counted."""
        with self._lock:
            if self._wait(key) > 0:
                return False
            now = self.clock()
            while self._failures and next(iter(self._failures.values()))[1] < now - self.forget_s:
                self._failures.popitem(last=False)
            count = self._failures.pop(key, (0, now))[0]
            while len(self._failures) >= MOST_KEYS:
                self._failures.popitem(last=False)
            self._failures[key] = (count + 1, now)
            return True

    def give_back(self, key: str, *, all_of_them: bool) -> None:
        """The try was right: forget it, or all failures of the key."""
        with self._lock:
            count, at = self._failures.get(key, (0, 0.0))
            if all_of_them or count <= 1:
                self._failures.pop(key, None)
            else:
                self._failures[key] = (count - 1, at)


class Login:
    """Checks names and passwords, and keeps the sessions, of one running dashboard.

    Args:
        home: The home.
        hours: How long a login lasts.
        always: Whether accounts are needed even if there are none (left): where others can connect.
        https_hosts: Host names under which the page is asked for by https.
        port: Our port; browsers share cookies between the ports of a host.
    """

    def __init__(
        self,
        home: Home,
        hours: float,
        *,
        always: bool = False,
        https_hosts: frozenset[str] = frozenset(),
        port: int = 0,
    ) -> None:
        self.home = home
        self.always = always
        self.https_hosts = https_hosts
        self.port = port
        self.known = Accounts(home)
        self.sessions = Sessions(self.known, hours)
        self.by_account = Lockout(free=5)
        self.by_address = Lockout(free=20)
        self._checks = threading.BoundedSemaphore(CHECKS_AT_ONCE)

    def needed(self) -> bool:
        """Whether a request needs a session now."""
        return self.always or self.known.needed()

    def account_of(self, connection: HTTPConnection) -> str | None:
        """The account of a request's session."""
        return self.sessions.name_of(connection.cookies.get(self.cookie_name(connection)))

    def is_https(self, connection: HTTPConnection) -> bool:
        """Whether the browser reached us by https, as the settings say for the host it asked for."""
        forwarded = connection.headers.get("x-forwarded-host", "").split(",")[0]
        return host_name(forwarded or connection.headers.get("host", "")) in self.https_hosts

    def cookie_name(self, connection: HTTPConnection) -> str:
        """Name of the session's cookie."""
        return SECURE_COOKIE if self.is_https(connection) else f"{COOKIE}-{self.port}"

    def check(self, name: str, password: str, address: str) -> tuple[accounts.Account | None, float]:
        """The account, if name and password are right and neither name nor address has to wait; and that wait.

        Raises:
            ConfigError: If the accounts cannot be read.
        """
        name_key, address_key = name[:64], _network(address)
        if not self.by_address.take(address_key):
            return None, self.by_address.wait_s(address_key)
        if not self.by_account.take(name_key):
            return None, self.by_account.wait_s(name_key)
        if not self._checks.acquire(timeout=CHECK_WAIT_S):
            return None, CHECK_WAIT_S
        try:
            account = accounts.verify(self.home, name, password)
        finally:
            self._checks.release()
        if account is not None:
            self.by_account.give_back(name_key, all_of_them=True)
            self.by_address.give_back(address_key, all_of_them=False)
        return account, 0.0


def _network(address: str) -> str:
    """What counts as one client: an IPv4 address, or the 64 bits that an IPv6 household has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return str(found)
