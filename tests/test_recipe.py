"""Recipes: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantkit.errors import NotYetError, RecipeError
from quantkit.recipe import (
    AUTO,
    BEST,
    MAX_RECIPE_BYTES,
    CalibrationSpec,
    ExportSpec,
    GateSpec,
    Override,
    ProbesSpec,
    PublishSpec,
    QuantizeSpec,
    Recipe,
    TaskSpec,
    TypeOverride,
    find_recipe,
    json_schema,
    load_recipe,
    shipped_folder,
    shipped_recipes,
    validate,
)
from quantkit.schemes import EFFORTS, FORMATS, KV_CACHES, METHODS, RUNTIMES, SCHEMES

MINIMAL = "version: 1\n"
WHOLE = """\
version: 1
model: a/model
output: out
calibration:
  data: text.txt
  samples: 4
quantize:
  scheme: w4a16
  overrides:
    - {match: "*.down_proj", scheme: w8a16}
export:
  - {format: compressed-tensors}
gate:
  data: eval.txt
  max_perplexity_increase: 3%
"""


def write(folder: Path, text: str) -> Path:
    """Write a recipe file."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The message with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides=overrides)
    return str(caught.value)


# --- what is accepted


def test_a_recipe_with_nothing_but_its_version_has_every_default(tmp_path: Path) -> None:
    """All groups but calibration and gate have complete defaults."""
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe == Recipe(version=1)
    assert recipe.quantize.scheme == "w4a16"
    assert recipe.quantize.group_size == 128
    assert recipe.quantize.method == "best"
    assert recipe.export[0].format == "compressed-tensors"
    assert recipe.calibration is None
    assert recipe.gate is None


def test_a_whole_recipe_is_read(tmp_path: Path) -> None:
    """Nested groups and lists arrive as frozen records."""
    recipe = load_recipe(write(tmp_path, WHOLE))
    assert recipe.calibration is not None
    assert recipe.calibration.samples == 4
    assert recipe.quantize.overrides[0].scheme == "w8a16"
    assert recipe.gate is not None
    assert recipe.gate.max_perplexity_increase == pytest.approx(0.03)


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    """A stage cannot change what the next one reads."""
    recipe = load_recipe(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "other"  # type: ignore[misc]


def test_a_dumped_recipe_validates_to_itself(tmp_path: Path) -> None:
    """The resolved recipe in the evidence can be run again."""
    recipe = load_recipe(write(tmp_path, WHOLE))
    assert validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("size", [32, 64, 128, "channel"])
def test_the_group_sizes_of_the_design_are_accepted(size: object) -> None:
    """And no other; see below."""
    assert validate({"version": 1, "quantize": {"group_size": size}}).quantize.group_size == size


def test_a_limit_may_be_switched_off() -> None:
    """`null` means no limit."""
    gate = validate({"version": 1, "gate": {"data": "x", "max_kl": None}}).gate
    assert gate is not None
    assert gate.max_kl is None


def test_yaml_none_is_the_scheme_none() -> None:
    """`scheme: null` and `scheme: none` both leave a layer alone."""
    override = {"match": "*", "scheme": "none"}
    recipe = validate({"version": 1, "quantize": {"overrides": [override], "kv_cache": None}})
    assert recipe.quantize.overrides[0].scheme == "none"
    assert recipe.quantize.kv_cache == "none"


# --- what is refused


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("version: 1\nmodle: x\n", 2, "unknown key 'modle'; did you mean 'model'?"),
        (
            "version: 1\nquantize:\n  shceme: w4a16\n",
            3,
            "unknown key 'shceme'; did you mean 'scheme'?",
        ),
        (
            "version: 1\nquantize: {method: awk}\n",
            2,
            "method 'awk' is unknown; did you mean 'awq'?",
        ),
        (
            "version: 1\nquantize: {group_size: 100}\n",
            2,
            "group_size 100 is unknown (known: 16, 32, 64",
        ),
        ("version: 1\nexport:\n  - format: guf\n", 3, "did you mean 'gguf'?"),
        ("version: 1\ngate:\n  data: x\n  tasks:\n    - {nane: arc}\n", 5, "unknown key 'nane'"),
        ("version: 1\nint: 3\n", 2, "unknown key 'int'"),
        ("version: 1\nquantize: {overrides: [{scheme: w8a16}]}\n", 2, "this key is required"),
        ("version: 2\n", 1, "input should be 1, got 2"),
        ("model: x\n", 0, "version: this key is required"),
        ("version: 1\ngate: {data: x, python: {vlm: py}}\n", 2, "did you mean 'vllm'?"),
    ],
)
def test_a_wrong_key_or_word_is_refused_with_its_line_and_the_nearest_name(
    tmp_path: Path, text: str, line: int, expected: str
) -> None:
    """File, line, key, what is wrong, and what was probably meant."""
    message = refusal(tmp_path, text)
    place = f"{tmp_path / 'recipe.yaml'}:{line}: " if line else str(tmp_path / "recipe.yaml")
    assert any(row.startswith(place) and expected in row for row in message.splitlines())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("samples", "many", "a whole number is expected, got 'many'"),
        ("samples", 1.5, "a whole number is expected, got 1.5"),
        ("samples", True, "a number is expected, got True"),
        ("samples", [1], "a whole number is expected"),
        ("samples", 0, "greater than or equal to 1, got 0"),
        ("seed", -1, "greater than or equal to 0, got -1"),
        ("data", 5, "text is expected, got 5"),
        ("assistant_only", "perhaps", "true or false is expected, got 'perhaps'"),
    ],
)
def test_a_wrong_type_is_refused_in_plain_words(key: str, value: object, expected: str) -> None:
    """No word of the library that checks it."""
    with pytest.raises(RecipeError) as caught:
        validate({"version": 1, "calibration": {"data": "x", key: value}})
    assert f"calibration.{key}: " in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "three%", -0.1])
