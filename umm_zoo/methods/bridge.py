"""What every bridge from a frozen vision-language model to an image decoder shares."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Grid, Tokens, Turn
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.blocks.queries import QuerySampler
from umm_zoo.errors import MistakeError
from umm_zoo.method import Method
from umm_zoo.methods.conditioning import (
    ConditionDropout,
    Guidance,
    Prompts,
    Version,
    drawing_tasks,
    select_rows,
    stated_version,
)
from umm_zoo.methods.encoded_prompt import Reading, attention_bias, read
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import Branch
from umm_zoo.training.optimization import OptimizerFactory, Schedule


class Bridge(Method):
    """Reads a request with a frozen vision-language model and draws the answer with an image decoder.

    The model reads the request once, without gradients and keeping no activations; query tokens read its keys and values on the
    ``pathway``; the ``connector`` turns their states into the decoder's condition; the decoder carries noise to the target's
    latent. Text-to-image, reconstruction, unconditional drawing, editing and composing of any number of images differ only in the
    request (``branches.drawing_tasks``). What the model answers to questions stays the same bit for bit.

    Subclasses say which blocks and defaults make a paper.

    Args:
        vlm: frozen for good.
        queries: what is put behind the request.
        pathway: who reads them.
        connector: from states to condition.
        decoder: draws.
        codec: images to latents and back; frozen unless listed.
        objective: how the decoder is trained and sampled.
        optimizer: builds the optimiser over the trained parts.
        trained: names among ``queries``, ``pathway``, ``connector``, ``detail``, ``decoder``.
        schedule: learning rate over the steps; None is constant.
        detail: tokens of the input images' own latents for the pathway; None for none.
        guidance: scales of sampling.
        dropout: what training leaves out at random.
        prompts: what stands in its place.
        image_size: side in pixels of what ``sample`` draws when nothing else is said.
        num_drawn_batches: batches of each validation that are drawn; None draws all.
        measure_attention: also return how far queries look at image rather than text (costs a second pass of the pathway).
        measure_sensitivity: also draw edits as reconstructions, from the same noise (costs a second drawing).
        max_new_tokens: longest answer in validation, to rows that have one.

    Raises:
        ValueError: sizes of the blocks disagree, or a part of the vision-language model is to be trained.
    """

    def __init__(
        self,
        vlm: PrefixBackbone,
        queries: QuerySampler,
        pathway: QueryPathway,
        connector: Connector,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: FlowMatching,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None,
        detail: DetailBranch | None,
        guidance: Guidance,
        dropout: ConditionDropout,
        prompts: Prompts,
        image_size: int,
        num_drawn_batches: int | None,
        measure_attention: bool,
        measure_sensitivity: bool,
        max_new_tokens: int,
    ) -> None:
        super().__init__()
        self.vlm, self.queries, self.pathway, self.connector = vlm, queries, pathway, connector
        self.decoder, self.codec, self.objective, self.detail = decoder, codec, objective, detail
        self.guidance, self.dropout, self.prompts = guidance, dropout, prompts
        self.image_size, self.num_drawn_batches = image_size, num_drawn_batches
        self.measure_attention, self.measure_sensitivity = measure_attention, measure_sensitivity
        self.max_new_tokens = max_new_tokens
        self._num_tokens = torch.zeros((), dtype=torch.long)
        self._check_blocks(trained)
        pathway.attach(vlm)
        connector.match_rms(decoder.condition_rms)
        self.train_only(trained, optimizer, schedule)

    def _check_blocks(self, trained: list[str]) -> None:
        if own := sorted(set(trained) & set(self.vlm.parts())):
            raise ValueError(f"method.trained: found '{own[0]}'; a bridge reads the vision-language model frozen")
        sizes = [
            ("queries.width", self.queries.width, "vlm.width", self.vlm.width),
            ("connector.in_dim", self.connector.in_dim, "vlm.width", self.vlm.width),
            ("connector.out_dim", self.connector.out_dim, "decoder.condition_dim", self.decoder.condition_dim),
            ("codec.latent_channels", self.codec.latent_channels, "decoder.latent_channels", self.decoder.latent_channels),
        ]
        if self.detail is not None:
            sizes.append(("detail.width", self.detail.width, "vlm.width", self.vlm.width))
            sizes.append(
                ("detail.latent_channels", self.detail.latent_channels, "codec.latent_channels", self.codec.latent_channels)
            )
        for mine, found, theirs, expected in sizes:
            if found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, and ``queries``, ``pathway``, ``connector``, ``detail`` (if any), ``decoder``, ``codec``."""
        named: dict[str, nn.Module | None] = {
            "queries": self.queries,
            "pathway": self.pathway,
            "connector": self.connector,
            "detail": self.detail,
            "decoder": self.decoder,
            "codec": self.codec,
        }
        return {**self.vlm.parts(), **{name: part for name, part in named.items() if part is not None}}

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to draw, while the codec is frozen."""
        return {} if "codec" in self.trained else {"latents": Precomputable(self.codec, self.target_latents, "row")}

    # -- from a request to a condition ---------------------------------------------------------------------------------------

    def latent_grid(self, height: int, width: int) -> Grid:
        """Cells of the latent of an image of that size.

        Raises:
            ValueError: a side is not a multiple of the codec's factor.
        """
        factor = self.codec.downsampling
        if height % factor or width % factor:
            raise ValueError(f"images to draw must be multiples of {factor} px, found {height} x {width}")
        return Grid(height // factor, width // factor)

    def read(self, batch: Batch) -> Reading:
        """The frozen model's reading of the requests of a batch, as they are; detail tokens carry a gradient, nothing else does."""
        return read(self.vlm, self.codec, self.detail, batch)

    def draw_queries(self, reading: Reading, grid: Grid, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Queries ``[B, N, D]`` for a latent grid; with a generator per row a row does not depend on the others."""
        context = reading.context
        if generators is None:
            return self.queries(context, grid)
        rows = [
            self.queries(Tokens(context.values[i : i + 1], None if context.mask is None else context.mask[i : i + 1]), grid, own)
            for i, own in enumerate(generators)
        ]
        return torch.cat(rows)

    def condition(self, reading: Reading, queries: Tensor, grid: Grid) -> Tokens:
        """The decoder's condition ``[B, N, E]``.

        Args:
            reading: of the request.
            queries: ``[B, N, D]``, drawn for ``grid``.
            grid: of the latent to be drawn.
        """
        own = self.queries.grid_for(grid)
        tokens, positions, mask = reading.with_queries(self.pathway, self.vlm, queries, own)
        states = self.pathway(tokens, reading.prefix, positions, mask)[:, reading.num_details :]  # [B, N, D]
        dtype = next(self.connector.parameters(), states).dtype
        return self.connector(Tokens(states.to(dtype)), own)

    # -- training ------------------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` of the objective, and its other terms.

        Raises:
            MistakeError: the batch has no images to draw.
        """
        shown = self.prompts.apply(batch, self.dropout(drawing_tasks(batch)))
        latents = self.target_latents(batch)
        grid = Grid(*latents.shape[-2:])
        reading = self.read(shown)
        queries = self.draw_queries(reading, grid)
        self._num_tokens = reading.prefix.attention_mask.sum() + queries.shape[:2].numel() + reading.detail_mask.sum()
        return self.objective(self.decoder, latents, self.condition(reading, queries, grid))

    @torch.no_grad()
    def target_latents(self, batch: Batch) -> Tensor:
        """Latents of the images to draw, ``[B, C, h, w]``: those of the shards where they hold any (``extras["latents"]``).

        Raises:
            MistakeError: there is nothing to draw.
        """
        if "latents" in batch.extras:
            return batch.extras["latents"].float()
        if batch.targets is None:
            raise MistakeError("found no image to draw (KEY.target.png)", row=0)
        return self.codec.encode(batch.targets)

    def batch_tokens(self, batch: Batch) -> Tensor:
        """Tokens that the last training batch was made of: request, detail and queries; ``callbacks.Throughput`` asks."""
        return self._num_tokens

    # -- validation ----------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """What metrics read.

        Rows with an image to draw: ``loss`` and ``flow`` (the plain error) under the same noise at every validation, ``images``
        as drawn with guidance from noise that depends on the row alone, ``round_trips`` of the codec; with ``measure_attention``
        also ``attention_bias`` and ``attention_log_bias``, with ``measure_sensitivity`` ``other_images`` and ``other_targets``:
        edits drawn from the same noise as reconstructions, and their sources. Rows without: ``answers``, ``nll`` and
        ``num_tokens`` of the frozen model.
        """
        if batch.targets is None:
            return self._language_outputs(batch)
        versions = [stated_version(task) for task in drawing_tasks(batch)]
        latents = self.target_latents(batch)
        grid = Grid(*latents.shape[-2:])
        generators = self._generators(_row_seeds(batch))
        reading = self.read(self.prompts.apply(batch, versions))
        queries = self.draw_queries(reading, grid, generators)
        generator = torch.Generator(latents.device).manual_seed(batch_idx)
        outputs: dict[str, Any] = dict(self.objective(self.decoder, latents, self.condition(reading, queries, grid), generator))
        outputs |= {"generated": None, "other_images": None}  # which metrics of images leave out
        if self.num_drawn_batches is None or batch_idx < self.num_drawn_batches:
            height, width = batch.targets.shape[-2:]
            outputs["generated"] = self.draw(batch, _row_seeds(batch), size=(height, width))
            outputs["round_trips"] = self.codec.decode(latents).to(batch.targets.dtype)
            outputs |= self._sensitivity_outputs(batch, (height, width))
            if self.measure_attention:
                outputs |= attention_bias(self.pathway, self.vlm, reading, queries, self.queries.grid_for(grid))
        return outputs

    def _sensitivity_outputs(self, batch: Batch, size: tuple[int, int]) -> dict[str, Any]:
        """What the same noise gives when the instruction is to change nothing, for ``metrics.InstructionSensitivity``."""
        if not self.measure_sensitivity:
            return {}
        images = batch.images
        if set(drawing_tasks(batch)) != {"edit"} or images is None or tuple(images.shape[-2:]) != size:
            return {"other_images": None}
        unchanged = replace(batch, meta=[{**meta, "task": "reconstruction"} for meta in batch.meta])
        return {"other_images": self.draw(unchanged, _row_seeds(batch), size=size), "other_targets": images}

    def _language_outputs(self, batch: Batch) -> dict[str, Any]:
        output = self.vlm(self.vlm.inputs_of(batch))
        answers = self.answer(batch) if self.max_new_tokens else [""] * len(batch)
        nothing = {"generated": None, "other_images": None}  # which metrics of images leave out
        return {"nll": output.nll, "num_tokens": output.num_tokens, "answers": answers, **nothing}

    # -- use -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(self, batch: Batch, max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """The frozen model's answers to a batch of prompts; a row's own last answer is not looked at."""
        return self.vlm.generate(
            batch.prompts(), batch.images, batch.image_counts, max_new_tokens or self.max_new_tokens or 64, temperature
        )

    def sample(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Tensor]] | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Draw images.

        A prompt alone is text-to-image, with one image an edit, with several a composition. With an empty prompt, images are
        reconstructed, and without any the model draws what it likes.

            images = WeMMU.load("runs/wemmu/toy/stage4").sample(["Make the circle green."], [[image]], seed=3)

        Args:
            prompts: one per image to be drawn.
            images: for each prompt, its input images ``[3, H, W]`` in [-1, 1], all of one size.
            seed: the k-th image is drawn from seed + k, so that it does not depend on how many are drawn at a time.
            num_steps: of the sampler; None is the objective's own.
            guidance: scales; None is the method's own.
            size: height and width in pixels; None is the method's ``image_size``.

        Returns:
            ``[len(prompts), 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: as many lists of images as prompts are needed; a marker too many; a size that the codec cannot draw.
        """
        shown = [[] for _ in prompts] if images is None else [list(group) for group in images]
        if len(shown) != len(prompts):
            raise ValueError(f"sample: found {len(prompts)} prompts and {len(shown)} groups of images")
        batch = drawing_batch(list(prompts), shown).to(self.device)
        return self.draw(batch, [seed + row for row in range(len(prompts))], num_steps, guidance, size)

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images ``[M, 3, H, W]`` again from what queries and details make of them, in their own size."""
        seed = int(torch.randint(2**31, (), generator=generator, device=None if generator is None else generator.device))
        return self.sample([""] * len(images), [[image] for image in images], seed, size=(images.shape[-2], images.shape[-1]))

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> Tensor:
        """Images through the codec and back: the best that a reconstruction could be."""
        return self.codec.decode(self.codec.encode(images)).clamp(-1, 1)

    @torch.no_grad()
    def draw(
        self,
        batch: Batch,
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Draw what the rows of a batch ask for, ``[B, 3, H, W]``; ``sample`` is the plain way to it.

        Each request is read once per version that its guidance needs, whatever the number of steps, and all versions of a row share
        one draw of the queries, so that they differ by the condition alone.
        """
        guidance = guidance or self.guidance
        grid = self.latent_grid(*(size or (self.image_size, self.image_size)))
        tasks = drawing_tasks(batch)
        factor = self.codec.downsampling
        images = torch.empty(len(batch), 3, grid.h * factor, grid.w * factor, device=self.device)
        for task in dict.fromkeys(tasks):
            rows = [row for row, own in enumerate(tasks) if own == task]
            generators = self._generators([seeds[row] for row in rows])
            branches = self._branches(select_rows(batch, rows), guidance.weights(task), generators, grid)
            shape = (self.decoder.latent_channels, *grid)
            noise = torch.stack([torch.randn(shape, generator=own, device=own.device) for own in generators])
            latents = self.objective.sample(self.decoder, (len(rows), *shape), branches, noise=noise, num_steps=num_steps)
            images[rows] = self.codec.decode(latents).clamp(-1, 1).to(images.dtype)
        return images

    def _branches(self, batch: Batch, weights: dict[Version, float], generators: list[torch.Generator], grid: Grid) -> list[Branch]:
        branches: list[Branch] = []
        queries: Tensor | None = None
        for version, weight in sorted(weights.items(), key=lambda item: item[0] != "full"):  # queries may look at the full request
            reading = self.read(self.prompts.apply(batch, [version] * len(batch)))
            if queries is None:
                queries = self.draw_queries(reading, grid, generators)
            branches.append(Branch(self.condition(reading, queries, grid), weight))
        return branches

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]


