"""Memory and processor time of a program and everything below it, read from /proc: cheap enough for every second."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spent:
    """One process at one moment: the bytes it has in memory, and the processor seconds it has used so far."""

    resident_bytes: int
    cpu_s: float


def tree(pid: int) -> dict[tuple[int, int], Spent]:
    """A process and its living descendants.

    Returns:
        By pid and start (clock ticks since the machine was started), so that no process is taken for another one.
    """
    found: dict[tuple[int, int], Spent] = {}
    pids = [pid]
    for one in pids:  # grows as it goes on
        if (facts := _facts(one)) is not None:
            found[one, facts[0]] = facts[1]
            pids += _children(one)
    return found


def _facts(pid: int) -> tuple[int, Spent] | None:
    """Start and costs of a process; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # from field 3 on; the name before may hold anything
        with open(f"/proc/{pid}/statm", "rb") as file:
            resident = int(file.read().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19]), Spent(resident, (int(fields[11]) + int(fields[12])) / TICKS_PER_S)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except FileNotFoundError:  # the process or a thread has ended, or this kernel does not list children
        return _listed_children(pid)
    except OSError:
        return []
    return found


def _listed_children(pid: int) -> list[int]:
    """The same from the list of all processes of the machine, which takes longer."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []
