"""Chats by a model's template, which may be hostile; and which tokens of them count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.activations.harvest import harvest
from sae.activations.loader import ActivationLoader
from sae.errors import CacheError, DataError
from sae.model.language_model import LanguageModel
from sae.text.chat import ChatTemplate
from sae.text.document import Chat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
TRIMMED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
LAST_ONLY = "{% for m in messages %}{{ m.role if loop.last else '' }}:{{ m.content }};{% endfor %}"
TALK = Chat(
    (
        {"role": "system", "content": "user"},
        {"role": "user", "content": "What is 2 + 2? \n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": " 4, as before: 4"},
    )
)


class FakeTokenizer:
    special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, template: str | None) -> None:
        self.template = template

    def get_chat_template(self) -> str:
        if self.template is None:
            raise ValueError("no template")
        return self.template


@pytest.mark.parametrize("template", [CHATML, TRIMMED, LAST_ONLY])
def test_the_spans_are_the_contents_of_the_roles(template: str) -> None:
    renderer = ChatTemplate(FakeTokenizer(template))
    try:
        for roles in (["assistant"], ["user"], ["system", "assistant"]):
            chat = renderer.render(TALK, "a:1", roles)
            assert [chat.text[start:end].strip() for start, end in chat.spans] == [
                message["content"].strip() for message in TALK.messages if message["role"] in roles
            ]
        assert renderer.render(TALK, "a:1").spans == ((0, len(chat.text)),)
    finally:
        renderer.close()
    if template == TRIMMED:
        assert chat.text.startswith("<s>[system] user\n[user] What is 2 + 2?\n[assistant] 4\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took more than 1 s"),
        ("{{ 'x' * 10 ** 10 }}", "too much memory"),
        ("{{ messages[0].__class__.__mro__[1].__subclasses__() }}", "refuses it"),
        ("{{ raise_exception('roles must\nalternate') }}", r"refuses it \(roles must alternate\)"),
        pytest.param("{{ 'x' * 80000000 }}", "gives more than 64 MB", marks=pytest.mark.slow),
    ],
)
def test_hostile_templates_end_in_one_line(template: str, message: str) -> None:
    renderer = ChatTemplate(FakeTokenizer(template), seconds=1.0 if "range" in template else 600.0)
    try:
        with pytest.raises(DataError, match=message) as caught:
            renderer.render(TALK, "a:1")
    finally:
        renderer.close()
    assert "\n" not in str(caught.value)


def test_no_template() -> None:
    with pytest.raises(DataError, match="the model's tokenizer has no chat template: take a chat model, or give"):
        ChatTemplate(FakeTokenizer(None))


@pytest.fixture
def chat_model(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr(
        language_model.tokenizer, "chat_template", TRIMMED.replace("{{ bos_token }}", ""), raising=False
    )
    return language_model


@pytest.mark.slow
def test_roles_that_no_chat_has_are_refused_before_the_model_reads_them(
    tiny_config: Any, chat_model: LanguageModel, tmp_path: Path
) -> None:
    chats = [[{"role": role, "content": f"river {n}"} for role in ("user", "assistant", "user")] for n in range(300)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"m": chat}) + "\n" for chat in chats))
    settings = {
        "data__source": str(tmp_path / "c.jsonl"), "data__column": "m", "data__tokens": 600,
        "data__held_out_tokens": 100,
    }  # fmt: skip
    message = r"^chats have the roles user, assistant; data.chat_roles=\[asistant, bot\] names none of them: name at"
    with pytest.raises(DataError, match=message):
        harvest(tiny_config(data__chat_roles=["asistant", "bot"], **settings), chat_model)
    harvest(tiny_config(data__chat_roles=["asistant", "user"], **settings), chat_model)


def test_only_the_chosen_roles_count_everywhere(tiny_config: Any, chat_model: LanguageModel, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"the river {n}"}, {"role": "assistant", "content": f"keeps {n} stone houses"}]
        for n in range(300)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"m": chat}) + "\n" for chat in chats))
    config = tiny_config(
        data__source=str(tmp_path / "c.jsonl"), data__column="m", data__chat_roles="assistant", data__tokens=600,
        data__held_out_tokens=100,
    )  # fmt: skip
    cache = harvest(config, chat_model)
    assert cache.manifest.tokens["chat_roles"] == ["assistant"]
    assert cache.manifest.data["chats"] > 20
    eligible = torch.cat([cache.eligible_shard("train", number) for number in range(cache.shards("train"))])
    tokens = torch.cat([cache.token_shard("train", number)[0] for number in range(cache.shards("train"))])
    counted = chat_model.tokenizer.decode(tokens[eligible].tolist())
    assert "keeps" in counted
    assert not {"user", "assistant", "river", "the", "["} & set(counted.replace("]", " ").split())
    assert cache.statistics(cache.hooks[0]).tokens == int(eligible.sum()) < 400
    assert ActivationLoader(cache, cache.hooks[0], batch_size=8).tokens_per_epoch == int(eligible.sum())
    seen = torch.cat([batch.eligible.flatten() for batch in cache.contexts("train")])
    assert torch.equal(seen, eligible)
    with pytest.raises(CacheError, match=r"made with data.chat_roles=\['assistant'\], now None is asked for"):
        harvest(config.model_copy(update={"data": config.data.model_copy(update={"chat_roles": None})}), chat_model)
