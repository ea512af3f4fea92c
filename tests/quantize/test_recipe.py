"""Recipes: which weight gets which scheme (CPU only, no torch, no model)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quantize.errors import RecipeError
from quantize.recipe import PRESETS, Recipe, Rule, Scheme, preset, recipe_from_json

_LAYER = "model.decoder.layers.3."


def test_first_match_wins():
    wide = Rule(("*.q_proj.weight",), Scheme(bits=8))
    narrow = Rule(("model.layers.0.*",), Scheme(bits=4))
    name = "model.layers.0.q_proj.weight"
    assert Recipe("a", (wide, narrow)).rule_for(name) is wide
    assert Recipe("b", (narrow, wide)).rule_for(name) is narrow


def test_no_match_is_no_rule():
    assert Recipe("a", (Rule(("*.x",), "keep"),)).rule_for("model.y") is None


def test_patterns_match_the_whole_name_and_mind_case():
    rule = Rule(("*.q_proj.weight",), "keep")
    assert rule.matches("model.q_proj.weight")
    assert not rule.matches("model.q_proj.weight.more")
    assert not rule.matches("model.Q_proj.weight")
    assert not rule.matches("q_proj.weight")


@pytest.mark.parametrize(
    "name",
    [
        f"{_LAYER}self_attn.q_proj.weight",
        f"{_LAYER}self_attn.k_proj.weight",
        f"{_LAYER}self_attn.v_proj.weight",
        f"{_LAYER}self_attn.o_proj.weight",
        f"{_LAYER}mlp.gate_proj.weight",
        f"{_LAYER}mlp.up_proj.weight",
        f"{_LAYER}mlp.down_proj.weight",
        f"{_LAYER}experts.gate_up_proj",
        f"{_LAYER}experts.down_proj",
        "model.decoder.self_conditioning.gate_proj.weight",
        "model.layers.0.mlp.experts.7.up_proj.weight",
    ],
)
@pytest.mark.parametrize("recipe", PRESETS)
def test_presets_quantize_linears_and_experts_to_four_bits(recipe, name):
    scheme = preset(recipe).rule_for(name).treatment
    assert (scheme.bits, scheme.activation) == (4, "int8_dynamic")
    assert (
        scheme.group_size
        == {
            "int4-g32": 32,
            "int4-g64": 64,
            "int4-g128": 128,
            "int4-channel": None,
            "int4-g32-embed4": 32,
        }[recipe]
    )


@pytest.mark.parametrize(
    "name",
    [
        f"{_LAYER}input_layernorm.weight",
        f"{_LAYER}self_attn.q_norm.weight",
        f"{_LAYER}router.proj.weight",
        f"{_LAYER}router.scale",
        f"{_LAYER}router.per_expert_scale",
        f"{_LAYER}layer_scalar",
        "model.encoder.language_model.layers.3.layer_scalar",
        "model.decoder.norm.weight",
        "model.decoder.self_conditioning.pre_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("recipe", PRESETS)
def test_presets_leave_norms_router_scalars_and_biases_alone(recipe, name):
    rule = preset(recipe).rule_for(name)
    assert rule is None or rule.treatment == "keep"


@pytest.mark.parametrize("recipe", PRESETS)
def test_presets_skip_the_vision_tower_even_where_its_names_look_like_linears(recipe):
    for name in (
        "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.encoder.vision_tower.encoder.layers.0.input_layernorm.weight",
        "model.encoder.embed_vision.embedding_projection.weight",
    ):
        assert preset(recipe).rule_for(name).treatment == "skip"


def test_embeddings_are_int8_rows_by_default_and_int4_groups_on_request():
    name = "model.decoder.embed_tokens.weight"
    rows = preset().rule_for(name).treatment
    assert (rows.bits, rows.group_size, rows.activation) == (8, None, "none")
    groups = preset("int4-g32-embed4").rule_for(name).treatment
    assert (groups.bits, groups.group_size, groups.activation) == (4, 32, "none")


def test_a_head_of_its_own_is_a_linear_as_wide_as_the_embedding():
    scheme = preset().rule_for("lm_head.weight").treatment
    assert (scheme.bits, scheme.group_size, scheme.activation) == (8, None, "int8_dynamic")


def test_hqq_goes_to_four_bit_weights_and_into_the_name():
    recipe = preset("int4-g32-embed4", scale_algorithm="hqq")
    assert recipe.name == "int4-g32-embed4-hqq"
    four_bit = [r.treatment for r in recipe.rules if isinstance(r.treatment, Scheme)]
    assert {scheme.scale_algorithm for scheme in four_bit} == {"hqq"}
    rows = preset(scale_algorithm="hqq").rule_for("model.embed_tokens.weight").treatment
    assert rows.scale_algorithm == "minmax"


@pytest.mark.parametrize("algorithm", ["minmax", "hqq"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_survives_json(name, algorithm):
    recipe = preset(name, scale_algorithm=algorithm)
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("bits", 4.0),
        ("bits", "4"),
        ("group_size", 16),
        ("group_size", 0),
        ("group_size", True),
        ("activation", "int4_dynamic"),
        ("scale_algorithm", "awq"),
        ("scale_dtype", "int8"),
        ("smaller_groups", 1),
        ("smaller_groups", []),
    ],
)
def test_a_scheme_echoes_the_value_it_cannot_take(field, value):
    with pytest.raises(RecipeError) as caught:
        Scheme(**{field: value})
    assert f"{field} as {value!r}" in str(caught.value)
    json_recipe = preset().to_json()
    json_recipe["rules"][-1]["treatment"][field] = value
    with pytest.raises(RecipeError, match=field):
        recipe_from_json(json_recipe)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        ([], "[]"),
        ({"name": "x"}, "['name']"),
        ({"name": "x", "rules": {}}, "{}"),
        ({"name": "", "rules": []}, "''"),
        ({"name": "x", "rules": [7]}, "7"),
        ({"name": "x", "rules": [{"patterns": "*", "treatment": "keep"}]}, "'*'"),
        ({"name": "x", "rules": [{"patterns": [], "treatment": "keep"}]}, "()"),
        ({"name": "x", "rules": [{"patterns": [3], "treatment": "keep"}]}, "(3,)"),
        ({"name": "x", "rules": [{"patterns": ["*"], "treatment": "drop"}]}, "'drop'"),
        ({"name": "x", "rules": [{"patterns": ["*"], "treatment": {"bit": 4}}]}, "'bit'"),
    ],
)
def test_a_recipe_that_cannot_be_read_echoes_what_it_saw(value, said):
    with pytest.raises(RecipeError) as caught:
        recipe_from_json(value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(RecipeError) as caught:
        preset("int3")
    assert "'int3'" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(RecipeError, match="'awq'"):
        preset(scale_algorithm="awq")


# Widths of the released DiffusionGemma: hidden 2816, MLP 2112, experts 704.
@pytest.mark.parametrize(
    ("width", "group_size", "taken"),
    [(2816, 128, 128), (2112, 128, 64), (704, 128, 64), (96, 128, 32), (96, 64, 32), (96, 32, 32)],
)
def test_a_row_takes_the_largest_smaller_group_that_divides_it(width, group_size, taken):
    scheme = Scheme(group_size=group_size, smaller_groups=True)
    assert scheme.for_shape("w", (8, width)).group_size == taken
    assert scheme.for_shape("w", (4, 8, width)).group_size == taken


def test_a_row_that_no_group_divides_is_an_error_that_names_the_weight():
    for scheme in (Scheme(group_size=128), Scheme(group_size=32, smaller_groups=True)):
        with pytest.raises(RecipeError) as caught:
            scheme.for_shape("model.odd.weight", (8, 48))
        assert "48 inputs of model.odd.weight" in str(caught.value)
    assert Scheme(group_size=None).for_shape("w", (8, 48)).group_size is None


@pytest.mark.parametrize("shape", [(), (32,), (2, 2, 2, 32), (0, 32)])
def test_only_matrices_and_stacks_of_them_can_be_quantized(shape):
    with pytest.raises(RecipeError, match=r"model\.odd"):
        Scheme().for_shape("model.odd", shape)


def test_recipes_need_no_torch():
    code = "import sys, quantize.recipe, quantize.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
