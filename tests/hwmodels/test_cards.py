"""What Jupyter shows of machines and costs."""

import re

import pytest

import hwmodels


@pytest.mark.parametrize("name", hwmodels.list_accelerators())
def test_every_accelerator_shows_its_modes(name):
    hw = hwmodels.load_accelerator(name)
    html = hw._repr_html_()
    assert html.startswith(f"<strong>{name}: ")
    assert all(re.search(rf"<td[^>]*>{re.escape(mode.name)}</td>", html) for mode in hw.modes)


def test_a_cost_shows_parts_whose_shares_add_up_to_one_for_each_quantity():
    work = hwmodels.GemmWorkload(m=64, n=256, k=256, main="W4A8", branch="W8A8", rank=8)
    cost = hwmodels.estimate_cost(work, hwmodels.load_accelerator("aie2"))
    html = cost._repr_html_()
    rows = re.findall(
        r"<tr>\s*<td[^>]*>([\w ]+)</td>\s*<td[^>]*>\w+</td>\s*<td>[^<]*</td>\s*<td>([\d.]+)%", html
    )
    sums = {quantity: 0.0 for quantity, _ in rows}
    for quantity, share in rows:
        sums[quantity] += float(share)
    assert set(sums) == {"latency", "energy", "DRAM traffic", "stored weights"}
    # Each of at most 10 shares is rounded to 0.1 %.
    assert all(abs(total - 100) <= 0.5 for total in sums.values())


def test_texts_of_a_users_file_are_escaped():
    hw = hwmodels.load_accelerator("aie2").model_copy(update={"title": "<img src=x onerror=y>"})
    assert "<img" not in hw._repr_html_()
