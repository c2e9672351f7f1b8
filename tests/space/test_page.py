"""What a visitor sees first: in a real browser, fast enough to run every time."""

import time
from urllib.parse import parse_qs, urlsplit

from lmd_hf.weights.source import EMBEDDED_ID


def test_from_the_first_paint_to_a_spectrum_and_back_by_its_link(visit, app):
    visitor = visit().open()
    page = visitor.page
    assert "29 matrices" in visitor.settled()
    assert page.locator(".lmd-tiles > div").count() >= 5

    visitor.tab("Map")
    page.locator("#grid button[data-key]").nth(9).click()
    page.wait_for_function("() => document.querySelector('.lmd-facts h2')?.innerText === 'layer 1, attention v'")
    page.wait_for_selector("#tabs .lmd-plot .js-plotly-plot path.js-line")
    assert page.get_by_role("tab", name="Spectrum", exact=True).get_attribute("aria-selected") == "true"
    page.wait_for_function("() => location.search.includes('matrix=model.layers.1')")
    asked = {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}
    assert asked["tab"] == "spectrum"
    assert asked["model"] == EMBEDDED_ID

    begun = time.perf_counter()
    page.reload()
    page.wait_for_function("() => document.querySelector('.lmd-facts h2')?.innerText === 'layer 1, attention v'")
    assert page.get_by_role("tab", name="Spectrum", exact=True).get_attribute("aria-selected") == "true"
    assert time.perf_counter() - begun < 10
    page.evaluate("lmdLink({ model: '  org/name ', revision: ' ' })")
    asked = parse_qs(urlsplit(page.url).query)
    assert asked["model"] == ["org/name"]
    assert "revision" not in asked


def test_without_a_browser_the_first_answer_comes_before_torch(app):
    """The process that answers visitors never imports it: weights are opened by workers alone."""
    import psutil

    loaded = {entry.path for entry in psutil.Process(app.process.pid).memory_maps()}
    assert any("site-packages" in path for path in loaded)
    assert not [path for path in loaded if "/torch/lib/" in path]
