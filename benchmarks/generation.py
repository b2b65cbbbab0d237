"""Answering questions: one at a time with transformers, as the tutorials do, and ours.

    python benchmarks/generation.py [--rounds 3] [--rows 32] [--tokens 64] [--vocabulary 2048 …]
        [--ways WAY …]

A random model of five million weights (besides its embedding) with adapters of rank 64, formulas
as questions, greedy, every answer of equal length. The ways take turns, A B A B; what is compared
are the seconds of one round, and all answers must be the same. Processor seconds of one thread are
printed beside those on the wall: they hardly depend on who else keeps the machine busy.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = {"hidden": 256, "layers": 6, "vision_width": 128, "vision_layers": 6}
RANK, ALPHA, SEED = 64, 16, 42
MAX_PIXELS = 56448
PROMPT = "Write this formula in LaTeX."
BASELINE = "one at a time (transformers)"
OURS = "ours, together, images known"


@dataclass(frozen=True)
class Setting:
    """What every way is given."""

    model: Any
    encoder: Any
    caching: Any
    questions: Sequence[Any]
    tokens: int


def setting(folder: Path, vocabulary: int, rows: int, tokens: int) -> Setting:
    """A model with adapters that say something, its encoders, and questions."""
    import torch

    from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message
    from vlmtune.data.media import ImagePolicy
    from vlmtune.formulas import write_formula_table
    from vlmtune.models.contract import BaseModelIdentity, make_contract
    from vlmtune.models.encode import Encoder
    from vlmtune.models.families import load_family
    from vlmtune.models.load import load_model
    from vlmtune.testing import TinySize, tiny
    from vlmtune.training.looking import Keeping, Part, with_features
    from vlmtune.tuning.apply import apply_tuning
    from vlmtune.tuning.config import TuningConfig

    class Endless(Encoder):
        """An encoder by which no answer ends before the limit."""

        end_ids = frozenset()

    base = tiny("qwen2_vl", folder / "base", size=TinySize(**SIZE, vocabulary=vocabulary))
    family = load_family(str(base))
    contract = make_contract(
        family,
        BaseModelIdentity(id="base", weights_sha256="0" * 64),
        ImagePolicy(max_pixels=MAX_PIXELS),
        prompt=PROMPT,
    )
    torch.manual_seed(SEED)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    tuned = apply_tuning(
        model, TuningConfig(rank=RANK, alpha=ALPHA, dropout=0.0), family.facts, base_id="base"
    )
    for name, parameter in model.named_parameters():
        # Fresh layers hardly change the stream, fresh adapters nothing: answers would be all alike.
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
        elif parameter.dim() > 1 and "embed_tokens" not in name and "lora" not in name:
            parameter.data.mul_(8)
    tuned.model.eval()
    (folder / "rows").mkdir()
    table = write_formula_table(folder / "rows", rows, seed=0)
    pictures = sorted(table.parent.rglob("*.png"))[:rows]
    questions = [
        Conversation(
            str(number), (Message("user", (Image(0),)),), (EncodedImage(path.read_bytes()),)
        )
        for number, path in enumerate(pictures)
    ]
    assert len(questions) == rows
    encoder = Endless(family, contract)
    part = Part(questions, range(rows), 2)
    found = with_features(tuned.model, encoder, [part], Keeping("memory", 8, torch.float32))

    class EndlessCaching(type(found)):
        end_ids = frozenset()

    return Setting(tuned.model, encoder, EndlessCaching(found.cache), questions, tokens)


def stock(given: Setting) -> list[list[int]]:
    """Each question by itself, through the model's own ``generate``."""
    import torch
    from transformers import GenerationConfig

    from vlmtune.models.decode import pad_left

    encoder, said = given.encoder, []
    greedy = GenerationConfig(do_sample=False, pad_token_id=encoder.pad_id, eos_token_id=None)
    for question in given.questions:
        row = encoder.encode(question, ask=True)
        inputs = encoder.family.generate_inputs(pad_left(encoder, [row]))
        with torch.no_grad():
            output = given.model.generate(
                **inputs, generation_config=greedy, max_new_tokens=given.tokens
            )
        said.append(output[0, len(row.tokens) :].tolist())
    return said


def ours(given: Setting, *, rows: int, known: bool) -> list[list[int]]:
    """``generate`` of ours, as an evaluation calls it."""
    from vlmtune.models import generate as module

    said: dict[str, list[int]] = {}
    answer_of = module.answer_of

    def noted(encoder: Any, row: Any, ids: list[int]) -> Any:
        said[row.id] = ids
        return answer_of(encoder, row, ids)

    module.answer_of = noted
    try:
        module.generate(
            given.model,
            given.caching if known else given.encoder,
            given.questions,
            max_new_tokens=given.tokens,
            batch_rows=rows,
        )
    finally:
        module.answer_of = answer_of
    return [said[question.id] for question in given.questions]


WAYS: dict[str, Callable[[Setting], list[list[int]]]] = {
    BASELINE: stock,
    "ours, one at a time": lambda given: ours(given, rows=1, known=False),
    "ours, together": lambda given: ours(given, rows=32, known=False),
    OURS: lambda given: ours(given, rows=32, known=True),
}


def measured(given: Setting, rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    """Seconds of every way in every round, and whether all said the same."""
    expected: list[list[int]] = []
    seconds: dict[str, dict[str, list[float]]] = {
        way: {"wall": [], "processor": []} for way in ways
    }
    equal = dict.fromkeys(ways, True)
    for _ in range(rounds):
        for way in ways:
            wall, processor = time.perf_counter(), time.process_time()
            said = WAYS[way](given)
            seconds[way]["wall"].append(time.perf_counter() - wall)
            seconds[way]["processor"].append(time.process_time() - processor)
            expected = expected or said  # the baseline comes first
            equal[way] = equal[way] and said == expected
    first = seconds[BASELINE]
    table: dict[str, Any] = {}
    for way in ways:
        table[way] = {"equal_answers": equal[way]}
        for clock, values in seconds[way].items():
            ratios = [base / value for base, value in zip(first[clock], values, strict=True)]
            table[way][clock] = {
                "seconds": [round(value, 3) for value in values],
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_minimum": round(min(ratios), 2),
            }
    return table


def machine() -> dict[str, Any]:
    """What the numbers hold for, in general words."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": f"one thread of {os.cpu_count()} shared cores, {platform.machine()}, no GPU",
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2048, 151936])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results")
    asked = parser.parse_args()
    results: dict[str, Any] = {**machine(), "rows": asked.rows, "new_tokens": asked.tokens}
    results["vocabularies"] = {}
    for vocabulary in asked.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            given = setting(Path(folder), vocabulary, asked.rows, asked.tokens)
            ways = [BASELINE, *(way for way in asked.ways if way != BASELINE)]
            table = measured(given, asked.rounds, ways)
        results["vocabularies"][str(vocabulary)] = table
        print(f"\nvocabulary {vocabulary}: {asked.rows} questions, {asked.tokens} tokens each")
        print(f"{'':34} {'seconds':>9} {'ratio':>7} {'lowest':>7} {'of processor':>13}  answers")
        for way, row in table.items():
            wall, processor = row["wall"], row["processor"]
            print(
                f"{way:34} {min(wall['seconds']):9.2f} {wall['ratio_median']:7.2f} "
                f"{wall['ratio_minimum']:7.2f} {processor['ratio_median']:13.2f}  "
                f"{'equal' if row['equal_answers'] else 'DIFFER'}"
            )
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "generation-cpu.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
