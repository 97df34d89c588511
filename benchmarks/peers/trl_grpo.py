"""The steps of `benchmarks/grpo_step.py` on TRL's GRPOTrainer; run by that script.

Needs `pip install torch==2.13.0 trl==1.16.0` in an environment of its own. Generation is
transformers' `generate`, which TRL uses without a vLLM server on a GPU. A step is one update, as on
our side. Prints one line of JSON per step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--mode", choices=["single", "multi"], required=True)
parser.add_argument("--groups", type=int, required=True)
parser.add_argument("--group-size", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--micro", type=int, default=16, help="sequences of a forward pass")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--bf16", action="store_true", help="autocast; fp32 without")
parser.add_argument("--out", required=True)
options = parser.parse_args()
os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1")
os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import talk
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

torch.set_num_threads(options.threads)
TURNS, TOKENS = talk.TURNS[options.mode], talk.TOKENS[options.mode]
EPISODES = options.groups * options.group_size
count = {"sampled": 0}
spent = {"generate": 0.0}


def text_of(completion: Any) -> str:
    """Return the reply's text, a string or a list of messages."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """Score each reply; with several turns, the text of the whole conversation."""
    return [talk.score(text_of(completion)) for completion in completions]


def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
    """Play several turns: generate, append the next question, generate on the whole again."""
    began = time.perf_counter()
    tokenizer = trainer.processing_class
    end = tokenizer.eos_token_id
    more = tokenizer.encode(
        f"\n<|im_start|>user\n{talk.CONTINUE}<|im_end|>\n<|im_start|>assistant\n",
        add_special_tokens=False,
    )
    starts = [
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for prompt in prompts
    ]
    replies: list[list[int]] = [[] for _ in starts]
    masks: list[list[int]] = [[] for _ in starts]
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        model.eval()
        for turn in range(TURNS):
            rows = [start + reply for start, reply in zip(starts, replies, strict=True)]
            width = max(map(len, rows))
            pad = [[tokenizer.pad_token_id] * (width - len(row)) for row in rows]
            ids = torch.tensor([p + row for p, row in zip(pad, rows, strict=True)])
            seen = torch.tensor(
                [[0] * len(p) + [1] * len(row) for p, row in zip(pad, rows, strict=True)]
            )
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=seen,
                    max_new_tokens=TOKENS,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=tokenizer.pad_token_id,
                )[:, width:].tolist()
            for reply, mask, new in zip(replies, masks, out, strict=True):
                new = new[: new.index(end) + 1] if end in new else new
                reply += new
                mask += [1] * len(new)
                count["sampled"] += len(new)
                if turn + 1 < TURNS:
                    said = ([] if new[-1] == end else [end]) + more
                    reply += said
                    mask += [0] * len(said)
        model.train()
    spent["generate"] += time.perf_counter() - began
    return {"prompt_ids": starts, "completion_ids": replies, "logprobs": None, "env_mask": masks}


class Timed(GRPOTrainer):
    """Measure generation; with several turns `rollout` measures it."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        spent["generate"] += time.perf_counter() - began
        count["sampled"] += sum(map(len, result[0]))
        return result


class Clock(TrainerCallback):
    """Print one line per step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began, self.spent, self.count = time.perf_counter(), dict(spent), dict(count)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        line = {
            "seconds": time.perf_counter() - self.began,
            "generate": spent["generate"] - self.spent["generate"],
            "sampled": count["sampled"] - self.count["sampled"],
        }
        print("STEP", json.dumps(line), flush=True)


settings = GRPOConfig(
    output_dir=options.out,
    per_device_train_batch_size=options.micro,
    gradient_accumulation_steps=EPISODES // options.micro,
    num_generations=options.group_size,
    max_completion_length=TOKENS if options.mode == "single" else 448,
    max_steps=options.steps,
    learning_rate=1e-6,
    lr_scheduler_type="constant",
    loss_type="dapo",
    beta=0.0,
    temperature=1.0,
    bf16=options.bf16,
    gradient_checkpointing=False,  # TRL's default is on, and slower
    model_init_kwargs={"dtype": "float32"},
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    seed=0,
)
asks = [
    {"prompt": [{"role": "user", "content": talk.ASK.format(subject)}]} for subject in talk.SUBJECTS
] * (1 + options.groups * (options.steps + 1) // len(talk.SUBJECTS))
trainer = Timed(
    model=options.model,
    reward_funcs=reward,
    args=settings,
    train_dataset=Dataset.from_list(asks),
    processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
    callbacks=[Clock()],
    **({"rollout_func": rollout} if options.mode == "multi" else {}),
)
trainer.train()
