"""The optimisation of one unit on digits, in this process."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import train_on
from safetensors.torch import load, save
from sklearn.datasets import load_digits

from teddy_ray import synthesis
from teddy_ray.errors import StageError
from teddy_ray.kernels.winograd import WinogradConv2d
from teddy_ray.matching import layer_weights, make_targets, member_loss
from teddy_ray.models import build, freeze
from teddy_ray.moments import class_moments
from teddy_ray.pixels import from_pixels, to_pixels
from teddy_ray.recipe import Augmentation, Curriculum, Data, Recipe, Statistics, Synthesis
from teddy_ray.starts import noise_start
from teddy_ray.synthesis import Member, State, optimise
from teddy_ray.taps import Taps

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

CPU = torch.device("cpu")
LABELS = np.repeat(np.array([2, 5, 7]), 4)
IDENTITY = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)


@dataclass(frozen=True)
class Loaded:
    """A member before it is frozen and tapped."""

    name: str
    model: Any
    moments: Any

    def ready(self, dtype=torch.float32, *, kernels=False):
        return Member(self.name, self.model, dtype, kernels=kernels)

    @property
    def pooled(self):
        return {layer: moments.pooled() for layer, moments in self.moments.items()}


@dataclass(frozen=True)
class Result:
    images: Any
    losses: Any


def make_recipe(seed=0, scope="subset", **part):
    return Recipe(
        name="test",
        seed=seed,
        data=Data(source="sklearn:digits", image_size=8, channels=1),
        statistics=Statistics(scope=scope),
        synthesis=Synthesis(**{"steps": 6, "models_per_step": 2} | part),
    )


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    return (bunch.images[:, None] / 16 * 255).round().astype(np.uint8), bunch.target.astype(np.int64)


def loaded(name, model, digits):
    """With the moments of the digits at the model's taps."""
    pixels, labels = digits
    model = freeze(copy.deepcopy(model))
    with torch.inference_mode(), Taps(model) as taps:
        model(from_pixels(pixels, CPU))
        activations = zip(taps.layers, taps.take(), strict=True)
        moments = {layer: class_moments(x, torch.from_numpy(labels), 10) for layer, x in activations}
    return Loaded(name, model, moments)


@pytest.fixture(scope="module")
def members(digits):
    """Three snapshots of a ConvNet trained on digits."""
    pixels, labels = digits
    snapshots = train_on(pixels[:600], labels[:600], (2, 5, 10))
    return [loaded(f"epoch {epoch}", model, digits) for epoch, model in snapshots.items()]


@pytest.fixture(scope="module")
def start():
    return noise_start(len(LABELS), 1, 8, ("start",))


def states(begin, members, recipe, key="unit A", labels=LABELS, dtype=torch.float32, kernels=False, **options):
    """Those of a unit, from where it stands, on a worker of its own."""
    ready = [member.ready(dtype, kernels=kernels) for member in members]
    y = torch.from_numpy(labels)
    targets = [
        own.targets(member.moments, member.pooled, y, recipe) for own, member in zip(ready, members, strict=True)
    ]
    yield from optimise(begin, labels, ready, targets, recipe, key=key, **options)


def run(start, members, recipe, **options):
    """A unit from its first step to its last."""
    *_, last = states(State.begin(start, recipe, CPU), members, recipe, **options)
    assert last.step == recipe.synthesis.steps
    return Result(to_pixels(last.images).numpy(), last.losses.mean(1).numpy())


def both(result):
    return result.images.tobytes(), result.losses.tobytes()


def terms(member, images, labels, recipe):
    """Statistics and u CE of one member on images as they are."""
    part = recipe.synthesis
    with Taps(member.model) as taps:
        moments = [member.moments[layer] for layer in taps.layers]
        pooled = [member.pooled[layer] for layer in taps.layers]
        targets = make_targets(moments, pooled, labels, scope=recipe.statistics.scope, blend=0.5, device=CPU)
        channels = [layer.mean.shape[1] for layer in pooled]
        weights = layer_weights(channels, first_layer_factor=part.first_layer_factor, normalise=part.normalise_layers)
        return member_loss(member.model, taps, images, labels, targets, u=part.ce_weight, weights=weights)


