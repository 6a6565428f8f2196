"""Whether a base model that writes knows the language that the rows are in.

Some rows are read before anything is trained, beside plain English: their bits a character compare
whatever the tokenizer (Mielke et al. 2019, "What Kind of Language Is Hard to Language-Model?",
arXiv:1906.04726). The tokenizer alone (``base.language`` of the gate) cannot tell that the weights
never saw a language whose words it keeps whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.data.shapes.texts import RawText
from luthier.gate.checks.base_language import ENGLISH
from luthier.gate.language_identification import detect_languages
from luthier.objectives.causal_lm import CausalLM
from luthier.objectives.means import mean_loss

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network
    from luthier.types import Example

UNFAMILIAR = 2.5
"""Times the bits of plain English from which a base hardly knows a text (docs/log/defaults.md). Of
SmolLM2: replies and articles 0.8 to 1.4, text messages 2.2, Vietnamese 2.8 to 3.2."""
LEAST = 0.6
"""Bits a character of plain English below which it tells nothing: the sample was learned by heart."""
ROWS, CHARACTERS, LEAST_CHARACTERS = 12, 240, 400
"""Rows that are read, characters of each, and how many letters must come together."""
LEAST_LETTERS = 0.6
"""Share of the characters that must be letters: numbers and logs surprise any model."""
BUDGET = 1024


def find_unfamiliar_text(
    network: Network, chat: ChatFormat, examples: Sequence[Example]
) -> str | None:
    """What to say where the texts of ``examples`` cost the network far more than English does.

    ``None`` where they do not, are English themselves, or are too few, and for networks that do not go
    on with a text, such as encoders.
    """
    if network.both_ways or chat.start_id is not None or not examples:
        return None
    chosen = examples[:: max(1, len(examples) // ROWS)][:ROWS]
    texts = [chat.tokenizer.decode(each.ids_T, skip_special_tokens=True) for each in chosen]
    # The end is what the rows teach; a conversation begins with a template and a system prompt.
    texts = [text.strip()[-CHARACTERS:] for text in texts]
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    if letters < max(LEAST_CHARACTERS, LEAST_LETTERS * sum(map(len, texts))):
        return None
    # English of a style of its own is what tuning teaches: no other base is the answer.
    if detect_languages([" ".join(texts)]) == ["en"]:
        return None
    longest = max(map(len, chosen))  # what is known to fit the network
    rows, english = (
        bits_per_character(network, chat, each, longest) for each in (texts, [ENGLISH])
    )
    if rows < UNFAMILIAR * max(english, LEAST):
        return None
    return (
        f"before training, the base model needs {rows:.1f} bits for a character of the rows and "
        f"{english:.1f} for one of plain English: it hardly knows their language or kind of text. If "
        "they are in a language that another base was trained on, start from that one: `--base ID`"
    )


def bits_per_character(
    network: Network, chat: ChatFormat, texts: Sequence[str], longest: int
) -> float:
    """Bits that the network needs for each character of ``texts``, the first token of each left out.

    Texts are cut to ``longest`` tokens.
    """
    objective = CausalLM()
    rows = [RawText(file="", line=0, text=text) for text in texts if text.strip()]
    whole = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    examples = [objective.truncate(each, longest) for each in whole if len(each) > 1]
    decoded = [chat.decode_tokens(example.ids_T[1:].tolist()) for example in examples]
    tokens = sum(len(example) - 1 for example in examples)
    nats = mean_loss(objective, network, examples, BUDGET) * tokens
    return nats / math.log(2) / max(1, sum(map(len, decoded)))
