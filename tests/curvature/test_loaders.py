"""Loaders that shuffle, augment, drop or run dry: one matrix, or an error that says why not."""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from hvpop import BATCHES, HessianOperator
from hvpop.risk.batches import Batches

from .problems import error, mlp, random, regression, split

TIGHT = 1e-12
DATA = TensorDataset(*regression())


def hessian(data: Any, **settings: Any) -> HessianOperator:
    return HessianOperator(mlp(), nn.MSELoss(), data, **settings)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return hessian([DATA[:]]).to_dense()


def states(*generators: torch.Generator) -> list[Any]:
    numpy = np.random.get_state()
    held = [tuple(g.get_state().tolist()) for g in generators]
    return [
        python_random.getstate(),
        (numpy[1].tolist(), *numpy[2:]),
        tuple(torch.get_rng_state().tolist()),
        *held,
    ]


def test_a_plain_loader_is_read_as_it_is(expected: Tensor) -> None:
    assert error(hessian(DataLoader(DATA, 10)).to_dense(), expected) < TIGHT
    assert error(hessian(DataLoader(DATA, 10)).linearize().to_dense(), expected) < TIGHT


class Endless:
    """A sampler that does not say how long it is, and draws when it begins."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(6).tolist())


class Batched:
    def __iter__(self) -> Iterator[Iterator[int]]:
        yield from (iter([0, 1]), map(int, [2, 3]))


LOADERS: dict[str, Any] = {
    "in order": {"batch_size": 5},
    "dropping": {"batch_size": 5, "drop_last": True},
    "shuffled": {"batch_size": 5, "shuffle": True},
    "with a generator": {"batch_size": 5, "shuffle": True, "generator": torch.Generator()},
    "with replacement": {"sampler": RandomSampler(DATA, replacement=True), "batch_size": 4},
    "by batches": {"batch_sampler": [[0, 3], [2], [1, 1, 4]]},
    "one by one": {"batch_size": None},
    "by tuples": {"batch_sampler": [(0, 3), (2, 1)]},
    "by arrays": {"batch_sampler": np.arange(6).reshape(3, 2)},
    "by iterators": {"batch_sampler": Batched()},
    "by tensors": {"sampler": torch.arange(6).flip(0), "batch_size": 2},
    "by single tensors": {"sampler": torch.arange(3), "batch_size": 1},
    "by a sampler without length": {"sampler": Endless(), "batch_size": 2},
    "of a subset": {"dataset": Subset(DATA, [4, 1, 3, 0, 2]), "batch_size": 2, "shuffle": True},
    "of a split": {"dataset": Subset(Subset(DATA, torch.arange(6)), [5, 0, 4]), "batch_size": 2},
}


@pytest.mark.parametrize("form", LOADERS)
@pytest.mark.filterwarnings("ignore:the loader has drop_last=True")
def test_what_is_cut_out_of_tensors_is_what_the_loader_yields(form: str) -> None:
    loader = DataLoader(**{"dataset": DATA} | LOADERS[form])
    held = {t.data_ptr() for t in DATA.tensors}
    found = list(Batches(loader, seed=3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if loader.generator is not None:
            loader.generator.manual_seed(3)
        expected = list(loader)
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert type(batch) is type(other)
        assert all(map(torch.equal, batch, other))
        if loader.batch_sampler is not None:  # a copy, not the user's memory
            assert all(t.data_ptr() not in held for t in batch)


def test_what_a_data_set_or_a_collation_of_ones_own_makes_of_samples_counts() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            return tuple(2 * t for t in super().__getitem__(i))

    def doubled(samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [2 * t for t in torch.utils.data.default_collate(samples)]

    expected = [2 * t for t in DATA.tensors]

    class Doubling(DataLoader[Any]):
        def __iter__(self) -> Any:
            return ([2 * t for t in batch] for batch in super().__iter__())

    for loader in (
        DataLoader(Doubled(*DATA.tensors), batch_size=len(DATA)),
        DataLoader(DATA, batch_size=len(DATA), collate_fn=doubled),
        Doubling(DATA, batch_size=len(DATA)),
    ):
        (batch,) = Batches(loader, seed=0)
        assert all(map(torch.equal, batch, expected))


def test_a_loader_with_workers_gives_the_same(expected: Tensor) -> None:
    loader = DataLoader(DATA, 10, num_workers=1, persistent_workers=True)
    outer = iter(loader)
    first = next(outer)  # a pass of the user's own is under way
    assert error(hessian(loader).to_dense(), expected) < TIGHT
    rest = list(outer)
    assert torch.equal(torch.cat([first[0], *(x for x, _ in rest)]), DATA.tensors[0])


SHUFFLED = {
    "shuffle": lambda g: DataLoader(DATA, 10, shuffle=True),
    "generator": lambda g: DataLoader(DATA, 10, shuffle=True, generator=g),
    "sampler": lambda g: DataLoader(DATA, 10, sampler=RandomSampler(DATA, generator=g)),
    "replacement": lambda g: DataLoader(
        DATA, 10, sampler=RandomSampler(DATA, replacement=True, num_samples=40, generator=g)
    ),
    "drop_last": lambda g: DataLoader(TensorDataset(*DATA[:20]), 5, shuffle=True, drop_last=True),
}


@pytest.mark.parametrize("form", SHUFFLED)
def test_a_shuffled_loader_is_one_matrix_and_leaves_the_generators_alone(form: str) -> None:
    generator = torch.Generator().manual_seed(7)
    loader = SHUFFLED[form](generator)
    H = hessian(loader, average=BATCHES)  # the order matters
    v = random(H.shape[1])
    before = states(generator)
    first, second = H @ v, H @ v
    linearized = H.linearize(memory=0)
    assert torch.equal(first, second)
    assert error(linearized @ v, first) < TIGHT
    assert states(generator) == before
    if form != "drop_last":
        list(loader)  # an epoch of training in between, which moves the generator on
    assert torch.equal(H @ v, first)
    assert error(linearized @ v, first) < TIGHT


def test_a_shuffled_loader_has_the_hessian_of_all_samples(expected: Tensor) -> None:
    H = hessian(DataLoader(DATA, 10, shuffle=True))
    assert error(H.to_dense(), expected) < TIGHT


def test_the_epoch_of_a_distributed_sampler_does_not_change_the_matrix() -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1)
    H = hessian(DataLoader(DATA, 5, sampler=sampler))
    v = random(H.shape[1])
    first = H @ v
    sampler.set_epoch(3)
    assert torch.equal(H @ v, first)
    assert sampler.epoch == 3


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise from one of the global random number generators."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = DATA[i]
        if self.source == "torch":
            return x + torch.rand(4, dtype=torch.float64), y
        if self.source == "numpy":
            return x + torch.from_numpy(np.random.rand(4)), y
        return x + python_random.random(), y


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_augmentation_is_drawn_once_and_the_users_numbers_stay(source: str) -> None:
    H = hessian(DataLoader(Augmented(source), 10, shuffle=True))
    v = random(H.shape[1])
    before = states()
    first = H @ v
    assert torch.equal(H @ v, first)
    assert error(H.linearize() @ v, first) < TIGHT
    assert error(H.linearize(memory=0) @ v, first) < TIGHT
    assert states() == before
    assert error(hessian(DataLoader(DATA, 10)) @ v, first) > 1e-3


class SelfWilled(Dataset[tuple[Tensor, Tensor]]):
    """Samples from a generator of its own, which nobody else can seed."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.generator.normal(size=4)), DATA[i][1]


