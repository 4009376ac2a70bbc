"""What others' code takes for the same distillation step: TRL's GKD trainer, MiniMind's loop.

    python -m pip install -r requirements-bench.txt
    python -m bench.benchmark --only distillation --peers

GKDTrainer (Agarwal et al. 2023, 2306.13649) with beta = 0 and lmbda = 0 is forward KL on given
text, which is our alpha = 0. Both models are transformers' Llama of our exact shape, and every
batch is ready in memory. Timed are

    TRL GKD, train()         30 steps as a user has them: loop, clipping, AdamW, log
    TRL GKD, training_step   its forward and backward pass alone, and an AdamW step of ours

MiniMind's loop needs no package: it is the step that its train_distillation.py describes (labels
and KL on the valid tokens' logits, picked by a mask; gradients clipped), on our own models.
"""

import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model import ModelConfig

from .timing import Variants

STEPS = 30  # of one train()


def llama(size: str):
    """transformers' Llama of a preset's shape, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig.from_dict(ModelConfig.preset(size, 1024).to_json()))


def minimind_step(pair) -> Callable[[], int]:
    """alpha = 0.5, T = 1; pair: a benchmark's Pair."""
    valid = torch.ones_like(pair.labels).flatten()

    def step() -> int:
        logits = pair.student(pair.input_ids)
        with torch.no_grad():
            teacher_logits = pair.teacher(pair.input_ids)
        each = F.cross_entropy(logits.flatten(0, 1), pair.labels.flatten(), reduction="none")
        loss = 0.5 * (each * valid).sum() / valid.sum()
        chosen, theirs = (x.flatten(0, 1)[valid == 1] for x in (logits, teacher_logits))
        loss += 0.5 * F.kl_div(chosen.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0)
        pair.optimizer.step()
        pair.optimizer.zero_grad(set_to_none=True)
        return pair.labels.numel()

    return step


def peer_variants(sizes: str, pair, device) -> Variants:
    """The same steps on the tokens of `pair`, vocabulary 1,024. Raises ValueError without TRL."""
    try:
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast, PrinterCallback
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise ValueError(
            f"--peers needs {error.name}: python -m pip install -r requirements-bench.txt"
        ) from None
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    student, teacher = map(llama, sizes.split("<"))
    words = {f"w{number}": number for number in range(1024)}  # the trainer asks for a tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w0"
    )
    input_ids = pair.input_ids
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    batch["labels"] = input_ids.clone()
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            output_dir=folder, lmbda=0.0, beta=0.0, temperature=1.0, report_to=[], bf16=False,
            activation_checkpointing=False, use_cpu=device.type == "cpu",
            per_device_train_batch_size=len(input_ids), max_steps=STEPS, save_strategy="no",
            logging_steps=10, optim="adamw_torch_fused", disable_tqdm=True,
            dataloader_pin_memory=False,
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        )  # fmt: skip
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, args=settings, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": [1]}] * len(input_ids) * STEPS),
            data_collator=lambda examples: batch,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1  # which its train() would set
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4, fused=True)

    def step() -> int:
        trainer.model.train()
        trainer.training_step(trainer.model, dict(batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return input_ids.numel()

    def train() -> int:
        trainer.train()
        return STEPS * input_ids.numel()

    return {
        "MiniMind-style loop": minimind_step(pair),
        "TRL GKD, train()": train,
        "TRL GKD, training_step": step,
    }
