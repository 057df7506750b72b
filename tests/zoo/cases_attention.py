"""Cases: attention, by torch's layers, by the fused kernel and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ingredients import SIZES, least_squares, tokens
from .registry import Problem, case

LENGTH, WIDTH, HEADS = 4, 4, 2


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        call = dict(self.call)
        if call.pop("padded", False):
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[::2, -1] = True
            call["key_padding_mask"] = padding
        return self.attention(x, x, x, **call)[0]


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


SELF: dict[str, Callable[[], nn.Module]] = {
    "mha": lambda: SelfAttention({}),
    "mha_without_weights": lambda: SelfAttention({"need_weights": False}),
    "mha_eval": lambda: SelfAttention({"need_weights": False}).eval(),
    "mha_masked": lambda: SelfAttention({"attn_mask": causal()}),
    "mha_causal": lambda: SelfAttention(
        {"attn_mask": causal(), "is_causal": True, "need_weights": False}
    ),
    "mha_padded": lambda: SelfAttention({"padded": True, "need_weights": False}),
    "mha_bias_kv": lambda: SelfAttention({}, add_bias_kv=True),
    "mha_zero_attention": lambda: SelfAttention({"need_weights": False}, add_zero_attn=True),
    "mha_without_bias": lambda: SelfAttention({"need_weights": False}, bias=False),
}
for _name, _make in SELF.items():
    case(_name)(lambda make=_make: least_squares(make(), LENGTH, WIDTH))
case("mha_dropout", reference="laws")(
    lambda: least_squares(SelfAttention({"need_weights": False}, dropout=0.2), LENGTH, WIDTH)
)


@case("mha_cross_dimensions")
def mha_cross_dimensions() -> Problem:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            query, memory = x[:, :2, :4], x[:, 2:]
            return self.attention(query, memory[..., :3], memory[..., 2:4])[0]

    return least_squares(Cross(), 5, 4)


class Fused(nn.Module):
    """``scaled_dot_product_attention`` with given options, behind one projection."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project, self.options = nn.Linear(WIDTH, 3 * WIDTH), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.project(x).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2)


FUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "sdpa": dict,
    "sdpa_causal": lambda: {"is_causal": True},
    "sdpa_boolean_mask": lambda: {"attn_mask": ~causal()},
    "sdpa_float_mask": lambda: {"attn_mask": torch.randn(LENGTH, LENGTH)},
    "sdpa_scale": lambda: {"scale": 0.3},
}
for _name, _options in FUSED.items():
    case(_name)(lambda options=_options: least_squares(Fused(**options()), LENGTH, WIDTH))
case("sdpa_dropout", reference="laws")(lambda: least_squares(Fused(dropout_p=0.2), LENGTH, WIDTH))


@case("sdpa_grouped_queries")
def sdpa_grouped_queries() -> Problem:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, 2, 2)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    return least_squares(Grouped(), LENGTH, WIDTH)


# An older torch has a first derivative there, whose author rules out a second one.
@case("flex_attention", refused="(?s)FlexAttention.*(sdpa|eager|scaled_dot_product)|is once_differ")
def flex() -> Problem:
    from torch.nn.attention.flex_attention import flex_attention

    class Flexible(Fused):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, dim=-1))
            return flex_attention(q, k, v)

    return least_squares(Flexible(), LENGTH, WIDTH)


@case("sdpa_under_users_kernel_choice")
def sdpa_under_users_kernel_choice() -> Problem:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Chosen(Fused):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return super().forward(x)

    return least_squares(Chosen(), LENGTH, WIDTH)


def layer(kind: str, **options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True, "dim_feedforward": 5} | options
    made: nn.Module = getattr(nn, kind)(WIDTH, HEADS, **options)
    return made


