"""The figures of a run that do not come from its artifacts; test_pipeline.py has those that do."""

import pytest
from plans import DIGITS, FACTS

from teddy_ray import summary
from teddy_ray.plan import Plan
from teddy_ray.work import flops_of_stages


@pytest.mark.parametrize("error", [RuntimeError("no fake tensors"), KeyError("aten"), NotImplementedError()])
def test_a_model_that_cannot_be_counted_fails_no_finished_run(monkeypatch, error):
    plan = Plan(DIGITS, FACTS)
    assert summary._flops(plan) == flops_of_stages(plan)

    def fail(plan):
        raise error

    monkeypatch.setattr(summary, "flops_of_stages", fail)
    assert summary._flops(plan) == {}
