"""A row that violates each rule of files and rows."""

from __future__ import annotations

from written_rows import CHAT, PAIR, TEXT, USER, chat

from luthier.data.files import parsing

EXAMPLES: list[tuple[str, list[object], int]] = [
    # rule, rows, line
    ("row.unknown_shape", [{"title": "x", "n": 1}], 1),
    ("row.unknown_shape", [{}], 1),
    ("row.unknown_shape", [{"Question": "a", "answer": "b"}], 1),
    ("row.unknown_shape", [{"instruction": "a", "input": "b", "result": "c"}], 1),
    ("row.unknown_shape", [{"input": "b", "target": "c"}], 1),
    ("row.unknown_shape", [{"question": "b"}], 1),
    ("row.ambiguous", [{"instruction": "a", "input": "b", "output": "c", "text": "all of it"}], 1),
    ("row.ambiguous", [{"question": "a", "answer": "b", "response": "c"}], 1),
    (
        "row.mixed_shapes",
        [{"question": "a", "answer": "b"}, {"instruction": "a", "output": "b"}],
        2,
    ),
    ("field.list", [{"user": 7, "items": [1, 2]}, {"user": 8, "items": []}], 2),
    ("field.empty", [{"instruction": "a", "output": ""}], 1),
    ("field.missing", [{"instruction": "a", "output": "b"}, {"instruction": "a"}], 2),
    (
        "message.part",
        [{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}],
        1,
    ),
    (
        "media.count",
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}],
        1,
    ),
    (
        "message.weight",
        [{"messages": [USER, {"role": "assistant", "content": "b", "weight": 0}]}],
        1,
    ),
    ("row.unknown_shape", [{"Text": "x"}], 1),
    ("row.unknown_shape", [{"a": "x", "b": "y"}], 1),
    ("row.unknown_shape", [{f"k{n}": 1 for n in range(12)}], 1),
    ("row.ambiguous", [PAIR | CHAT], 1),
    ("row.ambiguous", [PAIR | CHAT | TEXT], 1),
    ("row.ambiguous", [{"completion": "a", "text": "b"}], 1),
    ("row.mixed_shapes", [b"", PAIR, PAIR, CHAT], 4),
    ("row.mixed_shapes", [CHAT, TEXT], 2),
    ("field.missing", [PAIR, {"prompt": "a"}], 2),
    ("field.type", [{"prompt": "a", "expected": 4}], 1),
    ("row.mixed_shapes", [{"prompt": "a"}, PAIR], 2),
    ("field.missing", [{"completion": "a"}], 1),
    ("field.missing", [{"prompt": "a", "response": "b"}], 1),
    ("field.missing", [{"messages": [{"role": "user"}]}], 1),
    ("field.missing", [{"messages": [USER, {"from": "gpt", "content": "b"}]}], 1),
    ("field.type", [{"prompt": 7, "completion": "a"}], 1),
    ("field.type", [{"prompt": "a", "completion": None}], 1),
    ("field.type", [{"text": True}], 1),
    ("field.type", [{"text": {}}], 1),
    ("field.type", [{"messages": [{"role": "user", "content": ["a"]}]}], 1),
    ("field.type", [{"messages": [{"role": 1, "content": "a"}]}], 1),
    ("field.empty", [{"prompt": "", "completion": "a"}], 1),
    ("field.empty", [{"prompt": "a", "completion": " \n\u2028"}], 1),
    ("field.empty", [{"text": ""}], 1),
    ("field.empty", [chat("user: ", "assistant: a")], 1),
    ("field.empty", [chat("user: a", "assistant: ")], 1),
    ("field.empty", [{"messages": [{"role": "", "content": "a"}]}], 1),
    ("id.duplicate", [PAIR | {"id": "a"}, PAIR, PAIR | {"id": "a"}], 3),
    ("id.duplicate", [PAIR | {"id": 7}, PAIR | {"id": 7}], 2),
    ("messages.type", [{"messages": "hi"}], 1),
    ("messages.type", [{"messages": {"role": "user"}}], 1),
    ("messages.type", [{"messages": ["hi"]}], 1),
    ("tools.type", [{**chat("user: a", "assistant: b"), "tools": [{"description": "c"}]}], 1),
    ("messages.empty", [{"messages": []}], 1),
    ("message.role", [chat("user: a", "bot: b")], 1),
    ("message.role", [chat("Human: a", "assistant: b")], 1),
    ("message.role", [chat("narrator: a")], 1),
    ("message.order", [chat("user: a", "assistant: b", "tool: c", "assistant: d")], 1),
    (
        "message.tool_calls",
        [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}],
        1,
    ),
    (
        "message.tool_calls",
        [
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": "b",
                        "function_call": {"name": "f", "arguments": "["},
                    },
                ]
            }
        ],
        1,
    ),
    ("message.order", [chat("user: a", "user: b", "assistant: c")], 1),
    ("message.order", [chat("system: s", "user: a", "assistant: b", "assistant: c")], 1),
    ("message.order", [chat("assistant: b")], 1),
    ("message.order", [chat("system: s", "assistant: b")], 1),
    ("message.order", [chat("user: a", "system: s", "assistant: b")], 1),
    ("message.order", [chat("system: s", "system: t", "user: a", "assistant: b")], 1),
    ("message.last", [chat("user: a")], 1),
    ("message.last", [chat("user: a", "assistant: b", "user: c")], 1),
    ("message.last", [chat("system: a")], 1),
    ("line.too_long", [TEXT, b'{"text":"%s"}' % (b"x" * parsing.MAX_LINE_BYTES)], 2),
    ("encoding.utf8", [TEXT, b'{"text":"\xe9"}'], 2),
    ("encoding.surrogate", [TEXT, b'{"text":"\\ud83d"}'], 2),
    ("json.invalid", [TEXT, b'{"text":"a",}'], 2),
    ("json.not_object", [TEXT, [1]], 2),
    ("json.duplicate_key", [TEXT, b'{"text":"a","text":"b"}'], 2),
    ("json.not_finite", [TEXT, b'{"text":"a","score":NaN}'], 2),
    ("json.too_deep", [TEXT, b"[" * 100_000], 2),
    ("file.empty", [], 0),
    ("file.binary", [b"\0"], 0),
    ("label.type", [{"text": "x", "label": 1.5}], 1),
    ("media.type", [{"image": 7, "label": "x"}], 1),
    ("media.missing", [{"image": "no.png", "label": "x"}], 1),
    ("media.remote", [{"image": "https://example.org/a.png", "label": "x"}], 1),
    ("media.outside", [{"image": "../a.png", "label": "x"}], 1),
    ("history.type", [{"history": "a", "item": "b"}], 1),
    ("choices.type", [{"prompt": "a", "choices": [], "answer": 0}], 1),
    ("choices.answer", [{"prompt": "a", "choices": ["b"], "answer": 1}], 1),
    ("choices.length", [{"prompt": ["a", "b"], "choices": ["b"], "answer": 0}], 1),
    ("history.item", [{"history": ["a\nb"], "item": "c"}], 1),
    ("label.type", [{"text": "x", "label": {}}], 1),
    ("label.type", [{"text": "x", "label": " "}], 1),
    ("label.type", [{"text": "x", "label": ["a", None]}], 1),
    ("label.duplicate", [{"text": "x", "label": ["a", "a"]}], 1),
    ("rating.type", [{"text": "x", "rating": "4"}], 1),
    ("rating.type", [{"text": "x", "rating": True}], 1),
    ("pair.negative", [{"anchor": "a", "positive": "b", "negatives": [1]}], 1),
    ("pair.negative", [{"anchor": "a", "positive": "b", "negatives": ["c", "b"]}], 1),
    ("pair.negative", [{"anchor": "a", "positive": "Ａ b", "negatives": ["a  B\n"]}], 1),
    ("pair.label", [{"query": "a", "document": "b", "label": 2}], 1),
    ("passages.type", [{"question": "a", "passages": [], "answer": "b", "cited": [1]}], 1),
    ("cited.type", [{"question": "a", "passages": ["b"], "answer": "b", "cited": ["1"]}], 1),
    ("cited.range", [{"question": "a", "passages": ["b"], "answer": "b", "cited": [2]}], 1),
    ("cited.missing", [{"question": "a", "passages": ["b"], "answer": "b", "cited": []}], 1),
    ("cited.declined", [{"question": "a", "passages": ["b"], "answer": None, "cited": [1]}], 1),
    (
        "cited.contradiction",
        [{"question": "a", "passages": ["b", "c"], "answer": "b [2]", "cited": [1]}],
        1,
    ),
    ("answers.type", [{"question": "a", "context": "b", "answers": ["b"]}], 1),
    (
        "answers.impossible",
        [
            {
                "question": "a",
                "context": "b",
                "answers": {"text": ["b"], "answer_start": [0]},
                "is_impossible": True,
            }
        ],
        1,
    ),
    (
        "answers.span",
        [{"question": "a", "context": "b", "answers": [{"text": "c", "answer_start": 0}]}],
        1,
    ),
    ("tags.type", [{"tokens": ["a"]}], 1),
    ("tags.type", [{"tokens": "a b", "tags": ["O"]}], 1),
    ("tags.type", [{"tokens": ["a", ""], "tags": ["O", "O"]}], 1),
    ("tags.type", [{"tokens": [], "tags": []}], 1),
    ("tags.length", [{"tokens": ["a", "b"], "tags": ["O"]}], 1),
    ("tags.bio", [{"tokens": ["a"], "tags": ["person"]}], 1),
    ("tags.span", [{"text": "Rita", "entities": [[0, 9, "x"]]}], 1),
    ("tags.overlap", [{"text": "Rita", "spans": [[0, 3, "x"], [2, 4, "x"]]}], 1),
    ("tags.rejected", [{"text": "Rita", "spans": [], "answer": "reject"}], 1),
    (
        "tags.annotators",
        [
            {
                "data": {"text": "Rita"},
                "annotations": [
                    {"result": []},
                    {"result": [{"value": {"start": 0, "end": 4, "labels": ["x"]}}]},
                ],
            }
        ],
        1,
    ),
    ("field.missing", [{"label": "a"}], 1),
    ("field.missing", [{"txet": "a", "label": "b"}], 1),
    ("row.ambiguous", [{"text": "x", "label": "a", "rating": 1}], 1),
]
WHOLE_FILE = {
    *("file.missing", "file.directory", "file.unreadable", "file.unknown_format"),
    *("file.damaged", "file.extra"),  # test_containers.py
    *("file.no_match", "file.remote"),  # test_sources.py
    *("table.header", "table.cells", "table.invalid"),  # test_tables.py
    "column.missing",  # test_forms.py
    *("media.base", "media.mixed", "media.folder", "media.npz"),  # test_media_files.py
    *("window.value", "window.time", "window.columns"),  # test_time_series.py
    "history.time",  # test_interactions.py
}