@pytest.fixture
def looks_at_every_step(monkeypatch):
    monkeypatch.setattr(synthesis, "LOOK_EVERY_S", 0.0)


@pytest.mark.parametrize("scope", ["subset", "global", "blend"])
def test_same_unit_gives_the_same_bytes(scope, members, start):
    recipe = make_recipe(scope=scope)
    result = run(start, members, recipe)
    assert result.images.dtype == np.uint8
    assert result.images.shape == start.shape
    assert result.losses.shape == (6, 3)
    assert not result.losses[:, 2].any()  # no priors
    assert np.isfinite(result.losses).all()
    assert both(run(start, members, recipe)) == both(result)


def test_unit_depends_on_nothing_that_ran_before(members, start):
    recipe = make_recipe()
    alone = both(run(start, members, recipe))
    torch.manual_seed(99)
    run(start[::-1].copy(), members, make_recipe(models_per_step=3), key="unit B")
    given = start.copy()
    assert both(run(given, members, recipe)) == alone
    assert np.array_equal(given, start)


@pytest.mark.parametrize("change", [{"key": "unit B"}, {"seed": 1}], ids=["key", "seed"])
@pytest.mark.parametrize("drawn", ["views", "members"])
def test_another_key_or_seed_draws_other_views_and_members(drawn, change, members, start):
    pool = members[:1] if drawn == "views" else members
    augmentation = Augmentation() if drawn == "views" else IDENTITY
    first, other = (
        run(start, pool, make_recipe(**options, augmentation=augmentation, models_per_step=1), key=key)
        for options, key in [({}, "unit A"), ({"seed": change.get("seed", 0)}, change.get("key", "unit A"))]
    )
    assert (other.losses != first.losses).any()
    assert other.images.tobytes() != first.images.tobytes()


def test_steps_draw_views_anew(members, start):
    # a rate so low that only the views move the losses
    result = run(start, members[:1], make_recipe(learning_rate=1e-9, models_per_step=1))
    assert len(np.unique(result.losses[:, 0])) == 6


def count_passes(members):
    """Copies of the members that log their name at each forward pass."""
    log, copies = [], []
    for member in members:
        model = copy.deepcopy(member.model)
        model.register_forward_hook(lambda module, inputs, output, name=member.name: log.append(name))
        copies.append(Loaded(member.name, model, member.moments))
    return copies, log


@pytest.mark.parametrize("num_drawn", [1, 2, 3])
def test_members_are_drawn_without_replacement_at_each_step(num_drawn, members, start):
    counted, log = count_passes(members)
    run(start, counted, make_recipe(steps=12, models_per_step=num_drawn))
    assert len(log) == 12 * num_drawn
    steps = [log[i : i + num_drawn] for i in range(0, len(log), num_drawn)]
    assert all(len(set(drawn)) == num_drawn for drawn in steps)
    assert len(set(log)) == 3
    assert len({tuple(drawn) for drawn in steps}) > 1


def test_moments_are_taken_by_name_of_layer_not_by_order(members, start):
    assert len(members[0].moments) > 1
    shuffled = [Loaded(m.name, m.model, dict(reversed(m.moments.items()))) for m in members]
    assert both(run(start, shuffled, make_recipe())) == both(run(start, members, make_recipe()))


def test_first_step_is_adams_on_the_mean_over_the_drawn_members(members, start):
    recipe = make_recipe(steps=1, models_per_step=3, augmentation=IDENTITY, ce_weight=0.5, first_layer_factor=4.0)
    result = run(start, members, recipe)
    S = (torch.from_numpy(start).float() / 255).requires_grad_()
    losses = torch.stack([torch.stack(terms(m, S, torch.from_numpy(LABELS), recipe)) for m in members]).mean(0)
    np.testing.assert_allclose(result.losses[0, :2], losses.detach(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), S)
    # the first step of Adam has the length of the learning rate wherever the gradient is well above its epsilon
    moved = (S - recipe.synthesis.learning_rate * gradient.sign()).detach().clamp(0, 1) * 255
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    assert (torch.from_numpy(result.images) - moved).abs()[clear].max() < 0.51


