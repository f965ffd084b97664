"""Make a table of lmms-eval's prompts and scores, for comparison with this project's.

If lmms-eval 0.7.3 can be imported (see `docs/tasks.md`), this command writes the table ::

    python -m eval.tasks.against_lmms_eval tests/eval/lmms_eval_0_7_3.json

`tests/eval/test_tasks_lmms_eval.py` compares prompts, splits and scores with the table, and the
table with lmms-eval if that can be imported.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FAMILIES = {
    "textvqa": "textvqa/textvqa_val.yaml",
    "pope": "pope/pope.yaml",
    "gqa": "gqa/gqa.yaml",
    "vqav2": "vqav2/vqav2_val.yaml",
}
_KEPT = ("dataset_path", "dataset_name", "test_split", "generation_kwargs")
_PIECES = (
    "the", "a", "An", "two", "Ten", "none", "NONE", "zero", "2", "10", "1,000", "1,,2", "3.5",
    ".5", "5.", "...", "a.m.", "U.S.A.", "dont", "Dont", "don't", "whats", "it's", "cant",
    "youre", "o'clock", "yes", "no", "Yes.", "no!", "t-shirt", "and/or", "rock & roll", "stop?",
    '"quoted"', "(left)", "[x]", "{y}", "=", "+", "a+b", "_", "under_score", "-", "->", "<b>",
    "@home", "`", ",", ";", "é", "Ñandú", "naïve", "\t", "\n", "  ", "www.site.com", "12:30",
    "7-eleven", "50%", "$5.00", "half", "light blue", "blue", "Blue", "cat", "cats", "#1",
    "dr. pepper", "men's", "Men's Room", "o",
)  # fmt: skip
_SEED = 7


def table() -> dict[str, Any]:
    """Make the table. Needs lmms-eval."""
    import lmms_eval
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    rng = random.Random(_SEED)
    processor = EvalAIAnswerProcessor()
    # The processor's number table grows with every word, which does not change its results.
    texts = sorted(
        {*EvalAIAnswerProcessor.CONTRACTIONS, *EvalAIAnswerProcessor.CONTRACTIONS.values()}
    )
    texts += list(_PIECES) + ["a.b" * 20 + "." * 40] + [_text(rng) for _ in range(300)]
    words = [[text, processor(text), _without_tokenizing(processor, text)] for text in texts]
    return {
        "made_by": "python -m eval.tasks.against_lmms_eval tests/eval/lmms_eval_0_7_3.json",
        "lmms_eval": _version(lmms_eval),
        "words": words,
        "settings": {name: _settings(path) for name, path in _FAMILIES.items()},
        "textvqa": [_textvqa(rng) for _ in range(40)],
        "vqav2": [_vqav2(rng) for _ in range(40)],
        "gqa": [_gqa(rng) for _ in range(40)],
        "pope": _pope(rng),
    }


def _version(package: Any) -> str:
    from importlib.metadata import version

    return version(package.__name__)


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(_PIECES, k=rng.randint(1, 4)))


def _without_tokenizing(processor: Any, text: str) -> str:
    return str(processor.process_digit_article(processor.process_punctuation(text)))


def _yaml(path: str) -> Mapping[str, Any]:
    from lmms_eval import utils
    from lmms_eval.tasks import __file__ as tasks

    loaded: Mapping[str, Any] = utils.load_yaml_config(str(Path(tasks).parent / path), mode="full")
    return loaded


def _settings(path: str) -> dict[str, Any]:
    found = _yaml(path)
    settings = {name: found.get(name) for name in _KEPT}
    default = found["lmms_eval_specific_kwargs"]["default"]
    return settings | {"default": {name: default[name] for name in ("pre_prompt", "post_prompt")}}


def _prompt_options(name: str) -> dict[str, Any]:
    return dict(_yaml(_FAMILIES[name])["lmms_eval_specific_kwargs"]["default"])


def _ten(rng: random.Random) -> tuple[list[str], list[str]]:
    """Ten annotators' answers, and answers of models."""
    pool = [_text(rng) for _ in range(rng.randint(1, 5))]
    given = [rng.choice(pool) for _ in range(10)]
    answers = [
        *sorted(set(given)),
        given[0].upper(),
        f" {given[1]}.\n",
        f"the {given[2]}",
        _text(rng),
    ]
    return given, answers


