"""Cases: recurrent layers, cells and loops over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from .ingredients import SIZES, least_squares, regression
from .registry import Problem, case

LENGTH, WIDTH = 4, 2


class Reader(nn.Module):
    """The outputs of a recurrent layer at every step."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(WIDTH, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Last(Reader):
    """The final state of the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.layer(x)[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]


READERS: dict[str, Callable[[], nn.Module]] = {
    "rnn_tanh": lambda: Reader(nn.RNN),
    "rnn_relu": lambda: Reader(nn.RNN, nonlinearity="relu"),
    "rnn_two_layers_bidirectional": lambda: Reader(nn.RNN, num_layers=2, bidirectional=True),
    "gru": lambda: Reader(nn.GRU),
    "gru_bidirectional": lambda: Reader(nn.GRU, bidirectional=True),
    "gru_two_layers": lambda: Reader(nn.GRU, num_layers=2),
    "gru_without_bias": lambda: Reader(nn.GRU, bias=False),
    "gru_last": lambda: Last(nn.GRU),
    "lstm": lambda: Reader(nn.LSTM),
    "lstm_eval": lambda: Reader(nn.LSTM).eval(),
    "lstm_two_layers": lambda: Reader(nn.LSTM, num_layers=2),
    "lstm_bidirectional": lambda: Reader(nn.LSTM, bidirectional=True),
    "lstm_projected": lambda: Reader(nn.LSTM, proj_size=2),
    "lstm_last": lambda: Last(nn.LSTM),
}
for _name, _make in READERS.items():
    case(_name)(lambda make=_make: least_squares(make(), LENGTH, WIDTH))
case("lstm_dropout", reference="laws")(
    lambda: least_squares(Reader(nn.LSTM, num_layers=2, dropout=0.3), LENGTH, WIDTH)
)


class Packed(nn.Module):
    """A recurrent layer on packed sequences of unequal lengths."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % LENGTH + 1
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.layer(packed)
        return pad_packed_sequence(out, batch_first=True, total_length=LENGTH)[0]


for _kind in (nn.RNN, nn.GRU, nn.LSTM):
    case(f"packed_{_kind.__name__.lower()}")(
        lambda kind=_kind: least_squares(Packed(kind), LENGTH, WIDTH)
    )


@case("packed_sequence_as_batch")
def packed_sequence_as_batch() -> Problem:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(WIDTH, 3), nn.Linear(3, 2)

        def forward(self, x: Any) -> Tensor:
            return self.head(self.layer(x)[1][-1])

    data = [
        {
            "targets": torch.randn(b, 2),
            "sentences": pack_sequence([torch.randn(n, WIDTH) for n in range(b, 0, -1)]),
        }
        for b in SIZES
    ]

    def batch_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return nn.functional.mse_loss(model(batch["sentences"]), batch["targets"])

    return Problem(Sentences(), data, batch_loss=batch_loss)


class Cells(nn.Module):
    """A cell, stepped by a Python loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.new_zeros(len(x), 3)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        outputs = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn_cell": lambda: nn.RNNCell(WIDTH, 3),
    "gru_cell": lambda: nn.GRUCell(WIDTH, 3),
    "lstm_cell": lambda: nn.LSTMCell(WIDTH, 3),
}
for _name, _make in CELLS.items():
    case(_name)(lambda make=_make: least_squares(Cells(make()), LENGTH, WIDTH))


@case("lstm_by_hand")
def lstm_by_hand() -> Problem:
    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.h = nn.Linear(WIDTH, 12), nn.Linear(3, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(len(x), 3)
            for step in x.unbind(1):
                i, f, g, o = (self.x(step) + self.h(h)).chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            return h

    return least_squares(Hand(), LENGTH, WIDTH)


@case("lstm_learned_start")
def lstm_learned_start() -> Problem:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(WIDTH, 3)  # time first
            self.start = nn.Parameter(torch.randn(2, 1, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.start.expand(-1, -1, len(x), -1).contiguous()
            return self.layer(x.transpose(0, 1), (h, c))[0].transpose(0, 1)

    return least_squares(Started(), LENGTH, WIDTH)


@case("lstm_flattened_after_load")
def lstm_flattened_after_load() -> Problem:
    model = Reader(nn.LSTM)
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)
    return least_squares(model, LENGTH, WIDTH)


@case("lstm_shared_by_two")
def lstm_shared_by_two() -> Problem:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.LSTM(WIDTH, 2, batch_first=True)
            self.right = self.left

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x)[0] * self.right(x.flip(1))[0]

    return least_squares(Siamese(), LENGTH, WIDTH)


@case("sequence_to_sequence")
def sequence_to_sequence() -> Problem:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, WIDTH)
            self.encoder = nn.GRU(WIDTH, 3, batch_first=True)
            self.decoder = nn.GRU(WIDTH, 3, batch_first=True)
            self.head = nn.Linear(3, 5)

        def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
            _, state = self.encoder(self.embed(source))
            return self.head(self.decoder(self.embed(shifted), state)[0])

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    data = []
    for b in SIZES:
        source, target = torch.randint(5, (b, 3)), torch.randint(5, (b, 4))
        data.append(({"source": source, "shifted": target.roll(1, 1)}, target))
    return Problem(Translate(), data, loss)


@case("echo_state_buffer")
def echo_state_buffer() -> Problem:
    class Echo(nn.Module):
        state: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.read = nn.Linear(3, 3), nn.Linear(3, 2)
            self.register_buffer("state", torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x) + self.state)
            self.state.copy_(h.detach().mean(0))  # carried to the next batch when training
            return self.read(h)

    return Problem(Echo(), regression(3), nn.MSELoss())


@case("structured_state_space")
def structured_state_space() -> Problem:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.randn(3))
            self.inward, self.outward = nn.Linear(WIDTH, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(x.shape[1], dtype=x.dtype)
            kernel = torch.exp(-steps[:, None] * self.decay.exp())
            u = torch.fft.rfft(self.inward(x), n=2 * x.shape[1], dim=1)
            k = torch.fft.rfft(kernel, n=2 * x.shape[1], dim=0)
            y = torch.fft.irfft(u * k, n=2 * x.shape[1], dim=1)[:, : x.shape[1]]
            return self.outward(nn.functional.silu(y))

    return least_squares(Scan(), LENGTH, WIDTH)
