"""Base class of bridges from a frozen vision-language model to an image decoder: prompts in, images out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.batch import Batch, Grid, Images, Task, Tokens, by_size, map_by_size, stacked
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.blocks.queries import QuerySampler
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.methods.answering import AnswersWithVLM
from umm_zoo.methods.conditioning import ConditionDropout, ConditioningMode, Guidance, mode_of
from umm_zoo.methods.encoded_prompt import EncodedPrompt, assert_grid, encode_prompt, query_attention
from umm_zoo.methods.preparing import PreparesRequests
from umm_zoo.methods.requests import request_batch, row_seeds
from umm_zoo.methods.source_latents import known_latents, storable
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch
from umm_zoo.outputs import Outputs, Sampling, TokenCount, add_counts, in_groups, sequence_counts


class Bridge(AnswersWithVLM, PreparesRequests, Method):
    """Method of a frozen vision-language model, queries that attend to its prompt, and an image decoder conditioned on them.

    The model encodes the request once, without gradients and keeping no activations; query tokens attend to its keys and values on
    the ``pathway``; the ``connector`` turns their states into the decoder's condition; the decoder carries noise to the target's
    latent. Text-to-image, reconstruction, unconditional generation, editing and composing of any number of images differ only in
    the request. What the model answers to questions stays the same bit for bit.

    A paper's subclass names its parts and writes its training step.

    Attributes:
        queries, pathway, connector, decoder, codec, objective, detail, guidance, dropout: the blocks, see ``WeMMU``.
        image_size: side in pixels of what ``sample`` generates when nothing else is said.
    """

    queries: QuerySampler
    pathway: QueryPathway
    connector: Connector
    decoder: ImageDecoder
    codec: LatentCodec
    objective: DecoderObjective
    detail: DetailBranch | None
    guidance: Guidance
    dropout: ConditionDropout
    image_size: int

    def __init__(self, vlm: PrefixBackbone) -> None:
        super().__init__()
        self.vlm = vlm

    def join(self) -> None:
        """Join the blocks, once all are there: sizes, the pathway's layers, scale of the condition, first queries, what is frozen.

        Raises:
            ValueError: sizes of the blocks disagree.
        """
        sizes = [
            ("queries.width", self.queries.width, "vlm.width", self.vlm.width),
            ("connector.in_dim", self.connector.in_dim, "vlm.width", self.vlm.width),
            ("connector.out_dim", self.connector.out_dim, "decoder.condition_dim", self.decoder.condition_dim),
            ("codec.latent_channels", self.codec.latent_channels, "decoder.latent_channels", self.decoder.latent_channels),
        ]
        if (detail := self.detail) is not None:
            sizes.append(("detail.width", detail.width, "vlm.width", self.vlm.width))
            sizes.append(("detail.latent_channels", detail.latent_channels, "codec.latent_channels", self.codec.latent_channels))
        for mine, found, theirs, expected in sizes:
            if found != expected:
                raise ValueError(f"{mine} is {found}, {theirs} is {expected}")
        self.pathway.attach(self.vlm)
        self.connector.match_rms(self.decoder.condition_rms)
        self.queries.start_from(self.vlm.token_embeddings)
        self.objective.match(self.decoder.schedule)
        self.decoder.pixels_per_cell = self.codec.downsampling
        for part in self.vlm.parts().values():
            freeze(part)

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, and ``queries``, ``pathway``, ``connector``, ``detail`` (if any), ``decoder``, ``codec``."""
        named = {name: getattr(self, name) for name in ("queries", "pathway", "connector", "detail", "decoder", "codec")}
        return {**self.vlm.parts(), **{name: part for name, part in named.items() if part is not None}}

    def check_trained(self, trained: Sequence[str]) -> None:
        """The vision-language model is frozen for good."""
        if own := sorted(set(trained) & set(self.vlm.parts())):
            raise UserError("training.trained", f"'{own[0]}'", "other parts than the vision-language model's")

    def precomputable(self) -> dict[str, Precomputable]:
        """``latents`` of the images to generate, and ``source_latents`` where there are details, while the codec is frozen."""
        return {} if "codec" in self.changing else storable(self.vlm, self.codec, self.detail)

    # -- from a request to a condition ---------------------------------------------------------------------------------------

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        assert_grid(self.vlm, self.detail, inputs)
        latents = self.codec.encode(targets)
        grid = Grid(*latents.shape[-2:])
        queries = self.queries(Tokens(latents.new_zeros(1, 1, self.vlm.width)), grid)
        self.decoder.try_latents(latents, self.connector(Tokens(queries), self.queries.grid_for(grid)))

    def encode_prompt(self, batch: Batch, modes: Sequence[ConditioningMode], targets: Images | None = None) -> EncodedPrompt:
        """Requests as the frozen model encodes them; detail tokens carry a gradient, nothing else. ``targets``: their latents."""
        requests = self.dropout.prompts.apply(batch, modes)
        known = {} if self.detail is None else known_latents(self.vlm, batch, targets)
        return encode_prompt(self.vlm, self.codec, self.detail, requests, self.queries.opening, known)

    def draw_queries(self, prompt: EncodedPrompt, grid: Grid, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Queries ``[B, N, D]`` for a latent grid; with a generator per row a row does not depend on the others."""
        context = prompt.context
        if generators is None:
            return self.queries(context, grid)
        rows = [
            self.queries(Tokens(context.values[i : i + 1], None if context.mask is None else context.mask[i : i + 1]), grid, own)
            for i, own in enumerate(generators)
        ]
        return torch.cat(rows)

    def condition(self, prompt: EncodedPrompt, queries: Tensor, grid: Grid) -> Tokens:
        """The decoder's condition ``[B, N, E]`` from queries ``[B, N, D]`` for a latent grid."""
        own = self.queries.grid_for(grid)
        states = self.pathway(prompt.prefix, prompt.details, self.queries.behind_marker(queries), own)  # [B, N, D]
        dtype = next(self.connector.parameters(), states).dtype
        return self.connector(Tokens(states.to(dtype)), own)

    def conditioned_targets(self, batch: Batch, prompt: EncodedPrompt, targets: Images) -> list[tuple[Tensor, Tokens]]:
        """Latents ``[m, C, h, w]`` of ``targets`` of one size, for each size, and their condition; queries are drawn here.

        ``token_counts`` become ``text`` and ``image`` of the requests, detail tokens (``image`` too) and ``query``.
        """
        counts = [sequence_counts(prompt.prefix.attention_mask, prompt.image_mask)]
        counts.append({"image": TokenCount(prompt.details.mask.sum(), prompt.details.mask.numel())})

        def condition(rows: list[int], latents: Tensor) -> Tokens:
            own, grid = prompt.select(rows or [0]), Grid(*latents.shape[-2:])
            queries = self.draw_queries(own, grid)  # [m, N, D]
            counts.append({"query": TokenCount(queries.shape[:2].numel() * bool(rows), queries.shape[:2].numel())})
            return replace(self.condition(own, queries, grid), crops=[batch.crops[row] for row in rows or [0]])

        groups = self.decoder.conditioned(by_size(targets), condition)
        self.token_counts = add_counts(*counts)
        return groups

    # -- validation ----------------------------------------------------------------------------------------------------------

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        own = {"generated", "round_trips", "unchanged", "unchanged_references", "attention", "nll", "num_tokens", "answers"}
        return {*self.objective.makes, *own}

    def check_rows(self, batch: Batch, scoring: bool) -> None:
        """Refuse rows that the frozen model cannot read whole."""
        if not batch.requested:
            self.vlm.check_rows(batch)
        if batch.requested or (scoring and self.wanted.max_new_tokens):
            self.vlm.check_rows(batch, for_generation=True, opening=self.queries.opening if batch.requested else "")

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs for metrics; targets of one size go together.

        Rows with an image to generate: the objective's terms under the same noise at every validation, ``generated`` in the
        target's size with guidance, from noise that depends on the row alone, ``round_trips`` of the codec; on request
        ``attention``, and ``unchanged``: edits generated from the same noise as reconstructions, left out unless all rows are edits
        in the size of their image. Rows without: ``answers``, ``nll`` and ``num_tokens`` of the frozen model.
        """
        sizes = [target.shape for target in batch.requested] if all(batch.has_target) else []
        return in_groups(lambda rows: self._validate(rows, batch_idx), batch, sizes)

    def _validate(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of rows whose targets have one size, or which have none."""
        if not batch.requested:
            output = self.vlm(self.vlm.inputs_of(batch))
            answers = self.answer(batch, self.wanted.max_new_tokens) if self.wanted.max_new_tokens else [""] * len(batch)
            return Outputs(nll=output.nll, num_tokens=output.num_tokens, answers=answers)
        latents = stacked(self.codec.target_latents(batch))
        grid = Grid(*latents.shape[-2:])
        prompt = self.encode_prompt(batch, [mode_of(task) for task in batch.tasks], latents)
        queries = self.draw_queries(prompt, grid, self._generators(row_seeds(batch)))
        generator = torch.Generator(latents.device).manual_seed(batch_idx)
        condition = replace(self.condition(prompt, queries, grid), crops=batch.crops)
        outputs = Outputs(self.objective(self.decoder, latents, condition, generator))
        if self.wanted.generates(batch_idx):
            target = batch.requested[0]
            sampling = Sampling(size=(target.shape[-2], target.shape[-1]))
            outputs.generated = self.generate(batch, row_seeds(batch), sampling)
            outputs.round_trips = list(self.codec.decode(latents).to(target.dtype))
            all_edits = set(batch.tasks) == {Task.EDIT} and all(image.shape == target.shape for image in batch.images)
            if all_edits and "unchanged" in self.wanted.on_request:
                unchanged = replace(batch, tasks=[Task.RECONSTRUCT] * len(batch))
                outputs.unchanged = self.generate(unchanged, row_seeds(batch), sampling)
                outputs.unchanged_references = batch.images
            if "attention" in self.wanted.on_request:
                tokens = self.queries.behind_marker(queries)
                outputs.attention = query_attention(self.pathway, prompt, tokens, self.queries.grid_for(grid))
        return outputs

    # -- use -----------------------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Tensor]] | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Images ``[len(prompts), 3, H, W]`` in [-1, 1] of requests from Python, whose tasks are those of ``request_batch``.

            images = WeMMU.load("runs/wemmu/toy/stage4").sample(["Make the circle green."], [[image]], seed=3)

        Args:
            prompts: one per image to be generated.
            images: for each prompt, its input images ``[3, H, W]`` in [-1, 1], of any sizes.
            seed: the k-th image is generated from seed + k, so that it does not depend on how many are made at a time.
            num_steps: of the sampler; None is the objective's own.
            guidance: scales; None is the method's own.
            size: height and width in pixels; None is the method's ``image_size``.

        Raises:
            ValueError: as many lists of images as prompts are needed; a marker too many; a size that the codec cannot make.
        """
        batch = request_batch(prompts, images).to(self.device)
        seeds = [seed + row for row in range(len(prompts))]
        return self._generate(batch, seeds, guidance or self.guidance, Sampling(num_steps, size=size))

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        """Images that the rows of a batch ask for, squares of ``image_size`` where no size is said; see ``outputs.Draws``."""
        sampling = sampling or Sampling()
        guidance = self.guidance.changed(sampling.guidance, sampling.image_guidance)
        return list(self._generate(batch, seeds, guidance, sampling))

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images again from what queries and details make of them, each in its own size; the k-th from seed + k.

        Raises:
            UserError: a size that the codec cannot make.
        """
        made = dict[int, Tensor]()
        for places, stack in by_size(images):
            batch = request_batch([""] * len(places), [[image] for image in stack]).to(self.device)
            seeds, sampling = [seed + place for place in places], Sampling(size=(stack.shape[-2], stack.shape[-1]))
            made.update(zip(places, self._generate(batch, seeds, self.guidance, sampling), strict=True))
        return [made[place] for place in range(len(images))]

    @torch.no_grad()
    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the codec and back: the best that a reconstruction could be."""
        return map_by_size(lambda stack: self.codec.decode(self.codec.encode(stack)).clamp(-1, 1), images)

    @torch.no_grad()
    def _generate(self, batch: Batch, seeds: Sequence[int], guidance: Guidance, sampling: Sampling) -> Tensor:
        """Images ``[B, 3, H, W]``.

        Each request is encoded once per mode that its guidance needs, whatever the number of steps, and all modes of a row share
        one draw of the queries, so that they differ by the condition alone.
        """
        height, width = sampling.size or (self.image_size, self.image_size)
        grid = self.codec.latent_grid(height, width, self.decoder.patch)
        images = torch.empty(len(batch), 3, height, width, device=self.device)
        for task in dict.fromkeys(batch.tasks):
            rows = [row for row, own in enumerate(batch.tasks) if own == task]
            generators = self._generators([seeds[row] for row in rows])
            branches = self._branches(batch.select(rows), guidance.weights(task), generators, grid)
            shape = (self.decoder.latent_channels, *grid)
            noise = torch.stack([torch.randn(shape, generator=own, device=own.device) for own in generators])
            latents = self.objective.sample(self.decoder, (len(rows), *shape), branches, None, noise, sampling.num_steps)
            images[rows] = self.codec.decode(latents).clamp(-1, 1).to(images.dtype)
        return images

    def _branches(
        self, batch: Batch, weights: dict[ConditioningMode, float], generators: list[torch.Generator], grid: Grid
    ) -> list[Branch]:
        branches: list[Branch] = []
        queries: Tensor | None = None
        for mode, weight in sorted(weights.items(), key=lambda item: item[0] != "full"):  # queries may look at the full request
            prompt = self.encode_prompt(batch, [mode] * len(batch))
            queries = self.draw_queries(prompt, grid, generators) if queries is None else queries
            branches.append(Branch(self.condition(prompt, queries, grid), weight))
        return branches

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