def test_a_limit_that_could_never_fail_is_refused(value: object) -> None:
    """NaN compares false with everything: such a gate would be no gate."""
    for key in ("max_perplexity_increase", "max_kl"):
        with pytest.raises(RecipeError, match=key):
            validate({"version": 1, "gate": {"data": "x", key: value}})


def test_a_list_is_expected_where_one_word_is_given() -> None:
    """`ignore: lm_head` would otherwise be seven letters."""
    with pytest.raises(RecipeError, match=r"quantize\.ignore: a list is expected, got 'lm_head'"):
        validate({"version": 1, "quantize": {"ignore": "lm_head"}})


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """One line each."""
    message = refusal(tmp_path, "version: 1\nmodle: x\nquantize: {methd: rtn, scheme: w5}\n")
    assert len(message.splitlines()) == 3


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML would silently take the last one."""
    assert ":3: key 'model' is given twice" in refusal(tmp_path, "version: 1\nmodel: a\nmodel: b\n")


def test_aliases_are_refused(tmp_path: Path) -> None:
    """A few of them can grow into gigabytes."""
    assert "aliases" in refusal(tmp_path, "version: 1\nmodel: &a x\noutput: *a\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n",
        "version: [\n",
        "just text\n",
        "{a: 1}: 2\n",
        "version: !!python/none x\n",
        "version: 1\nmodel: !!bool x\n",
        "version: 1\nmodel: 2026-02-30\n",
        "version: 1\nmodel: {<<: 1}\n",
        "version: 0x" + "f" * 5000 + "\n",
        "version: " + "[" * 100_000 + "\n",
        "\t\n",
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_refused(tmp_path: Path, text: str) -> None:
    """With the file's name and without a traceback."""
    assert str(tmp_path / "recipe.yaml") in refusal(tmp_path, text)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    """Somebody passed the weights instead of the recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"version: 1 \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)
    path.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than a recipe"):
        load_recipe(path)


def test_long_and_strange_values_are_not_repeated_at_length() -> None:
    """The line stays a line."""
    with pytest.raises(RecipeError) as caught:
        validate(
            {"version": 1, "calibration": {"data": "x", "samples": "9" * 5000 + "x"}, "a\nb": 1}
        )
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 2


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Recipe.model_fields, "data", "int", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "str", "z"]), json_like, max_size=5))
def test_any_data_is_either_a_recipe_or_refused(tree: dict[str, Any]) -> None:
    """Never another exception."""
    try:
        recipe = validate(tree)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


# --- what is not built yet


NOT_BUILT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scheme 'w8a16'": (
        "SCHEMES",
        SCHEMES | {"w8a16": replace(SCHEMES["w8a16"], built=False)},
        {"quantize": {"scheme": "w8a16"}},
    ),
    "method 'gptq'": (
        "METHODS",
        METHODS | {"gptq": replace(METHODS["gptq"], built=False)},
        {"quantize": {"method": "gptq"}},
    ),
    "kv_cache 'fp8'": ("KV_CACHES", KV_CACHES | {"fp8": False}, {"quantize": {"kv_cache": "fp8"}}),
    "export format 'onnx'": (
        "FORMATS",
        FORMATS | {"onnx": False},
        {"export": [{"format": "onnx", "precision": "int4"}]},
    ),
    "gate runtime 'vllm'": (
        "RUNTIMES",
        RUNTIMES | {"vllm": False},
        {"gate": {"data": "x", "runtime": "vllm"}},
    ),
}
"""What the error names -> the table that marks it as not built, and a recipe that asks for it."""


@pytest.mark.parametrize("words", NOT_BUILT)
def test_what_is_not_built_yet_is_refused_and_never_ignored(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known key whose feature is missing is not a misspelling, and not a no-op either."""
    name, table, tree = NOT_BUILT[words]
    assert validate({"version": 1, **tree})
    monkeypatch.setattr(f"quantkit.recipe.refusals.{name}", table)
    with pytest.raises(NotYetError, match=f"{words}.* is not yet built"):
        validate({"version": 1, **tree})


