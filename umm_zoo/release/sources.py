"""What makes images of texts in a method, and what of it is constant: queries, places, texts of the guidance branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Conversation, Grid, Task, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.readers import TextOnlyReader
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import guide


class Source(ABC):
    """What makes images of texts: a language model, a connector, a decoder, a codec.

    Attributes:
        holder: the module that holds the connector.
    """

    holder: nn.Module
    vlm: LibraryVLM
    connector: Connector
    decoder: ImageDecoder
    codec: LatentCodec
    objective: DecoderObjective
    image_size: int

    @property
    def grid(self) -> Grid:
        """Cells of the latent."""
        return self.codec.latent_grid(self.image_size, self.image_size, self.decoder.patch)

    @abstractmethod
    def condition(self, prompt: str, seed: int) -> Tensor:
        """The decoder's condition ``[1, N, E]``."""

    @abstractmethod
    def branches(self) -> list[tuple[str, float]]:
        """Texts of the guidance branches, ``{}`` standing for the user's, and their weights."""

    @abstractmethod
    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """Table and tensors of the queries, and their grid; None where the states of the text itself are the condition."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the weights, by part; ``stack`` is what runs on the queries."""
        parts = {"vlm": self.vlm.text_model, "connector": self.connector, "decoder": self.decoder.model, "codec": self.codec}
        found = {name: next(part.parameters()).dtype for name, part in parts.items()}
        return {**found, "stack": found["vlm"]}

    def predict(self, noisy: Tensor, time: float, tokens: Tensor) -> Tensor:
        """The decoder's prediction ``[1, C, h, w]``."""
        predicted: Tensor = self.decoder(noisy, torch.tensor([time]), Tokens(tokens))
        return predicted

    def text(self, conversation: Conversation, opening: str = "") -> str:
        """A request as the model reads it."""
        return "".join(piece.text for piece in self.vlm.template.render(conversation, for_generation=True)) + opening


class BridgeSource(Source):
    """A bridge: queries behind the text."""

    def __init__(self, bridge: Bridge) -> None:
        if not isinstance(bridge.vlm, LibraryVLM):
            raise ValueError(f"it knows no {type(bridge.vlm).__name__}")
        self.bridge = self.holder = bridge
        self.vlm, self.connector, self.decoder, self.codec = bridge.vlm, bridge.connector, bridge.decoder, bridge.codec
        self.objective, self.image_size = bridge.objective, bridge.image_size

    def condition(self, prompt: str, seed: int) -> Tensor:
        """See ``Source``."""
        encoded = self.bridge.encode_prompt(request_batch([prompt]), ["full"])
        queries = self.bridge.draw_queries(encoded, self.grid, [torch.Generator().manual_seed(seed)])
        return self.bridge.condition(encoded, queries, self.grid).values

    def branches(self) -> list[tuple[str, float]]:
        """See ``Source``; the full request comes last."""
        found = []
        weights = self.bridge.guidance.weights(Task.TEXT_TO_IMAGE)
        for mode, weight in sorted(weights.items(), key=lambda item: item[0] == "full"):
            (turns,) = self.bridge.dropout.prompts.apply(request_batch(["{}"]), [mode]).conversations
            found.append((self.text(turns, self.bridge.queries.opening), weight))
        return found

    def dtypes(self) -> dict[str, torch.dtype]:
        """See ``Source``."""
        own = next(self.bridge.pathway.parameters(), None)
        return super().dtypes() if own is None else {**super().dtypes(), "stack": own.dtype}

    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """See ``Source``; what is drawn is added to ``queries``."""
        bridge, own = self.bridge, self.bridge.queries.grid_for(self.grid)
        context = Tokens(torch.zeros(1, 1, self.vlm.width))
        constant = []
        for seed in (1, 2):
            found = bridge.queries(context, self.grid, torch.Generator().manual_seed(seed))
            drawn = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)) if bridge.queries.random else 0 * found
            constant.append(found - drawn)
        if not torch.allclose(constant[0], constant[1], atol=1e-5):
            raise ValueError(f"it cannot draw as {type(bridge.queries).__name__} does")
        if not isinstance(bridge.pathway, ExpertPathway) and any(True for _ in bridge.pathway.parameters()):
            raise ValueError(f"it knows no {type(bridge.pathway).__name__}")
        tokens = bridge.queries.behind_marker(constant[0])
        prefix = bridge.encode_prompt(request_batch(["a"]), ["full"]).prefix
        arranged, positions, among = bridge.pathway.arrange(prefix, Details.none(tokens), tokens, own)
        if not torch.equal(arranged, tokens):
            raise ValueError("its pathway changes the queries")
        count, kinds = tokens.shape[1], getattr(self.vlm.text_model.config, "layer_types", None)
        if others := set(kinds or ()) - {"full_attention"}:
            raise ValueError(f"it knows no layers of {', '.join(sorted(others))}")
        if prefix.plain_positions:
            positions = positions[0]
        tensors = {
            "queries": constant[0],
            "markers": tokens[:, : count - constant[0].shape[1]],
            "positions": positions - prefix.next_position[0],
            "among": torch.ones(count, count, dtype=torch.bool) if among is None else among[0],
        }
        return {"random": bridge.queries.random, "masks": kinds is not None}, tensors, own


class CaptionSource(Source):
    """UAE's renderer: the states of the text itself."""

    def __init__(self, renderer: CaptionRenderer, vlm: LibraryVLM) -> None:
        if not isinstance(renderer.reader, TextOnlyReader):
            raise ValueError(f"it cannot read as {type(renderer.reader).__name__} does")
        self.renderer = self.holder = renderer
        self.reader, self.vlm, self.connector, self.decoder = renderer.reader, vlm, renderer.connector, renderer.decoder
        self.codec, self.objective, self.image_size = renderer.codec, renderer.objective, renderer.image_size

    def condition(self, prompt: str, seed: int) -> Tensor:
        """See ``Source``."""
        return self.renderer.condition(self.vlm, [prompt]).values

    def branches(self) -> list[tuple[str, float]]:
        """See ``Source``."""
        asked, negative = (self._asked(text) for text in ("{}", self.renderer.negative_prompt))
        if self.renderer.guidance == 1:
            return [(asked, 1.0)]
        empty = Tokens(torch.zeros(1, 1, 1))
        return [
            (text, one.weight) for text, one in zip((negative, asked), guide(empty, empty, self.renderer.guidance), strict=True)
        ]

    def _asked(self, text: str) -> str:
        return self.text([{"role": self.reader.role, "text": text}])  # type: ignore[typeddict-item]

    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """See ``Source``; there are none."""
        return {"random": False, "masks": False}, {}, None
