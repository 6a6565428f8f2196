"""Fixtures: tiny models and a tiny tokenizer from a seed, and a separate store per test."""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import typer.testing
from forked_commands import fork_modules, forker
from hypothesis import HealthCheck, settings
from remembered_probes import FOLDER, remember_probes

gc.disable()  # until the end of the collection: imports make a million lasting objects
pytest_plugins = ["job_queue", "openai_endpoint", "postgres", "principals_of", "ray_cluster"]

# On a busy machine, drawing three examples may take longer than the second that hypothesis allows.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
MEMORY_DISK = Path("/dev/shm")
if MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 4 * 2**30:
    # A disk takes a millisecond for each of a hundred thousand folders; all of them need 1 GB.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))
torch.set_num_threads(1)
fork_modules()
remember_probes()
# Otherwise each command builds all commands anew, for 0.07 s.
typer.testing._get_command = cache(typer.testing._get_command)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant: please answer the question in one word, yes or no.",
    "My card has not arrived yet. When will my new card be delivered to me?",
)
VOCABULARY = 320


LONGEST = {
    "server/console/test_browser.py",
    "server/console/test_pages.py",
    "server/jobs/test_shared_training.py",
    "server/live/test_retraining.py",
    "server/test_full_disk.py",
    "server/test_measurements.py",
    "server/test_service.py",
    "server/test_shutdown.py",
    "server/test_time_limits.py",
    "engine/test_resume_methods.py",
    "exports/test_onnx.py",
    "inference/test_adapters.py",
    "inference/test_prediction.py",
    "inference/test_reasoning.py",
    "test_pairs.py",
    "test_processes.py",
    "trackers/test_trackers.py",
}
"""Files that take more than 20 s, with few tests of more than 10 s or many short ones."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set an hour as time limit of slow tests, and start with the longest files.

    By default, xdist starts with the files of most tests and ends with a single busy worker.
    """
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests, folder = Counter(item.path for item in items), Path(__file__).parent
        longest = {folder / name for name in LONGEST}
        items.sort(key=lambda item: (item.path not in longest, -tests[item.path]))


_FREEZE, _UNFREEZE = gc.freeze, gc.unfreeze


def pytest_collection_finish() -> None:
    """Exclude the collected objects from garbage collection.

    1.1 million objects take most of a second per full collection, and a model pool collects once
    per base. The pool would unfreeze these objects on close, so freezing is off except in tests of
    ``freezing``.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    gc.enable()


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enable freezing of objects; no object is frozen at the start."""
    monkeypatch.setattr(gc, "freeze", _FREEZE)
    monkeypatch.setattr(gc, "unfreeze", _UNFREEZE)
    gc.unfreeze()
    yield
    gc.collect()
    _FREEZE()