# --- exports


def test_types_of_gguf_files_are_written_in_any_case() -> None:
    """llama.cpp's names are in capitals; a folder pattern keeps its case."""
    override = {"match": "*.down_proj.weight", "type": "q6_k"}
    recipe = validate(
        {
            "version": 1,
            "export": [{"format": "gguf", "type": "q4_k_m", "overrides": [override]}],
        }
    )
    assert recipe.export[0].type == "Q4_K_M"
    assert recipe.export[0].overrides[0].type == "Q6_K"


def test_the_types_of_a_gguf_file_can_be_left_open() -> None:
    """Within bits per weight, and among types in any case."""
    export = {"format": "gguf", "type": "Auto", "target_bits": 4.5}
    recipe = validate({"version": 1, "export": [export]})
    assert recipe.export[0].type == AUTO
    assert recipe.export[0].candidates == ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    assert recipe.measures
    assert recipe.chooses_types

    recipe = validate({"version": 1, "export": [{**export, "candidates": ["q2_k", "q8_0"]}]})
    assert recipe.export[0].candidates == ("Q2_K", "Q8_0")
    assert not Recipe(version=1).measures


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"export": [{"format": "gguf"}]}, "a gguf export needs a type, for instance Q4_K_M"),
        ({"export": [{"format": "gguf", "type": "Q4_KM"}]}, "did you mean 'Q4_K_M'?"),
        ({"export": [{"type": "Q4_K_M"}]}, "type belongs to the format gguf"),
        ({"export": [{"pre_tokenizer": "qwen2"}]}, "pre_tokenizer belongs to the format gguf"),
        ({"export": [{"format": "gguf", "type": "Q4_0"}] * 2}, "export names a format twice"),
        (
            {"export": [{"format": "gguf", "type": "Q4_0"}], "quantize": {"kv_cache": "fp8"}},
            "quantize.kv_cache is for formats with schemes, and the only format is gguf",
        ),
        (
            {"export": [{"format": "gguf", "type": "Q4_0"}], "quantize": {"ignore": ["*.0.*"]}},
            "quantize.ignore is for formats with schemes, and the only format is gguf",
        ),
        (
            {"export": [{"format": "gguf", "type": "Q4_0", "overrides": [{"mach": "*"}]}]},
            "unknown key 'mach'; did you mean 'match'?",
        ),
        ({"export": [{"format": "gguf", "type": "auto"}]}, "type auto needs target_bits"),
        (
            {"export": [{"format": "gguf", "type": "Q4_0", "target_bits": 5}]},
            "target_bits belongs to type auto, and the type is Q4_0",
        ),
        (
            {"export": [{"format": "gguf", "type": "Q4_0", "candidates": ["Q4_0", "Q8_0"]}]},
            "candidates belongs to type auto, and the type is Q4_0",
        ),
        ({"export": [{"target_bits": 5}]}, "target_bits belongs to the format gguf"),
        (
            {"export": [{"format": "gguf", "type": "auto", "target_bits": 5}, {}]},
            "type auto chooses for a single file: make it the only export",
        ),
        (
            {
                "export": [{"format": "gguf", "type": "auto", "target_bits": 5}],
                "quantize": {"scheme": "auto", "target_bits": 5},
            },
            "quantize.scheme is for formats with schemes, and the only format is gguf",
        ),
    ],
)
def test_exports_that_contradict_themselves_are_refused(tree: dict[str, Any], says: str) -> None:
    """What a format has no place for is never ignored."""
    with pytest.raises(RecipeError, match=re.escape(says)):
        validate({"version": 1, **tree})


