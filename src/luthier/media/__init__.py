"""Images, audio and time series: rows, processors, networks, objectives, checks and generation.

The core never imports this package. :mod:`luthier.plugins` reads :data:`ENTRY_POINTS` like the
entry points of an installed package.
"""

ENTRY_POINTS = {
    "luthier.objectives": {
        "vae": "luthier.media.objectives.vae:VAE",
        "gan": "luthier.media.objectives.gan:GAN",
        "diffusion": "luthier.media.objectives.diffusion:Diffusion",
        "restoration": "luthier.media.objectives.restoration:Restoration",
        "image_to_text": "luthier.media.objectives.image_to_text:ImageToText",
    },
    "luthier.training_steps": {
        "augmented_rows": "luthier.media.training_steps:AugmentedRows",
        "sample_pictures": "luthier.media.training_steps:SamplePictures",
        "restored_pictures": "luthier.media.training_steps:RestoredPictures",
        "generative_verdict": "luthier.media.training_steps:GenerativeVerdict",
    },
    "luthier.base_models": {
        "efficientnet-lite0": "luthier.media.catalog:EFFICIENTNET_LITE0",
        "small-cnn": "luthier.media.catalog:SMALL_CNN",
        "small-audio-cnn": "luthier.media.catalog:SMALL_AUDIO_CNN",
        "band-means": "luthier.media.catalog:BAND_MEANS",
        "colour-statistics": "luthier.media.catalog:COLOUR_STATISTICS",
        "small-dcgan": "luthier.media.catalog:SMALL_DCGAN",
        "small-unet": "luthier.media.catalog:SMALL_UNET",
        "small-vae": "luthier.media.catalog:SMALL_VAE",
        "small-window-vae": "luthier.media.catalog:SMALL_WINDOW_VAE",
        "small-sensor-vae": "luthier.media.catalog:SMALL_SENSOR_VAE",
        "z-score": "luthier.media.catalog:Z_SCORE",
        "pp-ocrv6-small": "luthier.media.catalog:PP_OCRV6_SMALL",
        "small-ocr": "luthier.media.catalog:SMALL_OCR",
    },
    "luthier.networks": {
        "line_encoder": "luthier.media.networks.line_encoder",
        "efficientnet_lite": "luthier.media.networks.efficientnet_lite",
        "small_cnn": "luthier.media.networks.small_cnn",
        "dcgan": "luthier.media.networks.dcgan",
        "unet": "luthier.media.networks.unet",
        "vae": "luthier.media.networks.vae",
        "vgg": "luthier.media.networks.vgg",
        "z_score": "luthier.media.networks.z_score",
        "stable_diffusion": "luthier.media.networks.stable_diffusion",
    },
    "luthier.weight_files": {"vgg": "luthier.media.networks.vgg:write_folder"},
    "luthier.checks": {
        "media": "luthier.media.checks.media_files:MediaFiles",
        "time_series": "luthier.media.checks.time_series:TimeSeries",
    },
    "luthier.readers": {
        "folder": "luthier.media.files:read_folder",
        "zip": "luthier.media.files:read_zip",
        "npz": "luthier.media.files:read_npz",
    },
    "luthier.table_readers": {"series": "luthier.media.time_series:read_series"},
    "luthier.image_generators": {"images": "luthier.media.image_generation:ImageGenerator"},
    "luthier.processors": {
        "tiled_images": "luthier.media.chat_images:TiledImages",
        "image": "luthier.media.processors:ImageProcessor",
        "feature_extractor": "luthier.media.processors:FeatureExtractor",
        "audio": "luthier.media.processors:AudioProcessor",
        "window": "luthier.media.processors:WindowProcessor",
    },
}
"""Parts of this package by group and name, each as ``module:class``."""
