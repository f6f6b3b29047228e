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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmpipe_cli import hub
from llmpipe_cli.data.cache import cached_folder, fingerprint
from llmpipe_cli.data.discover import find_folder_or_id
from llmpipe_cli.data.sources import PIECE_CHARS, cut_text, hub_commit
from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.schema import Recipe, TokenizerTraining

if TYPE_CHECKING:
    from llmpipe_cli.data.chat import ChatEncoder

_VERSION = 2  # of the folder's contents: older ones are made again
_TOKENIZER_FILES = ("*token*", "chat_template*", "vocab*", "merges*", "*.model", "*.tiktoken", "config.json", "*.py")


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
    token_types: bool = False
    """Whether the second text of a pair has another token type than the first."""

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
    chat_template = _chat_template(recipe, base_dir)
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
            "chat": chat_template,
            "template": template,
            "family": family,
            "text": text_identity,
            "version": _VERSION,
        }
        return _from_cache(
            cache_dir,
            identity,
            lambda: _with_chat_template(
                train_tokenizer(training_text(), training, template, family=family), chat_template
            ),
        )
    folder = find_folder_or_id(choice, base_dir, where="tokenizer" if recipe.tokenizer else "model.from")
    revision = None if recipe.tokenizer else recipe.model.revision

    def load() -> Any:
        tokenizer = _load(str(folder or choice), revision)
        return _with_chat_template(tokenizer, chat_template)

    def identify() -> dict[str, Any]:
        about: dict[str, Any] = {"name": choice, "revision": revision, "version": _VERSION, "chat": chat_template}
        if folder is not None:
            paths = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
            about["files"] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        else:
            about["commit"] = hub_commit(choice, revision, kind="models")
        return about

    if folder is None and hub_commit(choice, revision, kind="models") is None:
        load()  # downloads it; from then on its commit is known, and part of the fingerprint
    return _from_cache(cache_dir, identify(), load)


def _chat_template(recipe: Recipe, base_dir: Path) -> str | None:
    """The template that the recipe gives, or for a chat the one that takes the place of a missing one."""
    if recipe.task != "chat":
        return None
    given = recipe.data.chat_template
    if given is None:
        return ""
    if "{" in given:
        return given
    for folder in (Path.cwd(), base_dir):
        if (folder / given).is_file():
            return (folder / given).read_text("utf-8")
    raise UsageError(
        f"there is no file {given}",
        where="data.chat_template",
        hint="write a file with a Jinja template, or the template itself",
    )


def _with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with the given chat template; "" gives one without any the default one."""
    from llmpipe_cli.data.chat import DEFAULT_TEMPLATE

    if template:
        tokenizer.chat_template = template
    elif template == "" and not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


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


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    `offsets` are first and last-plus-one character of each of the context's tokens, which begin at `context_start`;
    `null_position` is where the labels point when there is no answer.
    """

    ids: list[int]
    type_ids: list[int]
    context_start: int
    offsets: list[tuple[int, int]]
    null_position: int


