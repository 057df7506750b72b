"""A batch's weight is what its loss divides by: known, proven by batches put together, or asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from hvpop import TOTAL, EmpiricalRisk, HessianOperator
from hvpop.risk import hugging_face

from .problems import classes, error, mlp, random, set_parameters, split

SIZES = (10, 10, 3)
TIGHT = 1e-12
X, REAL, Y = random(23, 4), random(23, 3, seed=1), classes(23)


def mean(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def summed(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().sum()


def product(H: HessianOperator) -> Tensor:
    found: Tensor = H @ random(H.shape[1], seed=5).to(H.torch_dtype)
    return found


def of(model: nn.Module, batch_loss: Any, data: Any) -> HessianOperator:
    return HessianOperator.from_risk(EmpiricalRisk.from_batch_loss(model, batch_loss, data))


# -- sums, and other divisors --------------------------------------------------------------------


def between(*layers: nn.Module) -> nn.Module:
    return set_parameters(nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)).double())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": mlp,
    "dropout": lambda: between(nn.Tanh(), nn.Dropout(0.5)),
    "batch norm": lambda: between(nn.BatchNorm1d(5), nn.Tanh()),
    "all zero": lambda: set_parameters(mlp(), scale=0.0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_sum_is_refused_and_a_mean_taken_in_silence(name: str, scale: float) -> None:
    model, data = MODELS[name](), split((X, REAL), SIZES)
    assert product(HessianOperator(model, lambda o, y: scale * mean(o, y), data)).isfinite().all()
    H = HessianOperator(model, lambda o, y: scale * summed(o, y), data)
    for operator in (H, H, H.linearize(), H.linearize()):  # however often it is tried
        with pytest.raises(ValueError, match=r"adds up its samples.*average=TOTAL"):
            product(operator)
    product(HessianOperator(model, summed, data, average=TOTAL))
    product(HessianOperator(model, summed, data[:1]))  # of one batch the weight does not matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:the products of a torch.bfloat16 model")
def test_sums_are_told_from_means_in_low_precision(dtype: torch.dtype) -> None:
    data = split((X.to(dtype), REAL.to(dtype)), SIZES)
    product(HessianOperator(mlp(dtype=dtype), mean, data))
    with pytest.raises(ValueError, match="adds up its samples"):
        product(HessianOperator(mlp(dtype=dtype), summed, data))


def test_a_penalty_on_parameters_hides_neither() -> None:
    model, data = mlp(), split((X, REAL), SIZES)

    def penalized(loss: Any) -> Any:
        return lambda o, y: loss(o, y) + 3 * sum(p.square().sum() for p in model.parameters())

    found = product(HessianOperator(model, penalized(mean), data))
    assert error(found, product(HessianOperator(model, penalized(mean), [(X, REAL)]))) < TIGHT
    with pytest.raises(ValueError, match="adds up its samples"):
        product(HessianOperator(model, penalized(summed), data))


def masked(out: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    y, mask = targets
    return (F.cross_entropy(out, y, reduction="none") * mask).sum() / mask.sum()


MASKS = {
    "in the first": [*[0.0] * 6, *[1.0] * 17],
    "in the last only": [*[1.0] * 22, 0.0],
    "weights": np.linspace(0.2, 3.0, 23).tolist(),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mean_over_a_mask_is_found_out(name: str) -> None:
    mask = torch.tensor(MASKS[name], dtype=torch.float64)
    data = [(x, (y, k)) for x, y, k in split((X, Y, mask), SIZES)]
    H = HessianOperator(mlp(), masked, data)
    for operator in (H, H, H, H.linearize()):
        with pytest.raises(ValueError, match=r"divides by something else.*Average\(weight="):
            product(operator)


COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root": lambda o, y: mean(o, y).sqrt(),
    "contrast": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "ranks": lambda o, y: (o[:, 0] - o[:, 0].logcumsumexp(0)).mean(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_no_mean_is_warned_about_once(name: str) -> None:
    H = HessianOperator(mlp(), COUPLED[name], split((X, REAL), SIZES))
    with pytest.warns(UserWarning, match="no mean of theirs"):
        first = product(H)
    assert torch.equal(product(H), first)


def test_batches_that_cannot_be_put_together_are_warned_about_once() -> None:
    data = [(random(b, t, 4, seed=b), random(b, t, 3, seed=t)) for b, t in ((5, 2), (3, 6))]
    H = HessianOperator(mlp(), mean, data)
    with pytest.warns(UserWarning, match="cannot be put together.*differ in shapes"):
        product(H)
    product(H)
    with pytest.raises(ValueError, match="adds up its samples"):  # parts of each tell
        product(HessianOperator(mlp(), summed, data))


def loss_of_pixels(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=2)


@pytest.mark.parametrize("sizes", [((2, 6), (3, 4), (1, 8)), ((2, 4), (3, 4), (1, 8), (2, 6))])
def test_what_a_call_of_torch_divides_by_weighs_images_of_several_sizes(
    sizes: tuple[tuple[int, int], ...],
) -> None:
    model = set_parameters(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()).double())
    data = [
        (random(b, 1, side, side, seed=side), classes(b * side**2).reshape(b, side, side))
        for b, side in sizes
    ]
    told = HessianOperator(model, nn.CrossEntropyLoss(ignore_index=2), data)
    H = HessianOperator(model, loss_of_pixels, data)
    if sizes[0][1] == sizes[1][1]:  # which can be put together, and would be refused
        H = HessianOperator(model, lambda z, y: F.cross_entropy(z, y), data)
        told = HessianOperator(model, nn.CrossEntropyLoss(), data)
    for _ in range(2):
        assert error(product(H), product(told)) < TIGHT
    assert error(product(H.linearize()), product(told)) < TIGHT


def test_sequences_packed_into_one_count_by_their_tokens() -> None:
    tokens = [random(1, n, 4, seed=n) for n in (29, 5, 11)]
    data = [(x, classes(x.shape[1])[None]) for x in tokens]

    class Past(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1).tanh()

    model = set_parameters(nn.Sequential(nn.Linear(4, 5), Past(), nn.Linear(5, 3)).double())
    H = HessianOperator(model, lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), data)
    told = [
        product(HessianOperator(model, lambda o, y: -likelihoods(o, y).mean(), [b])) for b in data
    ]
    found = product(H)
    expected = sum(x.shape[1] * t for (x, _), t in zip(data, told, strict=True)) / 45
    assert error(found, torch.as_tensor(expected)) < TIGHT


# -- batches of any form -------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Samples along the second dimension, or packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3)
        set_parameters(self.double())

    def forward(self, x: Any) -> Tensor:
        outputs: tuple[Tensor, Tensor] = self.rnn(x)
        return outputs[0 if isinstance(x, Tensor) else 1]


SERIES = [random(5, 7, 4), random(5, 7, 3, seed=1)]
LENGTHS = [random(n, 4, seed=n) for n in (4, 3, 2, 3, 1, 2, 5)]


def row_loss(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack([mean(model(s["x"]), s["y"]) for s in batch]).mean()


def array_loss(model: nn.Module, batch: Any) -> Tensor:
    return mean(model(torch.as_tensor(batch["x"])), torch.as_tensor(batch["y"]))


def columns_loss(model: nn.Module, batch: Any) -> Tensor:
    images, targets = batch
    return torch.stack(
        [mean(model(i).mean(0), t["y"]) for i, t in zip(images, targets, strict=True)]
    ).mean()


IMAGES = [random(3, 4, seed=i) for i in range(7)]  # three rows each: not the number of samples
FORMS: dict[str, tuple[nn.Module, Any, Callable[[slice], Any]]] = {
    "rows": (
        mlp(),
        row_loss,
        lambda s: [{"x": x, "y": y} for x, y in zip(X[s], REAL[s], strict=True)],
    ),
    "lists of samples": (
        mlp(),
        columns_loss,
        lambda s: (tuple(IMAGES[s]), tuple({"y": y, "name": "a"} for y in REAL[:7][s])),
    ),
    "arrays": (mlp(), array_loss, lambda s: {"x": X[s].numpy(), "y": REAL[s].numpy()}),
    "strings": (
        mlp(),
        array_loss,
        lambda s: {"x": X[s], "y": REAL[s], "where": ["a"] * len(X[s]), "size": (8, 8)},
    ),
    "second dimension": (
        Recurrent(),
        lambda m, b: mean(m(b[0]), b[1]),
        lambda s: tuple(t[:, s] for t in SERIES),
    ),
    "packed": (
        Recurrent(),
        lambda m, b: mean(m(b[0])[0], b[1]),
        lambda s: (pack_sequence(LENGTHS[s], enforce_sorted=False), REAL[:7][s]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_counted_in_batches_of_any_form(form: str) -> None:
    model, batch_loss, batch = FORMS[form]
    parts = [batch(slice(0, 3)), batch(slice(3, 6)), batch(slice(6, 7))]
    expected = product(of(model, batch_loss, [batch(slice(0, 7))]))
    H = of(model, batch_loss, parts)
    assert error(product(H), expected) < TIGHT
    assert error(product(H.linearize()), expected) < TIGHT


def test_a_head_for_question_answering_ignores_answers_beyond_the_text() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 1)
            set_parameters(self.double())

        def forward(self, input_ids: Tensor, start_positions: Tensor) -> Any:
            logits = self.out(self.embedding(input_ids).tanh()).squeeze(-1)
            beyond = logits.shape[1]
            loss = F.cross_entropy(logits, start_positions.clamp(0, beyond), ignore_index=beyond)
            return type("Output", (), {"loss": loss})

    ids, starts = classes(8, 6, of=9), torch.tensor([1, 2, 30, 30, 3, 4, 5, 30])
    whole = {"input_ids": ids, "start_positions": starts}
    parts = [{k: v[s] for k, v in whole.items()} for s in (slice(0, 4), slice(4, 8))]
    expected = product(of(Head(), hugging_face(), [whole]))
    assert error(product(of(Head(), hugging_face(), parts)), expected) < TIGHT


# -- what changes --------------------------------------------------------------------------------


def changed_labels(loss: Any, data: Any, array: Any) -> None:
    array[1:] = -100


def replaced_labels(loss: Any, data: Any, array: Any) -> None:
    data[0][1] = torch.tensor([0, *[-100] * 9])


def changed_weights(loss: Any, data: Any, array: Any) -> None:
    loss.weight.copy_(torch.tensor([1.0, 2.0, 20.0]))


def replaced_weights(loss: Any, data: Any, array: Any) -> None:
    loss.weight = torch.tensor([1.0, 2.0, 20.0], dtype=torch.float64)


def ignored_class(loss: Any, data: Any, array: Any) -> None:
    loss.ignore_index = 2


CHANGES = [changed_labels, replaced_labels, changed_weights, replaced_weights, ignored_class]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("plain", [True, False])
def test_weights_follow_the_loss_and_the_labels(change: Any, plain: bool) -> None:
    model = mlp() if plain else nn.Sequential(mlp(), type("Own", (nn.Identity,), {})())
    loss = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
    array = Y[:10].clone().numpy()
    data = [[X[:10], torch.from_numpy(array)], [X[10:], Y[10:]]]
    H = HessianOperator(model, loss, data)
    before = product(H)
    change(loss, data, array)
    expected = product(HessianOperator(model, loss, [(X, torch.cat([y for _, y in data]))]))
    assert error(before, expected) > 1e-3
    assert error(product(H), expected) < TIGHT
    assert error(product(H.linearize()), expected) < TIGHT


@pytest.mark.parametrize("late", [20, 21, 24])
def test_a_divisor_that_differs_in_a_late_batch_only_is_found_out(late: int) -> None:
    data = [(random(4, 4, seed=i), (random(4, 3, seed=i), torch.ones(4))) for i in range(25)]
    model = mlp()
    assert error(product(HessianOperator(model, masked, data)), _whole(model, data)) < TIGHT
    data[late][1][1][1:] = 0  # the tail of sequences sorted by length
    H = HessianOperator(model, masked, data)
    for operator in (H, H.linearize()):
        with pytest.raises(ValueError, match="divides by something else"):
            product(operator)


def _whole(model: nn.Module, data: list[Any]) -> Tensor:
    batch = (
        torch.cat([x for x, _ in data]),
        tuple(torch.cat(t) for t in zip(*(y for _, y in data), strict=True)),
    )
    return product(HessianOperator(model, masked, [batch]))


def likelihoods(o: Tensor, y: Tensor) -> Tensor:
    return o.log_softmax(-1).gather(-1, y[..., None])


def test_losses_too_much_alike_speak_for_no_weights_but_those_at_work() -> None:
    tokens = [
        torch.randint(5, (1, n), generator=torch.Generator().manual_seed(n)) for n in (29, 23)
    ]
    data = [(t, t.roll(-1, 1)) for t in tokens]  # packed: a sample each, or as many as tokens

    class Past(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1).tanh()

    model = set_parameters(nn.Sequential(nn.Embedding(5, 4), Past(), nn.Linear(4, 5)).double())
    H = HessianOperator(model, lambda o, y: -likelihoods(o, y).mean(), data)
    with pytest.warns(UserWarning, match="cannot be put together"):
        product(H)


def test_a_proof_does_not_outlive_what_it_was_about() -> None:
    how: dict[str, Any] = {"reduction": "mean"}
    array = np.ones(23)
    H = HessianOperator(mlp(), lambda o, y: F.mse_loss(o, y, **how), split((X, REAL), SIZES))
    product(H)
    how["reduction"] = "sum"
    with pytest.raises(ValueError, match="adds up its samples"):
        product(H)
    batches = split((X, Y, torch.from_numpy(array)), SIZES)
    H = HessianOperator(mlp(), masked, [(x, (y, k)) for x, y, k in batches])
    product(H)
    array[11:15] = 0  # through NumPy, behind torch's back
    with pytest.raises(ValueError, match="divides by something else"):
        product(H)


# -- nothing to differentiate, and loaders of other things than tensors --------------------------


@pytest.mark.parametrize(
    "cut",
    [Tensor.detach, lambda o: o.data, lambda o: o.detach().requires_grad_()],
    ids=["detach", "data", "a leaf"],
)
def test_a_loss_that_no_parameter_reaches_is_refused(cut: Any) -> None:
    H = HessianOperator(mlp(), lambda o, y: mean(cut(o), y), split((X, REAL), SIZES))
    for operator in (H, H.linearize()):
        with pytest.raises(ValueError, match="no parameter reaches the loss"):
            product(operator)


def test_one_batch_that_no_parameter_reaches_is_an_empty_one() -> None:
    data = [(X[:10], REAL[:10]), (X[10:], REAL[10:])]
    H = HessianOperator(mlp(), lambda o, y: mean(o, y) if len(o) == 13 else 0 * y.sum(), data)
    with pytest.warns(UserWarning, match="no mean of theirs"):
        found = product(H)
    alone = product(HessianOperator(mlp(), mean, data[1:]))
    assert error(found, 13 / 23 * alone) < TIGHT


@pytest.mark.filterwarnings("ignore:batches are weighted by")
def test_the_zero_that_stands_for_an_empty_batch_is_no_loss_with_a_hook() -> None:
    empty = torch.zeros((), dtype=torch.float64, requires_grad=True)
    data = [(X[:10], REAL[:10]), (X[10:], REAL[10:])]
    H = HessianOperator(mlp(), lambda o, y: mean(o, y) if len(o) == 13 else empty, data)
    alone = product(HessianOperator(mlp(), mean, data[1:]))
    for operator in (H, H.linearize()):
        assert error(product(operator), 13 / 23 * alone) < TIGHT  # by differences it would be 1e-10
    constant = HessianOperator(mlp(), lambda o, y: mean(o.detach(), y).requires_grad_(), data)
    with pytest.raises(ValueError, match="no parameter reaches the loss"):
        product(constant)


def test_loaders_of_arrays_and_lists_that_differ_are_found_out() -> None:
    class Loader:
        def __init__(self, form: Any) -> None:
            self.form, self.draw = form, np.random.default_rng(0)

        def __iter__(self) -> Iterator[Any]:
            for _ in range(2):
                yield {"x": self.form(self.draw.random((4, 4))), "y": REAL[:4].numpy()}

    def batch_loss(model: nn.Module, batch: Any) -> Tensor:
        return mean(model(torch.as_tensor(batch["x"])), torch.as_tensor(batch["y"]))

    for form in (np.asarray, lambda a: torch.from_numpy(a)):
        H = of(mlp(), batch_loss, Loader(form))
        product(H)
        with pytest.raises(RuntimeError, match="gave other batches than at the first pass"):
            product(H)


# -- words ---------------------------------------------------------------------------------------

WORDS: dict[str, tuple[Callable[[], Any], str]] = {
    "float labels": (
        lambda: product(HessianOperator(mlp(), nn.CrossEntropyLoss(), [(X, Y.double())])),
        r"class indices.*got torch.float64.*targets.long\(\)",
    ),
    "a batch loss as loss": (
        lambda: HessianOperator(mlp(), hugging_face(), [(X, Y)]),
        r"takes \(model, batch\); use EmpiricalRisk.from_batch_loss",
    ),
    "a function of model and batch": (
        lambda: product(HessianOperator(mlp(), lambda m, b: mean(m(b), b), [(X, REAL)])),
        "called as loss.*EmpiricalRisk.from_batch_loss",
    ),
    "a class of batch losses": (
        lambda: of(mlp(), hugging_face, [(X, Y)]),
        r"got the class hugging_face; pass an object: hugging_face\(\)",
    ),
    "a loss as batch loss": (
        lambda: of(mlp(), nn.MSELoss(), [(X, REAL)]),
        r"takes \(outputs, targets\); use EmpiricalRisk\(model, loss, data\)",
    ),
    "a loss as risk": (
        lambda: HessianOperator.from_risk(hugging_face()),  # type: ignore[arg-type]
        "takes an EmpiricalRisk, got hugging_face",
    ),
    "single samples": (
        lambda: product(HessianOperator(mlp(), lambda o, y: y.nothing, [(X[0], 1)])),
        r"single samples, put them into batches",
    ),
    "a name without its glob": (
        lambda: product(HessianOperator(mlp(), nn.MSELoss(), [(X, REAL)], params="0")),
        r"did you mean '0\.\*'",
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_was_passed_wrongly_is_told(name: str) -> None:
    attempt, words = WORDS[name]
    with pytest.raises((TypeError, ValueError, AttributeError), match=f"(?s){words}"):
        attempt()
