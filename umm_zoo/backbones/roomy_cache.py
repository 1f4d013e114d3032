"""Keys and values of answers that are written token by token, in buffers with room for more."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

#: Tokens that a buffer has room for when it is made (our choice): so many are written before anything is copied.
_ROOM = 64


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written in place; the library's own copies all of them for every token. No gradient."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far, views of the buffers."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = self._with_room(self.keys, key_states, end), self._with_room(self.values, value_states, end)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _with_room(known: Tensor | None, new: Tensor, end: int) -> Tensor:
        assert known is not None
        buffer = new.new_empty(*new.shape[:-2], end + _ROOM, new.shape[-1])
        buffer[..., : known.shape[-2], :] = known
        return buffer


def with_room(cache: DynamicCache) -> DynamicCache:
    """A cache with the same keys and values, to which tokens are appended without copying the others."""
    roomy = copy.copy(cache)
    roomy.layers = [
        _with_room(layer) if type(layer) is DynamicLayer and layer.get_seq_length() else layer for layer in cache.layers
    ]
    return roomy


def _with_room(layer: DynamicLayer) -> RoomyLayer:
    roomy = RoomyLayer()
    roomy.__dict__.update(layer.__dict__)
    return roomy
