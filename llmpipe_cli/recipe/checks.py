"""Checks combinations of recipe fields, as far as the recipe alone tells.

Each check looks at a recipe whose single values are right and yields findings. A finding names the dotted fields it is
about: the first is the place it is shown at, and a finding is dropped when one of its fields already has a problem of
its own. What needs the model's config or the machines is checked in `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmpipe_cli.recipe.names import nearest
from llmpipe_cli.recipe.schema import DataSource, Recipe, TrainedTokenizer

LANGUAGE_MODELLING = ("causal-lm", "masked-lm")
METRICS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("loss", "perplexity"),
    "masked-lm": ("loss", "perplexity"),
    "classification": ("loss", "accuracy", "precision_macro", "recall_macro", "f1_macro", "f1_micro"),
    "translation": ("loss", "perplexity"),
    "chat": ("loss", "perplexity"),
    "question-answering": ("loss", "exact_match", "f1"),
    "token-classification": ("loss", "accuracy", "precision", "recall", "f1", "f1_macro"),
}
"""Validation metrics that a training watches. `evaluate` reports more: those need passes of their own."""


@dataclass(frozen=True)
class Finding:
    """Something wrong (or, as a warning, pointless) about the fields `paths`."""

    paths: tuple[str, ...]
    message: str
    hint: str | None = None
    is_warning: bool = False


@dataclass(frozen=True)
class _Context:
    """What the checks share."""

    recipe: Recipe
    job: str | None
    locked: bool

    def given(self, dotted: str) -> bool:
        """True when the field was written. A lock file writes every field: there, when it is not the default."""
        *parents, last = dotted.split(".")
        section: Any = self.recipe
        for name in parents:
            section = section[int(name)] if isinstance(section, list) else getattr(section, name, None)
        if section is None or last not in section.model_fields_set:
            return False
        value, default = getattr(section, last), type(section).model_fields[last].get_default()
        return value is not None and not (self.locked and value == default)


def check(recipe: Recipe, *, job: str | None = None, locked: bool = False) -> list[Finding]:
    """All findings about a recipe, in no particular order.

    Args:
        job: "train" and "evaluate" also ask for what the job needs; None checks what is written.
        locked: the recipe is a lock file, in which every default is written out.
    """
    context = _Context(recipe, job, locked)
    return [finding for function in _CHECKS for finding in function(context)]


def _model(context: _Context) -> Iterator[Finding]:
    model = context.recipe.model
    if model.config is None and model.from_ is None:
        hint = "config: {model_type: ...} builds one from scratch, from: NAME takes a pretrained one"
        yield Finding(("model",), "the model needs either `config` or `from`", hint)
    if model.config is not None and model.from_ is not None:
        hint = "remove one; in a recipe that extends another, `config: null` removes the inherited one"
        yield Finding(("model.from", "model.config"), "`model.config` and `model.from` exclude each other", hint)
    if model.config is not None:
        model_type = model.config.get("model_type")
        if model_type is None:
            hint = "for example model_type: llama"
            yield Finding(("model.config",), "`model.config` needs `model_type`", hint)
        elif not isinstance(model_type, str):
            yield Finding(("model.config.model_type",), f"`model_type` expects a text, found {model_type!r}")
    if model.revision is not None and model.from_ is None:
        yield Finding(("model.revision",), "`model.revision` belongs to `model.from`", "remove it, or name the model")


def _lora(context: _Context) -> Iterator[Finding]:
    recipe, lora = context.recipe, context.recipe.lora
    for name in ("freeze", "trainable"):
        patterns = getattr(recipe.train, name)
        if any(not pattern.strip() for pattern in patterns):
            yield Finding((f"train.{name}",), f"`{name}` holds an empty pattern", 'for example "*.embed_tokens"')
        if patterns and lora is not None:
            message = f"`{name}` has no place beside `lora`, which freezes all but the adapters"
            hint = "name modules that are to be trained whole in lora.modules_to_save"
            yield Finding((f"train.{name}", "lora"), message, hint)
    if lora is None:
        return
    if recipe.model.from_ is None and recipe.model.config is not None and context.job != "evaluate":
        message = "LoRA adapts a pretrained model, and `model.config` builds one from scratch"
        hint = "write model: {from: NAME}, or `llmpipe finetune RECIPE --from NAME`"
        paths = ("lora", "model.from", "model.config")
        yield Finding(paths, message, hint, is_warning=context.job is None)
    if lora.target_modules == []:
        yield Finding(("lora.target_modules",), "`target_modules` is empty", "write auto, all-linear or names")


def _tokenizer(context: _Context) -> Iterator[Finding]:
    recipe = context.recipe
    if not isinstance(recipe.tokenizer, TrainedTokenizer):
        return
    if recipe.model.from_ is not None:
        hint = "leave `tokenizer` out: the one beside the model is taken"
        message = "a newly trained tokenizer does not fit the embeddings of a pretrained model"
        yield Finding(("tokenizer", "model.from"), message, hint)
    if recipe.data.train is not None and recipe.data.train.synthetic:
        message = "a tokenizer cannot be trained on synthetic data"
        yield Finding(("tokenizer", "data.train"), message, "leave `tokenizer` out: random ids need none")
    rows = (recipe.model.config or {}).get("vocab_size")
    entries = recipe.tokenizer.train.vocab_size
    if isinstance(rows, int) and rows < entries:
        message = f"the model has {rows} embeddings, the tokenizer {entries} entries"
        hint = f"write vocab_size: {entries} under model.config:, or leave it out there"
        yield Finding(("model.config.vocab_size", "tokenizer.train.vocab_size"), message, hint)


def _data_sources(context: _Context) -> Iterator[Finding]:
    data = context.recipe.data
    for name, source in (("train", data.train), ("validation", data.validation)):
        if source is not None:
            yield from _data_source(context, f"data.{name}", source)
    train, validation = data.train, data.validation
    for path, source in (("data.train", train), ("data.validation", validation)):
        if source is not None and source.weight is not None:
            message = "`weight` belongs to the sources of a mixture"
            yield Finding((f"{path}.weight",), message, "write train: {mixture: [{files: ..., weight: 2}, ...]}")
    if train is not None and train.streaming:
        yield from _streaming(context, train)
    elif train is not None and context.given("data.train.shuffle_buffer"):
        message = "`shuffle_buffer` is for streamed data; data that was prepared is drawn from as a whole"
        yield Finding(("data.train.shuffle_buffer",), message, "leave it out, or write streaming: true")
    if validation is not None and validation.fraction is None and context.given("data.validation.stratify"):
        message = "`stratify` says which training documents `fraction` holds out, which is missing"
        yield Finding(("data.validation.stratify",), message, "leave it out")
    if train is not None and train.fraction is not None:
        hint = "write validation: {fraction: ...} beside train:"
        yield Finding(("data.train.fraction",), "`fraction` holds out validation data", hint)
    if validation is not None and validation.fraction is not None:
        if train is None:
            message = "`fraction` holds out a share of data.train, which is missing"
            yield Finding(("data.validation.fraction", "data.train"), message)
        elif train.synthetic:
            message = "synthetic data has no documents to hold out"
            yield Finding(("data.validation.fraction", "data.train"), message, "write validation: {synthetic: true}")


def _data_source(context: _Context, path: str, source: DataSource) -> Iterator[Finding]:
    origins = [
        name
        for name, given in (
            ("files", source.files is not None),
            ("dataset", source.dataset is not None),
            ("synthetic", source.synthetic),
            ("mixture", source.mixture is not None),
            ("fraction", source.fraction is not None and path == "data.validation"),
        )
        if given
    ]
    if not origins and source.fraction is None:
        hint = 'files: "corpus/*.txt", dataset: HUB-ID, or synthetic: true'
        yield Finding((path,), f"`{path}` names no data", hint)
    if len(origins) > 1:
        paths = tuple(f"{path}.{name}" for name in reversed(origins))
        yield Finding(paths, f"`{origins[0]}` and `{origins[1]}` exclude each other", "keep one of the two")
    if source.files is not None and (not source.files or (isinstance(source.files, list) and "" in source.files)):
        yield Finding((f"{path}.files",), "`files` names no file", 'files: "corpus/*.txt"')
    if source.mixture is not None:
        yield from _mixture(context, path, source)
    if source.dataset == "":
        yield Finding((f"{path}.dataset",), "`dataset` is empty", "write a hub id or a folder")
    streams_files = path == "data.train" and source.files is not None
    for field in ("subset", "split", "revision", *(() if streams_files else ("streaming",))):
        if context.given(f"{path}.{field}") and getattr(source, field) and source.dataset is None:
            yield Finding((f"{path}.{field}", f"{path}.dataset"), f"`{field}` belongs to `dataset`, which is missing")
    for field in ("exclude", "format"):
        if context.given(f"{path}.{field}") and source.files is None:
            yield Finding((f"{path}.{field}", f"{path}.files"), f"`{field}` belongs to `files`, which is missing")
    yield from _data_fields(context, path)


def _streaming(context: _Context, train: DataSource) -> Iterator[Finding]:
    """What needs all of the training data at hand."""
    recipe, data, where = context.recipe, context.recipe.data, "data.train.streaming"
    if recipe.task not in LANGUAGE_MODELLING or not recipe.packs:
        message = "streamed text is cut into blocks, which only packed language modelling learns from"
        yield Finding((where, "task", "data.packing"), message, "leave `streaming` out: the data is prepared once")
    if context.job != "evaluate" and recipe.train.max_steps is None:
        message = "how long an epoch of a stream is shows at its end only"
        yield Finding(("train.num_train_epochs", where, "train"), message, "write max_steps: 10000 under train:")
    if data.validation is not None and data.validation.fraction is not None:
        message = "to hold out a share of a stream it would have to be read to its end first"
        yield Finding(("data.validation.fraction", where), message, "name validation data of its own")
    for field, reason in (
        ("augment", "copies are made when data is prepared"),
        ("whole_word_masking", "a stream has tokens alone"),
    ):
        if getattr(data, field):
            yield Finding((f"data.{field}", where), f"`{field}` does not go with a stream: {reason}", "leave it out")
    if data.clean is not None and data.clean.duplicates != "none":
        message = "finding duplicates in a stream would keep all of it in mind"
        yield Finding(("data.clean.duplicates", where), message, "leave it out")
    if isinstance(recipe.tokenizer, TrainedTokenizer) and recipe.tokenizer.train.max_documents is None:
        message = "a tokenizer would be trained on the whole stream"
        yield Finding(("tokenizer.train", where), message, "write max_documents: 10000 under tokenizer: train:")


def _mixture(context: _Context, path: str, source: DataSource) -> Iterator[Finding]:
    assert source.mixture is not None
    if len(source.mixture) < 2:
        yield Finding((f"{path}.mixture",), "a mixture has two sources or more", "write the source itself")
    for field in sorted(source.model_fields_set - {"mixture", "fraction"}):
        if context.given(f"{path}.{field}"):
            message = f"`{field}` belongs to each source of the mixture"
            yield Finding((f"{path}.{field}", f"{path}.mixture"), message, f"write it under {path}.mixture.0:")
    weighted = [part.weight is not None for part in source.mixture]
    if path == "data.train" and any(weighted) and not all(weighted):
        message = "some sources of the mixture have a weight and some have none"
        yield Finding((f"{path}.mixture.{weighted.index(False)}",), message, "write a weight for each, or for none")
    if path == "data.train" and not context.recipe.data.shuffle:
        message = "samples of several sources have no order of their own"
        yield Finding(("data.shuffle", f"{path}.mixture"), message, "leave `shuffle: false` out")
    for index, part in enumerate(source.mixture):
        place = f"{path}.mixture.{index}"
        for field in ("mixture", "synthetic", "fraction", "streaming"):
            if getattr(part, field):
                yield Finding((f"{place}.{field}",), f"`{field}` has no place inside a mixture", "leave it out")
        if path == "data.validation" and part.weight is not None:
            message = "validation data is measured whole, so its sources have no weights"
            yield Finding((f"{place}.weight",), message, "leave it out")
        yield from _data_source(context, place, part)


_FIELDS_OF_TASKS = {
    "text": ("causal-lm", "masked-lm", "classification"),
    "label": ("classification",),
    "source": ("translation",),
    "target": ("translation",),
    "question": ("question-answering",),
    "context": ("question-answering",),
    "answers": ("question-answering",),
    "messages": ("chat",),
    "words": ("token-classification",),
    "tags": ("token-classification",),
}
_TEXT_STEPS = {
    "clean": ("causal-lm", "masked-lm", "classification", "translation"),
    "augment": ("causal-lm", "masked-lm", "classification"),
}
_TASK_OPTIONS = {
    "whole_word_masking": ("masked-lm",),
    "stride": ("question-answering",),
    "multi_label": ("classification",),
    "class_weights": ("classification",),
    "chat_template": ("chat",),
    "source_prefix": ("translation",),
    "target_sequence_len": ("translation",),
}


def _data_fields(context: _Context, path: str) -> Iterator[Finding]:
    task = context.recipe.task
    for field, tasks in _FIELDS_OF_TASKS.items():
        if context.given(f"{path}.{field}") and task not in tasks:
            read = [f"`{name}`" for name, readers in _FIELDS_OF_TASKS.items() if task in readers]
            hint = f"it reads {', '.join(read[:-1])}{' and ' if read[1:] else ''}{read[-1]}"
            message = f"the task {task} does not read `{field}`"
            yield Finding((f"{path}.{field}", "task"), message, hint)


def _data_shape(context: _Context) -> Iterator[Finding]:
    recipe = context.recipe
    if recipe.task not in (*LANGUAGE_MODELLING, "chat") and recipe.data.packing and not context.locked:
        message = f"packing is for language modelling and chat; the task {recipe.task} has one record a sample"
        yield Finding(("data.packing", "task"), message, "leave it out")
    if recipe.data.block_attention is True and recipe.task not in ("causal-lm", "chat"):
        message = f"block attention is for causal-lm and chat; transformers keeps no documents apart in {recipe.task}"
        yield Finding(("data.block_attention", "task"), message, "leave it out, or write packing: false")
    elif recipe.data.block_attention is True and not recipe.packs:
        message = "block attention keeps the documents of packed samples apart, and `packing` is off"
        yield Finding(("data.block_attention", "data.packing"), message, "write packing: true, or leave it out")
    for field, tasks in _TASK_OPTIONS.items():
        if recipe.task not in tasks and context.given(f"data.{field}") and getattr(recipe.data, field):
            yield Finding((f"data.{field}", "task"), f"`{field}` is for {tasks[0]}", "leave it out")
    if recipe.data.stride >= recipe.data.sequence_len and recipe.task == "question-answering":
        message = f"windows of {recipe.data.sequence_len} tokens cannot overlap by {recipe.data.stride}"
        yield Finding(("data.sequence_len", "data.stride"), message, "write sequence_len: 384 and stride: 128")
    for field, able in _TEXT_STEPS.items():
        if getattr(recipe.data, field) is not None and recipe.task not in able:
            hint = f"it is for {', '.join(able)}"
            message = f"`{field}` changes texts in which the task {recipe.task} points at places"
            yield Finding((f"data.{field}", "task"), message, hint)
    many = recipe.data.multi_label and recipe.task == "classification"
    if recipe.train.label_smoothing and (many or recipe.task == "question-answering"):
        message = f"label smoothing is for one class each; {'multi_label' if many else recipe.task} has none"
        yield Finding(("train.label_smoothing", "task", "data.multi_label"), message, "leave it out")
    if many and recipe.data.class_weights is not None:
        message = "class weights are for one label a text"
        yield Finding(("data.class_weights", "data.multi_label"), message, "leave them out")
    if recipe.data.sequence_len < 2 and recipe.task == "causal-lm":
        message = "a sample of one token has nothing to predict"
        yield Finding(("data.sequence_len",), message, "sequence_len: 1024")


def _length(context: _Context) -> Iterator[Finding]:
    recipe, train = context.recipe, context.recipe.train
    needed = context.job == "train" or (context.job is None and recipe.data.train is not None)
    if needed and train.max_steps is None and train.num_train_epochs is None:
        message = "how long to train is not said: `max_steps` or `num_train_epochs` is needed"
        yield Finding(("train", "train.max_steps", "train.num_train_epochs"), message, "train: {max_steps: 1000}")
    if train.warmup_steps is not None and train.max_steps is not None and train.warmup_steps > train.max_steps:
        message = f"the warm-up of {train.warmup_steps} steps is longer than the training of {train.max_steps}"
        yield Finding(("train.warmup_steps", "train.max_steps"), message, "shorten it, or write warmup_ratio: 0.05")
    if train.lr_scheduler_type == "wsd":
        share = train.warmup_ratio
        if train.warmup_steps is not None and train.max_steps is not None:
            share = train.warmup_steps / train.max_steps
        if share <= 1 and share + train.decay_ratio > 1:
            message = f"warm-up ({share:g}) and decay ({train.decay_ratio:g}) are longer than the whole training"
            first = "train.decay_ratio" if context.given("train.decay_ratio") else "train.lr_scheduler_type"
            yield Finding(
                (first, "train.warmup_ratio", "train.warmup_steps"), message, "lower decay_ratio or the warm-up"
            )


def _batch(context: _Context) -> Iterator[Finding]:
    """global batch = micro-batch size x micro-batches a replica x replicas, as far as the three are known."""
    train, replicas = context.recipe.train, context.recipe.parallel.data
    factors = {
        "train.micro_batch_size": None if train.micro_batch_size == "auto" else train.micro_batch_size,
        "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
        "parallel.data": None if replicas == "auto" else replicas,
    }
    known = {path: factor for path, factor in factors.items() if factor is not None}
    if not known:
        return
    product = 1
    for factor in known.values():
        product *= factor
    complete = len(known) == len(factors)
    total = train.global_batch_size
    if (total == product) if complete else (total % product == 0):
        return
    text = " x ".join(f"{path.rpartition('.')[2]} {factor}" for path, factor in known.items())
    text = text if len(known) == 1 else f"{text} = {product}"
    default = "" if context.given("train.global_batch_size") else " (the default)"
    relation = "is not" if complete else "is not a multiple of"
    message = f"global_batch_size {total}{default} {relation} {text}"
    if complete:
        hint = f"write global_batch_size: {product}, or leave gradient_accumulation_steps out: it follows"
    else:
        lower, upper = total // product * product, (total // product + 1) * product
        hint = f"write global_batch_size: {upper}" + (f" or {lower}" if lower else "")
    given = [path for path in ("train.global_batch_size", *known) if context.given(path)]
    yield Finding((given[0], "train.global_batch_size", *factors), message, hint)


def _parallel(context: _Context) -> Iterator[Finding]:
    parallel = context.recipe.parallel
    if isinstance(parallel.tensor, int) and parallel.tensor > 1:
        if context.recipe.train.optimizer == "adafactor":
            message = "Adafactor keeps sums over the rows and columns of whole matrices, which tensor shards divide"
            yield Finding(("train.optimizer", "parallel.tensor"), message, "use adamw, or tensor: 1")
        attention = context.recipe.model.attn_implementation
        if attention not in ("auto", "eager", "sdpa") and context.recipe.model.dropout != 0:
            message = f"the attention {attention} draws its dropout masks itself, so they would depend on tensor shards"
            yield Finding(("model.attn_implementation", "parallel.tensor"), message, "use sdpa, or model.dropout: 0")
    yield from _virtual_stages(context)
    if isinstance(parallel.partition, list) and isinstance(parallel.pipeline, int):
        given, chunks = len(parallel.partition), parallel.num_chunks
        if given != parallel.pipeline * chunks and chunks == 1:
            message = f"`partition` names {given} stages, `pipeline` {parallel.pipeline}"
            hint = f"write pipeline: {given}, or one number a stage"
            yield Finding(("parallel.partition", "parallel.pipeline"), message, hint)
        elif given != parallel.pipeline * chunks:
            message = f"`partition` names {given} parts; {parallel.pipeline} stages have {chunks} each"
            hint = f"write {parallel.pipeline * chunks} numbers, in the model's order, or auto"
            yield Finding(("parallel.partition", "parallel.pipeline"), message, hint)
    if parallel.partition == []:
        yield Finding(("parallel.partition",), "`partition` is empty", "write one number a stage, or auto")


def _virtual_stages(context: _Context) -> Iterator[Finding]:
    parallel = context.recipe.parallel
    wanted, schedule = parallel.virtual_stages, parallel.schedule
    if isinstance(wanted, str):
        return
    fields = ("parallel.virtual_stages", "parallel.schedule")
    if schedule == "interleaved" and wanted == 1:
        message = "one part a stage cannot be interleaved"
        yield Finding(fields, message, "write virtual_stages: 2 or more, or schedule: 1f1b")
    elif schedule == "zb-v" and wanted != 2:
        yield Finding(fields, f"zb-v has 2 parts a stage, not {wanted}", "leave virtual_stages out")
    elif schedule not in ("interleaved", "zb-v") and wanted > 1:
        message = f"the schedule {schedule} has one part a stage, not {wanted}"
        yield Finding(fields, message, "write schedule: interleaved, or leave virtual_stages out")


def _precision(context: _Context) -> Iterator[Finding]:
    recipe = context.recipe
    dtype, zero_stage, optimizer = recipe.model.dtype, recipe.parallel.zero_stage, recipe.train.optimizer
    if dtype in ("bf16", "fp16") and zero_stage == 0:
        message = (
            f"{dtype} training keeps fp32 master weights and gradients, which DeepSpeed's pipelines do with ZeRO-1 only"
        )
        yield Finding(("parallel.zero_stage", "model.dtype"), message, "write zero_stage: 1 or auto")
    if optimizer == "adafactor" and (zero_stage == 1 or dtype != "fp32"):
        reason = "zero_stage: 1" if zero_stage == 1 else f"dtype: {dtype}, which implies ZeRO-1,"
        message = f"adafactor does not work with {reason}: its row and column statistics cannot be cut into flat slices"
        yield Finding(("train.optimizer", "parallel.zero_stage", "model.dtype"), message, "write optimizer: adamw")
    wire = recipe.parallel.wire_dtype
    if wire not in ("auto", dtype) and (wire, dtype) != ("bf16", "fp32"):
        message = f"sending {wire} between stages that compute in {dtype} gains nothing"
        yield Finding(("parallel.wire_dtype", "model.dtype"), message, "write wire_dtype: auto")


def _evaluation(context: _Context) -> Iterator[Finding]:
    recipe = context.recipe
    wanted = []
    if recipe.train.early_stopping is not None:
        wanted.append(("train.early_stopping", "train.early_stopping.metric", recipe.train.early_stopping.metric))
    if recipe.checkpoint.keep_best is not None:
        wanted.append(("checkpoint.keep_best", "checkpoint.keep_best", recipe.checkpoint.keep_best))
    for path, metric_path, metric in wanted:
        name = path.rpartition(".")[2]
        if recipe.data.validation is None:
            message = f"`{name}` needs validation data"
            yield Finding((path, "data.validation"), message, "write validation: {fraction: 0.02} under data:")
        if recipe.evaluation.every_steps is None:
            message = f"`{name}` needs evaluations while training"
            yield Finding((path, "evaluation.every_steps"), message, "write evaluation: {every_steps: 500}")
        metrics = METRICS.get(recipe.task, ())
        if metrics and metric not in metrics:
            near = nearest(metric.removeprefix("eval_"), metrics)
            hint = f"did you mean {near}?" if near else f"write one of {', '.join(metrics)}"
            yield Finding((metric_path, "task"), f"a {recipe.task} training watches no metric `{metric}`", hint)
    if len({metric for _, _, metric in wanted}) > 1:
        message = f"`keep_best` ({wanted[1][2]}) and `early_stopping` ({wanted[0][2]}) have to watch the same metric"
        hint = f"write metric: {wanted[1][2]} under early_stopping:"
        yield Finding(("checkpoint.keep_best", "train.early_stopping.metric"), message, hint)
    if recipe.data.validation is None:
        for field in ("every_steps", "max_samples"):
            if context.given(f"evaluation.{field}"):
                message = "there is no validation data to evaluate on"
                hint = "write validation: {fraction: 0.02} under data:"
                yield Finding((f"evaluation.{field}", "data.validation"), message, hint)
                break


_SIZE = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*(KB|MB|GB|TB)\s*\Z", re.IGNORECASE)


def _checkpoint(context: _Context) -> Iterator[Finding]:
    size = context.recipe.checkpoint.max_shard_size
    if not _SIZE.match(size):
        message = f"`max_shard_size` expects a size such as 5GB, found {size[:40]!r}"
        yield Finding(("checkpoint.max_shard_size",), message, "max_shard_size: 5GB")
    if context.recipe.output_dir.strip() == "":
        yield Finding(("output_dir",), "`output_dir` is empty", "output_dir: runs")


def _needed_for_job(context: _Context) -> Iterator[Finding]:
    recipe, data = context.recipe, context.recipe.data
    if context.job == "train" and data.train is None:
        yield Finding(("data", "data.train"), "there is no training data", 'data: {train: {files: "corpus/*.txt"}}')
    if context.job == "evaluate" and data.validation is None:
        hint = "data: {validation: {files: ...}}"
        yield Finding(("data", "data.validation"), "there is no validation data to evaluate on", hint)
    source = {"train": data.train, "evaluate": data.validation}.get(context.job or "")
    if source is not None and not source.synthetic and recipe.tokenizer is None and recipe.model.from_ is None:
        hint = "tokenizer: gpt2 takes that one; tokenizer: {train: {vocab_size: 8000}} trains one on the recipe's text"
        yield Finding(("tokenizer", "model"), "a model from scratch needs a `tokenizer`", hint)


def _without_effect(context: _Context) -> Iterator[Finding]:
    """Options that the recipe's other choices leave without a meaning: told, but harmless."""
    train = context.recipe.train
    rules: tuple[tuple[str, str, bool], ...] = (
        ("adam_beta1", "optimizers adamw and lion", train.optimizer in ("adamw", "lion")),
        ("adam_beta2", "optimizers adamw and lion", train.optimizer in ("adamw", "lion")),
        ("adam_epsilon", "the optimizer adamw", train.optimizer == "adamw"),
        ("momentum", "the optimizer sgd", train.optimizer == "sgd"),
        ("decay_ratio", "the schedule wsd", train.lr_scheduler_type == "wsd"),
        ("min_lr_ratio", "the schedules cosine and wsd", train.lr_scheduler_type in ("cosine", "wsd")),
    )
    for field, used_by, is_used in rules:
        if not is_used and context.given(f"train.{field}"):
            yield Finding((f"train.{field}",), f"`{field}` has no effect: it is for {used_by}", None, is_warning=True)


_CHECKS: tuple[Callable[[_Context], Iterator[Finding]], ...] = (
    _model,
    _lora,
    _tokenizer,
    _data_sources,
    _data_shape,
    _length,
    _batch,
    _parallel,
    _precision,
    _evaluation,
    _checkpoint,
    _needed_for_job,
    _without_effect,
)
