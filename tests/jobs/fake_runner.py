"""The real runner with the programs of `tests.jobs.fake`: `python -m tests.jobs.fake_runner HOME UID ATTEMPT`.

HOME/fake.json says which configurations there are.
"""

import json
import sys
from pathlib import Path

from backend.engines.configurations import Configuration
from backend.engines.registry import Engine
from backend.jobs import measure, one_program, runner, stages
from tests.jobs.fake_scheduler import use_fakes

MODULE = "tests.jobs.fake"
ENGINE = Engine(name="fake", algorithms=(), module=MODULE, requires=(), environment=None, about="")


def configurations(config, device):
    found = json.loads((Path(sys.argv[1]) / "fake.json").read_text())["configurations"]
    return [Configuration(c["name"], c["name"].upper(), "fake", {**c, "label": c["name"].upper()}) for c in found]


if __name__ == "__main__":
    use_fakes()
    stages.PREPARE = measure.WORKER = measure.FIDELITY = measure.SPEED = MODULE
    one_program.engine_for = lambda config: ENGINE
    runner.configurations = configurations
    runner.main()