def test_data_that_change_from_pass_to_pass_are_refused() -> None:
    H = hessian(DataLoader(SelfWilled(), 3))
    v = random(H.shape[1])
    H @ v
    with pytest.raises(RuntimeError, match=r"other batches than at the first pass.*list\(data\)"):
        H @ v
    A = hessian(DataLoader(SelfWilled(), 3)).linearize()  # reads once, so it is a matrix
    assert torch.equal(A @ v, A @ v)
    for memory in (0, 200, 400):  # holds none of the batches, one or two
        with pytest.raises(RuntimeError, match="other batches"):
            hessian(DataLoader(SelfWilled(), 3)).linearize(memory=memory) @ v


def test_samples_that_only_change_places_are_noticed() -> None:
    class Flipping(Dataset[Any]):
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            x = torch.arange(3.0, dtype=torch.float64)
            return (x.flip(0) if self.rng.random() < 0.5 else x), torch.ones(1).double()

    batches = Batches(DataLoader(Flipping(), batch_size=3), seed=0)
    list(batches)
    with pytest.raises(RuntimeError, match="gave other batches than at the first pass"):
        list(batches)


def test_fewer_batches_than_at_the_first_pass_are_refused() -> None:
    class Fading:
        left = 3

        def __iter__(self) -> Iterator[Any]:
            self.left -= 1
            return iter([regression()] * self.left)

    H = hessian(Fading())
    v = random(H.shape[1])
    H @ v
    with pytest.raises(RuntimeError, match="other batches"):
        H @ v


