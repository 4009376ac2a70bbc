#!/usr/bin/env bash
# The story of MiniDistill, command by command: run the file, or paste what you like into a shell.
#
#     bash -e speedrun.sh
#
# They are the commands that `python -m eval.reproduce` runs for its two main tables, with seed 0;
# there they run side by side, a core each. Every script says with --help what its flags do. A run
# that was stopped resumes with its own command and --resume; the last line does all that is left.

# 0. Data: Shakespeare's plays as token streams, word problems with gold traces, one tokenizer.
python -m dataset.prepare --out out/quick/data --tier easy --vocab_size 2048 --problems 16000 \
    --prompts 3000 --test_problems 500

# 1. Distillation by logits.

# The teacher: 1.05M parameters, which reads four times what its students read.
python train_pretrain.py --model mini --data out/quick/data --steps 600 --warmup 5 \
    --batch_size 16 --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --out out/quick/runs/teacher-mini-s0

# A plain student, 0.23M: the text alone.
python train_pretrain.py --model nano --data out/quick/data --steps 150 --warmup 5 \
    --batch_size 16 --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --out out/quick/runs/plain-nano-s0

# The distilled student: the same tokens, and the teacher's distribution for each.
python train_distillation.py --teacher out/quick/runs/teacher-mini-s0 --student nano \
    --temperature 1.0 --alpha 0.5 --data out/quick/data --steps 150 --warmup 5 --batch_size 16 \
    --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --out out/quick/runs/distilled-from-teacher-mini-s0-T1-a0.5

# How do teacher, plain and distilled student continue a text?
echo "Tell me, my daughters" | python -m eval.chat --complete --max_new_tokens 60 \
    --model out/quick/runs/teacher-mini-s0
echo "Tell me, my daughters" | python -m eval.chat --complete --max_new_tokens 60 \
    --model out/quick/runs/plain-nano-s0
echo "Tell me, my daughters" | python -m eval.chat --complete --max_new_tokens 60 \
    --model out/quick/runs/distilled-from-teacher-mini-s0-T1-a0.5

# The distilled student has cost more. What does a plain one reach at the same cost?
cost() {
    python -c 'import json, sys
column, *runs = sys.argv[1:]
total = sum(json.load(open(run + "/run.json"))[column] for run in runs)
print(float(f"{total:.6g}"))' "$@"
}

# A plain student that trains as many seconds as the distilled one took.
python train_pretrain.py --model nano --data out/quick/data --warmup 5 --batch_size 16 \
    --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --seconds $(cost seconds out/quick/runs/distilled-from-teacher-mini-s0-T1-a0.5) \
    --out out/quick/runs/equal-seconds-nano-s0

# A plain student with as many operations as the distilled one, its teacher's passes included.
python train_pretrain.py --model nano --data out/quick/data --warmup 5 --batch_size 16 \
    --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --flops $(cost flops out/quick/runs/distilled-from-teacher-mini-s0-T1-a0.5) \
    --out out/quick/runs/equal-flops-nano-s0

# A plain student with as many operations as the distilled one and its teacher's training.
python train_pretrain.py --model nano --data out/quick/data --warmup 5 --batch_size 16 \
    --seq_len 128 --data_share 1.0 --seed 0 --eval_every 50 --final_eval 200 \
    --flops $(cost flops out/quick/runs/distilled-from-teacher-mini-s0-T1-a0.5 \
        out/quick/runs/teacher-mini-s0) --out out/quick/runs/equal-flops-and-teacher-nano-s0

# 2. Distillation by reasoning: word problems of 1 to 4 steps.

# The reasoning teacher, 0.49M: gold traces, until it is good at them.
python train_distill_reason.py --student micro --tokenizer out/quick/data \
    --data out/quick/data/reason_train.jsonl --steps 1600 --batch_size 16 --seed 0 \
    --tag_weight 1.0 --eval_every 500 --final_eval 300 \
    --out out/quick/runs/reason-teacher-micro-s0

# A student that learns the answers alone, 0.23M as the next two.
python train_distill_reason.py --student nano --tokenizer out/quick/data \
    --data out/quick/data/reason_train.jsonl --steps 1000 --batch_size 16 --seed 0 \
    --tag_weight 1.0 --eval_every 500 --final_eval 300 --answers_only \
    --out out/quick/runs/reason-answers-s0

# A student that learns gold traces: to write the steps first.
python train_distill_reason.py --student nano --tokenizer out/quick/data \
    --data out/quick/data/reason_train.jsonl --steps 1000 --batch_size 16 --seed 0 \
    --tag_weight 1.0 --eval_every 500 --final_eval 300 --out out/quick/runs/reason-tag1-s0

# The teacher writes traces for problems that have none ...
python -m dataset.make_traces --teacher out/quick/runs/reason-teacher-micro-s0 \
    --prompts out/quick/data/reason_prompts.jsonl --seed 0 \
    --out out/quick/runs/traces-of-micro-s0.jsonl

# ... and a student learns from its words.
python train_distill_reason.py --student nano --tokenizer out/quick/data \
    --data out/quick/runs/traces-of-micro-s0.jsonl --steps 1000 --batch_size 16 --seed 0 \
    --tag_weight 1.0 --eval_every 500 --final_eval 300 \
    --out out/quick/runs/reason-teachers-words-s0

# How many answers are right, at each number of steps?
python -m eval.reasoning --problems out/quick/data/reason_test.jsonl \
    --model out/quick/runs/reason-teacher-micro-s0
python -m eval.reasoning --problems out/quick/data/reason_test.jsonl \
    --model out/quick/runs/reason-answers-s0
python -m eval.reasoning --problems out/quick/data/reason_test.jsonl \
    --model out/quick/runs/reason-tag1-s0
python -m eval.reasoning --problems out/quick/data/reason_test.jsonl \
    --model out/quick/runs/reason-teachers-words-s0

# 3. The other experiments, the tables and the pictures. What is done is not done again.
python -m eval.reproduce
