"""Which checkpoint is proven for which use: the tests run every cell, and ``tools/update_readme.py`` prints the table."""

from __future__ import annotations

#: What a vision-language model is used for, by name.
USES = {
    "logits": "logits, loss and generation equal the library's",
    "prefix": "a prompt encoded once and continued equals one pass",
    "llava": "trained by `LLaVA`",
    "uae": "captioner of UAE",
    "frozen": "bridge on `FrozenPathway` (MetaQuery)",
    "expert": "bridge on `ExpertPathway` (WeMMU)",
    "detail": "with a detail branch",
}
#: The library's model types, a checkpoint of each, and the uses that are proven.
PROVEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen2_vl": ("Qwen2-VL", tuple(USES)),
    "qwen2_5_vl": ("Qwen2.5-VL", tuple(USES)),
    "qwen3_vl": ("Qwen3-VL", tuple(USES)),
    "llava": ("LLaVA-1.5", tuple(USES)),
    "llava_next": ("LLaVA-NeXT (1.6)", tuple(use for use in USES if use != "detail")),
    "llava_onevision": ("LLaVA-OneVision", tuple(use for use in USES if use != "detail")),
    "internvl": ("InternVL3", tuple(USES)),
    "smolvlm": ("SmolVLM", tuple(USES)),
    "gemma3": ("Gemma 3", tuple(USES)),
}
#: Settings of the image processor under which an image becomes one grid, which a detail branch needs.
GRID_SETTINGS = {"internvl": {"crop_to_patches": False}, "smolvlm": {"do_image_splitting": False}}


def proven(use: str) -> list[str]:
    """Model types that are proven for a use."""
    return [kind for kind, (_, uses) in PROVEN.items() if use in uses]


def table() -> str:
    """The table of checkpoints and uses."""
    lines = ["| checkpoint (`model_type`) | " + " | ".join(USES.values()) + " |", "|---" * (len(USES) + 1) + "|"]
    for kind, (name, uses) in PROVEN.items():
        cells = []
        for use in USES:
            settings = GRID_SETTINGS.get(kind, {}) if use == "detail" else {}
            said = "".join(f" (`{key}: {str(value).lower()}`)" for key, value in settings.items())
            cells.append(f"yes{said}" if use in uses else "no")
        lines.append(f"| {name} (`{kind}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines)
