"""Architectures of torchvision, of timm and of the user's."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torchvision import models as torchvision_models

import teddy_ray
from teddy_ray import cli
from teddy_ray.models import ARCHITECTURES, build, code_identity, freeze, from_torchvision, outline, takes_any_size

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

NETS = """
    from torch import nn

    def make(num_classes, channels, image_size, width=2, bias=True):
        return nn.Sequential(
            nn.Conv2d(channels, width, image_size), nn.BatchNorm2d(width), nn.Flatten(),
            nn.Linear(width, num_classes, bias=bias),
        )

    def narrow(num_classes, channels, image_size):
        return make(num_classes + 1, channels, image_size)

    def pair(num_classes, channels, image_size):
        net = make(num_classes, channels, image_size)
        net.forward = lambda x: (x, x)
        return net

    def large(num_classes, channels, image_size):
        return nn.Sequential(nn.Conv2d(channels, num_classes, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def broken(num_classes, channels, image_size):
        raise KeyError("width")

    def word(num_classes, channels, image_size):
        return "a network"

    def worded(num_classes, channels, image_size):
        if make(num_classes, channels, image_size)[0].weight.std().item() >= 0:
            return make(num_classes, channels, image_size)

    class Viewed(nn.Module):
        def __init__(self, num_classes, channels, image_size):
            super().__init__()
            self.features = nn.Conv2d(channels, 4, 3)
            self.classifier = nn.Linear(4 * (image_size - 2) ** 2, num_classes)

        def forward(self, x):
            return self.classifier(self.features(x).view(len(x), -1))

    CONSTANT = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with a module `nets_of_mine` on the path."""
    (tmp_path / "nets_of_mine.py").write_text(textwrap.dedent(NETS))
    (tmp_path / "broken_of_mine.py").write_text("import torch\nraise RuntimeError('on import')")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in ("nets_of_mine", "broken_of_mine"):
        sys.modules.pop(module, None)


def small(name, size=32, channels=3, **rest):
    return build(name, num_classes=5, channels=channels, image_size=size, **rest)


def refusal(name, size=32, channels=3):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared by the callers
        small(name, size, channels)
    return str(caught.value)


# -- torchvision ---------------------------------------------------------------------------------------------------


def works(name, size):
    """Whether torchvision's own model takes the size, in training too, built as the facts say but for the size."""
    facts = from_torchvision.FACTS.get(name) or from_torchvision.FACTS.get(family(name)) or from_torchvision.Facts()
    sized = facts.sized(size) if facts.sized else {}
    try:
        with torch.device("meta"):
            model = torchvision_models.get_model(name, weights=None, num_classes=5, **facts.arguments, **sized)
            return model(torch.empty(2, 3, size, size)).shape == (2, 5)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError):
        return False


def family(name):
    return torchvision_models.get_model_builder(name).__module__.rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("alexnet", 63),
        ("convnext_tiny", 32),
        ("densenet121", 29),
        ("googlenet", 15),
        ("inception_v3", 75),
        ("squeezenet1_0", 21),
        ("squeezenet1_1", 17),
        ("swin_t", 4),
        ("vgg11", 32),
        ("vit_b_16", 16),
        ("vit_b_32", 32),
    ],
)
def test_smallest_image_of_a_family_is_the_smallest_that_works(name, smallest):
    assert works(name, smallest)
    assert not works(name, smallest - 1)
    assert outline(f"torchvision/{name}", num_classes=5, channels=3, image_size=smallest).mean.is_meta
    assert f"{smallest} pixels" in refusal(f"torchvision/{name}", smallest - 1)


@pytest.mark.parametrize(("name", "size", "step"), [("vit_b_16", 40, 16), ("maxvit_t", 256, 224)])
def test_size_between_two_multiples_is_refused(name, size, step):
    told = f"torchvision/{name}: takes images of {step} pixels or a multiple of it, not of {size}"
    assert refusal(f"torchvision/{name}", size) == told


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_grey_images_are_repeated_for_models_of_colours(name):
    grey = freeze(small(f"torchvision/{name}", channels=1))
    colours = freeze(small(f"torchvision/{name}"))
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colours(x.expand(-1, 3, -1, -1)), rtol=0, atol=1e-6)
    assert grey.state_dict().keys() == colours.state_dict().keys()


def test_two_channels_are_refused_by_models_of_colours():
    told = "torchvision/resnet18: takes images of 3 channels, or of one, which is repeated; not of 2"
    assert refusal("torchvision/resnet18", channels=2) == told


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_model_gives_a_tuple_in_training(name):
    size = 75
    model = outline(f"torchvision/{name}", num_classes=5, channels=3, image_size=size).train()
    assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 5)


# -- timm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "any_size"), [("test_resnet", True), ("test_convnext", True), ("test_vit", False), ("test_byobnet", True)]
)
def test_models_of_timm_take_the_channels_and_the_size_of_the_data(name, any_size):
    pytest.importorskip("timm")
    model = freeze(small(f"timm/{name}", channels=1))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    assert takes_any_size(f"timm/{name}") == any_size


def test_size_that_a_model_of_timm_cannot_take_is_refused_with_one_that_it_can():
    pytest.importorskip("timm")
    told = refusal("timm/test_vit", 8)
    assert told.startswith("timm/test_vit: a pass of 2 images of 3 x 8 x 8 should give logits (2, 5), but raised")
    assert told.endswith("images of 16 pixels are the smallest that it was found to take")


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal("timm/resnet18") == "timm/resnet18: timm is not installed; pip install 'timm>=1.0,<2'"


def test_names_that_would_reach_out_for_more_are_no_models_of_timm():
    pytest.importorskip("timm")
    for name in ("timm/hf-hub:timm/resnet18.a1_in1k", "timm/local-dir:/tmp"):
        assert refusal(name).startswith(f"unknown architecture '{name}'; should be a model of timm")


