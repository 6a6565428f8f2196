"""Rules of data checks by stable id; the reference documentation is generated from this module."""

from __future__ import annotations

from collections.abc import Mapping

RULES: Mapping[str, str] = {
    "file.missing": "The path names no file.",
    "file.directory": "A folder or archive holds no data, several kinds of files, or splits that must "
    "not mix.",
    "file.unreadable": "The file exists but cannot be opened or read.",
    "file.unknown_format": "Neither the content nor the ending of a file tells what it is.",
    "file.binary": "The file is not UTF-8 text: UTF-16, an archive or other binary data.",
    "file.damaged": "A packed or Parquet file is cut off or damaged.",
    "file.extra": "The file needs a package that is not installed.",
    "file.no_match": "A pattern, or a prefix of s3://, matches no file of a known kind.",
    "file.remote": "An s3:// or file:// address is malformed, or could not be fetched.",
    "file.empty": "The file holds no rows.",
    "line.too_long": "A line or row is longer than 16 MiB.",
    "encoding.utf8": "A text is not valid UTF-8.",
    "encoding.surrogate": "A string holds half of a surrogate pair, which is no character.",
    "json.invalid": "A line, file or cell is not valid JSON.",
    "json.not_object": "A row is valid JSON, but not an object.",
    "json.duplicate_key": "One object has the same key twice, so one value would be lost.",
    "json.not_finite": "A number is NaN, infinite or too large to hold.",
    "json.too_deep": "Arrays or objects are nested too deeply to be read.",
    "table.header": "The first row of a table does not name each column once.",
    "table.cells": "A row of a table has more cells than its header, or fewer.",
    "table.invalid": "A row of a table is no CSV: a quote is not closed or stands wrong, or a line "
    "ends with CR alone.",
    "column.missing": "A column that a setting names is not there, or is empty in a row.",
    "row.unknown_shape": "A row has the keys of none of the shapes and forms.",
    "row.ambiguous": "A row has keys of more than one shape or form.",
    "row.mixed_shapes": "A row has another shape or form than the first row.",
    "field.missing": "A field that the shape needs is not there.",
    "field.type": "A field that must be a string is something else.",
    "field.list": "A list that the format needs is empty or has other values.",
    "field.empty": "A text field is empty or holds only white space.",
    "media.type": "What should name an image or a sound is no path, bytes or data: address.",
    "media.missing": "The file that a row names is not there.",
    "media.outside": "A row names a file that is not below the folder of its own file.",
    "media.remote": "A row names a remote file, which is not fetched.",
    "media.count": "The images of a row do not match its messages, or are too many.",
    "media.base": "The base model reads no such rows: texts, images or sounds.",
    "window.value": "A value of a time series is missing or no finite number.",
    "window.columns": "A time series has several columns of numbers.",
    "window.time": "A time of a time series is missing, or no moment of the calendar.",
    "media.mixed": "A folder or archive holds images and sounds.",
    "media.folder": "Some files of a folder lie in folders, which are labels, and some do not.",
    "media.npz": "An .npz file has no images, or arrays of other shapes.",
    "id.duplicate": "Two rows of one file have the same id.",
    "messages.type": "The messages are not an array of objects.",
    "messages.empty": "The array of messages is empty.",
    "message.role": "A role is none of system, user, assistant and tool.",
    "message.order": "Messages are out of order: system (optional), user, assistant, user, ...",
    "message.last": "The last message is not from the assistant, so its turn has no target.",
    "label.type": "A label is neither a string, a whole number, nor an array of them.",
    "label.duplicate": "One row names the same label twice.",
    "rating.type": "A rating is not a finite number.",
    "tags.length": "A row has more tokens than tags, or fewer.",
    "tags.type": "The tokens or tags are not an array of strings, or a token is empty.",
    "pair.negative": "A negative of a pair is not a text, or equals the positive.",
    "pair.label": "The relevance of a document is no number from 0 to 1.",
    "answers.type": "The answers are not texts with the position of the first character.",
    "answers.span": "An answer is not in the context at its position.",
    "answers.impossible": "The mark of an impossible question contradicts its answers.",
    "passages.type": "The passages are no array of texts, are empty, or one is blank.",
    "cited.type": "The cited passages are no array of numbers.",
    "cited.range": "A cited number is that of no passage of the row.",
    "cited.missing": "An answer cites no passage.",
    "cited.declined": "A row without an answer cites a passage.",
    "cited.contradiction": "The citations in an answer are not the cited passages of its row.",
    "tags.bio": "A tag is none of O, B-name and I-name.",
    "tags.span": "An entity is not in the text at its characters.",
    "tags.overlap": "Two entities of a text have common characters.",
    "tags.annotators": "The annotations of a task differ.",
    "tags.rejected": "An annotation is marked as rejected or ignored.",
    "message.part": "The content of a message has a part that is no text.",
    "tools.type": "The tools are no array of functions with a name, a description and a schema.",
    "message.weight": "A mark of what is learned is unclear, or leaves nothing to learn.",
    "history.type": "A history is no array of items, is empty, or has too many.",
    "history.time": "A time of a log of users and items cannot be read.",
    "history.item": "An item of a history is no text of one line.",
    "choices.type": "The prompt or the choices are no text and no array of texts, or one is blank.",
    "choices.answer": "The answer is not the place of one of the choices.",
    "choices.length": "A row has more choices than can be, or neither one prompt nor one for each.",
    "message.tool_calls": "A call has no name or no object of arguments, or names no tool of the row.",
}
"""Rules of reading and checking."""

PREFERENCE_RULES: Mapping[str, str] = {
    "preference.missing": "One of chosen and rejected, or of OpenAI's three fields, is not there.",
    "preference.type": "A prompt or an answer is neither a text, a message nor a list of messages.",
    "preference.empty": "The prompt, a message or the chosen answer is empty or only white space.",
    "preference.equal": "The chosen and the rejected answer are the same, white space aside.",
    "preference.no_beginning": "Chosen and rejected are conversations that do not begin alike.",
    "preference.order": "Prompt and answer are no conversation in turns that an assistant ends.",
    "rating.single": "The answer is the only one to its prompt, so nothing can be compared.",
    "rating.tied": "All answers to one prompt have the same rating.",
    "thumb.type": 'A thumb is neither true nor false, "up" nor "down".',
    "thumb.one_kind": "All thumbs point the same way.",
}
"""Rules of preferences."""

PROMPT_RULES: Mapping[str, str] = {
    "prompt.shape": "Prompts are asked for, and the row has neither a prompt nor messages.",
    "prompt.mixed": "Some rows are prompts and others conversations.",
    "grader.no_reference": "A grader is to compare with the row's own reply, and there is none.",
    "prompt.unasked": "Without its last assistant turn, a conversation asks nothing.",
    "row.predicted": "A row has the field where the answer is to stand: `predicted`, `embedding`.",
}
"""Rules of prompts."""

CONVERT_RULES: Mapping[str, str] = {
    "convert.form": "The form asked for has no place for something in the row.",
    "convert.container": "A table has no place for something in the row.",
    "convert.key": "A further key of the row has the name of one that is written.",
    "convert.message": "A message has a key beside its role and its text, which would be lost.",
}
"""Rules of ``luthier convert``."""

SEARCH_RULES: Mapping[str, str] = {
    "qrels.line": "A line of qrels is not a query, a document and a score.",
    "qrels.query": "A query of the qrels is missing in the file of queries.",
    "qrels.document": "A document of the qrels is missing in the corpus.",
    "qrels.empty": "No line of the qrels has a score above 0.",
}
"""Rules of test sets for search."""
