"""The recipe: one YAML file, typed and frozen. Every field says whether it can change the bytes of the result.

`Result` fields enter fingerprints; `Execution` fields (workers, address, storage) never do.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Role(Enum):
    """Whether a field can change the bytes of the result."""

    RESULT = "result"
    EXECUTION = "execution"


T = TypeVar("T")
Result = Annotated[T, Role.RESULT]
Execution = Annotated[T, Role.EXECUTION]

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Workers = Annotated[int, Field(ge=1)] | Literal["auto"]


class Part(BaseModel):
    """A section of the recipe: frozen, unknown keys forbidden, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Augmentation(Part):
    """A random resized crop and flip, drawn per image."""

    crop_scale: Result[tuple[Positive, Positive]] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_ratio: Result[tuple[Positive, Positive]] = (0.75, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: Result[bool] = True
    """Mirror half of the images left to right."""


class Placed(Part):
    """A stage whose work runs on Ray workers."""

    num_workers: Execution[Workers] = "auto"
    """Workers, all of which the cluster must hold; auto: as many as it holds. Never more than there is work for."""
    gpus_per_worker: Execution[NonNegative] = 0.0
    """GPUs (or a share of one) per worker; 0 runs on CPUs."""
    threads: Result[Count] = 1
    """CPU threads per worker. They change the order of floating-point sums, hence the bytes."""


class Data(Part):
    """What is distilled."""

    source: Result[str]
    """`sklearn:digits`; `torchvision:<Name>:<folder>`, a data set as torchvision keeps it in a local folder, such as
    `torchvision:CIFAR10:/data` or, with an option, `torchvision:EMNIST,split=letters:/data` (nothing is downloaded);
    or a path or URI of a folder of class folders, of a Parquet file, or of a folder of Parquet files."""
    test_source: Result[str | None] = None
    """The test split: a folder of class folders or Parquet. Without it the data set's own is used, where it has one
    (torchvision's and the digits), or else `test_fraction` of the source is set aside."""
    test_fraction: Result[Fraction] = 0.2
    """Share of each class that becomes the test split where there is no other."""
    validation: Result[Fraction] = 0.1
    """Share of each class left out of training, moments, starts and controls; pool accuracies use it."""
    image_size: Result[Annotated[int, Field(ge=4)]] = 32
    """Height and width of all images, in pixels; others are resized and centre-cropped."""
    channels: Result[Literal[1, 3]] = 3
    """1 for greyscale, 3 for RGB; images are converted, transparency over white."""
    classes: Result[Annotated[tuple[str, ...], Field(min_length=1)] | None] = None
    """Use these classes alone, in this order."""
    limit_per_class: Result[Count | None] = None
    """Use at most so many training images of each class (those with the smallest id hashes)."""
    on_bad_image: Result[Literal["error"] | Fraction] = "error"
    """What becomes of images that cannot be decoded. error: the first one that is met ends the run. A fraction, such as
    0.01: they are left out and counted, up to that share of the source and of the test source each; for that, every
    image is decoded once before anything else."""
    license: Execution[str] = "unknown"
    """Licence of the data, for the card of the distilled set: an identifier that the Hugging Face hub knows, such as
    cc-by-4.0."""
    origin: Execution[str | None] = None
    """Where the data come from, for the card: a citation, a URL."""
    image_column: Result[str] = "image"
    """Parquet: column of images: encoded bytes, struct<bytes, path>, or uint8 tensors (h w), (h w c) or (c h w)."""
    label_column: Result[str] = "label"
    """Parquet: column of labels, either integers or class names."""


class GivenBase(Part):
    """A model that was trained elsewhere, of the one architecture in `pool.architectures`."""

    weights: Execution[str | None] = None
    """Its weights: a safetensors file, or a state_dict of torch.save, at a path or URI. None: bases are trained here.
    What counts is their hash, not where they lie."""
    classes: Execution[Literal["as_data"] | Annotated[tuple[str, ...], Field(min_length=1)] | None] = None
    """Class names of its outputs, in order; as_data: those of the data, in their order. None: those that the
    safetensors file names. They have to be the data's: a check, which changes nothing."""
    mean: Result[float | tuple[float, ...]] = 0.5
    """What is subtracted from pixels in [0, 1], for all channels or one each (ImageNet: [0.485, 0.456, 0.406])."""
    std: Result[Positive | tuple[Positive, ...]] = 0.25
    """What pixels are divided by then (ImageNet: [0.229, 0.224, 0.225])."""
    well_trained: Result[Fraction] = 0.5
    """For `generation: auto`: the share of the way from chance to perfect that the base's validation accuracy has
    to have gone to count as well trained."""


class Post(Part):
    """`generation: post`: members are copies of a trained base, pruned and fine-tuned."""

    ratios: Result[Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)]] = (0.0, 0.2, 0.4)
    """A member of each base for each: the share of channels that it loses, 0 for none. One ratio may stand several
    times: the place in this list is the seed of the fine-tuning."""
    epochs: Result[Count] = 1
    """Passes of the fine-tuning, all of it cosine to 0, without warm-up."""
    learning_rate: Result[Positive] = 5e-4
    """Peak rate of AdamW in the fine-tuning."""


