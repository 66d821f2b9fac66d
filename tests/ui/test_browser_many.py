"""In a real browser: paging through 10,000 jobs, and a running job's page with its log, reloaded in the middle.

The jobs are rows put in by SQL. The running one belongs to this test: it holds the runner's lock and writes what a
runner writes, so the dashboard and the scheduler take it for a job at work.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from backend.jobs import control, labels
from backend.jobs.store import Job, JobStore
from backend.jobs.usage import USAGE_FILE, Sample, UsageFile
from backend.paths import Home
from backend.process import hold_lock
from backend.schema import parse_yaml
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS, dashboard, watched_page
from tests.ui.many import fill
from ui.draft import TEMPLATE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = IN_BROWSER
EVIL = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"


class FakeRunner(threading.Thread):
    """A job at work: it holds its lock, beats, and writes numbered lines to the log until it is told to end."""

    def __init__(self, home: Home, name: str) -> None:
        super().__init__(daemon=True)
        self.home, self.store = home, JobStore(home)
        text = TEMPLATE.replace("my-first-job", name)
        self.job: Job = self.store.create(text, parse_yaml(text).config, device="cpu")
        self.ending = threading.Event()
        self.burst = threading.Event()
        self.written = 0

    def save(self, *names: str) -> None:
        """Have saved models of these names."""
        entries = []
        for name in names:
            folder = self.home.root / "models" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("{}")
            manifest = {"files": {"config.json": {"sha256": "ab" * 32}}}
            entries.append({"name": name, "label": name, "artefact": str(folder), "rows": [], "manifest": manifest})
        self.store.update(self.job.uid, 1, result={"results": entries})

    def run(self) -> None:
        log = control.log_path(self.home, self.job.uid)
        log.parent.mkdir(parents=True)
        with hold_lock(self.home.run_dir(self.job.uid) / "runner.lock") as held, open(log, "a") as file:
            assert held
            self.store.grant(self.job.uid, 1, ["cpu:0"])
            self.store.move(self.job.uid, "running", actor="runner", attempt=1)
            usage = UsageFile(self.home.run_dir(self.job.uid) / USAGE_FILE)
            while not self.ending.wait(0.2):
                usage.add(Sample(1, self.written / 5, 0.2, "quantize", "", 10**9, 1.5))
                for _ in range(20_000 if self.burst.is_set() else 1):
                    file.write(f"line {self.written} of the log {EVIL}\n")
                    self.written += 1
                self.burst.clear()
                file.flush()
                self.store.beat(self.job.uid, 1)
                progress = {"stage": "quantize", "step": 3, "total": 10, "message": f"model.layers.3 {EVIL}"}
                self.store.update(self.job.uid, 1, progress=progress)
            self.store.move(self.job.uid, "succeeded", actor="runner", attempt=1)


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Iterator[FakeRunner]:
    home = Home(tmp_path_factory.mktemp("many") / "home")
    fill(home, 10_000)
    runner = FakeRunner(home, "at-work")
    runner.start()
    yield runner
    runner.ending.set()
    runner.join(30)


@pytest.fixture(scope="module")
def address(runner) -> Iterator[str]:
    """A dashboard on the home with all those jobs."""
    with dashboard(runner.home) as url:
        yield url


@pytest.fixture
def watched(address):
    """A page, and what it complained of or asked of other hosts."""
    with watched_page(address) as found:
        yield found


def sees(page: Any, where: str, words: str) -> None:
    """`where` holds the words in the end; what it held meanwhile is not printed, it is long."""
    expect(page.locator(where).get_by_text(words).first).to_be_visible(timeout=STEP_MS)


def shown_lines(page: Any) -> list[int]:
    """Numbers of the log's lines in the page."""
    return [int(n) for n in re.findall(r"^line (\d+)", page.locator("#log [data-lines]").text_content(), re.M)]


def wait_until(page: Any, expression: str) -> None:
    page.wait_for_function(expression, timeout=STEP_MS)


