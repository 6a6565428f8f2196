"""Presets of studies, each with a question and the tested claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.formatting import did_you_mean
from luthier.workflows.study.grid import (
    NONE,
    TAUGHT,
    TEACHER,
    Configuration,
    Dimension,
    grid_of,
    parse_dimensions,
)

FILE = "FILE"
"""Placeholder for the file in ``--preset domain=papers.jsonl``."""


@dataclass(frozen=True)
class Preset:
    """A study with a name."""

    question: str
    claim: str
    """The tested claim with its source."""
    vary: tuple[str, ...] = ()
    """Dimensions, as of ``--vary``."""
    configurations: Mapping[str, Mapping[str, Any]] | None = None
    """Settings by label, instead of dimensions."""

    needs_file: bool = False


PRESETS: Mapping[str, Preset] = {
    "methods": Preset(
        "Which method is best, and what does it cost?",
        "LoRA learns less than full tuning and forgets less (Biderman et al. 2024, arXiv:2405.09673).",
        configurations={
            "full": {"adaptation.method": "full"},
            "lora": {"adaptation.method": "lora"},
            "dora": {"adaptation.method": "lora", "adaptation.dora": True},
            "freeze": {"adaptation.method": "freeze"},
            "bitfit": {"adaptation.method": "bitfit"},
        },
    ),
    "layers": Preset(
        "How many layers need training?",
        "The upper quarter of the layers reaches 90 % of the quality of full tuning (Lee et al. 2019, "
        "arXiv:1911.03090).",
        configurations={
            "all layers": {"adaptation.method": "full"},
            "upper 3/4": {"adaptation.method": "freeze", "adaptation.share": 0.25},
            "upper half": {"adaptation.method": "freeze", "adaptation.share": 0.5},
            "upper quarter": {"adaptation.method": "freeze", "adaptation.share": 0.75},
        },
    ),
    "rate": Preset(
        "Is the learning rate right?",
        "A smaller learning rate keeps more of the earlier knowledge (Biderman et al. 2024, "
        "arXiv:2405.09673).",
        vary=("training.learning_rate_multiplier=0.1,0.3,1,3",),
    ),
    "rows": Preset(
        "Would more rows help?",
        "The error falls as a power of the number of rows (Viering and Loog 2023, arXiv:2103.10948).",
        vary=("data.train_share=0.125,0.177,0.25,0.354,0.5,0.707,1.0",),
    ),
    "domain": Preset(
        "Does text of the domain help first?",
        "Further pre-training on text of the domain improves the task (Gururangan et al. 2020, "
        "arXiv:2004.10964).",
        configurations={"task alone": {"before": NONE}, "text first": {"before": FILE}},
        needs_file=True,
    ),
    "replay": Preset(
        "Do earlier rows in the mix prevent forgetting?",
        "A few percent of earlier data prevent most of the forgetting (Ibrahim et al. 2024, "
        "arXiv:2403.08763).",
        configurations={
            "no replay": {"data.mix": []},
            "5 % replay": {"data.mix": [{"train": FILE, "weight": 0.05}]},
            "25 % replay": {"data.mix": [{"train": FILE, "weight": 0.25}]},
        },
        needs_file=True,
    ),
    "student": Preset(
        "How much of its score does a smaller network keep?",
        "A student of half the layers keeps 97 % of the teacher's score, and learns more from the "
        "teacher than from the labels alone (Sanh et al. 2019, arXiv:1910.01108).",
        configurations={
            TEACHER: {"adaptation.method": "full"},
            "student, taught": {"adaptation.method": "full", "student": TAUGHT},
            "student, rows alone": {"adaptation.method": "full", "student": "rows"},
        },
    ),
    "prompts": Preset(
        "Does tuning pay, compared with a better prompt?",
        "Fine-tuning is more accurate and cheaper per answer than examples in the prompt (Liu et al. "
        "2022, arXiv:2205.05638).",
        configurations={"tuned": {"prompts": FILE}},
        needs_file=True,
    ),
    "augmentation": Preset(
        "Do random changes of texts, images or audio help?",
        "Augmentation improves accuracy, most with few rows (Shorten and Khoshgoftaar 2019, "
        "doi:10.1186/s40537-019-0197-0; text: Wei and Zou 2019, arXiv:1901.11196).",
        configurations={
            "none": {"data.augmentation": {}},
            "crop": {"data.augmentation": {"crop": 0.3}},
            "colour": {"data.augmentation": {"colour": 0.4}},
            "RandAugment": {"data.augmentation": {"randaugment": 2}},
            "shift and speed": {"data.augmentation": {"shift": 0.1, "speed": 0.15}},
            "masks": {"data.augmentation": {"masks": 2}},
            "words left out": {"data.augmentation": {"drop": 0.1}},
            "words swapped": {"data.augmentation": {"swap": 0.1}},
        },
    ),
    "bits": Preset(
        "What do fewer bits of the base cost?",
        "LoRA on a base in 4 bits reaches the quality of 16 bits (Dettmers et al. 2023, "
        "arXiv:2305.14314).",
        configurations={
            "16 bits": {"adaptation.method": "lora"},
            "8 bits": {"adaptation.method": "qlora", "adaptation.quantization": "int8"},
            "4 bits, NF4": {"adaptation.method": "qlora", "adaptation.quantization": "nf4"},
            "4 bits, FP4": {"adaptation.method": "qlora", "adaptation.quantization": "fp4"},
        },
    ),
}


def grid_from(
    preset: str | None, vary: Sequence[str], trials: int | None = None
) -> tuple[list[Configuration], list[Dimension]]:
    """Return the configurations and dimensions of a preset, or of ``--vary``.

    In a search of ``trials``, the configurations are examples for a check.

    Raises:
        RecipeError: for an unknown preset, a missing file, or a preset with ``vary`` or ``trials``.
    """
    if preset is None:
        dimensions = parse_dimensions(vary)
        return grid_of(dimensions, trials), dimensions
    name, _, file = preset.partition("=")
    if vary or trials:
        other = "vary" if vary else "search"
        raise RecipeError(f"`preset` and `{other}` exclude each other.", setting="preset")
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS, f"there are {', '.join(PRESETS)}")
        raise RecipeError(f"Unknown preset {name!r}; {hint}.", setting="preset")
    chosen = PRESETS[name]
    if chosen.needs_file and not Path(file).is_file():
        missing = f"{file} is not a file" if file else "The preset needs a file"
        raise RecipeError(f"{missing}. Write `--preset {name}=FILE`.", setting="preset")
    if file and not chosen.needs_file:
        raise RecipeError(f"`--preset {name}` takes no file. Remove `={file}`.", setting="preset")
    if chosen.configurations is None:
        dimensions = parse_dimensions(chosen.vary)
        return grid_of(dimensions), dimensions
    filled = {
        label: {key: _fill(value, file) for key, value in settings.items()}
        for label, settings in chosen.configurations.items()
    }
    return [Configuration(settings, label) for label, settings in filled.items()], []


def _fill(value: Any, file: str) -> Any:
    """Return a setting with the file of the user."""
    if isinstance(value, list):
        return [{**each, "train": file} for each in value]
    return file if value == FILE else value
