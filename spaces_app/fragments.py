"""Small pieces of the page, as HTML with every name escaped."""

import html
from decimal import ROUND_CEILING, Context
from typing import Any


HEADER = """
<header class="lmd-head"><h1>Inside a model’s weights</h1>
<p>Every weight matrix of a Hugging Face model, read as five factors: what it listens for, how sharply it separates,
where it writes. Choose a model; nothing is installed, and no code of a repository runs.</p></header>
"""
FOOTER = """
<footer class="lmd-foot"><p>Layer Matrix Decomposition, <a href="https://arxiv.org/abs/2309.05968">arXiv 2309.05968</a>.
Same numbers from a shell: <code>lmd-hf analyze org/model</code>. Public results are kept by commit for the next
visitor; nothing else is.</p></footer>
"""
JOBS = "https://huggingface.co/docs/huggingface_hub/guides/jobs"
NOTHING = '<p class="lmd-note">Choose a model and press Analyze.</p>'


def say(text: str, kind: str = "") -> str:
    """A line for the status, which screen readers read out."""
    return f'<p class="lmd-status {kind}" role="status">{html.escape(text)}</p>'


def note(text: str) -> str:
    """A line in small print."""
    return f'<p class="lmd-note">{text}</p>'


def waiting(before: int) -> str:
    """The place in the line."""
    told = "1 request is" if before == 1 else f"{before:,} requests are"
    return say(f"In line: {told} before this one …")


def progress(done: int, total: int, name: str) -> str:
    """A bar, and which matrix was finished last."""
    share = done / max(total, 1)
    return (
        f'<div class="lmd-status" role="status"><progress max="{total}" value="{done}" aria-label="Matrices done">'
        f"{share:.0%}</progress><span>{done:,} of {total:,} matrices <small>{html.escape(name)}</small></span></div>"
    )


def plan(planned: dict[str, Any]) -> str:
    """What would be done, in one paragraph, and what would be skipped."""
    share = planned["decomposed"] / planned["parameters"] if planned["parameters"] else 0
    share = share if share == 1 else min(share, 0.999)  # all of it only when nothing is missing
    seconds, fetched = planned["expected_seconds"] or 0, planned["bytes_to_fetch"] or 0
    rows = (
        ("matrices", f"{len(planned['matrices']):,}"),
        ("parameters covered", f"{planned['decomposed']:,} of {planned['parameters']:,} ({share:.1%})"),
        ("to fetch", f"{fetched / 1e6:,.1f} MB" if fetched else "nothing"),
        ("work", f"about {seconds:,.0f} s" if seconds >= 1 else "a second or less"),
        ("memory", f"{(planned['memory_bytes'] or 0) / 1e6:,.0f} MB"),
    )
    reasons: dict[str, int] = {}
    for item in planned["skipped"]:
        reasons[item["reason"]] = reasons.get(item["reason"], 0) + 1
    skipped = "".join(f"<li>{count:,} {html.escape(reason)}</li>" for reason, count in reasons.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in planned["notes"])
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    left = (
        f"<details><summary>Skipped: {len(planned['skipped']):,} tensors</summary><ul>{skipped}{notes}</ul></details>"
    )
    below = left if skipped or notes else ""
    return f'<div class="lmd-plan" role="region" aria-label="Plan"><dl>{cells}</dl>{below}</div>'


def refusal(told: str) -> str:
    """Why a model is too large for this hardware, with the command that runs it elsewhere."""
    text, _, command = told.rpartition(": ")
    return (
        f'<p class="lmd-status lmd-bad" role="status"><span>{html.escape(text)}: <code>{html.escape(command)}</code>, '
        f'on your machine or as a <a href="{JOBS}" target="_blank" rel="noopener">Hugging Face Job</a>.</span></p>'
    )


def facts(pairs: list[tuple[str, str]], heading: str) -> str:
    """Key figures of one thing."""
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in pairs)
    name = html.escape(heading)
    return f'<section class="lmd-facts" aria-label="{name}"><h2>{name}</h2><dl>{cells}</dl></section>'


def bound(value: float) -> str:
    """A bound with one digit, rounded up: what is shown bounds too."""
    return f"{float(Context(prec=1, rounding=ROUND_CEILING).create_decimal(repr(value))):.0e}"


def of_matrix(matrix: Any, heading: str) -> str:
    """Key figures of a matrix."""
    k = min(matrix.shape)

    def number(value: float | None, form: str = ",.1f") -> str:
        return "–" if value is None else format(value, form)

    return facts(
        [
            ("shape (out × in)", f"{matrix.shape[0]:,} × {matrix.shape[1]:,}"),
            ("effective rank", f"{number(matrix.effective_rank)} of {k:,}"),
            ("latent dimension n'", number(matrix.latent_dim, ",d")),
            ("stable rank", number(matrix.stable_rank)),
            ("spikes above noise", number(matrix.mp_spikes, ",d")),
            ("capacity, log₁₀ K", number(matrix.capacity_log10, ".2f")),
            ("stored as", f"{matrix.dtype}" if matrix.stored == "plain" else matrix.stored),
            ("error bound", bound(matrix.error_bound)),
        ],
        heading,
    )


def of_head(head: Any, heading: str) -> str:
    """The Hopfield reading of a head: similarity, separation, projection."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    pairs = [
        ("similarity: QK participation", number(head.qk_participation_ratio)),
        ("symmetric energy of QK", number(head.qk_symmetric_energy)),
        ("attraction of QK", number(head.qk_eigenvalue_score)),
        ("separation: inverse temperature", number(head.inverse_temperature)),
        ("projection: copying of OV", number(head.copying_score)),
        ("capacity, log₁₀ K", number(head.capacity_log10)),
    ]
    if head.hopfield_class:
        pairs.append(("class (Ramsauer et al.)", head.hopfield_class))
    return facts(pairs, heading)


def tokens(found: dict[str, Any]) -> str:
    """The directions of a head with the tokens nearest to them."""
    names = (
        ("reads", "reads"),
        ("reads_opposite", "reads, opposite"),
        ("writes", "writes"),
        ("writes_opposite", "writes, opposite"),
    )
    blocks = []
    for each in found["directions"]:
        rows = "".join(
            f'<tr><th scope="row">{label}</th><td>{_listed(each[name])}</td></tr>'
            for name, label in names
            if each[name]
        )
        blocks.append(
            f"<h3>Direction {each['index']} <small>strength {each['strength']:.3g}</small></h3>"
            f'<div class="lmd-scroll" tabindex="0" role="region" aria-label="Direction {each["index"]}">'
            f"<table>{rows}</table></div>"
        )
    lens = f'<p class="lmd-note">{html.escape(found["lens"])}</p>'
    return f'<section class="lmd-tokens" aria-label="Nearest tokens">{"".join(blocks)}{lens}</section>'


def _listed(pairs: Any) -> str:
    return " ".join(
        f"<code>{html.escape(repr(token)[1:-1])}</code><small>{value:.2f}</small>" for token, value in pairs
    )


def proposal(made: dict[str, Any]) -> str:
    """What became of a pull request, or would."""
    words = {
        "written": "Done",
        "drafted": "This is what a pull request would change",
        "left": "Left alone",
        "failed": "Failed",
    }
    told = f"{words[made['status']]}: {made['reason']}."
    url = made["url"]
    link = f' <a href="{html.escape(url)}" target="_blank" rel="noopener">{html.escape(url)}</a>' if url else ""
    return f'<p class="lmd-status" role="status">{html.escape(told)}{link}</p>'
