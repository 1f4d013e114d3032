"""Packed sequences: which token of a row of splits may attend to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from umm_zoo.backbones.by_shape import triangle
from umm_zoo.backbones.devices import send
from umm_zoo.errors import UserError

#: ``causal``: text; ``full``: an image that is read; ``noise``: an image that is generated.
SplitKind = Literal["causal", "full", "noise"]
_KINDS = ("causal", "full", "noise")


class Split(NamedTuple):
    """A run of tokens of one kind.

    Args:
        kind: how they attend to each other.
        length: their number.
    """

    kind: SplitKind
    length: int


class PackedMask:
    """Mask of rows of splits, one behind another: Bagel's (released ``create_sparse_mask``).

    A token attends to another if that one stands before it or both are in one ``full`` or ``noise`` split, and never to a token of
    a ``noise`` split from outside of it. An image that is generated and read later stands in a row twice, noisy and clean, and one
    pass trains every turn.

    Reference: Deng et al., "Bagel" (arXiv 2505.14683), section 2.2.

    Shape:
        ``[B, L, L]`` bool, True where the row may attend to the column; L is the longest row, and padding behind shorter ones
        attends to what stands before it, so that no row of the mask is empty.

    Args:
        rows: splits of each row.

    Raises:
        UserError: a split of another kind, or of fewer than no tokens.
    """

    def __init__(self, rows: Sequence[Sequence[Split]]) -> None:
        for row, splits in enumerate(rows):
            for kind, length in splits:
                if kind not in _KINDS or length < 0:
                    raise UserError(
                        "splits", f"'{kind}' of {length} tokens", f"one of {', '.join(_KINDS)}, 0 tokens or more", row=row
                    )
        self.lengths = [sum(split.length for split in splits) for splits in rows]
        longest = max(self.lengths, default=0)
        own = [_numbered(splits, longest) for splits in rows]
        #: Number of the split that each token is in, -1 on padding, and whether it attends both ways, or is noise; ``[B, L]``.
        self.owners, self.kinds = (torch.tensor(values).view(len(rows), longest) for values in zip(*own, strict=True))

    def __call__(self, device: torch.device | None = None) -> Tensor:
        """The mask, on a device."""
        device = device or torch.device("cpu")
        owners, kinds = send(self.owners, device), send(self.kinds, device)
        same = owners[:, :, None] == owners[:, None]
        seen = triangle(device, owners.shape[1]) | (same & (kinds > 0)[:, :, None])
        return seen & (same | (kinds < 2)[:, None])


def _numbered(splits: Sequence[Split], longest: int) -> tuple[list[int], list[int]]:
    """Numbers of the splits, and of their kinds, token by token."""
    padded = [*splits, Split("causal", longest - sum(split.length for split in splits))]
    numbers = [*range(len(splits)), -1]
    owners = [number for number, split in zip(numbers, padded, strict=True) for _ in range(split.length)]
    return owners, [_KINDS.index(split.kind) for split in padded for _ in range(split.length)]
