"""What a recipe may say: one pydantic model a section, every field with its meaning.

The schema checks what can be seen in the recipe alone (types, ranges, combinations). What needs the model's config or
the machines is checked in `plan`. Field descriptions are shown by ``llmpipe recipes schema`` and in editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]
TaskName = Literal[
    "causal-lm", "masked-lm", "chat", "classification", "question-answering", "translation", "token-classification"
]


PACKED_BY_DEFAULT = ("causal-lm", "masked-lm")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, use_attribute_docstrings=True)


class ModelSection(Section):
    config: dict[str, Any] | None = None
    """Hugging Face config fields with `model_type`; the model is built from scratch."""
    from_: str | None = Field(default=None, alias="from")
    """Hub id or directory of a pretrained model to start from."""
    revision: str | None = None
    """Branch, tag or commit of the hub id in `from`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of parameters and activations; bf16 and fp16 keep fp32 master weights."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; auto leaves the choice to transformers."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Sets every dropout probability of the model's config; unset keeps the config's own."""
    allow_pickle: bool = False
    """Read weights from pytorch_model.bin where there are no safetensors; only tensors are taken from it."""


class LoraSection(Section):
    r: PositiveInt = 8
    """Rank: rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """The adapters' results are multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of the adapters' inputs."""
    target_modules: list[str] | Literal["auto", "all-linear"] = "auto"
    """Layers to adapt, by module name or its last part(s), such as [q_proj, v_proj]; all-linear takes every linear
    layer but the head; auto takes what peft does for the model's type, or all-linear."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole and saved with the adapters; a new head always is."""


class TokenizerTraining(Section):
    vocab_size: Annotated[int, Field(ge=260)] = 8000
    """Entries of the byte-level BPE vocabulary, the 256 bytes and the special tokens included."""
    max_documents: PositiveInt | None = None
    """Train on the first documents only."""


class TrainedTokenizer(Section):
    train: TokenizerTraining
    """Train a byte-level BPE tokenizer on the recipe's own training text."""


class DataSource(Section):
    files: str | list[str] | None = None
    """Glob pattern(s) of text, JSONL, CSV or parquet files, optionally compressed with gzip; `{stdlib}` stands for
    the folder of Python's standard library, `{recipes}` for that of the ready recipes."""
    exclude: str | list[str] | None = None
    """Glob pattern(s) of files to leave out."""
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "conll"] = "auto"
    """File format; auto goes by the file name's ending, and takes any other ending as text. jsonl also takes a JSON
    array, and SQuAD's own form."""
    dataset: str | None = None
    """Hub id or folder of a dataset that `datasets.load_dataset` opens."""
    subset: str | None = None
    """Configuration name of `dataset`."""
    split: str | None = None
    """Split of `dataset`, for example train."""
    revision: str | None = None
    """Branch, tag or commit of `dataset`."""
    streaming: bool = False
    """Training: read, tokenise and learn at once, without preparing the data; for text that does not fit the disk.
    Validation: read `dataset` without downloading it whole."""
    shuffle_buffer: PositiveInt = 1024
    """Streaming: samples that are read ahead and drawn in random order."""
    synthetic: bool = False
    """Random token ids instead of text, for benchmarks."""
    mixture: list[DataSource] | None = None
    """Several sources in one; each has its own `files` or `dataset`, fields and, for training, a `weight`."""
    weight: Annotated[float, Field(gt=0.0)] | None = None
    """In a mixture: share of the training samples that come from this source, as a factor; unset for all draws each
    sample once an epoch."""
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Validation only: hold out this share of the training documents, chosen by a hash of their content."""
    stratify: bool = True
    """With `fraction`: classification holds out this share of each class."""
    text: str = "text"
    """Field with the text."""
    label: str = "label"
    """Classification: field with the label."""
    source: str = "source"
    """Translation: field with the input text."""
    target: str = "target"
    """Translation: field with the output text. A dotted name, such as translation.de, is a field inside a field."""
    question: str = "question"
    """Question answering: field with the question."""
    context: str = "context"
    """Question answering: field with the text that holds the answer."""
    answers: str = "answers"
    """Question answering: field with the answers, `text` and `answer_start`, none where the context has no answer."""
    messages: str = "messages"
    """Chat: field with the turns; conversations, alpaca's and prompt with completion are found without it."""
    words: str = "tokens"
    """Token classification: field with the list of words."""
    tags: str = "ner_tags"
    """Token classification: field with the list of their tags."""
    max_documents: PositiveInt | None = None
    """Use the first documents only."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be learned from does (unreadable, an unknown label, an answer that is not in the
    context, turns out of order): end with file and line, or be skipped and counted."""
    on_too_long: Literal["cut", "skip", "stop"] = "cut"
    """What a text longer than a sample does: be cut, be skipped, or end with file and line; all are counted. Packed
    text and questions with their long contexts are divided instead."""