def test_steps_grow_short_towards_the_end(members, start):
    # at a constant rate of Adam the loss would keep moving
    losses = run(start, members[:1], make_recipe(steps=80, models_per_step=1, augmentation=IDENTITY)).losses
    moves = np.abs(np.diff(losses.sum(1)))
    assert moves[-5:].max() < 0.01 * moves[:5].max()


@pytest.mark.parametrize("beginning", ["noise", "real"])
def test_loss_of_a_fixed_batch_falls(beginning, members, start):
    digits = load_digits()
    real = np.stack([digits.images[digits.target == label][:4] for label in (2, 5, 7)]).reshape(-1, 1, 8, 8)
    images = start if beginning == "noise" else (real / 16 * 255).round().astype(np.uint8)
    recipe = make_recipe(steps=80, models_per_step=3, augmentation=IDENTITY)
    result = run(images, members, recipe)
    before, after = (
        sum(float(sum(terms(m, from_pixels(x, CPU), torch.from_numpy(LABELS), recipe))) for m in members)
        for x in (images, result.images)
    )
    assert after < 0.6 * before
    assert result.losses[-1].sum() < 0.6 * result.losses[0].sum()


def test_states_come_up_to_the_last_step(members, start, looks_at_every_step):
    recipe = make_recipe(steps=30)
    looks = list(states(State.begin(start, recipe, CPU), members, recipe))
    assert [state.step for state in looks] == list(range(1, 31))
    losses = looks[-1].losses.mean(1)
    assert looks[-1].mean_losses(4) == pytest.approx(losses[-4:].mean(0).tolist())
    for state in (looks[0], looks[9]):
        assert state.mean_losses(1) == pytest.approx(losses[state.step - 1].tolist())


FEATURES = {
    "plain": {},
    "all": {
        "tv_weight": 0.01,
        "l2_weight": 0.01,
        "normalise_layers": True,
        "curriculum": Curriculum(crop_scale=(0.9, 1.0), share=0.5),
    },
}
ENGINES = {"plain": {}, "bf16": {"dtype": torch.bfloat16}, "kernels": {"kernels": True}}


@pytest.fixture(scope="module")
def wide(digits):
    """Members whose second convolution is one for the kernels."""
    names = ["convnet:width=32,depth=2", "convnet:width=32,depth=2,norm=group"]
    return [loaded(name, build(name, num_classes=10, channels=1, image_size=8), digits) for name in names]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stop", [1, 11])
def test_unit_that_goes_on_from_a_checkpoint_gives_the_same_bytes(
    stop, engine, features, wide, start, looks_at_every_step
):
    recipe, form = make_recipe(steps=12, **FEATURES[features]), ENGINES[engine]
    for state in states(State.begin(start, recipe, CPU), wide, recipe, **form):
        if state.step == stop:
            saved = load(save({name: tensor.contiguous() for name, tensor in state.tensors().items()}))
            break
    torch.manual_seed(99)
    resumed = State.from_tensors(saved, CPU)
    assert resumed.step == stop
    *_, last = states(resumed, wide, recipe, **form)
    assert both(Result(to_pixels(last.images).numpy(), last.losses.mean(1).numpy())) == both(
        run(start, wide, recipe, **form)
    )


def test_kernels_come_near_the_librarys(wide, start):
    recipe = make_recipe(steps=1, augmentation=IDENTITY)
    plain, own = (run(start, wide, recipe, kernels=kernels) for kernels in (False, True))
    np.testing.assert_allclose(own.losses[0], plain.losses[0], rtol=1e-5)
    for member in wide:
        kinds = {type(module) for module in member.ready(kernels=True).model.modules()}
        assert WinogradConv2d in kinds


