"""The command line: `python -m backend COMMAND`.

Exit codes: 0 success, 1 a failed job or another error, 2 a mistake in a config or in the command itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.engines import environments
from backend.engines.registry import ENGINES
from backend.errors import ConfigError, QuantdeckError
from backend.evaluate.combined import combined_table
from backend.evaluate.compare import RENDERERS, comparison_rows
from backend.jobs import control, export
from backend.jobs.follow import follow
from backend.jobs.preflight import check_job
from backend.jobs.results import results_of
from backend.jobs.store import Job, JobStore
from backend.paths import HOME_VARIABLE, Home
from backend.schema import read_yaml

Handler = Callable[[argparse.Namespace, Home], int]


def _print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _run(args: argparse.Namespace, home: Home) -> int:
    document = read_yaml(args.config)
    if args.unique:
        document = control.with_free_name(home, document)
    for warning in document.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    job = control.submit(home, document.dump())
    print(f"job {job.job_id} ({job.uid}) on {job.device}, log: {control.log_path(home, job.uid)}", file=sys.stderr)
    return _outcome(follow(home, job.uid), as_json=args.json)


def _resume(args: argparse.Namespace, home: Home) -> int:
    control.reconcile(home)
    before = JobStore(home).get(args.job_id)
    events = control.events_file(home, before.uid)
    cursor = events.stat().st_size if events.exists() else 0
    job = control.resume(home, before.uid)
    print(f"job {job.job_id} ({job.uid}) goes on, attempt {job.attempt}", file=sys.stderr)
    return _outcome(follow(home, job.uid, cursor), as_json=args.json)


def _outcome(job: Job, *, as_json: bool) -> int:
    """Print how a job ended; returns the exit code."""
    if job.reason:
        print(f"{job.state}: {job.reason}", file=sys.stderr)
    entries = results_of(job.result)
    if as_json:
        _print_json(result_object(job))
    elif job.result and "table" in job.result:
        print(combined_table(entries) if len(entries) > 1 else job.result["table"])
        print()
        for entry in entries:
            which = f" {entry['name']}" if len(entries) > 1 else ""
            print(f"Quantized model{which}: {entry['artefact']}")
    return 0 if job.state == "succeeded" else 1


def result_object(job: Job) -> dict[str, Any]:
    """A job's outcome as `run --json` prints it."""
    result = job.result or {}
    return {
        "job_id": job.job_id,
        "state": job.state,
        "reason": job.reason,
        "artefact": job.artefact,
        "rows": result.get("rows", []),
        "results": results_of(result),
        "timings": result.get("timings", {}),
        "peak_rss_bytes": result.get("peak_rss_bytes"),
        "device": result.get("device"),
        "versions": result.get("versions", {}),
    }


def _validate(args: argparse.Namespace, home: Home) -> int:
    document = read_yaml(args.config)
    config = document.config
    for warning in document.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    checked = check_job(config, home)
    for note in checked.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.config}: valid ({config.ALGORITHM} of {config.MODEL} on {checked.device})")
    for configuration in checked.configurations:
        size = checked.predicted.get(configuration.name)
        print(f"  {configuration.label}" + (f": {size / 1e6:.1f} MB of weights" if size else ""))
    return 0


def _jobs(args: argparse.Namespace, home: Home) -> int:
    control.reconcile(home)
    jobs = JobStore(home).jobs()
    if args.json:
        _print_json([{k: v for k, v in vars(job).items() if k != "config_yaml"} for job in jobs])
        return 0
    if not jobs:
        print("no jobs yet; `python -m backend run examples/autoawq_demo.yaml` makes one")
    for job in jobs:
        print(f"{job.created_at[:19]}  {job.state:<10} {job.algorithm:<10} {job.job_id:<24} {job.model}")
    return 0


def _compare(args: argparse.Namespace, home: Home) -> int:
    store = JobStore(home)
    rows = comparison_rows([store.get(job_id) for job_id in args.job_id])
    print(RENDERERS[args.form](rows))
    return 0


def _export(args: argparse.Namespace, home: Home) -> int:
    print(export.export_text(JobStore(home).get(args.job_id).config_yaml, args.to), end="")
    return 0