# -- names that are nobody's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("convnett", "did you mean convnet"),
        ("densenet169", "did you mean torchvision/densenet169"),
        ("densenet_121", "did you mean densenet121"),
        ("mobilenetv2", "did you mean mobilenet_v2"),
        ("efficientnet_b1", "did you mean torchvision/efficientnet_b1"),
        ("torchvision/resnet19", "did you mean torchvision/resnet18"),
        ("timm/resnet18x", "did you mean timm/resnet18"),
        ("huggingface/resnet18", f"should be one of {', '.join(ARCHITECTURES)}, torchvision/<name>, timm/<name>"),
        ("nothing_like_it", "<module>:<function>"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name, told):
    assert told in refusal(name)


# -- functions of the user's ---------------------------------------------------------------------------------------


def test_function_is_called_with_the_size_of_the_task_and_the_options(nets):
    model = freeze(small("nets_of_mine:make:width=7,bias=false", size=8, channels=2))
    assert model.network[0].weight.shape == (7, 2, 8, 8)
    assert model.network[3].bias is None
    assert model(torch.rand(3, 2, 8, 8)).shape == (3, 5)
    assert small("nets_of_mine:make", size=8).network.training


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("not_there:make", "not_there:make: cannot import 'not_there' (No module named 'not_there')"),
        ("broken_of_mine:make", "broken_of_mine:make: importing 'broken_of_mine' raised RuntimeError: on import"),
        ("nets_of_mine:none", "nets_of_mine has no function 'none'"),
        ("nets_of_mine:CONSTANT", "'CONSTANT' of nets_of_mine should be a function, not 3"),
        ("nets_of_mine:broken", "nets_of_mine:broken: the function raised KeyError: 'width'"),
        (
            "nets_of_mine:make:depth=3",
            "the function raised TypeError: make() got an unexpected keyword argument 'depth'",
        ),
        ("nets_of_mine:word", "the function should return a torch.nn.Module, not str"),
        ("nets_of_mine:narrow", "a pass of 2 images of 3 x 8 x 8 should give logits (2, 5), but gave (2, 6)"),
        ("nets_of_mine:pair", "should give logits (2, 5), but gave tuple"),
        ("nets_of_mine:Viewed", "use reshape or flatten: models run channels-last"),
        ("nets_of_mine:large", "; images of 16 pixels are the smallest that it was found to take"),
    ],
)
@pytest.mark.parametrize("builder", [build, outline])
def test_every_failure_of_a_function_says_what_is_wrong(nets, name, told, builder):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        builder(name, num_classes=5, channels=3, image_size=8)
    assert told in str(caught.value)


def test_function_that_needs_weights_has_them_in_the_outline_too(nets):
    model = outline("nets_of_mine:worded", num_classes=5, channels=3, image_size=8)
    assert not model.mean.is_meta
    assert outline("nets_of_mine:make", num_classes=5, channels=3, image_size=8).mean.is_meta


def test_code_identity_follows_the_source_of_functions_alone(nets):
    first = code_identity("nets_of_mine:make:width=3")
    assert first == code_identity("nets_of_mine:narrow")
    with open(nets / "nets_of_mine.py", "a") as file:
        file.write("# edited\n")
    assert first != code_identity("nets_of_mine:make")
    assert len(first) == 64
    assert "nets_of_mine" not in sys.modules
    assert [code_identity(name) for name in ("convnet:width=3", "torchvision/resnet18", "timm/x", "no.where:f")] == [
        None
    ] * 4


def test_code_identity_of_a_package_covers_all_of_it(nets):
    (nets / "package_of_mine").mkdir()
    (nets / "package_of_mine" / "__init__.py").write_text("from .blocks import make")
    blocks = nets / "package_of_mine" / "blocks.py"
    blocks.write_text("")
    first = code_identity("package_of_mine:make")
    blocks.write_text("make = None")
    assert code_identity("package_of_mine:make") != first


def test_modules_of_the_current_folder_are_found_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "nothing"]) == 2
    assert sys.path[-1] == str(tmp_path)  # last: a file there must not stand for a library


def test_functions_in_the_current_folder_are_found_by_workers_of_a_local_ray(nets):
    code = """
import ray
from teddy_ray import cli, models
cli.main(["check", "nothing"])
ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
size = {"num_classes": 5, "channels": 3, "image_size": 8}
print(ray.get(ray.remote(models.build).remote("nets_of_mine:make:width=7", **size)).network[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(teddy_ray.__file__).parent.parent)}
    script = f"import sys; sys.path.remove(''); exec({code!r})"  # installed commands do not have the current folder
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=nets, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("Conv2d(3, 7, kernel_size=(8, 8)"), done.stderr


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/test_vit", "nets_of_mine:make"])
def test_weights_follow_name_and_seed(nets, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    first, again, other = (small(name, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_pixels_are_normalised_per_channel():
    mean, std = [0.5, 0.25, 0.75], [0.5, 0.25, 1.0]
    model = freeze(small("convnet:width=4,depth=1", size=4, mean=mean, std=std))
    x = torch.rand(2, 3, 4, 4)
    by_hand = torch.stack([(x[:, i] - mean[i]) / std[i] for i in range(3)], 1)
    torch.testing.assert_close(model(x), model.network(by_hand))
    assert model.state_dict()["mean"].shape == small("convnet:width=4", size=8).state_dict()["mean"].shape == (3,)


def test_wrong_number_of_means_is_refused():
    with pytest.raises(ValueError, match=r"one for each of 3 channels, not \[0.5, 0.5\]"):
        small("convnet", mean=[0.5, 0.5])
