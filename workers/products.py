"""Products of token segments with one matrix each: all that LoRA asks of a machine.

N tokens lie one after the other in J segments, one a job; segment j has its own matrix. Three products make
both passes of a LoRA layer (`workers.runs`):

    by_rows(x, w)     x_j @ w_j^T    x [N, K], w [J, M, K] -> [N, M]
    by_columns(x, w)  x_j @ w_j      x [N, K], w [J, K, M] -> [N, M]
    outer(x, y)       x_j^T @ y_j    x [N, K], y [N, M]    -> [J, K, M]

`Batched` needs segments of one length, and gives each job the bits that a product of its own would
(`tests/workers/test_products.py` holds it to that). `Grouped` takes any lengths in one launch: the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batched:
    """`jobs` segments of equal length, as one batch."""

    jobs: int

    def by_rows(self, x_NK: Tensor, w_JMK: Tensor) -> Tensor:
        return self.by_columns(x_NK, w_JMK.transpose(1, 2))

    def by_columns(self, x_NK: Tensor, w_JKM: Tensor, out_NM: Tensor | None = None) -> Tensor:
        """`out` is written, not added to."""
        if self.jobs == 1:
            return torch.mm(x_NK, w_JKM[0], out=out_NM)
        out_JTM = None if out_NM is None else self._split(out_NM)
        return torch.bmm(self._split(x_NK), w_JKM, out=out_JTM).flatten(0, 1)

    def add_by_columns(self, into_NM: Tensor, x_NK: Tensor, w_JKM: Tensor) -> None:
        """by_columns added in place; the sum is rounded once."""
        if self.jobs == 1:
            into_NM.addmm_(x_NK, w_JKM[0])
        else:
            self._split(into_NM).baddbmm_(self._split(x_NK), w_JKM)

    def outer(self, x_NK: Tensor, y_NM: Tensor) -> Tensor:
        if self.jobs == 1:
            return (x_NK.t() @ y_NM).unsqueeze(0)
        return torch.bmm(self._split(x_NK).transpose(1, 2), self._split(y_NM))

    def per_token(self, x_J: Tensor, tokens: int) -> Tensor:
        """One number a job as one a token, [N, 1]."""
        return x_J.repeat_interleave(tokens // self.jobs)[:, None]

    def _split(self, x_NK: Tensor) -> Tensor:
        return x_NK.view(self.jobs, -1, x_NK.shape[1])


@dataclass(frozen=True)
class Grouped:
    """Segments that end at `ends_J` (int32, none empty): torch's grouped matrix product.

    On a GPU it takes bfloat16, with every matrix side a multiple of 8.
    """

    ends_J: Tensor

    def by_rows(self, x_NK: Tensor, w_JMK: Tensor) -> Tensor:
        return F.grouped_mm(x_NK, w_JMK.transpose(1, 2), offs=self.ends_J)

    def by_columns(self, x_NK: Tensor, w_JKM: Tensor, out_NM: Tensor | None = None) -> Tensor:
        product_NM = F.grouped_mm(x_NK, w_JKM, offs=self.ends_J)
        return product_NM if out_NM is None else out_NM.copy_(product_NM)

    def add_by_columns(self, into_NM: Tensor, x_NK: Tensor, w_JKM: Tensor) -> None:
        """by_columns added in place."""
        into_NM += self.by_columns(x_NK, w_JKM)

    def outer(self, x_NK: Tensor, y_NM: Tensor) -> Tensor:
        return F.grouped_mm(x_NK.t(), y_NM, offs=self.ends_J)

    def per_token(self, x_J: Tensor, tokens: int) -> Tensor:
        """One number a job as one a token, [N, 1]."""
        lengths = self.ends_J.diff(prepend=self.ends_J.new_zeros(1))
        return x_J.repeat_interleave(lengths, output_size=tokens)[:, None]
