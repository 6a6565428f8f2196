"""Templates and tokenizers with limits: the same answers, and nothing that takes all there is."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from thinking_models import IS_OPENED
from tokenizers import AddedToken

from luthier.data.chat import ChatFormat
from luthier.data.reasoning import DecodedReply
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.texts import TaggedWords
from luthier.errors import RecipeError
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.reward_model import RewardModel
from luthier.objectives.token_classification import TokenClassification
from luthier.serving import sandboxed_text
from luthier.serving.sandboxed_text import SandboxedFormat, sandboxed_format
from luthier.types import Message

TEXTS = ["Hello.", "", "Grüße, 世界 🎻!\n\n  two  spaces", "\ud800 alone", "a" * 5000]


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path) -> ChatFormat:
    return load_chat_format(tiny_model_folder)


@pytest.fixture(scope="module")
def limited(tiny_model_folder: Path) -> Iterator[SandboxedFormat]:
    chat = sandboxed_format(tiny_model_folder)
    yield chat
    chat.close()


@pytest.fixture
def hostile(tiny_model_folder: Path, tmp_path: Path) -> Iterator[Callable[..., SandboxedFormat]]:
    """``hostile(template=…, tokenizer=…)``: a model whose template or tokenizer.json is another."""
    opened: list[SandboxedFormat] = []

    def made(
        template: str | None = None, tokenizer: Callable[[Any], None] | None = None
    ) -> SandboxedFormat:
        folder = tmp_path / f"model-{len(opened)}"
        shutil.copytree(tiny_model_folder, folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if tokenizer is not None:
            path = folder / "tokenizer.json"
            fields = json.loads(path.read_text())
            tokenizer(fields)
            path.write_text(json.dumps(fields))
        opened.append(sandboxed_format(folder))
        return opened[-1]

    yield made
    for chat in opened:
        chat.close()


def alive(chat: SandboxedFormat) -> int:
    """Id of the process at work for it."""
    child = chat.tokenizer._child
    assert child is not None
    return child.pid


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_is_told_apart_as_elsewhere(
    special: bool, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = new_tokenizer(IS_OPENED)
    tokenizer.add_tokens([AddedToken(m, special=special) for m in ("<think>", "</think>")], special)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    plain, limited = load_chat_format(tmp_path), sandboxed_format(tmp_path)
    ids = plain.tokens("hm\n</think>\n\nblue", first=False).tolist()
    prompt_T = plain.encode_prompt([Message("user", "sky?")])
    for chat in (plain, limited):
        marks = chat.reasoning_marks
        assert marks is not None and (marks.open, marks.close) == ("<think>", "</think>")
        assert [marks.open_id, marks.close_id] == [320, 321]
        assert chat.decode(ids) == "hm\n</think>\n\nblue"
        assert chat.decode_reply(prompt_T, ids) == DecodedReply("hm", "blue")
    limited.close()


def test_a_template_that_takes_too_much_has_no_marks(
    hostile: Callable[..., SandboxedFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandboxed_text, "SECONDS", 1)
    chat = hostile(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}</think>"
    )
    assert chat.reasoning_marks is None
    assert not chat.tokenizer.alive
    assert chat.reasoning_marks is None and not chat.tokenizer.alive  # it is not tried again


class TestItIsTheSame:
    def test_settings(self, plain: ChatFormat, limited: SandboxedFormat) -> None:
        assert (limited.template, limited.stop_ids, limited.start_id) == (
            plain.template,
            plain.stop_ids,
            plain.start_id,
        )
        assert limited.tokenizer.chat_template == plain.tokenizer.chat_template
        assert limited.tokenizer.vocab_size == plain.tokenizer.vocab_size

    @pytest.mark.parametrize("text", TEXTS)
    def test_texts(self, plain: ChatFormat, limited: SandboxedFormat, text: str) -> None:
        def read(chat: ChatFormat) -> Any:
            try:
                ids_T, word_T = chat.encode_words(text)
                raw = chat.with_template("plain").encode_prompt([Message("user", text)])
            except (RecipeError, TypeError, UnicodeEncodeError):
                return "refused"
            assert word_T is not None
            found = [ids_T.tolist(), word_T.tolist(), raw.tolist()]
            return [*found, chat.decode(found[0]), chat.pieces(found[0])]

        assert read(limited) == read(plain)

    @pytest.mark.parametrize("objective", [TokenClassification(), RewardModel()])
    def test_rows_of_objectives_that_ask_the_tokenizer(
        self, plain: ChatFormat, limited: SandboxedFormat, objective: Any
    ) -> None:
        row = (
            TaggedWords("rows", 1, ("Anna", "lives"), None)
            if objective.task == "token_classification"
            else PromptCompletion("rows", 1, "Hi", "Hello")
        )
        ours, theirs = (objective.encode(row, 0, chat) for chat in (limited, plain))
        np.testing.assert_array_equal(ours.ids_T, theirs.ids_T)
        np.testing.assert_array_equal(ours.weight_T, theirs.weight_T)

    def test_conversations(self, plain: ChatFormat, limited: SandboxedFormat) -> None:
        turns = [Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why 'x'?")]
        np.testing.assert_array_equal(limited.encode_prompt(turns), plain.encode_prompt(turns))
        ours, theirs = limited.encode_reply(turns[:2]), plain.encode_reply(turns[:2])
        np.testing.assert_array_equal(ours.ids_T, theirs.ids_T)
        np.testing.assert_array_equal(ours.learned_T, theirs.learned_T)

    def test_what_a_request_says_of_the_template(
        self, hostile: Callable[..., SandboxedFormat]
    ) -> None:
        chat, turns = hostile("{{ messages[0].content }}{{ who }}"), [Message("user", "Hi ")]
        assert chat.prompt_text(turns, (), {"who": "you", "chat_template": "x"}) == "Hi you"

    def test_what_the_template_refuses(self, hostile: Callable[..., SandboxedFormat]) -> None:
        chat = hostile("{{ raise_exception('only users speak') }}")
        with pytest.raises(RecipeError, match="refuses this conversation: only users speak"):
            chat.encode_prompt([Message("user", "Hi")])

    def test_grammars(self, plain: ChatFormat, limited: SandboxedFormat) -> None:
        size = plain.tokenizer.vocab_size
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string"}, "kind": {"enum": ["alpha", "beta"]}},
            "required": ["name", "kind"],
        }
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        one, two = (LLMatcher(chat.grammar_tokens(size), grammar) for chat in (plain, limited))
        generator = np.random.default_rng(0)
        for _ in range(40):
            bits = one.compute_bitmask()
            assert two.compute_bitmask() == bits
            allowed = np.flatnonzero(
                np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
            )
            token = int(generator.choice(allowed))
            one.consume_token(token), two.consume_token(token)
            if one.is_stopped():
                break
        assert not one.is_error() and not two.is_error()


def doubling(fields: dict[str, Any]) -> None:
    """A normalizer that makes 2^40 letters of one."""
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    fields["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 40}


def backtracking(fields: dict[str, Any]) -> None:
    """A pattern whose time grows exponentially with the text."""
    fields["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a|a|aa)+$"},
        "behavior": "Isolated",
        "invert": False,
    }


def shouting(fields: dict[str, Any]) -> None:
    """A decoder that makes 2^16 letters of one."""
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    fields["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteLevel", **_LEVEL}] + [twice] * 16,
    }


_LEVEL = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}


class TestNothingTakesAllThereIs:
    @pytest.fixture(autouse=True)
    def _little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxed_text, "SECONDS", 2)

    @pytest.mark.slow
    def test_loops_are_ended(self, hostile: Callable[..., SandboxedFormat]) -> None:
        nested = "{% for a in range(99999) %}" * 4 + "{% set x = a %}" + "{% endfor %}" * 4
        chat = hostile("{% if messages[0].content == 'now' %}" + nested + "{% endif %}fine")
        before = alive(chat)
        with pytest.raises(RecipeError, match="takes more than 2 seconds of processor time"):
            chat.encode_prompt([Message("user", "now")])
        assert not Path(f"/proc/{before}").exists()
        assert chat.decode(chat.encode_prompt([Message("user", "later")]).tolist()) == "fine"
        assert alive(chat) != before

    @pytest.mark.parametrize(
        "template",
        [
            "{{ 'a' * 4000000000 }}",
            "{% set n = namespace(x='aaaaaaaa') %}"
            "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "{{ 'a' * 200000000 }}",
            "{{ ['a'] * 900000000 }}",
            "{{ 9 ** (9 ** 9) }}",
        ],
    )
    def test_large_texts_are_refused(
        self, hostile: Callable[..., SandboxedFormat], template: str
    ) -> None:
        chat = hostile(template)
        with pytest.raises(
            RecipeError, match=r"GiB of memory|larger than|over 32 MiB|takes more than|fails"
        ):
            chat.encode_prompt([Message("user", "Hi")])

    @pytest.mark.parametrize("faulty", [doubling, backtracking])
    def test_tokenizers_are_ended(
        self, hostile: Callable[..., SandboxedFormat], faulty: Callable[[Any], None]
    ) -> None:
        chat = hostile(tokenizer=faulty)
        with pytest.raises(RecipeError, match=r"template or tokenizer|cannot take this text"):
            chat.encode_whole("a" * 100_000 + "!")
        assert len(chat.encode_whole("b"))

    def test_few_tokens_do_not_become_much_text(
        self, hostile: Callable[..., SandboxedFormat]
    ) -> None:
        chat = hostile(tokenizer=shouting)
        ids = chat.encode_whole("a").tolist()
        with pytest.raises(RecipeError, match="tokens stand for 65,536 characters"):
            chat.decode(ids)
        with pytest.raises(RecipeError, match="tokens stand for 65,536 characters"):
            chat.pieces(ids)

    def test_templates_themselves_have_a_length(
        self, hostile: Callable[..., SandboxedFormat]
    ) -> None:
        with pytest.raises(RecipeError, match="more than 1,000,000 characters"):
            hostile("{# " + "a" * 1_000_001 + " #}")


class TestTheProcess:
    def test_opens_nothing_and_knows_no_secret(
        self, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LUTHIER_SERVER_KEY", "c2VjcmV0")
        chat = sandboxed_format(tiny_model_folder)
        there = Path(f"/proc/{alive(chat)}")
        limits = {
            line[:25].strip(): line[25:].split()[:2]
            for line in (there / "limits").read_text().splitlines()
        }
        assert limits["Max open files"] == limits["Max file size"] == ["0", "0"]
        assert int(limits["Max address space"][1]) < 4 << 30
        assert "SECRET" not in (there / "environ").read_text().upper()
        assert b"c2VjcmV0" not in (there / "environ").read_bytes()
        chat.close()
        assert not there.exists()

    def test_that_was_killed_is_followed_by_another(self, tiny_model_folder: Path) -> None:
        chat = sandboxed_format(tiny_model_folder)
        expected = chat.encode_whole("Hello.")
        os.kill(alive(chat), 9)
        with pytest.raises(RecipeError, match="ended its process"):
            chat.encode_whole("Hello.")
        np.testing.assert_array_equal(chat.encode_whole("Hello."), expected)
        chat.close()
        with pytest.raises(RecipeError, match="unloaded"):
            chat.encode_whole("Hello.")

    def test_ends_with_the_one_that_started_it(self, tiny_model_folder: Path) -> None:
        chat = sandboxed_format(tiny_model_folder)
        there = Path(f"/proc/{alive(chat)}/stat")
        assert chat.tokenizer._connection is not None
        chat.tokenizer._connection.close()  # as the kernel does when a process is killed
        deadline = time.monotonic() + 20
        while there.exists() and there.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        chat.close()

    def test_answers_threads_in_turns(self, limited: SandboxedFormat) -> None:
        wrong: list[str] = []

        def ask(text: str) -> None:
            for _ in range(50):
                if limited.decode(limited.encode_whole(text).tolist()) != text:
                    wrong.append(text)

        threads = [threading.Thread(target=ask, args=(f"text {i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_says_what_is_wrong_with_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(RecipeError):
            sandboxed_format(tmp_path)
