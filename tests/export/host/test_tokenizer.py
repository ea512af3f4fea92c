"""A tokenizer is checked against the model, and chat templates render as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.contract.manifest import SpecialTokens
from export.host.tokenizer import REPLACEMENT, TextTokenizer, render_chat, tokenizer_files
from quantize.errors import InputError
from tests.support.toy_model import SPECIAL

CHAT = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "yes"}]

TEMPLATES = {
    "blocks_are_trimmed": """
{% for message in messages %}
    {% if message.role == 'user' %}
    U: {{ message.content }}
    {% else %}
A: {{ message['content'] | trim }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}go{% endif %}""",
    "json_is_not_escaped_for_html": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loops_can_be_left": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "special_tokens_are_there": "{{ bos_token }}|{{ eos_token }}",
}


@pytest.fixture
def file(tmp_path: Path, toy_tokenizer_json: bytes) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(toy_tokenizer_json)
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    expected, _ = render_jinja_template(
        [CHAT], chat_template=TEMPLATES[name], add_generation_prompt=True, **special
    )
    assert render_chat(TEMPLATES[name], CHAT, special) == expected[0]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for %}", "is not valid"),
        ("{{ nothing.at.all }}", "fails"),
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
    ],
)
def test_a_template_that_is_broken_or_hostile_is_one_sentence(template: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        render_chat(template, CHAT, {})


def test_text_comes_back_and_special_tokens_are_left_out(file: Path) -> None:
    tokenizer = TextTokenizer(file, 29, special_tokens=SPECIAL)
    tokens = tokenizer.encode("<bos>cabbage<eos>")
    assert tokens[0] == 2 and tokens[-1] == 1
    assert tokenizer.decode(tokens) == "cabbage"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<bos>cabbage<eos>"
    assert tokenizer.token_texts(tokens[:3]) == ["<bos>", "c", "a"]


def test_a_prompt_goes_through_the_chat_template(file: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = TextTokenizer(file, 29, chat_template=template, special_tokens=SPECIAL)
    assert tokenizer.encode_prompt("ab") == [2, 3, 4]
    assert TextTokenizer(file, 29).encode_prompt("ab") == [3, 4]
    with pytest.raises(InputError, match="no chat template"):
        TextTokenizer(file, 29).encode_chat([{"role": "user", "content": "ab"}])


def test_a_padded_vocabulary_shows_ids_without_a_token_as_replacement_characters(
    file: Path,
) -> None:
    assert TextTokenizer(file, 40).token_texts([3, 35]) == ["a", REPLACEMENT]


@pytest.mark.parametrize(
    ("vocabulary", "special", "says"),
    [
        (28, SPECIAL, "'z' the id 28, the model's vocabulary ends at 27"),
        (5000, SpecialTokens(eos=(4999,)), "no token for the model's eos id 4999"),
        (5000, SpecialTokens(pad=29), "pad id 29"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(
    file: Path, vocabulary: int, special: SpecialTokens, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        TextTokenizer(file, vocabulary, special_tokens=special)


@pytest.mark.parametrize("text", ["äbc", "ab ", "a🙂"])
def test_a_character_without_a_token_is_named(file: Path, text: str) -> None:
    strange = next(c for c in text if not "a" <= c <= "z")
    if strange == " ":  # white space may be lost in tokenizing: many tokenizers normalize it
        assert TextTokenizer(file, 29).encode("ab") == [3, 4]
        return
    with pytest.raises(InputError, match=strange):
        TextTokenizer(file, 29).encode(text)


def test_a_character_that_the_tokenizer_drops_silently_is_named(tmp_path: Path) -> None:
    document = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(document))
    tokenizer = TextTokenizer(tmp_path / "t.json", 2)
    assert tokenizer.encode("abba") == [0, 1, 1, 0]
    with pytest.raises(InputError, match="'x'"):
        tokenizer.encode("abxba")


@pytest.mark.parametrize("token", [29, -1])
def test_an_id_outside_of_the_vocabulary_is_refused(file: Path, token: int) -> None:
    with pytest.raises(InputError, match=f"token 1 has id {token}"):
        TextTokenizer(file, 29).decode([3, token])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        TextTokenizer(tmp_path / "tokenizer.json", 29)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        TextTokenizer(tmp_path / "tokenizer.json", 29)


def test_a_checkpoint_folder_says_where_its_template_is(tmp_path: Path, file: Path) -> None:
    assert tokenizer_files(tmp_path / "nowhere") is None
    assert tokenizer_files(tmp_path).chat_template is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert tokenizer_files(tmp_path).chat_template == "one"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert tokenizer_files(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert tokenizer_files(tmp_path).chat_template == "three"
    assert tokenizer_files(tmp_path).file == file
    config.write_text("{")
    with pytest.raises(InputError, match="tokenizer_config"):
        tokenizer_files(tmp_path)
