from loraq_sim.sweeps.cases import case_identity


def test_names_do_not_depend_on_the_order_of_facts():
    name = case_identity(a=1, b={"x": 1, "y": 2})
    assert name == case_identity(b={"y": 2, "x": 1}, a=1)
    assert name != case_identity(a=1, b={"x": 1, "y": 3})
    assert len(name) == 64