# --- --set, --model, --output


@pytest.mark.parametrize(
    ("pair", "read"),
    [
        ("quantize.group_size=64", lambda recipe: recipe.quantize.group_size == 64),
        ("quantize.ignore=[lm_head, '*.0.*']", lambda r: r.quantize.ignore == ("lm_head", "*.0.*")),
        ("gate.max_perplexity_increase=5%", lambda r: r.gate.max_perplexity_increase == 0.05),
        ("quantize.overrides.0.scheme=none", lambda r: r.quantize.overrides[0].scheme == "none"),
        ("calibration.data=a=b.txt", lambda recipe: recipe.calibration.data == "a=b.txt"),
        ("gate=null", lambda recipe: recipe.gate is None),
        ("gate.python.vllm=/v", lambda recipe: recipe.gate.python == {"vllm": "/v"}),
        ("gate.python.llama.cpp=/l", lambda recipe: recipe.gate.python == {"llama.cpp": "/l"}),
    ],
)
def test_set_overrides_any_key(tmp_path: Path, pair: str, read: Any) -> None:
    """Values are YAML; list items go by index."""
    assert read(load_recipe(write(tmp_path, WHOLE), overrides=[pair]))


def test_set_makes_the_groups_that_it_needs(tmp_path: Path) -> None:
    """`gate.data=x` works on a recipe that has no gate."""
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides=["gate.data=x", "gate.samples=3"])
    assert recipe.gate is not None
    assert (recipe.gate.data, recipe.gate.samples) == ("x", 3)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("quantize.group_size", "expected KEY=VALUE"),
        ("=5", "expected KEY=VALUE"),
        ("quantize.grup_size=64", "unknown key 'grup_size'; did you mean 'group_size'?"),
        ("model.name=x", "'model' is a value, not a group of keys"),
        ("export.3.format=gguf", "'3' is not an index of a list of 1"),
        ("gate.python.llama.cp=/l", "runtime 'llama.cp' is unknown; did you mean 'llama.cpp'?"),
        ("model=[", "not valid YAML"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path: Path, pair: str, expected: str) -> None:
    """As a wrong key in the file would be."""
    assert expected in refusal(tmp_path, WHOLE, pair)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("quantize.group_size=100", "--set quantize.group_size=100: group_size 100 is unknown"),
        ("quantize={group_size: 5}", "--set 'quantize={group_size: 5}': quantize.group_size: gr"),
        ("export=[{format: guf}]", "--set 'export=[{format: guf}]': export.0.format: "),
        ("export.0.format=guf", "--set export.0.format=guf: "),
        (
            "calibration.samples=8",
            "--set calibration.samples=8: calibration.data: this key is required: add "
            "--set calibration.data=...",
        ),
        ("grup.size=64", "--set grup.size=64: grup: unknown key 'grup'"),
        ("group_size=64", "unknown key 'group_size'; did you mean 'quantize.group_size'?"),
        ("samples=8", "did you mean 'calibration.samples' or 'gate.samples'?"),
        ("quantize.method=AWQ", "method 'AWQ' is unknown; did you mean 'awq'?"),
        ("quantize.scheme=int4", "scheme 'int4' is unknown; did you mean 'w4a16'?"),
        ("quantize.scheme=INT8", "did you mean 'w8a8'?"),
        ("quantize.scheme=fp8", "did you mean 'fp8_dynamic'?"),
        ("quantize.scheme=auto", "one of the two (with --set quantize.scheme=auto)"),
        ("quantize.ignore=" + "x" * 99, "xx...: a list is expected"),
    ],
)
def test_what_was_set_is_blamed_and_not_the_file(tmp_path: Path, pair: str, expected: str) -> None:
    """The line of the file says something else."""
    text = "version: 1\nquantize:\n  group_size: 128\nexport:\n  - format: compressed-tensors\n"
    message = refusal(tmp_path, text, pair)
    assert expected in message
    if "scheme=auto" not in pair:
        assert "recipe.yaml" not in message


