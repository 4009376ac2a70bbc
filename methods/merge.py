"""Merging models (LM-Cocktail): average descendants of one base, weighted by a few examples.

    theta = sum_i w_i theta_i        w = softmax(-L(theta_i; few examples) / tau)

A base takes the first part of --steps, copies of it on each part of the text (other plays) the
rest; their float32 weights are averaged (2311.13534; soups, 2203.05482). No mixture of experts, as
popular texts have it: one model comes out. No teacher, so no KL: all learn by CE, and L is CE, a
mean over labels that are not -100. Nobody trains on the windows of the examples, and nothing is
reported on them. Traps: bases of several seeds (--ancestors 2) have no hidden unit in common, and
their merge must fail; weights that do not add up to 1 shrink a model. The last run is one step at
a rate of 1e-12 from the merged weights, for run.json, log.csv and best/; merge.json has the parts.
Charged: all phases; not the loss on the examples.

    python -m methods.merge
    python -m methods.merge --ancestors 2 --out out/two_ancestors

Judged on few: success is 0.02 nats below plain training of as many steps, and below every part.
Try: --tau 0.001 (the best part alone), --base_share 0.1 (how much must they have in common?).
Shapes: B batch, S sequence, V vocabulary.
"""

from argparse import Namespace

from torch import Tensor

from dataset.parts import PartOfText
from distill import cross_entropy, weighted_mean
from files import check_ranges, write_json
from model import load_model, save_model
from model.merge import merge, merge_weights
from run import Run, add_common_flags, command_line, evaluate, new_parser, run_phase
from run.phases import share_of, val_loss

RANGES = {"parts": (2, 64), "ancestors": (1, 64), "base_share": (0.01, 0.99), "tau": (1e-6, 1e6)}
RANGES |= {"examples": (1, 10**6)}
NOTHING = {"steps": 1, "flops": None, "seconds": None, "learning_rate": 1e-12}


def compute_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """CE, a scalar, and its one part. logits (B, S, V), labels (B, S)."""
    ce = weighted_mean(cross_entropy(logits, labels), labels != -100)
    return ce, {"ce": ce}


def train(args) -> dict:
    """One phase: args.student learns from args.part of the text."""
    run = Run(args)
    text = PartOfText(args, args.part)
    student = run.student(args.student, text)
    run.optimize(student)
    for input_ids, labels in run.batches(text):
        with run.precision():
            logits = student(input_ids)  # (B, S, V)
        loss, parts = compute_loss(logits, labels)
        run.step(loss, **parts)
    return run.finish()


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--parts", type=int, default=3, help="of the text: a descendant learns from each")
    add("--ancestors", type=int, default=1, help="bases, of different seeds, that they come from")
    add("--base_share", type=float, default=0.5, help="of all steps, those of the bases")
    add("--examples", type=int, default=16, help="windows of the text that only choose weights")
    add("--tau", type=float, default=0.1, help="nats per token: low prefers the best")
    add("--student", default="nano", help="preset or checkpoint folder, of the bases")
    add("--data", default="out/data", help="folder made by dataset.prepare")
    add("--data_share", type=float, default=1.0, help="share of the text")
    add_common_flags(parser, out="out/merge", fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    bases, folders = [], []
    for i in range(args.ancestors):
        own = {"part": "all", "seed": args.seed + i}
        own |= share_of(args, args.base_share / args.ancestors)
        bases.append(run_phase(args, f"base{i}", train, **own))
    for i in range(args.parts):
        own = {"part": i, "student": str(bases[i % args.ancestors])}
        own |= share_of(args, (1 - args.base_share) / args.parts)
        folders.append(run_phase(args, f"part{i}", train, **own))
    models, few = [load_model(folder) for folder in folders], PartOfText(args, "examples")
    losses = [evaluate(x, few.evaluation(args.batch_size, few.size))["val_loss"] for x in models]
    weights = merge_weights(losses, args.tau)
    models[0].load_state_dict(merge([x.state_dict() for x in models], weights))
    merged = args.out / "phases" / "merged"
    save_model(models[0], merged, args.data)
    record = train(Namespace(**{**vars(args), **NOTHING, "part": "all", "student": str(merged)}))
    own = [val_loss(folder) for folder in folders]
    found = {"weights": weights, "example_losses": losses, "val_losses": own}
    write_json(args.out / "merge.json", found)
    print(f"{found}; mean {sum(own) / len(own):.4f}, merged {record['metrics']['val_loss']:.4f}")
    return record


if __name__ == "__main__":
    command_line(main, parse_args())