@pytest.mark.parametrize("form", ["generator", "iterator", "zip", "map"])
def test_what_can_be_read_once_is_read_once_and_kept(form: str, expected: Tensor) -> None:
    batches = split(regression(), (10, 10, 3))
    data: Any = {
        "generator": (batch for batch in batches),
        "iterator": iter(batches),
        "zip": zip(*([b[i] for b in batches] for i in (0, 1)), strict=True),
        "map": map(tuple, batches),
    }[form]
    H = hessian(data)
    v = random(H.shape[1])
    assert error(H @ v, expected @ v) < TIGHT
    assert error(H @ v, expected @ v) < TIGHT
    assert error(H.linearize() @ v, expected @ v) < TIGHT


def test_a_generator_that_draws_leaves_the_users_numbers_alone() -> None:
    H = hessian((torch.randn(5, 4).double(), torch.randn(5, 3).double()) for _ in range(2))
    before = states()
    v = random(H.shape[1])
    assert torch.equal(H @ v, H @ v)
    assert states() == before


def test_a_used_up_iterator_is_told() -> None:
    data = iter(split(regression(), (10, 13)))
    list(data)
    H = hessian(data)
    with pytest.raises(ValueError, match="yielded no batch; an iterator that was used before is"):
        H @ random(H.shape[1])


@pytest.mark.parametrize(
    "data",
    [[], (), DataLoader(TensorDataset(torch.ones(0, 4), torch.ones(0, 3)), 2)],
    ids=["list", "tuple", "loader"],
)
def test_data_without_batches_are_told(data: Any) -> None:
    H = hessian(data)
    for operator in (H, H.linearize()):
        with pytest.raises(
            ValueError, match=rf"the data \({type(data).__name__}\) yielded no batch"
        ):
            operator @ random(H.shape[1])


def test_dropped_samples_are_warned_about_once() -> None:
    H = hessian(DataLoader(DATA, 10, drop_last=True))
    v = random(H.shape[1])
    with pytest.warns(UserWarning, match="drop_last=True: 3 of 23 samples will be missing"):
        H @ v
    H @ v  # warnings are errors here

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(DATA)

    H = hessian(DataLoader(Stream(), 10, drop_last=True))
    with pytest.warns(UserWarning, match="drop_last=True: the incomplete last batch"):
        H @ v


def test_nothing_is_warned_about_where_nothing_is_dropped() -> None:
    hessian(DataLoader(TensorDataset(*DATA[:20]), 10, drop_last=True)) @ random(43)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA, r"a TensorDataset, which yields single samples; wrap it: DataLoader\(data, 64\)"),
        (regression(), r"a pair of tensors, so one batch; pass a list of batches: \[\(x, y\)\]"),
        (DATA.tensors[0], "iterable of batches .*, got Tensor"),
        ({"x": 1}, "iterable of batches .*, got dict"),
        (None, "iterable of batches .*, got NoneType"),
        (7, "iterable of batches .*, got int"),
        ("data", "iterable of batches .*, got str"),
    ],
    ids=["data set", "pair", "tensor", "mapping", "nothing", "number", "text"],
)
def test_what_is_no_data_is_refused_with_the_spelling_that_works(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hessian(data)


def test_a_pass_that_is_broken_off_leaves_the_random_numbers_alone() -> None:
    class Breaking(nn.Module):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            raise KeyError("in the user's code")

    generator = torch.Generator()
    loader = DataLoader(DATA, 10, shuffle=True, generator=generator)
    H = HessianOperator(mlp(), Breaking(), loader)
    before = states(generator)
    with pytest.raises(KeyError, match="in the user's code"):
        H @ random(H.shape[1])
    assert states(generator) == before