def test_a_later_set_stands_for_an_earlier_one(tmp_path: Path) -> None:
    """Also for what is below it; the file is to blame for the rest."""
    text = "version: 1\nmodel: 3\n"
    message = refusal(tmp_path, text, "quantize.effort=1", "quantize={effort: 2}")
    assert message.splitlines() == [
        f"{tmp_path / 'recipe.yaml'}:2: model: text is expected, got 3",
        "--set 'quantize={effort: 2}': quantize.effort: effort 2 is unknown "
        "(known: fast, normal, best)",
    ]


def test_overrides_may_be_a_mapping(tmp_path: Path) -> None:
    """Of keys to values, in the words of Python."""
    overrides = {"quantize.ignore": ["lm_head", "a: b"], "gate": None, "model": "7"}
    recipe = load_recipe(write(tmp_path, WHOLE), overrides=overrides)
    assert recipe.quantize.ignore == ("lm_head", "a: b")
    assert (recipe.gate, recipe.model) == (None, "7")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "gate.samples=8",
            "overrides is a list of KEY=VALUE, got one string: write overrides=['gate.samples=8']",
        ),
        ([8], "overrides is a list of KEY=VALUE, and 8 is none"),
        ({"gate.samples": object()}, "the value of 'gate.samples' is of type object"),
    ],
)
def test_what_are_no_overrides_is_refused(tmp_path: Path, overrides: Any, expected: str) -> None:
    """A string would be taken apart into letters."""
    with pytest.raises(RecipeError, match=re.escape(expected)):
        load_recipe(write(tmp_path, WHOLE), overrides=overrides)


def test_model_and_output_win_over_the_recipe(tmp_path: Path) -> None:
    """Given as text or as paths."""
    recipe = load_recipe(write(tmp_path, WHOLE), model=Path("m"), output="o")
    assert (recipe.model, recipe.output) == ("m", "o")


# --- where things are looked up


def test_relative_paths_are_looked_up_from_the_working_folder_then_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with recipe and data can be run from anywhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (home / "text.txt").write_text("beside the recipe")
    path = write(home, WHOLE)
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(path)
    assert recipe.calibration is not None
    assert recipe.calibration.data == str(home / "text.txt")
    (elsewhere / "text.txt").write_text("in the working folder")
    recipe = load_recipe(path)
    assert recipe.calibration is not None
    assert recipe.calibration.data == "text.txt"


