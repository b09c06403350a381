"""A server with real models, small and untrained: what they say is noise, and all that is around it is as it will be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from minga.config.presets import tiny
from minga.data.tokenizer import DEFAULT_SPECIALS, train_bpe
from minga.engine.llm import LLM
from minga.model.transformer import Transformer
from minga.serve.app import create_app
from minga.serve.service import Settings
from tests.serve import conftest

CONTEXT = 4096
THOUGHT, CALL = ("<think>", "</think>"), ("<|tool_call|>", "<|tool_args|>", "<|tool_end|>")
# A model that thinks where it is told to.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if thinking is defined and thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)


def untrained(*, markers: bool = False) -> LLM:
    """A model that chats, calls tools in Hermes' way and never ends by itself; with markers: in Minga's way, and it can think."""
    words = json.dumps({"type": "function", "function": {"name": "weather", "description": "city", "parameters": {}}})
    words += "You can call these functions: <tools> To call one, write its name and its arguments, a JSON object. "
    specials = (*DEFAULT_SPECIALS, *((*THOUGHT, *CALL) if markers else ()))  # tokens 0, 1, ..
    tokenizer = train_bpe([words * 4], 320, specials=specials)
    if markers:
        tokenizer.chat_template = THINKING
    config = tiny().replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(3))
    with (
        torch.no_grad()
    ):  # one number of every state is large: by it, markers never come but where a grammar wants them
        model.model.embed_tokens.weight[:, 0] = 10
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[: len(specials), 0] = -5
        model.lm_head.weight[tokenizer.encode("".join(THOUGHT), specials=True) if markers else [], 0] = -10
    return LLM.from_parts(model, tokenizer)


def serving(models: Mapping[str, LLM], runs_dir: Path, settings: Settings | None = None) -> AbstractContextManager[str]:
    """The address of a server with these models."""
    return conftest.serving(create_app(models, runs_dir, settings))
