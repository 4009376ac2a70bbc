"""How large the experiments are: `quick` to see it work, `standard` for the pictures, `full`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of all experiments at one preset; by default those of `standard`."""

    name: str
    teacher: str = "mini"  # the reference teacher's preset
    student: str = "nano"
    teacher_sizes: tuple[str, ...] = ("nano", "micro", "mini")  # the student's own size first
    seeds: int = 3  # of every experiment but
    more_seeds: int = 5  # of those whose arms are close: alpha, and reasoning on easy problems
    teacher_steps: int = 1200  # teachers read several times what students read, as in life
    text_steps: int = 400  # of a student
    text_batch: int = 16
    seq_len: int = 128
    text_warmup: int = 50  # steps
    text_eval_every: int = 100  # steps between the points of a learning curve
    text_final_eval: int = 400  # held-out windows at the end of a run
    reason_teacher: str = "micro"
    reason_teacher_steps: int = 1600
    reason_steps: int = 1000  # of a student, on easy problems
    hard_steps: int = 3000  # of teacher and student on hard problems; 0: none are made
    reason_batch: int = 16
    reason_eval_every: int = 100
    reason_final_eval: int = 1000  # held-out conversations
    flags: tuple = ()  # more flags of all training runs, as a Job has them
    vocab_size: int = 2048
    problems: int = 20000  # with gold traces; a twentieth is held out to evaluate on
    prompts: int = 4000  # problems for which the reasoning teacher writes traces
    test_problems: int = 1000
    equal: tuple[str, ...] = ("seconds", "flops", "seconds and teacher", "flops and teacher")
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    data_shares: tuple[float, ...] = (0.03, 0.1, 1.0)  # of the text
    readings: tuple[float, ...] = (0.5, 1.0, 3.0)  # what teachers read, times what students read
    tag_weights: tuple[float, ...] = (1.0, 3.0, 10.0)
    with_kl: bool = True  # an arm of gold traces and the teacher's distribution

    @property
    def root(self) -> str:
        return f"out/{self.name}"

    @property
    def data(self) -> str:
        return f"{self.root}/data"

    @property
    def hard_data(self) -> str:
        return f"{self.root}/data-hard"


QUICK = Scale(
    "quick",
    seeds=1,
    more_seeds=1,
    teacher_steps=600,
    text_steps=150,
    text_warmup=5,  # the scripts' default is too long for a hundred steps
    text_eval_every=50,
    text_final_eval=200,  # beside a teacher, 400 took as long as 30 steps
    hard_steps=0,
    reason_eval_every=500,
    reason_final_eval=300,
    problems=16000,  # no more than the steps reach: reading them takes seconds in every run
    prompts=3000,
    test_problems=500,
    equal=("seconds", "flops", "flops and teacher"),
    temperatures=(1.0, 2.0, 4.0),
    alphas=(0.0, 0.5, 1.0),
    data_shares=(0.03, 1.0),
    readings=(),
    tag_weights=(1.0,),
    with_kl=False,
)
# Teachers of 6M, 26M and 104M, a student of 6M: for one laptop GPU.
FULL = Scale(
    "full", teacher="base", student="small", teacher_sizes=("small", "base", "large"),
    teacher_steps=6000, text_steps=2000, text_batch=32, seq_len=256, reason_teacher="base",
    reason_teacher_steps=3000, reason_steps=2000, reason_batch=64, flags=(("compile", None),),
    vocab_size=6400,
)  # fmt: skip
SCALES = {scale.name: scale for scale in (QUICK, Scale("standard"), FULL)}
