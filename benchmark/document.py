"""Writes the tables of docs/benchmarks.md and README.md from the newest results that are kept.

    python -m benchmark document [--check]

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what is around it is
written by hand. Results are looked for in benchmark/results/DATE, the newest date that has them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark import report

RESULTS = Path(__file__).parent / "results"
PROJECT = Path(__file__).parent.parent
PAGES = ("docs/benchmarks.md", "README.md")
BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)

Figures = dict[str, Any]


def table(columns: str, rows: list[list[str]]) -> str:
    """A Markdown table; `columns` separated by ``|``."""
    head = [column.strip() for column in columns.split("|")]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def span(middle: float, low: float, high: float, digits: int) -> str:
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def origin(result: Figures, command: str) -> str:
    """The line above a table: what wrote it, when and from which state of the code."""
    at = result["environment"]
    return f"`{command}`, commit {at['commit']}, {at['cores']} cores:\n\n"


def milliseconds(arm: Figures) -> list[str]:
    """Samples, then median and quartiles of an arm in milliseconds."""
    if not arm.get("samples"):
        return ["0", "-"]
    return [str(arm["samples"]), span(*(1e3 * arm[k] for k in ("median", "p25", "p75")), 0)]


# One result each ----------------------------------------------------------------------------------


def serve(result: Figures) -> str:
    ours, stock = result["ours"], result["stock"]
    rows = [["recompute, stock SGLang", *milliseconds(stock["recompute"])]]
    rows.append(["recompute", *milliseconds(ours["recompute"])])
    rows.append(["device hit, stock SGLang", *milliseconds(stock["device"])])
    rows += [[f"{level} hit", *milliseconds(ours[level])] for level in ("host", "device")]
    ratios = [[name, f"{value:.2f}"] for name, value in result["ratios"].items()]
    return (
        origin(result, "python -m benchmark.serve")
        + table("arm | samples | TTFT, ms: median (quartiles)", rows)
        + "\n"
        + table("ratio of medians | measured", ratios)
    )


def readme(result: Figures) -> str:
    ours, stock = result["ours"], result["stock"]
    rows = [
        ["nowhere: recompute", ours["recompute"]],
        ["host level", ours["host"]],
        ["device level", ours["device"]],
        ["device level, stock SGLang (`torch_native`)", stock["device"]],
    ]
    return table(
        "where the prefix was found | TTFT",
        [[name, f"{1e3 * arm['median']:,.0f} ms"] for name, arm in rows],
    )


def advise(result: Figures) -> str:
    names = {
        "symphony recompute": "recompute",
        "hicache storage": "stock HiCache, from its files",
        "symphony storage": "ours, no hint",
        "symphony device": "device hit",
    }
    hints = sorted(
        (float(name.rsplit(" ", 1)[1]), name) for name in result["arms"] if " advised " in name
    )
    for seconds, name in hints:
        names[name] = f"advised {seconds:g} s before"
    rows = [[text, *milliseconds(result["arms"][name])] for name, text in names.items()]
    ratios = []
    for name, value in result["ratios"].items():
        goal = result["goals"].get(name, {})
        ratios.append([name, f"{value:.2f}", goal.get("goal", "")])
    return (
        origin(result, f"python -m benchmark.advise --rounds {result['rounds']}")
        + table("arm | samples | TTFT, ms: median (quartiles)", rows)
        + "\n"
        + table("ratio of medians | measured | goal", ratios)
    )


def advise_cost(result: Figures) -> str:
    kinds = result["summary"]
    rows = []
    for name, first in kinds["turns"].items():
        digits = 4 if name == "step_share" else 0
        figures = [
            span(values["median"], values["min"], values["max"], digits)
            for values in (kinds[kind][name] for kind in ("turns", "storm"))
        ]
        rows.append([name.replace("_", " "), *figures, str(first.get("goal", ""))])
    seconds = result["settings"]["seconds"]
    hints = [
        f"{median([one['hints'] / seconds for one in result['rounds'][kind]]):.0f}"
        for kind in ("turns", "storm")
    ]
    rows.append(["hints a second", *hints, ""])
    return origin(result, "python -m benchmark.advise_cost") + table(
        "figure, median (low to high) | a hint for each turn | a storm of hints | goal at most",
        rows,
    )


def store(result: Figures) -> str:
    rows = []
    for size, arms in result["samples"].items():
        for direction in ("read", "write"):
            ours = arms["store, interval"][direction]
            disk, files = arms["fio"][direction], arms["SGLang file backend"][direction]
            pairs = ((ours, disk), (ours, files), (disk, files))
            cells = [ratio([speeds(one), speeds(other)]) for one, other in pairs]
            cpu = median([sample["cpu_seconds_per_gigabyte"] for sample in ours])
            rows.append([f"{size}, {direction}", *cells, f"{cpu:.2f}"])
    return origin(result, f"python -m benchmark.store --rounds {result['rounds']}") + table(
        "pages | store / fio | store / file backend | fio / file backend | CPU s/GB", rows
    )


def store_serve(result: Figures) -> str:
    rows = [[name, *milliseconds(arm)] for name, arm in result["arms"].items()]
    ratios = [
        [name, span(value["median"], value["lowest"], value["highest"], 2)]
        for name, value in result["ratios"].items()
    ]
    return (
        origin(result, "python -m benchmark.store_serve")
        + table("found in | samples | TTFT, ms: median (quartiles)", rows)
        + "\n"
        + table("ratio within a round | median (low to high)", ratios)
    )


def routing(result: Figures) -> str:
    rows = [
        [name, *(f"{times[key]:.0f}" for key in ("p50", "p90", "p99"))]
        for name, times in result["decide_microseconds"].items()
    ]
    bytes_a_page = ", ".join(
        f"{one['resident_bytes_per_page']:.0f} ({one['workers']} workers)"
        for one in result["memory"]
    )
    options = result["options"]
    return (
        origin(result, "python -m benchmark.routing")
        + table("policy | P50, µs | P90 | P99", rows)
        + f"\n{options['workers']} workers, prompts of {options['tokens']:,} tokens, "
        f"{result['index_pages']:,} pages in the index; bytes a page: {bytes_a_page}.\n"
    )


def router(result: Figures) -> str:
    rows = []
    for load, arms in result["loads"].items():
        for arm, figures in arms.items():
            if arm == "direct":
                continue
            cells = [load, arm]
            for key in ("added_first_p50_ms", "added_first_p99_ms"):
                one = figures[key]
                cells.append(span(one["median"], one["low"], one["high"], 2))
            cells.append(f"{figures['requests_per_second']['median']:,.0f}")
            cells.append(f"{figures['chunks_per_second']['median']:,.0f}")
            rows.append([*cells, f"{figures['processor_us_per_request']['median']:,.0f}"])
    goals = [
        [name, span(*(one["value"][k] for k in ("median", "low", "high")), 2), one["goal"]]
        for name, one in result["goals"].items()
    ]
    return (
        origin(result, f"python -m benchmark.router --rounds {result['rounds']}")
        + table(
            "load | router | first byte added, ms: P50 | P99 | requests/s | chunks/s "
            "| CPU µs a request",
            rows,
        )
        + "\n"
        + table("goal | measured | goal", goals)
    )


def migrate(result: Figures) -> str:
    rows = []
    for row in result["rows"]:
        ways = {way: [s[0] for s in samples] for way, samples in row["samples"].items()}
        raw = max((way for way in ways if way.startswith("raw")), key=lambda way: median(ways[way]))
        for way, values in ways.items():
            cells = [f"{row['page']}, {row['megabytes']} MB", way]
            cells.append(span(median(values), min(values), max(values), 2))
            cells.append(ratio([values, ways[raw]]))
            cpu = median([sample[1] for sample in row["samples"][way]])
            rows.append([*cells, f"{cpu:.2f}"])
    return origin(result, f"python -m benchmark.migrate --rounds {result['rounds']}") + table(
        "pages, volume | way | GB/s | of the faster raw TCP | CPU s/GB", rows
    )


def migrate_serve(result: Figures) -> str:
    rows = []
    for name, values in result["summary"].items():
        digits = 0 if name.startswith("moves") else 3
        figures = span(values["median"], values["min"], values["max"], digits)
        rows.append([name.replace("_", " "), figures, str(values.get("goal", ""))])
    return origin(result, "python -m benchmark.migrate_serve") + table(
        "figure | median (low to high) | goal at most", rows
    )


def median(values: list[float]) -> float:
    return statistics.median(values)


def speeds(samples: list[Figures]) -> list[float]:
    return [sample["gigabytes_per_second"] for sample in samples]


def ratio(pair: list[list[float]]) -> str:
    """Median, lowest and highest of the ratio within a round."""
    ratios = [one / other for one, other in zip(*pair, strict=True)]
    return span(median(ratios), min(ratios), max(ratios), 2)


RENDERERS: dict[str, Callable[[Figures], str]] = {
    "serve": serve,
    "readme": readme,
    "advise": advise,
    "advise-cost": advise_cost,
    "store": store,
    "store-serve": store_serve,
    "routing": routing,
    "router": router,
    "migrate": migrate,
    "migrate-serve": migrate_serve,
}
# Tables drawn from another result than the one of their name.
SOURCES = {"readme": "serve"}


# Finding and writing ------------------------------------------------------------------------------


def newest(name: str, results: Path = RESULTS) -> Path | None:
    """The newest result of a benchmark, or of a scenario."""
    name = SOURCES.get(name, name)
    for day in sorted((path for path in results.iterdir() if path.name[:2] == "20"), reverse=True):
        for path in (day / f"{name.replace('-', '_')}.json", day / name / report.SUMMARY_NAME):
            if path.exists():
                return path
    return None


def block(name: str, results: Path = RESULTS) -> str:
    """The table of this name.

    Raises:
        ValueError: there is no result for it.
    """
    path = newest(name, results)
    if path is None:
        raise ValueError(f"table {name!r}: no result of this name in {results}")
    result = json.loads(path.read_text())
    if name in RENDERERS:
        return RENDERERS[name](result)
    return str(report.markdown(result))


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every table written anew."""
    return BLOCK.sub(lambda found: found[1] + block(found[2], results) + found[4], text)


def write_pages(*, check: bool) -> list[str]:
    """Names of the pages that were not up to date; without `check` they are now."""
    stale = []
    for name in PAGES:
        path = PROJECT / name
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    return stale
