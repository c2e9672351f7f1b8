"""Whole visits in a real browser: every tab on desktop and phone in both modes, errors, signing in, stopping."""

import json
import time
from pathlib import Path

import pytest

import lmd_hf
from lmd_hf.weights.source import EMBEDDED_ID


pytestmark = pytest.mark.slow
TABS = ("Overview", "Map", "Spectrum", "Heads", "Factors", "Compare", "Table", "Whole report", "Model card")
SHOTS = Path(__file__).parents[2] / "test-artifacts" / "space"
SEEN = "() => document.querySelector('.lmd-facts h2')?.innerText"
MINILM = "local: model"


def violations(page):
    """What axe-core calls serious or worse, in one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{v['id']}: {v['help']} {v['nodes'][0]['html'][:160]}" for v in found if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (820, "light"), (390, "light"), (390, "dark")]
)
def test_every_tab_is_complete_and_accessible(visit, width, scheme):
    SHOTS.mkdir(parents=True, exist_ok=True)
    visitor = visit(width=width, height=844 if width < 500 else 900, scheme=scheme).open()
    page = visitor.page
    visitor.settled()
    assert (page.evaluate("document.body.classList.contains('dark')")) == (scheme == "dark")
    wrong = []
    for name in TABS:
        visitor.tab(name)
        if name == "Heads":
            page.click("#near")
            page.wait_for_selector("#tokens .lmd-tokens table")
        if name == "Factors":
            page.click("#apart")
            page.wait_for_selector("#pictures img")
        page.wait_for_timeout(600)
        page.screenshot(path=SHOTS / f"{width}-{scheme}-{name.split()[-1].lower()}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width + 1, f"{name} is wider than the screen"
        wrong += [f"{name}: {violation}" for violation in violations(page)]
    assert wrong == []


def test_with_the_keyboard_alone(visit):
    visitor = visit().open()
    page = visitor.page
    visitor.settled()
    page.get_by_role("tab", name="Overview", exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#grid button[data-key]")
    page.locator("#grid button[data-key]").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_function(f"({SEEN})() === 'layer 1, attention v'")


def test_a_cell_is_open_at_once(visit):
    visitor = visit().open()
    page = visitor.page
    visitor.settled()
    page.wait_for_timeout(1500)
    times = []
    for place in range(3, 10):
        visitor.tab("Map")
        button = page.locator("#grid button[data-key]").nth(place)
        title = button.get_attribute("aria-label").split(":")[0]
        times.append(
            page.evaluate(
                """async ([place, title]) => {
                  const begun = performance.now();
                  document.querySelectorAll("#grid button[data-key]")[place].click();
                  const there = () => document.querySelector(".lmd-facts h2")?.innerText === title
                    && document.querySelector("#spectrum-line .js-plotly-plot path.js-line");
                  while (!there()) await new Promise(requestAnimationFrame);
                  return performance.now() - begun; }""",
                [place, title],
            )
        )
    assert sorted(times)[len(times) // 2] < 1000, times  # the aim is 500, and 330 to 500 were seen; CI may be slower


def test_a_model_with_progress_and_a_second_visitor(visit):
    first, second = visit().open(), visit().open()
    first.settled(), second.settled()
    first.ask(MINILM)
    first.page.wait_for_selector("#status progress")
    assert "40 matrices" in first.settled()
    begun = time.perf_counter()
    second.ask(MINILM)
    assert "40 matrices" in second.settled()
    assert time.perf_counter() - begun < 3  # of which the page's own part is most: measured by benchmarks/space.py


def test_stopped_and_begun_again(visit, start_app, minilm):
    app = start_app(minilm)
    visitor = visit(url=app.url).open()
    visitor.settled()
    visitor.ask(MINILM)
    visitor.page.wait_for_selector("#status progress")
    visitor.page.click("#stop")
    visitor.page.wait_for_function("() => document.querySelector('#status').innerText.startsWith('Stopped')")
    visitor.page.wait_for_timeout(500)
    visitor.ask(MINILM)
    assert "40 matrices" in visitor.settled()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("org/absent", "There is no model org/absent"),
        ("../../etc", "is not a Hub id"),
        ("/etc/passwd", "is not a Hub id"),
        ("~", "is not a Hub id"),
        ("org/gated", "is gated: accept its terms on its page, then sign in"),
        ("org/secret", "There is no model org/secret"),
        ("org/pickled", "holds pickles alone"),
        ("org/empty", "holds no weights"),
        ("org/broken", "the header claims"),
        ("", "Name a model first"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(app, hub, model_files, model, told):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    hub.add("org/gated", model_files, gated=True)
    hub.add("org/secret", model_files, private=True)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("org/empty", {"README.md": b"hello"})
    hub.add("org/broken", {"config.json": b"{}", "model.safetensors": b"not a header at all"})
    with pytest.raises(AppError) as raised:
        Client(app.url, verbose=False).predict(model, api_name="/analyze")
    text = str(raised.value)
    assert told in text
    assert "Traceback" not in text
    assert "\n" not in text.strip()


def test_too_large_a_model_is_refused_with_the_command(visit, start_app):
    app = start_app(LMD_SPACE_MEMORY_GB="0.2")
    visitor = visit(url=app.url).open()
    told = visitor.settled()
    assert "too large for this Space" in told
    assert f"lmd-hf analyze {EMBEDDED_ID} --out lmd/" in told
    assert visitor.page.locator("#status a[href*='jobs']").count() == 1
    assert visitor.page.inner_text("#planned").startswith("matrices")


def test_signing_in_and_a_pull_request_in_the_visitors_own_name(visit, app, hub, model_files):
    hub.add("org/model", model_files)
    hub.visitor = "hf_other_token"
    visitor = visit().open("?model=org/model&tab=card")
    page = visitor.page
    assert "29 matrices" in visitor.settled()
    page.click("#pull")
    page.wait_for_function("() => document.querySelector('#card-status').innerText.startsWith('Sign in first')")
    page.click("#login")
    page.wait_for_selector("#login:has-text('other')")
    assert "write-discussions" in hub.scopes
    assert "model=org" in page.url
    visitor.settled()
    page.click("#diff")
    page.wait_for_function("() => document.querySelector('#card-status').innerText.startsWith('This is what')")
    assert "+## Layer Matrix Decomposition" in page.inner_text("#card-diff")
    assert hub.repos["org/model"].pulls == []
    page.click("#pull")
    page.wait_for_function("() => document.querySelector('#card-status').innerText.startsWith('Done')")
    (pull,) = hub.repos["org/model"].pulls
    assert pull.author == "other"
    assert page.get_attribute("#card-status a", "href") == f"{hub.url}/org/model/discussions/1"
    page.click("#pull")
    page.wait_for_function("() => document.querySelector('#card-status').innerText.startsWith('Left alone')")


def test_a_private_model_is_its_visitors_alone(visit, app, hub, model_files):
    hub.add("org/secret", model_files, private=True)
    hub.visitor = hub.token
    visitor = visit().open()
    visitor.settled()
    visitor.page.click("#login")
    visitor.page.wait_for_selector("#login:has-text('tester')")
    visitor.settled()
    visitor.ask("org/secret")
    assert "29 matrices" in visitor.settled()
    stranger = visit().open("?model=org/secret")
    assert "There is no model org/secret" in stranger.settled()
    hub.down = True  # what was cached for one visitor would show now
    another = visit().open("?model=org/secret")
    assert "cannot be reached" in another.settled()


def test_links_lead_to_heads_factors_and_comparisons(visit, app, hub, model_files):
    commit = hub.add("org/model", model_files)
    visitor = visit().open(f"?model=org/model&revision={commit}&tab=heads&head=2+attention+1")
    visitor.settled()
    visitor.page.wait_for_function("() => document.querySelector('#head input')?.value === 'layer 2, attention head 1'")
    name = "model.layers.2.mlp.up_proj.weight"
    visitor = visit().open(f"?model=org/model&tab=factors&matrix={name}&cut=7")
    visitor.settled()
    visitor.page.wait_for_selector("#pictures img")
    assert "n' = 7" in visitor.page.inner_text("#pictures")


def test_factors_follow_the_slider(visit):
    visitor = visit().open("?tab=factors")
    page = visitor.page
    visitor.settled()
    page.wait_for_selector("#pictures img")
    before = page.inner_text("#pictures p >> nth=0")
    page.locator("#cut input[type=range]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("(text) => document.querySelector('#pictures p').innerText !== text", arg=before)
    assert page.locator("#pictures img").count() == 8
    assert all(image.get_attribute("alt") for image in page.locator("#pictures img").all())


def test_two_models_beside_each_other(visit, app, hub, model_files):
    from safetensors.torch import load, save

    tensors = load(model_files["model.safetensors"])
    tensors = {name: value * (1.5 if "q_proj" in name else 1) for name, value in tensors.items()}
    hub.add("org/model", model_files)
    hub.add("org/tuned", {**model_files, "model.safetensors": save(tensors)})
    visitor = visit().open("?tab=compare&base=org/model&tuned=org/tuned")
    page = visitor.page
    visitor.settled()
    page.wait_for_selector("#change-grid button[data-key]")  # the address asks for it
    page.click("#compare")
    assert page.locator("#change-grid button[data-key]").first.inner_text() == "0.50"
    page.locator("#change-grid button[data-key]").first.click()
    page.wait_for_selector("#change-line .js-plotly-plot path.js-line")


def test_files_are_what_the_report_holds(visit, tmp_path):
    visitor = visit().open("?tab=table")
    page = visitor.page
    visitor.settled()
    got = {}
    for name in ("CSV", "Parquet", "JSON"):
        with page.expect_download() as coming:
            page.locator("#files").get_by_text(name, exact=True).click()
        got[name] = tmp_path / coming.value.suggested_filename
        coming.value.save_as(got[name])
    import pandas

    report = lmd_hf.Report.from_dict(json.loads(got["JSON"].read_text()))
    assert len(pandas.read_csv(got["CSV"])) == len(pandas.read_parquet(got["Parquet"])) == len(report.matrices) == 29
    visitor.tab("Whole report")
    with page.expect_download() as coming:
        page.click("#save-page")
    coming.value.save_as(tmp_path / "page.html")
    page.click("#show-page")
    page.frame_locator("#whole iframe").locator("#spectrum path.js-line").first.wait_for()
    alone = visit(url=(tmp_path / "page.html").as_uri())
    alone.page.goto(alone.url)
    alone.page.locator("#map button[data-key]").nth(9).click()
    assert alone.page.inner_text("#matrix-title") == "layer 1, attention v"
    alone.page.fill("#search", "q_proj")
    assert alone.page.locator(".lmd-table tbody tr:visible").count() == 4
    assert violations(alone.page) == []
    alone.page.fill("#search", "")
    alone.page.emulate_media(media="print")
    assert (
        alone.page.evaluate(
            "(({scrollHeight, clientHeight}) => scrollHeight - clientHeight)(document.querySelector('.lmd-table'))"
        )
        == 0
    ), "paper does not scroll"


def test_names_are_suggested_from_the_hub(visit, app, hub, model_files):
    hub.add("org/a-model-to-find", model_files)
    hub.add("org/a-model-to-hide", model_files, private=True)
    visitor = visit().open()
    visitor.settled()
    box = visitor.page.get_by_label("Model", exact=True)
    box.fill("")
    box.press_sequentially("a-model-to", delay=60)
    visitor.page.get_by_role("option", name="org/a-model-to-find").wait_for()
    assert visitor.page.get_by_role("option", name="org/a-model-to-hide").count() == 0
