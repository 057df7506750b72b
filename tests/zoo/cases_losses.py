"""Cases: every loss of torch with its reductions, weights and ignored targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, Apply, classification, mlp, regression
from .registry import Problem, case

Data = list[tuple[Any, Any]]


def real() -> Data:
    return regression(4, outputs=(3,))


def near() -> Data:
    """Return targets near zero, so that a Huber loss uses both of its branches."""
    return [(x, 0.7 * y) for x, y in real()]


def classes() -> Data:
    return classification(4)


def binary() -> Data:
    return [(torch.randn(b, 4), torch.randint(2, (b, 3)).double()) for b in SIZES]


def soft() -> Data:
    return [(torch.randn(b, 4), torch.rand(b, 3)) for b in SIZES]


def distributions() -> Data:
    return [(torch.randn(b, 4), torch.randn(b, 3).softmax(1)) for b in SIZES]


def log_distributions() -> Data:
    return [(torch.randn(b, 4), torch.randn(b, 3).log_softmax(1)) for b in SIZES]


def counts() -> Data:
    return [(torch.randn(b, 4), torch.randint(5, (b, 3)).double()) for b in SIZES]


def signs(*shape: int) -> Data:
    return [(torch.randn(b, 4), 2.0 * torch.randint(2, (b, *shape)).double() - 1) for b in SIZES]


def label_lists() -> Data:
    rows = torch.tensor([[0, -1, 0], [2, 1, -1], [1, -1, 2], [0, 2, 1], [2, -1, 1], [1, 0, 2]])
    return [(torch.randn(b, 4), rows[:b]) for b in SIZES]


LOG = partial(nn.LogSoftmax, dim=1)
Losses = dict[str, tuple[Callable[..., nn.Module], Callable[[], Data], Callable[[], nn.Module]]]
LOSSES: Losses = {
    "mse": (nn.MSELoss, real, nn.Identity),
    "l1": (nn.L1Loss, real, lambda: Apply(torch.exp)),
    "smooth_l1": (nn.SmoothL1Loss, near, nn.Identity),
    "smooth_l1_beta": (partial(nn.SmoothL1Loss, beta=0.5), near, nn.Identity),
    "huber": (nn.HuberLoss, near, nn.Identity),
    "huber_delta": (partial(nn.HuberLoss, delta=0.4), near, nn.Identity),
    "cross_entropy": (nn.CrossEntropyLoss, classes, nn.Identity),
    "cross_entropy_smoothed": (
        partial(nn.CrossEntropyLoss, label_smoothing=0.1),
        classes,
        nn.Identity,
    ),
    "cross_entropy_soft_targets": (nn.CrossEntropyLoss, distributions, nn.Identity),
    "nll": (nn.NLLLoss, classes, LOG),
    "bce": (nn.BCELoss, soft, nn.Sigmoid),
    "bce_with_logits": (nn.BCEWithLogitsLoss, binary, nn.Identity),
    "kl_div": (nn.KLDivLoss, distributions, LOG),
    "kl_div_log_target": (partial(nn.KLDivLoss, log_target=True), log_distributions, LOG),
    "poisson_nll": (nn.PoissonNLLLoss, counts, nn.Identity),
    "poisson_nll_full": (
        partial(nn.PoissonNLLLoss, log_input=False, full=True),
        counts,
        nn.Softplus,
    ),
    "soft_margin": (nn.SoftMarginLoss, partial(signs, 3), nn.Identity),
    "hinge_embedding": (nn.HingeEmbeddingLoss, partial(signs, 3), lambda: Apply(torch.exp)),
    "multi_margin": (nn.MultiMarginLoss, classes, lambda: Apply(torch.exp)),
    "multi_margin_squared": (partial(nn.MultiMarginLoss, p=2), classes, nn.Identity),
    "multilabel_margin": (nn.MultiLabelMarginLoss, label_lists, lambda: Apply(torch.exp)),
    "multilabel_soft_margin": (nn.MultiLabelSoftMarginLoss, binary, nn.Identity),
}


def criterion(
    make: Callable[..., nn.Module],
    data: Callable[[], Data],
    last: Callable[[], nn.Module],
    reduction: str,
) -> Problem:
    """Return the criterion on the outputs of a small network."""
    model = nn.Sequential(mlp(), last())
    return Problem(model, data(), make(reduction=reduction))


for _name, (_make, _data, _last) in LOSSES.items():
    _warns = "batchmean" if _name.startswith("kl_div") else None  # torch's own advice
    case(f"{_name}_mean", warns=_warns)(partial(criterion, _make, _data, _last, "mean"))
    case(f"{_name}_sum", total=True)(partial(criterion, _make, _data, _last, "sum"))
case("kl_div_batchmean")(partial(criterion, nn.KLDivLoss, distributions, LOG, "batchmean"))


WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def by_class(data: Data) -> list[float]:
    return [WEIGHTS[y].sum().item() for _, y in data]


@case("cross_entropy_class_weights")
def cross_entropy_class_weights() -> Problem:
    data = classes()
    return Problem(mlp(), data, nn.CrossEntropyLoss(WEIGHTS), weights=by_class(data))


@case("cross_entropy_class_weights_smoothed")
def cross_entropy_class_weights_smoothed() -> Problem:
    data = classes()
    loss = nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2)
    return Problem(mlp(), data, loss, weights=by_class(data))


@case("cross_entropy_class_weights_sum", total=True)
def cross_entropy_class_weights_sum() -> Problem:
    return Problem(mlp(), classes(), nn.CrossEntropyLoss(WEIGHTS, reduction="sum"))


@case("nll_class_weights")
def nll_class_weights() -> Problem:
    data = classes()
    return Problem(nn.Sequential(mlp(), LOG()), data, nn.NLLLoss(WEIGHTS), weights=by_class(data))


def some_ignored(index: int) -> Data:
    data = classes()
    for _, y in data:
        y[1:3] = index
    data[0][1][4] = index
    return data


@case("cross_entropy_ignore_index")
def cross_entropy_ignore_index() -> Problem:
    loss = nn.CrossEntropyLoss(ignore_index=7)
    return Problem(mlp(), some_ignored(7), loss, weights=[3, 2])


@case("cross_entropy_default_ignore_index")
def cross_entropy_default_ignore_index() -> Problem:
    return Problem(mlp(), some_ignored(-100), nn.CrossEntropyLoss(), weights=[3, 2])


@case("functional_cross_entropy_ignored")
def functional_cross_entropy_ignored() -> Problem:
    return Problem(mlp(), some_ignored(-100), F.cross_entropy, weights=[3, 2])


@case("nll_ignore_index")
def nll_ignore_index() -> Problem:
    model = nn.Sequential(mlp(), LOG())
    return Problem(model, some_ignored(5), nn.NLLLoss(ignore_index=5), weights=[3, 2])


@case("cross_entropy_images_weighted_ignored")
def cross_entropy_images_weighted_ignored() -> Problem:
    data = []
    for b in SIZES:
        y = torch.randint(3, (b, 2, 2))
        y[0] = 255
        data.append((torch.randn(b, 2, 2, 2), y))
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    weights = [WEIGHTS[y[1:]].sum().item() for _, y in data]
    loss = nn.CrossEntropyLoss(WEIGHTS, ignore_index=255)
    return Problem(model, data, loss, weights=weights)


@case("mse_of_unequal_lengths")
def mse_of_unequal_lengths() -> Problem:
    data = [(torch.randn(b, t, 4), torch.randn(b, t, 3)) for b, t in ((6, 2), (4, 5))]
    return Problem(mlp(), data, nn.MSELoss(), weights=[12, 20])


@case("cross_entropy_of_unequal_lengths")
def cross_entropy_of_unequal_lengths() -> Problem:
    data = [(torch.randn(b, t, 4), torch.randint(3, (b, t))) for b, t in ((6, 2), (4, 5))]
    model = nn.Sequential(mlp(), Apply(lambda x: x.transpose(1, 2)))
    return Problem(model, data, nn.CrossEntropyLoss(), weights=[12, 20])


@case("bce_with_logits_pos_weight")
def bce_with_logits_pos_weight() -> Problem:
    return Problem(mlp(), binary(), nn.BCEWithLogitsLoss(pos_weight=WEIGHTS))


@case("bce_with_logits_weight")
def bce_with_logits_weight() -> Problem:
    return Problem(mlp(), binary(), nn.BCEWithLogitsLoss(weight=WEIGHTS))


@case("bce_weight")
def bce_weight() -> Problem:
    return Problem(nn.Sequential(mlp(), nn.Sigmoid()), soft(), nn.BCELoss(weight=WEIGHTS))


@case("multi_margin_weight")
def multi_margin_weight() -> Problem:
    model = nn.Sequential(mlp(), Apply(torch.exp))
    return Problem(model, classes(), nn.MultiMarginLoss(weight=WEIGHTS, margin=0.7))


@case("multilabel_soft_margin_weight")
def multilabel_soft_margin_weight() -> Problem:
    return Problem(mlp(), binary(), nn.MultiLabelSoftMarginLoss(weight=WEIGHTS))


GAUSSIANS = {"gaussian_nll": {}, "gaussian_nll_full": {"full": True}}
for _name, _options in GAUSSIANS.items():
    for _reduction in ("mean", "sum"):

        @case(f"{_name}_{_reduction}", total=_reduction == "sum")
        def gaussian_nll(
            options: dict[str, Any] = _options, reduction: str = _reduction
        ) -> Problem:
            criterion = nn.GaussianNLLLoss(reduction=reduction, **options)

            def loss(outputs: Tensor, targets: Tensor) -> Tensor:
                mean, spread = outputs.chunk(2, dim=1)
                return criterion(mean, targets, F.softplus(spread))

            return Problem(mlp(outputs=4), regression(4), loss)


Triple = Callable[..., nn.Module]
PAIRED: dict[str, tuple[Triple, int, bool]] = {
    "cosine_embedding": (partial(nn.CosineEmbeddingLoss, margin=0.1), 2, True),
    "margin_ranking": (partial(nn.MarginRankingLoss, margin=0.5), 2, True),
    "triplet_margin": (partial(nn.TripletMarginLoss, margin=2.0), 3, False),
    "triplet_margin_swap": (partial(nn.TripletMarginLoss, p=3, swap=True), 3, False),
    "triplet_with_distance": (
        partial(
            nn.TripletMarginWithDistanceLoss,
            distance_function=lambda a, b: 1 - F.cosine_similarity(a, b),
        ),
        3,
        False,
    ),
}


def paired(make: Triple, arms: int, labelled: bool, reduction: str, ranking: bool) -> Problem:
    """Return a loss of two or three outputs of one network."""
    criterion = make(reduction=reduction)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        parts = list(outputs.chunk(arms, dim=1))
        parts = [part.square().sum(1) for part in parts] if ranking else parts
        return criterion(*parts, *([targets] if labelled else []))

    return Problem(mlp(outputs=3 * arms), signs(), loss)


for _name, (_triple, _arms, _labelled) in PAIRED.items():
    for _reduction in ("mean", "sum"):
        case(f"{_name}_{_reduction}", total=_reduction == "sum")(
            partial(paired, _triple, _arms, _labelled, _reduction, _name == "margin_ranking")
        )


def ctc(reduction: str, zero_infinity: bool) -> Problem:
    """Return a CTC loss of sequences with targets of unequal lengths."""
    criterion = nn.CTCLoss(reduction=reduction, zero_infinity=zero_infinity)
    data = []
    for b in SIZES:
        lengths = torch.arange(b) % 2 + 1
        data.append((torch.randn(b, 5, 4), (torch.randint(1, 3, (b, 2)), lengths)))

    def loss(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        times = torch.full((len(logits),), logits.shape[1])
        scores = logits.log_softmax(-1).transpose(0, 1)
        return criterion(scores, targets[0], times, targets[1])

    return Problem(mlp(), data, loss)


case("ctc_mean")(partial(ctc, "mean", False))
case("ctc_mean_zero_infinity")(partial(ctc, "mean", True))
case("ctc_sum", total=True)(partial(ctc, "sum", False))


CUSTOM: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], Data]]] = {
    "focal": (lambda o, y: (-((1 - p_of(o, y)) ** 2) * p_of(o, y).log()).mean(), classes),
    "dice": (
        lambda o, y: 1 - (2 * (o.sigmoid() * y).sum() + 1) / (o.sigmoid().sum() + y.sum() + 1),
        binary,
    ),
    "log_cosh": (lambda o, y: (o - y).cosh().log().mean(), real),
    "quantile": (
        lambda o, y: torch.maximum(0.3 * (y - o.exp()), -0.7 * (y - o.exp())).mean(),
        real,
    ),
    "cauchy": (lambda o, y: ((o - y) ** 2).log1p().mean(), real),
    "mse_functional": (F.mse_loss, real),
    "mse_broadcast_by_hand": (lambda o, y: (o - y[:, :1]).square().mean(), real),
    "huber_functional": (F.huber_loss, near),
    "loss_of_shape_one": (lambda o, y: (o - y).square().mean().reshape(1), real),
    "contrastive": (
        lambda o, _: F.cross_entropy(F.normalize(o) @ F.normalize(o).T * 3, torch.arange(len(o))),
        real,
    ),
}


def p_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.softmax(1).gather(1, targets[:, None]).squeeze(1)


COUPLED = ("dice", "contrastive")  # no means over samples
for _name, (_loss, _data) in CUSTOM.items():
    case(_name, warns="no mean of theirs" if _name in COUPLED else None)(
        lambda loss=_loss, data=_data: Problem(mlp(), data(), loss)
    )
case("loss_not_reduced", refused="(?i)scalar|reduce|shape")(
    lambda: Problem(mlp(), real(), nn.MSELoss(reduction="none"))
)
