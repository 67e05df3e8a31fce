"""Every Python block of the README and of docs/ runs, in order, file by file."""

import re
import textwrap
from pathlib import Path

import pytest

from bayespass.rules import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return [textwrap.dedent(code) for _, code in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(registry._RULES)
    namespace = {}
    try:
        for code in blocks(page):
            if "transformers" in code:
                pytest.importorskip("transformers")
            exec(compile(code, str(page), "exec"), namespace)
    finally:
        registry._RULES.clear()
        registry._RULES.update(before)


def test_the_readme_has_code_and_local_links_exist():
    assert blocks(ROOT / "README.md")
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_docstrings_link_to_headings_that_exist():
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "assumptions.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    used = set()
    for file in (ROOT / "src").rglob("*.py"):
        used |= set(re.findall(r"docs/assumptions\.md#([a-z-]+)", file.read_text(encoding="utf-8")))
    assert used
    assert used <= anchors


def test_the_readme_table_is_the_result_file():
    """`make benchmark-demo` wrote both; a number typed by hand would differ."""
    import json

    import readme

    result = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.with_table(text, readme.demo_table(result)) == text


def test_shares_of_a_gap_are_of_means_over_seeds_with_their_jackknife_error():
    from readme import shares_closed

    def runs(*aurcs):
        names = ("map", "one", "mc")
        return [
            {
                "predictors": [
                    {"predictor": n, "scores": {"aurc": {"value": v}}} for n, v in zip(names, row, strict=True)
                ]
            }
            for row in aurcs
        ]

    shares = shares_closed(runs((5, 4, 3), (6, 4, 3), (7, 4, 4)))  # gains 1, 2, 3 of gaps 2, 3, 3
    left_out = [5 / 6, 4 / 5, 3 / 5]
    middle = sum(left_out) / 3
    error = (2 / 3 * sum((share - middle) ** 2 for share in left_out)) ** 0.5
    assert shares["one"] == pytest.approx((6 / 8, error))
    assert shares["mc"] == pytest.approx((1, 0))
    assert set(shares_closed(runs((5, 4, 3), (5, 4, 6), (5, 4, 5))).values()) == {None}  # gaps 2, -1, 0
    assert set(shares_closed(runs((5, 4, 3))).values()) == {None}


def test_the_coverage_page_is_made_from_the_registry_and_the_result_file():
    """`make coverage-page` wrote it; a rule that changes, or a new benchmark run, must change it."""
    import json

    import coverage_page

    result = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text(encoding="utf-8"))
    assert coverage_page.PAGE.read_text(encoding="utf-8") == coverage_page.page(result)
    assert not [row for row in result["table"] if row["status"] == "fails"]


def test_the_post_hoc_tables_are_the_result_file():
    """`make benchmark-post-hoc` wrote them."""
    import json

    import post_hoc_pages

    text = (ROOT / "docs" / "post_hoc.md").read_text(encoding="utf-8")
    result = json.loads(post_hoc_pages.RESULT.read_text(encoding="utf-8"))
    assert post_hoc_pages.with_tables(text, post_hoc_pages.page(result)) == text


def test_the_fidelity_tables_are_the_result_file():
    """`make benchmark-fidelity` wrote them."""
    import json

    import fidelity_pages

    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    result = json.loads(fidelity_pages.RESULT.read_text(encoding="utf-8"))
    assert fidelity_pages.with_tables(text, fidelity_pages.page(result)) == text


def test_the_training_tables_are_the_result_file():
    """`make benchmark-training` wrote them."""
    import json

    import training_tables

    text = training_tables.PAGE.read_text(encoding="utf-8")
    result = json.loads(training_tables.RESULT.read_text(encoding="utf-8"))
    assert training_tables.with_tables(text, training_tables.tables(result)) == text