def test_a_shipped_recipe_is_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without its ending; and its data is found too."""
    monkeypatch.chdir(tmp_path)
    for path in shipped_recipes():
        assert find_recipe(path.stem) == find_recipe(path.name) == path
        recipe = load_recipe(path.stem)
        for spec in (recipe.calibration, recipe.gate):
            assert spec is None or Path(spec.data).is_file()


def test_a_copy_of_a_shipped_recipe_still_finds_the_shipped_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantkit recipes show awq4 > my.yaml` is how people start."""
    monkeypatch.chdir(tmp_path)
    copy = write(tmp_path, (shipped_folder() / "awq4.yaml").read_text())
    assert load_recipe(copy).calibration == load_recipe("awq4").calibration


def test_an_unknown_recipe_names_the_nearest_shipped_one() -> None:
    """And lists what there is."""
    with pytest.raises(RecipeError, match=r"did you mean 'awq4'\? \(shipped: .*rtn4"):
        load_recipe("awk4")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    """Nor is a path that does not exist."""
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(RecipeError, match="no recipe"):
            load_recipe(path)


# --- the schema


def test_the_schema_describes_every_key() -> None:
    """Editors show the description while people type."""
    schema = json_schema()
    for spec in (schema, *schema["$defs"].values()):
        for key, field in spec["properties"].items():
            assert field.get("description"), key


def test_the_schema_lists_the_known_words() -> None:
    """So that an editor completes them."""
    properties = json_schema()["$defs"]["QuantizeSpec"]["properties"]
    assert properties["scheme"]["enum"] == [*SCHEMES, AUTO]
    assert properties["method"]["enum"] == [BEST, *METHODS]
    assert properties["effort"]["enum"] == list(EFFORTS)


# --- the documentation


def default_of(field: FieldInfo) -> str:
    """A default in the words of a recipe."""
    if field.is_required():
        return "required"
    value = field.default
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    return f"`{text}`"


def choice(word: object) -> str:
    """A value that a key takes, marked where its feature is not built."""
    known: dict[object, bool] = {**KV_CACHES, **FORMATS, **RUNTIMES}
    known |= {name: scheme.built for name, scheme in SCHEMES.items()}
    known |= {name: method.built for name, method in METHODS.items()}
    return f"`{word}`" if known.get(word, True) else f"`{word}` (not yet)"


def key_tables() -> str:
    """The list of keys as docs/recipes.md has it."""
    groups: list[tuple[str, type[BaseModel]]] = [
        ("At the top", Recipe),
        ("`calibration`", CalibrationSpec),
        ("`quantize`", QuantizeSpec),
        ("Items of `quantize.overrides`", Override),
        ("Items of `export`", ExportSpec),
        ("Items of `overrides` of an export", TypeOverride),
        ("`gate`", GateSpec),
        ("Items of `gate.tasks`", TaskSpec),
        ("`gate.probes`", ProbesSpec),
        ("`publish`", PublishSpec),
    ]
    schema = json_schema()
    rows: list[str] = []
    for title, spec in groups:
        properties = schema if spec is Recipe else schema["$defs"][spec.__name__]
        rows += [f"### {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, field in spec.model_fields.items():
            words = properties["properties"][key].get("enum", ())
            choices = f": {', '.join(choice(word) for word in words)}" if words else ""
            meaning = f"{field.description}{choices}".replace("|", "\\|")
            rows.append(f"| `{key}` | {default_of(field)} | {meaning} |")
        rows.append("")
    return "\n".join(rows).rstrip("\n")


def test_the_documentation_lists_every_key_with_its_default() -> None:
    """Generated, so that it cannot lag behind: on a difference, paste what the test expects."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    begin, end = "<!-- keys: begin -->\n", "\n<!-- keys: end -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == key_tables()


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    """Longer than a file system has names for; it names itself in short."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\ncalibration: {{data: {'a' * 5000}}}\nquantize: {{}}\n")
    with pytest.raises(RecipeError, match=r"path 'a{60}'\.\.\.: File name too long"):
        load_recipe(path)
