"""The page: what is where, and which action answers what. No values are made here."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fragments
import gradio as gr
from actions import HEAD_MEASURE, TABS, Actions
from catalogue import EMBEDDED
from endpoints import Endpoints
from service import Service

import lmd_hf


HERE = Path(__file__).parent
HEAD = f"<script>{(HERE / 'script.js').read_text()}</script>"
MAP = (HERE / "map.js").read_text()
NAMES = ("Overview", "Map", "Spectrum", "Heads", "Factors", "Compare", "Table", "Whole report", "Model card")
ONE_HOUR = 3600
SIGN_IN = os.environ.get("SYSTEM") == "spaces" and "OAUTH_CLIENT_ID" in os.environ
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# fewer than app.THREADS, so that whoever waits for another's result leaves that one a thread to make it; more than
# jobs.LONGEST_LINE, which turns the rest away
WORK: dict[str, Any] = {"concurrency_limit": 90, "concurrency_id": "work"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}


def theme() -> gr.Theme:
    """Quiet: the blue of the figures as the one accent, system fonts, so that nothing is fetched from elsewhere."""
    blue = gr.themes.Color(
        c50="#eef7fd", c100="#d6ebf8", c200="#aed7f1", c300="#7cbfe7", c400="#46a3d9", c500="#0072b2", c600="#00659d",
        c700="#005485", c800="#00446c", c900="#003655", c950="#00253b",
    )  # fmt: skip
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    made = gr.themes.Base(primary_hue=blue, neutral_hue="slate", font=fonts, font_mono=mono)
    return made.set(color_accent="*primary_600", button_large_text_weight="550")


def style() -> str:
    """The page's own style, and that of the figures of `lmd_hf`."""
    return lmd_hf.interactive.STYLE + (HERE / "style.css").read_text()


