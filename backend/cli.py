"""The command line: `python -m backend COMMAND`.

Exit codes: 0 success, 1 a failed job, a problem found by the doctor or another error, 2 a mistake in a config or in
the command itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from backend import commands_jobs, commands_machine, commands_schema, commands_served, commands_text, commands_tidy
from backend.engines import environments
from backend.errors import ConfigError, QuantdeckError
from backend.jobs import export
from backend.jobs.states import ACTIVE, FINAL
from backend.paths import HOME_VARIABLE, Home

Handler = Callable[[argparse.Namespace, Home], int]
LISTED = 1000


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

    _add_jobs(add)
    commands_tidy.add_commands(add)
    _add_machine(add)
    _add_served(add)
    return parser


def _add_jobs(add: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    run = add("run", commands_jobs.run, "run a job in the foreground")
    run.add_argument("config", help="the job's YAML file")
    run.add_argument("--json", action="store_true", help="print the result as one JSON object")
    run.add_argument("--unique", action="store_true", help="if the JOB_ID is taken, number it: NAME-2, NAME-3, ...")
    validate = add("validate", commands_jobs.validate, "check a YAML file without starting anything")
    validate.add_argument("config", help="the job's YAML file")
    validate.add_argument("--online", action="store_true", help="ask the Hub what its model is, without downloading it")
    schema = add("schema", commands_schema.schema, "the keys of a job file: all of them, or the help of one")
    schema.add_argument("key", nargs="?", metavar="KEY", help="e.g. W_BIT, AutoAWQ.W_BIT or llm.AutoAWQ.W_BIT")
    written = schema.add_mutually_exclusive_group()
    for name, what in (("markdown", "the whole reference, as in docs/yaml.md"), ("json", "every fact of every key")):
        written.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=what)
    preview = add(
        "preview", commands_text.preview_text, "show the calibration text of a YAML file as the model sees it"
    )
    preview.add_argument("config", help="the job's YAML file")
    preview.add_argument(
        "--text", choices=("calibration", "tuning"), default="calibration",
        help="which text: calibration (default), or what AQLM tunes the whole model on",
    )  # fmt: skip
    preview.add_argument("--rows", type=_count, default=5, metavar="N", help="rows to print, at most 50 (default: 5)")
    preview.add_argument("--online", action="store_true", help="fetch the first rows of a dataset of the Hub")
    jobs = add("jobs", commands_jobs.jobs, "list jobs, newest first")
    jobs.add_argument(
        "--state", action="append", choices=(*ACTIVE, *FINAL), help="only jobs in this state; may be repeated"
    )
    jobs.add_argument("--limit", type=_count, default=LISTED, metavar="N", help=f"at most N (default: {LISTED})")
    jobs.add_argument("--search", default="", metavar="TEXT", help="only jobs with this text, or a tag: tag:sweep")
    jobs.add_argument("--deleted", action="store_true", help="the deleted jobs instead")
    jobs.add_argument("--json", action="store_true")
    compare = add("compare", commands_jobs.compare, "baseline against the quantized models of some jobs")
    compare.add_argument("job_id", nargs="*")
    compare.add_argument("--published", action="store_true", help="instead, what the guides publish of other models")
    form = compare.add_mutually_exclusive_group()
    for name in ("json", "markdown", "csv"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    compare.set_defaults(form="markdown")
    exporting = add("export", commands_jobs.export_job, "print a job's settings for another program")
    exporting.add_argument("job_id")
    exporting.add_argument("--to", choices=(*export.TARGETS, "bundle"), default="yaml")
    exporting.add_argument("-o", dest="output", metavar="FILE.zip", help="new file for --to bundle")
    cancelling = add("cancel", commands_jobs.cancel, "cancel a job")
    cancelling.add_argument("job_id")
    resuming = add("resume", commands_jobs.resume, "go on with a failed or cancelled job, in the foreground")
    resuming.add_argument("job_id")
    resuming.add_argument(
        "--redo", choices=["measure"], help="measure again, with the models as they are; also of a succeeded job"
    )
    resuming.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_machine(add: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    # A word after the command may carry --home too; without a default, it keeps one given before that word.
    below = argparse.ArgumentParser(add_help=False)
    below.add_argument("--home", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    doctor = add("doctor", commands_machine.examine, "check everything that must be true; exit code 1 if it is not")
    doctor.add_argument("--deep", action="store_true", help="also compare every published file with its sha256")
    doctor.add_argument("--mend", action="store_true", help="put right what is safe to, e.g. stale leases")
    doctor.add_argument("--json", action="store_true")
    backup = add("backup", commands_machine.backup, "copy jobs.db to a new file, also while jobs run")
    backup.add_argument("file")
    accounts = add("accounts", commands_machine.accounts_list, "who may log in to the page")
    actions = accounts.add_subparsers(dest="action")
    listing = actions.add_parser("list", help="print the names", parents=[below])
    listing.set_defaults(handler=commands_machine.accounts_list)
    adding = actions.add_parser("add", help="add an account; asks for its password", parents=[below])
    adding.add_argument("name")
    adding.add_argument("--password-stdin", action="store_true", help="take the password from standard input")
    adding.set_defaults(handler=commands_machine.accounts_add)
    removing = actions.add_parser("remove", help="remove an account", parents=[below])
    removing.add_argument("name")
    removing.set_defaults(handler=commands_machine.accounts_remove)
    token = add("token", commands_machine.token_status, "the token for gated and private models on the Hub")
    tokens = token.add_subparsers(dest="action")
    telling = tokens.add_parser("status", help="whether there is one", parents=[below])
    telling.set_defaults(handler=commands_machine.token_status)
    storing = tokens.add_parser("set", help="store one; asks for it", parents=[below])
    storing.add_argument("--token-stdin", action="store_true", help="take it from standard input")
    storing.set_defaults(handler=commands_machine.token_set)
    forgetting = tokens.add_parser("clear", help="remove it", parents=[below])
    forgetting.set_defaults(handler=commands_machine.token_clear)
    engines = add("engines", commands_machine.engines, "list the engines and whether they can run here, or install one")
    installing = engines.add_subparsers(dest="action").add_parser(
        "install", help="build the environment of an engine that needs its own", parents=[below]
    )
    installing.add_argument("name", choices=environments.names())
    installing.set_defaults(handler=commands_machine.install_engine)
    evaluate = add("evaluate", commands_machine.evaluate, "measure one model folder")
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


def _add_served(add: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    served = add("served", commands_served.served, "measure a model behind an OpenAI-compatible server")
    served.add_argument("url", metavar="URL", help="base URL, one of [served] urls in quantdeck.toml")
    served.add_argument("--model", default="", help="its id there (default: the only one)")
    for name, default, help in (
        ("requests", 7, "repetitions that count"),
        ("warmup", 2, "repetitions that are thrown away"),
        ("concurrency", 8, "requests at once, after one alone; 1: only alone"),
        ("prompt-tokens", 128, "about so many tokens per prompt"),
        ("new-tokens", 64, "tokens to make per request"),
    ):
        served.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})")
    served.add_argument("--json", action="store_true")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text!r}; it must be a whole number from 1")
    return int(text)


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
