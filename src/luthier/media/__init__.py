"""Images, audio and time series: rows, processors, networks, objectives, checks and generation.

The core never imports this package. :mod:`luthier.plugins` reads :data:`ENTRY_POINTS` as it reads the
entry points of an installed package.
"""

ENTRY_POINTS = {
    "luthier.objectives": {
        "vae": "luthier.media.objectives.vae:VAE",
        "gan": "luthier.media.objectives.gan:GAN",
        "diffusion": "luthier.media.objectives.diffusion:Diffusion",
        "image_to_text": "luthier.media.objectives.image_to_text:ImageToText",
    },
    "luthier.training_steps": {
        "sample_pictures": "luthier.media.training_steps:SamplePictures",
        "generative_verdict": "luthier.media.training_steps:GenerativeVerdict",
    },
}
"""Parts of this package by group and name, each as ``module:class``."""