def _cancel(args: argparse.Namespace, home: Home) -> int:
    job = control.cancel(home, args.job_id)
    print(f"job {job.job_id}: {job.state}")
    return 0


def _engines(args: argparse.Namespace, home: Home) -> int:
    for engine in ENGINES:
        reason = engine.unavailable_because()
        state = f"disabled: {reason}" if reason else "enabled"
        print(f"{engine.name:<14} {', '.join(engine.algorithms):<32} {state}\n{'':<14} {engine.about}")
    return 0


def _install_engine(args: argparse.Namespace, home: Home) -> int:
    python = environments.install(args.name, on_line=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"engine {args.name} is ready: {python}")
    return 0


def _evaluate(args: argparse.Namespace, home: Home) -> int:
    from backend.evaluate.command import evaluate_folder

    with tempfile.TemporaryDirectory() as work:
        result = evaluate_folder(
            args.model_dir, home, Path(work), protocols=args.protocol, dataset=args.dataset, subset=args.subset,
            split=args.split, tasks=args.tasks,
        )  # fmt: skip
    if args.json:
        _print_json(result)
        return 0
    for metric in result["metrics"]:
        spread = f" +/- {metric['stderr']:.4g}" if metric["stderr"] is not None else ""
        print(f"{metric['name']}: {metric['value']:.4f}{spread} {metric['unit']}  [{metric['protocol']['summary']}]")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", help=f"folder of jobs.db and user_data (default: ${HOME_VARIABLE} or the project)")
    parser = argparse.ArgumentParser(
        prog="python -m backend", description="Quantize language models, measure what it cost."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, parents=[common])
        command.set_defaults(handler=handler)
        return command

    run = add("run", _run, "run a job in the foreground")
    run.add_argument("config", help="the job's YAML file")
    run.add_argument("--json", action="store_true", help="print the result as one JSON object")
    run.add_argument("--unique", action="store_true", help="if the JOB_ID is taken, number it: NAME-2, NAME-3, ...")
    validate = add("validate", _validate, "check a YAML file without starting anything")
    validate.add_argument("config", help="the job's YAML file")
    jobs = add("jobs", _jobs, "list all jobs")
    jobs.add_argument("--json", action="store_true")
    compare = add("compare", _compare, "baseline against the quantized models of some jobs")
    compare.add_argument("job_id", nargs="+")
    form = compare.add_mutually_exclusive_group()
    for name in ("json", "markdown", "csv"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    compare.set_defaults(form="markdown")
    exporting = add("export", _export, "print a job's settings for another program")
    exporting.add_argument("job_id")
    exporting.add_argument("--to", choices=export.TARGETS, default="yaml")
    cancelling = add("cancel", _cancel, "cancel a job")
    cancelling.add_argument("job_id")
    resuming = add("resume", _resume, "go on with a failed or cancelled job where it stopped, in the foreground")
    resuming.add_argument("job_id")
    resuming.add_argument("--json", action="store_true", help="print the result as one JSON object")
    engines = add("engines", _engines, "list the engines and whether they can run here, or install one")
    installing = engines.add_subparsers(dest="action").add_parser(
        "install", help="build the environment of an engine that needs its own"
    )
    installing.add_argument("name", choices=environments.names())
    installing.set_defaults(handler=_install_engine)
    evaluate = add("evaluate", _evaluate, "measure one model folder")
    evaluate.add_argument("model_dir", help="folder of a 16-bit or quantized model, or quantdeck/demo")
    evaluate.add_argument(
        "--protocol", action="append", choices=["gptq_wikitext", "full_window"], default=None,
        help="perplexity protocol; may be given twice (default: gptq_wikitext)",
    )  # fmt: skip
    evaluate.add_argument(
        "--dataset", default="quantdeck/demo", help="text for perplexity (default: the built-in text)"
    )
    evaluate.add_argument("--subset", default=None)
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--tasks", default="", help="lm-eval tasks as name:shots[:limit], separated by commas")
    evaluate.add_argument("--json", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors meant for users become one message and an exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.handler(args, Home.at(args.home))
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except QuantdeckError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
