"""Keys and values in buffers with room are those of the library's cache, which copies them for every token."""

import torch
from transformers import DynamicCache

from umm_zoo.backbones.roomy_cache import with_room


def test_tokens_are_appended_as_in_the_librarys_cache_and_the_prompt_stays() -> None:
    plain = DynamicCache()
    prompt = [torch.randn(2, 3, 5, 4) for _ in range(2)]
    plain.update(*prompt, 0)
    own = with_room(plain)
    for count in (1, 70, 1, 2):  # more than there is room for
        new = torch.randn(2, 2, 3, count, 4)
        expected = [torch.cat(both, -2) for both in zip((own.layers[0].keys, own.layers[0].values), new, strict=True)]
        found = own.update(*new, 0)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert own.get_seq_length() == 79 and plain.get_seq_length() == 5 and torch.equal(plain.layers[0].keys, prompt[0])
    moved = own.layers[0].keys.data_ptr()
    own.update(*torch.randn(2, 2, 3, 1, 4), 0)
    assert own.layers[0].keys.data_ptr() == moved