def spoil(members, at, where, value):
    """Copies of the members of which one gives something not finite in the pool's `at`-th forward pass."""
    log, copies = [], []

    def before(name):
        def hook(module, inputs):
            log.append(name)
            return (inputs[0] * value,) if where == "activations" and len(log) == at + 1 else None

        return hook

    def after(module, inputs, output):
        return output * value if where == "logits" and len(log) == at + 1 else None

    for member in members:
        model = copy.deepcopy(member.model)
        model.register_forward_pre_hook(before(member.name))
        model.register_forward_hook(after)
        copies.append(Loaded(member.name, model, member.moments))
    return copies, log


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["activations", "logits"])
@pytest.mark.parametrize("draw", [0, 27, 49, 50, 75])
def test_loss_that_is_not_finite_stops_the_unit_and_names_step_and_member(draw, where, value, members, start):
    # two members a step: one of them good, so that a mean or a maximum could hide the other
    spoilt, log = spoil(members, draw, where, value)
    recipe, finished = make_recipe(steps=38), []
    with pytest.raises(StageError) as caught:
        finished.extend(s.step for s in states(State.begin(start, recipe, CPU), spoilt, recipe))
    error = caught.value
    assert error.stage == "synthesis"
    assert error.item == f"unit unit A, step {draw // 2}, member {log[draw]}"
    assert "not finite" in error.reason
    assert all(step <= draw // 2 for step in finished)


def test_statistics_that_are_not_finite_stop_the_unit_though_the_cross_entropy_is(members, start):
    counted, log = count_passes(members)
    name = members[2].name
    moments = {layer: replace(m, mean=m.mean * math.nan) for layer, m in members[2].moments.items()}
    counted[2] = replace(counted[2], moments=moments)
    with pytest.raises(StageError) as caught:
        run(start, counted, make_recipe(steps=38, models_per_step=1))
    assert caught.value.item == f"unit unit A, step {log.index(name)}, member {name}"


def test_last_step_that_spoils_the_pixels_is_not_published(members, start):
    # sqrt at 0: a finite loss with a gradient that is not, after which no further loss would tell
    model = copy.deepcopy(members[0].model)
    model.register_forward_hook(lambda module, inputs, output: output + (output * 0).sqrt())
    with pytest.raises(StageError, match="unit unit A, step 0, member epoch 2"):
        run(start, [replace(members[0], model=model)], make_recipe(steps=1, models_per_step=1))


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (MemoryError(), "out of memory; lower synthesis.slots_per_unit or synthesis.classes_per_unit"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; lower synthesis.slots_per_unit"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; lower"),
        (RuntimeError("shapes do not fit"), "RuntimeError: shapes do not fit"),
    ],
    ids=["host", "device", "allocator", "other"],
)
def test_error_in_a_model_names_unit_step_and_member(raised, told, members, start):
    counted, log = count_passes(members)

    def fail(module, inputs):
        if len(log) == 7:
            raise raised

    for member in counted:
        member.model.register_forward_pre_hook(fail)
    with pytest.raises(StageError) as caught:
        run(start, counted, make_recipe(steps=9, models_per_step=1))
    quiet, names = count_passes(members)
    run(start, quiet, make_recipe(steps=9, models_per_step=1))
    assert caught.value.item == f"unit unit A, step 7, member {names[7]}"
    assert caught.value.reason.startswith(told)


@pytest.fixture(scope="module")
def mixed(digits):
    """One member of each family: affine norms, residual blocks, norms over groups, over a sample, and none."""
    names = [
        "convnet:width=16,depth=2",
        "resnet18:width=4",
        "convnet:width=16,depth=2,norm=group",
        "convnet:width=16,depth=2,norm=layer",
        "convnet:width=16,depth=2,norm=instance",
        "convnet:width=16,depth=2,norm=none",
    ]
    return [loaded(name, build(name, num_classes=10, channels=1, image_size=8), digits) for name in names]


