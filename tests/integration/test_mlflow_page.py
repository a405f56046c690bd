"""MLflow's pages in a real browser: the three adapters, the fused one, and the curves of a run are there."""

import os
import shutil
from datetime import UTC, datetime

import pytest

from orchestrator.contracts import MetricPoint
from orchestrator.registry import server as tracking_server
from tests.contract.samples import classification, new_version

pytestmark = pytest.mark.browser

SECONDS = 120
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1600,2600",
)
TASKS = ("support", "sentiment", "recommendation")
CURVES = ("loss", "learning_rate", "tokens_per_second", "grad_norm")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver"
        if os.environ.get("CHORUS_REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A server of its own with three adapters, the fused one and a run's curves: url, names, run id."""
    from orchestrator.registry.registry import MlflowRegistry

    folder = tmp_path_factory.mktemp("page")
    with tracking_server.start(folder) as server:
        registry = MlflowRegistry(server.url)
        names = [f"tiny.{task}" for task in TASKS]
        for seed, name in enumerate(names):
            changes = {"scores": [classification(name)], "base_scores": [classification(name, macro_f1=0.2)]}
            new = new_version(registry, folder, name, f"step-{name}", seed, **changes)
            registry.register(new)
            registry.set_alias(name, "candidate", 1)
        log_curves(registry, new.run_id)
        registry.end_run(new.run_id, "FINISHED")
        parents = [f"{name}/1" for name in names]
        changes = {
            "parents": parents,
            "model_type": "lora-adapter-fused",
            "fusion_report": {"rule": "concat"},
        }
        registry.register(new_version(registry, folder, "tiny.multi-task", "step-fused", 9, **changes))
        registry.promote("tiny.multi-task", 1, None, "first", {"macro_f1": 0.9})
        yield server.url, [*names, "tiny.multi-task"], new.run_id


def log_curves(registry, run_id):
    now = int(datetime.now(UTC).timestamp() * 1000)
    values = {"loss": 4.0, "learning_rate": 2e-3, "tokens_per_second": 5000.0, "grad_norm": 1.5}
    points = [
        MetricPoint(key, value / step**0.5, step, now + 100 * step)
        for step in range(1, 41)
        for key, value in values.items()
    ]
    registry.log_metrics(run_id, points)


def wait_for_text(browser, words):
    """The page's text once it holds every word; fails with the page's text otherwise."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def shown(window):
        text = window.find_element(By.TAG_NAME, "body").text
        return text if all(word in text for word in words) else None

    try:
        return WebDriverWait(browser, SECONDS).until(shown)
    except TimeoutException:
        text = browser.find_element(By.TAG_NAME, "body").text
        pytest.fail(f"the page lacks one of {words}: {text[:2000]}")


def test_models_page_shows_the_three_adapters_and_the_fused_one(browser, filled):
    url, names, _ = filled
    browser.get(f"{url}/#/models")
    text = wait_for_text(browser, names)
    assert "champion" in text


def test_version_page_shows_its_digest_tags(browser, filled):
    url, names, _ = filled
    browser.get(f"{url}/#/models/{names[-1]}/versions/1")
    wait_for_text(browser, ["fusion.parents", "adapter.digest", "champion"])


def test_run_page_shows_its_curves_drawn(browser, filled):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    url, _, run_id = filled
    browser.get(f"{url}/#/experiments/1/runs/{run_id}/model-metrics")
    wait_for_text(browser, CURVES)
    drawn = WebDriverWait(browser, SECONDS).until(
        lambda window: window.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path.js-line")
    )
    assert len(drawn) >= 1
