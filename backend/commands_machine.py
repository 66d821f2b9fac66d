"""The commands about the machine and the home: doctor, backup, accounts, engines, and measuring one folder."""

from __future__ import annotations

import argparse
import getpass
import sys
import tempfile
from pathlib import Path

from backend import accounts
from backend.commands_jobs import print_json
from backend.engines import environments
from backend.engines.registry import ENGINES
from backend.errors import ConfigError
from backend.jobs import doctor
from backend.jobs.doctor_findings import report
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.sources import hub_token


def examine(args: argparse.Namespace, home: Home) -> int:
    """`doctor`: everything that must be true; exit code 1 if something is not."""
    findings = doctor.examine(home, deep=args.deep, mend=args.mend)
    if args.json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print(report(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def backup(args: argparse.Namespace, home: Home) -> int:
    """A copy of the job store that is whole, whatever runs meanwhile."""
    if not home.jobs_db.exists():
        raise ConfigError(f"there is no {home.jobs_db} to back up", key="--home")
    target = Path(args.file).expanduser().resolve()
    if target.exists():
        raise ConfigError(f"{target} exists; a backup never overwrites a file", key="FILE")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}", key="FILE")
    JobStore(home).backup(target)
    print(f"{home.jobs_db} is saved in {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def accounts_list(args: argparse.Namespace, home: Home) -> int:
    """The names of all accounts."""
    names = accounts.names(home)
    print("\n".join(names) if names else "no accounts: the page asks nobody to log in, and listens on loopback only")
    return 0


def accounts_add(args: argparse.Namespace, home: Home) -> int:
    """A new account; its password is never an argument, which every user of the machine could read."""
    if args.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass(f"Password of {args.name}: ")
        if getpass.getpass("Again: ") != password:
            raise ConfigError("the two passwords differ; nothing was stored", key="password")
    accounts.add(home, args.name, password)
    print(f"account {args.name} is added")
    return 0


def accounts_remove(args: argparse.Namespace, home: Home) -> int:
    """Take an account away."""
    accounts.remove(home, args.name)
    print(f"account {args.name} is removed")
    return 0


def token_status(args: argparse.Namespace, home: Home) -> int:
    """Whether there is a token for the Hub; nothing of it is told."""
    print(hub_token.status(home))
    return 0


def token_set(args: argparse.Namespace, home: Home) -> int:
    """Keep a token for the Hub; it is never an argument, which every user of the machine could read."""
    token = sys.stdin.readline() if args.token_stdin else getpass.getpass("Token for the Hub: ")
    hub_token.save(home, token)
    print("the token is stored; jobs and searches use it from now on")
    return 0


def token_clear(args: argparse.Namespace, home: Home) -> int:
    """Forget the token for the Hub."""
    print("the token is removed" if hub_token.clear(home) else "no token was stored")
    return 0


def engines(args: argparse.Namespace, home: Home) -> int:
    """The engines, and whether they can run here."""
    for engine in ENGINES:
        reason = engine.unavailable_because()
        state = f"disabled: {reason}" if reason else "enabled"
        print(f"{engine.name:<14} {', '.join(engine.algorithms):<32} {state}\n{'':<14} {engine.about}")
    return 0


def install_engine(args: argparse.Namespace, home: Home) -> int:
    """Build an engine's own environment."""
    python = environments.install(args.name, on_line=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"engine {args.name} is ready: {python}")
    return 0


def evaluate(args: argparse.Namespace, home: Home) -> int:
    """Measure one model folder."""
    from backend.evaluate.command import evaluate_folder

    with tempfile.TemporaryDirectory() as work:
        result = evaluate_folder(
            args.model_dir, home, Path(work), protocols=args.protocol, dataset=args.dataset, subset=args.subset,
            split=args.split, tasks=args.tasks,
        )  # fmt: skip
    if args.json:
        print_json(result)
        return 0
    for metric in result["metrics"]:
        spread = f" +/- {metric['stderr']:.4g}" if metric["stderr"] is not None else ""
        print(f"{metric['name']}: {metric['value']:.4f}{spread} {metric['unit']}  [{metric['protocol']['summary']}]")
    return 0
