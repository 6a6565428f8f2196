"""Image generation, reconstruction, restoration and interpolation with a stored model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RecipeError
from luthier.formatting import list_some
from luthier.media.objectives.diffusion import DenoisingSettings, Diffusion
from luthier.media.objectives.generative import Generative, images_at_once
from luthier.media.objectives.restoration import Restoration
from luthier.media.objectives.vae import VAE, Compression
from luthier.media.processors import ImageProcessor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.inference.inference import ImageRequest
    from luthier.library.models import StoredModel
    from luthier.media.decoding import Pixels
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives import Objective
    from luthier.types import Row

MOST_SAMPLES = 100_000
"""Maximum number of images per request, because all images stay in memory."""
STRIP = 9
"""Images of the strip of a latent."""
MAX_SHOWN_LABELS = 20
"""Maximum number of classes in an error message."""


@dataclass(frozen=True)
class SampledImage:
    """A generated image."""

    pixels: Pixels
    label: str = ""
    """Class of the image; empty for a model without classes."""


@dataclass(frozen=True)
class Reconstruction:
    """An image and its reconstruction, or the restored image."""

    original: Pixels
    """The input image after the processor."""
    copy: Pixels
    error: float
    """Mean squared error of pixels from 0 to 1."""
    compression: Compression | None
    """Ratio between the sizes of the image and of the latents; ``None`` for restored images."""


class ImageGenerator:
    """A loaded model that generates or restores images."""

    def __init__(self, network: Network, objective: Objective, chat: ChatFormat, name: str) -> None:
        if not isinstance(chat.media, ImageProcessor):
            raise RecipeError(f"{name} is not an image model")
        self.network, self.objective, self.chat, self.name = network, objective, chat, name
        self.processor = chat.media
        network.chat = chat
        network.model.eval()

    @staticmethod
    def is_able(objective: Objective) -> bool:
        """Return whether models of ``objective`` generate images."""
        return isinstance(objective, Generative)

    @staticmethod
    def open(stored: StoredModel, name: str = "") -> ImageGenerator:
        """Load ``stored`` on the best device of this machine; error messages use ``name`` or the
        model's id.

        Raises:
            RecipeError: for a model that neither generates nor restores images.
        """
        from luthier.engine.machine import open_network

        objective = stored.objective
        if not isinstance(objective, Generative | Restoration):
            raise RecipeError(
                f"{stored.id} cannot generate images. Train a model with `objective.method=vae`, "
                "`objective.method=gan` or `objective.method=diffusion`"
            )
        chat = stored.chat
        return ImageGenerator(open_network(stored), objective, chat, name or stored.id)

    def sample(
        self,
        count: int,
        seed: int = 0,
        label: str | None = None,
        done: Callable[[int], None] = lambda count: None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
        settings: DenoisingSettings | None = None,
        prompt: str | None = None,
    ) -> list[SampledImage]:
        """Generate images, reproducible by ``seed``.

        Args:
            count: number of images.
            seed: random seed.
            label: a class; by default, a model with classes generates each class in turn.
            done: receives the number of finished images.
            turn: returns a context manager around the work on each batch.
            settings: settings of diffusion models.
            prompt: a prompt, for a model that was trained with captions.

        Raises:
            RecipeError: for a label, prompt or settings that the model does not support.
        """
        import torch

        objective = self.objective
        if not isinstance(objective, Generative):
            raise RecipeError(f"{self.name} cannot generate images")
        if settings is not None and settings != DenoisingSettings():
            if not isinstance(objective, Diffusion):
                raise RecipeError(
                    f"{self.name} is not a diffusion model. Omit steps, guidance_scale, eta and "
                    "negative_prompt",
                    setting=next(
                        name for name, value in asdict(settings).items() if value is not None
                    ),
                )
            objective = objective.with_sampling(settings)
        if not 1 <= count <= MOST_SAMPLES:
            raise RecipeError(f"count must be from 1 to {MOST_SAMPLES:,}, not {count:,}")
        if not -(2**63) <= seed < 2**64:
            raise RecipeError(f"the seed {seed} has more than 64 bits")
        classes = objective.sample_labels
        if label is not None and label not in classes:
            names = list_some(classes, MAX_SHOWN_LABELS) or "none"
            text = f"{self.name} cannot generate {label[:64]!r}. Known classes: {names}"
            raise RecipeError(text, setting="label")
        if prompt is not None:
            if not objective.reads_prompts:
                fix = f"Use label, one of {', '.join(classes)}" if classes else "Omit the prompt"
                text = f"{self.name} was trained without captions. {fix}"
                raise RecipeError(text, setting="prompt")
            objective.check_prompt(prompt)
        condition = label if label is not None else prompt
        conditions = [condition] if condition is not None else list(classes) or [""]
        labels = [conditions[index % len(conditions)] for index in range(count)]
        generator = torch.Generator().manual_seed(seed)
        generated: list[SampledImage] = []
        at_once = images_at_once(self.processor)
        for start in range(0, count, at_once):
            batch = labels[start : start + at_once]
            with turn(), torch.inference_mode():
                images = self._pixels(objective.sample(self.network, batch, generator))
            generated += [
                SampledImage(image, name if name in classes else "")
                for image, name in zip(images, batch, strict=True)
            ]
            done(len(generated))
        return generated

    def generate(
        self,
        request: ImageRequest,
        seed: int,
        done: Callable[[int], None],
        turn: Callable[[], AbstractContextManager[None]],
    ) -> list[SampledImage]:
        """Generate the images of ``request``; see :meth:`sample`.

        Raises:
            RecipeError: naming the unsupported field of the request.
        """
        objective, processor = self.objective, self.processor
        reads_prompts = isinstance(objective, Generative) and objective.reads_prompts
        height, width = processor.height, processor.width
        if request.size not in (None, (height, width)):
            text = f"{self.name} generates images of {width}x{height} (width x height) only"
            raise RecipeError(text, setting="size")
        settings = DenoisingSettings(
            request.steps, request.guidance_scale, negative_prompt=request.negative_prompt or None
        )
        condition = request.label or None
        label, prompt = (None, condition) if reads_prompts else (condition, None)
        try:
            return self.sample(request.count, seed, label, done, turn, settings, prompt)
        except RecipeError as refused:
            if refused.setting == "prompt":
                raise RecipeError(str(refused), setting="label") from refused
            raise

    @property
    def can_reconstruct(self) -> bool:
        """True if the model can reconstruct or restore images."""
        return isinstance(self.objective, VAE | Restoration)

    def reconstruct(
        self, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
    ) -> list[Reconstruction]:
        """Return each image with its reconstruction, or the restored image, in order.

        Raises:
            RecipeError: for a model that cannot reconstruct images.
        """
        import torch

        objective, finished, compression = self.objective, 0, None
        if not isinstance(objective, Restoration):
            objective = self._reconstructor()
            compression = objective.compression(self.network)
        examples = [self.chat.encode_input(row.bare(), index) for index, row in enumerate(rows)]

        def reconstruct_batch(batch: TreeBatch) -> list[Reconstruction]:
            nonlocal finished
            copies = self._pixels(objective.reconstruct(self.network, batch))
            reconstructions = []
            for original, copy in zip(self._pixels(batch.plan), copies, strict=True):
                difference = (original.astype(np.float64) - copy) / 255
                error = float(np.square(difference).mean())
                reconstructions.append(Reconstruction(original, copy, error, compression))
            finished += len(reconstructions)
            done(finished)
            return reconstructions

        with torch.inference_mode():
            return self.network.read_rows(
                examples, images_at_once(self.processor), reconstruct_batch
            )

    def interpolate(self, rows: Sequence[Row], steps: int) -> list[list[Pixels]]:
        """Return ``steps`` images between each image and the next, ends included.

        Raises:
            RecipeError: for a model that cannot reconstruct images.
        """
        import torch

        objective = self._reconstructor()
        if len(rows) < 2 or steps < 2:
            raise RecipeError("interpolation needs at least two images and two steps")
        examples = [self.chat.encode_input(row.bare(), index) for index, row in enumerate(rows)]
        ways: list[list[Pixels]] = []
        with torch.inference_mode():
            for pair in pairwise(examples):
                (batch,) = self.network.batches(list(pair), 2)
                way = self._pixels(objective.interpolate(self.network, batch, steps))
                # Rows of a batch are in the order of its tree.
                ways.append(way if batch.tree.examples[0].row == pair[0].row else way[::-1])
        return ways

    def decode(self, code_NZ: NDArray[np.float32]) -> list[Pixels]:
        """Return the images of codes ``[N, Z]``.

        Raises:
            RecipeError: for a model without codes, or codes of another length.
        """
        import torch

        objective = self._reconstructor()
        size = int(self.network.model.config.latent_size)
        if code_NZ.ndim != 2 or code_NZ.shape[1] != size or not np.isfinite(code_NZ).all():
            raise RecipeError(
                f"codes of {self.name} have {size} finite numbers in each row. Write codes with "
                f"`luthier embed {self.name} IMAGES --output codes.npy`"
            )
        images: list[Pixels] = []
        at_once = images_at_once(self.processor)
        for start in range(0, len(code_NZ), at_once):
            with torch.inference_mode():
                codes = torch.from_numpy(code_NZ[start : start + at_once])
                images += self._pixels(objective.decode(self.network, codes))
        return images

    def strips(self, code_Z: NDArray[np.float32] | None = None) -> list[Pixels]:
        """Return :data:`STRIP` images per latent: the latent runs from -3 to 3 deviations, the other
        latents stay at ``code_Z`` (default 0)."""
        self._reconstructor()
        size = int(self.network.model.config.latent_size)
        start_Z = np.zeros(size, np.float32) if code_Z is None else code_Z
        code_ZSZ = np.tile(start_Z, (size, STRIP, 1))
        for latent in range(size):
            code_ZSZ[latent, :, latent] = np.linspace(-3, 3, STRIP)
        return self.decode(code_ZSZ.reshape(size * STRIP, size).astype(np.float32))

    def _reconstructor(self) -> VAE:
        if not isinstance(self.objective, VAE):
            raise RecipeError(
                f"{self.name} cannot reconstruct images. Train a model with `objective.method=vae`"
            )
        return self.objective

    def _pixels(self, images: Tensor) -> list[Pixels]:
        return [self.processor.to_pixels(each) for each in images.float().cpu().numpy()]
