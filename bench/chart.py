"""Bars as SVG, drawn by hand: readable on light and on dark pages, with every number written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 720
LABELS = 130  # left of the bars
NUMBERS = 110  # right of them
BAR, GAP, TITLE, MARGIN = 14, 5, 24, 12

# Colors of bars: ours, then peers. The page's own colors are unknown, so the background stays transparent.
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.n{fill:#59636e;font-weight:400}
.b0{fill:#0969da}.b1{fill:#8250df}.b2{fill:#8c959f}.b3{fill:#afb8c1}.b4{fill:#d0d7de}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.n{fill:#9198a1}
.b0{fill:#4493f8}.b1{fill:#ab7df8}.b2{fill:#9198a1}.b3{fill:#656c76}.b4{fill:#3d444d}}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One number.

    Attributes:
        label: left of it.
        value: its length.
        text: right of it.
        color: 0 is ours, 1 another variant of ours, 2 and more are peers.
    """

    label: str
    value: float
    text: str
    color: int


@dataclass(frozen=True, slots=True)
class Group:
    """Bars of one unit; each group has a scale of its own.

    Attributes:
        title: above them.
        note: after the title, in a quieter color.
        bars: from top to bottom.
    """

    title: str
    note: str
    bars: Sequence[Bar]


def chart(groups: Sequence[Group]) -> str:
    """The SVG document."""
    parts: list[str] = []
    y = MARGIN
    for group in groups:
        note = f'<tspan class="n" dx="8">{escape(group.note)}</tspan>' if group.note else ""
        parts.append(f'<text class="t" x="{MARGIN}" y="{y + 12}">{escape(group.title)}{note}</text>')
        y += TITLE
        longest = max((bar.value for bar in group.bars), default=0.0) or 1.0
        for bar in group.bars:
            length = max(1.0, bar.value / longest * (WIDTH - LABELS - NUMBERS - 2 * MARGIN))
            base = y + BAR - 2
            left = MARGIN + LABELS
            parts += [
                f'<text x="{left - 8}" y="{base}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect class="b{bar.color}" x="{left}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>',
                f'<text x="{left + length + 6:.1f}" y="{base}">{escape(bar.text)}</text>',
            ]
            y += BAR + GAP
        y += MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])
