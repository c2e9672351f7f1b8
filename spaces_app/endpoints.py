"""The named endpoints, for `gradio_client`, `curl` and MCP: JSON types in, JSON types out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from catalogue import Subject
from service import Service, last, session_of

import lmd_hf


@dataclass(frozen=True)
class Endpoints:
    """One method each, its docstring the endpoint's description. A visitor who is signed in, or a client with
    `oauth_token=`, also reaches what is private to them."""

    service: Service

    def all(self) -> dict[str, Callable[..., Any]]:
        """{name: function}."""
        names = (
            "plan",
            "analyze",
            "compare",
            "card",
            "summary",
            "map",
            "spectrum",
            "factors",
            "directions",
            "page",
            "search",
        )
        return {name: getattr(self, name) for name in names}

    def plan(
        self, model: str, revision: str = "", request: gr.Request = None, token: gr.OAuthToken | None = None
    ) -> dict[str, Any]:
        """What an analysis would do, from headers alone: matrices, coverage, time, memory, bytes, and what is skipped.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            revision: a branch, tag or commit; main if empty
        """
        return self.service.plan(self.service.look(model, revision, token), session_of(request))

    def analyze(
        self, model: str, revision: str = "", request: gr.Request = None, token: gr.OAuthToken | None = None
    ) -> dict[str, Any]:
        """Decompose every weight matrix of a model; the whole report (schema lmd-report/1).

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            revision: a branch, tag or commit; main if empty
        """
        return self._report(self.service.look(model, revision, token), request).to_dict()

    def compare(
        self,
        base: str,
        tuned: str,
        base_revision: str = "",
        tuned_revision: str = "",
        request: gr.Request = None,
        token: gr.OAuthToken | None = None,
    ) -> dict[str, Any]:
        """What changed from one model to another, matrix by matrix (schema lmd-compare/1).

        Args:
            base: the earlier model
            tuned: the later model
            base_revision: of the base; main if empty
            tuned_revision: of the tuned model; main if empty
        """
        sides = self.service.look(base, base_revision, token), self.service.look(tuned, tuned_revision, token)
        return last(self.service.comparison(*sides, session_of(request))).to_dict()

    def card(
        self, model: str, revision: str = "", request: gr.Request = None, token: gr.OAuthToken | None = None
    ) -> str:
        """The model-card section of a model, as Markdown.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            revision: a branch, tag or commit; main if empty
        """
        return self._report(self.service.look(model, revision, token), request).card()

    def summary(
        self, model: str, revision: str = "", request: gr.Request = None, token: gr.OAuthToken | None = None
    ) -> str:
        """The findings in a few plain lines of text.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            revision: a branch, tag or commit; main if empty
        """
        return self._report(self.service.look(model, revision, token), request).summary()

    def spectrum(
        self,
        model: str,
        name: str,
        part: str = "",
        revision: str = "",
        request: gr.Request = None,
        token: gr.OAuthToken | None = None,
    ) -> dict[str, Any]:
        """All numbers of one matrix, its singular values among them.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            name: the matrix, as the report calls it
            part: which of several matrices in one tensor
            revision: a branch, tag or commit; main if empty
        """
        row = self._row(self._report(self.service.look(model, revision, token), request), name, part)
        return {**dataclasses.asdict(row), "singular_values": row.singular_values.tolist(), "topology_spectrum": None}

    def factors(
        self,
        model: str,
        name: str,
        part: str = "",
        revision: str = "",
        request: gr.Request = None,
        token: gr.OAuthToken | None = None,
    ) -> dict[str, Any]:
        """The five factors of one matrix as block means, and the relative error that a cut at each n' leaves.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            name: the matrix, as the report calls it
            part: which of several matrices in one tensor
            revision: a branch, tag or commit; main if empty
        """
        subject = self.service.look(model, revision, token)
        row = self._row(self._report(subject, request), name, part)
        found = self.service.pieces(subject, f"{row.name} {row.part}", row.layer, session_of(request))
        return {**found.to_dict(), "error": [found.error(cut) for cut in range(1, len(found.s_K) + 1)]}

    def directions(
        self,
        model: str,
        part: str,
        layer: int = 0,
        revision: str = "",
        request: gr.Request = None,
        token: gr.OAuthToken | None = None,
    ) -> dict[str, Any]:
        """The tokens nearest to what a head or a matrix reads and writes.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            part: such as "head 2" or "down"
            layer: counted from 0
            revision: a branch, tag or commit; main if empty
        """
        return self.service.tokens(self.service.look(model, revision, token), part, layer, session_of(request))

    def page(
        self, model: str, revision: str = "", request: gr.Request = None, token: gr.OAuthToken | None = None
    ) -> str:
        """The whole report as one interactive HTML page that stands alone.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            revision: a branch, tag or commit; main if empty
        """
        return self._report(self.service.look(model, revision, token), request).page()

    def search(self, words: str = "") -> list[str]:
        """Models whose names fit: those that are always here, then the Hub's.

        Args:
            words: a part of the name
        """
        return self.service.catalogue.suggest(words)

    def map(
        self,
        model: str,
        measure: str = "effective rank / k",
        revision: str = "",
        request: gr.Request = None,
        token: gr.OAuthToken | None = None,
    ) -> list[dict[str, Any]]:
        """One measure of every matrix, with its layer and role.

        Args:
            model: a Hub id (org/name), or a model that the Space was started with
            measure: "effective rank / k", "latent dimension n'", "stable rank", "capacity, log₁₀ K" …
            revision: a branch, tag or commit; main if empty
        """
        measures = lmd_hf.interactive.MEASURES
        if measure not in measures:
            raise gr.Error(f"There is no measure “{measure}”; known: {', '.join(measures)}.", print_exception=False)
        report = self._report(self.service.look(model, revision, token), request)
        return [
            {"name": m.name, "part": m.part, "layer": m.layer, "stack": m.stack, "block": m.block, "role": m.role,
             "value": measures[measure](m)}
            for m in report.matrices
        ]  # fmt: skip

    def _report(self, subject: Subject, request: gr.Request | None) -> Any:
        return last(self.service.analysis(subject, session_of(request)))

    def _row(self, report: Any, name: str, part: str) -> Any:
        found = [row for row in report.matrices if row.name == name and part in ("", row.part)]
        if not found:
            told = f"{report.model.id} has no matrix {name}; /analyze lists them."
            raise gr.Error(told, print_exception=False)
        return found[0]
