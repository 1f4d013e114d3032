"""What tests of orders share: random shards and runs, and a stream that is read in pieces."""

from hypothesis import strategies as st

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
#: Ranks, micro-batches and steps; a batch of 12 can be shared out evenly.
legs_of_a_run = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 3]), st.integers(1, 3)).filter(
    lambda leg: 12 % (leg[0] * leg[1]) == 0
)


def in_pieces(new_stream, start, lengths):
    """Samples of a stream, each piece from a stream of its own, as after a resume."""
    pieces, position = [], start
    for length in lengths:
        pieces += new_stream().take(position, position + length).tolist()
        position += length
    return pieces
