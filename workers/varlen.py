"""Attention over rows that lie end to end in one sequence, without padding: `attention: varlen`.

Each row is causal by itself. On a GPU it is torch's variable-length attention (Flash Attention on cumulative
lengths, arXiv 2307.08691); elsewhere one row after another, the reference that the GPU is held to. While no
rows are announced, the attention is transformers' own `sdpa`: scoring pads its rows and brings its masks.
Shapes: N tokens of all rows, H heads, G heads of keys and values, D features of a head.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workers.types import BadInput

NAME = "chorus_varlen"
"""Under which transformers knows it."""
TRIED, APART = (2, 7), 0.05
"""Lengths of the rows that a model is tried on, and how far their logits may be apart: bfloat16 rounds."""


class _Rows:
    """The rows of a pass: what its every layer asks of them, made once."""

    def __init__(self, ends: Sequence[int]) -> None:
        self.spans = tuple(pairwise(ends))
        self.longest = max(stop - start for start, stop in self.spans)
        self._ends = tuple(ends)
        self._cumulative: Tensor | None = None

    def cumulative(self, device: torch.device) -> Tensor:
        if self._cumulative is None:
            self._cumulative = torch.tensor(self._ends, dtype=torch.int32, device=device)
        return self._cumulative


_rows: list[_Rows] = []
"""Of the pass under way. Of the process: the way back may run on a thread of its own."""


@contextmanager
def end_to_end(ends: Sequence[int]) -> Generator[None]:
    """Within the block, passes [1, N] hold rows that begin and end there, 0 first; empty: as they come."""
    if not ends:
        yield
        return
    _rows.append(_Rows(ends))
    try:
        yield
    finally:
        _rows.pop()


@torch.no_grad()
def check(model: Any, device: torch.device) -> None:
    """Whether the model reads rows end to end as it reads each alone; collective if it is partitioned.

    Raises BadInput: not every model leaves all of its attention to the function that it is given.
    """
    rows = [torch.arange(1, 1 + length, device=device)[None] for length in TRIED]
    places = torch.cat([row - 1 for row in rows], dim=1)
    try:
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
        with end_to_end(tuple(accumulate(TRIED, initial=0))):
            together = model(input_ids=torch.cat(rows, dim=1), position_ids=places, use_cache=False).logits
    except ValueError as error:
        raise BadInput(f"attention: varlen does not suit this model: {error}") from error
    apart = float((together - alone).double().norm() / alone.double().norm())
    if not apart <= APART:
        raise BadInput(
            f"attention: varlen does not suit this model, whose logits come out {apart:.0%} apart; use sdpa"
        )


def _attend(
    module: nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, N, H, D], as transformers' attention functions give it."""
    if not _rows:
        return sdpa_attention_forward(module, query_1HND, key_1GND, value_1GND, attention_mask, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"it knows no {unknown[0]}; use eager")
    times = query_1HND.shape[1] // key_1GND.shape[1]
    key_1HND, value_1HND = (x.repeat_interleave(times, dim=1) for x in (key_1GND, value_1GND))
    parts = tuple(x[0].transpose(0, 1) for x in (query_1HND, key_1HND, value_1HND))
    attend = _flash if query_1HND.is_cuda else _row_by_row
    return attend(parts, _rows[-1], options.get("sliding_window"), options.get("scaling"))[None], None


Parts: TypeAlias = tuple[Tensor, ...]
"""Query, key and value [N, H, D]."""


def _flash(parts: Parts, rows: _Rows, window: int | None, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cumulative, longest = rows.cumulative(parts[0].device), rows.longest
    before = -1 if window is None else window - 1
    lengths = (cumulative, cumulative, longest, longest)
    found: Any = varlen_attn(*parts, *lengths, scale=scale, window_size=(before, 0))
    return found


def _row_by_row(parts: Parts, rows: _Rows, window: int | None, scale: float | None) -> Tensor:
    found: list[Tensor] = []
    for start, stop in rows.spans:
        row = (x[start:stop].transpose(0, 1)[None] for x in parts)
        mask = None if window is None or stop - start <= window else _window(stop - start, window, parts[0])
        found.append(F.scaled_dot_product_attention(*row, mask, is_causal=mask is None, scale=scale)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


def _window(length: int, window: int, like: Tensor) -> Tensor:
    """True [T, T] where a token sees another: itself and the `window` - 1 before it."""
    seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    return seen.triu(1 - window)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """None for rows end to end: the attention itself keeps them apart."""
    return None if _rows else sdpa_mask(*args, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
