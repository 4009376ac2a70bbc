"""The whole story in one command: data, teachers, students, distillation, reasoning, pictures.

    python -m eval.reproduce                        # quick: about 6 minutes on two cores
    python -m eval.reproduce --preset standard      # 3 seeds: the pictures of the README
    python -m eval.reproduce --preset full          # sizes for one laptop GPU

Every training run's command is printed, so that it can be run alone. What is done already is not
done again: stop it whenever you like, and the same command resumes.
"""

import argparse
import time

from eval import plots
from eval.experiments import (
    alpha,
    curves,
    data_share,
    headline,
    optimizer,
    reasoning,
    soft_labels,
    teacher_reading,
    teacher_size,
    temperature,
)
from eval.experiments.common import prepare_data, preset_args, run_experiments, settled
from eval.report import check_report, write_report
from files import command_line


def parse_args(argv=None) -> argparse.Namespace:
    return preset_args(__doc__, argv)


def main(args) -> None:
    started = time.perf_counter()
    scale, results = settled(args.scale, args), args.results
    check_report(results, scale)
    prepare_data(scale)
    # One pool for all runs. First those that others wait for, and the longest; last those whose row
    # is theirs already: a plain student's is measured beside the teacher, after its run.
    first = [headline.experiment(scale), reasoning.experiment(scale)]
    order = (data_share, teacher_size, temperature, alpha, teacher_reading, optimizer)
    others = [module.experiment(scale) for module in order]
    run_experiments([*first, *others, reasoning.hard_experiment(scale)], results)
    curves.run(scale, results)
    soft_labels.run(scale, results)
    pictures = plots.draw_all(results)
    print("\n" + write_report(results, scale))
    print("\npictures:", *pictures, sep="\n  ")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    command_line(main, parse_args())