class Pool(Placed):
    """The models M whose statistics S has to match."""

    generation: Result[Literal["prior", "post", "auto"]] = "prior"
    """prior: snapshots of an early training trajectory. post: pruned and fine-tuned copies of a trained base. auto:
    post where `pool.base` is well trained, prior where it is not, or where there is none."""
    architectures: Result[Annotated[tuple[str, ...], Field(min_length=1)]] = ("convnet",)
    """Architectures of the bases, such as `convnet:width=32`, `resnet18`, `torchvision/mobilenet_v2`."""
    seeds: Result[Annotated[tuple[Seed, ...], Field(min_length=1)]] = (0,)
    """One base per architecture and seed."""
    base: Result[GivenBase] = GivenBase()
    """A base to begin with: trajectories of a prior pool start from it, members of a post pool are copies of it."""
    snapshots: Result[Annotated[tuple[Count, ...], Field(min_length=1)]] = (2, 4, 6, 8, 10)
    """Epochs after which a base is kept as a member; the last one ends its training. A post pool takes the last."""
    post: Result[Post] = Post()
    """Pruning and fine-tuning of a post pool."""
    recalibrate: Result[bool] = False
    """Take the running statistics of each member's BatchNorms anew, over all training images with its weights fixed:
    those of training lag behind."""
    batch_size: Result[Count] = 64
    """Images per training step."""
    learning_rate: Result[Positive] = 2e-3
    """Peak rate of AdamW, after a warm-up of one epoch; cosine to 0 at the last snapshot."""
    weight_decay: Result[NonNegative] = 0.01
    """AdamW's weight decay."""
    augmentation: Result[Augmentation] = Augmentation()
    """Augmentation of the bases' training."""
    precision: Result[Literal["auto", "fp32", "bf16"]] = "auto"
    """bf16: products in bfloat16, weights and sums in fp32. auto: bf16 where the device does it fast."""
    workers_per_base: Result[Count] = 1
    """Workers that share each step of a base's training: its batch is cut among them, gradients are averaged. Each
    takes BatchNorm's statistics of its own part."""
    keep_bytes: Execution[Annotated[int, Field(ge=0)]] = 4 * 2**30
    """Training images are held in a worker's memory, 8 bits per value, where all of them take no more than this;
    otherwise they are decoded anew in each epoch."""


class Statistics(Placed):
    """The targets RM and RV of Eq. 7."""

    source: Result[Literal["moments", "buffers"]] = "moments"
    """moments: exact per-class moments from one pass over the data. buffers: the running statistics that BatchNorms
    keep from training, as in the paper; needs scope global and members with BatchNorms alone."""
    scope: Result[Literal["subset", "global", "blend"]] = "subset"
    """Targets of a unit: the mixture of its own classes, of all classes, or both losses blended."""
    blend: Result[Fraction] = 0.5
    """Weight of the global loss under `scope: blend`; the subset loss has the rest."""
    view: Result[Literal["augmented", "plain"]] = "augmented"
    """augmented: one draw of `synthesis.augmentation` per image; plain: the images as they are."""
    chunk_size: Result[Count | Literal["auto"]] = "auto"
    """Images per chunk: what one worker measures at a time and what is lost with it. Chunks follow the data's own
    order. auto: a 64th of the data in whole batches, 1,000 at least. Data in random order needs storage, until it is
    merged, for the moments of nearly all classes per chunk."""
    batch_size: Result[Count] = 100
    """Images per forward pass."""
    kernels: Result[bool | Literal["auto"]] = "auto"
    """On CPUs: own C++ kernels, as `synthesis.kernels`. auto: where there is a C++ compiler to build them."""
    decoders: Execution[Count] = 1
    """Threads of each worker that decode images ahead of the models."""


