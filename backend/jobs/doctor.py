"""The doctor: everything that must be true of a home, looked at from outside.

It reads `jobs.db`, `/proc` and the folders itself instead of asking the code that keeps them in order, so a mistake
there is found here. Jobs may run meanwhile: what looks wrong about something alive (a runner, a lease, a process) is
only told if it is still wrong after the time in which the scheduler would have put it right.
"""

from __future__ import annotations

from backend.errors import QuantdeckError
from backend.jobs import doctor_disk
from backend.jobs.doctor_alive import examine_alive, mend_alive
from backend.jobs.doctor_findings import Finding, Problem, finding
from backend.jobs.doctor_store import examine_history, examine_states, examine_store, read_tables
from backend.paths import Home
from backend.settings import FILE_NAME, Settings

GRACE_S = 25.0
"""How long something alive may look wrong: a starting job has 20 s to show its runner."""


def examine(home: Home, *, deep: bool = False, mend: bool = False, grace_s: float = GRACE_S) -> list[Finding]:
    """Check everything.

    Args:
        home: The home.
        deep: Also read every published file and compare its sha256, which takes as long as reading them does.
        mend: Put right what is safe to: stale leases, leftover temporary folders, permissions, a missing scheduler.
        grace_s: How long to wait for the scheduler to put right what is alive.
    """
    findings = [_settings(home)]
    if mend and home.jobs_db.exists():
        findings += mend_alive(home)
    found, snapshot = examine_store(home)
    findings.append(found)
    if snapshot is not None:
        findings += [examine_states(snapshot), examine_history(snapshot)]
        findings += examine_alive(home, grace_s)
        latest = read_tables(home, results=True)  # what the scheduler has changed meanwhile is final now
        # A deleted job may lack anything, and of one that was deleted for good nothing is left but its history.
        jobs = [job for job in latest.jobs.values() if job["deleted_at"] is None]
        gone = [job for job in latest.jobs.values() if job["deleted_at"] is not None]
        findings.append(finding("results", *doctor_disk.results(home, jobs, deep=deep)))
        findings.append(finding("half-published", *doctor_disk.half_published(home, jobs, gone)))
        findings.append(finding("run folders", *doctor_disk.run_folders(home, jobs, gone, mend=mend)))
        findings.append(finding("deletions", *doctor_disk.deletions(home, gone, mend=mend)))
    findings.append(finding("disk", *doctor_disk.disk(home)))
    findings.append(finding("permissions", *doctor_disk.permissions(home, mend=mend)))
    findings.append(finding("accounts", *doctor_disk.readable_accounts(home)))
    findings.append(finding("environments", *doctor_disk.engine_environments()))
    return findings


def _settings(home: Home) -> Finding:
    try:
        Settings.load(home)
    except QuantdeckError as error:
        return Finding("settings", "", (Problem(error.message, f"edit {home.root / FILE_NAME}"),))
    return Finding("settings", FILE_NAME if (home.root / FILE_NAME).exists() else "defaults")
