"""The command about the job file itself: its reference as Markdown, as JSON, or the help of one key."""

from __future__ import annotations

import argparse

from backend.commands_jobs import print_json
from backend.errors import ConfigError
from backend.paths import Home
from backend.schema import reference


def schema(args: argparse.Namespace, home: Home) -> int:
    """`schema`: every key of a job file, or the help of one."""
    if args.key and args.form == "markdown":
        raise ConfigError("--markdown writes the whole reference; leave the key out", key="KEY", value=args.key)
    found = reference.find(args.key) if args.key else None
    if args.form == "json":
        keys = {setting.key for setting in found} if found else None
        print_json([row for row in reference.as_data() if keys is None or row["path"] in keys])
    elif args.form == "markdown":
        print(reference.markdown(), end="")
    elif found:
        print("\n".join(reference.help_of(setting) for setting in found), end="")
    else:
        print(reference.listing(), end="")
    return 0
