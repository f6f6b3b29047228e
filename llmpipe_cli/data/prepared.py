"""What `prepare` hands to the plan and to every rank: plain JSON that says where the tokens are and what they mean."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PreparedSplit(BaseModel):
    """Training or validation data, ready to be read by index."""

    kind: Literal["packed", "bins", "records", "synthetic", "mixture", "stream"]
    """packed: samples are consecutive blocks of the token stream; bins: several whole documents; records: one document
    a sample; mixture: those of `parts`; stream: blocks that are read while training, of unknown number."""
    directory: str
    """Folder of the arrays; empty for synthetic data."""
    fingerprint: str
    """Hash of the samples' contents: equal when two machines or two runs see the same samples."""
    task: str
    sequence_len: int
    target_sequence_len: int
    vocab_size: int
    num_samples: int
    num_documents: int = 0
    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0
    num_skipped: int = 0
    """Malformed records left out."""
    num_truncated: int = 0
    """Documents longer than a sample, which were or will be cut."""
    skipped_examples: list[str] = []
    """The first malformed records: place and reason."""
    truncated_examples: list[str] = []
    """The places of the first documents that were cut."""
    num_labels: int = 0
    label_counts: list[int] = []
    """Classification: documents of each label; of a mixture as often as an epoch draws them."""
    stream: dict[str, Any] | None = None
    """What a streamed split is read from."""
    parts: list[PreparedSplit] = []
    """The sources of a mixture."""
    draws: list[int] = []
    """Samples of each source in one epoch of a mixture."""
    origin: str = ""
    """Of a source in a mixture: what the recipe says of it."""


class PreparedData(BaseModel):
    """All data of a run.

    `special_token_ids` has the keys pad, eos, bos, unk, cls, sep and mask, as far as the tokenizer has them.
    """

    task: str
    tokenizer_dir: str | None
    tokenizer_fingerprint: str | None = None
    vocab_size: int
    special_token_ids: dict[str, int] = {}
    all_special_ids: list[int] = []
    label_names: list[str] | None = None
    token_types: bool = False
    """Whether the tokenizer tells the two texts of a pair apart."""
    packing: bool = True
    block_attention: bool = False
    """Whether tokens of a packed sample attend to their own document alone."""
    multi_label: bool = False
    class_weights: list[float] | None = None
    """Factor on the loss of each class."""
    whole_word_masking: bool = False
    scoring: dict[str, float] = {}
    """Numbers of the recipe's `evaluation` that decide how outputs become answers."""
    train: PreparedSplit | None = None
    validation: PreparedSplit | None = None
