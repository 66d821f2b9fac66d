"""Accounts: only hashes on disk, readable by their owner only, and a broken file lets nobody in."""

from __future__ import annotations

import json
import multiprocessing
import stat
import time

import pytest

from backend import accounts
from backend.errors import ConfigError

PASSWORD = "correct horse battery"


def test_an_account_is_added_verified_and_removed(home):
    assert accounts.names(home) == []
    accounts.add(home, "ada", PASSWORD)
    accounts.add(home, "bob@example.org", "another password")
    assert accounts.names(home) == ["ada", "bob@example.org"]
    assert accounts.verify(home, "ada", PASSWORD).name == "ada"
    assert accounts.verify(home, "ada", "another password") is None
    assert accounts.verify(home, "Ada", PASSWORD) is None
    assert accounts.verify(home, "nobody", PASSWORD) is None
    accounts.remove(home, "ada")
    assert accounts.verify(home, "ada", PASSWORD) is None
    assert accounts.names(home) == ["bob@example.org"]


def test_the_file_is_private_and_holds_no_password(home):
    accounts.add(home, "ada", PASSWORD)
    path = accounts.accounts_file(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PASSWORD not in path.read_text()
    accounts.add(home, "bob", PASSWORD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first, second = json.loads(path.read_text())["accounts"]
    assert first["key"] != second["key"]  # one password, two salts
    assert {first["n"], first["r"], first["p"]} == {2**15, 8, 1}


def test_a_removed_and_added_account_is_another_one(home):
    accounts.add(home, "ada", PASSWORD)
    before = accounts.load(home)["ada"].salt
    accounts.remove(home, "ada")
    accounts.add(home, "ada", PASSWORD)
    assert accounts.load(home)["ada"].salt != before


@pytest.mark.parametrize("name", ["", " ada", "a b", "../x", "-rf", "a\n", "a\x00", "<b>", "x" * 65, "ünï"])
def test_odd_names_are_refused(home, name):
    with pytest.raises(ConfigError, match="account name"):
        accounts.add(home, name, PASSWORD)
    assert not accounts.accounts_file(home).exists()


@pytest.mark.parametrize("password", ["", "short", "x" * 11, "x" * 1025])
def test_passwords_of_odd_lengths_are_refused_and_not_repeated(home, password):
    with pytest.raises(ConfigError) as caught:
        accounts.add(home, "ada", password)
    assert len(password) < 4 or password not in caught.value.message


def test_names_are_taken_once_and_removed_once(home):
    accounts.add(home, "ada", PASSWORD)
    with pytest.raises(ConfigError, match="taken"):
        accounts.add(home, "ada", "some other password")
    assert accounts.verify(home, "ada", PASSWORD)
    with pytest.raises(ConfigError, match="no account"):
        accounts.remove(home, "bob")


def test_the_same_letters_in_another_form_are_the_same_password(home):
    accounts.add(home, "ada", "cafe\u0301 au lait noir")
    assert accounts.verify(home, "ada", "caf\u00e9 au lait noir")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "not json", '{"version": 2, "accounts": []}', '{"version": 1, "accounts": [{"name": "ada"}]}',
     '{"version": 1, "accounts": [{"name": "a", "salt": "zz", "key": "", "n": 2, "r": 8, "p": 1, "created_at": ""}]}',
     '{"version": 1, "accounts": [{"name": "a", "salt": "00", "key": "%s", "n": 1073741824, "r": 8, "p": 1, '
     '"created_at": ""}]}' % ("00" * 32)],
)  # fmt: skip
def test_a_broken_file_is_an_error_and_never_no_accounts(home, content):
    path = accounts.accounts_file(home)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    path.chmod(0o600)
    for call in (accounts.names, accounts.load):
        with pytest.raises(ConfigError, match="cannot be read"):
            call(home)
    with pytest.raises(ConfigError):
        accounts.verify(home, "ada", PASSWORD)
    with pytest.raises(ConfigError):
        accounts.add(home, "ada", PASSWORD)
    assert path.read_text() == content


def test_a_file_that_others_can_read_is_refused(home):
    accounts.add(home, "ada", PASSWORD)
    accounts.accounts_file(home).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        accounts.names(home)


def test_an_unknown_name_costs_as_much_as_a_wrong_password(home):
    accounts.add(home, "ada", PASSWORD)

    def cpu(name: str) -> float:
        """The least CPU time of several tries: what the work itself costs, whatever else the machine does."""
        spent = []
        for _ in range(5):
            before = time.thread_time()
            assert accounts.verify(home, name, "a wrong password") is None
            spent.append(time.thread_time() - before)
        return min(spent)

    known, unknown = cpu("ada"), cpu("nobody")
    assert known > 0.005 and unknown > known / 3  # without the hash it would be a hundredth


def _add(home, name):
    accounts.add(home, name, PASSWORD)


def test_accounts_added_by_several_processes_at_once_are_all_kept(home):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(home, f"user{i}")) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert accounts.names(home) == [f"user{i}" for i in range(4)]