class Causal(nn.Module):
    """A transformer encoder with a causal mask."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x, mask, is_causal=True)


class Decoding(nn.Module):
    """A decoder layer whose memory is the first half of the sequence."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x[:, :2], x[:, 2:])


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "encoder_layer": lambda: layer("TransformerEncoderLayer"),
    "encoder_layer_eval": lambda: layer("TransformerEncoderLayer").eval(),
    "encoder_layer_norm_first": lambda: layer("TransformerEncoderLayer", norm_first=True),
    "encoder_layer_gelu": lambda: layer("TransformerEncoderLayer", activation="gelu"),
    "encoder_layer_eval_dropout": lambda: layer("TransformerEncoderLayer", dropout=0.3).eval(),
    "encoder_two_layers": lambda: nn.TransformerEncoder(
        layer("TransformerEncoderLayer"), 2, enable_nested_tensor=False
    ),
    "encoder_two_layers_eval": lambda: nn.TransformerEncoder(
        layer("TransformerEncoderLayer"), 2, norm=nn.LayerNorm(WIDTH)
    ).eval(),
    "encoder_causal": lambda: Causal(
        nn.TransformerEncoder(layer("TransformerEncoderLayer"), 1, enable_nested_tensor=False)
    ),
    "decoder_layer": lambda: Decoding(layer("TransformerDecoderLayer")),
    "decoder_layer_norm_first": lambda: Decoding(layer("TransformerDecoderLayer", norm_first=True)),
    "decoder_two_layers_eval": lambda: Decoding(
        nn.TransformerDecoder(layer("TransformerDecoderLayer"), 2)
    ).eval(),
}
for _name, _make in TRANSFORMERS.items():
    case(_name)(lambda make=_make: least_squares(make(), LENGTH, WIDTH))
case("encoder_layer_dropout", reference="laws")(
    lambda: least_squares(layer("TransformerEncoderLayer", dropout=0.2), LENGTH, WIDTH)
)


@case("transformer")
def transformer() -> Problem:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(4, 2, 1, 1, 4, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.transformer(x[:, :2], x[:, 2:])

    return least_squares(Translate(), LENGTH, WIDTH)


@case("language_model_tied")
def language_model_tied() -> Problem:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, WIDTH)
            self.position = nn.Parameter(0.1 * torch.randn(5, WIDTH))
            self.block = Causal(nn.TransformerEncoder(layer("TransformerEncoderLayer"), 1))
            self.head = nn.Linear(WIDTH, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x) + self.position
            return self.head(self.block(h)).transpose(1, 2)

    data = [(torch.randint(7, (b, 5)), torch.randint(7, (b, 5))) for b in SIZES]
    return Problem(Language(), data, nn.CrossEntropyLoss())


class Scores(nn.Module):
    """Attention written out, with a bias on the scores."""

    def __init__(self, bias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.slope, self.bias = nn.Parameter(torch.tensor(0.3)), bias

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bid,bjd->bij", self.q(x), self.k(x)) / math.sqrt(WIDTH)
        return self.bias(self.slope * scores).softmax(-1) @ self.v(x)


def fill(scores: Tensor) -> Tensor:
    return scores.masked_fill(causal(), -math.inf)


def alibi(scores: Tensor) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return scores - 0.5 * distance.abs()


case("attention_by_hand_causal")(lambda: least_squares(Scores(fill), LENGTH, WIDTH))
case("attention_by_hand_alibi")(lambda: least_squares(Scores(alibi), LENGTH, WIDTH))


@case("attention_rotary")
def attention_rotary() -> Problem:
    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(LENGTH, dtype=x.dtype)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = [
            even * angle.cos() - odd * angle.sin(),
            even * angle.sin() + odd * angle.cos(),
        ]
        return torch.stack(turned, -1).flatten(-2)

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)

    return least_squares(Rotary(), LENGTH, WIDTH)


@case("attention_linear")
def attention_linear() -> Problem:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, dim=-1)
            q, k = F.elu(q) + 1, F.elu(k) + 1
            state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
            return torch.einsum("btd,btde->bte", q, state) / (q * k.cumsum(1)).sum(-1, True)

    return least_squares(Linear(), LENGTH, WIDTH)


@case("attention_pooling_of_tokens")
def attention_pooling_of_tokens() -> Problem:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.query = (
                nn.Embedding(7, 4, padding_idx=None),
                nn.Parameter(torch.randn(4)),
            )
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(((h @ self.query).softmax(1).unsqueeze(-1) * h).sum(1))

    return Problem(Pool(), tokens(), nn.CrossEntropyLoss())


@case("vision_transformer")
def vision_transformer() -> Problem:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, WIDTH, 2, stride=2)
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.block = layer("TransformerEncoderLayer", norm_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).mT
            h = torch.cat([self.token.expand(len(h), -1, -1), h], dim=1)
            return self.block(h)[:, 0]

    return least_squares(Vision(), 1, 4, 4)


@case("graph_attention")
def graph_attention() -> Problem:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.score = nn.Linear(3, 4), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lift(x)
            n = h.shape[1]
            pairs = torch.cat(
                [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1)], -1
            )
            scores = F.leaky_relu(self.score(pairs).squeeze(-1), 0.2)
            return F.elu(scores.softmax(-1) @ h)

    return least_squares(Graph(), 3, 3)
