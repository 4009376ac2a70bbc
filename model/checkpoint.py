"""Save and load a model as a Hugging Face checkpoint folder.

    config.json               sizes and architecture (`ModelConfig.to_json`)
    manifest.json             sha256 of the three that belong together, checked on loading
    model.safetensors         weights under Hugging Face's names; a tied head is not stored
    generation_config.json    which tokens end a turn
    tokenizer.json, ...       copied from where the model's tokenizer lies

Only safetensors are read, so loading a stranger's folder runs no code of theirs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import files
from files import check_file, check_keys, known_hash, read_json, tokenizer_hash, write_json

from .config import PRESETS, ModelConfig
from .control import control_ids
from .experts import MIXTRAL, ExpertsConfig, add_experts
from .prune import layers_named, take_layers
from .transformer import Transformer
from .vocabulary import rows_for, select_rows

MANIFEST = "manifest.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_model(model: Transformer, folder, tokenizer_folder=None, state: dict | None = None):
    """Write `model` to `folder`, in the dtype of its parameters, with a copy of its tokenizer (its
    folder says which tokens begin, end and pad).
    state: its state_dict, where it had to be gathered from several processes."""
    folder, state = Path(folder), model.state_dict() if state is None else state
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    ids = control_ids(tokenizer_folder or folder)
    if tokenizer_folder is not None:
        files.copy_tokenizer(tokenizer_folder, folder)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    end = {"eos_token_id": next(iter(ids["eos_token_id"]), None)}  # all are in the other file
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    paths = folder / "model.safetensors", folder / "config.json"
    with files.atomic_path(paths[0]) as weights, files.atomic_path(paths[1]) as config:
        save_file(tensors, weights, metadata={"format": "pt"})
        write_json(config, model.config.to_json() | ids | end | {"dtype": dtype})
        write_manifest(folder, [weights, paths[0]], [config, paths[1]])


def write_manifest(folder: Path, weights: list[Path], configs: list[Path]) -> None:
    """Record which files belong together in `folder`: the new ones, and those whose place they are
    about to take, as far as there are any. Whichever of them a crash leaves is known."""
    manifest = {}
    for name, paths in (("sha256", weights), ("config_sha256", configs)):
        manifest[name] = [files.file_hash(path) for path in paths if path.is_file()]
    if (folder / "tokenizer.json").is_file():
        manifest["tokenizer_sha256"] = tokenizer_hash(folder)
    write_json(folder / MANIFEST, manifest)


def check_manifest(file: Path) -> None:
    """Raise ValueError where save_model wrote other bytes, or beside another config.json or another
    tokenizer: nothing else would notice."""
    manifest = file.parent / MANIFEST
    if file.name != "model.safetensors" or not manifest.is_file():
        return  # of a folder that others made
    written = {"config_sha256": [], **read_json(manifest, sha256=list)}
    check_keys(written, manifest, config_sha256=list)  # []: of an earlier version
    tokenizer = written.get("tokenizer_sha256")  # None of a model that has none
    if tokenizer is not None and tokenizer != tokenizer_hash(file.parent):
        other = f"{file.parent}/tokenizer.json is not the one that these weights were saved with"
        raise ValueError(f"{other}: copy that back, or train again")
    config, known = file.parent / "config.json", written["config_sha256"]
    if known and files.file_hash(config) not in known:
        other = f"{config} is not the one that these weights were saved with"
        raise ValueError(f"{other}: copy that back, or delete {manifest} if you mean the change")
    if known_hash(file) not in written["sha256"]:
        cure = "train or copy it again, or use best/ (delete the manifest of weights you changed)"
        raise ValueError(f"{file} is damaged: its bytes are not those of {MANIFEST}; {cure}")


def weights_hash(folder) -> str:
    """sha256 of a checkpoint's weights: of its one file, or of its shards' hashes together."""
    first, *more = [known_hash(path) for path in weight_files(Path(folder))]
    return hashlib.sha256("".join([first, *more]).encode("ascii")).hexdigest() if more else first


def checkpoint_files(folder) -> list[Path]:
    """What a model depends on: its weights, config.json and tokenizer.json."""
    folder = Path(folder)
    return [*weight_files(folder), folder / "config.json", folder / "tokenizer.json"]


def read_config(folder) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises ValueError naming what is missing."""
    path, make = Path(folder, "config.json"), "python train_pretrain.py --data DATA --out"
    cure = f"make one with: {make} {folder} (DATA: what it is to know), or pass another folder"
    missing = f"no checkpoint in '{folder}': {path} does not exist"
    config = read_json(check_file(path, cure, missing))
    kind = ExpertsConfig if config.get("architectures") in ([MIXTRAL], MIXTRAL) else ModelConfig
    try:
        return kind.from_json(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def number_of_layers(name: str) -> int:
    """Of a preset, of a student "layers:N", or of the checkpoint in the folder `name`."""
    if (few := layers_named(name)) is not None:
        return few
    return PRESETS[name][1] if name in PRESETS else read_config(name).num_hidden_layers


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    index, paths = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file() and not paths[0].is_file():
        names = list(read_json(index, weight_map=dict)["weight_map"].values())
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ValueError(f"{index}: 'weight_map' must name files of this folder: download it")
        paths = [folder / name for name in sorted(set(names))]
    cure = "only safetensors checkpoints are read; convert or download the model"
    return [check_file(path, cure) for path in paths]


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file, mapped into memory: what is taken out of it is read when it is used.
    Raises ValueError naming a file that cannot be read."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        unreadable = f"{file} is not a readable safetensors file ({error})"
        raise ValueError(f"{unreadable}: save or download it again") from None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is inf or nan; unlike isfinite().all(), without another copy of them."""
    return tensor.numel() == 0 or all(limit.isfinite() for limit in tensor.aminmax())


def load_model(folder, device="cpu", dtype: torch.dtype | None = torch.float32) -> Transformer:
    """A checkpoint folder's model on `device`, its parameters in `dtype` (None: as they are
    stored), in evaluation mode. One tensor at a time is read and converted, so memory holds the
    model and little more.
    Raises ValueError unless every parameter is there with its exact shape, and no other."""
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: nothing is allocated before the file is checked
        model = Transformer(config)
        if isinstance(config, ExpertsConfig):
            add_experts(model, config)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(Path(folder)):
        with opened(file) as tensors:
            names = list(tensors.keys())
        check_manifest(file)
        for name in names:
            with opened(file) as tensors:  # anew: a mapping keeps in memory all that was read of it
                tensor = tensors.get_tensor(name)
            if name.endswith("rotary_emb.inv_freq"):
                continue  # older exports store rotary tables, and some a copy of the tied head
            if tensor.dtype not in FLOATS:
                kind = f"{folder}: {name} is of {tensor.dtype}, integer or quantised"
                raise ValueError(f"{kind}: use a checkpoint of float32, float16 or bfloat16")
            state[name] = tensor.to(dtype or tensor.dtype)
            if not is_finite(state[name]):
                broken = f"{folder}: {name} has values that are inf or nan"
                raise ValueError(f"{broken}: the model is broken; train or download it again")
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # it names what is missing, left over or of another shape
        reason = " ".join(str(error).split())[:300]
        cure = "config.json is of another model, or save or download the weights again"
        raise ValueError(f"{folder}: {reason}: {cure}") from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_().to(device).eval()


def load_for(folder, data, device="cpu", dtype=torch.float32) -> Transformer:
    """`load_model`, with a row for each token of `data`'s tokenizer and no other
    (model/vocabulary.py). Raises ValueError where the model does not know the data's tokens."""
    model, rows = load_model(folder, dtype=dtype), rows_for(folder, data)
    if rows is None:
        own = f"the tokenizer of {folder} (vocabulary {model.config.vocab_size})"
        other = f"the one of {data.tokenizer_folder} (vocabulary {data.vocab_size})"
        cure = f"run python -m dataset.prepare --tokenizer {folder} --out NEW, then pass --data NEW"
        if data.padded:  # conversations: read with the tokenizer of the first folder
            cure = f"start the student from a preset, with --tokenizer {folder}"
        raise ValueError(f"{own} is not {other}: both must use one tokenizer; {cure}")
    if max(rows) >= (size := model.config.vocab_size):
        few = f"{folder} has vocabulary {size}, the data {data.vocab_size}"
        raise ValueError(f"{few}: both must use one tokenizer; re-train on this data")
    return select_rows(model, rows).to(device)


def make_or_load(name: str, vocab_size: int, data=None, teacher=None) -> Transformer:
    """A new model of preset `name`, the folder `name`'s, or of "layers:N" that many layers of the
    folder `teacher`'s; raises ValueError where its tokenizer is not that of `data`."""
    if (few := layers_named(name)) is not None:
        # As it is stored until the other layers are gone: it may be large.
        return take_layers(load_for(teacher, data, dtype=None), few).float()
    if name in PRESETS or not Path(name).exists():
        return Transformer(ModelConfig.preset(name, vocab_size))
    return load_for(name, data)
