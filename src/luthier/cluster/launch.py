"""Launch files: a recipe as a job of Slurm, Kubernetes, SkyPilot or Ray, sized by the estimate.

The folder ``templates`` has one template per launch target. Each value enters a template through a
filter that quotes the value for its syntax. The environment rejects unquoted text, so a template
without a filter fails on every use.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from luthier.data.files.sources import absolute, is_address
from luthier.errors import RecipeError
from luthier.files import folder_size, luthier_home
from luthier.formatting import format_duration, one_line
from luthier.recipe import Recipe, map_sources, portable, to_toml

if TYPE_CHECKING:
    from luthier.engine.machine import Machine
    from luthier.library.models import StoredModel
    from luthier.workflows.estimate.estimate import Estimate

Target = Literal["slurm", "kubernetes", "skypilot", "ray"]
TEMPLATES: Mapping[Target, str] = {
    "slurm": "slurm.sh.jinja",
    "kubernetes": "kubernetes.yaml.jinja",
    "skypilot": "skypilot.yaml.jinja",
    "ray": "ray.py.jinja",
}
IMAGE = "luthier"
"""Default image name, as built from ``deploy/Dockerfile``."""
HOME = "/luthier/home"
"""The store on machines that do not share the local store."""
DATA = "/luthier/data"
"""Folder of copied files."""
RECIPE = "/etc/luthier/recipe.toml"
MEMORY_FACTOR = 1.25
"""Factor on the upper bound of the estimated memory. A process above the memory limit is killed."""
TIME_FACTOR = 1.5
"""Factor on the upper bound of the estimated time. A run stopped at the time limit is queued again."""
MIN_SECONDS = 600.0
CHECKPOINT_SECONDS = 120
"""Time for one step and a checkpoint before the time limit, in seconds."""
GPU_PROCESS_THREADS = 4
RESTARTS = 10
"""Maximum number of restarts after a failure or the time limit."""


@dataclass(frozen=True)
class LaunchRequest:
    """The target and the size of a job."""

    target: Target
    processes: int = 1
    """Processes on each node."""
    nodes: int = 1
    gpu: str | None = None
    """GPU type of each process, or ``none``. The default follows the machine of the estimate."""
    image: str | None = None
    """Container image."""
    seconds: float | None = None
    """Time limit of one run in seconds. The default follows the estimate."""

    def __post_init__(self) -> None:
        """Validate the fields; raises :class:`RecipeError`."""
        if self.target not in get_args(Target):
            raise RecipeError(
                f"unknown launch target {self.target!r}. Choose one of {', '.join(TEMPLATES)}"
            )
        for name in ("nodes", "processes"):
            count = getattr(self, name)
            if not 1 <= count <= 10_000:
                raise RecipeError(f"{name} must be from 1 to 10,000, not {count}")
        if self.gpu is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,39}", self.gpu):
            raise RecipeError(
                f"{self.gpu!r} is not a GPU type. Use a type such as H100 or A100, or none"
            )
        if self.image is not None and not re.fullmatch(r"[!-~]{1,500}", self.image):
            raise RecipeError(f"{self.image!r} is not a container image. Use registry/name:tag")
        if self.image is not None and self.target == "ray":
            raise RecipeError(
                "Ray jobs run in the environment of the node. Install luthier on the nodes and omit "
                "`--image`"
            )
        if self.seconds is not None and not 60 <= self.seconds < math.inf:
            raise RecipeError(f"the time limit must be at least 60 seconds, not {self.seconds:g}")


@dataclass(frozen=True)
class Sizing:
    """The resources of one node, with a reason for each."""

    threads: int
    """Threads of a process."""
    cpus: int
    memory: int
    """Memory in GiB."""
    disk: int
    """Disk for the store in GiB."""
    gpus: int
    gpu: str
    """GPU type; empty without GPUs."""
    seconds: int
    """Time limit of one run, in seconds."""
    reasons: Mapping[str, str]


def size_job(
    estimate: Estimate, request: LaunchRequest, machine: Machine, input_bytes: int = 0
) -> Sizing:
    """Return the resources of one node for the estimated job.

    Memory grows with the number of processes, because each process has a whole model and
    micro-batches of equal size. Time does not shrink with the number of processes: the speedup was
    never measured.

    Args:
        estimate: the estimate.
        request: the target and the number of processes.
        machine: the machine of the estimate.
        input_bytes: size of the base model and the rows.
    """
    gpu = request.gpu
    if gpu is None:
        gpu = _gpu_name(estimate.machine) if machine.device.type == "cuda" else "none"
    gpus = 0 if gpu.lower() == "none" else request.processes
    threads = min(machine.threads, GPU_PROCESS_THREADS) if gpus else machine.threads
    bytes_each = estimate.memory.high * MEMORY_FACTOR / 2**30
    # Communication buffers need memory, too.
    memory = math.ceil(request.processes * bytes_each) + (1 if request.processes > 1 else 0)
    disk = max(10, math.ceil((estimate.disk.high * MEMORY_FACTOR + input_bytes) / 2**30))
    seconds = request.seconds or max(MIN_SECONDS, TIME_FACTOR * estimate.seconds.high)
    processes = f"{request.processes} process{'es' * (request.processes > 1)}"
    reasons = {
        "cpus": f"{processes} of {threads} thread{'s' * (threads > 1)}: "
        + ("the GPU computes." if gpus else "as in the estimate."),
        "memory": f"{MEMORY_FACTOR:g} times the estimated maximum of {processes} of "
        f"{_format_size(estimate.memory.high)}"
        + (", and 1 GB for communication." if request.processes > 1 else "."),
        "disk": f"The store: {_format_size(estimate.disk.high)} for checkpoints and the custom model "
        f"(estimate) and {_format_size(input_bytes)} for the base model and the rows, at least 10 GB.",
        "gpus": "One per process.",
        "image": "By option."
        if request.image
        else "docker build -f deploy/Dockerfile -t luthier . : use the name in your registry.",
        "time": _time_reason(estimate, request, gpus > 0 and machine.device.type != "cuda"),
    }
    return Sizing(
        threads=threads,
        cpus=request.processes * threads,
        memory=memory,
        disk=disk,
        gpus=gpus,
        gpu="" if not gpus else gpu,
        seconds=math.ceil(seconds),
        reasons=reasons,
    )


def _time_reason(estimate: Estimate, request: LaunchRequest, is_other_device: bool) -> str:
    if request.seconds:
        return f"Time: {format_duration(request.seconds)} by option."
    return (
        f"Time: {TIME_FACTOR:g} times the estimate of {format_duration(estimate.seconds.high)} for one "
        f"process on {estimate.machine}, at least {format_duration(MIN_SECONDS)}."
        + " A GPU needs less time."
        * is_other_device
    )


def _format_size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _gpu_name(device: str) -> str:
    """Return a GPU type in the names of SkyPilot and Ray: ``H100`` for ``NVIDIA H100 80GB HBM3``."""
    match = re.search(r"\b(?!NVIDIA|RTX)([A-Z]{1,2}[0-9]{1,4}[A-Z]?|V100)\b", device)
    if match is None:
        raise RecipeError(f"the cluster's name of {device!r} is unknown. Set `--gpu`")
    return match[1]


def launch_file(
    recipe: Recipe, estimate: Estimate, request: LaunchRequest, machine: Machine
) -> str:
    """Return the launch file of ``recipe``, sized by ``estimate``.

    Raises:
        RecipeError: for file names that the launch file cannot contain.
    """
    from luthier import __version__
    from luthier.engine.runs import automatic_name
    from luthier.library.models import find

    base = find(recipe.base)
    name = recipe.name or automatic_name(base.root, recipe.data.train, resume=False)
    label = "luthier-" + re.sub(r"[^a-z0-9-]+", "-", name)[:40].strip("-")
    shared = request.target in ("slurm", "ray")
    data: dict[str, str] = {} if shared else _copied_data(recipe)
    models = {} if shared else _copied_models(base)
    files = sum(path.stat().st_size for path in recipe.data.files)
    sizing = size_job(estimate, request, machine, files + folder_size(base.network_folder))
    if recipe.training.threads:  # the option counts one process, the file all processes of a node
        threads = {"threads": recipe.training.threads * request.processes}
        training = recipe.training.model_copy(update=threads)
        recipe = recipe.model_copy(update={"training": training})
    home = str(luthier_home())
    image = request.image or ("" if shared else IMAGE)
    values = {
        **vars(request),
        **vars(sizing),
        "title": f"luthier tune {estimate.base} as {name}: {estimate.objective} with "
        f"{estimate.adaptation} on {estimate.rows:,} rows, {estimate.steps:,} steps "
        f"(luthier {__version__})",
        "measured": f"Estimate of {estimate.created[:10]}, one process on {estimate.machine}: "
        f"{format_duration(estimate.seconds.value)}, {_format_size(estimate.memory.value)} of memory, "
        f"{_format_size(estimate.disk.value)} of disk.",
        "label": label,
        "key": estimate.key[:8],
        "recipe": recipe_text(recipe, name, data),
        "home": home,
        "bin": str(Path(sys.executable).parent),
        "image": image,
        "mounts": _mounts([home, *_local_sources(recipe)]) if shared and image else "",
        "command": _command(request, label),
        "data": list(data.items()),
        "models": list(models.items()),
        "folders": sorted(
            {str(Path(there).parent) for there in [*data.values(), *models.values()]}
        ),
        "copies": [*data.items(), *models.items()],
        "restarts": RESTARTS,
        "limit": sizing.seconds if request.seconds else 0,
        "lead": min(CHECKPOINT_SECONDS, sizing.seconds // 4),
        "slurm_time": _slurm_time(sizing.seconds),
    }
    return render(TEMPLATES[request.target], values)


def recipe_text(recipe: Recipe, name: str, targets: Mapping[str, str]) -> str:
    """Return the recipe as TOML with absolute paths and printable characters only.

    Args:
        recipe: the recipe.
        name: the name of the custom model.
        targets: target paths by local paths of files and folders.
    """

    def target_path(source: str) -> str:
        for ours, there in targets.items():
            if source == ours or source.startswith(f"{ours}/"):
                return there + source[len(ours) :]
        return source

    plain = map_sources(portable(recipe), target_path)
    base = str(Path(recipe.base).absolute()) if Path(recipe.base).is_dir() else recipe.base
    text = to_toml({"name": name, **plain, "base": target_path(base)}).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{one_line(text[max(0, error.start - 40) : error.end])!r} is not valid UTF-8, which a "
            "recipe requires. Rename the file",
            rule="recipe.encoding",
        ) from error
    # Unprintable characters occur inside quotes only, so TOML escapes are valid.
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in text)


def _local_sources(recipe: Recipe) -> list[str]:
    """Return the local files and folders of a recipe. A glob pattern counts as its fixed parent
    folder."""
    from glob import has_magic

    paths: list[str] = []

    def add(source: str) -> str:
        if not is_address(source):
            path = Path(source)
            while has_magic(str(path)) and not path.exists():
                path = path.parent
            paths.append(str(path))
        return source

    map_sources(portable(recipe), add)
    if Path(recipe.base).is_dir():
        paths.append(str(Path(recipe.base).absolute()))
    return list(dict.fromkeys(paths))


def _copied_data(recipe: Recipe) -> dict[str, str]:
    """Return target paths by local paths. Rows with images or audio need their whole folder."""
    sources = _local_sources(recipe)
    sources = [str(Path(each).parent) if _names_media(recipe, each) else each for each in sources]
    targets: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        name = Path(source).name or "data"
        number = sum(Path(other).name == name for other in targets)
        targets[source] = f"{DATA}/{number}/{name}" if number else f"{DATA}/{name}"
    return targets


def _names_media(recipe: Recipe, source: str) -> bool:
    """Return whether the first rows of a file name images or audio files by relative paths."""
    from luthier.data.rows import RowReader
    from luthier.data.shapes.media import MediaRow
    from luthier.engine.dataset import FIRST_ROWS

    data = [recipe.data.train, recipe.data.validation, *(each.train for each in recipe.data.mix)]
    if not Path(source).is_file() or source not in (absolute(each) for each in data if each):
        return False
    rows = islice(RowReader(source, recipe.data.columns, whole=False), FIRST_ROWS)
    return any(isinstance(row, MediaRow) and row.media.path is not None for row in rows)


def _copied_models(base: StoredModel | None) -> dict[str, str]:
    """Return target paths of the local models that no other machine can download."""
    from luthier.models.catalog import CATALOG

    targets: dict[str, str] = {}
    while base is not None:
        if base.id not in CATALOG and base.folder.is_relative_to(luthier_home() / "models"):
            inside = base.folder.relative_to(luthier_home()).as_posix()
            targets[str(base.folder)] = f"{HOME}/{inside}"
        base = base.parent
    return targets


def _mounts(sources: Sequence[str]) -> str:
    """Return the mounts of a Slurm container: local folders at equal paths."""
    folders = dict.fromkeys(str(Path(s).parent) if Path(s).is_file() else s for s in sources)
    if odd := next((each for each in folders if set(each) & set(",:")), None):
        raise RecipeError(
            f"{odd}: containers cannot mount folders with commas or colons. Rename the folder"
        )
    return ",".join(f"{each}:{each}" for each in folders)


def _command(request: LaunchRequest, label: str) -> list[str]:
    """Return the command of a container."""
    tune = ["luthier", "tune", RECIPE, "--resume"]
    if request.nodes > 1:
        return [
            *("torchrun", "--nnodes", str(request.nodes)),
            *("--nproc-per-node", str(request.processes), "--rdzv-id", label),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{label}-0.{label}:29500"),
            *("--rdzv-conf", "read_timeout=600"),  # the first pod may start minutes later
            *("--no-python", *tune),
        ]
    several = ["--processes", str(request.processes)] if request.processes > 1 else []
    return [*tune, *several]


def _slurm_time(seconds: int) -> str:
    days, rest = divmod(60 * math.ceil(seconds / 60), 86400)
    return f"{days}-{rest // 3600:02}:{rest % 3600 // 60:02}:00"


class Quoted(str):
    """Text that a filter has quoted."""

    __slots__ = ()


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a rendered template; raises :class:`TypeError` for unquoted text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("luthier.cluster", "templates"),
        autoescape=False,  # noqa: S701 - no HTML: each filter quotes for its place
        finalize=_only_quoted,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters = {
        "sh": lambda text: Quoted(shlex.quote(text)),
        "yaml": lambda text: Quoted(_yaml_scalar(text)),
        "py": lambda text: Quoted(ascii(str(text))),
        "comment": lambda text: Quoted(one_line(text)),
        "paragraph": _paragraph,
        "word": _word,
        "block": _block,
    }
    return environment.get_template(template).render(values)


def _only_quoted(value: Any) -> Any:
    if isinstance(value, Quoted | int):
        return value
    raise TypeError(f"{value!r} is not quoted")


def _paragraph(text: str, indent: int) -> Quoted:
    """Return wrapped lines of a comment whose first line has begun."""
    lines = textwrap.wrap(one_line(text), 98 - indent, break_on_hyphens=False)
    return Quoted(f"\n{' ' * indent}# ".join(lines))


def _word(text: str) -> Quoted:
    """Return text that needs no quotes in any target syntax; raises :class:`ValueError` otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9._:/-]+", text):
        raise ValueError(f"{text!r} needs quotes")
    return Quoted(text)


def _yaml_scalar(text: str) -> str:
    """Return ``text`` as a double-quoted YAML scalar on one line."""
    import yaml

    written: str = yaml.dump(str(text), default_style='"', allow_unicode=False, width=math.inf)
    return written.strip()


def _block(text: str, indent: int) -> Quoted:
    """Return printable text for a here-document or YAML block, indented after the first line."""
    if any(not (c.isprintable() or c == "\n") for c in text):
        raise ValueError("a block must have printable text")
    return Quoted(text.replace("\n", "\n" + " " * indent).replace(" " * indent + "\n", "\n"))
