"""Every metric by name: whose rows it reads, what it makes of them, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from vdm.errors import UserError, nearest
from vdm.evaluation.candidates import Kind, of_templates
from vdm.evaluation.classified import accuracy, pair_accuracy
from vdm.evaluation.matching import OTHERS, r_precision, r_precision_rank
from vdm.evaluation.measures import (
    ALL,
    BLOCKS,
    SEED,
    Columns,
    Distance,
    Measure,
    Median,
    PerClip,
    Score,
    Unmeasurable,
    column,
)
from vdm.evaluation.networks import CLIP_COLUMNS
from vdm.evaluation.options import USUAL, Options
from vdm.evaluation.pixels import FLOW_COLUMNS, FRAME_COLUMNS
from vdm.evaluation.verdicts import marked
from vdm.metrics.clip import relative_clipsim
from vdm.metrics.frechet import frechet_distance, frechet_infinity, kernel_distance
from vdm.metrics.inception import inception_score
from vdm.metrics.toy import FEATURES

Better = Literal["higher", "lower", "as the reference"]
HIGHER: Better = "higher"
LOWER: Better = "lower"
ALIKE: Better = "as the reference"
UNBIASED = {"cov": "unbiased"}
KERNEL = {"kernel": "(x.y / D + 1)^3, unbiased"}
CANDIDATES = {"candidates": "own prompt and 99 of other templates, of the reference; drawn by prompt and seed"}
IN_ACTIONS = {"candidates": "own objects in all templates of Something-Something with as many slots"}
IN_OBJECTS = {"candidates": f"own template with the objects of up to {OTHERS} prompts of the reference"}
IN_PAIRS = {"candidates": "own template and each that is its mirror image, its reverse or its pretence"}
OTHER_PROMPTS = {"chance": "the prompts of all clips in place of the own"}
LOGITS, VIDEOMAE = 400, 1408  # features of I3D, and of VideoMAE-v2-g


@dataclass(frozen=True)
class Metric:
    """`about` is a line for the report; `protocol` what the record says beyond the extractor's own."""

    name: str
    extractor: str
    measure: Measure
    better: Better
    about: str
    protocol: Mapping[str, object] = field(default_factory=dict)


def _biased(x: Tensor, y: Tensor) -> float:
    return frechet_distance(x, y, unbiased=False)


def _fvd_inf(x: Tensor, y: Tensor) -> float:
    return frechet_infinity(x, y, seed=SEED)


def _fvd_inf_biased(x: Tensor, y: Tensor) -> float:
    return frechet_infinity(x, y, seed=SEED, unbiased=False)


BIASED = {frechet_distance: _biased, _fvd_inf: _fvd_inf_biased}


def _relative(x: Tensor, y: Tensor) -> float:
    """GODIVA's RM. Raises Unmeasurable."""
    try:
        return relative_clipsim(x, y)
    except ValueError as error:
        raise Unmeasurable(
            "the reference's clips do not match their prompts, so there is nothing to hold against"
        ) from error


def _is(logits: Tensor) -> float:
    return inception_score(logits)[0]


def _is_of_ten(logits: Tensor) -> float:
    """Of 12 clips or more, for the jackknife leaves out 2 of 12 and 3 of 11."""
    return inception_score(logits, splits=10, seed=SEED)[0]


def _spread_of_ten(logits: Tensor) -> float:
    """The standard deviation of the score over the 10 shares, of which `is_10_splits` is the mean: what papers write
    behind their +-. It is of shares of a tenth of the clips, and no interval of the mean, which `ci95` is."""
    return inception_score(logits, splits=10, seed=SEED)[1]


def _frechet(num_features: int, columns: Columns = ALL) -> Distance:
    return Distance(frechet_distance, columns, trusted=num_features)


def _kernel(columns: Columns = ALL) -> Distance:
    return Distance(kernel_distance, columns, trusted=BLOCKS)  # as many as its interval has blocks


def _retrieved(at: int) -> PerClip:
    return r_precision(len(CLIP_COLUMNS), at=at)


