"""Check for chat template markers inside text, placeholders and refusals.

A tokenizer turns the name of a special token in raw text or in an assistant's turn into one special
id. The id ends the turn or starts a new turn in the middle of the message. In an answer, the model
learns to stop or to speak for the user at that point (:data:`SPECIAL`). In all other turns of a
conversation, ``luthier.data.conversations.tokenization`` breaks the names of special tokens
(:data:`AS_TEXT`). If the model's format is known, the check finds exactly the strings that become
special ids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.content_parts import IMAGE_WORD
from luthier.data.conversations.tokenization import special_tokens
from luthier.gate.batch_text import JoinedTexts, SpotCheck, Spots
from luthier.gate.check import CheckContext, RowBatch
from luthier.gate.rules import Rule
from luthier.types import Row, Text

SPECIAL = Rule(
    "marker.special_token",
    "error",
    "The text contains a string that the tokenizer turns into a special token.",
    "The special token ends the turn, and the model learns to stop in the middle of an answer.",
    "Remove the string. If the row is rendered with a template, write the turns as messages.",
)
AS_TEXT = Rule(
    "marker.special_text",
    "note",
    "A turn of the user or the system contains the name of a special token.",
    "The name is tokenized as text, in training and inference, and does not end the turn.",
    "Keep the name. If the row is rendered with a template, write the turns as messages.",
)
TEMPLATE = Rule(
    "marker.other_template",
    "warning",
    "The text contains markers of another chat template, which are plain text for the model.",
    "The row is rendered for another model. The model learns to write the markers.",
    "Write the turns as messages; luthier applies the model's template.",
)
ROLE = Rule(
    "marker.role_prefix",
    "warning",
    "The answer begins with a role name.",
    "The template already writes the role; the model learns to write the name again.",
    "Remove the name from the answer.",
)
PLACEHOLDER = Rule(
    "marker.placeholder",
    "warning",
    "The text contains a placeholder.",
    "The model learns to answer with the placeholder.",
    "Replace the placeholder, or remove the row.",
)
IMAGE = Rule(
    "marker.image",
    "warning",
    "The text contains the mark of an image, and the row has no image.",
    "The model learns the mark as letters, without the image.",
    'Write the path under "image", or name the column with `data.columns.image=COLUMN`.',
)
REFUSAL = Rule(
    "marker.refusal",
    "note",
    "The answer is a refusal, or mentions being a language model.",
    "The model learns refusals like any answer; a few percent of the rows suffice.",
    "Remove the row, unless the refusal is intended.",
)

_TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|user|assistant|system|end|eot_id|eom_id|begin_of_text"
    r"|end_of_text|start_header_id|end_header_id|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|prompter"
    r"|endofprompt|channel|message|start|return)\|>"
    r"|<[|｜](?:User|Assistant|begin▁of▁sentence|end▁of▁sentence)[|｜]>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS)\]"
    r"|</s>|<s>|<bos>|<eos>"
    # Looking back behind the first character leaves the search to that character, which is fast.
    r"|#(?<![^\n]#)## ?(?:Instruction|Response|Input|Human|Assistant|User):"
    r"|H(?<=\n\nH)uman: |A(?<=\n\nA)ssistant: "
    r"|U(?<![^\n]U)SER: |A(?<![^\n]A)SSISTANT: "
)
_STRUCK = re.compile(r"<s>[^<\n]{1,200}</s>")
"""Struck-through text of HTML, which is not a marker."""
_ROLE = re.compile(
    r"\s*(?:[*#<\[]{0,3})(?:assistant|ai|bot|chatbot|chatgpt|gpt|gpt-4|model|system|user|human|trợ lý"
    r"|người dùng)(?:[*>\]]{0,3}) ?[:：]",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"{(?<![\\\w}^_{]{){ ?[A-Za-z_][A-Za-z0-9_ ]{0,40} ?}}(?!})"
    r"|[\[<](?:[Ii]nsert|INSERT|[Yy]our|YOUR|[Ee]nter|ENTER)[ _-][A-Za-z' _-]{2,40}[\]>]"
    r"|\[(?:Name|NAME|Date|DATE|Company(?: Name)?|Recipient(?:'s Name)?|Address|placeholder"
    r"|PLACEHOLDER)\]"
    r"|T(?<![^\n]T)(?:ODO|BD)\b[:.]?(?=\s|$)|F(?<![^\n]F)IXME\b[:.]?(?=\s|$)"
    r"|L(?=orem [Ii]psum)orem .psum|l(?=orem ipsum)orem ipsum"
)
_IMAGE = re.compile(re.escape(IMAGE_WORD))
_REFUSAL = re.compile(
    r"as an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)"
    r"|as a (?:large )?language model"
    r"|^\W{0,3}(?:i'?m|i am) (?:sorry|afraid),? (?:but )?(?:i|as an?|that i) "
    r"(?:can(?:no|'|’)t|am (?:not able|unable)|ai |do not have|don't have)"
    r"|^\W{0,3}(?:sorry|unfortunately),? (?:but )?i (?:can(?:no|'|’)t|am (?:not able|unable))"
    r"|^\W{0,3}i (?:can(?:no|'|’)t|am unable to) (?:assist|help|provide|fulfil|comply|answer)"
    r"|là một (?:mô hình ngôn ngữ|trợ lý ai|ai)"
    r"|^\W{0,3}(?:tôi )?(?:rất )?xin lỗi,? (?:nhưng )?tôi không thể",
    re.IGNORECASE,
)
_HINTS = (
    "model",
    "assistant",
    "sorry",
    "afraid",
    "unfortunately",
    "i can",
    "i am unable",
    "xin lỗi",
    "là một",
)
"""Strings of which every refusal has at least one. Substring search is faster than the pattern."""
_OPENING = 300
"""Length of the beginning of an answer that is searched for a refusal, in characters."""


class Markers(SpotCheck):
    """Looks for special tokens, template marks, placeholders and refusals."""

    name: ClassVar[str] = "markers"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        SPECIAL, AS_TEXT, TEMPLATE, ROLE, PLACEHOLDER, IMAGE, REFUSAL,
    )  # fmt: skip
    measures_with: ClassVar[tuple[str, ...]] = ("tokenizer", "special", "_special", "breaks")

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check with the special tokens of the base model, if given."""
        return cls(
            context.chat if context.chat is not None and context.chat.has_tokenizer else None
        )

    def __init__(self, chat: ChatFormat | None = None) -> None:
        super().__init__()
        self.tokenizer = None if chat is None else chat.tokenizer
        self.special = {} if chat is None else special_tokens(chat.tokenizer)
        self.breaks = chat is not None and chat.template.kind == "chat" and chat.decoder is None
        names = sorted(self.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def measure(self, batch: RowBatch) -> Spots:
        """Look through a batch."""
        joined = JoinedTexts.of(batch)
        marks: Counter[str] = Counter()
        found = list(self._find_reserved(joined))
        owners = [joined.at(start) for start, _, _ in found]
        broken = [self.breaks and _is_prompt(batch.rows[index], text) for index, text, _ in owners]
        special = [each for each, is_broken in zip(found, broken, strict=True) if not is_broken]
        asked = [each for each, is_broken in zip(found, broken, strict=True) if is_broken]
        templates = list(self._foreign(joined.text, {start for start, _, _ in found}))
        marks.update(what for _, _, what in found + templates)
        spots = joined.spots(SPECIAL, special) + joined.spots(AS_TEXT, asked)
        spots += joined.spots(TEMPLATE, templates)
        named = ((*match.span(), match[0]) for match in _PLACEHOLDER.finditer(joined.text))
        spots += joined.spots(PLACEHOLDER, named)
        images = ((*match.span(), match[0]) for match in _IMAGE.finditer(joined.text))
        spots += joined.spots(IMAGE, images)
        roles, refusals, answers = [], [], set()
        for start, (index, text) in zip(joined.starts, joined.owners, strict=True):
            if text.part != "target" or text.field == "text":
                continue  # Raw text and partners of pairs answer nothing.
            answers.add(index)
            role = _ROLE.match(text.content)
            if role:
                roles.append((start, start + role.end(), f"{role[0].strip()!r} at the start"))
            refusal = _refusal(text.content)
            if refusal:
                at = start + refusal.start()
                refusals.append((at, start + refusal.end(), f'"{refusal[0].strip()}"'))
        spots += joined.spots(ROLE, roles) + joined.spots(REFUSAL, refusals)
        return Spots(spots, {"marks": marks, "answers": Counter(answers=len(answers))})

    def _find_reserved(self, joined: JoinedTexts) -> Iterator[tuple[int, int, str]]:
        if self._special is None:
            return
        judged: dict[int, bool] = {}
        for match in self._special.finditer(joined.text):
            _, text, offset = joined.at(match.start())
            start = match.start() - offset
            if start not in judged:
                judged[start] = self._is_encoded(text.content)
            if judged[start]:
                yield *match.span(), match[0]

    def _is_encoded(self, content: str) -> bool:
        """Return True if the tokenizer turns a part of ``content`` into a special id."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(content, add_special_tokens=False)
        return not set(self.special.values()).isdisjoint(ids)

    def _foreign(self, joined: str, taken: set[int]) -> Iterator[tuple[int, int, str]]:
        for match in _TEMPLATE.finditer(joined):
            start, end = match.span()
            if start in taken or match[0] in self.special:
                continue
            low = max(0, start - 210)
            if match[0] in ("<s>", "</s>") and any(
                low + struck.start() <= start < low + struck.end()
                for struck in _STRUCK.finditer(joined[low : end + 210])
            ):
                continue
            yield start, end, match[0].strip()

    def summary(self) -> Mapping[str, Any]:
        """Return the rows that break each rule, the frequent markers and the share of refusals."""
        answers = self.counts["answers"].total()
        return {
            "rows": self.rows_by_rule(),
            "marks": self.count("marks"),
            "refusal_share": round(self.rows[REFUSAL.id] / answers, 4) if answers else 0.0,
        }


def _is_prompt(row: Row, text: Text) -> bool:
    """Return True if ``text`` belongs to a turn of the user or the system."""
    if text.part != "input" or not row.turns():
        return False
    name, is_turn, rest = text.field.partition("[")
    return not is_turn or getattr(row, name)[int(rest.split("]")[0]) - 1].role != "assistant"


def _refusal(answer: str) -> re.Match[str] | None:
    opening = answer[:_OPENING].lower()
    if not any(hint in opening for hint in _HINTS):
        return None
    return _REFUSAL.search(answer, 0, _OPENING)
