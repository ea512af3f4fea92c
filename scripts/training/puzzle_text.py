"""What the demo models read and write: vocabulary, tokenizer, chat template, puzzles as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.host.puzzles import Puzzle, generate
from quantize.files.durable import write_json

CANVAS_LENGTH = 20
PROMPT_LENGTH = 30
"""Tokens of the longest rendered prompt."""
ROWS_PER_STEP = {"sudoku": 104, "add": 104, "sort": 48}
"""Rows of each puzzle kind in one optimizer step."""
PURE_NOISE_SHARE = 0.4
"""Share of canvases (or blocks) that are all noise, as they are when sampling starts."""

PAD, EOS, BOS, UNKNOWN, TURN_START, TURN_END = range(6)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
WORDS = ["user", "model", "system", "sudoku", "sort", "add"]
CHARACTERS = list("0123456789+-=.,?/ \n") + [chr(code) for code in range(ord("a"), ord("z") + 1)]
UNUSED = [f"<unused{n}>" for n in range(64 - len(SPECIAL + WORDS + CHARACTERS))]
VOCABULARY = SPECIAL + WORDS + CHARACTERS + UNUSED

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """Return the 64-token `tokenizers.Tokenizer`: whole words where known, else characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(VOCABULARY)},
            merges=[],
            unk_token="<unk>",
            ignore_merges=True,
        )
    )
    pattern = "|".join(WORDS) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL + UNUSED]
    )
    return tokenizer


def render(prompt: str) -> str:
    """Render one user turn and the opening of the model's turn as the chat template does."""
    return f"<bos><|turn>user\n{prompt}<turn|>\n<|turn>model\n"


def write_companions(folder: Path, **sampler: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    sampler: entries of generation_config.json beyond the tokens.
    """
    build_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<turn|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": [EOS, TURN_END],
        "pad_token_id": PAD,
        "max_new_tokens": CANVAS_LENGTH,
    }
    write_json(folder / "generation_config.json", generation | sampler)


def puzzles_of_step(seed: int, step: int, scale: float = 1.0) -> list[Puzzle]:
    """The puzzles of one optimizer step, `scale` times `ROWS_PER_STEP`.

    A function of seed and step only, so that a run can resume.
    """
    return [
        puzzle
        for kind, rows in ROWS_PER_STEP.items()
        for puzzle in generate(kind, max(1, round(rows * scale)), seed=step_seed(seed, step))
    ]


def step_seed(seed: int, step: int) -> int:
    """The seed of what is drawn for one step of a run."""
    return seed * 10_000_019 + step


def tensors(puzzles: list[Puzzle], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts [B, P] (right-padded), their lengths [B] and clean canvases [B, T]."""
    encoded = tokenizer.encode_batch([render(puzzle.prompt) for puzzle in puzzles])
    answers = tokenizer.encode_batch([puzzle.answer + "<turn|>" for puzzle in puzzles])
    prompts = torch.full((len(puzzles), PROMPT_LENGTH), PAD)
    clean = torch.full((len(puzzles), CANVAS_LENGTH), PAD)
    for row, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
        prompts[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        clean[row, : len(answer.ids)] = torch.tensor(answer.ids)
    return prompts, torch.tensor([len(prompt.ids) for prompt in encoded]), clean
