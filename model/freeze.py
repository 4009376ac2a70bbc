"""What of a model learns, where not all of it does."""

from .transformer import Transformer


def freeze_but(model: Transformer, number: int) -> None:
    """Only layer `number`, counted from 1, learns, with the first one the embedding. A tied head is
    the embedding: what is frozen is the parameter, by whatever path a gradient comes."""
    model.requires_grad_(False)
    model.model.layers[number - 1].requires_grad_(True)
    if number == 1:
        model.model.embed_tokens.requires_grad_(True)
