"""Qwen2.5-VL, through transformers; the only file that knows its attribute paths."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from umm_zoo.backbones.base import IGNORE, VLMInputs, VLMOutput, language_loss
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.backbones.generation import Samples, append_answers, decode, label_log_probs, repeat_rows
from umm_zoo.backbones.loading import assert_complete, find_source, on_meta_device, torch_dtype
from umm_zoo.backbones.prefix import Prefix, PrefixBackbone, evaluation_mode
from umm_zoo.backbones.qwen_chat import SYSTEM_PROMPT, QwenChat
from umm_zoo.backbones.qwen_config import differences, match_tokenizer, patch_layout, read_config, tokenizer_source
from umm_zoo.backbones.qwen_images import PatchLayout
from umm_zoo.backbones.qwen_stack import QwenStack
from umm_zoo.backbones.templates import encode, pad, special_id, stop_ids
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.batch import IMAGE_MARKER, Conversation, Grid
from umm_zoo.errors import MistakeError


class Qwen25VL(PrefixBackbone):
    """A vision transformer with windowed attention, a merger of 2 x 2 patches, and a causal language model with M-RoPE.

    Images may have any size; the image's token grid follows from it (``image_grid``). Build it with ``from_pretrained`` or
    ``from_config``.

    Reference: Bai et al., "Qwen2.5-VL Technical Report" (arXiv 2502.13923).

    Args:
        model: the library's model.
        tokenizer: None only on the meta device, where nothing is run.
        layout: how images are resized and cut.
        system_prompt: put before a conversation without a system turn; None puts none.
        gradient_checkpointing: recompute the layers of trained parts in the backward pass instead of storing them.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase | None,
        layout: PatchLayout,
        system_prompt: str | None = SYSTEM_PROMPT,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.layout = layout
        self.template: QwenChat = QwenChat(system_prompt)
        self._tokenizer = tokenizer
        config: Any = model.config
        self.width = config.text_config.hidden_size
        self.image_size = None
        if gradient_checkpointing:
            with warnings.catch_warnings():  # the library's newer name for it is not in every version that this package admits
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # the library made frozen embeddings ask for gradients, a graph nobody needs
        # The merger lives inside the library's vision tower and lm_head outside its language model, so a part is a group of
        # modules. The groups are kept in a plain dict: registered, every tensor would stand twice in the state dict.
        visual, language = self.model.model.visual, self.model.model.language_model
        self._parts: dict[str, nn.Module] = {
            "vision_tower": nn.ModuleDict({"patch_embed": visual.patch_embed, "blocks": visual.blocks}),
            "projector": visual.merger,
            "language_model": nn.ModuleDict({"model": language, "lm_head": self.model.lm_head}),
        }

    # -- construction ------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        tokenizer: str | None = None,
        min_tokens: int = 4,
        max_tokens: int = 16384,
        system_prompt: str | None = SYSTEM_PROMPT,
        dtype: str = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> Qwen25VL:
        """Random weights of any size. On the meta device nothing is read from disk.

        Args:
            config: ``text_config`` and ``vision_config`` as in the library's ``config.json``; token ids left out are the
                tokenizer's.
            tokenizer: name or folder; None is the one shipped with this package.
            min_tokens, max_tokens: smaller and larger images are resized.
            system_prompt: put before a conversation without a system turn; None puts none.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            attention: ``sdpa``, ``eager``, ``flash_attention_2`` …
            gradient_checkpointing: see the class.

        Raises:
            ValueError: an unknown key or dtype, sizes that do not fit, token ids other than the tokenizer's.
        """
        built = read_config(config)
        reader = None
        if not on_meta_device():
            reader = load_tokenizer(tokenizer)
            match_tokenizer(built, reader, config)
        layout = patch_layout(built, min_tokens, max_tokens)
        return cls(_built(built, dtype, attention), reader, layout, system_prompt, gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        system_prompt: str | None = SYSTEM_PROMPT,
        dtype: str = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> Qwen25VL:
        """Weights of a model name or folder in the library's format. On the meta device with ``config`` nothing is read from disk.

        Args:
            source: name or folder, such as ``Qwen/Qwen2.5-VL-3B-Instruct``.
            config: what the checkpoint is expected to be, for building without it; compared with what is found when loading.
            tokenizer: name or folder; None is the checkpoint's own, or the shipped one where a folder has none.
            min_tokens, max_tokens: None is the checkpoint's own bound.
            system_prompt, dtype, attention, gradient_checkpointing: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the expected one.
        """
        source = find_source(source)
        if on_meta_device():
            built = read_config(config) if config is not None else Qwen2_5_VLConfig.from_pretrained(source)
            layout = patch_layout(built, min_tokens, max_tokens)
            return cls(_built(built, dtype, attention), None, layout, system_prompt, gradient_checkpointing)
        model = _loaded(source, dtype, attention)
        found = model.config.to_dict()
        if config is not None and (different := differences(config, found)):
            raise ValueError(f"{source}: the checkpoint is not the one stated: {'; '.join(different)}")
        reader = load_tokenizer(tokenizer_source(source, tokenizer))
        match_tokenizer(model.config, reader, found)
        layout = patch_layout(model.config, min_tokens, max_tokens, source)
        return cls(model.train(), reader, layout, system_prompt, gradient_checkpointing)

    def save(self, folder: str | Path) -> None:
        """Write weights, tokenizer and preprocessor in the library's format, for ``from_pretrained`` here or in the library."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.layout.save(Path(folder))

    # -- structure ---------------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            RuntimeError: the model was built on the meta device.
        """
        if self._tokenizer is None:
            raise RuntimeError("Qwen25VL was built on the meta device, where no tokenizer is read; it can be counted but not run")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are."""
        return self._embedding.weight.device

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.model.language_model.embed_tokens)

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower`` (patch embedding and blocks), ``projector`` (the merger), ``language_model`` (embeddings to lm_head)."""
        return self._parts

    def train(self, mode: bool = True) -> Qwen25VL:
        """Set the mode of every part that is not frozen."""
        super().train(mode)
        for part in self._parts.values():
            if isinstance(part, FrozenBackbone):
                part.eval()
        return self

    def image_grid(self, height: int, width: int) -> Grid:
        """Grid of tokens that an image of that many pixels becomes."""
        return self.layout.grid(height, width)

    @property
    def _pad_id(self) -> int:
        return special_id(self.tokenizer, "<|endoftext|>")

    # -- inputs ------------------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[M, 3, H, W]`` in [-1, 1] to what enters the language model, ``[M, h*w, D]`` in raster order."""
        grid = self.image_grid(*images.shape[-2:])
        merge = self.layout.merge_size
        sizes = torch.tensor([[1, grid.h * merge, grid.w * merge]], device=images.device).expand(len(images), -1)
        features = self.model.model.get_image_features(self.layout.patches(images), image_grid_thw=sizes).pooler_output
        return torch.stack(list(features))

    def embed(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        for_generation: bool = False,
    ) -> VLMInputs:
        """See ``VLMBackbone.embed``. Padding is on the right, for generation on the left; it has position 0.

        Roles other than user and assistant are written as they are: UAE conditions its decoder on a turn of the role ``generate``.
        """
        grid = Grid(0, 0) if images is None else self.image_grid(*images.shape[-2:])
        if sum(image_counts) != (0 if images is None else len(images)) or len(image_counts) != len(conversations):
            raise ValueError(
                f"image_counts {image_counts} do not fit {len(conversations)} conversations and"
                f" {0 if images is None else len(images)} images"
            )
        image_id = special_id(self.tokenizer, self.template.image)
        rows = []
        for row, (conversation, count) in enumerate(zip(conversations, image_counts, strict=True)):
            pieces = self.template.render(conversation, for_generation)
            if (markers := sum(piece.kind == "image" for piece in pieces)) != count:
                raise MistakeError(f"found {markers} {IMAGE_MARKER} markers in the turns for {count} images", row)
            rows.append(encode(self.tokenizer, pieces, image_id, grid.num_cells))
        token_ids = pad([ids for ids, _ in rows], self._pad_id, for_generation)
        labels = pad([labels for _, labels in rows], IGNORE, for_generation)
        attention_mask = pad([[1] * len(ids) for ids, _ in rows], 0, for_generation).bool()
        image_mask = token_ids == image_id
        merge = self.layout.merge_size
        sizes = torch.tensor([[1, grid.h * merge, grid.w * merge]]).expand(sum(image_counts), -1)
        position_ids, _ = self.model.model.get_rope_index(
            token_ids, image_mask.int(), image_grid_thw=sizes, attention_mask=attention_mask
        )
        token_ids, labels, attention_mask, position_ids, image_mask = (
            tensor.to(self.device) for tensor in (token_ids, labels, attention_mask, position_ids, image_mask)
        )
        embeddings = self._embedding(token_ids)  # [B, L, D]
        if images is not None and len(images):
            features = self.encode_images(images.to(self.device)).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(image_mask[..., None], features)
        return VLMInputs(token_ids, embeddings, attention_mask, position_ids, labels, image_mask)

    # -- the language model ------------------------------------------------------------------------------------------------------

    def _run(self, embeddings: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        states = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return cast(Tensor, states.last_hidden_state)

    def forward(self, inputs: VLMInputs) -> VLMOutput:
        """Run the language model over the whole sequence; logits are formed only where there is a label."""
        hidden = self._run(inputs.embeddings, inputs.attention_mask, inputs.position_ids)  # [B, L, D]
        return VLMOutput(*language_loss(hidden, inputs.labels, self.model.lm_head), hidden)

    def log_probs(self, inputs: VLMInputs, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each labelled token, differentiable.

        Returns:
            (log_probs ``[B, L-1]``, entry i being that of token i + 1 and 0 without a label; mask ``[B, L-1]``).
        """
        hidden = self._run(inputs.embeddings, inputs.attention_mask, inputs.position_ids)
        return label_log_probs(hidden, inputs.labels, self.model.lm_head, temperature)

    @torch.no_grad()
    def prefix(self, inputs: VLMInputs) -> Prefix:
        """Read a prompt once, keep its keys and values and no activations; evaluation mode, no gradient."""
        cache = DynamicCache(config=self.model.config.text_config)
        with evaluation_mode(self.model):
            hidden = self._run(inputs.embeddings, inputs.attention_mask, inputs.position_ids, cache)  # [B, L, D]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = (inputs.attention_mask * places).argmax(dim=1)  # [B], last real token of either padding
        last_hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return Prefix(cache, inputs.attention_mask, inputs.position_ids.amax(dim=(0, 2)) + 1, last_hidden)

    def language_stack(self, copied: bool) -> QwenStack:
        """The layers and final norm of the language model, or a trainable copy of them without the token embeddings."""
        language = self.model.model.language_model
        stack = QwenStack(language.layers, language.norm, language.rotary_emb)
        return stack.copied() if copied else stack

    def continue_from(self, prefix: Prefix, embeddings: Tensor, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Last hidden states of new tokens that attend to a prompt and to each other; the prefix does not grow.

        Differentiable with respect to the embeddings and the language model, in evaluation mode (see ``evaluation_mode``).

        Shape:
            - embeddings: ``[B, N, D]``; position_ids: ``[3, B, N]``
            - mask: ``[B, N, N]`` bool, True where the row may attend to the column; None is causal.
            - output: ``[B, N, D]``
        """
        if mask is None:
            num_tokens = embeddings.shape[1]
            mask = prefix.attention_mask.new_ones(num_tokens, num_tokens).tril().expand(len(embeddings), -1, -1)
        with evaluation_mode(self.model):
            return self.language_stack(copied=False)(embeddings, prefix, position_ids, mask)

    # -- answers -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_from(
        self,
        inputs: VLMInputs,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw ``num_samples`` answers to each prompt embedded ``for_generation``; the prompt is read once for its whole group."""
        prefix = self.prefix(inputs).repeat(num_samples)
        mask, drawn = prefix.attention_mask, 0

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, drawn
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position_ids = (prefix.next_position + drawn).expand(3, -1)[..., None]  # [3, R, 1]
            drawn += 1
            hidden = self._run(self._embedding(tokens[:, None]), mask, position_ids, prefix.cache)
            return cast(Tensor, self.model.lm_head(hidden[:, -1]))

        with evaluation_mode(self.model):
            tokens, kept, log_probs = decode(
                step,
                self.model.lm_head(prefix.last_hidden),
                [*stop_ids(self.tokenizer, self.template.end), self._pad_id],
                self._pad_id,
                max_new_tokens,
                temperature,
                generator,
            )
        rows = zip(tokens.cpu(), kept.cpu(), strict=True)
        texts = [str(self.tokenizer.decode(row[own].tolist(), skip_special_tokens=True)).strip() for row, own in rows]
        return Samples(tokens, kept, texts, log_probs)

    def sample(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw ``num_samples`` answers to each of B prompts, as groups of rows; see ``Samples``."""
        with torch.no_grad(), evaluation_mode(self.model):
            inputs = self.embed(conversations, images, image_counts, for_generation=True)
        return self.sample_from(inputs, num_samples, max_new_tokens, temperature, generator)

    def with_answers(self, inputs: VLMInputs, tokens: Tensor, mask: Tensor) -> VLMInputs:
        """Prompts embedded ``for_generation`` with drawn answers behind them as labels, for ``log_probs`` or ``forward``.

        Args:
            inputs: B prompts.
            tokens, mask: ``[B * G, T]`` of ``Samples``.
        """
        repeated = repeat_rows(inputs, max(1, len(tokens) // len(inputs.token_ids)))
        return append_answers(repeated, tokens, mask, self._embedding(tokens))

    def answer_log_probs(self, prefix: Prefix, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of each token of drawn answers, ``[R, T]`` (0 off the mask), with the cache: no prompt is read again.

        For scoring under another policy or temperature. A gradient would miss the prompt's own keys and values; training takes
        ``log_probs`` of the whole sequence.

        Args:
            prefix: of B prompts embedded ``for_generation``.
            tokens, mask: ``[R, T]`` of ``Samples``, R a multiple of B.
            temperature: divides the logits, as sampling did.
        """
        prompts = prefix.repeat(len(tokens) // len(prefix.next_position))
        hidden = prompts.last_hidden[:, None]  # [R, 1, D], predicts the first token
        if tokens.shape[1] > 1:
            places = prompts.text_positions(tokens.shape[1] - 1)
            hidden = torch.cat([hidden, self.continue_from(prompts, self._embedding(tokens[:, :-1]), places)], dim=1)
        logits = self.model.lm_head(hidden[mask]).float() / temperature  # [K, vocabulary]
        chosen = logits.gather(1, tokens[mask][:, None]).squeeze(1) - logits.logsumexp(-1)
        return torch.zeros(mask.shape, device=chosen.device).masked_scatter(mask, chosen)

    def generate(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Answer B prompts with the KV cache; temperature 0 is greedy."""
        return self.sample(conversations, images, image_counts, 1, max_new_tokens, temperature, generator).texts


def _built(config: Qwen2_5_VLConfig, dtype: str, attention: str) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch_dtype(dtype), attn_implementation=attention)


def _loaded(source: str, dtype: str, attention: str) -> Qwen2_5_VLForConditionalGeneration:
    load: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained
    try:
        model, info = load(source, dtype=torch_dtype(dtype), attn_implementation=attention, output_loading_info=True)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source}: no Qwen2.5-VL checkpoint, expected a model name or folder ({reason})") from error
    assert_complete(source, info)
    return cast(Qwen2_5_VLForConditionalGeneration, model)