class Encoder:
    """Text to token ids, with the tokenizer in `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fast: Any = None
        self._slow: Any = None
        file = Path(directory) / "tokenizer.json"
        if file.is_file():
            import tokenizers

            self._fast = tokenizers.Tokenizer.from_file(str(file))
            self._fast.no_truncation()
            self._fast.no_padding()
        else:
            self._slow = _load(directory, None)
        self._prefix, self._suffix = self._special_tokens_around()
        about = Path(directory).parent / "info.json"
        info = json.loads(about.read_text()) if about.is_file() else {}
        self._cls_id = info.get("special_token_ids", {}).get("cls")

    @cached_property
    def chat(self) -> ChatEncoder:
        """Conversations to token ids, by the tokenizer's chat template."""
        from llmpipe_cli.data.chat import ChatEncoder

        return ChatEncoder(_load(self._directory, None))

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
    ) -> tuple[list[list[int]], list[int]]:
        """Ids with special tokens, at most `max_length` each, and which texts were cut. `target`: the texts are in
        the output language, which a few translation tokenizers treat apart."""
        if self._fast is not None:
            self._fast.enable_truncation(max_length)
            encodings = self._fast.encode_batch_fast(texts)
            self._fast.no_truncation()
            cut = [index for index, encoding in enumerate(encodings) if encoding.overflowing]
            return [encoding.ids for encoding in encodings], cut
        whole = self._slow(**{"text_target" if target else "text": texts})["input_ids"]
        short = self._slow(**{"text_target" if target else "text": texts}, truncation=True, max_length=max_length)
        return short["input_ids"], [index for index, ids in enumerate(whole) if len(ids) > max_length]

    def encode_windows(self, question: str, context: str, max_length: int, stride: int) -> list[Window]:
        """A question with overlapping parts of its context, at most `max_length` tokens each.

        Raises:
            ValueError: the question leaves no room for more than `stride` tokens of the context.
        """
        fast = self._fast_only("strides over long contexts")
        room = max_length - len(fast.encode(question, "").ids)
        if room <= stride:
            raise ValueError(
                f"the question leaves {max(room, 0)} of {max_length} tokens for the context, which move on by windows "
                f"that overlap by {stride}"
            )
        fast.enable_truncation(max_length, stride=stride, strategy="only_second")
        whole = fast.encode(question, context)
        fast.no_truncation()
        return [self._window(encoding) for encoding in (whole, *whole.overflowing)]

    def _window(self, encoding: Any) -> Window:
        inside = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
        offsets = [encoding.offsets[index] for index in inside]
        ids = encoding.ids
        null_position = ids.index(self._cls_id) if self._cls_id in ids else 0
        return Window(ids, encoding.type_ids, inside[0] if inside else 0, offsets, null_position)

    def encode_words(self, words: list[str], max_length: int) -> tuple[list[int], list[int | None]]:
        """Ids of a text that is given as words, at most `max_length` with special tokens, and the number of the word
        that each belongs to (None for special tokens)."""
        fast = self._fast_only("words with tags")
        fast.enable_truncation(max_length)
        encoding = fast.encode(words, is_pretokenized=True)
        fast.no_truncation()
        return encoding.ids, encoding.word_ids

    def encode_with_words(self, text: str, *, first: bool = True, last: bool = True) -> tuple[list[int], list[int]]:
        """As `encode_with_special_tokens`, and for each token the number of its word from 1, 0 for special tokens. What
        a word is, the tokenizer's own splitting decides."""
        fast = self._fast_only("whole words")
        encoding = fast.encode(text, add_special_tokens=False)
        words = [0 if word is None else word + 1 for word in encoding.word_ids]
        prefix, suffix = self._prefix if first else [], self._suffix if last else []
        return [*prefix, *encoding.ids, *suffix], [0] * len(prefix) + words + [0] * len(suffix)

    def cut(self, ids: list[int], words: list[int], max_length: int) -> tuple[list[int], list[int]]:
        """Both cut to `max_length`, with the special tokens kept at the end."""
        if len(ids) <= max_length:
            return ids, words
        keep = max_length - len(self._suffix)
        return [*ids[:keep], *self._suffix], [*words[:keep], *[0] * len(self._suffix)]

    def _fast_only(self, what: str) -> Any:
        if self._fast is None:
            raise UsageError(
                f"{what} need a tokenizer with a tokenizer.json, which tells where each token lies in the text",
                where="tokenizer",
                hint="take the fast form of this tokenizer, or another one",
            )
        return self._fast

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


def _load(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    no_network = hub.expect(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for a bad name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"tokenizer {name!r} cannot be loaded: {reason}",
            where="tokenizer",
            hint=f"{no_network}give a folder with tokenizer files or a hub id",
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
        "token_types": "token_type_ids" in tokenizer.model_input_names
        and any(tokenizer("a", "b").get("token_type_ids") or []),
    }
