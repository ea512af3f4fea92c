"""Token ids with a meaning, as the files of a checkpoint state them: mask, ends, padding, start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from export.contract.manifest import SpecialTokens
from quantize.errors import CheckpointError
from quantize.files.json_files import read_json_object


class ModelFiles(Protocol):
    """The files beside a model's weights; `quantize.checkpoint.Checkpoint` is one of these."""

    @property
    def folder(self) -> Path:
        """Where they are."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none."""


@dataclass(frozen=True)
class TokenNames:
    """Texts of added tokens by which a format knows its mask and the ends of an answer.

    They count beside what the files state. mask_token: the mask's id where no file says.
    """

    masks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    mask_token: int | None = None


def mask_token_of(files: ModelFiles, names: TokenNames, vocabulary_size: int) -> int:
    """The id of the mask. Raises CheckpointError where no file says, or for what is no id."""
    for file, section in (
        ("config.json", files.config),
        ("generation_config.json", files.generation_config),
    ):
        value = section.get("mask_token_id")
        if value is not None:
            return _in_vocabulary(value, f"mask_token_id of {file}", vocabulary_size)
    added = AddedTokens(files.folder)
    own = added.text_of("mask_token")
    texts = names.masks if own is None else (own, *names.masks)
    for text in texts:
        if (value := added.find(text)) is not None:
            return _in_vocabulary(value, f"the tokenizer's {text!r}", vocabulary_size)
    if names.mask_token is not None:
        return _in_vocabulary(names.mask_token, "the mask token of this format", vocabulary_size)
    raise CheckpointError(
        f"{files.folder} does not say which token is the mask: neither config.json "
        f"(mask_token_id) nor the tokenizer ({', '.join(map(repr, texts))}) has it; add "
        "mask_token_id to config.json"
    )


def special_tokens_of(files: ModelFiles, names: TokenNames, vocabulary_size: int) -> SpecialTokens:
    """Ids of the first of generation_config.json, config.json and its `text_config` to state each.

    What the format's names end an answer with is added; padding and beginning may be named by the
    tokenizer alone. Raises CheckpointError for what is no id.
    """
    text = files.config.get("text_config")
    sections = (files.generation_config, files.config, text if isinstance(text, Mapping) else {})
    added = AddedTokens(files.folder)

    def find(key: str) -> Any:
        stated = (section.get(key) for section in sections)
        return next((value for value in stated if value is not None), None)

    def one(key: str, role: str) -> int | None:
        value = find(key)
        if value is None and (text := added.text_of(role)) is not None:
            value = added.find(text)
        return None if value is None else _in_vocabulary(value, key, vocabulary_size)

    stated = find("eos_token_id")
    stated = [] if stated is None else stated if isinstance(stated, list) else [stated]
    ends = [_in_vocabulary(end, "eos_token_id", vocabulary_size) for end in stated]
    for name in names.ends:
        if (value := added.find(name)) is not None:
            ends.append(_in_vocabulary(value, f"the tokenizer's {name!r}", vocabulary_size))
    return SpecialTokens(
        eos=tuple(dict.fromkeys(ends)),
        pad=one("pad_token_id", "pad_token"),
        bos=one("bos_token_id", "bos_token"),
    )


def _in_vocabulary(value: Any, what: str, vocabulary_size: int) -> int:
    if type(value) is not int or not 0 <= value < vocabulary_size:
        raise CheckpointError(
            f"{what} is {value!r}, the vocabulary has {vocabulary_size} tokens; "
            "take all files from one checkpoint"
        )
    return value


class AddedTokens:
    """The tokens that a tokenizer's files name, by their text; read when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[str, Any] | None = None

    def find(self, text: str) -> Any:
        """The id of an added token, or of a whole-word entry of the vocabulary; None without."""
        if self._ids is None:
            self._ids = self._read_ids()
        return self._ids.get(text)

    def text_of(self, role: str) -> str | None:
        """The text of the token that the tokenizer calls `mask_token` or the like; None without."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._read(file).get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                return value
        return None

    def _read_ids(self) -> dict[str, Any]:
        ids: dict[str, Any] = {}
        tokenizer = self._read("tokenizer.json")
        model = tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            ids |= vocabulary
        ids |= self._read("added_tokens.json")
        decoder = self._read("tokenizer_config.json").get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                ids[entry["content"]] = int(number) if str(number).isdecimal() else number
        added = tokenizer.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                ids[entry["content"]] = entry.get("id")
        return ids

    def _read(self, file: str) -> dict[str, Any]:
        path = self._folder / file
        return read_json_object(path) if path.is_file() else {}
