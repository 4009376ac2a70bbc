"""A run of several phases, each a run of its own: a base, an assistant, a generation.

    folder = run_phase(args, "base", train, steps=200)   # train(args of the phase), in phases/base
    ...                                                  # the last phase is the run in --out itself
    run = Run(args); student = run.student(folder, data); ...; run.finish()

A phase that is finished is loaded, one that was stopped goes on with --resume. What all phases cost
together is in the run.json of the last one, and what each cost by itself under "phases"; the flags
that the whole chain was given are under "given", among its "args".
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from files import Finished, check_free, read_json

from .checkpoint import NOT_IN_RESULT
from .flags import check_flags

COSTS = ("tokens", "flops", "seconds")


def run_phase(args: Namespace, name: str, train: Callable, **changes) -> Path:
    """Run train(args) with `changes` to the flags, in --out/phases/NAME, unless that is done;
    returns that folder. Raises ValueError where it was done with other flags or files, or where
    --out holds something else already."""
    whole, out = Path(args.out), Path(args.out) / "phases" / name
    if "given" not in args:  # before a phase's folder takes the place of --teacher or --student
        plain = {k: v for k, v in vars(args).items() if k not in NOT_IN_RESULT}
        args.given = json.loads(json.dumps(plain, default=str))
    check_flags(args)
    check_free(whole, ("run.json", "resume"), args.overwrite)
    if (whole / "run.json").is_file() and not args.resume and not args.overwrite:
        cure = "pass --overwrite to replace it, or another --out"
        raise ValueError(f"{whole} already holds a run: {cure}")
    (whole / "resume").mkdir(parents=True, exist_ok=True)  # the mark of a run's folder
    own = Namespace(**{**vars(args), "phases": [], **changes, "out": out})
    del own.given
    own.resume = args.resume or (out / "run.json").is_file() and not args.overwrite
    own.overwrite = args.overwrite and not own.resume
    print(f"{out}: phase {name}")
    try:
        train(own)
    except Finished as reason:
        print(reason)
    if str(out) not in vars(args).setdefault("phases", []):
        args.phases.append(str(out))
    return out


def val_loss(folder: Path) -> float:
    """The held-out loss of a finished run, in nats per token."""
    return read_json(folder / "run.json", metrics=dict)["metrics"]["val_loss"]


def share_of(args: Namespace, share: float) -> dict:
    """That share of the run's budget, in whichever unit it is."""
    budget = {name: share * x for name in ("flops", "seconds") if (x := getattr(args, name))}
    return {"steps": max(1, round(share * args.steps)), **budget}


def add_phases(args: Namespace, costs: dict[str, float]) -> dict:
    """`costs` and those of all phases before: the sums, and each phase's own."""
    own, names = {}, getattr(args, "phases", [])
    for folder in names:
        record = read_json(Path(folder) / "run.json", tokens=int, flops=float)
        own[Path(folder).name] = {name: record[name] for name in COSTS}
    if not own:
        return costs
    own["last"] = {name: costs[name] for name in COSTS}
    return {name: sum(phase[name] for phase in own.values()) for name in COSTS} | {"phases": own}
