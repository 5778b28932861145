"""Every family of models by the name that ``model.family`` gives it."""

from pypar.models.decoder_section import DecoderSection
from pypar.models.family import ModelSection

FAMILIES: dict[str, type[ModelSection]] = {
    "decoder": DecoderSection,
}
