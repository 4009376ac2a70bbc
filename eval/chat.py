"""Talk to a model in the terminal; words appear as they are made.

    python -m eval.chat --model out/reasoner
    python -m eval.chat --model out/reasoner --teacher out/reason_teacher     # both reply
    python -m eval.chat --model out/student --complete                        # continue a text

Replies are greedy. Texts are sampled, at temperature 0.8 from the likeliest 95%: greedy, a small
model soon repeats one sentence for ever. An empty line or Ctrl-D ends the talk; "/new" forgets what
was said. A model that others made is asked in its own form, which may begin with the words of a
system; --system gives others.
"""

import argparse
import sys

import torch

from dataset.chat import encode_prompt, stop_ids, with_system
from dataset.tokenizer import decode, encode, load_tokenizer
from files import check_ranges, command_line, new_parser, printable
from model import generate, load_model, stream
from model.device import choose_device

TEXT = {"temperature": 0.8, "top_p": 0.95}  # how a text is continued unless flags say otherwise
TURNS = {"temperature": 0.0, "top_p": 1.0}
TEMPERATURES = (0.0, 10.0)


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__, temperature=TEMPERATURES)
    parser.add_argument("--model", default="out/reasoner", help="checkpoint folder")
    parser.add_argument("--teacher", default=None, help="a second folder, to reply too")
    parser.add_argument("--complete", action="store_true", help="continue your text, without turns")
    told = "words that the models are told first; default those of their own template, if any"
    parser.add_argument("--system", default=None, help=told)
    greedy = "of sampling; 0: greedy; default 0, with --complete 0.8"
    parser.add_argument("--temperature", type=float, default=None, help=greedy)
    parser.add_argument("--top_k", type=int, default=0, help="sample among the best k; 0: all")
    mass = "sample among the likeliest of this mass; default 1, with --complete 0.95"
    parser.add_argument("--top_p", type=float, default=None, help=mass)
    parser.add_argument("--max_new_tokens", type=int, default=200, help="of one reply")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    for name, value in (TEXT if args.complete else TURNS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def complete(model, tokenizer, prompt: str, max_new_tokens: int = 100, seed: int = 0) -> str:
    """How the model continues the prompt, sampled as `--complete` does; one seed, one text."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    sampling = {**TEXT, "stop_ids": stop_ids(tokenizer), "generator": generator}
    (ids,) = generate(model, [encode(tokenizer, prompt)], max_new_tokens, **sampling)
    return decode(tokenizer, ids).rstrip("\ufffd")  # of a character that was cut


def reply(model, tokenizer, prompt: list[int], args, generator) -> str:
    """Print the reply while it is made; return it whole."""
    room = model.config.max_position_embeddings - args.max_new_tokens
    prompt = prompt[-room:]  # the oldest words are forgotten first
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    sampling |= {"stop_ids": stop_ids(tokenizer), "generator": generator}
    ids, shown = [], ""
    for token in stream(model, prompt, args.max_new_tokens, **sampling):
        ids.append(token)
        text = decode(tokenizer, ids)
        if not text.endswith("\ufffd"):  # a character of several bytes may not be whole yet
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
    text = decode(tokenizer, ids).rstrip("\ufffd")  # a character that was cut is not one
    print(printable(text[len(shown) :]))
    return text


def main(args) -> None:
    check_ranges(args, temperature=TEMPERATURES)
    if args.complete and args.system is not None:
        raise ValueError("--system is of turns: leave it out, or leave out --complete")
    device = choose_device(args.device)
    speakers = []
    for folder in filter(None, (args.model, args.teacher)):
        model = load_model(folder, device)
        if args.max_new_tokens >= model.config.max_position_embeddings:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens} must be below the "
                f"{model.config.max_position_embeddings} positions of {folder}"
            )
        speakers.append((folder, model, load_tokenizer(folder), []))
    generator = torch.Generator(device=device).manual_seed(args.seed)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 are no reason to stop
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        if not said.strip():
            return
        for folder, model, tokenizer, turns in speakers:
            if said.strip() == "/new":
                turns.clear()
                continue
            if len(speakers) > 1:
                print(f"[{folder}]")
            if args.complete:
                reply(model, tokenizer, encode(tokenizer, said), args, generator)
                continue
            turns.append({"role": "user", "content": said})
            prompt = encode_prompt(tokenizer, with_system(turns, args.system))
            content = reply(model, tokenizer, prompt, args, generator)
            turns.append({"role": "assistant", "content": content})


if __name__ == "__main__":
    command_line(main, parse_args())
