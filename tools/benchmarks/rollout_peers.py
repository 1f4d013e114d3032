"""Peers of our rollouts: the library's own calls, and TRL's GRPOTrainer, on the same model, images and reward."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.base import Options

RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-5


def library_loop() -> Any:
    """The method with its captions and its scoring as a general trainer does them."""
    import torch
    from torch import Tensor

    from umm_zoo.backbones.base import VLMInputs
    from umm_zoo.backbones.generation import Samples, take_rows
    from umm_zoo.batch import stacked
    from umm_zoo.methods.uae.captioner_grpo import CaptionRollout, GenerationForUnderstanding

    class LibraryLoop(GenerationForUnderstanding):
        """Every copy of a prompt for itself."""

        @torch.no_grad()
        def roll_out(self, batch: Any) -> CaptionRollout:
            vlm: Any = self.vlm
            images = stacked(batch.images)
            group = self.rollouts.group
            size = len(images) * group
            copies = images.repeat_interleave(group, dim=0)
            with self.phases("caption", self.device):
                inputs = vlm.embed(self.captions.conversations(size), copies, [1] * size, for_generation=True)
                sides = torch.tensor([[1, *(side // vlm.layout.patch_size for side in copies.shape[-2:])]] * size)
                whole = vlm.model.generate(
                    input_ids=inputs.token_ids,
                    attention_mask=inputs.attention_mask.long(),
                    pixel_values=vlm.layout.patches(copies),
                    image_grid_thw=sides.to(copies.device),
                    mm_token_type_ids=inputs.image_mask.int(),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    max_new_tokens=self.captions.max_new_tokens,
                    pad_token_id=vlm.pad_id,
                    eos_token_id=vlm.tokenizer.eos_token_id,
                )
                tokens = whole[:, inputs.token_ids.shape[1] :]
                ended = (tokens == vlm.tokenizer.eos_token_id).long()
                mask = (ended.cumsum(1) - ended) == 0
                texts = vlm.tokenizer.batch_decode(tokens, skip_special_tokens=True)  # the padding is one of them
            with self.phases("score", self.device):
                old = self._scored(inputs, tokens, mask)
            samples = Samples(tokens, mask, texts, old)
            with self.phases("generate", self.device):
                generated = self.images_of_samples(samples, batch.images, self.noise(len(images), group), torch.arange(size))
            return CaptionRollout(
                batch=batch,
                images=batch.images,
                captions=texts,
                generated=generated,
                rewards=self.judge(generated, batch),
                inputs=inputs,
                samples=samples,
                weights=self.objective.aggregation(mask),
            )

        def _scored(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor) -> Tensor:
            found, _ = self.vlm.log_probs(self.vlm.with_answers(prompts, tokens, mask), self.captions.temperature)
            return found[:, -tokens.shape[1] :]  # the tokens are the last of the sequence

        def log_probs(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor, owners: Tensor | None = None) -> Tensor:
            return self._scored(prompts if owners is None else take_rows(prompts, owners * self.rollouts.group), tokens, mask)

        def prompts_of(self, rollout: CaptionRollout, groups: Tensor) -> VLMInputs:
            if len(groups) < len(rollout.captions):  # older commits ask for a prompt per caption
                groups = groups.repeat_interleave(self.rollouts.group)
            copies = [rollout.images[row] for row in groups.tolist()]
            return self.vlm.embed(self.captions.conversations(len(copies)), copies, [1] * len(copies), for_generation=True)

        _prompts = prompts_of  # its name in older commits

    return LibraryLoop


#: QwenChat without a system turn, as the library writes a template.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trl_processor(vlm: Any) -> Any:
    """The library's processor with the image's patches and the prompt's tokens of a ``Qwen25VL``."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class Processor(Qwen2_5_VLProcessor):
        """Without videos, whose processor needs torchvision."""

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    layout = vlm.layout
    cutter = Qwen2VLImageProcessorPil(
        patch_size=layout.patch_size,
        merge_size=layout.merge_size,
        temporal_patch_size=layout.temporal_size,
        size=dict(zip(("shortest_edge", "longest_edge"), layout.limits, strict=True)),
    )
    vlm.tokenizer.padding_side = "left"
    return Processor(cutter, vlm.tokenizer, CHAT_TEMPLATE)


def trl_trainer(options: Options, method: Any, batch: Any, folder: str) -> Any:
    """TRL's trainer of the method's captioner, which generates and rewards with the method and measures its phases."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from torch import nn
    from trl import GRPOConfig, GRPOTrainer

    from umm_zoo.batch import IMAGE_MARKER, stacked
    from umm_zoo.outputs import Sampling

    device, phases = torch.device(options.device), method.phases

    class Trainer(GRPOTrainer):
        """With a clock."""

        def _generate(self, prompts: Any) -> Any:
            with phases("caption", device):
                return super()._generate(prompts)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            with phases("score", device):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    @torch.no_grad()
    def reconstruction(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float | None]:
        seeds = method.noise(options.batch, options.group)
        copies = stacked(batch.images).repeat_interleave(options.group, dim=0)
        texts = [turns[0]["content"] for turns in completions]
        with phases("generate", device):
            images = method.images_of_captions(texts, seeds, copies, Sampling(num_steps=method.num_steps))
        with phases("reward", device):
            return list(method.reward(images, batch).tolist())

    levels = ((stacked(batch.images) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    question = method.captions.prompt.removeprefix(IMAGE_MARKER)  # the trainer puts the image before the text
    rows = {
        "prompt": [[{"role": "user", "content": question}]] * options.batch,
        "image": [Image.fromarray(image) for image in levels],
    }
    model = method.vlm.model
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".language_model." in name]
    config = GRPOConfig(  # the rest by its defaults: one update on a rollout, no KL, all tokens sampled at temperature 1
        output_dir=folder,
        per_device_train_batch_size=options.batch * options.group,
        num_generations=options.group,
        max_completion_length=options.tokens,
        max_steps=options.steps + 1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,  # of AdamW in the other arms
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        loss_type="grpo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        reward_funcs=reconstruction,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=trl_processor(method.vlm),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights="gaussian"),
    )