def test_paging_through_ten_thousand_jobs(address, watched):
    page, faults = watched
    page.goto(address)
    sees(page, "#jobs", "1 to 50 of 10,001 jobs, page 1 of 201")
    expect(page.locator("#jobs tbody tr")).to_have_count(50)
    sees(page, "#jobs", "Quantize layer by layer")  # the running one is at the top, with its progress

    page.get_by_role("button", name="Older").click()
    sees(page, "#jobs", "51 to 100 of 10,001 jobs")
    page.get_by_role("button", name="Last").click()
    sees(page, "#jobs", "page 201 of 201")
    sees(page, "#jobs", "job-00000")
    assert page.url.endswith("/?p=201")
    page.reload()
    sees(page, "#jobs", "page 201 of 201")

    # States and search narrow it down, and the address keeps them.
    page.locator("#filters").get_by_role("button", name="Failed").click()
    sees(page, "#jobs", "1 to 50 of 2,000 jobs")
    page.get_by_role("button", name="Older").click()
    sees(page, "#jobs", "51 to 100 of 2,000 jobs")
    page.locator("#search :is(input, textarea)").fill("model-3")
    sees(page, "#jobs", "1 to 50 of 600 jobs")
    sees(page, "#filters", "2,200")
    page.reload()
    sees(page, "#jobs", "1 to 50 of 600 jobs")
    expect(page.locator("#search :is(input, textarea)")).to_have_value("model-3")
    page.locator("#search :is(input, textarea)").fill("no such job")
    page.get_by_role("button", name="Show all").click()
    sees(page, "#jobs", "1 to 50 of 10,001 jobs")
    assert page.url.rstrip("/") == address

    # A click on a button of a row reaches its job, and the answer is shown.
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.locator('#jobs tr[data-job="at-work"]').get_by_role("button", name="Cancel").click()  # not confirmed
    page.locator('#jobs tr[data-job="at-work"] a.qd-name').click()
    page.wait_for_url("**/job?id=*")
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []


def test_sorting_selecting_deleting_and_undoing_among_ten_thousand_jobs(address, runner, watched):
    page, faults = watched
    labels.change(runner.home, "job-00007", tags="sweep", note="the best so far")
    labels.change(runner.home, "job-00009", tags="sweep")
    page.goto(address)
    sees(page, "#jobs", "1 to 50 of 10,001 jobs")

    # By name; the address keeps it. What is selected outlives the list that the job at work draws anew all the time.
    page.get_by_role("button", name="Job", exact=True).click()
    expect(page.locator("#jobs th[aria-sort=ascending]")).to_have_text("Job", timeout=STEP_MS)
    expect(page.locator("#jobs tbody tr").nth(1)).to_contain_text("job-00000", timeout=STEP_MS)
    assert page.url.endswith("/?sort=name")
    box = page.get_by_role("checkbox", name="Select job-00001")
    box.focus()
    page.keyboard.press("Space")
    page.get_by_role("checkbox", name="Select job-00003").click(modifiers=["Shift"])
    expect(page.locator("[data-bulk] [data-count]")).to_have_text("3 selected")
    page.evaluate("document.querySelector('#jobs table').dataset.old = 'yes'")
    runner.store.update(runner.job.uid, 1, progress={"stage": "quantize", "step": 4, "total": 10})
    wait_until(page, "!document.querySelector('#jobs table').dataset.old")
    expect(page.locator("[data-pick]:checked")).to_have_count(3)
    expect(page.get_by_role("checkbox", name="Select job-00003")).to_be_focused()
    expect(page.locator("[data-bulk] a")).to_have_attribute(
        "href", re.compile(r"/compare\?jobs=[0-9a-f]{22},[0-9a-f]{22}$")
    )

    page.get_by_role("button", name="Delete 3").click()
    sees(page, "#said", "3 jobs were deleted")
    sees(page, "#filters", "9,998")
    expect(page.locator("[data-bulk]")).to_be_hidden()
    page.locator("#said").get_by_role("button", name="Undo").click()
    sees(page, "#said", "3 jobs were restored")
    sees(page, "#filters", "10,001")

    # A tag narrows the list; one of its jobs is deleted for good.
    page.locator("#jobs").get_by_role("button", name="sweep").first.click()
    expect(page.locator("#jobs tbody tr")).to_have_count(2, timeout=STEP_MS)
    expect(page.locator("#search :is(input, textarea)")).to_have_value("tag:sweep")
    page.get_by_role("checkbox", name="Select all jobs shown").check()
    page.keyboard.press("Escape")
    expect(page.locator("[data-pick]:checked")).to_have_count(0)
    page.get_by_role("checkbox", name="Select job-00009").check()
    page.get_by_role("button", name="Delete 1").click()
    page.locator("#filters").get_by_role("button", name="Deleted").click()
    page.get_by_role("button", name="Delete for good").click()
    sees(page, "#said", "Delete job job-00009 for good?")
    page.locator("#said").get_by_role("button", name="Delete for good").click()
    sees(page, "#said", "Job job-00009 was deleted for good")
    sees(page, "#jobs", "No job matches")
    page.get_by_role("button", name="Show all").click()
    sees(page, "#filters", "10,000")
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []


