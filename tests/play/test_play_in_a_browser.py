"""The playground in Chromium. Skipped where Gradio, Playwright or Chromium is missing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import toy_parts
from finished_runs import write_run
from PIL import Image

from tests.test_generate_images import WEMMU
from umm_zoo.generate import main as generate
from umm_zoo.play.commands import RunWords
from umm_zoo.play.following import follow, trainings
from umm_zoo.play.launching import launched
from umm_zoo.play.loaded import LoadedRun
from umm_zoo.play.server import application

pytest.importorskip("gradio")
uvicorn: Any = pytest.importorskip("uvicorn")
playwright: Any = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"), pytest.mark.processes]

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} it's\n--seed"
)
PATIENCE = 120_000  # ms; a busy machine


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs and the trainings of a folder, served from this process."""
    folder, before = tmp_path_factory.mktemp("play"), Path.cwd()
    os.chdir(folder)
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]  # of trainings
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name in ("one", "two"):
        write_run(Path("runs") / name, {**WEMMU, "image_size": 8 if name == "one" else 12}, image_size=32)
    (Path("runs/one") / "experiment.yaml").write_text("name: one\n")
    Image.new("RGB", (40, 32), "red").save("red.png")
    toy_parts.write_yaml(folder / "toy.yaml", toy_parts.toy_experiment())
    app = application([LoadedRun(RunWords(f"runs/{name}")) for name in ("one", "two")], True, "trained", ["127.0.0.1"])
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    for run in trainings("trained").values():  # of a test that has failed
        if (started := launched(run)) is not None and started.holder.ended() is False:
            os.kill(started.holder.pid, signal.SIGKILL)
    server.should_exit = True
    thread.join(timeout=20)
    patch.undo()
    os.chdir(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, site: str, **options: Any) -> Any:
    """A fresh page; what it asks for and what goes wrong in it are kept beside it."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.goto(site)
    page.get_by_role("tab", name="Text to image").wait_for()
    return page


@pytest.fixture(scope="module")
def page(browser: Any, site: str) -> Iterator[Any]:
    found = opened(browser, site, viewport={"width": 1400, "height": 900})
    yield found
    assert found.faults == [] and set(found.asked) == {urlsplit(site).netloc}  # no other machine, ever
    assert "owned" not in found.title()
    found.close()


def panel(page: Any, tab: str) -> Any:
    page.get_by_role("tab", name=tab, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true")


@pytest.fixture(scope="module")
def edited(page: Any) -> Any:
    """The tab of an edit by both runs; its results are the first two entries of the history."""
    edit = panel(page, "Edit")
    edit.locator("input[type=file]").first.set_input_files("red.png")
    edit.get_by_label("Instruction").fill(HOSTILE)
    edit.get_by_role("button", name="Settings").click()
    edit.get_by_role("textbox", name="Seed of").fill("5")
    edit.get_by_role("button", name="Generate").click()
    edit.locator(".result").nth(1).wait_for()
    return edit


def test_an_edit_by_two_runs_and_its_commands(edited: Any, page: Any, site: str, tmp_path: Path) -> None:
    edit, results = edited, edited.locator(".result")
    assert [image.evaluate("i => i.decode().then(() => i.naturalWidth)") for image in edit.locator(".result img").all()] == [8, 12]
    page.evaluate("document.execCommand = () => { window.copied = document.activeElement.value; return true; }")
    for number in (0, 1):
        results.nth(number).get_by_role("button", name="copy").click()
        line = shlex.split(page.evaluate("window.copied"))
        assert HOSTILE in line
        assert generate([line[3], line[4], "--out", str(tmp_path / str(number)), *line[5:]]) == 0
        served = page.request.get(site + results.nth(number).locator("img").get_attribute("src").lstrip("/")).body()
        assert (tmp_path / str(number) / "000-generated.png").read_bytes() == served


def test_a_user_error_is_its_line(page: Any) -> None:
    prompt = panel(page, "Text to image")
    prompt.get_by_role("button", name="Settings").click()
    prompt.get_by_role("textbox", name="Steps").fill("0")
    prompt.get_by_role("button", name="Generate").click()
    prompt.locator(".wrong").wait_for()
    assert prompt.locator(".wrong").inner_text() == "--steps: found 0, expected a positive whole number up to 1000"


def test_history_survives_a_reload_and_shows_text(edited: Any, page: Any) -> None:
    page.reload()
    page.get_by_role("tab", name="History").click()
    entries = page.locator(".entry")
    entries.first.wait_for()
    assert entries.count() == 2 and entries.first.locator(".asked").inner_text() == HOSTILE
    assert entries.first.get_by_role("link", name="download").get_attribute("href").startswith("/play/file/")


def test_a_training_is_started_and_found_again_and_stopped(page: Any, browser: Any, site: str) -> None:
    page.get_by_role("tab", name="Train", exact=True).click()
    page.get_by_role("tab", name="Start").click()
    page.get_by_label("Experiment file").click()
    page.get_by_role("option", name="toy.yaml", exact=True).click()
    page.locator(".command", has_text="umm_zoo.fit").wait_for()
    steps = page.get_by_role("textbox", name="value 2")
    steps.fill("-3")
    page.locator(".wrong", has_text="trainer.max_steps").wait_for()
    steps.fill("1000000")
    page.locator(".command", has_text="trainer.max_steps=1000000").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".training", has_text="toy").wait_for()

    again = opened(browser, site)  # somebody else, or the same one tomorrow
    again.get_by_role("tab", name="Train", exact=True).click()
    again.locator(".state.running").wait_for()
    again.frame_locator("iframe").locator("h1", has_text="toy").wait_for()
    assert again.locator("iframe").get_attribute("sandbox") == "allow-scripts"
    again.get_by_role("button", name="Stop", exact=True).click()
    assert follow(trainings("trained")["toy"]).state == "running"  # it asks
    again.get_by_role("button", name="Stop it").click()
    again.locator(".state.stopped").wait_for()
    assert "stopped by SIGTERM" in again.locator(".training pre").inner_text()
    assert again.faults == []
    again.close()


def test_no_other_file_of_the_machine_is_handed_out(page: Any, site: str) -> None:
    for address in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={Path('red.png').resolve()}",
        "gradio_api/file=red.png",
        f"gradio_api/file={Path('runs/one/experiment.yaml').resolve()}",
        "gradio_api/file=https://example.org/",
        "gradio_api/proxy=https://example.org/",
        "play/file/0/..%2Fcheckpoints/last.ckpt",
        "play/file/7/inputs/a.png",
        "play/training/..%2Fruns%2Fone",
    ):
        assert page.request.get(site + address).status in (403, 404), address
    assert page.request.get(site + "play/page/0").headers["content-security-policy"].startswith("sandbox allow-scripts;")
    assert page.request.get(site, headers={"host": "example.org"}).status == 403


def test_a_file_that_was_not_uploaded_is_no_input(page: Any, site: str) -> None:
    found = page.request.get(site + "config").json()
    kinds = {part["id"]: part for part in found["components"]}
    (call, inputs) = next(
        (event["id"], event["inputs"])
        for event in found["dependencies"]
        if "image" in (types := [kinds[own]["type"] for own in event["inputs"]]) and "textbox" in types
    )
    secret = Path("toy.yaml").resolve()
    image = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    data = [image if kinds[own]["type"] == "image" else "x" for own in inputs]
    body = json.dumps({"data": data, "fn_index": call, "session_hash": "other", "trigger_id": None, "event_data": None})
    assert page.request.post(site + "gradio_api/queue/join", data=body, headers={"content-type": "application/json"}).ok
    said = page.request.get(site + "gradio_api/queue/data?session_hash=other").text()
    assert '"success":false' in said.replace(" ", "")
    assert not list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("toy.yaml"))


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_the_page_is_no_wider_than_its_window(browser: Any, site: str, width: int, scheme: str) -> None:
    page = opened(browser, site, viewport={"width": width, "height": 800}, color_scheme=scheme)
    time.sleep(0.5)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
