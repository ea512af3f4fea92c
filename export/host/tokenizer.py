"""Text to token ids and back for one model, with its chat template; needs no torch.

The template is code from a checkpoint, so it runs in Jinja's sandbox, set up as transformers does
(`utils/chat_template_utils.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from export.contract.bundle import Bundle
from export.contract.manifest import SpecialTokens
from quantize.errors import InputError, UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a checkpoint folder: its file, and the chat template as Jinja source."""

    file: Path
    chat_template: str | None

    def open(self, vocabulary_size: int, special_tokens: SpecialTokens) -> TextTokenizer:
        """The tokenizer, for a model of that vocabulary; raises InputError as TextTokenizer."""
        return TextTokenizer(
            self.file,
            vocabulary_size,
            chat_template=self.chat_template,
            special_tokens=special_tokens,
        )


def tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """Find tokenizer.json and the chat template of a checkpoint folder; None without a tokenizer.

    The template is `chat_template.jinja` if there is one, else the one of tokenizer_config.json.
    Raises InputError for a file that cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    config = _read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return TokenizerFiles(file, template)


class TextTokenizer:
    """A `tokenizer.json` that was checked against the model it is used with."""

    def __init__(
        self,
        file: Path,
        vocabulary_size: int,
        *,
        chat_template: str | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        """Load `file`. Raises InputError if it is missing, damaged, or of another model."""
        # Imported here: `--help` does not need it.
        from tokenizers import Tokenizer

        if not file.is_file():
            raise InputError(f"{file} is missing; put the model's tokenizer.json there")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise InputError(
                f"{file} is no tokenizer that can be read ({error}); fetch it again"
            ) from error
        self.vocabulary_size = vocabulary_size
        self.special_tokens = special_tokens or SpecialTokens()
        self.chat_template = chat_template
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)
        self._check_fits(file)

    def _check_fits(self, file: Path) -> None:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        text, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
        if largest >= self.vocabulary_size:
            raise InputError(
                f"{file} gives the token {text!r} the id {largest}, the model's vocabulary ends at "
                f"{self.vocabulary_size - 1}; use the tokenizer that belongs to the model"
            )
        special = self.special_tokens
        for name, ids in {"eos": special.eos, "pad": (special.pad,), "bos": (special.bos,)}.items():
            for token in ids:
                if token is not None and self._tokenizer.id_to_token(token) is None:
                    raise InputError(
                        f"{file} has no token for the model's {name} id {token}; use the "
                        "tokenizer that belongs to the model"
                    )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Raises InputError for a character that the tokenizer has not."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises Exception itself
            raise InputError(self._no_token_for(text)) from error
        covered = [character.isspace() for character in text]
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._unknown_id and end > begin:
                raise InputError(self._no_token_for(text[begin:end]))
            covered[begin:end] = [True] * (end - begin)
        if not all(covered):
            raise InputError(self._no_token_for(text))
        return list(encoding.ids)

    def _no_token_for(self, text: str) -> str:
        """The sentence about the first character that cannot be encoded by itself."""
        for token in self._tokenizer.get_added_tokens_decoder().values():
            text = text.replace(token.content, "")
        culprit = next((character for character in text if not self._is_known(character)), text)
        return f"the model has no token for {culprit!r}; leave it out of the prompt"

    def _is_known(self, character: str) -> bool:
        if character.isspace():
            return True
        try:
            ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        except Exception:  # the library raises Exception itself
            return False
        return bool(ids) and self._unknown_id not in ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's format, up to where its answer begins.

        messages: `{"role": "user", "content": text}`. Raises InputError for a model without a chat
        template and for a template that fails.
        """
        if self.chat_template is None:
            raise InputError("the model has no chat template; give it plain text")
        return self.encode(render_chat(self.chat_template, messages, self._special_texts()))

    def encode_prompt(self, text: str) -> list[int]:
        """A user's prompt: through the chat template if there is one, else with special tokens."""
        if self.chat_template is None:
            return self.encode(text, add_special_tokens=True)
        return self.encode_chat([{"role": "user", "content": text}])

    def _special_texts(self) -> dict[str, str]:
        special = self.special_tokens
        ids = {
            "bos_token": special.bos,
            "pad_token": special.pad,
            "eos_token": special.eos[0] if special.eos else None,
        }
        return {
            name: text
            for name, token in ids.items()
            if token is not None and (text := self._tokenizer.id_to_token(token)) is not None
        }

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises InputError for an id outside of the model's vocabulary."""
        self._check_ids(tokens)
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token by itself, as far as it has one: for showing a canvas.

        Models pad their vocabulary: an id without a token shows as a replacement character.
        """
        self._check_ids(tokens)
        return [
            REPLACEMENT
            if self._tokenizer.id_to_token(token) is None
            else self._tokenizer.decode([int(token)], skip_special_tokens=False)
            for token in tokens
        ]

    def _check_ids(self, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens):
            if not 0 <= token < self.vocabulary_size:
                raise InputError(
                    f"token {position} has id {token}, the vocabulary ends at "
                    f"{self.vocabulary_size - 1}; use the tokenizer that belongs to the model"
                )


def open_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokenizer of a bundle. Raises InputError if the bundle has none, or the wrong one."""
    manifest = bundle.manifest
    if manifest.tokenizer is None:
        raise InputError(
            f"{bundle.folder} was exported without a tokenizer; give token ids, or export a "
            "checkpoint that has a tokenizer.json"
        )
    files = TokenizerFiles(bundle.path(manifest.tokenizer.file), manifest.tokenizer.chat_template)
    return files.open(manifest.model.vocabulary_size, manifest.special_tokens)


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], special_texts: Mapping[str, str]
) -> str:
    """A conversation as text, with the opening of the model's turn.

    Raises InputError for a template that is not valid, fails, or refuses the conversation.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            **special_texts,
        )
    except UserError:
        raise
    except Exception as error:
        kind = "is not valid" if isinstance(error, jinja2.TemplateSyntaxError) else "fails"
        raise InputError(
            f"the model's chat template {kind} ({error}); fetch the tokenizer's files again"
        ) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    # As transformers: Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise InputError(f"the model's chat template refuses the conversation ({message}); change it")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again")
    return value
