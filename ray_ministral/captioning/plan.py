"""`StepPlan`: what all stages do for one step of one microbatch, as data. Small; no torch, pixels or activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

BLOCK_TOKENS = 64
"""The KV cache of a sequence is given out in blocks of so many tokens."""


def in_blocks(tokens: int) -> int:
    """`tokens`, rounded up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True)
class Prefill:
    """A piece of a prompt: `length` tokens from position `start` on, into `slot`.

    `completes` says that the prompt ends here, so that the step gives the sequence its first token.
    `images` lists, in order, the rows of pixel blocks that belong to the piece, as (block, row).
    """

    slot: int
    start: int
    length: int
    completes: bool
    images: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step of one microbatch.

    The stream is one token of each decoding sequence, then the pieces of prompts. Decoding sequences have the slots 0
    to `len(decode_positions) - 1` in this order; prompts have slots above. Before anything else each of `moves` (from,
    to) carries a sequence to the slot of one that has ended.

    token_ids: int32 [T], for the first stage. decode_positions: int32, the position of each decoding sequence's token.
    sample_keys, sample_positions: uint64 and int64, for each token to sample (decoding sequences, then prompts that
    complete): what its random number is keyed by, and the position that the new token will have.
    generation: of the pipeline that it is for; stages of another one refuse it.
    """

    step: int
    microbatch: int
    moves: tuple[tuple[int, int], ...]
    token_ids: np.ndarray
    decode_positions: np.ndarray
    prefills: tuple[Prefill, ...]
    sample_keys: np.ndarray
    sample_positions: np.ndarray
    generation: int = 0

    @property
    def num_decode(self) -> int:
        """Decoding sequences."""
        return len(self.decode_positions)

    @property
    def num_slots(self) -> int:
        """Slots in use once the step is done."""
        return self.num_decode + len(self.prefills)

    def without_token_ids(self) -> StepPlan:
        """The plan for stages after the first, which read hidden states."""
        return replace(self, token_ids=np.empty(0, dtype=np.int32))

    def positions(self) -> np.ndarray:
        """int64 [T]: the true position of every token of the stream."""
        pieces = [self.decode_positions.astype(np.int64)]
        pieces += [np.arange(p.start, p.start + p.length, dtype=np.int64) for p in self.prefills]
        return np.concatenate(pieces)

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence in the stream."""
        return (1,) * self.num_decode + tuple(piece.length for piece in self.prefills)

    def sampled_rows(self) -> np.ndarray:
        """int64: the rows of the stream whose logits are sampled from."""
        rows = list(range(self.num_decode))
        end = self.num_decode
        for piece in self.prefills:
            end += piece.length
            if piece.completes:
                rows.append(end - 1)
        return np.asarray(rows, dtype=np.int64)