def build(service: Service) -> gr.Blocks:
    """The whole page, with its endpoints."""
    act, heavy = Actions(service), {**PRIVATE, **WORK}
    known = service.catalogue.suggest()
    measures, changes = list(lmd_hf.interactive.MEASURES), list(lmd_hf.interactive.CHANGES)
    with gr.Blocks(title="Inside a model’s weights", analytics_enabled=False) as page:
        # first, for they are to have these very names: a handler of the page that is called so too gets a number
        for name, answer in Endpoints(service).all().items():
            gr.api(answer, api_name=name, **WORK)
        shown, wanted = gr.State(None, time_to_live=ONE_HOUR), gr.State({}, time_to_live=ONE_HOUR)
        compared, taken = gr.State(None, time_to_live=ONE_HOUR), gr.State(None, time_to_live=ONE_HOUR)
        parcel = gr.JSON(visible=False)
        with gr.Row(elem_id="top"):
            gr.HTML(fragments.HEADER, scale=5)
            if SIGN_IN:  # elsewhere there is nobody to sign in with
                gr.LoginButton(size="sm", scale=1, min_width=200, elem_id="login")
        with gr.Row(elem_id="ask"):
            model = _model_box(known, "Model", value=EMBEDDED)
            revision = gr.Textbox(label="Revision", placeholder="main", scale=2, min_width=120, elem_id="revision")
            with gr.Row(elem_id="buttons", scale=3):
                start = gr.Button("Analyze", variant="primary", min_width=90, elem_id="analyze")
                ahead = gr.Button("Plan", min_width=70, elem_id="plan")
                stop = gr.Button("Stop", min_width=70, elem_id="stop")
        status = gr.HTML(fragments.say("Choose a model and press Analyze."), elem_id="status")
        planned = gr.HTML("", elem_id="planned")
        with gr.Tabs(elem_id="tabs") as tabs:
            places = {name: gr.Tab(label, id=name) for name, label in zip(TABS, NAMES, strict=True)}
            with places["overview"]:
                overview = gr.HTML(fragments.NOTHING)
                plane = _plot("Capacity and expressivity of every matrix and head", "plane")
            with places["map"]:
                measure = gr.Radio(measures, value=measures[0], label="Measure", elem_id="measure")
                grid = gr.HTML(fragments.NOTHING, js_on_load=MAP, elem_id="grid")
                gr.HTML(fragments.note("One cell a layer and role; choose one to open its spectrum. Arrow keys move."))
            with places["spectrum"]:
                with gr.Row():
                    matrix = gr.Dropdown([], label="Matrix", scale=3, min_width=260, elem_id="matrix")
                    scale = gr.Radio(
                        ["logarithmic", "linear"], value="logarithmic", label="Axis of σ", scale=1, elem_id="scale"
                    )
                facts = gr.HTML(fragments.NOTHING)
                lines = _plot("Singular values, with the edge of noise and the cut at n'", "spectrum-line")
                with gr.Row():
                    bulk = _plot("Density beside pure noise (Marchenko–Pastur)", "density-line")
                    energy = _plot("Energy of the leading values", "energy-line")
            with places["heads"]:
                head_measures = list(lmd_hf.interactive.HEAD_MEASURES)
                head_measure = gr.Radio(head_measures, value=HEAD_MEASURE, label="Measure", elem_id="head-measure")
                head_grid = gr.HTML(fragments.NOTHING, js_on_load=MAP, elem_id="head-grid")
                head = gr.Dropdown([], label="Head", elem_id="head")
                head_facts = gr.HTML()
                circuits = _plot("Spectra of QK (similarity) and OV (projection)", "circuit-line")
                near = gr.Button("Show the tokens it reads and writes", elem_id="near")
                tokens = gr.HTML(elem_id="tokens")
            with places["factors"]:
                with gr.Row():
                    piece = gr.Dropdown([], label="Matrix", scale=3, min_width=260, elem_id="piece")
                    apart = gr.Button("Take it apart", variant="primary", scale=1, elem_id="apart")
                cut = gr.Slider(
                    1, 2, value=1, step=1, label="n', the axes that are kept", interactive=False, elem_id="cut"
                )
                pictures = gr.HTML(fragments.note("Choose a matrix and take it apart."), elem_id="pictures")
            with places["compare"]:
                with gr.Row():
                    base = _model_box(known, "Base", value=EMBEDDED)
                    base_revision = gr.Textbox(label="Revision of the base", placeholder="main", scale=2)
                with gr.Row():
                    tuned = _model_box(known, "Tuned")
                    tuned_revision = gr.Textbox(label="Revision of the tuned model", placeholder="main", scale=2)
                beside = gr.Button("Compare", variant="primary", elem_id="compare")
                compare_status = gr.HTML(fragments.say("Two models of one shape: a base and what was made of it."))
                difference = gr.HTML()
                changed = gr.Column(visible=False)
            with places["compare"], changed:
                change_measure = gr.Radio(changes, value=changes[0], label="Measure", elem_id="change-measure")
                change_grid = gr.HTML("", js_on_load=MAP, elem_id="change-grid")
                pair = gr.Dropdown([], label="Matrix", elem_id="pair")
                change = _plot("Singular values of the difference ΔW", "change-line")
            with places["table"]:
                with gr.Row(elem_id="files"):
                    words = gr.Textbox(
                        label="Search", placeholder="such as: mlp down", scale=4, min_width=300, elem_id="search"
                    )
                    files = {kind: gr.Button(kind.upper() if kind != "parquet" else "Parquet", size="sm", min_width=90)
                             for kind in ("csv", "parquet", "json")}  # fmt: skip
                table = gr.Dataframe(interactive=False, label="Matrices", max_height=640, elem_id="table")
            with places["whole"]:
                gr.HTML(fragments.note("Everything in one page that needs no server: send it, or open it years later."))
                with gr.Row():
                    save_page = gr.Button("Download the page", variant="primary", elem_id="save-page")
                    show_page = gr.Button("Show it here", elem_id="show-page")
                gr.HTML('<div class="lmd-frame"></div>', elem_id="whole")
            with places["card"]:
                card = gr.Markdown(fragments.NOTHING, elem_id="section", sanitize_html=True)
                with gr.Row():
                    diff = gr.Button("Show the change of the card", elem_id="diff")
                    pull = gr.Button("Open a pull request", variant="primary", elem_id="pull")
                signed = (
                    ""
                    if SIGN_IN
                    else " Outside a Space there is no sign-in: use <code>lmd-hf annotate org/model --create-pr</code>."
                )
                gr.HTML(fragments.note(f"In your own name, after signing in; a token is never asked for.{signed}"))
                card_status = gr.HTML(elem_id="card-status")
                card_diff = gr.Code(
                    language=None,
                    label="Change of README.md",
                    interactive=False,
                    elem_id="card-diff",
                    wrap_lines=True,
                    visible=False,
                )
        gr.HTML(fragments.FOOTER)

        rendered = [overview, plane, measure, grid, matrix, piece, head_measure, head_grid, head, table, words, card]
        figures, head_parts = [facts, lines, bulk, energy], [head_facts, circuits, tokens]
        request = [model, revision, wanted]
        steps: Sequence[Any] = (
            page.load(act.restore, None, [model, revision, tabs, base, tuned, measure, wanted], **QUICK),
            start.click(lambda: {}, None, wanted, **QUICK),
        )
        steps[0].then(None, None, None, js="() => { window.lmdRestored = true; }", **PRIVATE)
        runs = []
        for step in steps:
            run = step.then(
                act.analyze,
                request,
                [status, planned, shown, *rendered],
                show_progress="minimal",
                show_progress_on=status,
                **heavy,
            )
            run.then(
                None,
                [model, revision],
                None,
                js="(model, revision) => { lmdLink({model, revision}); setTimeout(lmdReach, 300); }",
                **PRIVATE,
            )
            run.then(act.matrix, [matrix, scale, shown], figures, **QUICK)
            run.then(act.head, [head, shown], head_parts, **QUICK)
            runs.append(run)
        again = runs[0].then(
            act.wanted_apart, [piece, wanted, shown], [taken, cut, pictures], show_progress="hidden", **heavy
        )
        look = ahead.click(
            act.plan, [model, revision], [status, planned], show_progress="minimal", show_progress_on=status, **heavy
        )
        sides = [base, base_revision, tuned, tuned_revision]
        beside_outputs = [compare_status, compared, difference, change_measure, change_grid, pair, changed]
        looks: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": compare_status, **heavy}
        differ = beside.click(act.compare, sides, beside_outputs, **looks)
        linked = steps[0].then(act.wanted_compare, [*sides, wanted], beside_outputs, **looks)
        for event in (differ, linked):
            event.then(act.change, [pair, compared], change, **QUICK)
        differ.then(None, [base, tuned], None, js=_link("base", "tuned"), **PRIVATE)
        stop.click(act.stop, None, status, cancels=[*runs, look, differ, linked, again], **QUICK)

        measure.change(act.map, [measure, matrix, shown], grid, **QUICK)
        measure.input(None, measure, None, js=_link("measure"), **PRIVATE)
        opened = grid.select(act.open_matrix, [scale, shown], [tabs, matrix, piece, *figures], **QUICK)
        chosen = matrix.input(act.matrix, [matrix, scale, shown], figures, **QUICK)
        opened.then(None, matrix, None, js=_link("matrix"), **PRIVATE)
        chosen.then(None, matrix, None, js=_link("matrix"), **PRIVATE)
        scale.change(act.matrix, [matrix, scale, shown], figures, **QUICK)
        head_measure.change(act.head_map, [head_measure, head, shown], head_grid, **QUICK)
        opened_head = head_grid.select(act.open_head, shown, [head, *head_parts], **QUICK)
        picked = head.input(act.head, [head, shown], head_parts, **QUICK)
        for event in (opened_head, picked):
            event.then(None, head, None, js=_link("head"), **PRIVATE)
        near.click(act.tokens, [head, shown], tokens, show_progress="minimal", **heavy)
        apart.click(
            act.take_apart,
            [piece, wanted, shown],
            [taken, cut, pictures],
            show_progress="minimal",
            show_progress_on=pictures,
            **heavy,
        )
        cut.input(act.cut, [cut, taken], pictures, trigger_mode="always_last", **QUICK)
        cut.release(None, [cut, piece], None, js=_link("cut", "matrix"), **PRIVATE)
        change_measure.change(act.change_map, [change_measure, pair, compared], change_grid, **QUICK)
        change_grid.select(act.open_change, compared, [pair, change], **QUICK)
        pair.input(act.change, [pair, compared], change, **QUICK)
        words.input(act.search, [words, shown], table, trigger_mode="always_last", **QUICK)
        for kind, button in files.items():
            button.click(getattr(act, kind), shown, parcel, **QUICK).then(
                None, parcel, None, js="(parcel) => lmdSave(parcel)", **PRIVATE
            )
        save_page.click(act.whole, shown, parcel, **QUICK).then(
            None, parcel, None, js="(parcel) => lmdSave(parcel)", **PRIVATE
        )
        show_page.click(act.whole, shown, parcel, **QUICK).then(
            None, parcel, None, js="(parcel) => lmdShow(parcel)", **PRIVATE
        )
        diff.click(act.diff, shown, [card_status, card_diff], show_progress="minimal", **heavy)
        pull.click(act.pull, shown, [card_status, card_diff], show_progress="minimal", **heavy)
        for names in (model, base, tuned):
            seen = gr.State(known, time_to_live=ONE_HOUR)
            names.key_up(act.suggest, seen, [names, seen], trigger_mode="always_last", **QUICK)
        for name, place in places.items():
            place.select(None, None, None, js=f"() => lmdTab('{name}')", **PRIVATE)
        page.unload(act.leave)
    return page


def _link(*names: str) -> str:
    """A script that puts these values into the page's address."""
    return f"({', '.join(names)}) => lmdLink({{{', '.join(names)}}})"


def _model_box(known: list[str], label: str, *, value: str | None = None) -> gr.Dropdown:
    return gr.Dropdown(
        known, value=value, label=label, allow_custom_value=True, scale=5, min_width=260, elem_id=label.lower()
    )


def _plot(title: str, name: str) -> gr.Plot:
    with gr.Column(min_width=300):
        gr.HTML(f'<h2 class="lmd-title">{title}</h2>')
        return gr.Plot(show_label=False, container=False, visible=False, elem_classes="lmd-plot", elem_id=name)
