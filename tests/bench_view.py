"""What the benchmark found, as a Markdown table and as an SVG plot: figures in, text out.

A result has "values", by the key of a row or point and then by competitor: a list, one figure (s or 1/s) a round.
"""

import itertools
import math
import statistics
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

Result = Mapping[str, Any]
Rounds = Mapping[str, Sequence[float]]  # by competitor

GREY = "#768390"  # of text and lines; on white and on black all of these can be read, and there is no background
COLOURS = {"direct": GREY, "nginx": "#d97706", "plexus_lite": "#3b82f6"}  # all competitors
WIDTH, HEIGHT, LEFT, ABOVE, BELOW, GAP = 960, 370, 58, 104, 76, 74  # of the plot; around and between its panels


class Row(NamedTuple):
    key: str
    title: str
    factor: float = 1e6  # from the unit in which it is kept (s, 1/s) to the one in which it is shown
    more_is_better: bool = False


class Panel(NamedTuple):
    """A curve's points are values of the keys "<key>_p50@<x>" and "<key>_p99@<x>"."""

    key: str
    title: str
    x_title: str
    values: Sequence[int]


def names_of(result: Result) -> List[str]:
    return [name for name in COLOURS if name != "nginx" or result["nginx"]]


def heading(result: Result) -> str:
    nginx = f"nginx {result['nginx']}" if result["nginx"] else "nginx is not installed: skipped"
    return "{date}; {machine}; {python}; {}; plexus_lite {plexus_lite}".format(nginx, **result)


def figure(row: Row, values: Sequence[float]) -> str:
    shown = statistics.median(values) * row.factor if values else math.nan
    return "-" if not values else f"{shown:,.0f}" if shown >= 100 else f"{shown:.3g}"


def ratio(values: Rounds) -> str:
    """plexus_lite's figure over nginx's: the median of the rounds' ratios."""
    ratios = [ours / theirs for ours, theirs in zip(values.get("plexus_lite", ()), values.get("nginx", ())) if theirs]
    return f"{statistics.median(ratios):.3g}" if ratios else "-"


def change(row: Row, values: Rounds, then: Rounds) -> str:
    """plexus_lite's median over the one then; what differs by more than a tenth is named."""
    if "plexus_lite" not in values or "plexus_lite" not in then:
        return "-"
    factor = statistics.median(values["plexus_lite"]) / statistics.median(then["plexus_lite"])
    loss = 1 / factor if row.more_is_better else factor
    return f"{factor:.2f}" + (" worse" if loss > 1.1 else " better" if loss < 1 / 1.1 else "")


def render_table(rows: Sequence[Row], result: Result, then: Optional[Result] = None) -> str:
    """A Markdown table with aligned columns: a row for each figure; the problems below."""
    names = names_of(result)
    table = [[f"median of {result['rounds']} rounds", *names, *(["x nginx"] if result["nginx"] else [])]]
    table[0] += [f"x {then['date']}"] if then else []
    for row in rows:
        values = result["values"].get(row.key, {})
        table.append([row.title, *(figure(row, values.get(name, ())) for name in names)])
        table[-1] += [ratio(values)] if result["nginx"] else []
        table[-1] += [change(row, values, then["values"].get(row.key, {}))] if then else []
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in cells] + ["PROBLEM: " + one for one in result["problems"]]
    )


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def draw_curve(name: str, part: str, spots: Sequence[Tuple[float, float]]) -> Iterator[str]:
    is_main, colour = part == "p50" and name != "direct", COLOURS[name]
    style = f'stroke-width="{2.2 if is_main else 1.2}"' + (' stroke-dasharray="4 3"' if part == "p99" else "")
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    yield f'<polyline points="{places}" fill="none" stroke="{colour}" {style}/>'
    if is_main:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots)


def draw(panels: Sequence[Panel], result: Result) -> str:
    """SVG: a panel each, side by side, both axes logarithmic; each point is the median of the rounds."""
    names = names_of(result)
    width = (WIDTH - LEFT - 24 - GAP * (len(panels) - 1)) / len(panels)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="{GREY}"',
        ' font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif">',
        text(14, 26, "How the cost of standing in the middle grows", ' font-size="16" font-weight="600"'),
        text(14, HEIGHT - 10, f"{heading(result)}; medians of {result['rounds']} rounds"),
    ]
    x = 17.0
    for name in reversed(names):
        out += draw_curve(name, "p50", [(x, 46), (x + 22, 46)])
        out.append(text(x + 30, 50, "direct: the benchmark's own share" if name == "direct" else name))
        x += 56 + 6 * len(name)
    out.append(text(WIDTH - 24, 50, "solid p50, dashed p99", ' text-anchor="end"'))
    for place, panel in enumerate(panels):
        out.append(f'<g transform="translate({LEFT + place * (width + GAP):.1f} {ABOVE})">')
        out += [*draw_panel(panel, names, result["values"], width, HEIGHT - ABOVE - BELOW), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def draw_panel(
    panel: Panel, names: Sequence[str], values: Mapping[str, Rounds], width: float, height: float
) -> Iterator[str]:
    curves: Dict[Tuple[str, str], List[Tuple[int, float]]] = {}
    for name, part in [("direct", "p50"), *itertools.product(names[1:], ("p99", "p50"))]:  # the last one is on top
        points = [(x, values.get(f"{panel.key}_{part}@{x}", {}).get(name)) for x in panel.values]
        curves[name, part] = [(x, statistics.median(rounds)) for x, rounds in points if rounds]
    seconds = [y for curve in curves.values() for _, y in curve] or [1.0]
    low = math.floor(math.log10(min(seconds)))
    high = max(low + 1, math.ceil(math.log10(max(seconds))))
    first, last = math.log10(panel.values[0]), math.log10(panel.values[-1])

    def place(x: float, y: float) -> Tuple[float, float]:
        across, up = (math.log10(x) - first) / (last - first), (math.log10(y) - low) / (high - low)
        return across * width, (1 - up) * height

    yield text(0, -14, panel.title, ' font-size="12" font-weight="600"')
    for decade in range(low, high + 1):
        y = place(1, 10.0**decade)[1]
        yield f'<path d="M0 {y:.1f}h{width:.1f}" stroke="{GREY}" stroke-opacity=".3"/>'
        amount, unit = 10 ** (decade % 3), {-3: "ns", -2: "\u00b5s", -1: "ms"}.get(decade // 3, "s")
        yield text(-7, y + 4, f"{amount} {unit}", ' text-anchor="end"')
    for value in panel.values:
        x = place(value, 10.0**low)[0]
        yield f'<path d="M{x:.1f} {height}v4" stroke="{GREY}"/>'
        short = f"{value // 1_000_000}M" if value >= 1_000_000 else f"{value // 1000}k" if value >= 1000 else str(value)
        yield text(x, height + 17, short, ' text-anchor="middle"')
    yield text(width / 2, height + 36, panel.x_title, ' text-anchor="middle"')
    for (name, part), curve in curves.items():
        yield from draw_curve(name, part, [place(x, y) for x, y in curve])
