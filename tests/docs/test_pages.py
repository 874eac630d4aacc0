"""Pages are committed as GitHub shows them: whole, up to date, with links that lead somewhere."""

import re
import urllib.parse

import pytest
from fill_pages import DOCS, GENERATED_PLACE, differences, filled
from generated_tables import GENERATED
from page_blocks import page_blocks, pages

import hwmodels
import loraq_sim

ROOT = DOCS.parent
PAGES = pages(DOCS)
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]
LINK = re.compile(r"(?<!`)\[(?:[^\[\]]|\[[^\]]*\])*\]\((?!https?:|mailto:)([^)\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_a_page_says_what_the_program_says_today(path):
    """`make pages` renews what differs. Runs the commands of the page whose output it shows."""
    committed = path.read_text(encoding="utf-8")
    assert differences(committed, filled(path)) == [], "run `make pages` and look at what changed"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_a_page_reads_without_a_build(path):
    """GitHub knows Markdown, tables and formulas, but no directives and no roles."""
    text = path.read_text(encoding="utf-8")
    assert "```{" not in text
    assert not re.search(r"\{(cite|ref|doc|py:\w+|download|eval-rst)\}", text)
    assert not re.search(r"^: ", text, re.MULTILINE), "a definition list"
    for place in GENERATED_PLACE.finditer(text):
        assert len(place[0].splitlines()) > 2, place[0]
    for block in page_blocks(text):
        if block.options is not None and block.note is None:
            after = text[block.end :].lstrip("\n")
            assert after.startswith(("```text\n", "![")), block.text
    for code in re.findall(r"(?<!\$)\$`[^`]*`\$", text):
        raise AssertionError(f"GitHub's other formula syntax: {code}")


def anchors(path):
    """Anchors GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    heads = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads)
    return set(plain)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=[*NAMES, "/README.md"])
def test_links_lead_to_files_and_headings_of_the_repository(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in LINK.findall(text):
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert ROOT in found.parents, link
        assert found.suffix != ".html", link
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), link


def test_every_page_is_in_the_list_of_pages():
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = {link for link in LINK.findall(text) if link.endswith(".md")}
    assert {str(path.relative_to(DOCS)) for path in PAGES} - {"README.md"} <= listed


def test_every_public_name_is_described():
    text = "".join((DOCS / "reference" / f"{n}.md").read_text() for n in ("python", "hwmodels"))
    names = [f"loraq_sim.{name}" for name in loraq_sim.__all__ if name != "__version__"]
    names += [f"hwmodels.{name}" for name in hwmodels.__all__]
    assert [name for name in names if f"### {name}\n" not in text] == []


def test_every_picture_is_small_and_made_by_the_command_below_it():
    for path in DOCS.rglob("*.png"):
        assert path.stat().st_size < 400_000, path
    for picture in re.findall(
        r"!\[[^\]]*\]\((images/made/[^)]+)\)", (DOCS / "gallery.md").read_text()
    ):
        assert (DOCS / picture).exists(), picture


def test_what_a_command_prints_anew_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("fill_pages.DOCS", tmp_path)
    page = tmp_path / "page.md"
    text = "# A\n\n```bash\nloraq-sim explain knee\n```\n<!-- output -->\n\nAfter.\n"
    page.write_text(text, encoding="utf-8")
    whole = filled(page)
    assert whole.startswith(text.removesuffix("\n\nAfter.\n"))
    assert "```text\nknee: The point of a front" in whole
    assert whole.endswith("\n<!-- end of output -->\n\nAfter.\n")
    page.write_text(whole, encoding="utf-8")
    assert filled(page) == whole
    page.write_text(whole.replace("point", "place"), encoding="utf-8")
    assert filled(page) == whole
    assert len(differences(page.read_text(), whole)) == 1


def test_digits_may_differ_between_processors_but_words_and_sizes_not():
    old = " W4A4  12.3 %  1,024 \n ------ \n"
    assert differences(old, " W4A4   12.4 %  1,024 \n --------- \n") == []
    assert differences(old, " W4A4   14.3 %  1,024 \n --------- \n") != []
    assert differences(old, " W4A8   12.3 %  1,024 \n --------- \n") != []
    assert differences(old, old + "more\n") == ["2 lines are 3 now"] or differences(old, old + "x")


def test_generated_parts_are_renewed_and_an_empty_one_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("fill_pages.DOCS", tmp_path)
    monkeypatch.setitem(GENERATED, "again", lambda argument="x": f"made of {argument}")
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: again -->\n\ntext\n\n<!-- generated: again b -->\n")
    whole = filled(page)
    assert whole.count("<!-- end of generated -->") == 2
    assert "made of x" in whole
    assert "made of b" in whole
    assert "\n\ntext\n\n" in whole
    page.write_text(whole.replace("made of x", "old words"), encoding="utf-8")
    assert filled(page) == whole


def test_the_scan_of_links_sees_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## The *one* thing: `a_b`\n\n[x](other.md) [y](#the-one-thing-a_b)\n")
    assert LINK.findall(page.read_text()) == ["other.md", "#the-one-thing-a_b"]
    assert anchors(page) == {"the-one-thing-a_b"}
