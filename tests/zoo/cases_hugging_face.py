"""Cases: Hugging Face families from tiny configurations with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .ingredients import SIZES
from .reference import finite_difference
from .registry import Problem, case

hf: Any = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 13, 5
Batch = dict[str, Tensor]


class InDouble(TorchFunctionMode):
    """Drops the casts to float32 that these models make, for a reference without their noise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


NAMES = {  # one vocabulary of sizes for configurations that name them differently
    "usual": {
        "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
    },
    "gpt": {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
}  # fmt: skip
QUIET = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(kind: str, config: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """Return a model of random weights in float64, in training mode, without dropout."""
    settings = getattr(hf, config)(**options)
    settings._attn_implementation = attention
    model: nn.Module = getattr(hf, kind)(settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().train()


def causal_batches() -> list[Batch]:
    """Return token batches whose labels leave out some, not alike in the two batches."""
    batches = []
    for b in SIZES:
        ids = torch.randint(3, VOCABULARY, (b, LENGTH))
        labels = ids.clone()
        labels[0, :2] = -100
        labels[1, 3:] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def counted(batches: list[Batch], *, shifted: bool) -> list[float]:
    labels = [batch["labels"][:, 1:] if shifted else batch["labels"] for batch in batches]
    return [float((part != -100).sum()) for part in labels]


def causal(kind: str, config: str, attention: str, options: dict[str, Any]) -> Problem:
    data = causal_batches()
    weights = counted(data, shifted=True)
    model = build(kind, config, attention, **options)
    return Problem(model, data, weights=weights, hugging_face=True, exactly=InDouble)


def masked(kind: str, config: str, attention: str, options: dict[str, Any]) -> Problem:
    data = causal_batches()
    for batch in data:
        padding = torch.ones_like(batch["input_ids"])
        padding[0, -1] = 0
        batch["attention_mask"] = padding
    model = build(kind, config, attention, **options)
    return Problem(
        model, data, weights=counted(data, shifted=False), hugging_face=True, exactly=InDouble
    )


def classified(kind: str, config: str, attention: str, options: dict[str, Any]) -> Problem:
    data = [
        {"input_ids": torch.randint(3, VOCABULARY, (b, LENGTH)), "labels": torch.randint(3, (b,))}
        for b in SIZES
    ]
    model = build(kind, config, attention, num_labels=3, **options)
    return Problem(model, data, hugging_face=True, exactly=InDouble)


def translated(kind: str, config: str, attention: str, options: dict[str, Any]) -> Problem:
    data = causal_batches()
    for batch in data:
        batch["input_ids"] = torch.randint(3, VOCABULARY, (len(batch["labels"]), 3))
    model = build(kind, config, attention, **options)
    return Problem(
        model, data, weights=counted(data, shifted=False), hugging_face=True, exactly=InDouble
    )


def seen(kind: str, config: str, attention: str, options: dict[str, Any]) -> Problem:
    data = [
        {"pixel_values": torch.randn(b, 1, 8, 8), "labels": torch.randint(3, (b,))} for b in SIZES
    ]
    model = build(kind, config, attention, num_labels=3, **options)
    return Problem(model, data, hugging_face=True, exactly=InDouble)


Build = Callable[[str, str, str, dict[str, Any]], Problem]
U, G, Q = NAMES["usual"], NAMES["gpt"], QUIET
KEYS = {"num_key_value_heads": 1, "head_dim": 4}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
BART = {
    "vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8, "max_position_embeddings": 16, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "relative_attention_num_buckets": 4,
}  # fmt: skip
PAIRS: dict[str, tuple[Build, str, str, dict[str, Any]]] = {
    "gpt2": (causal, "GPT2LMHeadModel", "GPT2Config", G | Q),
    "gpt_neo": (
        causal,
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        Q | {
            "vocab_size": VOCABULARY, "hidden_size": 8, "num_layers": 1, "num_heads": 2,
            "attention_types": [[["global"], 1]], "max_position_embeddings": 16,
            "intermediate_size": 8, "embed_dropout": 0.0, "resid_dropout": 0.0,
        },
    ),
    "gpt_neox": (causal, "GPTNeoXForCausalLM", "GPTNeoXConfig", U | Q),
    "opt": (
        causal,
        "OPTForCausalLM",
        "OPTConfig",
        U | Q | {"ffn_dim": 8, "word_embed_proj_dim": 8},
    ),
    "llama": (causal, "LlamaForCausalLM", "LlamaConfig", U | Q | KEYS),
    "mistral": (causal, "MistralForCausalLM", "MistralConfig", U | Q | KEYS),
    "qwen2": (causal, "Qwen2ForCausalLM", "Qwen2Config", U | Q | KEYS),
    "gemma": (causal, "GemmaForCausalLM", "GemmaConfig", U | Q | KEYS),
    "phi": (causal, "PhiForCausalLM", "PhiConfig", U | Q),
    "bloom": (
        causal,
        "BloomForCausalLM",
        "BloomConfig",
        Q | {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 1, "n_head": 2,
             "hidden_dropout": 0.0},
    ),
    "mamba": (
        causal,
        "MambaForCausalLM",
        "MambaConfig",
        Q | {"vocab_size": VOCABULARY, "hidden_size": 4, "state_size": 2, "num_hidden_layers": 1},
    ),
    "mixtral": (
        causal,
        "MixtralForCausalLM",
        "MixtralConfig",
        U | Q | KEYS | {"num_local_experts": 2, "num_experts_per_tok": 1,
                        "experts_implementation": "eager"},
    ),
    "bert_masked": (masked, "BertForMaskedLM", "BertConfig", U | Q),
    "bert": (classified, "BertForSequenceClassification", "BertConfig", U | Q),
    "roberta": (classified, "RobertaForSequenceClassification", "RobertaConfig", U | Q),
    "electra": (
        classified,
        "ElectraForSequenceClassification",
        "ElectraConfig",
        U | Q | {"embedding_size": 4},
    ),
    "albert": (
        classified,
        "AlbertForSequenceClassification",
        "AlbertConfig",
        U | Q | {"embedding_size": 4, "classifier_dropout_prob": 0.0},
    ),
    "distilbert": (
        classified,
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        Q | {"vocab_size": VOCABULARY, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2,
             "max_position_embeddings": 16, "seq_classif_dropout": 0.0},
    ),
    "deberta": (classified, "DebertaV2ForSequenceClassification", "DebertaV2Config", U | Q),
    "bart": (translated, "BartForConditionalGeneration", "BartConfig", Q | BART),
    "t5": (translated, "T5ForConditionalGeneration", "T5Config", Q | T5),
    "vit": (seen, "ViTForImageClassification", "ViTConfig", U | Q | IMAGE),
    "deit": (seen, "DeiTForImageClassification", "DeiTConfig", U | Q | IMAGE),
    "convnext": (
        seen,
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 4],
         "depths": [1, 1], "image_size": 8},
    ),
    "resnet": (
        seen,
        "ResNetForImageClassification",
        "ResNetConfig",
        {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1],
         "layer_type": "basic"},
    ),
    "swin": (
        seen,
        "SwinForImageClassification",
        "SwinConfig",
        Q | {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 4, "depths": [2],
             "num_heads": [2], "window_size": 2, "mlp_ratio": 1.0, "drop_path_rate": 0.0},
    ),
}  # fmt: skip
BOTH = ("gpt2", "llama", "bert", "vit")  # also with attention written out
LIMITED = {  # no fused attention, or nothing to choose
    "mamba": "eager", "deberta": "eager", "convnext": "eager", "resnet": "eager",
    "swin": "eager", "gpt_neo": "eager", "bloom": "eager", "t5": "eager",
}  # fmt: skip
# Labels that are ignored become padding tokens of the decoder, whose embedding has no gradient.
SPECIAL: dict[str, dict[str, Any]] = {
    "bart": {"reference": "double backward"},
    "opt": {"seed": 2},
    "t5": {"seed": 2},
}
SINGLE = {"tolerance": 1e-5, "agreement": 5e-6}  # their casts to float32, with an eps of 1e-7

