"""Save and load a model as a Hugging Face checkpoint folder.

    config.json               sizes and architecture (`ModelConfig.to_json`)
    manifest.json             sha256 of the weights' file, checked on loading
    model.safetensors         weights under Hugging Face's Llama names; a tied head is not stored
    generation_config.json    which tokens end a turn
    tokenizer.json, ...       copied from where the model's tokenizer lies

Loading is strict both ways: every parameter must be in the file with its exact shape, and nothing
may be left over. Only safetensors are read, so loading a stranger's folder runs no code of theirs.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from run import parallel, shards
from run.files import atomic_path, copy_tokenizer, file_hash, read_json, write_json

from .config import PRESETS, ModelConfig
from .transformer import Transformer

MANIFEST = "manifest.json"


def save_model(model: Transformer, folder, tokenizer_folder=None) -> None:
    """Write `model` to `folder`, in the dtype that its parameters have.

    tokenizer_folder: where tokenizer.json lies; its files are copied so that the folder is whole.
    To be called by every process of a run, of which one writes.
    """
    folder = Path(folder)
    tensors = shards.gather(dict(model.state_dict()))
    if not parallel.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_json(folder / "config.json", model.config.to_json())
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False},
    )
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)
    weights = folder / "model.safetensors"
    with atomic_path(weights) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        # Before the new file takes its place: whichever of the two a crash leaves is known.
        earlier = [file_hash(weights)] if weights.is_file() else []
        write_json(folder / MANIFEST, {"sha256": [file_hash(temporary), *earlier]})


def check_manifest(file: Path) -> None:
    """Raise ValueError where save_model wrote other bytes: a flipped bit loads without a word.

    Folders that others made have no manifest, and pass.
    """
    manifest = file.parent / MANIFEST
    if file.name == "model.safetensors" and manifest.is_file():
        if file_hash(file) not in read_json(manifest).get("sha256", []):
            raise ValueError(
                f"{file} is damaged: its bytes are not those that {MANIFEST} names; train it "
                "again, use the folder's best/, or copy it again (delete the manifest if you "
                "changed the weights yourself)"
            )


def read_config(folder) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises ValueError naming what is missing."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"no checkpoint in '{folder}': {path} does not exist; train one first "
            "(python train_pretrain.py) or pass another folder"
        )
    config = read_json(path)
    try:
        return ModelConfig.from_json(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        files = [single]
    else:
        mapped = read_json(index).get("weight_map")
        names = list(mapped.values()) if isinstance(mapped, dict) else []
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ValueError(f"{index}: 'weight_map' must name files of this folder: download it")
        files = [folder / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist: only safetensors checkpoints are read; "
                "convert the model or download it whole"
            )
    return files


def load_model(folder, device="cpu", dtype=torch.float32) -> Transformer:
    """Load a checkpoint folder to `device` with parameters in `dtype`, in evaluation mode.

    Raises ValueError for a folder, architecture, key or shape that does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: nothing is allocated before the file is checked
        model = Transformer(config)
    expected = dict(model.named_parameters())  # a tied head appears once, as embed_tokens
    loaded: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as weights:
                for name in weights.keys():
                    # Older exports store rotary tables, and some a copy of the tied head.
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if name not in expected:
                        raise ValueError(
                            f"{file}: unexpected weight '{name}': the file is not of this "
                            f"{config.to_json()['architectures'][0]}; check config.json"
                        )
                    shape = tuple(weights.get_slice(name).get_shape())
                    if shape != tuple(expected[name].shape):
                        raise ValueError(
                            f"{file}: '{name}' has shape {shape}, config.json says "
                            f"{tuple(expected[name].shape)}: the two do not belong together"
                        )
                    loaded[name] = weights.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}): save or download it again"
            ) from None
        check_manifest(file)
    missing = [name for name in expected if name not in loaded]
    if missing:
        raise ValueError(
            f"{folder}: weight '{missing[0]}' is missing ({len(missing)} in all): "
            "the checkpoint is incomplete; save or download it again"
        )
    if config.tie_word_embeddings:
        loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    model.load_state_dict(loaded, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(device).eval()


def make_or_load(name: str, vocab_size: int, device="cpu") -> Transformer:
    """A new model of preset `name`, or the checkpoint in the folder `name`, with that vocabulary.

    Raises ValueError where the folder's vocabulary is another one.
    """
    if name in PRESETS or not Path(name).exists():
        return Transformer(ModelConfig.preset(name, vocab_size)).to(device)
    model = load_model(name, device)
    if model.config.vocab_size != vocab_size:
        raise ValueError(
            f"{name} has vocabulary {model.config.vocab_size}, here {vocab_size} is needed: both "
            "must use one tokenizer; train it again on this data, or start from a preset"
        )
    return model