def drawing_batch(prompts: list[str], images: list[list[Tensor]]) -> Batch:
    """Requests as a batch; markers are put in front of a prompt that has none.

    Raises:
        ValueError: images of different sizes.
    """
    conversations: list[Conversation] = []
    meta: list[dict[str, Any]] = []
    for prompt, shown in zip(prompts, images, strict=True):
        marked = prompt if IMAGE_MARKER in prompt else "\n".join([IMAGE_MARKER] * len(shown) + ([prompt] if prompt else []))
        conversations.append([Turn(role="user", text=marked)])
        meta.append({"task": "reconstruction" if shown else "unconditional"} if not prompt.strip() else {})
    every = [image for shown in images for image in shown]
    if len({image.shape for image in every}) > 1:
        raise ValueError(f"images of one call must be of one size, found {sorted({tuple(image.shape) for image in every})}")
    return Batch(
        keys=[f"prompt {row}" for row in range(len(prompts))],
        conversations=conversations,
        images=torch.stack(every) if every else None,
        image_counts=[len(shown) for shown in images],
        meta=meta,
    )


def _row_seeds(batch: Batch) -> list[int]:
    """A seed per row that depends on the row alone; rows of a ``pair`` share theirs, so that they differ by the request alone."""
    names = [str(meta.get("pair", key)) for meta, key in zip(batch.meta, batch.keys, strict=True)]
    return [zlib.crc32(name.encode()) for name in names]
