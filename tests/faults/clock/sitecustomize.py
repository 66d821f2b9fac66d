"""Loaded by every Python that has this folder in PYTHONPATH: the time of day is off by what a file says, in seconds.

The file may change while programs run, as a clock may be set. The monotonic clock goes on, as it does then.
(libfaketime shifts the absolute times of `clock_nanosleep` as well: sleeping fails under it.)
"""

import datetime as module
import os
import time

FILE = os.environ.get("QUANTDECK_TEST_CLOCK", "")
real_time, real_ns, RealDatetime = time.time, time.time_ns, module.datetime


def shift() -> int:
    with open(FILE) as file:
        return int(file.read() or 0)


class ShiftedDatetime(RealDatetime):
    @classmethod
    def now(cls, tz=None):
        return RealDatetime.now(tz) + module.timedelta(seconds=shift())


if FILE:
    time.time = lambda: real_time() + shift()
    time.time_ns = lambda: real_ns() + shift() * 10**9
    module.datetime = ShiftedDatetime