class Curriculum(Part):
    """Easier views in the first part of the steps. The last views are those of `synthesis.augmentation`, of which
    the statistics are taken."""

    share: Result[Fraction] = 0.5
    """Share of the steps that the curriculum takes."""
    crop_scale: Result[tuple[Positive, Positive] | None] = None
    """Crop scale at the first step; moves in a straight line to that of `synthesis.augmentation`."""
    image_size: Result[Annotated[int, Field(ge=4)] | None] = None
    """Height and width of the views in that part, in pixels: fewer make its steps cheaper. Needs models that take
    images of any size."""


class Mosaic(Part):
    """`start: mosaic`: an image starts as a grid of patches of its class, each the best of several by the pool."""

    grid: Result[Annotated[int, Field(ge=2)]] = 2
    """Patches along each side of an image; should divide data.image_size."""
    candidates: Result[Count] = 5
    """Patches drawn for each place, of which the one with the lowest cross-entropy under the pool is kept."""
    crop_scale: Result[tuple[Positive, Positive]] = (0.5, 1.0)
    """Smallest and largest share of a real image that a patch shows."""


class Synthesis(Placed):
    """Optimisation of S by Eq. 7."""

    images_per_class: Result[Count] = 10
    """Synthetic images per class (IPC)."""
    steps: Result[Count] = 500
    """Optimiser steps per unit."""
    models_per_step: Result[Count] = 1
    """n: members drawn without replacement at each step."""
    ce_weight: Result[NonNegative] = 1.0
    """u: weight of the cross-entropy."""
    first_layer_factor: Result[NonNegative] = 1.0
    """w of the first tapped layer; all others have 1 (SRe2L uses 10)."""
    normalise_layers: Result[bool] = False
    """Divide each layer's term by the root of its channels, so that u carries over between architectures."""
    tv_weight: Result[NonNegative] = 0.0
    """Weight of a prior: total variation, the summed absolute differences of neighbouring pixels of an image."""
    l2_weight: Result[NonNegative] = 0.0
    """Weight of a prior: summed squared distances of an image's pixels from grey."""
    learning_rate: Result[Positive] = 0.02
    """Peak rate of Adam (0.5, 0.9), in units of the pixel range [0, 1]; cosine to 0."""
    start: Result[Literal["real", "mosaic", "noise"]] = "real"
    """What the images start from: random real images of their class, mosaics of scored patches, or noise."""
    mosaic: Result[Mosaic] = Mosaic()
    """How mosaics are made."""
    formation: Result[Count] = 1
    """f: an image holds f x f smaller ones, each enlarged to a whole image before a model sees it, in the synthesis and
    afterwards: more content in equal bytes. Every epoch of a student takes one of each image, in turn."""
    augmentation: Result[Augmentation] = Augmentation()
    """A: what S passes through before the models see it."""
    curriculum: Result[Curriculum] = Curriculum()
    """Easier views in the first part of the steps; none by default."""
    classes_per_unit: Result[Count] = 10
    """Classes optimised together. Units of disjoint classes run at the same time."""
    slots_per_unit: Result[Count] = 10
    """Images of each class optimised together. A larger IPC keeps the units of a smaller one
    wherever this divides it; small blocks carry poor statistics."""
    precision: Result[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of activations and weights; statistics, losses and images are fp32 always. auto: what the device does fast."""
    compile: Result[bool | Literal["auto", "graphs"]] = "auto"
    """Compile the models with torch.compile; graphs: into CUDA graphs. auto: where a unit's work is worth the
    warm-up, without graphs."""
    kernels: Result[bool | Literal["auto"]] = "auto"
    """On CPUs in fp32: own C++ kernels, 3x3 convolutions by Winograd's algorithm and statistics in one pass. auto:
    where there is a C++ compiler to build them."""
    checkpoint_s: Execution[NonNegative] = 60.0
    """Seconds between two checkpoints of a unit: what a lost worker costs at most."""


class LabelMembers(Part):
    """Members of the pool: those whose every property is in the list given for it; all without a list."""

    architectures: Result[Annotated[tuple[str, ...], Field(min_length=1)] | None] = None
    """Of these architectures."""
    seeds: Result[Annotated[tuple[Seed, ...], Field(min_length=1)] | None] = None
    """Of these seeds: of a prior pool, those of the bases; of a post pool, the places among `pool.post.ratios`."""
    epochs: Result[Annotated[tuple[Count, ...], Field(min_length=1)] | None] = None
    """Snapshots after these epochs: early ones label best at 32 pixels (EDC, 2024)."""
    ratios: Result[Annotated[tuple[float, ...], Field(min_length=1)] | None] = None
    """Pruned by these ratios."""


class Labels(Placed):
    """Soft labels of the ensemble, one per image and view."""

    mode: Result[Literal["fp16", "top_k", "none"]] = "fp16"
    """What is stored: fp16, every class of a label in 16 bits; top_k, its largest probabilities, and what they leave of
    1 goes to the other classes in equal parts; none, no labels: the members are published instead, and label every view
    as it is trained on."""
    top_k: Result[Count] = 5
    """Classes that a label of `mode: top_k` keeps."""
    views: Result[Count] = 100
    """Augmented views per image that are labelled. A student's epochs take them in turn, from the first again
    after the last. Under `mode: none` every epoch has views of its own."""
    averaged: Result[bool] = False
    """Store one label per image, the mean over its views. Students see a view of its own in every epoch then."""
    members: Result[Literal["all"] | LabelMembers] = "all"
    """Which members of the pool label: all, or those of the epochs, architectures, seeds or ratios listed."""
    ensemble: Result[Literal["probabilities", "logits"]] = "probabilities"
    """What is averaged over members and stored. logits: for students of `evaluation.loss: logit_mse`."""
    temperature: Result[Positive] = 1.0
    """tau of the softmax, for labels and students alike."""
    augmentation: Result[Augmentation] = Augmentation()
    """What makes a view of an image."""
    cutmix: Result[Annotated[float, Field(ge=0, le=1)]] = 0.0
    """Share of the views into which a box of the same view of another image of the set is laid (CutMix, Yun et al.,
    2019, with lambda drawn from [0, 1])."""
    batch_size: Result[Count] = 100
    """Images per labelling batch; batches follow the image ids."""
    precision: Result[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of the members while they label; labels are averaged in fp32. auto: bf16 where the device does it fast. Under
    `mode: none` members label in fp32 always."""
    images_per_file: Result[Count] = 1000
    """Images per Parquet file of a labelled set."""
    kernels: Result[bool | Literal["auto"]] = "auto"
    """On CPUs: own C++ kernels, as `synthesis.kernels`. auto: where there is a C++ compiler to build them."""


Control = Literal[
    "random_soft",
    "random_hard",
    "start_soft",
    "start_hard",
    "distilled_hard",
    "distilled_plain",
    "random_plain",
    "full_data",
]


class Steps(Part):
    """`schedule: steps`: when the rate falls, and by how much."""

    at: Result[Annotated[tuple[Fraction, ...], Field(min_length=1)]] = (0.8, 0.9, 0.95)
    """Shares of the training, without its warm-up, after each of which the rate is multiplied by the factor. The
    defaults are EDC's for CIFAR-10; DC has [0.5] and a factor of 0.1."""
    factor: Result[Fraction] = 0.5
    """What the rate is multiplied by."""


class Evaluation(Placed):
    """What the distilled set is worth: accuracy of students on the test split, beside controls."""

    students: Result[Annotated[tuple[str, ...], Field(min_length=1)]] = ("convnet",)
    """Architectures of the students; the first one gives the headline."""
    seeds: Result[Annotated[tuple[Seed, ...], Field(min_length=1)]] = (0, 1, 2)
    """One student per seed; random controls draw a new subset for each."""
    epochs: Result[Count] = 300
    """Passes over a small set; the last one counts."""
    longer_epochs: Result[tuple[Count, ...]] = ()
    """Further budgets: every small set is trained on again, for so many epochs each. A lead over random images under
    soft labels shrinks as students train longer."""
    batch_size: Result[Count] = 25
    """Images per student step."""
    learning_rate: Result[Positive | Annotated[tuple[Positive, ...], Field(min_length=1)]] = 2e-3
    """Peak rate of the optimiser. Of several, each student is trained with each, and the one that is best on the
    validation part counts."""
    weight_decay: Result[NonNegative] = 0.01
    """The optimiser's weight decay."""
    loss: Result[Literal["kl", "logit_mse"]] = "kl"
    """How students learn from soft labels. kl: KL divergence at `labels.temperature`. logit_mse: mean squared error of
    the logits. Hard labels always take cross-entropy."""
    ce_weight: Result[NonNegative] = 0.0
    """Weight of a cross-entropy with the hard label that is added to the loss of soft labels (EDC: 0.025 to 0.1)."""
    optimiser: Result[Literal["adamw", "sgd"]] = "adamw"
    """sgd: with `momentum`, and `weight_decay` as an L2 penalty."""
    momentum: Result[Annotated[float, Field(ge=0, lt=1)]] = 0.9
    """Momentum of `optimiser: sgd`."""
    schedule: Result[Literal["cosine", "half_cosine", "steps", "constant"]] = "cosine"
    """How the rate goes from its peak. cosine: to 0. half_cosine: to half of the peak, as in RDED. steps: down at
    `steps.at`. constant: not at all."""
    steps: Result[Steps] = Steps()
    """When the rate falls under `schedule: steps`."""
    precision: Result[Literal["auto", "fp32", "bf16"]] = "auto"
    """Of the students' training, as `pool.precision`; they are measured in fp32."""
    warmup_epochs: Result[Annotated[int, Field(ge=0)]] = 0
    """Epochs in which the rate first rises in a straight line to its peak."""
    ema: Result[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Decay per step of a running average of the weights, which is then what is measured; 0: none. It forgets over
    1 / (1 - ema) steps: with few steps in all, 0.99 helps and 0.999 has not yet left the start."""
    controls: Result[tuple[Control, ...]] = ("random_soft", "random_hard", "start_soft", "distilled_hard", "full_data")
    """What is trained beside the distilled set, under the same student recipe: random real images with soft or hard
    labels, the images that the synthesis started from, the distilled images with hard labels, the whole training
    set with hard labels, and _plain: without augmentation, each image with the soft label of itself."""
    full_data_epochs: Result[Count] = 30
    """Passes over the whole training set for `full_data`."""
    keep_bytes: Execution[Annotated[int, Field(ge=0)]] = 4 * 2**30
    """The training images are held in the memory of each student of `full_data`, 8 bits per value, where all of them
    take no more than this; otherwise each batch is decoded when it is needed."""


class Cluster(Part):
    """Where the work runs."""

    address: Execution[str | None] = None
    """Address of a running Ray cluster (`auto` to find it); none starts Ray on this machine."""
    wait_s: Execution[NonNegative] = 600.0
    """Seconds to wait for an autoscaler to bring resources; without one nothing is waited for."""


class Logs(Part):
    """What a run tells of itself beside its results."""

    form: Execution[Literal["text", "json"]] = "text"
    """text: progress for people. json: one object per line, the workers' own log files under Ray's included, with
    stage, item (a unit, say) and node."""
    tensorboard: Execution[bool] = False
    """Write the curves of every stage of a finished run to runs/<name>/tensorboard/, one run of TensorBoard's per
    training, unit and student."""


Objective = Literal["accuracy", "improvement", "images", "bytes", "seconds"]
Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class Axis(Part):
    """What a sweep tries for one key: one of the four."""

    grid: Execution[Values | None] = None
    """Each of these values with each combination of the other keys' (`sampler: grid`)."""
    choice: Execution[Values | None] = None
    """One of these values, drawn."""
    uniform: Execution[tuple[float, float] | None] = None
    """[low, high]: drawn from between, whole numbers where the key takes no others."""
    log_uniform: Execution[tuple[float, float] | None] = None
    """[low, high], both above 0: its logarithm is drawn."""


class Stopping(Part):
    """Successive halving (ASHA, Li et al., 2020): the first student of a trial is measured at some epochs, and the
    trial ends where others did better by then."""

    grace_epochs: Execution[Count]
    """Epochs that every trial gets."""
    reduction: Execution[Annotated[int, Field(ge=2)]] = 3
    """At each epoch where trials are compared, of so many one goes on; the next is so many times later."""


class Trackers(Part):
    """Where else a sweep's trials are shown, by Ray Tune's own callbacks."""

    tensorboard: Execution[bool] = False
    """runs/<name>/tensorboard/, with what TensorBoard needs for its view of hyperparameters."""
    mlflow: Execution[str | None] = None
    """URI of an MLflow tracking server or folder; needs the package mlflow."""
    wandb: Execution[str | None] = None
    """Project of Weights & Biases; needs the package wandb, and its key in WANDB_API_KEY."""


class Sweep(Part):
    """Trials of the recipe with other values of some keys, all measured on the validation part."""

    space: Execution[Annotated[dict[str, Axis], Field(min_length=1)]]
    """Dotted key of the recipe -> what is tried for it."""
    sampler: Execution[Literal["grid", "random", "optuna"]] = "grid"
    """grid: every combination. random: draws. optuna: draws that learn from the trials before (needs the package
    optuna); with several objectives, towards their front."""
    trials: Execution[Count | None] = None
    """How many trials random and optuna draw; a larger number later adds to the same ones."""
    seconds: Execution[Positive | None] = None
    """Begin no more trials, and end those that run, after so long. The same command goes on for as long again."""
    objectives: Execution[Annotated[tuple[Objective, ...], Field(min_length=1)]] = ("accuracy",)
    """What makes a trial good. accuracy: of the first student on the validation part. improvement: of it over random
    real images under the same labels. images, bytes (as stored, labels included) and seconds (of workers, pool and
    statistics included) are better when fewer. The winner is the best by the first of them."""
    seed: Execution[Seed] = 0
    """Of the draws of random and optuna."""
    at_once: Execution[Count | Literal["auto"]] = "auto"
    """Trials at a time. auto: as many as the cluster holds workers of the synthesis, 8 at most."""
    stopping: Execution[Stopping | None] = None
    """End bad trials early; by default none is."""
    trackers: Execution[Trackers] = Trackers()
    """Where else trials are shown."""


class Recipe(Part):
    """A whole distillation."""

    name: Execution[Name]
    """Name of the run: results go to runs/<name>/."""
    seed: Result[Seed] = 0
    """Seed of every draw after the pool."""
    storage: Execution[str] = "."
    """Where artifacts/ and runs/ lie: a path or any URI that pyarrow.fs opens, without credentials."""
    data: Result[Data]
    pool: Result[Pool] = Pool()
    statistics: Result[Statistics] = Statistics()
    synthesis: Result[Synthesis] = Synthesis()
    labels: Result[Labels] = Labels()
    evaluation: Result[Evaluation] = Evaluation()
    cluster: Execution[Cluster] = Cluster()
    logs: Execution[Logs] = Logs()
    sweep: Execution[Sweep | None] = None
    """What `teddy-ray sweep` tries; other commands pass over it."""


def result_fields(part: Part) -> dict[str, Any]:
    """The fields of a part that can change bytes, nested, as plain JSON values."""
    fields: dict[str, Any] = {}
    for name, info in type(part).model_fields.items():
        if Role.RESULT not in info.metadata:
            continue
        value = getattr(part, name)
        fields[name] = result_fields(value) if isinstance(value, Part) else value
    return fields
