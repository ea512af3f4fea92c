"""What to do with each weight: rules from patterns on its name to bits and group size.

No torch here, and no algorithm: how a scheme is carried out is the quantizer's business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from quantize.errors import RecipeError

GROUP_SIZES = (128, 64, 32)
ScaleAlgorithm = Literal["minmax", "hqq"]


def _check(field: str, value: object, allowed: tuple) -> None:
    # By type too: 4.0 and True compare equal to numbers that they are not.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(str(choice) for choice in allowed)
        raise RecipeError(f"A recipe gives {field} as {value!r}; choose one of {choices}.")


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized: symmetric integers with one scale a group of a row.

    bits: 4 or 8. group_size: weights that share a scale, 32, 64, 128, or None for a whole row
    (per channel). activation: `int8_dynamic` quantizes a linear's input per token as it comes,
    `none` leaves it. scale_algorithm: `minmax` takes the largest magnitude, `hqq` searches the
    scale of least squared error. scale_dtype: the type scales are stored and multiplied in.
    smaller_groups: whether a row that the group size does not divide takes the largest smaller
    one that does (128, 64, 32); without it such a row is an error.
    """

    bits: int = 4
    group_size: int | None = 32
    activation: Literal["int8_dynamic", "none"] = "int8_dynamic"
    scale_algorithm: ScaleAlgorithm = "minmax"
    scale_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    smaller_groups: bool = False

    def __post_init__(self) -> None:
        _check("bits", self.bits, (4, 8))
        _check("group_size", self.group_size, (*sorted(GROUP_SIZES), None))
        _check("activation", self.activation, ("int8_dynamic", "none"))
        _check("scale_algorithm", self.scale_algorithm, get_args(ScaleAlgorithm))
        _check("scale_dtype", self.scale_dtype, ("bfloat16", "float32"))
        _check("smaller_groups", self.smaller_groups, (False, True))

    @property
    def label(self) -> str:
        """A short name for tables, e.g. `int4 g32 hqq, int8 act`."""
        words = [f"int{self.bits}", f"g{self.group_size}" if self.group_size else "row"]
        if self.scale_algorithm == "hqq":
            words.append("hqq")
        return " ".join(words) + (", int8 act" if self.activation == "int8_dynamic" else "")

    def for_shape(self, name: str, shape: tuple[int, ...]) -> Scheme:
        """This scheme with the group size that a weight of `shape` (`[..., out, in]`) really takes.

        Raises RecipeError for a weight that is neither 2-D nor 3-D, is empty, or has rows that
        cannot be split into groups.
        """
        if len(shape) not in (2, 3) or 0 in shape:
            raise RecipeError(
                f"The recipe quantizes {name}, which has shape {list(shape)} and is no matrix "
                "or stack of matrices; name it in an earlier rule with the treatment keep."
            )
        width = shape[-1]
        if self.group_size is None or width % self.group_size == 0:
            return self
        if self.smaller_groups:
            for size in GROUP_SIZES:
                if size < self.group_size and width % size == 0:
                    return replace(self, group_size=size)
        raise RecipeError(
            f"The {width} inputs of {name} cannot be split into groups of {self.group_size}; "
            "choose a group size that divides them, or one scale per row (group_size null)."
        )


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches one of `patterns`, and what becomes of them.

    Patterns are shell globs on the whole Hugging Face name (`*` also matches dots, case counts).
    treatment: a Scheme, `keep` (stored as it is, computed in fp32) or `skip` (left out).
    """

    patterns: tuple[str, ...]
    treatment: Scheme | Literal["keep", "skip"]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.patterns, tuple)
            or not self.patterns
            or not all(isinstance(pattern, str) and pattern for pattern in self.patterns)
        ):
            raise RecipeError(
                f"A rule's patterns are {self.patterns!r}; give at least one pattern on a "
                "weight's name, such as *.q_proj.weight."
            )
        if not isinstance(self.treatment, Scheme):
            _check("treatment", self.treatment, ("keep", "skip"))

    def matches(self, name: str) -> bool:
        """Whether any pattern matches the whole name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Recipe:
    """Named rules in order: the first that matches a weight's name decides; no match keeps it."""

    name: str
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"A recipe's name is {self.name!r}; give it a non-empty text.")
        if not isinstance(self.rules, tuple) or not all(isinstance(r, Rule) for r in self.rules):
            raise RecipeError(f"Recipe {self.name} has the rules {self.rules!r}; give a tuple.")

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a weight's name, or None."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def to_json(self) -> dict:
        """The recipe as a JSON object; `recipe_from_json` reads it back equal."""
        rules = []
        for rule in self.rules:
            treatment = rule.treatment
            rules.append(
                {
                    "patterns": list(rule.patterns),
                    "treatment": asdict(treatment) if isinstance(treatment, Scheme) else treatment,
                }
            )
        return {"name": self.name, "rules": rules}


