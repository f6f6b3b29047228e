"""The tokenizer of a run: loaded, or trained on the run's own text, and kept as a folder that transformers opens.

`prepare_tokenizer` puts that folder into the cache, with `info.json` beside it that holds what the ranks need to know
(vocabulary size, ids of the special tokens), so that a second run imports neither transformers nor the hub client.
`Encoder` turns text into ids with the `tokenizers` library alone where the tokenizer has a fast form; the processes
that tokenise a corpus then start quickly.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmpipe_cli.data.cache import cached_folder, fingerprint
from llmpipe_cli.data.discover import find_folder_or_id
from llmpipe_cli.data.sources import PIECE_CHARS, cut_text, hub_commit
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe, TokenizerTraining

_VERSION = 1  # of the folder's contents: older ones are made again
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "config.json", "*.py")


class TokenizerInfo(BaseModel):
    """What is known of a tokenizer without opening it.

    `vocab_size` is one more than the largest id. `special_token_ids` has the keys pad, eos, bos, unk, cls, sep and mask
    as far as the tokenizer has them; `all_special_ids` also any others.
    """

    directory: str
    fingerprint: str
    vocab_size: int
    special_token_ids: dict[str, int]
    all_special_ids: list[int]

    @property
    def end_of_text(self) -> int | None:
        """The token that separates documents: eos, or sep."""
        return self.special_token_ids.get("eos", self.special_token_ids.get("sep"))


def prepare_tokenizer(
    recipe: Recipe,
    base_dir: Path,
    cache_dir: Path,
    training_text: Callable[[], Iterator[str]],
    text_identity: dict[str, Any],
) -> TokenizerInfo:
    """The recipe's tokenizer, from the cache when it is there.

    `training_text` gives the texts to train on (called only when training is needed); `text_identity` is what they
    depend on.

    Raises:
        UsageError: when there is no such tokenizer, or the recipe names none.
    """
    choice = recipe.tokenizer or recipe.model.from_
    if choice is None:
        raise UsageError(
            "the recipe names no tokenizer",
            where="tokenizer",
            hint="write a hub id or folder, or `tokenizer: {train: {vocab_size: 8000}}` to train one on this text",
        )
    if not isinstance(choice, str):
        training = choice.train
        family = _FAMILIES_WITH_OWN_SPLITTING.get((recipe.model.config or {}).get("model_type", ""))
        template = _template_name(recipe.task) if family is None else "causal"
        identity = {
            "train": training.model_dump(),
            "template": template,
            "family": family,
            "text": text_identity,
            "version": _VERSION,
        }
        return _from_cache(
            cache_dir, identity, lambda: train_tokenizer(training_text(), training, template, family=family)
        )
    folder = find_folder_or_id(choice, base_dir, where="tokenizer" if recipe.tokenizer else "model.from")
    revision = None if recipe.tokenizer else recipe.model.revision

    def load() -> Any:
        return _load(str(folder or choice), revision, recipe.model.trust_remote_code)

    def identify() -> dict[str, Any]:
        about: dict[str, Any] = {"name": choice, "revision": revision, "version": _VERSION}
        if folder is not None:
            paths = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
            about["files"] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        else:
            about["commit"] = hub_commit(choice, revision, kind="models")
        return about

    if folder is None and hub_commit(choice, revision, kind="models") is None:
        load()  # downloads it; from then on its commit is known, and part of the fingerprint
    return _from_cache(cache_dir, identify(), load)


def train_tokenizer(
    texts: Iterator[str], training: TokenizerTraining, template: str, *, family: str | None = None
) -> Any:
    """A byte-level BPE tokenizer (`PreTrainedTokenizerFast`) trained on `texts`; the same texts give the same one.

    Every byte has a token, so no text is unknown. `template` decides the special tokens: "causal" has <|endoftext|>
    (end and beginning of text) and <|pad|>; "encoder" [PAD] [UNK] [CLS] [SEP] [MASK], with [CLS] and [SEP] put around
    each text; "seq2seq" <pad>, </s>, <unk>, with </s> put after each text. `family` names a transformers tokenizer
    class whose way of splitting text into words is taken.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    names = _SPECIAL_TOKENS[template]
    special_tokens = list(dict.fromkeys(names.values()))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if family is not None:
        alike = getattr(transformers, family)(vocab=dict.fromkeys(special_tokens, 0), merges=[]).backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = alike.normalizer, alike.pre_tokenizer
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(texts, training.max_documents), trainer)
    ids = {token: tokenizer.token_to_id(token) for token in special_tokens}
    if template == "encoder":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    elif template == "seq2seq":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