_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Store the terminal before pytest captures output.

    With xdist, the fork server of commands starts its imports.
    """
    config.stash[_STDERR] = os.dup(sys.__stderr__.fileno())
    if getattr(config.option, "tx", None):
        forker()


def _exit_later(item: pytest.Item) -> None:
    limit = item.get_closest_marker("timeout")
    seconds = float(limit.args[0] if limit else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + 100, exit=True, file=item.config.stash[_STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Print all stacks and exit if the time limit cannot end a test.

    The limit is a single signal, and native code ignores signals. Fixture teardown after the signal
    can hang. The exit gives "crashed while running" with the test's name.
    """
    _exit_later(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Restart the timer: pytest cancels the timer at a failure."""
    if isinstance(node, pytest.Item):
        _exit_later(node)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for tiny tensors a second thread gains nothing and waits for other work.

    Runs inside a test use all cores and would leave that setting to the next test.
    """
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pictures_drawn_once() -> Iterator[None]:
    """Draw the curves of runs once per set of metrics, and copy a single image.

    Drawing takes a quarter of a short run. test_metrics.py tests the content. In commands and
    workers, ``forked_commands`` copies one picture.
    """
    from luthier.engine import metrics, model_writer
    from luthier.files import write_bytes

    draw, save = model_writer.draw_curves, metrics.save_figure
    drawn, saved = dict[frozenset[str], dict[str, bytes]](), dict[str, bytes]()

    def save_or_copy(figure: Any, *paths: Path) -> None:
        for path in paths:
            if path.suffix not in saved:
                save(figure, path)
                saved[path.suffix] = path.read_bytes()
            write_bytes(path, saved[path.suffix])

    def draw_or_copy(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[str]:
        found = frozenset(name for line in lines for name in line)
        if found not in drawn:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(metrics, "save_figure", save_or_copy)
                names = draw(lines, folder, title)
            drawn[found] = {name: (folder / name).read_bytes() for name in names}
            return names
        for name, picture in drawn[found].items():
            write_bytes(folder / name, picture)
        return [*drawn[found]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_writer, "draw_curves", draw_or_copy)
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Probe each network once for all tests; see ``remembered_probes``."""
    folder = shared_folder(tmp_path_factory) / "probes"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        yield


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of all workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def short_parity_check() -> Iterator[None]:
    """Generate 4 tokens after each prompt in the parity check of stored models.

    The usual 16 tokens take a third of a short run. test_model_writer.py generates all.
    """
    from luthier.engine import model_writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_writer, "GREEDY_TOKENS", 4)
        yield


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open models in float32 on one thread, regardless of the machine."""
    from luthier.engine import machine as machines

    machine = machines.Machine(torch.device("cpu"), torch.float32, 1, "a test")
    monkeypatch.setattr(machines, "choose_machine", lambda *arguments: machine)


@pytest.fixture(autouse=True)
def luthier_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store for one test."""
    home = tmp_path / "luthier-home"
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE of at most 320 tokens with ChatML turns; ``<|im_end|>`` ends a text."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def new_tokenizer() -> Callable[..., Any]:
    """``new_tokenizer(template, special, eos)`` returns a tokenizer with other turns and special
    tokens."""
    return make_tokenizer


@pytest.fixture(scope="session")
def family_tokenizer() -> Callable[[str], Any]:
    """``family_tokenizer(name)`` makes the tokenizer of a family: word pieces, characters, …"""
    return lambda name: TOKENIZERS.get(name, make_tokenizer)()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """``tiny_llama(tied=…, seed=…)`` makes a LlamaForCausalLM with grouped query heads."""
    return make_llama


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Any]:
    """``tiny_gpt2(seed=…)`` makes a GPT2LMHeadModel: learned positions, biases, tied head."""
    return make_gpt2


@pytest.fixture(scope="session")
def tiny_palm() -> Callable[..., Any]:
    """``tiny_palm(seed=…)`` returns a PalmForCausalLM: parallel layers, one key head, tied head."""
    return make_palm


@pytest.fixture(scope="session")
def tiny_transfo_xl() -> Callable[..., Any]:
    """``tiny_transfo_xl(seed=…)`` makes a TransfoXLForCausalLM with segments of 8 tokens."""
    return make_transfo_xl


@pytest.fixture(scope="session")
def tiny_elmo() -> Callable[..., Any]:
    """``tiny_elmo(kind=…, seed=…)`` returns a network of ELMo's family by class name."""
    return make_elmo


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A read-only Hugging Face folder: tiny Llama, tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = make_llama(eos_token_id=tokenizer.eos_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``thinking_folder(kind)`` returns the folder of a reasoning model, shared by all workers."""
    shared = shared_folder(tmp_path_factory)

    @cache
    def make(kind: str) -> Path:
        from thinking_models import TEMPLATES, make_thinking_model

        folder = shared / f"thinking-{[*TEMPLATES].index(kind)}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / "thinker").exists():
                return folder / "thinker"
            tokenizer = make_tokenizer(TEMPLATES[kind])
            network = make_llama(eos_token_id=tokenizer.eos_token_id)
            return make_thinking_model(folder, network, tokenizer)

    return make


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``family_folder(name)`` returns a Hugging Face folder of a tiny network of a family."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            if name in IMAGE_FAMILIES:
                make_image_family(name, made[name])
                return made[name]
            if name in SOUND_FAMILIES:
                make_sound_family(name, made[name])
                return made[name]
            if name in VISION_FAMILIES:
                make_vision_family(name, made[name])
                return made[name]
            tokenizer = TOKENIZERS.get(name, make_tokenizer)()
            make_family(name, tokenizer).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


ENCODERS = {
    "bert": "Bert", "roberta": "Roberta", "albert": "Albert", "modernbert": "ModernBert",
    "eurobert": "EuroBert", "distilbert": "DistilBert", "mpnet": "MPNet", "electra": "Electra",
    "deberta": "DebertaV2",
}  # fmt: skip
"""Prefix of the classes of transformers for each family of encoders."""
FAMILIES = ("llama", "gpt2", "palm", "transfo_xl", *ENCODERS, "t5", "xlnet", "elmo")


IMAGE_FAMILIES = (
    "vae", "dcgan", "unet", "small_cnn", "vgg", "trocr", "pp_ocr", "clip", "stable_diffusion",
)  # fmt: skip
SOUND_FAMILIES = ("ast", "wav2vec2")
VISION_FAMILIES = ("resnet", "mobilenet_v2", "efficientnet", "convnext", "vit", "dinov2")
TROCR = {
    "model_type": "vision-encoder-decoder",
    "encoder": {
        "model_type": "vit",
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.3,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "decoder": {
        "model_type": "trocr",
        "vocab_size": 1481,
        "d_model": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 48,
        "init_std": 0.3,
        "cross_attention_hidden_size": 24,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "is_decoder": True,
        "add_cross_attention": True,
    },
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


PP_OCR: dict[str, Any] = {
    "image_size": (48, 64),
    "hidden_size": 8,
    "num_attention_heads": 2,
    "depth": 1,
    "head_out_channels": 6,
    "letters": "aeno ",
    "backbone_config": {
        "model_type": "pp_lcnet_v4",
        "stem_channels": (3, 4, 8),
        "block_configs": [
            [[3, 8, 8, 1, True]],
            [[3, 8, 8, 1, False]],
            [[3, 8, 8, [2, 1], False]],
            [[3, 8, 8, [2, 1], False]],
        ],
    },
}


def make_image_family(name: str, folder: Path) -> None:
    """Write a tiny network for images of 9 x 7 (TrOCR, CLIP: 16 x 16, VGG: 32 x 32, PP-OCR: 48 x 64)
    with its processor."""
    from luthier.data.inputs import save_processor
    from luthier.media.processors import ImageProcessor
    from luthier.models.build import build_media

    if name == "stable_diffusion":
        make_pipeline().save_pretrained(folder)
        return
    if name == "trocr":
        build_media(TROCR, "image_to_text", 0, folder)
        save_processor(ImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3), folder)
        return
    if name == "pp_ocr":
        from transformers import PPOCRV6SmallRecConfig, PPOCRV6SmallRecForTextRecognition

        torch.manual_seed(0)
        reader = PPOCRV6SmallRecForTextRecognition(PPOCRV6SmallRecConfig(**PP_OCR))
        for weight in reader.parameters():  # columns with different letters
            weight.data += 0.3 * torch.randn_like(weight)
        reader.save_pretrained(folder)
        save_processor(ImageProcessor(48, 64, (0.5,) * 3, (0.5,) * 3, pad=True), folder)
        return
    if name == "clip":
        tokenizer = make_clip_tokenizer()
        make_clip(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_processor(ImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3, shortest_edge=16), folder)
        return
    if name == "vgg":
        sizes = {"image_size": 32, "hidden_sizes": (8,) * 5, "intermediate_size": 12}
        build_media(
            {"model_type": name, "num_layers": 11, "batch_norm": True, **sizes},
            "embedding", 0, folder,
        )  # fmt: skip
        save_processor(ImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3), folder)
        return
    fields: dict[str, Any] = {"image_size": (9, 7), "hidden_sizes": (8, 16)}
    if name == "small_cnn":  # group normalization with groups of 16
        fields["hidden_sizes"] = (16, 32)
    elif name != "unet":
        fields["latent_size"] = 4
    build_media(
        {"model_type": name, **fields}, "autoencoding" if name == "vae" else "embedding", 0, folder
    )
    save_processor(ImageProcessor(9, 7, (0.5,) * 3, (0.5,) * 3), folder)


def make_sound_family(name: str, folder: Path) -> None:
    """Write a tiny audio classifier with the published feature extractor."""
    import transformers

    rate, reads = 8_000, {"max_length": 40, "num_mel_bins": 16}
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 2}
    sizes |= {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    if name == "ast":
        steps: dict[str, Any] = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
        config: Any = transformers.ASTConfig(**sizes, **steps, **reads)
        model: Any = transformers.ASTForAudioClassification(config)
        extractor: Any = transformers.ASTFeatureExtractor(sampling_rate=rate, **reads)
    else:
        layers: dict[str, Any] = {
            "conv_dim": (16, 16, 16),
            "conv_kernel": (10, 8, 4),
            "conv_stride": (5, 4, 4),
        }
        sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        config = transformers.Wav2Vec2Config(**sizes, **layers, classifier_proj_size=12)
        model = transformers.Wav2Vec2ForSequenceClassification(config)
        extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=rate)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)


VISION_SIZES: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]},
    "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 8, "finegrained_output": True},
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 1.0,
        "hidden_dim": 320,
        "kernel_sizes": [3, 5, 3],
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 6, 6],
        "depthwise_padding": [2],
    },
    "convnext": {
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 2, 1],
        "num_stages": 3,
        "layer_scale_init_value": 1.0,  # with the default of 1e-6, the layers have no effect
    },
    # Published for images of 518, and used with 224.
    "dinov2": {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layerscale_value": 1.0,
    },
    "vit": {
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
}
PUBLISHED_PROCESSORS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_convert_rgb": True,
        "resample": 3,
    },
    "resnet": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "size": 32,
        "crop_pct": 0.875,
        "resample": 3,
    },
    "mobilenet_v2": {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": {"shortest_edge": 36},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "efficientnet": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_center_crop": False,
        "resample": 0,
        "rescale_offset": False,
        "include_top": True,
        "image_std": [0.47853944, 0.4732864, 0.47434163],
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 0.875,
    },
    "vit": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
"""Published preprocessor settings of image networks."""


def make_vision_family(name: str, folder: Path) -> None:
    """Write a tiny transformers classifier for images of 32 x 32.

    The batch norms have the statistics of two batches: with random statistics, the last layer would
    lose the image.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes = {"image_size": 32, "initializer_range": 0.2} | VISION_SIZES[name]
    if name == "resnet":
        del sizes["image_size"], sizes["initializer_range"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, num_labels=2, **sizes)
    model: Any = AutoModelForImageClassification.from_config(config)
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # their mean, and not the latest
    with torch.no_grad():
        for _ in norms and range(2):
            model.train()(torch.randn(8, 3, 32, 32))
    model.save_pretrained(folder)
    shared = {
        "do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    fields = shared | PUBLISHED_PROCESSORS[name]
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def make_clip(tokenizer: Any) -> Any:
    """Return encoders for images of 16 x 16 and for text of at most 40 tokens, three layers each."""
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {
        "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2
    }  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    sizes |= {"initializer_factor": 3.0}
    vision = {"hidden_size": 24, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**sizes, **ends, "hidden_size": 16, "max_position_embeddings": 40},
        vision_config={**sizes, **vision},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return CLIPModel(config)


def make_clip_tokenizer() -> Any:
    """Byte-level pieces between CLIP's two tokens."""
    from tokenizers import processors

    names = ("<|startoftext|>", "<|endoftext|>")
    made = make_tokenizer(None, ("<pad>", *names), names[1])
    made.pad_token, made.bos_token = "<pad>", names[0]
    marks = [(name, made.convert_tokens_to_ids(name)) for name in names]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=marks
    )
    return made


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., Any]:
    """``tiny_pipeline(**noise)`` makes a StableDiffusionPipeline of random weights for 16 x 16."""
    return make_pipeline


def make_pipeline(**noise: Any) -> Any:
    """Return a pipeline whose text encoder takes at most 48 letters; ``noise`` configures the
    scheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *special]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[], model_max_length=48, pad_token=special[1])
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=48,
            initializer_range=0.3,
            bos_token_id=ids[special[0]],
            eos_token_id=ids[special[1]],
            pad_token_id=ids[special[1]],
        )
    )
    unet = UNet(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        **{
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **noise,
        }
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_wordpiece() -> Any:
    """Return a lower-case WordPiece tokenizer with [CLS] and [SEP], like BERT.

    The library's trainer breaks ties randomly, which would give other results in each process.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Counter(re.findall(r"\w+|[^\w\s]", " ".join(CORPUS).lower()))
    letters = sorted(set("".join(words)))
    common = sorted(words, key=lambda word: (-words[word], word))
    pairs = sorted({f"##{word[at : at + 2]}" for word in words for at in range(1, len(word) - 1)})
    inner = [f"##{letter}" for letter in letters]
    known = dict.fromkeys([*special, *letters, *inner, *common, *pairs])
    ids = {piece: number for number, piece in enumerate(list(known)[:160])}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_family(name: str, tokenizer: Any) -> Any:
    """Return a tiny network of a family with its pre-training head."""
    import transformers

    if name == "llama":
        return make_llama(eos_token_id=tokenizer.eos_token_id)
    if name == "gpt2":
        return make_gpt2(eos_token_id=tokenizer.eos_token_id)
    if name in ("t5", "xlnet"):
        return make_padded(name, tokenizer)
    if name == "palm":
        return make_palm(eos_token_id=tokenizer.eos_token_id)
    if name == "elmo":
        return make_elmo()
    if name == "transfo_xl":
        return make_transfo_xl(eos_token_id=tokenizer.eos_token_id)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    further: dict[str, dict[str, Any]] = {
        "albert": {"embedding_size": 16},
        "electra": {"embedding_size": 16},
        "modernbert": {"classifier_pooling": "mean", "initializer_cutoff_factor": 2.0},
        # Version 3: relative positions in buckets, shared with the projections of the content.
        "deberta": {
            "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
            "type_vocab_size": 0,
        },
    }  # fmt: skip
    kind = ENCODERS[name]
    config = getattr(transformers, f"{kind}Config")(**fields, **further.get(name, {}))
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForMaskedLM")(config)


def make_padded(name: str, tokenizer: Any) -> Any:
    """Return a network whose attention has its own relative positions."""
    import transformers

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields: dict[str, Any] = {"vocab_size": len(tokenizer), "d_model": 32, **ids}
    torch.manual_seed(0)
    if name == "xlnet":
        sizes = {"n_layer": 3, "n_head": 4, "d_inner": 64, "initializer_range": 0.15}
        config: Any = transformers.XLNetConfig(**fields, **sizes)
        return transformers.XLNetLMHeadModel(config)
    config = transformers.T5Config(
        **fields,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return transformers.T5ForConditionalGeneration(config)


def make_t5_tokenizer() -> Any:
    """Return a byte-level tokenizer with ``</s>`` and span sentinels, like T5."""
    from tokenizers import processors

    sentinels = tuple(f"<extra_id_{n}>" for n in range(20))
    made = make_tokenizer(None, ("<pad>", "</s>", *sentinels), "</s>")
    made.pad_token = "<pad>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.eos_token_id)]
    )
    return made


def make_xlnet_tokenizer() -> Any:
    """Return a byte-level tokenizer that ends with ``<sep><cls>``, like XLNet."""
    from tokenizers import processors

    special = ("<pad>", "<sep>", "<cls>", "<mask>")
    made = make_tokenizer(None, special, "<sep>")
    made.pad_token, made.cls_token, made.sep_token, made.mask_token = (
        "<pad>",
        "<cls>",
        "<sep>",
        "<mask>",
    )
    closing = [(name, made.convert_tokens_to_ids(name)) for name in ("<sep>", "<cls>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <sep> <cls>", special_tokens=closing
    )
    return made


def make_tokenizer(
    template: str | None = CHATML,
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    eos: str = "<|im_end|>",
) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, additional_special_tokens=list(special)
    )
    made.chat_template = template
    return made


def make_llama(tied: bool = False, seed: int = 0, **fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            # Larger than usual, so that errors in attention become visible.
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": 1,
            "tie_word_embeddings": tied,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def make_gpt2(seed: int = 0, **fields: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.15,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def make_palm(seed: int = 0, **fields: Any) -> Any:
    from luthier.models.networks.classic.palm import PalmConfig, PalmForCausalLM

    config = PalmConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 1,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return PalmForCausalLM(config)


def make_transfo_xl(seed: int = 0, **fields: Any) -> Any:
    from luthier.models.networks.classic.transfo_xl import TransfoXLConfig, TransfoXLForCausalLM

    config = TransfoXLConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "segment_length": 8,
            "memory_length": 6,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "eos_token_id": 1,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return TransfoXLForCausalLM(config)


def make_elmo(seed: int = 0, kind: str = "ElmoForPreTraining", **fields: Any) -> Any:
    from luthier.models.networks.classic import elmo

    config = elmo.ElmoConfig(
        **{
            "character_size": 8,
            "filters": [[1, 4], [2, 8], [3, 12]],
            "projection_size": 16,
            "cell_size": 32,
            "max_characters_per_token": 12,
            "max_position_embeddings": 512,
            "num_labels": 5,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return getattr(elmo, kind)(config)


def make_character_tokenizer() -> Any:
    from luthier.models.characters import character_tokenizer

    return character_tokenizer()


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(ENCODERS, make_wordpiece),
    "t5": make_t5_tokenizer,
    "xlnet": make_xlnet_tokenizer,
    "elmo": make_character_tokenizer,
}
