"""Dropout masks as the host draws them, read off the host's own layers; and PEFT made to use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.numerics.slots import adapted, factors, put
from workers.base import DTYPES
from workers.dropout import DropoutKey
from workers.lora import Segment
from workers.rows import Row
from workers.types import AdapterSpec, BaseSpec


class Masks:
    """The multipliers of every module of a base: an adapter of rank 1 on zero weights shows them.

    Its B maps to the first output alone and its A is all ones, so that the gradient of the first output with
    respect to an input element is that element's multiplier.
    """

    def __init__(self, base: BaseSpec, dropout: float) -> None:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base.path), dtype=DTYPES[base.dtype]
        )
        model.requires_grad_(False)
        self._adapters = adapted(model, model.get_output_embeddings())
        self._slots = self._adapters.slots
        self._model = model
        spec = AdapterSpec(1, 1, dropout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            put(self._slots, 0, spec)
            for a, b in factors(self._slots, 0):
                a.fill_(1)
                b.zero_()[0] = 1

    def of(self, module: str, rows: Sequence[DropoutKey], length: int, before: int = 0) -> Tensor:
        """[rows, length, in_features]: 0 where dropped, 1 / (1 - p) where kept, 1 on padding.

        `before` rows without an adapter come first in the micro-batch.
        """
        layer = self._model.get_submodule(module)
        width = self._slots.layers[module].in_features
        rows_in_all = before + len(rows)
        x_RTD = torch.ones(rows_in_all, length, width, dtype=self._model.dtype, requires_grad=True)
        with self._adapters.rows([Segment(0, before, rows_in_all, tuple(rows))]):
            layer(x_RTD)[..., 0].sum().backward()
        assert x_RTD.grad is not None
        return x_RTD.grad[before:]


class KeyedDropout(nn.Module):
    """Stands where PEFT has its dropout: same formula, the host's masks for the rows of the current step."""

    keys: Sequence[DropoutKey] = ()

    def __init__(self, masks: Masks, module: str) -> None:
        super().__init__()
        self._masks, self._module = masks, module

    def forward(self, x_RTD: Tensor) -> Tensor:
        return x_RTD * self._masks.of(self._module, self.keys, x_RTD.shape[1])


def key_dropout(peft_model: nn.Module, masks: Masks, prefix: str) -> list[KeyedDropout]:
    """Put a KeyedDropout into every LoRA layer. `prefix` is what PEFT puts before a module's name."""
    keyed = []
    for name, layer in list(peft_model.named_modules()):
        if hasattr(layer, "lora_dropout"):
            keyed.append(KeyedDropout(masks, name.removeprefix(prefix)))
            layer.lora_dropout["default"] = keyed[-1]
    return keyed


def keys_of(rows: Sequence[Row], seed: int, step: int) -> list[DropoutKey]:
    return [DropoutKey(seed, step, row.sample, len(row.input_ids)) for row in rows]