def _made(kind: Kind) -> PerClip:
    return of_templates(kind, len(CLIP_COLUMNS))


_frames = {name: column(i) for i, name in enumerate(FRAME_COLUMNS)}
_flows = {name: column(i, share=name == "dynamic_degree") for i, name in enumerate(FLOW_COLUMNS)}
_clip = {name: column(i) for i, name in enumerate(CLIP_COLUMNS)}
_ratio = Distance(_relative, (0, 1), shifts=False)
_toy: Columns = (0, FEATURES)

_ALL = (
    Metric("fvd", "i3d", _frechet(LOGITS), LOWER, "Frechet distance of I3D's logits", UNBIASED),
    Metric(
        "fvd_inf", "i3d", Distance(_fvd_inf, least=3 * LOGITS, trusted=3 * LOGITS, certain=False), LOWER,
        "the same for endless sets", UNBIASED,
    ),
    Metric("kvd", "i3d", _kernel(), LOWER, "kernel distance of I3D's logits; for few clips", KERNEL),
    Metric("fvd_rep2", "i3d_rep2", _frechet(LOGITS), LOWER, "FVD of short clips with each frame shown twice", UNBIASED),
    Metric("kvd_rep2", "i3d_rep2", _kernel(), LOWER, "kernel distance of the same", KERNEL),
    Metric("fvd_i3d_imagenet", "i3d_imagenet", _frechet(LOGITS), LOWER, "by weights from ImageNet on", UNBIASED),
    Metric("fvd_videomae", "videomae", _frechet(VIDEOMAE), LOWER, "content-debiased FVD, by VideoMAE", UNBIASED),
    Metric("kvd_videomae", "videomae", _kernel(), LOWER, "kernel distance by the same", KERNEL),
    Metric(
        "ssv2_action_accuracy", "ssv2", accuracy(at=1), HIGHER, "own template first of SSv2's 174, by VideoMAE",
        OTHER_PROMPTS,
    ),
    Metric("ssv2_action_accuracy_5", "ssv2", accuracy(at=5), HIGHER, "own template among the first 5", OTHER_PROMPTS),
    Metric(
        "ssv2_pair_accuracy", "ssv2", pair_accuracy(), HIGHER,
        "own template before its mirror image, reverse or pretence; by chance 0.5",
    ),
    Metric("is", "c3d", Score(_is), HIGHER, "Inception score by C3D of UCF-101, 1 to 101; one split"),
    Metric("is_10_splits", "c3d", Score(_is_of_ten, least=12), HIGHER, "mean of 10 shares of the clips"),
    Metric(
        "is_10_splits_std", "c3d", Score(_spread_of_ten, least=20, certain=False), ALIKE,
        "standard deviation over the 10 shares",
    ),
    Metric("is_i3d_k400", "i3d", Score(_is), HIGHER, "Inception score by I3D, 1 to 400; one split"),
    Metric("clipsim", "clip", _clip["clipsim"], HIGHER, "mean cosine of frames and prompt, by CLIP"),
    Metric("clipsim_rm", "clip", _ratio, HIGHER, "CLIPSIM over that of the reference; 1 is as good"),
    Metric("clip_score", "clip", _clip["clip_score"], HIGHER, "2.5 max(cosine, 0), with the prefix A photo depicts"),
    Metric("r_precision", "clip", _retrieved(1), HIGHER, "own prompt first of 100; by chance 0.01", CANDIDATES),
    Metric("r_precision_5", "clip", _retrieved(5), HIGHER, "own prompt among the first 5; by chance 0.05", CANDIDATES),
    Metric("r_precision_10", "clip", _retrieved(10), HIGHER, "own prompt among the first 10; by chance .1", CANDIDATES),
    Metric(
        "r_precision_median_rank", "clip", Median(r_precision_rank(len(CLIP_COLUMNS))), LOWER,
        "the own prompt's middle place among 100; by chance 50.5", CANDIDATES,
    ),
    Metric("rp_action", "clip", _made("action"), HIGHER, "own prompt before other actions of its objects", IN_ACTIONS),
    Metric("rp_object", "clip", _made("object"), HIGHER, "own prompt before other objects in its action", IN_OBJECTS),
    Metric(
        "rp_pair", "clip", _made("pair"), HIGHER, "own prompt before a look-alike; CLIP cannot see the order of frames",
        IN_PAIRS,
    ),
    Metric("subject_consistency", "dino", column(0), HIGHER, "DINO's likeness to first and last frame; a still has 1"),
    Metric(
        "background_consistency", "clip", _clip["background_consistency"], HIGHER, "CLIP's; a still has 1",
        {"interp": "bicubic"},
    ),
    Metric("frame_ssim", "frames", _frames["frame_ssim"], ALIKE, "SSIM of consecutive frames; a still has 1"),
    Metric("flicker", "frames", _frames["flicker"], ALIKE, "1 - mean difference of consecutive frames; a still has 1"),
    Metric("motion_energy", "frames", _frames["motion_energy"], ALIKE, "mean difference of consecutive frames, 0 to 1"),
    Metric("ms_flow", "flows", _flows["ms_flow"], HIGHER, "how little the flow changes; a still has 1"),
    Metric("static_share", "flows", _flows["static_share"], ALIKE, "pairs of frames between which nothing moves"),
    Metric("ms_vfi_dis", "flows", _flows["ms_vfi_dis"], HIGHER, "how well a frame follows from its neighbours"),
    Metric("warping_error", "flows", _flows["warping_error"], LOWER, "what is left when motion is undone; MSE, 0 to 1"),
    Metric("warping_coverage", "flows", _flows["warping_coverage"], ALIKE, "share of pixels that can be followed"),
    Metric("dynamic_degree", "flows", _flows["dynamic_degree"], ALIKE, "share of clips in which something moves fast"),
    Metric(
        "dynamic_degree_mean", "flows", _flows["dynamic_degree_mean"], ALIKE,
        "speed, pixels in an eighth second; below 12 fps, from frame to frame",
    ),
    Metric("valid_rate", "judge", marked("valid"), HIGHER, "all colours asked for are there"),
    Metric("action_accuracy", "judge", marked("action"), HIGHER, "the action asked for, by fixed rules"),
    Metric("direction_accuracy", "judge", marked("direction"), HIGHER, "the direction asked for"),
    Metric("colour_accuracy", "judge", marked("colour"), HIGHER, "what is acted on has its colours"),
    Metric("shape_accuracy", "judge", marked("shape"), HIGHER, "what is acted on has its shapes"),
    Metric("joint_accuracy", "judge", marked("joint"), HIGHER, "action, colours and shapes at once"),
    Metric("fvd_toy", "toy", _frechet(FEATURES, _toy), LOWER, "by a classifier of mini-something", UNBIASED),
    Metric("kvd_toy", "toy", _kernel(_toy), LOWER, "kernel distance by the same", KERNEL),
    Metric("is_toy", "toy", Score(_is, (FEATURES, None)), HIGHER, "Inception score by the same, 1 to 16"),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def chosen(names: Sequence[str] | None, options: Options = USUAL) -> list[Metric]:
    """The metrics of some names, in the order of the table; all where None. Raises UserError for an unknown one, or
    where no name is given."""
    if names is not None and not names:
        raise UserError("--metrics names no metric; leave it out to measure all")
    for name in names or ():
        if name not in METRICS:
            close = nearest(name, METRICS)
            hint = f"did you mean {close}? " if close else ""
            raise UserError(f"there is no metric {name!r}; {hint}there are {', '.join(METRICS)}")
    wanted = [metric for metric in METRICS.values() if names is None or metric.name in names]
    return wanted if options.cov == "unbiased" else [_with_biased(metric) for metric in wanted]


def _with_biased(metric: Metric) -> Metric:
    """With covariances divided by N, where there are any."""
    if not isinstance(metric.measure, Distance) or metric.measure.of not in BIASED:
        return metric
    measure = replace(metric.measure, of=BIASED[metric.measure.of])
    return replace(metric, measure=measure, protocol={**metric.protocol, "cov": "biased"})
