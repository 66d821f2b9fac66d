"""All that is needed to make a job's result again, in one zip file: never the weights.

The file is the same, byte for byte, each time it is made of the same job by the same version of Quantdeck.
"""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from collections.abc import Mapping
from typing import Any

from backend.errors import JobError
from backend.evaluate.combined import combined_table
from backend.jobs.results import measured, results_of
from backend.jobs.store import Job
from backend.paths import PROJECT
from backend.schema import parse_yaml

EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can name
README = """\
What job {name} was made from: everything but the weights.

{name}.yaml    the job file, as it was submitted
command.sh     runs the same job, in Quantdeck's folder or with its environment
versions.txt   the packages that made it; `pip install -r versions.txt` installs them, +cpu and +cu builds of torch
               from PyTorch's own index
facts.json     model and commit, data, seed, device, peak memory, Quantdeck's commit when this file was made
results.json   the measurements
results.md     the same as a table
SHA256SUMS     checksums of the model's files; `sha256sum -c SHA256SUMS` above the folders of the models
"""


def bundle(job: Job) -> bytes:
    """A zip file with the job's file, the command, packages, seed, model, data, results and checksums.

    Raises:
        JobError: If the job has not ended.
        ConfigErrors: If its file cannot be read any more.
    """
    if job.is_active:
        raise JobError(f"job {job.job_id} is {job.state}; a bundle is made of a job that has ended")
    entries = results_of(job.result)
    manifests = {str(e["name"] or "model"): e["manifest"] for e in entries if isinstance(e.get("manifest"), dict)}
    first: Mapping[str, Any] = next(iter(manifests.values()), {})
    files = {
        "README.txt": README.format(name=job.job_id),
        f"{job.job_id}.yaml": job.config_yaml,
        "command.sh": f"python -m backend run {job.job_id}.yaml\n",
        "versions.txt": pins(first.get("versions") or (job.result or {}).get("versions") or {}),
        "facts.json": _json(_facts(job, first)),
        "results.json": _json([{key: e.get(key) for key in ("name", "label", "rows")} for e in measured(job.result)]),
        "results.md": _table(job),
        "SHA256SUMS": "".join(checksums(name, manifest) for name, manifest in manifests.items()),
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(f"{job.job_id}/{name}", EARLIEST)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, text)
    return stream.getvalue()


def pins(versions: Mapping[str, Any]) -> str:
    """Versions as a pip requirements file; as comments Python's, and which packages were not installed."""
    lines = [f"# python {versions['python']}"] if versions.get("python") else []
    for name, version in sorted((name, v) for name, v in versions.items() if v and name != "python"):
        lines.append(f"# {name} was not installed" if version == "absent" else f"{name}=={version}")
    return "".join(f"{line}\n" for line in lines)


def checksums(name: str, manifest: Mapping[str, Any]) -> str:
    """The files of one model as `sha256sum` writes them, below a folder of that name."""
    return "".join(f"{facts['sha256']}  {name}/{file}\n" for file, facts in (manifest.get("files") or {}).items())


def _facts(job: Job, manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = parse_yaml(job.config_yaml).config
    calibration = config.CALIBRATION
    data = {key: getattr(config, key) for key in ("DATASET_NAME", "DATASET_SUBSET", "DATA_PATH", "SPLIT", "TEXT_COLUMN")
            if getattr(config, key, None) is not None}  # fmt: skip
    return {
        "job_id": job.job_id,
        "state": job.state,
        "model": job.model,
        "model_commit": manifest.get("model_commit"),
        "algorithm": job.algorithm,
        "seed": calibration.SEED,
        "data": {**data, "calibration": calibration.model_dump(mode="json"), "taken": manifest.get("calibration")},
        "device": manifest.get("device") or job.device,
        "peak_memory_bytes": (job.result or {}).get("peak_rss_bytes"),
        "quantdeck_commit_now": commit(),
    }


def commit() -> str | None:
    """The commit of Quantdeck's folder, if it is a checkout of git."""
    if not (PROJECT / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(PROJECT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _table(job: Job) -> str:
    entries = measured(job.result)
    if not entries:
        return "Nothing was measured.\n"
    return (combined_table(entries) if len(entries) > 1 else str(entries[0].get("table") or "")).rstrip() + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
