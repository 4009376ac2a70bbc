"""A teacher that costs no training: random weights, large enough that tokens differ in p_max."""

from pathlib import Path

import torch

from model import ModelConfig, Transformer, save_model


def make_random_teacher(folder: Path, data: Path) -> Path:
    """Save one that reads the tokens of the prepared folder `data`; returns its folder."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", 400))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim == 2 else 1)
    save_model(model, folder / "teacher", data)
    return folder / "teacher"
