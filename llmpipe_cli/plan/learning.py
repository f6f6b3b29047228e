"""What a job learns: all parameters, those that patterns choose, or LoRA adapters beside frozen ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from llmpipe_cli.errors import UsageError
from llmpipe_cli.model.adapters import (
    Adapters,
    choose_adapters,
    extend_plan,
    read_adapters,
)
from llmpipe_cli.model.skeleton import build_skeleton
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.trainable import select_trainable, without_needless_gradients
from llmpipe_cli.model.weights import missing_names
from llmpipe_cli.plan.plan import Job
from llmpipe_cli.recipe.schema import ModelSection, Recipe


@dataclass(frozen=True)
class Learning:
    """What `choose_learning` decides.

    Attributes:
        slice_plan: the model's plan, with the adapters' parameters where there are any.
        adapters: LoRA adapters of the model.
        trainable: names of the parameters that learn; None means all.
    """

    slice_plan: SlicePlan
    adapters: Adapters | None = None
    trainable: list[str] | None = None


def choose_learning(
    recipe: Recipe,
    job: Job,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    slice_plan: SlicePlan,
    section: ModelSection,
    weights: Path | None,
    adapter: Path | None,
    *,
    resuming: Path | None = None,
) -> Learning:
    """Decide what learns.

    Args:
        recipe: the recipe.
        job: only training learns; other jobs use the adapters that are there.
        cls: class of the model.
        config: its config.
        slice_plan: its plan.
        section: what the model itself is read from.
        weights: directory of its weights; None from scratch.
        adapter: directory of adapters to start from.
        resuming: the checkpoint that training goes on from.

    Raises:
        UsageError: a pattern or a module's name matches nothing, or the recipe does not fit the adapter.
    """
    if job not in ("train", "bench"):
        if adapter is None:
            return Learning(slice_plan)
        adapters = read_adapters(adapter)
        return Learning(extend_plan(slice_plan, build_skeleton(cls, config), adapters), adapters)
    _check_kinds_agree(recipe, adapter, resuming)
    if recipe.lora is not None:
        return _adapted(recipe, cls, config, slice_plan, section, weights, adapter)
    if recipe.train.freeze or recipe.train.trainable:
        model = build_skeleton(cls, config)
        chosen = select_trainable(model, slice_plan, freeze=recipe.train.freeze, trainable=recipe.train.trainable)
        return Learning(without_needless_gradients(slice_plan, chosen), None, chosen)
    return Learning(slice_plan)


def _check_kinds_agree(recipe: Recipe, adapter: Path | None, resuming: Path | None) -> None:
    """Adapters are trained on as adapters, a whole model as a whole."""
    if adapter is not None and recipe.lora is None:
        raise UsageError(
            f"{adapter} holds LoRA adapters, and the recipe has no lora section",
            where="lora",
            hint=f"write `lora:` to train them on, or `llmpipe merge {adapter} OUT` to train the whole model",
        )
    if resuming is not None and adapter is None and recipe.lora is not None:
        raise UsageError(
            "the checkpoint holds a whole model, the recipe trains LoRA adapters",
            where="lora",
            hint="start a new training from it with `llmpipe finetune --from`, or remove `lora`",
        )


def _adapted(
    recipe: Recipe,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    slice_plan: SlicePlan,
    section: ModelSection,
    weights: Path | None,
    adapter: Path | None,
) -> Learning:
    """LoRA adapters learn, and what the task adds to the model."""
    assert recipe.lora is not None
    model = build_skeleton(cls, config)
    missing = missing_names(model, weights, allow_pickle=section.allow_pickle) if weights is not None else []
    adapters = choose_adapters(
        build_skeleton(cls, config),
        recipe.lora,
        recipe.task,
        base=_lasting_name(section),
        revision=section.revision,
        missing=[name for name in missing if name not in {*slice_plan.replicated, *slice_plan.unused}],
    )
    if adapter is not None:
        _check_same(adapters, read_adapters(adapter), adapter)
    extended = extend_plan(slice_plan, model, adapters)
    trainable = [*adapters.names, *adapters.saved]
    return Learning(without_needless_gradients(extended, trainable), adapters, trainable)


def _lasting_name(section: ModelSection) -> str:
    """A hub id, or a directory by its full path."""
    name = section.from_ or ""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _check_same(wanted: Adapters, saved: Adapters, directory: Path) -> None:
    """Saved adapters go on only as the same ones."""
    for what, field, mine, theirs in (
        ("rank", "r", wanted.r, saved.r),
        ("alpha", "alpha", wanted.scale * wanted.r, saved.scale * saved.r),
        ("layers", "target_modules", set(wanted.targets), set(saved.targets)),
        ("whole modules", "modules_to_save", set(wanted.saved), set(saved.saved)),
    ):
        if mine != theirs:
            shown = f": {theirs:g}, the recipe says {mine:g}" if isinstance(mine, (int, float)) else ""
            raise UsageError(
                f"the adapters in {directory} have another {what}{shown}",
                where=f"lora.{field}",
                hint=f"write it as it was, or `llmpipe merge {directory} OUT` and train new adapters",
            )