for _name, (_build, _kind, _config, _options) in PAIRS.items():
    _attentions = [LIMITED.get(_name, "sdpa"), *(["eager"] if _name in BOTH else [])]
    for _attention in _attentions:
        _suffix = f"_{_attention}" if _name in BOTH else ""

        @case(f"hf_{_name}{_suffix}", **SPECIAL.get(_name, {}), **SINGLE)
        def family(
            build: Build = _build,
            kind: str = _kind,
            config: str = _config,
            attention: str = _attention,
            options: dict[str, Any] = _options,
        ) -> Problem:
            return build(kind, config, attention, options)


@case("hf_gpt2_dropout", reference="laws", **SINGLE)
def gpt2_dropout() -> Problem:
    options = G | Q | {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    return causal("GPT2LMHeadModel", "GPT2Config", "sdpa", options)


for _reentrant in (True, False):

    @case(f"hf_llama_checkpointed_{'reentrant' if _reentrant else 'non_reentrant'}", **SINGLE)
    def llama_checkpointed(reentrant: bool = _reentrant) -> Problem:
        problem = causal("LlamaForCausalLM", "LlamaConfig", "sdpa", U | Q | KEYS)
        plain = replace(problem, model=copy.deepcopy(problem.model))
        problem = replace(problem, expected=lambda v: finite_difference(plain, v).product)
        model: Any = problem.model
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return problem


@case("hf_whisper", reference="double backward", **SINGLE)
def whisper() -> Problem:
    options = Q | BART | {
        "num_mel_bins": 3, "max_source_positions": 4, "max_target_positions": 16,
        "median_filter_width": 1,
    }  # fmt: skip
    data = causal_batches()
    for batch in data:
        del batch["input_ids"]
        batch["input_features"] = torch.randn(len(batch["labels"]), 3, 8)
    model = build("WhisperForConditionalGeneration", "WhisperConfig", **options)
    return Problem(
        model, data, weights=counted(data, shifted=False), hugging_face=True, exactly=InDouble
    )


@case("hf_clip", warns="no mean of theirs", **SINGLE)
def clip() -> Problem:
    options = {
        "text_config": U | {"max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 4},
        "vision_config": U | IMAGE | {"projection_dim": 4},
        "projection_dim": 4,
    }
    data = [
        {
            "input_ids": torch.randint(3, VOCABULARY, (b, LENGTH)),
            "pixel_values": torch.randn(b, 1, 8, 8),
            "return_loss": True,
        }
        for b in SIZES
    ]
    model = build("CLIPModel", "CLIPConfig", **options)
    return Problem(model, data, hugging_face=True, exactly=InDouble)


@case("hf_gpt2_by_outputs", **SINGLE)
def gpt2_by_outputs() -> Problem:
    """A loss of the outputs' logits, with inputs by name."""

    class Mean(nn.Module):
        def forward(self, outputs: Any, targets: Tensor) -> Tensor:
            return (outputs.logits[:, -1] - targets).square().mean()

    data = [
        ({"input_ids": torch.randint(3, VOCABULARY, (b, LENGTH))}, torch.randn(b, VOCABULARY))
        for b in SIZES
    ]
    return Problem(build("GPT2LMHeadModel", "GPT2Config", **(G | Q)), data, Mean())


@case("hf_bart_without_padding", **SINGLE)
def bart_without_padding() -> Problem:
    problem = translated("BartForConditionalGeneration", "BartConfig", "sdpa", Q | BART)
    for batch in problem.data:
        batch["labels"] = batch["labels"].clamp(min=3)
    return Problem(
        problem.model, problem.data, weights=list(SIZES), hugging_face=True, exactly=InDouble
    )