# For these model types `AutoTokenizer` takes vocabulary and merges from a folder, but splits text into words in the
# family's own way whatever tokenizer.json says. A tokenizer trained for them has to split in that way from the start.
_FAMILIES_WITH_OWN_SPLITTING = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3_5": "Qwen3_5Tokenizer",
    "qwen3_5_text": "Qwen3_5Tokenizer",
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
    "qwen4_exp": "Qwen3_5Tokenizer",
}


class Encoder:
    """Text to token ids, with the tokenizer in `directory`."""

    def __init__(self, directory: str) -> None:
        self._fast: Any = None
        self._slow: Any = None
        file = Path(directory) / "tokenizer.json"
        if file.is_file():
            import tokenizers

            self._fast = tokenizers.Tokenizer.from_file(str(file))
            self._fast.no_truncation()
            self._fast.no_padding()
        else:
            self._slow = _load(directory, None, trust_remote_code=False)
        self._prefix, self._suffix = self._special_tokens_around()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens. A very long text is cut in pieces, so that memory stays bounded."""
        ids: list[int] = []
        while len(text) > 2 * PIECE_CHARS:
            end = cut_text(text)
            ids += self._encode(text[:end], special_tokens=False)
            text = text[end:]
        return ids + self._encode(text, special_tokens=False)

    def encode_with_special_tokens(self, text: str, *, first: bool = True, last: bool = True) -> list[int]:
        """Ids with the special tokens that the tokenizer puts around a text. Of a document in pieces, only the `first`
        piece gets those in front and only the `last` those behind."""
        return [*(self._prefix if first else []), *self.encode(text), *(self._suffix if last else [])]

    def encode_truncated(
        self, texts: list[str], max_length: int, *, target: bool = False
    ) -> tuple[list[list[int]], int]:
        """Ids with special tokens, at most `max_length` each, and how many texts were cut. `target`: the texts are in
        the output language, which a few translation tokenizers treat apart."""
        if self._fast is not None:
            self._fast.enable_truncation(max_length)
            encodings = self._fast.encode_batch_fast(texts)
            self._fast.no_truncation()
            return [encoding.ids for encoding in encodings], sum(bool(encoding.overflowing) for encoding in encodings)
        whole = self._slow(**{"text_target" if target else "text": texts})["input_ids"]
        cut = self._slow(**{"text_target" if target else "text": texts}, truncation=True, max_length=max_length)
        return cut["input_ids"], sum(len(ids) > max_length for ids in whole)

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        if self._fast is not None:
            ids: list[int] = self._fast.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids
            return ids
        slow: list[int] = self._slow(text, add_special_tokens=special_tokens)["input_ids"]
        return slow

    def _special_tokens_around(self) -> tuple[list[int], list[int]]:
        bare = self._encode("a", special_tokens=False)
        full = self._encode("a", special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []


def _template_name(task: str) -> str:
    return {"causal-lm": "causal", "chat": "causal", "translation": "seq2seq"}.get(task, "encoder")


# No `unk_token` for causal models: with all 256 bytes in the vocabulary it would be a row of the embedding that nothing
# ever reads. Encoders and sequence-to-sequence models keep theirs, since pretrained ones have it too.
_SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "causal": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "encoder": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "seq2seq": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def _load(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for a bad name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"tokenizer {name!r} cannot be loaded: {reason}",
            where="tokenizer",
            hint="give a folder with tokenizer files or a hub id; without network only downloaded ones load",
        ) from error


def _from_cache(cache_dir: Path, identity: dict[str, Any], make: Callable[[], Any]) -> TokenizerInfo:
    key = fingerprint(identity)

    def fill(directory: Path) -> None:
        tokenizer = make()
        tokenizer.save_pretrained(directory / "tokenizer")
        (directory / "info.json").write_text(json.dumps(_describe(tokenizer), indent=1))

    folder = cached_folder(cache_dir / "tokenizers" / key, fill)
    info = json.loads((folder / "info.json").read_text())
    return TokenizerInfo(directory=str(folder / "tokenizer"), fingerprint=key, **info)


def _describe(tokenizer: Any) -> dict[str, Any]:
    names = ("pad", "eos", "bos", "unk", "cls", "sep", "mask")
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    largest = max(tokenizer.get_vocab().values(), default=-1)
    return {
        "vocab_size": max(len(tokenizer), largest + 1),
        "special_token_ids": {name: value for name, value in ids.items() if isinstance(value, int)},
        "all_special_ids": sorted(set(tokenizer.all_special_ids)),
    }
