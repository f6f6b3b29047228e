"""The recipe's model as the planner sees it, from its config alone: how it is cut, what learns, what segments cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmpipe_cli.model.slicing.plan import SlicePlan
    from llmpipe_cli.recipe.schema import ModelSection

_DEEP, _FEW = 24, 6  # models from so many layers on are measured with so few


@dataclass(frozen=True)
class RecipeModel:
    """A recipe's model.

    Attributes:
        recipe: the recipe.
        section: its model, an adapter's base in place of the adapter.
        cls: class of the model.
        config: its config.
    """

    recipe: Recipe
    section: ModelSection
    cls: type[PreTrainedModel]
    config: PreTrainedConfig

    @cached_property
    def sliced(self) -> tuple[SlicePlan, list[str] | None]:
        """How the model can be cut, split as the recipe lists, and the parameters that learn (None: all).

        Raises:
            NotSliceableError: it cannot be cut, and the recipe wants stages.
        """
        from llmpipe_cli.model.slicing.trace import NotSliceableError, trace_config, whole_plan
        from llmpipe_cli.plan.cuts import split_as_listed
        from llmpipe_cli.plan.layout import fixed
        from llmpipe_cli.plan.learning import choose_learning

        recipe, cls, config = self.recipe, self.cls, self.config
        length, attention = recipe.data.sequence_len, self.section.attn_implementation
        try:
            plan = trace_config(cls, config, recipe.task, sequence_len=length, attn_implementation=attention)
        except NotSliceableError:
            if recipe.parallel.pipeline not in (1, "auto"):
                raise
            plan = whole_plan(cls, config)
        if recipe.lora is not None:
            return plan, []  # the adapters are small beside what is frozen
        learning = choose_learning(recipe, "train", cls, config, plan, self.section, None, None)
        tensor = fixed(recipe.parallel.tensor) or 1
        plan = split_as_listed(recipe, tensor, cls, config, learning.slice_plan, learning.trainable)
        return plan, learning.trainable

    def profile(self, plan: SlicePlan, trainable: list[str] | None, device: str) -> ModelProfile:
        """What the segments of a slice plan cost; `device` is "cuda" or "cpu": whose kernels it will run."""
        from llmpipe_cli.plan.measure import measure_profile

        return measure_profile(
            self.cls,
            self.config,
            self.recipe.task,
            plan,
            dtype=self.recipe.model.dtype,
            attn_implementation=self.section.attn_implementation,
            trainable=trainable,
            device=device,
        )


def recipe_model(recipe: Recipe) -> RecipeModel:
    """The recipe's model.

    Raises:
        UsageError: no such model.
    """
    from llmpipe_cli.model.adapters import config_section, split_adapter
    from llmpipe_cli.model.auto import load_config, model_class

    section, adapter = split_adapter(recipe.model)
    tokenizer = recipe.tokenizer
    vocab_size = None if tokenizer is None or isinstance(tokenizer, str) else tokenizer.train.vocab_size
    config = load_config(config_section(section, adapter), recipe.task, vocab_size=vocab_size)
    return RecipeModel(recipe, section, model_class(config, recipe.task), config)


def recipe_profile(recipe: Recipe, device: str = "cuda") -> ModelProfile:
    """The profile of the recipe's model.

    Args:
        recipe: the recipe.
        device: "cuda" or "cpu": whose kernels it will run.

    Raises:
        UsageError: no such model, or one that cannot be traced.
    """
    from llmpipe_cli.model.slicing.trace import trace_config

    model = recipe_model(recipe)
    short = _shortened(model.config)
    particular = recipe.lora is not None or recipe.train.freeze or recipe.train.trainable
    if short is not None and not particular and not isinstance(recipe.parallel.split_layers, list):
        few = RecipeModel(recipe, model.section, model.cls, short)
        plan = trace_config(model.cls, short, recipe.task, attn_implementation=model.section.attn_implementation)
        whole = few.profile(plan, None, device).stretched(model.config.num_hidden_layers)
        if whole is not None:
            return whole
    return model.profile(*model.sliced, device)


def _shortened(config: Any) -> Any | None:
    """The config of the same model with few layers, for deep models whose layers look alike; else None.

    Layers that differ are listed in the config one by one, or show in the profile (`ModelProfile.stretched`).
    """
    depth = getattr(config, "num_hidden_layers", None)
    if (
        not isinstance(depth, int)
        or depth < _DEEP
        or config.is_encoder_decoder
        or config.get_text_config() is not config
    ):
        return None
    listed = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == depth]
    if listed:
        return None
    short = copy.deepcopy(config)
    short.num_hidden_layers = _FEW
    return short
