"""What is written down of the rows that a model learned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from luthier.engine.dataset import loss_mask, prepare
from luthier.objectives import OBJECTIVES
from luthier.recipe import DataSpec
from luthier.store.models import chat_format, find

TURNS = (
    (("user", "Colour of snow?"), ("assistant", "White.")),
    (
        ("user", "Of the sky?"),
        ("assistant", "Blue."),
        ("user", "At night?"),
        ("assistant", "Black."),
    ),
    (("system", "Be brief."), ("user", "Of coal?"), ("assistant", "Black, too.")),
)


def test_the_mask_says_that_replies_are_learned_whole_and_nothing_else(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in TURNS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = chat_format(find(str(tiny_model_folder)))
    spec = DataSpec(train=data, validation_share=0)
    made = prepare(spec, OBJECTIVES["sft"](), chat, 256, 0)
    mask = made.mask
    assert mask is not None
    replies = [text for turns in TURNS for role, text in turns if role == "assistant"]
    assert (mask.stretches, mask.behind_opening, mask.with_stop) == (4, 4, 4)
    learned = [
        chat.tokenizer.decode(each.ids_T[each.weight_T > 0], skip_special_tokens=False)
        for each in made.train
    ]
    stop = chat.tokenizer.decode([chat.stop_ids[0]])
    assert "".join(learned).count(stop) == 4 and "Colour" not in "".join(learned)
    assert all(reply in "".join(learned) for reply in replies)
    digest = hashlib.sha256(b"".join(e.ids_T.tobytes() + e.weight_T.tobytes() for e in made.train))
    assert mask.sha256 == digest.hexdigest()


def test_a_mask_that_is_off_by_one_token_shows(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": f"a{n}"}) + "\n" for n in range(5))
    )
    chat = chat_format(find(str(tiny_model_folder)))
    train = prepare(
        DataSpec(train=data, validation_share=0), OBJECTIVES["sft"](), chat, 256, 0
    ).train
    assert len(chat.reply_opening()) > 0
    early = [replace(each, weight_T=np.roll(each.weight_T, -1)) for each in train]
    found, shifted = loss_mask(train, chat), loss_mask(early, chat)
    assert found is not None and shifted is not None and found.sha256 != shifted.sha256
    assert (found.behind_opening, found.with_stop) == (5, 5)
    assert (shifted.behind_opening, shifted.with_stop) == (0, 0)
    nothing = [replace(each, weight_T=np.zeros_like(each.weight_T)) for each in train]
    assert loss_mask(nothing, chat) is None
