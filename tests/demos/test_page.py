"""The page of `bridle demo --serve`, driven in a real headless browser: `make test-serve` installs what it needs.

A file is uploaded, as by hand, and what the page then shows is read; neither page nor server asks another machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.pixels import write_pixels, write_sample
from helpers.showcases import LABELS, save_models
from helpers.sounds import write_sounds
from helpers.waiting import DEADLINE
from transformers import pipeline

import bridle_hf


pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: make test-serve")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-serve")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM or not DRIVER, reason="no chromium here: apt-get install chromium chromium-driver"
    ),
]

# The command, in a process that writes down every other machine that it would ask.
SERVER = """
import socket, sys

def watched(function, place):
    def call(*args, **options):
        host = args[place][0] if isinstance(args[place], tuple) else args[place]
        if host not in ("127.0.0.1", "::1", "localhost", None):
            print("asks", host, file=sys.stderr, flush=True)
        return function(*args, **options)
    return call

socket.socket.connect = watched(socket.socket.connect, 1)
socket.getaddrinfo = watched(socket.getaddrinfo, 0)
from bridle_hf.commands import main
main(argv=sys.argv[1:])
"""


@pytest.fixture(scope="module", params=LABELS)
def served(request, tmp_path_factory):
    """A modality's page over all kinds of models and a table: the address, the folder, the file to ask of, its set."""
    modality = request.param
    folder = tmp_path_factory.mktemp(modality)
    models = save_models(folder / "models", modality, "encoder", "tokenizer", "classifier")
    data = write_sounds(folder / "data") if modality == "audio" else write_pixels(folder / "data", modality)
    table = str(folder / "x.parquet")
    bridle_hf.embed(data=data, model=str(models / "encoder"), output=table)
    with running(folder, "--serve", str(models), "--embeddings", table) as url:
        yield modality, url, folder
    assert "asks" not in (folder / "server.log").read_text()


class running:  # noqa: N801 (read as `with running(...)`)
    """The command, from its start to its end; its address."""

    def __init__(self, folder: Path, *words: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.log = folder / "server.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "gradio")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "demo", *words, "--port", port],
            stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{port}/"

    def __enter__(self) -> str:
        wait_for(lambda: "Ctrl-C ends it" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None and self.url in self.log.read_text(), self.log.read_text()
        return self.url

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(DEADLINE)


def chrome(*words: str):
    """Options of a browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *words):
        options.add_argument(f"--{word}")
    return options


@pytest.fixture
def browser(served):
    """A browser with the page open; all that it has asked for came from there."""
    options = chrome("window-size=1300,2600")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    url = served[1]
    try:
        driver.get(url)
        yield driver
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = [
            entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"
        ]
        assert len(asked) > 10
        assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    finally:
        driver.quit()


def wait_for(condition):
    """What a condition gives, as soon as that is true."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError


def upload(browser, path):
    wait_for(lambda: browser.find_elements("css selector", "#file input[type=file]"))[0].send_keys(str(path))


def text(browser, selector):
    """What can be read there; nothing where it is hidden."""
    return "\n".join(element.text for element in browser.find_elements("css selector", selector))


def pictures(browser):
    """Ids of the pictures that are drawn on the page."""
    return browser.execute_script("""
        const names = ["input", "timeline", "mask", "codes", "predictions", "neighbours"];
        const drawn = (image) => image && image.complete && image.naturalWidth > 400 && image.clientWidth > 400;
        return names.filter(name => drawn(document.querySelector(`#${name} img`)));
    """)


def test_a_file_is_uploaded_and_its_outcome_shown(served, browser):
    modality, _, folder = served
    name = f"{LABELS[modality][1]}_3.{ {'audio': 'wav', 'image': 'png', 'video': 'mp4'}[modality] }"
    file = folder / "data" / name
    assert pictures(browser) == [] and text(browser, "#classes, #rows, #said").strip() == ""
    upload(browser, file)
    expected = [*(["timeline"] if modality == "audio" else []), "mask", "codes", "predictions", "neighbours"]
    wait_for(lambda: pictures(browser) == expected)
    asked = pipeline(f"{modality}-classification", model=str(folder / "models" / "classifier"))(str(file))
    lines = text(browser, "#classes").splitlines()
    assert lines[0] == asked[0]["label"]
    for entry in asked:
        assert f"{round(100 * entry['score'])}%" in lines[1:] and entry["label"] in lines[1:]
    rows = text(browser, "#rows")
    assert "1.000" in rows and name in rows and LABELS[modality][1] in rows
    screenshot(browser, folder / "page.png")


def screenshot(browser, path):
    """Of the whole page; a person may look at it."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.set_window_size(1300, height + 200)
    assert browser.save_screenshot(str(path))


def test_bad_input_is_one_line_on_the_page(served, browser):
    modality, _, folder = served
    bad = folder / {"audio": "bad.wav", "image": "bad.png", "video": "bad.mp4"}[modality]
    bad.write_bytes(b"nothing of the kind")
    upload(browser, bad)
    said = wait_for(lambda: text(browser, "#said .md").strip())
    assert said.startswith(f"Cannot be used: {bad.name}: ") and "\n" not in said
    assert str(folder) not in said and pictures(browser) == [] and text(browser, "#classes, #rows").strip() == ""
    assert "Traceback" not in text(browser, "body")
    screenshot(browser, folder / "refused.png")


def test_a_recording_of_the_microphone_is_classified(tmp_path):
    """Chromium's own microphone beeps."""
    models = save_models(tmp_path / "models", "audio", "encoder", "classifier")
    options = chrome("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream")
    with (
        running(tmp_path, "--serve", str(models)) as url,
        webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER)) as driver,
    ):
        driver.get(url)

        def click(selector):
            wait_for(lambda: [one for one in driver.find_elements("css selector", selector) if one.is_displayed()])
            driver.find_element("css selector", selector).click()

        click("#file button[aria-label='Record audio']")
        click("#file button.record")
        time.sleep(2)  # of sound
        click("#file button.stop-button")
        wait_for(lambda: pictures(driver) == ["timeline", "mask"])
        lines = text(driver, "#classes").splitlines()
    assert set(LABELS["audio"]) <= set(lines) and lines[2].endswith("%")


def test_what_is_missing_is_said(tmp_path):
    models = save_models(tmp_path / "models", "image", "bare")
    with (
        running(tmp_path, "--serve", str(models / "bare")) as url,
        webdriver.Chrome(options=chrome(), service=webdriver.ChromeService(executable_path=DRIVER)) as driver,
    ):
        driver.get(url)
        upload(driver, write_sample(tmp_path / "dark.png", "dark", np.random.default_rng(0)))
        wait_for(lambda: pictures(driver) == ["input"])
        shown = text(driver, "body")
    for what in ("classes", "mask", "codes", "neighbours"):
        assert f"No {what}: " in shown


def test_a_port_that_is_taken_is_one_line(tmp_path):
    models = save_models(tmp_path / "models", "image", "bare")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["demo", "--serve", str(models / "bare"), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(
            [sys.executable, "-m", "bridle_hf.commands", *words], capture_output=True, text=True, timeout=DEADLINE
        )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "port" in done.stderr
