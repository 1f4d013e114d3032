"""Which vision-language checkpoint is proven for which use; the tests run every cell, `tools/update_readme.py` prints the table."""

from __future__ import annotations

from umm_zoo.backbones.families import MODELS

#: Uses by name: what is claimed, and the test of it, once per checkpoint.
USES = {
    "same": ("logits, loss, answers of the library", "backbones/test_pretrained_vlm.py"),
    "prefix": ("prompt encoded once, gone on from", "backbones/test_pretrained_vlm.py::test_prefix_and_continuation_are_one_pass"),
    "llava": ("`LLaVA`", "methods/test_vlm_uses.py::test_llava"),
    "uae": ("captioner of UAE", "methods/test_vlm_uses.py::test_captioner"),
    "frozen": ("`MetaQuery` on `FrozenPathway`", "methods/test_vlm_uses.py::test_frozen_pathway"),
    "expert": ("`WeMMU` on `ExpertPathway`", "methods/test_vlm_uses.py::test_expert_pathway"),
    "detail": ("with `VAEDetail`", "methods/test_vlm_uses.py::test_detail"),
}
_NO_GRID = tuple(use for use in USES if use != "detail")
#: Uses that are proven, by the library's model type.
PROVEN: dict[str, tuple[str, ...]] = {
    "qwen2_vl": tuple(USES),
    "qwen2_5_vl": tuple(USES),
    "qwen3_vl": tuple(USES),
    "llava": tuple(USES),
    "llava_next": _NO_GRID,
    "llava_onevision": _NO_GRID,
    "internvl": tuple(USES),
    "smolvlm": tuple(USES),
    "gemma3": tuple(USES),
}
#: Settings of the image processor under which an image becomes one grid, which a detail branch needs.
GRID_SETTINGS = {"internvl": {"crop_to_patches": False}, "smolvlm": {"do_image_splitting": False}}


def proven(use: str) -> list[str]:
    """Model types that are proven for a use."""
    return [kind for kind, uses in PROVEN.items() if use in uses]


def table() -> str:
    """Checkpoints and uses, and the tests of each."""
    known = {family.stored: family for family in MODELS}
    heads = ["vision-language model", "checkpoint, such as", *(claim for claim, _ in USES.values())]
    rows = []
    for kind, uses in PROVEN.items():
        settings = "".join(f" (`{name}: {str(value).lower()}`)" for name, value in GRID_SETTINGS.get(kind, {}).items())
        cells = [("yes" + settings * (use == "detail")) if use in uses else "no grid of tokens" for use in USES]
        rows.append([known[kind].name, f"`{known[kind].example}`", *cells])
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    proofs = ", ".join(dict.fromkeys(f"`{test}`" for _, test in USES.values()))
    return "\n".join(lines) + f"\n\nAll through `PretrainedVLM`. Tests in `tests`, once per row: {proofs}.\n"
