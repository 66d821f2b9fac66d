"""The command that measures a model behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import sys

from backend.commands_jobs import print_json
from backend.evaluate.metrics import Metric
from backend.paths import Home
from backend.served.address import allowed_url
from backend.served.client import served_name
from backend.served.measure import ServedSpeed, measure_served
from backend.settings import Settings


def served(args: argparse.Namespace, home: Home) -> int:
    """Time to the first token and tokens/s of a served model."""
    url = allowed_url(args.url, Settings.load(home).served.urls)
    settings = ServedSpeed(
        prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, warmup=args.warmup, repetitions=args.requests,
        concurrency=args.concurrency,
    )  # fmt: skip
    settings.check()
    model = served_name(url, args.model)
    metrics = measure_served(url, model, settings, on_progress=_progress)
    if args.json:
        print_json({"url": url, "model": model, "metrics": metrics})
    else:
        print(table(metrics))
    return 0


def table(metrics: list[Metric]) -> str:
    """The numbers of one server for people, and below them how they were found."""
    lines = [f"{'':<44} {'median':>10}   interval of the median"]
    for metric in metrics:
        spread = metric["spread"]
        interval = f"{spread['low']:.4g} to {spread['high']:.4g} ({100 * spread['confidence']:.1f} %)"
        lines.append(f"{metric['name']:<44} {metric['value']:>10.4g}   {interval} {metric['unit']}")
    _, _, how = metrics[0]["protocol"]["summary"].partition("; ")
    return "\n".join([*lines, how])


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rrepetition {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