def recipe_from_json(value: object) -> Recipe:
    """The inverse of Recipe.to_json; raises RecipeError, echoing the value it cannot use."""
    table = _object("recipe", value, {"name", "rules"})
    if not isinstance(table["rules"], list):
        raise RecipeError(f"A recipe's rules are {table['rules']!r}; give a list of rules.")
    rules = []
    for item in table["rules"]:
        rule = _object("rule", item, {"patterns", "treatment"})
        patterns, treatment = rule["patterns"], rule["treatment"]
        if isinstance(treatment, dict):
            treatment = _scheme_from_json(treatment)
        rules.append(Rule(tuple(patterns) if isinstance(patterns, list) else patterns, treatment))
    return Recipe(table["name"], tuple(rules))


def preset(name: str = "int4-g32", *, scale_algorithm: ScaleAlgorithm = "minmax") -> Recipe:
    """A recipe by name (`PRESETS` lists them); `scale_algorithm="hqq"` applies to 4-bit weights.

    Raises RecipeError for a name or an algorithm that does not exist.
    """
    if name not in PRESETS:
        raise RecipeError(f"There is no recipe {name!r}; choose one of {', '.join(PRESETS)}.")
    _check("scale_algorithm", scale_algorithm, get_args(ScaleAlgorithm))
    group_size, embedding = PRESETS[name]
    linear = Scheme(
        bits=4,
        group_size=group_size,
        # Scales of whole rows cost next to nothing in fp32.
        scale_dtype="float32" if group_size is None else "bfloat16",
        smaller_groups=group_size is not None,
        scale_algorithm=scale_algorithm,
    )
    if embedding.bits == 4:
        embedding = replace(embedding, scale_algorithm=scale_algorithm)
    rules = (
        Rule(OTHER_MODALITIES, "skip"),
        Rule(PRECISE, "keep"),
        Rule(EMBEDDINGS, embedding),
        Rule(HEADS, replace(embedding, activation="int8_dynamic")),
        Rule(LINEARS + EXPERTS, linear),
    )
    suffix = "" if scale_algorithm == "minmax" else f"-{scale_algorithm}"
    return Recipe(name + suffix, rules)


OTHER_MODALITIES = ("*vision_tower*", "*embed_vision*", "*audio_tower*", "*embed_audio*")
PRECISE = ("*norm*", "*.router.*", "*layer_scalar")
EMBEDDINGS = (
    "*embed_tokens.weight",
    "*embed_tokens_per_layer.weight",
    "*wte.weight",
    "*word_embeddings.weight",
)
HEADS = ("*lm_head.weight", "*embed_out.weight", "*transformer.ff_out.weight")
# Gemma, Qwen, Llama, HRM-Text and their fused forms; then LLaDA's names.
LINEARS = (
    *(f"*.{part}_proj.weight" for part in ("q", "k", "v", "o", "qkv", "gate", "up", "down")),
    "*.gate_up_proj.weight",
    "*.gqkv_proj.weight",
    "*.per_layer_input_gate.weight",
    "*.per_layer_projection.weight",
    "*.per_layer_model_projection.weight",
    "*.attn_out.weight",
    "*.ff_proj.weight",
    "*.ff_out.weight",
)
EXPERTS = ("*.experts.gate_up_proj", "*.experts.down_proj")

_INT8_ROWS = Scheme(bits=8, group_size=None, activation="none", scale_dtype="float32")
_INT4_GROUPS = Scheme(bits=4, group_size=32, activation="none")

# Name: the linears' group size (None: a whole row), the scheme of embeddings and tied head.
PRESETS: dict[str, tuple[int | None, Scheme]] = {
    "int4-g32": (32, _INT8_ROWS),
    "int4-g64": (64, _INT8_ROWS),
    "int4-g128": (128, _INT8_ROWS),
    "int4-channel": (None, _INT8_ROWS),
    "int4-g32-embed4": (32, _INT4_GROUPS),
}


def _object(what: str, value: object, fields: set[str]) -> dict:
    if not isinstance(value, dict) or set(value) != fields:
        seen = sorted(value) if isinstance(value, dict) else value
        raise RecipeError(
            f"A {what} is given as {seen!r}; give an object with exactly "
            f"{' and '.join(sorted(fields))}."
        )
    return value


def _scheme_from_json(value: dict) -> Scheme:
    unknown = sorted(set(value) - set(Scheme.__dataclass_fields__))
    if unknown:
        raise RecipeError(
            f"A scheme has the unknown field {unknown[0]!r}; it may have "
            f"{', '.join(Scheme.__dataclass_fields__)}."
        )
    return Scheme(**value)
