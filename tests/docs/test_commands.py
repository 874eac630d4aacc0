"""What the pages tell readers to type works: every bash and Python block, page by page.

Blocks of pages that show an output are run by `test_pages`; here run the blocks of all other pages,
and all Python.
"""

from pathlib import Path

import pytest
from captured_output import CommandFailed, PageFolder
from generated_tables import GENERATED
from markdown_table import table
from page_blocks import commands_of, page_blocks, pages

ROOT = Path(__file__).resolve().parents[2]
PAGES = pages(ROOT / "docs")
NAMES = [str(path.relative_to(ROOT / "docs")) for path in PAGES]


def blocks_of(path):
    return list(page_blocks(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_the_blocks_of_a_page_run(path, tmp_path):
    blocks = blocks_of(path)
    bash = [block for block in blocks if block.language == "bash"]
    folder = PageFolder(tmp_path)
    if not any(block.options is not None for block in bash):
        for block in filter(folder.can_run, bash):
            folder.run(block)
    namespace = {}
    with folder.entered():
        for block in blocks:
            if block.language == "python" and block.note is None:
                exec(compile(block.text, str(path), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_the_slow_blocks_of_a_page_run(path, tmp_path):
    folder = PageFolder(tmp_path)
    for block in blocks_of(path):
        if block.note == "slow":
            folder.run(block)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_a_block_that_is_not_run_says_why(path):
    text = path.read_text(encoding="utf-8")
    blocks = blocks_of(path)
    assert text.count("```bash") == sum(block.language == "bash" for block in blocks)
    assert not [block for block in blocks if block.note and len(block.why) < 5]
    assert "```console" not in text
    assert "```sh\n" not in text


def test_a_failing_command_is_noticed(tmp_path):
    (block,) = page_blocks("```bash\nloraq-sim hw show no_such_machine\n```\n")
    with pytest.raises(CommandFailed, match="no_such_machine"):
        PageFolder(tmp_path).run(block)


def test_blocks_know_their_notes_and_outputs():
    text = (
        "<!-- slow: minutes -->\n```bash\n# e\na b \\\n  'c d'\n```\n\n"
        "```bash\nx\n```\n<!-- output: lines=3 stderr -->\n\n```python\npass\n```\n"
    )
    slow, shown, python = page_blocks(text)
    assert (slow.note, slow.why, slow.options) == ("slow", "minutes", None)
    assert commands_of(slow.text) == ["a b 'c d'"]
    assert (shown.note, shown.options) == (None, ("lines=3", "stderr"))
    assert (python.language, python.options) == ("python", None)


def test_markdown_tables_keep_bars_and_line_breaks_inside_their_cells():
    assert table(("a", "b"), [("x|y\nz", 1.5)]) == "| a | b |\n| --- | ---: |\n| x\\|y z | 1.5 |"


@pytest.mark.parametrize("name", ["formats", "rounding_ties", "row_columns", "golden_counts"])
def test_generated_tables_are_as_long_as_what_they_show(name):
    from loraq_sim.formats import ELEMENTS, Rounding
    from loraq_sim.results.rows import COLUMNS

    expected = {
        "formats": len(ELEMENTS),
        "rounding_ties": len(Rounding),
        "row_columns": len(COLUMNS),
        "golden_counts": 3,
    }
    assert len(GENERATED[name]().splitlines()) == expected[name] + 2


def test_the_rounding_table_shows_the_ties_of_the_manual():
    rows = {row.split("|")[1].strip(" `"): row for row in GENERATED["rounding_ties"]().splitlines()}
    # 2.5, 3.5, -2.5, -3.5 as AMD's table has them.
    assert [cell.strip() for cell in rows["conv_even"].split("|")[2:6]] == ["2", "4", "-2", "-4"]
    assert [cell.strip() for cell in rows["symmetric_inf"].split("|")[2:6]] == [
        "3",
        "4",
        "-3",
        "-4",
    ]
    assert [cell.strip() for cell in rows["floor"].split("|")[2:6]] == ["2", "3", "-3", "-4"]
