"""What happens on the page: from what a visitor chose to what the page shows. No layout here."""

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fragments
import gradio as gr
from catalogue import EMBEDDED, Subject
from service import Service, session_of

import lmd_hf


TICK = 0.1  # seconds between two pictures of the progress
TABS = ("overview", "map", "spectrum", "heads", "factors", "compare", "table", "whole", "card")
COLUMNS = (
    "layer", "stack", "block", "role", "part", "shape", "effective_rank", "latent_dim", "stable_rank", "mp_spikes",
    "capacity_log10", "spectral_norm", "error_bound", "name",
)  # fmt: skip
HEAD_MEASURE = "copying score of OV"
Shown = tuple[Subject, Any]  # a model and its `lmd_hf.Report`
Wanted = dict[str, str]  # what the address asks for
interactive = lmd_hf.interactive


@dataclass(frozen=True)
class Actions:
    """The handlers of the page's events."""

    service: Service

    def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """What the address holds: (model, revision, tab, base, tuned, measure, everything)."""
        wanted = {key: str(value)[:300] for key, value in dict(request.query_params).items()}
        tab = wanted.get("tab", "")
        model = wanted.get("model") or EMBEDDED
        return (
            model,
            wanted.get("revision", ""),
            gr.Tabs(selected=tab if tab in TABS else "overview"),
            wanted.get("base") or model,
            wanted.get("tuned"),
            wanted["measure"] if wanted.get("measure") in interactive.MEASURES else next(iter(interactive.MEASURES)),
            wanted,
        )

    def suggest(self, seen: list[str], data: gr.KeyUpData, token: gr.OAuthToken | None) -> tuple[Any, list[str]]:
        """(names to choose from, the same): those that were, and what fits what is being typed. The list never gets
        shorter, for that an open list of Gradio's does not survive; it filters by itself."""
        found = self.service.catalogue.suggest(data.input_value, None if token is None else token.token)
        names = list(dict.fromkeys([*seen, *found]))
        return gr.Dropdown(choices=names), names

    def plan(self, model: str, revision: str, request: gr.Request, token: gr.OAuthToken | None) -> tuple[str, str]:
        """(status, plan)."""
        try:
            made = self.service.plan(self.service.look(model, revision, token), session_of(request))
        except gr.Error as error:
            return fragments.say(str(error.message), "lmd-bad"), ""
        if made["refusal"]:
            return fragments.refusal(made["refusal"]), fragments.plan(made)
        return fragments.say(f"{made['model']['id']}: this is what an analysis would do."), fragments.plan(made)

    def analyze(
        self, model: str, revision: str, wanted: Wanted, request: gr.Request, token: gr.OAuthToken | None
    ) -> Iterator[tuple[Any, ...]]:
        """(status, plan, shown, everything that `_rendered` gives), again and again until it is done."""
        nothing = (gr.skip(),) * RENDERED
        started, last, planned = time.monotonic(), 0.0, ""
        yield fragments.say(f"Looking up {model} …"), "", gr.skip(), *nothing
        try:
            subject = self.service.look(model, revision, token)
            for kind, value in self.service.analysis(subject, session_of(request)):
                if kind == "plan":
                    planned = fragments.plan(value)
                    if value["refusal"]:
                        yield fragments.refusal(value["refusal"]), planned, gr.skip(), *nothing
                        return
                    yield fragments.say("Reading the first matrices …"), planned, gr.skip(), *nothing
                elif kind == "progress" and (time.monotonic() - last > TICK or value[0] == value[1]):
                    last = time.monotonic()
                    yield fragments.progress(*value), planned, gr.skip(), *nothing
                elif kind == "waiting":
                    yield fragments.waiting(value), planned, gr.skip(), *nothing
                elif kind == "report":
                    report = value
        except gr.Error as error:
            yield fragments.say(str(error.message), "lmd-bad"), planned, gr.skip(), *nothing
            return
        at = f" at commit {subject.commit[:12]}" if subject.commit else ""
        told = f"{subject.id}{at}: {len(report.matrices):,} matrices, ready after {time.monotonic() - started:.1f} s."
        yield fragments.say(told), folded(planned), (subject, report), *self._rendered(report, wanted)

    def _rendered(self, report: Any, wanted: Wanted) -> tuple[Any, ...]:
        """(overview, plane, measure, map, matrix, matrix to take apart, its measure, map of heads, head, table, words,
        card): the measures too, so that what is chosen and what is drawn stay the same."""
        choices = [(interactive.title(m), interactive.matrix_key(m)) for m in report.matrices]
        keys = [key for _, key in choices]
        inside = [interactive.matrix_key(m) for m in report.matrices if m.layer is not None]
        key = wanted.get("matrix") if wanted.get("matrix") in keys else next(iter([*inside, *keys]), None)
        heads = [(interactive.head_title(head), interactive.head_key(head)) for head in report.heads]
        head = wanted.get("head") if wanted.get("head") in [k for _, k in heads] else next((k for _, k in heads), None)
        first = next(iter(interactive.MEASURES))
        measure = wanted["measure"] if wanted.get("measure") in interactive.MEASURES else first
        return (
            interactive.overview(report),
            plot(interactive.plane(report)),
            measure,
            self.map(measure, key, (None, report)),
            gr.Dropdown(choices=choices, value=key),
            gr.Dropdown(choices=choices, value=key),
            HEAD_MEASURE,
            self.head_map(HEAD_MEASURE, head, (None, report)),
            gr.Dropdown(choices=heads, value=head),
            table(report),
            "",
            report.card(),
        )

    def map(self, measure: str, key: str | None, shown: Any) -> str:
        """The map of one measure."""
        if shown is None:
            return fragments.NOTHING
        measure = measure if measure in interactive.MEASURES else next(iter(interactive.MEASURES))
        return interactive.layer_table(shown[1].matrices, measure, interactive.MEASURES[measure], selected=key)

    def matrix(self, key: str | None, scale: str, shown: Shown | None) -> tuple[Any, ...]:
        """(key figures, spectrum, density, energy) of one matrix."""
        row = None if shown is None else find(shown[1].matrices, key, interactive.matrix_key)
        if row is None:
            return fragments.NOTHING, None, None, None
        heading = interactive.title(row)
        figures = (
            interactive.spectrum(row, log=scale == "logarithmic"),
            interactive.density(row),
            interactive.energy(row),
        )
        return fragments.of_matrix(row, heading), *map(plot, figures)

    def open_matrix(self, scale: str, shown: Shown | None, data: gr.EventData) -> tuple[Any, ...]:
        """A click on the map: the spectrum's tab, the matrix there and for the factors, and what `matrix` gives."""
        key = data.key
        return gr.Tabs(selected="spectrum"), key, key, *self.matrix(key, scale, shown)

    def head_map(self, measure: str, key: str | None, shown: Any) -> str:
        """The grid of heads."""
        if shown is None:
            return fragments.NOTHING
        if not shown[1].heads:
            return fragments.note("No attention head could be formed of this model’s matrices; the overview says why.")
        return interactive.head_grid(shown[1].heads, measure, selected=key)

    def head(self, key: str | None, shown: Shown | None) -> tuple[Any, ...]:
        """(key figures, spectra, no tokens yet) of one head."""
        head = None if shown is None else find(shown[1].heads, key, interactive.head_key)
        if head is None:
            return fragments.NOTHING, None, ""
        return fragments.of_head(head, interactive.head_title(head)), plot(interactive.circuit(head)), ""

    def open_head(self, shown: Shown | None, data: gr.EventData) -> tuple[Any, ...]:
        """A click on the grid of heads."""
        return data.key, *self.head(data.key, shown)

    def tokens(self, key: str | None, shown: Shown | None, request: gr.Request) -> str:
        """The tokens nearest to what a head reads and writes."""
        head = None if shown is None else find(shown[1].heads, key, interactive.head_key)
        if shown is None or head is None:
            return fragments.NOTHING
        part = " ".join(filter(None, (head.stack, head.block, f"head {head.head}")))
        try:
            return fragments.tokens(self.service.tokens(shown[0], part, head.layer, session_of(request)))
        except gr.Error as error:
            return fragments.say(str(error.message), "lmd-bad")

    def take_apart(
        self, key: str | None, wanted: Wanted, shown: Shown | None, request: gr.Request
    ) -> tuple[Any, Any, str]:
        """(the factors, the slider of n', the pictures) of one matrix."""
        row = None if shown is None else find(shown[1].matrices, key, interactive.matrix_key)
        if shown is None or row is None:
            return None, gr.skip(), fragments.NOTHING
        try:
            found = self.service.pieces(shown[0], f"{row.name} {row.part}", row.layer, session_of(request))
        except gr.Error as error:
            return None, gr.skip(), fragments.say(str(error.message), "lmd-bad")
        most = len(found.s_K)
        asked = wanted.get("cut", "") if wanted.get("matrix") == key else ""
        cut = min(int(asked) if asked.isdigit() else row.latent_dim or most, most)
        return (
            found,
            gr.Slider(1, most, value=max(cut, 1), step=1, interactive=True),
            interactive.pictures(found, max(cut, 1)),
        )

    def wanted_apart(
        self, key: str | None, wanted: Wanted, shown: Shown | None, request: gr.Request
    ) -> tuple[Any, ...]:
        """`take_apart` where the address leads to the factors."""
        if wanted.get("tab") != "factors":
            return gr.skip(), gr.skip(), gr.skip()
        return self.take_apart(key, wanted, shown, request)

    def cut(self, cut: float, found: Any) -> Any:
        """The pictures at another n'."""
        return gr.skip() if found is None else interactive.pictures(found, min(int(cut), len(found.s_K)))

    def compare(
        self, base: str, base_revision: str, tuned: str, tuned_revision: str, request: gr.Request,
        token: gr.OAuthToken | None,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """(status, comparison, text, measure, map, pair, what shows them)."""
        nothing = (gr.skip(),) * 6
        yield fragments.say("Looking up both models …"), *nothing
        try:
            sides = self.service.look(base, base_revision, token), self.service.look(tuned, tuned_revision, token)
            last = 0.0
            for kind, value in self.service.comparison(*sides, session_of(request)):
                if kind == "progress" and time.monotonic() - last > TICK:
                    last = time.monotonic()
                    yield fragments.progress(*value), *nothing
                elif kind == "waiting":
                    yield fragments.waiting(value), *nothing
                elif kind == "comparison":
                    found = value
        except gr.Error as error:
            yield fragments.say(str(error.message), "lmd-bad"), *nothing
            return
        choices = [(interactive.title(m), interactive.matrix_key(m)) for m in found.matrices]
        first = next((key for _, key in choices), None)
        told, measure = fragments.say(f"{len(found.matrices):,} matrices compared."), next(iter(interactive.CHANGES))
        yield (
            told,
            found,
            interactive.changes(found),
            measure,
            self.change_map(measure, first, found),
            gr.Dropdown(choices=choices, value=first),
            gr.Column(visible=True),
        )

    def wanted_compare(
        self, base: str, base_revision: str, tuned: str, tuned_revision: str, wanted: Wanted, request: gr.Request,
        token: gr.OAuthToken | None,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """`compare` where the address leads to a comparison."""
        if wanted.get("tab") == "compare" and wanted.get("tuned"):
            yield from self.compare(base, base_revision, tuned, tuned_revision, request, token)
        else:
            yield (gr.skip(),) * 7

    def change_map(self, measure: str, key: str | None, found: Any) -> str:
        """The map of what changed."""
        if found is None:
            return ""
        return interactive.layer_table(found.matrices, measure, interactive.CHANGES[measure], selected=key)

    def change(self, key: str | None, found: Any) -> Any:
        """The spectrum of one difference."""
        row = None if found is None else find(found.matrices, key, interactive.matrix_key)
        return gr.skip() if row is None else plot(interactive.update(row))

    def open_change(self, found: Any, data: gr.EventData) -> tuple[Any, ...]:
        """A click on the map of what changed."""
        return data.key, self.change(data.key, found)

    def diff(self, shown: Shown | None, request: gr.Request) -> tuple[str, str]:
        """(status, diff) of the card as a pull request would change it."""
        return self._proposed(shown, "dry", request)

    def pull(self, shown: Shown | None, request: gr.Request, token: gr.OAuthToken | None) -> tuple[str, str]:
        """(status, diff) after a pull request in the visitor's own name."""
        if token is None:
            return fragments.say("Sign in first: a pull request is opened in your own name.", "lmd-bad"), gr.skip()
        return self._proposed(shown, "pull", request, token)

    def _proposed(
        self, shown: Shown | None, how: str, request: gr.Request, token: gr.OAuthToken | None = None
    ) -> tuple[str, Any]:
        if shown is None:
            return fragments.NOTHING, gr.skip()
        subject, report = shown
        if not subject.on_hub:
            return fragments.say(
                f"{subject.id} is not on the Hub: the section above is for its README.md.", "lmd-bad"
            ), gr.skip()
        try:
            if token is not None:  # under the visitor's name, whatever the analysis ran as
                subject = self.service.look(subject.id, subject.revision or "", token)
            made = self.service.proposal(subject, report, how, session_of(request))
        except gr.Error as error:
            return fragments.say(str(error.message), "lmd-bad"), gr.skip()
        return fragments.proposal(made), gr.Code(made["diff"], visible=bool(made["diff"]))

    def stop(self, request: gr.Request) -> str:
        """End what runs for this visitor."""
        self.service.jobs.stop(session_of(request))
        return fragments.say("Stopped. Analyze starts again, from what a public safetensors model has finished.")

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.service.jobs.stop(session_of(request))

    def search(self, words: str, shown: Shown | None) -> Any:
        """The rows of the table that hold all of these words."""
        return None if shown is None else table(shown[1], words)

    def csv(self, shown: Shown | None) -> Any:
        """The table as a file."""
        return shown and parcel(f"{file_name(shown)}.csv", "text/csv", frame(shown[1]).to_csv(index=False).encode())

    def parquet(self, shown: Shown | None) -> Any:
        """The table with whole spectra, as a file."""
        if shown is None:
            return None
        stream = io.BytesIO()
        frame(shown[1]).assign(singular_values=[m.singular_values for m in shown[1].matrices]).to_parquet(stream)
        return parcel(f"{file_name(shown)}.parquet", "application/vnd.apache.parquet", stream.getvalue())

    def json(self, shown: Shown | None) -> Any:
        """The report as a file."""
        return shown and parcel(f"{file_name(shown)}.json", "application/json", shown[1].to_json().encode())

    def whole(self, shown: Shown | None) -> Any:
        """The interactive page as a file."""
        return shown and parcel(f"{file_name(shown)}.html", "text/html", shown[1].page().encode())


RENDERED = 12


def folded(planned: str) -> str:
    """The plan after the work, to open again."""
    return f'<details class="lmd-folded"><summary>The plan</summary>{planned}</details>' if planned else ""


def find(rows: Any, key: str | None, name: Any) -> Any:
    """The row of that key, or `None`."""
    return next((row for row in rows if name(row) == key), None)


def frame(report: Any) -> Any:
    """The columns that the page shows, one row a matrix."""
    values = report.to_pandas()[list(COLUMNS)]
    return values.assign(shape=[f"{m.shape[0]} × {m.shape[1]}" for m in report.matrices])


def plot(figure: Any) -> Any:
    """A figure in its place, or nothing where there is none."""
    return gr.Plot(figure, visible=figure is not None)


def table(report: Any, words: str = "") -> Any:
    """The same, rounded to what can be read; with words only the rows that hold all of them."""
    values = frame(report)
    lines = [" ".join(map(str, row)).lower() for row in values.itertuples(index=False)]
    values = values.loc[[all(word in line for word in words.lower().split()) for line in lines]]
    values = values.assign(error_bound=values["error_bound"].map(fragments.bound))
    values = values.loc[:, [c for c in values if c not in ("stack", "part") or values[c].any()]]
    digits = {"effective_rank": 1, "stable_rank": 1, "capacity_log10": 2, "spectral_norm": 3}
    return (
        values.round(digits)
        .astype(object)
        .where(values.notna(), None)
        .rename(columns=lambda name: name.replace("_", " "))
    )


def parcel(name: str, mime: str, data: bytes) -> dict[str, str]:
    """A file for the browser to save: nothing of it stays here."""
    return {"name": name, "mime": mime, "base64": base64.b64encode(data).decode()}


def file_name(shown: Shown) -> str:
    """The model's id as part of a file name."""
    return shown[0].id.replace("/", "--")
