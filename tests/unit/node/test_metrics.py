"""What a node tells Prometheus, read by a parser that takes only what the format and the naming rules allow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from formation.core.clock import Clock
from formation.core.ids import NodeId
from formation.node.exposition import CONTENT_TYPE, Page
from formation.node.metrics import FAMILIES, FDS, RSS, STARTED, peers_by_score, put_process
from formation.p2p.service import PeerScore
from tests.unit.node.nodes import running

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
_PAIR = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
SAMPLE = re.compile(rf"(?P<name>[a-z_]+)(?:\{{(?P<labels>{_PAIR}(?:,{_PAIR})*)\}})? (?P<value>\S+)")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
# Ratios, counts and words that are no units may end a name; these are not base units.
NOT_BASE_UNITS = ("_ms", "_milliseconds", "_minutes", "_kib", "_mib", "_kilobytes", "_percent", "_ns", "_s")
SERIES_COUNT_MAX = 400


def parse(text: str) -> dict[str, dict[str, float]]:
    """{family: {name and labels of a sample: value}}; refuses what Prometheus or its linter would."""
    assert text.endswith("\n")
    families: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    helped = current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, helped, words = line.split(" ", 3)
            assert words.strip()
            assert helped not in families, f"{helped} comes twice"
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current == helped, "HELP comes right before TYPE"
            assert kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == current.endswith("_total"), current
            assert not current.endswith(NOT_BASE_UNITS), current
            families[current], kinds[current] = {}, kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            suffix = match["name"].removeprefix(current)
            assert suffix in (("_bucket", "_sum", "_count") if kinds[current] == "histogram" else ("",)), line
            labels = [name for name, _ in LABEL.findall(match["labels"] or "")]
            assert len(set(labels)) == len(labels), line
            assert "le" not in labels or suffix == "_bucket", line
            key = line.rpartition(" ")[0]
            assert key not in families[current], f"{key} comes twice"
            families[current][key] = float(match["value"])
    return families


async def test_a_running_node_tells_all_of_it(tmp_path: Path, jumping_clock: Clock) -> None:
    """Over its API, in the form and under the names that Prometheus wants, and no more series than a node may have."""
    async with running(tmp_path) as nodes:
        await nodes.boot()
        answer = await nodes.client().get("/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"] == CONTENT_TYPE
        families = parse(answer.body.decode())
        assert families["formation_kad_lookups_total"].keys() == {
            f'formation_kad_lookups_total{{outcome="{outcome}"}}' for outcome in ("found", "ended", "timed_out")
        }
        assert families["formation_kad_is_server"] == {"formation_kad_is_server": 1}
        assert families["formation_vms"]['formation_vms{phase="running"}'] == 1
        labelled = {family.name for family in FAMILIES if family.labels}
        assert {family.name for family in FAMILIES} - labelled <= set(families)
        assert families["formation_state_voters"]['formation_state_voters{state="online"}'] >= 1
        assert sum(len(samples) for samples in families.values()) < SERIES_COUNT_MAX


def test_no_label_names_a_peer_an_account_or_a_machine() -> None:
    """Anybody can make any number of them."""
    fixed = {"state", "score", "reason", "direction", "protocol", "topic", "level", "phase", "version", "outcome", "owner"}
    assert {label for family in FAMILIES for label in family.labels} == fixed


async def test_the_process_is_described() -> None:
    """Under the names that every exporter gives."""
    page = Page()
    put_process(page)
    families = parse(page.text(FAMILIES))
    assert families[RSS.name][RSS.name] > 1 << 20
    assert families[FDS.name][FDS.name] > 2
    assert families[STARTED.name][STARTED.name] > 1e9
    await trio.lowlevel.checkpoint()


def test_peers_are_counted_by_range_of_score() -> None:
    """Each once; a ban counts more than a number."""

    def peer(score: float, banned_for_s: float = 0.0) -> PeerScore:
        return PeerScore(
            node_id=NodeId("x"), score=score, offence_count=1, last_offence="", banned_for_s=banned_for_s, refusal=None
        )

    scores = (peer(-60), peer(-50), peer(-49), peer(-1), peer(0), peer(-99, 5.0))
    assert peers_by_score(scores) == {"banned": 1, "-100 to -50": 1, "-50 to -10": 2, "-10 to 0": 1, "0": 1}


def document_lines() -> list[str]:
    rows = ["| name | kind | labels | |", "|---|---|---|---|"]
    return rows + [
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.help} |"
        for family in FAMILIES
    ]


def test_the_document_lists_what_there_is() -> None:
    """To mend it, put this test's lines there."""
    assert "\n".join(document_lines()) in DOCUMENT.read_text(), "\n" + "\n".join(document_lines())


@pytest.mark.parametrize(
    "text",
    [
        "# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n",
        "# HELP a x\n# TYPE a counter\na 1\n",
        "# HELP a x\n# TYPE a gauge\na 1\na 2\n",
        "# HELP a x\n# TYPE a gauge\na{b=1} 1\n",
        "# HELP a x\n# TYPE a gauge\nc 1\n",
        "# HELP a x\n# TYPE a gauge\na 1",
    ],
    ids=["unit", "counter", "twice", "label", "other", "end"],
)
def test_the_parser_refuses_what_prometheus_would(text: str) -> None:
    """Else it shows nothing."""
    with pytest.raises(AssertionError):
        parse(text)
