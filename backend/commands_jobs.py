"""The commands that make, follow, list and compare jobs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from backend.errors import ConfigError, JobError
from backend.evaluate import published
from backend.evaluate.combined import combined_table
from backend.evaluate.compare import RENDERERS, comparison_rows
from backend.jobs import control, export, launch
from backend.jobs.bundle import bundle
from backend.jobs.follow import follow
from backend.jobs.memory_warnings import told_range
from backend.jobs.preflight import check_job
from backend.jobs.results import result_object, results_of
from backend.jobs.room import amount
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.schema import read_yaml
from backend.schema.report import told_with_lines, warnings_with_lines
from backend.sources import hub
from backend.sources.models import resolve_model


def print_json(value: Any) -> None:
    """One JSON value on one line of standard output."""
    print(json.dumps(value), flush=True)


def run(args: argparse.Namespace, home: Home) -> int:
    """Submit a job file and follow the job to its end."""
    document = read_yaml(args.config)
    if args.unique:
        document = control.with_free_name(home, document)
    for warning in warnings_with_lines(document):
        print(f"warning: {warning}", file=sys.stderr)
    job = told_with_lines(document, lambda: control.submit(home, document.dump()))
    print(f"job {job.job_id} ({job.uid}) on {job.device}, log: {control.log_path(home, job.uid)}", file=sys.stderr)
    return _outcome(follow(home, job.uid), as_json=args.json)


def resume(args: argparse.Namespace, home: Home) -> int:
    """Queue a job again and follow it to its end."""
    launch.watch(home)
    before = JobStore(home).get(args.job_id)
    events = control.events_file(home, before.uid)
    cursor = events.stat().st_size if events.exists() else 0
    job = control.resume(home, before.uid, redo=args.redo or "")
    print(f"job {job.job_id} ({job.uid}) goes on, attempt {job.attempt}", file=sys.stderr)
    return _outcome(follow(home, job.uid, cursor), as_json=args.json)


def _outcome(job: Job, *, as_json: bool) -> int:
    """Print how a job ended; returns the exit code."""
    if job.reason:
        print(f"{job.state}: {job.reason}", file=sys.stderr)
    entries = results_of(job.result)
    if as_json:
        print_json(result_object(job))
    elif job.result and "table" in job.result:
        print(combined_table(entries) if len(entries) > 1 else job.result["table"])
        print()
        for entry in entries:
            which = f" {entry['name']}" if len(entries) > 1 else ""
            print(f"Quantized model{which}: {entry['artefact']}")
        if job.state == "succeeded" and job.reason:
            print(f"\n{job.reason}")
    return 0 if job.state == "succeeded" else 1


def validate(args: argparse.Namespace, home: Home) -> int:
    """Check a job file without starting anything."""
    document = read_yaml(args.config)
    for warning in warnings_with_lines(document):
        print(f"warning: {warning}", file=sys.stderr)
    config = told_with_lines(document, lambda: document.config)
    if args.online and (source := resolve_model(config, home)).kind == "hub":
        hub.inspect(home, source.id, config.REVISION)
    checked = told_with_lines(document, lambda: check_job(config, home))
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for note in checked.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.config}: valid ({config.ALGORITHM} of {config.MODEL} on {checked.device})")
    for configuration in checked.configurations:
        size, bits = checked.predicted.get(configuration.name), checked.bits.get(configuration.name)
        told = [f"{size / 1e6:.1f} MB of weights" if size else "", f"{bits:.2f} bits per weight" if bits else ""]
        print(f"  {configuration.label}" + (f": {', '.join(filter(None, told))}" if any(told) else ""))
    if checked.known.basis:
        print(f"  known {checked.known.basis}")
    for need in checked.memory:
        print(f"  {need.where} to {need.what}: {told_range(need)}, {need.basis}")
    if checked.room is not None:
        download = f"{amount(checked.room.download)} of download and " if checked.room.download else ""
        print(f"  disk: {download}up to {amount(checked.room.results)} while it runs")
    return 0


def jobs(args: argparse.Namespace, home: Home) -> int:
    """List jobs, newest first."""
    launch.watch(home)
    states = tuple(dict.fromkeys(args.state or ()))
    found = JobStore(home).jobs(states=states, limit=args.limit, search=args.search, deleted=args.deleted)
    if args.json:
        print_json([{k: v for k, v in vars(job).items() if k != "config_yaml"} for job in found])
        return 0
    if not found:
        which = " or ".join(["deleted"] if args.deleted else states)
        if args.search:
            print(f"no {which} job with {args.search!r}".replace("  ", " "))
            return 0
        none = f"no {which} jobs" if which else "no jobs yet"
        print(f"{none}; `python -m backend run examples/autoawq_demo.yaml` makes one")
    for job in found:
        priority = f"{job.priority:>+4d}" if job.priority else "    "
        tags = f"  [{' '.join(job.tags)}]" if job.tags else ""
        print(
            f"{job.created_at[:19]}  {job.state:<10} {priority} {job.algorithm:<13} {job.job_id:<24} {job.model}{tags}"
        )
        if job.is_active and job.reason:
            print(f"{'':<21}{job.reason}")
    return 0


def compare(args: argparse.Namespace, home: Home) -> int:
    """Baseline against the quantized models of some jobs; or published figures, which never stand beside them."""
    if args.published == bool(args.job_id):
        found = "both were given" if args.published else "neither was given"
        raise ConfigError(f"compare takes the names of jobs or --published; {found}", key="JOB_ID")
    if args.published:
        print(published.RENDERERS[args.form]())
        return 0
    store = JobStore(home)
    rows = comparison_rows([store.get(job_id) for job_id in args.job_id])
    print(RENDERERS[args.form](rows))
    return 0


def export_job(args: argparse.Namespace, home: Home) -> int:
    """A job's settings for another program; as a bundle, a zip file with all that makes its result again."""
    if (args.to == "bundle") != bool(args.output):
        raise ConfigError("`--to bundle` and `-o FILE.zip` go together", key="--to", value=args.to)
    if args.to == "bundle":
        content = bundle(JobStore(home).get(args.job_id))
        try:
            with open(args.output, "xb") as stream:
                stream.write(content)
        except OSError as error:
            raise JobError(f"{args.output} cannot be written: {error.strerror}") from error
        print(args.output)
        return 0
    print(export.export_text(JobStore(home).get(args.job_id).config_yaml, args.to), end="")
    return 0


def cancel(args: argparse.Namespace, home: Home) -> int:
    """Ask for the end of a job."""
    job = control.cancel(home, args.job_id)
    print(f"job {job.job_id}: {job.state}")
    return 0
