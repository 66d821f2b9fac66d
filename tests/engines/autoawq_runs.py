"""The stage program for several requests in one process: `python -m tests.engines.autoawq_runs FOLDER...`.

Run by the interpreter of environments/autoawq, whose imports take longer than a tiny model. Reads
FOLDER/request.json; writes FOLDER/result.json and FOLDER/events.jsonl.
"""

import sys
from pathlib import Path

from backend.engines.autoawq_package import quantize
from backend.event_stream import EventWriter
from backend.files import read_request, write_json

for folder in map(Path, sys.argv[1:]):
    with open(folder / "events.jsonl", "w", encoding="utf-8") as events:
        write_json(folder / "result.json", quantize(read_request(folder / "request.json"), EventWriter(events)))
    print(folder)