def _textvqa(rng: random.Random) -> dict[str, Any]:
    from lmms_eval.tasks.textvqa import utils

    given, answers = _ten(rng)
    row = {
        "question_id": rng.randrange(100_000),
        "image_id": f"{rng.getrandbits(64):016x}",
        "question": rng.choice(
            ["what is the Name of IBM's boat?", "WHO wrote it", "who's on 1st?"]
        ),
        "answers": given,
        "ocr_tokens": rng.choices(["STOP", "Coca-Cola", "12", "é"], k=rng.randint(0, 4)),
    }
    options = _prompt_options("textvqa")
    return {
        "row": row,
        "prompt": utils.textvqa_doc_to_text(row, options),
        "prompt_ocr": utils.textvqa_doc_to_text(row, options | {"ocr": True}),
        "scores": [
            [one, utils.textvqa_process_results(copy.deepcopy(row), [one.strip()])["exact_match"]]
            for one in answers
        ],
    }


def _vqav2(rng: random.Random) -> dict[str, Any]:
    from lmms_eval.tasks.vqav2 import utils

    given, answers = _ten(rng)
    row = {
        "question_id": rng.randrange(100_000),
        "image_id": rng.randrange(100_000),
        "question": "What is it?",
        "answer_type": rng.choice(["yes/no", "number", "other"]),
        "answers": [
            {"answer": one, "answer_confidence": "yes", "answer_id": n + 1}
            for n, one in enumerate(given)
        ],
    }
    return {
        "row": row,
        "prompt": utils.vqav2_doc_to_text(row, _prompt_options("vqav2")),
        "scores": [
            [one, utils.vqav2_process_results_val(copy.deepcopy(row), [one.strip()])["exact_match"]]
            for one in answers
        ],
    }


def _gqa(rng: random.Random) -> dict[str, Any]:
    from lmms_eval.api.metrics import exact_match_fn
    from lmms_eval.tasks.gqa import utils

    answer = rng.choice(["no", "t-shirt", "light blue", "man's", "cell phone"])
    row = {
        "id": f"{rng.randrange(10**8):08d}",
        "imageId": f"n{rng.randrange(10**6)}",
        "question": "Is the cat to the left of the dog?",
        "answer": answer,
    }
    metric = _yaml(_FAMILIES["gqa"])["metric_list"][0]
    rules = {name: metric[name] for name in ("ignore_case", "ignore_punctuation")}
    answers = [
        answer,
        answer.upper(),
        f"{answer}.",
        f" {answer} \n",
        f"the {answer}",
        f"{answer} .",
        "snow",
    ]
    return {
        "row": row,
        "prompt": utils.gqa_doc_to_text(row, _prompt_options("gqa")),
        "scores": [
            [
                one,
                float(
                    exact_match_fn(predictions=[one.strip()], references=[answer], **rules)[
                        "exact_match"
                    ]
                ),
            ]
            for one in answers
        ],
    }


def _pope(rng: random.Random) -> dict[str, Any]:
    from lmms_eval.tasks.pope import utils

    options = _prompt_options("pope")
    rows, prompts, answers, scores, results = [], [], [], [], []
    for number in range(120):
        row = {
            "question_id": str(number + 1),
            "question": f" Is there a {rng.choice(['dog', 'car'])} in the image?\n",
            "answer": rng.choice(["yes", "no", "no"]),
            "image_source": f"COCO_val2014_{number // 3:012d}",
            "category": rng.choice(["random", "popular", "adversarial"]),
        }
        one = rng.choice(
            ["yes", "Yes", " no\n", "No", "Yes.", "no, it is not", "", "NO ", "yesterday"]
        )
        result = utils.pope_process_results(row, [one.strip()])
        rows.append(row)
        prompts.append(utils.pope_doc_to_text(row, options))
        answers.append(one)
        scores.append(result["pope_accuracy"]["score"])
        results.append(result["pope_accuracy"])
    figures = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    return {
        "rows": rows,
        "prompts": prompts,
        "answers": answers,
        "scores": scores,
        "figures": {
            f"pope_{name}": getattr(utils, f"pope_aggregate_{name}")(results) for name in figures
        },
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table with one line for each entry, so that diffs are readable."""
    parts = []
    for name, value in content.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            inner = ",\n".join(json.dumps(one, ensure_ascii=False) for one in value)
            parts.append(f"{json.dumps(name)}: [\n{inner}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    try:
        content = table()
    except ImportError as error:
        parser.error(f"lmms-eval cannot be imported here ({error}); docs/tasks.md says how")
    write(out, content)


if __name__ == "__main__":
    main()
