"""The command that shows the text of a job as the model will see it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from backend.errors import DataError
from backend.paths import Home
from backend.schema import read_yaml
from backend.sources.preview import NotDownloadedError, Preview, bins_of, preview, preview_config, summary

BAR = 40  # characters of the longest bar
BINS = 10


def preview_text(args: argparse.Namespace, home: Home) -> int:
    """Print the first rows of a job file's calibration or tuning text, and how long rows are."""
    config = preview_config(read_yaml(args.config), args.text)
    try:
        found = preview(config, home, text=args.text, rows=args.rows, online=args.online)
    except NotDownloadedError as error:
        raise DataError(f"{error.message}; with --online its first rows are fetched from the Hub") from None
    print("\n".join(lines_of(found)))
    return 0


def lines_of(found: Preview) -> list[str]:
    """A preview as lines of text."""
    lines = [f"warning: {text}" for text in found.warnings] + [f"note: {text}" for text in found.notes]
    for row in found.rows:
        lines += ["", f"-- row {row.number}, {f'{row.length:,} {found.unit}' if row.length else 'empty'}"]
        text = "".join(piece for piece, _ in row.pieces) + (" ..." if row.cut else "")
        lines += [_printable(line) for line in text.split("\n")] if row.length else []
    lines += ["", summary(found), *_bars(found.lengths, found.unit)]
    return lines


def _bars(lengths: Sequence[int], unit: str) -> list[str]:
    bins = bins_of(lengths, BINS)
    top = max((n for *_, n in bins), default=0)
    wide = max((len(f"{a:,} to {b:,}") for a, b, _ in bins), default=0)
    return [
        f"{f'{a:,} to {b:,}':>{wide}} {unit}  {'#' * max(int(n > 0), BAR * n // top):<{BAR}} {n:,}" for a, b, n in bins
    ]


def _printable(line: str) -> str:
    """A line without characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)
