"""What the doctor tells: findings, their problems, and how to mend them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 20  # problems of one check in the report
MEND_COMMAND = "python -m backend doctor --mend"


@dataclass(frozen=True)
class Problem:
    """Something that should not be.

    Attributes:
        what: What was found, with names.
        mend: How to put it right.
        mended: Whether `examine(mend=True)` has done so.
    """

    what: str
    mend: str
    mended: bool = False


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Name of the check.
        detail: What was looked at, when all is well.
        problems: What is wrong; empty if nothing.
    """

    check: str
    detail: str
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(problem.mended for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def report(findings: list[Finding]) -> str:
    """One line per check, and two per problem."""
    lines = []
    for finding in findings:
        told = f" ({finding.detail})" if finding.detail else ""
        if not finding.problems:
            lines.append(f"ok       {finding.check}{told}")
        for problem in finding.problems[:SHOWN]:
            if problem.mended:
                lines.append(f"mended   {finding.check}: {problem.what}")
            else:
                lines += [f"PROBLEM  {finding.check}: {problem.what}", f"         to mend: {problem.mend}"]
        if len(finding.problems) > SHOWN:
            lines.append(f"         and {len(finding.problems) - SHOWN} more of {finding.check}; --json tells all")
    return "\n".join(lines)


def finding(check: str, detail: str, problems: list[tuple[str, str, bool]]) -> Finding:
    """A finding of problems that are plain rows of what, how to mend it, and whether that was done."""
    return Finding(check, detail, tuple(Problem(*problem) for problem in problems))
