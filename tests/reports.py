"""Reports of runs that nobody made: many students, rows and budgets, long names, large images."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from teddy_ray.gallery import ShownClass, Strip, make_strip
from teddy_ray.plan import Plan
from teddy_ray.plots import losses
from teddy_ray.records import Row
from teddy_ray.report import render
from teddy_ray.summary import Summary

ROWS = (
    "distilled",
    "random_soft",
    "random_hard",
    "start_soft",
    "start_hard",
    "distilled_hard",
    "full_data",
    "distilled_plain",
    "random_plain",
)
STUDENTS = ("convnet:width=128,depth=3", "resnet18:width=64", "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
LONG_NAME = "Pseudopseudohypoparathyroidism, Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch"


def accuracies(students: tuple[str, ...] = STUDENTS, budgets: tuple[int, ...] = (300, 1200)) -> dict[str, Row]:
    """Rows of every student and budget, named as a summary names them."""
    rng = np.random.default_rng(0)
    rows = {}
    for (index, student), (place, epochs), row in product(enumerate(students), enumerate(budgets), ROWS):
        name = row + (f"@{epochs}" if place else "") + (f"/{student}" if index else "")
        rows[name] = Row(
            validation=None,
            mean=0.45 + 0.05 * place - 0.04 * index - 0.03 * ROWS.index(row) + 0.3 * (row == "full_data"),
            std=float(rng.uniform(0.002, 0.02)) if row != "full_data" else None,
            n=3 if row != "full_data" else 1,
            n_counts="student seeds on one distilled set",
            labels="hard" if "hard" in row or row == "full_data" else "soft",
            split="test",
            student=student,
            student_steps=epochs * 40 * (10 if row == "full_data" else 1),
        )
    return rows


def many(summary: Summary) -> Summary:
    """A summary with three students, nine rows and two budgets."""
    rows = accuracies()
    return replace(
        summary,
        accuracy=rows,
        improvement_over_random=rows["distilled"].mean - rows["random_soft"].mean,
    )


def bare(plan: Plan, **labels: Any) -> Summary:
    """A summary of a run that nobody made: two rows, and labels of the recipe's mode."""
    recipe, stage = plan.recipe, {"seconds": 1.0, "worker_seconds": 1.0, "reused": False, "fingerprint": 64 * "0"}
    rows = {name: row for name, row in accuracies(STUDENTS[:1], (300,)).items() if name in ("distilled", "random_soft")}
    has_none = recipe.labels.mode == "none"
    return Summary(
        name=recipe.name,
        accuracy=rows,
        improvement_over_random=rows["distilled"].mean - rows["random_soft"].mean,
        scores=dict.fromkeys(("ior", "hlr", "lrs", "ars")),
        stages=dict.fromkeys(plan.stages(), stage),
        images=plan.num_images,
        images_per_class=recipe.synthesis.images_per_class,
        num_classes=len(plan.data.classes),
        num_test=plan.data.num_test,
        num_train=sum(plan.data.counts),
        skipped_images=0,
        bytes={
            "images": 5000,
            "images_raw": 2560,
            "labels": plan.label_bytes,
            "stored": 9000,
            "members": 123_456 if has_none else 0,
        },
        labels={
            "mode": recipe.labels.mode,
            "views": None if has_none else recipe.labels.views,
            "averaged": recipe.labels.averaged,
            "members": len(plan.label_members),
            "mass_kept": 1.0,
            **labels,
        },
        synthesis={"images_steps_per_s": 100.0, "units": plan.num_units},
        flops={},
        generation={"chosen": plan.pool_plan.generation, "reason": plan.pool_plan.generation_reason},
        pool=[
            {
                "architecture": member.architecture,
                "seed": member.seed,
                "ratio": member.ratio,
                "parameters": 1000,
                "epoch": member.epoch,
                "validation_accuracy": 0.9,
            }
            for member in plan.members
        ],
        versions={"teddy_ray": "0.1", "torch": "2.11"},
        device="CPU",
    )


def wide_page(plan: Plan, summary: Summary) -> str:
    """A page with many accuracies, twenty classes with long names of large images in colour, and noisy losses."""
    rng = np.random.default_rng(0)

    def strip(title: str, num: int) -> Strip:
        return make_strip(title, f"{num} images", rng.integers(0, 255, (num, 3, 224, 224), dtype=np.uint8), 10)

    strips = [strip("real", 7), strip("start", 10), strip("distilled", 10)]
    steps = np.arange(20, 1001, 20)
    curves = [
        np.stack([steps, 90 * np.exp(-steps / 150) + rng.uniform(1, 2, 50), rng.uniform(1, 2, 50), 0 * steps], axis=1)
        for _ in range(40)
    ]
    return render(
        plan,
        summary,
        shown=[ShownClass(f"{LONG_NAME} {index}", 10, strips) for index in range(20)],
        loss_charts=losses([f"unit {index}" for index in range(40)], curves),
        stage_bytes={"pool": 10**10, "synthesis": 10**7},
    )
