"""What the report and the card say of labels and pool, for each form of labels, without a run."""

import re

import pytest
from conftest import tiny
from reports import bare, wide_page

from teddy_ray.card import write_card
from teddy_ray.flow import prepare


@pytest.fixture
def plan(tmp_path):
    def plan(**overrides):
        return prepare(tiny(tmp_path, **overrides)).plan

    return plan


def text_of(page):
    """What a page says, without its markup."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub("<[^>]+>", " ", body).split())


def test_every_class_in_float16(plan):
    chosen = plan()
    text = text_of(wide_page(chosen, bare(chosen)))
    assert 'data[0]["soft_label"] # 6 x 10: views x classes' in text
    assert "soft labels, every class in float16 4,800 120" in text
    assert "soft_label_classes" not in text
    assert "members/" not in text


def test_the_largest_classes(plan):
    chosen = plan(labels__mode="top_k", labels__top_k=3)
    text = text_of(wide_page(chosen, bare(chosen, mass_kept=0.9731)))
    assert 'data[0]["soft_label_classes"], data[0]["soft_label_values"] # 6 x 3 each' in text
    assert 'data[0]["soft_label"]' not in text
    kept = "soft labels, the 3 largest of each in float16, which hold 0.9731 of the probability in the mean"
    assert f"{kept} {chosen.label_bytes:,}" in text


def test_no_stored_labels(plan):
    chosen = plan(labels__mode="none")
    text = text_of(wide_page(chosen, bare(chosen)))
    assert "soft_label_" not in text
    assert 'data[0]["soft_label"]' not in text
    assert "No soft labels are stored: distilled/members/ holds the 4 models that label every view" in text
    assert "weights of the 4 model(s) that label, for no soft labels are stored 123,456" in text
    assert "soft labels, " not in text[text.index("of the distilled set bytes") :]
    assert 'data = teddy_ray.load("distilled")' in text


def test_one_soft_label_each(plan):
    chosen = plan(labels__averaged=True, labels__cutmix=0.0)
    assert 'data[0]["soft_label"] # 1 x 10: views x classes' in text_of(wide_page(chosen, bare(chosen)))


def test_a_pool_of_one_model_is_called_so_and_no_method_is_claimed(plan):
    chosen = plan(pool__seeds=[0], pool__snapshots=[1])
    text = text_of(wide_page(chosen, bare(chosen)))
    assert "10 classes; pool of 1 model, prior; CPU" in text
    assert "Teddy" not in text
    card = write_card(chosen, bare(chosen))
    assert "real ones by\nteddy_ray 0.1 (recipe `tiny`). Its algorithm is that of Yu et al." in card
    assert "- **Pool**: 1 model, prior" in card
    two = plan(pool__snapshots=[1])
    assert "pool of 2 models, prior" in text_of(wide_page(two, bare(two)))