def test_a_running_job_and_its_log(address, runner, watched):
    page, faults = watched
    page.goto(f"{address}/job?id={runner.job.uid}")
    sees(page, "#job-head", "Running")
    sees(page, "#stages", "3 of 10")
    sees(page, "#history", "scheduler")
    wait_until(page, "document.querySelector('#log [data-lines]').textContent.includes('line 5 ')")

    # A reload in the middle: the same page, the log from its beginning, and it goes on.
    page.reload()
    sees(page, "#job-head", "Running")
    wait_until(page, "document.querySelector('#log [data-lines]').textContent.includes('line 20 ')")
    lines = shown_lines(page)
    assert lines == list(range(len(lines)))

    # A second tab shows the same job, and goes on by itself.
    second = page.context.browser.new_page()
    second.goto(page.url)
    sees(second, "#job-head", "Running")
    wait_until(second, f"document.querySelector('#log [data-lines]').textContent.includes('line {lines[-1] + 3} ')")

    # Its memory is drawn and told. The chart grows as it stands there: somebody may have zoomed into it.
    sees(page, "#usage-words", "Now 1.00 GB, 1.5 cores. At most 1.00 GB of memory")
    wait_until(page, "document.querySelector('#usage .js-plotly-plot')?.data")
    zoomed = "window.chart = document.querySelector('#usage .js-plotly-plot'); window.points = chart.data[0].x.length;"
    page.evaluate(f"() => {{ {zoomed} return Plotly.relayout(chart, {{'xaxis.range': [1, 3]}}) }}")
    wait_until(page, "window.chart.data[0].x.length > window.points")
    assert page.evaluate("window.chart.isConnected && window.chart.layout.xaxis.range.join()") == "1,3"

    # What somebody has opened among the saved models stays open when another one is saved, and is copied by a button.
    runner.save("w4", "w3")
    page.locator('#artefact [data-key="w4"] > summary').click()
    page.locator('#artefact [data-key="w4 vLLM"] > summary').click()
    runner.save("w4", "w3", "w2")
    expect(page.locator('#artefact [data-key="w2"]')).to_be_visible(timeout=STEP_MS)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator('#artefact [data-key="w4 vLLM"] .qd-copy').click()
    expect(page.locator('#artefact [data-key="w4 vLLM"] .qd-copy')).to_have_text("Copied", timeout=STEP_MS)
    assert page.evaluate("navigator.clipboard.readText()") == f"vllm serve {runner.home.root}/models/w4"

    # Paused, nothing moves under the reader; followed again, nothing is missing.
    page.locator("#log [data-follow]").click()
    before = shown_lines(page)
    expect(page.locator("#log [data-told]")).to_contain_text("new line", timeout=STEP_MS)
    assert shown_lines(page) == before
    page.locator("#log [data-follow]").click()
    wait_until(page, f"document.querySelector('#log [data-lines]').textContent.includes('line {before[-1] + 3} ')")
    lines = shown_lines(page)
    assert lines == list(range(len(lines)))

    # The search narrows what is here; Enter searches the whole log.
    page.locator("#log [data-find]").fill("LINE 7 of")
    expect(page.locator("#log [data-told]")).to_contain_text("1 of ", timeout=STEP_MS)
    assert shown_lines(page) == [7]
    page.locator("#log [data-find]").press("Enter")
    expect(page.locator("#log [data-told]")).to_contain_text("whole log: 1 line", timeout=STEP_MS)
    page.locator("#log [data-find]").fill("")

    # Much at once: the page keeps the end of it, in bounds, and says what it left out; the download has all.
    for _ in range(3):
        last = runner.written
        runner.burst.set()
        wait_until(page, f"document.querySelector('#log [data-lines]').textContent.includes('line {last + 20_000} ')")
    lines = shown_lines(page)
    assert len(lines) <= 4_000
    jumps = sum(after - before - 1 for before, after in zip(lines, lines[1:], strict=False))
    text = page.locator("#log [data-lines]").text_content()
    assert sum(map(int, re.findall(r"^\.\.\. (\d+) lines are left out here", text, re.M))) == jumps > 0
    expect(page.locator("#log [data-told]")).to_contain_text("earlier lines are in the download", timeout=STEP_MS)
    page.locator("#log [data-find]").fill("line 7 of")
    page.locator("#log [data-find]").press("Enter")
    expect(page.locator("#log [data-told]")).to_contain_text("whole log: 1 line", timeout=STEP_MS)
    assert shown_lines(page) == [7]
    with page.expect_download() as download:
        page.locator("#log [data-whole]").click()
    assert download.value.suggested_filename == "at-work.log"
    with open(download.value.path(), encoding="utf-8") as file:
        assert file.readline() == f"line 0 of the log {EVIL}\n"

    # It ends, and the page says so by itself. Nothing of what the log says became a part of the page.
    runner.ending.set()
    sees(page, "#job-head", "Succeeded")
    sees(second, "#job-head", "Succeeded")
    # Resumed from elsewhere it is noticed as well, although a job that is over is looked at less often.
    assert runner.store.resume(runner.job.uid, actor="user", attempt=1, redo="measure")
    control.cancel(runner.home, runner.job.uid)
    sees(page, "#job-head", "Cancelled")
    expect(page.locator("#log img, #stages img")).to_have_count(0)
    assert page.evaluate("window.harmed") is None
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
