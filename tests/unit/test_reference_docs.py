"""The reference pages say what the code says.

``SYMPHONY_UPDATE_DOCS=1 pytest tests/unit/test_reference_docs.py`` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import route_reference
from symphony_sglang import config
from symphony_sglang.errors import ConfigError
from symphony_sglang.launch_server import split_arguments
from symphony_sglang.telemetry import metrics

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGES = {
    "metrics.md": metrics.reference,
    "flags.md": config.reference,
    "routes.md": route_reference.reference,
}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_up_to_date(name: str) -> None:
    render: Callable[[], str] = PAGES[name]
    path = REFERENCE / name
    if os.environ.get("SYMPHONY_UPDATE_DOCS"):
        path.write_text(render())
    assert path.read_text() == render(), f"{name}: run this test with SYMPHONY_UPDATE_DOCS=1"


def test_every_declared_metric_stands_in_the_page_once() -> None:
    page = metrics.reference()
    for metric in (*metrics.declared(metrics.Worker), *metrics.declared(metrics.Router)):
        assert page.count(f"| `{metric.name}` |") == 1


def test_flags_of_the_page_are_flags_that_the_launcher_takes() -> None:
    rows = [line for line in config.reference().splitlines() if line.startswith("| `--")]
    assert len(rows) == len(config.SymphonyConfig.__dataclass_fields__)
    for row in rows:
        for spelling in row.split(" | ")[0].strip("| ").split(", "):
            words = spelling.strip("`").split()
            if len(words) > 1:
                # The default is always in range; an empty one stands for text.
                default = row.split(" | ")[2].strip("` ")
                words[1] = default or "a-path-or-a-secret-long-enough"
            _, rest = split_arguments([*words, "--model-path", "m"])
            assert rest == ["--model-path", "m"], spelling


def test_route_that_nothing_is_said_about_fails_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = route_reference.router_routes()
    new = route_reference.Served("router", "GET", "/new", "none")
    monkeypatch.setattr(route_reference, "router_routes", lambda: [*routes, new])
    with pytest.raises(ConfigError, match="no words about GET /new"):
        route_reference.reference()
    gone = [route for route in routes if route.path != "/workers"]
    monkeypatch.setattr(route_reference, "router_routes", lambda: gone)
    with pytest.raises(ConfigError, match="words about GET /workers, which nobody serves"):
        route_reference.reference()


def test_page_says_which_key_a_route_wants() -> None:
    keys = {(route.server, route.path): route.key for route in route_reference.router_routes()}
    assert keys["router", "/health"] == keys["router", "/symphony/ui"] == "none"
    assert keys["router", "/generate"] == keys["router", "/symphony/advise"] == "caller"
    assert keys["router", "/workers/{id}/drain"] == keys["router", "/symphony/migrate"] == "control"
    open_ones = [route.path for route in route_reference.worker_routes() if route.key == "none"]
    assert open_ones == ["/symphony/ui"]