def test_pools_of_mixed_architectures_run_in_one_unit(mixed, start):
    counted, log = count_passes(mixed)
    recipe = make_recipe(steps=60, models_per_step=3, augmentation=IDENTITY, normalise_layers=True)
    result = run(start, counted, recipe)
    assert set(log) == {member.name for member in mixed}
    for member in mixed:
        before, after = (
            float(terms(member, from_pixels(x, CPU), torch.from_numpy(LABELS), recipe)[0])
            for x in (start, result.images)
        )
        assert after < 0.7 * before, member.name


@pytest.mark.parametrize("pool", ["members", "mixed"])
def test_bfloat16_comes_near_float32(pool, start, request):
    pool = request.getfixturevalue(pool)
    recipe = make_recipe(steps=1, models_per_step=len(pool), augmentation=IDENTITY)
    single, half = (run(start, pool, recipe, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert both(single) != both(half)
    np.testing.assert_allclose(half.losses[0], single.losses[0], rtol=0.02)


def test_bfloat16_gives_the_same_bytes_each_time(members, start):
    first, second = (run(start, members, make_recipe(), dtype=torch.bfloat16) for _ in range(2))
    assert both(first) == both(second)


def test_normalised_layers_weigh_the_same_whatever_their_width(members, start):
    # all layers of this ConvNet have 16 channels
    plain, normalised = (
        run(start, members, make_recipe(steps=1, normalise_layers=on, augmentation=IDENTITY)) for on in (False, True)
    )
    assert normalised.losses[0, 0] == pytest.approx(plain.losses[0, 0] / 4, rel=1e-5)
    assert normalised.losses[0, 1] == pytest.approx(plain.losses[0, 1], rel=1e-5)


def variation(images):
    x = images.astype(np.float64) / 255
    return np.abs(np.diff(x, axis=2)).sum() + np.abs(np.diff(x, axis=3)).sum()


def test_priors_draw_the_images(members, start):
    plain, smooth, grey = (
        run(start, members, make_recipe(steps=60, **weights))
        for weights in ({}, {"tv_weight": 1.0}, {"l2_weight": 10.0})
    )
    assert variation(smooth.images) < 0.7 * variation(plain.images)
    assert np.abs(grey.images - 127.5).mean() < 0.7 * np.abs(plain.images - 127.5).mean()
    assert smooth.losses[0, 2] > smooth.losses[-1, 2] > 0


def test_prior_is_that_of_the_images_before_the_step(members, start):
    x = start.astype(np.float64) / 255
    result = run(start, members, make_recipe(tv_weight=0.5, l2_weight=0.25))
    expected = (0.5 * variation(start) + 0.25 * ((x - 0.5) ** 2).sum()) / len(start)
    assert result.losses[0, 2] == pytest.approx(expected, rel=1e-5)


def test_curriculum_ends_with_the_views_of_the_augmentation(mixed, start):
    seen = []
    member = mixed[1]  # takes images of any size
    model = copy.deepcopy(member.model)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    recipe = make_recipe(steps=8, models_per_step=1, curriculum=Curriculum(image_size=4, share=0.5))
    run(start, [replace(member, model=model)], recipe)
    assert seen == [4] * 4 + [8] * 4


def test_compiled_loss_gives_what_the_loss_gives(wide, start):
    """One program for all members of an architecture, kernels inside, the same bytes each time."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(member_loss, backend=counter, dynamic=False, fullgraph=True)
    members = [wide[0], replace(wide[0], name="another", model=copy.deepcopy(wide[0].model))]
    recipe = make_recipe()
    plain = run(start, members, recipe, kernels=True)
    first, second = (run(start, members, recipe, kernels=True, loss=compiled) for _ in range(2))
    assert counter.frame_count == 1
    assert both(first) == both(second)
    np.testing.assert_allclose(first.losses[0], plain.losses[0], rtol=1e-5)
    assert np.abs(first.images.astype(int) - plain.images).mean() < 1


def test_pixels_of_8_bits_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    images = from_pixels(pixels, CPU)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.array_equal(to_pixels(images).numpy(), pixels)


def test_pixels_are_rounded_to_the_nearest():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0])
    assert to_pixels(images).tolist() == [0, 0, 1, 255, 255]