class Cleaning(Section):
    html: bool = False
    """Take tags away and turn entities into characters."""
    control_characters: bool = False
    """Take control and formatting characters away, except line ends and tabs."""
    unicode: Literal["none", "nfc", "nfkc", "ftfy"] = "none"
    """Unicode normal form, or ftfy, which also mends text that was decoded wrongly."""
    min_chars: PositiveInt | None = None
    """Leave shorter texts out."""
    max_chars: PositiveInt | None = None
    """Leave longer texts out."""
    scripts: list[str] = Field(default_factory=list)
    """Leave texts out whose letters are of other scripts, named as in Unicode: latin, cyrillic, greek, arabic, cjk."""
    min_script_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Share of letters that `scripts` ask for."""
    duplicates: Literal["none", "exact", "near"] = "none"
    """Leave copies out; near also leaves almost equal texts out."""
    near_duplicate_similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Share of common five-word runs from which on two texts are near-duplicates."""
    stop_words: list[str] = Field(default_factory=list)
    """Words to take out of every text."""


class Augmentation(Section):
    copies: PositiveInt = 1
    """Changed copies of each training text."""
    deletion: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Probability that a word is left out."""
    swap: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Pairs of words that change places, as a share of the words."""
    synonyms: str | None = None
    """JSON file with an object from words to lists of words that may replace them."""
    synonym_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Probability that a word with synonyms is replaced."""


class DataSection(Section):
    train: DataSource | None = None
    """Training data."""
    validation: DataSource | None = None
    """Held-out data; `{fraction: 0.02}` holds out a share of the training documents."""
    sequence_len: PositiveInt = 1024
    """Tokens a sample; without packing the most, since short texts are padded to the longest of their micro-batch."""
    target_sequence_len: PositiveInt | None = None
    """Translation: tokens of the output text; unset takes `sequence_len`."""
    packing: bool | None = None
    """Fill each sample: language modelling with consecutive text, chat with whole conversations; off pads one document
    a sample. Unset packs language modelling alone."""
    block_attention: bool | Auto = "auto"
    """Packing: tokens attend to their own document alone, whose positions begin at 0, and the first token of a document
    is not predicted from the one before; auto does so for chat."""
    clean: Cleaning | None = None
    """Clean texts before they are tokenised."""
    augment: Augmentation | None = None
    """Add changed copies of training texts."""
    whole_word_masking: bool = False
    """Masked language modelling: hide whole words instead of single tokens."""
    stride: Annotated[int, Field(ge=0)] = 128
    """Question answering: tokens that neighbouring parts of a long context share."""
    multi_label: bool = False
    """Classification: a text has any number of labels, as a list or a text with | between them."""
    class_weights: dict[str, Annotated[float, Field(gt=0.0)]] | Literal["balanced"] | None = None
    """Classification: factor on the loss of each class; balanced takes samples / (classes x samples of the class)."""
    chat_template: str | None = None
    """Chat: a Jinja template, or a file that holds one; unset takes the tokenizer's, or a plain one where it has
    none."""
    source_prefix: str = ""
    """Translation: text put before each input."""
    shuffle: bool = True
    """Draw samples in a random order that depends on the seed alone."""


class EarlyStopping(Section):
    metric: str = "loss"
    """Validation metric that has to improve."""
    patience: PositiveInt = 3
    """Evaluations without improvement before training ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest change that counts as an improvement."""


class TrainSection(Section):
    max_steps: PositiveInt | None = None
    """Optimizer steps; wins over `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training data."""
    global_batch_size: PositiveInt = 8
    """Samples an optimizer step, over all devices."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples a micro-batch."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches a step and replica; follows from the batch sizes and the layout, and is checked when given."""
    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """What turns gradients into changes of the weights."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """The highest, which warm-up leads to."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of matrices and embeddings; biases and norms do not decay."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW and Lion: decay of the mean of the gradients."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """AdamW: decay of the mean of their squares; Lion: its second decay."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW: added to the denominator."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Momentum of SGD."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """How the learning rate goes on after the warm-up; wsd stays and falls at the end (`decay_ratio`)."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of all steps over which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of warm-up; wins over `warmup_ratio`."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end of cosine and wsd, as a share of `learning_rate`."""
    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """wsd: share of all steps over which the learning rate falls at the end."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target's probability that is spread evenly over all classes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Decides weights from scratch, sample order and dropout."""
    freeze: list[str] = Field(default_factory=list)
    """Parameters that stay as they are: glob patterns over Hugging Face names, such as `*.embed_tokens` or
    `model.layers.[0-3]`; a module's name stands for all its parameters."""
    trainable: list[str] = Field(default_factory=list)
    """Train these parameters only, written as in `freeze`, which takes away from them."""
    early_stopping: EarlyStopping | None = None
    """End when a validation metric no longer improves."""
    hang_timeout_seconds: Annotated[float, Field(ge=3.0)] | None = 600.0
    """How long one piece of a step may take, and a rank may be silent, before the job ends and names it; null: for
    ever."""


class ParallelSection(Section):
    pipeline: PositiveInt | Auto = "auto"
    """Stages."""
    tensor: PositiveInt | Auto = "auto"
    """Tensor shards inside a stage."""
    data: PositiveInt | Auto = "auto"
    """Replicas of the pipeline."""
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"] = "auto"
    """Order of forward and backward passes."""
    virtual_stages: PositiveInt | Auto = "auto"
    """Parts of the model on each stage: 2 or more with the schedule interleaved, 2 with zb-v, else 1."""
    partition: list[PositiveInt] | Auto = "auto"
    """Layers of each stage, embedding and head counted as layers; auto balances by FLOPs. With `virtual_stages`,
    layers of each part in the model's order."""
    split_layers: list[str] | Auto | Literal[False] = "auto"
    """auto: stages may begin inside a layer, between its attention and its MLP, where that makes them more even; false:
    between whole layers only; a list: these layers are split, and `partition` counts each of their parts."""
    zero_stage: Literal[0, 1] | Auto = "auto"
    """ZeRO stage: 1 shards the optimizer state over the replicas."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute activations in the backward pass instead of keeping them."""
    wire_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of activations and their gradients between stages; auto keeps the model's. bf16 halves what fp32
    stages send, and rounds it."""

    @property
    def num_chunks(self) -> int:
        """Parts of the model on each stage, as far as the recipe says; the schedule auto may choose others."""
        if self.schedule not in ("interleaved", "zb-v") or isinstance(self.virtual_stages, str):
            return 2 if self.schedule in ("interleaved", "zb-v") else 1
        return self.virtual_stages


class CheckpointSection(Section):
    every_steps: PositiveInt | None = None
    """Save after so many steps; unset saves at the end only."""
    keep: PositiveInt | None = None
    """Keep the newest checkpoints only; unset keeps all."""
    keep_best: str | None = None
    """Validation metric whose best checkpoint is kept besides, under `checkpoints/best`."""
    max_shard_size: str = "5GB"
    """Size of one weights file."""


class EvaluationSection(Section):
    every_steps: PositiveInt | None = None
    """Evaluate on the validation data after so many steps; unset evaluates at the end only."""
    max_samples: PositiveInt | None = None
    """Use the first validation samples only, while training."""
    n_best: PositiveInt = 20
    """Question answering: first and last tokens that are combined to candidates, the likeliest of each row."""
    max_answer_len: PositiveInt = 30
    """Question answering: longest answer in tokens."""
    null_score_threshold: float = 0.0
    """Question answering: no answer is given where its score is higher than the best answer's by more than this."""
    text_metrics: list[Literal["bleu", "chrf", "rouge"]] = ["bleu", "chrf"]
    """Translation: what `llmpipe evaluate` scores generated texts by; rouge is for summaries, [] generates nothing."""
    num_beams: PositiveInt = 1
    """Translation: width of the beam search; 1 is greedy search."""
    max_new_tokens: PositiveInt | None = None
    """Translation: longest generated text in tokens; unset takes `data.target_sequence_len`."""
    bleu_tokenize: str = "13a"
    """Translation: sacrebleu's tokenizer, such as zh or ja-mecab for texts without spaces."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Classification with several labels: probability from which on a label is given."""


class Recipe(Section):
    """One training job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run; letters, digits, '.', '_' and '-'."""
    task: TaskName = "causal-lm"
    """What is learned."""
    model: ModelSection
    """The network: its config, or where its weights are."""
    tokenizer: str | TrainedTokenizer | None = None
    """Hub id or directory, or `{train: {vocab_size: 8000}}`; unset takes the one beside `model.from`."""
    data: DataSection = Field(default_factory=DataSection)
    """What is read, and how it becomes samples."""
    train: TrainSection = Field(default_factory=TrainSection)
    """Length, batch, optimizer and learning rate."""
    lora: LoraSection | None = None
    """Train small adapters beside the frozen weights of `model.from`; `lora: {}` takes the defaults."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """How the model is divided over devices."""
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    """When the training is saved, and what is kept."""
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """When and how validation data is measured."""
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
    output_dir: str = "runs"
    """Folder of the run directories."""

    @property
    def packs(self) -> bool:
        """Whether a training sample holds several documents."""
        return self.task in PACKED_BY_DEFAULT if self.data.packing is None else self.data.packing

    @property
    def blocks_attention(self) -> bool:
        """Whether tokens of a packed sample attend to their own document alone."""
        wanted = self.data.block_attention
        return self.packs and (self.task == "chat" if wanted == "auto" else bool(wanted))
